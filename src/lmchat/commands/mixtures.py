"""Mixtures of conversations from a fine-tuning config, or from a file or folder, given on the command line."""

from pathlib import Path

from lmchat.cli.lean_imports import import_lightning, importing
from lmchat.data.mixture import Mixture, MixturePart
from lmchat.tasks import JSONLConversations
from lmchat.types import UserError


def mixtures(source: Path, overlay: list[Path], split: str = "train") -> dict[str, Mixture]:
    """The mixtures of a config by split, among them ``split``, or the conversations of a file, in order."""
    if source.suffix not in (".yaml", ".yml"):
        if overlay:
            raise UserError(f"--overlay {overlay[0]} overrides a config, but {source} is not a config; leave it out")
        return {split: Mixture([MixturePart(JSONLConversations(str(source)))], shuffle_seed=None)}
    with importing():
        import_lightning()
        from lmchat.cli.fit import read_data_module
    from lmchat.stages.chat import ChatDataModule

    configs = [source, *overlay]
    data = read_data_module(configs)
    if not isinstance(data, ChatDataModule) or split not in data.mixtures:
        raise UserError(
            f"{', '.join(map(str, configs))}: {type(data).__name__} has no mixture data.init_args.{split}; give a "
            "config like configs/sft.yaml"
        )
    return data.mixtures
