"""Old tasks on the toy, and what they should give."""

import copy

import torch
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.callbacks import OldTask
from tests.toy import Toy, rows

OLD = rows(50, seed=9)


class Noisy(Toy):
    """Everything that a careless evaluation would disturb: dropout, running statistics, a frozen layer in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.backbone[4].eval().requires_grad_(False)
        self.modes: list[dict[str, bool]] = []

    def training_step(self, batch, batch_idx):
        self.modes.append({name: child.training for name, child in self.named_modules()})
        return super().training_step(batch, batch_idx)


def classify(module, batch):
    x, y = batch
    return module(x).argmax(1), y


def regress(module, batch):
    x, y = batch
    return module(x)[:, 1], y.to(x)


def accuracy(data=OLD, step=classify) -> OldTask:
    return OldTask(data, MulticlassAccuracy(num_classes=2, average="micro"), step)


def error(data=OLD) -> OldTask:
    return OldTask(data, MeanSquaredError(), regress)


def expected_accuracy(net: nn.Module) -> float:
    twin = copy.deepcopy(net).eval()
    x, y = OLD.tensors
    with torch.no_grad():
        return float((twin(x.to(next(twin.parameters()))).argmax(1) == y).double().mean())


def expected_error(net: nn.Module) -> float:
    twin = copy.deepcopy(net).eval().double()
    x, y = OLD.tensors
    with torch.no_grad():
        return float((twin(x.double())[:, 1] - y).square().mean())
