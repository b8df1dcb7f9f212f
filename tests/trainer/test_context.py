"""Context parallelism: every token is held once, and gradients do not change."""

import numpy as np
import pytest
import torch
from engine import CPU
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import run

from finetune_trainer.engine.packing.context import ALONE, ContextGroup, share


@given(size=st.integers(2, 5), chunk=st.integers(1, 40))
def test_every_token_is_held_once_and_work_is_balanced(size, chunk):
    tokens = 2 * size * chunk
    held = [ContextGroup(i, size, None).held(tokens) for i in range(size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(tokens))
    seen = [int(h.sum()) for h in held]  # keys before each query of one long document
    assert max(seen) == min(seen)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), size=st.integers(2, 4))
def test_spans_cover_held_tokens_and_keys_end_at_the_last_query(lengths, size):
    group = object()
    padding = ContextGroup(0, size, None).padding(sum(lengths))
    lengths = [*lengths, padding] if padding else lengths
    position = np.concatenate([np.arange(n) for n in lengths])
    document = np.repeat(np.arange(len(lengths)), lengths)
    order = np.concatenate([ContextGroup(i, size, None).held(len(position)) for i in range(size)])
    for index in range(size):
        context = ContextGroup(index, size, group)
        held = context.held(len(position))
        spans, shared_keys = share(lengths, context, CPU)
        assert sum(s.q_len for s in spans) == len(held)
        query = key = 0
        for span in spans:
            mine = held[query : query + span.q_len]
            keys = order[shared_keys.index[key : key + span.kv_len].numpy()]
            assert (np.diff(mine) == 1).all()
            assert keys[-1] == mine[-1]
            assert position[keys].tolist() == list(range(span.kv_len))
            assert set(document[keys]) == {document[mine[0]]}
            query, key = query + span.q_len, key + span.kv_len
        assert key == len(shared_keys.index)


def test_a_single_process_holds_whole_documents():
    spans, shared_keys = share([3, 2], ALONE, CPU)
    assert (spans, shared_keys) == (((3, 3), (2, 2)), None)


@pytest.mark.parametrize(
    ("size", "sharing", "sharding"),
    [(2, 2, "NoShard"), (4, 2, "NoShard"), (2, 2, "FullShard"), (3, 3, "NoShard")],
)
def test_gradients_equal_those_without_context_parallelism(tmp_path, size, sharing, sharding):
    expected, loss, _ = run(1, 100, 8, tmp_path / "one")
    found, other_loss, _ = run(size, 100, 8, tmp_path / "shared", sharding, sharing)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert torch.isfinite(found).all()
