"""LaDiR as a model of EleutherAI's lm-evaluation-harness: importing this registers it there under the name ``ladir``.

An optional extra (requirements-eval.txt).  ``python -m ladir harness`` is the harness's own command line with it.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal, NoReturn

import lm_eval.models  # noqa: F401  # the harness's own models, which it registers only where it has none yet
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ladir.config import SampleSettings
from ladir.errors import UnusableError
from ladir.reasoner import Reasoner, Trajectory

logger = logging.getLogger(__name__)

_CONTROLS = tuple(field.name for field in fields(SampleSettings) if field.name != "max_thought_tokens")
_OWN = ("pretrained", "base", "dtype", "device", "seed", "thoughts", "answer_prefix", "question_field")
#: of a task's generation_kwargs: what is heeded
_HEEDED = ("until", "max_gen_toks", "do_sample", "temperature")
#: the harness's --device where none is given, on any machine
_THEIR_DEVICE = "cuda:0"
#: questions between two moves of the progress bar
_QUESTIONS = 64


@dataclass(frozen=True)
class _Request:
    """What one request asks: a question, its place among the equal ones, controls, and what ends an answer."""

    question: str
    repeat: int
    controls: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]


@register_model("ladir")
class HarnessModel(LM):
    """Answers ``generate_until``; a repeated request is another trajectory of its question."""

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        seed: int = 0,
        thoughts: bool = False,
        answer_prefix: str = "",
        question_field: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **controls: Any,
    ) -> None:
        """``pretrained``: an export; ``base``, ``dtype`` and ``device`` as in :meth:`Reasoner.from_pretrained`.

        ``seed``: of the sampling; ``thoughts``: the decoded blocks stand before the answer, a line each; ``answer_prefix`` stands
        before the answer itself ("#### " for tasks that look for GSM8K's mark); ``question_field``: the field of a task's
        documents that is asked, where it is not the whole prompt ("Question: ... Answer:" is none that LaDiR was trained on).
        ``batch_size``: trajectories at a time, or auto; ``max_batch_size``: at most so many.  ``controls``: those of
        :class:`~ladir.config.SampleSettings`, which beat the task's generation_kwargs.
        """
        super().__init__()
        _refuse_unknown(controls)
        self._batch_size = _batch_size(batch_size, max_batch_size)
        self.pretrained, self.seed, self.thoughts = pretrained, int(seed), bool(thoughts)
        self.answer_prefix, self.question_field, self.controls = str(answer_prefix), question_field, controls
        self._ignored: set[str] = set()
        if device == _THEIR_DEVICE and not torch.cuda.is_available():
            device = None
        self.reasoner = Reasoner.from_pretrained(pretrained, device=device, dtype=dtype, base=base)
        self.reasoner.settings_with(**controls)

    @property
    def tokenizer_name(self) -> str:
        """What tells the harness's caches of requests apart."""
        return self.pretrained

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refused: UnusableError."""
        raise UnusableError(
            "LaDiR gives no likelihood of a text: its answer stands behind thoughts that are sampled, over which one would have "
            "to integrate. Choose tasks that generate (output_type: generate_until), or ask the AR baseline with --model hf"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Refused: UnusableError."""
        self.loglikelihood(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, in their order."""
        asked = self._asked(requests)
        found: dict[_Request, str] = {}
        with tqdm(total=len(asked), desc="LaDiR", disable=disable_tqdm) as bar:
            for batch in _batches(asked):
                found |= self._answer(batch)
                bar.update(len(batch))
        for request, own in zip(requests, asked, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, found[own])
        return [found[own] for own in asked]

    def _asked(self, requests: Sequence[Instance]) -> list[_Request]:
        """Equal requests are numbered: each is a trajectory of its own."""
        seen: Counter[tuple[Any, ...]] = Counter()
        asked = []
        for request in requests:
            context, given = request.args
            what = (self._question(context, request.doc), self._controls(given), _stops(given))
            asked.append(_Request(what[0], seen[what], *what[1:]))
            seen[what] += 1
        return asked

    def _question(self, context: str, document: Mapping[str, Any]) -> str:
        """The text that is asked.  UnusableError where the task's documents have no such field."""
        if self.question_field is None:
            return context.strip()
        if self.question_field not in document:
            raise UnusableError(
                f"question_field={self.question_field}: the task's documents have no such field; they have {', '.join(document)}"
            )
        return str(document[self.question_field]).strip()

    def _controls(self, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """What a task's generation_kwargs and the model's arguments make of the controls; what has no meaning is told once."""
        for name in given.keys() - set(_HEEDED) - self._ignored:
            self._ignored.add(name)
            logger.warning("%s of the task's generation_kwargs is left out: it is no control of LaDiR", name)
        found: dict[str, Any] = {}
        if given.get("max_gen_toks") is not None:
            found["max_answer_tokens"] = int(given["max_gen_toks"])
        if given.get("do_sample") is False:
            found["answer_temperature"] = 0.0
        elif given.get("temperature") is not None:
            found["answer_temperature"] = float(given["temperature"])
        return tuple(sorted({**found, **self.controls}.items()))

    def _answer(self, batch: Sequence[_Request]) -> dict[_Request, str]:
        """A batch of requests with the same controls."""
        questions = list(dict.fromkeys(request.question for request in batch))
        count = 1 + max(request.repeat for request in batch)
        groups = self.reasoner.generate(
            questions,
            num_trajectories=count,
            seed=self.seed,
            thoughts=self.thoughts,
            batch_size=self._batch_size,
            **dict(batch[0].controls),
        )
        by_question = dict(zip(questions, groups, strict=True))
        return {request: self._text(by_question[request.question][request.repeat], request.until) for request in batch}

    def _text(self, trajectory: Trajectory, until: Sequence[str]) -> str:
        """What the harness sees; its stop texts end the answer, not the thoughts, whose end is the model's to say."""
        answer = trajectory.answer
        for stop in until:
            answer = answer.partition(stop)[0]
        return "\n".join([*(trajectory.thoughts if self.thoughts else []), f"{self.answer_prefix}{answer}"])


def _refuse_unknown(controls: Mapping[str, Any]) -> None:
    """UnusableError for model_args that are none, all at once."""
    known = (*_OWN, *_CONTROLS)
    unknown = [name for name in controls if name not in _CONTROLS]
    near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    told = [f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in unknown]
    if told:
        raise UnusableError(f"model_args: unknown {', '.join(told)}; known: {', '.join(known)}")


def _batch_size(given: int | str | None, most: int | None) -> int | Literal["auto"]:
    """The harness's --batch_size (a number, ``auto`` or ``auto:N``), bounded by --max_batch_size."""
    text = str("auto" if given is None else given)
    if text.partition(":")[0] == "auto":
        return "auto" if most is None else most
    return int(text) if most is None else min(int(text), most)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts that end an answer, without empty ones."""
    until = given.get("until") or ()
    return tuple(filter(None, [until] if isinstance(until, str) else until))


def _batches(asked: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Requests of the same controls, some questions at a time, each with all its repeats."""

    def controls(request: _Request) -> str:
        return repr(request.controls)

    for _, same in groupby(sorted(asked, key=controls), key=controls):
        by_question: dict[str, list[_Request]] = {}
        for request in same:
            by_question.setdefault(request.question, []).append(request)
        questions = list(by_question.values())
        for first in range(0, len(questions), _QUESTIONS):
            yield [request for repeats in questions[first : first + _QUESTIONS] for request in repeats]
