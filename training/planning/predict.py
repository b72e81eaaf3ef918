"""A phase's memory, data and time, put together from weights, traces and the engine's rules."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from ladir.config import Config, TrainSettings
from ladir.inference.rollout import Rollout
from ladir.inference.sampler import passes_per_span
from ladir.models.backbone import DTYPES, choose_dtype
from ladir.models.vae import Vae
from training.planning.memory import Holdings, Weight, Zero, checkpoint_bytes, holdings, taking_in, weights_of
from training.planning.models import PHASES, DataSize, Lengths, data_size, lm_config, meta_model, micro_batch
from training.planning.trace import Pass, TakingIn, at_no_cost, trace_inference, trace_long_rollout, trace_training
from training.runtime.ds_config import read_ds_config
from training.runtime.sampler import micro_batch_size

GIB = 2**30
#: what splits least, where there are several GPUs
_LIGHTEST = "ds_configs/zero2.json"
#: offloading that is tried, mildest first, where a phase does not fit
_LADDER = ("ds_configs/zero3.json", "ds_configs/zero3_offload_optimizer.json", "ds_configs/zero3_offload.json")


@dataclass(frozen=True)
class Machine:
    """What a job runs on; ``reserve``: bytes per GPU for CUDA, NCCL and the allocator's losses."""

    gpus: int
    gpus_per_node: int
    gpu_bytes: int
    reserve: int
    flops: float
    mfu: float
    launch_seconds: float = 20e-6
    """What it takes the host to launch one operator (docs/benchmark.md: 20 to 28 us beside an H200)."""

    @property
    def ranks_per_node(self) -> int:
        """Processes on one node."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Prediction:
    """One phase: bytes per GPU unless said otherwise; ``remedy`` says what makes it fit where it does not."""

    phase: str
    holdings: Holdings
    activations: int
    capacity: int
    host_per_node: int
    checkpoint: int
    model_folder: int
    setup: str
    samples: int
    tokens: int
    steps: float | None
    seconds: float
    epochs: float | None
    remedy: str = ""
    lighter: str = ""
    """The DeepSpeed file that splits less and fits as well."""
    bound: str = ""
    """What the time is that of, where not of arithmetic."""

    @property
    def peak(self) -> int:
        """Most bytes on a GPU: resident, and the larger of a pass (activations, gathered weights) and a step."""
        held = self.holdings
        return held.resident + max(self.activations + held.gathered, held.step)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the GPU's memory, the reserve left out."""
        return self.peak <= self.capacity


class Planner:
    """Predicts phases of one configuration on one machine; traces are made once."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.data: DataSize = data_size(config)
        self.element_bytes = DTYPES[choose_dtype(config.backbone.dtype, "cuda")].itemsize
        self.architecture = lm_config(config.backbone).get_text_config()
        self._models: dict[tuple[str, str, int], nn.Module] = {}
        self._peaks: dict[tuple[Zero, str, str, int, int], int] = {}
        self._mean_passes: dict[tuple[str, int], Pass] = {}

    def predictions(self) -> Iterator[Prediction]:
        """All phases in the order in which they run."""
        yield self.training("vae")
        yield self.encode()
        yield self.training("denoiser")
        if self.config.rollout.enabled:
            yield self.training("rollout")
        yield self.training("ar")
        yield self.evaluate()

    def train_settings(self, phase: str) -> TrainSettings:
        """The phase's own training settings."""
        train: TrainSettings = getattr(self.config, phase).train
        return train

    def training(self, phase: str) -> Prediction:
        """A training phase, with the remedy where it does not fit."""
        train, backbone = self.train_settings(phase), self.config.backbone
        micro = micro_batch_size(train.global_batch, self.machine.gpus, train.micro_batch)
        found = self._attempt(phase, self.config, micro)
        if not found.fits:
            return replace(found, remedy=self._remedy(phase, micro, backbone.activation_checkpointing))
        return replace(found, lighter=self._lighter(phase, found))

    def _lighter(self, phase: str, found: Prediction) -> str:
        """The first of the usual DeepSpeed files before ours that fits as well; "" where there is none.

        What a pass allocates is no more there: only splitting takes memory for a gradient on its way.
        """
        train, own = self.train_settings(phase), self.config.deepspeed.config
        usual = [*(["ds_configs/zero0.json"] if self.machine.gpus == 1 else [_LIGHTEST]), *_LADDER]
        for path in usual[: usual.index(own)] if own in usual else []:
            zero = Zero.of(read_ds_config(path), self.machine.gpus, self.element_bytes)
            held = holdings(weights_of(self._model(phase, self.config), train.optimizer), zero, train.ema > 0)
            if replace(found, holdings=held).fits:
                return path
        return ""

    def _attempt(self, phase: str, config: Config, micro: int) -> Prediction:
        """The phase under ``config`` (which may differ from ours in checkpointing, offloading and adapters)."""
        train, machine = self.train_settings(phase), self.machine
        checkpointing, rank = config.backbone.activation_checkpointing, config.backbone.lora.rank
        weights = weights_of(self._model(phase, config), train.optimizer)
        zero = Zero.of(read_ds_config(config.deepspeed.config), machine.gpus, self.element_bytes)
        held = holdings(weights, zero, train.ema > 0)
        samples = self.data.samples * (self.data.mean.blocks if phase == "vae" else 1)
        arithmetic = samples * self._mean_pass(phase, config).flops / self._speed
        launching = samples / micro / machine.gpus * self._launches(phase, config) * machine.launch_seconds
        return Prediction(
            phase=phase,
            holdings=held,
            activations=self._activations(phase, config, micro, zero),
            capacity=machine.gpu_bytes - machine.reserve,
            host_per_node=held.host * machine.ranks_per_node,
            checkpoint=checkpoint_bytes(weights, train.ema > 0),
            model_folder=self.element_bytes * sum(w.numel for w in _saved(phase, weights, rank)),
            setup=f"micro {micro} x {train.global_batch // micro // machine.gpus}, recompute {checkpointing}",
            samples=samples,
            tokens=samples * self._tokens(phase),
            steps=samples / train.global_batch,
            seconds=max(arithmetic, launching),
            epochs=train.max_epochs,
            bound="launches" if launching > arithmetic else "",
        )

    @property
    def _speed(self) -> float:
        """Useful FLOPs per second of the whole job."""
        return self.machine.gpus * self.machine.flops * self.machine.mfu

    def _model(self, phase: str, config: Config) -> nn.Module:
        key = (phase, config.backbone.activation_checkpointing, config.backbone.lora.rank)
        if key not in self._models:
            self._models[key] = meta_model(config, phase, key[1])
        return self._models[key]

    def _activations(self, phase: str, config: Config, micro: int, zero: Zero) -> int:
        """Peak bytes of a pass over ``micro`` of the longest records."""
        key = (zero, phase, config.backbone.activation_checkpointing, config.backbone.lora.rank, micro)
        if key not in self._peaks:
            self._peaks[key] = self._trace(phase, config, self.data.longest, micro, partial(taking_in, zero=zero)).peak_bytes
        return self._peaks[key]

    def _mean_pass(self, phase: str, config: Config) -> Pass:
        """A pass over one mean sample, forward and backward, nothing recomputed (what MFU counts)."""
        key = (phase, config.backbone.lora.rank)
        if key not in self._mean_passes:
            plain = deepcopy(config)
            plain.backbone.activation_checkpointing = "none"
            self._mean_passes[key] = self._trace(phase, plain, self.data.mean, 1)
        return self._mean_passes[key]

    def _launches(self, phase: str, config: Config) -> float:
        """Operators that a GPU's host launches for a micro batch, what is recomputed included.

        Their number is that of one sample: more samples make operators larger, not more.
        """
        again = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}[config.backbone.activation_checkpointing]
        return self._mean_pass(phase, config).launches * (1 + again)

    def _trace(self, phase: str, config: Config, lengths: Lengths, count: int, taken: TakingIn = at_no_cost) -> Pass:
        """A pass over ``count`` records of these sizes."""
        model = self._model(phase, config)

        def batch_of(blocks: int) -> Any:
            return micro_batch(config, phase, replace(lengths, blocks=blocks), count, int(self.architecture.vocab_size))

        if isinstance(model, Rollout):
            return trace_long_rollout(model, batch_of, lengths.blocks, taken)
        return trace_training(model, batch_of(lengths.blocks), taken)

    def _tokens(self, phase: str) -> int:
        return int(micro_batch(self.config, phase, self.data.mean, 1, int(self.architecture.vocab_size)).num_tokens)

    def _remedy(self, phase: str, micro: int, checkpointing: str) -> str:
        """The settings, least costly first, that make the phase fit."""
        for changes, config, size in self._ladder(phase, micro, checkpointing):
            if self._attempt(phase, config, size).fits:
                return " ".join(changes)
        return "no setting tried makes it fit: take more GPUs or larger ones, or lower data.max_*"

    def _ladder(self, phase: str, micro: int, checkpointing: str) -> Iterator[tuple[list[str], Config, int]]:
        """(changes, configuration, micro batch) to try, each keeping what was changed before."""
        config, changes = deepcopy(self.config), []
        if checkpointing != "full":
            config.backbone.activation_checkpointing = "full"
            changes = ["backbone.activation_checkpointing=full"]
            yield changes, deepcopy(config), micro
        smaller = [size for size in (micro // 2, micro // 4, 1) if 1 <= size < micro]
        for size in dict.fromkeys(smaller):
            yield [*changes, f"{phase}.train.micro_batch={size}"], deepcopy(config), size
        sizes = [micro, 1] if micro > 1 else [1]
        later = _LADDER[_LADDER.index(config.deepspeed.config) + 1 :] if config.deepspeed.config in _LADDER else _LADDER
        for path in later:
            config.deepspeed.config = path
            for size in sizes:
                extra = [f"{phase}.train.micro_batch={size}"] if size < micro else []
                yield [*changes, f"deepspeed.config={path}", *extra], deepcopy(config), size
        if config.backbone.lora.rank == 0:
            config.backbone.lora.rank = 16
            for size in sizes:
                extra = [f"{phase}.train.micro_batch={size}"] if size < micro else []
                yield [*changes, f"deepspeed.config={config.deepspeed.config} backbone.lora.rank=16", *extra], config, size

    def encode(self) -> Prediction:
        """Encoding the training set: the encoder whole on every GPU, no gradient."""
        vae = self._model("vae", self.config)
        assert isinstance(vae, Vae)
        count = self.config.latents.batch_size + self.data.longest.blocks  # a record is not divided
        vocab = int(self.architecture.vocab_size)
        batch = micro_batch(self.config, "vae", self.data.longest, count, vocab)
        traced = trace_inference(vae, lambda: vae.encode(batch.encoder_ids, batch.encoder), batch)
        mean = micro_batch(self.config, "vae", self.data.mean, 1, vocab)
        flops = trace_inference(vae, lambda: vae.encode(mean.encoder_ids, mean.encoder), mean).flops
        numel = sum(p.numel() for name, p in vae.named_parameters() if not name.startswith("own_decoder."))
        sentences = self.data.samples * self.data.mean.blocks
        size = self.element_bytes * numel
        return Prediction(
            phase="encode",
            holdings=Holdings(frozen=size),
            activations=traced.peak_bytes,
            capacity=self.machine.gpu_bytes - self.machine.reserve,
            host_per_node=size * self.machine.ranks_per_node,
            checkpoint=0,
            model_folder=sentences * self.config.vae.latents_per_block * self.config.vae.latent_dim * self._latent_bytes,
            setup=f"{self.config.latents.batch_size} sentences a pass",
            samples=sentences,
            tokens=sentences * (self.data.mean.block + self.config.vae.latents_per_block),
            steps=None,
            seconds=sentences * flops / self._speed,
            epochs=None,
            remedy="" if traced.peak_bytes + size <= self.machine.gpu_bytes - self.machine.reserve else "latents.batch_size=8",
        )

    def evaluate(self) -> Prediction:
        """Answering: both LMs whole on every GPU, keys and values of every trajectory (an upper bound: nothing shared)."""
        config, sample, ask = self.config, self.config.sample, self.config.evaluate
        branches = 2 if sample.guidance_scale != 1 else 1
        latents = config.vae.latents_per_block
        longest = self.data.longest.question + sample.max_blocks * (latents + 2) + sample.max_answer_tokens + 1
        shares = config.backbone.lora.rank > 0 and config.vae.decoder == "frozen"
        lm = self._lm_numel
        weights = self.element_bytes * lm * ((1 if shares else 2) + int(sample.reencode))
        blocks, mean = self.data.mean.blocks, self.data.mean
        span = config.denoiser.span
        passes = passes_per_span(sample, span)
        per_row = max(blocks, span) * passes * (latents + 1) + blocks * (latents + 2) + mean.answer + 1
        trajectory = 2 * branches * longest  # tokens with keys and values; twice: rows that go on are copied
        if sample.reencode:  # a block's text is written from a cache of its own, then read again
            trajectory += 2 * (latents + sample.max_thought_tokens)
            per_row += blocks * (1 + sample.restarts) * 2 * (mean.block + latents)
        rows = max(ask.questions_per_batch * ask.num_trajectories, ask.greedy_questions_per_batch)
        read = min(sample.thoughts_per_batch, rows * blocks) * 2 * (latents + mean.block + 1)  # behind the answers, as text
        cache = max(rows * trajectory, read) * self._cache_bytes
        flops = 2 * lm * (mean.question + ask.num_trajectories * branches * per_row)
        questions = ask.num_questions or 1000
        capacity = self.machine.gpu_bytes - self.machine.reserve
        most = max(0, (capacity - weights) // (trajectory * self._cache_bytes))
        remedy = "" if weights + cache <= capacity else _evaluate_remedy(int(most), ask.num_trajectories)
        return Prediction(
            phase="evaluate",
            holdings=Holdings(frozen=weights),
            activations=cache,
            capacity=capacity,
            host_per_node=weights * self.machine.ranks_per_node,
            checkpoint=0,
            model_folder=0,
            setup=f"{ask.questions_per_batch} questions x {ask.num_trajectories}, {passes} passes a span",
            samples=questions,
            tokens=questions * ask.num_trajectories * per_row,
            steps=None,
            seconds=questions * flops / self._speed,
            epochs=None,
            remedy=remedy,
        )

    @cached_property
    def _lm_numel(self) -> int:
        return sum(p.numel() for p in self._model("ar", self.config).parameters())

    @property
    def _latent_bytes(self) -> int:
        """Stored bytes of one element of a latent."""
        kept = 4 if self.config.latents.dtype == "float32" else 2
        return kept * (2 if self.config.denoiser.sample_latents else 1)

    @property
    def _cache_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        a = self.architecture
        head = getattr(a, "head_dim", None) or a.hidden_size // a.num_attention_heads
        heads = getattr(a, "num_key_value_heads", None) or a.num_attention_heads
        return int(2 * a.num_hidden_layers * heads * head * self.element_bytes)


def _evaluate_remedy(most: int, trajectories: int) -> str:
    if most >= trajectories:
        return f"evaluate.questions_per_batch={most // trajectories}"
    if most > 0:
        return f"evaluate.questions_per_batch=1 evaluate.num_trajectories={most}"
    return "larger GPUs, or LoRA: one LM instead of two"


def _saved(phase: str, weights: list[Weight], lora_rank: int) -> list[Weight]:
    """What the finished model's folder holds: everything trained; the frozen base stays where it is."""
    return [w for w in weights if w.trained] if phase == "vae" or lora_rank else weights


__all__ = ["PHASES", "Lengths", "Machine", "Planner", "Prediction"]
