"""``lmchat import``: converts models of other programs to checkpoints of lmchat."""

from pathlib import Path
from typing import Literal


def hf(folder: Path, tag: str | None = None, stage: Literal["pretrain", "sft", "rl"] | None = None) -> None:
    """Import a model in the format of the transformers library: an export of lmchat, or NanoChatForCausalLM.

    Args:
        folder: folder with config.json, tokenizer.json and safetensors files.
        tag: name of the checkpoint's folder; default is the exported run's, or the folder's name.
        stage: training stage of the model; default is the exported run's, or pretrain.
    """
    from lmchat.checkpoint.hf.import_ import read_hf

    _save(read_hf(folder), tag, stage)


def nanochat(
    folder: Path,
    tokenizer: Path | None = None,
    tag: str | None = None,
    stage: Literal["pretrain", "sft", "rl"] | None = None,
) -> None:
    """Import a nanochat checkpoint with its tokenizer.

    Args:
        folder: folder of the checkpoints, of which the last one is imported, or one model_005000.pt.
        tokenizer: tokenizer.pkl or its folder; default is the checkpoint's folder, or nanochat's tokenizer folder
            beside those of the checkpoints.
        tag: name of the checkpoint's folder; default is the name of nanochat's folder.
        stage: training stage of the model; default follows from nanochat's folder, or pretrain.
    """
    from lmchat.checkpoint.nanochat import read_nanochat

    _save(read_nanochat(folder, tokenizer), tag, stage)


def _save(model, tag, stage) -> None:  # type: ignore[no-untyped-def]  # types would be imported for --help
    from lmchat.checkpoint.imported import save_imported
    from lmchat.scaling import parameter_counts

    known = stage or model.stage
    stage = known or "pretrain"
    paths = save_imported(model, stage=stage, tag=tag or model.tag)
    count = parameter_counts(model.config).total
    print(f"imported {model.source}: {len(model.state)} tensors, {count:,} parameters, to {paths.directory}")
    if known is None:
        print("imported as a pretrained model; if it is fine-tuned, import it with --stage sft")
    for note in model.notes:
        print(f"note: {note}")
    print(f"talk to it: lmchat chat --checkpoint {paths.directory}")
    following = {"pretrain": ("fine-tune it", "sft"), "sft": ("continue with reinforcement learning", "grpo")}
    if stage in following:
        what, config = following[stage]
        print(f"{what}: lmchat fit --config configs/{config}.yaml --ckpt_path {paths.directory}")


COMMANDS = {"hf": hf, "nanochat": nanochat}
