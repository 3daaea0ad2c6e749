"""Checks of what a Hugging Face Hub answers, beyond those of huggingface_hub."""

from __future__ import annotations

import functools

from lmchat.types import UserError


@functools.cache
def refuse_unsafe_etags() -> None:
    """Makes huggingface_hub raise `UserError` for an ETag that is not a plain file name.

    It names files of its cache after ETags, so that one with ``../`` in it would be written anywhere.
    """
    from huggingface_hub import __version__, file_download

    normalize = getattr(file_download, "_normalize_etag", None)
    if normalize is None:
        raise UserError(f"lmchat does not know huggingface_hub {__version__}; install 2.4 or an older version")

    def checked(etag: str | None) -> str | None:
        name = normalize(etag)
        if name is not None and not (name.isprintable() and "/" not in name and "\\" not in name and len(name) < 200):
            raise UserError(f"the Hub sent the unsafe ETag {name!r:.200}; check HF_ENDPOINT")
        return name

    file_download._normalize_etag = checked
