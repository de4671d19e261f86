"""Linear probes: features of a frozen network pooled to one vector a row, and heads fitted to them in closed form."""

from lightning_peft.probes.attention_pool import AttentionPool
from lightning_peft.probes.layer_probe import LayerProbe, fit_layers, layer_features
from lightning_peft.probes.linear_fit import LinearFit, fit_linear
from lightning_peft.probes.pooling import hidden_features, pool

__all__ = [
    "AttentionPool",
    "LayerProbe",
    "LinearFit",
    "fit_layers",
    "fit_linear",
    "hidden_features",
    "layer_features",
    "pool",
]
