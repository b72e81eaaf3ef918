"""What runs the phases: telemetry, engine, planning."""

from __future__ import annotations

from dataclasses import dataclass

from ladir.config.declare import setting


@dataclass
class TelemetrySettings:
    loggers: list[str] = setting(
        ["tensorboard"],
        "where records go beside metrics.jsonl; wandb and mlflow where their packages are installed (pip install wandb, mlflow), "
        "set up by their own environment variables; []: nowhere",
        ("tensorboard", "wandb", "mlflow"),
    )
    progress: str = setting("auto", "auto: a bar on a terminal, lines in a log", ("auto", "bar", "lines"))
    line_every_seconds: float = setting(10.0, "least seconds between two progress lines in a log")
    status_every_seconds: float = setting(5.0, "seconds between two writings of status.json, which python -m ladir status reads")
    slow_rank_factor: float = setting(
        1.3,
        "a rank whose own forward passes (ZeRO-3, where they wait for others: matrix products) take so many times as long as the "
        "median rank's, in three log lines on end, is named in a warning",
    )
    profile_steps: list[int] = setting(
        [],
        "[first, last], or first:last: these training steps are traced by PyTorch's profiler, a file per rank in "
        "profile/<phase>; []: none",
    )
    nvtx: bool = setting(
        False, "name the parts of a step (forward, backward, optimizer step, ...) for NVIDIA's Nsight Systems; CUDA only"
    )
    memory_events: int = setting(
        0,
        "where a GPU's memory runs out, in a training, an evaluation or elsewhere, memory/<phase> says what lay in it "
        "(pytorch.org/memory_viz); this many allocations before that are told with the code that made them, which costs a little "
        "time; 0: none",
    )
    samples: int = setting(4, "held-out samples shown in TensorBoard (text, histograms, pictures) at validations; 0: none")
    samples_share: float = setting(
        0.02,
        "share of a training's seconds that showing samples may take: a validation at which it would be more shows none, but for "
        "the first and the last one; 0: these alone",
    )
    peak_tflops: float | None = setting(
        None, "peak TFLOP/s of one device, for the MFU; not set: that of a large matrix product, measured at the start"
    )


@dataclass
class DeepSpeedSettings:
    config: str = setting(
        "ds_configs/zero3.json",
        "DeepSpeed configuration (ZeRO stage, offload, communication); a phase may have its own (<phase>.train.deepspeed)",
    )
    start_seconds: float = setting(50.0, "longest wait until all processes of a job have started; more where they load slowly")
    timeout_minutes: float = setting(30.0, "longest wait for another rank (loading, checkpoints) before the job is ended")
    step_timeout_minutes: float = setting(5.0, "longest wait for another rank within a training step, after the first one")
    preflight: str = setting(
        "warn",
        "before anything is loaded every rank multiplies matrices and all add up numbers; one that computes wrongly is refused "
        "with its name and node, and one that takes telemetry.slow_rank_factor times as long as the median rank is warned of, or "
        "refused, too; off: not looked at",
        ("off", "warn", "refuse"),
    )
    sharded_loading: bool = setting(
        True, "ZeRO-3 on several processes: pretrained weights are split while they are read, so that none holds a whole LM"
    )
    leaf_layers: bool = setting(
        False,
        "ZeRO-3 gathers and reduces each LM layer as one unit where a pass runs it once: a quarter of the hooks, which cost a "
        "small model as much time as its arithmetic; more is gathered at a time",
    )
    stop_signal: str = setting("USR2", "signal that asks for a checkpoint and a clean stop (TERM always does)")


_STAGES = ("data", "base", "vae", "latents", "denoiser", "rl", "export", "ar", "ar-rl", "evaluate", "report")


@dataclass
class DemoSettings:
    data: str = setting(
        "countdown",
        "records that are made first; countdown: puzzles (countdown.*); gym: of a set of reasoning-gym (gym.*)",
        ("countdown", "gym"),
    )
    stages: list[str] = setting(
        list(_STAGES),
        "what is run, always in this order; stage 2 behind the denoiser where rollout.enabled, rl and ar-rl (stage 3 of LaDiR "
        "and of the baseline) where rl.enabled; without data and base: records and LM are those that data.* and "
        "backbone.name_or_path name",
        _STAGES,
    )


@dataclass
class PlanSettings:
    samples: int | None = setting(None, "training records; not set: counted in data.train")
    question_tokens: int | None = setting(None, "mean tokens of a question; not set: measured in data.train, else half the limit")
    blocks: int | None = setting(None, "mean blocks of a record; not set: likewise")
    block_tokens: int | None = setting(None, "mean tokens of a block; not set: likewise")
    answer_tokens: int | None = setting(None, "mean tokens of an answer; not set: likewise")
