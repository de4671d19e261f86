"""When things happen: Lightning callbacks, imported as ``lightning_peft.callbacks``."""

if __name__ == "callbacks":
    raise ImportError("import lightning_peft.callbacks, not callbacks: the bare name would make every class twice")

from lightning_peft.callbacks.decay_to_pretrained import DecayToPretrained
from lightning_peft.callbacks.decoding_evaluation import DecodingEvaluation
from lightning_peft.callbacks.ewc import EWC
from lightning_peft.callbacks.exact_resume import ExactResume
from lightning_peft.callbacks.forgetting_budget import ForgettingBudget
from lightning_peft.callbacks.forgetting_evaluation import ForgettingEvaluation
from lightning_peft.callbacks.freeze_schedule import FreezeSchedule
from lightning_peft.callbacks.gradient_flow import GradientFlow
from lightning_peft.callbacks.gradient_projection import GradientProjection
from lightning_peft.callbacks.kl_gauge import KLGauge
from lightning_peft.callbacks.memory_fill import MemoryFill
from lightning_peft.callbacks.phases import Phase, Plateau
from lightning_peft.callbacks.probe_baseline import ProbeBaseline
from lightning_peft.callbacks.replay_mixing import ReplayMixing
from lightning_peft.callbacks.weight_drift import WeightDrift
from lightning_peft.callbacks.weight_interpolation import WeightInterpolation
from lightning_peft.callbacks.zero_init_head import ZeroInitHead
from lightning_peft.old_task import OldTask
from lightning_peft.ready_tasks import accuracy_task, perplexity_task, retrieval_task

__all__ = [
    "EWC",
    "DecayToPretrained",
    "DecodingEvaluation",
    "ExactResume",
    "ForgettingBudget",
    "ForgettingEvaluation",
    "FreezeSchedule",
    "GradientFlow",
    "GradientProjection",
    "KLGauge",
    "MemoryFill",
    "OldTask",
    "Phase",
    "Plateau",
    "ProbeBaseline",
    "ReplayMixing",
    "WeightDrift",
    "WeightInterpolation",
    "ZeroInitHead",
    "accuracy_task",
    "perplexity_task",
    "retrieval_task",
]
