"""A tokenizer without training, whose ids are UTF-8 bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ByteTokenizer:
    """A tokenizer whose ids are bytes; ``encoded`` collects the encoded texts, the text ``fails_on`` raises."""

    bos_id = 256

    def __init__(self, fingerprint: str = "bytes", vocab_size: int = 257, fails_on: str | None = None) -> None:
        self.fingerprint = fingerprint
        self.vocab_size = vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.fails_on = fails_on
        self.encoded: list[str] = []

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        if text == self.fails_on:
            raise RuntimeError("interrupted")
        self.encoded.append(text)
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def document(self, text: str) -> list[int]:
        """Expected tokens of a document with this text in a token file."""
        return [self.bos_id, *text.encode()]
