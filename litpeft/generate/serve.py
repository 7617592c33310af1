"""The command `litpeft serve`: a base and any number of runs answer requests of OpenAI's API over HTTP."""

import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from litpeft.core.errors import ConfigError, DataError, UserError, brief, quoted
from litpeft.core.terminal import tell
from litpeft.data.prompts import Prompt
from litpeft.generate.address import LOCAL, bound, hostname, is_local
from litpeft.generate.batch import Request
from litpeft.generate.catalogue import Catalogue, RunFolder
from litpeft.generate.choice import Choice, choices
from litpeft.generate.draft import Draft
from litpeft.generate.engine import prompt_ids
from litpeft.generate.logprobs import TokenScore, passes, prompt_scores
from litpeft.generate.protocol import (
    Ask,
    Refused,
    are_tokens,
    busy,
    check_prompt,
    last_piece,
    model,
    models,
    parse,
    piece,
    reply,
    usage,
)
from litpeft.generate.served import Base, Served, load_served
from litpeft.generate.settings import Serve
from litpeft.generate.worker import Worker

LARGEST_BODY = 10 << 20  # bytes
SLOWEST_BODY = 60  # seconds
KEY = "LITPEFT_API_KEY"

QUIET = logging.getLogger("litpeft.http")  # what a broken request makes aiohttp say: its sender has the answer
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# the number of an answer, and new text of it, or an error, or its end; and how many of its tokens have scores by now
Came = tuple[int, str | None, Exception | None, int]


def serve(settings: Serve) -> None:
    """The command. It runs until Ctrl-C or SIGTERM; what it does is told on stderr."""
    key = os.environ.get(KEY)
    if not is_local(settings.host) and not key:
        what = f"other machines may reach {settings.host}, and anyone there could ask"
        raise ConfigError(what, where="host", hint=f"set the environment variable {KEY} to a key that clients send")
    place = bound(settings.host, settings.port)  # before the weights are read, in case the port is taken
    asyncio.run(until_signal(Server(settings, *load_served(settings), key), place))


async def until_signal(server: "Server", place: socket.socket) -> None:
    """Lets a server answer until Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.run(place, stop)


class Server:
    """The HTTP side: it reads requests, hands them to the thread that computes, and writes what comes."""

    def __init__(self, settings: Serve, served: dict[str, Served], base: Base | None, key: str | None):
        """`base` is that of the runs in `settings.runs`."""
        self.settings, self.key = settings, key
        batches = list({id(one.batch): one.batch for one in served.values()}.values())
        self.worker = Worker(batches, lambda error: tell(f"error: {type(error).__name__}: {brief(str(error))}"))
        self.models = Catalogue(served, base and RunFolder(Path(settings.runs), base, self.worker))
        self.renderer = ThreadPoolExecutor(1)  # one at a time: a template is rendered by one process
        self.began = int(time.time())

    async def run(self, place: socket.socket, stop: asyncio.Event) -> None:
        """Answers requests until `stop` is set; those that are being answered then fail with status 503."""
        runner = web.AppRunner(
            self.application(), handler_cancellation=True, access_log=None, logger=QUIET, shutdown_timeout=5
        )
        await runner.setup()
        await web.SockSite(runner, place).start()
        self.worker.start()
        host, port = place.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        tell(self.models.said())
        tell(f"http://{host}:{port}/v1 answers; Ctrl-C ends it")
        await stop.wait()
        await asyncio.to_thread(self.worker.stop)
        for request in (request for batch in self.worker.batches for request in batch.clear()):
            request.ended(Refused("the server is being stopped", status=503))
        await runner.cleanup()
        self.renderer.shutdown()
        self.models.close()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=LARGEST_BODY, middlewares=[self.guard])
        application.add_routes(
            [
                web.get("/health", self.health),
                web.get("/v1/models", self.list_models),
                web.get("/v1/models/{name}", self.one_model),
                web.post("/v1/chat/completions", partial(self.complete, chat=True)),
                web.post("/v1/completions", partial(self.complete, chat=False)),
            ]
        )
        return application

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets a request through that may ask, and turns errors into JSON."""
        try:
            self.check(request)
            return await handler(request)
        except Refused as error:
            return web.json_response(error.body(), status=error.status)
        except web.HTTPException as error:
            paths = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health"
            what = f"{error.reason}; there is {paths}" if error.status in (404, 405) else error.reason
            return web.json_response(Refused(what, status=error.status).body(), status=error.status)
        except Exception as error:  # ours, not the sender's: it is told here, and the server lives on
            tell(f"error: {type(error).__name__}: {brief(str(error))}")
            what = error.what if isinstance(error, UserError) else "the server failed"
            return web.json_response(Refused(what, status=500).body(), status=500)

    def check(self, request: web.Request) -> None:
        """Raises Refused for a request that another web page makes in a browser here, or that lacks the key."""
        if is_local(self.settings.host) and hostname(request.host) not in LOCAL:
            raise Refused(f"this server is called localhost, not {quoted(request.host)}", status=403)
        if self.key is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(*(os.fsencode(text) for text in (given, self.key))):  # both may be no UTF-8
                raise Refused(f"the request needs the header Authorization: Bearer KEY, with that of {KEY}", status=401)
        if request.method == "POST" and request.content_type != "application/json":
            raise Refused("the request needs the header Content-Type: application/json", status=415)

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(models(self.models.names(), self.began))

    async def one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.models.check(name)
        return web.json_response(model(name, self.began))

    async def complete(self, request: web.Request, chat: bool) -> web.StreamResponse:
        """Answers a request for completions."""
        try:
            body = await asyncio.wait_for(request.read(), SLOWEST_BODY)
        except asyncio.TimeoutError:
            raise Refused("the request did not come to its end", status=408) from None
        ask = parse(body, chat, self.settings.sampling)
        served, release = await self.models.take(ask.model)
        try:
            return await self.answered(request, ask, served, release)
        finally:
            release()

    async def answered(
        self, request: web.Request, ask: Ask, served: Served, release: Callable[[], None]
    ) -> web.StreamResponse:
        """Returns the reply to a request; the model is released before the client has read it all."""
        ids = [await self.tokens(served, content, ask.answers) for content in ask.prompts]
        came: asyncio.Queue[Came] = asyncio.Queue()
        prompts = [prompt for prompt in ids for _ in range(ask.choices)]
        replied = await self.choices(ask, served, ids)
        left = len(prompts)

        def arrive(index: int, text: str | None, error: Exception | None, scores: int) -> None:
            nonlocal left
            came.put_nowait((index, text, error, scores))
            left -= text is None
            if not left:
                release()

        requests = [self.wanted(ask, served, prompt, index, arrive) for index, prompt in enumerate(prompts)]
        if ask.answers:
            self.admit(served, requests)
        for choice, one in zip(replied, requests, strict=True):
            choice.request = one
        began, prompt = time.perf_counter(), sum(map(len, ids))
        try:
            if ask.stream:
                return await self.streamed(request, ask, replied, came, prompt)
            async for _ in self.pieces(requests if ask.answers else [], came):
                pass
            used = usage(prompt, sum(len(one.draft.answer.ids) for one in requests))
            whole = [(one.echo + one.request.draft.answer.text, one.reason, one.logprobs()) for one in replied]
            return web.json_response(reply(ask, whole, used))
        finally:
            for one in requests:
                one.cancelled = True
            written = sum(len(one.draft.answer.ids) for one in requests)
            tell(f"{ask.model}: {prompt} + {written} tokens in {time.perf_counter() - began:.1f} s")

    async def choices(self, ask: Ask, served: Served, prompts: list[list[int]]) -> list[Choice]:
        """Returns the choices of a reply, with what stands before each answer."""
        scores: list[list[TokenScore]] = [[] for _ in prompts]
        if ask.echo and ask.top is not None:  # a prompt that is in the cache has no logits any more
            if self.worker.work.qsize() > self.settings.max_waiting:
                raise busy()
            model = served.loaded.model
            for numbers in passes(model, prompts):
                together = [prompts[number] for number in numbers]
                work = self.worker.between_steps(partial(prompt_scores, model, together, ask.top, served.adapter))
                for number, one in zip(numbers, await asyncio.wrap_future(work), strict=True):
                    scores[number] = one
        return choices(ask, served.loaded.tokenizer, prompts, scores)

    async def tokens(self, served: Served, content: Any, answers: bool) -> list[int]:
        """Returns the tokens of a prompt, which leaves room for an answer unless there is none."""
        loaded, settings = served.loaded, self.settings
        system = loaded.system if settings.system is None else settings.system
        key = "messages" if isinstance(content, list) and not are_tokens(content) else "prompt"
        try:
            loop = asyncio.get_running_loop()
            ids = content if are_tokens(content) else None
            if ids is None:
                ids = await loop.run_in_executor(self.renderer, prompt_ids, loaded, Prompt({}, content, key), system)
        except DataError as error:  # the template refuses it
            raise Refused(error.what, key) from None
        most = min(loaded.model.reach, settings.max_length)
        check_prompt(ids, key, loaded.model.config.vocab_size, most, answers)
        return ids

    def wanted(self, ask: Ask, served: Served, prompt: list[int], index: int, arrive: Callable[..., None]) -> Request:
        """Returns an answer's request, which tells `arrive` what comes."""
        loaded, loop = served.loaded, asyncio.get_running_loop()
        sampling = replace(ask.sampling, seed=(ask.sampling.seed + index) % 2**62)
        most = min(loaded.model.reach, self.settings.max_length) - len(prompt)
        stop_ids = loaded.template.stop_ids if ask.chat else loaded.tokenizer.stop_ids
        draft = Draft(prompt, loaded.tokenizer, sampling, stop_ids, min(sampling.max_new_tokens, most))

        def put(text: str | None, error: Exception | None = None) -> None:
            loop.call_soon_threadsafe(arrive, index, text, error, len(asked.scores))

        asked = Request(draft, sampling, served.adapter, put, lambda error: put(None, error), top=ask.top)
        return asked

    def admit(self, served: Served, requests: list[Request]) -> None:
        """Hands requests to the thread that computes, unless too many wait."""
        batch = served.batch
        if batch.count + len(requests) > batch.capacity + self.settings.max_waiting:
            raise busy()
        self.worker.add(batch, requests)

    async def pieces(
        self, requests: list[Request], came: asyncio.Queue[Came]
    ) -> AsyncIterator[tuple[int, str | None, int]]:
        """Yields each answer's number with its new text, None at its end, and the number of its tokens with scores."""
        left = len(requests)
        while left:
            index, text, error, scores = await came.get()
            if isinstance(error, Refused):
                raise error
            if error is not None:
                what = error.what if isinstance(error, UserError) else "the server failed to compute the answer"
                raise Refused(what, status=500)
            left -= text is None
            yield index, text, scores

    async def streamed(
        self, request: web.Request, ask: Ask, choices: list[Choice], came: asyncio.Queue[Came], prompt: int
    ) -> web.StreamResponse:
        """Writes the answers as they come, as events."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        with suppress(ConnectionError):  # the client has gone
            try:
                requests = [one.request for one in choices]
                for index, one in enumerate(choices):
                    reason = None if ask.answers else one.reason
                    await send(piece(ask, index, one.echo, one.logprobs(0), reason, first=True))
                async for index, text, scores in self.pieces(requests if ask.answers else [], came):
                    one = choices[index]
                    await send(piece(ask, index, text, one.logprobs(scores), None if text else one.reason))
                if ask.with_usage:
                    await send(last_piece(ask, usage(prompt, sum(len(one.draft.answer.ids) for one in requests))))
                await response.write(b"data: [DONE]\n\n")
            except Refused as error:  # after the status was sent
                await send(error.body())
        return response
