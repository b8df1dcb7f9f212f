"""Models, adapters and checkpoints of others: no code runs, nothing is written beside its folder,
and absurd files end in a named failure."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

import finetune_trainer
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.checkpointing import dcp_storage
from finetune_trainer.engine.checkpointing.dcp_storage import LoadPlannerOfValues
from finetune_trainer.failures import UserError
from finetune_trainer.storage import modelconfig
from finetune_trainer.storage.filenames import is_plain
from finetune_trainer.storage.modelfiles import fetch_model, fetch_tokenizer, read_limits
from finetune_trainer.storage.objects import ObjectInfo, ObjectStore, Stores
from finetune_trainer.storage.published import Base, PublishedFile, fetch_adapter
from finetune_trainer.storage.run_head import CorruptCheckpoint
from finetune_trainer.storage.weight_reader import Weights
from trainer.prepare_helpers import make_tokenizer, save_model

INDEX: Final = "model.safetensors.index.json"


class Folder:
    """A model in object storage whose files a test changes."""

    def __init__(
        self, run_spec: RunSpec, stores: Stores, files: dict[str, bytes], to: Path
    ) -> None:
        self.location, self._stores, self._to = run_spec.base_model, stores, to
        for name, data in files.items():
            self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        self._stores.default.put(f"{self.location.source}/{name}", data)

    def fault(self, fetch: Callable[..., Any] = fetch_tokenizer) -> UserError:
        with pytest.raises(UserError) as caught:
            fetch(self.location, self._stores, self._to)
        assert self.location.source in caught.value.message
        return caught.value

    def fetched(self) -> set[str]:
        fetch_tokenizer(self.location, self._stores, self._to)
        return {p.relative_to(self._to).as_posix() for p in self._to.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = save_model(tmp_path_factory.mktemp("model"), make_tokenizer(bos=True))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(run_spec_for: Any, files: dict[str, bytes], tmp_path: Path) -> Folder:
    run_spec = run_spec_for()
    return Folder(run_spec, Stores(run_spec), files, tmp_path / "model")


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}, "code of its own"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["a.T", None]}},
            "code of its own",
        ),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09, at most 4,096"),
        ("config.json", {"n_layer": 10**9}, "n_layer is"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size is 1e+12"),
        ("config.json", {"hidden_size": -1e300}, "hidden_size is -1e+300"),
        ("config.json", {"text_config": {"num_experts": 10**7}}, "num_experts is 1e+07"),
        ("config.json", {"max_position_embeddings": 10**18}, "max_position_embeddings"),
        ("config.json", ["no object"], "must hold one JSON object"),
        ("config.json", b'{"vocab_size": NaN}', "vocab_size is nan"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("tokenizer_config.json", b"\xff", "not JSON"),
    ],
)
def test_a_hostile_configuration_is_refused_before_it_is_used(
    folder: Folder, files: dict[str, bytes], name: str, data: Any, words: str
) -> None:
    if isinstance(data, dict):
        data = {**json.loads(files[name]), **data}
    folder.put(name, data if isinstance(data, bytes) else json.dumps(data).encode())
    error = folder.fault()
    assert error.reason == "UnsupportedModel"
    assert f"/{name}" in error.message and words in error.message


@pytest.mark.parametrize("value", ["x", [], {}, None, True, -1, 0, 2.5])
@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "model_type", "rope_theta"])
def test_a_configuration_of_wrong_types_is_read_or_refused(
    files: dict[str, bytes], tmp_path: Path, name: str, value: Any
) -> None:
    config = {**json.loads(files["config.json"]), name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        read_limits(tmp_path, "s3://m")
    except UserError as error:
        assert error.reason == "UnsupportedModel" and "s3://m/config.json" in error.message


def test_large_files_of_a_tokenizer_are_not_fetched(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelconfig, "SMALL_BYTES", 1 << 20)
    folder.put("tokenizer.json", bytes((1 << 20) + 1))
    assert "/tokenizer.json: 1,048,577 bytes; at most 1,048,576" in folder.fault().message


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["../../outside.safetensors"], ["/etc/passwd"], ["pytorch_model.bin"], ["model.pt"],
        ["a/b.safetensors"], ["a\0b.safetensors"], ["x" * 300 + ".safetensors"], [7], [[]], 7,
    ],
)  # fmt: skip
def test_an_index_names_safetensors_beside_it(folder: Folder, names: Any) -> None:
    mapped = {str(i): name for i, name in enumerate(names)} if isinstance(names, list) else names
    folder.put(INDEX, json.dumps({"weight_map": mapped}).encode())
    for fetch in (fetch_tokenizer, fetch_model):
        error = folder.fault(fetch)
        assert error.reason == "UnreadableModel" and INDEX in error.message


def test_keys_with_tricks_are_passed_over(
    folder: Folder, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers refuse to write some of these keys; a hostile server lists any."""
    tricks = [
        "a/../../b.json", "additional_chat_templates/../../c.json", "%2e%2e%2fd.json", "e.json/",
        "\u202ef.json", "x" * 300 + ".json", "g.json ", "additional_chat_templates/h/i.jinja",
    ]  # fmt: skip
    listed = ObjectStore.list

    def with_tricks(self: ObjectStore, prefix: str) -> Iterator[ObjectInfo]:
        yield from listed(self, prefix)
        yield from (ObjectInfo(f"{prefix}{name}", 2, "") for name in tricks)

    monkeypatch.setattr(ObjectStore, "list", with_tricks)
    folder.put("additional_chat_templates/tool_use.jinja", b"{{ messages }}")
    expected = {name for name in files if not name.endswith(".safetensors")}
    assert folder.fetched() == {*expected, "additional_chat_templates/tool_use.jinja"}


def test_plain_names() -> None:
    assert all(map(is_plain, ("model-00001-of-00002.safetensors", "a b.json", "..a", ".a")))
    wrong = ("", ".", "..", "...", "a/b", "a\\b", "a\nb", "a\0", "é", "x" * 300, " a")
    assert not any(map(is_plain, wrong))


# --- weights -------------------------------------------------------------------------------------


def tensor(dtype: str = "F32", shape: Any = (2,), at: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(shape=[-2], at=[0, -8])},
        {"a": tensor(shape=[2**62, 8])},
        {"a": tensor(shape=[2.0])},
        {"a": tensor(shape=[True], at=[0, 4])},
        {"a": tensor(shape="2")},
        {"a": tensor(at=[-8, 0])},
        {"a": tensor(at=[8, 0])},
        {"a": tensor(at=[0, 10**15])},
        {"a": tensor(dtype="PICKLE")},
        {"a": tensor(), "b": tensor(at=[4, 12])},
        {"a": tensor(), "b": tensor()},
        {"a": {}},
        {"a": 7},
    ],
)
def test_a_header_that_lies_is_named(
    store: ObjectStore, root: str, tmp_path: Path, header: Any
) -> None:
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(16)
    store.put(f"{root}/model.safetensors", data)
    (tmp_path / "model.safetensors").write_bytes(data)
    for opened in (
        lambda: Weights.of_objects(store, list(store.list(f"{root}/model"))),
        lambda: Weights.of_files([tmp_path / "model.safetensors"]),
    ):
        with pytest.raises(UserError, match="not a whole safetensors file") as caught:
            opened()
        assert caught.value.reason == "UnreadableModel"


def test_a_long_header_is_not_read(store: ObjectStore, root: str) -> None:
    store.put(f"{root}/model.safetensors", struct.pack("<Q", 2**63) + bytes(100))
    with pytest.raises(UserError, match="its header would have"):
        Weights.of_objects(store, list(store.list(f"{root}/model")))


@pytest.mark.parametrize(
    "names",
    [["../../outside"], ["adapter_model.bin"], ["adapter_config.json"], ["a/../../b"], ["/b"]],
)
def test_an_adapters_manifest_names_files_of_its_folder(
    run_spec_for: Any, tmp_path: Path, names: list[str]
) -> None:
    run_spec = run_spec_for()
    stores = Stores(run_spec)
    source = f"{run_spec.base_model.source}/adapter"
    known = PublishedFile(bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    if names != ["adapter_config.json"]:
        names = [*names, "adapter_model.safetensors"]
    for name in names:
        if ".." not in name:  # the server refuses to write such keys; others list them
            stores.default.put(f"{source}/{name}", b"x")
    base = Base(
        run_spec.base_model, (), replace_source(run_spec, source), tuple((n, known) for n in names)
    )
    if names == ["adapter_config.json"]:
        words = "does not name adapter_model.safetensors"
    else:
        words = f"names {names[0]!r}"
    with pytest.raises(UserError, match=re.escape(words)):
        fetch_adapter(base, stores, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*outside")) and not list(tmp_path.rglob("adapter_model.bin"))


def replace_source(run_spec: RunSpec, source: str) -> Any:
    return run_spec.base_model.model_copy(update={"source": source})


# --- pickles -------------------------------------------------------------------------------------


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_metadata_of_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    for attack in (Attack(path), Metadata({}, planner_data=Attack(path))):
        with pytest.raises(CorruptCheckpoint, match=r"posix\.mkdir, which is not metadata"):
            dcp_storage._unpickled(pickle.dumps(attack), "s3://b/step-1")
    assert not path.exists()


class Attribute:
    """Pickled as the attribute of an object, as Python 3.11.0 to 3.11.3 pickle enumerations."""

    def __init__(self, of: Any, name: str) -> None:
        self._of, self._name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._of, self._name)


def test_metadata_may_name_members_of_enumerations_alone() -> None:
    member = Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    loaded = dcp_storage._unpickled(pickle.dumps(member), "s3://b/step-1")
    assert loaded is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for other in (Attribute(_MEM_FORMAT_ENCODING, "__init__"), Attribute(Metadata, "__init__")):
        with pytest.raises(CorruptCheckpoint, match=r"__init__, which is not metadata"):
            dcp_storage._unpickled(pickle.dumps(other), "s3://b/step-1")


def test_values_of_a_checkpoint_run_no_code(tmp_path: Path) -> None:
    data = io.BytesIO()
    torch.save(Attack(tmp_path / "ran"), data)
    data.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        LoadPlannerOfValues().load_bytes(None, data)  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


SOURCES: Final = Path(finetune_trainer.__file__).parent
UNSAFE: Final = re.compile(
    r"\btorch\.load\((?!value, weights_only=True)|\bpickle\.loads?\(|trust_remote_code=True"
    r"|\bAuto(?:Config|Tokenizer|Model\w*)\.from_pretrained\(|np\.load\(|allow_pickle"
)


def test_no_module_loads_pickles_or_a_models_code() -> None:
    """The only loaders of configurations and tokenizers forbid a model's own code."""
    found = {
        path.relative_to(SOURCES).as_posix(): UNSAFE.findall(path.read_text())
        for path in SOURCES.rglob("*.py")
        if UNSAFE.search(path.read_text())
    }
    quoted = found.pop("publish/modelcard.py")  # what the card tells users to write
    assert all(word.startswith("Auto") for word in quoted)
    loaders = ["AutoConfig.from_pretrained(", "AutoTokenizer.from_pretrained("]
    # What a run has published is loaded as users load it.
    wanted = {"storage/modelconfig.py": loaders, "publish/plain.py": loaders[:1]}
    assert found == wanted
    for name, calls in wanted.items():
        assert (SOURCES / name).read_text().count("trust_remote_code=False") == len(calls)
