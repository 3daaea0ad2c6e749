"""Download of the evaluation bundle, from a local mock server."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core_bundle import write_bundle
from lmchat.__main__ import main
from lmchat.evaluation.core import read_bundle


class Handler(SimpleHTTPRequestHandler):
    """Serves files; drops the first connection for the file ``flaky``."""

    dropped: bool = False

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        if "flaky" in self.path and not Handler.dropped:
            Handler.dropped = True
            outputfile.write(source.read(100))
            return
        super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    write_bundle(tmp_path / "eval_bundle")
    for name in ("bundle", "flaky"):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path, "eval_bundle")
    (tmp_path / "page.zip").write_text("<html>moved</html>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def download(url: str) -> int:
    return main(["data", "download", "--eval_bundle", "true", "--eval_bundle_url", url])


@pytest.mark.parametrize("name", ["bundle.zip", "flaky.zip"])
def test_the_bundle_is_fetched_and_unpacked(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    if name == "flaky.zip":
        assert download(f"{server}/{name}") == 2
        assert "the connection ended after 100 of" in capsys.readouterr().err
        assert not (tmp_path / "base" / "eval_bundle").exists()
    assert download(f"{server}/{name}") == 0
    fetched, served = (read_bundle(folder / "eval_bundle") for folder in (tmp_path / "base", tmp_path))
    assert [task.fingerprint for task in fetched] == [task.fingerprint for task in served]
    assert download(f"{server}/{name}") == 2
    assert "exists; delete it" in capsys.readouterr().err


def test_an_invalid_bundle_leaves_no_files(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    for name, message in (("page.zip", "is not an evaluation bundle"), ("missing.zip", "404")):
        assert download(f"{server}/{name}") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "base" / "eval_bundle").exists()
