"""Checks of responses of a Hub that huggingface_hub lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from hub_server import HubServer
from lmchat.hub import guard_downloads
from lmchat.types import UserError


def test_an_etag_does_not_lead_outside_the_cache(tmp_path: Path) -> None:
    """Of any file of a data set, also those that `datasets` fetches."""
    guard_downloads()
    cache = tmp_path / "home" / "cache"
    with HubServer("some/shards", {"a.txt": b"content"}) as hub:
        hub.faults["a.txt"] = ["etag"]
        with pytest.raises(UserError, match=r"unsafe ETag 'x/\.\./"):
            hf_hub_download("some/shards", "a.txt", repo_type="dataset", cache_dir=cache, endpoint=hub.endpoint)
        hub.faults.clear()
        path = hf_hub_download("some/shards", "a.txt", repo_type="dataset", cache_dir=cache, endpoint=hub.endpoint)
    assert Path(path).read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
