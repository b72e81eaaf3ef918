"""Stage 3 of the denoiser's training as the train loop sees it: learning from its own judged thoughts and answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ladir.config import Config
from ladir.data.batches import DenoiserBatch, DenoiserCollator
from ladir.data.latents import LatentStore
from ladir.data.question_store import Questions
from ladir.data.randomness import derive
from ladir.errors import UnusableError
from ladir.models.denoiser import Denoiser
from ladir.models.folders import load_denoiser, load_denoiser_to_train, load_readers, save_denoiser
from ladir.models.pairing import TrainedOn
from ladir.models.vae import ThoughtDecoder
from ladir.reasoner import Reasoner
from ladir.rl.batches import JudgedCollator, terms
from ladir.rl.lines import Answered, best_and_worst
from ladir.rl.policy import Policy
from ladir.rl.rewards import decodes_thoughts, reward_function
from ladir.tasks import Task, get_task
from ladir.tokens import load_tokenizer
from training.evaluation.judging import judges_of
from training.phases.base import Samples, TrainingPhase
from training.phases.denoiser import denoiser_collator, denoiser_weights, stored_latents, trained_on
from training.phases.earlier import Earlier
from training.phases.samples import Show, markdown_table
from training.phases.tokens import Tokens
from training.reinforcement.asking import Asker
from training.reinforcement.samplers import LatentSampler
from training.reinforcement.steps import OwnSteps
from training.runtime.alarm import give_way
from training.runtime.alone import unbroken
from training.runtime.distributed import World
from training.runtime.engine import Lag
from training.runtime.phase import Underway
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.stages import last_denoiser
from training.runtime.status import say
from training.runtime.step_batches import StepBatch
from training.runtime.telemetry import Telemetry

#: records on which the distance from the start is measured
_COMPARED = 16


@dataclass(kw_only=True)
class RlPhase(TrainingPhase):
    """A training on its own attempts, beside stored gold records; ``lag``: of the model that makes the attempts."""

    lag: Lag
    steps: Callable[[Underway], Generator[StepBatch]]

    def step_batches(self, training: Underway) -> Generator[StepBatch]:
        """A batch for every step to come."""
        return self.steps(training)


def rl_phase(config: Config, world: World, stop: StopRequest | None = None) -> RlPhase:
    """Stage 3, from the denoiser of the last stage before it.  UnusableError where that is missing or was made otherwise.

    BrokenOff, on all ranks, where any was asked to stop before all is loaded.
    """
    settings, folder = config.rl, RunFolder(config)
    tokenizer = load_tokenizer(config.backbone)
    store, validation = stored_latents(config, folder, world, stop)
    source = unbroken(world, stop, lambda pause: last_denoiser(folder, "rl", pause))
    before = Earlier.of(config, world, tokenizer, store, source, stage=3, stop=stop)
    frame = before.frame
    task = get_task(config.evaluate.task, config.evaluate)
    records = rl_questions(Tokens(config, world, tokenizer, stop), task)
    reward = reward_function(settings)
    give_way(world, stop)  # between any two models that are loaded
    with sharded_init(config, settings.train, world):
        denoiser = load_denoiser_to_train(source, config.backbone, config.denoiser, world.device.type)
    give_way(world, stop)
    say("loading the models that answer")
    old, _ = load_denoiser(source, config.backbone, world.device)
    give_way(world, stop)
    sampler = LatentSampler(_reasoner(config, folder, old, tokenizer, before.trained_on), config)
    teacher = denoiser_collator(config, store, tokenizer, settings.train, "rl/teacher", frame)
    steps = OwnSteps(
        records,
        Policy(old, settings, config.sample).eval(),
        Asker(sampler, task, reward, settings, judges_of(config, world.largest([world.local_rank])[0] + 1)),
        JudgedCollator.of(teacher, settings, derive(config.run.seed, "rl/attempts")),
        settings,
        config.run.seed,
        config.sample.num_steps,
        _compared_with(config, source, world),
    )

    def write(target: Path, state: Iterator[tuple[str, Tensor]]) -> None:
        own = ((name.removeprefix("denoiser."), tensor) for name, tensor in state)
        known = trained_on(store, tokenizer, frame)
        save_denoiser(denoiser, target, own, origin=before.fingerprint, trained_on=known, stage="rl")

    return RlPhase(
        items=store,
        collator=teacher,
        name="rl",
        model=Policy(denoiser, settings, config.sample),
        weights=rl_weights(config),
        validation=Samples(validation, teacher) if validation is not None else None,
        write=write,
        show=_attempts_and_distance(steps, _Start(old, _fixed_batch(validation or store, teacher))),
        lag=Lag(settings.old_decay, settings.updates),
        steps=steps.step_batches,
    )


def _compared_with(config: Config, source: Path, world: World) -> Policy | None:
    """The model in ``source`` once more, whole and never changed, where a loss is of the distance from it."""
    if "kl" not in terms(config.rl):
        return None
    denoiser, _ = load_denoiser(source, config.backbone, world.device)
    return Policy(denoiser, config.rl, config.sample).eval()


def rl_weights(config: Config) -> dict[str, float]:
    """Weights of the losses: thoughts as the flow's, answers as the answer's in stage 1, and that stage's own as the anchor."""
    d, anchor = config.denoiser, config.rl.anchor_weight
    own = {"nft": d.flow_weight, "steps": 1.0, "kl": config.rl.kl_weight, "answers": d.answer_weight}
    stage_1 = {name: anchor * weight for name, weight in denoiser_weights(d).items()}
    return {**{name: own[name] for name in terms(config.rl)}, **(stage_1 if anchor else {})}


def rl_questions(tokens: Tokens, task: Task) -> Questions:
    """The questions that are asked, each once, whatever solutions are known."""
    settings = tokens.config.rl
    named = settings.questions or tokens.config.data.train
    if named is None:
        raise UnusableError("there are no questions to ask: set rl.questions or data.train")
    different = tokens.questions(named, task).distinct()
    if len(different) < settings.prompts:
        raise UnusableError(f"rl.prompts={settings.prompts}: {named} has only {len(different)} different questions; ask fewer")
    return different


def _reasoner(
    config: Config, folder: RunFolder, old: Denoiser, tokenizer: PreTrainedTokenizerBase, before: TrainedOn
) -> Reasoner:
    """Asks the old model as an evaluation would; ``before``: what it was trained on.

    The VAE's LMs, a whole one on every rank, are loaded where somebody reads blocks.
    """
    if not decodes_thoughts(config):
        return Reasoner(old, ThoughtDecoder(old.backbone, old.latent_in), tokenizer, config.sample, trained_on=before)
    decoder, encoder = load_readers(folder.model("vae"), config.backbone, old.latent_mean.device, config.sample.reencode)
    return Reasoner(old, decoder, tokenizer, config.sample, encoder, before)


def _fixed_batch(store: LatentStore, collator: DenoiserCollator) -> DenoiserBatch:
    """Records and noise on which models are compared: the same in every start."""
    places = range(min(_COMPARED, len(store)))
    return collator([store[place] for place in places], list(places), False)


class _Start:
    """What the model predicted before this stage, of fixed records at fixed noise."""

    def __init__(self, denoiser: Denoiser, batch: DenoiserBatch) -> None:
        self._batch = batch.to(denoiser.latent_mean.device)
        self._prediction = self._predict(denoiser)

    @torch.no_grad()
    def _predict(self, denoiser: Denoiser) -> Tensor:
        return denoiser.predict(denoiser.read(self._batch)[1])

    def distance(self, denoiser: Denoiser) -> float:
        """Mean square difference of ``denoiser``'s predictions from those, per latent element."""
        return float((self._predict(denoiser) - self._prediction).square().mean())


def _attempts_and_distance(steps: OwnSteps, start: _Start) -> Show:
    """The best and the worst attempt at a question of the last iteration; how far the model has come from its start."""

    def show(model: object, telemetry: Telemetry, step: int) -> None:
        assert isinstance(model, Policy)
        telemetry.record("validation", step, {"start_distance": start.distance(model.denoiser)})
        show_attempts(steps, telemetry, step)

    return show


def show_attempts(steps: OwnSteps, telemetry: Telemetry, step: int) -> None:
    """The best and the worst attempt at a question of the last iteration, where there was one."""
    if not steps.last:
        return
    (question, best), (_, worst) = best_and_worst(steps.last)
    telemetry.keep("attempts", step, {"question": question, "best": _told(best), "worst": _told(worst)})
    if telemetry.shows_samples:
        rows = [
            (question, "\n".join((*answer.verdict.thoughts, answer.verdict.answer)), f"{answer.reward:g}")
            for answer in (best, worst)
        ]
        telemetry.text("attempts", markdown_table(("question", "thoughts and answer", "reward"), rows), step)


def _told(answer: Answered) -> dict[str, Any]:
    """An attempt as a report reads it."""
    return {"thoughts": list(answer.verdict.thoughts), "answer": answer.verdict.answer, "reward": answer.reward}
