"""What people see of stage 3: TensorBoard's charts, a good and a bad attempt there and in the run folder."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ladir.evaluation.results import Trajectory
from ladir.report.runs import Attempt, read_run
from ladir.rl.lines import Answered, Group, Line, figures
from tests.test_samples import assert_charts_find, read_events
from tests.toy_phase import toy_config
from training.phases.rl import show_attempts
from training.runtime import dashboard
from training.runtime.distributed import World
from training.runtime.run import Run
from training.runtime.telemetry import Telemetry


@pytest.mark.parametrize("phase", ["rl", "ar-rl"])
def test_stage_3_has_charts_of_its_own(phase: str) -> None:
    """What an iteration, and the policies, report is found by a chart, and every chart of learning finds something."""
    chain = Trajectory("1", True, "1", ("so",), chain_correct=True)
    line = Line(torch.zeros(1, 1, 1), (Answered([5], chain, 1.0, True), Answered([6], chain, 0.0, True)))
    losses = ("loss", "nft", "steps", "answers", "kl")
    policies = ("nft_distance", "start_distance", "token_ratio", "token_clipped", "step_ratio", "step_clipped")
    seconds = ("sampling_seconds", "judging_seconds", "learning_seconds")
    tags = {dashboard.tag(phase, name) for name in (*figures([Group("q", [1], (line, line))]), *losses, *policies, *seconds)}
    assert {f"2 quality/{phase}/pass@4", f"1 losses/{phase}/kl", f"5 speed/{phase}/judging_seconds"} <= tags
    assert_charts_find(phase, tags)
    ((title, charts),) = dashboard.layout(phase).items()
    assert "stage 3" in title
    learning = [pattern for name, (_, (pattern,)) in charts.items() if name in dict.fromkeys(n for n, *_ in dashboard._LEARNING)]
    assert len(learning) == len(dashboard._LEARNING) and all(any(re.search(p, tag) for tag in tags) for p in learning)


def test_a_good_and_a_bad_attempt_are_shown_and_kept(tmp_path: Path) -> None:
    """As a text of TensorBoard, and in the file that the report reads, which is there without loggers, too."""
    answered = [
        Answered([1], Trajectory(answer, reward > 0, answer, ("a|thought",)), reward, True)
        for answer, reward in (("x", 0.0), ("best", 2.0), ("worst", -1.0))
    ]
    last = [Group("why?", [1], tuple(Line(torch.zeros(1, 1, 1), (entry,)) for entry in answered))]
    config = toy_config(tmp_path)
    for loggers in (["tensorboard"], []):
        config.telemetry.loggers = loggers
        run = Run(config, "rl", World(0, 1, 0, torch.device("cpu")))
        run.folder.path.mkdir(exist_ok=True)
        with Telemetry(run, 0) as telemetry:
            show_attempts(SimpleNamespace(last=last), telemetry, 7 - len(loggers))
            show_attempts(SimpleNamespace(last=[]), telemetry, 9)  # a start that made no attempts keeps what there is
    shown = read_events(run.folder.tensorboard("rl") / "validation").Tensors("attempts/text_summary")
    assert [event.step for event in shown] == [6]
    _, _, best, worst = shown[0].tensor_proto.string_val[0].decode().splitlines()
    assert best == "| `why?` | `a¦thought`<br>`best` | `2` |" and worst == "| `why?` | `a¦thought`<br>`worst` | `-1` |"
    for file in (run.folder.config("rl"), run.folder.path / "config.yaml"):
        file.write_text("rl: {policy: latents}\n")
    found = read_run(run.folder.path).attempts["rl"]
    assert (found.step, found.question) == (7, "why?")
    assert (found.best, found.worst) == (Attempt(["a|thought"], "best", 2.0), Attempt(["a|thought"], "worst", -1.0))
