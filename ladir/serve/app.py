"""The routes: chat and plain completions, models, health, metrics, and a page that shows thoughts forming."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ladir.serve.jobs import Block, Event, Failed, Finished, Job, Piece, Step
from ladir.serve.page import PAGE, POLICY
from ladir.serve.protocol import BadRequest, ChatRequest, CompletionRequest, Replies, error_body
from ladir.serve.scheduler import Scheduler

_MOST_BYTES = 4 << 20  # of a request
_LOOK_SECONDS = 0.2  # between two looks at whether the client is still there
_STOP_SECONDS = 30.0
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def build_app(scheduler: Scheduler, model: str, key: str | None = None) -> FastAPI:
    """The application over a scheduler, which it starts and stops; ``model``: the name by which it is asked for; ``key``: what
    requests must bring."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.stop()
        await asyncio.to_thread(scheduler.join, _STOP_SECONDS)

    app = FastAPI(title="LaDiR", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_open_routes(scheduler))
    app.include_router(_routes(scheduler, model), dependencies=[Depends(_guard(key))])
    app.add_exception_handler(BadRequest, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(RequestValidationError, _told)
    return app


def _open_routes(scheduler: Scheduler) -> APIRouter:
    """What needs no key."""
    router = APIRouter()

    @router.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    @router.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if scheduler.alive else {"status": "stopping"}, 200 if scheduler.alive else 503)

    return router


def _routes(scheduler: Scheduler, model: str) -> APIRouter:
    router, begun = APIRouter(), int(time.time())

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "created": begun, "owned_by": "ladir"}]}

    @router.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(scheduler), media_type="text/plain; version=0.0.4")

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(scheduler, asked, request, Replies(True, model))

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(scheduler, asked, request, Replies(False, model))

    return router


def metrics_text(scheduler: Scheduler) -> str:
    """The counts in Prometheus' text format."""
    counts = {**asdict(scheduler.counts), "waiting": scheduler.waiting}
    lines = []
    for name, value in counts.items():
        gauge = name in ("waiting", "running")
        full = f"ladir_{name}" if gauge else f"ladir_{name}_total"
        lines += [f"# TYPE {full} {'gauge' if gauge else 'counter'}", f"{full} {value}"]
    return "\n".join(lines) + "\n"


def _guard(key: str | None) -> Any:
    """Lets in who brings the key, and requests of a size that can be."""

    async def guard(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise BadRequest("a key is needed that is not this one: send it as 'Authorization: Bearer KEY'", status=401)
        if request.method == "POST" and int(request.headers.get("content-length", _MOST_BYTES + 1)) > _MOST_BYTES:
            raise BadRequest(f"a request may have {_MOST_BYTES} bytes, and must say how many it has", status=413)

    return guard


async def _told(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a request, as OpenAI's clients read it."""
    if isinstance(error, BadRequest):
        status, message, param = error.status, str(error), error.param
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        status, message = 400, f"{param or 'the body'}: {first['msg']}"
    else:
        assert isinstance(error, HTTPException)
        status, message, param = error.status_code, str(error.detail), None
    return JSONResponse(error_body(message, _KINDS.get(status, "invalid_request_error"), param), status)


async def _answer(scheduler: Scheduler, asked: ChatRequest | CompletionRequest, request: Request, replies: Replies) -> Response:
    """The whole answer, or a stream that begins with the first event: what cannot be answered has a status of its own."""
    if asked.model not in (None, replies.model):
        raise BadRequest(f"model {asked.model!r} is not here; this server has {replies.model!r}", "model", 404)
    job = asked.job(scheduler.reasoner, scheduler.max_trajectories)
    if (refusal := scheduler.put(job)) is not None:
        raise BadRequest(refusal.message, status=refusal.status)
    events = job.events()
    if not asked.stream:
        last = await _last(job, events, request)
        return JSONResponse(replies.whole(last, job))
    first = await _of_a_client(job, events, request)
    if isinstance(first, Failed):
        raise BadRequest(first.message, status=first.status)
    pieces = _pieces(job, events, first, replies, asked.wants_usage)
    return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _last(job: Job, events: AsyncIterator[Event], request: Request) -> Finished:
    while True:
        event = await _of_a_client(job, events, request)
        if isinstance(event, Failed):
            raise BadRequest(event.message, status=event.status)
        if isinstance(event, Finished):
            return event


async def _of_a_client(job: Job, events: AsyncIterator[Event], request: Request) -> Event:
    """The next event, as long as the client is there to hear of it."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while not (await asyncio.wait([coming], timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise BadRequest("the client has gone", status=499)
        return coming.result()
    except BaseException:
        job.cancelled = True
        coming.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await coming
        raise


async def _pieces(job: Job, events: AsyncIterator[Event], first: Event, replies: Replies, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a client that goes ends the generator, and with it its part of the model's work."""
    event = first
    try:
        while True:
            for piece in _told_of(event, replies, job, usage):
                yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
            if isinstance(event, Finished | Failed):
                break
            event = await anext(events)
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled = True  # of no effect where it is answered


def _told_of(event: Event, replies: Replies, job: Job, usage: bool) -> list[dict[str, Any]]:
    """The pieces that an event is told by.  Where one of several is chosen, its thoughts are told when it is."""
    if isinstance(event, Failed):
        return [error_body(event.message, _KINDS.get(event.status, "invalid_request_error"))]
    if isinstance(event, Step):
        return [replies.step(event.trajectory, event.block, event.step, event.text)]
    if isinstance(event, Block):
        return [replies.thought(event.trajectory, event.text)]
    if isinstance(event, Piece):
        return [replies.part(event.trajectory, event.text)]
    trajectories = [trajectory for group in event.groups for trajectory in group]
    last = replies.ending if job.told_pieces else replies.chosen
    pieces = [last(i, trajectory) for i, trajectory in enumerate(trajectories)]
    return [*pieces, *([replies.end(event)] if usage else [])]
