"""Scorers of texts: what can still become valid, what is valid, what passes its tests."""

from lightning_peft.decoding.scorers.classifier_score import ClassifierScore
from lightning_peft.decoding.scorers.json_viability import JSONViability
from lightning_peft.decoding.scorers.python_source import PythonParses, PythonViability
from lightning_peft.decoding.scorers.regex_viability import RegexViability
from lightning_peft.decoding.scorers.runs_tests import RunsTests

__all__ = ["ClassifierScore", "JSONViability", "PythonParses", "PythonViability", "RegexViability", "RunsTests"]
