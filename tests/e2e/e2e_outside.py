"""Evaluation of a published model without this project's code: transformers, fp32, greedy."""

from __future__ import annotations

import json
from pathlib import Path

import sacrebleu
import torch
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_merged(folder: Path):
    """Load the published merged model."""
    return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()


def load_adapter(folder: Path, base: Path):
    """Load the published adapter on the base model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def evaluate_outside(model, tokenizer_folder: Path, data: Path, task: str) -> dict[str, float]:
    """Compute the metrics of a quickstart task from the texts of its test records."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    if task == "intent":
        prompts = [f"{r['text']}\nLabel:" for r in records]
        truth = [r["label"] for r in records]
    else:
        prompts = [f"{r['message']}\nNote:" for r in records]
        truth = [r["note"] for r in records]
    said = [answer(model, tokenizer, p) for p in prompts]
    loss = mean_loss(model, tokenizer, prompts, truth)
    if task == "intent":
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, said, labels=sorted(set(truth)), average="macro", zero_division=0.0
        )
        return {
            "Loss": loss, "Accuracy": accuracy_score(truth, said),
            "Precision": precision, "Recall": recall, "F1": f1,
        }  # fmt: skip
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(t, s)["rougeL"].fmeasure for t, s in zip(truth, said, strict=True)]
    exact = [t == s for t, s in zip(truth, said, strict=True)]
    return {
        "Loss": loss, "Rouge": sum(rouge) / len(rouge), "ExactMatch": sum(exact) / len(exact),
        "Bleu": sacrebleu.corpus_bleu(said, [truth]).score,
    }  # fmt: skip


def mean_loss(model, tokenizer, prompts: list[str], answers: list[str]) -> float:
    """Return the cross-entropy in nats per token of the answers, with their EOS tokens."""
    total, tokens = 0.0, 0
    for prompt, text in zip(prompts, answers, strict=True):
        head = tokenizer(prompt).input_ids
        tail = [*tokenizer(f" {text}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        total += cross_entropy(logits, torch.tensor(tail), reduction="sum").item()
        tokens += len(tail)
    return total / tokens


def answer(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
