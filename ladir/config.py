"""Every setting of the stack, as dataclasses: one YAML file plus ``section.key=value`` drives all phases.

This module only declares settings (name, type, default, meaning); :mod:`ladir.config_loader` reads, checks and explains
them.  ``None`` means "not set".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its meaning and, for enumerations, its valid values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type[T], help: str, **defaults: Any) -> T:
    """A nested group of settings; ``defaults`` override the group's own."""
    return field(default_factory=lambda: cls(**defaults), metadata={"help": help})


@dataclass
class RunSettings:
    name: str = setting("ladir", "name of the run; everything it writes lies in <folder>/<name>")
    folder: str = setting("runs", "folder of all runs")
    seed: int = setting(0, "seed of initialisation, data order, noise and sampling")
    exclusive: bool = setting(
        True,
        "keep other jobs out of the run's folder; false: train_ar.py, and evaluations with a name or of a snapshot, may work in "
        "it beside LaDiR's phases and one another (not under Slurm)",
    )


@dataclass
class LoraSettings:
    rank: int = setting(0, "rank of the adapters; 0 trains all parameters instead")
    alpha: float = setting(32.0, "scale of the adapters (effective scale alpha / rank)")
    dropout: float = setting(0.0, "dropout on the adapters' input")
    targets: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "names of the linear layers that get an adapter",
    )


@dataclass
class BackboneSettings:
    name_or_path: str | None = setting(None, "causal LM of transformers: a local folder or a Hub id")
    scratch: dict[str, Any] = setting(
        {},
        "architecture of a new LM (a transformers config as a mapping: model_type, hidden_size, ...), "
        "used by train_ar.py with ar.from_scratch=true, and by plan.py where backbone.name_or_path is not at hand",
    )
    tokenizer: str | None = setting(None, "tokenizer folder or Hub id; not set: backbone.name_or_path")
    dtype: str = setting(
        "auto",
        "dtype of weights and activations; auto: bfloat16 where the device multiplies it in hardware, else float32",
        ("auto", "bfloat16", "float32"),
    )
    attention: str = setting(
        "auto",
        "attention kernel: eager and sdpa take a dense mask; flex (CUDA) costs what is visible, and leaves rows of less than "
        "1024 tokens, where that does not pay, to sdpa; flash (CUDA): flex, and "
        "flash-attn for plain text and cached prefixes; auto: on a CPU eager, and sdpa for long rows; else the first of "
        "flash, flex, sdpa that can run",
        ("auto", "eager", "sdpa", "flex", "flash"),
    )
    activation_checkpointing: str = setting(
        "none",
        "activations recomputed in the backward pass instead of stored: of no layer, of every layer, of every second layer",
        ("none", "full", "selective"),
    )
    logits_parts: int = setting(
        1,
        "the logits of a loss are made in so many parts, one after the other, and again in the backward pass: memory of one part "
        "(with 128k words and 4,096 labels all at once take several GiB); ZeRO-3 gathers the LM head for each",
    )
    compile: bool = setting(
        False, "compile the LM's layers for training (torch.compile, some minutes at the start); with ZeRO stage 0 or 2 only"
    )
    lora: LoraSettings = section(LoraSettings, "low-rank adapters (PEFT)")


@dataclass
class DataSettings:
    train: str | None = setting(None, "training records: .jsonl, .jsonl.gz, .parquet, or a Hub id read through datasets")
    validation: str | None = setting(None, "validation records: settings are chosen on them")
    test: str | None = setting(None, "test records: the final table is made on them")
    sentences: str | None = setting(None, 'extra sentences the VAE also trains on: JSONL of {"text": sentence} (optional)')
    input_field: str = setting("input", "name of the question's field")
    output_field: str = setting("output", "name of the reasoning chain's field")
    answer_field: str = setting("answer", "name of the explicit answer's field, used where a record has it")
    answer_prefixes: list[str] = setting(
        ["####", "The answer is"],
        "literal text that starts the final answer; the last occurrence counts (beside an explicit answer only where one "
        "sentence or that answer follows); the AR baseline writes the first",
    )
    sentences_per_block: int = setting(1, "sentences in one block; 0: the whole chain is one block")
    strip_calculator: bool = setting(True, "remove GSM8K's <<...>> calculator annotations from the reasoning")
    on_bad_record: str = setting(
        "error", "error: refuse the file; skip: leave the record out, count and list it", ("error", "skip")
    )
    max_question_tokens: int = setting(512, "longest question, in tokens; longer ones are bad records")
    max_block_tokens: int = setting(128, "longest block, in tokens")
    max_blocks: int = setting(32, "most blocks in a record")
    max_answer_tokens: int = setting(128, "longest answer, in tokens")


@dataclass
class TrainSettings:
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    max_epochs: float | None = setting(None, "stop after this many passes over the data")
    max_seconds: float | None = setting(None, "stop after this many seconds of training (start-up not counted)")
    global_batch: int = setting(128, "samples in one optimizer step, over all ranks and micro batches")
    micro_batch: int = setting(8, "most samples in one forward pass of one rank; accumulation follows from it")
    pack_tokens: int = setting(
        0, "samples of a micro batch are laid end to end in rows of about this many tokens; 0: a row for every sample"
    )
    data_processes: int = setting(
        0,
        "processes per rank that make batches ahead; 0: a thread of the training process, enough unless a step is shorter "
        "than it takes to make its batch (data_wait)",
    )
    lr: float = setting(1e-5, "peak learning rate")
    min_lr_ratio: float = setting(0.1, "final learning rate as a fraction of the peak")
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up; wsd: constant, then linear decay in the last decay_fraction",
        ("constant", "cosine", "linear", "wsd"),
    )
    warmup_fraction: float = setting(0.03, "fraction of the training spent warming up linearly")
    decay_fraction: float = setting(0.2, "fraction of the training spent decaying (schedule=wsd)")
    optimizer: str = setting(
        "adamw",
        "muon: orthogonalised momentum for the matrices of the LM's layers, in steps as long as AdamW's, which takes the rest",
        ("adamw", "muon"),
    )
    weight_decay: float = setting(0.01, "decoupled weight decay (matrices only)")
    beta1: float = setting(0.9, "AdamW beta1")
    beta2: float = setting(0.999, "AdamW beta2")
    eps: float = setting(1e-8, "AdamW epsilon")
    momentum: float = setting(0.95, "Muon's momentum")
    max_grad_norm: float = setting(1.0, "gradient clipping norm; 0: off")
    ema: float = setting(0.0, "decay of the exponential moving average of the weights; 0: off")
    log_every: int = setting(10, "steps between metric lines")
    validate_every: int | None = setting(None, "steps between validations; not set: only at the end")
    validation_batches: int = setting(8, "global batches in one validation")
    checkpoint_every: int | None = setting(None, "steps between checkpoints; not set: only when stopped and at the end")
    keep_checkpoints: int = setting(2, "newest checkpoints kept")
    snapshot_every: int | None = setting(
        None,
        "steps between models that are kept as they then are (models/<phase>-<step>), for what longer training brings "
        "(evaluate.snapshot); not set: none",
    )


@dataclass
class VaeSettings:
    latent_dim: int = setting(512, "size d of one thought token")
    latents_per_block: int = setting(4, "thought tokens L per block")
    beta: float = setting(1e-5, "weight of the KL term (summed over d, mean over latents)")
    latent_noise: float = setting(3.0, "standard deviation k of the noise added to z in training")
    token_substitution: float = setting(0.3, "probability that an encoder input token is replaced by a random one in training")
    decoder: str = setting("frozen", "frozen: the base LM as it is; trained: a second LM trained along", ("frozen", "trained"))
    train: TrainSettings = section(TrainSettings, "training of the VAE", max_epochs=2.0, lr=2e-5)


@dataclass
class LatentSettings:
    batch_size: int = setting(64, "sentences encoded in one forward pass of one rank")
    pack_tokens: int = setting(0, "sentences are laid end to end in rows of about this many tokens; 0: a row for every sentence")
    records_per_part: int = setting(1024, "records a rank encodes between two looks at the stop signal; finished parts are kept")


@dataclass
class DenoiserSettings:
    objective: str = setting("velocity", "what the network predicts", ("velocity", "x0", "epsilon", "v"))
    timesteps: str = setting("uniform", "distribution of t in training", ("uniform", "logit_normal"))
    timestep_mean: float = setting(0.0, "mean of logit(t) (timesteps=logit_normal); positive: towards noise")
    timestep_std: float = setting(1.0, "standard deviation of logit(t) (timesteps=logit_normal)")
    draws: int = setting(4, "noise draws M per block and step")
    span: int = setting(
        1, "blocks that are denoised together, each at a noise level of its own: a block sees the next ones of its span form"
    )
    independent_levels: float = setting(
        0.5,
        "share of a span's noisy copies whose blocks draw their levels independently; in the others the blocks before a random "
        "one are finished and those behind it noise (span above 1)",
    )
    flow_weight: float = setting(5.0, "weight of the flow loss")
    answer_weight: float = setting(1.0, "weight of the answer's cross-entropy")
    stop_weight: float = setting(1.0, "weight of the stop head's cross-entropy")
    token_weight: float = setting(0.0, "weight of the auxiliary token head (training only); 0: no such head")
    token_rank: int = setting(64, "rank of the auxiliary token head")
    token_positions: int = setting(32, "first tokens of a block that the auxiliary token head predicts")
    answer_every: int = setting(1, "the answer, the stop decisions and the last clean block are part of every n-th step only")
    bidirectional_question: bool = setting(
        False,
        "a question's tokens all see each other; false: only those before them, as pretrained LMs learned to read (true is for "
        "LMs made from scratch)",
    )
    condition_dropout: float = setting(0.1, "probability that a question is hidden (classifier-free guidance)")
    init_from_vae: bool = setting(True, "start the latent maps from the VAE's")
    sample_latents: bool = setting(False, "draw z from the encoder's posterior instead of taking its mean")
    timestep_features: int = setting(256, "sinusoidal features of t")
    train: TrainSettings = section(TrainSettings, "training of the denoiser, stage 1", max_epochs=20.0, lr=1e-5, global_batch=64)


@dataclass
class RolloutSettings:
    enabled: bool = setting(
        True,
        "whether make demo, slurm/submit.sh and plan.py include stage 2; train_denoiser.py stage=rollout trains it in any case",
    )
    answer_weight: float = setting(1.0, "weight of the answer's cross-entropy through the model's own blocks")
    num_steps: int = setting(10, "Euler steps per block")
    lag: int = setting(2, "steps by which a block of a span starts after the one before it (denoiser.span above 1)")
    gradient_steps: int | None = setting(None, "last steps of a block that carry gradient; not set: all")
    last_blocks: int | None = setting(
        None,
        "blocks of a record, counted from its end, that are the model's own; not set: all (as in the paper; in small models it "
        "costs accuracy, the last block alone does not)",
    )
    own_context: float = setting(
        1.0,
        "share of steps whose flow loss stands behind the model's own blocks (in small models this costs accuracy: 0); in the "
        "others it stands behind the true ones",
    )
    initial_noise: float = setting(1.0, "scale of the noise a block starts from")
    gold: str = setting(
        "nearest",
        "which gold solution is trained towards where a question has several of as many blocks; nearest: to the model's own "
        "blocks (mean square of the latents); sampled: the record that was drawn",
        ("nearest", "sampled"),
    )
    candidates: int = setting(8, "most gold solutions that are compared (gold=nearest)")
    train: TrainSettings = section(TrainSettings, "training of the denoiser, stage 2", max_epochs=20.0, lr=1e-5, global_batch=12)


@dataclass
class ArSettings:
    phase: str = setting("ar", "name of the phase, and of the model folder it writes: models/<phase>")
    from_scratch: bool = setting(False, "build a new LM from backbone.scratch instead of loading backbone.name_or_path")
    copy_fraction: float = setting(0.0, "share of samples that ask to repeat a sentence (teaches a frozen decoder to copy)")
    bidirectional_question: bool = setting(
        False,
        "the same as denoiser.bidirectional_question, for the LM that train_ar trains (baseline or base LM); its folder keeps it "
        "for the evaluation. Training then takes flex or sdpa in place of flash-attn",
    )
    train: TrainSettings = section(TrainSettings, "chain-of-thought fine-tuning", max_epochs=3.0, lr=1e-5)


@dataclass
class SampleSettings:
    num_steps: int = setting(10, "Euler steps per block")
    lag: int = setting(
        2,
        "steps by which a block of a span starts after the one before it (denoiser.span above 1); 0: all together; num_steps: "
        "one after another",
    )
    sampler: str = setting("ode", "ode: deterministic; sde: fresh noise at every step", ("ode", "sde"))
    spacing: str = setting(
        "uniform",
        "times of the steps, u being the share of them done; uniform: 1 - u; cosine: cos(pi u / 2), shorter steps near noise; "
        "power: (1 - u) ** spacing_power",
        ("uniform", "cosine", "power"),
    )
    spacing_power: float = setting(
        2.0, "exponent (spacing=power); above 1: shorter steps near the finished block, below 1: near noise"
    )
    initial_noise: float = setting(1.0, "scale of the noise a block starts from (acts as a temperature)")
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1: off, 0: as if there were no question")
    diversity_scale: float = setting(
        0.0, "gamma_max of the diversity guidance among the trajectories of a question, three or more; 0: off"
    )
    restarts: int = setting(
        0,
        "times that a finished block is noised again and denoised anew: what does not fit together in it is found a second time",
    )
    restart_time: float = setting(0.9, "time back to which a restart goes; 1: nothing is left of the block")
    restart_steps: int = setting(5, "Euler steps of a restart")
    reencode: bool = setting(
        False,
        "read every finished block as text and encode that again: what follows reads latents as the VAE makes them; the export "
        "then holds the VAE's encoder, too",
    )
    max_blocks: int = setting(32, "blocks after which the answer is forced; below data.max_blocks long chains are cut short")
    max_answer_tokens: int = setting(128, "longest answer, in tokens; below data.max_answer_tokens long ones are cut short")
    max_thought_tokens: int = setting(
        128, "longest text of a decoded block, in tokens; below data.max_block_tokens long ones are cut short"
    )
    answer_temperature: float = setting(0.7, "temperature of the answer's tokens; 0: greedy")


@dataclass
class EvaluateSettings:
    task: str = setting("countdown", "which checker judges the answers", ("countdown", "maths", "code"))
    check_seconds: float = setting(
        5.0, "processor time that judging one answer (a program, a formula) may take; beyond it, it is wrong"
    )
    check_memory_mb: int = setting(
        1024, "memory that judging one answer takes, in MiB; of a program, all its processes together (16 at most)"
    )
    isolation: str = setting(
        "namespaces",
        "how programs are shut in (task=code); namespaces: no network, no files, no other processes; limits: only limits and an "
        "empty folder, for a container without namespaces that can be thrown away (what a program detaches may go on in it)",
        ("namespaces", "limits"),
    )
    judges: int | None = setting(
        None,
        "answers that each rank judges at a time; not set: as many programs as it has threads (task=code, isolation=namespaces), "
        "else one",
    )
    split: str = setting("test", "which records are asked", ("validation", "test"))
    num_questions: int | None = setting(None, "first questions of the split that are asked; not set: all")
    num_trajectories: int = setting(100, "samples per question")
    questions_per_batch: int = setting(20, "questions answered in one batch")
    ar_temperature: float = setting(1.0, "temperature of the AR baseline's samples")
    ar_max_tokens: int = setting(256, "longest AR answer (reasoning included), in tokens")
    snapshot: int | None = setting(
        None, "ask the models of this training step (train.snapshot_every) in place of the finished ones; results-<step>.json"
    )
    methods: list[str] = setting(
        ["ar-greedy", "ar", "ar-majority", "ladir", "ladir-zero-noise", "ladir-sde", "ladir-majority", "ladir-rollout"],
        "rows of the table; -majority: the most frequent answer among the samples of ar or ladir; -consistent: the most frequent "
        "one among those whose reasoning agrees with their answer; ladir-rollout: left out where that stage was not trained",
        (
            "ar",
            "ar-greedy",
            "ar-majority",
            "ar-consistent",
            "ladir",
            "ladir-zero-noise",
            "ladir-sde",
            "ladir-majority",
            "ladir-consistent",
            "ladir-rollout",
        ),
    )
    voters: int | None = setting(
        None, "samples that vote on one answer; fewer than num_trajectories: the mean over separate votes; not set: all of them"
    )
    examples: int = setting(3, "questions printed with their thoughts")
    name: str = setting(
        "", "set: results-<name>.json and generations-<name>.jsonl are written instead, to stand beside the others in a report"
    )


@dataclass
class TelemetrySettings:
    tensorboard: bool = setting(True, "write TensorBoard event files")
    progress: str = setting("auto", "auto: a bar on a terminal, lines in a log", ("auto", "bar", "lines"))
    line_every_seconds: float = setting(10.0, "least seconds between two progress lines in a log")
    samples: int = setting(4, "held-out samples shown in TensorBoard (text, histograms, pictures) at every validation; 0: none")
    peak_tflops: float | None = setting(
        None, "peak TFLOP/s of one device, for the MFU; not set: that of a large matrix product, measured at the start"
    )


@dataclass
class DeepSpeedSettings:
    config: str = setting("ds_configs/zero3.json", "DeepSpeed configuration (ZeRO stage, offload, communication)")
    timeout_minutes: float = setting(30.0, "longest wait for another rank (start-up, checkpoints) before the job is ended")
    step_timeout_minutes: float = setting(5.0, "longest wait for another rank within a training step, after the first one")
    sharded_loading: bool = setting(
        True, "ZeRO-3 on several processes: pretrained weights are split while they are read, so that none holds a whole LM"
    )
    leaf_layers: bool = setting(
        False,
        "ZeRO-3 gathers and reduces each LM layer as one unit where a pass runs it once: a quarter of the hooks, which cost a "
        "small model as much time as its arithmetic; more is gathered at a time",
    )
    stop_signal: str = setting("USR2", "signal that asks for a checkpoint and a clean stop (TERM always does)")


@dataclass
class PlanSettings:
    samples: int | None = setting(None, "training records; not set: counted in data.train")
    question_tokens: int | None = setting(None, "mean tokens of a question; not set: measured in data.train, else half the limit")
    blocks: int | None = setting(None, "mean blocks of a record; not set: likewise")
    block_tokens: int | None = setting(None, "mean tokens of a block; not set: likewise")
    answer_tokens: int | None = setting(None, "mean tokens of an answer; not set: likewise")


@dataclass
class CountdownSettings:
    numbers: int = setting(3, "numbers per puzzle")
    max_number: int = setting(20, "largest given number (smallest is 1)")
    max_value: int = setting(100, "largest target and intermediate result (smallest is 1)")
    min_target: int = setting(1, "smallest target")
    max_target: int | None = setting(None, "largest target; not set: countdown.max_value")
    train: int = setting(14000, "training puzzles")
    validation: int = setting(300, "validation puzzles")
    test: int = setting(500, "test puzzles")
    solutions_per_puzzle: int = setting(2, "most gold solutions written per training puzzle, one record each")
    orders: str = setting(
        "one",
        "one: solutions that differ only in the order of sums, products and their steps count as one; all: each counts",
        ("one", "all"),
    )


@dataclass
class Config:
    stage: str = setting(
        "teacher",
        "what train_denoiser.py trains; teacher: stage 1, behind the true blocks; rollout: stage 2, through the model's own",
        ("teacher", "rollout"),
    )
    run: RunSettings = section(RunSettings, "where a run lies and its seed")
    backbone: BackboneSettings = section(BackboneSettings, "the language model")
    data: DataSettings = section(DataSettings, "records and their blocks")
    countdown: CountdownSettings = section(CountdownSettings, "the Countdown generator (python -m ladir countdown)")
    vae: VaeSettings = section(VaeSettings, "sentence <-> thought tokens")
    latents: LatentSettings = section(LatentSettings, "encoding the training set")
    denoiser: DenoiserSettings = section(DenoiserSettings, "the flow-matching denoiser")
    rollout: RolloutSettings = section(RolloutSettings, "the denoiser's stage 2: the answer through blocks it generates itself")
    ar: ArSettings = section(ArSettings, "the autoregressive baseline")
    sample: SampleSettings = section(SampleSettings, "how a block and an answer are generated")
    evaluate: EvaluateSettings = section(EvaluateSettings, "the evaluation")
    telemetry: TelemetrySettings = section(TelemetrySettings, "what people look at")
    deepspeed: DeepSpeedSettings = section(DeepSpeedSettings, "the engine")
    plan: PlanSettings = section(PlanSettings, "what training/plan.py assumes of the data; no phase reads it")
