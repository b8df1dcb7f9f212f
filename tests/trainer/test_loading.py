"""A model whose weights are read by byte ranges is the same model; placeholders hold none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_loading import CONFIGS, assert_same, computed_buffers, upload_weights
from transformers import AutoModelForCausalLM

from finetune_trainer.engine.model import Init, Pretrained, build_base
from finetune_trainer.engine.placeholders import is_placeholder
from finetune_trainer.failures import UserError
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.weight_reader import Weights


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_read_by_ranges_is_the_same(
    name: str, store: ObjectStore, root: str, model_of: Callable[[str], Path]
) -> None:
    folder = model_of(name)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    weights = Weights.of_objects(store, upload_weights(store, root, folder))
    found = build_base(folder, torch.float32, Pretrained(weights))
    assert_same(dict(found.named_parameters()), dict(expected.named_parameters()))
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
    assert_same(computed_buffers(found), computed_buffers(expected))
    assert found.config.to_dict() == expected.config.to_dict()


def test_a_model_that_is_replaced_while_reading_is_refused(
    store: ObjectStore, root: str, model_of: Callable[[str], Path]
) -> None:
    folder = model_of("tied")
    objects = upload_weights(store, root, folder)
    weights = Weights.of_objects(store, objects)
    uri = objects[0].uri
    store.put(uri, store.get(uri)[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(UserError) as caught:
        build_base(folder, torch.float32, Pretrained(weights))
    assert caught.value.reason == "ModelChanged" and uri in caught.value.message
    with pytest.raises(UserError) as caught:
        Weights.of_objects(store, objects)
    assert caught.value.reason == "ModelChanged"


def test_missing_weights_are_named(model_of: Callable[[str], Path]) -> None:
    folder = model_of("untied")
    weights = Weights.of_folder(folder)
    del weights._slices["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        build_base(folder, torch.float32, Pretrained(weights))
    assert caught.value.reason == "IncompleteModel"


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
