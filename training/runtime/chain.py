"""The phases of a whole run in their order, each with the program and the settings that start it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ladir.config import Config


@dataclass(frozen=True)
class Step:
    """A phase, its entry point ``training/<entry>.py``, and settings of its own."""

    phase: str
    entry: str
    settings: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """As ``PHASES`` of ``slurm/submit.sh`` has it."""
        return " ".join((self.entry, *self.settings))


#: what may go on side by side: LaDiR's trainings and the asking of its models, and those of the AR baseline
LANES = ("ladir", "ar")
#: phases whose models of a training step (train.snapshot_every) can be asked
SNAPSHOT_PHASES = ("denoiser", "rollout", "rl", "ar", "ar-rl")

#: settings by which a step is told from others of the same entry point: the next one does not inherit them
OWN_SETTINGS = ("stage", "ar.phase", "ar.from_scratch", "ar.copy_fraction")


def chain(config: Config, also: str = "") -> list[Step]:
    """All phases that ``config`` needs, and ``also`` that stage of the denoiser."""
    # backbone.scratch alone may only describe the LM for plan.py: a base is trained where the run's own is to be read.
    own = Path(config.run.folder) / config.run.name / "models" / "base"
    wanted = config.backbone.name_or_path is not None and Path(config.backbone.name_or_path) == own
    base = [Step("base", "train_ar", ("ar.phase=base", "ar.from_scratch=true"))] if config.backbone.scratch and wanted else []
    again = ("ar.copy_fraction=0",) if base else ()  # the sentences to repeat are for the base LM
    joint = ("stage=joint",) if config.stage == "joint" else ()
    wanted_second = (config.rollout.enabled and config.stage != "joint") or also == "rollout"
    second = [Step("rollout", "train_denoiser", ("stage=rollout",))] if wanted_second else []
    text = config.rl.policy == "text"  # it goes on from the baseline
    reinforced = Step("ar-rl" if text else "rl", "train_rl")
    third = [reinforced] if config.rl.enabled or also == reinforced.phase else []
    asked = any(method.startswith("ar") for method in config.evaluate.methods)
    baseline = [Step("ar", "train_ar", again), *(third if text else [])] if asked or (text and third) else []
    first = Step("denoiser", "train_denoiser", joint)
    ladir = [Step("vae", "train_vae"), Step("latents", "encode_latents"), first, *second, *([] if text else third)]
    judging = [Step("verifier", "train_verifier")] if config.verifier.enabled else []
    return [*base, *ladir, *judging, *baseline, Step("export", "export"), Step("evaluate", "evaluate")]


def side_by_side(config: Config) -> list[Step]:
    """:func:`chain` for a queue of jobs, where both lanes may be trained and asked at the same time."""
    *steps, evaluate = chain(config)
    beside = ("run.exclusive=false",)
    found = [Step(step.phase, step.entry, step.settings + beside) if step.phase in ("ar", "ar-rl") else step for step in steps]
    if len(lanes_of(config, evaluate)) < len(LANES):
        return [*found, evaluate]
    asking = [Step(evaluate.phase, evaluate.entry, (f"evaluate.lane={lane}", *beside)) for lane in LANES]
    return [*found, *asking, Step("evaluate", "table")]


def lanes_of(config: Config, step: Step) -> tuple[str, ...]:
    """The lanes that ``step``, under its own settings, is part of: what it needs and makes."""
    if step.entry in ("evaluate", "table"):
        if config.evaluate.lane in LANES:
            return (config.evaluate.lane,)
        rows = {"ar" if method.startswith("ar") else "ladir" for method in config.evaluate.methods}
        return tuple(lane for lane in LANES if lane in rows)
    if step.entry == "train_ar" and config.ar.phase != "ar":  # the LM that everything stands on
        return LANES
    return ("ar",) if step.entry == "train_ar" or step.phase == "ar-rl" else ("ladir",)


def following(config: Config, phase: str, finished: Callable[[str], bool]) -> Step | None:
    """The first step behind ``phase`` that is not finished; of a phase that is none of them, the first of all."""
    steps = chain(config, also=phase)
    places = [number for number, step in enumerate(steps) if step.phase == phase]
    return next((step for step in steps[places[0] + 1 if places else 0 :] if not finished(step.phase)), None)
