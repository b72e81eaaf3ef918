"""``python -m ladir``: inspect, countdown, asking; exit status and messages."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import io
import json
import math
import os
import pkgutil
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ladir import reasoner
from ladir.__main__ import main, program
from ladir.cli.ask import render
from ladir.cli.commands import COMMANDS
from ladir.cli.live import LiveTrace
from ladir.config import SampleSettings
from ladir.models.pairing import TrainedOn
from ladir.tasks import get_task
from ladir.tokens import build_word_tokenizer
from tests.test_reasoner import tiny_reasoner

SMALL = ["countdown.train=30", "countdown.validation=5", "countdown.test=5", "countdown.max_number=9"]


@pytest.fixture
def puzzles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["countdown", "--out", str(tmp_path / "cd"), *SMALL]) == 0
    assert f"{tmp_path / 'cd'}/test.jsonl: 5 lines" in capsys.readouterr().out
    return tmp_path / "cd"


def test_countdown_follows_the_seed(puzzles: Path, tmp_path: Path) -> None:
    assert main(["countdown", *SMALL, "--out", str(tmp_path / "same")]) == 0
    assert main(["countdown", *SMALL, "run.seed=1", "--out", str(tmp_path / "other")]) == 0
    train = (puzzles / "train.jsonl").read_text()
    assert (tmp_path / "same" / "train.jsonl").read_text() == train
    assert (tmp_path / "other" / "train.jsonl").read_text() != train


def test_inspect_shows_blocks_lengths_and_verdict(puzzles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tokenizer = str(puzzles / "train.jsonl"), str(puzzles / "tokenizer")
    first = json.loads((puzzles / "train.jsonl").read_text().splitlines()[0])
    assert main(["inspect", file, "--tokenizer", tokenizer, "--show", "1"]) == 0
    out = capsys.readouterr().out
    step, _, answer = first["output"].split("\n")
    assert f"question: {first['input']}" in out and f"block  1: {step}" in out
    assert f"answer: {answer.removeprefix('#### ')}" in out
    assert "blocks per record" in out and " 0 bad" in out and "does not know" not in out


def test_inspect_refuses_what_training_would(puzzles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tokenizer = tmp_path / "my.jsonl", str(puzzles / "tokenizer")
    good = {"input": "[bold] words", "output": "12 + 3 = 15\n#### 15"}
    file.write_text(json.dumps(good) + "\n{}\n" + json.dumps({**good, "input": "1 2 3 4"}) + "\n")
    command = ["inspect", str(file), "--tokenizer", tokenizer, "data.max_question_tokens=3"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "3 records: 1 usable, 2 bad" in out
    assert f"{file}:2: no field 'input'" in out and f"{file}:3: its question has 4 tokens" in out
    assert "1 records hold words that the tokenizer does not know" in out and "[bold] words" in out
    assert main([*command, "data.on_bad_record=skip"]) == 0
    assert main(["inspect", str(file), "data.input_field=x"]) == 1
    assert "No tokenizer given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["inspect", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        (["inspect", "x.jsonl", "data.inptu_field=a"], 2, "did you mean data.input_field"),
        (["countdown", "--out", "x", "countdown.train=99999999"], 1, "gave only"),
        (["3 7 12 -> 45", "--model", "nowhere"], 1, "nowhere: no such folder; training/export.py writes"),
        (["3 7", "7 \udcff", "--model", "."], 1, "question 2 holds half a surrogate pair at character 2"),
    ],
)
def test_faults_are_told_without_a_traceback(
    argv: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "remedy"), [(errno.EACCES, "give yourself access to it"), (errno.ENOSPC, "make room there")])
def test_files_that_cannot_be_written_are_told_without_a_traceback(
    number: int, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(argv: list[str]) -> int:
        raise OSError(number, os.strerror(number), "runs/my/report")

    monkeypatch.setattr("ladir.__main__.run", refused)
    assert main(["report", "runs/my"]) == 1
    told = f"ladir: runs/my/report: {os.strerror(number)}; {remedy}, or name another place (--out)\n"
    assert capsys.readouterr().err == told


class FakeReasoner:
    """Answers from a table, noting how it was asked."""

    def __init__(self) -> None:
        self.tokenizer = build_word_tokenizer(["3", "7", "->", "21"])
        self.asked: dict[str, Any] = {}

    def settings_with(self, **controls: Any) -> SampleSettings:
        return dataclasses.replace(SampleSettings(), **{name: value for name, value in controls.items() if value is not None})

    def generate(self, questions: list[str], on_step: Any = None, **controls: Any) -> list[list[reasoner.Trajectory]]:
        self.asked = controls
        for step, text in enumerate(["9 9", "3 * 7 = 21"] if on_step else []):
            on_step(0, 0, step, text)
        trace = [["9 9", "3 * 7 = 21"]] if on_step else []
        trajectory = reasoner.Trajectory("3 * 7", ["3 * 7 = 21"], torch.zeros(1, 1, 2), 2, False, trace)
        return [[trajectory] * controls["num_trajectories"] for _ in questions]


def test_asking_prints_thoughts_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeReasoner()
    monkeypatch.setattr(reasoner.Reasoner, "from_pretrained", lambda folder, device=None, base=None: fake)
    assert main(["3 7 -> 21", "--model", str(tmp_path), "--trajectories", "2", "--num-steps", "5", "--seed", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("trajectory 1:\n") == captured.out.count("trajectory 2:\n") == 1
    assert captured.out.count("  thought 1: 3 * 7 = 21\n") == 2 and captured.out.count("answer: 3 * 7\n") == 2
    assert "limit on blocks" in captured.out and "step" not in captured.out and captured.err == ""
    assert (fake.asked["num_steps"], fake.asked["seed"], fake.asked["initial_noise"]) == (5, 4, None)
    assert main(["ask", "what is 3", "--model", str(tmp_path), "--trace"]) == 0
    captured = capsys.readouterr()
    assert "block 1, step  1: 9 9\n  block 1, step  2: 3 * 7 = 21\n  thought 1" in captured.out
    assert "does not know all of 'what is 3'" in captured.err
    assert main(["3 7 -> 21", "--model", str(tmp_path), "--trajectories", "0"]) == 1


def test_ctrl_c_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeReasoner, "generate", interrupted)
    monkeypatch.setattr(reasoner.Reasoner, "from_pretrained", lambda folder, device=None, base=None: FakeReasoner())
    assert main(["3 7 -> 21", "--model", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ladir: stopped by Ctrl-C\n"


def test_a_real_ctrl_c_ends_with_one_line(tmp_path: Path) -> None:
    tiny_reasoner(num_steps=100_000).save_pretrained(tmp_path / "export")
    command = [sys.executable, "-m", "ladir", "a b c", "--model", str(tmp_path / "export"), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1)  # it imports, loads or answers: at any time the same
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT) and (out, errors) == ("", "ladir: stopped by Ctrl-C\n")


def test_a_trace_is_live_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reasoner.Reasoner, "from_pretrained", lambda folder, device=None, base=None: FakeReasoner())
    command = ["3 7 -> 21", "--model", str(tmp_path), "--trace", "--num-steps", "2"]
    assert main(command) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == piped.out
    assert "trajectory 1, block 1" in shown.err and "9 9" in shown.err and "step 1 of 2" in shown.err


def in_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status of a program whose stdout and stderr are a terminal of 24 lines, and what it wrote there."""
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    shown = b""
    with subprocess.Popen(command, stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        with contextlib.suppress(OSError):  # Linux says so where a terminal's last writer has gone
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    return process.returncode, shown.decode().replace("\r\n", "\n")


def test_a_real_trace_is_live_on_a_terminal_and_plain_in_a_pipe(tmp_path: Path) -> None:
    model = tiny_reasoner(num_steps=30)
    with torch.no_grad():
        model.denoiser.stop_head.bias.fill_(-1e4)  # three blocks
    model.save_pretrained(tmp_path / "export")
    command = [sys.executable, "-m", "ladir", "a b c", "--model", str(tmp_path / "export"), "--trace", "--device", "cpu"]
    coloured = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {name: value for name, value in os.environ.items() if name not in coloured}
    environment |= {"TERM": "xterm-256color", "PYTHONUTF8": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", env=environment) as process:  # both at once
        terminal_status, shown = in_a_terminal(command, environment)
        piped, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    steps = re.findall(r"^  block (\d), step +(\d+): ", piped, re.MULTILINE)
    assert steps == [(str(block), str(step)) for block in (1, 2, 3) for step in range(1, 31)]
    assert piped.count("  thought ") == 3 and "\nanswer: " in piped and "\x1b" not in piped
    assert terminal_status == 0 and shown.endswith(piped)
    live = shown.removesuffix(piped)
    assert "trajectory 1, block 1" in live and "\x1b[2K" in live and "━" in live  # drawn over one another, with a bar
    assert len(set(re.findall(r"step \d+ of 30", live))) > 1


def test_live_lines_stay_within_the_terminal_and_hold_no_control_characters() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=8, color_system=None)
    with LiveTrace([str(number) for number in range(1, 31)], 10, console) as live:
        live._drawn = math.inf  # drawn by hand
        for trajectory in range(30):
            live.step(trajectory, trajectory % 3, 9, "\x1b]0;owned\x07 [bold] " + "long " * 100)
        with console.capture() as capture:
            console.print(live._view())
    lines = capture.get().splitlines()
    assert len(lines) == 5 and all(len(line) <= 60 for line in lines)
    assert "\x07" not in capture.get() and "[bold]" in capture.get() and "block 3" in lines[-1]


def test_answers_cannot_steer_the_terminal() -> None:
    trajectory = reasoner.Trajectory("a\x1b[2Jb\nc", ["x\ny\x9b"], torch.zeros(1, 1, 2), 2, True)
    text = render(trajectory)
    assert "\x1b" not in text and "\x9b" not in text
    assert "thought 1: x | y" in text and "b\nc" in text


def test_every_control_of_the_sampling_can_be_given_in_python_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeReasoner()
    monkeypatch.setattr(reasoner.Reasoner, "from_pretrained", lambda folder, device=None, base=None: fake)
    given = {"num_steps": 7, "lag": 3, "sampler": "sde", "spacing": "power", "spacing_power": 0.5, "initial_noise": 0.25}
    given |= {"guidance_scale": 1.5, "diversity_scale": 0.8, "restarts": 2, "restart_time": 0.6, "restart_steps": 4}
    given |= {"verifier_scale": 0.5, "renoise_time": 0.4, "renoise_steps": 2}
    given |= {"max_blocks": 5, "max_answer_tokens": 9, "answer_temperature": 0.1}
    given |= {"guidance_interval": [0.25, 0.75], "guidance_rescale": 0.7, "token_head_weight": 0.8, "lm_weight": 0.3}
    given |= {"thought_temperature": 0.9}
    texts = {name: map(str, value if isinstance(value, list) else [value]) for name, value in given.items()}
    options = [text for name, values in texts.items() for text in (f"--{name.replace('_', '-')}", *values)]
    ask = ["3 7 -> 21", "--model", str(tmp_path), "--seed", "4", "--trajectories", "2", "--choose", "majority"]
    ask += ["--task", "countdown"]
    for no, wanted in (("", True), ("no-", False)):
        assert main([*ask, *options, f"--{no}reencode", f"--{no}restart-keeps-state"]) == 0
        switches = {"reencode": wanted, "restart_keeps_state": wanted}
        kinds = {"choose": "majority", "canonical": get_task("countdown").canonical.__name__}
        asked = {**fake.asked, "canonical": fake.asked["canonical"].__name__}
        assert asked == {**given, **switches, **kinds, "seed": 4, "num_trajectories": 2, "batch_size": "auto"}
    controls = {field.name for field in dataclasses.fields(SampleSettings)} - {"max_thought_tokens", "thoughts_per_batch"}
    assert controls == {*given, *switches} <= inspect.signature(reasoner.Reasoner.generate).parameters.keys()
    assert main(ask) == 0
    assert {fake.asked[name] for name in controls} == {None}  # left to the export's settings


def test_the_folder_that_was_meant_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_reasoner().save_pretrained(tmp_path / "run" / "export")
    (tmp_path / "run" / "models" / "denoiser").mkdir(parents=True)
    (tmp_path / "run" / "models" / "denoiser" / "ladir.json").write_text('{"kind": "denoiser"}')
    for place, fault in (
        ("run", "is no export (ladir.json is missing)"),
        ("run/exprot", "no such folder"),
        ("run/models/denoiser", "is no export (vae/ is missing)"),
        ("run/models/vae", "no such folder"),
    ):
        assert main(["a b", "--model", str(tmp_path / place), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert fault in error and f"did you mean {tmp_path / 'run' / 'export'}?" in error and len(error.splitlines()) == 1


def test_questions_longer_than_the_trainings_are_warned_of_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_reasoner()
    model.trained_on = TrainedOn(longest_question=3)
    model.save_pretrained(tmp_path / "export")
    ask = ["--model", str(tmp_path / "export"), "--device", "cpu"]
    assert main(["a b c", *ask]) == 0
    assert not caplog.messages
    assert main(["a b c", "a b c d e", "a b c d", *ask]) == 0
    assert caplog.messages == [
        "question 2 has 5 tokens; the longest that this model was trained on has 3: the answer may suffer",
    ]
    assert main(["a", "b " * 252, *ask]) == 1
    assert "question 2 has 252 tokens, too many for an LM of 256 positions" in capsys.readouterr().err
    loaded = reasoner.Reasoner.from_pretrained(tmp_path / "export", "cpu")
    caplog.clear()
    for length in (5, 5, 4, 6):  # told once, and of what is longer still
        loaded.generate([" ".join("abcdefg"[:length])])
    assert [message.split()[3] for message in caplog.messages] == ["5", "6"]


def test_help_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "ladir", "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    theirs = {"harness": "lm-eval"}
    assert capsys.readouterr().out.startswith(f"usage: {theirs.get(name, f'python -m ladir {name}')} ")


def test_the_program_ladir_is_the_same() -> None:
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name: pkgutil.resolve_name(target) for name, target in scripts.items()} == {"ladir": program}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspct", "x.jsonl"], "unknown command inspct; did you mean inspect?"),
        (["Report", "runs/x"], "unknown command Report; did you mean report?"),
        (["aks", "3 7 -> 21", "--model", "x"], "unknown command aks; did you mean ask?"),
        (["train"], "unknown command train; there are ask, answer, "),
        ([], "usage: python -m ladir COMMAND"),
    ],
)
def test_a_mistyped_command_is_told_the_closest(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_question_of_one_word_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeReasoner()
    monkeypatch.setattr(reasoner.Reasoner, "from_pretrained", lambda folder, device=None, base=None: fake)
    for argv in (["Why?"], ["hello"], ["ask", "report"]):
        assert main([*argv, "--model", str(tmp_path)]) == 0
