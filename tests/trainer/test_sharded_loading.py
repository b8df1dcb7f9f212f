"""Sharded models read from object storage: the same parameters, and no more read or held than
needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_decoder, write_encoder
from fixtures_loading import CONFIGS, assert_same, computed_buffers, upload_weights
from loading_worker import fill
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from worlds import forked

from finetune_trainer.engine.model import TEXT, Purpose, build_base
from finetune_trainer.storage import weight_reader
from finetune_trainer.storage.objects import Credentials, ObjectInfo, ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3
from finetune_trainer.storage.weight_reader import Weights
from ports import free_port
from variants import beyond

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "sharding", "size"),
    beyond(
        [*((name, "FullShard", 3) for name in CONFIGS), ("untied", "HybridShard", 4)],
        lambda name, *_: name in ("untied", "experts", "split", "buffers"),
    ),
)
def test_each_rank_reads_only_its_shards(
    name: str, sharding: str, size: int, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = model_of(name)
    objects = upload_weights(store, root, folder)
    open_in_world(size, sharding, folder, s3, objects, tmp_path)
    expected = build_base(folder, torch.float32)
    found, buffers = torch.load(tmp_path / "whole.pt")
    assert_same(found, dict(expected.named_parameters()))
    assert_same(buffers, dict(expected.named_buffers()))
    sizes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    sizes, left = [size[:2] for size in sizes], [size[2] for size in sizes]
    assert left == [0] * size, "on a GPU, each placeholder would take the memory of a whole tensor"
    copies = size // 2 if sharding == "HybridShard" else 1
    whole = sum(p.nbytes for p in expected.parameters())
    assert sum(held for _, held in sizes) == copies * whole, "each rank holds its shards"
    headers = size * sum(min(o.size, weight_reader.HEAD_BYTES) for o in objects)
    read = sum(read for read, _ in sizes) - headers
    if name == "split":  # its shards are not rows of the tensors in the files
        assert read <= size * whole
    else:
        kept = sum(b.nbytes for n, b in buffers.items() if n not in computed_buffers(expected))
        assert read == copies * whole + size * kept, "each rank reads its shards once"


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_rank_0_reads_for_all_replicas(
    precision: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    """By DDP, and by FSDP's copies."""
    folder = model_of("untied")
    objects = upload_weights(store, root, folder)
    open_in_world(2, "NoShard", folder, s3, objects, tmp_path, TEXT, None, precision)
    expected = build_base(folder, torch.float32)
    found, _ = torch.load(tmp_path / "whole.pt")
    assert_same(found, dict(expected.named_parameters()))
    read = [torch.load(tmp_path / f"{rank}.pt")[0] for rank in range(2)]
    assert read[0] > 0 and read[1] == 0
    other, _ = torch.load(tmp_path / "whole-1.pt")
    assert_same(other, found)


def open_in_world(
    size: int, sharding: str, folder: Path, s3: EmbeddedS3, objects: list[ObjectInfo], out: Path,
    *more: Any,
) -> None:  # fmt: skip
    """Have a world open a model (``fill``), and wait until all processes end."""
    port, keys = free_port(), Credentials(s3.access_key, s3.secret_key)
    out.mkdir(exist_ok=True)
    ranks = [
        forked(
            fill, rank, size, port, sharding, str(folder), s3.endpoint, keys, objects, str(out),
            *more,
        )
        for rank in range(size)
    ]  # fmt: skip
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0] * size


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA"},
    "DoRA": {"type": "LoRA", "lora": {"useDora": True}},
    "PiSSA": {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA"}},
    "PrefixTuning": {"type": "PrefixTuning"},
    "PromptTuning": {"type": "PromptTuning"},
}


@pytest.mark.parametrize(
    ("method",), beyond(((name,) for name in METHODS), lambda name: name in ("DoRA", "PiSSA"))
)
def test_parameters_derived_from_weights_are_the_same_when_sharded(
    method: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = model_of("gpt2" if method == "DoRA" else "untied")
    check_alike(folder, s3, upload_weights(store, root, folder), tmp_path, TEXT, METHODS[method])


def encoder(folder: Path) -> Path:
    return write_encoder(folder)


def with_pooler(folder: Path) -> Path:
    """An encoder without a language-model head, whose names have no prefix."""
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.from_pretrained(write_encoder(folder))).save_pretrained(folder)
    return folder


def classifier(folder: Path, classes: int) -> Path:
    config = AutoConfig.from_pretrained(write_encoder(folder, "roberta"), num_labels=classes)
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def of_others(folder: Path) -> Path:
    return classifier(folder, 5)


def of_the_same(folder: Path) -> Path:
    config = AutoConfig.from_pretrained(classifier(folder, len(CLASSES)))
    config.id2label = dict(enumerate(CLASSES))
    config.save_pretrained(folder)
    return folder


CLASSES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("make", "method"),
    beyond(
        [(encoder, "Full"), (with_pooler, "LoRA"), (of_others, "LoRA"), (of_the_same, "LoRA"),
         (write_decoder, "Full")],
        lambda make, _: make in (encoder, of_others),
    ),
)  # fmt: skip
def test_a_classifier_is_the_same_when_sharded(
    make: Callable[[Path], Path], method: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = make(tmp_path / "model")
    purpose = Purpose("SequenceClassification", CLASSES, 7)
    found = check_alike(
        folder, s3, upload_weights(store, root, folder), tmp_path, purpose, {"type": method}
    )
    there = Weights.of_folder(folder)
    for name, values in found.items():
        own = name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
        kept = own if make is not with_pooler else own.removeprefix("bert.")
        if kept in there and (make is not of_others or "out_proj" not in own):
            assert torch.equal(values, there[kept][...]), name


def check_alike(
    folder: Path, s3: EmbeddedS3, objects: list[ObjectInfo], tmp_path: Path, *how: Any
) -> dict[str, Any]:
    """Check that a sharded model is the same as on one process, and that nothing is read twice."""
    whole: dict[str, Any]
    open_in_world(1, "NoShard", folder, s3, objects, tmp_path / "alone", *how)
    open_in_world(3, "FullShard", folder, s3, objects, tmp_path / "shards", *how)
    whole, buffers = torch.load(tmp_path / "alone" / "whole.pt")
    found, others = torch.load(tmp_path / "shards" / "whole.pt")
    assert_same(found, whole)
    assert_same(others, buffers)
    sizes = [torch.load(tmp_path / "shards" / f"{rank}.pt") for rank in range(3)]
    assert [size[2] for size in sizes] == [0] * 3
    headers = 3 * sum(min(o.size, weight_reader.HEAD_BYTES) for o in objects)
    weights = Weights.of_folder(folder)
    stored = sum(weights[name][...].nbytes for name in weights)
    assert sum(size[0] for size in sizes) - headers <= stored, "each rank reads only its shards"
    return found
