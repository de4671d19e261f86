"""Modules that nobody here wrote, adapted with at most three changed lines: the trials of docs/adoption.md."""

import base64
import hashlib
import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest

from tests import adoption

ROOT = Path(__file__).parents[1]
IDS = [f"{trial.module}-{trial.technique}" for trial in adoption.TRIALS]
# The slowest are left to make test-all.
LARGE = {"LightningLSTM", "LightningTransformer", "NBeats"}
SIZED = [
    pytest.param(trial, marks=pytest.mark.large if trial.module in LARGE else pytest.mark.slow, id=name)
    for trial, name in zip(adoption.TRIALS, IDS, strict=True)
]


def test_the_trials_are_of_every_kind():
    kinds = {trial.kind for trial in adoption.TRIALS}
    assert len({trial.module for trial in adoption.TRIALS}) >= 5
    assert kinds >= {
        "image classifier",
        "sequence model",
        "forecaster (regression)",
        "manual optimization",
        "causal language model",
    }


@pytest.mark.parametrize("trial", adoption.TRIALS, ids=IDS)
def test_at_most_three_lines_of_a_script_change(trial):
    assert 1 <= trial.changed <= 3
    after = trial.after.strip().splitlines()
    kept = [line for line in trial.before.strip().splitlines() if line in after]
    assert len(after) == len(kept) + trial.changed


def test_a_line_counts_whether_it_is_new_or_other():
    trial = adoption.Trial("Net", "package", "kind", "nothing", dict, "a\nb\nc", "a\nB\nc\nd\ne")
    assert trial.changed == 3


@pytest.mark.filterwarnings("ignore")  # of packages that nobody here wrote
@pytest.mark.parametrize("trial", SIZED)
def test_the_new_task_is_learned_and_the_old_one_kept_better(trial):
    try:
        files = metadata.distribution(trial.package).files
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs {trial.package}")
    assert untouched(Path(inspect.getsourcefile(trial.prepare()[trial.module])), files)
    found = trial.run()
    new, *old = found.without

    def gain(name: str, scores: adoption.Scores) -> float:
        return (scores[name] - found.untrained[name]) * (1 if "accuracy" in name else -1)

    # A few steps of half the parameters or less: more than half of what the project's own way learns, and not nothing.
    assert gain(new, found.with_it) > 0.5 * max(gain(new, found.without), 0.1)
    for name in old:
        assert gain(name, found.without) < -0.5  # what the trial is about: unprotected, it is forgotten
        kept = {"ReplayMixing": 0.2, "LoRA": 0.8}[trial.technique]
        assert gain(name, found.with_it) > kept * gain(name, found.without)
    assert (found.trainable < 0.5) is (trial.technique == "LoRA")


def untouched(source: Path, files: list[metadata.PackagePath]) -> bool:
    """Compare a source file with the hash that its package was installed with."""
    (record,) = [file for file in files if Path(file.locate()).resolve() == source.resolve()]
    digest = hashlib.new(record.hash.mode, source.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == record.hash.value


def test_the_table_has_a_line_for_every_trial():
    text = (ROOT / "docs" / "adoption.md").read_text()
    assert text.startswith(adoption.HEADING)
    assert text.endswith(adoption.FOOT)
    lines = text.removeprefix(adoption.HEADING).removesuffix(adoption.FOOT).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    told = [[f"{t.module} ({t.package})", t.kind, t.technique, str(t.changed)] for t in adoption.TRIALS]
    assert [line[:4] for line in cells] == told
    assert all(re.search(r"\d → \S+ ± \S+ / ", line[4]) for line in cells)
