"""One tiny network and its rows, for tests in this process and in launched ones."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), (x.sum(1) > 0).long())


class Toy(pl.LightningModule):
    """A backbone and a head, as a user would write them."""

    def __init__(self, width: int = 8, lr: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        layers = [nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width)]
        self.backbone = nn.Sequential(*(layers if dropout else [layers[0], layers[1], layers[3]]))
        self.head = nn.Linear(width, 2)
        for parameter in self.backbone.parameters():  # "pretrained": the same for every instance
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trainable, lr=self.lr, momentum=0.9, weight_decay=0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(24, dtype=self.dtype), 6, shuffle=True)


class TwoOptimizers(pl.LightningModule):
    """Before a module: two optimizers step in each batch, so that the number of steps jumps by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        halves = list(self.parameters())[::2], list(self.parameters())[1::2]
        return [torch.optim.Adam(half, 1e-2) for half in halves]


class StepsTwice(TwoOptimizers, Toy): ...


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Batches:
    """The toy's rows in order, batches of six; the first ``skip`` batches of the first pass are left out.

    A plain loader begins an epoch anew when a run resumes in its middle: this one stands for a loader that goes on.
    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def __iter__(self):
        skip, self.skip = self.skip, 0  # at the first row, not when Lightning tries whether it can iterate
        yield from list(DataLoader(rows(24), 6))[skip:]

    def __len__(self) -> int:
        return 4

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
