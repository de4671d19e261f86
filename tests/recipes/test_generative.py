"""The parts of the recipe do what their formulas say, what is said follows the numbers, and a killed run goes on."""

import gzip
import itertools
import json
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

from lightning_peft.recipes import generative as recipe
from lightning_peft.recipes import generative_arms, generative_naive
from lightning_peft.recipes.generative_data import Images, read_idx, read_images
from lightning_peft.recipes.generative_models import (
    SIGMA,
    VAE,
    Autoencoder,
    Classifier,
    ConditionalVAE,
    LetterPairs,
    OneHot,
    divergence,
    spell,
)
from lightning_peft.recipes.generative_page import spread, summary, table
from lightning_peft.recipes.generative_train import blur, digits_and_others, hide_half
from lightning_peft.recipes.generative_verdicts import judged, means, verdicts

pytest.importorskip("sklearn", reason="needs the extra recipes")


def small(rows=60, side=8, classes=3):
    images = torch.rand(rows, 1, side, side)
    labels = torch.arange(rows) % classes
    return Images(images[10:], labels[10:], images[:10], labels[:10])


# --- data -------------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_no_row_is_in_both_parts():
    images = read_images("digits", 0, most=2000)
    assert (len(images.train), len(images.test), images.side, images.classes) == (1257, 540, 8, 10)
    shares = [torch.bincount(labels).double() / len(labels) for labels in (images.labels, images.test_labels)]
    assert torch.allclose(*shares, atol=2e-3)
    assert 0 <= float(images.train.min()) < float(images.train.max()) <= 1
    assert not torch.equal(read_images("digits", 1, most=2000).test, images.test)
    assert len(read_images("digits", 0, most=100).train) == 100


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_a_folder_of_idx_files_is_read_plain_or_compressed(tmp_path):
    train, labels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4), np.array([0, 1, 2], np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(train))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    images = read_images(str(tmp_path), 0, most=10)
    assert torch.equal(images.train[:, 0] * 255, torch.from_numpy(train).float())
    assert images.labels.tolist() == [0, 1, 2]
    assert len(images.test) == 2


def test_an_npz_file_is_read_with_and_without_a_split(tmp_path):
    pixels, labels = np.random.default_rng(0).random((40, 5, 5)), np.arange(40) % 2
    np.savez(tmp_path / "one.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "two.npz", x_train=pixels, y_train=labels, x_test=pixels[:4], y_test=labels[:4])
    assert len(read_images(str(tmp_path / "one.npz"), 0, most=99).test) == 12
    assert torch.equal(
        read_images(str(tmp_path / "two.npz"), 0, most=99).test[:, 0], torch.from_numpy(pixels[:4]).float()
    )


def test_sources_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="data='nothing' is neither 'digits', nor a folder"):
        read_images("nothing", 0, most=9)
    with pytest.raises(ValueError, match="has no file train-images-"):
        read_images(str(tmp_path), 0, most=9)
    np.savez(tmp_path / "odd.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['a'\]; it needs x_train"):
        read_images(str(tmp_path / "odd.npz"), 0, most=9)
    np.savez(tmp_path / "wide.npz", images=np.zeros((9, 2, 3)), labels=np.arange(9) % 2)
    with pytest.raises(ValueError, match=r"must be \(rows, side, side\)"):
        read_images(str(tmp_path / "wide.npz"), 0, most=99)
    (tmp_path / "raw").write_bytes(b"abcdefgh")
    with pytest.raises(ValueError, match="an IDX file of bytes begins with 0, 0, 8"):
        read_idx(tmp_path / "raw")


def test_resizing_keeps_rows_and_range():
    images = small().resized(14)
    assert images.train.shape == (50, 1, 14, 14)
    assert 0 <= float(images.train.min()) <= float(images.train.max()) <= 1


# --- models -----------------------------------------------------------------------------------------------------------


def logged(module):
    module.log = module.log_dict = lambda *_, **__: None
    return module


def test_the_divergence_is_torch_s():
    mean, log_variance = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    assert torch.allclose(divergence(mean, log_variance), expected, atol=1e-12)


def test_the_loss_of_a_vae_is_the_negative_elbo_but_for_a_constant():
    net, images = logged(VAE()).double(), torch.rand(5, 1, 8, 8).double()
    torch.manual_seed(3)
    loss = net.training_step([images], 0)
    torch.manual_seed(3)
    mean, log_variance = net.encoder(images.flatten(1)).chunk(2, 1)
    posterior = Normal(mean, (log_variance / 2).exp())
    latents = mean + posterior.scale * torch.randn_like(mean)
    likelihood = Normal(net.decode(latents), SIGMA).log_prob(images).sum((1, 2, 3))
    constant = -64 * math.log(SIGMA * math.sqrt(2 * math.pi))
    expected = -(likelihood - constant - kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_what_is_sampled_are_images_in_range():
    for module in (Autoencoder(latents=3), VAE(latents=2)):
        assert module.sample(4).shape == (4, 1, 8, 8)
    conditional = ConditionalVAE(OneHot(3), 3)
    found = conditional.sample(torch.tensor([0, 2]))
    assert found.shape == (2, 1, 8, 8)
    assert bool(((found >= 0) & (found <= 1)).all())


def test_a_conditional_vae_listens_to_its_condition():
    net, latents = ConditionalVAE(OneHot(3), 3), torch.randn(1, 8)
    first, second = (net.decode(latents, torch.tensor([kind])) for kind in (0, 1))
    assert not torch.equal(first, second)


def test_words_are_read_without_case_and_misspelled_ones_lie_near():
    vectors = LetterPairs(16)
    seven, upper, misspelled, other = vectors(spell(["seven", "SEVEN!", "seveen", "zoo"]))
    assert torch.equal(seven, upper)
    assert (seven - misspelled).norm() < (seven - other).norm()


@pytest.mark.parametrize("side", [8, 14, 28, 9])
def test_a_classifier_takes_every_size_and_has_64_features(side):
    net = Classifier(5, side)
    assert net.features(torch.rand(2, 1, side, side)).shape == (2, net.num_features)
    assert net(torch.rand(2, 1, side, side)).shape == (2, 5)


def test_a_half_is_hidden_and_a_blurred_image_keeps_its_mean():
    images = torch.rand(3, 1, 8, 8)
    assert not hide_half(images)[..., 4:].any()
    assert torch.equal(hide_half(images)[..., :4], images[..., :4])
    assert torch.allclose(blur(images).mean((2, 3)), images.mean((2, 3)), atol=1e-6)
    assert len(blur(images)[0].unique()) == 16


def test_the_detector_learns_from_as_many_others_as_real_images():
    images = small()
    found, labels = digits_and_others(images)
    assert labels.sum() == len(images.train) == len(found) / 2
    assert torch.equal(found[:50], images.train)
    shuffled = found[50 + 26 : 50 + 38].flatten(1)  # the third of four parts of 13, 13, 12 and 12
    assert torch.equal(shuffled.sort(1).values, images.train[26:38].flatten(1).sort(1).values)


# --- naive ways -------------------------------------------------------------------------------------------------------


def frozen(classes=3):
    torch.manual_seed(1)
    return Classifier(classes).eval().requires_grad_(False)


def test_ascent_raises_the_target_moves_no_weight_and_is_held_by_its_regularisers():
    net, start, wanted = frozen(), torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain, path = generative_naive.ascend(net, start, wanted, steps=40)
    near, _ = generative_naive.ascend(net, start, wanted, steps=40, near=1.0)
    smooth, _ = generative_naive.ascend(net, start, wanted, steps=40, smooth=0.3)
    rows = torch.arange(6)
    chances = [net(images).softmax(1)[rows, wanted] for images in (start, plain)]
    assert bool((chances[1] > chances[0]).all())
    assert (near - start).norm() < (plain - start).norm()
    assert smooth.diff(dim=2).abs().sum() < plain.diff(dim=2).abs().sum()
    assert len(path) == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_search_accepts_what_the_classifier_is_sure_of_and_gives_up():
    net = frozen()
    draws = torch.rand(8000, 1, 8, 8)
    top = net(draws).softmax(1).amax(1)
    threshold = float(top.quantile(0.9))
    parts = iter(draws.split(4000))
    accepted, drawn = generative_naive.search(lambda count: next(parts), net, threshold, 600, most=99_999)
    assert drawn == 8000
    assert torch.equal(accepted, draws[top > threshold])
    none, drawn = generative_naive.search(lambda count: draws[:count], net, 0.999999, 5, most=8000)
    assert (len(none), drawn) == (0, 8000)


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_the_least_draws_are_below_the_draws_that_were_counted(pixels):
    train = torch.rand(3, 1, 1, pixels)
    noise = torch.rand(200_000, pixels)
    share = float((torch.cdist(noise, train.flatten(1)).amin(1) <= 0.2).float().mean())
    least = generative_naive.least_draws(train, 0.2)
    assert 0 <= least <= math.log10(1 / share)
    assert least > math.log10(1 / share) - 1 - pixels / 2  # and no idle bound


def test_the_least_draws_grow_with_the_pixels():
    """Of a cube with n times the pixels the exponent is n times as large, less what the union over images costs."""
    found = [generative_naive.least_draws(torch.full((1, 1, side, side), 0.5), 0.1 * side) for side in (4, 8)]
    assert found[1] == pytest.approx(4 * found[0], rel=0.01)


# --- arms and what is said --------------------------------------------------------------------------------------------


def test_an_arm_makes_the_same_whatever_was_made_before():
    images = small()
    bench = generative_arms.Bench(images, {"classifier": frozen()}, 5, 0, 8000)
    first = generative_arms.make("uniform noise", bench).images
    generative_arms.make("pixel Gaussian", bench)
    assert torch.equal(generative_arms.make("uniform noise", bench).images, first)


def test_latents_are_drawn_from_where_they_say():
    latents = 3 + 2 * torch.randn(4000, 2)
    scaled, box, fitted, standard = (
        generative_arms.LATENTS[name](latents, 4000, 0) for name in ("scaled", "box", "GMM", "N(0, I)")
    )
    for draws in (scaled, fitted):
        assert torch.allclose(draws.mean(0), latents.mean(0), atol=0.2)
        assert torch.allclose(draws.std(0), latents.std(0), atol=0.2)
    assert bool((box >= latents.amin(0)).all() & (box <= latents.amax(0)).all())
    assert standard.mean().abs() < 0.1


def row(name, seed=0, **changes):
    numbers = dict.fromkeys(
        ("confidence", "sure", "agreement", "detector", "nearest", "recall", "density", "nearer", "conditional", "moved"), 0.5
    ) | {
        "fid": 9.0, "precision": 0.9, "coverage": 0.8, "images": 40, "acceptance": 0.1, "drawn": 400, "latent_std": 2.0, "kl": 1.0,
        "active": 2.0, "squared_error": 0.01, "neighbour_error": 0.02, "two_draws": 1.0, "misspelled": 0.7,
    }  # fmt: skip
    return {"name": name, "seed": seed, **numbers, **changes}


def every_arm(**changes):
    names = list(generative_arms.arms(small(classes=10)))
    return {
        f"{name}, seed {seed}": row(name, seed, **changes.get(name, {}))
        for name, seed in itertools.product(names, (0, 1))
    }


@pytest.mark.parametrize(
    ("precision", "recall", "coverage", "verdict"),
    [
        (0.9, 0.6, 0.8, "works"),
        (0.9, 0.6, 0.3, "works in part"),
        (0.2, 0.6, 0.8, "works in part"),
        (0.9, 0.01, 0.8, "works in part"),
        (0.0, 0.9, 0.8, "fails"),
        (0.9, 0.9, 0.01, "fails"),
        (math.nan, math.nan, math.nan, "makes nothing"),
    ],
)
def test_an_arm_is_judged_by_its_worst_measure(precision, recall, coverage, verdict):
    real = {"precision": 1.0, "recall": 1.0, "coverage": 0.8}
    assert judged({"precision": precision, "recall": recall, "coverage": coverage}, real) == verdict


def test_every_arm_has_its_sentence_with_its_own_numbers():
    rows = every_arm(**{"ascent from grey": {"detector": 0.125}, "noise, C > 0.9": {"precision": math.nan}})
    said = verdicts(rows)
    assert set(said) == {row["name"] for row in rows.values()} - {"real test images"}
    assert "calls 12.5% of them digits" in said["ascent from grey"]
    assert said["noise, C > 0.9"].endswith("makes nothing. Too few were accepted to measure.")
    assert not [sentence for sentence in said.values() if "{" in sentence or "nan" in sentence]


def test_the_correction_says_mostly_only_where_most_of_it_is_scale():
    def first(scaled):
        return summary(every_arm(**{"AE8, N(0, I)": {"fid": 109.0}, "AE8, scaled": {"fid": scaled}}))[0]

    assert "is mostly a matter of scale: FID 109 from N(0, I), 29.0 once" in first(29.0)
    assert ": 80% of the way" in first(29.0)
    assert "is only in part a matter of scale" in first(80.0)


def test_a_table_has_means_and_of_fid_the_range():
    rows = every_arm()
    rows["uniform noise, seed 1"]["fid"] = 29.0
    lines = {line[0]: line for line in table(rows).rows}
    assert lines["uniform noise"][6] == "19.0 (9.0-29.0)"
    assert means(rows)["uniform noise"]["fid"] == 19
    assert spread([0.0]) == "0.000"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": 0}, "'seeds': 0"), ({"rows": 20}, "'rows': 20"), ({"samples": 3}, "'samples': 3")],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"generative: .*{message}.* too small"):
        recipe.Generative(**options)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_short_run_ends_with_its_page_and_goes_on_after_a_kill(tmp_path, capsys):
    options = {"epochs": 2, "rows": 150, "draws": 2000, "samples": 160, "out": str(tmp_path / "out")}
    rows = recipe.run(recipe.Generative(**options))
    out = tmp_path / "out"
    page = (out / "generative.md").read_text()
    printed = capsys.readouterr().out
    assert rows["AE8, GMM, seed 0"]["images"] == 160
    assert rows["real test images, seed 0"]["images"] == 150  # no more are held out
    for part in ("FID", "AE8, GMM", "CVAE8, word", "10^", "--epochs 2"):
        assert part in page
    assert "AE8, N(0, I): " in printed
    assert str(tmp_path) not in page
    for name in (
        "samples",
        "metrics",
        "ascent",
        "accepted",
        "search",
        "latents",
        "reconstructions",
        "classes",
        "conditions",
    ):
        with Image.open(out / f"generative_{name}.png") as image:
            assert min(image.size) > 100
    assert list((out / "logs" / "vae8").glob("events*"))
    assert not list((out / "nets").glob("seed-0/.*"))

    kept = json.loads((out / "results.json").read_text())
    for gone in ("AE8, GMM, seed 0", "search 14 px, seed 0", "CVAE8, word, seed 0"):  # as if it had been killed there
        del kept["arms"][gone]
    (out / "results.json").write_text(json.dumps(kept))
    stamp = (out / "nets" / "seed-0" / "vae8.pt").stat().st_mtime_ns
    again = recipe.run(recipe.Generative(**options, resume=True))
    assert (out / "nets" / "seed-0" / "vae8.pt").stat().st_mtime_ns == stamp
    assert {name: str(found) for name, found in again.items()} == {name: str(found) for name, found in rows.items()}
    with pytest.raises(ValueError, match="drop --resume or use --out"):
        recipe.run(recipe.Generative(**{**options, "epochs": 3}, resume=True))
