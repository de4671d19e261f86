"""Scorers of texts: what can still become valid, what is valid, what passes its tests."""

from lightning_peft.decoding.scorers.runs_tests import RunReport, RunsTests

__all__ = ["RunReport", "RunsTests"]
