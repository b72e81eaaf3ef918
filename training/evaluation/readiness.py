"""What an evaluation needs is there: looked for before anything is read or loaded, and all that is missing told at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ladir.config import Config
from ladir.data.rows import EXTENSIONS
from ladir.models.exports import VERIFIER_FOLDER
from training.evaluation.answerers import verifier_of
from training.evaluation.rows import PHASES, SCORED, is_asked, model_of, sampling_of, stage_of
from training.runtime.chain import LANES
from training.runtime.run import Run, RunFolder
from training.runtime.stages import stage_folder

logger = logging.getLogger(__name__)

_ENDINGS = (*EXTENSIONS, ".gz")
#: stages that a run may go without
OPTIONAL = ("rollout", "rl", "ar-rl")


def ready_methods(run: Run, asked: Mapping[str, Config]) -> list[str]:
    """The rows of the table that can be filled: all of the job's lane, or all but those of later stages that were not trained.

    ``asked``: the settings of every data set by its name in a suite.  Raises FileNotFoundError with a line for everything else
    that is missing: models, their snapshots, the files of questions.
    """
    settings = run.config.evaluate
    methods = [method for method in settings.methods if is_asked(settings, method) and _is_trained(run, method)]
    files = (problem for name, config in asked.items() for problem in _missing_file(name, config))
    problems = [*files, *_missing_models(run, methods)] if run.world.is_main else None
    if problems := run.world.broadcast(problems):
        raise FileNotFoundError("\n".join(problems))
    return methods


def question_file(config: Config) -> str | None:
    """The file, or Hub data set, of the split that is asked."""
    path: str | None = getattr(config.data, config.evaluate.split)
    return path


def _is_trained(run: Run, method: str) -> bool:
    """False for a method that is part of the default table and of which a run may have no model."""
    stage = model_of(sampling_of(method)[0])
    if stage not in OPTIONAL:
        return True
    model = run.folder.model(run.folder.snapshot(stage, run.config.evaluate.snapshot))
    if not run.world.broadcast(model.is_dir()):
        logger.info("%s: left out, %s was not trained", method, model)
        return False
    return True


def _missing_file(data_set: str, config: Config) -> Iterator[str]:
    name, path, folder = f"data.{config.evaluate.split}", question_file(config), Path(config.evaluate.suite_folder)
    whose = f"evaluate.suite: {data_set}: " if data_set else ""
    if path is None:
        yield f"{whose}{name} is not set: name the records to evaluate on"
    elif path.endswith(_ENDINGS) and not Path(path).is_file():
        by_name = f", put the file there (evaluate.suite_folder={folder}), or give the set a {name} of its own"
        remedy = by_name if data_set and folder in Path(path).parents else ""
        yield f"{whose}{name}={path}: no such file (looked in {Path.cwd()}); correct the path{remedy}"


def _missing_models(run: Run, methods: Sequence[str]) -> Iterator[str]:
    folder, step = run.folder, run.config.evaluate.snapshot
    rows: dict[str, list[str]] = {}
    for method in methods:
        rows.setdefault(model_of(sampling_of(method)[0]), []).append(method)
    settings = run.config.evaluate
    # Of a lane that has rows, each of a stage that was not trained, there is nothing to do: the table has none of them either.
    if not methods and not (settings.lane in LANES and any(is_asked(settings, method) for method in settings.methods)):
        lane = f" in evaluate.lane={settings.lane}" if settings.lane in LANES else ""
        yield f"evaluate.methods: nothing is left to ask{lane}; run training/train_denoiser.py stage=rollout, or name other rows"
    if "ar" in rows and step is None and not folder.model("ar").is_dir():
        yield _lacking(rows["ar"], folder.model("ar"), "training/train_ar.py")
    denoisers = [method for model in ("ladir", *OPTIONAL) if not model.startswith("ar") for method in rows.get(model, [])]
    if denoisers and not folder.export.is_dir() and step is None:
        yield _lacking(denoisers, folder.export, "training/export.py (behind the trainings)")
    elif "ladir" in rows and step is None and (first := stage_folder(folder, "denoiser", None)) and not first.is_dir():
        yield _lacking(rows["ladir"], first, "training/train_denoiser.py")
    elif denoisers and not folder.export.is_dir() and not folder.model("vae").is_dir():
        yield _lacking(denoisers, folder.model("vae"), "training/train_vae.py")
    else:
        for model in sorted(rows.keys() & {"ladir", "rollout", "rl"}):
            yield from _missing_verifier(folder, model, rows[model], step)
    if step is not None:
        needed = [PHASES[model][-1] for model in rows if model not in OPTIONAL]
        yield from (line for phase in needed for line in _missing_snapshot(folder, phase, step))


def _missing_verifier(folder: RunFolder, model: str, methods: Sequence[str], step: int | None) -> Iterator[str]:
    """Where rows go by the scores of a verifier that is not there, or is of another denoiser."""
    scored = [method for method in methods if sampling_of(method)[1] in SCORED]
    if not scored:
        return
    denoiser = stage_folder(folder, stage_of(model), step)
    exported = denoiser is None and (folder.export / VERIFIER_FOLDER).is_dir()
    if not exported and verifier_of(folder, denoiser) is None:
        yield (
            f"rows {', '.join(scored)}: there is no verifier of {denoiser or folder.export}; run training/train_verifier.py "
            f"verifier.stage={stage_of(model)}, or leave them out (evaluate.methods)"
        )


def _lacking(rows: Sequence[str], folder: Path, program: str) -> str:
    return f"rows {', '.join(rows)}: {folder} is not there; run {program} or leave them out (evaluate.methods)"


def _missing_snapshot(folder: RunFolder, phase: str, step: int) -> Iterator[str]:
    """Where a model of the asked training step, or what its training said of it, is missing."""
    name = folder.snapshot(phase, step)
    if missing := [str(path) for path in (folder.model(name), folder.outcome_file(name)) if not path.exists()]:
        found = [path.name.removeprefix(f"{phase}-") for path in folder.model(phase).parent.glob(f"{phase}-*")]
        kept = sorted(int(number) for number in found if number.isdecimal() and folder.outcome(f"{phase}-{number}"))
        yield (
            f"there is no snapshot of step {step}: {' and '.join(missing)} missing; kept are the steps {kept or 'none'}; set "
            f"{phase}.train.snapshot_every in training, or ask for the other model's evaluate.methods only"
        )
