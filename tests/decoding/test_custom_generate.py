"""A search inside generate writes what generate's own beam search writes, or its scorers' choice."""

from dataclasses import replace

import pytest
import torch

from lightning_peft.decoding import BeamSearch
from tests.decoding.searched import PROMPTS, Without, model, padded
from tests.prompts.language_nets import tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.8}, {"min_new_tokens": 5}])
def test_it_is_generate_s_own_beam_search_also_with_logits_processors(kind, options):
    for seed in range(3):
        net, inputs = model(kind, seed, scale=4.0), padded()
        shared = {"max_new_tokens": 10, "do_sample": False, **options}
        wanted = net.generate(**inputs, num_beams=3, num_return_sequences=2, **shared)
        search = BeamSearch(num_beams=3, num_return=2)
        found = net.generate(**inputs, custom_generate=search.as_custom_generate(tokenizer()), **shared)
        assert torch.equal(found, wanted)


def test_its_scorers_are_heard():
    net, inputs = model(seed=1), padded()
    search = BeamSearch(num_beams=4, expand=6, partial=Without("ei"))
    rows = net.generate(**inputs, max_new_tokens=8, custom_generate=search.as_custom_generate(tokenizer()))
    alone = replace(search, max_new_tokens=8).decode(net, tokenizer(), PROMPTS)
    for row, one in zip(rows[:, inputs["input_ids"].shape[1] :].tolist(), alone.best, strict=True):
        assert row[: len(one.ids)] == list(one.ids)


def test_what_would_be_ignored_is_refused():
    net, inputs = model(), padded()
    run = BeamSearch().as_custom_generate(tokenizer())
    with pytest.raises(ValueError, match="num_beams=2 was given to generate"):
        net.generate(**inputs, max_new_tokens=4, num_beams=2, custom_generate=run)
    with pytest.raises(ValueError, match="return_dict_in_generate=True, and it gives tokens alone"):
        net.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, custom_generate=run)
    with pytest.raises(ValueError, match="MaxTimeCriteria"):
        net.generate(**inputs, max_new_tokens=4, max_time=9.0, custom_generate=run)
