"""``lmchat export``: writes checkpoints in the format of other libraries."""

from pathlib import Path
from typing import Literal


def hf(
    checkpoint: str,
    output: Path | None = None,
    native: bool | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    tokenizer: Path | None = None,
    check: bool = True,
) -> None:
    """Export a checkpoint for the transformers library: weights, configs, tokenizer, chat template and model card.

    Args:
        checkpoint: folder or file of a checkpoint, or last: the newest one of the last stage that has any.
        output: folder to write, which must be missing or empty; default is TAG-hf in the current folder.
        native: export as transformers' own NanoChatForCausalLM, which loads without remote code; default is true if it
            supports the architecture. Otherwise the export has a modelling file and needs trust_remote_code=True.
        dtype: dtype of the stored weights.
        tokenizer: folder of its tokenizer; default is the one beside the checkpoint folders, or else
            $LMCHAT_BASE_DIR/tokenizer.
        check: load the export with transformers and compare it with lmchat: logits, greedy decoding, chat template.
    """
    from lmchat.checkpoint.hf.check import TOLERANCE, check_export
    from lmchat.checkpoint.hf.export import choose_native, write_export
    from lmchat.checkpoint.load import find_model, load_tokenizer
    from lmchat.files import new_folder
    from lmchat.model.config import GPTConfig

    found = find_model(None if checkpoint == "last" else Path(checkpoint))
    native = choose_native(GPTConfig(**found.meta["model"]), native)
    own_tokenizer = load_tokenizer(found, tokenizer)
    output = output or Path(f"{found.meta['tag']}-hf")
    with new_folder(output) as folder:
        export = write_export(found, own_tokenizer, folder, native=native, dtype=dtype)
        parity = check_export(folder, found, own_tokenizer, native=native, dtype=dtype) if check else None
    form = "NanoChatForCausalLM" if native else "LMChatForCausalLM (trust_remote_code=True)"
    print(f"{output}: {form}, {export.tensors} tensors, {export.parameters:,} parameters in {dtype}")
    if export.padding:
        print(f"{export.padding:,} parameters of padding rows, which no token uses, are in padding.safetensors")
    if parity is None:
        print("not checked: whether transformers loads it, its logits, greedy decoding and chat template")
    else:
        print(
            f"checked with transformers: logits of {parity.prompt_tokens} tokens differ by "
            f"{parity.logits_difference:.1e} at most (allowed {TOLERANCE:g}), {parity.greedy_tokens} greedy tokens are "
            f"equal, {parity.conversations} conversations have equal ids"
        )


COMMANDS = {"hf": hf}
