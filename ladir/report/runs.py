"""What a report reads of a run folder: its settings, curves, results and generations, each where it is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ladir.evaluation.results import QuestionResult, read_questions, read_results

#: training phases in their order, and what of theirs is drawn
PHASES = ("base", "vae", "denoiser", "rollout", "rl", "verifier", "ar", "ar-rl")
REINFORCED = ("rl", "ar-rl")
LOSSES = (
    "loss", "reconstruction", "kl", "flow", "answer", "rollout", "token", "lm", "stop", "nft", "steps", "answers", "verifier",
    "value",
)  # fmt: skip
RATES = (
    "exact", "token_accuracy", "answer_accuracy", "lm_accuracy", "rollout_token_accuracy", "stop_accuracy", "verifier_accuracy",
)  # fmt: skip
#: what is drawn of learning from rewards, beside pass@k
LEARNING = (
    "reward", "reward_spread", "signal", "chain", "stopped", "distinct_correct", "answer_tokens", "nft_distance",
    "start_distance", "kl", "token_ratio", "step_ratio", "token_clipped", "step_clipped", "sampling_seconds", "judging_seconds",
    "learning_seconds",
)  # fmt: skip

#: what trained a VAE, whose outcome has its figures, and what their names begin with there
_VAES = (("VAE alone", "latents", ""), ("jointly with the denoiser", "denoiser", "vae_"))

#: steps and values of one metric, by phase and name
Curves = dict[str, dict[str, tuple[list[float], list[float]]]]


@dataclass(frozen=True)
class Results:
    """One ``results*.json`` of a run; ``sample``: LaDiR's controls it was made with."""

    run: str
    file: str
    content: Mapping[str, Any]
    sample: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per method."""
        return list(self.content["rows"])

    @property
    def ar(self) -> Mapping[str, Any]:
        """The baseline's controls, where it has a row."""
        asked = any(str(row["method"]).startswith("ar") for row in self.rows)
        return self.content.get("ar") or {} if asked else {}


@dataclass(frozen=True)
class Attempt:
    """What stage 3 thought and answered once, and what that was worth."""

    thoughts: list[str]
    answer: str
    reward: float


@dataclass(frozen=True)
class AttemptsShown:
    """The best and the worst attempt at a question, of the last validation of stage 3 (``step``)."""

    step: int
    question: str
    best: Attempt
    worst: Attempt


@dataclass(frozen=True)
class RunData:
    """A run as far as it has come; ``name``: its folder's, with its parents' before it where a report has another such run."""

    name: str
    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    losses: Curves
    rates: Curves
    results: list[Results]
    questions: dict[str, list[QuestionResult]]
    reinforced: dict[str, Mapping[str, Any]]
    """The settings of every stage 3 that was begun."""
    learning: Curves
    """What its attempts and its learning were like."""
    attempts: dict[str, AttemptsShown]
    latents: dict[str, Mapping[str, Any]]
    """What the latents of every VAE are good for, by what trained it."""

    @property
    def sentences_per_block(self) -> int | None:
        """``data.sentences_per_block``; 0: the whole chain is one block."""
        value = self.config.get("data", {}).get("sentences_per_block")
        return None if value is None else int(value)

    @property
    def seed(self) -> int:
        """``run.seed`` of the evaluation."""
        evaluated = self.results[0].content if self.results else {}
        return int(evaluated.get("seed", self.config.get("run", {}).get("seed", 0)))

    @property
    def sample(self) -> Mapping[str, Any]:
        """The controls of the evaluation."""
        return self.results[0].sample if self.results else {}


def read_run(folder: str | Path) -> RunData:
    """A run folder.  Raises FileNotFoundError where there is none, ValueError naming a file that is not what it should be."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder; name one (runs/<name>)")
    known = ("config.yaml", "metrics.jsonl", "results.json")
    if not any((path / name).is_file() for name in known):
        raise FileNotFoundError(f"{path}: no run folder: it has none of {', '.join(known)}")
    config = _settings(path / "config.yaml")
    reinforced = {lane: settings for lane in REINFORCED if (settings := _settings(path / f"config-{lane}.yaml"))}
    name, metrics, generations = path.resolve().name, path / "metrics.jsonl", path / "generations.jsonl"
    return RunData(
        name=name,
        path=path,
        config=config,
        environment=_json(path / "environment.json"),
        losses=read_curves(metrics, dict.fromkeys(PHASES, LOSSES)) if metrics.is_file() else {},
        rates=read_curves(metrics, dict.fromkeys(PHASES, RATES)) if metrics.is_file() else {},
        results=[
            _results(name, file, config) for file in sorted(path.glob("results*.json"), key=lambda f: (len(f.name), f.name))
        ],
        questions=_questions(generations) if generations.is_file() else {},
        reinforced=reinforced,
        learning=read_curves(metrics, {lane: _learning(of) for lane, of in reinforced.items()}) if metrics.is_file() else {},
        attempts={lane: found for lane in reinforced if (found := _attempts(path / f"attempts-{lane}.json"))},
        latents={vae: figures for vae, phase, start in _VAES if (figures := _figures(path / f"outcome-{phase}.json", start))},
    )


def _learning(settings: Mapping[str, Any]) -> list[str]:
    """The metrics of a stage 3, of which pass@k goes by its settings."""
    rl = settings.get("rl", {})
    answers = rl.get("group", 1) * rl.get("answers", 1)
    return list(dict.fromkeys([*LEARNING, "pass@1", f"pass@{answers}"]))


def _attempts(file: Path) -> AttemptsShown | None:
    content = _json(file)
    try:
        best, worst = (Attempt(**content[name]) for name in ("best", "worst"))
        return AttemptsShown(content["step"], content["question"], best, worst)
    except (KeyError, TypeError) as error:
        if not content:
            return None
        raise ValueError(f"{file}: not what training/train_rl.py writes ({error}); delete it") from error


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Several run folders, each under a name of its own: where two share one, the names of their parents stand before it."""
    runs = [read_run(folder) for folder in folders]
    paths = [run.path.resolve() for run in runs]
    return [_named(run, _own_name(path, set(paths) - {path})) for run, path in zip(runs, paths, strict=True)]


def _own_name(path: Path, others: set[Path]) -> str:
    """The shortest end of ``path`` that no other one has."""
    ends = (path.parts[-length:] for length in range(1, len(path.parts)))
    own = ("/".join(end) for end in ends if all(other.parts[-len(end) :] != end for other in others))
    return next(own, str(path))


def _named(run: RunData, name: str) -> RunData:
    return replace(run, name=name, results=[replace(results, run=name) for results in run.results])


def read_curves(path: str | Path, keys: Mapping[str, Sequence[str]]) -> Curves:
    """Training curves from a ``metrics.jsonl``, by phase and label, each as (steps, values).

    ``keys``: what to read of each phase, in this order; a label is "key" in training and "key (validation)" there.
    Phases and keys without a value are left out, and so is a torn last line.
    """
    curves: Curves = {phase: {} for phase in keys}
    for row in _rows(Path(path)):
        for key in keys.get(row["phase"], ()):
            value = row.get(key)
            if value is not None:
                label = key if row.get("kind") == "train" else f"{key} ({row.get('kind')})"
                steps, heights = curves[row["phase"]].setdefault(label, ([], []))
                steps.append(float(row["step"]))
                heights.append(float(value))
    return {phase: found for phase, found in curves.items() if found}


def _results(run: str, file: Path, config: Mapping[str, Any]) -> Results:
    content = read_results(file)
    return Results(run, file.name, content, content.get("sample") or config.get("sample", {}))


def _settings(file: Path) -> Mapping[str, Any]:
    """``config.yaml`` as it is, of whatever version: nothing is started with it."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from error
    return content if isinstance(content, dict) else {}


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _figures(file: Path, start: str) -> Mapping[str, Any]:
    """Those of an outcome whose names begin with ``start``, without it."""
    metrics = _json(file).get("metrics")
    found = metrics.items() if isinstance(metrics, dict) else ()
    return {name.removeprefix(start): value for name, value in found if name.startswith(start)}


def _questions(file: Path) -> dict[str, list[QuestionResult]]:
    try:
        return read_questions(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not what training/evaluate.py writes ({error}); run it again") from error


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run is being written, or was cut off there
                return
            raise ValueError(f"{path}:{number}: not JSON ({error}); delete the line") from error
