"""Requests that are malformed, too large, too slow or not allowed are answered with 4xx in OpenAI's shape."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from live_server import LiveServer, live_server, tiny_engine, wait_for
from lmchat.generation.engine import TokenEvent
from lmchat.serve import http_io, http_server
from lmchat.serve.limits import Limits

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
TEXT = {"prompt": "Hi", "max_tokens": 1}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "n",
    "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "calculator", "tools", "logit_bias",
    "best_of", "response_format", "user", "__class__", "",
]  # fmt: skip
VALUES = [
    "true", "false", "0", "1", "-1", "2.5", "-0.0", "1e308", "-1e999", "NaN", "Infinity", "1" * 30, "1" * 5000, '""',
    '"x"', r'"\ud800"', r'"\u0000"', '"\U0001f600"', "[]", "[[]]", "[null]", "[1, 2]", "[-1]", "[999999]", "{}",
    '{"a": [1]}', "[" * 50 + "]" * 50, '[{"role": "user"}]', '[{"role": "user", "content": ""}]', '[{"content": "x"}]',
    '[{"role": "user", "content": [{"type": "image_url"}]}]', '[{"role": ["user"], "content": "x"}]',
    '[{"role": "assistant", "content": "x"}]', '[{"role": "user", "content": 1}]', '[{"role": {}, "content": null}]',
    '[{"role": "user", "content": "x", "tool_calls": [1]}]', '[{"role": "user", "content": {"a": "b"}}]',
]  # fmt: skip


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=30) as client:
        yield client


def post(client: httpx.Client, path: str, body: bytes | str, **headers: str) -> httpx.Response:
    return client.post(path, content=body, headers={"Content-Type": "application/json", **headers})


def check(response: httpx.Response, *statuses: int) -> None:
    """The response is an answer, or an error in OpenAI's shape."""
    assert response.status_code in statuses if statuses else response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] and len(error["message"]) < 1000


@pytest.mark.parametrize("path", PATHS)
def test_every_field_with_every_kind_of_value(client: httpx.Client, path: str) -> None:
    refused = 0
    for field, value in itertools.product(FIELDS, VALUES):
        body = {name: json.dumps(each) for name, each in PATHS[path].items()} | {field: value}
        response = post(client, path, "{" + ", ".join(f'"{name}": {each}' for name, each in body.items()) + "}")
        check(response)
        refused += response.status_code >= 400
    assert refused > len(FIELDS) * len(VALUES) // 2


@pytest.mark.parametrize("path", PATHS)
def test_invalid_json_bodies_are_refused(client: httpx.Client, path: str) -> None:
    bodies: list[bytes] = [
        b"", b"null", b"[]", b"1", b'"x"', b"{", b"{'a': 1}", b"\xff\xfe", b'{"prompt": "\xff"}', b"{}" * 2,
        b"\x00" * 100, b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"prompt": "' + b"\\" * 1001 + b'"}', b'{"n": 1, "n": 2, "prompt": "a"', '{"prompt": "é"}'.encode("utf-16"),
    ]  # fmt: skip
    for body in bodies:
        check(post(client, path, body), 400)
    valid = json.dumps(PATHS[path]).encode()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(valid)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        check(post(client, path, bytes(damaged)))


def test_a_body_full_of_invalid_items_is_refused_at_the_first(client: httpx.Client) -> None:
    """A report of every item took 4 to 8 seconds, in which no stream went on."""
    for items in (["1"] * 480_000, ["null"] * 190_000, ["[null]"] * 120_000, ["{}"] * 300_000, ["1.5"] * 240_000):
        for path, field in (("/v1/completions", "prompt"), ("/detokenize", "tokens"), ("/v1/completions", "stop")):
            body = f'{{"{field}": [' + ", ".join(items)[:900_000].rpartition(",")[0] + ', "a"]}'
            begun = time.process_time()
            check(post(client, path, body), 400)
            assert time.process_time() - begun < 1, (field, items[0])


def test_unknown_and_unsupported_options_are_reported(client: httpx.Client) -> None:
    for name, value in {
        "temprature": 1,
        "tools": [{}],
        "presence_penalty": 0.5,
        "response_format": {"type": "json"},
    }.items():
        response = post(client, "/v1/chat/completions", json.dumps(CHAT | {name: value}))
        check(response, 400)
        assert response.json()["error"]["param"] == name
    harmless = {
        "presence_penalty": 0,
        "tools": None,
        "user": "me",
        "response_format": {"type": "text"},
        "logit_bias": {},
    }
    check(post(client, "/v1/chat/completions", json.dumps(CHAT | harmless)), 200)


def test_options_that_change_the_answer_are_not_ignored(client: httpx.Client) -> None:
    for path, options, param in (
        ("/v1/chat/completions", CHAT | {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"includeUsage": True}}, "stream_options"),
        ("/v1/completions", TEXT | {"n": 2, "best_of": 1}, "best_of"),
        ("/v1/completions", TEXT | {"n": 2, "best_of": 3}, "best_of"),
    ):
        response = post(client, path, json.dumps(options))
        check(response, 400)
        assert response.json()["error"]["param"] == param
    same = CHAT | {"max_tokens": 2, "max_completion_tokens": 2}
    check(post(client, "/v1/chat/completions", json.dumps(same)), 200)
    check(post(client, "/v1/completions", json.dumps(TEXT | {"n": 2, "best_of": 2})), 200)
    streamed = TEXT | {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": None}}
    check(post(client, "/v1/completions", json.dumps(streamed)), 200)


def test_messages_name_all_types_of_a_field(client: httpx.Client) -> None:
    for options, message in (
        ({"prompt": ["a", 5]}, "prompt must be a text, a list of texts, a list of token ids, or a list of"),
        ({"prompt": [[1], ["a"]]}, "prompt must be a text,"),
        ({"stop": ["a"] * 17}, "stop must be a text of 1 to 200 characters, or a list of at most 16 of these"),
        ({"stop": ""}, "stop must be a text of 1 to 200 characters"),
    ):
        response = post(client, "/v1/completions", json.dumps(TEXT | options))
        check(response, 400)
        assert response.json()["error"]["message"].startswith(message)


def test_a_compressed_body_is_refused_as_such(client: httpx.Client) -> None:
    response = post(client, "/v1/completions", gzip.compress(json.dumps(TEXT).encode()), **{"Content-Encoding": "gzip"})
    check(response, 415)
    assert "'gzip'; send it uncompressed" in response.json()["error"]["message"]


def test_other_types_paths_and_methods(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"):
        check(client.post("/v1/completions", content=json.dumps(TEXT), headers={"Content-Type": kind}), 415)
    check(post(client, "/v1/completions", json.dumps(TEXT), **{"Content-Type": "application/json; charset=utf-8"}), 200)
    check(client.get("/v1/chat/completions"), 405)
    check(client.put("/v1/completions"), 405)
    check(client.request("X" * 5000, "/v1/completions"), 405)
    for path in ("/", "/app.js", "/health", "/v1/models", "/metrics"):
        asked, given = client.head(path), client.get(path)
        assert (asked.status_code, asked.content) == (200, b"")
        assert asked.headers["content-type"] == given.headers["content-type"]
    for path in ("/nothing", "/v1/", "/v1/models/", "/../../etc/passwd", "/app.js/x", "/%00", "/docs", "/openapi.json"):
        check(client.get(path), 404)


def test_too_long_prompts_and_completions_are_refused(client: httpx.Client, live: LiveServer) -> None:
    limit = live.server.engine.context_limit
    for text in ("x" * (limit + 1), "x" * (limit - 1), "x" * 900_000):
        response = post(client, "/v1/completions", json.dumps({"prompt": text, "max_tokens": 30}))
        check(response, 400)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    response = post(client, "/v1/chat/completions", json.dumps(CHAT | {"max_tokens": 10**6}))
    check(response, 400)
    assert response.json()["error"]["param"] == "max_tokens"
    check(post(client, "/v1/completions", json.dumps({"prompt": "x" * 1_100_000})), 413)
    check(post(client, "/v1/completions", iter([b" " * 10_000] * 200)), 413)  # type: ignore[arg-type]
    check(post(client, "/v1/completions", json.dumps(TEXT | {"n": 9})), 400)
    check(post(client, "/v1/completions", json.dumps(TEXT | {"prompt": ["a"] * 300})), 400)


def test_too_many_prompts_are_refused_before_any_is_encoded(
    client: httpx.Client, live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    monkeypatch.setattr(live.server.engine.tokenizer, "encode", lambda text: encoded.append(text) or [1])
    response = post(client, "/v1/completions", json.dumps({"prompt": ["a"] * 133, "n": 2}))
    check(response, 400)
    assert "266 completions exceeds this server's 264" in response.json()["error"]["message"]
    assert encoded == []


def test_other_origins_and_names_are_refused(client: httpx.Client, live: LiveServer) -> None:
    body = json.dumps(TEXT)
    own = live.url.removeprefix("http://")
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[", f"http://{own}.evil.example"):
        response = post(client, "/v1/completions", body, Origin=origin)
        check(response, 403)
        assert not any(name.startswith("access-control") for name in response.headers)
    check(post(client, "/v1/completions", body, Origin=live.url), 200)
    assert client.options("/v1/completions", headers={"Origin": "http://evil.example"}).status_code == 403
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"):
        check(client.get("/v1/models", headers={"Host": host}), 403)
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        check(client.get("/v1/models", headers={"Host": host}), 200)


def test_headers_of_every_response(client: httpx.Client) -> None:
    for path in ("/", "/app.js", "/health", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-request-id"]
    assert client.get("/v1/models").headers["content-type"] == "application/json"


def test_a_bearer_token_is_required() -> None:
    with live_server(tiny_engine(), api_key="s3cret") as live, httpx.Client(base_url=live.url) as client:
        for path in ("/", "/app.js", "/health"):
            check(client.get(path), 200)
        wrong = ("", "s3cret", "Bearer", "Bearer s3cre", "Bearer s3cretx", "Basic s3cret", "Bearer \xe9")
        for given in wrong:
            headers = {"Authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/nothing"):
                check(client.get(path, headers=headers), 401)
            check(client.post("/v1/completions", headers=headers), 401)
        for given in ("Bearer s3cret", "bearer  s3cret"):
            check(client.get("/v1/models", headers={"Authorization": given}), 200)


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def raw(live: LiveServer) -> Iterator[socket.socket]:
    """A raw connection, for bytes that HTTP clients do not send."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def received(connection: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):  # how a connection is closed whose bytes the server has not read
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "version", "nonsense", "headers", "length", "chunk"],
)
def test_invalid_http_is_refused(raw: socket.socket, sent: bytes, client: httpx.Client) -> None:
    raw.sendall(sent)
    raw.shutdown(socket.SHUT_WR)
    answer = received(raw)
    assert answer == b"" or answer.split()[1].startswith(b"4"), answer
    if answer:
        assert json.loads(answer.split(b"\r\n\r\n")[-1])["error"]["type"] == "invalid_request_error"
    check(client.get("/health"), 200)


def test_invalid_http_after_an_answer_closes_the_connection(
    raw: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    raw.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}}"):  # head and body may arrive apart
        answer += raw.recv(65536)
    assert b"415" in answer.split(b"\r\n")[0]
    raw.sendall(b"zz\r\n")
    assert received(raw) == b""
    assert "Traceback" not in caplog.text


def test_a_missing_body_times_out(raw: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_io, "BODY_SECONDS", 0.2)
    raw.sendall(POST + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
    assert b"408" in raw.recv(65536).split(b"\r\n")[0]


def test_surplus_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "max_connections", lambda: 3)
    with live_server(tiny_engine()) as live, ExitStack() as opened:
        host, port = live.url.removeprefix("http://").split(":")
        connections = [opened.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(5)]
        assert [received(each) for each in connections[3:]] == [b"", b""]
        assert len(live.connections) == 3
        connections[0].close()
        wait_for(lambda: len(live.connections) == 2)
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_the_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        http_server.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 4096), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="the time limit is an option of Linux")
def test_a_client_that_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_SECONDS", 0.5)
    with live_server(tiny_engine()) as live, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = live.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.settimeout(20)
        connection.sendall(b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)  # more than buffers take
        wait_for(lambda: live.connections)
        wait_for(lambda: not live.connections)


def test_missing_headers_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.2)
    with live_server(tiny_engine()) as live:
        host, port = live.url.removeprefix("http://").split(":")
        for earlier in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(earlier)
                answer = b""
                while earlier and not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
                assert received(connection) == b""
        with httpx.Client(base_url=live.url) as client:
            check(client.get("/health"), 200)


def test_full_slow_and_closing_servers() -> None:
    engine = tiny_engine(max_rows=2)
    limits = Limits(max_running=2, max_queued=1, max_seconds=0.5, max_new_tokens=600)
    engine_step, blocked = engine.step, threading.Event()
    blocked.set()

    def step() -> list[TokenEvent]:
        if blocked.is_set():
            time.sleep(0.05)
            return []
        return engine_step()

    engine.step = step  # type: ignore[method-assign]
    with live_server(engine, limits) as live, httpx.Client(base_url=live.url, timeout=20) as client:
        check(post(client, "/v1/completions", json.dumps(TEXT | {"n": 2, "prompt": ["a", "b"]})), 400)
        results: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: results.append(httpx.post(f"{live.url}/v1/completions", json=TEXT)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: live.server.admission.open == 3)
        full = post(client, "/v1/completions", json.dumps(TEXT))
        check(full, 429)
        assert full.headers["retry-after"] == "1" and full.json()["error"]["code"] == "server_full"
        for thread in threads:
            thread.join()
        for response in results:
            check(response, 504)
            assert response.headers["x-should-retry"] == "false"
        with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
            events = "".join(response.iter_text())
        assert response.status_code == 200 and '"code":"timeout"' in events and events.endswith("data: [DONE]\n\n")
        blocked.clear()
        check(post(client, "/v1/completions", json.dumps(TEXT)), 200)
        wait_for(
            lambda: live.server.admission.open == len(engine.scheduler.running) == engine.scheduler.num_waiting == 0
        )
        live.server.admission.draining = True
        assert client.get("/health").status_code == 503
        check(post(client, "/v1/completions", json.dumps(TEXT)), 503)
