"""One more base class is enough: attach, train, save, load, resume, command line."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import (
    AdapterMixin,
    FullFinetune,
    FullFinetuneMixin,
    LinearProbe,
    LinearProbeMixin,
    LoRA,
    LoRAMixin,
)
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.freezing import trainable_names
from lightning_peft.version import __version__
from tests.toy import Batches, Toy, rows, same, weights


class LoRAToy(LoRAMixin, Toy):
    pass


class SavingToy(Toy):
    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.save_hyperparameters()


class SavingLoRAToy(LoRAMixin, SavingToy):
    pass


class LateToy(Toy):
    """Builds its network in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        del self.backbone

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            self.backbone = Toy().backbone


class LateLoRAToy(LoRAMixin, LateToy):
    pass


def lora() -> LoRA:
    return LoRA(rank=2)


@pytest.mark.parametrize("kind", [LoRAToy, SavingLoRAToy, LateLoRAToy])
def test_the_mixin_alone_freezes_the_backbone_and_trains_the_rest(kind, fit):
    net = kind(adapter=lora())
    fit(net)
    lora_names = [f"backbone.{i}.adapters.default.lora_{m}" for i in (0, 2) for m in "AB"]
    assert sorted(trainable_names(net)) == sorted([*lora_names, "head.weight", "head.bias"])
    pretrained = Toy().backbone
    for i in (0, 2):
        assert torch.equal(net.backbone[i].weight, pretrained[i].weight)
        assert net.backbone[i].adapters["default"].lora_B.abs().max() > 0


def test_attaching_twice_is_attaching_once():
    net = LoRAToy(adapter=lora())
    net.configure_model()
    before = weights(net)
    net.configure_model()
    assert same(weights(net), before)


def test_a_missing_backbone_is_named_with_what_is_near():
    with pytest.raises(ValueError, match="backbone='bacbone' is none of its modules. Nearest: backbone"):
        LoRAToy(adapter=lora(), backbone="bacbone").configure_model()


def test_bases_in_the_wrong_order_are_refused():
    with pytest.raises(TypeError, match=r"Write class Wrong\(AdapterMixin, Toy\)"):

        class Wrong(Toy, LoRAMixin):
            pass


def test_something_else_than_an_adapter_is_refused():
    with pytest.raises(TypeError, match="adapter=8 must be an Adapter"):
        LoRAToy(adapter=8)


class ProbedToy(LinearProbeMixin, Toy):
    pass


def test_a_probed_backbone_stays_in_eval_mode_and_still(fit):
    net = ProbedToy(dropout=0.5)
    before = weights(net.backbone)
    modes = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append((pl_module.training, pl_module.backbone.training, pl_module.backbone[2].training))

    fit(net, Watch())
    assert set(modes) == {(True, False, False)}
    assert same(weights(net.backbone), before)
    assert trainable_names(net) == ["head.weight", "head.bias"]


def test_full_finetuning_moves_everything(fit):
    class FullToy(FullFinetuneMixin, Toy):
        pass

    net = FullToy()
    before = weights(net)
    fit(net)
    assert all(not torch.equal(value, before[name]) for name, value in weights(net).items())


def saved(net, fit, tmp_path, **options):
    trainer = fit(net, **options)
    path = tmp_path / "net.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_holds_what_trains_and_plain_data(fit, tmp_path):
    net = LoRAToy(adapter=lora())
    checkpoint = torch.load(saved(net, fit, tmp_path), weights_only=True)
    assert sorted(checkpoint["state_dict"]) == sorted(trainable_names(net))
    record = checkpoint["lightning_peft"]
    assert record["adapters"] == {"default": lora().to_plain()}
    assert (record["format"], record["version"]) == (2, __version__)


@pytest.mark.parametrize("kind", [LoRAToy, SavingLoRAToy, LateLoRAToy])
def test_load_from_checkpoint_rebuilds_the_adapter_by_itself(kind, fit, tmp_path):
    net = kind(adapter=LoRA(rank=3, targets=["2"]))
    path = saved(net, fit, tmp_path)
    again = kind.load_from_checkpoint(path, weights_only=True)
    assert again.adapter.to_plain() == net.adapter.to_plain()
    assert same(weights(again), weights(net))
    assert trainable_names(again) == trainable_names(net)


def test_hyperparameters_of_the_module_come_back(fit, tmp_path):
    path = saved(SavingLoRAToy(width=6, adapter=lora()), fit, tmp_path)
    again = SavingLoRAToy.load_from_checkpoint(path, weights_only=True)
    assert again.hparams["width"] == 6
    assert again.head.in_features == 6


def test_any_adapter_value_works_with_the_general_mixin(fit, tmp_path):
    class AnyToy(AdapterMixin, Toy):
        pass

    for adapter in (LinearProbe(), FullFinetune(), lora()):
        net = AnyToy(adapter=adapter)
        again = AnyToy.load_from_checkpoint(saved(net, fit, tmp_path), weights_only=True)
        assert type(again.adapter) is type(adapter)
        assert same(weights(again), weights(net))


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(stop, fit, tmp_path):
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=stop)

    whole, resumed = LoRAToy(adapter=lora()), LoRAToy(adapter=lora())
    whole.train_dataloader = lambda: Batches(0)
    fit(whole, checkpoint(), epochs=2)
    path = next(path for path in tmp_path.glob("*.ckpt") if f"step={stop}" in path.name)
    resumed.train_dataloader = lambda: Batches(stop % 4)
    fit(resumed, checkpoint(), epochs=2, ckpt_path=path)
    assert same(weights(resumed), weights(whole))


class BatchNormToy(LoRAMixin, Toy):
    def __init__(self) -> None:
        super().__init__(adapter=lora())
        self.backbone.insert(1, nn.BatchNorm1d(8))


def test_buffers_that_changed_are_kept_and_others_are_not(fit, tmp_path):
    class WithTable(BatchNormToy):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.register_buffer("table", torch.arange(1000.0))

    net = WithTable()
    path = saved(net, fit, tmp_path)
    keys = set(torch.load(path, weights_only=True)["state_dict"])
    assert "backbone.1.running_mean" in keys
    assert "backbone.table" not in keys
    again = WithTable()
    again.on_load_checkpoint(checkpoint := torch.load(path, weights_only=True))
    again.load_state_dict(checkpoint["state_dict"])
    assert same(weights(again), weights(net))


def test_a_base_loaded_after_the_adapter_came_is_the_base(fit, tmp_path):
    net = LoRAToy(adapter=lora())
    net.configure_model()
    other = Toy()
    nn.init.normal_(other.backbone[0].weight)
    net.load_state_dict(other.state_dict(), strict=False)
    path = saved(net, fit, tmp_path)
    with pytest.raises(ValueError, match="backbone|other values"):
        LoRAToy.load_from_checkpoint(path)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copied_module_trains_to_the_same_weights(again, fit):
    net = LoRAToy(adapter=lora())
    net.configure_model()
    other = again(net)
    assert attachment_of(other.backbone).adapters == {"default": net.adapter}
    for one in (net, other):
        pl.seed_everything(1, verbose=False)
        fit(one)
    assert same(weights(net), weights(other))


def test_masters_stay_float32_under_bf16_true_and_resume(fit, tmp_path):
    net = LoRAToy(adapter=lora())
    net.train_dataloader = lambda: torch.utils.data.DataLoader(rows(24, dtype=torch.bfloat16), 6)
    path = saved(net, fit, tmp_path, precision="bf16-true")
    assert net.backbone[0].weight.dtype == torch.bfloat16
    assert net.backbone[0].adapters["default"].lora_A.dtype == torch.float32
    again = LoRAToy.load_from_checkpoint(path)
    assert torch.equal(again.backbone[0].adapters["default"].lora_B, net.backbone[0].adapters["default"].lora_B)


def test_the_trainable_count_is_logged(fit, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit(LoRAToy(adapter=lora()), logger=CSVLogger(tmp_path, name="", version=""))
    text = (tmp_path / "metrics.csv").read_text()
    assert "adapter/trainable_parameters" in text
    assert str(2 * (4 + 8) + 2 * (8 + 8) + 18) in text


def cli(model, args, monkeypatch, tmp_path):
    from lightning.pytorch.cli import LightningCLI

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    monkeypatch.setattr("sys.argv", ["train.py"])
    defaults = {**quiet, "max_epochs": 1, "default_root_dir": str(tmp_path), "enable_checkpointing": False}
    return LightningCLI(model, args=["fit", *args], trainer_defaults=defaults, save_config_callback=None)


class CommandToy(LoRAMixin, SavingToy):
    pass


class AnyCommandToy(AdapterMixin, SavingToy):
    pass


@pytest.mark.filterwarnings("ignore:.*compute_output")
def test_the_command_line_sets_the_adapter_and_its_checkpoint_loads(monkeypatch, tmp_path):
    run = cli(CommandToy, ["--model.adapter.rank=3", "--model.width=6"], monkeypatch, tmp_path)
    assert run.model.adapter == LoRA(rank=3)
    assert run.model.head.in_features == 6
    path = tmp_path / "cli.ckpt"
    run.trainer.save_checkpoint(path)
    again = CommandToy.load_from_checkpoint(path, weights_only=True)
    assert again.adapter == LoRA(rank=3)
    assert same(weights(again), weights(run.model))


@pytest.mark.filterwarnings("ignore:.*compute_output")
def test_the_command_line_chooses_any_adapter_by_name(monkeypatch, tmp_path):
    run = cli(
        AnyCommandToy,
        ["--model.adapter=lightning_peft.LoRA", "--model.adapter.rank=3", "--model.adapter.targets=['2']"],
        monkeypatch,
        tmp_path,
    )
    assert run.model.adapter.rank == 3
    probe = cli(AnyCommandToy, ["--model.adapter=lightning_peft.LinearProbe"], monkeypatch, tmp_path)
    assert isinstance(probe.model.adapter, LinearProbe)


class OwnBackboneToy(Toy):
    """A module with a backbone argument of its own."""

    def __init__(self, backbone: str = "small") -> None:
        super().__init__(width={"small": 6, "large": 8}[backbone])
        self.save_hyperparameters()


class OwnBackboneLoRAToy(LoRAMixin, OwnBackboneToy):
    pass


class ConfigToy(Toy):
    """A module that keeps one object of hyper-parameters."""

    def __init__(self, cfg: dict) -> None:
        super().__init__(width=cfg["width"])
        self.save_hyperparameters(cfg)


class ConfigLoRAToy(LoRAMixin, ConfigToy):
    pass


class FixedToy(LoRAMixin, SavingToy):
    """Gives the adapter itself, and hands the rest on."""

    def __init__(self, **options) -> None:
        super().__init__(adapter=LoRA(rank=2), **options)


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: OwnBackboneLoRAToy(backbone="large", adapter=lora()), 8),
        (lambda: OwnBackboneLoRAToy("large", adapter=lora()), 8),
        (lambda: ConfigLoRAToy({"width": 6}, adapter=lora()), 6),
        (lambda: FixedToy(width=6), 6),
    ],
)
def test_modules_with_arguments_of_all_kinds_come_back(make, width, fit, tmp_path):
    net = make()
    again = type(net).load_from_checkpoint(saved(net, fit, tmp_path), weights_only=True)
    assert again.head.in_features == width
    assert same(weights(again), weights(net))


def test_the_general_mixin_asks_for_an_adapter_before_training(fit):
    class AnyToy(AdapterMixin, Toy):
        pass

    with pytest.raises(ValueError, match=r"adapter=None; pass one, for instance AnyToy\(..., adapter=LoRA"):
        fit(AnyToy())


def test_a_base_weight_that_somebody_else_thawed_is_in_the_checkpoint(fit, tmp_path):
    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.backbone[0].weight.requires_grad_(batch_idx < 2)

    class AllToy(LoRAMixin, Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    net = AllToy(adapter=lora())
    trainer = fit(net, Thaw())
    assert not net.backbone[0].weight.requires_grad
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert same(weights(AllToy.load_from_checkpoint(tmp_path / "net.ckpt")), weights(net))


def test_a_module_that_sets_its_mode_in_init_works(fit):
    class EvalToy(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.eval()

    class EvalProbeToy(LinearProbeMixin, EvalToy):
        pass

    net = EvalProbeToy()
    fit(net)
    assert not net.train().backbone.training


def test_testing_with_the_checkpoint_of_a_bf16_true_run_works(fit, tmp_path):
    class TestedToy(LoRAMixin, Toy):
        def test_step(self, batch, batch_idx):
            self(batch[0])

        def train_dataloader(self):
            return torch.utils.data.DataLoader(rows(24, dtype=torch.bfloat16), 6)

        test_dataloader = train_dataloader

    net = TestedToy(adapter=lora())
    trainer = fit(net, precision="bf16-true")
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    trainer.test(net, ckpt_path=tmp_path / "net.ckpt", verbose=False)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_weight_averaging_that_copies_too_early_is_refused_and_the_other_works(fit):
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    with pytest.raises(ValueError, match=r"copies the module before the adapter comes. Call attach_adapter\(\)"):
        fit(LoRAToy(adapter=lora()), StochasticWeightAveraging(swa_lrs=0.01))
    net = LoRAToy(adapter=lora())
    net.attach_adapter()
    fit(net, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), epochs=3)
    fit(net, EMAWeightAveraging())
