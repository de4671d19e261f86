"""Decoding that spends compute on search, with external scorers and exact accounts."""

from lightning_peft.decoding.beam_search import BeamSearch
from lightning_peft.decoding.compute_curve import compute_curve
from lightning_peft.decoding.result import DecodeResult
from lightning_peft.decoding.sample import Greedy, Sample
from lightning_peft.decoding.selection import MBR, BestOfN, SelfConsistency

__all__ = ["MBR", "BeamSearch", "BestOfN", "DecodeResult", "Greedy", "Sample", "SelfConsistency", "compute_curve"]
