"""Every image is in its place."""

import pytest
import torch
from PIL import Image

from lightning_peft.image_grid import image_grid, save_image


def test_images_stand_row_by_row_and_small_ones_are_enlarged_unblurred():
    images = torch.arange(5).reshape(5, 1, 1, 1).expand(5, 1, 16, 16) / 10
    grid = image_grid(images, columns=3)
    assert grid.shape == (1, 2 * 33 + 1, 3 * 33 + 1)
    for number in range(5):
        top, left = 1 + 33 * (number // 3), 1 + 33 * (number % 3)
        assert torch.equal(grid[0, top : top + 32, left : left + 32], torch.full((32, 32), number / 10))
    assert grid[0, 40, 80] == 0.5  # the sixth place is empty


def test_an_image_is_neither_turned_nor_mirrored():
    image = torch.rand(40, 33)
    assert torch.equal(image_grid(image[None, None])[0, 1:41, 1:34], image)


def test_values_outside_are_cut_off_and_shapes_without_channels_taken():
    assert set(image_grid(torch.tensor([[[-1.0]], [[2.0]]])).unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 8, 8), (0, 1, 8, 8)])
def test_what_is_no_set_of_images_is_named(shape):
    with pytest.raises(ValueError, match="is no set of images"):
        image_grid(torch.zeros(shape))


def test_a_file_has_the_pixels(tmp_path):
    save_image(tmp_path / "a.png", torch.tensor([[[0.0, 1.0]]]))
    with Image.open(tmp_path / "a.png") as image:
        assert [image.getpixel((x, 0))[:3] for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
