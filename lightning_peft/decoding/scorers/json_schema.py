"""The part of JSON Schema that can be judged while a document is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

TYPES = {'"': ("string",), "{": ("object",), "[": ("array",), "t": ("boolean",), "f": ("boolean",), "n": ("null",)}
"""What a value can be, by its first character; any other begins a number."""

KNOWN = {"type", "enum", "const", "properties", "required", "additionalProperties", "items"}
WORDS = {"$schema", "$id", "title", "description", "default", "examples"}
"""Keywords that demand nothing."""


def checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema all of whose demands are known here.

    Raises:
        ValueError: Else.

    >>> checked_schema({"title": "Age", "type": "integer"})
    {'title': 'Age', 'type': 'integer'}
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"JSONViability: the schema {schema!r} must be a mapping; {{}} demands nothing.")
    types = {"number", "integer"}.union(*TYPES.values())
    if wrong := [one for one in _types(schema) if one not in types]:
        raise ValueError(f"JSONViability: type {wrong!r} is none of {sorted(types)}.")
    unknown = sorted(set(schema) - KNOWN - WORDS)
    if unknown or not isinstance(schema.get("additionalProperties", True), bool):
        what = unknown or ["additionalProperties with a schema"]
        raise ValueError(
            f"JSONViability: {what!r} cannot be judged here. Known are {sorted(KNOWN)}; leave the rest to a final scorer."
        )
    if any(isinstance(option, list | dict) for option in options(schema) or ()):
        raise ValueError(
            f"JSONViability: enum and const hold plain values here, not {options(schema)!r}. Use properties and items."
        )
    inside = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    for inner in inside:
        checked_schema(inner)
    return dict(schema)


def options(schema: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that ``enum`` or ``const`` leave, or ``None`` for all."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def may_begin(schema: Mapping[str, Any], character: str) -> bool:
    """Return whether a value may begin with a character."""
    kinds = TYPES.get(character, ("number", "integer"))
    wanted, allowed = _types(schema) or kinds, options(schema)
    if allowed is not None and kinds not in [TYPES.get(json.dumps(one)[0], ("number", "integer")) for one in allowed]:
        return False
    return any(kind in wanted for kind in kinds)


def may_be(schema: Mapping[str, Any], written: str) -> bool:
    """Return whether a plain value, as it is written, is one that the schema allows."""
    wanted = _types(schema)
    if (
        "integer" in wanted
        and "number" not in wanted
        and written[0] in "-0123456789"
        and not written.lstrip("-").isdigit()
    ):
        return False
    # Python refuses to read whole numbers of more than some thousand digits; decimals have no limit, and are equal to them.
    found, allowed = json.loads(written, parse_int=Decimal), options(schema)
    return allowed is None or any(found == one and isinstance(found, bool) == isinstance(one, bool) for one in allowed)


def may_grow(schema: Mapping[str, Any], begun: str) -> bool:
    """Return whether a string that is still open can become one that the schema allows."""
    allowed = options(schema)
    return allowed is None or any(isinstance(one, str) and one.startswith(begun) for one in allowed)


def may_be_key(schema: Mapping[str, Any], key: str, *, open_ended: bool) -> bool:
    """Return whether an object may have a key, or one that begins so."""
    if schema.get("additionalProperties", True):
        return True
    names = schema.get("properties", {})
    return any(name.startswith(key) for name in names) if open_ended else key in names


def _types(schema: Mapping[str, Any]) -> list[str]:
    """Return the types that a schema names, or none."""
    wanted = schema.get("type", [])
    return [wanted] if isinstance(wanted, str) else list(wanted)
