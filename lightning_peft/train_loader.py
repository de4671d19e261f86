"""The training loader of a run, wherever it comes from: the only file that touches Lightning's source of loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource


class _Changed(_DataLoaderSource):
    """A source whose loader is changed each time Lightning asks for it."""

    def __init__(self, source: _DataLoaderSource, change: Callable[[Any], Any]) -> None:
        super().__init__(source.instance, source.name)
        self._source, self._change = source, change

    def dataloader(self) -> Any:
        return self._change(self._source.dataloader())


def change_train_loader(trainer: pl.Trainer, change: Callable[[Any], Any]) -> None:
    """Let a function change the training loaders of this fit, before Lightning puts a distributed sampler in.

    Call it in ``setup``. It acts on loaders of the module, of a datamodule, and on those passed to ``fit``; the next ``fit``
    begins without it.

    Args:
        trainer: The trainer, in a fit.
        change: Takes and returns what the hook or the caller of ``fit`` gave: a loader or a collection of them.
    """
    loop = cast("Any", trainer.fit_loop)
    loop._data_source = _Changed(loop._data_source, change)
