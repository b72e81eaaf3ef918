"""Programs as answers in stage 3: they run in the sandbox, beside sampling, and what they are worth is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ladir.config import Config, RlSettings
from ladir.data.records import Record
from ladir.rl.rewards import reward_function
from ladir.tasks import get_task
from tests.test_code import isolated, namespaces  # noqa: F401
from training.evaluation.answerers import Sampled
from training.evaluation.judging import judges_of
from training.reinforcement.asking import Asker
from training.reinforcement.samplers import Tries
from training.runtime.distributed import World

TESTS = "assert add(1, 2) == 3"
ANSWERS = {
    "def add(a, b):\n    return a + b": 1.25,  # right, and of the expected form
    "def add(a, b):\n    return a - b": 0.25,
    "def add(a, b):\n    while True: pass": 0.25,
    "import os\nos._exit(0)": 0.25,  # ends well before the tests
    "": 0.0,
}


class Programs:
    """Answers every question with the same programs; one line of thought each."""

    limit = 100

    def __call__(self, records: Sequence[Record], seed: int, steps: Sequence[int], give_way: Any) -> list[Tries]:
        none = [None] * len(ANSWERS)
        texts = [Sampled(answer, (), True) for answer in ANSWERS]
        return [
            Tries(record, [1], [torch.zeros(1, 1, 1)] * len(none), none, none, [[1]] * len(none), texts) for record in records
        ]


@isolated
@pytest.mark.parametrize("judges", [1, 3])
def test_programs_are_worth_what_their_tests_say(judges: int) -> None:
    config = Config()
    config.evaluate.task, config.evaluate.check_seconds, config.evaluate.judges = "code", 1.0, judges
    settings = RlSettings(questions_per_batch=1, format_weight=0.25)
    task = get_task("code", config.evaluate)
    asker = Asker(Programs(), task, reward_function(settings), settings, judges_of(config, 1))
    records = [Record(f"add {number}", (), "", f"line {number}", {"tests": TESTS}) for number in range(2)]
    alarm: Any = SimpleNamespace(give_way=lambda: None, meet=lambda: False)
    asked = asker.ask(records, 0, World(0, 1, 0, torch.device("cpu")), alarm)
    assert asked is not None and [group.text for group in asked.groups] == ["add 0", "add 1"]
    for group in asked.groups:
        assert group.rewards[:, 0].tolist() == list(ANSWERS.values())
        best, *others = group.attempts(1.0)
        assert best.optimality == 1.0 and all(other.optimality is not None and other.optimality < 0.5 for other in others)
