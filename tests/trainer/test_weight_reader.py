"""Tensors of safetensors files, read from a folder or by byte ranges from object storage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from finetune_trainer.failures import UserError
from finetune_trainer.storage import weight_reader
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.weight_reader import Weights

CUT = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()


def test_remote_tensors_are_indexed_like_local_ones(
    store: ObjectStore, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_reader, "PART_BYTES", 100)
    monkeypatch.setattr(weight_reader, "HEAD_BYTES", 16)
    there = {
        "matrix": torch.randn(17, 5), "half": torch.randn(9, 3).bfloat16(),
        "numbers": torch.arange(40).reshape(2, 4, 5), "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4), "mask": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(there, tmp_path / "a.safetensors")
    store.upload(tmp_path / "a.safetensors", f"{root}/a.safetensors")
    remote = Weights.of_objects(store, list(store.list(f"{root}/")))
    local = Weights.of_files([tmp_path / "a.safetensors"])
    assert remote.keys() == local.keys() == there.keys()
    for name, tensor in there.items():
        for found in (remote[name], local[name]):
            assert list(found.get_shape()) == list(tensor.shape)
            got = found[...]
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        assert remote[name].get_dtype() == local[name].get_dtype()

    @given(st.integers(0, 18), st.integers(0, 18), st.integers(0, 5), st.integers(0, 5))
    def cut(a: int, b: int, c: int, d: int) -> None:
        index = slice(a, b), slice(c, d)
        assert torch.equal(remote["matrix"][index], there["matrix"][index])

    cut()
    assert torch.equal(remote["matrix"][3:9], there["matrix"][3:9])
    assert torch.equal(remote["numbers"][:, 1:3, :], there["numbers"][:, 1:3, :])


def test_a_slice_reads_only_its_bytes(
    store: ObjectStore, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(1000, 10), "b": torch.ones(1000, 10)}, tmp_path / "a.safetensors")
    store.upload(tmp_path / "a.safetensors", f"{root}/a.safetensors")
    monkeypatch.setattr(weight_reader, "HEAD_BYTES", 1000)
    remote = Weights.of_objects(store, list(store.list(f"{root}/")))
    asked: list[int] = []
    get = ObjectStore.get_range

    def counting(self: ObjectStore, uri: str, start: int, stop: int, **more: Any) -> bytes:
        asked.append(stop - start)
        return get(self, uri, start, stop, **more)

    monkeypatch.setattr(ObjectStore, "get_range", counting)
    assert torch.equal(remote["b"][10:20], torch.ones(10, 10))
    assert asked == [400]


def test_safetensors_files_outside_the_index_are_ignored(model_of: Callable[[str], Path]) -> None:
    """Part files with an index, beside an older whole file and a whole file of another layout."""
    folder = model_of("tied")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    there = Weights.of_folder(folder)
    stale = {name: torch.zeros(1) for name in (*there, "old.weight")}
    for name in ("model.safetensors", "consolidated.safetensors"):
        save_file(stale, folder / name)
    found = Weights.of_folder(folder)
    assert found.keys() == there.keys()
    assert all(found[name].get_shape() == there[name].get_shape() for name in there)

    (folder / "model.safetensors.index.json").unlink()
    assert Weights.of_folder(folder).keys() == stale.keys()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x01", b"not safetensors at all, but long enough",
        struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", len(CUT)) + CUT + bytes(8),
    ],
)  # fmt: skip
def test_invalid_safetensors_files_are_named(store: ObjectStore, root: str, data: bytes) -> None:
    uri = f"{root}/model.safetensors"
    store.put(uri, data)
    with pytest.raises(UserError, match=uri) as caught:
        Weights.of_objects(store, list(store.list(uri)))
    assert caught.value.reason == "UnreadableModel"
