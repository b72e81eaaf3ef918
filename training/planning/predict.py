"""A phase's memory, data and time, put together from weights, traces and the engine's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from ladir.config import Config, TrainSettings
from ladir.config.checks import reads_blocks
from ladir.inference.rollout import Rollout
from ladir.models.backbone import DTYPES, choose_dtype
from ladir.models.prefix_attention import has_plain_attention
from ladir.models.vae import Vae
from ladir.rl.batches import attempts_of, terms
from ladir.rl.beside import MOST_TOGETHER
from ladir.rl.rewards import decodes_thoughts, reads_thoughts
from training.planning.asking import Answering, Architecture, answering, completing, drifting, greedy, remedy
from training.planning.evaluating import UNKNOWN, Questions, questions, samplings, work
from training.planning.memory import (
    Holdings,
    Weight,
    Zero,
    checkpoint_bytes,
    copied_bytes,
    holdings,
    taking_in,
    weights_of,
    writing_bytes,
)
from training.planning.models import (
    LARGEST,
    DataSize,
    Lengths,
    StepKind,
    data_size,
    layer_period,
    learns_text,
    lm_config,
    meta_model,
    micro_batch,
    step_kinds,
    trains_jointly,
    vae_has_one_lm,
)
from training.planning.prediction import Iteration, Machine, Need, Prediction
from training.planning.trace import (
    Pass,
    TakingIn,
    at_no_cost,
    extrapolated,
    trace_inference,
    trace_long_rollout,
    trace_training,
    weighted,
)
from training.runtime.ds_config import DeepSpeedConfigError, check_ds_config, read_ds_config
from training.runtime.sampler import BatchSizeError, DataOrder, micro_batch_size
from training.runtime.topology import GIB, check_topology, deepspeed_file, train_settings

#: what splits least, where there are several GPUs
_LIGHTEST = "ds_configs/zero2.json"
#: global batches whose shares are looked at, and bytes of a stored token id
_BALANCED, _ID_BYTES = 20, 4
#: offloading that is tried, mildest first, where a phase does not fit
_LADDER = ("ds_configs/zero3.json", "ds_configs/zero3_offload_optimizer.json", "ds_configs/zero3_offload.json")


class Planner:
    """Predicts phases of one configuration on one machine; traces are made once."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.refused: dict[str, str] = {}
        """Why phases cannot start, of those that were predicted so far."""
        self.element_bytes = DTYPES[choose_dtype(config.backbone.dtype, "cuda")].itemsize
        self.architecture = lm_config(config.backbone).get_text_config()
        self._models: dict[tuple[str, str, int, int | None], nn.Module] = {}
        self._peaks: dict[tuple[Zero, str, str, int, Lengths, int], int] = {}
        self._sample_passes: dict[tuple[str, int, StepKind], Pass] = {}

    @cached_property
    def data(self) -> DataSize:
        """Sizes of the records.  PlanError where nobody knows how many there are."""
        return data_size(self.config)

    def left_out(self) -> Iterator[str]:
        """What will run and is not predicted, and what is assumed, a line each."""
        if unknown := [asked.name or "the questions" for asked in self._questions if asked.assumed]:
            yield f"How many questions there are is not known, {UNKNOWN:,} are counted of each: {', '.join(unknown)}."

    def predictions(self) -> Iterator[Prediction]:
        """All phases that can start, in the order in which they run."""
        yield from self._startable("vae")
        yield self.encode()
        yield from self._startable("denoiser")
        if self.config.rollout.enabled and self.config.stage != "joint":  # as in the chain
            yield from self._startable("rollout")
        text = self.config.rl.policy == "text"  # it goes on from the baseline
        if self.config.rl.enabled and not text:
            yield from self._startable("rl")
        if self.config.verifier.enabled:
            yield self.verifier()
        yield from self._startable("ar")
        if self.config.rl.enabled and text:
            yield from self._startable("rl")
        yield self.evaluate()

    def _startable(self, phase: str) -> Iterator[Prediction]:
        """A training phase; none where it cannot start, which is noted in ``refused``."""
        try:
            check_ds_config(self.config.backbone, deepspeed_file(self.config, phase))
            check_topology(self.config, phase, self.machine.gpus, [self.machine.ranks_per_node])  # as the phase
        except (BatchSizeError, DeepSpeedConfigError) as error:
            self.refused[phase] = str(error)
            return
        yield self.training(phase)

    def train_settings(self, phase: str) -> TrainSettings:
        """The phase's own training settings."""
        train: TrainSettings = getattr(self.config, phase).train
        return train

    def training(self, phase: str) -> Prediction:
        """A training phase, with the remedy where it does not fit."""
        found = self._predict(phase)
        return replace(found, remedy=self._remedy(phase), lighter=self._lighter(phase, found))

    def need(self, phase: str) -> Need:
        """What a phase takes of a GPU, and the remedy where it does not fit: sooner than :meth:`predictions`, without time."""
        asking = {"encode": self.encode, "verifier": self.verifier, "evaluate": self.evaluate}
        if phase in asking:
            return asking[phase]()
        return replace(self._need(phase, self.config, self._micro(phase)), remedy=self._remedy(phase))

    def state(self, phase: str) -> Holdings:
        """What a training holds of a GPU whatever its records are: there are none to be read for it."""
        return self._held(phase, self.config, self._zero(deepspeed_file(self.config, phase)))

    def _micro(self, phase: str) -> int:
        """Samples of a micro batch."""
        train = self.train_settings(phase)
        micro = micro_batch_size(train.global_batch, self.machine.gpus, train.micro_batch)
        return max(micro, min(train.micro_batch, sum(self._own_samples(self.config)))) if phase == "rl" else micro

    def _lighter(self, phase: str, found: Prediction) -> str:
        """The first of the usual DeepSpeed files before ours that fits as well; "" where there is none, or ours does not fit.

        What a pass allocates is no more there: only splitting takes memory for a gradient on its way.
        """
        own = self._zero(deepspeed_file(self.config, phase))
        if not found.fits:
            return ""
        for path in ["ds_configs/zero0.json" if self.machine.gpus == 1 else _LIGHTEST, *_LADDER]:
            zero = self._zero(path)
            if zero.weight < own.weight and replace(found, holdings=self._held(phase, self.config, zero)).fits:
                return path
        return ""

    def _zero(self, file: str) -> Zero:
        """What a DeepSpeed file says, on this machine."""
        return Zero.of(read_ds_config(file), self.machine.gpus, self.element_bytes)

    def _need(self, phase: str, config: Config, micro: int) -> Need:
        """The phase under ``config`` (which may differ from ours in checkpointing, offloading and adapters)."""
        zero = self._zero(deepspeed_file(config, phase))
        text = learns_text(config, phase)
        passes = self._completions(config, micro, zero) if text else self._activations(phase, config, micro, zero)
        return Need(
            phase=phase,
            holdings=self._held(phase, config, zero),
            activations=max(passes, self._own_attempts(config).cache) if phase == "rl" else passes,
            capacity=self.machine.capacity,
        )

    def _predict(self, phase: str) -> Prediction:
        """A training phase, memory and time."""
        config, train, machine, micro = self.config, self.train_settings(phase), self.machine, self._micro(phase)
        checkpointing, along = config.backbone.activation_checkpointing, "with the VAE, " * trains_jointly(config, phase)
        weights = weights_of(self._model(phase, config), train.optimizer)
        zero = self._zero(deepspeed_file(config, phase))
        need = self._need(phase, config, micro)
        samples = self.data.samples * (self.data.mean.blocks if phase == "vae" else 1)
        arithmetic = samples * self._mean_pass(phase, config).flops / self._speed
        launching = samples / micro / machine.gpus * self._launches(phase, config) * machine.launch_seconds
        found = Prediction(
            **vars(need),
            host_per_node=need.holdings.host * machine.ranks_per_node,
            checkpoint=checkpoint_bytes(weights, self._averages(phase)),
            saving_per_node=self._saving(phase, weights, zero),
            loading_per_node=self._loading(weights, zero),
            model_folder=self.element_bytes * sum(w.numel for w in _saved(phase, weights, config)),
            setup=f"{along}micro {micro} x {self._rounds(phase, config, micro)}, recompute {checkpointing}",
            samples=samples,
            tokens=round(samples * self._tokens(phase)),
            steps=samples / train.global_batch,
            seconds=max(arithmetic, launching),
            epochs=train.max_epochs,
            bound="launches" if launching > arithmetic else "",
            read_bytes=samples * self._sample_bytes(phase),
            balance=self._balance(phase, train, micro),
        )
        return self._reinforced(found, config, micro) if phase == "rl" else found

    def _own_samples(self, config: Config) -> tuple[int, int]:
        """A rank's attempts and gold records of an update of stage 3."""
        rl, gpus = config.rl, self.machine.gpus
        return -(-attempts_of(rl) // gpus), rl.train.global_batch // gpus * (rl.anchor_weight > 0)

    def _rounds(self, phase: str, config: Config, micro: int) -> int:
        """Micro batches of a step; in stage 3 those of attempts."""
        if phase == "rl":
            return -(-self._own_samples(config)[0] // micro)
        return self.train_settings(phase).global_batch // micro // self.machine.gpus

    def _averages(self, phase: str) -> int:
        """Averages of the weights in a checkpoint; stage 3's old model is one."""
        return int(self.train_settings(phase).ema > 0) + int(phase == "rl")

    def _saving(self, phase: str, weights: list[Weight], zero: Zero) -> int:
        """Bytes of a node's memory for checkpoints."""
        copied = copied_bytes(weights, zero, self._averages(phase)) if self.train_settings(phase).checkpoint_in_background else 0
        writers = self.machine.ranks_per_node if zero.stage else 1
        return writers * (copied + writing_bytes(weights, zero))

    def _loading(self, weights: list[Weight], zero: Zero) -> int:
        """Bytes of a node's memory for weights that every rank reads whole; under ZeRO-3 they are split while they are read."""
        shared = self.config.deepspeed.sharded_loading and zero.stage == 3 and (self.machine.gpus > 1 or zero.offload_weights)
        return 0 if shared else self.element_bytes * sum(w.numel for w in weights) * self.machine.ranks_per_node

    def _held(self, phase: str, config: Config, zero: Zero) -> Holdings:
        """What the engine holds; in stage 3 also whole models that sample and are compared with, and the old one's average."""
        train = self.train_settings(phase)
        weights = weights_of(self._model(phase, config), train.optimizer)
        held = holdings(weights, zero, train.ema > 0)
        if phase != "rl":
            return held
        old = holdings(weights, zero, averaged=True)
        return replace(
            held,
            frozen=held.frozen + self.element_bytes * self._lm.parameters * _whole_copies(config),
            average=held.average + old.average,
            host_average=held.host_average + old.host_average,
        )

    def _own_attempts(self, config: Config) -> Answering:
        """A batch of stage 3's questions being answered."""
        rl = config.rl
        if learns_text(config, "rl"):
            return completing(config, self.data, self._lm, rl.questions_per_batch, rl.group)
        reads = reads_thoughts(rl.reward)
        return answering(
            config, self.data, self._lm, rl.questions_per_batch, rl.group, rl.answers, replayed=self._replayed, reads=reads
        )

    def _reinforced(self, found: Prediction, config: Config, micro: int) -> Prediction:
        """Stage 3: rounds of asking and updates."""
        rl, asked = config.rl, self._own_attempts(config)
        one = self._iteration(config, micro, asked)
        steps = rl.train.max_steps or rl.updates
        return replace(
            found,
            setup=f"{rl.prompts} questions x {rl.group} x {rl.answers}, {rl.updates} updates, {found.setup}",
            samples=-(-steps // rl.updates) * rl.prompts,
            tokens=-(-steps // rl.updates) * rl.prompts * rl.group * asked.row_tokens,
            steps=float(steps),
            seconds=one.seconds * steps / rl.updates,
            epochs=None,
            iteration=one,
            bound="launches" if one.launching > one.arithmetic else "",
        )

    def _iteration(self, config: Config, micro: int, asked: Answering) -> Iteration:
        """Seconds of an iteration where every group teaches."""
        rl, gpus = config.rl, self.machine.gpus
        batches = -(-rl.prompts // (rl.questions_per_batch * gpus))
        sampling = (rl.prompts * asked.flops / self._speed, batches * asked.real_passes * self._forward_launches(config))
        again = 1 + (1 + ("kl" in terms(rl))) / 3  # the old model's pass, and the start's, are forward alone
        attempts, gold = attempts_of(rl), rl.train.global_batch * (rl.anchor_weight > 0)
        of_rank, gold_of_rank = self._own_samples(config)
        passes = self._rounds("rl", config, micro) * again
        if of_rank + gold_of_rank > min(micro, MOST_TOGETHER):  # else gold records go with the attempts
            passes += gold_of_rank // micro_batch_size(rl.train.global_batch, gpus, micro)
        one = self._mean_pass("rl", config).flops
        learning = (
            rl.updates * (attempts * again + gold) * one / self._speed,
            rl.updates * passes * self._launches("rl", config),
        )
        return Iteration(*((work, count * self.machine.launch_seconds) for work, count in (sampling, learning)))

    def _forward_launches(self, config: Config) -> float:
        """Operators of a forward pass of the LM alone."""
        plain = deepcopy(config)
        plain.backbone.activation_checkpointing = "none"

        def traced(layers: int | None) -> Pass:
            model = self._model("ar", plain, layers)
            batch = micro_batch(plain, "ar", self.data.mean, 1, int(self.architecture.vocab_size))
            return trace_inference(model, lambda: model(batch), batch)

        return self._by_layers("ar", traced).launches

    def _sample_bytes(self, phase: str) -> int:
        """Stored bytes of a mean sample: token ids, and latents where they are learned from."""
        config, mean = self.config, self.data.mean
        if phase == "vae":
            return _ID_BYTES * mean.block
        tokens = _ID_BYTES * (mean.question + mean.blocks * mean.block + mean.answer)
        latents = mean.blocks * config.vae.latents_per_block * config.vae.latent_dim * self._latent_bytes
        without = phase == "ar" or trains_jointly(config, phase) or learns_text(config, phase)
        return tokens + latents * (not without)

    def _balance(self, phase: str, train: TrainSettings, micro: int) -> float | None:
        """How even the shares are that ranks get of the first global batches, by the work that the phase goes by."""
        if phase in ("vae", "rl") or not self.data.records:
            return None
        works = [
            size.blocks if phase == "rollout" else size.question + size.completion + size.blocks for size in self.data.records
        ]
        order = DataOrder(len(works), train.global_batch, self.config.run.seed, works.__getitem__)
        gpus, done, waited = self.machine.gpus, 0.0, 0.0
        for batch in range(_BALANCED):
            shares = [order.micro_batches(batch * train.global_batch, rank, gpus, micro) for rank in range(gpus)]
            for parts in zip(*shares, strict=True):
                work = [max(works[i] for i in indices) * len(indices) for indices, _ in parts]
                done, waited = done + sum(work), waited + gpus * max(work)
        return done / waited

    @property
    def _speed(self) -> float:
        """Useful FLOPs per second of the whole job."""
        return self.machine.gpus * self.machine.flops * self.machine.mfu

    def _model(self, phase: str, config: Config, layers: int | None = None) -> nn.Module:
        """The phase's model, of so many layers (None: all)."""
        key = (phase, config.backbone.activation_checkpointing, config.backbone.lora.rank, layers)
        if key not in self._models:
            self._models[key] = meta_model(config, phase, key[1], layers)
        return self._models[key]

    def _by_layers(self, phase: str, traced: Callable[[int | None], Pass]) -> Pass:
        """What ``traced`` finds with all layers, from two small numbers of them where they repeat."""
        total, period = self._layers
        if period is None or 2 * period >= total:
            return traced(None)
        return extrapolated(traced(period), traced(2 * period), (total - period) / period)

    @cached_property
    def _layers(self) -> tuple[int, int | None]:
        """How many layers the LM has, and after how many they repeat (an even number, for every second one may be recomputed)."""
        total = int(self.architecture.num_hidden_layers)
        return total, layer_period(self._model("ar", self.config), self.architecture)

    def _completions(self, config: Config, micro: int, zero: Zero) -> int:
        """Peak bytes of a pass of the baseline's stage 3: of its own completions, of gold records, or of both together."""
        of_rank, gold_of_rank = self._own_samples(config)
        own = replace(self.data.longest, blocks=0, answer=config.evaluate.ar_max_tokens)
        together = of_rank + gold_of_rank <= min(micro, MOST_TOGETHER)
        attempts = self._activations("rl", config, min(micro, of_rank), zero, own)
        if not gold_of_rank:
            return attempts
        size = micro_batch_size(config.rl.train.global_batch, self.machine.gpus, micro)
        gold = self._activations("rl", config, size, zero)
        return attempts + gold if together else max(attempts, gold)

    def _activations(self, phase: str, config: Config, micro: int, zero: Zero, longest: Lengths | None = None) -> int:
        """Peak bytes of a pass over ``micro`` of the longest records (of ``longest`` ones where they are given)."""
        lengths = longest or self.data.longest
        key = (zero, phase, config.backbone.activation_checkpointing, config.backbone.lora.rank, lengths, micro)
        if key not in self._peaks:
            taken = partial(taking_in, zero=zero)

            def traced(layers: int | None) -> Pass:
                return self._trace(phase, config, lengths, micro, taken, layers)

            # A rollout's many passes have their peak where all layers' gradients are on their way.  A single pass may have it
            # elsewhere where there are few layers, and costs little.
            self._peaks[key] = (self._by_layers(phase, traced) if phase == "rollout" else traced(None)).peak_bytes
        return self._peaks[key]

    def _mean_pass(self, phase: str, config: Config) -> Pass:
        """A pass over one mean sample, forward and backward, nothing recomputed (what MFU counts), in the mean step.

        Where steps of stage 2 differ it is in stage 1's pass, which costs less to trace.
        """
        whole, kinds = self._sample_pass(phase, config), list(step_kinds(config, phase))
        if kinds == [(1.0, LARGEST)]:
            return whole
        first = "denoiser" if phase == "rollout" else phase
        shares = [(share, self._sample_pass(first, config, kind)) for share, kind in kinds]
        return weighted([(1.0, whole), *shares, (-1.0, self._sample_pass(first, config))])

    def _sample_pass(self, phase: str, config: Config, kind: StepKind = LARGEST) -> Pass:
        """The same in a step of this ``kind``."""
        key = (phase, config.backbone.lora.rank, kind)
        if key not in self._sample_passes:
            plain = deepcopy(config)
            plain.backbone.activation_checkpointing = "none"
            self._sample_passes[key] = self._by_layers(
                phase, lambda layers: self._trace(phase, plain, self.data.mean, 1, layers=layers, kind=kind)
            )
        return self._sample_passes[key]

    def _launches(self, phase: str, config: Config) -> float:
        """Operators that a GPU's host launches for a micro batch, what is recomputed included.

        Their number is that of one sample: more samples make operators larger, not more.
        """
        again = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}[config.backbone.activation_checkpointing]
        return self._mean_pass(phase, config).launches * (1 + again)

    def _trace(
        self,
        phase: str,
        config: Config,
        lengths: Lengths,
        count: int,
        taken: TakingIn = at_no_cost,
        layers: int | None = None,
        kind: StepKind = LARGEST,
    ) -> Pass:
        """A pass over ``count`` records of these sizes, in a step of this ``kind``, with so many layers (None: all)."""
        model = self._model(phase, config, layers)

        def batch_of(blocks: int) -> Any:
            sizes, vocab = replace(lengths, blocks=blocks), int(self.architecture.vocab_size)
            return micro_batch(config, phase, sizes, count, vocab, kind=kind)

        if isinstance(model, Rollout):
            return trace_long_rollout(model, batch_of, lengths.blocks, taken)
        return trace_training(model, batch_of(lengths.blocks), taken)

    def _tokens(self, phase: str) -> float:
        """Tokens of a mean sample, which a first pass does not count again."""
        config, mean, vocab = self.config, self.data.mean, int(self.architecture.vocab_size)
        kinds = step_kinds(config, phase)
        return sum(share * micro_batch(config, phase, mean, 1, vocab, kind=kind).num_tokens for share, kind in kinds)

    def _remedy(self, phase: str) -> str:
        """The settings, least costly first, that make the phase fit; "" where it does."""
        micro = self._micro(phase)
        if self._need(phase, self.config, micro).fits:
            return ""
        for changes, config, size in self._ladder(phase, micro, self.config.backbone.activation_checkpointing):
            if self._need(phase, config, size).fits:
                return " ".join(changes)
        copies = _whole_copies(self.config)
        if phase == "rl" and (size := self.element_bytes * self._lm.parameters * copies) > self.machine.capacity:
            whole = f"{copies} whole LM{'s' if copies > 1 else ''} ({size / GIB:.2f} GiB)"
            return f"larger GPUs: to sample, each holds {whole} beside the one that learns, which no number of GPUs splits"
        return "more GPUs, or larger ones, or a lower data.max_*: no setting that was tried makes it fit"

    def _ladder(self, phase: str, micro: int, checkpointing: str) -> Iterator[tuple[list[str], Config, int]]:
        """(changes, configuration, micro batch) to try, each keeping what was changed before."""
        config, changes = deepcopy(self.config), list[str]()
        if phase == "rl" and config.rl.questions_per_batch > 1:
            config.rl.questions_per_batch = 1
            changes = ["rl.questions_per_batch=1"]
            yield changes, deepcopy(config), micro
        if checkpointing != "full":
            config.backbone.activation_checkpointing = "full"
            changes = [*changes, "backbone.activation_checkpointing=full"]
            yield changes, deepcopy(config), micro
        smaller = [size for size in (micro // 2, micro // 4, 1) if 1 <= size < micro]
        for size in dict.fromkeys(smaller):
            yield [*changes, f"{phase}.train.micro_batch={size}"], deepcopy(config), size
        sizes = [micro, 1] if micro > 1 else [1]
        train, file = train_settings(config, phase), deepspeed_file(config, phase)
        for path in _LADDER[_LADDER.index(file) + 1 :] if file in _LADDER else _LADDER:
            train.deepspeed = path
            for size in sizes:
                extra = [f"{phase}.train.micro_batch={size}"] if size < micro else []
                yield [*changes, f"{phase}.train.deepspeed={path}", *extra], deepcopy(config), size
        if config.backbone.lora.rank == 0:
            config.backbone.lora.rank = 16
            for size in sizes:
                extra = [f"{phase}.train.micro_batch={size}"] if size < micro else []
                lora = [f"{phase}.train.deepspeed={deepspeed_file(config, phase)}", "backbone.lora.rank=16"]
                yield [*changes, *lora, *extra], config, size

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
            capacity=self.machine.capacity,
            host_per_node=size * self.machine.ranks_per_node,
            checkpoint=0,
            model_folder=sentences * self.config.vae.latents_per_block * self.config.vae.latent_dim * self._latent_bytes,
            setup=f"{self.config.latents.batch_size} sentences a pass",
            samples=sentences,
            tokens=sentences * (self.data.mean.block + self.config.vae.latents_per_block),
            steps=None,
            seconds=sentences * flops / self._speed,
            epochs=None,
            remedy="" if traced.peak_bytes + size <= self.machine.capacity else "latents.batch_size=8",
        )

    def verifier(self) -> Prediction:
        """Judged trajectories for the verifier, whose own training is that of a small head."""
        v = self.config.verifier
        found = answering(self.config, self.data, self._lm, v.questions_per_batch, v.num_trajectories)
        if v.drift:
            found = drifting(found, self.config, self.data, self._lm, v.num_trajectories)
        asked = (v.num_questions, v.questions_per_batch, v.num_trajectories)
        return self._asking("verifier", found, *asked, "verifier.questions_per_batch", "verifier.num_trajectories")

    def evaluate(self) -> Prediction:
        """All data sets in all ways: both LMs whole on every GPU, keys and values of every trajectory.

        Memory is an upper bound, nothing shared, of the set that takes most.
        """
        sets, ways = self._questions, samplings(self.config)
        found = max((self._answered(asked.config) for asked in sets), key=lambda one: (not one.fits, one.peak))
        works = [work(asked, way, self.data, self._lm, self.machine.gpus, self._replayed) for asked in sets for way in ways]
        launched = self._forward_launches(self.config) * self.machine.launch_seconds if works else 0.0
        times = [(one.flops / self._speed, one.passes * launched) for one in works]
        arithmetic, launching = (sum(part) for part in zip(*times, strict=True)) if times else (0.0, 0.0)
        count = f"{len(sets)} sets, " if self.config.evaluate.suite else ""
        return replace(
            found,
            setup=f"{found.setup}, {count}{len(ways)} ways of asking",
            samples=sum(asked.asked for asked in sets),
            tokens=sum(one.tokens for one in works),
            seconds=sum(map(max, times)),
            bound="launches" if launching > arithmetic else "",
        )

    @cached_property
    def _questions(self) -> list[Questions]:
        """The evaluation's data sets."""
        return questions(self.config)

    @property
    def _replayed(self) -> bool:
        """Whether denoising steps are CUDA graphs where questions are answered."""
        return self.machine.replays and has_plain_attention(self.architecture)

    def _answered(self, config: Config) -> Prediction:
        """A data set's questions in batches, sampled or greedy, whichever takes more memory."""
        ask = config.evaluate
        found = answering(config, self.data, self._lm, ask.questions_per_batch, ask.num_trajectories)
        asked = (0, ask.questions_per_batch, ask.num_trajectories)
        names = ("evaluate.questions_per_batch", "evaluate.num_trajectories")
        sampled = self._asking("evaluate", found, *asked, *names)
        both = self._asking("evaluate", greedy(found, ask.greedy_questions_per_batch), *asked, *names)
        if not sampled.fits or both.fits:
            return both
        most = self._most_rows("evaluate", found)
        return replace(both, remedy=f"evaluate.greedy_questions_per_batch={most}")

    def _asking(
        self, phase: str, found: Answering, questions: int, batch: int, lines: int, batch_name: str, lines_name: str
    ) -> Prediction:
        """``questions`` asked in batches; the names are those of the settings that say how many rows a batch has."""
        weights, capacity = self._asked_weights(phase), self.machine.capacity
        most = self._most_rows(phase, found)
        return Prediction(
            phase=phase,
            holdings=Holdings(frozen=weights),
            activations=found.cache,
            capacity=capacity,
            host_per_node=weights * self.machine.ranks_per_node,
            checkpoint=0,
            model_folder=0,
            setup=f"{batch} questions x {lines}, {found.passes} passes a span",
            samples=questions,
            tokens=questions * lines * found.row_tokens,
            steps=None,
            seconds=questions * found.flops / self._speed,
            epochs=None,
            remedy="" if weights + found.cache <= capacity else remedy(most, batch_name, lines, lines_name),
        )

    def _most_rows(self, phase: str, found: Answering) -> int:
        """Rows whose keys and values fit beside the weights."""
        free = self.machine.capacity - self._asked_weights(phase)
        return int(max(0, free // found.row_bytes))

    def _asked_weights(self, phase: str) -> int:
        """Bytes of the LMs that are in memory while questions are answered."""
        return self.element_bytes * self._lm.parameters * self._asked_models(phase)

    def _asked_models(self, phase: str) -> int:
        """LMs in memory while questions are answered: the denoiser's, the VAE's decoder and, to encode again, its encoder.

        An export's decoder may be the denoiser's LM without its adapters.  The verifier's phase asks trained parts, without a VAE
        where no blocks are read; there encoder and decoder may be one LM.
        """
        shares = vae_has_one_lm(self.config)
        encoder = int(self.config.sample.reencode)
        if phase == "evaluate":
            return (1 if shares else 2) + encoder
        if not reads_blocks(self.config):
            return 1
        return 2 + int(encoder and not shares)

    @cached_property
    def _lm(self) -> Architecture:
        numel = sum(p.numel() for p in self._model("ar", self.config).parameters())
        return Architecture(numel, self._cache_bytes)

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


def _saved(phase: str, weights: list[Weight], config: Config) -> list[Weight]:
    """What the finished model's folder holds: everything trained; the frozen base stays where it is."""
    frozen = phase == "vae" or trains_jointly(config, phase) or config.backbone.lora.rank
    return [w for w in weights if w.trained] if frozen else weights


def _whole_copies(config: Config) -> int:
    """LMs that every GPU holds whole in stage 3, beside the one that learns.

    The old model, the VAE's decoder where thoughts are read, its encoder where they are encoded again, and the start.
    """
    if learns_text(config, "rl"):
        return 1
    encoders = int(config.sample.reencode and not vae_has_one_lm(config))
    return 1 + int(decodes_thoughts(config)) + encoders + int("kl" in terms(config.rl))
