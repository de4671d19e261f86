"""A file is whole or not there."""

import pytest

from lightning_peft.files import write_atomic, write_text


def test_missing_folders_are_made_and_the_path_comes_back(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    assert write_text(path, "grün\n") == path
    assert path.read_bytes() == "grün\n".encode()


def test_the_writer_gets_a_draft_beside_the_place_with_the_same_suffix(tmp_path):
    drafts = []

    def write(draft):
        drafts.append(draft)
        draft.write_text("x")

    write_atomic(tmp_path / "picture.png", write)
    assert drafts[0].parent == tmp_path
    assert drafts[0].suffix == ".png"
    assert drafts[0] != tmp_path / "picture.png"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_fails_in_the_middle_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "note.txt"
    if before:
        path.write_text(before)

    def write(draft):
        draft.write_text("half of the te")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, write)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = write_text(tmp_path / "note.txt", "old")
    seen = []

    def write(draft):
        draft.write_text("new")
        seen.append(path.read_text())

    write_atomic(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_the_file(tmp_path):
    assert write_text(tmp_path / "note.txt", "x").stat().st_mode & 0o777 == 0o644
