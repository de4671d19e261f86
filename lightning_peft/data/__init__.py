"""Mixing of old and new rows, and the packaged models and data."""

from lightning_peft.data.ratio import CosineRatio, LinearRatio

__all__ = ["CosineRatio", "LinearRatio"]
