"""The model card of an export, from the run's meta."""

from pathlib import Path
from string import Template
from typing import Any

from lmchat.model.config import GPTConfig
from lmchat.scaling import flops_per_token, parameter_counts

_STAGES = {
    "pretrain": "pretrained on text; it continues documents and has not been taught to converse",
    "sft": "fine-tuned on conversations",
    "rl": "fine-tuned on conversations and trained further by reinforcement learning",
}


_PROMPT = 'tokenizer("The sky is", return_tensors="pt")'
_CHAT_PROMPT = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}], '
    'add_generation_prompt=True, return_dict=True, return_tensors="pt")'
)


def model_card(meta: dict[str, Any], config: GPTConfig, native: bool, dtype: str) -> str:
    """Markdown with the front matter for the Hugging Face Hub."""
    context = f"Attention windows slide beyond {config.sequence_len:,} tokens; the limit is ten times that."
    if native:
        context = f"Contexts beyond {config.sequence_len:,} tokens were not trained on."
    template = Path(__file__).parent / "files" / "model_card.md"
    return Template(template.read_text(encoding="utf-8")).substitute(
        custom_code="" if native else "\n- custom_code",
        tag=meta["tag"],
        stage=meta["stage"],
        training=_STAGES[meta["stage"]],
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(meta, config, dtype).items()),
        remote="" if native else ", trust_remote_code=True",
        prompt=_PROMPT if meta["stage"] == "pretrain" else _CHAT_PROMPT,
        context=context,
    )


def _facts(meta: dict[str, Any], config: GPTConfig, dtype: str) -> dict[str, str]:
    counts = parameter_counts(config)
    facts = {
        "parameters": f"{counts.total:,} ({counts.scaling:,} of them in matrices, the rest in token tables)",
        "layers × width": f"{config.n_layer} × {config.n_embd}",
        "heads": f"{config.n_head} for queries, {config.n_kv_head} for keys and values",
        "vocabulary": f"{config.vocab_size:,}",
        "training context": f"{config.sequence_len:,} tokens",
        "attention windows": ", ".join(map(str, config.window_sizes)),
    }
    if imported := meta.get("imported"):
        facts["imported from"] = f"{imported['kind']}, step {imported['step'] or 'unknown'}"
    else:
        of = f" of {meta['total_steps']:,}" if meta.get("total_steps") else ""
        facts["optimizer steps"] = f"{meta['step']:,}{of}"
    batch = meta.get("global_batch_tokens")
    if meta["stage"] == "pretrain" and batch:
        tokens = meta["step"] * batch
        facts["tokens"] = f"{tokens:,} ({batch:,} a step)"
        facts["training FLOPs"] = f"{tokens * flops_per_token(config):.3g}"
    facts["stored in"] = dtype
    facts["tokenizer"] = f"byte-level BPE, fingerprint {meta['tokenizer_fingerprint'][:16]}"
    facts["lmchat"] = meta.get("lmchat_version", "unknown")
    return facts
