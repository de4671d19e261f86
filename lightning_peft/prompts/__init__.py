"""Prompts for frozen language models: templates, answers for labels, scores, calibration, search."""

from lightning_peft.prompts.calibration import leaning
from lightning_peft.prompts.label_scores import label_log_probabilities, scoring_cost
from lightning_peft.prompts.score_cache import ScoreCache
from lightning_peft.prompts.search import PromptSearch, SearchReport
from lightning_peft.prompts.space import Candidate, PromptSpace
from lightning_peft.prompts.strategies import Bootstrap, Coordinate, Halving, RandomSearch, Rewrite, Strategy, Trial
from lightning_peft.prompts.template import Demonstration, PromptTemplate
from lightning_peft.prompts.token_flips import TokenFlips
from lightning_peft.prompts.tpe import TPE
from lightning_peft.prompts.verbalizer import Verbalizer
from lightning_peft.prompts.writing import parsed_label, write_answers

__all__ = [
    "TPE",
    "Bootstrap",
    "Candidate",
    "Coordinate",
    "Demonstration",
    "Halving",
    "PromptSearch",
    "PromptSpace",
    "PromptTemplate",
    "RandomSearch",
    "Rewrite",
    "ScoreCache",
    "SearchReport",
    "Strategy",
    "TokenFlips",
    "Trial",
    "Verbalizer",
    "label_log_probabilities",
    "leaning",
    "parsed_label",
    "scoring_cost",
    "write_answers",
]
