"""The ways to compute a meta-step that ``maml.py`` compares."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_peft import MAMLMixin, MetaConfig
from lightning_peft.meta import Episode

RATE = 0.01
WAYS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "16 at a time": {"task_chunk": 16},
    "first order": {"second_order": False},
    "recompute": {"memory": "recompute"},
    "compiled": {"memory": "recompute", "compile": True},
    "one by one": {"task_batching": "loop"},
}


class Net(pl.LightningModule):
    """The two networks of the paper: 1-40-40-1 for sines, and four convolutions of 64 channels for characters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        if kind == "mlp":
            self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        else:
            blocks = [(1, 64), (64, 64), (64, 64), (64, 64)]
            layers = [
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b, track_running_stats=False), nn.ReLU()
                )
                for a, b in blocks
            ]
            self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) if self.kind == "mlp" else F.cross_entropy(outputs, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


class Meta(MAMLMixin, Net):
    """Ours."""


def rows(kind: str, tasks: int) -> Episode:
    torch.manual_seed(1)

    def side() -> tuple[Tensor, Tensor]:
        if kind == "mlp":
            return torch.randn(tasks, 10, 1), torch.randn(tasks, 10, 1)
        return torch.randn(tasks, 5, 1, 28, 28), torch.arange(5).repeat(tasks, 1)

    return Episode(side(), side())


def loop(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    named = dict(net.named_parameters())
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        total: Any = 0.0
        for i in range(len(sx)):
            fast = named
            for _ in range(steps):
                lost = net.loss(functional_call(net.net, _inside(fast), (sx[i],)), sy[i])
                grads = torch.autograd.grad(lost, list(fast.values()), create_graph=True)
                fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), grads, strict=True)}
            total = total + net.loss(functional_call(net.net, _inside(fast), (qx[i],)), qy[i])
        (total / len(sx)).backward()

    return run


def _inside(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): value for name, value in values.items()}


def with_higher(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    import higher  # noqa: PLC0415

    inner = torch.optim.SGD(net.parameters(), RATE)
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        for i in range(len(sx)):
            with higher.innerloop_ctx(net.net, inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(steps):
                    optimizer.step(net.loss(fast(sx[i]), sy[i]))
                (net.loss(fast(qx[i]), qy[i]) / len(sx)).backward()

    return run


def with_learn2learn(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    import learn2learn  # noqa: PLC0415

    maml = learn2learn.algorithms.MAML(net.net, lr=RATE, first_order=False)
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        total: Any = 0.0
        for i in range(len(sx)):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(net.loss(learner(sx[i]), sy[i]))
            total = total + net.loss(learner(qx[i]), qy[i])
        (total / len(sx)).backward()

    return run


def plain_vmap(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    """The same as stacked tasks in a few lines of torch: what ours may cost, and what it must not."""
    named = _inside(dict(net.named_parameters()))
    (sx, sy), (qx, qy) = batch[:2]
    losses = vmap(lambda p, x, y: net.loss(functional_call(net.net, p, (x,)), y))

    def run() -> None:
        fast = {name: p.expand(len(sx), *p.shape) for name, p in named.items()}
        for _ in range(steps):
            grads = torch.autograd.grad(losses(fast, sx, sy).sum(), list(fast.values()), create_graph=True)
            fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses(fast, qx, qy).mean().backward()

    return run


def by_hand(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    """The MLP's formula written out for all tasks, without modules or vmap: the limit of what stacked tasks could reach."""
    own = list(net.parameters())
    (sx, sy), (qx, qy) = batch[:2]

    def losses(p: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
            x = torch.baddbmm(bias[:, None], x, weight.mT).relu()
        return (torch.baddbmm(p[-1][:, None], x, p[-2].mT) - y).square().mean((1, 2))

    def run() -> None:
        fast = [p.expand(len(sx), *p.shape) for p in own]
        for _ in range(steps):
            grads = torch.autograd.grad(losses(fast, sx, sy).sum(), fast, create_graph=True)
            fast = list(torch._foreach_add(fast, grads, alpha=-RATE))
        losses(fast, qx, qy).mean().backward()

    return run


def joint(net: Net, batch: Episode) -> Callable[[], None]:
    (sx, sy), (qx, qy) = batch[:2]
    x, y = (torch.cat(parts).flatten(0, 1) for parts in ((sx, qx), (sy, qy)))

    def run() -> None:
        net.loss(net.net(x), y).backward()

    return run


def ours(kind: str, batch: Episode, steps: int, config: dict[str, Any]) -> Callable[[], None]:
    module = Meta(kind, meta=MetaConfig(inner_lr=RATE, adaptation_steps=steps, **config))

    def run() -> None:
        loss, _ = module.learner.meta_loss(batch, 0)
        loss.backward()

    return run


def arms(kind: str, tasks: int, steps: int, *, compiled: bool) -> dict[str, Callable[[], None]]:
    batch = rows(kind, tasks)
    found = {"loop": loop(Net(kind), batch, steps), "joint": joint(Net(kind), batch)}
    found["plain vmap"] = plain_vmap(Net(kind), batch, steps)
    if kind == "mlp":
        found["by hand"] = by_hand(Net(kind), batch, steps)
    for name, peer in (("higher", with_higher), ("learn2learn", with_learn2learn)):
        if importlib.util.find_spec(name):
            found[name] = peer(Net(kind), batch, steps)
    for name, config in WAYS.items():
        if (name != "compiled" or compiled) and config.get("task_chunk", 0) < tasks:
            found[name] = ours(kind, batch, steps, config)
    return found
