"""The latents of a look are those of the rows, and the picture shows them."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_peft.callbacks import LatentPlane
from tests.callbacks.test_looks import Sketch
from tests.toy import rows


@pytest.mark.parametrize("given", [rows(20), DataLoader(rows(20), 7, shuffle=True)])
def test_the_latents_are_those_of_the_first_rows_in_their_order(given, fit):
    plane, net = LatentPlane(given, most=15, side=2), Sketch()
    fit(net, plane)
    with torch.no_grad():
        expected = net.eval().encode(rows(20).tensors[0][:15])
    assert torch.allclose(plane.latents, expected, atol=1e-6)


def test_each_look_stands_in_tensorboard_and_in_the_folder(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    plane = LatentPlane(rows(20), every_n_steps=2, side=2, folder=tmp_path / "seen")
    fit(Sketch(), plane, epochs=1, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [image.step for image in events.Images("generation/latents")] == [2, 4]
    assert sorted(file.name for file in (tmp_path / "seen").iterdir()) == ["latents-000002.png", "latents-000004.png"]


def test_training_and_held_out_rows_stand_side_by_side(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    given = {"train": rows(20), "held_out": rows(9)}
    planes = [LatentPlane(one, side=2, folder=tmp_path / "seen", name=name) for name, one in given.items()]
    fit(Sketch(), *planes, epochs=1, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert events.Tags()["images"] == ["generation/train/latents", "generation/held_out/latents"]
    assert all((tmp_path / "seen" / name / "latents-000004.png").exists() for name in given)
    assert [len(plane.latents) for plane in planes] == [20, 9]


def test_rows_without_labels_and_a_module_without_a_decoder_have_their_picture_too(fit):
    class Encoder(Sketch):
        decode = None

        def training_step(self, batch, batch_idx):
            return self.encode(batch[0]).square().mean()

    plane = LatentPlane([x for x, _ in rows(9)])
    fit(Encoder(), plane)
    assert plane.latents.shape == (9, 3)


def test_a_model_that_diverges_ends_no_training_by_being_looked_at(fit, tmp_path):
    class Diverging(Sketch):
        def encode(self, x):
            return torch.where(x[:, :1] < self.trainer.global_step - 1.5, torch.nan, super().encode(x))

        def training_step(self, batch, batch_idx):
            return super().encode(batch[0]).square().mean()

    trainer = fit(Diverging(), LatentPlane(rows(20), every_n_steps=1, side=2, folder=tmp_path / "seen"), epochs=2)
    assert trainer.global_step == 8
    assert 1 < len(list((tmp_path / "seen").iterdir())) < 8


@pytest.mark.parametrize("name", ["most", "side"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_what_is_no_number_to_draw_is_refused(name, value):
    with pytest.raises(ValueError, match=f"LatentPlane: {name}={value} must be a whole number of at least 1"):
        LatentPlane(rows(3), **{name: value})
