"""The packages that are listed, the packages on disk, and the links between them are the same."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_peft

ROOT = Path(__file__).parents[1]
LEVELS = {"recipes": 3, "callbacks": 2, "mixins": 1}


def packages() -> dict[str, Path]:
    found = {"lightning_peft": ROOT / "lightning_peft"}
    for init in [*(ROOT / "lightning_peft").glob("*/__init__.py"), *(ROOT / "lightning_peft").glob("*/*/__init__.py")]:
        parts = init.parent.relative_to(ROOT).parts
        found[".".join(parts)] = init.parent.resolve()
    for name in ("callbacks", "recipes"):
        found[f"lightning_peft.{name}"] = ROOT / name
    return found


def sources() -> list[Path]:
    return [file for folder in packages().values() for file in folder.glob("*.py")]


def level(module: str) -> int:
    parts = module.split(".")
    return LEVELS.get(parts[1], 0) if len(parts) > 1 else 0


def test_every_package_on_disk_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages())


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_the_links_lead_to_the_root_folders(name):
    link = ROOT / "lightning_peft" / name
    if not link.exists():
        pytest.skip("a checkout without links")
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_the_bare_names_refuse_to_be_imported(name):
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import lightning_peft.{name}, not {name}" in run.stderr


@pytest.mark.parametrize("name", ["lightning_peft", "lightning_peft.callbacks", "lightning_peft.recipes"])
def test_all_public_names_exist_and_are_sorted_nowhere_else(name):
    module = importlib.import_module(name)
    exported = {
        key for key, value in vars(module).items() if not key.startswith("_") and not hasattr(value, "__path__")
    }
    modules = {key for key, value in vars(module).items() if type(value).__name__ == "module"}
    assert set(module.__all__) - {"__version__"} == exported - modules


def test_imports_run_down_only():
    upward = []
    for package, folder in packages().items():
        for file in folder.glob("*.py"):
            here = level(f"{package}.{file.stem}")
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_peft."):
                    if file.parent.name != "lightning_peft" and level(node.module) > here:
                        upward.append(f"{file.relative_to(ROOT)} imports {node.module}")
                    recipe, part = (name.partition("_")[0] for name in (file.stem, node.module.rpartition(".")[2]))
                    sibling = level(node.module) == here == LEVELS["recipes"] and file.stem != "__init__"
                    # A long one has parts: sentiment_data. What the package itself exports are factories, for all.
                    if sibling and recipe != part and node.module != "lightning_peft.recipes":
                        upward.append(f"{file.relative_to(ROOT)} imports its sibling {node.module}")
    assert not upward


def test_no_module_imports_transformers_when_it_is_imported():
    at_import = [
        (file.name, node.lineno)
        for file in sources()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "transformers" in ast.dump(node)
    ]
    assert at_import == []


def test_every_source_file_says_what_it_is_for():
    assert [file for file in sources() if not ast.get_docstring(ast.parse(file.read_text()))] == []


def test_the_version_is_the_package_s():
    assert importlib.metadata.version("lightning-peft") == lightning_peft.__version__
