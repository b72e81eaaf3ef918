"""From data to report: LaDiR from nothing on arithmetic puzzles or word problems, every training phase through the deepspeed
launcher.

Makes the records, trains a base LM and, from it, LaDiR (VAE, latents, denoiser) and the autoregressive baseline for as many
seconds, evaluates both, draws the report and shows what came out; demo.stages leaves parts away, and with rl.enabled=true both
learn from rewards at the end of their seconds.  The two train side by side, each with half of the processes; with one process
they take turns.  Run again, it skips what is finished and continues what was interrupted.
"""

from __future__ import annotations

if not __package__:  # started as a program
    import preflight  # noqa: F401

import argparse
import hashlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.text import Text

from ladir.config import Config
from ladir.config.loader import parse_args
from ladir.evaluation.report import examples, results_table, shown_figures
from ladir.evaluation.results import QuestionResult, read_questions, read_results
from ladir.report.fitting import print_text, print_whole
from training.jobs import POLL_SECONDS, Job, launcher_command, tail, threads_of
from training.runtime.files import read_json, write_json
from training.runtime.preemption import INTERRUPTED_STATUS
from training.runtime.run import RunFolder, relevant_settings

ENTRIES = Path(__file__).parent
LOG_TAIL = 30
#: name of the evaluation of data.test_held_out
HELD_OUT = "held-out"
#: stages that go with another one
_WITH = {"rollout": "denoiser", f"evaluate-{HELD_OUT}": "evaluate"}
_RECORDS = {"countdown": "puzzles", "gym": "records of reasoning-gym"}


@dataclass(frozen=True)
class Stage:
    """One step of the way: what it is for people, and the program with its own settings."""

    name: str
    title: str
    command: Callable[[], list[str]]
    trains: bool = False
    """Whether it is a training phase, which leaves an outcome in the run folder when it is finished."""


#: stages that run one after another
Track = list[Stage]


@dataclass
class Lane:
    """A track under way: the stages left, the first of which ``job`` runs."""

    stages: Track
    ran: bool
    """Whether a stage before those left had to run, so that they must."""
    job: Job | None = None
    fingerprint: str = ""

    @property
    def finished(self) -> bool:
        """Nothing is left."""
        return not self.stages


class Demo:
    """The stages of one demo run and the record (``demo.json``) of those that are finished."""

    def __init__(self, config: Config, arguments: argparse.Namespace, console: Console) -> None:
        self.config, self.console = config, console
        self.ranks, self.seconds = arguments.ranks, arguments.seconds
        self._labels: dict[str, str] = {}
        self.folder = RunFolder(config)
        self.logs = self.folder.path / "logs"
        self.record_file = self.folder.path / "demo.json"
        self.record: dict[str, dict[str, Any]] = read_json(self.record_file)
        given = [*(["--config", arguments.config] if arguments.config else []), *arguments.overrides]
        self.settings = [*given, "run.exclusive=false"]  # the baseline trains beside LaDiR

    def plan(self) -> list[list[Track]]:
        """What is run one after another; within a part, tracks run side by side where there are processes for each."""
        together = max(1, self.ranks // 2)
        base = self._entry("train_ar", "ar.phase=base", "ar.from_scratch=true")
        ladir = [
            Stage("vae", "VAE: sentence <-> thought tokens", self._entry("train_vae", ranks=together), trains=True),
            Stage("latents", "latents of the training records", self._entry("encode_latents", ranks=together)),
            Stage("denoiser", "denoiser: thought tokens from noise", self._denoiser(together), trains=True),
            *(self._rollout(together) if self.config.rollout.enabled else ()),
            *(self._reinforced("rl", together)),
            Stage("export", "export as a Hugging Face folder", self._export),
        ]
        ar = [
            Stage("ar", "AR baseline: the base LM trained on for as long", self._baseline(together), trains=True),
            *(self._reinforced("ar-rl", together)),
        ]
        parts = [
            [[Stage("data", f"{_RECORDS[self.config.demo.data]} as JSONL", self._data)]],
            [[Stage("base", "base LM: a new LM learns chains of thought", base, trains=True)]],
            *([[ladir, ar]] if self.ranks > 1 else [[ladir], [ar]]),
            [self._evaluations()],
            [[Stage("report", "report: curves, and thoughts forming", self._report)]],
        ]
        return self._chosen(parts)

    def _chosen(self, parts: Sequence[Sequence[Track]]) -> list[list[Track]]:
        """Of these, what demo.stages names."""

        def named(stage: Stage) -> bool:
            return _WITH.get(stage.name, stage.name) in self.config.demo.stages

        kept = [[[stage for stage in track if named(stage)] for track in part] for part in parts]
        without_empty = [[track for track in part if track] for part in kept]
        return [part for part in without_empty if part]

    def _evaluations(self) -> Track:
        """Of the test records, and of those of another kind where there are any."""
        rows = self._rows()
        stages = [Stage("evaluate", "evaluation on the test records", self._entry("evaluate", *rows))]
        if self.config.data.test_held_out is not None:
            held_out = (*rows, "evaluate.split=test_held_out", f"evaluate.name={HELD_OUT}")
            stages.append(Stage(f"evaluate-{HELD_OUT}", "evaluation on what is held out", self._entry("evaluate", *held_out)))
        return stages

    def run(self) -> None:
        """Run every stage that is not finished, and all after one that ran; ends the process where one fails."""
        parts, ran = self.plan(), False
        names = [stage.name for part in parts for track in part for stage in track]
        self._labels = {name: f"[{number}/{len(names)}]" for number, name in enumerate(names, start=1)}
        for part in parts:
            ran |= self._run_part([Lane(track, ran) for track in part])

    def _run_part(self, lanes: Sequence[Lane]) -> bool:
        """Run tracks side by side to their ends; says whether anything had to run."""
        with self.console.status("") as status:
            try:
                while not all(lane.finished for lane in lanes):
                    for lane in lanes:
                        self._advance(lane)
                    if self.console.is_terminal:
                        status.update(Group(*(line for lane in lanes for line in self._watched(lane))))
                    time.sleep(POLL_SECONDS)
            except BaseException as error:
                self._stop(lanes)
                if isinstance(error, KeyboardInterrupt):
                    self._line("stopped; the same command continues")
                    sys.exit(INTERRUPTED_STATUS)
                raise
        return any(lane.ran for lane in lanes)

    def _advance(self, lane: Lane) -> None:
        """Start a lane's next stage, or note how the one under way has ended."""
        if lane.job is None:
            self._start_next(lane)
        elif (result := lane.job.poll()) is not None:
            stage, record = lane.stages[0], self.record[lane.stages[0].name]
            self._charge(lane)
            record["peak_gib"] = max(record["peak_gib"], result.peak_gib)
            if result.status == INTERRUPTED_STATUS:
                self._line(f"{self._label(stage)}: interrupted and saved; the same command continues")
                sys.exit(INTERRUPTED_STATUS)
            if result.status != 0 or (stage.trains and self.folder.outcome(stage.name) is None):
                self._fail(stage, result.status)
            record["settings"] = lane.fingerprint
            write_json(self.record_file, self.record)
            self._line(f"{self._label(stage)}: {_clock(result.seconds)}")
            lane.stages.pop(0)

    def _start_next(self, lane: Lane) -> None:
        """Start the first stage that is not finished."""
        while lane.stages:
            stage = lane.stages[0]
            command = stage.command()
            lane.fingerprint = self._fingerprint(stage, command)
            record = self.record.setdefault(stage.name, {"settings": None, "seconds": 0.0, "peak_gib": 0.0})
            if lane.ran or record["settings"] != lane.fingerprint:
                if record["settings"] is not None and not stage.trains:
                    record["seconds"] = 0.0  # all of it is done anew
                lane.ran, record["settings"] = True, None
                lane.job = Job(command, self._log(stage), threads_of(self.ranks))
                if not self.console.is_terminal:
                    self._line(f"{self._label(stage)} ...")
                return
            self._line(f"{self._label(stage)}: done before ({_clock(record['seconds'])})")
            lane.stages.pop(0)

    def _charge(self, lane: Lane) -> None:
        """Add what the stage under way took to what it had cost before it was interrupted."""
        if lane.job is not None:
            self.record[lane.stages[0].name]["seconds"] += lane.job.seconds
            lane.job = None
            write_json(self.record_file, self.record)

    def _stop(self, lanes: Sequence[Lane]) -> None:
        """Let all jobs save and stop; the saving counts, too."""
        running = [lane.job for lane in lanes if lane.job is not None]
        try:
            with ThreadPoolExecutor() as stopping:
                list(stopping.map(Job.stop, running))
        finally:
            for lane in lanes:
                self._charge(lane)

    def _watched(self, lane: Lane) -> list[Text]:
        """A lane's stage and the last line it wrote."""
        if lane.job is None:
            return []
        width, stage = self.console.width - 4, lane.stages[0]
        line = "  ".join(["", *tail(self._log(stage), 1)])
        return [Text(f"{self._label(stage)}  {_clock(lane.job.seconds)}"[:width]), Text(line[:width], style="dim")]

    def show(self) -> None:
        """Print the table, some questions, what it cost and what to try next."""
        file, held_out = (self.folder.path / f"results{label}.json" for label in ("", f"-{HELD_OUT}"))
        shown: list[QuestionResult] = []
        if file.is_file():
            beside = read_results(held_out) if self.config.data.test_held_out and held_out.is_file() else None
            self.console.print()
            content = read_results(file)
            print_whole(self.console, partial(results_table, content, beside), shown_figures(content))
            shown = self._solved_first(read_questions(self.folder.path / "generations.jsonl").get("ladir", []))
            self.console.print("\nLaDiR's thoughts, decoded to text (first trajectory of each question):\n")
            print_text(self.console, examples(shown, self.config.evaluate.examples))
        seconds, memory = self._cost()
        self._line(f"total {_clock(seconds)}, at most {memory:.1f} GiB of memory")
        self._line(f"results {self.folder.path / 'results.json'}   logs {self.logs}")
        self._line(f"report {self.folder.path / 'report' / 'report.html'} (open it in a browser)")
        self._line("\nNext:")
        for command, meaning in self._next_commands(shown):
            self._line(f"  {command}\n      {meaning}")

    def _cost(self) -> tuple[float, float]:
        """Seconds from start to end, and the most memory in GiB: tracks side by side take the longest one's time, their memory
        adds up."""
        seconds, memory = 0.0, 0.0
        for part in self.plan():
            tracks = [[self.record[stage.name] for stage in track] for track in part]
            seconds += max(sum(stage["seconds"] for stage in track) for track in tracks)
            memory = max(memory, sum(max(stage["peak_gib"] for stage in track) for track in tracks))
        return seconds, memory

    def _rollout(self, ranks: int) -> list[Stage]:
        title = "denoiser, stage 2: answers through its own thoughts"
        return [Stage("rollout", title, self._entry("train_denoiser", "stage=rollout", ranks=ranks), trains=True)]

    def _reinforced(self, stage: str, ranks: int) -> list[Stage]:
        """Stage 3 of one lane, where it is part of the run; the baseline's completions learn under the same settings."""
        if stage not in third_stages(self.config):
            return []
        titles = {"rl": "denoiser, stage 3: learning from its judged answers", "ar-rl": "AR baseline: the same, for as long"}
        own = ("rl.policy=text", "rl.answers=1", "rl.algorithm=nft") if stage == "ar-rl" else ()
        return [Stage(stage, titles[stage], self._entry("train_rl", *own, ranks=ranks), trains=True)]

    def _rows(self) -> list[str]:
        """Has an evaluation ask what learned from rewards, too, where its rows do not name that."""
        methods = self.config.evaluate.methods
        rows = {"rl": "ladir-rl", "ar-rl": "ar-rl"}
        new = [row for stage, row in rows.items() if stage in third_stages(self.config) and row not in methods]
        return [f"evaluate.methods=[{','.join([*methods, *new])}]"] if new else []

    def _data(self) -> list[str]:
        out = ["--out", str(self.folder.path / "data")]
        return [sys.executable, "-m", "ladir", self.config.demo.data, *out, *self.settings]

    def _export(self) -> list[str]:
        return [sys.executable, str(ENTRIES / "export.py"), *self.settings]

    def _report(self) -> list[str]:
        return [sys.executable, "-m", "ladir", "report", str(self.folder.path)]

    def _entry(self, name: str, *overrides: str, ranks: int | None = None) -> Callable[[], list[str]]:
        script = ENTRIES / f"{name}.py"
        return lambda: launcher_command(script, ranks or self.ranks, [*self.settings, *overrides])

    def _denoiser(self, ranks: int) -> Callable[[], list[str]]:
        """The denoiser trains for what VAE and latents have left of LaDiR's seconds (and stages 2 and 3 will need)."""

        def command() -> list[str]:
            outcomes = [self.folder.outcome(phase) for phase in ("vae", "latents")]
            left = self.seconds - sum(outcome.seconds for outcome in outcomes if outcome is not None)
            left -= later_seconds(self.config, "rl")
            if left < 1.0:
                taken = f"VAE, latents and later stages take {self.seconds - left:.0f}"
                self._line(f"--seconds={self.seconds:g} leaves the denoiser none: {taken}; give more, and it goes on")
                sys.exit(1)
            return self._entry("train_denoiser", f"denoiser.train.max_seconds={left:.1f}", ranks=ranks)()

        return command

    def _baseline(self, ranks: int) -> Callable[[], list[str]]:
        """The AR baseline trains for the seconds that LaDiR has after the base LM, which both start from, less its stage 3's."""
        seconds = self.seconds - later_seconds(self.config, "ar-rl")
        settings = ("ar.phase=ar", "ar.copy_fraction=0", f"ar.train.max_seconds={seconds:.1f}")
        return self._entry("train_ar", *settings, ranks=ranks)

    def _fail(self, stage: Stage, status: int) -> NoReturn:
        log = self._log(stage)
        for line in tail(log, LOG_TAIL):
            self._line(f"    {line}")
        self._line(f"{self._label(stage)}: failed with status {status}; the lines above end {log}")
        self._line("When the cause is mended, the same command continues from the last checkpoint.")
        sys.exit(1)

    def _label(self, stage: Stage) -> str:
        return f"{self._labels[stage.name]} {stage.title}"

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name}.log"

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
        tools = Path(sys.executable).parent
        if tools.is_relative_to(Path.cwd()):
            tools = tools.relative_to(Path.cwd())
        puzzle = questions[0].question if questions else "3 7 12 -> 45"
        return [
            (
                shlex.join([f"{tools}/python", "-m", "ladir", puzzle, "--model", str(self.folder.export), "--trace"]),
                "ask it, and see each thought form out of noise",
            ),
            (shlex.join([f"{tools}/tensorboard", "--logdir", f"{self.folder.path}/tensorboard"]), "look at the training"),
            (shlex.join([f"{tools}/python", "-m", "ladir", "inspect", "your.jsonl"]), "see how records of yours would be read"),
        ]

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def third_stages(config: Config) -> list[str]:
    """Those of stage 3 that are run: LaDiR's and the baseline's, or with rl.policy=text the baseline's alone."""
    lanes = ("ar-rl",) if config.rl.policy == "text" else ("rl", "ar-rl")
    return [stage for stage in lanes if config.rl.enabled and stage in config.demo.stages]


def later_seconds(config: Config, stage: str) -> float:
    """What stages 2 and 3 take of the seconds of a lane, named by its stage 3: rl is LaDiR's, ar-rl the baseline's."""
    second = stage == "rl" and config.rollout.enabled and "denoiser" in config.demo.stages
    trains = [config.rollout.train] * second + [config.rl.train] * (stage in third_stages(config))
    return sum(train.max_seconds or 0.0 for train in trains)


def refused(config: Config, seconds: float) -> str:
    """What is wrong with ``seconds`` for each lane, or with the settings of stage 3 where it is on; "" where nothing is."""
    taken = max(later_seconds(config, stage) for stage in ("rl", "ar-rl"))
    if seconds < taken + 1.0:
        settings = "rollout.train.max_seconds, rl.train.max_seconds"
        return f"--seconds={seconds:g}: stages 2 and 3 alone take {taken:g} ({settings}); give more"
    if not config.rl.enabled:
        return ""
    if not third_stages(config):
        policy = f" (rl.policy={config.rl.policy})" if config.rl.policy == "text" else ""
        return f"rl.enabled=true{policy}: demo.stages leaves stage 3 out; add rl or ar-rl to it, or set rl.enabled=false"
    if config.rl.train.max_seconds is None:
        return (
            "rl.enabled=true: both lanes train for the same seconds, and those of stage 3 are not known; set "
            "rl.train.max_seconds (and rl.train.max_steps=null, so that it does not end before)"
        )
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    config, arguments = parse_args(argv, __doc__ or "", _add_arguments)
    if problem := refused(config, arguments.seconds):
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {problem}\n")
        raise SystemExit(2)
    signal.signal(signal.SIGTERM, _interrupt)
    demo = Demo(config, arguments, Console())
    demo.run()
    demo.show()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes that train at the same time (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=580.0, help="that LaDiR and the AR baseline train for, each (default: 580)"
    )


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    main()
