"""A mock Hugging Face Hub over HTTP: the endpoints that a download uses, with injected faults."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

COMMIT = "c0ffee" * 6 + "c0de"
Fault = Literal["error", "truncate", "corrupt", "stall", "endless", "wait", "huge", "missing", "etag"]
"""error: status 503. truncate: the body ends halfway. corrupt: one byte differs. stall: half the body, then silence.
endless: the body does not end. wait: status 429, to come back in a day. huge: of a petabyte. missing: status 404.
etag: an ETag that leads to another folder."""
_OF_EVERY_REQUEST: dict[str, tuple[int, dict[str, str]]] = {
    "wait": (429, {"Retry-After": "86400"}),
    "huge": (200, {"X-Linked-Size": str(10**15)}),
    "missing": (404, {}),
    "etag": (200, {"ETag": '"x/../../../../../../escaped"'}),
}
"""Status and headers of faults that HEAD requests see too, again and again."""


class HubServer:
    """Serves one data set of the given files until the ``with`` block ends.

    Args:
        repo_id: its name.
        files: path to content.
        others: further data sets, served at the same address.

    Attributes:
        faults: path to the faults of its next GETs, in order ("tree" for the listing).
        gets: GETs served so far, by path.
        unknown: paths of other requests.
        listing: served instead of the list of files.
        endless: every page of the list of files names a further one.
    """

    def __init__(self, repo_id: str, files: dict[str, bytes], others: Sequence[HubServer] = ()) -> None:
        self.repo_id = repo_id
        self.files = files
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.gets: list[str] = []
        self.unknown: list[str] = []
        self.listing: bytes | None = None
        self.endless = False
        self.released = threading.Event()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hubs": (self, *others)}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def wait_for_gets(self, count: int, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while len(self.gets) < count:
            assert time.monotonic() < deadline, f"only {len(self.gets)} of {count} requests came"
            time.sleep(0.02)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of killed clients."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hubs: tuple[HubServer, ...]
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        """The requested data set; the first one if it is unknown."""
        return next((hub for hub in self.hubs if f"/{hub.repo_id}/" in self.path), self.hubs[0])

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve_file(body=False)

    def do_GET(self) -> None:
        asked = re.fullmatch(rf"/api/datasets/{self.hub.repo_id}/(revision|tree)/(\w+)/?([^?]*)(\?.*)?", self.path)
        if asked is not None:
            kind, revision, folder, query = asked.groups()
            if revision not in ("main", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if kind == "revision":
                return self._send_json({"id": self.hub.repo_id, "sha": COMMIT, "siblings": []})
            if self.hub.faults["tree"]:
                self.hub.faults["tree"].pop(0)
                return self._send(503, b"")
            if self.hub.listing is not None:
                return self._send(200, self.hub.listing, {"Content-Type": "application/json"})
            if self.hub.endless and not self.hub.released.is_set():  # a client that goes on ends with the server
                entries = [{"type": "file", "path": f"shard_{n}.parquet", "oid": "0", "size": 1} for n in range(100)]
                time.sleep(0.02)
                link = {"Link": f'<{self.hub.endpoint}{self.path}>; rel="next"', "Content-Type": "application/json"}
                return self._send(200, json.dumps(entries).encode(), link)
            return self._send_json(self._entries(folder, "recursive=true" in (query or "").lower()))
        return self._serve_file(body=True)

    def _entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Entries of a folder ("" is the root), and of its subfolders if requested."""
        inside = folder and f"{folder}/"
        files = [path for path in self.hub.files if path.startswith(inside)]
        if recursive:
            return [self._entry(path) for path in files]
        names = {path[len(inside) :].split("/")[0] for path in files}
        folders = [{"type": "directory", "path": inside + name, "oid": "0" * 40} for name in sorted(names)]
        return [self._entry(entry["path"]) if entry["path"] in files else entry for entry in folders]

    def _entry(self, path: str) -> dict[str, Any]:
        content = self.hub.files[path]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": path, "oid": "0" * 40, "size": len(content), "lfs": lfs}

    def _serve_file(self, body: bool) -> None:
        match = re.fullmatch(rf"/datasets/{self.hub.repo_id}/resolve/(\w+)/(.+)", self.path)
        if match is None:
            self.hub.unknown.append(self.path)
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        content = self.hub.files.get(match[2])
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        faults = self.hub.faults[match[2]]
        if faults and faults[0] in _OF_EVERY_REQUEST:
            status, more = _OF_EVERY_REQUEST[faults[0]]
            return self._send(status, b"" if status != 200 else content, {**headers, **more})
        if not body:
            return self._send(200, content, headers)
        self.hub.gets.append(match[2])
        fault = faults.pop(0) if faults else None
        start = 0
        if requested := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(requested[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault == "error":
            return self._send(503, b"")
        if fault == "endless":
            return self._send_endlessly(headers)
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self._send(206 if start else 200, content[start:], headers, fault=fault)

    def _send_endlessly(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        while not self.hub.released.is_set():
            self.wfile.write(bytes(1 << 16))
            time.sleep(0.01)
        self.close_connection = True

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault not in ("truncate", "stall"):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.hub.released.wait()
        self.close_connection = True
