"""Under a Trainer a search is the search that it is without one; what is chosen is used, kept, and gone on from."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_peft import (
    Budget,
    DERMixin,
    DistillMixin,
    LoRA,
    LoRAMixin,
    PromptSearchMixin,
    ReplayMixin,
    adapted,
    add_adapter,
)
from lightning_peft.callbacks import ExactResume, FreezeSchedule, GradientFlow, ZeroInitHead
from lightning_peft.prompts import (
    TPE,
    Coordinate,
    Halving,
    PromptSearch,
    PromptSpace,
    RandomSearch,
    Rewrite,
    Verbalizer,
)
from tests.mixins.test_prompting_mixin import Module
from tests.prompts.language_nets import tokenizer

TRAIN = [(f"a film {number}", number % 2) for number in range(30)]
VALIDATION = [(f"a joy {number}", number % 2) for number in range(21)]
TEST = [(f"dull {number}", number % 2) for number in range(14)]
pytestmark = pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")


def space():
    return PromptSpace(
        ["Review: {text}\nSentiment: {answer}", "{text}. It was {answer}"],
        [Verbalizer(["negative", "positive"]), Verbalizer(["terrible", "great"])],
        instructions=["", "Judge the review.", "It was a film."],
        examples=TRAIN[:6],
        shots=(0, 2),
    )


class Searching(PromptSearchMixin, Module):
    pass


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(TRAIN, shuffle=True)

    def val_dataloader(self):
        return loader(VALIDATION)


def loader(rows, **options):
    return DataLoader([{"text": text, "label": label} for text, label in rows], 4, **options)


def trainer(tmp_path, **options):
    usual = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **{**usual, "max_epochs": 9, **options})


def search(strategy=None, **options):
    return PromptSearch(space(), strategy or RandomSearch(4, 20), **{"rounds": 3, "calibration": "batch", **options})


def facts(report):
    return report.rounds, report.validation, report.prompt, report.verbalizer, report.stopped, report.usage.tokens


@pytest.mark.parametrize("strategy", [RandomSearch(4, 20), Halving(6, 8), Coordinate(2, 3, 20), TPE(4, 20, startup=4)])
@pytest.mark.parametrize("by", ["loaders", "datamodule"])
def test_a_fit_finds_what_the_search_finds_without_a_trainer(strategy, by, tmp_path):
    net = Searching(search=search(strategy))
    given = (
        {"datamodule": Data()}
        if by == "datamodule"
        else {"train_dataloaders": Data().train_dataloader(), "val_dataloaders": loader(VALIDATION)}
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = trainer(tmp_path)
    run.fit(net, **given)
    alone = search(strategy).run(net.model, tokenizer(), TRAIN, VALIDATION)
    assert facts(net.report) == facts(alone)
    assert (net.prompt, net.verbalizer) == (alone.prompt, alone.verbalizer)
    assert run.global_step == len(alone.rounds)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_test_judges_the_chosen_prompt_calibrated_as_it_was_chosen(tmp_path):
    net = Searching(search=search())
    run = trainer(tmp_path)
    run.fit(net, datamodule=Data())
    (logged,) = run.test(net, loader(TEST), verbose=False)
    expected = search().run(net.model, tokenizer(), TRAIN, VALIDATION, TEST).test
    assert logged["learn/test_accuracy"] == pytest.approx(expected.accuracy, abs=1e-6)


def test_a_budget_ends_the_fit_and_the_log_tells_how_it_went(tmp_path):
    net = Searching(search=search(rounds=50, budget=Budget(max_tokens=9_000)))
    run = trainer(tmp_path, max_epochs=50, logger=TensorBoardLogger(tmp_path))
    run.fit(net, datamodule=Data())
    assert net.report.stopped == "max_tokens=9000"
    assert net.report.usage.tokens <= 9_000
    assert run.current_epoch < 50
    log = EventAccumulator(run.logger.log_dir).Reload()
    assert log.Scalars("search/tokens")[-1].value == net.report.usage.tokens
    assert log.Scalars("search/validation")[-1].value == pytest.approx(net.report.validation.accuracy)
    assert "search/prompt/text_summary" in log.Tags()["tensors"]


@pytest.mark.parametrize(
    "strategy", [RandomSearch(4, 20), TPE(4, 20, startup=4), Rewrite(lambda told: [f"{told[0][0]} It."], 20)]
)
def test_a_fit_goes_on_from_a_checkpoint_at_its_round(strategy, tmp_path):
    whole = Searching(search=search(strategy))
    trainer(tmp_path).fit(whole, datamodule=Data())
    first = Searching(search=search(strategy))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(first, datamodule=Data())
    run.save_checkpoint(tmp_path / "second.ckpt")
    assert "search_anchor" not in torch.load(tmp_path / "second.ckpt", weights_only=True)["state_dict"]
    again = Searching(search=search(strategy))
    trainer(tmp_path).fit(again, datamodule=Data(), ckpt_path=tmp_path / "second.ckpt", weights_only=True)
    assert facts(again.report)[:5] == facts(whole.report)[:5]
    assert len(first.report.rounds) == 2
    loaded = Searching.load_from_checkpoint(tmp_path / "second.ckpt", weights_only=True)
    assert (loaded.prompt, loaded.verbalizer) == (first.prompt, first.verbalizer)


def test_a_search_with_a_cache_pays_for_nothing_twice(tmp_path):
    first, second = (Searching(search=search(), score_cache=tmp_path / "scores.db") for _ in range(2))
    trainer(tmp_path).fit(first, datamodule=Data())
    trainer(tmp_path).fit(second, datamodule=Data())
    assert facts(second.report) == facts(first.report)
    assert second.report.usage.cached > first.report.usage.cached


def test_what_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="verbalizer=None"):
        trainer(tmp_path).fit(Searching(), datamodule=Data())
    with pytest.raises(ValueError, match="limit_val_batches=0 leaves no rows"):
        trainer(tmp_path, limit_val_batches=0).fit(Searching(search=search()), datamodule=Data())
    with pytest.raises(ValueError, match="nothing has been found yet"):
        _ = Searching(search=search()).report


@pytest.mark.parametrize("mixin", [LoRAMixin, ReplayMixin, DistillMixin, DERMixin])
def test_a_class_that_would_search_and_train_is_refused_when_it_is_written(mixin):
    for bases in ((PromptSearchMixin, mixin), (mixin, PromptSearchMixin)):
        with pytest.raises(
            TypeError, match=rf"{mixin.__name__} is there to train, and a fit of PromptSearchMixin trains"
        ):
            type("Both", (*bases, Module), {})
    with pytest.raises(TypeError, match="AdapterMixin is there to train"):
        adapted(Searching, LoRA())


def test_a_search_may_stand_on_a_network_that_has_an_adapter(tmp_path):
    net = Searching(search=search())
    add_adapter(net.model, LoRA(rank=2))
    with torch.no_grad():
        for parameter in net.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer(tmp_path).fit(net, datamodule=Data())
    assert facts(net.report) == facts(search().run(net.model, tokenizer(), TRAIN, VALIDATION))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == flags


class Mine(GradientFlow):
    pass


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("kind", [lambda: FreezeSchedule.head_first("lm_head", steps=1), Mine])
def test_callbacks_that_act_on_training_are_refused_wherever_they_come_from(kind, mine, tmp_path):
    net, callback = Searching(search=search()), kind()
    if mine:
        Module.configure_callbacks = lambda self: callback
    try:
        with pytest.raises(ValueError, match=f"Searching: {type(callback).__name__} would have nothing to act on"):
            trainer(tmp_path, callbacks=[] if mine else [ExactResume(), callback]).fit(net, datamodule=Data())
    finally:
        if mine:
            del Module.configure_callbacks


def test_a_refused_callback_has_done_nothing_yet_and_may_stand_in_a_test(tmp_path):
    net = Searching(search=search())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = trainer(tmp_path, callbacks=[ZeroInitHead("model.lm_head")])
    with pytest.raises(ValueError, match="ZeroInitHead would have nothing"):
        run.fit(net, datamodule=Data())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    run.test(net, loader(TEST), verbose=False)


def test_a_first_round_that_would_use_the_budget_up_leaves_enough_to_judge(tmp_path):
    free = Searching(search=search(RandomSearch(6, 20), rounds=1))
    trainer(tmp_path).fit(free, datamodule=Data())
    limit = int(0.6 * free.report.usage.tokens)
    held = Searching(search=search(RandomSearch(6, 20), rounds=1, budget=Budget(max_tokens=limit)))
    trainer(tmp_path).fit(held, datamodule=Data())
    assert held.report.stopped == f"max_tokens={limit}"
    assert held.report.chosen_among >= 1
    assert held.report.usage.tokens <= limit
