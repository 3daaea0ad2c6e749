"""Parity check of an export: loads it with transformers and compares results with lmchat's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmchat.checkpoint.hf.export import need, stored_dtype
from lmchat.checkpoint.load import Checkpoint, load_model
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.tokenizer.render import render_conversation, render_for_completion
from lmchat.types import Conversation, UserError, user_errors

TOLERANCE = 1e-4
"""Maximum difference of fp32 logits, which are between -15 and 15."""

NEW_TOKENS = 16

_NOT_WRITTEN = "nothing was written (--check false writes it anyway)"

CONVERSATIONS: tuple[Conversation, ...] = (
    {"messages": [{"role": "user", "content": "What is 12 × 34?"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": f"  {' '.join(SPECIAL_TOKENS)} are plain text here.\n\n"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Adjacent "},
                    {"type": "text", "text": "parts; "},
                    {"type": "python", "text": "12*34"},
                    {"type": "python_output", "text": "408"},
                    {"type": "text", "text": "It's 408."},
                ],
            },
            {"role": "user", "content": "Grüße, 日本語, \ufdd0\ufdd3"},
        ]
    },
)


@dataclass(frozen=True)
class Parity:
    """Result of `check_export`: maximum difference of fp32 logits over the prompt, and numbers of equal items."""

    logits_difference: float
    prompt_tokens: int
    greedy_tokens: int
    conversations: int


def check_export(folder: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, *, native: bool, dtype: str) -> Parity:
    """Loads the export with transformers and compares logits, greedy decoding and the chat template with lmchat's.

    Both compute in fp32 on the CPU with the stored weights.

    Raises:
        UserError: transformers is missing or too old, or results differ.
    """
    transformers = need("transformers", "the check of an export (--check false leaves it out)")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(
            f"the check of an export needs transformers 5 or newer, not {transformers.__version__}; install it with: "
            "pip install 'lmchat[hf]', or leave the check out with --check false"
        )
    net = _stored_model(checkpoint, dtype)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded, exported_tokenizer = _load(transformers, folder, trust_remote_code=not native)
    _check_tokenizer(exported_tokenizer, tokenizer)
    prompt = _prompt(net.config)
    with torch.inference_mode():
        expected, logits = net(prompt), loaded.eval()(prompt).logits
    if logits.shape != expected.shape:
        raise _different(f"the export gives logits of shape {tuple(logits.shape)}, lmchat {tuple(expected.shape)}")
    difference = (logits.float() - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise _different(f"the export's logits differ from lmchat's by {difference:.2g}, more than {TOLERANCE:g}")
    _check_greedy(net, loaded, prompt)
    return Parity(difference, prompt.size(1), NEW_TOKENS, len(CONVERSATIONS))


def _load(transformers: Any, folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Loads the export's model, in fp32, and its tokenizer."""
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    problem = f"transformers {transformers.__version__} does not load the export"
    with user_errors(problem, _NOT_WRITTEN, OSError, ValueError, RuntimeError, TypeError, KeyError):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model, transformers.AutoTokenizer.from_pretrained(folder, **options)


def _different(how: str) -> UserError:
    return UserError(f"{how}; {_NOT_WRITTEN}")


def _stored_model(checkpoint: Checkpoint, dtype: str) -> GPT:
    """The checkpoint's network in fp32, with the weights as stored in the export."""
    net = load_model(checkpoint, compute_dtype=torch.float32)
    net.load_state_dict({k: v.to(stored_dtype(k, dtype)).float() for k, v in net.state_dict().items()})
    return net


def _prompt(config: GPTConfig) -> Tensor:
    """(1, T) random ids, longer than the short windows, with room for new tokens in the training context."""
    length = max(1, min(config.sequence_len // 2 + NEW_TOKENS, config.sequence_len - NEW_TOKENS))
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _check_greedy(net: GPT, loaded: Any, prompt: Tensor) -> None:
    options = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    found = loaded.generate(prompt, max_new_tokens=NEW_TOKENS, **options)[0, prompt.size(1) :]
    with torch.inference_mode():
        logits = net(torch.cat([prompt, found[None]], dim=1))[0, prompt.size(1) - 1 : -1]
    # If two logits differ by less than the tolerance, either may be larger.
    behind = logits.amax(dim=1) - logits.gather(1, found[:, None])[:, 0] > 2 * TOLERANCE
    if behind.any():
        begin = logits.argmax(dim=1)[: int(behind.int().argmax()) + 1].tolist()
        raise _different(f"greedy decoding of the export gives {found.tolist()}, but lmchat's starts with {begin}")


def _check_tokenizer(exported: Any, tokenizer: Tokenizer) -> None:
    for conversation in CONVERSATIONS:
        messages = conversation["messages"]
        rendered = {
            "the chat template": (
                exported.apply_chat_template(messages, return_dict=True)["input_ids"],
                render_conversation(tokenizer, conversation, max_tokens=10**9)[0],
            ),
            "the chat template with add_generation_prompt": (
                exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"],
                render_for_completion(tokenizer, conversation),
            ),
        }
        for name, (found, expected) in rendered.items():
            if list(found) != expected:
                raise _different(f"{name} of the export renders {messages} as {list(found)}, lmchat as {expected}")
