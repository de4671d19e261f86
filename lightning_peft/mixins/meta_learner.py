"""What computes meta-losses, meta-gradients and adaptation for a module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_peft.distributed import refuse_sharded
from lightning_peft.meta.adaptation_curve import AdaptationCurve
from lightning_peft.meta.bookkeeping import metrics_kept, silenced
from lightning_peft.meta.compiled import CompiledRecursion
from lightning_peft.meta.episode import Episode
from lightning_peft.meta.inner_loop import InnerLoop, Outcome, added, leaves, meta_loss, recomputed
from lightning_peft.meta.inner_rates import Rate
from lightning_peft.meta.norm_statistics import batch_statistics, frozen_statistics
from lightning_peft.meta.places import Parts, Places
from lightning_peft.meta.surrogate import surrogate_loss
from lightning_peft.meta.task_losses import Params, TaskCalls
from lightning_peft.meta.twice_differentiable import (
    explained,
    math_attention,
    no_checkpointing,
    no_second_derivative,
    once_differentiable,
)
from lightning_peft.randomness import RandomState, random_state, set_random_state

if TYPE_CHECKING:
    from lightning_peft.mixins.maml_mixin import MAMLMixin

_NOT_STACKED = ("vmap", "Batching rule not implemented")
"""What torch says where something cannot be vectorised."""


class MetaLearner:
    """Adapts a module to tasks, and gives the gradient of how well that went.

    Args:
        module: What is meta-learned; its ``meta``, losses and inner parameters are asked for at every step, so that they may
            change.
    """

    def __init__(self, module: MAMLMixin) -> None:
        self.module = module
        self.compile_backend = "inductor"
        self._compiled: CompiledRecursion | None = None
        self._checked = False
        self._ahead: RandomState | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled code, which cannot be copied; it is made again where it is needed."""
        return vars(self) | {"_compiled": None}

    @property
    def name(self) -> str:
        """Who is meant in messages."""
        return type(self.module).__name__

    def refuse_fit(self, trainer: pl.Trainer) -> None:
        """Stop a run that could not end well.

        Raises:
            ValueError: For manual optimization, strategies that shard weights, and fp16 where gradients are taken outside of its
                scaler.
        """
        refuse_sharded(trainer, self.name, "a module's own weights are gathered where those stand that tasks adapt")
        if not self.module.automatic_optimization:
            raise ValueError(f"{self.name}: meta-learning needs automatic_optimization=True: it returns the meta-loss.")
        config = self.module.meta
        unscaled = config.memory == "recompute" or config.task_batching == "loop" or config.task_chunk is not None
        if str(trainer.precision) == "16-mixed" and (config.second_order is not False or unscaled):
            raise ValueError(
                f"{self.name}: precision='16-mixed' scales the loss, and inner gradients are taken outside of that, where fp16 "
                "underflows. Use precision='bf16-mixed' or '32-true', or MetaConfig(second_order=False) with stacked tasks."
            )

    def refuse_still_rates(self, trainer: pl.Trainer) -> None:
        """Stop a run whose learned rates no optimizer holds: they would never move.

        Raises:
            ValueError: With what to add.
        """
        rates = self.module.inner_rates
        if rates is None:
            return
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if any(p.requires_grad and id(p) not in held for p in rates.parameters()):
            raise ValueError(
                f"{self.name}: learn_inner_lr={self.module.meta.learn_inner_lr!r}, and configure_optimizers gives the rates to no "
                "optimizer, so they would never move. Add self.inner_rates.parameters() to a group; self.parameters() holds them."
            )

    # --- training -------------------------------------------------------------------------------------------------------------

    def meta_loss(self, episode: Episode, epoch: int) -> tuple[Tensor, Outcome]:
        """Return a loss whose gradient is the meta-gradient, and what it is made of, mean over tasks."""
        config = self.module.meta
        second_order = config.second_order_at(epoch)
        weights = config.step_weights(epoch)
        places = self._places()
        inner = places.parameters
        with self._conditions(places, second_order=second_order):
            chunks = list(self._chunks(episode, places))
            if len(chunks) == 1 and config.memory == "graph":
                loop = self._loop(chunks[0], weights, second_order)
                outcome = self._told(meta_loss, loop, chunks[0].start(inner))
                return outcome.total.mean(), outcome
            outer = places.trainable()
            total: list[Tensor | None] = [None] * len(outer)
            outcomes = []
            for calls in chunks:
                outcome, grads = self._gradients(calls, inner, outer, self._loop(calls, weights, second_order))
                outcomes.append(outcome)
                total = list(map(added, total, grads))
        joined = _joined(outcomes)
        return surrogate_loss(joined.total.sum(), zip(outer, total, strict=True)) / len(joined.total), joined

    def reptile_loss(self, episode: Episode) -> tuple[Tensor, Outcome]:
        """Return a loss whose gradient is ``theta - mean over tasks of theta_k``; its value is the query loss at ``theta_k``."""
        places, outcomes = self._places(), []
        inner = places.parameters
        moved = {name: torch.zeros_like(value) for name, value in inner.items()}
        with self._conditions(places, second_order=False):
            for calls in self._chunks(episode, places):
                loop = self._loop(calls, [1.0], second_order=False)
                start = parameters = leaves(calls.start(inner))
                support = []
                for adapted, losses in self._steps(loop, start, loop.steps):
                    parameters = adapted
                    support.append(losses)
                with torch.no_grad():
                    query = loop.query(parameters, loop.steps)
                    far = calls.summed([start[name] - parameters[name] for name in inner])
                    for name, value in zip(inner, far, strict=True):
                        assert value is not None
                        moved[name] += value / episode.tasks
                outcomes.append(Outcome(query, query, support))
        joined = _joined(outcomes)
        return surrogate_loss(joined.total.mean(), ((inner[name], moved[name]) for name in inner)), joined

    def _gradients(
        self, calls: TaskCalls, inner: Params, outer: Sequence[Tensor], loop: InnerLoop
    ) -> tuple[Outcome, Sequence[Tensor | None]]:
        """Return the gradients of the summed losses of some tasks."""
        if self.module.meta.memory == "graph":
            outcome = self._told(meta_loss, loop, calls.start(inner))
            total, outcome.total = outcome.total.sum(), outcome.total.detach()
            return outcome, self._told(torch.autograd.grad, total, outer, allow_unused=True)
        own = {id(value) for value in inner.values()}
        others = [value for value in outer if id(value) not in own]
        self._ahead = None
        outcome, v, rest = self._told(self._recomputed, loop, calls, inner, others)
        if self._ahead is not None:
            set_random_state(self._ahead, self.module.device)
        by_id: dict[int, Tensor | None] = dict(zip(map(id, inner.values()), v, strict=True))
        by_id |= dict(zip(map(id, others), rest, strict=True))
        return outcome, [by_id[id(value)] for value in outer]

    def _recomputed(self, loop: InnerLoop, calls: TaskCalls, inner: Params, others: Sequence[Tensor]) -> Any:
        if not self.module.meta.compile:
            return recomputed(loop, calls, inner, others)
        if self._compiled is None:
            self._compiled = CompiledRecursion(self.name, self.compile_backend)
        return self._compiled(loop, calls, inner, others)

    # --- evaluation -----------------------------------------------------------------------------------------------------------

    def adapted(self, support_of: Episode, steps: int) -> Params:
        """Return the weights of one task after so many first-order steps."""
        places = self._places()
        calls = TaskCalls(support_of, None, places)
        with self._evaluating(), self._conditions(places, second_order=False):
            parameters = leaves(places.parameters)
            loop = self._loop(calls, [1.0], second_order=False)
            for adapted, _ in self._steps(loop, parameters, steps):
                parameters = adapted
        own = {value.data_ptr() for value in places.parameters.values()}
        # What no step moved, all of it after none, is the module's own memory still, which goes on training.
        return {n: v.detach().clone() if v.data_ptr() in own else v.detach() for n, v in parameters.items()}

    def curve(self, episode: Episode) -> AdaptationCurve:
        """Return query losses, and accuracies, of tasks before adaptation and after each step of it."""
        found, places = AdaptationCurve(), self._places()
        for calls in self._chunks(episode, places):
            measured = []
            with self._evaluating(), self._conditions(places, second_order=False):
                parameters = leaves(calls.start(places.parameters))
                loop = self._loop(calls, [1.0], second_order=False)
                measured.append(self._told(self._measured, calls, parameters, 0))
                for t, (adapted, _) in enumerate(self._steps(loop, parameters, self.module.meta.eval_steps)):
                    measured.append(self._told(self._measured, calls, adapted, t + 1))
            losses, accuracies = zip(*measured, strict=True)
            found.add(AdaptationCurve(_by_task(losses), _by_task(accuracies)))
        return found

    def _steps(self, loop: InnerLoop, parameters: Params, steps: int) -> Iterator[tuple[Params, Tensor]]:
        """Yield the weights after each step, without a graph, and the losses before it."""
        for t in range(steps):
            parameters, losses = self._told(loop.step, parameters, t)
            parameters = leaves(parameters)
            yield parameters, losses.detach()

    @torch.no_grad()
    def _measured(self, calls: TaskCalls, parameters: Params, t: int) -> tuple[Tensor, Tensor | None]:
        def both(batch: Any) -> list[Tensor]:
            found = [self.module.query_loss(batch), self.module.query_accuracy(batch)]
            return [value for value in found if value is not None]  # vmap returns tensors only

        with self._at(t, calls.places.parts):
            losses, *accuracy = calls.query(both, parameters)
        return self._single(losses), accuracy[0] if accuracy else None

    # --- what both share ------------------------------------------------------------------------------------------------------

    def _places(self) -> Places:
        return Places(self.module, self.module.inner_parameters())

    def _chunks(self, episode: Episode, places: Places) -> Iterator[TaskCalls]:
        config = self.module.meta
        single = config.task_batching == "loop"
        if episode.ragged and not single:
            raise ValueError(
                f"{self.name}: tasks of different sizes cannot be stacked. Use MetaConfig(task_batching='loop')."
            )
        for chunk in episode.chunks(1 if single else config.task_chunk or sys.maxsize):
            one, count = (chunk.only(), None) if single else (chunk, chunk.tasks)
            yield TaskCalls(one, count, places)

    def _loop(self, calls: TaskCalls, weights: Sequence[float], second_order: bool) -> InnerLoop:
        module, statistics = self.module, self.module.step_statistics

        def run(call: Callable[..., Any], method: Callable[[Any], Any], parameters: Params, t: int) -> Tensor:
            if statistics is None or not module.training:
                with self._at(t, calls.places.parts):
                    return self._single(call(method, parameters))
            losses, found = call(statistics.recording(module, method), parameters)
            statistics.update(module, t, found)
            return self._single(losses)

        def support(parameters: Params, t: int) -> Tensor:
            losses = run(calls.support, module.adaptation_loss, parameters, t)
            if second_order and not torch.compiler.is_compiling():
                self._check_twice(losses)
            return losses

        return InnerLoop(
            support=support,
            query=lambda parameters, t: run(calls.query, module.query_loss, parameters, t),
            rate=lambda t: self._rate(t, list(calls.places.parameters)),
            steps=module.meta.adaptation_steps,
            weights=[weight or None for weight in weights],
            second_order=second_order,
            generators=self._generators if module.training else None,
        )

    def _single(self, losses: Tensor) -> Tensor:
        """Return one loss for each task; a module's may be of shape ``(1,)``, as Lightning takes it."""
        if losses.ndim > 1 and losses[0].numel() != 1:
            raise ValueError(
                f"{self.name}: the loss of a task has shape {tuple(losses.shape[1:])}; it must be one number. Take the mean."
            )
        return losses.flatten()

    def _check_twice(self, losses: Tensor) -> None:
        """Look once for custom functions without a second derivative: ``autograd.grad`` passes over them without a word."""
        if not self._checked and (names := sorted(once_differentiable(losses))):
            raise no_second_derivative(f"the custom functions {names}", self.name)
        self._checked = True

    def _rate(self, t: int, names: Sequence[str]) -> Rate:
        rates = self.module.inner_rates
        return float(self.module.meta.inner_lr) if rates is None else rates.at(t, names)

    def _generators(self, state: RandomState | None) -> RandomState:
        if state is None:
            return random_state(self.module.device)
        if self._ahead is None:  # the next task goes on from here: else it would draw what this one drew
            self._ahead = random_state(self.module.device)
        set_random_state(state, self.module.device)
        return state

    @property
    def _by_step(self) -> bool:
        """Whether each step normalises by statistics of its own."""
        return self.module.step_statistics is not None and not self.module.training

    def _at(self, t: int, parts: Parts) -> AbstractContextManager[None]:
        return self.normalising(t, parts) if self._by_step else nullcontext()  # else it holds for all steps already

    def normalising(self, t: int, parts: Parts) -> AbstractContextManager[None]:
        """Let normalisation layers use what ``norm_stats`` says for the weights after ``t`` steps."""
        kind = self.module.meta.norm_stats
        if kind == "frozen":
            return frozen_statistics(parts)
        statistics = self.module.step_statistics
        return batch_statistics(parts) if statistics is None or not self._by_step else statistics.at(parts, t)

    @contextmanager
    def _conditions(self, places: Places, *, second_order: bool) -> Iterator[None]:
        """Silence the module's logs and metrics, which would see tasks and not batches, and choose kernels."""
        with ExitStack() as stack:
            # Stacked tasks too: vmap has no rule for the fused kernels, and would run them task by task.
            stack.enter_context(math_attention(second_order or self.module.meta.task_batching == "stacked"))
            stack.enter_context(no_checkpointing(self.name))
            if not self._by_step:
                stack.enter_context(self.normalising(0, places.parts))
            stack.enter_context(silenced(self.module))
            stack.enter_context(metrics_kept(places.parts))
            yield

    @staticmethod
    @contextmanager
    def _evaluating() -> Iterator[None]:
        """Allow gradients, wherever Lightning has switched them off."""
        with torch.inference_mode(False), torch.enable_grad():
            yield

    def _told(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do something, and say of its errors what a user can do about them."""
        try:
            return work(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise RuntimeError(
                f"{self.name}: the meta-gradient does not compile: {error}. Use MetaConfig(compile=False), or define "
                "adaptation_loss(self, batch) without what stops it."
            ) from error
        except RuntimeError as error:
            if any(sign in str(error) for sign in _NOT_STACKED):
                raise RuntimeError(
                    f"{self.name}: something in the loss cannot run on stacked tasks: {error}. Use "
                    "MetaConfig(task_batching='loop'), or define adaptation_loss(self, batch) without it."
                ) from error
            told = explained(error, self.name)
            if told is error:
                raise
            raise told from error


def _by_task(values: Sequence[Tensor | None]) -> list[list[float]]:
    """Return a row for each task of what was measured after each step."""
    if any(value is None for value in values):
        return []
    rows: list[list[float]] = torch.stack([value for value in values if value is not None], 1).tolist()
    return rows


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    if len(outcomes) == 1:
        return outcomes[0]
    steps = zip(*(outcome.support for outcome in outcomes), strict=True)
    return Outcome(
        torch.cat([outcome.total for outcome in outcomes]),
        torch.cat([outcome.query for outcome in outcomes]),
        [torch.cat(step) for step in steps],
    )
