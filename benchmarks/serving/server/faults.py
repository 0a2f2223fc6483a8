"""What a server does when something goes wrong, asked by the OpenAI client; and its memory over many requests."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.serving.server.checkpoint import Shape
from benchmarks.serving.server.load import load
from benchmarks.serving.server.server import IMAGES, Server
from PIL import Image

PATIENCE = 60.0  # seconds after which something hangs
ROUNDS = 20  # looks at the memory
LONG = 150  # tokens of an answer that is not waited for


class Asker:
    def __init__(self, server: Server) -> None:
        from openai import OpenAI

        self.server = server
        self.client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def ask(self, *urls: str, keep: float | None = None, tokens: int = 8, stream: bool = False) -> Any:
        parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": "w1 w2 w3"}]
        more: dict[str, Any] = {"ignore_eos": True}
        if keep is not None:
            more["mm_processor_kwargs"] = {"foveate_keep": keep}
        how: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": stream, "extra_body": more}
        return self.client.chat.completions.create(model=str(self.server.model), messages=[{"role": "user", "content": parts}], **how)

    def said(self, *urls: str, keep: float | None = None) -> str:
        return str(self.ask(*urls, keep=keep).choices[0].message.content)

    def refused(self, *urls: str, keep: float | None = None) -> str:
        """ "400: reason", or the answer that should not have been."""
        from openai import APIError, APIStatusError

        try:
            return f"answered: {self.said(*urls, keep=keep)!r}"
        except APIStatusError as error:
            return f"{error.status_code}: {error.message}"
        except APIError as error:
            return f"{type(error).__name__}: {error}"

    def settled(self) -> str:
        """Once no request runs and no KV block is in use, "" ; else what is left after a while."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            now = self.server.metrics()
            left = {name: now.get(f"vllm:{name}", 0.0) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
            if not any(left.values()):
                return ""
            time.sleep(0.2)
        return f"still {left}"


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 10.0 + seed).convert("RGB").save(file, "PNG")
    return file.getvalue()


def fault(name: str, wanted: str, seen: str, good: bool) -> dict[str, Any]:
    return {"name": name, "wanted": wanted, "seen": " ".join(seen.split())[:300], "good": good}


def faults(make: Callable[[], Server]) -> list[dict[str, Any]]:
    """What was wanted and what was seen, of a server that `make` makes, which has a reducer."""
    found = []
    with make() as server:
        asker = Asker(server)
        whole = png(64, 64)
        before = asker.said(url(whole))
        for name, data in {"no image": b"what is this", "half an image": whole[: len(whole) // 2], "an empty image": b""}.items():
            seen = asker.refused(url(data))
            after = asker.said(url(whole))
            found.append(fault(name, "400, and the next request is answered as before", seen, seen.startswith("400") and after == before))
        many = [url(png(896, 896, seed)) for seed in range(IMAGES)]  # where size does not matter, it does no harm
        seen, fits = asker.refused(*many, keep=1.0), asker.refused(*many, keep=0.25)
        wanted = "400 where they are whole, an answer where a quarter is kept"
        found.append(fault(f"{IMAGES} images, more than the context", wanted, seen, seen.startswith("400") and fits.startswith("answered")))
        seen = asker.refused(url(png(5000, 4000)))
        found.append(fault("an image of 20 megapixels", "an answer", seen, seen.startswith("answered")))
        found.append(_cancelled(asker, url(whole), before))
        lost = _killed(asker, url(whole))
    with make() as server:
        again = Asker(server).said(url(whole))
    wanted = "every client hears of it at once, and a new server answers as the old one"
    found.append(fault("kill -9 under 8 requests", wanted, lost, lost.startswith("8 of 8") and again == before))
    return found


def _cancelled(asker: Asker, image: str, before: str) -> dict[str, Any]:
    stream = asker.ask(image, tokens=LONG, stream=True)
    next(iter(stream))
    running = asker.server.metrics().get("vllm:num_requests_running", 0.0)
    stream.close()
    left = asker.settled()
    good = running == 1 and not left and asker.said(image) == before
    return fault("a request cancelled after its first token", "it ends, and gives back its KV blocks", left or "it ended", good)


def _killed(asker: Asker, image: str) -> str:
    from openai import APIError

    def one(_: int) -> str:
        try:
            asker.ask(image, tokens=LONG)
            return "answered"
        except APIError as error:
            return type(error).__name__

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(one, number) for number in range(8)]
        end = time.monotonic() + PATIENCE
        while asker.server.metrics().get("vllm:num_requests_running", 0.0) < 1 and time.monotonic() < end:
            time.sleep(0.05)
        began = time.monotonic()
        asker.server.kill()
        said = [one.result() for one in asked]
    took = time.monotonic() - began
    told = [name for name in said if name == "APIConnectionError"]
    return f"{len(told)} of 8 clients were told within {took:.1f} s ({', '.join(sorted(set(said)))})"


def soak(make: Callable[[], Server], shape: Shape, count: int, clients: int = 8) -> dict[str, Any]:
    """Resident memory of a server over many small requests, each with a picture of its own: (requests so far, bytes) at every look."""
    looks, failed, step = [], 0, max(1, count // ROUNDS)
    with make() as server:
        began = time.monotonic()
        for number in range(ROUNDS):
            told = load(server, shape, clients, step, 10_000 + number, 0.25, (1, 0.0))
            failed += told["failed"]
            looks.append([(number + 1) * step, server.memory()])
        return {"requests": step * ROUNDS, "failed": failed, "seconds": time.monotonic() - began, "memory": looks}
