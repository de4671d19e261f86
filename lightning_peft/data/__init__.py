"""Mixing of old and new rows, buffers of old ones, and the packaged models and data."""

from lightning_peft.data.class_balanced_buffer import ClassBalancedBuffer
from lightning_peft.data.feature_cache import FeatureCache
from lightning_peft.data.herding_buffer import HerdingBuffer
from lightning_peft.data.ratio import CosineRatio, LinearRatio
from lightning_peft.data.reservoir_buffer import ReservoirBuffer
from lightning_peft.data.self_generated import SelfGenerated

__all__ = [
    "ClassBalancedBuffer",
    "CosineRatio",
    "FeatureCache",
    "HerdingBuffer",
    "LinearRatio",
    "ReservoirBuffer",
    "SelfGenerated",
]
