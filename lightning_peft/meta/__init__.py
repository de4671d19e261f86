"""Starting points that are learned: adaptation as a function, and its exact gradient."""

from lightning_peft.meta.adaptation_curve import AdaptationCurve
from lightning_peft.meta.config import MetaConfig
from lightning_peft.meta.episode import Episode
from lightning_peft.meta.fast_weights import FastWeights

__all__ = ["AdaptationCurve", "Episode", "FastWeights", "MetaConfig"]
