"""A schedule can be written in YAML and on the command line: phases, plateaus, functions, presets."""

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_peft.callbacks import FreezeSchedule, Phase, Plateau
from tests.toy import Toy


def never(trainer, pl_module):
    return False


def schedule(monkeypatch, *options: str) -> FreezeSchedule:
    monkeypatch.setattr("sys.argv", ["train.py"])
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(
        Toy,
        args=["fit", "--trainer.accelerator=cpu", "--trainer.max_steps=3", *quiet, *options],
        save_config_callback=None,
    )
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, FreezeSchedule))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("callback", "phases"),
    [
        (
            """
    class_path: lightning_peft.callbacks.FreezeSchedule
    init_args:
      phases:
        - {train: [head.*], until: {monitor: loss, patience: 1, each: epoch}}
        - {train: ["*"], steps: 3, lr_scale: {backbone.*: 0.1}, warmup_steps: 2, frozen_state: reset}
        - {train: [head.*], frozen_dropout: false}""",
            [
                Phase(["head.*"], until=Plateau("loss", patience=1, each="epoch")),
                Phase(["*"], steps=3, lr_scale={"backbone.*": 0.1}, warmup_steps=2, frozen_state="reset"),
                Phase(["head.*"], frozen_dropout=False),
            ],
        ),
        (
            """
    class_path: lightning_peft.callbacks.FreezeSchedule.head_first
    init_args: {head: head, steps: 2}""",
            FreezeSchedule.head_first("head", steps=2).phases,
        ),
        (
            """
    class_path: lightning_peft.callbacks.FreezeSchedule.gradual
    init_args: {blocks: [head.*, backbone.2.*], epochs: 2}""",
            FreezeSchedule.gradual(["head.*", "backbone.2.*"], epochs=2).phases,
        ),
        (
            """
    class_path: lightning_peft.callbacks.FreezeSchedule
    init_args:
      phases: [{train: [head.*], until: tests.callbacks.test_schedule_from_yaml.never}, {train: ["*"]}]""",
            ["head.*", "*"],
        ),
    ],
    ids=["phases", "head_first", "gradual", "a function"],
)
def test_a_yaml_file_says_what_python_says(callback, phases, monkeypatch, tmp_path):
    (tmp_path / "schedule.yaml").write_text(f"trainer:\n  callbacks:{callback}\n")
    found = schedule(monkeypatch, "--config", str(tmp_path / "schedule.yaml")).phases
    if phases == ["head.*", "*"]:
        assert [phase.train for phase in found] == [["head.*"], ["*"]]
        assert found[0].until.__name__ == "never"
    else:
        assert found == phases


@pytest.mark.filterwarnings("ignore")
def test_a_command_line_says_what_python_says(monkeypatch):
    phases = '[{train: [head.*], steps: 1}, {train: ["*"], lr_scale: 0.5}]'
    options = ["--trainer.callbacks+=lightning_peft.callbacks.FreezeSchedule", f"--trainer.callbacks.phases={phases}"]
    assert schedule(monkeypatch, *options).phases == [Phase(["head.*"], steps=1), Phase(["*"], lr_scale=0.5)]
