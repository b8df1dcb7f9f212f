"""Compiled blocks: compiled once for all micro-batches, with the gradients of plain blocks."""

import pytest
import torch
from engine import CPU, samples, tiny_llama
from test_attention import kernel  # noqa: F401

from finetune_trainer.engine import compilation
from finetune_trainer.engine.compilation import compile_blocks, uncompiled
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.dropout import key_dropouts
from finetune_trainer.engine.packing.feed import StaticShape, build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.parameters import decoder_blocks

SHAPE = StaticShape(100, 40)
ROWS = [[37, 12, 5], [40, 40, 9, 2, 3], [8], [30, 30, 30]]


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def gradient(model, lengths: list[int], shape: StaticShape | None) -> torch.Tensor:
    documents = samples(lengths)
    micro_batch = build_packed(
        documents, range(len(lengths)), seed=0, step=len(lengths), device=CPU, shape=shape
    )
    model.zero_grad()
    with layout_context(micro_batch.layout):
        TokenLoss(model)(micro_batch).tokens.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compiled_and_plain(micro_batches: list[list[int]]) -> list[int]:
    """Count the graphs after each micro-batch, and check its gradient against a plain model's."""
    plain, model = tiny_llama(), tiny_llama()
    for each in (plain, model):
        key_dropouts(each, 0.1)
    compile_blocks(model, "aot_eager")
    counts = []
    for lengths in micro_batches:
        found, expected = gradient(model, lengths, SHAPE), gradient(plain, lengths, None)
        assert (found - expected).norm() / expected.norm() < 1e-5
        counts.append(compilation.compilations())
    return counts


def test_a_run_compiles_only_at_its_first_micro_batch():
    counts = compiled_and_plain(ROWS)
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.usefixtures("kernel")
def test_a_block_is_one_graph_with_the_gpu_kernel():
    assert compiled_and_plain(ROWS) == [1] * len(ROWS)


def test_uncompiled_blocks_run_eagerly():
    model = tiny_llama()
    compile_blocks(model, "aot_eager")
    with uncompiled(decoder_blocks(model)):
        model(torch.zeros(1, 7, dtype=torch.long))
    assert compilation.compilations() == 0


@pytest.mark.parametrize(
    ("tokens", "padding"), [(100, []), (99, [1]), (40, [40, 20]), (20, [40] * 2)]
)
def test_padding_documents_are_no_longer_than_the_longest_document(tokens, padding):
    assert SHAPE.padding(tokens) == padding
