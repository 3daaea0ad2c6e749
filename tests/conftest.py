"""Fixtures for all tests. Tests run in parallel: each worker has one thread and a base folder of its own."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from built_parsers import keep_parsers

# Set before torch is imported: tests, and the processes they start, use one thread each. Threads do not survive a fork,
# and sums depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
# All x86 CPUs run the AVX2 kernels, so that rounding errors are the same on each of them.
os.environ.update(ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="AVX2", ONEDNN_MAX_CPU_ISA="AVX2")
# Compiled kernels depend on that choice, which is not part of torch's cache key: tests have a separate cache.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"lmchat_test_kernels_avx2_{os.getuid()}")
# Tests start many processes, which would all compile lmchat's source.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Mock Hubs listen on the loopback interface, so these tests also run offline.
for _variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(_variable, None)
# Neither the user's cache of Hugging Face libraries nor one that workers share, to which mock Hubs and exports write.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lmchat_hf_home_")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# No certificates, which each HTTP client would read for 60 ms: tests talk to their own servers, without encryption.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.environ["HF_HOME"]


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[Any]:
    """Imports Lightning without packages that it hardly uses, for a faster collection."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return (yield)  # this process distributes the tests to workers
    from lmchat.cli.lean_imports import import_lightning, importing

    with importing():
        import_lightning()
        import lmchat.cli.fit  # noqa: F401
    keep_parsers()
    gc.set_threshold(10_000)  # training creates many objects and few cycles
    with importing():
        return (yield)


LONG = {
    "test_demo.py", "test_faults.py", "test_kill.py", "test_own_model_page.py", "test_resume.py", "test_startup.py",
    "test_training_memory.py", "test_world_change.py",
}  # fmt: skip
"""Files with tests of many seconds. They run first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


REPOSITORY = Path(__file__).resolve().parent.parent


def _shared(folder: str, variable: str) -> Path:
    path = Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / folder)
    if not path.is_dir():
        pytest.skip(f"no {folder} folder; set {variable} to run this test")
    return path


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Recorded inputs and outputs of the reference implementation."""
    return _shared("oracles", "LMCHAT_ORACLES")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, conversations and tasks."""
    return _shared("data", "LMCHAT_SHARED_DATA")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small committed numeric fixtures."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def default_base(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests without a base folder use one of the worker, never the user's."""
    os.environ["LMCHAT_BASE_DIR"] = str(tmp_path_factory.mktemp("default_base"))


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Creates a folder once for all workers of a test run: ``make_once(name, fill)`` calls ``fill(folder)`` once.

    Tests must not change the folder.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        from lmchat.files import locked

        folder, finished = root / name, root / f"{name}.finished"
        with locked(root / f"{name}.lock", lambda: None):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                finished.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(make_once: MakeOnce) -> Path:
    """A base folder with Python's own documentation as three shards, and a tokenizer of 512 entries."""

    def fill(base: Path) -> None:
        from pydoc_data.topics import topics

        import pyarrow as pa
        import pyarrow.parquet as pq

        from lmchat.tokenizer.bpe import Tokenizer

        data = base / "base_data"
        data.mkdir()
        texts = [text for _, text in sorted(topics.items())]
        for number in range(3):
            pq.write_table(pa.table({"text": texts[number::3]}), data / f"shard_{number:05d}.parquet")
        Tokenizer.train(texts, 512).save(base / "tokenizer")

    return make_once("tiny_base", fill)


@pytest.fixture(scope="session")
def new_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Creates more base folders with the tokenizer and shards of `tiny_base`."""

    def make() -> Path:
        base = tmp_path_factory.mktemp("base")
        for name in ("base_data", "tokenizer"):
            (base / name).symlink_to(tiny_base / name)
        return base

    return make


@pytest.fixture
def base(new_base: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate base folder, set as `LMCHAT_BASE_DIR`."""
    base = new_base()
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    return base


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Lightning keeps the process group of a strategy, and its variables, until the process ends."""
    yield
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
