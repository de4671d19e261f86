"""A decoder is evaluated while a language model trains, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_peft.callbacks import DecodingEvaluation
from lightning_peft.decoding import BeamSearch, Greedy, Sample
from tests.decoding.toy_language import Numbers, Writer
from tests.toy import same, weights

PROMPTS = ["5 6", "7", "8 8 8"]


def even(texts):
    """Right is what says an even number first; asking costs random numbers, which no one shall miss."""
    torch.rand(3)
    return torch.tensor([float(t.completion.split()[:1] > [] and int(t.completion.split()[0]) % 2 == 0) for t in texts])


def evaluation(**given):
    decoders = {
        "greedy": Greedy(max_new_tokens=4),
        "beam": BeamSearch(num_beams=3, max_new_tokens=4),
        "drawn": Sample(n=4, max_new_tokens=4),
    }
    return DecodingEvaluation(decoders, PROMPTS, even, tokenizer=Numbers(), **given)


def test_what_is_logged_is_what_decoding_gives(fit):
    module, callback = Writer(), evaluation()
    before = copy.deepcopy(module)
    trainer = fit(module, callback, epochs=2)
    assert [row["step"] for row in callback.history] == [0, 4, 8]
    for name, decoder in callback.decoders.items():
        for which, row in ((before, callback.history[0]), (module, callback.history[-1])):
            result = decoder.decode(which.lm, Numbers(), PROMPTS)
            assert row[f"decoding/{name}_right"] == pytest.approx(even([c.draft for c in result.best]).mean().item())
            covered = [even([h.draft for h in pool]).max().item() for pool in result.pool]
            assert row[f"decoding/{name}_covered"] == pytest.approx(sum(covered) / 3)
            assert row[f"decoding/{name}_tokens"] == pytest.approx(sum(a.tokens for a in result.usage) / 3)
        assert trainer.callback_metrics[f"decoding/{name}_right"] == callback.history[-1][f"decoding/{name}_right"]


def test_training_is_the_same_to_the_bit(fit):
    alone, watched = Writer(), Writer()
    watched.load_state_dict(alone.state_dict())
    torch.manual_seed(3)
    fit(alone, epochs=2)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    fit(watched, evaluation(), epochs=2)
    assert same(weights(alone), weights(watched))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in watched.modules()] == [m.training for m in alone.modules()]


def test_tensorboard_shows_curves_and_texts(fit, tmp_path):
    fit(Writer(), evaluation(shown=2), epochs=1, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    assert {
        f"decoding/{name}_{kind}" for name in ("greedy", "beam", "drawn") for kind in ("right", "covered", "tokens")
    } <= set(events.Tags()["scalars"])
    texts = events.Tensors("decoding/beam/text_summary")
    assert [event.step for event in texts] == [0, 4]
    shown = texts[0].tensor_proto.string_val[0].decode()
    assert shown.count("**right**") + shown.count("**wrong**") == 2
    assert "    5 6" in shown


def test_validations_in_between_and_without_a_fit_are_left_alone(fit, trainer):
    module, callback = Writer(), evaluation(every_n_epochs=2)
    fit(module, callback, epochs=3, num_sanity_val_steps=1)
    assert [row["step"] for row in callback.history] == [0, 8]
    trainer(callback).validate(module, verbose=False)
    assert len(callback.history) == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_has_the_whole_history(fit, tmp_path):
    whole = evaluation()
    fit(Writer(), whole, epochs=3)
    first = evaluation()
    fit(Writer(), first, ModelCheckpoint(tmp_path / "run", save_last=True), epochs=2)
    second = pickle.loads(pickle.dumps(copy.deepcopy(evaluation())))
    saver = ModelCheckpoint(tmp_path / "run", save_last=True)
    fit(Writer(), second, saver, ckpt_path=tmp_path / "run" / "last.ckpt", epochs=3)
    assert second.history == whole.history


@pytest.mark.parametrize(
    ("given", "message"),
    [({"model": "nothing"}, r"'nothing' .* it has \['lm'\]"), ({"every_n_epochs": 0}, "every_n_epochs=0")],
)
def test_what_cannot_be_done_is_said(fit, given, message):
    with pytest.raises(ValueError, match=message):
        fit(Writer(), evaluation(**given), epochs=1)


def test_a_module_without_a_language_model_is_named(fit, net):
    with pytest.raises(ValueError, match="holds 0 causal"):
        fit(net, evaluation(), epochs=1)
    two = Writer()
    two.other = Writer().lm
    with pytest.raises(ValueError, match=r"2 causal language models \['lm', 'other'\]"):
        fit(two, evaluation(), epochs=1)
    fit(two, evaluation(model="lm"), epochs=1)


def test_prompts_are_a_list():
    with pytest.raises(ValueError, match="list of texts"):
        DecodingEvaluation(Greedy(), "5 6", even, tokenizer=Numbers())
