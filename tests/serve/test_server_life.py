"""Disconnecting clients, stop strings, signals, metrics, and a failing engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from forked import lmchat, start
from live_server import CARD, LiveServer, live_server, tiny_engine, wait_for
from lmchat.__main__ import main
from lmchat.generation.engine import TokenEvent
from lmchat.serve import http_io
from lmchat.serve.app import Server
from lmchat.serve.http_server import _Uvicorn, open_socket, run_server
from lmchat.serve.limits import Limits
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_checkpoint import save_random_checkpoint

ENDLESS = {"prompt": "x", "max_tokens": 500, "seed": 1, "top_k": 5, "temperature": 0.5}
"""A request whose completion does not end by itself."""


def slow(live: LiveServer, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slows down the engine's steps; returns a list with the number of sequences decoded in each."""
    step, sizes = live.server.engine.step, []

    def slow_step() -> list[TokenEvent]:
        time.sleep(seconds)
        events = step()
        sizes.append(len(events))
        return events

    monkeypatch.setattr(live.server.engine, "step", slow_step)
    return sizes


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_frees_its_slot_within_a_step(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    sizes = slow(live, 0.2, monkeypatch)  # long enough for a busy machine to notice the client within one
    engine = live.server.engine
    before = live.server.metrics.disconnects._value.get()
    with httpx.Client(base_url=live.url, timeout=20) as client:
        timeout = httpx.Timeout(20, read=20 if stream else 0.7)
        body = {**ENDLESS, "n": 3, "stream": stream}
        request = client.build_request("POST", "/v1/completions", json=body, timeout=timeout)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_raw())
            assert len(engine.scheduler.running) == 3
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    steps = len(sizes)
    wait_for(lambda: len(engine.scheduler.running) == 0)
    assert len(sizes) - steps <= 2, "the step that ran, and one more if the event loop was late"
    wait_for(lambda: live.server.admission.open == 0)
    assert live.server.metrics.disconnects._value.get() == before + 1


def test_stop_strings_end_one_sample_and_not_the_others(live: LiveServer) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none")
    options: Any = {"model": "lmchat", "prompt": "x", "max_tokens": 60, "seed": 4, "n": 3, "extra_body": {"top_k": 40}}
    whole = [choice.text for choice in client.completions.create(**options).choices]
    assert min(map(len, whole)) > 5
    stop = whole[1][3:5]
    cut = [text[: text.index(stop)] if stop in text else text for text in whole]
    stopped = client.completions.create(stop=[stop, "never there"], **options)
    assert [choice.text for choice in stopped.choices] == cut
    assert stopped.choices[1].finish_reason == "stop"
    texts = ["", "", ""]
    for chunk in client.completions.create(stop=stop, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == cut
    wait_for(lambda: len(live.server.engine.scheduler.running) == 0)


def test_a_slow_client_receives_everything(live: LiveServer) -> None:
    body = {**ENDLESS, "stream": True, "logprobs": 0}
    whole = httpx.post(f"{live.url}/v1/completions", json={**body, "stream": False}).json()["choices"][0]
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as response:
        text = ""
        for number, line in enumerate(response.iter_lines()):
            if number < 10:
                time.sleep(0.05)
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == whole["text"]


def test_metrics_and_health(live: LiveServer) -> None:
    def metrics() -> dict[str, float]:
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = metrics()
    answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "abc", "max_tokens": 9, "seed": 2}).json()
    after = metrics()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained("lmchat_prompt_tokens_total") == answer["usage"]["prompt_tokens"] == 4
    assert gained("lmchat_generated_tokens_total") == answer["usage"]["completion_tokens"] > 1
    assert gained('lmchat_requests_total{path="/v1/completions",status="200"}') == 1
    for name in ("first_token", "token_interval", "request"):
        assert gained(f"lmchat_{name}_seconds_count") == 1
    assert after["lmchat_running"] == after["lmchat_waiting"] == 0
    assert httpx.get(f"{live.url}/health").json() == {
        "status": "ok", "model": "tiny-sft-7", "running": 0, "waiting": 0,
    }  # fmt: skip


def test_a_failed_engine_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine()

    def fail() -> list[TokenEvent]:
        raise RuntimeError("an illegal memory access")

    engine.step = fail  # type: ignore[method-assign]
    with live_server(engine) as live, httpx.Client(base_url=live.url) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failure"
        assert client.get("/health").status_code == 503
    assert "an illegal memory access" in caplog.text


def test_a_server_continues_after_a_lack_of_memory() -> None:
    engine = tiny_engine()
    prepare, lacking = engine.scheduler.prepare, [1]

    def prepare_or_fail() -> None:
        prepare()
        if lacking:
            raise torch.OutOfMemoryError(f"CUDA out of memory ({lacking.pop()})")

    engine.scheduler.prepare = prepare_or_fail  # type: ignore[method-assign]
    with live_server(engine) as live, httpx.Client(base_url=live.url) as client:
        answers = [client.post("/v1/completions", json={"prompt": "a", "temperature": 0}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [500, 200, 200]
        assert "send fewer or shorter requests" in answers[0].json()["error"]["message"]
        assert client.get("/health").json()["running"] == 0


class ServerProcess:
    """``lmchat serve ARGS`` in a forked process."""

    def __init__(self, output: Path, *args: str) -> None:
        self._output = output
        output.touch()
        self.process = start(lmchat, "serve", *args, output=output)
        wait_for(lambda: len(self._lines()) > 1 or not self.process.is_alive(), seconds=60)
        self.first, self.second, *_ = [*self._lines(), "", ""]

    def _lines(self) -> list[str]:
        return [line for line in self._output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def later_output(self) -> str:
        """What the server has written after its first two lines."""
        return self._output.read_text().removeprefix(self.first + self.second)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServerProcess, str]]:
    """``lmchat serve`` on a checkpoint, and its address."""
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    save_random_checkpoint(tokenizer, sequence_len=256)
    tokenizer.save(tmp_path / "tokenizer")
    server = ServerProcess(tmp_path / "output.txt", "--port", "0", "--max_new_tokens", "2000")
    try:
        assert server.first.startswith("sft tiny, step 7"), server.first + server.second
        assert "Chat: http://127.0.0.1:" in server.second, server.first + server.second
        yield server, server.second.split()[1].rstrip("/")
    finally:
        server.process.kill()
        server.process.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_running_requests_and_refuses_new_ones(
    process: tuple[ServerProcess, str], number: int
) -> None:
    server, url = process
    answers: list[httpx.Response] = []
    body = {"prompt": "x", "max_tokens": 800, "seed": 1, "temperature": 0.3}
    for _ in range(100):
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60)))
    thread.start()
    wait_for(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
    server.send_signal(number)
    wait_for(lambda: is_refused(url))
    assert thread.is_alive(), "the answer came before the new request was refused; make it longer"
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] > 100
    assert server.wait(timeout=20) == 0
    assert server.later_output() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_at_once_and_silently(process: tuple[ServerProcess, str], number: int) -> None:
    server, url = process
    wait_for(lambda: not is_refused(url))

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{url}/v1/completions", json={**ENDLESS, "max_tokens": 1500}, timeout=60)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
    server.send_signal(number)
    wait_for(lambda: is_refused(url))
    server.send_signal(number)
    assert server.wait(timeout=20) == 128 + number
    assert server.later_output() == ""
    thread.join()


def test_sigint_before_the_server_starts_is_a_graceful_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's asyncio would cancel the server's tasks."""
    server = Server(tiny_engine(), CARD, Limits())
    serve, handler, started = _Uvicorn.serve, signal.getsignal(signal.SIGINT), []

    async def interrupted(runner: _Uvicorn, sockets: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        await serve(runner, sockets)
        started.append(runner.started)

    monkeypatch.setattr(_Uvicorn, "serve", interrupted)
    run_server(server, open_socket("127.0.0.1", 0))
    assert started == [True] and server.admission.draining
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stopping_server_answers_a_request_whose_body_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cancelled, with a traceback, where --max_seconds was less than the time for bodies."""
    monkeypatch.setattr(http_io, "BODY_SECONDS", 2)
    with socket.socket() as connection:
        with live_server(tiny_engine(), Limits(max_running=8, max_seconds=0.1)) as live:
            host, port = live.url.removeprefix("http://").split(":")
            connection.connect((host, int(port)))
            head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            connection.sendall("\r\n".join([*head, "Content-Length: 9", "", "{"]).encode())
            wait_for(lambda: live.connections)
        assert b" 408 " in connection.recv(65536)


def is_refused(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 503
    except httpx.TransportError:
        return True


def test_unavailable_ports_are_reported() -> None:
    listener = open_socket("127.0.0.1", 0)
    with listener, pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port \d+: Address already in use"):
        open_socket("127.0.0.1", listener.getsockname()[1])
    for port in (-1, 65536):
        with pytest.raises(UserError, match="from 0 to 65535"):
            open_socket("127.0.0.1", port)


def test_listening_on_a_network_requires_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMCHAT_API_KEY", raising=False)
    for host in ("999.1.1.1", "a..b", "x" * 300):
        assert main(["serve", "--host", host]) == 2
        assert f"cannot listen on {host} port 8000" in capsys.readouterr().err
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "set LMCHAT_API_KEY to a secret token" in capsys.readouterr().err
    for key in (" s3cret", "s3cret ", " ", "schlüssel", "a\nb"):  # clients cannot send these
        monkeypatch.setenv("LMCHAT_API_KEY", key)
        assert main(["serve", "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert "the API key must have printable ASCII characters" in error and "s3cret" not in error
    monkeypatch.delenv("LMCHAT_API_KEY")
    assert main(["serve", "--port", "0", "--api_key", ""]) == 2
    assert "the API key must have" in capsys.readouterr().err
    assert main(["serve", "--max_seconds", "0"]) == 2
    assert "--max_seconds is 0" in capsys.readouterr().err
