"""What is measured, as torchmetrics classes."""

from lightning_peft.metrics.retrieval import RecallAtOne

__all__ = ["RecallAtOne"]
