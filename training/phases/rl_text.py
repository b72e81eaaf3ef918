"""Stage 3 of the autoregressive baseline: as LaDiR's, of the completions' tokens."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ladir.config import Config
from ladir.data.batches import ArCollator
from ladir.data.prompts import Frame
from ladir.data.randomness import derive
from ladir.models.ar import ArModel
from ladir.models.backbone import for_training
from ladir.models.folders import load_backbone
from ladir.rl.rewards import reward_function
from ladir.rl.text import JudgedTextCollator, TextPolicy
from ladir.tasks import get_task
from ladir.tokens import load_tokenizer
from training.evaluation.answerers import Reading
from training.evaluation.judging import judges_of
from training.phases.ar import chains_of, write_lm
from training.phases.base import Samples
from training.phases.rl import RlPhase, rl_questions, show_attempts
from training.phases.tokens import Tokens
from training.reinforcement.asking import Asker
from training.reinforcement.samplers import TextSampler
from training.reinforcement.steps import OwnSteps
from training.runtime.alarm import give_way
from training.runtime.distributed import World
from training.runtime.engine import Lag
from training.runtime.preemption import StopRequest
from training.runtime.run import RunFolder
from training.runtime.sharding import sharded_init
from training.runtime.status import say


def rl_text_phase(config: Config, world: World, stop: StopRequest | None = None) -> RlPhase:
    """Stage 3 of the LM in models/ar.  FileNotFoundError where it was not trained.

    BrokenOff, on all ranks, where any was asked to stop before all is loaded.
    """
    settings, folder = config.rl, RunFolder(config).model("ar")
    tokenizer = load_tokenizer(config.backbone)
    task = get_task(config.evaluate.task, config.evaluate)
    tokens = Tokens(config, world, tokenizer, stop)
    questions = rl_questions(tokens, task)
    reward = reward_function(settings)
    reading = Reading.of(folder)
    bidirectional, frame = reading.bidirectional, reading.frame or Frame.of(tokenizer, config.data.chat_template)
    paths = (config.data.train, config.data.validation)
    chains, held_out = (chains_of(tokens, tokens.records(path), frame) for path in paths)
    give_way(world, stop)  # between any two models that are loaded
    with sharded_init(config, settings.train, world):
        backbone = load_backbone(folder, config.backbone, world.device, trainable=True)
    for_training(backbone, config.backbone)
    give_way(world, stop)
    say("loading the model that answers")
    old = load_backbone(folder, config.backbone, world.device).to(world.device).eval()
    collator = ArCollator(settings.train.pack_tokens, bidirectional)
    temperature = config.evaluate.ar_temperature
    steps = OwnSteps(
        questions,
        TextPolicy(ArModel(old), settings, temperature).eval(),
        Asker(
            TextSampler(old, tokenizer, config, reading),
            task,
            reward,
            settings,
            judges_of(config, world.largest([world.local_rank])[0] + 1),
        ),
        JudgedTextCollator(collator, int(tokenizer.eos_token_id)),
        settings,
        derive(config.run.seed, "text"),
        config.sample.num_steps,
    )

    def own(state: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((name.removeprefix("model."), tensor) for name, tensor in state)

    return RlPhase(
        items=chains,
        collator=collator,
        name="ar-rl",
        model=TextPolicy(ArModel(backbone), settings, temperature),
        weights={"answers": 1.0, **({"text": settings.anchor_weight} if settings.anchor_weight else {})},
        validation=Samples(held_out, collator) if held_out else None,
        write=lambda target, state: write_lm(backbone, tokenizer, target, own(state), bidirectional, frame),
        show=lambda model, telemetry, step: show_attempts(steps, telemetry, step),
        lag=Lag(settings.old_decay, settings.updates),
        steps=steps.step_batches,
    )
