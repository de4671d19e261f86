"""Decoding that spends compute on search, with external scorers and exact accounts."""

from lightning_peft.decoding.beam_search import BeamSearch
from lightning_peft.decoding.compute_curve import ComputeCurve, compute_curve, pass_at_k
from lightning_peft.decoding.draft import Draft, Scorer, Viability
from lightning_peft.decoding.result import DecodeResult, Hypothesis
from lightning_peft.decoding.sampling import Greedy, Sample
from lightning_peft.decoding.selection import MBR, BestOfN, SelfConsistency

__all__ = [
    "MBR",
    "BeamSearch",
    "BestOfN",
    "ComputeCurve",
    "DecodeResult",
    "Draft",
    "Greedy",
    "Hypothesis",
    "Sample",
    "Scorer",
    "SelfConsistency",
    "Viability",
    "compute_curve",
    "pass_at_k",
]
