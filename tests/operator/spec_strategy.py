"""Valid specs of any shape: values for some fields of the models, kept if the models accept the
whole."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from operator_world import spec
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune_api import cluster
from finetune_api.base import InvalidSpec, Spelling
from finetune_api.spec import FineTuneJobSpec, parse_spec

QUANTITIES: Final = st.sampled_from(["1", "500m", "2Gi", "1.5Gi", "4", "1e3", "12k"])
QUALIFIED: Final = st.from_regex(
    r"([a-z]{1,20}\.example/)?[a-zA-Z][a-zA-Z0-9_.-]{0,40}z", fullmatch=True
)
TEXT: Final = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20
)
KUBERNETES: Final = {
    cluster.Quantity: QUANTITIES,
    cluster.QualifiedName: QUALIFIED,
    cluster.LabelValue: st.from_regex(r"([a-zA-Z0-9][a-zA-Z0-9_.-]{0,60})?[a-z]", fullmatch=True),
}
"""Types whose values Kubernetes restricts beyond the models: a child is refused with its words."""
OPAQUE: Final = {"podTemplate"}
"""Overrides of users, with tests of their own."""


def values(kind: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of an annotated type, as JSON."""
    for known, strategy in KUBERNETES.items():
        if kind == known or (get_args(known)[0] is kind and get_args(known)[1:] == metadata):
            return strategy
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        return st.one_of([values(a, metadata) for a in arguments if a is not type(None)])
    if origin is Literal:
        return st.sampled_from(arguments)
    low, high = _bounds(metadata)
    if origin is list:
        return st.lists(values(arguments[0]), min_size=low or 0, max_size=(low or 0) + 2)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(low if low is not None else -5, high if high is not None else 2**31 - 1)
    if kind is str:
        return _texts(metadata, low or 0, high)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return blocks(kind)
    return st.nothing()


def _texts(metadata: tuple[Any, ...], low: int, high: int | None) -> st.SearchStrategy[str]:
    patterns = [m for m in metadata if isinstance(m, Spelling)]
    if patterns:
        pattern = re.compile(patterns[0].pattern, re.ASCII)
        found = st.from_regex(pattern, alphabet=st.characters(codec="ascii"))
        return found.map(lambda t: t.rstrip("\n")).filter(
            lambda t: len(t) <= patterns[0].max_length
        )
    return TEXT.filter(lambda t: low <= len(t) <= (high or 20))


def _bounds(metadata: tuple[Any, ...]) -> tuple[int | None, int | None]:
    """Lower and upper bound, of a number or a length."""
    flat = [x for m in metadata for x in (m.metadata if isinstance(m, FieldInfo) else [m])]
    found = [
        next((getattr(m, name) for m in flat if getattr(m, name, None) is not None), None)
        for name in ("ge", "le")
    ]
    lengths = [
        next((getattr(m, name) for m in flat if getattr(m, name, None) is not None), None)
        for name in ("min_length", "max_length")
    ]
    return (found[0] if found[0] is not None else lengths[0],
            found[1] if found[1] is not None else lengths[1])  # fmt: skip


def blocks(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """A block with its required fields and up to three others."""
    fields = {
        field.alias or name: (
            field,
            st.deferred(lambda f=field: values(f.annotation, tuple(f.metadata))),
        )
        for name, field in model.model_fields.items()
        if (field.alias or name) not in OPAQUE
    }
    required = {name: s for name, (field, s) in fields.items() if field.is_required()}
    others = {name: s for name, (field, s) in fields.items() if not field.is_required()}

    @st.composite
    def block(draw: st.DrawFn) -> dict[str, Any]:
        names = (
            draw(st.lists(st.sampled_from(sorted(others)), max_size=3, unique=True))
            if others
            else []
        )
        return {n: draw(s) for n, s in {**required, **{n: others[n] for n in names}}.items()}

    return block()


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid spec: the operator tests' own with one to four of its fields changed."""
    made = spec()
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(FineTuneJobSpec.model_fields)))
        field = FineTuneJobSpec.model_fields[name]
        if name in ("managed_by", "suspend"):
            continue
        changed = {
            **made,
            field.alias or name: draw(values(field.annotation, tuple(field.metadata))),
        }
        try:
            found = parse_spec(changed)
        except InvalidSpec:
            continue
        if found.model.source is not None:  # a reference is resolved before children are made
            made = changed
    return made
