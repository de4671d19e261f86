"""The plane is scikit-learn's first two components; the grid lies over the points."""

import numpy as np
import pytest
import torch

from lightning_peft.latent_plane import draw_latents, plane_grid, principal_plane


def test_the_plane_is_that_of_scikit_learn_up_to_signs():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs the extra recipes")
    latents = torch.randn(60, 5) * torch.tensor([1.0, 4, 2, 0.5, 3]) + 7
    pca = decomposition.PCA(2).fit(latents.double().numpy())
    plane = principal_plane(latents)
    expected = np.abs(pca.transform(latents.double().numpy()))
    assert plane.project(latents).abs().numpy() == pytest.approx(expected, abs=1e-8)
    assert plane.explained == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-9)


def test_two_latents_stay_as_they_are():
    latents = torch.randn(9, 2)
    assert torch.equal(principal_plane(latents).project(latents), latents.double())


def test_signs_do_not_depend_on_the_order_of_rows():
    latents = torch.randn(30, 4)
    assert torch.allclose(principal_plane(latents).axes, principal_plane(latents.flip(0)).axes, atol=1e-9)


def test_lifted_places_project_back():
    plane, places = principal_plane(torch.randn(30, 4)), torch.randn(6, 2).double()
    assert torch.allclose(plane.project(plane.lift(places)), places, atol=1e-12)


def test_the_decoded_grid_reads_like_the_axes():
    """Left to right is rising x, top to bottom falling y: as matplotlib shows an image over an extent."""
    places = torch.tensor([[0.0, 10.0], [4.0, 30.0]])
    grid, extent = plane_grid(places, 2)
    assert extent == (0.0, 4.0, 10.0, 30.0)
    assert grid.tolist() == [[1, 25], [3, 25], [1, 15], [3, 15]]


def test_a_figure_has_a_panel_for_the_rows_and_one_for_the_decoded_plane():
    latents, labels = torch.randn(20, 3), torch.arange(20) % 4
    figure = draw_latents(latents, labels, lambda z: z.float()[:, :1].reshape(-1, 1, 1, 1), side=3)
    assert [len(axes.collections) for axes in figure.axes] == [4, 0]
    assert len(figure.axes[1].images) == 1
    assert len(draw_latents(latents, None, None).axes) == 1


def test_a_line_has_no_plane():
    with pytest.raises(ValueError, match=r"latents of shape \(9, 1\); a plane needs"):
        principal_plane(torch.randn(9, 1))
