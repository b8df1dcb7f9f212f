"""The figures of lm-evaluation-harness on the same requests: multiple choice, generated answers,
and the likelihood of texts."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine import CPU, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from finetune_trainer.engine.loss import TokenLoss, evaluating, micro_batch_losses
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.planning.plan import pack_all
from finetune_trainer.evaluate.label_scores import chosen
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.evaluate.prompt_batches import Ids
from finetune_trainer.evaluate.scores import Answers, text_metrics
from finetune_trainer.prepared.dataset import TokenSample

WORDS = ["the", "film", "was", "so", "very", "good", "dull", "long", "short", "about", "a", "trip"]
LABELS = ["good", "not good", "very long and dull", "short"]
NEW_TOKENS = 7
WORLD: Any = SimpleNamespace(
    rank=0, size=1, device=CPU, autocast=nullcontext, on_all=lambda work: [work()]
)


def text(seed: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, int(draw.integers(3, 30))))


PROMPTS = [f"{text(n)}\nLabel:" for n in range(40)]


class Bench:
    """A random model with a byte-level tokenizer, as ours and as the harness' model."""

    def __init__(self) -> None:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        inner.train_from_iterator([*PROMPTS, *LABELS], trainer)
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        self.loss = TokenLoss(tiny_llama(vocab_size=320, initializer_range=0.3))

    def ids(self, text: str) -> Ids:
        """Tokens of a prompt."""
        return np.array(self.tokenizer(text)["input_ids"], np.int32)

    def evaluator(self) -> Evaluator:
        labels = {
            label: [*self.tokenizer.encode(f" {label}", add_special_tokens=False), 1]
            for label in LABELS
        }
        manifest = SimpleNamespace(sets=[SimpleNamespace(labels=labels)], stop_token_ids=[1])
        return Evaluator(
            world=WORLD, data=SimpleNamespace(manifest=manifest), loss=self.loss,  # type: ignore[arg-type]
            tokenizer=self.tokenizer, micro_batch_tokens=256, packing="Concatenated",
            build=build_packed, max_samples=100, max_new_tokens=NEW_TOKENS,
        )  # fmt: skip

    def harness(self, records: list[dict[str, Any]], *, bos: bool = True, **task: Any) -> Any:
        """Results and samples of a task of the harness."""
        from datasets import Dataset
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        data = {"test": Dataset.from_list(records)}
        made = {"task": "made", "custom_dataset": lambda **_: data, "test_split": "test", **task}
        with evaluating(self.loss):
            found = simple_evaluate(
                model=HFLM(
                    pretrained=self.loss.model, tokenizer=self.tokenizer, batch_size=8,
                    max_length=512, add_bos_token=bos,
                ),
                tasks=[made],
                task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
                cache_requests=False,
            )  # fmt: skip
        samples = sorted(found["samples"]["made"], key=lambda each: each["doc_id"])
        return found["results"]["made"], samples


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_labels(bench: Bench) -> None:
    """Labels of one and of several tokens; the reference is a random label."""
    wanted = np.random.default_rng(1).choice(LABELS, len(PROMPTS)).tolist()
    found = bench.evaluator().label_scores(
        0, [bench.ids(prompt) for prompt in PROMPTS], ["LabelAccuracy"]
    )
    records = [{"prompt": p, "label": w} for p, w in zip(PROMPTS, wanted, strict=True)]
    results, samples = bench.harness(
        records, output_type="multiple_choice", doc_to_text="{{prompt}}",
        doc_to_target="{{label}}", doc_to_choice=LABELS,
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    assert found is not None and len(set(found.tokens)) > 1
    theirs = [[ll for ll, _ in sample["filtered_resps"]] for sample in samples]
    np.testing.assert_allclose(found.values, theirs, atol=1e-4)
    ours = text_metrics(
        Answers([""] * len(wanted), wanted, wanted, label_scores=found),
        ["LabelAccuracy", "LabelAccuracyPerCharacter"],
    )
    assert ours["LabelAccuracy"] == pytest.approx(results["acc,none"])
    assert ours["LabelAccuracyPerCharacter"] == pytest.approx(results["acc_norm,none"])
    first, second = (chosen(found, m) for m in ("LabelAccuracy", "LabelAccuracyPerCharacter"))
    assert first != second, "the rules choose other labels"


def test_generated_answers(bench: Bench) -> None:
    said = bench.evaluator().generate([bench.ids(prompt) for prompt in PROMPTS])
    wanted = [answer.text if n % 3 else "another" for n, answer in enumerate(said)]
    records = [{"prompt": p, "answer": w} for p, w in zip(PROMPTS, wanted, strict=True)]
    results, samples = bench.harness(
        records, output_type="generate_until", doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"max_gen_toks": NEW_TOKENS, "do_sample": False, "until": []},
    )  # fmt: skip
    assert [answer.text for answer in said] == [sample["filtered_resps"][0] for sample in samples]
    ours = text_metrics(Answers([answer.text for answer in said], wanted, None), ["ExactMatch"])
    assert ours["ExactMatch"] == pytest.approx(results["exact_match,none"])
    assert 0.5 < ours["ExactMatch"] < 1


def test_likelihood_of_texts(bench: Bench) -> None:
    """Our loss is that of all tokens behind the beginning-of-sequence token; the harness puts that
    token in front itself."""
    samples = [TokenSample(ids, np.arange(len(ids)) > 0) for ids in map(bench.ids, PROMPTS)]
    lengths = np.array([len(sample.ids) for sample in samples])
    total = 0.0
    with evaluating(bench.loss):
        for numbers in pack_all(lengths, 256, 1)[0]:
            some = [samples[n] for n in numbers]
            built = build_packed(some, list(numbers), seed=0, step=0, device=CPU)
            total += float(micro_batch_losses(bench.loss, built).double().sum())
    results, _ = bench.harness(
        [{"prompt": p} for p in PROMPTS], bos=False, output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{prompt}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    bytes_ = sum(len(prompt.encode()) for prompt in PROMPTS)
    assert math.exp(total / bytes_) == pytest.approx(results["byte_perplexity,none"], abs=1e-4)
    assert total / bytes_ / math.log(2) == pytest.approx(results["bits_per_byte,none"], abs=1e-4)
