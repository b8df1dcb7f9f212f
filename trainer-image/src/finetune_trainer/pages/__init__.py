"""Self-contained HTML pages: their common style and the loader of page templates."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def page(package: str, name: str) -> Template:
    """Load a page template, which extends ``page.html.j2`` (the common style).

    Args:
        package: package that contains the template.
        name: file name of the template.
    """
    rooms = [PackageLoader(room, ".") for room in (package, __name__)]
    environment = Environment(
        loader=ChoiceLoader(rooms),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
