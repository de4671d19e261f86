"""The well-known variants of MAML, a mixin each."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_peft.meta.episode import Episode
from lightning_peft.meta.inner_loop import Outcome
from lightning_peft.mixins.maml_mixin import MAMLMixin


class FOMAMLMixin(MAMLMixin):
    """First-order MAML: the query gradient at the adapted weights is taken for the meta-gradient.

    Finn et al. 2017, arXiv:1703.03400, section 5.2.
    """

    preset = {"second_order": False}


class ANILMixin(MAMLMixin):
    """Almost no inner loop: the head adapts, the outer loop learns everything. Raghu et al. 2020, arXiv:1909.09157."""

    preset = {"adapt": "head"}


class MetaSGDMixin(MAMLMixin):
    """MAML that learns a rate for every weight besides. Li et al. 2017, arXiv:1707.09835."""

    preset = {"learn_inner_lr": "parameter"}


class ReptileMixin(MAMLMixin):
    """Move towards what tasks adapt to: ``theta - mean of theta_k`` stands for the gradient, so the outer rate is the paper's step.

    Nichol et al. 2018, arXiv:1803.02999, algorithm 2. The support set is all that trains; give it more rows in training than
    in evaluation, as the paper does (1-shot tasks train with 10 or 15).

    Raises:
        ValueError: When a fit begins, for settings that the algorithm has no use for: learned rates, which no gradient would reach,
            losses after each step, and memory for a graph that it never builds.
    """

    preset = {"second_order": False}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.meta.learn_inner_lr:
            raise ValueError(
                f"{type(self).__name__}: learn_inner_lr={self.meta.learn_inner_lr!r}: Reptile has no gradient for rates. "
                "Leave it unset, or use FOMAMLMixin."
            )
        idle = {"memory": "graph", "multi_step_loss_epochs": 0}
        if stage == "fit" and (wrong := [name for name, usual in idle.items() if getattr(self.meta, name) != usual]):
            raise ValueError(
                f"{type(self).__name__}: Reptile has no use for {wrong[0]}={getattr(self.meta, wrong[0])!r}: it takes no gradient "
                "through its steps, and its query set is never trained on. Leave it unset."
            )

    @override
    def outer_loss(self, episode: Episode) -> tuple[Tensor, Outcome]:
        return self.learner.reptile_loss(episode)
