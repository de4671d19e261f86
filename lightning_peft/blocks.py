"""Blocks of a network: what belongs together when parameters are shown, read off their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_peft.matching import match_names


def block_of(name: str) -> str:
    """Return the block of a parameter: its name up to the first number, or up to the second dot.

    >>> [block_of(f"net.{name}") for name in ("encoder.layer.3.output.dense.weight", "embeddings.norm.bias", "scale")]
    ['net.encoder.layer.3', 'net.embeddings', 'net']
    >>> block_of("head.weight"), block_of("temperature")
    ('head', 'temperature')
    """
    parts = name.split(".")
    modules = parts[:-1] or parts
    for count, part in enumerate(modules):
        if part.isdigit():
            return ".".join(modules[: count + 1])
    return ".".join(modules[:2])


def group_by_block(
    named: Iterable[tuple[str, Tensor]], blocks: Mapping[str, str] | None = None, *, owner: str = "group_by_block"
) -> dict[str, dict[str, Tensor]]:
    """Group parameters by block, in the order of the network.

    Args:
        named: Names and parameters, as ``module.named_parameters()`` gives them.
        blocks: Globs over parameter names by title; a parameter belongs to the first that matches, and one that none matches is
            left out. Unset, blocks are read off the names (:func:`block_of`).
        owner: Who asks, for messages.

    Raises:
        ValueError: For a glob that matches nothing.

    >>> named = [("net.0.weight", Tensor(2)), ("net.0.bias", Tensor(1)), ("head.weight", Tensor(1))]
    >>> {block: list(found) for block, found in group_by_block(named).items()}
    {'net.0': ['net.0.weight', 'net.0.bias'], 'head': ['head.weight']}
    """
    parameters = dict(named)
    if blocks is None:
        titles = {name: block_of(name) for name in parameters}
    else:
        titles = {}
        for title, glob in blocks.items():
            for name in match_names(list(parameters), [glob], owner=owner, kind="parameter"):
                titles.setdefault(name, title)
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        if name in titles:
            grouped.setdefault(titles[name], {})[name] = parameter
    return grouped
