"""Meta-learn a module: weights from which a task is learned in a few gradient steps on a few rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.distributed import gather_objects
from lightning_peft.logging import log_figure
from lightning_peft.meta.adaptation_curve import AdaptationCurve, curve_figure
from lightning_peft.meta.config import MetaConfig
from lightning_peft.meta.episode import Episode, as_episode, over_tensors
from lightning_peft.meta.fast_weights import FastWeights
from lightning_peft.meta.inner_loop import Outcome
from lightning_peft.meta.inner_rates import InnerRates
from lightning_peft.meta.norm_statistics import StepStatistics
from lightning_peft.meta.places import Places
from lightning_peft.meta.twice_differentiable import explained
from lightning_peft.mixins.inner_names import inner_names
from lightning_peft.mixins.meta_learner import MetaLearner
from lightning_peft.mixins.order import refuse_order

_KEY = "lightning_peft_meta"


class MAMLMixin(pl.LightningModule):
    """Learn the weights from which a few gradient steps on a task's support set do best on its query set.

    ``class FewShot(MAMLMixin, MyModule)`` is all: batches are episodes (:class:`~lightning_peft.data.EpisodicDataModule` makes
    them), the module's own ``training_step`` is the loss on either set, and the meta-loss

        mean over tasks of  L_query(theta - alpha * grad L_support(theta))

    goes to automatic optimization, so accumulation, clipping, schedulers, precision and DDP work as ever. Meta-gradients are
    exact, also through normalisation layers, whatever of ``MetaConfig`` computes them. Finn et al. 2017, arXiv:1703.03400.

    Validation and test adapt to each task and log ``meta/<stage>_loss_after_<steps>`` and, for pairs of inputs and classes,
    ``meta/<stage>_accuracy_after_<steps>``, with an interval over tasks; prediction adapts, and predicts the query set.

    **The trap:** with normalisation by batch statistics (``norm_stats="batch"``, as in the paper) the rows of a query set see
    each other. Say so beside results.

    Args:
        *args: Handed on to the module.
        meta: How to meta-learn; a mapping does too.
        **kwargs: Handed on to the module.

    Raises:
        ValueError: When a fit begins, for manual optimization, strategies that shard weights, fp16 with gradients that no scaler
            reaches, or learned rates that no optimizer holds.
        RuntimeError: For operations that cannot be vectorised, or differentiated twice, with their names.
    """

    preset: ClassVar[Mapping[str, Any]] = {}
    """Settings of a variant, where ``meta`` leaves them at their defaults."""
    meta: MetaConfig
    inner_rates: InnerRates | None
    """Learned rates of the inner loop; they come in ``configure_model``."""
    step_statistics: StepStatistics | None
    """Running statistics of each inner step; they come in ``configure_model``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, MAMLMixin)

    def __init__(self, *args: Any, meta: MetaConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hparams.pop("meta", None)  # it is in the checkpoint under a key of its own
        self._given = meta is not None
        self._takes_index = len(inspect.signature(super().training_step).parameters) > 1
        self.meta = self._with_preset(meta if isinstance(meta, MetaConfig) else MetaConfig(**(meta or {})))
        # Not of the class: an attribute there would hide the submodules that come later.
        self.inner_rates = self.step_statistics = None
        self._learner: MetaLearner | None = None
        self._curves: dict[str, AdaptationCurve] = {}

    # --- yours to define ------------------------------------------------------------------------------------------------------

    def split_episode(self, batch: Any) -> Episode:
        """Return the support and query sets of a batch; by default it is an episode, a mapping or a pair of both."""
        return as_episode(batch, type(self).__name__)

    def adaptation_loss(self, batch: Any) -> Tensor:
        """Return the loss of one task's support set, which adaptation goes down; by default the module's ``training_step``."""
        step = super().training_step
        output = step(batch, 0) if self._takes_index else step(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"{type(self).__name__}: training_step returned {loss!r} for a support set, not a loss.")
        return loss

    def query_loss(self, batch: Any) -> Tensor:
        """Return the loss of one task's query set; by default as for adaptation."""
        return self.adaptation_loss(batch)

    def query_accuracy(self, batch: Any) -> Tensor | None:
        """Return the share of a query set that is right, None where there is no such thing; by default of (inputs, classes)."""
        if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            return None
        inputs, classes = batch
        if classes.is_floating_point() or classes.ndim != 1 or type(self).forward is pl.LightningModule.forward:
            return None
        logits = self(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return None
        right: Tensor = logits.argmax(1) == classes
        return right.to(logits.dtype).mean()

    def inner_parameters(self) -> list[str]:
        """Return the names of the parameters that adapt; by default what ``MetaConfig.adapt`` means."""
        names = inner_names(self, self.meta.adapt, owner=type(self).__name__)
        return [name for name in names if not name.startswith("inner_rates.")]

    # --- few-shot use ---------------------------------------------------------------------------------------------------------

    def adapt(self, support: Any, steps: int | None = None) -> FastWeights:
        """Adapt to one task and return its weights; the module's own stay as they are. Works in inference mode too.

        Args:
            support: One batch, as the module's ``training_step`` takes it.
            steps: Gradient steps; unset, ``MetaConfig.eval_steps``.

        Raises:
            ValueError: For a negative number of steps.
        """
        if steps is not None and steps < 0:
            raise ValueError(f"{type(self).__name__}.adapt: steps={steps!r} must be at least 0.")
        count = self.meta.eval_steps if steps is None else steps
        episode = Episode(_out_of_inference(support), None)
        return FastWeights(self.learner.adapted(episode, count), count)

    @contextmanager
    def with_fast_weights(self, fast: FastWeights) -> Iterator[None]:
        """Let the module's own ``forward`` see adapted weights inside the block."""
        places = Places(self, fast.parameters)
        with self.learner.normalising(fast.steps, places.parts), places.holding(list(fast.parameters.values())):
            yield

    # --- Lightning ------------------------------------------------------------------------------------------------------------

    @property
    def learner(self) -> MetaLearner:
        """What adapts, and computes meta-gradients."""
        if self._learner is None:
            self._learner = MetaLearner(self)
        return self._learner

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self.attach_meta()

    def attach_meta(self) -> None:
        """Make what ``meta`` learns or keeps beside the module's own weights; a second call does nothing.

        ``configure_model`` does it by itself.
        """
        if self.meta.learn_inner_lr and self.inner_rates is None:
            named = dict(self.named_parameters())
            adapted = {name: named[name] for name in self.inner_parameters()}
            self.inner_rates = InnerRates(
                self.meta.learn_inner_lr, adapted, start=self.meta.inner_lr, steps=self.meta.adaptation_steps
            )
        if self.meta.norm_stats == "per_step" and self.step_statistics is None:
            self.step_statistics = StepStatistics(self, self.meta.adaptation_steps)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.learner.refuse_fit(self.trainer)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self.learner.refuse_still_rates(self.trainer)

    # A compiled step could not be differentiated inside; MetaConfig.compile compiles what can be.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the meta-loss of a batch of episodes."""
        episode = self.split_episode(batch)
        loss, outcome = self.outer_loss(episode)
        self.log("meta/support_loss", outcome.support[0].mean(), batch_size=episode.tasks)
        self.log("meta/query_loss", outcome.query.mean(), prog_bar=True, batch_size=episode.tasks)
        return loss

    def outer_loss(self, episode: Episode) -> tuple[Tensor, Outcome]:
        """Return the loss that the outer loop goes down, and what it is made of."""
        return self.learner.meta_loss(episode, self.current_epoch)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        try:
            super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            told = explained(error, type(self).__name__)
            if told is error:
                raise
            raise told from error

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("validation", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> list[Any]:
        """Adapt to each task of an episode; return what the module predicts for each query set."""
        predict = super().predict_step
        own = getattr(predict, "__func__", predict) is not pl.LightningModule.predict_step
        places = (batch_idx, dataloader_idx)[: len(inspect.signature(predict).parameters) - 1]
        predictions = []
        for chunk in self.split_episode(batch).chunks(1):
            task = chunk.only()
            with self.with_fast_weights(self.adapt(task.support)), torch.no_grad():
                inputs = task.query
                if not own and isinstance(inputs, Sequence) and len(inputs) == 2:
                    inputs = inputs[0]  # Lightning's own would hand (inputs, targets) to forward
                predictions.append(predict(inputs, *places) if own else self(inputs))
        return predictions

    def _evaluate(self, stage: str, batch: Any, loader: int) -> None:
        support, query, ragged = self.split_episode(batch)
        episode = Episode(_out_of_inference(support), _out_of_inference(query), ragged)
        name = f"{stage}_{loader}" if loader else stage
        self._curves.setdefault(name, AdaptationCurve()).add(self.learner.curve(episode))

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._tell("validation")

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._tell("test")

    def _tell(self, stage: str) -> None:
        """Log the curves of a stage, over the tasks of all processes."""
        for name in sorted(key for key in self._curves if key.partition("_")[0] == stage):
            curve = AdaptationCurve()
            for other in gather_objects(self._curves.pop(name)):
                curve.add(other)
            self.log_dict(curve.summary(name), sync_dist=True, add_dataloader_idx=False)
            if not self.trainer.sanity_checking and self.trainer.loggers:
                log_figure(self.trainer, f"meta/{name}_curve", curve_figure({name: curve}))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = self.meta.plain()
        # save_hyperparameters() in a class of one's own keeps the object, which torch.load(weights_only=True) refuses.
        kept = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if isinstance(kept.get("meta"), MetaConfig):
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**kept, "meta": kept["meta"].plain()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._given and _KEY in checkpoint:
            self.meta = MetaConfig(**checkpoint[_KEY])
        # What is learned beside the weights comes after adapters, and before they look for a place of all that was saved.
        self.configure_model()
        super().on_load_checkpoint(checkpoint)

    def _with_preset(self, config: MetaConfig) -> MetaConfig:
        defaults = {field.name: field.default for field in fields(MetaConfig)}
        # 1 == True, and second_order=1 is an epoch.
        left = {key for key, default in defaults.items() if repr(getattr(config, key)) == repr(default)}
        return replace(config, **{key: value for key, value in self.preset.items() if key in left})


def _out_of_inference(batch: Any) -> Any:
    """Return a batch that autograd may keep: tensors made in inference mode are copied out of it."""
    with torch.inference_mode(False):
        return over_tensors(batch, _copied)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
