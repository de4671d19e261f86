"""Whether a text can still become a JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_peft.decoding.scorers.json_prefix import COMPLETE, DEAD, JSONPrefix
from lightning_peft.decoding.scorers.json_schema import checked_schema
from lightning_peft.decoding.scorers.text_scorer import PrefixScorer, Reads


class JSONViability(PrefixScorer):
    r"""Kill texts that can no longer become a JSON document (RFC 8259; ``NaN`` and ``Infinity`` are none).

    Args:
        schema: What the document must be, in a part of JSON Schema: ``type``, ``enum`` and ``const`` of plain values,
            ``properties``, ``required``, ``additionalProperties`` as a bool, ``items``. An ``integer`` is one that is written
            without point and exponent.
        reads: ``"completion"`` judges what was written alone.
        cache_size: How many answers are remembered.

    Raises:
        ValueError: For a keyword of JSON Schema that is not among these, an unknown type, or a schema that is no mapping.

    >>> scorer = JSONViability({"type": "object", "properties": {"age": {"type": "integer"}}, "additionalProperties": False})
    >>> scorer(['{"a', '{"b', '{"age": 4', '{"age": "']), scorer.finished(['{"age": 4}', "{"])
    (tensor([0., -inf, 0., -inf]), [True, False])
    """

    def __init__(
        self, schema: Mapping[str, Any] | None = None, *, reads: Reads = "completion", cache_size: int = 65_536
    ) -> None:
        super().__init__(reads=reads, cache_size=cache_size)
        self.schema = checked_schema(schema or {})

    @override
    def can_continue(self, text: str) -> bool:
        # Bytes of a character that was cut in two are decoded to U+FFFD, and may still become any character.
        return JSONPrefix(text.rstrip("\ufffd"), self.schema).standing() != DEAD

    @override
    def is_complete(self, text: str) -> bool:
        return JSONPrefix(text, self.schema).standing() == COMPLETE
