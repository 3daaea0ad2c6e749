"""Downloads the evaluation bundle of CORE."""

import shutil
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from lmchat.evaluation.core import read_bundle
from lmchat.files import new_folder
from lmchat.progress import ProgressBar
from lmchat.types import UserError, user_errors

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BYTES = 1 << 30
"""Limit of the file's packed and unpacked size: ten times the size of the bundle."""
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


def download_bundle(output: Path, url: str = BUNDLE_URL) -> int:
    """Downloads, checks and unpacks a bundle; ``output`` appears when it is complete. Returns the number of tasks.

    Raises:
        UserError: ``output`` exists, the download fails, or the file is not a bundle.
    """
    if output.exists():
        raise UserError(f"{output} exists; delete it to fetch the bundle again, or choose another with --output")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "eval_bundle.zip"
        _fetch(url, archive)
        read_bundle(archive)
        with zipfile.ZipFile(archive) as file, new_folder(output) as staging:
            if (size := sum(entry.file_size for entry in file.infolist())) > MAX_BYTES:
                raise UserError(f"{url} unpacks to {size / 1e9:.1f} GB, too much for a bundle; check the address")
            file.extractall(folder)
            shutil.copytree(Path(folder) / "eval_bundle", staging, dirs_exist_ok=True)
    return len(read_bundle(output))


def _fetch(url: str, path: Path) -> None:
    remedy = "check the address and the network, and run again"
    with (
        user_errors(f"cannot download {url}", remedy, OSError, HTTPException, ValueError),
        urlopen(url, timeout=_TIMEOUT_SECONDS) as answer,
        path.open("wb") as file,
    ):
        size = int(answer.headers.get("Content-Length") or 0)
        with ProgressBar("Downloading", size or None, unit="B") as progress:
            while chunk := answer.read(_CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    raise UserError(
                        f"{url} has over {MAX_BYTES / 1e9:.1f} GB, too much for a bundle; check the address"
                    )
        if size and file.tell() < size:
            raise OSError(f"the connection ended after {file.tell()} of {size} bytes")
