"""Pages for people: what all of them look like, each in one file of its own."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def page(package: str, name: str) -> Template:
    """The page template of a room; it extends ``page.html.j2``, which holds the common style.

    Args:
        package: room that the template lies in.
        name: its file.
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
