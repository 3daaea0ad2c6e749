"""Converts between Lightning's checkpoint dictionary and lmchat's files."""

from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO

from lmchat.checkpoint.attempt import UNFENCED
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import check_can_resume, load_model_state, load_rank_state, open_checkpoint
from lmchat.checkpoint.writer import PEER_TIMEOUT_SECONDS, BackgroundWriter, snapshot, write_checkpoint

_NETWORK = "net."
_FORMER_CALLBACKS = {"NonFiniteLoss": "NonFiniteGuard"}
"""Former and current keys of callback states in checkpoints."""
# The loops' state follows from the step. The options of a run are in the module's meta; Lightning's copy may contain
# objects that a safe loader refuses.
_DROPPED = (
    "epoch", "global_step", "pytorch-lightning_version", "loops",
    "hparams_name", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters",
)  # fmt: skip


class LMChatCheckpointIO(CheckpointIO):
    """Saves and loads checkpoints in the layout of `lmchat.checkpoint.layout`.

    `save_checkpoint` copies the state to CPU memory and returns; files are written by a thread, one checkpoint at a
    time. An error of that thread is raised by the next `save_checkpoint` or `teardown`, or by ``writer``.

    Lightning's strategies save on rank 0. A strategy that shards the optimizer creates its own instance with ``rank``
    and ``world_size`` (before the callbacks' ``setup``) and calls `save_checkpoint` on every rank, with the rank's
    ``optimizer_states``.

    Args:
        rank, world_size: of the processes that save; each writes one optimizer file.

    Attributes:
        writer: the thread that writes.
        attempt: attempt of the run that saves.
        peer_timeout_seconds: how long rank 0 waits for the other ranks' files; changes apply to a write in progress.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.attempt = UNFENCED
        self.peer_timeout_seconds = PEER_TIMEOUT_SECONDS
        self.writer = BackgroundWriter()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves Lightning's checkpoint with `StepCheckpoint`'s additions, ``meta`` and ``rng``."""
        self.writer.wait()
        rest = {key: value for key, value in checkpoint.items() if key not in _DROPPED}
        network = rest.pop("state_dict")
        others = [name for name in network if not name.startswith(_NETWORK)]
        assert not others, f"only the network at module.net is saved, not {others}"
        meta = rest.pop("meta")
        weights = {name.removeprefix(_NETWORK): tensor for name, tensor in network.items()}
        self.writer.start(
            write_checkpoint,
            CheckpointPaths.of(path),
            model=snapshot(weights if self.rank == 0 else {}),
            rank_state=snapshot(rest),
            meta=snapshot(meta),
            rank=self.rank,
            world_size=self.world_size,
            attempt=self.attempt,
            peer_timeout_seconds=lambda: self.peer_timeout_seconds,
        )

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Verifies and loads the files of the checkpoint whose ``model_*.pt`` or ``meta_*.json`` is at ``path``.

        If another number of ranks saved it, each of ``optimizer_states`` is a tuple of all ranks' states, which
        `MuonAdamW` combines.

        Raises:
            DamagedCheckpoint: a file is missing, truncated or altered.
            UserError: there is no such checkpoint.
        """
        paths = CheckpointPaths.of(path)
        meta = open_checkpoint(paths, files=()).meta
        same_world = meta["world_size"] == self.world_size
        ranks = [self.rank] if same_world else list(range(meta["world_size"]))
        checkpoint = open_checkpoint(paths, files=[paths.model, *map(paths.optimizer, ranks)])
        check_can_resume(checkpoint)
        shards = [load_rank_state(checkpoint, rank) for rank in ranks]
        state = shards[0]
        if not same_world:
            # RNG states are per rank and cannot be continued with another number of ranks.
            state = {key: value for key, value in state.items() if key != "rng"}
            state["optimizer_states"] = list(zip(*(shard["optimizer_states"] for shard in shards), strict=True))
        for former, name in _FORMER_CALLBACKS.items():
            if former in state.get("callbacks", {}):
                state["callbacks"][name] = state["callbacks"].pop(former)
        weights = {_NETWORK + name: tensor for name, tensor in load_model_state(checkpoint).items()}
        evaluated = checkpoint.meta.get("evaluated", True)  # earlier versions did not note it
        own = {"epoch": 0, "global_step": paths.step, "pytorch-lightning_version": L.__version__}
        return {"state_dict": weights, "evaluated": evaluated, **own, **state}

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError("checkpoints are pruned by keep_last, after a newer one is complete")

    def teardown(self) -> None:
        self.writer.wait()
