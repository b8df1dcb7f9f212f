"""Format Retrieval: passages of a prompt, their order, and citations of the answer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data
from finetune_api.templates import Retrieval
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.digest import content_digest
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.formats import Pair, detect_format
from finetune_trainer.prepare.rendering.retrieval import RetrievalPrompts

PASSAGES = st.lists(
    st.text("abcdefgh", min_size=3, max_size=6), min_size=1, max_size=8, unique=True
)


def record(**fields: Any) -> Record:
    whole = {
        "question": "Where?",
        "oracle": "It is here.",
        "distractors": ["It was there.", "It will be elsewhere.", "It is nowhere."],
        "answer": "Here [oracle].",
    }
    return Record({**whole, **fields}, "s3://b/a.jsonl", "line 7")


def prompts(seed: int = 0, **retrieval: Any) -> RetrievalPrompts:
    return RetrievalPrompts(Retrieval.model_validate(retrieval), seed)


def shown(pair: Pair) -> list[str]:
    """Passages in the order of their numbers."""
    found = re.findall(r"^\[(\d+)\] (.*)$", pair.prompt, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [passage for _, passage in found]


def fault(retrieval: dict[str, Any] | None = None, **fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prompts(**retrieval or {}).drawn(record(**fields))
    assert "s3://b/a.jsonl, line 7" in caught.value.message
    return caught.value


def test_a_retrieval_record_is_detected() -> None:
    assert detect_format(record()) == "Retrieval"


@given(PASSAGES, st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_citations_are_the_numbers_of_the_oracles(
    passages: list[str], oracles: int, seed: int
) -> None:
    oracle, rest = passages[:oracles], passages[oracles:]
    marks = "".join(f"<[oracle {i}]>" for i in range(1, len(oracle) + 1))
    found = prompts(seed).with_oracle(record(oracle=oracle, distractors=rest, answer=marks))
    assert sorted(shown(found)) == sorted(passages)
    cited = re.findall(r"<\[(\d+)\]>", found.completion)
    assert [shown(found)[int(number) - 1] for number in cited] == oracle
    assert found.prompt.endswith("Question: Where?\nAnswer:") and found.subject == "Where?"


@given(PASSAGES, st.integers(0, 8), st.integers(0, 2**31 - 1), st.randoms())
def test_choice_and_order_do_not_depend_on_the_records_order(
    passages: list[str], wanted: int, seed: int, random: Any
) -> None:
    mixed = random.sample(passages, len(passages))
    wanted = min(wanted, len(passages))
    made = prompts(seed, distractors=wanted)
    one, other = (made.with_oracle(record(distractors=d)) for d in (passages, mixed))
    assert one == other and len(shown(one)) == wanted + 1
    assert set(shown(one)) <= {"It is here.", *passages}


def test_the_order_varies_with_the_question_and_the_seed() -> None:
    def numbers(seed: int) -> list[int]:
        made = prompts(seed)
        pairs = [made.with_oracle(record(question=str(i))) for i in range(400)]
        return [shown(pair).index("It is here.") for pair in pairs]

    counts = [numbers(0).count(i) for i in range(4)]
    assert min(counts) > 60 and numbers(0) != numbers(1)  # 100 each is expected


@pytest.mark.parametrize(
    ("share", "least", "most"), [("0", 0, 0), ("0.8", 360, 440), ("1", 500, 500)]
)
def test_the_oracle_is_shown_in_its_share_of_records(share: str, least: int, most: int) -> None:
    made = prompts(oracleShare=share)
    pairs = [made.drawn(record(question=str(i))) for i in range(500)]
    with_oracle = ["It is here." in shown(pair) for pair in pairs]
    assert least <= sum(with_oracle) <= most
    for pair, there in zip(pairs, with_oracle, strict=True):
        assert len(shown(pair)) == 3 + there
        # Without the oracle the answer is the same, but without the citation.
        assert re.fullmatch(r" Here \[\d\]\." if there else r" Here\.", pair.completion)


def test_a_distractor_equal_to_the_oracle_is_removed() -> None:
    made = prompts(oracleShare="0").drawn(record(distractors=["It is here.", "Elsewhere."]))
    assert shown(made) == ["Elsewhere."]


def test_without_distractors_and_oracle_the_prompt_is_the_question() -> None:
    made = prompts(oracleShare="0").drawn(record(distractors=None))
    assert made.prompt == "Question: Where?\nAnswer:"


def test_a_json_list_of_passages_in_a_string_is_a_list() -> None:
    cells = {"oracle": '["It is here."]', "distractors": '["x", "y"]'}
    made = prompts().with_oracle(record(**cells))
    assert sorted(shown(made)) == ["It is here.", "x", "y"]
    assert len(shown(prompts().with_oracle(record(distractors="[]")))) == 1
    for passage in ('["x" is text]', "[1]", "17"):
        assert passage in shown(prompts().with_oracle(record(distractors=passage)))


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"oracle": None}, "MissingField", "field 'oracle' is null"),
        ({"oracle": []}, "WrongType", "at least one passage"),
        ({"oracle": "[]"}, "WrongType", "at least one passage"),
        ({"oracle": 3}, "WrongType", "a passage or a list"),
        ({"distractors": ["a", 3]}, "WrongType", "field 'distractors'"),
        ({"answer": ["a"]}, "WrongType", "field 'answer'"),
        ({"answer": "so [oracle 2]"}, "UnknownPassage", "cites [oracle 2]"),
        ({"answer": "so [oracle 0]"}, "UnknownPassage", "cites [oracle 0]"),
    ],
)
def test_a_faulty_record_is_named(fields: dict[str, Any], reason: str, words: str) -> None:
    error = fault(**fields)
    assert error.reason == reason and words in error.message


def test_the_digest_covers_the_retrieval_settings() -> None:
    def made(**retrieval: Any) -> str:
        block = {"source": "s3://bucket/a.jsonl", "format": "Retrieval", "retrieval": retrieval}
        data = Data.model_validate({"train": [block]})
        return content_digest(data, [Source("train", "a", data.train[0], [])], {}, 128, "CausalLM")

    assert len({made(), made(distractors=2), made(oracleShare="0.5")}) == 3


def test_too_few_distractors_are_refused() -> None:
    error = fault({"distractors": 4})
    assert error.reason == "TooFewDistractors" and "has 3 passages" in error.message
