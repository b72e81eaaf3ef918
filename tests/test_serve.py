"""The server, asked by OpenAI's own client: one and many at a time, wrongly, cut off, stopped."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ladir.cli import serve
from ladir.config import SampleSettings
from ladir.errors import UnusableError
from ladir.inference import generation
from ladir.inference.asking import Ask
from ladir.inference.cache import Prefix
from ladir.inference.decode import decode
from ladir.inference.trajectory import plain_answer
from ladir.reasoner import Reasoner
from ladir.serve.jobs import Job
from ladir.serve.running import Server
from ladir.tokens import decode_text
from tests.browser import browser
from tests.test_reasoner import QUESTIONS, tiny_reasoner
from tests.test_verifier import with_verifier

#: nothing may hang: a client that waits longer fails
PATIENCE = 60.0


@contextmanager
def served(reasoner: Reasoner, limits: tuple[int, int] = (24, 64), key: str | None = None) -> Iterator[Server]:
    """A server on a free port of this machine, in threads of this process."""
    server = Server(reasoner, "tiny", ("127.0.0.1", 0), limits, key, plain_answer)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.handle_exit(2, None)
        thread.join(PATIENCE)
    assert not thread.is_alive() and not server.scheduler.alive


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def client(server: Server, key: str = "none") -> OpenAI:
    url = f"http://127.0.0.1:{server.port}/v1"
    return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(with_verifier()) as running:
        yield running


def user(question: str) -> Any:
    return [{"role": "user", "content": question}]


@contextmanager
def slow(monkeypatch: pytest.MonkeyPatch, reasoner: Reasoner) -> Iterator[threading.Event]:
    """While inside, the model waits before every step until the event is set."""
    go, real = threading.Event(), reasoner.denoiser.denoise_step

    def step(*arguments: Any) -> Any:
        go.wait(PATIENCE)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reasoner.denoiser, "denoise_step", step)
        yield go
        go.set()


# --- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_completion_holds_answers_thoughts_and_scores(server: Server) -> None:
    found = client(server).chat.completions.create(
        model="tiny", messages=user("a b c"), n=3, seed=5, temperature=0.5, max_tokens=4, extra_body={"num_steps": 2}
    )
    expected = server.scheduler.reasoner.generate(["a b c"], 3, seed=5, answer_temperature=0.5, max_answer_tokens=4, num_steps=2)[
        0
    ]
    assert [choice.message.content for choice in found.choices] == [entry.answer for entry in expected]
    for choice, entry in zip(found.choices, expected, strict=True):
        assert choice.message.reasoning_content == "".join(f"{thought}\n" for thought in entry.thoughts)  # type: ignore[attr-defined]
        assert choice.score == pytest.approx(entry.score, abs=1e-6)  # type: ignore[attr-defined]
        assert choice.finish_reason == ("stop" if entry.stopped else "length")
    latents = sum(2 * len(entry.latents) for entry in expected)
    assert found.usage is not None and found.usage.prompt_tokens == 3
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.reasoning_tokens == latents
    assert (found.model, found.seed) == ("tiny", 5)  # type: ignore[attr-defined]


def test_a_stream_tells_the_same_block_by_block_and_word_by_word(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": user("e f g h i"), "n": 2, "seed": 1}
    whole = client(server).chat.completions.create(**asked)
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"stream_steps": True}}
    pieces = list(client(server).chat.completions.create(**asked, **options))
    thoughts, answers, endings = {0: "", 1: ""}, dict[int, list[str]](), {}
    steps = dict[tuple[int, int], list[str]]()
    for piece in pieces:
        for choice in piece.choices:
            thoughts[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
            if choice.delta.content:
                assert choice.index not in endings
                answers.setdefault(choice.index, []).append(choice.delta.content)
            if choice.finish_reason:
                endings[choice.index] = (choice.finish_reason, choice.score)  # type: ignore[attr-defined]
            if hasattr(choice, "step"):
                steps.setdefault((choice.index, choice.step["block"]), []).append(choice.step["text"])
    for choice in whole.choices:
        message = choice.message
        assert thoughts[choice.index] == message.reasoning_content  # type: ignore[attr-defined]
        assert "".join(answers[choice.index]) == message.content
        assert len(answers[choice.index]) == len(str(message.content).split()) > 1
        assert endings[choice.index] == (choice.finish_reason, choice.score)  # type: ignore[attr-defined]
    assert {len(texts) for texts in steps.values()} == {3}  # Euler steps
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices


def test_plain_completions_take_several_prompts(server: Server) -> None:
    found = client(server).completions.create(model="tiny", prompt=QUESTIONS[:2], n=2, seed=3)
    expected = server.scheduler.reasoner.generate(QUESTIONS[:2], 2, seed=3)
    assert [choice.text for choice in found.choices] == [entry.answer for group in expected for entry in group]
    stream = client(server).completions.create(model="tiny", prompt="a b c", seed=3, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == expected[0][0].answer


def test_one_of_several_trajectories_is_chosen(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": user("d"), "n": 4, "seed": 2}
    expected = server.scheduler.reasoner.generate(["d"], 4, seed=2, choose="best")[0][0]
    (choice,) = client(server).chat.completions.create(**asked, extra_body={"choose": "best"}).choices
    assert choice.message.content == expected.answer
    assert choice.score == pytest.approx(expected.score, abs=1e-6)  # type: ignore[attr-defined]
    pieces = list(client(server).chat.completions.create(**asked, stream=True, extra_body={"choose": "best"}))
    assert [piece.choices[0].delta.content for piece in pieces] == [expected.answer]


def test_without_a_seed_answers_differ_and_the_seed_that_was_drawn_repeats_them(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": user("a b c"), "n": 8}
    one, two = (client(server).chat.completions.create(**asked) for _ in range(2))
    assert one.seed != two.seed  # type: ignore[attr-defined]
    again = client(server).chat.completions.create(**asked, seed=one.seed)  # type: ignore[attr-defined]
    assert [choice.message for choice in again.choices] == [choice.message for choice in one.choices]


def test_many_clients_at_once_are_answered_together_and_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner, sizes = tiny_reasoner(), []
    real = reasoner.answer

    def noted(asks: Any, *rest: Any) -> Any:
        sizes.append(sum(ask.num_trajectories for ask in asks))
        return real(asks, *rest)

    monkeypatch.setattr(reasoner, "answer", noted)
    questions = [" ".join("abcdefgh"[: 1 + number % 8]) for number in range(50)]
    with served(reasoner) as server, ThreadPoolExecutor(50) as pool, slow(monkeypatch, reasoner) as go:

        def ask(number: int) -> str | None:
            found = client(server).chat.completions.create(model="tiny", messages=user(questions[number]), seed=number)
            return found.choices[0].message.content

        answers = [pool.submit(ask, number) for number in range(50)]
        until(lambda: server.scheduler.counts.requests == 50)
        go.set()
        found = [answer.result(PATIENCE) for answer in answers]
    assert sum(sizes) == 50 and len(sizes) <= 4 and max(sizes) == 24  # the first alone, or with those that were quick
    for number, answer in enumerate(found):
        assert answer == real([Ask(questions[number], 1, number)], reasoner.settings)[0][0].answer


def test_streams_and_whole_answers_are_made_together_and_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    with served(reasoner) as server, ThreadPoolExecutor(12) as pool, slow(monkeypatch, reasoner) as go:
        ask = client(server).chat.completions.create

        def told(number: int) -> str:
            asked: dict[str, Any] = {"model": "tiny", "messages": user("abcdefgh"[number % 8]), "seed": number}
            if number % 2:
                return str(ask(**asked).choices[0].message.content)
            return "".join(piece.choices[0].delta.content or "" for piece in ask(**asked, stream=True))

        answers = [pool.submit(told, number) for number in range(12)]
        until(lambda: server.scheduler.counts.requests == 12)
        go.set()
        found = [answer.result(PATIENCE) for answer in answers]
        assert server.scheduler.counts.batches <= 4
    for number, answer in enumerate(found):
        assert answer == reasoner.generate(["abcdefgh"[number % 8]], 1, seed=number)[0][0].answer


@given(text=st.text(max_size=12), end=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_pieces_of_an_answer_make_it_up_and_hold_whole_characters(text: str, end: int) -> None:
    """A tokenizer of bytes, of which the last ones may be missing."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    ids = ids[: max(len(ids) - end, 0)]
    job, whole = asyncio.run(a_job()), decode_text(tokenizer, ids)
    pieces = list[str]()
    object.__setattr__(job, "emit", lambda piece: pieces.append(piece.text))
    for count in range(1, len(ids) + 1):
        job.answer(0, decode_text(tokenizer, ids[:count]))
    torn = len(whole) - len(whole.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert "".join(pieces) == whole[: len(whole) - torn]
    job.answer(0, whole, whole=True)
    assert "".join(pieces) == whole


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{byte: i for i, byte in enumerate(alphabet, start=1)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


async def a_job() -> Job:
    return Job([Ask("a")], SampleSettings(), stream=True)


# --- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "send one user message"),
        ({"messages": [*user("a"), *user("b")]}, "this model answers single questions"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "reads text alone"),
        ({"messages": user("  ")}, "question 1 is empty"),
        ({"messages": user("b " * 252)}, "question 1 has 252 tokens, too many for an LM of 256 positions"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 25}, "n=25: this server thinks at most 24 trajectories of a request"),
        ({"temperature": -1.0}, "answer_temperature=-1.0: must be at least 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"top_p": 0.5}, "top_p is not supported by this model"),
        ({"stop": ["x"]}, "stop is not supported"),
        ({"extra_body": {"num_step": 3}}, "unknown field num_step; LaDiR's own are num_steps"),
        ({"extra_body": {"num_steps": 0}}, "num_steps=0: must be at least 1"),
        ({"extra_body": {"num_steps": "many"}}, "num_steps='many': must be a whole number"),
        ({"extra_body": {"choose": "loudest"}}, "choose: Input should be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_answered_by_what_is_wrong(server: Server, asked: dict[str, Any], named: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(server).chat.completions.create(**{"model": "tiny", "messages": user("a"), "stream": stream, **asked})
    assert named in str(caught.value.body["message"])  # type: ignore[index]


def test_errors_that_are_not_of_a_question(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not here; this server has 'tiny'"):
        client(server).chat.completions.create(model="gpt", messages=user("a"))
    assert httpx2.get(url(server, "/v1/nothing")).status_code == 404
    post = url(server, "/v1/chat/completions")
    torn = httpx2.post(post, content=b"{", headers={"Content-Type": "application/json"})
    assert torn.status_code == 400 and "JSON" in torn.json()["error"]["message"]
    large = httpx2.post(post, content=b"x" * (5 << 20))
    assert large.status_code == 413 and "4194304 bytes" in large.json()["error"]["message"]


def test_thoughts_that_do_not_stay_finite_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    with served(reasoner) as server, ThreadPoolExecutor(3) as pool, slow(monkeypatch, reasoner) as go:
        real = reasoner.plain

        def plain(z: torch.Tensor) -> torch.Tensor:
            if len(z) == 3:  # the one with three trajectories, alone or with others
                raise reasoner_error
            return real(z)

        reasoner_error = UnusableError("the thoughts did not stay finite under these controls")
        monkeypatch.setattr(reasoner, "plain", plain)

        def ask(n: int) -> int:
            return len(client(server).chat.completions.create(model="tiny", messages=user("a"), n=n, seed=0).choices)

        jobs = [pool.submit(ask, n) for n in (2, 3)]
        until(lambda: server.scheduler.counts.requests == 2)
        go.set()
        assert jobs[0].result(PATIENCE) == 2
        with pytest.raises(openai.BadRequestError, match="did not stay finite"):
            jobs[1].result(PATIENCE)


@pytest.mark.parametrize("changes", [False, True])
def test_what_is_made_again_is_not_told_again_and_what_comes_out_otherwise_is_an_error(
    monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    reasoner, failed = tiny_reasoner(), []
    expected = reasoner.generate(["a"], 1, seed=3)[0][0]
    with served(reasoner) as server, ThreadPoolExecutor(3) as pool, slow(monkeypatch, reasoner) as go:
        real = reasoner._finish

        def finish(group: Any, settings: Any, *rest: Any) -> Any:
            found = real(group, settings, *rest)
            if len(group.rows) == 2 and not failed:  # both are told by now
                failed.append(group)
                raise torch.OutOfMemoryError
            for trajectory in found.values() if changes else ():
                trajectory.answer = "otherwise"
            return found

        monkeypatch.setattr(reasoner, "_finish", finish)

        def ask() -> tuple[str, str]:
            stream = list(client(server).chat.completions.create(model="tiny", messages=user("a"), stream=True, seed=3))
            deltas = [piece.choices[0].delta for piece in stream]
            thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            return "".join(delta.content or "" for delta in deltas), thoughts

        before = pool.submit(client(server).chat.completions.create, model="tiny", messages=user("b"))
        until(lambda: server.scheduler.counts.running == 1)
        jobs = [pool.submit(ask) for _ in range(2)]
        until(lambda: server.scheduler.waiting == 2)
        go.set()
        for job in jobs:
            if changes:
                with pytest.raises(openai.APIError, match="came out otherwise than the parts of it that were told"):
                    job.result(PATIENCE)
            else:
                assert job.result(PATIENCE) == (expected.answer, "".join(f"{thought}\n" for thought in expected.thoughts))
        assert before.result(PATIENCE).choices
    assert failed


def test_a_failure_of_the_model_is_told_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    with served(reasoner) as server:
        with monkeypatch.context() as patch:
            patch.setattr(reasoner, "_finish", lambda *arguments: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the model failed; the server's log says why"):
                client(server).chat.completions.create(model="tiny", messages=user("a"))
            with pytest.raises(openai.APIError, match="the model failed"):
                list(client(server).chat.completions.create(model="tiny", messages=user("a"), stream=True))
        assert client(server).chat.completions.create(model="tiny", messages=user("a")).choices


# --- cut off -----------------------------------------------------------------------------------------------------------


def test_a_client_that_goes_ends_its_part_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner(max_blocks=3)
    with torch.no_grad():
        reasoner.denoiser.stop_head.bias.fill_(-1e4)
    with served(reasoner) as server:
        jobs, put = list[Job](), server.scheduler.put
        monkeypatch.setattr(server.scheduler, "put", lambda job: jobs.append(job) or put(job))
        asked: dict[str, Any] = {"model": "tiny", "messages": user("a"), "stream": True}
        with slow(monkeypatch, reasoner) as go:
            go.set()
            stream = client(server).chat.completions.create(**asked, extra_body={"num_steps": 100})
            next(iter(stream))  # the first block is there
            go.clear()
            stream.close()
            until(lambda: jobs[0].cancelled)
            go.set()
            until(lambda: server.scheduler.counts.cancelled == 1)
        with slow(monkeypatch, reasoner) as go, ThreadPoolExecutor(1) as pool:
            impatient = client(server).with_options(timeout=0.5)
            gone = pool.submit(impatient.chat.completions.create, model="tiny", messages=user("a"))
            with pytest.raises(openai.APITimeoutError):
                gone.result(PATIENCE)
            until(lambda: jobs[1].cancelled)
            go.set()
            until(lambda: server.scheduler.counts.cancelled == 2)
        assert client(server).chat.completions.create(model="tiny", messages=user("a")).choices
        until(lambda: server.scheduler.counts.running == 0)
        assert server.scheduler.counts.trajectories == 1


def test_a_client_that_goes_amid_an_answer_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner, go, caches = tiny_reasoner(), threading.Event(), list[weakref.ref[Any]]()
    append = Prefix.append

    def slow_append(prefix: Prefix, inputs: torch.Tensor) -> torch.Tensor:
        if jobs and jobs[0]._answers:  # the first words have been told
            go.wait(PATIENCE)
        return append(prefix, inputs)

    def endless(prefix: Prefix, hidden: torch.Tensor, eos: int, *rest: Any, **named: Any) -> list[list[int]]:
        caches.append(weakref.ref(prefix.cache))
        return decode(prefix, hidden, -1, *rest, **named)

    jobs = list[Job]()
    with served(reasoner) as server, monkeypatch.context() as patch:
        put = server.scheduler.put
        patch.setattr(server.scheduler, "put", lambda job: jobs.append(job) or put(job))
        patch.setattr(Prefix, "append", slow_append)
        patch.setattr(generation, "decode", endless)
        stream = client(server).chat.completions.create(model="tiny", messages=user("a"), stream=True, temperature=0)
        assert next(piece for piece in stream if piece.choices[0].delta.content)
        assert caches[0]() is not None
        stream.close()
        until(lambda: jobs[0].cancelled)
        go.set()
        until(lambda: server.scheduler.counts.cancelled == 1 and server.scheduler.counts.running == 0)
        gc.collect()
        assert caches[0]() is None


def test_a_server_that_is_stopped_tells_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    with served(reasoner) as server, ThreadPoolExecutor(3) as pool, slow(monkeypatch, reasoner) as go:

        def ask(stream: bool) -> Any:
            found = client(server).chat.completions.create(model="tiny", messages=user("a"), stream=stream)
            return list(found) if stream else found

        under_way = pool.submit(ask, False)
        until(lambda: server.scheduler.counts.running == 1)
        waiting = [pool.submit(ask, stream) for stream in (False, True)]
        until(lambda: server.scheduler.waiting == 2)
        server.handle_exit(15, None)
        for job in waiting:
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                job.result(PATIENCE)
        go.set()
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            under_way.result(PATIENCE)


def test_a_full_queue_is_said_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoner = tiny_reasoner()
    with served(reasoner, limits=(1, 1)) as server, ThreadPoolExecutor(2) as pool, slow(monkeypatch, reasoner) as go:
        ask = client(server).chat.completions.create
        first = pool.submit(ask, model="tiny", messages=user("a"))
        until(lambda: server.scheduler.counts.running == 1)
        second = pool.submit(ask, model="tiny", messages=user("b"))
        until(lambda: server.scheduler.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already; try again later"):
            ask(model="tiny", messages=user("c"))
        go.set()
        assert first.result(PATIENCE).choices and second.result(PATIENCE).choices


# --- around ------------------------------------------------------------------------------------------------------------


def test_models_health_and_metrics(server: Server) -> None:
    assert [model.id for model in client(server).models.list()] == ["tiny"]
    assert httpx2.get(url(server, "/health")).json() == {"status": "ok"}
    until(lambda: server.scheduler.counts.running == 0)
    before = httpx2.get(url(server, "/metrics")).text
    client(server).chat.completions.create(model="tiny", messages=user("a"), n=2)

    def number(text: str, name: str) -> float:
        return float(dict(line.split() for line in text.splitlines() if not line.startswith("#"))[name])

    until(lambda: number(httpx2.get(url(server, "/metrics")).text, "ladir_running") == 0)
    after = httpx2.get(url(server, "/metrics")).text
    for name, more in (("requests", 1), ("trajectories", 2), ("batches", 1)):
        assert number(after, f"ladir_{name}_total") == number(before, f"ladir_{name}_total") + more
    assert number(after, "ladir_waiting") == number(after, "ladir_running") == 0


def test_with_a_key_nobody_asks_without_it() -> None:
    with served(tiny_reasoner(), key="secret") as server:
        assert client(server, "secret").chat.completions.create(model="tiny", messages=user("a")).choices
        for wrong in ("secre", "secrets", "geheim-ü"):
            assert httpx2.get(url(server, "/metrics"), headers={"Authorization": f"Bearer {wrong}".encode()}).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="a key is needed that is not this one"):
            client(server, "other").chat.completions.create(model="tiny", messages=user("a"))
        assert httpx2.get(url(server, "/metrics")).status_code == 401
        assert httpx2.get(url(server, "/health")).status_code == 200


def test_the_page_is_whole_and_runs_its_own_script_alone(server: Server) -> None:
    page = httpx2.get(url(server, "/"))
    assert page.status_code == 200 and "<script>" in page.text and "http" not in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_the_page_shows_thoughts_forming_and_says_what_is_wrong(server: Server, tmp_path: Path) -> None:
    expected = server.scheduler.reasoner.generate(["a b c"], 3, seed=4, num_steps=2)[0]
    with browser(tmp_path / "profile") as tab:
        tab.open(url(server, "/"), 800)
        ask = "document.getElementById('form').requestSubmit()"
        fill = "for (const [id, value] of Object.entries({})) document.getElementById(id).value = value"
        given = json.dumps({"question": "a b c", "n": 3, "seed": 4, "steps": 2})
        tab.evaluate(f"{{{fill.replace('{}', given)}}}; {ask}")
        until(lambda: tab.evaluate("document.getElementById('out').textContent").count("(score ") == 3)
        texts = "[...document.querySelectorAll('.trajectory')].map(one => [...one.children].map(line => line.textContent))"
        for shown, entry in zip(tab.evaluate(texts), expected, strict=True):
            assert shown[:-1] == entry.thoughts
            assert shown[-1] == f"answer: {entry.answer}  (score {entry.score:.2f})"
        tab.evaluate(f"document.getElementById('n').value = 25; {ask}")
        until(lambda: "n=25: this server thinks at most 24" in tab.evaluate("document.getElementById('error').textContent"))
        assert not [error for error in tab.errors if not error.startswith(f"fetched {url(server, '/')}") and "400" not in error]


def test_the_command_listens_on_this_machine_alone_and_warns_where_it_does_not(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_reasoner().save_pretrained(tmp_path / "mine" / "export")
    command = ["--model", str(tmp_path / "mine" / "export"), "--device", "cpu", "--port", "0", "--num-steps", "2"]
    running = serve.prepare(serve.build_parser().parse_args(command))
    assert (running.name, running.config.host, running.scheduler.reasoner.settings.num_steps) == ("mine", "127.0.0.1", 2)
    assert not caplog.messages
    open_to_all = [*command, "--host", "0.0.0.0"]
    serve.prepare(serve.build_parser().parse_args(open_to_all))
    assert "whoever reaches this machine may ask, since LADIR_KEY is not set" in caplog.text
    caplog.clear()
    monkeypatch.setenv("LADIR_KEY", "secret")
    serve.prepare(serve.build_parser().parse_args(open_to_all))
    assert not caplog.messages
    with pytest.raises(ValueError, match="--max-waiting 0: must be at least 1"):
        serve.prepare(serve.build_parser().parse_args([*command, "--max-waiting", "0"]))
