"""The lowering for an H100 keeps the activations of the memory model, and moves the bytes that the GPU page says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._triton import has_triton

from lmchat.scaling import config_for_depth
from lmchat.training_memory import SAVED_WIDTHS, Mode

pytest.importorskip("triton", reason="torch's CPU wheels have no Triton: run make test-torch211")
if not torch.__version__.startswith("2.11."):
    pytest.skip("uses private functions of torch 2.11", allow_module_level=True)
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import lowering

ROWS = 32
TOKENS = ROWS * lowering.SEQUENCE_LEN
CONFIG = config_for_depth(8, lowering.VOCAB_SIZE, lowering.SEQUENCE_LEN)
ACTIVATION = TOKENS * CONFIG.n_embd * 2


@pytest.fixture(autouse=True)
def compiled_before() -> None:
    """After a compilation for a CPU, torch's compiler remembers that there is no GPU for Triton."""
    has_triton()


@pytest.mark.parametrize(("layer", "key_heads"), [(0, 4), (1, 4), (0, 2), (1, 1)])
@pytest.mark.parametrize("mode", ["compiled", "recomputing"])
def test_a_block_keeps_the_activations_of_the_memory_model(mode: Mode, layer: int, key_heads: int) -> None:
    with FakeTensorMode():
        counts = lowering.block(replace(CONFIG, n_kv_head=key_heads), ROWS, layer, recompute=mode == "recomputing")
    # Beside the model's widths: the normed embedding, which all blocks share, and a value embedding.
    widths, kv_widths = SAVED_WIDTHS[mode]
    kept = widths + 1 + (kv_widths + (layer in CONFIG.value_embedding_layers)) * key_heads / CONFIG.n_head
    assert counts.saved_bytes(TOKENS) / ACTIVATION == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(("layer", "width"), [(0, 60), (1, 66)])
def test_fused_kernels_of_a_block_move_the_bytes_of_the_gpu_page(layer: int, width: int) -> None:
    with FakeTensorMode():
        counts = lowering.block(CONFIG, ROWS, layer)
    assert counts.fused_bytes / ACTIVATION == pytest.approx(width, abs=1)


def test_the_loss_head_passes_over_the_logits_twice_and_in_evaluation_once() -> None:
    logits = lowering.CHUNK_TOKENS["cuda"] * lowering.VOCAB_SIZE * 2
    for training, passes in ((True, 2), (False, 1)):
        with FakeTensorMode():
            counts = lowering.head(training)
        assert len(counts.fused) == 1 and counts.fused_bytes == pytest.approx(passes * logits, rel=0.01)
