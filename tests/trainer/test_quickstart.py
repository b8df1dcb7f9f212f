"""The quickstart's model and data: reproducible, loadable, consistent."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.quickstart import VERSION, make_quickstart
from finetune_trainer.quickstart.language import COMPLAINTS, NOTES, draw_ticket, message, note
from finetune_trainer.quickstart.pretrain import SIZES, make_base
from finetune_trainer.quickstart.records import make_data


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_model_loads_with_plain_transformers_and_generates(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "model")
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    batch = tokenizer("Customer: where is my lamp?\nAgent:", return_tensors="pt")
    ids = model.generate(input_ids=batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > batch["input_ids"].shape[1]


def test_the_tokenizer_round_trips_every_text(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "model")
    for text in ("Customer: Hello.\nAgent: Dear Anna,", "naïve 日本 🙂\t", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_extends_its_own_prompt(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "model")
    asked = [{"role": "user", "content": "Where is it?"}]
    answered = [*asked, {"role": "assistant", "content": "On its way."}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert prompt == "Customer: Where is it?\nAgent:"
    assert whole == f"{prompt} On its way.{tokenizer.eos_token}\n"


def test_the_same_seed_gives_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    seen = make_base(tmp_path / "model", SIZES["tiny"])
    assert digests(tmp_path / "model") == digests(tiny_base / "model")
    used = [r["text"] for r in records(tiny_base / "data" / "intent-test.jsonl")]
    assert not seen.intersection(used)


def test_messages_are_unique_and_unseen_in_pretraining(tmp_path: Path) -> None:
    random = Random(2)  # same seed as make_data below, which would otherwise draw these messages
    seen = {message(draw_ticket(random), random) for _ in range(50)}
    make_data(tmp_path, seen, train=40, test=20, seed=2)
    used = [
        record.get("text") or record.get("message") or record["messages"][0]["content"]
        for path in sorted(tmp_path.glob("*.jsonl"))
        for record in records(path)
    ]
    assert len(used) == 2 * (40 + 20) + 20
    assert len(set(used)) == len(used)
    assert not seen.intersection(used)


def test_labels_and_notes_match_the_message() -> None:
    random = Random(0)
    for _ in range(200):
        ticket = draw_ticket(random)
        text = message(ticket, random)
        assert ticket.name in text
        assert ticket.product in text
        assert NOTES[ticket.intent] in note(ticket)
    assert set(NOTES) == set(COMPLAINTS)


def test_the_cache_is_reused(tiny_base: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / f"tiny-{VERSION}"
    for part in ("model", "data"):
        (kept / part).mkdir(parents=True)
        for path in (tiny_base / part).iterdir():
            (kept / part / path.name).write_bytes(path.read_bytes())
    assert make_quickstart(tmp_path / "out", tiny=True, cache=tmp_path / "cache")
    assert digests(tmp_path / "out") == digests(tiny_base)


def test_imports_print_no_library_warnings() -> None:
    pytest.importorskip("torchao")
    code = "import finetune_trainer, torchao.quantization"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "_pytree" not in said.stderr
