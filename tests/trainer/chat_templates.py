"""Chat templates for the tests, in the shapes of common models: with tools and reasoning, and the
expected supervised text of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CALLS = """{% for c in m.tool_calls or [] %}<tool_call>\
{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>\
{% endfor %}"""

CHATML_TOOLS = (
    """{% if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}"""
    + CALLS
    + """<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

# Headers, an unconditional system turn, one call per turn; tool results have the role ipython.
HEADERS = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

{% if tools %}{% for t in tools %}{{ t | tojson }}
{% endfor %}{% endif %}<|eot_id|>{% for m in messages %}{% if m.role == 'tool' %}\
<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>{% elif m.tool_calls %}\
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call a turn') }}{% endif %}\
<|start_header_id|>assistant<|end_header_id|>

{{ {'name': m.tool_calls[0].function.name, 'parameters': m.tool_calls[0].function.arguments} \
| tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# The tools are written before the last question, so the text of earlier turns changes later. There
# is no generation prompt: an answer follows [/INST].
BRACKETS = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[TOOLS] {{ tools | tojson }}\
[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT] {{ m.content }}\
[/RESULT]{% elif m.role == 'system' %}{{ m.content }}{% elif m.tool_calls %}[CALLS] [\
{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}\
]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""

# Reasoning of answers before the last question is dropped, tool results share one user turn, and
# the last answer gets an empty thought if it has none.
REASONING = (
    """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}\
{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}\
<|im_start|>user{% endif %}
<result>{{ m.content }}</result>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}\
<|im_end|>
{% endif %}{% else %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning_content or '' }}\
</think>{% endif %}{{ m.content }}"""
    + CALLS
    + """<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

# Marks the answer by {% generation %}, without the empty thought before and the stop token after.
MARKED = (
    """{% if tools %}{{ tools | tojson }}
{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
<think></think>{% generation %}{{ m.content }}"""
    + CALLS
    + """{% endgeneration %}{{ '\\n' }}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

# Without a generation prompt, ends the conversation with a token that does not end a turn.
CLOSED = (
    """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}"""
    + CALLS
    + """<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% else %}{{ eos_token }}{% endif %}"""
)

# The same without line breaks; calls end in a special token too.
TIGHT = (
    """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\
<|start_header_id|>{{ m.content }}"""
    + CALLS
    + """{% if m.tool_calls %}<|end_header_id|>{% endif %}\
<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|start_header_id|>\
{% else %}{{ eos_token }}{% endif %}"""
)


def _plain_calls(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    texts = (json.dumps(call, ensure_ascii=False) for call in calls)
    return "".join(f"<tool_call>{text}</tool_call>" for text in texts)


def _chatml(message: dict[str, Any]) -> str:
    return f"{message.get('content') or ''}{_plain_calls(message)}<|im_end|>"


def _headers(message: dict[str, Any]) -> str:
    for call in message.get("tool_calls") or ():
        function = call["function"]
        said = {"name": function["name"], "parameters": function["arguments"]}
        return f"{json.dumps(said, ensure_ascii=False)}<|eot_id|>"
    return f"{message['content'].strip()}<|eot_id|>"


def _brackets(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    if calls:
        return f"[CALLS] {json.dumps(calls, ensure_ascii=False)}</s>"
    return f" {message['content']}</s>"


def _reasoning(message: dict[str, Any]) -> str:
    return f"<think>{message.get('reasoning_content') or ''}</think>{_chatml(message)}"


def _marked(message: dict[str, Any]) -> str:
    return _chatml(message).removesuffix("<|im_end|>") + "\n<|im_end|>"


def _tight(message: dict[str, Any]) -> str:
    if message.get("tool_calls"):
        return _chatml(message).replace("<|im_end|>", "<|end_header_id|><|im_end|>")
    return _chatml(message)


@dataclass(frozen=True)
class Shape:
    """A chat template with its expected supervised text."""

    template: str
    learned: Callable[[dict[str, Any]], str]
    """Returns the supervised text of an assistant's message."""
    calls: int = 3
    """Maximum calls of a message."""


SHAPES = {
    "chatml": Shape(CHATML_TOOLS, _chatml),
    "headers": Shape(HEADERS, _headers, calls=1),
    "brackets": Shape(BRACKETS, _brackets),
    "reasoning": Shape(REASONING, _reasoning),
    "marked": Shape(MARKED, _marked),
    "closed": Shape(CLOSED, _chatml),
    "tight": Shape(TIGHT, _tight),
}
