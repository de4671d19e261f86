"""Translate adapters to PEFT's ``adapter_config.json`` and back."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.layer_kinds import kind_of
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.lora_targets import LINEAR, adaptable, heads_of, own_parameters
from lightning_peft.adapters.lora_update import LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.updates import hosts

CONFIG = "adapter_config.json"
DESCRIPTIVE = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
"""Fields that change nothing in what is computed."""
# Fields of PEFT's that change what a LoRA computes, with the only values that we compute.
_REFUSED: dict[str, Any] = dict.fromkeys(
    (
        "lora_bias",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "trainable_token_indices",
        "monteclora_config",
        "velora_config",
        "corda_config",
        "lora_ga_config",
    )
)
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` for one LoRA of a network."""
    lora = attachment.adapters[name]
    assert isinstance(lora, LoRA)
    found = {path: u for path, _, updates in hosts(model) if (u := updates.get_update(name)) is not None}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters: list[str] = []
    for path, update in found.items():
        assert isinstance(update, LoRAUpdate | ParametersLoRA)
        key = path
        if isinstance(update, ParametersLoRA) and not isinstance(model.get_submodule(path), nn.MultiheadAttention):
            inner = [f"{path}.{parameter}".lstrip(".") for parameter in update.paths.values()]
            parameters, key = [*parameters, *inner], inner[0]
        # What counts from a start other than zero is stored as both ends side by side: of twice the rank.
        wider = 2 if isinstance(update, LoRAUpdate) and update.start_A is not None else 1
        ranks[path] = update.rank * wider
        alphas[path] = lora.alpha_of(key) * (math.sqrt(wider) if lora.scaling == "rslora" else wider)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    modules = [path for path in found if not any(p.rpartition(".")[0] == path for p in parameters)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        # An exact expression: PEFT would match a name in a list against the end of longer names too.
        "target_modules": "|".join(re.escape(path) for path in modules) if modules else [],
        **({"target_parameters": parameters} if parameters else {}),
        "exclude_modules": None,
        "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
        "use_rslora": lora.scaling == "rslora",
        "use_dora": lora.dora,
        "bias": lora.bias,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,  # loading runs the init again, and others than this move the base
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved_modules(model, lora.train_also) or None,
    }


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules that PEFT would save whole for parameters that train beside an adapter.

    Raises:
        ValueError: If only a part of a module trains.
    """
    trained = own_parameters(model, list(names), "none", {})
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in trained))
    for path in modules:
        left = [key for key, _ in model.get_submodule(path).named_parameters(path) if key not in trained]
        if left:
            raise ValueError(
                f"save_adapter: {path!r} trains without {left[0]!r}, and PEFT's format holds whole modules. "
                f"Put the whole module into train_also."
            )
    return modules


def lora_from_config(config: Mapping[str, Any], model: nn.Module, *, live: bool = False) -> LoRA:
    """Return the LoRA that PEFT's fields describe for a network.

    Args:
        config: The fields.
        model: The network without the adapter.
        live: Whether they come from a model in memory, whose base has gone through PEFT's initialisation.

    Raises:
        ValueError: If a field is missing that would have to be guessed, or asks for what cannot be computed.
    """
    if missing := [key for key in ("r", "lora_alpha") if config.get(key) is None]:
        raise ValueError(f"load_adapter: {CONFIG} lacks {missing}; PEFT would guess them, and a wrong guess is silent.")
    # An empty dict or list, false and null mean the same in these fields.
    if strange := {key: config[key] for key in _REFUSED if config.get(key)}:
        raise ValueError(f"load_adapter: {CONFIG} asks for {strange}, which cannot be computed yet.")
    start = str(config.get("init_lora_weights", True)).lower()
    if not live and start.startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"load_adapter: init_lora_weights={start!r} moved the weights of the base that the adapter was trained on, so it "
            "does not fit the base at hand. Let PEFT convert it (path_initial_model_for_weight_conversion)."
        )
    heads = matching_modules(model, config.get("modules_to_save"))
    names = [name for name in target_names(config, model) if not any(_inside(name, head) for head in heads)]
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=[glob.escape(name) for name in names],
        dropout=config.get("lora_dropout") or 0.0,
        rank_pattern=_resolved(config.get("rank_pattern"), names),
        alpha_pattern=_resolved(config.get("alpha_pattern"), names),
        scaling="rslora" if config.get("use_rslora") else "lora",
        dora=bool(config.get("use_dora")),
        train_also=[glob.escape(name) for name in heads],
        bias=config.get("bias") or "none",
    )


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _resolved(pattern: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """Return what a pattern of PEFT's gives each name: the first expression that matches its end counts."""
    found = {}
    for name in names:
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                found[glob.escape(name)] = value
                break
    return found


def matching_modules(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """Return the modules whose name ends in one of the given names, as ``modules_to_save`` does."""
    wanted = list(names or [])
    return [
        path for path, _ in model.named_modules() if any(path == name or path.endswith(f".{name}") for name in wanted)
    ]


def target_names(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return what ``target_modules``, ``target_parameters`` and their restrictions choose, by PEFT's rules.

    Raises:
        ValueError: If that is nothing.
    """
    known = adaptable(model)
    layers = [name for name, target in known.items() if target.host == name]
    targets, exclude = config.get("target_modules"), config.get("exclude_modules")
    if targets is None and not config.get("target_parameters"):
        raise ValueError(
            f"load_adapter: {CONFIG} lacks ['target_modules']; PEFT would guess them, and a wrong guess is silent."
        )
    if targets == "all-linear":
        bypassed = heads_of(model)
        names = [name for name in layers if kind_of(known[name].module) in LINEAR and name not in bypassed]
    else:
        names = [name for name in layers if _matches(targets or [], name) and _in_layers(config, targets, name)]
    names = [name for name in names if not (exclude and _matches(exclude, name))]
    parameters = list(config.get("target_parameters") or [])
    names += [name for p in parameters for name in known if known[name].host != name and _matches([p], name)]
    if not names:
        raise ValueError(f"load_adapter: target_modules={targets!r} matches no layer of {type(model).__name__}.")
    return names


def _matches(targets: str | Iterable[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(config: Mapping[str, Any], targets: Any, name: str) -> bool:
    chosen = config.get("layers_to_transform")
    if chosen is None or isinstance(targets, str) or name in (targets or []):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    for pattern in patterns:
        if found := re.match(rf".*?(?:^|\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in indices
    return False


Writer = Callable[[nn.Module, Attachment, str], dict[str, Any]]
WRITERS: dict[type[Adapter], Writer] = {LoRA: lora_config}
"""The fields of PEFT's for every adapter that it has a format for."""
READERS: dict[str, Callable[..., Adapter]] = {"LORA": lora_from_config}
"""The adapter for every ``peft_type`` that can be read."""


def adapter_from_config(config: Mapping[str, Any], model: nn.Module, *, live: bool) -> Adapter:
    """Return the adapter that PEFT's fields describe.

    Args:
        config: The fields.
        model: The network without the adapter.
        live: Whether they come from a model in memory.

    Raises:
        ValueError: If it is a method, or asks for an option, that we do not compute.
    """
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    if kind not in READERS:
        raise ValueError(f"load_adapter: peft_type={kind!r} cannot be read; these can: {', '.join(sorted(READERS))}.")
    return READERS[kind](config, model, live=live)
