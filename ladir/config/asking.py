"""How a trained model is asked, and how its answers are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ladir.config.declare import setting


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
    initial_noise: float = setting(
        1.0, "scale of the noise a block starts from, and of what an SDE adds at every step (acts as a temperature)"
    )
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1: off, 0: as if there were no question")
    guidance_interval: list[float] = setting(
        [0.0, 1.0],
        "times t (1: noise) between which guidance bends a step, both ends included; at others the step is that of the question",
    )
    guidance_rescale: float = setting(
        0.0,
        "share phi to which a guided estimate of the clean block gets back the standard deviation it has without guidance, which "
        "strong guidance enlarges; 0: off, .7 in its source",
    )
    diversity_scale: float = setting(
        0.0,
        "gamma_max of the diversity guidance among the trajectories of a question, three or more; 0: off; the force is a mean "
        "over the others, the paper's sum is (num_trajectories - 1) times as large",
    )
    verifier_scale: float = setting(
        0.0,
        "how strongly blocks are drawn, at every step, to where the verifier thinks that the answer will be right; 0: off. Each "
        "step then takes another pass of the LM and its gradient",
    )
    renoise_time: float = setting(
        0.5, "time back to which finished thoughts are noised to see how far they drift (row -stable, choose=stable)"
    )
    renoise_steps: int = setting(5, "Euler steps in which they are denoised again")
    restarts: int = setting(
        0,
        "times that a finished block is noised again and denoised anew: what does not fit together in it is found a second time",
    )
    restart_time: float = setting(0.9, "time back to which a restart goes; 1: nothing is left of the block")
    restart_steps: int = setting(5, "Euler steps of a restart")
    restart_keeps_state: bool = setting(False, "a restart goes on with the carried state (denoiser.carry); false: with zeros")
    reencode: bool = setting(
        False,
        "read every finished block as text and encode that again: what follows reads latents as the VAE makes them; the export "
        "then holds the VAE's encoder, too",
    )
    token_head_weight: float = setting(
        0.0,
        "weight of the denoiser's token head beside the VAE's decoder where a finished block is read as text (reencode, or "
        "denoiser.context=text): a product of both, and the sentence ends where it would without the head; 0: without",
    )
    lm_weight: float = setting(
        0.0,
        "weight of what the denoiser's LM expects to be written next (denoiser.lm_weight) beside the VAE's decoder where a "
        "finished block is read as text: a product of both, which also ends the sentence; 0: none",
    )
    thought_temperature: float = setting(
        0.0,
        "temperature at which a finished block is read as text (reencode, or denoiser.context=text), of whatever has a say "
        "there; 0: the likeliest tokens",
    )
    max_blocks: int = setting(32, "blocks after which the answer is forced; below data.max_blocks long chains are cut short")
    max_answer_tokens: int = setting(128, "longest answer, in tokens; below data.max_answer_tokens long ones are cut short")
    max_thought_tokens: int = setting(
        128, "longest text of a decoded block, in tokens; below data.max_block_tokens long ones are cut short"
    )
    thoughts_per_batch: int = setting(
        4096, "blocks that are read as text at a time, of whichever trajectories; more of them take fewer passes and more memory"
    )
    answer_temperature: float = setting(0.7, "temperature of the answer's tokens; 0: greedy")


@dataclass
class EvaluateSettings:
    task: str = setting("countdown", "which checker judges the answers", ("countdown", "maths", "code"))
    check_seconds: float = setting(
        5.0, "processor time that judging one answer (a program, a formula) may take; beyond it, it is wrong"
    )
    check_memory_mb: int = setting(
        1024, "memory that judging one answer takes, in MiB; of a program, all its processes together (40 at most)"
    )
    tolerance: float = setting(
        0.0,
        "a gold number with decimals accepts answers within such a share of it, a whole one those that round to it (task=maths), "
        "as TheoremQA's authors judge with 0.04, which that set of maths7 has; 0: answers that equal it",
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
    suite: list[Any] = setting(
        [],
        "several data sets in one table; names (maths7, code4, countdown, or one of their sets) and mappings {name: NAME, "
        "data.test: FILE, evaluate.task: TASK, ...}, each with whatever settings of data, evaluate and sample are its own; "
        "[]: data.test alone",
    )
    suite_folder: str = setting(
        "data/benchmarks", "folder of the files of data sets given by name: NAME.jsonl (.json, .jsonl.gz, .parquet), NAME/test.*"
    )
    split: str = setting("test", "which records are asked", ("validation", "test", "test_held_out"))
    num_questions: int | None = setting(None, "first questions of the split that are asked; not set: all")
    num_trajectories: int = setting(100, "samples per question")
    questions_per_batch: int = setting(20, "questions answered in one batch")
    greedy_questions_per_batch: int = setting(
        200, "the same for rows of one answer per question (ar-greedy, ladir-zero-noise), of which many fill a batch"
    )
    ar_batches: int = setting(
        4,
        "most batches of questions that the AR baseline is given at a time: as completions end the next questions join, so that "
        "none waits for the longest; memory is that of one batch",
    )
    left_out: str = setting(
        "count",
        "questions of the file that are not asked (data.on_bad_record=skip); count: as questions without a right answer; "
        "exclude: all figures are of the questions asked",
        ("count", "exclude"),
    )
    on_bad_gold: str = setting(
        "error",
        "records whose own answer is refused by the task's checker; error: refuse the file; skip: leave them out of everything, "
        "counted and listed; ignore: ask them all the same",
        ("error", "skip", "ignore"),
    )
    ar_temperature: float = setting(1.0, "temperature of the AR baseline's samples")
    ar_top_p: float = setting(
        1.0, "the AR baseline's samples are of the likeliest tokens that have this probability together (nucleus); 1: of all"
    )
    ar_max_tokens: int = setting(256, "longest AR answer (reasoning included), in tokens")
    snapshot: int | None = setting(
        None, "ask the models of this training step (train.snapshot_every) in place of the finished ones; results-<step>.json"
    )
    lane: str = setting(
        "all",
        "which rows a job asks; ladir or ar: those of these models alone, whose answers it keeps, so that two jobs ask side by "
        "side (run.exclusive=false); table: none, it writes the table of what both have kept; all: everything",
        ("all", "ladir", "ar", "table"),
    )
    methods: list[str] = setting(
        [
            "ar-greedy",
            "ar",
            "ar-majority",
            "ladir",
            "ladir-zero-noise",
            "ladir-sde",
            "ladir-majority",
            "ladir-rollout",
            "ladir-rl",
            "ar-rl",
        ],
        "rows of the table; -majority: the most frequent answer among the samples of ar or ladir; -consistent: the most frequent "
        "one among those whose reasoning agrees with their answer; -best: of the sample with the verifier's highest score; "
        "-weighted: with the largest sum of scores; -stable: of the sample whose thoughts move least when they are noised and "
        "denoised again; ladir-rollout, ladir-rl, ar-rl: left out where that stage was not trained",
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
            "ladir-best",
            "ladir-weighted",
            "ladir-stable",
            "ladir-rollout",
            "ladir-rollout-majority",
            "ladir-rollout-consistent",
            "ladir-rollout-best",
            "ladir-rollout-weighted",
            "ladir-rollout-stable",
            "ladir-rl",
            "ladir-rl-majority",
            "ladir-rl-consistent",
            "ladir-rl-best",
            "ladir-rl-weighted",
            "ladir-rl-stable",
            "ar-rl",
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
class ExportSettings:
    merge_lora: bool = setting(
        False,
        "merge LoRA adapters into copies of the weights they stand on, shard by shard: the export needs no other LM and no PEFT, "
        "and holds whole LMs (of the frozen decoder a second one)",
    )
    copy_base: bool = setting(
        False,
        "copy the LM under LoRA adapters, or a frozen decoder of the Hub, into the export; else it is named: a folder as it is "
        "seen from the export, an LM of the Hub by its id",
    )
    license: str | None = setting(
        None, "licence of the model as the Hub calls it (apache-2.0, llama3.1, ...), for its card; not set: none is stated"
    )
