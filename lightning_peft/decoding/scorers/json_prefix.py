"""Read the beginning of a JSON document: a pushdown automaton over its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.decoding.scorers.json_schema import may_be, may_be_key, may_begin, may_grow

ALIVE, DEAD, COMPLETE = "alive", "dead", "complete"
"""Can become a document; cannot; is one (and may still grow, as a number does)."""

_SPACE = re.compile(r"[ \t\n\r]*")
_CHARACTERS = r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*'
_STRING = re.compile(f'"{_CHARACTERS}"')
_OPEN_STRING = re.compile(rf'("{_CHARACTERS})(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?\Z')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OPEN_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE](?:[+-]?[0-9]*))?)?|[eE](?:[+-]?[0-9]*))?)?")
_NUMERIC = re.compile(r"[-+.eE0-9]+")
_WORD = re.compile(r"[a-z]+")


@dataclass
class _Container:
    """An array or object that is open."""

    closing: str
    schema: Mapping[str, Any]
    keys: list[str] = field(default_factory=list)


class JSONPrefix:
    """A text, read as far as it can be a JSON document.

    Args:
        text: The text.
        schema: One that ``checked_schema`` passed.

    >>> [JSONPrefix(text, {}).standing() for text in ('{"a": [1, 2', "[1]", "[1]]", "-", "01")]
    ['alive', 'complete', 'dead', 'alive', 'dead']
    """

    def __init__(self, text: str, schema: Mapping[str, Any]) -> None:
        self.text = text
        self.schema = schema
        self.place = 0
        self.open: list[_Container] = []
        self.expects = "value"

    def standing(self) -> str:
        """Return whether the text is alive, dead or complete."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]  # matches everywhere
            if self.place == len(self.text):
                return COMPLETE if self.expects == "nothing" else ALIVE
            found = self._step(self.text[self.place])
            if found is not None:
                return found

    def _step(self, character: str) -> str | None:
        """Read one token; return a verdict where reading ends with it."""
        if self.open and character == self.open[-1].closing and self.expects in ("more", "key or end", "value or end"):
            return self._close()
        if self.expects.startswith("value"):
            return self._value(character)
        if self.expects.startswith("key"):
            return self._key(character)
        if self.expects == "colon":
            return self._sign(character, ":", "value")
        if self.expects == "more":
            return self._sign(character, ",", "key" if self.open[-1].closing == "}" else "value")
        return DEAD

    def _sign(self, character: str, wanted: str, then: str) -> str | None:
        self.place += 1
        self.expects = then
        return None if character == wanted else DEAD

    def _close(self) -> str | None:
        container = self.open.pop()
        self._ended(self.place + 1)
        return None if set(container.schema.get("required", ())) <= set(container.keys) else DEAD

    def _ended(self, place: int) -> None:
        self.place = place
        self.expects = "more" if self.open else "nothing"

    def _wanted(self) -> Mapping[str, Any]:
        """Return the schema of the value that comes next."""
        if not self.open:
            return self.schema
        container = self.open[-1]
        if container.closing == "]":
            found: Mapping[str, Any] = container.schema.get("items", {})
        else:
            found = container.schema.get("properties", {}).get(container.keys[-1], {})
        return found

    def _value(self, character: str) -> str | None:
        schema = self._wanted()
        if not may_begin(schema, character):
            return DEAD
        if character in "{[":
            if "enum" in schema or "const" in schema:
                return DEAD
            self.open.append(_Container("}" if character == "{" else "]", schema))
            self.place += 1
            self.expects = "key or end" if character == "{" else "value or end"
            return None
        if character == '"':
            return self._string(schema)
        return self._number(schema) if character in "-0123456789" else self._word(schema)

    def _string(self, schema: Mapping[str, Any]) -> str | None:
        whole = _STRING.match(self.text, self.place)
        if whole is not None:
            self._ended(whole.end())
            return None if may_be(schema, whole[0]) else DEAD
        begun = _OPEN_STRING.match(self.text, self.place)
        return ALIVE if begun is not None and may_grow(schema, _begun(begun[1])) else DEAD

    def _number(self, schema: Mapping[str, Any]) -> str | None:
        run = _NUMERIC.match(self.text, self.place)[0]  # type: ignore[index]  # begins with a digit or a minus
        good = _NUMBER.fullmatch(run) is not None and may_be(schema, run)
        self._ended(self.place + len(run))
        if self.place < len(self.text):
            return None if good else DEAD
        if _OPEN_NUMBER.fullmatch(run) is None:
            return DEAD
        return COMPLETE if good and not self.open else ALIVE

    def _word(self, schema: Mapping[str, Any]) -> str | None:
        match = _WORD.match(self.text, self.place)
        run = match[0] if match else "?"
        words = [word for word in ("true", "false", "null") if word.startswith(run) and may_be(schema, word)]
        if not words:
            return DEAD
        self._ended(self.place + len(run))
        if run == words[0]:
            return None
        return ALIVE if self.place == len(self.text) else DEAD

    def _key(self, character: str) -> str | None:
        container = self.open[-1]
        whole = _STRING.match(self.text, self.place) if character == '"' else None
        if whole is not None:
            container.keys.append(json.loads(whole[0]))
            self.place, self.expects = whole.end(), "colon"
            return None if may_be_key(container.schema, container.keys[-1], open_ended=False) else DEAD
        begun = _OPEN_STRING.match(self.text, self.place) if character == '"' else None
        if begun is None:
            return DEAD
        return ALIVE if may_be_key(container.schema, _begun(begun[1]), open_ended=True) else DEAD


def _begun(written: str) -> str:
    """Return the value of a string that is still open, without what is no character yet."""
    found: str = json.loads(written + '"')
    # An escaped half of a surrogate pair, whose other half may follow.
    return found[:-1] if "\ud800" <= found[-1:] <= "\udbff" else found
