"""Every method against every property, ours and PEFT's: ``python -m tests.adapters.conformance docs/adapters.md``.

The same functions make the table of the docs and the tests: a property says what it saw, and whether that is right.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import lightning_peft as lp
from lightning_peft.files import write_text
from tests.adapters.zoo import ZOO, build, stir

TOKENS = 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Seen:
    """What a property saw, and whether it is as it should be."""

    ok: bool
    says: str


@dataclass(frozen=True)
class Method:
    """One way to adapt a network, ours and PEFT's.

    Args:
        ours: Our adapter.
        peft: Name of PEFT's configuration class and its fields; None where PEFT has nothing like it.
        prompt: Whether it adds to the input and not to weights.
        base: Whether it trains parameters of the network itself.
        adds: Whether it adds parameters of its own.
        format: Whether PEFT has files for it.
        constants: Whether its gradient takes something for a constant that moves, so that it is the gradient of nothing.
    """

    ours: Any
    peft: tuple[str, dict[str, Any]] | None
    prompt: bool = False
    base: bool = False
    adds: bool = True
    format: bool = True
    constants: bool = False


def network() -> nn.Module:
    """A Llama of two layers in float64, the same at every call."""
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
PADDED = torch.tensor([[0, 0, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = (PADDED != 0).long()


def logits(model: nn.Module, **more: Any) -> torch.Tensor:
    """What a method's network says of the same rows, at the rows' own positions."""
    found: torch.Tensor = model(
        **{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False, **more}
    ).logits
    return found[:, -IDS.shape[1] :]  # PEFT shows its virtual tokens in the output


def lora(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 2, "lora_alpha": 4, "target_modules": LINEAR, **fields}


METHODS: dict[str, Method] = {
    "LoRA": Method(lp.LoRA(rank=2, alpha=4), lora()),
    "LoRA, rsLoRA": Method(lp.LoRA(rank=2, alpha=4, scaling="rslora"), lora(use_rslora=True)),
    "LoRA, DoRA": Method(lp.LoRA(rank=2, alpha=4, dora=True), lora(use_dora=True), constants=True),
    "LoRA, PiSSA": Method(lp.LoRA(rank=2, alpha=4, init="pissa"), lora(init_lora_weights="pissa")),
    "LoRA, OLoRA": Method(lp.LoRA(rank=2, alpha=4, init="olora"), lora(init_lora_weights="olora")),
    "LoRA, orthogonal": Method(lp.LoRA(rank=2, alpha=4, init="orthogonal"), lora(init_lora_weights="orthogonal")),
    "LoRA, train_also": Method(
        lp.LoRA(rank=2, alpha=4, train_also=["lm_head"]), lora(modules_to_save=["lm_head"]), base=True
    ),
    "IA3": Method(
        lp.IA3(),
        ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ),
    "VeRA": Method(lp.VeRA(rank=2), ("VeraConfig", {"r": 2, "target_modules": LINEAR})),
    "LayerNormTuning": Method(
        lp.LayerNormTuning(),
        ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
        base=True,
        adds=False,
    ),
    "BitFit": Method(lp.BitFit(), None, base=True, adds=False, format=False),
    "SoftPrompt": Method(lp.SoftPrompt(tokens=3), ("PromptTuningConfig", {"num_virtual_tokens": 3}), prompt=True),
    "KVPrefix": Method(
        lp.KVPrefix(tokens=3, offset_positions=True), ("PrefixTuningConfig", {"num_virtual_tokens": 3}), prompt=True
    ),
    "KVPrefix, positions from 0 on": Method(lp.KVPrefix(tokens=3), None, prompt=True, format=False),
    "DeepPrompt": Method(lp.DeepPrompt(tokens=3), None, prompt=True, format=False),
}


class Ours:
    """Our library."""

    def add(self, method: Method, model: nn.Module | None = None) -> nn.Module:
        return lp.add_adapter(network() if model is None else model, method.ours)

    def again(self, method: Method, model: nn.Module) -> nn.Module:
        return lp.set_adapter(lp.add_adapter(model, method.ours, "second"), "second")

    def switch(self, model: nn.Module, name: str) -> None:
        lp.set_adapter(model, name)

    def disabled(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return lp.adapter_disabled(model)

    def merge(self, model: nn.Module) -> nn.Module:
        return lp.merge_adapter(model)

    def unmerge(self, model: nn.Module) -> None:
        lp.unmerge_adapter(model)

    def unload(self, model: nn.Module) -> nn.Module:
        return lp.remove_adapter(model)

    def save(self, model: nn.Module, path: Path) -> None:
        lp.save_adapter(model, path)

    def load(self, path: Path, *, trains: bool = False) -> nn.Module:
        return lp.load_adapter(network(), path).eval()

    def rows(self, model: nn.Module, names: list[str | None]) -> torch.Tensor:
        with lp.adapter_rows(model, names):
            return logits(model)


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


NARROW = ("pissa", "olora")
"""PEFT's initialisations that know no float64."""


class Peft:
    """PEFT, as its documentation says to use it."""

    def config(self, method: Method) -> Any:
        import peft

        assert method.peft is not None
        kind, fields = method.peft
        return getattr(peft, kind)(task_type="CAUSAL_LM", **fields)

    def add(self, method: Method, model: nn.Module | None = None) -> nn.Module:
        import peft

        model = network() if model is None else model
        kind = model.dtype
        narrow = model.float() if kind == torch.float64 else model  # its decompositions do not know float64
        return peft.get_peft_model(narrow, self.config(method), autocast_adapter_dtype=False).to(kind).eval()

    def again(self, method: Method, model: Any) -> nn.Module:
        config = self.config(method)
        if getattr(config, "init_lora_weights", None) not in NARROW:
            model.add_adapter("second", config)
            model.set_adapter("second")
            if method.prompt:  # which it leaves trainable: the first one is not to be moved along
                model.prompt_encoder["default"].requires_grad_(False)
            return model.double()
        kept = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
        model.float().add_adapter("second", config)
        model.set_adapter("second")
        for name, value in model.double().named_parameters():
            if name in kept:
                value.data.copy_(kept[name])
        return model

    def switch(self, model: Any, name: str) -> None:
        model.set_adapter(name)

    def disabled(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        return model.disable_adapter()

    def merge(self, model: Any) -> nn.Module:
        model.merge_adapter()
        return model

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def unload(self, model: Any) -> nn.Module:
        return model.unload()

    def save(self, model: Any, path: Path) -> None:
        model.save_pretrained(path)

    def load(self, path: Path, *, trains: bool = False) -> nn.Module:
        import peft

        decomposes = json.loads((path / "adapter_config.json").read_text()).get("init_lora_weights") in NARROW
        base = network().float() if decomposes else network()
        with default_float64():  # its prompts are made in torch's default dtype, and would be rounded to it
            model = peft.PeftModel.from_pretrained(base, path, is_trainable=trains, autocast_adapter_dtype=False)
        return model.double().eval()

    def rows(self, model: Any, names: list[str | None]) -> torch.Tensor:
        return logits(model, adapter_names=[name or "__base__" for name in names])


Arm = Ours | Peft


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return (one.double() - two.double()).abs().max().item()


def difference(value: float, limit: float) -> Seen:
    return Seen(value <= limit, "exact" if value == 0 else f"{value:.0e}")


def adds_nothing(arm: Arm, method: Method) -> Seen:
    return difference(gap(logits(arm.add(method)), logits(network())), 0.0)


def disabled_is_the_base(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method))
    with arm.disabled(model):
        return difference(gap(logits(model), logits(network())), 0.0)


def keeps_base_keys(arm: Arm, method: Method) -> Seen:
    kept = network().state_dict().keys() <= arm.add(method).state_dict().keys()
    return Seen(kept, "kept" if kept else "renamed")


def merging_keeps_outputs(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method), 0.1)
    before = logits(model)
    return difference(gap(logits(arm.merge(model)), before), 1e-12)


def unmerging_restores_bits(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method, network().bfloat16()), 0.1)
    weight = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers.0.mlp.up_proj")))
    before = weight.weight.detach().clone()
    arm.merge(model)
    arm.unmerge(model)
    return difference(gap(weight.weight, before), 0.0)


def unloading_gives_back_the_network(arm: Arm, method: Method) -> Seen:
    base = network()
    base.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    model = arm.unload(stir(arm.add(method, copy.deepcopy(base))))
    same = {name: p.requires_grad for name, p in model.named_parameters()} == flags
    equal = model.state_dict().keys() == base.state_dict().keys() and gap(logits(model), logits(base)) == 0
    return Seen(same and equal, "network and flags" if same and equal else "network only" if equal else "other weights")


def state_comes_back(arm: Arm, method: Method) -> Seen:
    first, second = stir(arm.add(method)), arm.add(method)
    second.load_state_dict(first.state_dict())
    return difference(gap(logits(first), logits(second)), 0.0)


def deepcopies(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method))
    return difference(gap(logits(copy.deepcopy(model)), logits(model)), 0.0)


def pickles(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method))
    return difference(gap(logits(pickle.loads(pickle.dumps(model))), logits(model)), 0.0)


def graph_breaks(arm: Arm, method: Method) -> Seen:
    torch._dynamo.reset()
    model = stir(arm.add(method))
    if isinstance(arm, Peft):
        model = model.base_model.model if not method.prompt else model
    breaks = torch._dynamo.explain(model)(input_ids=IDS, use_cache=False).graph_break_count
    return Seen(breaks == 0, f"{breaks} graph breaks" if breaks else "whole graph")


def checkpointing(reentrant: bool) -> Callable[[Arm, Method], Seen]:
    def check(arm: Arm, method: Method) -> Seen:
        grads = []
        for checkpointed in (False, True):
            torch.manual_seed(1)
            model = stir(arm.add(method)).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            logits(model).square().mean().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        if any(grad is None for grad in grads[1]):
            return Seen(False, "no gradients")
        return difference(max(gap(*pair) for pair in zip(*grads, strict=True)), 1e-12)

    return check


def autocast(dtype: torch.dtype) -> Callable[[Arm, Method], Seen]:
    def check(arm: Arm, method: Method) -> Seen:
        model = stir(arm.add(method, network().float()).float(), 0.05)
        expected = logits(model)
        with torch.autocast("cpu", dtype):
            output = logits(model)
        output.float().square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        good = all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        away = gap(output, expected) / expected.abs().max().item()
        return Seen(good and away < 0.1, f"within {away:.3f}" if good else "gradients missing or not finite")

    return check


def masters(arm: Arm, method: Method) -> Seen:
    model = arm.add(method, network().float()).to(torch.bfloat16)  # what precision="bf16-true" does
    names = {name for name, _ in network().named_parameters()}
    kinds = {
        p.dtype
        for n, p in model.named_parameters()
        if p.requires_grad and n not in names and "modules_to_save" not in n
    }
    logits(model)
    return Seen(kinds == {torch.float32}, ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)))


def files(arm: Arm, method: Method) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        model = stir(arm.add(method), 0.1)
        expected = logits(model)
        arm.save(model, Path(folder))
        other: Arm = Peft() if isinstance(arm, Ours) else Ours()
        return difference(gap(logits(other.load(Path(folder))), expected), 1e-10)


def trains_after_loading(arm: Arm, method: Method) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        arm.save(stir(arm.add(method)), Path(folder))
        model = arm.load(Path(folder), trains=True)
        logits(model).square().mean().backward()
        trains = [p.grad is not None for p in model.parameters() if p.requires_grad]
        return Seen(bool(trains) and all(trains), "trains on" if trains and all(trains) else "frozen")


def torn_files_are_refused(arm: Arm, method: Method) -> Seen:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        arm.save(stir(arm.add(method)), Path(folder))
        file = Path(folder) / "adapter_model.safetensors"
        weights = load_file(file)
        weights.pop(sorted(weights)[0])
        weights["base_model.model.nowhere.lora_A.weight"] = torch.zeros(1)
        save_file(weights, file, metadata={"format": "pt"})
        try:
            arm.load(Path(folder))
        except Exception as error:
            named = "nowhere" in str(error)
            return Seen(named, "refused, keys named" if named else f"refused ({type(error).__name__})")
        return Seen(False, "loads by halves")


def switches(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method))
    first = logits(model)
    model = stir(arm.again(method, model))
    second = logits(model)
    arm.switch(model, "default")
    off = gap(logits(model), first)
    arm.switch(model, "second")
    return difference(max(off, gap(logits(model), second)) if gap(first, second) else 1.0, 0.0)


def rows(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method))
    first = logits(model)
    model = stir(arm.again(method, model))
    second = logits(model)
    mixed = arm.rows(model, ["default", "second"])
    return difference(gap(mixed, torch.stack([first[0], second[1]])), 1e-12)


def second_derivatives(arm: Arm, method: Method) -> Seen:
    """Differentiate a gradient along a direction, and compare with the difference of two gradients."""
    model = network()
    model.set_attn_implementation("eager")  # torch's fused attention has no second derivative
    model = stir(arm.add(method, model), 0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits(model).square().mean(), parameters, create_graph=True)
    along = [torch.randn_like(p) for p in parameters]
    exact = torch.autograd.grad(sum((g * d).sum() for g, d in zip(grads, along, strict=True)), parameters)
    ends = []
    for step in (1e-3, -2e-3, 1e-3):  # there, to the other side, and back
        torch._foreach_add_([p.data for p in parameters], along, alpha=step)
        ends.append(torch.autograd.grad(logits(model).square().mean(), parameters))
    slopes = [(one - two) / 2e-3 for one, two in zip(*ends[:2], strict=True)]
    size = max(s.abs().max().item() for s in slopes)
    away = max(gap(*pair) for pair in zip(exact, slopes, strict=True)) / size
    return Seen(away < 0.01, "right" if away < 0.01 else f"off by {away:.0%}")


def left_padding(arm: Arm, method: Method) -> Seen:
    model = stir(arm.add(method), 0.1)
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, input_ids=PADDED, attention_mask=MASK, position_ids=positions)
    alone = model(input_ids=PADDED[:1, 2:], attention_mask=MASK[:1, 2:], use_cache=False).logits[:, -4:]
    return difference(gap(padded[:1, 2:], alone), 1e-9)


def generates(beams: int) -> Callable[[Arm, Method], Seen]:
    def check(arm: Arm, method: Method) -> Seen:
        model = stir(arm.add(method), 0.1)
        settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        together = model.generate(input_ids=PADDED, attention_mask=MASK, **settings)[:, -5:]
        alone = [
            model.generate(input_ids=row[mask.bool()][None], attention_mask=mask[mask.bool()][None], **settings)[:, -5:]
            for row, mask in zip(PADDED, MASK, strict=True)
        ]
        right = sum(torch.equal(one, two[0]) for one, two in zip(together, alone, strict=True))
        return Seen(right == len(alone), f"{right} of {len(alone)} rows right")

    return check


Property = Callable[[Arm, Method], Seen]
PROPERTIES: dict[str, Property] = {
    "adding changes no output": adds_nothing,
    "disabled, it is the base": disabled_is_the_base,
    "keys of the base": keeps_base_keys,
    "merging keeps outputs (float64)": merging_keeps_outputs,
    "unmerging restores bits (bf16)": unmerging_restores_bits,
    "taking it off": unloading_gives_back_the_network,
    "state dict": state_comes_back,
    "deepcopy": deepcopies,
    "pickle": pickles,
    "torch.compile": graph_breaks,
    "checkpointing, re-entrant": checkpointing(True),
    "checkpointing, not re-entrant": checkpointing(False),
    "bf16 autocast": autocast(torch.bfloat16),
    "fp16 autocast": autocast(torch.float16),
    "master weights in bf16-true": masters,
    "the other library reads its file": files,
    "loaded, it trains on": trains_after_loading,
    "a file with a key missing and one too many": torn_files_are_refused,
    "several adapters": switches,
    "another adapter for each row": rows,
    "second derivatives": second_derivatives,
    "left padding": left_padding,
    "generate, greedy, left-padded": generates(1),
    "generate, 3 beams, left-padded": generates(3),
}
FILES = {"the other library reads its file", "loaded, it trains on", "a file with a key missing and one too many"}
PROMPTS_HAVE_NOT = {"adding changes no output", "merging keeps outputs (float64)", "unmerging restores bits (bf16)"}
ALL_SHARE = {"another adapter for each row"}


def applies(method: Method, name: str) -> bool:
    """Whether a property means anything for a method."""
    without: set[str] = set()
    without |= PROMPTS_HAVE_NOT | ALL_SHARE if method.prompt else set()
    without |= ALL_SHARE if method.base else set()
    without |= {"second derivatives"} if method.constants else set()
    without |= {"master weights in bf16-true"} if not method.adds else set()
    without |= FILES if not method.format else set()
    return name not in without


def see(arm: Arm, subject: Any, check: Callable[[Arm, Any], Seen]) -> Seen:
    """What a property says; an error is an answer too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check(arm, subject)
        except Exception as error:
            said = " ".join(str(error).split())
            return Seen(False, f"{type(error).__name__}: {said[:60]}{'...' if len(said) > 60 else ''}")


def layer_network(case: str) -> nn.Module:
    """One of the networks with a layer of that kind, the same at every call."""
    torch.manual_seed(3)
    return build(ZOO[case])


def adapted_layers(arm: Arm, case: str) -> nn.Module:
    """That network with a LoRA on the layers in question, moved away from its start."""
    import peft

    targets, parameters = list(ZOO[case].targets), list(ZOO[case].parameters)
    model = layer_network(case)
    if isinstance(arm, Ours):
        return lp.add_adapter(model, lp.LoRA(rank=2, alpha=6, targets=[*targets, *parameters]))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, target_parameters=parameters or None)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def layer_adds_nothing(arm: Arm, case: str) -> Seen:
    x = layer_input(case)
    return difference(gap(adapted_layers(arm, case)(x), layer_network(case)(x)), 1e-15)


def layer_merges(arm: Arm, case: str) -> Seen:
    model, x = stir(adapted_layers(arm, case)), layer_input(case)
    before = model(x)
    return difference(gap(arm.merge(model)(x), before), 1e-12)


def layer_computes_what_the_weights_say(arm: Arm, case: str) -> Seen:
    """Compare with the plain network that has the formula's weights: those of our own merge, which tests hold to float64."""
    model, x = stir(adapted_layers(arm, case)), layer_input(case)
    with tempfile.TemporaryDirectory() as folder:
        arm.save(model, Path(folder))
        loaded = lp.load_adapter(layer_network(case), folder)
    return difference(gap(lp.merge_adapter(loaded, unload=True)(x), model(x)), 1e-10)


def layer_input(case: str) -> Any:
    torch.manual_seed(4)
    return ZOO[case].inputs()


LAYERS: dict[str, Callable[[Arm, str], Seen]] = {
    "adding changes no output": layer_adds_nothing,
    "merging keeps outputs (float64)": layer_merges,
    "forward is the formula of its file": layer_computes_what_the_weights_say,
}
CANNOT_MERGE = {case for case, network in ZOO.items() if "merge" in network.no}


def layer_applies(case: str, name: str) -> bool:
    """Whether a property means anything for a kind of layer: grouped convolutions have no merged weight of low rank."""
    return case not in CANNOT_MERGE or name == "adding changes no output"


HOW = {
    "keys of the base": "so that a checkpoint of the base loads before and after",
    "master weights in bf16-true": "dtype of what the adapter added after `precision='bf16-true'`",
    "loaded, it trains on": "in PEFT with `is_trainable=True`",
    "left padding": "a row in a padded batch against the row alone; `position_ids` are given",
    "generate, greedy, left-padded": "rows in a padded batch against the rows alone",
    "generate, 3 beams, left-padded": "rows in a padded batch against the rows alone",
    "second derivatives": "against differences of gradients; with eager attention, since fused attention has none",
    "checkpointing, re-entrant": "gradients against those without",
    "checkpointing, not re-entrant": "gradients against those without",
    "bf16 autocast": "largest distance from float32, relative; gradients finite and float32",
    "fp16 autocast": "largest distance from float32, relative; gradients finite and float32",
    "the other library reads its file": "outputs in float64",
    "forward is the formula of its file": "loaded here and merged into the plain network",
}
"""What is compared."""
WHY = {
    "another adapter for each row": "the names are ignored, or the base was moved",
    "several adapters": "the base was moved when the second one came",
    "adding changes no output": "the decomposition is taken out of the base, and comes back rounded",
    "disabled, it is the base": "the base was moved when the adapter came",
    "keys of the base": "`base_layer` comes in between",
    "unmerging restores bits (bf16)": "the update is subtracted again, with rounding; here the weights were kept",
    "taking it off": "`requires_grad` stays as it has become, and the base where it was moved to",
    "torch.compile": "strings are compared in forward, or an update looks at numbers",
    "master weights in bf16-true": "small optimizer steps are rounded away",
    "the other library reads its file": "its initialisation moved the base: such a file is refused",
    "a file with a key missing and one too many": "at most a warning, or an error that does not name both",
    "left padding": "the prompt goes before the padding, and `position_ids` are dropped",
    "generate, greedy, left-padded": "the prompt goes before the padding",
    "generate, 3 beams, left-padded": "the prompt goes before the padding",
}
"""Why it is not as it should be in PEFT."""
HEADING = """# Adapters

What every method does, ours and PEFT's. Each property is tried on a small Llama (two layers, grouped queries, biases, float64) or
on a small network with one kind of layer. **Bold** is not as it should be. A property that means nothing for a method is left
out: prompts change outputs and are no change of weights, a prompt or a trained parameter of the base serves a whole batch, the
gradient of DoRA takes a norm for a constant, and PEFT has no files for BitFit and DeepPrompt.
Made by `python -m tests.adapters.conformance docs/adapters.md` {versions}.
Our column is made anew, cell by cell, in the tests.
"""


def shown(seen: Seen | None) -> str:
    """A cell of the table."""
    if seen is None:
        return "has no such method"
    text = seen.says.replace("|", "/")
    return text if seen.ok else f"**{text}**"


def page(rows: list[tuple[str, str, Seen, Seen | None]]) -> str:
    """The tables as Markdown, one for each method and one for layers."""
    lines: list[str] = []
    for title, cells in itertools.groupby(rows, key=lambda row: row[0]):
        lines += ["", f"### {title}", "", "| property | ours | PEFT | note |", "|---|---|---|---|"]
        for _, name, ours, peft in cells:
            notes = [
                HOW.get(name),
                WHY.get(name) if peft is not None and not peft.ok and ": " not in peft.says else None,
            ]
            lines.append(f"| {name} | {shown(ours)} | {shown(peft)} | {'. PEFT: '.join(filter(None, notes))} |")
    return "\n".join(lines) + "\n"


def table() -> Iterator[tuple[str, str, Seen, Seen | None]]:
    """Yield every cell: method or kind of layer, property, ours, PEFT's."""
    for (name, method), (title, check) in itertools.product(METHODS.items(), PROPERTIES.items()):
        if applies(method, title):
            yield name, title, see(Ours(), method, check), see(Peft(), method, check) if method.peft else None
    for case, (title, layer_check) in itertools.product(ZOO, LAYERS.items()):
        if layer_applies(case, title):
            yield f"LoRA on layers: {case}", title, see(Ours(), case, layer_check), see(Peft(), case, layer_check)


if __name__ == "__main__":
    import peft
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    count = sum(applies(method, title) for method in METHODS.values() for title in PROPERTIES)
    found = list(tqdm(table(), desc="cells", total=count + sum(layer_applies(c, n) for c in ZOO for n in LAYERS)))
    versions = f"with PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    write_text(Path(sys.argv[1]), HEADING.format(versions=versions) + page(found))
