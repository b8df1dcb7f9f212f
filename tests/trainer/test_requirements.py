"""Missing packages, compilers and device features are reported, with alternative settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import CPU
from fixtures_memory import spec_of

from finetune_trainer.engine.memory import requirements
from finetune_trainer.engine.memory.requirements import check_device, check_image
from finetune_trainer.failures import UserError

GPU = torch.device("cuda")
QLORA: dict[str, Any] = {"method": {"type": "QLoRA"}}
FULL: dict[str, Any] = {"method": {"type": "Full"}}
SMALL: dict[str, Any] = {**FULL, "training": {"optimizer": "AdamW8bit"}}
FP8: dict[str, Any] = {**FULL, "training": {"precision": "FP8", "compile": True}}


@pytest.mark.parametrize(
    ("asked", "package", "instead"),
    [
        (QLORA, "bitsandbytes", "method.type: LoRA"),
        (SMALL, "bitsandbytes", "training.optimizer: AdamW"),
        (FP8, "torchao", "training.precision: BF16"),
    ],
)
def test_quantized_settings_need_a_package_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], package: str, instead: str
) -> None:
    spec = spec_of(**asked)
    check_image(spec)
    with pytest.raises(UserError) as caught:
        check_device(spec, CPU)
    assert caught.value.reason == "GPUMissing"
    assert caught.value.message.endswith(f"set compute.gpusPerNode, or {instead}")
    monkeypatch.setattr(requirements, "is_installed", lambda name: name != package)
    with pytest.raises(UserError, match="EXTRA=gpu") as caught:
        check_image(spec)
    assert caught.value.reason == "PackageMissing"
    assert package in caught.value.message and caught.value.message.endswith(f"set {instead}")
    other = spec_of(**FULL)
    check_image(other)
    check_device(other, CPU)


def test_fp8_needs_a_capable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = SimpleNamespace(
        get_device_capability=lambda device: (8, 0), get_device_name=lambda device: "A100"
    )
    monkeypatch.setattr(requirements.torch, "cuda", gpus)
    check_device(spec_of(**SMALL), GPU)
    with pytest.raises(UserError, match=r"this is a A100; set training\.precision: BF16"):
        check_device(spec_of(**FP8), GPU)


@pytest.mark.parametrize(("gpus", "language"), [(0, "C++ compiler for a CPU"), (1, "C compiler")])
def test_compile_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, gpus: int, language: str
) -> None:
    compute = {"gpusPerNode": gpus}
    spec = spec_of(**FULL, training={"compile": True}, compute=compute)
    check_image(spec)
    check_device(spec, CPU)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="EXTRA=gpu have one") as caught:
        check_image(spec)
    assert caught.value.reason == "NoCompiler" and language in caught.value.message
    with pytest.raises(UserError, match="CPU"):
        check_device(spec, CPU)
    check_image(spec_of(**FULL, compute=compute))
