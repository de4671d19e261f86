"""A decoder writes while a model trains: what is logged is what it writes, and training does not notice."""

import copy
import pickle
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks import DecodingEvaluation, ExactResume
from lightning_peft.decoding import BeamSearch, BestOfN, Greedy
from tests.decoding.searched import MANY_ENDS, PROMPTS
from tests.prompts.language_nets import CAUSAL, tokenizer
from tests.toy import TwoOptimizers, same, weights


class Writer(pl.LightningModule):
    """A language model with dropout that learns random rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = CAUSAL["gpt2"]()
        self.model.generation_config.eos_token_id = MANY_ENDS

    def training_step(self, batch, batch_idx):
        return self.model(batch[0], labels=batch[0]).loss

    def train_dataloader(self):
        ids = torch.randint(5, 300, (16, 6), generator=torch.Generator().manual_seed(2))
        return DataLoader(TensorDataset(ids), 4, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-2)


def short(texts):
    return [len(text.completion) < 12 for text in texts]


def noisy(texts):
    torch.rand(3)
    return short(texts)


def evaluation(decoder=None, verifier=short, **options):
    decoder = decoder or BestOfN(n=3, max_new_tokens=6)
    return DecodingEvaluation(decoder, PROMPTS, verifier, tokenizer=tokenizer(), **options)


def test_training_is_bit_for_bit_what_it_is_without(fit):
    ends = []
    for callbacks in ((), (evaluation(verifier=noisy, every_n_steps=1),)):
        pl.seed_everything(3, verbose=False)
        net = Writer()
        fit(net, *callbacks, epochs=2)
        ends.append(weights(net))
    assert same(*ends)
    assert len(callbacks[0].history) == 9


@pytest.mark.parametrize("cut_counts", [False, True])
def test_what_is_logged_is_what_the_decoder_writes_with_the_weights_there_are(fit, cut_counts):
    net, decoder, asked = Writer(), BestOfN(n=3, max_new_tokens=6), []

    def verifier(texts):
        asked.extend(texts)
        return short(texts)

    seen = evaluation(decoder, verifier, cut_counts=cut_counts)
    trainer = fit(net, seen, epochs=2)
    result = decoder.decode(net.model, tokenizer(), PROMPTS)
    assert seen.texts == result.texts
    right = [[len(one.text) < 12 and (one.finished or cut_counts) for one in pool] for pool in result.pool]
    expected = {
        "accuracy": sum(one[0] for one in right) / 3,
        "coverage": sum(map(any, right)) / 3,
        "finished": sum(one.finished for one in result.best) / 3,
        "tokens": sum(one.tokens for one in result.usage) / 3,
    }
    for key, value in expected.items():
        assert float(trainer.callback_metrics[f"decoding/{key}"]) == pytest.approx(value)
        assert seen.history[-1][key] == pytest.approx(value)
    assert seen.history[0] != seen.history[-1]
    last = [one.draft for pool in result.pool for one in pool if one.finished or cut_counts]
    assert [str(draft) for draft in asked[len(asked) - len(last) :]] == list(map(str, last))
    assert any(one.finished for pool in result.pool for one in pool)
    assert not all(one.finished for pool in result.pool for one in pool)


def test_what_a_scorer_has_ruled_out_is_wrong_without_a_question(fit):
    class Ruling(BestOfN):
        def decode(self, *args):
            result = super().decode(*args)
            pool = [[replace(one, viable=False) for one in pool] for pool in result.pool]
            return replace(result, pool=pool)

    asked = []
    seen = evaluation(
        Ruling(n=2, max_new_tokens=4), lambda texts: asked.extend(texts) or [True] * len(texts), cut_counts=True
    )
    fit(Writer(), seen, steps=1)
    assert [row["accuracy"] for row in seen.history] == [0.0, 0.0]
    assert [row["coverage"] for row in seen.history] == [0.0, 0.0]
    assert not asked


def test_a_second_fit_that_begins_earlier_is_measured_again(fit, tmp_path):
    trainer = fit(Writer(), steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    seen = evaluation(Greedy(max_new_tokens=2), every_n_steps=3)
    fit(Writer(), seen, epochs=3)
    fit(Writer(), seen, epochs=2, ckpt_path=tmp_path / "two.ckpt")
    assert [row["step"] for row in seen.history] == [0, 3, 6, 9, 12, 3, 6]


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [0, 8]), ({"every_n_steps": 3}, [0, 3, 6, 8]), ({"every_n_epochs": 1}, [0, 4, 8])],
)
def test_it_measures_before_now_and_then_and_after(fit, options, steps):
    seen = evaluation(Greedy(max_new_tokens=3), **options)
    fit(Writer(), seen, epochs=2)
    assert [row["step"] for row in seen.history] == steps


class Twice(TwoOptimizers, Writer): ...


@pytest.mark.parametrize("stopped_at", [2, 4, 8])
def test_no_interval_is_skipped_where_steps_jump_also_after_a_resume(fit, tmp_path, stopped_at):
    class EachBatch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(*more, ckpt_path=None):
        pl.seed_everything(3, verbose=False)
        seen = evaluation(Greedy(max_new_tokens=3), every_n_steps=3)
        fit(Twice(), seen, ExactResume(), *more, epochs=2, ckpt_path=ckpt_path)
        return seen

    whole = run(EachBatch())
    again = run(ckpt_path=tmp_path / f"{stopped_at}.ckpt")
    assert [row["step"] for row in whole.history] == [0, 4, 6, 10, 12, 16]
    assert again.history == whole.history


def test_curves_and_texts_stand_in_tensorboard(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Writer(), evaluation(name="best", every_n_epochs=1, samples=2), logger=logger, epochs=2)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    assert [event.step for event in found.Scalars("decoding/best/accuracy")] == [0, 4, 8]
    (text,) = found.Tensors("decoding/best/samples/text_summary")[0].tensor_proto.string_val
    assert text.decode().count("**") == 4
    assert PROMPTS[0] in text.decode()


def test_a_resumed_run_goes_on_with_its_history(fit, tmp_path):
    whole, first, second = (evaluation(every_n_epochs=1) for _ in range(3))
    for seen, epochs in ((whole, 2), (first, 1)):
        pl.seed_everything(3, verbose=False)
        keep = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        fit(Writer(), seen, keep, ExactResume(), epochs=epochs)
    # The last one was the shorter run's.
    fit(Writer(), second, ModelCheckpoint(tmp_path / "1"), ExactResume(), epochs=2, ckpt_path=keep.last_model_path)
    assert [row["step"] for row in second.history] == [0, 4, 8]
    assert second.history == whole.history
    assert second.texts == whole.texts


class Looking(pl.Callback):
    """A decoder that looks at the weights it writes with, and a callback that looks at those that train."""

    def __init__(self):
        self.wrote, self.trained = [], []

    def decode(self, model, tokenizer, prompts):
        self.wrote.append(weights(model))
        return Greedy(max_new_tokens=2).decode(model, tokenizer, prompts)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(weights(pl_module.model))


def test_averaged_weights_write_once_they_are_averaged(fit):
    for averages in (False, True):
        look = Looking()
        callbacks = [EMAWeightAveraging(decay=0.5)] if averages else []
        fit(Writer(), look, evaluation(look, every_n_epochs=1), *callbacks, epochs=2)
        assert same(look.wrote[1], look.trained[3]) is not averages


def test_it_is_copied_and_pickled(fit):
    seen = evaluation(BeamSearch(num_beams=2, max_new_tokens=4))
    fit(Writer(), seen)
    for other in (copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert other.state_dict() == seen.state_dict()
        assert [one.problem for one in other.drafts] == [0, 1, 2]


@pytest.mark.parametrize(
    ("network", "kind", "message"),
    [
        ("net", ValueError, "Writer has no network='net'. Nearest: model"),
        ("model.lm_head", TypeError, "network='model.lm_head' is a Linear"),
    ],
)
def test_what_holds_no_language_model_is_named(fit, network, kind, message):
    with pytest.raises(kind, match=message):
        fit(Writer(), evaluation(network=network))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts=\\[\\]"),
        ("one", {}, "prompts='one'"),
        (["a"], {"every_n_epochs": 0}, "every_n_epochs=0"),
        (["a"], {"every_n_epochs": 1, "every_n_steps": 1}, "exclude each other"),
    ],
)
def test_a_setting_out_of_range_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        DecodingEvaluation(Greedy(), prompts, short, tokenizer=tokenizer(), **options)
