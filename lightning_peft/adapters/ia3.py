"""IA3: rescale what frozen layers put out, or take in, by learned vectors.

``y = l * (W x + b)`` on keys and values, ``y = W (l * x) + b`` on the last projection of a feed-forward block.
Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.ia3_update import IA3Update
from lightning_peft.adapters.layer_kinds import AdaptedConv, AdaptedConv1D, AdaptedLinear, kind_of
from lightning_peft.adapters.layer_targets import select_layers
from lightning_peft.adapters.lora_targets import Target, adaptable, check_apart
from lightning_peft.adapters.updates import place
from lightning_peft.matching import match_names

LAYER_KINDS = (AdaptedLinear, AdaptedConv1D, AdaptedConv)
KEYS_AND_VALUES = (
    *(".k_proj", ".v_proj"),  # llama, mistral, qwen, opt, bart, ViT
    *(".key", ".value"),  # bert, roberta
    *(".k_lin", ".v_lin"),  # distilbert
    *(".SelfAttention.k", ".SelfAttention.v", ".EncDecAttention.k", ".EncDecAttention.v"),  # t5
    *(".attn.c_attn", ".query_key_value"),  # gpt2, bloom, falcon, gpt-neox: one layer, so the queries are scaled too
)
"""How names of the common projections to keys and values end."""
FEEDFORWARD = (
    ".down_proj",  # llama, mistral, qwen, gemma
    ".output.dense",  # bert, roberta
    ".ffn.lin2",  # distilbert
    ".mlp.c_proj",  # gpt2
    ".DenseReluDense.wo",  # t5
    ".fc2",  # opt, bart, ViT, phi
    ".dense_4h_to_h",  # bloom, falcon, gpt-neox
)
"""How names of the common last projections of feed-forward blocks end."""
ATTENTION_OUTPUT = ".attention.output.dense"  # bert's, which ends like its feed-forward projection


@dataclass(frozen=True, repr=False)
class IA3(Adapter):
    """Vectors that scale activations, one number per feature; everything else is frozen.

    They start at one, so adding the adapter changes no output. Layers may be ``nn.Linear``, transformers' ``Conv1D`` and
    ``nn.Conv1d/2d/3d`` (a number per channel). On a bfloat16 or float16 base the vectors stay float32 and are cast at
    each use.

    **The trap:** a vector has very few numbers and starts at one, so it wants a learning rate well above LoRA's; the
    paper trains with 3e-3.

    Args:
        targets: Globs over names of layers whose output is scaled, their bias with it. None for the key and value
            projections and the feed-forward projections of common transformers, by their names.
        feedforward: Globs of layers whose input is scaled instead; they need not be in ``targets``. None for those of
            the targets that are called like a common feed-forward projection.
        exclude: Globs of layers to leave out.

    Raises:
        ValueError: For globs that are a plain string, here; for targets that do not fit a network, when it is adapted.

    >>> IA3(targets=["*.key"], feedforward=["*.output.dense"]).scales_input("layer.0.output.dense")
    True
    """

    targets: list[str] | tuple[str, ...] | None = None
    feedforward: list[str] | tuple[str, ...] | None = None
    exclude: list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        for name in ("targets", "feedforward", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str) or (name == "targets" and value is not None and not value):
                raise ValueError(f"IA3: {name}={value!r} must be a list of globs.")
            object.__setattr__(self, name, value if value is None else tuple(value))

    def scales_input(self, layer: str) -> bool:
        """Whether the vector of a layer scales its input, not its output."""
        if self.feedforward is None:
            return _is_feedforward(layer)
        return any(fnmatchcase(layer, glob) for glob in self.feedforward)

    @override
    def select(self, model: nn.Module) -> dict[str, Target]:
        """Return the layers of ``model`` that this adapter would scale, by name.

        Raises:
            ValueError: If a glob matches nothing, or a layer does not fit.
        """
        layers = [name for name, target in adaptable(model).items() if kind_of(target.module) in LAYER_KINDS]
        feedforward = match_names(layers, self.feedforward or (), owner="IA3: feedforward", kind="layer")
        if self.targets is not None:
            globs = [*self.targets, *feedforward]
        else:
            globs = [name for name in layers if f".{name}".endswith(KEYS_AND_VALUES)] + feedforward
            globs += [name for name in layers if self.feedforward is None and _is_feedforward(name)]
            if not globs:
                raise ValueError(
                    f"IA3: no layer of this {type(model).__name__} is called like a common projection to keys, to values "
                    "or out of a feed-forward block. Say which layers to scale with targets= and feedforward=."
                )
        return select_layers(model, globs, self.exclude, LAYER_KINDS, owner="IA3")

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        targets, trained = self.select(model), []
        check_apart(self.also(model), targets, owner="IA3")
        for host, target in targets.items():
            kind = kind_of(target.module)
            assert kind is not None
            layer = kind.adapt(target.module)
            update = IA3Update(layer, target, scales_input=self.scales_input(host))
            trained.append(f"{host}.{place(layer, name, update)}ia3_l".lstrip("."))
        return trained


def _is_feedforward(layer: str) -> bool:
    return f".{layer}".endswith(FEEDFORWARD) and not f".{layer}".endswith(ATTENTION_OUTPUT)
