"""The autoregressive baseline's loss against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ladir.data.batches import ArCollator
from ladir.data.prompts import ChainText, completion_text, parse_completion
from ladir.data.records import Record
from ladir.models.ar import ArModel
from ladir.models.backbone import Backbone
from ladir.models.folders import reads_questions_both_ways, save_lm
from ladir.models.store import SETTINGS_FILE
from ladir.reference import plain_forward
from tests.tiny import SHAPES, assert_same_gradients, gradients, tiny_lm

PAIRS = [([5, 6, 7], [8, 9, 1]), ([10], [11, 12, 13, 14, 1]), ([15, 16], [1])]


@pytest.mark.parametrize("pack_tokens", [0, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_are_transformers(kind: str, pack_tokens: int) -> None:
    model = ArModel(Backbone(tiny_lm(kind)))
    batch = ArCollator(pack_tokens)(PAIRS, [0, 1, 2])
    assert len(batch.rows.index) == (2 if pack_tokens else 3)
    result = model(batch)
    result["text"].backward()
    ours = gradients(model)
    model.zero_grad()
    expected = torch.tensor(0.0, dtype=torch.float64)
    right = 0.0
    for prompt, completion in PAIRS:
        ids = torch.tensor([[*prompt, *completion]])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        output = model.backbone.base(input_ids=ids, labels=labels)
        expected = expected + output.loss * len(completion)
        predicted = output.logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += float((predicted == torch.tensor(completion)).sum())
    expected.backward()
    assert result["text"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-5)
    assert batch.counts == {"text": 9.0} and batch.num_tokens == 5 + 5 + 2
    assert result["metric/token_accuracy"].tolist() == [right, 9.0]


@pytest.mark.parametrize("pack_tokens", [0, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_behind_a_bidirectional_question_are_those_of_plain_forwards(kind: str, pack_tokens: int) -> None:
    model = ArModel(Backbone(tiny_lm(kind)))
    result = model(ArCollator(pack_tokens, bidirectional_question=True)(PAIRS, [0, 1, 2]))
    result["text"].backward()
    ours = gradients(model)
    model.zero_grad()
    expected = torch.tensor(0.0, dtype=torch.float64)
    for prompt, completion in PAIRS:
        question, *rest = model.backbone.embed(torch.tensor([*prompt, *completion[:-1]])).split(
            [len(prompt)] + [1] * (len(completion) - 1)
        )
        hidden = plain_forward(model.backbone, [question, *rest])[len(prompt) - 1 :]
        expected = expected + F.cross_entropy(model.backbone.logits(hidden), torch.tensor(completion), reduction="sum")
    expected.backward()
    assert result["text"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lm_s_folder_says_how_it_reads_questions(bidirectional: bool, tmp_path: Path) -> None:
    save_lm(Backbone(tiny_lm()), tmp_path / "lm", bidirectional_question=bidirectional)
    assert reads_questions_both_ways(tmp_path / "lm") == bidirectional
    (tmp_path / "lm" / SETTINGS_FILE).write_text('{"kind": "lm"}')  # of a version that had no such setting
    assert not reads_questions_both_ways(tmp_path / "lm")


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("a\nb\n#### 12", ["a", "b"], "12"),
        ("a\n#### def f():\n    pass\n#### The answer is f\n#", ["a"], "def f():\n    pass\n#### The answer is f\n#"),
        ("a is 3. The answer is 4", ["a is 3."], "4"),
        ("no mark", ["no mark"], ""),
    ],
)
def test_a_completion_s_answer_begins_where_its_first_mark_does(text: str, thoughts: list[str], answer: str) -> None:
    assert parse_completion(text, ["####", "The answer is"]) == ChainText(thoughts, answer)


def test_headings_are_not_taken_for_the_answer() -> None:
    blocks = ("#### Step 1\nWe add: 1 + 2 = 3.", "Note. #### is a mark.", "####")
    program = "#### reads\nprint(3)\n#### prints"
    text = completion_text(Record("q", blocks, program, "f:1"), "####")
    lines = [line for block in blocks for line in block.splitlines()]
    assert parse_completion(text, ["####"]) == ChainText(lines, program)
