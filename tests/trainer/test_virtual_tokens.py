"""Prompt and prefix tuning: losses, answers and maximum length with virtual tokens."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import write_model
from engine import CPU, samples, spec_of
from tuning import Tuning

from finetune_trainer.engine.loss import TokenLoss, micro_batch_losses
from finetune_trainer.engine.model import build_base, load_tokenizer
from finetune_trainer.engine.packing.padded import build_padded_tokens
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.pipeline import max_length_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, attention_bias=True)
    return folder


@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning"])
def test_losses_and_answers_with_virtual_tokens(base: Path, name: str) -> None:
    """The same as of peft's own forward pass with eager attention."""
    spec = spec_of({"type": name, "prompt": {"virtualTokens": 5}}, dropout="0.2")
    tuning = Tuning(base, spec)
    tuning.step(0)
    model = tuning.loss.eval().model
    (sample,) = samples([18], seed=9)
    micro_batch = build_padded_tokens([sample], [0], seed=0, step=0, device=CPU)
    found = micro_batch_losses(tuning.loss, micro_batch)
    prompts = [torch.arange(3, 3 + n).numpy() for n in (4, 9, 4)]
    answers = evaluator(tuning.loss, base).generate(prompts)

    plain = TokenLoss(build_base(base, torch.float32, pack=False)).eval()
    with tuning.loss.base_model():
        assert torch.equal(
            micro_batch_losses(tuning.loss, micro_batch), micro_batch_losses(plain, micro_batch)
        )
        before = evaluator(tuning.loss, base).generate(prompts)
        assert before == evaluator(plain, base).generate(prompts)
    assert torch.equal(micro_batch_losses(tuning.loss, micro_batch), found)

    model.set_attn_implementation("eager")
    ids = torch.from_numpy(sample.ids.astype("int64"))
    target = sample.supervised.nonzero()[0]
    with torch.no_grad():
        scores = model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)
    torch.testing.assert_close(found, -scores[target - 1, ids[target]], atol=1e-5, rtol=1e-5)
    tokenizer = load_tokenizer(base)
    for prompt, (answer, _) in zip(prompts, answers, strict=True):
        said = torch.from_numpy(prompt)
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=said[None]).logits[0, -1].argmax()
            said = torch.cat([said, best[None]])
        assert answer == tokenizer.decode(said[len(prompt) :], skip_special_tokens=True)
    assert len(set(answers)) > 1


def evaluator(loss: TokenLoss, base: Path) -> Evaluator:
    world: Any = SimpleNamespace(
        rank=0, size=1, device=CPU, autocast=nullcontext, on_all=lambda work: [work()]
    )
    data: Any = SimpleNamespace(manifest=SimpleNamespace(stop_token_ids=[128]))
    return Evaluator(
        world=world, data=data, loss=loss, tokenizer=load_tokenizer(base), micro_batch_tokens=64,
        packing="Padded", build=build_padded_tokens, max_samples=8, max_new_tokens=6,
        virtual_tokens=5,
    )  # fmt: skip


def test_virtual_tokens_take_positions_of_the_model() -> None:
    prompt = {"type": "PromptTuning", "prompt": {"virtualTokens": 20}}
    assert max_length_of(spec_of(prompt), 512) == 492
    assert max_length_of(spec_of(prompt, maxLength=492), 512) == 492
    with pytest.raises(UserError, match=r"493 is more than the 512 positions .*, less 20 of"):
        max_length_of(spec_of(prompt, maxLength=493), 512)
    with pytest.raises(UserError, match="virtualTokens"):
        max_length_of(spec_of(prompt), 20)
    assert max_length_of(spec_of({"type": "LoRA"}, maxLength=512), 512) == 512
    assert max_length_of(spec_of(prompt), None) == 2048
