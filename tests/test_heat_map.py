"""The picture shows each value where it belongs, and tells frozen blocks from silent ones."""

import numpy as np
import pytest

from lightning_peft.heat_map import draw_heat_map

VALUES = {
    "embeddings": [(2, 1e-3), (3, 1e-2)],  # frozen up to step 2
    "layer.0": [(0, 0.0), (1, 1e-4), (2, 1e-1), (3, float("inf"))],
    "head": [(0, 10.0), (1, 1.0), (2, 1.0), (3, 1.0)],
}


@pytest.fixture
def pixels():
    """The cells of the picture as it is drawn, by block from the bottom up and step: red, green, blue in 0 to 1."""
    figure = draw_heat_map(VALUES, title="Gradients", label="norm")
    figure.canvas.draw()
    panel = figure.axes[0]
    whole = np.asarray(figure.canvas.buffer_rgba())[:, :, :3] / 255
    across = panel.transData.transform([(column, row) for row in range(3) for column in range(4)])
    found = [whole[len(whole) - 1 - round(y), round(x)] for x, y in across]
    return np.array(found).reshape(3, 4, 3)


def test_cells_are_coloured_by_the_logarithm_of_their_value(pixels):
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    for (row, column), height in {(0, 2): 0.2, (0, 3): 0.4, (1, 1): 0.0, (1, 2): 0.6, (2, 0): 1.0, (2, 1): 0.8}.items():
        # From 1e-4, the lowest value, to 10, the highest one, in five decades.
        assert pixels[row, column] == pytest.approx(viridis(height)[:3], abs=0.03)


def test_frozen_and_infinite_cells_are_grey_and_zeros_are_white(pixels):
    for row, column in ((0, 0), (0, 1), (1, 3)):
        assert pixels[row, column] == pytest.approx([0.8] * 3, abs=0.01)
    assert pixels[1, 0] == pytest.approx([1.0] * 3, abs=0.01)


def test_blocks_stand_from_the_bottom_up_with_their_names_and_steps_below():
    panel, bar = draw_heat_map(VALUES, title="Gradients", label="norm").axes
    assert [text.get_text() for text in panel.get_yticklabels()] == list(VALUES)
    assert panel.get_ylim()[0] < panel.get_ylim()[1]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "1", "2", "3"]
    assert panel.get_title() == "Gradients (grey: frozen, white: exactly zero)"
    assert bar.get_ylabel() == "log10 of the norm"


def test_many_blocks_and_steps_are_labelled_sparsely():
    values = {f"layer.{number}": [(step, 1.0 + step) for step in range(0, 9000, 10)] for number in range(120)}
    figure = draw_heat_map(values, title="", label="")
    assert len(figure.axes[0].get_yticks()) == 40
    assert len(figure.axes[0].get_xticks()) == 12
    assert figure.axes[0].get_xticklabels()[1].get_text() == "750"
    assert figure.get_size_inches()[1] < 15


@pytest.mark.parametrize("values", [{"head": [(0, 1.0)]}, {"head": [(0, 0.0)]}, {"head": [(0, float("nan"))]}])
def test_one_value_or_none_that_has_a_logarithm_is_drawn_too(values):
    draw_heat_map(values, title="", label="").canvas.draw()
