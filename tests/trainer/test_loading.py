"""Weights read by byte ranges: the same model, and no more read or held than needed."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_decoder, write_encoder
from hypothesis import given
from hypothesis import strategies as st
from loading_worker import fill
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3_5Config,
)
from worlds import forked

from finetune_trainer.engine.model import TEXT, Init, Pretrained, Purpose, build_base
from finetune_trainer.engine.placeholders import is_placeholder
from finetune_trainer.failures import UserError
from finetune_trainer.storage import weight_reader
from finetune_trainer.storage.objects import Credentials, ObjectInfo, ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3
from finetune_trainer.storage.weight_reader import Weights
from ports import free_port

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 72, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    # The files have one tensor per expert, the model one tensor for all experts.
    "experts": MixtralConfig(**LLAMA, num_local_experts=5),
    # One of three ranks has an empty shard of the experts.
    "four experts": MixtralConfig(**LLAMA, num_local_experts=4),
    # A persistent buffer, and weights that stay in float32.
    "buffers": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        intermediate_size=64,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
    ),
    "in 32 bits": Ernie4_5_MoeConfig(
        **LLAMA,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    # One tensor of the files is split by rows.
    "split": HrmTextConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=72,
        head_dim=8,
    ),
    # A configuration for text and images; the model is the language model.
    "composite": Qwen3_5Config(
        text_config={**LLAMA, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    # Matrices of shape [inputs, outputs], names without the body's prefix, one tensor for three
    # projections.
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


CUT = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()


@pytest.fixture(scope="module")
def bucket(s3: EmbeddedS3) -> str:
    """One bucket for all tests, because the server takes a while to create one."""
    s3.ensure_bucket("test-loading")
    return "test-loading"


@pytest.fixture
def root(bucket: str) -> str:
    return f"s3://{bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path / name
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_()
        model.save_pretrained(str(folder), max_shard_size="60KB")
        CONFIGS[name].save_pretrained(str(folder))
        return folder

    return make


def put(store: ObjectStore, root: str, folder: Path) -> list[ObjectInfo]:
    for path in sorted(folder.glob("*.safetensors")):
        store.upload(path, f"{root}/{path.name}")
    return list(store.list(f"{root}/"))


# --- tensors -------------------------------------------------------------------------------------


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


def test_a_model_that_is_replaced_while_reading_is_refused(
    store: ObjectStore, root: str, model_of: Callable[[str], Path]
) -> None:
    folder = model_of("tied")
    objects = put(store, root, folder)
    weights = Weights.of_objects(store, objects)
    uri = objects[0].uri
    store.put(uri, store.get(uri)[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(UserError) as caught:
        build_base(folder, torch.float32, Pretrained(weights))
    assert caught.value.reason == "ModelChanged" and uri in caught.value.message
    with pytest.raises(UserError) as caught:
        Weights.of_objects(store, objects)
    assert caught.value.reason == "ModelChanged"


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


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_read_by_ranges_is_the_same(
    name: str, store: ObjectStore, root: str, model_of: Callable[[str], Path]
) -> None:
    folder = model_of(name)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    weights = Weights.of_objects(store, put(store, root, folder))
    found = build_base(folder, torch.float32, Pretrained(weights))
    same(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert type(found) is type(expected)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_placeholders_take_no_memory(name: str, model_of: Callable[[str], Path]) -> None:
    folder = model_of(name)
    found = build_base(folder, torch.bfloat16, "Placeholders")
    expected = build_base(folder, torch.bfloat16)
    for (one, p), (other, q) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert (one, p.shape, p.dtype) == (other, q.shape, q.dtype)
        assert is_placeholder(p) and p.is_contiguous() and p.device.type == "cpu"
    same(computed(found), computed(expected))
    assert found.config.to_dict() == expected.config.to_dict()


def computed(model: nn.Module) -> dict[str, Any]:
    """Buffers that are not persistent."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def test_missing_weights_are_named(model_of: Callable[[str], Path]) -> None:
    folder = model_of("untied")
    weights = Weights.of_folder(folder)
    del weights._slices["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        build_base(folder, torch.float32, Pretrained(weights))
    assert caught.value.reason == "IncompleteModel"


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sharding", "size"),
    [(name, "FullShard", 3) for name in CONFIGS] + [("untied", "HybridShard", 4)],
)
def test_each_rank_reads_only_its_shards(
    name: str, sharding: str, size: int, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = model_of(name)
    objects = put(store, root, folder)
    open_in_world(size, sharding, folder, s3, objects, tmp_path)
    expected = build_base(folder, torch.float32)
    found, buffers = torch.load(tmp_path / "whole.pt")
    same(found, dict(expected.named_parameters()))
    same(buffers, dict(expected.named_buffers()))
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
        kept = sum(b.nbytes for n, b in buffers.items() if n not in computed(expected))
        assert read == copies * whole + size * kept, "each rank reads its shards once"


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_rank_0_reads_for_all_replicas(
    precision: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    """By DDP, and by FSDP's copies."""
    folder = model_of("untied")
    objects = put(store, root, folder)
    open_in_world(2, "NoShard", folder, s3, objects, tmp_path, TEXT, None, precision)
    expected = build_base(folder, torch.float32)
    found, _ = torch.load(tmp_path / "whole.pt")
    same(found, dict(expected.named_parameters()))
    read = [torch.load(tmp_path / f"{rank}.pt")[0] for rank in range(2)]
    assert read[0] > 0 and read[1] == 0
    other, _ = torch.load(tmp_path / "whole-1.pt")
    same(other, found)


def open_in_world(
    size: int, sharding: str, folder: Path, s3: EmbeddedS3, objects: list[ObjectInfo], out: Path,
    *more: Any,
) -> None:  # fmt: skip
    """Have a world open a model (``fill``), and wait until all processes end."""
    port, keys = free_port(), Credentials(s3.access_key, s3.secret_key)
    out.mkdir(exist_ok=True)
    world = [
        forked(
            fill, rank, size, port, sharding, str(folder), s3.endpoint, keys, objects, str(out),
            *more,
        )
        for rank in range(size)
    ]  # fmt: skip
    for process in world:
        process.join(120)
    assert [p.exitcode for p in world] == [0] * size


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA"},
    "DoRA": {"type": "LoRA", "lora": {"useDora": True}},
    "PiSSA": {"type": "LoRA", "lora": {"rank": 4, "initialization": "PiSSA"}},
    "PrefixTuning": {"type": "PrefixTuning"},
    "PromptTuning": {"type": "PromptTuning"},
}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_derived_from_weights_are_the_same_when_sharded(
    method: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    model_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = model_of("gpt2" if method == "DoRA" else "untied")
    check_alike(folder, s3, put(store, root, folder), tmp_path, TEXT, METHODS[method])


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
    [
        (encoder, "Full"), (with_pooler, "LoRA"), (of_others, "LoRA"), (of_the_same, "LoRA"),
        (write_decoder, "Full"),
    ],
)  # fmt: skip
def test_a_classifier_is_the_same_when_sharded(
    make: Callable[[Path], Path], method: str, s3: EmbeddedS3, store: ObjectStore, root: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = make(tmp_path / "model")
    purpose = Purpose("SequenceClassification", CLASSES, 7)
    found = check_alike(folder, s3, put(store, root, folder), tmp_path, purpose, {"type": method})
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
    same(found, whole)
    same(others, buffers)
    sizes = [torch.load(tmp_path / "shards" / f"{rank}.pt") for rank in range(3)]
    assert [size[2] for size in sizes] == [0] * 3
    headers = 3 * sum(min(o.size, weight_reader.HEAD_BYTES) for o in objects)
    weights = Weights.of_folder(folder)
    stored = sum(weights[name][...].nbytes for name in weights)
    assert sum(size[0] for size in sizes) - headers <= stored, "each rank reads only its shards"
    return found


def test_quantised_weights_are_refused(model_of: Callable[[str], Path]) -> None:
    folder = model_of("tied")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    inits: list[Init] = [Pretrained(), "Placeholders", "Meta"]
    for init in inits:
        with pytest.raises(UserError, match="fp8") as caught:
            build_base(folder, torch.float32, init)
        assert caught.value.reason == "UnsupportedModel"


def test_untied_weights_of_a_tied_configuration_are_refused(
    model_of: Callable[[str], Path],
) -> None:
    folder = model_of("untied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="tie_word_embeddings") as caught:
        build_base(folder, torch.float32)
    assert caught.value.reason == "IncompleteModel"
