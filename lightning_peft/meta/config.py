"""How a module is meta-learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_peft.counts import check_counts

LearnedRates = Literal["global", "layer", "layer_step", "parameter"]
NormStatistics = Literal["batch", "frozen", "per_step"]


@dataclass(frozen=True)
class MetaConfig:
    """How a module is meta-learned; plain data, for YAML and the command line too.

    Args:
        adapt: What the inner loop changes: ``"all"`` that trains, ``"head"``, ``"adapters"``, or globs over the names of
            parameters. What it leaves alone is still learned by the outer loop, if it requires a gradient.
        adaptation_steps: Gradient steps on the support set while training.
        eval_adaptation_steps: Steps in validation, test and prediction; unset, as many as in training.
        inner_lr: Rate of a step; where rates are learned, their start.
        learn_inner_lr: Learn one rate (``"global"``), one for each tensor (``"layer"``), one for each tensor and step
            (``"layer_step"``, Antoniou et al. 2019, arXiv:1810.09502), or one for each weight (``"parameter"``, Meta-SGD, Li et
            al. 2017, arXiv:1707.09835).
        second_order: Differentiate through the inner gradients (MAML) or not (first-order MAML); a number is the epoch, counted
            from 0, at which it begins.
        multi_step_loss_epochs: For so many epochs the query losses after all steps count, first equally, then ever more the last
            one (Antoniou et al. 2019); 0: the last one alone.
        task_batching: ``"stacked"``: all tasks in one forward; ``"loop"``: one by one, for what cannot be vectorised, and with the
            least memory.
        task_chunk: Tasks that are stacked at a time; unset, all.
        memory: ``"graph"`` keeps the graph of all inner steps; ``"recompute"`` that of one, and computes each step twice (compiled,
            each but the last): the same gradients, to rounding.
        norm_stats: What normalisation with running statistics uses: those of the ``"batch"`` (as in the MAML paper: query rows
            then see each other, so results are transductive; say so beside them), ``"frozen"`` running ones, or running ones of
            their own for each inner step, ``"per_step"``.
        compile: Compile the meta-gradient; needs ``memory="recompute"`` and stacked tasks of one shape.

    Raises:
        ValueError: For values that do not fit.

    >>> MetaConfig(adaptation_steps=5, inner_lr=0.4).eval_steps
    5
    """

    adapt: str | Sequence[str] = "all"
    adaptation_steps: int = 1
    eval_adaptation_steps: int | None = None
    inner_lr: float = 0.01
    learn_inner_lr: LearnedRates | None = None
    second_order: bool | int = True
    multi_step_loss_epochs: int = 0
    task_batching: Literal["stacked", "loop"] = "stacked"
    task_chunk: int | None = None
    memory: Literal["graph", "recompute"] = "graph"
    norm_stats: NormStatistics = "batch"
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        self._choices()
        check_counts(self, "adaptation_steps")
        check_counts(self, "multi_step_loss_epochs", least=0)
        check_counts(
            self, *(name for name in ("eval_adaptation_steps", "task_chunk") if getattr(self, name) is not None)
        )
        if not isinstance(self.second_order, bool):
            check_counts(self, "second_order", least=0)
        number = isinstance(self.inner_lr, int | float) and not isinstance(self.inner_lr, bool)
        if not number or not 0 <= self.inner_lr < float("inf"):
            raise ValueError(f"MetaConfig: inner_lr={self.inner_lr!r} must be a number of at least 0.")
        globs = [self.adapt] if isinstance(self.adapt, str) else self.adapt
        if not isinstance(globs, Sequence) or not globs or not all(isinstance(glob, str) for glob in globs):
            raise ValueError(
                f"MetaConfig: adapt={self.adapt!r} must be 'all', 'head', 'adapters', a glob or a list of globs."
            )
        if self.compile and (self.memory != "recompute" or self.task_batching != "stacked"):
            raise ValueError(
                "MetaConfig: compile=True needs memory='recompute' and task_batching='stacked': a compiled graph cannot be "
                "differentiated twice, so all derivatives must be inside of it."
            )
        if self.norm_stats == "per_step" and self.memory != "graph":
            raise ValueError(
                "MetaConfig: norm_stats='per_step' needs memory='graph': a step computed twice would count twice."
            )

    def _choices(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "task_batching": ("stacked", "loop"),
            "memory": ("graph", "recompute"),
            "norm_stats": ("batch", "frozen", "per_step"),
            "learn_inner_lr": (None, "global", "layer", "layer_step", "parameter"),
            "compile": (False, True),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"MetaConfig: {name}={getattr(self, name)!r} must be one of {list(allowed)}.")

    @property
    def eval_steps(self) -> int:
        """Steps in validation, test and prediction."""
        return self.adaptation_steps if self.eval_adaptation_steps is None else self.eval_adaptation_steps

    def second_order_at(self, epoch: int) -> bool:
        """Whether an epoch differentiates through the inner gradients."""
        return self.second_order if isinstance(self.second_order, bool) else epoch >= self.second_order

    def step_weights(self, epoch: int) -> list[float]:
        """Return how much the query loss after each step counts in an epoch; they sum to 1.

        Of ``k`` steps each has ``1/k`` in the first epoch; all but the last fall to nothing within ``multi_step_loss_epochs``.

        >>> MetaConfig(adaptation_steps=2, multi_step_loss_epochs=4).step_weights(2)
        [0.25, 0.75]
        """
        steps = self.adaptation_steps
        left = max(1 - epoch / self.multi_step_loss_epochs, 0.0) if self.multi_step_loss_epochs else 0.0
        early = left / steps
        return [early] * (steps - 1) + [1 - early * (steps - 1)]

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        adapt = self.adapt if isinstance(self.adapt, str) else list(self.adapt)
        return asdict(self) | {"adapt": adapt}
