"""A run that may be killed at any time: ``python -m tests.killed FOLDER STEPS`` begins it, and the same command goes on with it.

It writes a letter into ``FOLDER/steps.txt`` for each step, and the weights into ``FOLDER/end.pt``.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.callbacks import ExactResume, FreezeSchedule, Phase
from tests.resume_matrix import RandomToy


class Counts(pl.Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_rank == 0:
            with self.file.open("a") as file:
                file.write("s")
        time.sleep(0.05)  # long enough for the kill to come among the steps


def main(folder: Path, steps: int) -> None:
    pl.seed_everything(5, verbose=False)
    net = RandomToy("OneCycleLR").double()
    phases = [
        Phase(["head.*"], steps=4),
        Phase(["*"], warmup_steps=4, steps=8),
        Phase(["head.*"], frozen_state="reset"),
    ]
    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=1, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
        max_steps=steps,
        callbacks=[FreezeSchedule(phases), ExactResume(), Counts(folder / "steps.txt"), keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, ckpt_path="last")
    if trainer.is_global_zero:
        torch.save(net.state_dict(), folder / "end.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
