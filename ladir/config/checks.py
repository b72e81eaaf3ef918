"""What a setting's type cannot say: ranges, and combinations that cannot work.

:func:`validate` looks at a complete :class:`~ladir.config.Config` and returns every error, each naming the setting, its
value and the remedy.  Types, names and choices are the loader's business (:mod:`ladir.config.loader`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

from ladir.config import Config, RlSettings, SampleSettings, TrainSettings
from ladir.config.suites import suite_errors

#: settings that a training under way may go on with other values of
CHANGEABLE = re.compile(r"(vae|denoiser|rollout|rl|verifier|ar)\.train\.(lr|min_lr_ratio|max_grad_norm)")


@dataclass(frozen=True)
class Range:
    """The values a number may take; ``above`` and ``below`` are exclusive, the other two inclusive."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        names = {"at_least": "at least", "at_most": "at most", "above": "above", "below": "below"}
        parts = [(label, getattr(self, name)) for name, label in names.items()]
        return " and ".join(f"{label} {bound:g}" for label, bound in parts if bound is not None)


_POSITIVE = Range(above=0)
_NOT_NEGATIVE = Range(at_least=0)
_COUNT = Range(at_least=1)
_FRACTION = Range(at_least=0, at_most=1)
_DECAY = Range(at_least=0, below=1)

#: The first pattern that matches a setting's full name is its range.
RANGES: tuple[tuple[str, Range], ...] = (
    ("run.seed", Range(at_least=0, below=2**32)),
    ("backbone.lora.rank", _NOT_NEGATIVE),
    ("backbone.lora.alpha", _POSITIVE),
    ("backbone.lora.dropout", _DECAY),
    ("data.sentences_per_block", _NOT_NEGATIVE),
    ("data.max_*", _COUNT),
    ("data.processes", _COUNT),
    ("*.train.max_grad_norm", _NOT_NEGATIVE),
    ("*.train.patience", _COUNT),
    ("*.train.max_*", _POSITIVE),
    ("*.train.*_batch", _COUNT),
    ("*.train.pack_tokens", _NOT_NEGATIVE),
    ("*.train.data_processes", _NOT_NEGATIVE),
    ("*.train.lr", _POSITIVE),
    ("*.train.heads_lr_factor", Range(above=0, at_most=1000)),
    ("*.train.min_lr_ratio", _FRACTION),
    ("*.train.*_fraction", _FRACTION),
    ("*.train.weight_decay", _NOT_NEGATIVE),
    ("*.train.beta?", _DECAY),
    ("*.train.eps", _POSITIVE),
    ("*.train.momentum", _DECAY),
    ("*.train.ema", _DECAY),
    ("*.train.*_every", _COUNT),
    ("*.train.*_minutes", _POSITIVE),
    ("*.train.validation_batches", _COUNT),
    ("*.train.keep_checkpoints", _COUNT),
    ("backbone.logits_parts", _COUNT),
    ("vae.latent_dim", _COUNT),
    ("vae.latents_per_block", _COUNT),
    ("vae.beta", _NOT_NEGATIVE),
    ("vae.latent_noise", _NOT_NEGATIVE),
    ("vae.token_substitution", _FRACTION),
    ("vae.grounded_weight", _NOT_NEGATIVE),
    ("vae.grounded_tokens", _COUNT),
    ("latents.batch_size", _COUNT),
    ("latents.pack_tokens", _NOT_NEGATIVE),
    ("latents.records_per_part", _COUNT),
    ("latents.*", _NOT_NEGATIVE),
    ("denoiser.timestep_std", _POSITIVE),
    ("denoiser.draws", _COUNT),
    ("denoiser.span", _COUNT),
    ("denoiser.independent_levels", _FRACTION),
    ("denoiser.carry_probability", _FRACTION),
    ("denoiser.carry_own_rollout", _FRACTION),
    ("denoiser.*_weight", _NOT_NEGATIVE),
    ("denoiser.token_focus", _NOT_NEGATIVE),
    ("denoiser.token_rank", _COUNT),
    ("denoiser.token_positions", _COUNT),
    ("denoiser.answer_every", _COUNT),
    ("denoiser.condition_dropout", _DECAY),
    ("denoiser.timestep_features", Range(at_least=2)),
    ("rollout.answer_weight", _NOT_NEGATIVE),
    ("rollout.num_steps", _COUNT),
    ("rollout.lag", _NOT_NEGATIVE),
    ("rollout.gradient_steps", _NOT_NEGATIVE),
    ("rollout.last_blocks", _COUNT),
    ("rollout.own_context", _FRACTION),
    ("rollout.initial_noise", _NOT_NEGATIVE),
    ("rollout.guidance_scale", Range(at_least=0, at_most=100)),
    ("rollout.candidates", _COUNT),
    ("rl.group", Range(at_least=2)),
    ("rl.*_weight", _NOT_NEGATIVE),
    ("rl.reward_seconds", _POSITIVE),
    ("rl.prompts", _COUNT),
    ("rl.answers", _COUNT),
    ("rl.updates", _COUNT),
    ("rl.questions_per_batch", _COUNT),
    ("rl.beta", _POSITIVE),
    ("rl.advantage_clip", _POSITIVE),
    ("rl.random_steps", _COUNT),
    ("rl.step_randomness", Range(above=0, at_most=1)),
    ("rl.step_clip", Range(above=0, below=1)),
    ("rl.token_clip", Range(above=0, below=1)),
    ("rl.old_decay", _DECAY),
    ("verifier.held_out", _DECAY),
    ("verifier.value_weight", _NOT_NEGATIVE),
    ("verifier.*", _COUNT),
    ("ar.copy_fraction", _DECAY),
    ("sample.num_steps", _COUNT),
    ("sample.max_*", _COUNT),
    ("sample.thoughts_per_batch", _COUNT),
    ("sample.restart_time", Range(at_least=0.01, at_most=1)),
    ("sample.restart_steps", _COUNT),
    ("sample.renoise_time", Range(at_least=0.01, at_most=1)),
    ("sample.renoise_steps", _COUNT),
    ("sample.spacing_power", Range(at_least=0.1, at_most=10)),
    ("sample.guidance_rescale", _FRACTION),
    ("sample.*", Range(at_least=0, at_most=100)),
    ("evaluate.num_*", _COUNT),
    ("evaluate.*questions_per_batch", _COUNT),
    ("evaluate.ar_batches", _COUNT),
    ("evaluate.check_seconds", _COUNT),
    ("evaluate.tolerance", Range(at_least=0, below=1)),
    ("evaluate.check_memory_mb", Range(at_least=256)),
    ("evaluate.judges", _COUNT),
    ("evaluate.voters", _COUNT),
    ("evaluate.snapshot", _COUNT),
    ("evaluate.ar_temperature", _POSITIVE),
    ("evaluate.ar_top_p", Range(above=0, at_most=1)),
    ("evaluate.ar_max_tokens", _COUNT),
    ("evaluate.examples", _NOT_NEGATIVE),
    ("telemetry.line_every_seconds", _NOT_NEGATIVE),
    ("telemetry.memory_events", _NOT_NEGATIVE),
    ("telemetry.status_every_seconds", _POSITIVE),
    ("telemetry.slow_rank_factor", Range(above=1)),
    ("telemetry.samples", _NOT_NEGATIVE),
    ("telemetry.samples_share", _NOT_NEGATIVE),
    ("telemetry.peak_tflops", _POSITIVE),
    ("deepspeed.start_seconds", _POSITIVE),
    ("deepspeed.*timeout_minutes", _POSITIVE),
    ("plan.*", _COUNT),
    ("countdown.numbers", Range(at_least=2)),
    ("countdown.max_*", Range(at_least=2)),
    ("countdown.*", _COUNT),
    ("gym.held_out_templates", _NOT_NEGATIVE),
    ("gym.vocabulary", Range(at_least=0)),
    ("gym.*", _COUNT),
)


def validate(config: Config) -> list[str]:
    """All errors in the values of ``config`` (an empty list: it is usable), one sentence each."""
    return [*_range_errors(config), *_text_errors(config), *_combination_errors(config)]


def values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting below ``config`` as (full name, value), in the order of declaration."""
    for entry in dataclasses.fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from values(value, f"{name}.")
        else:
            yield name, value


_NUMBERS: dict[Any, tuple[tuple[type, ...], str]] = {int: ((int,), "a whole number"), float: ((int, float), "a number")}


def section_errors(name: str, section: Any) -> list[str]:
    """All errors in the values of one group of settings (``"sample"``) that Python code gave, each named without the group."""
    errors = [error.removeprefix(f"{name}.") for error in _range_errors(section, f"{name}.")]
    types = typing.get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        choices, value = entry.metadata["choices"], getattr(section, entry.name)
        if choices and value not in choices:
            errors.append(f"{entry.name}={value}: must be one of {', '.join(choices)}")
        wanted, meaning = _NUMBERS.get(types[entry.name], ((object,), ""))
        if not isinstance(value, wanted):
            errors.append(f"{entry.name}={value!r}: must be {meaning}")
    return [*errors, *_interval_errors("guidance_interval", getattr(section, "guidance_interval", (0, 1)))]


def _interval_errors(name: str, interval: Any) -> Iterator[str]:
    """Of a setting that gives two times."""
    usable = isinstance(interval, (list, tuple)) and all(type(end) in (int, float) for end in interval)
    if not (usable and len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        yield f"{name}={interval}: must be two times, [low, high], with 0 <= low <= high <= 1 (1: noise)"


def _range_errors(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values(config, prefix):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            yield f"{name}={value}: must be a finite number"
            continue
        allowed = next((allowed for pattern, allowed in RANGES if fnmatchcase(name, pattern)), None)
        if allowed is not None and not allowed.holds(value):
            yield f"{name}={value}: must be {allowed}"


def _text_errors(config: Config) -> Iterator[str]:
    name = config.run.name
    if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        yield f"run.name={name!r}: must be the name of one folder; put the path before it into run.folder"
    if any(mark in config.evaluate.name for mark in "/\\\0"):
        yield f"evaluate.name={config.evaluate.name!r}: must be a part of a file's name, without a path"
    if config.evaluate.name.isdecimal():
        yield f"evaluate.name={config.evaluate.name!r}: must not be a number: so the results of evaluate.snapshot are named"
    if not config.data.answer_prefixes:
        yield "data.answer_prefixes=[]: the AR baseline writes its answers behind the first of them; name at least one"
    if any(not prefix.strip() for prefix in config.data.answer_prefixes):
        yield "data.answer_prefixes: an empty prefix would match everywhere; remove it"
    data = config.data
    if data.input_field == data.output_field:
        yield f"data.input_field and data.output_field are both {data.input_field!r}: a record needs a field for each"
    for changed in config.run.allow_changes:
        if not CHANGEABLE.fullmatch(changed):
            yield (
                f"run.allow_changes: {changed!r} cannot change under way; lr, min_lr_ratio and max_grad_norm of a training can, "
                "e.g. vae.train.lr"
            )
    wanted = config.deepspeed.stop_signal
    usable = sorted(entry.name.removeprefix("SIG") for entry in signal.Signals)
    if wanted not in usable or wanted in ("KILL", "STOP"):
        yield f"deepspeed.stop_signal={wanted!r}: must be a signal that can be caught, without SIG, e.g. USR1 or USR2"
    yield from suite_errors(config.evaluate.suite)
    if len(set(config.evaluate.methods)) != len(config.evaluate.methods):
        yield f"evaluate.methods={config.evaluate.methods}: a method stands there twice; remove one"
    for name in config.telemetry.loggers:
        if find_spec(name) is None:
            yield f"telemetry.loggers: the package {name} is not installed; pip install {name}, or leave it out"


def _combination_errors(config: Config) -> Iterator[str]:
    for name in ("vae", "denoiser", "rollout", "rl", "verifier", "ar"):
        yield from _training_errors(f"{name}.train", getattr(config, name).train)
    backbone = config.backbone
    if config.ar.from_scratch and "model_type" not in backbone.scratch:
        yield "ar.from_scratch=true: backbone.scratch must describe the new LM, at least model_type (e.g. llama)"
    if config.ar.from_scratch and backbone.tokenizer is None and backbone.name_or_path is None:
        yield "ar.from_scratch=true: a new LM brings no tokenizer; set backbone.tokenizer"
    if backbone.lora.rank > 0 and not backbone.lora.targets:
        yield "backbone.lora.targets is empty, so no layer would get an adapter; name some, or set backbone.lora.rank=0"
    if 0 < config.denoiser.token_focus < 1:
        yield (
            f"denoiser.token_focus={config.denoiser.token_focus:g}: below 1 a certain token has no finite gradient; "
            "set 0 (off) or 1 and more"
        )
    if config.denoiser.timestep_features % 2:
        yield (
            f"denoiser.timestep_features={config.denoiser.timestep_features}: must be even, every frequency has a sine and a "
            "cosine"
        )
    largest = "max_value" if config.countdown.max_target is None else "max_target"
    if config.countdown.min_target > getattr(config.countdown, largest):
        yield (
            f"countdown.min_target={config.countdown.min_target}: no target is left up to countdown.{largest}="
            f"{getattr(config.countdown, largest)}; lower the one or raise the other"
        )
    yield from _asking_errors(config)
    yield from _context_errors(config)
    window = config.telemetry.profile_steps
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        yield f"telemetry.profile_steps={window}: must be [first, last] or first:last, two steps counted from 1, or [] for none"
    if config.stage == "joint" and config.denoiser.sample_latents:
        yield "denoiser.sample_latents=true: joint training (stage=joint) takes the posterior's mean; set it to false"
    if config.ar.train.heads_lr_factor != 1:
        yield (
            f"ar.train.heads_lr_factor={config.ar.train.heads_lr_factor:g}: train_ar.py trains an LM alone, which has no fresh "
            "heads; leave it at 1"
        )
    yield from _rl_errors(config)
    if config.ar.copy_fraction > 0 and config.data.train is None:
        yield "ar.copy_fraction: there are no sentences to copy; set data.train"


def _context_errors(config: Config) -> Iterator[str]:
    """What does not go with finished blocks as latents, or as text, through which nothing can be differentiated."""
    if config.denoiser.context == "latents":
        if config.denoiser.lm_weight:
            yield (
                f"denoiser.lm_weight={config.denoiser.lm_weight:g}: no sentence stands as text whose tokens could be predicted; "
                "set denoiser.context=text, or 0"
            )
        return
    if config.rollout.enabled or config.stage == "rollout":
        yield (
            "denoiser.context=text: stage 2 has no gradient through thoughts that were read as text; set rollout.enabled=false "
            "and leave stage=rollout out"
        )
    if config.sample.verifier_scale:
        yield (
            f"sample.verifier_scale={config.sample.verifier_scale:g}: the verifier's gradient goes through latents, not through "
            "text (denoiser.context=text); set it to 0"
        )


def reads_blocks(config: Config) -> str:
    """The setting by which finished blocks are read as text before the next ones; empty where they are not."""
    text = "denoiser.context=text" if config.denoiser.context == "text" else ""
    return "sample.reencode=true" if config.sample.reencode else text


def _asking_errors(config: Config) -> Iterator[str]:
    for name, scale in (("sample", config.sample.guidance_scale), ("rollout", config.rollout.guidance_scale)):
        if scale not in (None, 1) and config.denoiser.condition_dropout == 0:
            yield (
                f"{name}.guidance_scale={scale:g}: guidance needs a denoiser that has seen hidden questions; set "
                f"denoiser.condition_dropout above 0 and retrain, or {name}.guidance_scale=1"
            )
    yield from _interval_errors("sample.guidance_interval", config.sample.guidance_interval)
    if reads_blocks(config) and config.sample.max_thought_tokens < config.data.max_block_tokens:
        yield (
            f"sample.max_thought_tokens={config.sample.max_thought_tokens}: with {reads_blocks(config)} a longer sentence would "
            f"be cut short for all that follows; set it to data.max_block_tokens={config.data.max_block_tokens} at least"
        )
    if config.sample.token_head_weight and not (config.denoiser.token_weight and config.denoiser.carry != "none"):
        yield (
            f"sample.token_head_weight={config.sample.token_head_weight:g}: needs a denoiser that was trained with a token head "
            "(denoiser.token_weight above 0) and a carried state (denoiser.carry=hidden), which the head reads"
        )
    if config.sample.lm_weight and not config.denoiser.lm_weight:
        yield (
            f"sample.lm_weight={config.sample.lm_weight:g}: needs a denoiser whose LM was trained on sentences, too; set "
            "denoiser.lm_weight above 0 (and denoiser.context=text), or 0 here"
        )
    if config.evaluate.voters is not None and config.evaluate.voters > config.evaluate.num_trajectories:
        yield (
            f"evaluate.voters={config.evaluate.voters}: there are only evaluate.num_trajectories="
            f"{config.evaluate.num_trajectories} samples to vote; lower the one or raise the other"
        )


#: rewards that the task's checker gives; any other is a function of the user's
CHECKED_REWARDS = ("answer", "chain", "both")


def _rl_errors(config: Config) -> Iterator[str]:
    rl = config.rl
    module, _, function = rl.reward.partition(":")
    if rl.reward not in CHECKED_REWARDS and not (module and function.isidentifier()):
        yield f"rl.reward={rl.reward!r}: must be one of {', '.join(CHECKED_REWARDS)}, or name a function as module:function"
    if rl.policy == "text":
        yield from _text_policy_errors(rl)
    elif rl.policy != "latents" and config.sample.answer_temperature == 0:
        yield (
            f"rl.policy={rl.policy}: answers that are not sampled have nothing to learn from one another; set "
            "sample.answer_temperature above 0, or rl.policy=latents"
        )
    if rl.answers > 1 and config.sample.answer_temperature == 0:
        yield (
            f"rl.answers={rl.answers}: with sample.answer_temperature=0 all answers to a line of thought are the same; set it "
            "above 0, or rl.answers=1"
        )
    if rl.algorithm == "flow_grpo":
        yield from _flow_grpo_errors(config)
    if rl.reward == "chain" and rl.answers > 1:
        yield f"rl.answers={rl.answers}: rl.reward=chain is of the thoughts alone; set rl.answers=1, or another reward"


def _text_policy_errors(rl: RlSettings) -> Iterator[str]:
    """A completion is its own line of thought, without steps that denoise it."""
    for name, value, needed in (("answers", rl.answers, 1), ("algorithm", rl.algorithm, "nft")):
        if value != needed:
            yield f"rl.{name}={value}: rl.policy=text has no thoughts to answer or to denoise; set rl.{name}={needed}"


def _flow_grpo_errors(config: Config) -> Iterator[str]:
    """A random step's density is known where it is the network's own alone, and depends on the noisy latents alone."""
    sample, usual = config.sample, SampleSettings()
    wanted = {"denoiser.span": (config.denoiser.span, 1), "denoiser.carry": (config.denoiser.carry, "none")}
    for name in ("sampler", "guidance_scale", "diversity_scale", "restarts"):
        wanted[f"sample.{name}"] = (getattr(sample, name), getattr(usual, name))
    for name, (value, needed) in wanted.items():
        if value != needed:
            yield f"{name}={value}: rl.algorithm=flow_grpo needs {name}={needed}; set it, or rl.algorithm=nft"
    if config.rl.random_steps >= sample.num_steps:
        yield (
            f"rl.random_steps={config.rl.random_steps}: the last of sample.num_steps={sample.num_steps} steps is never random; "
            "lower it, or take more steps"
        )
    if sample.initial_noise == 0:
        yield "sample.initial_noise=0: rl.algorithm=flow_grpo needs noise; set it above 0, or rl.algorithm=nft"
    if config.rl.policy == "answer":
        yield "rl.policy=answer: rl.algorithm=flow_grpo is of the thoughts; set rl.policy=latents or both, or leave it at nft"


def _training_errors(name: str, train: TrainSettings) -> Iterator[str]:
    if train.best is not None and train.validate_every is None:
        yield f"{name}.best={train.best}: there is one validation, the last; set {name}.validate_every"
    if train.patience is not None and train.best is None:
        yield f"{name}.patience={train.patience}: nothing says which validation is better; set {name}.best, e.g. to loss"
    if train.max_steps is None and train.max_epochs is None and train.max_seconds is None:
        yield f"{name}: training would never end; set {name}.max_steps, {name}.max_epochs or {name}.max_seconds"
    if train.schedule == "wsd" and train.warmup_fraction + train.decay_fraction > 1:
        yield (
            f"{name}: warmup_fraction + decay_fraction = {train.warmup_fraction + train.decay_fraction:g} is more than "
            "the whole training; lower one of them"
        )
