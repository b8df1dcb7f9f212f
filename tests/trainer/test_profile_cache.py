"""A model is profiled once per run: the workers reuse valid profiles of prepare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import tiny_llama
from fixtures_memory import spec_of

from finetune_trainer.engine.memory import profile_cache
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.failures import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, find_profile: Callable[..., Any]) -> list[Any]:
    """Specs for which the model was actually profiled."""
    done: list[Any] = []
    real = profile_cache.profile_model

    def counted(path: Path, spec: Any, longest: int) -> Any:
        done.append(spec)
        return real(path, spec, longest)

    monkeypatch.setattr(profile_cache, "profile_model", counted)
    monkeypatch.setattr(ProfileCache, "_find", find_profile)
    return done


SPEC = spec_of(compute={"gpusPerNode": 2})


def test_stored_profiles_are_reused(folder: Path, made: list[Any]) -> None:
    first = ProfileCache(folder, 64)
    profile = first(SPEC)
    assert first(SPEC) is profile and len(made) == 1
    later = ProfileCache(folder, 64, first.to_json())
    assert later(SPEC) == profile and len(made) == 1
    assert ProfileCache(folder, 64, later.to_json())(SPEC) == profile and len(made) == 1
    rows = spec_of(compute={"gpusPerNode": 2}, training={"microBatchTokens": 100})
    assert later(rows) == profile and len(made) == 1


@pytest.mark.parametrize(
    "blocks",
    [
        {"compute": {"gpusPerNode": 0, "processesPerNode": 2}},
        {"compute": {"gpusPerNode": 2, "contextParallel": 2}},
        {"compute": {"gpusPerNode": 2}, "method": {"type": "Full"}},
        {"compute": {"gpusPerNode": 2}, "method": {"lora": {"rank": 4}}},
        {"compute": {"gpusPerNode": 2}, "training": {"precision": "FP32"}},
        {"compute": {"gpusPerNode": 2}, "training": {"optimizer": "Muon"}},
    ],
    ids=str,
)
def test_another_spec_is_profiled(folder: Path, made: list[Any], blocks: dict[str, Any]) -> None:
    kept = ProfileCache(folder, 64)
    kept(SPEC)
    other = spec_of(**blocks)
    found = ProfileCache(folder, 64, kept.to_json())(other)
    assert made == [SPEC, other]
    assert found == profile_cache.profile_model(folder, other, 64)


def test_another_model_package_or_length_is_profiled(
    folder: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ProfileCache(folder, 64)
    before = first(SPEC)
    assert ProfileCache(folder, 65, first.to_json())(SPEC) is not None and len(made) == 2
    with monkeypatch.context() as patch:
        patch.setattr(profile_cache, "version", lambda name: "0.0")
        assert ProfileCache(folder, 64, first.to_json())(SPEC) == before and len(made) == 3
    tiny_llama(hidden_size=64).save_pretrained(folder)
    after = ProfileCache(folder, 64, first.to_json())(SPEC)
    assert after.weights.numbers > before.weights.numbers and len(made) == 4


def test_profiles_of_another_form_are_ignored(folder: Path, made: list[Any]) -> None:
    first = ProfileCache(folder, 64)
    before = first(SPEC)
    kept = json.loads(first.to_json())
    for profile in kept.values():
        del profile["weights"]
    assert ProfileCache(folder, 64, json.dumps(kept).encode())(SPEC) == before and len(made) == 2


def test_errors_are_cached_in_memory_but_not_stored(folder: Path, made: list[Any]) -> None:
    wrong = spec_of(method={"lora": {"targetModules": ["nope"]}})
    measure = ProfileCache(folder, 64)
    for _ in range(2):
        with pytest.raises(UserError, match="nope"):
            measure(wrong)
    assert len(made) == 1
    with pytest.raises(UserError, match="nope"):
        ProfileCache(folder, 64, measure.to_json())(wrong)
    assert len(made) == 2
