"""The README's code runs as it stands, and its tables are the ones that the scripts wrote."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.toy import Toy, rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.DOTALL)[1]


@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_an_existing_project_train_it(monkeypatch, tmp_path):
    project = types.ModuleType("my_project")
    project.MyModule = Toy
    project.old_rows, project.old_test_rows = rows(20, seed=3), rows(20, seed=4)
    project.old_step = lambda module, batch: (module(batch[0]), batch[1])
    monkeypatch.setitem(sys.modules, "my_project", project)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in code("adopt").splitlines() if line.strip()]
    assert len(lines) <= 15
    namespace: dict = {"__name__": "train"}
    exec(compile("\n".join(lines), "README.md", "exec"), namespace)
    evaluation = next(found for found in namespace["callbacks"] if hasattr(found, "forgetting"))
    assert set(evaluation.forgetting) == {"old"}
    assert torch.equal(Toy().backbone[0].weight, project.MyModule().backbone[0].weight)


@pytest.mark.slow
def test_the_three_lines_classify_and_the_fourth_exports(suite_run, monkeypatch, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sentiment").symlink_to(suite_run)
    monkeypatch.chdir(tmp_path)
    assert len([line for line in code("classify").splitlines() if line]) == 3
    exec(compile(code("classify") + code("export"), "README.md", "exec"), {})
    assert re.fullmatch(r"\['(posi|nega)tive', '(posi|nega)tive'\]\n", capsys.readouterr().out)
    assert (tmp_path / "runs/sentiment/plain/model.safetensors").is_file()


@pytest.mark.parametrize("name", re.findall(r"<!-- table: (\w+) -->", README))
def test_the_tables_are_what_the_scripts_wrote(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("benchmark_readme", ROOT / "benchmarks" / "readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)[1]
    assert shown.strip() == script.table(name)
    assert shown.count("\n|") >= 4


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
