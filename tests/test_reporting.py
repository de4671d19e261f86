"""Tables, files and pictures hold what the rows hold."""

import csv
import json

import pytest

from lightning_peft.reporting import (
    finished_rows,
    format_value,
    plot_learned_forgotten,
    print_table,
    save_results,
    write_section,
)

ROWS = {
    "full": {"accuracy": 0.84213, "forgetting": 0.2, "code": 0.1, "seconds": 1834.2},
    "suite": {"accuracy": 0.85, "forgetting": -0.01, "code": 0.0, "parameters": 1234567},
}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.84213, "0.842"),
        (-0.0104, "-0.010"),
        (0.0, "0.000"),
        (1e-4, "0.0001"),
        (-2e-5, "-2e-05"),
        (99.94, "99.940"),
        (100.0, "100"),
        (-183.4, "-183"),
        (1834.2, "1,834"),
        (1234567, "1,234,567"),
        (True, "True"),
        ("full", "full"),
        (None, "None"),
    ],
)
def test_a_value_shows_as_a_reader_expects(value, text):
    assert format_value(value) == text


def test_a_table_has_a_line_per_measure_and_a_dash_where_a_value_is_missing(capsys):
    print_table("Results", {"accuracy": "learned", "parameters": "trainable"}, ROWS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].strip() == "Results"
    cells = [[word for word in line.split() if word[0].isalnum() or word == "-"] for line in lines]
    assert ["full", "suite"] in cells
    assert ["learned", "0.842", "0.850"] in cells
    assert ["trainable", "-", "1,234,567"] in cells


def test_json_gives_back_the_rows_and_what_they_are_about(tmp_path):
    save_results(tmp_path / "run", ROWS, {"seed": 3})
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"arms": ROWS, "about": {"seed": 3}}


def test_finished_rows_come_back_to_the_same_run_only(tmp_path):
    assert finished_rows(tmp_path, {"seed": 3}, owner="recipe") == {}
    save_results(tmp_path, ROWS, {"seed": 3})
    assert finished_rows(tmp_path, {"seed": 3}, owner="recipe") == ROWS
    with pytest.raises(
        ValueError, match=r"recipe: .*results.json comes from a run with \{'seed': 3\}, not \{'seed': 4\}; drop"
    ):
        finished_rows(tmp_path, {"seed": 4}, owner="recipe")


def test_a_row_that_says_its_arm_has_one_column_for_it(tmp_path):
    save_results(tmp_path, {"none, seed 0": {"arm": "none", "seed": 0}}, {})
    assert (tmp_path / "results.csv").read_text().splitlines() == ["arm,seed", '"none, seed 0",0']


def test_csv_has_a_column_for_every_key_and_a_line_for_every_row(tmp_path):
    save_results(tmp_path, ROWS, {})
    with (tmp_path / "results.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["arm", "accuracy", "forgetting", "code", "seconds", "parameters"]
    assert [line["arm"] for line in lines] == ["full", "suite"]
    assert float(lines[0]["accuracy"]) == 0.84213
    assert lines[0]["parameters"] == ""


def test_the_picture_is_a_png_that_grows_with_the_number_of_panels(tmp_path):
    widths = []
    for skills in ([("forgetting", "replayed")], [("forgetting", "replayed"), ("code", "never replayed")]):
        file = tmp_path / f"{len(skills)}.png"
        plot_learned_forgotten(file, ROWS, skills)
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        widths.append(int.from_bytes(data[16:20]))
    assert widths[1] == 2 * widths[0]


def test_a_part_of_a_page_takes_the_place_of_its_old_one(tmp_path):
    page = tmp_path / "page.md"
    for name, text in (("one", "first"), ("two", "other"), ("one", r"a \1 second")):
        write_section(page, name, text, heading="A page")
    told = "# A page\n\n<!-- one -->\na \\1 second\n<!-- end of one -->\n\n<!-- two -->\nother\n<!-- end of two -->\n"
    assert page.read_text() == told
