"""What a request may say, in OpenAI's words and ours, and the answers to it."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ladir.config import SampleSettings
from ladir.evaluation.choosing import CHOICES
from ladir.inference.asking import Ask
from ladir.inference.trajectory import Trajectory
from ladir.reasoner import Reasoner
from ladir.serve.jobs import Finished, Job

#: controls of the sampling that a request may give under their own names; two have OpenAI's, one is the model's
CONTROLS = tuple(
    field.name
    for field in dataclasses.fields(SampleSettings)
    if field.name not in ("answer_temperature", "max_answer_tokens", "max_thought_tokens", "thoughts_per_batch")
)

#: of OpenAI's fields those that change nothing here at these values; at others they are refused
_WITHOUT_EFFECT: dict[str, Sequence[Any]] = {
    "top_p": (None, 1, 1.0),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logprobs": (None, False),
    "stop": (None, [], ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "logit_bias": (None, {}),
}
#: fields that are about the caller, not about the answer
_ABOUT_CALLERS = ("user", "metadata", "store", "service_tier", "safety_identifier")


class BadRequest(ValueError):
    """A request that cannot be answered; ``param``: the field that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class _Request(BaseModel):
    """What both kinds of requests share; all other fields are in ``model_extra``."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    n: int = Field(1, ge=1)
    seed: int | None = None
    temperature: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    choose: Literal[CHOICES] | None = None  # type: ignore[valid-type]
    stream_steps: bool = False
    """Ours: every denoising step as text, in the stream."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def questions(self) -> list[str]:
        """What is asked."""
        raise NotImplementedError

    def job(self, reasoner: Reasoner, most: int) -> Job:
        """The request as the model takes it, at most ``most`` trajectories.  BadRequest naming what cannot be."""
        controls = self._controls()
        questions, seed = self.questions(), secrets.randbits(31) if self.seed is None else self.seed
        if self.n * len(questions) > most:
            raise BadRequest(f"n={self.n}: this server thinks at most {most} trajectories of a request", "n")
        try:
            settings = reasoner.settings_with(**controls)
            reasoner.check_choice(self.choose)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        asks = [Ask(question, self.n, seed) for question in questions]
        return Job(asks, settings, self.choose, self.stream_steps, self.stream)

    def _controls(self) -> dict[str, Any]:
        given = dict(self.model_extra or {})
        for name, harmless in _WITHOUT_EFFECT.items():
            if name in given and given.pop(name) not in harmless:
                raise BadRequest(f"{name} is not supported by this model; leave it out", name)
        unknown = sorted(given.keys() - {*CONTROLS, *_ABOUT_CALLERS})
        if unknown:
            raise BadRequest(
                f"unknown field {unknown[0]}; LaDiR's own are {', '.join(CONTROLS)}, choose, stream_steps", unknown[0]
            )
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return {
            **{name: given[name] for name in CONTROLS if name in given},
            "answer_temperature": self.temperature,
            "max_answer_tokens": most,
        }


class _Message(BaseModel):
    role: str
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        """Its text.  BadRequest where it holds anything else."""
        if isinstance(self.content, str):
            return self.content
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in self.content):
            raise BadRequest("messages: this model reads text alone", "messages")
        return "".join(part["text"] for part in self.content)


class ChatRequest(_Request):
    """``/v1/chat/completions``."""

    messages: list[_Message] = Field(min_length=1)

    def questions(self) -> list[str]:
        """The one question, behind what a system message says."""
        *before, last = self.messages
        if last.role != "user" or any(message.role not in ("system", "developer") for message in before):
            raise BadRequest("messages: this model answers single questions: send one user message, the last", "messages")
        return ["\n".join(message.text() for message in self.messages)]


class CompletionRequest(_Request):
    """``/v1/completions``."""

    prompt: str | list[str]

    def questions(self) -> list[str]:
        """One or several."""
        found = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not found:
            raise BadRequest("prompt: there is no question in it", "prompt")
        return found


@dataclasses.dataclass(frozen=True)
class Replies:
    """Answers to one request, whole or in pieces: ``chat`` completions, or plain ones."""

    chat: bool
    model: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, done: Finished, job: Job) -> dict[str, Any]:
        """The answer at once."""
        trajectories = [trajectory for group in done.groups for trajectory in group]
        choices = [self._choice(index, trajectory) for index, trajectory in enumerate(trajectories)]
        return {**self._head(part=False), "choices": choices, "usage": usage(done), "seed": job.asks[0].seed}

    def thought(self, index: int, text: str) -> dict[str, Any]:
        """A finished block."""
        piece = {"reasoning_content": f"{text}\n"}
        body = {"delta": {"role": "assistant", **piece}} if self.chat else {"text": "", **piece}
        return self._piece({"index": index, **body, "finish_reason": None})

    def step(self, index: int, block: int, step: int, text: str) -> dict[str, Any]:
        """What a block reads as while it forms."""
        body: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._piece({"index": index, **body, "finish_reason": None, "step": {"block": block, "step": step, "text": text}})

    def part(self, index: int, text: str) -> dict[str, Any]:
        """What an answer goes on with."""
        body: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._piece({"index": index, **body, "finish_reason": None})

    def ending(self, index: int, trajectory: Trajectory) -> dict[str, Any]:
        """The end of a trajectory that was told in pieces."""
        body: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._piece({"index": index, **body, **_ending(trajectory)})

    def chosen(self, index: int, trajectory: Trajectory) -> dict[str, Any]:
        """A trajectory of which nothing was told before it was chosen."""
        thoughts = {"reasoning_content": reasoning(trajectory)}
        body = {"delta": {"content": trajectory.answer, **thoughts}} if self.chat else {"text": trajectory.answer, **thoughts}
        return self._piece({"index": index, **body, **_ending(trajectory)})

    def end(self, done: Finished) -> dict[str, Any]:
        """The numbers of tokens, behind the last piece."""
        return {**self._head(part=True), "choices": [], "usage": usage(done)}

    def _choice(self, index: int, trajectory: Trajectory) -> dict[str, Any]:
        thoughts = {"reasoning_content": reasoning(trajectory)}
        text: dict[str, Any] = {"text": trajectory.answer, **thoughts}
        message = {"message": {"role": "assistant", "content": trajectory.answer, **thoughts}}
        return {"index": index, **(message if self.chat else text), "logprobs": None, **_ending(trajectory)}

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(part=True), "choices": [choice]}

    def _head(self, part: bool) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if part else ''}" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def reasoning(trajectory: Trajectory) -> str:
    """The thoughts, a line each."""
    return "".join(f"{thought}\n" for thought in trajectory.thoughts)


def _ending(trajectory: Trajectory) -> dict[str, Any]:
    """``length``: the limit on blocks forced the answer."""
    score = {} if trajectory.score is None else {"score": trajectory.score}
    return {"finish_reason": "stop" if trajectory.stopped else "length", **score}


def usage(done: Finished) -> dict[str, Any]:
    """Tokens; a latent counts as one."""
    latents = sum(trajectory.latents.shape[0] * trajectory.latents.shape[1] for group in done.groups for trajectory in group)
    made = done.answer_tokens + latents
    details = {"completion_tokens_details": {"reasoning_tokens": latents}}
    counts = {"prompt_tokens": done.prompt_tokens, "completion_tokens": made, "total_tokens": done.prompt_tokens + made}
    return {**counts, **details}


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
