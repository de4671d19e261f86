"""A project of the package pytorch_lightning is told what to import, before anything trains."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import LoRAMixin, ReplayMixin, adapted
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing, ZeroInitHead
from tests.toy import Toy, rows, weights

other = pytest.importorskip("pytorch_lightning")
SAID = "of the package pytorch_lightning.* from lightning.pytorch instead"


class Other(other.LightningModule):
    """The toy's like, of the other package."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(rows(24), 6)


def old_step(module, batch):
    return module.head(module.backbone(batch[0])), batch[1]


@pytest.mark.parametrize(
    "callback",
    [
        ZeroInitHead("head"),
        FreezeSchedule.head_first("head", steps=2),
        ReplayMixing(rows(20), ratio=0.2),
        ForgettingEvaluation({"old": OldTask(rows(20), MulticlassAccuracy(num_classes=2), old_step)}),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_its_trainer_is_refused_before_training(callback, tmp_path):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = other.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    net = Other()
    start = weights(net)
    with pytest.raises(TypeError, match=f"^{type(callback).__name__}: Trainer is a Trainer {SAID}"):
        trainer.fit(net)
    assert all(torch.equal(start[name], value) for name, value in weights(net).items())


@pytest.mark.parametrize(
    "adapt", [adapted, *(lambda cls, m=m: type("Net", (m, cls), {}) for m in (LoRAMixin, ReplayMixin))]
)
def test_its_modules_are_refused(adapt):
    with pytest.raises(TypeError, match=f"is a LightningModule {SAID}"):
        adapt(Other)
    assert adapt(Toy)
