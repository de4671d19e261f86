"""Small transformers networks of every family that prompts are tried on, and what they are called with."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    Adapter,
    SoftPrompt,
    adapter_disabled,
    adapter_rows,
    adapter_state_dict,
    add_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
)
from tests.adapters.zoo import stir
from tests.toy import same, weights

VOCABULARY, DIM, LAYERS, TOKENS = 50, 16, 3, 3
DECODERS = ("llama", "qwen2", "gpt2", "mistral")
ENCODERS = ("bert", "roberta", "distilbert")
TEXT = DECODERS + ENCODERS
FAMILIES = (*TEXT, "vit")
PAD = 1
"""Padding token of every family: RoBERTa's own, and no position of any other one follows from it."""


def config(family: str) -> Any:
    import transformers as hf

    wide = {"initializer_range": 0.3, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": DIM}
    words = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": None}
    llama = {**wide, **words, "intermediate_size": 24, "num_key_value_heads": 2}
    bert = {**wide, **words, "intermediate_size": 24, "max_position_embeddings": 30}
    gpt2 = {"n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 30, "initializer_range": 0.3}
    distilbert = {"dim": DIM, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 24, "initializer_range": 0.3}
    return {
        "llama": lambda: hf.LlamaConfig(**llama),
        "qwen2": lambda: hf.Qwen2Config(**llama),
        "mistral": lambda: hf.MistralConfig(**llama, sliding_window=4),
        "gpt2": lambda: hf.GPT2Config(**gpt2, **words),
        "bert": lambda: hf.BertConfig(**bert),
        "roberta": lambda: hf.RobertaConfig(**bert),
        "distilbert": lambda: hf.DistilBertConfig(**distilbert, vocab_size=VOCABULARY, max_position_embeddings=30),
        "vit": lambda: hf.ViTConfig(**wide, intermediate_size=24, image_size=8, patch_size=4),
    }[family]()


@functools.cache
def _pretrained(family: str, head: bool, attention: str) -> Any:
    import transformers as hf

    name = {"qwen2": "Qwen2", "gpt2": "GPT2", "distilbert": "DistilBert", "vit": "ViT", "roberta": "Roberta"}.get(
        family, family.capitalize()
    )
    kind = "Model" if not head else "ForCausalLM" if family in DECODERS else "ForSequenceClassification"
    kind = {"GPT2ForCausalLM": "GPT2LMHeadModel", "ViTForSequenceClassification": "ViTForImageClassification"}.get(
        name + kind, name + kind
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found = config(family)
        found._attn_implementation = attention
        return getattr(hf, kind)(found).double().eval()


def network(family: str, *, head: bool = True, attention: str = "sdpa") -> Any:
    """A network in float64 and eval mode, the same at every call, with or without a head."""
    return copy.deepcopy(_pretrained(family, head, attention))


IDS = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
LENGTHS = (3, 6, 5)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths in one batch: ids and mask."""
    at = torch.arange(IDS.shape[1])[None]
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = at >= IDS.shape[1] - lengths if side == "left" else at < lengths
    return torch.where(mask, IDS, PAD), mask.long()


def call(family: str, **more: Any) -> dict[str, torch.Tensor]:
    """What a network of the family is called with."""
    if family == "vit":
        random = torch.Generator().manual_seed(2)
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=random, dtype=torch.float64), **more}
    return {"input_ids": IDS, **more}


def labels(family: str) -> torch.Tensor:
    return IDS if family in DECODERS else torch.tensor([0, 1, 1])


def answer(model: nn.Module, **given: Any) -> torch.Tensor:
    """What a network says: its logits, without a head its last hidden state."""
    found = model(**given)
    return found.logits if "logits" in found else found.last_hidden_state


def hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-10)


def far(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-2)


def trains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module, **given: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    answer(model, **given).square().sum().backward()
    return {name: parameter.grad for name, parameter in trains(model).items()}


def refuses(model: nn.Module, kind: type[Adapter], options: dict[str, Any], message: str) -> None:
    """Assert that there is no such adapter, or the network cannot have it, and that the network is left as it was."""
    keys, hooked = list(model.state_dict()), hooks(model)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, kind(**options))
    assert (list(model.state_dict()), hooks(model)) == (keys, hooked)


class PromptLaws:
    """What holds for every kind of prompt; a subclass says which one."""

    method: Any
    counts_real_tokens = True
    """Whether positions are found without the caller's help in padded batches."""

    def adapted(self, family: str, name: str = "default", **options: Any) -> Any:
        return stir(add_adapter(network(family, **options), self.method, name))

    @pytest.mark.parametrize("head", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_fits_every_family_and_the_output_keeps_its_form(self, family, head):
        given = call(family, output_hidden_states=True, **({"labels": labels(family)} if head else {}))
        base, model = network(family, head=head), self.adapted(family, head=head)
        before, after = base(**given), model(**given)
        assert after.keys() == before.keys()
        for key in before.keys() - {"past_key_values"}:
            both = (before[key], after[key]) if isinstance(before[key], tuple) else ([before[key]], [after[key]])
            assert [entry.shape for entry in both[0]] == [entry.shape for entry in both[1]], key
            assert far(both[0][-1], both[1][-1]), key
        plain = model(**given, return_dict=False)
        assert [type(entry) for entry in plain] == [type(entry) for entry in base(**given, return_dict=False)]
        assert torch.equal(plain[0], after["loss" if head else "last_hidden_state"])

    @pytest.mark.parametrize("head", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_gradient_reaches_every_prompt_and_nothing_else_trains(self, family, head):
        model = self.adapted(family, head=head)
        names = {name for name, _ in model.named_parameters()} - {n for n, _ in network(family).named_parameters()}
        assert trains(model).keys() == {name for name in names if ".adapters." in f".{name}"} != set()
        assert {n for n, grad in gradients(model, **call(family)).items() if grad is None or not grad.any()} == set()
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", TEXT)
    def test_a_padded_row_is_what_it_is_alone(self, family, side):
        model, (ids, mask) = self.adapted(family, head=False), padded(side)
        given = {"input_ids": ids, "attention_mask": mask}
        if not self.counts_real_tokens and family != "roberta":
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        found = answer(model, **given)
        for row, real in enumerate(mask.bool()):
            assert close(found[row][real], answer(model, input_ids=ids[row][real][None])[0])
        if family == "roberta" and side == "left":
            return  # its positions are counted from the ids
        other = answer(model, **{**given, "input_ids": torch.where(mask.bool(), ids, 9)})
        assert torch.equal(other[mask.bool()], found[mask.bool()])

    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("family", DECODERS)
    def test_generate_gives_every_row_what_it_gets_alone(self, family, beams):
        model, (ids, mask) = self.adapted(family), padded("left")
        options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False, "pad_token_id": PAD}

        def generated(rows: slice, start: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
            given = {"input_ids": ids[rows, start:], "attention_mask": mask[rows, start:]}
            out = model.generate(**given, **options, **more, return_dict_in_generate=True, output_scores=True)
            scores = out.sequences_scores if beams > 1 else torch.stack(out.scores, 1)
            return out.sequences[:, len(given["input_ids"][0]) :], scores

        tokens, scores = generated(slice(None), 0)
        uncached = generated(slice(None), 0, use_cache=False)
        assert torch.equal(uncached[0], tokens)
        assert torch.allclose(uncached[1], scores, rtol=0, atol=1e-5)  # scores are float32
        for row, length in enumerate(LENGTHS):
            alone = generated(slice(row, row + 1), ids.shape[1] - length)
            assert torch.equal(alone[0][0], tokens[row])
            assert torch.allclose(alone[1][0], scores[row], rtol=0, atol=1e-5)
        if beams == 1:
            step = torch.cat([ids[1:2], tokens[1:2]], 1)
            assert torch.equal(answer(model, input_ids=step)[0, 5:-1].argmax(-1), tokens[1])

    @pytest.mark.parametrize("way", [{"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}])
    def test_generate_may_read_its_input_in_pieces(self, way):
        model = self.adapted("llama")
        given = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
        assert torch.equal(model.generate(**given, **way), model.generate(**given))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_checkpointed_gradients_are_the_same(self, family, reentrant):
        model = without_dropout(self.adapted(family)).train()
        before = gradients(model, **call(family))
        runs: list[nn.Module] = []
        part = next(next(m for m in model.modules() if isinstance(m, nn.ModuleList))[-1].children())
        part.forward = functools.partial(_counted, part.forward, runs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if family == "vit" and reentrant and not isinstance(self.method, SoftPrompt):
            # No input of the first layer requires a gradient; torch says so, and nothing trains in silence.
            with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError, match="grad_fn"):
                gradients(model, **call(family))
            return
        after = gradients(model, **call(family))
        assert len(runs) == 2
        for name, grad in before.items():
            assert torch.equal(after[name], grad), name

    @pytest.mark.parametrize("family", FAMILIES)
    def test_disabled_and_removed_it_leaves_the_pretrained_network(self, family):
        model, given = network(family), call(family)
        next(model.parameters()).requires_grad_(False)
        before, values, hooked = answer(model, **given), weights(model), hooks(model)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        configs = [(m, m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")]
        stir(add_adapter(model, self.method))
        after = answer(model, **given)
        assert far(after, before)
        with adapter_disabled(model):
            assert torch.equal(answer(model, **given), before)
        assert torch.equal(answer(model, **given), after)
        with pytest.raises(ValueError, match=f"merge_adapter: {type(self.method).__name__}.* no change of weights"):
            merge_adapter(model)
        with pytest.raises(ValueError, match="cannot have another adapter for each row"):
            adapter_rows(model, ["default", None, None]).__enter__()
        remove_adapter(model)
        assert torch.equal(answer(model, **given), before)
        assert same(weights(model), values)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert hooks(model) == hooked
        assert all(m.config is found and m.config._attn_implementation == name for m, found, name in configs)

    @pytest.mark.parametrize("family", ["llama", "bert", "vit"])
    def test_two_are_switched_exactly(self, family):
        model, given = self.adapted(family, "first"), call(family)
        first = answer(model, **given)
        add_adapter(model, dataclasses.replace(self.method, tokens=2), "second")
        assert torch.equal(answer(model, **given), first)
        second = answer(stir(set_adapter(model, "second")), **given)
        assert far(second, first)
        assert all(".second." in name for name in trains(model))
        assert torch.equal(answer(set_adapter(model, "first"), **given), first)
        assert torch.equal(answer(set_adapter(model, None), **given), answer(network(family), **given))
        remove_adapter(model, "first")
        assert torch.equal(answer(set_adapter(model, "second"), **given), second)
        assert hooks(remove_adapter(model)) == 0

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("family", ["llama", "vit"])
    def test_a_copy_computes_the_same_and_shares_nothing(self, family, again):
        model, given = self.adapted(family), call(family)
        other, before = again(model), answer(model, **given)
        assert torch.equal(answer(other, **given), before)
        assert far(answer(stir(other), **given), before)
        remove_adapter(other)
        assert hooks(other) == 0
        assert torch.equal(answer(other, **given), answer(network(family), **given))
        assert torch.equal(answer(model, **given), before)

    def test_saved_values_make_a_fresh_network_the_same(self):
        model, other = self.adapted("llama"), add_adapter(network("llama"), self.method)
        assert other.load_state_dict(adapter_state_dict(model), strict=False).unexpected_keys == []
        assert torch.equal(answer(other, **call("llama")), answer(model, **call("llama")))
        assert Adapter.from_plain(self.method.to_plain()) == self.method

    def test_compiling_breaks_no_graph(self):
        torch._dynamo.reset()
        found = torch._dynamo.explain(self.adapted("llama"))(**call("llama", use_cache=False))
        assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons

    @pytest.mark.parametrize("family", ["llama", "bert", "vit"])
    def test_half_precision_keeps_float32_masters(self, family):
        given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in call(family).items()}
        early, late = self.adapted(family).float().to(torch.bfloat16), network(family).to(torch.bfloat16)
        for model in (early, add_adapter(late, self.method)):
            assert {parameter.dtype for parameter in trains(model).values()} == {torch.float32}
            found = answer(model, **given)
            assert found.dtype == torch.bfloat16
            found.float().square().sum().backward()
            assert all(parameter.grad.isfinite().all() for parameter in trains(model).values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_autocast_gives_finite_gradients(self, family, dtype):
        model = add_adapter(network(family).float(), self.method)
        given = {key: value.float() if value.is_floating_point() else value for key, value in call(family).items()}
        with torch.autocast("cpu", dtype):
            found = answer(model, **given)
        found.float().square().sum().backward()
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in trains(model).values())
        assert all(p.grad.isfinite().all() and p.grad.any() for p in trains(model).values())

    @pytest.mark.parametrize("family", ["llama", "vit"])
    def test_seeds_choose_the_start_and_leave_the_global_generator_alone(self, family):
        def start(seed: int) -> dict[str, torch.Tensor]:
            return adapter_state_dict(add_adapter(network(family), dataclasses.replace(self.method, seed=seed)))

        state = torch.get_rng_state()
        first = start(3)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(start(3), first)
        assert not any(torch.equal(value, first[name]) for name, value in start(4).items())

    def test_networks_on_meta_can_be_adapted_before_they_have_values(self):
        model = add_adapter(network("llama").to("meta"), self.method)
        assert all(parameter.is_meta for parameter in trains(model).values())

    def refused(self, make: Any, model: nn.Module, message: str) -> None:
        """Adapting fails by this message and changes nothing."""
        keys, hooked = list(model.state_dict()), hooks(model)
        with pytest.raises(ValueError, match=message):
            add_adapter(model, make())
        assert (list(model.state_dict()), hooks(model)) == (keys, hooked)


def _counted(forward: Any, runs: list[Any], *args: Any, **kwargs: Any) -> Any:
    runs.append(None)
    return forward(*args, **kwargs)
