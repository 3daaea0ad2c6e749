"""The tokenizer of an export: ``tokenizer.json`` that parses special tokens, its config, and the chat template.

A chat template renders a conversation to one string, in which special tokens must be recognized, but not text that
looks like one. The template therefore escapes text with Unicode noncharacters, which ``tokenizer.json`` decodes before
encoding:

    U+FDD0 U+FDD1   stands for U+FDD0 itself
    U+FDD0 U+FDD2   is removed: between "<" and "|" it prevents text from being parsed as a special token
    U+FDD0 U+FDD3   splits the text: the parts of a message are encoded separately, as in lmchat
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.files import json_object, write_json
from lmchat.tokenizer import files
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

_ESCAPE, _LITERAL, _NOTHING, _CUT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"

_UNESCAPED = ((_ESCAPE + _NOTHING, ""), (_ESCAPE + _LITERAL, _ESCAPE))
_TEMPLATE = Path(__file__).parent / "files" / "chat_template.jinja"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    exported_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", "<|assistant_end|>")],
        "model_max_length": model_max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


def exported_tokenizer(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same vocabulary, with special tokens recognized in text and ``<|bos|>`` prepended to every text."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

    exported = files.hugging_face(tokenizer.ranks, tokenizer.pattern, SPECIAL_TOKENS)
    exported.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    exported.normalizer = normalizers.Sequence([normalizers.Replace(*pair) for pair in _UNESCAPED])
    cut = pre_tokenizers.Split(_ESCAPE + _CUT, behavior="removed", invert=False)
    exported.pre_tokenizer = pre_tokenizers.Sequence([cut, files.pre_tokenizer(tokenizer.pattern)])
    exported.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B:1", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    return exported


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of an export, or another program's ``tokenizer.json`` with the same special tokens.

    Raises:
        UserError: the file is missing, damaged, or another kind of tokenizer.
    """
    path = folder / "tokenizer.json"
    try:
        content = json_object(path.read_bytes())
        replace = [{"type": "Replace", "pattern": {"String": code}, "content": text} for code, text in _UNESCAPED]
        if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": replace}):
            raise ValueError("its normalizer changes text")
        match content["pre_tokenizer"]:
            case {"pretokenizers": [{"pattern": {"String": str(cut)}}, *others]} if cut == _ESCAPE + _CUT:
                content["pre_tokenizer"]["pretokenizers"] = others
        return Tokenizer(*files.from_hugging_face(content, SPECIAL_TOKENS))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy or download it again") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or not the tokenizer of an lmchat or nanochat model ({error}); copy the model's own"
        ) from error
