"""A collated batch, taken apart into rows again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def batch_rows(batch: Any, owner: str = "batch_rows") -> list[Any]:
    """Take a batch apart into rows, as torch's default collate function would put them together.

    Tensors are split along their first dimension; of mappings, lists and tuples each entry is a column, so a row is a ``dict``
    or a ``tuple``. A list of only texts, or of only numbers, is a column itself.

    **The trap:** a list of tensors is taken for columns. A collate function that makes a list with one tensor per row has its
    batches refused or, where the counts agree by chance, taken apart the wrong way.

    Args:
        batch: What a loader gives.
        owner: Whose name an error begins with.

    Raises:
        ValueError: For what has no rows, and for columns of different length.

    >>> import torch
    >>> batch_rows({"text": ["a", "b"], "label": torch.tensor([0, 1])})
    [{'text': 'a', 'label': tensor(0)}, {'text': 'b', 'label': tensor(1)}]
    """
    return _split(batch, "batch", owner)


def _split(value: Any, where: str, owner: str) -> list[Any]:
    if isinstance(value, Tensor) and value.dim() > 0:
        return list(value.unbind())
    if isinstance(value, Mapping) and value:
        columns = {name: _split(found, f"{where}[{name!r}]", owner) for name, found in value.items()}
        _check_lengths({f"{where}[{name!r}]": len(column) for name, column in columns.items()}, owner)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if type(value) in {list, tuple} and value:
        if _is_column(value):
            return list(value)
        parts = [_split(found, f"{where}[{number}]", owner) for number, found in enumerate(value)]
        _check_lengths({f"{where}[{number}]": len(column) for number, column in enumerate(parts)}, owner)
        return list(zip(*parts, strict=True))
    raise ValueError(
        f"{owner}: {where} is {value!r:.200}, a {type(value).__name__}, which cannot be taken apart into rows. A batch may hold "
        "tensors with the rows along the first dimension, and texts or numbers in a list, in mappings, tuples and lists; for any "
        "other give the rows themselves: MemoryFill(buffer, rows=dataset)."
    )


def _is_column(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, str | bytes) for value in values) or all(
        type(value) in {bool, int, float} for value in values
    )


def _check_lengths(lengths: dict[str, int], owner: str) -> None:
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{where}: {length}" for where, length in lengths.items())
        raise ValueError(
            f"{owner}: the parts of a batch have different numbers of rows ({found:.300}), so it cannot be taken apart. Give the "
            "rows themselves: MemoryFill(buffer, rows=dataset)."
        )
