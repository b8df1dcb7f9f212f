"""Generate docs/reference.md, the reference of the whole API, from the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune_api import failures, identity, meanings
from finetune_api.classes import field_class
from finetune_api.crd import DESCRIPTION
from finetune_api.names import API_VERSION, FINAL_EXIT_CODES, KIND, PLURAL, SECRET_KEYS
from finetune_api.schema import Schema, structural
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

GENERATED = "<!-- Generated from the models in crds/ by `make generate`: edit those. -->"

CHANGES = """\
Effect of a change of a field on a run that has begun:

- **Live**: the change is applied directly.
- **Resume**: a new gang continues the same run from its last checkpoint.
- **NewRun**: the current run is stopped with its state saved, and the next run begins. Earlier runs
  are kept in `status.history` and in object storage.

Numbers with a fraction are strings (`"2e-4"`). Lists and fields without a default are optional
unless they are marked required."""


def reference() -> str:
    """Return the text of the page."""
    parts = [
        GENERATED,
        f"# {KIND} reference",
        f"`{API_VERSION}`, `kubectl get {PLURAL}`. {DESCRIPTION}",
        "## spec",
        CHANGES,
        *_blocks(structural(FineTuneJobSpec, root="spec"), "spec", {}),
        "## status",
        *_blocks(structural(FineTuneJobStatus, root="status", defaults=False), "status", {}),
        *_words(),
        *_credentials(),
        *_layout(),
    ]
    return "\n\n".join(parts) + "\n"


# --- fields --------------------------------------------------------------------------------------


def _blocks(schema: Schema, path: str, seen: dict[str, str]) -> Iterator[str]:
    """Yield a section for the block at a path, then one for each block below it; ``seen`` maps the
    content of blocks already on the page to their paths."""
    if path.count("."):
        yield f"### {path}"
    yield schema["description"]
    key = json.dumps([schema["properties"], _class(schema, path)])
    first = seen.setdefault(key, path)
    if first != path:
        yield f"Same fields as [{first}](#{_anchor(first)})."
        return
    yield _table(schema, path)
    rules = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    if rules:
        yield "Rules:\n\n" + "\n".join(f"- {_cell(rule)}." for rule in rules)
    for name, child in schema["properties"].items():
        if "properties" in child:
            yield from _blocks(child, f"{path}.{name}", seen)
        elif "properties" in child.get("items", {}):
            yield from _blocks(child["items"], f"{path}.{name}[]", seen)


def _table(schema: Schema, path: str) -> str:
    of_spec = path.startswith("spec")
    head = ["Field", "Type", "Default", "Change", "Description"]
    if not of_spec:
        head = ["Field", "Type", "Description"]
    rows = [head, ["---"] * len(head)]
    for name, child in schema["properties"].items():
        required = of_spec and name in schema.get("required", ())
        cells = [f"`{name}`", _type(child, f"{path}.{name}")]
        if of_spec:
            cells += ["**required**" if required else _default(child)]
            cells += [_class(child, f"{path}.{name}")]
        rows.append([*cells, _cell(child.get("description", ""))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _class(child: Schema, path: str) -> str:
    """Return the class of a spec field, or of a block whose fields all have the same class; "" for
    status."""
    if not path.startswith("spec"):
        return ""
    dotted = path.removeprefix("spec").removeprefix(".").replace("[]", "")
    found = {field_class(leaf) for leaf in leaves(child, dotted)}
    return found.pop() if len(found) == 1 else "see below"


def leaves(schema: Schema, path: str) -> Iterator[str]:
    """Yield the dotted paths of the leaf fields at and below a node; a list counts as its items."""
    schema = schema.get("items", schema)
    if "properties" not in schema:
        yield path
        return
    for name, child in schema["properties"].items():
        yield from leaves(child, f"{path}.{name}" if path else name)


def _type(node: Schema, path: str) -> str:
    if "properties" in node:
        return f"[block](#{_anchor(path)})"
    if "properties" in node.get("items", {}):
        return f"list of {_count(node, 'Items')}[blocks](#{_anchor(path + '[]')})"
    if "items" in node:
        return f"list of {_count(node, 'Items')}{_type(node['items'], path)}"
    if "additionalProperties" in node:
        return f"map of {_type(node['additionalProperties'], path)}"
    if node.get("x-kubernetes-preserve-unknown-fields"):
        return "object"
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    if node["type"] == "integer":
        return f"integer{_range(node)}"
    if node.get("format") == "date-time":
        return "time"
    for rule in node.get("x-kubernetes-validations", []):
        return _cell(f"string: {rule['message'].removeprefix('must be ')}")
    limit = f", at most {node['maxLength']:,} characters" if "maxLength" in node else ""
    return f"{node['type']}{limit}"


def _range(node: Schema) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    if most is not None and most < 2_147_483_647:
        return f", {least:,} to {most:,}"
    return "" if least is None else f", at least {least:,}"


def _count(node: Schema, unit: str) -> str:
    least, most = node.get(f"min{unit}"), node.get(f"max{unit}")
    if least is None:
        return f"at most {most} " if most else ""
    return f"{least} to {most} "


def _default(node: Schema) -> str:
    if "properties" in node or "default" not in node:
        return ""
    return f"`{_cell(json.dumps(node['default']))}`"


def _anchor(path: str) -> str:
    """Return a heading's anchor as common Markdown renderers form it."""
    return "".join(c for c in path.lower() if c.isalnum() or c in "-_ ").replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- words and addresses -------------------------------------------------------------------------


def _words() -> Iterator[str]:
    yield "## Conditions"
    yield _rows(["Type", "True means"], ([f"`{k}`", v] for k, v in meanings.CONDITIONS.items()))
    yield (
        "Reasons of conditions. After a failure, `Failed`, `Ready` and `Stalled` carry the reason"
        " of `status.failure`."
    )
    yield _rows(["Reason", "Meaning"], ([f"`{k}`", v] for k, v in meanings.REASONS.items()))
    yield "## Phases"
    yield (
        "For display; scripts should wait for conditions: `kubectl wait --for=condition=Complete`."
    )
    yield _rows(["Phase", "Meaning"], ([f"`{k}`", v] for k, v in meanings.PHASES.items()))
    yield from _failures()


def _failures() -> Iterator[str]:
    yield "## Failure classes"
    yield "Values of `status.failure.class` and their remedies:"
    classes = ([f"`{k}`", *v] for k, v in failures.CLASSES.items())
    yield _rows(["Class", "Cause", "Remedy"], classes)
    yield "## Failures"
    yield (
        "How each reason is recognized, and what is done. *Fault*: whether an incident of a gang"
        " counts against `failurePolicy.maxRestarts`."
    )
    yield _rows(["Action", "Meaning"], ([f"`{k}`", v] for k, v in failures.ACTIONS.items()))
    head = ["Class", "Reasons", "Recognized by", "Action", "Fault"]
    yield _rows(head, map(_failure_row, failures.FAILURES))
    yield "## Exit codes of the trainer's containers"
    codes = (
        [str(int(code)), row.failure_class, "no" if int(code) in FINAL_EXIT_CODES else "yes"]
        for code, row in failures.exit_codes()
    )
    yield _rows(["Code", "Class", "Retried"], [["0", "The stage is done.", "no"], *codes])


def _failure_row(row: failures.FailureRow) -> list[str]:
    action = f"in place, then {row.action}" if row.in_place else row.action
    fault = "–" if row.action in ("End", "Wait") else "yes" if row.counts else "no"
    reasons = ", ".join(f"`{reason}`" for reason in row.reasons)
    return [row.failure_class, reasons, row.recognized_by, action, fault]


def _credentials() -> Iterator[str]:
    yield "## Keys of a storage Secret"
    yield "The Secret that `secretRef` names, in the namespace of the job:"
    keys = ([f"`{k}`", "yes" if needed else "no"] for k, needed in SECRET_KEYS.items())
    yield _rows(["Key", "Required"], keys)


def _layout() -> Iterator[str]:
    prefixes = {
        "data": identity.data_uri("<workspace>", "<digest>"),
        "workspace": "<workspace>",
        "run": identity.run_uri("<workspace>", "<job>", "<run>"),
        "output": identity.output_uri("<destination>", "<run>"),
    }
    yield "## Layout of object storage"
    yield (
        "`<workspace>` is `spec.storage.workspace`, `<destination>` is `spec.output.destination`,"
        " `<run>` is `status.run.id`. `<destination>/latest.json` names the newest complete run."
    )
    for kind, files in meanings.STORAGE_LAYOUT:
        rows = ([f"`{prefixes[kind]}/{name}`", meaning] for name, meaning in files)
        yield _rows(["Address", "Content"], rows)


def _rows(head: list[str], rows: Any) -> str:
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
