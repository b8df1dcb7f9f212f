"""Makes the questions of a run: the first prompts of each test set, behind examples, instructions
or retrieved passages.

    test prompts ┐
    training samples ─(draw)→ Pool ─(no near duplicates)→ examples ┤
    instruction, passages ─────────────────────────────── texts ───┴─(Joint)→ questions

Everything is a function of the spec and the prepared data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from finetune_api.evaluation_results import RETRIEVAL
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.metric_selection import measured_on
from finetune_trainer.evaluate.scores import need_answers
from finetune_trainer.failures import UserError
from finetune_trainer.prepare.questions.examples import Ids, Pool
from finetune_trainer.prepare.questions.joining import Joint
from finetune_trainer.prepare.questions.passages import Retriever, read_passages, shown
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.limits import LimitExceeded, limited_work, too_costly
from finetune_trainer.prepare.tokenizing.tokens import Model
from finetune_trainer.prepared.dataset import AnsweredPrompt, PreparedData, Reference
from finetune_trainer.prepared.questions import (
    Prompting,
    Question,
    Questions,
    few_shot,
)
from finetune_trainer.prepared.split import position
from finetune_trainer.storage.objects import Stores

log = logging.getLogger(__name__)

DEFAULT_SHOTS: Final = (1, 4)
"""Few-shot prompts where the spec names none, as far as they fit, and there are training sets."""
_ROOM: Final = 8192
"""Tokens of a question, for a model whose positions have no bound."""
_CANDIDATES: Final = 64
"""Training samples among which the examples of a draw are chosen, and more for many shots."""
_SHARDS: Final = 4
"""Shards of training samples that are read for a draw."""


class Preface(NamedTuple):
    """What stands in front of a test prompt."""

    prompt: str
    """Name of the prompt."""
    shots: int
    texts: tuple[str, ...] = ()
    field: str = ""
    """Field of the spec that asks for it; empty: a default, which may be left out."""


@dataclass(frozen=True)
class TestSet:
    """The asked samples of a test set."""

    number: int
    """Index in the manifest."""
    name: str
    positions: list[int]
    """Positions in the index of the test split."""
    references: list[Reference]
    joint: Joint


class DoesNotFit(Exception):
    """Some questions of a preface cannot be made. The message says why."""


def make_questions(
    spec: FineTuneJobSpec, data: PreparedData, model: Model, stores: Stores
) -> Questions:
    """Make the questions of all test sets whose answers are measured.

    Raises:
        UserError: 'QuestionsDoNotFit', what the spec asks for does not fit into the model's
            context, or there are not enough examples; 'NothingToAsk'; 'NoObjects';
            'TemplateTooCostly'.
        DataError: from ``read_passages``; 'TemplateFailed', the chat template takes no system turn.
    """
    asked = _test_sets(spec, data, model) if spec.kind.generates else []
    wanted = [preface.field for preface in _prefaces(spec) if preface.field]
    wanted += ["spec.evaluation.passages"] if spec.evaluation.passages is not None else []
    if wanted and not asked:
        raise UserError(
            "NothingToAsk",
            f"{wanted[0]}: no test set has answers that are measured, to prompts in front of which"
            " examples, an instruction or passages could stand; remove the field, or give a test"
            " set with prompts (data.test or data.split.test), with a metric of answers in"
            " spec.evaluation.metrics",
        )
    found: Questions = {}
    room = (model.positions or _ROOM) - data.manifest.answer_tokens(spec.evaluation.max_new_tokens)
    for preface in _prefaces(spec):
        for each in asked:
            for prompting, questions in _asked(spec, data, each, preface, room).items():
                found.setdefault(prompting, []).extend(questions)
    if spec.evaluation.passages is not None:
        retriever = Retriever(read_passages(spec.evaluation.passages, stores))
        top = spec.evaluation.passages.top
        found[Prompting(RETRIEVAL, tuned=True)] = [
            question for each in asked for question in _with_passages(each, retriever, top, room)
        ]
    return found


def _system_turn(chat: ChatTemplate, text: str) -> str:
    """Render a system turn; chat templates are untrusted.

    Raises:
        UserError: 'TemplateTooCostly'.
        DataError: 'TemplateFailed'.
    """
    try:
        with limited_work():
            return chat.system_turn(text)
    except LimitExceeded as error:
        raise too_costly("a system turn", str(error)) from None


def _prefaces(spec: FineTuneJobSpec) -> list[Preface]:
    baselines = spec.evaluation.baselines
    default = baselines.shots is None
    field = "" if default else "spec.evaluation.baselines.shots"
    shots = tuple(dict.fromkeys(baselines.shots or ()))
    if default and spec.data.train is not None:
        shots = DEFAULT_SHOTS
    return [
        *(Preface(few_shot(count), count, field=field) for count in shots),
        *(
            Preface(p.name, p.shots, (p.text,), "spec.evaluation.baselines.prompts")
            for p in baselines.prompts
        ),
    ]


def _test_sets(spec: FineTuneJobSpec, data: PreparedData, model: Model) -> list[TestSet]:
    most = min(spec.evaluation.max_samples, spec.evaluation.baselines.max_samples)
    found = []
    for number, name in data.set_names("test"):
        entry = data.manifest.sets[number]
        form = entry.format
        if not need_answers(measured_on(entry, spec)):
            continue
        positions = np.flatnonzero(data.index("test").set == number)[:most].tolist()
        chat = ChatTemplate(model.tokenizer, model.source) if form == "Messages" else None
        joint = Joint(
            encode=lambda text: model.tokenizer.encode(text, add_special_tokens=False),
            system=partial(_system_turn, chat) if chat else None,
            bos_id=model.tokens.bos_id,
            stops={*data.manifest.stop_token_ids, model.tokenizer.eos_token_id},
        )
        references = data.references("test", positions)
        found.append(TestSet(number, name, positions, references, joint))
    return found


def _asked(
    spec: FineTuneJobSpec, data: PreparedData, test: TestSet, preface: Preface, room: int
) -> Questions:
    """The questions of one test set behind a preface, by draw; none where a default does not fit.

    Raises:
        UserError: 'QuestionsDoNotFit'.
    """
    try:
        return {
            Prompting(preface.prompt, draw): _of_draw(spec, data, test, preface, room, draw)
            for draw in range(spec.evaluation.baselines.draws if preface.shots else 1)
        }
    except DoesNotFit as error:
        if preface.field:
            raise UserError(
                "QuestionsDoNotFit",
                f"{preface.field}: {preface.prompt} on test set {test.name}: {error}. Remove it,"
                " ask for fewer examples, or shorten spec.evaluation.maxNewTokens",
            ) from None
        log.info("no %s answers of the base model to %s: %s", preface.prompt, test.name, error)
        return {}


def _of_draw(
    spec: FineTuneJobSpec,
    data: PreparedData,
    test: TestSet,
    preface: Preface,
    room: int,
    draw: int,
) -> list[Question]:
    """Raises:
    DoesNotFit: with the first prompt for which it does not.
    """
    pool = Pool(_drawn(spec, data, test, preface.shots, room, draw) if preface.shots else [])
    questions = []
    for at, reference in zip(test.positions, test.references, strict=True):
        examples = pool.choose(preface.shots, reference.prompt_ids)
        if len(examples) < preface.shots:
            raise DoesNotFit(
                f"of its training samples, {len(examples)} are short enough and no near duplicates"
                f" of its prompt {at + 1}, but {preface.shots} are needed"
            )
        ids = test.joint.question(preface.texts, examples, reference.prompt_ids)
        _check_room(ids, room, at)
        questions.append(Question(test.number, at, ids))
    return questions


def _with_passages(test: TestSet, retriever: Retriever, top: int, room: int) -> list[Question]:
    """Raises:
    UserError: 'QuestionsDoNotFit'.
    """
    found = retriever.find([r.prompt for r in test.references], top)
    questions = []
    for at, reference, passages in zip(test.positions, test.references, found, strict=True):
        texts = [shown(passages)] if passages else []
        ids = test.joint.question(texts, [], reference.prompt_ids)
        try:
            _check_room(ids, room, at)
        except DoesNotFit as error:
            raise UserError(
                "QuestionsDoNotFit",
                f"spec.evaluation.passages: on test set {test.name}: {error}. Lower"
                " spec.evaluation.passages.top, or shorten the passages",
            ) from None
        questions.append(Question(test.number, at, ids))
    return questions


def _check_room(ids: Ids, room: int, at: int) -> None:
    if len(ids) > room:
        raise DoesNotFit(
            f"prompt {at + 1} has {len(ids)} tokens with what stands in front, but the model's"
            f" context leaves {max(0, room)} beside the answer"
        )


def _drawn(
    spec: FineTuneJobSpec, data: PreparedData, test: TestSet, shots: int, room: int, draw: int
) -> Sequence[AnsweredPrompt]:
    """Training samples in the order of a draw: of the set with the test set's name, else of all
    sets of its form, each short enough that all examples fit.

    Raises:
        DoesNotFit: there are too few.
    """
    sets = data.manifest.sets
    chat = sets[test.number].format == "Messages"
    listed = [n for n, _ in data.set_names("train") if (sets[n].format == "Messages") is chat]
    listed = [n for n in listed if sets[n].format != "Text"]
    named = [n for n in listed if sets[n].name == test.name]
    index, most = data.index("train"), (room - _longest(test)) // shots
    fitting = np.isin(index.set, named or listed) & (index.length <= most)

    def order(what: str) -> float:
        return position(spec.data.split.seed, f"few-shot\0{draw}\0{what}")

    positions = np.flatnonzero(fitting)
    shards = sorted(np.unique(index.shard[positions]).tolist(), key=lambda s: order(f"shard {s}"))
    near = positions[np.isin(index.shard[positions], shards[:_SHARDS])].tolist()
    wanted = max(_CANDIDATES, 4 * shots)
    chosen = sorted(near, key=lambda at: order(str(at)))[:wanted]
    if len(chosen) < shots:
        raise DoesNotFit(
            f"{len(chosen)} training samples of its form have at most {max(0, most)} tokens, so"
            f" that {shots} of them fit into the model's context"
        )
    return data.answered_prompts("train", chosen)


def _longest(test: TestSet) -> int:
    return max((len(r.prompt_ids) for r in test.references), default=0)
