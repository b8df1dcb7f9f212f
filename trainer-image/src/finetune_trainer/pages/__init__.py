"""Self-contained HTML pages: their common style and the loader of page templates.

Pages show records, names and answers of models, which are untrusted. All values are escaped, a
Content-Security-Policy forbids scripts, requests and any style but the page's own, and characters
that hide or reorder text are written out.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any, Final

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

STYLE_HASH: Final = "STYLE-HASH"
"""Stands for the hash of the page's style in the policy, which precedes every value."""

_HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
"""Control characters, and characters that hide or reorder others; not tab and line feed."""


class Page:
    """A page template."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def render(self, **values: Any) -> str:
        """Return the page as HTML, with the hash of its style in its policy."""
        text = self._template.render(**values)
        style = text[text.index("<style>") + len("<style>") : text.index("</style>")]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        return text.replace(STYLE_HASH, f"sha256-{digest}", 1)


def page(package: str, name: str) -> Page:
    """Load a page template, which extends ``page.html.j2`` (the common style).

    Args:
        package: package that contains the template.
        name: file name of the template.
    """
    rooms = [PackageLoader(room, ".") for room in (package, __name__)]
    environment = Environment(
        loader=ChoiceLoader(rooms),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Page(environment.get_template(name))


def _visible(value: Any) -> Any:
    """Write out hidden characters, as ⟨U+202E⟩."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value)
