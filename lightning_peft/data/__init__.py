"""Mixing of old and new rows, buffers of old ones, episodes, and the packaged models and data."""

from lightning_peft.data.class_balanced_buffer import ClassBalancedBuffer
from lightning_peft.data.episode_loader import EpisodeCollate, EpisodeLoader
from lightning_peft.data.episode_sampler import EpisodeSampler, TaskSampler
from lightning_peft.data.episodic_data_module import EpisodicDataModule
from lightning_peft.data.feature_cache import FeatureCache
from lightning_peft.data.herding_buffer import HerdingBuffer
from lightning_peft.data.ratio import CosineRatio, LinearRatio
from lightning_peft.data.reservoir_buffer import ReservoirBuffer
from lightning_peft.data.self_generated import SelfGenerated
from lightning_peft.data.sinusoids import Sinusoids

__all__ = [
    "ClassBalancedBuffer",
    "CosineRatio",
    "EpisodeCollate",
    "EpisodeLoader",
    "EpisodeSampler",
    "EpisodicDataModule",
    "FeatureCache",
    "HerdingBuffer",
    "LinearRatio",
    "ReservoirBuffer",
    "SelfGenerated",
    "Sinusoids",
    "TaskSampler",
]
