"""Questions in a chat template: which ids stand around them, in training, in asking, and in what is saved."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ladir.data.columns import TokenRecord
from ladir.data.prompts import Frame, FramedPairs, prompt_ids
from ladir.errors import UnusableError
from ladir.layout import Mark
from ladir.models.backbone import Backbone
from ladir.models.folders import question_frame, save_lm
from ladir.models.pairing import TrainedOn
from ladir.reasoner import Reasoner
from ladir.reference import clean_group, plain_forward, question_groups
from ladir.tokens import encode_text
from tests.test_reasoner import QUESTIONS, tiny_reasoner, tokenizer
from tests.tiny import tiny_lm

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = Frame((3, 4), (5, 6, 7), is_chat=True)


def chatty(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """A tokenizer with a template and its special tokens, behind its words."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": ["<|start|>", "<|end|>"]})
    made.chat_template = template
    return made


def test_around_a_question_stands_what_the_template_writes(caplog: pytest.LogCaptureFixture) -> None:
    words = chatty()
    frame = Frame.of(words, chat=True)
    begin, start, end = words.convert_tokens_to_ids(["<|begin|>", "<|start|>", "<|end|>"])
    assert frame.before[:2] == (begin, start) and end in frame.behind and frame.is_chat
    turn = [{"role": "user", "content": "a b"}]
    whole = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = words(whole, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert frame.around(encode_text(words, "a b")) == ids == prompt_ids(words, "a b", frame)
    assert Frame.saved(frame.to_save()) == frame
    assert end not in encode_text(words, "a <|end|> b")  # a question does not end its turn
    assert [*FramedPairs([TokenRecord(encode_text(words, "a b"), [], [])], [([1], [2, 3])], frame)] == [(ids, [2, 3])]
    assert Frame.of(words, chat=False) == Frame((begin,))
    assert prompt_ids(words, "a b", Frame.of(words, chat=False)) == [begin, *encode_text(words, "a b\n")]
    with caplog.at_level(logging.WARNING):
        Frame.of(words, chat=True)
    assert not caplog.messages


def test_without_a_template_that_can_hold_a_question_it_is_refused() -> None:
    with pytest.raises(UnusableError, match=r"data\.chat_template=true: .* has no chat template.*data\.chat_template=false"):
        Frame.of(chatty(None), chat=True)
    with pytest.raises(UnusableError, match="writes a question 2 times"):
        Frame.of(chatty("{{ messages[0]['content'] }} {{ messages[0]['content'] }}"), chat=True)


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_question_is_asked_in_its_frame_which_stays_where_it_is_hidden(bidirectional: bool) -> None:
    reasoner = tiny_reasoner(guidance_scale=2.0, bidirectional_question=bidirectional)
    reasoner.trained_on = TrainedOn(frame=CHAT.to_save())
    prefix = reasoner._question_prefix(QUESTIONS[:2], torch.tensor([0, 1]), True)
    d, latent = reasoner.denoiser, torch.zeros(1, 2, 3)
    marks = [d.mark(mark).expand(4, 1, -1) for mark in (Mark.BOT, Mark.EOT)]
    found = prefix.append(torch.cat([marks[0], d.clean_inputs(latent).expand(4, -1, -1), marks[1]], dim=1))[:, -1]
    for row, (hidden, question) in enumerate([(hidden, question) for hidden in (False, True) for question in QUESTIONS[:2]]):
        ids = encode_text(reasoner.tokenizer, question)
        groups = question_groups(d, ids, hidden, CHAT.before, CHAT.behind)
        assert torch.allclose(found[row], plain_forward(d.backbone, [*groups, clean_group(d, latent[0])])[-1], atol=1e-5)


def test_a_frame_is_kept_with_the_model(tmp_path: Path) -> None:
    reasoner = tiny_reasoner(dtype=torch.float32)
    plain = reasoner.generate(QUESTIONS[:1])
    reasoner.trained_on = TrainedOn(frame=CHAT.to_save())
    reasoner.save_pretrained(tmp_path / "export")
    again = Reasoner.from_pretrained(tmp_path / "export", device="cpu")
    assert again.trained_on.frame == CHAT.to_save() and again._frame == CHAT
    [[ours]], [[theirs]] = reasoner.generate(QUESTIONS[:1]), again.generate(QUESTIONS[:1])
    assert torch.allclose(ours.latents, theirs.latents, atol=1e-5)
    assert not torch.allclose(ours.latents[0], plain[0][0].latents[0], atol=1e-3)
    assert TrainedOn.of({"trained_on": {"vae": "x"}}).frame is None
    backbone = Backbone(tiny_lm(dtype=torch.float32))
    for number, frame in enumerate((CHAT, None)):
        save_lm(backbone, tmp_path / f"lm{number}", frame=frame.to_save() if frame else None)
        saved = question_frame(tmp_path / f"lm{number}")
        assert saved == (CHAT.to_save() if frame else None)
