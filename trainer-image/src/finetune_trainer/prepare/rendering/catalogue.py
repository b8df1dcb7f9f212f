"""The template library: for each task, several phrasings of the prompt and one completion; for
conversations, the known role names.

A phrasing ends with a word and a colon, and a completion begins with the space after it:
vocabularies hold words with a leading space. The first phrasing is the plainest, and is used for
held-out records. A value that is not text is written as JSON; an absent optional field is empty.
The texts are part of the content digest of prepared data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from finetune_api.sources import Format
from finetune_api.templates import Role, TemplateName


@dataclass(frozen=True)
class Field:
    """A field that a template renders."""

    what: str
    """Its description, for users."""
    optional: bool = False
    """Whether records may lack it."""


@dataclass(frozen=True)
class Entry:
    """A template of the library."""

    purpose: str
    """Its purpose, for users."""
    format: Format
    """Format of its records, which decides their metrics."""
    fields: Mapping[str, Field]
    prompts: tuple[str, ...] = ()
    """Phrasings (Jinja); none where the model's chat template writes the prompt."""
    completion: str = ""
    """The supervised text (Jinja)."""


CHAT_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Role of each usual role name; `template.roles` adds others."""


CATALOGUE: Final[Mapping[TemplateName, Entry]] = {
    "Summarize": Entry(
        purpose="a document and its summary",
        format="PromptCompletion",
        fields={"document": Field("the text"), "summary": Field("its summary")},
        prompts=(
            "Summarize the document.\n\n{{ document }}\n\nSummary:",
            "{{ document }}\n\nWrite a short summary of the text above.\n\nSummary:",
            "Read the following text and say in a few words what matters in it.\n\n"
            "{{ document }}\n\nIn short:",
            "Document:\n{{ document }}\n\nWhat does this document say, in brief?\n\nSummary:",
        ),
        completion=" {{ summary }}",
    ),
    "Translate": Entry(
        purpose="a text and its translation",
        format="PromptCompletion",
        fields={
            "source": Field("the text"),
            "target": Field("its translation"),
            "language": Field("the language of the translation, in words", optional=True),
        },
        prompts=(
            "Translate the text{% if language %} into {{ language }}{% endif %}.\n\n"
            "{{ source }}\n\nTranslation:",
            "{{ source }}\n\nGive a translation of the text above"
            "{% if language %} into {{ language }}{% endif %}.\n\nTranslation:",
            "How is this said in {{ language or 'the other language' }}?\n\n"
            "{{ source }}\n\nTranslation:",
        ),
        completion=" {{ target }}",
    ),
    "Classify": Entry(
        purpose="a text and its class; measured with accuracy and F1",
        format="Classification",
        fields={
            "text": Field("the text"),
            "label": Field("its class: text, a whole number or a boolean"),
        },
        prompts=(
            "{{ text }}\nLabel:",
            "Classify the text.\n\n{{ text }}\n\nLabel:",
            "Which label fits this text?\n\n{{ text }}\n\nLabel:",
            "Text: {{ text }}\nIts label:",
        ),
        completion=" {{ label }}",
    ),
    "Extract": Entry(
        purpose="a document, what is wanted of it, and what was found",
        format="PromptCompletion",
        fields={
            "document": Field("the text"),
            "wanted": Field("what to look for, in words or as a list of names"),
            "extracted": Field("what was found: text, or an object or list, written as JSON"),
        },
        prompts=(
            "{{ document }}\n\nExtract from the document: {{ wanted }}\n\nExtracted:",
            "Find the following in the text below: {{ wanted }}\n\n{{ document }}\n\nFound:",
            "Document:\n{{ document }}\n\nWanted: {{ wanted }}\nFound:",
        ),
        completion=" {{ extracted }}",
    ),
    "Question": Entry(
        purpose="a question and its answer",
        format="PromptCompletion",
        fields={"question": Field("the question"), "answer": Field("its answer")},
        prompts=(
            "Question: {{ question }}\nAnswer:",
            "{{ question }}\n\nAnswer:",
            "Answer the question.\n\n{{ question }}\n\nAnswer:",
            "Q: {{ question }}\nA:",
        ),
        completion=" {{ answer }}",
    ),
    "QuestionWithContext": Entry(
        purpose="a question, a text that holds the answer, and the answer",
        format="PromptCompletion",
        fields={
            "context": Field("the text that the answer follows from"),
            "question": Field("the question"),
            "answer": Field("its answer"),
        },
        prompts=(
            "{{ context }}\n\nQuestion: {{ question }}\nAnswer:",
            "Answer the question by the text.\n\nText: {{ context }}\n\n"
            "Question: {{ question }}\nAnswer:",
            "Question: {{ question }}\n\nThe answer is in this text:\n{{ context }}\n\nAnswer:",
            "Read this:\n{{ context }}\n\nNow answer: {{ question }}\n\nAnswer:",
        ),
        completion=" {{ answer }}",
    ),
    "Rewrite": Entry(
        purpose="a text and the same in other words",
        format="PromptCompletion",
        fields={
            "text": Field("the text"),
            "rewritten": Field("the text as it should be"),
            "manner": Field("how to write it, e.g. 'in plain words'", optional=True),
        },
        prompts=(
            "Rewrite the text{% if manner %} {{ manner }}{% endif %}.\n\n{{ text }}\n\nRewritten:",
            "{{ text }}\n\nWrite the text above anew{% if manner %}, {{ manner }}{% endif %}."
            "\n\nRewritten:",
            "Here is a text:\n{{ text }}\n\nSay the same{{ ' ' ~ manner if manner else"
            " ' in other words' }}.\n\nRewritten:",
        ),
        completion=" {{ rewritten }}",
    ),
    "Chat": Entry(
        purpose="a conversation, written by the model's chat template; every assistant turn is"
        " supervised",
        format="Messages",
        fields={
            "messages": Field("the list of turns"),
            "role": Field(f"role of the turn ({', '.join(CHAT_ROLES)})"),
            "content": Field("text of the turn"),
            "prompt": Field("of turns that are pairs: the user's text", optional=True),
            "response": Field("of turns that are pairs: the answer", optional=True),
            "system": Field("text of a system turn before the others", optional=True),
            "tools": Field("the tools that may be called, as JSON schemas", optional=True),
        },
    ),
}
