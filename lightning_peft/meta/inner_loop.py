"""Adaptation by gradient steps, and the gradient of what comes out by what went in, exactly.

``theta_{t+1} = theta_t - alpha_t * grad L_support(theta_t)``, and the meta-loss is ``sum_t w_t L_query(theta_t)``, mean over
tasks (Finn et al. 2017, arXiv:1703.03400, algorithm 1). Everything is ordinary autograd over the summed losses of the tasks, each
of which depends on its own weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_peft.meta.inner_rates import Rate
from lightning_peft.meta.task_losses import Params, TaskCalls
from lightning_peft.randomness import RandomState

Weight = float | Tensor | None
Losses = Callable[[Params, int], Tensor]
"""Losses ``(tasks,)`` under weights after so many steps."""


@dataclass(frozen=True)
class InnerLoop:
    """How tasks adapt and what is asked of them.

    Args:
        support: Losses that adaptation goes down.
        query: Losses that the result is judged by.
        rate: Rate of a step.
        steps: How many.
        weights: How much the query loss after each step counts; None where it is not asked for.
        second_order: Whether the inner gradients are differentiated.
        generators: Takes down the state of the random generators, and goes back to it if given one; a step that is computed twice
            then draws the same dropout. None where nothing is drawn.
    """

    support: Losses
    query: Losses
    rate: Callable[[int], Rate]
    steps: int
    weights: Sequence[Weight]
    second_order: bool = True
    generators: Callable[[RandomState | None], RandomState] | None = None

    def step(self, parameters: Params, t: int, *, plain: bool = False) -> tuple[Params, Tensor]:
        """Take step ``t``, a plain one without a graph of its gradients; return the new weights and the losses of the old ones."""
        losses = self.support(parameters, t)
        values = list(parameters.values())
        every = torch.ones_like(losses)
        grads = torch.autograd.grad(
            losses, values, every, create_graph=self.second_order and not plain, allow_unused=True
        )
        return dict(zip(parameters, moved(values, grads, self.rate(t)), strict=True)), losses


@dataclass
class Outcome:
    """What an inner loop came to.

    Args:
        total: The weighted query losses of the tasks, ``(tasks,)``.
        query: Those after the last step.
        support: Losses on the support sets before each step.
    """

    total: Tensor
    query: Tensor
    support: list[Tensor] = field(default_factory=list)


def moved(values: Sequence[Tensor], grads: Sequence[Tensor | None], rate: Rate) -> list[Tensor]:
    """Return ``value - rate * grad`` of each; without a gradient the value itself."""
    if isinstance(rate, float):
        found = [grad for grad in grads if grad is not None]
        if len(found) == len(values):
            return list(torch._foreach_add(list(values), found, alpha=-rate))
        return [v if g is None else v - rate * g for v, g in zip(values, grads, strict=True)]
    return [v if g is None else v - r * g for v, g, r in zip(values, grads, rate, strict=True)]


def meta_loss(loop: InnerLoop, parameters: Params) -> Outcome:
    """Adapt with the graph of all steps, so that ``backward`` of the total gives the meta-gradient."""
    totals, support, query = [], [], None
    for t in range(loop.steps):
        parameters, losses = loop.step(parameters, t)
        support.append(losses.detach())
        weight = loop.weights[t]
        if weight is not None:
            query = loop.query(parameters, t + 1)
            totals.append(query if weight == 1 else weight * query)
    assert query is not None
    return Outcome(totals[0] if len(totals) == 1 else torch.stack(totals).sum(0), query.detach(), support)


def recomputed(
    loop: InnerLoop, calls: TaskCalls, parameters: Params, others: Sequence[Tensor], *, keep_last: bool = False
) -> tuple[Outcome, list[Tensor | None], list[Tensor | None]]:
    """Return what :func:`meta_loss` comes to, and its gradients, with the graph of one inner step at a time.

    Backwards from ``v = 0``: ``v <- v + w_t grad L_query(theta_t)``, then ``v <- J^T v`` through step ``t``: for plain rates
    ``v - alpha H v``, a Hessian-vector product (the mode that MixFlow-MG uses, Kemaev et al. 2025, arXiv:2505.00793). Only the
    weights after each step are kept, and each until the recursion has passed it.

    Args:
        loop: The inner loop.
        calls: The tasks that it runs over.
        parameters: What all of them start from.
        others: What else the losses depend on, learned rates among them.
        keep_last: Whether the graph of the last step stays beside that of the query loss: a step less to take twice.

    Returns:
        The outcome, the gradient of the summed total by every parameter, and by all others (None: it depends on none).
    """
    path, support, states = [leaves(calls.start(parameters))], [], []
    for t in range(loop.steps):
        states.append(loop.generators(None) if loop.generators else None)
        following, losses = loop.step(path[-1], t, plain=not keep_last or t < loop.steps - 1)
        path.append(leaves(following))
        support.append(losses.detach())
    kept = list(following.values()) if keep_last else None
    del following, losses  # they would outlive what is popped below
    queries: list[tuple[float | Tensor, Tensor]] = []
    v: list[Tensor | None] = [None] * len(parameters)
    rest: list[Tensor | None] = [None] * len(others)
    for t in reversed(range(loop.steps)):
        reached = path.pop()
        weight = loop.weights[t]
        if weight is not None:
            query = loop.query(reached, t + 1)
            queries.append((weight, query.detach()))
            _through([(query * weight).sum()], reached, others, None, (v, rest))
            del query
        del reached
        before, v = v, [None] * len(v)
        if kept is None:
            if states[t] is not None and loop.generators:
                loop.generators(states[t])
            kept = list(loop.step(path[t], t)[0].values())
        moved_to, kept = kept, None
        reached_by = [(value, weight) for value, weight in zip(moved_to, before, strict=True) if weight is not None]
        if reached_by:
            outputs, weights = zip(*reached_by, strict=True)
            _through(outputs, path[t], others, weights, (v, rest))
            del outputs, weights
        del before, moved_to, reached_by
    total = torch.stack([weight * query for weight, query in queries]).sum(0)
    v, rest = ([None if one is None else one.detach() for one in side] for side in (v, rest))
    return Outcome(total, queries[0][1], support), calls.summed(v), rest


def _through(
    outputs: Sequence[Tensor],
    parameters: Params,
    others: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    onto: tuple[list[Tensor | None], list[Tensor | None]],
) -> None:
    """Add the gradients of outputs, each weighted, by the parameters and by what else they depend on, onto known ones."""
    found = torch.autograd.grad(outputs, [*parameters.values(), *others], grad_outputs=weights, allow_unused=True)
    own, more = onto
    own[:] = map(added, own, found[: len(parameters)])
    more[:] = map(added, more, found[len(parameters) :])


def leaves(parameters: Params) -> Params:
    """Return weights that gradients can be taken of, without what led to them."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, either of which may be missing."""
    if old is None or new is None:
        return new if old is None else old
    return old + new
