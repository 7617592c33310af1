"""A server in the tests' own process, and what it should answer."""

import asyncio
import http.client
import json
import threading
from typing import Any

from litpeft.data.formats.turn import Turn
from litpeft.generate.engine import answer
from litpeft.generate.load import Loaded
from litpeft.generate.serve import Server, bound
from litpeft.generate.served import load_served
from litpeft.generate.settings import Sampling, Serve

CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12}


class Running:
    """A server of this process, at a port of its own."""

    def __init__(self, settings: Serve, key: str | None = None):
        self.server, self.place = Server(settings, *load_served(settings), key), bound(settings.host, 0)
        self.port, self.ready = self.place.getsockname()[1], threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))
        self.thread.start()
        self.ready.wait()

    async def run(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.loop.call_later(0, self.ready.set)
        await self.server.run(self.place, self.stop)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Returns status and body of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Content-Type": "application/json"} | named)
        reply = connection.getresponse()
        status, text = reply.status, reply.read()
        connection.close()
        return status, text

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, text = self.raw("POST", path, json.dumps(body).encode())
        return status, json.loads(text)

    def ask(self, text: str, model: str = "lora", **more: Any) -> tuple[int, Any]:
        return self.post(CHAT, model=model, messages=[{"role": "user", "content": text}], **more)


def wanted(loaded: Loaded, text: str, **sampling: Any) -> tuple[str, int, int]:
    """Returns what `generate` answers, and the tokens of prompt and answer."""
    prompt = loaded.template.prompt([Turn("user", text)])
    sampling = Sampling(**{"max_new_tokens": 12} | sampling)
    (one,) = answer(loaded.model, [prompt], loaded.tokenizer, sampling, loaded.template.stop_ids, [sampling.seed])
    return one.text, len(prompt), len(one.ids)
