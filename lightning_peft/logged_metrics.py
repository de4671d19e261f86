"""What was logged so far: the values that other callbacks and schedulers look at, and the sums that an epoch's means are made of.

Lightning's checkpoints hold none of it, so a resumed epoch would log the mean of its rest. The only file that touches Lightning's
collection of results.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

_HOW = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)
_SUMS = ("value", "cumulated_batch_size")


def logged_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return this process's share of what was logged, as plain data.

    Values that are synced over a process group of their own are left out.
    """
    values = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
    results = trainer.fit_loop.epoch_loop._results
    sums = [
        _sums(one)
        for one in results.result_metrics
        if one.meta.on_epoch and not one.has_reset and not one.meta.sync.group
    ]
    return {"values": values, "sums": sums, "states": _states(trainer.lightning_module)}


def set_logged_metrics(trainer: pl.Trainer, logged: dict[str, Any], *, in_epoch: bool) -> None:
    """Go back to what :func:`logged_metrics` returned. Call it in ``on_train_start``.

    Args:
        trainer: In a fit that is resumed.
        logged: What the checkpoint kept.
        in_epoch: Whether the epoch goes on, so that its sums do.
    """
    connector: Any = trainer._logger_connector
    module, device = trainer.lightning_module, trainer.strategy.root_device
    connector._callback_metrics.update({name: value.to(device) for name, value in logged["values"].items()})
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name, (count, states) in logged["states"].items():
        if name not in metrics:
            continue
        metrics[name]._update_count, metrics[name]._computed = count, None
        for state, value in states.items():
            setattr(metrics[name], state, _moved(value, device))
    if not in_epoch:
        for kept in logged["sums"]:  # Lightning takes them back after the hooks of the epoch's end
            if (metric := metrics.get(kept["how"]["metric_attribute"])) is not None:
                metric.reset()
        return
    for kept in logged["sums"]:
        _log_again(trainer, kept, metrics, device)
    connector._first_loop_iter = True  # else the first batch would take the sums back


def _sums(one: Any) -> dict[str, Any]:
    how = {name: getattr(one.meta, name) for name in _HOW} | {"reduce_fx": one.meta.reduce_fx.__name__}
    sums = {name: getattr(one, name).cpu().clone() for name in _SUMS if one.is_tensor and hasattr(one, name)}
    sync = one.meta.sync
    return {
        "how": how | {"rank_zero_only": sync.rank_zero_only},
        "synced": sync.should,
        "sums": sums,
        "count": one._update_count,
    }


def _log_again(trainer: pl.Trainer, kept: dict[str, Any], metrics: dict[str, Metric], device: torch.device) -> None:
    """Log a value as it was, then put what it was the sum of in its place."""
    how, sums = kept["how"], kept["sums"]
    value = sums["value"].to(device) if sums else metrics.get(how["metric_attribute"])
    if value is None:
        return
    results: Any = trainer.fit_loop.epoch_loop._results
    results.log(**how, value=value, sync_dist_fn=trainer.strategy.reduce, batch_size=1)
    one = results[f"{how['fx']}.{how['name']}"]
    one.meta.sync.should, one._update_count, one._forward_cache = kept["synced"], kept["count"], None
    for name, tensor in sums.items():
        setattr(one, name, tensor.to(device))


def _states(module: nn.Module) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the states of torchmetrics objects that have counted something."""
    return {
        name: (
            metric._update_count,
            {state: _moved(getattr(metric, state), torch.device("cpu")) for state in metric._defaults},
        )
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and metric._update_count
    }


def _moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Copy a state, which is a tensor or a list of them."""
    if isinstance(value, list):
        return [one.detach().to(device, copy=True) for one in value]
    return value.detach().to(device, copy=True)
