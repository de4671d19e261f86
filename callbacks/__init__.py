"""When things happen: Lightning callbacks, imported as ``lightning_peft.callbacks``."""

if __name__ == "callbacks":
    raise ImportError("import lightning_peft.callbacks, not callbacks: the bare name would make every class twice")

from lightning_peft.callbacks.exact_resume import ExactResume
from lightning_peft.callbacks.forgetting_evaluation import ForgettingEvaluation
from lightning_peft.callbacks.freeze_schedule import FreezeSchedule
from lightning_peft.callbacks.gradient_flow import GradientFlow
from lightning_peft.callbacks.phases import Phase, Plateau
from lightning_peft.callbacks.replay_mixing import ReplayMixing
from lightning_peft.callbacks.weight_drift import WeightDrift
from lightning_peft.callbacks.zero_init_head import ZeroInitHead
from lightning_peft.old_task import OldTask

__all__ = [
    "ExactResume",
    "ForgettingEvaluation",
    "FreezeSchedule",
    "GradientFlow",
    "OldTask",
    "Phase",
    "Plateau",
    "ReplayMixing",
    "WeightDrift",
    "ZeroInitHead",
]
