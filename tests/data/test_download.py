"""Downloads from a mock Hub over HTTP: faults, resuming after a kill, and user errors."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import HubServer
from lmchat import hub as hub_limits
from lmchat.data import download
from lmchat.types import UserError
from terminal import Terminal

REPO = "some/shards"


def _parquet(seed: int) -> bytes:
    file = io.BytesIO()
    texts = [f"document {number} of shard {seed} " * 20 for number in range(50 + seed)]
    pq.write_table(pa.table({"text": texts}), file, compression="none")
    return file.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {f"shard_{number:05d}.parquet": _parquet(number) for number in range(6)}
    with HubServer(REPO, {**files, "README.md": b"about", "other/table.parquet": _parquet(9)}) as server:
        yield server


def _start(hub: HubServer, output: Path, **options: object) -> subprocess.Popen[str]:
    options = {"repo_id": REPO, "num_shards": 3, "pattern": "shard_*.parquet", "output": output, **options}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "lmchat", "data", "download", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _download(hub: HubServer, output: Path, **options: object) -> tuple[int, str]:
    """Exit status, and what was printed."""
    process = _start(hub, output, **options)
    printed, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, printed + errors


def _assert_complete(hub: HubServer, output: Path, *numbers: int) -> None:
    names = {f"shard_{number:05d}.parquet" for number in numbers}
    assert {path.name for path in output.glob("*.parquet")} == names
    assert all((output / name).read_bytes() == hub.files[name] for name in names)
    assert not (output / ".download").exists()


def test_the_first_and_last_shards_are_downloaded_despite_faults(
    hub: HubServer, tmp_path: Path, fetch: Callable[..., str]
) -> None:
    hub.faults["tree"] = ["error"]
    hub.faults["shard_00000.parquet"] = ["truncate", "error"]
    hub.faults["shard_00001.parquet"] = ["corrupt"]
    hub.faults["shard_00005.parquet"] = ["error", "corrupt", "truncate"]
    status, printed = _download(hub, tmp_path)
    assert status == 0, printed
    assert "4 shards" in printed
    assert "4 of them fetched now" in printed
    _assert_complete(hub, tmp_path, 0, 1, 2, 5)
    assert not any(hub.faults.values())

    # Downloading more later does not fetch existing files again.
    hub.gets.clear()
    fetch(num_shards=-1)
    _assert_complete(hub, tmp_path, *range(6))
    assert sorted(hub.gets) == ["shard_00003.parquet", "shard_00004.parquet"]
    assert not hub.unknown  # a response that a library keeps for later runs could break them


def test_a_killed_download_resumes(hub: HubServer, tmp_path: Path, fetch: Callable[..., str]) -> None:
    hub.faults["shard_00001.parquet"] = ["stall"]
    process = _start(hub, tmp_path, num_workers=2)
    hub.wait_for_gets(4)  # the others are complete or in progress in the second worker
    while len(list(tmp_path.glob("*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "shard_00001.parquet").exists()
    hub.gets.clear()
    assert "1 of them fetched now" in fetch()
    _assert_complete(hub, tmp_path, 0, 1, 2, 5)
    assert hub.gets == ["shard_00001.parquet"]


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`download_shards` from the mock Hub, in this process."""
    monkeypatch.setattr(download, "HfApi", partial(download.HfApi, endpoint=hub.endpoint))
    monkeypatch.setattr(download, "_FIRST_PAUSE_SECONDS", 0.01)

    defaults = {"repo_id": REPO, "num_shards": 3, "revision": "main", "pattern": "shard_*.parquet", "num_workers": 8}

    def run(**options: Any) -> str:
        return download.download_shards(output=tmp_path, **{**defaults, **options})

    return run


def test_a_broken_shard_is_reported_and_the_others_are_kept(
    hub: HubServer, tmp_path: Path, fetch: Callable[..., str]
) -> None:
    hub.faults["shard_00002.parquet"] = ["corrupt"] * 99
    with pytest.raises(UserError, match=r"some/shards/shard_00002\.parquet: its checksum is wrong \(\d attempts\)"):
        fetch(num_workers=1)
    assert {path.name for path in tmp_path.glob("*.parquet")} == {f"shard_0000{n}.parquet" for n in (0, 1, 5)}
    hub.faults.clear()
    size = sum(len(hub.files[f"shard_0000{n}.parquet"]) for n in (0, 1, 2, 5))
    assert fetch().startswith(f"4 shards ({size / 1e9:.2f} GB) in {tmp_path}, 1 of them fetched now; ")


def test_names_may_be_folders_of_others_but_not_differ_in_case_only(
    hub: HubServer, tmp_path: Path, fetch: Callable[..., str]
) -> None:
    first, second = "shard_00000.parquet", "shard_00001.parquet"
    hub.files |= {f"{first}/x.parquet": _parquet(7), ".hidden.parquet": b"", "notes.txt": b""}
    assert fetch(num_shards=-1, pattern="*[0x].parquet").startswith("2 shards ")
    assert (tmp_path / "x.parquet").read_bytes() == hub.files[f"{first}/x.parquet"]
    assert fetch(num_shards=-1, pattern="[!o]*").startswith("7 shards ")  # neither hidden nor of another kind
    hub.files[second.upper().replace("PARQUET", "parquet")] = hub.files[second]
    with pytest.raises(UserError, match="some/shards has files whose names differ in folder or case only"):
        fetch(pattern="[sS]*")


def test_a_shard_that_is_not_parquet_is_reported(hub: HubServer, fetch: Callable[..., str]) -> None:
    hub.files["shard_00005.parquet"] = b"something else"
    with pytest.raises(UserError, match=r"cannot read .*shard_00005\.parquet, truncated or not a parquet file"):
        fetch()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "wait",
            r"some/shards: the hub sent nothing for 2 s \(the last: .*429.* Waiting 86401.*\); what is complete",
        ),
        ("endless", r"the Hub sends more than the [\d,]+ bytes of .*/shard_00001\.parquet; check HF_ENDPOINT"),
        ("huge", r"cannot download some/shards/shard_00001\.parquet: .*too large.* attempts"),
        ("etag", r"the Hub sent the unsafe ETag 'x/\.\./\.\./"),
        ("missing", r"cannot download some/shards/shard_00001\.parquet: .*404.* attempts"),
    ],
)
def test_a_hub_that_does_not_deliver_a_listed_file(
    hub: HubServer,
    tmp_path: Path,
    fetch: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    message: str,
) -> None:
    """Not for hours, not until the disk is full, and not with an error of the library."""
    monkeypatch.setattr(hub_limits, "STALL_SECONDS", 2.0 if fault == "wait" else 60.0)
    hub.faults["shard_00001.parquet"] = [fault] * 99
    with pytest.raises(UserError, match=message):
        fetch(num_workers=1)
    assert {path.name for path in tmp_path.glob("*.parquet")} == {"shard_00000.parquet", "shard_00005.parquet"}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1 << 20
    hub.faults.clear()
    assert fetch().startswith("4 shards ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "no/such"}, "no/such at revision main: there is no such data set on the Hub"),
        ({"revision": "nowhere"}, "cannot download some/shards at revision nowhere"),
        ({"repo_id": "a/b/c"}, "Repo id must be in the form"),
        ({"num_shards": 6}, "num_shards is 6; some/shards has 5 training shards"),
        ({"num_workers": 0}, "--num_workers is 0; it must be at least 1"),
        ({"pattern": "other/*.parquet"}, r"has 1 file\(s\) that match 'other/\*\.parquet'"),
    ],
)
def test_user_mistakes_are_reported(fetch: Callable[..., str], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch(**options)


def test_offline_mode_makes_no_requests(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, printed = _download(hub, tmp_path / "shards")
    assert status == 2
    assert "offline mode is enabled" in printed and "unset the `HF_HUB_OFFLINE`" in printed
    assert "attempts" not in printed


def test_shards_of_two_repositories_are_not_mixed(tmp_path: Path, fetch: Callable[..., str]) -> None:
    (tmp_path / "source.json").write_text(json.dumps({"repo_id": "other/shards"}))
    with pytest.raises(UserError, match="contains shards of other/shards, not of some/shards; choose another folder"):
        fetch()


def test_two_downloads_into_one_folder_are_refused(hub: HubServer, tmp_path: Path, fetch: Callable[..., str]) -> None:
    hub.faults["shard_00005.parquet"] = ["stall"]
    process = _start(hub, tmp_path)
    hub.wait_for_gets(1)
    with pytest.raises(UserError, match=r"another download into .* is running"):
        fetch()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_source_record_is_reported(tmp_path: Path, fetch: Callable[..., str], content: str) -> None:
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(UserError, match=r"source\.json, .* is damaged \(.+\); delete it if that is some/shards"):
        fetch()
    (tmp_path / "source.json").unlink()
    fetch()
    assert json.loads((tmp_path / "source.json").read_text()) == {"repo_id": "some/shards"}


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"<html>Sign in</html>", "the Hub's response for some/shards is not a list of files"),
        (b"[" * 100_000, "is not a list of files"),
        (b"[1, 2]", "is not a list of files"),
        (b'{"error": 3}', "is not a list of files"),
        (b'[{"type": "file"}]', "is not a list of files"),
        (b'[{"type": "file", "path": 3, "oid": "", "size": 3}]', "unsafe name 3"),
        *[
            (json.dumps([{"type": "file", "path": path, "oid": "", "size": 3}]).encode(), "a file with the unsafe name")
            for path in (
                "../up.parquet",
                "/etc/a.parquet",
                "a/../../b.parquet",
                "nul\0.parquet",
                "\x1b[2J.parquet",
                "a" * 256,
                "",
            )
        ],
        (b'[{"type": "file", "path": "a.parquet", "oid": "", "size": "big"}]', "with the size 'big'"),
        (
            b'[{"type": "file", "path": "a.parquet", "oid": "", "size": 3, "lfs": {"size": 3, "oid": "x", '
            b'"pointerSize": 1}}]',
            "the checksum 'x'",
        ),
    ],
)
def test_responses_of_a_hub_are_checked(
    hub: HubServer, tmp_path: Path, fetch: Callable[..., str], listing: bytes, message: str
) -> None:
    hub.listing = listing
    with pytest.raises(UserError, match=message) as raised:
        fetch(pattern="*.parquet")
    assert "\x1b" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_an_endless_listing_is_refused(
    hub: HubServer, tmp_path: Path, fetch: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_limits, "LISTING_SECONDS", 0.5)
    hub.endless = True
    with pytest.raises(UserError, match="file list of some/shards at revision main does not end"):
        fetch()
    monkeypatch.setattr(hub_limits, "LISTING_SECONDS", 60.0)
    monkeypatch.setattr(download, "MAX_FILES", 1000)
    with (
        redirect_stderr(Terminal()) as terminal,
        pytest.raises(UserError, match="some/shards has more than 1,000 files"),
    ):
        fetch()
    counts = re.findall(r"Listing the files of some/shards at revision main: (\d+) files \[", terminal.getvalue())
    assert 0 < int(counts[-1]) <= 1001
    assert not list(tmp_path.iterdir())
