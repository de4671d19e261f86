"""The loaders of a fit, wherever they come from: the only file that touches Lightning's source of loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource

Change = Callable[[Any], Any]


class _Changed(_DataLoaderSource):
    """A source whose loader is changed each time Lightning asks for it."""

    def __init__(self, source: _DataLoaderSource) -> None:
        super().__init__(source.instance, source.name)
        self.of_rows: dict[str, Change] = {}
        self.of_loaders: dict[str, Change] = {}

    def dataloader(self) -> Any:
        loaders = super().dataloader()
        for change in (*self.of_rows.values(), *self.of_loaders.values()):
            loaders = change(loaders)
        return loaders


def change_train_loader(trainer: pl.Trainer, owner: str, change: Change, *, rows: bool) -> None:
    """Let a function change the training loaders of this fit, before Lightning puts a distributed sampler in.

    Call it in ``setup``. It acts on loaders of the module, of a datamodule, and on those passed to ``fit``.

    Args:
        trainer: The trainer, in a fit.
        owner: Whose change it is; an owner has one.
        change: Takes and returns what the hook or the caller of ``fit`` gave: a loader or a collection of them.
        rows: Whether it changes which rows come. Such changes are made before those that only watch the loader.
    """
    source = _changed(cast("Any", trainer.fit_loop))
    (source.of_rows if rows else source.of_loaders)[owner] = change


def change_validation_loader(trainer: pl.Trainer, owner: str, change: Change) -> None:
    """Let a function change the validation loaders of this fit; otherwise as :func:`change_train_loader`."""
    _changed(cast("Any", trainer.fit_loop).epoch_loop.val_loop).of_rows[owner] = change


def leave_loaders(trainer: pl.Trainer, owner: str) -> None:
    """Take an owner's changes back: the trainer may fit on without it."""
    fit = cast("Any", trainer.fit_loop)
    for source in (fit._data_source, fit.epoch_loop.val_loop._data_source):
        if isinstance(source, _Changed):
            source.of_rows.pop(owner, None)
            source.of_loaders.pop(owner, None)


def validation_loader(trainer: pl.Trainer) -> Any:
    """Return the validation loaders of a fit, made now if no validation has been yet; None without any."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        cast("Any", trainer.fit_loop).epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def _changed(loop: Any) -> _Changed:
    """Return a loop's source of loaders, as one that can be changed."""
    if not isinstance(loop._data_source, _Changed):
        loop._data_source = _Changed(loop._data_source)
    source: _Changed = loop._data_source
    return source
