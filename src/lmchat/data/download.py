"""Downloads parquet shards from the Hugging Face Hub: in parallel, verified, resumable."""

import errno
import fnmatch
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from lmchat.files import json_object, locked, write_json
from lmchat.hub import Session, file_sizes
from lmchat.option_checks import check_count
from lmchat.parquet_pages import open_parquet
from lmchat.progress import ProgressBar
from lmchat.types import UserError, reason, user_errors

MAX_FILES = 1_000_000

_NOT_LISTED = (json.JSONDecodeError, TypeError, LookupError, AttributeError, RecursionError)
"""What huggingface_hub raises for a malformed response."""
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.5
_SMALL_FILE_BYTES = 1 << 16
"""Size of huggingface_hub's own files beside partial downloads."""
_CONTINUE = "what is complete is kept, run again to continue"
_SOURCE = "source.json"
_STAGING = ".download"

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A parquet file of a repository; ``sha256`` is None for files stored in git instead of LFS."""

    path: str
    size: int
    sha256: str | None

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def download_shards(repo_id: str, output: Path, num_shards: int, revision: str, pattern: str, num_workers: int) -> str:
    """Downloads the first ``num_shards`` training shards of a dataset (-1: all), and its last shard, for validation.

    A file appears in ``output`` once its size and checksum are verified; a later run downloads the rest. Failed
    transfers are retried with exponential backoff. All shards are from one commit. Returns a summary in a sentence.

    Raises:
        UserError: no such repository, revision or shards; a file is damaged at every attempt; the disk is full; or
            ``output`` has shards of another repository.
    """
    check_count("", 1, num_workers=num_workers, num_shards=None if num_shards == -1 else num_shards)
    disable_progress_bars()
    hub = _Hub(repo_id, revision, output / _STAGING)
    *train, validation = hub.list_shards(pattern)
    if num_shards > len(train):
        raise UserError(f"num_shards is {num_shards}; {repo_id} has {len(train)} training shards (-1 takes all)")
    # Validation first, so that a run started meanwhile does not take another shard for it.
    shards = [validation, *(train if num_shards == -1 else train[:num_shards])]

    def refuse() -> None:
        raise UserError(f"another download into {output} is running; wait for it, or stop it")

    with user_errors(f"cannot write to {output}", "make room, or choose another folder with --output", OSError):
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / ".lock", when_taken=refuse):
            _note_source(output, repo_id)
            sizes = {path.name: path.stat().st_size for path in output.glob("*") if path.is_file()}
            missing = [shard for shard in shards if sizes.get(shard.name) != shard.size]
            _fetch_all(hub, missing, output, num_workers)
            shutil.rmtree(hub.staging, ignore_errors=True)
    size = sum(shard.size for shard in shards) / 1e9
    return (
        f"{len(shards)} shards ({size:.2f} GB) in {output}, {len(missing)} of them fetched now; the last is for "
        "validation"
    )


def _note_source(output: Path, repo_id: str) -> None:
    source = output / _SOURCE
    if not source.exists():
        write_json(source, {"repo_id": repo_id})
    remedy = f"delete it if that is {repo_id}, or choose another folder with --output"
    with user_errors(f"{source}, which records the source of the shards, is damaged", remedy, ValueError, KeyError):
        other = json_object(source.read_text())["repo_id"]
    if other != repo_id:
        raise UserError(f"{output} contains shards of {other}, not of {repo_id}; choose another folder with --output")


@dataclass
class _Hub:
    """One dataset at one commit."""

    repo_id: str
    revision: str
    staging: Path
    api: HfApi = field(default_factory=lambda: HfApi())

    def list_shards(self, pattern: str) -> list[Shard]:
        """The files that match, sorted by name. Raises `UserError` if there are fewer than two."""
        what = f"{self.repo_id} at revision {self.revision}"
        files = Session(what).list_files(lambda bar: _persistently(lambda: self._list_files(bar), what))
        parquet = [shard for shard in files if shard.name.endswith(".parquet") and not shard.name.startswith(".")]
        shards = [shard for shard in parquet if fnmatch.fnmatch(shard.path, pattern)]
        if len(shards) < 2:
            raise UserError(
                f"{self.repo_id} has {len(shards)} file(s) that match {pattern!r}; two or more are needed, the last "
                "for validation: choose others with --pattern"
            )
        if len({shard.name.casefold() for shard in shards}) < len(shards):  # macOS ignores case
            raise UserError(
                f"{self.repo_id} has files whose names differ in folder or case only; choose one with --pattern"
            )
        return sorted(shards, key=lambda shard: shard.name)

    def _list_files(self, bar: ProgressBar) -> list[Shard]:
        bar.set(0)
        problem = f"the Hub's response for {self.repo_id} is not a list of files"
        with user_errors(problem, "check HF_ENDPOINT and the network", *_NOT_LISTED):
            self.revision = self.api.dataset_info(self.repo_id, revision=self.revision).sha or self.revision
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=self.revision, repo_type="dataset")
            listed = bar.track(islice(entries, MAX_FILES + 1))
            files = [_checked(entry) for entry in listed if isinstance(entry, RepoFile)]
        if len(files) > MAX_FILES:
            raise UserError(
                f"{self.repo_id} has more than {MAX_FILES:,} files, lmchat's limit; choose another data set"
            )
        return files

    def fetch(self, shard: Shard, output: Path) -> None:
        """Downloads and verifies a shard, then moves it into ``output``."""

        def transfer() -> None:
            folder = self.staging / shard.name  # its own, since one file's path may be another's folder
            options: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision, "local_dir": folder}
            path = Path(self.api.hf_hub_download(self.repo_id, shard.path, **options))
            if damage := _damage(path, shard):
                path.unlink()
                raise OSError(damage)
            with open_parquet(path):
                pass
            path.replace(output / shard.name)

        _persistently(transfer, f"{self.repo_id}/{shard.path}")


def _checked(entry: RepoFile) -> Shard:
    """Validates an entry of the list of files, whose path could lead outside the output folder.

    Raises:
        UserError: its name, size or checksum is malformed.
    """
    path, size, sha256 = entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(
        part in ("", ".", "..") or not part.isprintable() or "\\" in part or len(part.encode()) > 255 for part in parts
    ):
        raise UserError(f"the Hub lists a file with the unsafe name {path!r:.200}; nothing was downloaded")
    if (
        type(size) is not int
        or not 0 <= size < 2**63
        or not (sha256 is None or re.fullmatch("[0-9a-f]{64}", str(sha256)))
    ):
        raise UserError(f"the Hub lists {path} with the size {size!r:.50} and the checksum {sha256!r:.80}; try again")
    return Shard(path, size, sha256)


def _damage(path: Path, shard: Shard) -> str | None:
    """How a file differs from the Hub's; None if it does not."""
    if (size := path.stat().st_size) != shard.size:
        return f"it has {size} bytes, not {shard.size}"
    if shard.sha256 is None:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == shard.sha256 else "its checksum is wrong"


def _persistently(action: Callable[[], T], what: str) -> T:
    """Retries after errors; raises those that would come again at once as `UserError`."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return action()
        except (UserError, MemoryError):
            raise
        except Exception as error:  # huggingface_hub raises errors of many types, and wraps some
            if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
                error = error.__cause__
            if final := _final_reason(error):
                raise UserError(f"cannot download {what}: {final}") from error
            last = error
    raise UserError(f"cannot download {what}: {reason(last)} ({_ATTEMPTS} attempts); {_CONTINUE}") from last


def _final_reason(error: Exception) -> str | None:
    """Reason and remedy of an error that would come again at once; None for another."""
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such data set on the Hub, or it is private or gated (`hf auth login` gives access to yours); "
            "check --repo_id"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return reason(error)  # names HF_HUB_OFFLINE
    if isinstance(error, RevisionNotFoundError | HFValidationError):
        return f"{reason(error)}; check --repo_id and --revision"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403):
        return f"{reason(error)}; check --repo_id and your access (`hf auth login`)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space is left; make room and run again"
    return None


def _fetch_all(hub: _Hub, shards: Sequence[Shard], output: Path, num_workers: int) -> None:
    """Downloads in parallel until all are done or one fails."""
    waiting, done, stop = iter(shards), list[Shard](), threading.Event()

    def work() -> None:
        while not stop.is_set() and (shard := next(waiting, None)):
            hub.fetch(shard, output)
            done.append(shard)

    leftover, longest = sum(file_sizes(hub.staging)), max((shard.size for shard in shards), default=0)

    def received() -> int:
        staged = file_sizes(hub.staging)
        if max(staged, default=0) > longest + _SMALL_FILE_BYTES:
            shutil.rmtree(hub.staging, ignore_errors=True)
            raise UserError(f"{hub.repo_id}: the hub sends more than the size that it lists; {_CONTINUE}")
        size = sum(shard.size for shard in done) + max(0, sum(staged) - leftover)
        bar.set(size, f"Downloading {len(done)} of {len(shards)} shards")
        return size

    with ProgressBar("Downloading", sum(shard.size for shard in shards), unit="B") as bar:
        try:
            Session(hub.repo_id).download([work] * min(num_workers, len(shards)), received, _CONTINUE)
        finally:
            stop.set()
