"""A server in a thread of the test process, on an untrained model in which every weight affects the output."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from lmchat.generation.engine import Engine
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.serve.app import Server
from lmchat.serve.http_server import open_socket, uvicorn_config
from lmchat.serve.limits import Limits
from lmchat.serve.load import ModelCard
from lmchat.tokenizer.bpe import Tokenizer
from random_weights import with_random_weights

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
CARD = ModelCard("tiny-sft-7", 1_700_000_000, {"stage": "sft", "tag": "tiny", "step": 7, "parameters": 1})


def tiny_engine(max_rows: int = 8, sequence_len: int = 64, **options: Any) -> Engine:
    """An engine on single bytes."""
    config = GPTConfig(
        sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
        window_pattern="SL",
    )  # fmt: skip
    net = with_random_weights(GPT(config), 0.2, embeddings=1.0)
    return Engine(net, TOKENIZER, max_rows=max_rows, max_bytes=100_000_000, **options)


@dataclass(frozen=True)
class LiveServer:
    """A running server with its open connections."""

    server: Server
    url: str
    connections: Collection[object]


@contextmanager
def live_server(engine: Engine, limits: Limits | None = None, **options: Any) -> Iterator[LiveServer]:
    """Runs a server on a free port of the loopback interface."""
    server = Server(engine, CARD, limits or Limits(max_running=8), **options)
    listener = open_socket("127.0.0.1", 0)
    runner = uvicorn.Server(uvicorn_config(server))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield LiveServer(server, f"http://127.0.0.1:{listener.getsockname()[1]}", runner.server_state.connections)
    finally:
        runner.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not end"


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Waits until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)
