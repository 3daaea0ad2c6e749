"""Causal language models of the transformers library, for CORE."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lmchat.evaluation.core import Example
from lmchat.evaluation.core_scoring import OptionScore, scores_of
from lmchat.types import UserError, user_errors


class HFModel:
    """A causal language model and its tokenizer, from a local folder as `save_pretrained` writes it.

    It is also a `lmchat.evaluation.core.PromptTokenizer`.

    Raises:
        UserError: transformers is not installed, or the folder has no causal language model.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        with user_errors("transformers is not installed", "install it: pip install 'lmchat[hf]'", ImportError):
            from transformers import AutoModelForCausalLM, AutoTokenizer
        self.path = path
        problem = f"{path} has no causal language model for transformers"
        with user_errors(problem, "give the folder of one", OSError, ValueError, KeyError):
            self._encoder = AutoTokenizer.from_pretrained(path, local_files_only=True)
            net: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        self.net = net.to(device).eval()
        self._keeps_logits = "logits_to_keep" in inspect.signature(net.forward).parameters

    @property
    def tokenizer(self) -> HFModel:
        return self

    @property
    def bos_id(self) -> int:
        """Id of the first token of documents: BOS, or else EOS (GPT-2: ``<|endoftext|>``).

        Raises:
            UserError: the tokenizer has neither.
        """
        for token in (self._encoder.bos_token_id, self._encoder.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(
            f"the tokenizer in {self.path} has neither a BOS nor an EOS token, and CORE's prompts begin with one; add "
            "it to the tokenizer's config"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self._encoder(text, add_special_tokens=False)["input_ids"])

    @property
    def context_limit(self) -> int:
        """Maximum number of tokens of a context."""
        return int(getattr(self.net.config, "max_position_embeddings", None) or self._encoder.model_max_length)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the weights files."""
        digest = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            if path.suffix in (".safetensors", ".bin"):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def release_memory(self) -> None:
        """Frees torch's cache of free blocks."""
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(self, questions: Sequence[Example]) -> list[list[OptionScore]]:
        """Scores each example's options, see `lmchat.evaluation.core_scoring.score`."""
        rows = list(dict.fromkeys((tuple(o), s) for q in questions for o, s in zip(q.options, q.spans, strict=True)))
        ids = pad_sequence([torch.tensor(option) for option, _ in rows], batch_first=True)
        first = min(start for _, (start, _) in rows) - 1
        logits = self._logits(ids.to(self.net.device), first)
        picked = [
            row_logits[start - 1 - first : end - 1 - first]
            for row_logits, (_, (start, end)) in zip(logits, rows, strict=True)
        ]
        scores = scores_of(torch.cat(picked), [option[slice(*span)] for option, span in rows], torch.Tensor.float)
        by_row = dict(zip(rows, scores, strict=True))
        return [
            [by_row[tuple(option), span] for option, span in zip(example.options, example.spans, strict=True)]
            for example in questions
        ]

    def _logits(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Logits (B, T − first, vocab_size) from position ``first`` on. Right padding needs no mask."""
        keep: dict[str, Any] = {"logits_to_keep": ids.size(1) - first} if self._keeps_logits else {}
        logits = self.net(ids, **keep).logits
        return logits if keep else logits[:, first:]
