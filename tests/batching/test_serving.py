"""`hf-fastattn serve`: Transformers' server over a patched model, asked by OpenAI's client over loopback."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.utils.import_utils import is_serve_available

import hf_fastattn
from hf_fastattn.batching.manager import FastBatchingManager
from hf_fastattn.batching.requests import Request
from hf_fastattn.eval.choices import SHIPPED

if not is_serve_available():
    pytest.skip("Transformers' server needs fastapi, uvicorn and openai", allow_module_level=True)

from openai import AsyncOpenAI  # noqa: E402

from hf_fastattn.eval import serve as command  # noqa: E402

# However slow the processor is, an endless answer ends because its client has hung up.
CLIENTS, NEW, ENDLESS = 32, 24, 10**6
# Seconds after which something hangs: on a busy processor a round of clients takes a minute.
PATIENCE = 600
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# Rounds of clients, and bytes beside pages that all but the first two may leave behind: the allocator's. It keeps more
# where answers have waited for their clients on a busy processor, so that what is left of requests is counted, too.
ROUNDS, FLAT = 4, 64 << 20
OF_REQUESTS = (Request, RequestState, GenerationOutput)


class Served:
    """A server in a thread of this process, the model in it, and its unpatched twin.

    Args:
        folder: of a checkpoint with a chat template.
        server: Transformers'.
    """

    def __init__(self, folder: Path, server: Any) -> None:
        self.name, self._server = str(folder), server
        self._address = f"http://127.0.0.1:{server.server.config.port}"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._twin = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self._known: dict[str, str] = {}

    @property
    def model(self) -> Any:
        (loaded,) = self._server._model_manager.loaded_models.values()
        return loaded.model

    @property
    def manager(self) -> Any:
        return self._server._generation_state._cb_manager._cb

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self._address}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self._address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def expected(self, text: str, chat: bool = True) -> str:
        """What the unpatched model says to a message, or after a text."""
        if text not in self._known:
            messages = [{"role": "user", "content": text}]
            asked = self.tokenizer.apply_chat_template(messages, return_tensors="pt") if chat else None
            ids = (asked or self.tokenizer(text, return_tensors="pt"))["input_ids"]
            tokens = self._twin.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
            self._known[text] = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return self._known[text]

    def ask(self, text: str, new: int = NEW, **options: Any) -> dict[str, Any]:
        """The arguments of a chat completion."""
        messages = [{"role": "user", "content": text}]
        return {"model": self.name, "messages": messages, "max_tokens": new, "temperature": 0, **options}

    def rest(self) -> None:
        """Wait until every request is over; nothing is left of any."""
        manager, until = self.manager, time.monotonic() + PATIENCE
        while hf_fastattn.report(self.model).pages_in_use or manager.output_router.result_handlers:
            assert time.monotonic() < until, "pages or handlers of requests are left"
            time.sleep(0.02)
        # Tasks of the server let go of theirs a little later.
        while left := left_of_requests():
            assert time.monotonic() < until, f"{left} objects of requests are left"
            time.sleep(0.2)
        assert manager.input_queue.empty() and manager.output_router.output_queue.empty()


def left_of_requests() -> int:
    """Requests and outputs that somebody still refers to."""
    gc.collect()
    return sum(type(found) in OF_REQUESTS for found in gc.get_objects())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for file in SHIPPED.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[Any] = []
    threads = torch.get_num_threads()
    # Server, engine and clients share the processor with other tests.
    torch.set_num_threads(1)

    class Recorded(command.Serve):
        def start_server(self) -> None:
            started.append(self)
            super().start_server()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Serve", Recorded)
        status = command.main(
            [str(folder), "--continuous-batching", "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype",
             "float32", "--log-level", "error", "--non-blocking", "--patch", "page_size=32"]
        )  # fmt: skip
    assert status == 0
    held = Served(folder, started[0])
    held.wait()
    yield held
    started[0].kill_server()
    torch.set_num_threads(threads)


async def streamed(client: AsyncOpenAI, given: dict[str, Any], hang_up_after: int | None = None) -> str:
    """The text of a stream, of which so many pieces are read."""
    stream, pieces = await client.chat.completions.create(stream=True, **given), []
    async for chunk in stream:
        pieces.append((chunk.choices[0].delta.content or "") if chunk.choices else "")
        if len(pieces) == hang_up_after:
            await stream.close()
            break
    return "".join(pieces)


def test_chat_completions(served: Served) -> None:
    async def ask() -> tuple[Any, str, Any]:
        async with served.client() as client:
            whole = await client.chat.completions.create(**served.ask("def add(a, b):"))
            text = await streamed(client, served.ask("import os"))
            plain = await client.completions.create(model=served.name, prompt="class A:\n", max_tokens=NEW, temperature=0)
            return whole, text, plain

    whole, text, plain = asyncio.run(ask())
    assert whole.choices[0].message.content == served.expected("def add(a, b):")
    assert whole.usage.completion_tokens == NEW and whole.choices[0].finish_reason == "length"
    assert text == served.expected("import os")
    assert plain.choices[0].text == served.expected("class A:\n", chat=False)
    assert isinstance(served.manager, FastBatchingManager)
    assert served.model._fastattn.runtime.config.page_size == 32
    call = hf_fastattn.report(served.model).last_call
    assert call.requests_batched == 3 and not call.not_looped and not call.fallbacks
    served.rest()


def test_many_clients_some_of_whom_hang_up(served: Served) -> None:
    """Whoever stays gets the tokens of the unpatched model; requests of those who go end, and their pages are free."""
    before = hf_fastattn.report(served.model).last_call.requests_batched

    async def one(client: AsyncOpenAI, place: int) -> str | None:
        text = f"def function_{place}(x):"
        if place % 4 == 3:
            # Long enough that nobody waits for its end.
            await streamed(client, served.ask(text, ENDLESS), hang_up_after=1 + place % 3)
            return None
        if place % 4 == 2:
            return (await client.chat.completions.create(**served.ask(text))).choices[0].message.content
        return await streamed(client, served.ask(text))

    async def round_of_clients() -> list[str | None]:
        async with served.client() as client:
            return await asyncio.gather(*(one(client, place) for place in range(CLIENTS)))

    held: list[int] = []
    for _ in range(ROUNDS):
        answers = asyncio.run(round_of_clients())
        for place, answer in enumerate(answers):
            assert answer == (None if place % 4 == 3 else served.expected(f"def function_{place}(x):"))
        served.rest()
        held.append(psutil.Process().memory_info().rss - served.model._fastattn.runtime.groups.nbytes)
    call = hf_fastattn.report(served.model).last_call
    assert call.requests_batched - before == ROUNDS * CLIENTS * 3 // 4 and not call.fallbacks and not call.not_looped
    assert held[-1] - held[1] < FLAT, held
