"""Evaluation of a published model with nothing of this project: transformers, fp32, greedy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer


def evaluate_outside(folder: Path, data: Path, task: str) -> dict[str, float]:
    """Metrics of the quickstart's tasks, from the texts of its test records alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = [json.loads(line) for line in data.read_text().splitlines()]
    if task == "intent":
        prompts = [f"{r['text']}\nLabel:" for r in records]
        truth = [r["label"] for r in records]
    else:
        prompts = [f"{r['message']}\nNote:" for r in records]
        truth = [r["note"] for r in records]
    said = [answer(model, tokenizer, p) for p in prompts]
    if task == "intent":
        return {
            "Accuracy": accuracy_score(truth, said),
            "F1": f1_score(truth, said, labels=sorted(set(truth)), average="macro"),
        }
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(t, s)["rougeL"].fmeasure for t, s in zip(truth, said, strict=True)]
    exact = [t == s for t, s in zip(truth, said, strict=True)]
    return {"Rouge": sum(rouge) / len(rouge), "ExactMatch": sum(exact) / len(exact)}


def answer(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
