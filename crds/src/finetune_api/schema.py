"""Convert models to the structural schema that the API server enforces.

Pydantic generates JSON Schema; a CustomResourceDefinition takes a subset of OpenAPI v3 without
references, nullable unions or titles. ``structural`` converts one to the other and adds the
extensions of Kubernetes: CEL rules, integer-or-string, opaque objects. It refuses whatever the API
server would validate differently from pydantic.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from finetune_api.base import Model

Schema = dict[str, Any]

KNOWN_KEYS: Final = frozenset(
    {
        "type", "description", "properties", "required", "additionalProperties", "items", "enum",
        "default", "pattern", "format", "minimum", "maximum", "minLength", "maxLength", "minItems",
        "maxItems", "maxProperties", "x-kubernetes-validations",
        "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    }
)  # fmt: skip
"""Keys with the same meaning for pydantic and the API server; any other key is refused."""

BOUND_OF: Final = {"string": "maxLength", "array": "maxItems"}
"""Required bound by type: the API server estimates the cost of CEL rules from them."""


def structural(model: type[Model], *, root: str, defaults: bool = True) -> Schema:
    """Return the structural schema of a model.

    Args:
        root: name of the model in messages (``spec``).
        defaults: whether to include defaults; a status has none, because it holds only observed
            values.

    Raises:
        ValueError: if a field cannot be expressed on the API server; the message names it.
    """
    raw = model.model_json_schema(by_alias=True, schema_generator=_Generator)
    schema = _inline(raw, raw.get("$defs", {}))
    schema.pop("$defs", None)
    schema.pop("default", None)
    return _checked(schema, root, defaults)


class _Generator(GenerateJsonSchema):
    """Pydantic's generator with changes for optional fields, defaults of blocks, and rules."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        result = self.generate_inner(schema["schema"])
        default = self.get_default_value(schema)
        if isinstance(default, Model):
            # In full: the API server runs a block's rules before it defaults the block's fields.
            result = {**result, "default": default.to_json()}
        elif default is not None:
            result = {**result, "default": default}
        return result

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        result = super().model_schema(schema)
        model = schema["cls"]
        if issubclass(model, Model) and model.RULES:
            result["x-kubernetes-validations"] = [
                {
                    "rule": rule.cel,
                    "message": rule.message,
                    "messageExpression": rule.cel_message(),
                }
                for rule in model.RULES
            ]
        return result

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _inline(node: Any, definitions: Schema) -> Any:
    """Replace every reference in a node by its target; keys next to the reference win."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return {key: _inline(value, definitions) for key, value in node.items() if key != "$defs"}


def _checked(node: Schema, path: str, defaults: bool) -> Schema:
    """Convert a node and its children to the API server's schema dialect."""
    node = {key: value for key, value in node.items() if key != "title"}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if not defaults:
        node.pop("default", None)
    if node.get("x-kubernetes-int-or-string"):
        node.pop("type")
    if "propertyNames" in node:
        node["x-kubernetes-validations"] = _key_rules(node.pop("propertyNames"))
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    _refuse_unknown(node, path)
    _refuse_unbounded(node, path)
    if "properties" in node:
        node.pop("additionalProperties", None)
        node["properties"] = {
            name: _checked(child, f"{path}.{name}", defaults)
            for name, child in node["properties"].items()
        }
    elif node.get("additionalProperties") is True:
        node.pop("additionalProperties")
        node["x-kubernetes-preserve-unknown-fields"] = True
    elif "additionalProperties" in node:
        node["additionalProperties"] = _checked(node["additionalProperties"], f"{path}.*", defaults)
    if "items" in node:
        node["items"] = _checked(node["items"], f"{path}[]", defaults)
    return {key: node[key] for key in sorted(node, key=_run_spec)}


def _key_rules(names: Schema) -> list[Schema]:
    """Return the CEL rule that bounds the keys of a map; a structural schema cannot."""
    least, most = names.get("minLength", 0), names["maxLength"]
    return [
        {
            "rule": f"self.all(key, key.size() >= {least} && key.size() <= {most})",
            "message": f"keys must have {least} to {most} characters",
        }
    ]


def _refuse_unknown(node: Schema, path: str) -> None:
    unknown = sorted(node.keys() - KNOWN_KEYS)
    if unknown:
        raise ValueError(
            f"{path}: the API server does not know {', '.join(unknown)}; use inclusive bounds,"
            " enumerations, patterns, or a Rule"
        )


def _refuse_unbounded(node: Schema, path: str) -> None:
    bound = BOUND_OF.get(node.get("type", ""))
    free = "enum" in node or node.get("format") == "date-time"
    if bound and bound not in node and not free:
        raise ValueError(f"{path}: give it {bound}, or CEL rules go over their cost budget")
    if isinstance(node.get("additionalProperties"), dict) and "maxProperties" not in node:
        raise ValueError(f"{path}: give it maxProperties, or CEL rules go over their cost budget")


def _run_spec(key: str) -> tuple[int, str]:
    """Sort key: description, type, default and enum first, then alphabetically."""
    first = ("description", "type", "default", "enum")
    return (first.index(key) if key in first else len(first), key)
