"""The demo: LaDiR from nothing on arithmetic puzzles, every training phase through the deepspeed launcher.

Makes the puzzles, trains base LM, VAE and denoiser and, for as many seconds, the autoregressive baseline, evaluates both,
exports LaDiR and shows what came out.  Run again, it skips what is finished and continues what was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.text import Text

from ladir.config import Config
from ladir.config_loader import parse_args
from ladir.evaluation.plots import plot_run, read_curves
from ladir.evaluation.report import examples, results_table
from ladir.evaluation.results import QuestionResult, read_questions, read_results
from training.jobs import launcher_command, run_job, tail
from training.runtime.files import write_json
from training.runtime.run import RunFolder, relevant_settings

ENTRIES = Path(__file__).parent
LOG_TAIL = 30
CURVES = {
    "base": ("loss",),
    "vae": ("reconstruction",),
    "denoiser": ("flow", "answer", "stop", "token"),
    "rollout": ("flow", "answer", "stop", "rollout"),
    "ar": ("loss",),
}


@dataclass(frozen=True)
class Stage:
    """One step of the demo: what it is for people, and the program with its own settings."""

    name: str
    title: str
    command: Callable[[], list[str]]
    trains: bool = False
    """Whether it is a training phase, which leaves an outcome in the run folder when it is finished."""


class Demo:
    """The stages of one demo run and the record (``demo.json``) of those that are finished."""

    def __init__(self, config: Config, arguments: argparse.Namespace, console: Console) -> None:
        self.config, self.console, self.ranks = config, console, arguments.ranks
        self.folder = RunFolder(config)
        self.logs = self.folder.path / "logs"
        self.record_file = self.folder.path / "demo.json"
        self.record: dict[str, dict[str, Any]] = _read_json(self.record_file)
        self.settings = [*(["--config", arguments.config] if arguments.config else []), *arguments.overrides]

    def stages(self) -> list[Stage]:
        """All stages in their order."""
        return [
            Stage("puzzles", "puzzles as JSONL", self._puzzles),
            Stage(
                "base",
                "base LM: a new Llama learns chains of thought",
                self._entry("train_ar", "ar.phase=base", "ar.from_scratch=true"),
                trains=True,
            ),
            Stage("vae", "VAE: sentence <-> thought tokens", self._entry("train_vae"), trains=True),
            Stage("latents", "latents of the training puzzles", self._entry("encode_latents")),
            Stage("denoiser", "denoiser: thought tokens from noise", self._entry("train_denoiser"), trains=True),
            *(self._rollout() if self.config.rollout.enabled else ()),
            Stage("ar", "AR baseline: the base LM trained on for as long", self._baseline, trains=True),
            Stage("export", "export as a Hugging Face folder", self._entry("export", ranks=1)),
            Stage("evaluate", "evaluation on held-out puzzles", self._entry("evaluate")),
        ]

    def run(self) -> None:
        """Run every stage that is not finished, and all after one that ran; ends the process where one fails."""
        stages, ran = self.stages(), False
        for number, stage in enumerate(stages, start=1):
            label = f"[{number}/{len(stages)}] {stage.title}"
            command = stage.command()
            fingerprint = self._fingerprint(stage, command)
            record = self.record.setdefault(stage.name, {"settings": None, "seconds": 0.0, "peak_gib": 0.0})
            if not ran and record["settings"] == fingerprint:
                self._line(f"{label}: done before ({_clock(record['seconds'])})")
                continue
            ran, record["settings"] = True, None
            self._run_stage(stage, label, command)
            record["settings"] = fingerprint
            write_json(self.record_file, self.record)

    def show(self) -> None:
        """Print the table, some puzzles, what it cost and what to try next; write the curves."""
        results = read_results(self.folder.path / "results.json")
        questions = read_questions(self.folder.path / "generations.jsonl")
        picture = self.folder.path / "curves.png"
        plot_run(picture, read_curves(self.folder.metrics, CURVES), results)
        self.console.print()
        self.console.print(results_table(results))
        shown = self._solved_first(questions.get("ladir", []))
        self.console.print("\nLaDiR's thoughts, decoded to text (first trajectory of each puzzle):\n")
        self.console.print(examples(shown, self.config.evaluate.examples))
        seconds = sum(stage["seconds"] for stage in self.record.values())
        memory = max(stage["peak_gib"] for stage in self.record.values())
        self._line(f"total {_clock(seconds)}, at most {memory:.1f} GiB of memory")
        self._line(f"results {self.folder.path / 'results.json'}   curves {picture}   logs {self.logs}")
        self._line("\nNext:")
        for command, meaning in self._next_commands(shown):
            self._line(f"  {command}\n      {meaning}")

    def _rollout(self) -> list[Stage]:
        title = "denoiser, stage 2: answers through its own thoughts"
        return [Stage("rollout", title, self._entry("train_denoiser", "stage=rollout"), trains=True)]

    def _puzzles(self) -> list[str]:
        out = ["--out", str(self.folder.path / "data")]
        return [sys.executable, "-m", "ladir", "countdown", *out, *self.settings]

    def _entry(self, name: str, *overrides: str, ranks: int | None = None) -> Callable[[], list[str]]:
        script = ENTRIES / f"{name}.py"
        return lambda: launcher_command(script, ranks or self.ranks, [*self.settings, *overrides])

    def _baseline(self) -> list[str]:
        """The AR baseline trains for the seconds that LaDiR had after the base LM, which both started from."""
        second = ("rollout",) if self.config.rollout.enabled else ()
        outcomes = [self.folder.outcome(phase) for phase in ("vae", "latents", "denoiser", *second)]
        seconds = sum(outcome.seconds for outcome in outcomes if outcome is not None)
        return self._entry("train_ar", "ar.phase=ar", "ar.copy_fraction=0", f"ar.train.max_seconds={seconds:.1f}")()

    def _run_stage(self, stage: Stage, label: str, command: Sequence[str]) -> None:
        """Run a stage to its end and note its cost; a stage that was interrupted before adds to what it had cost."""
        log, record, start = self.logs / f"{stage.name}.log", self.record[stage.name], time.monotonic()
        if not self.console.is_terminal:
            self._line(f"{label} ...")
        with self.console.status(label) as status:

            def watch(seconds: float) -> None:
                width = self.console.width - 4
                line = Text("  ".join(["", *tail(log, 1)])[:width], style="dim")
                status.update(Group(Text(f"{label}  {_clock(seconds)}"[:width]), line))

            try:
                result = run_job(command, log, self.ranks, watch if self.console.is_terminal else lambda seconds: None)
            except KeyboardInterrupt:
                self._line(f"{label}: stopped; the same command continues it")
                sys.exit(130)
            finally:
                record["seconds"] += time.monotonic() - start
                write_json(self.record_file, self.record)
        record["peak_gib"] = max(record["peak_gib"], result.peak_gib)
        if result.status != 0 or (stage.trains and self.folder.outcome(stage.name) is None):
            self._fail(label, log, result.status)
        self._line(f"{label}: {_clock(result.seconds)}")

    def _fail(self, label: str, log: Path, status: int) -> NoReturn:
        for line in tail(log, LOG_TAIL):
            self._line(f"    {line}")
        self._line(f"{label}: failed with status {status}; the lines above end {log}")
        self._line("When the cause is mended, the same command continues from the last checkpoint.")
        sys.exit(1)

    def _fingerprint(self, stage: Stage, command: Sequence[str]) -> str:
        """Changes with the settings on which the stage's result depends (not with the launcher's port)."""
        own = [argument for argument in command if "=" in argument and argument not in self.settings]
        everything = asdict(self.config)
        relevant = relevant_settings(everything, stage.name) if stage.trains else everything
        return hashlib.sha256(json.dumps([relevant, own], sort_keys=True).encode()).hexdigest()

    def _solved_first(self, questions: Sequence[QuestionResult]) -> list[QuestionResult]:
        """Questions in their own order, one whose first trajectory is right in front."""
        first = next((question for question in questions if question.trajectories[0].correct), None)
        return [*([first] if first else []), *(question for question in questions if question is not first)]

    def _next_commands(self, questions: Sequence[QuestionResult]) -> list[tuple[str, str]]:
        python = Path(sys.executable)
        tools = python.parent
        if tools.is_relative_to(Path.cwd()):
            tools = tools.relative_to(Path.cwd())
        puzzle = questions[0].question if questions else "3 7 12 -> 45"
        return [
            (
                f'{tools}/python -m ladir "{puzzle}" --model {self.folder.export} --trace',
                "ask it, and see each thought form out of noise",
            ),
            (f"{tools}/tensorboard --logdir {self.folder.path}/tensorboard", "look at the training"),
            (f"{tools}/python -m ladir inspect your.jsonl", "see how records of yours would be read"),
        ]

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    config, arguments = parse_args(argv, __doc__ or "", _add_arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    demo = Demo(config, arguments, Console())
    demo.run()
    demo.show()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes per training phase (default: 2)")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    main()
