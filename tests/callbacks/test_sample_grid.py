"""The samples of a look are those of the module, and stand in TensorBoard and as files."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_peft.callbacks import SampleGrid
from tests.callbacks.test_looks import Sketch


def test_the_samples_are_those_of_the_last_weights_from_the_given_seed(fit):
    grid, net = SampleGrid(count=5, seed=11), Sketch()
    fit(net, grid)
    torch.manual_seed(11)
    with torch.no_grad():
        expected = net.eval().sample(5)
    assert torch.equal(grid.samples, expected)


def test_each_look_stands_in_tensorboard_and_in_the_folder(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    fit(Sketch(), SampleGrid(count=4, every_n_steps=2, folder=tmp_path / "seen"), epochs=1, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [image.step for image in events.Images("generation/samples")] == [2, 4]
    files = sorted((tmp_path / "seen").iterdir())
    assert [file.name for file in files] == ["samples-000002.png", "samples-000004.png"]
    with Image.open(files[0]) as image:
        assert image.size == (67, 67)  # two images of 2 x 2, each enlarged to 32, and lines


def test_grids_of_different_names_share_no_key_and_no_file(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    grids = [SampleGrid(count=4, seed=seed, folder=tmp_path / "seen", name=f"seed_{seed}") for seed in range(2)]
    fit(Sketch(), *grids, epochs=1, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert events.Tags()["images"] == ["generation/seed_0/samples", "generation/seed_1/samples"]
    first, second = ((tmp_path / "seen" / f"seed_{seed}" / "samples-000004.png").read_bytes() for seed in range(2))
    assert first != second


def test_any_function_may_draw(fit):
    grid = SampleGrid(lambda module, count: torch.full((count, 3, 2, 2), 0.25), count=2)
    fit(Sketch(), grid)
    assert torch.equal(grid.samples, torch.full((2, 3, 2, 2), 0.25))


@pytest.mark.parametrize("count", [0, 2.5, True])
def test_what_is_no_number_of_images_is_refused(count):
    with pytest.raises(ValueError, match=f"SampleGrid: count={count} must be a whole number of at least 1"):
        SampleGrid(count=count)
