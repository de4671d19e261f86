"""Which parameters each phase of a schedule trains, and with which share of their learning rate."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightning_peft.blocks import block_of
from lightning_peft.callbacks.phases import Phase
from lightning_peft.matching import match_names


class PhaseParameters:
    """The parameters of every phase, by name.

    Args:
        phases: The phases in order.
        module: The root of the names.
        found: Names of what was trainable when the run began; the others need ``thaw_base``.
        owner: Who asks, for messages.

    Raises:
        ValueError: For globs that match no parameter, or only frozen ones, and for a warm-up of a phase that frees nothing.
    """

    def __init__(self, phases: Sequence[Phase], module: nn.Module, found: Collection[str], owner: str) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.chosen = [self._choose(number, phase, set(found), owner) for number, phase in enumerate(phases)]
        self.freed = [
            set(chosen).difference(self.chosen[number - 1] if number else ())
            for number, chosen in enumerate(self.chosen)
        ]
        self.scales = [self._scale(number, phase, owner) for number, phase in enumerate(phases)]
        self._warmups = [phase.warmup_steps for phase in phases]
        for number, warmup in enumerate(self._warmups):
            if warmup and not self.freed[number]:
                raise ValueError(
                    f"{owner}: phase {number} frees nothing that phase {number - 1} did not train, so warmup_steps={warmup} "
                    "has nothing to warm up. Leave it out."
                )

    def factor(self, number: int, name: str, step: int) -> float:
        """Return the factor of a parameter's learning rate.

        Args:
            number: Number of the phase.
            name: Name of the parameter.
            step: Optimizer steps that the phase has taken before this one.
        """
        factor = self.scales[number].get(name, 1.0)
        warmup = self._warmups[number]
        return factor * (step + 1) / warmup if step < warmup and name in self.freed[number] else factor

    def shares(self, module: nn.Module) -> list[dict[str, float]]:
        """Return for each phase the share of every block's numbers that it trains."""
        shares = []
        for chosen in map(set, self.chosen):
            total: dict[str, list[int]] = {}
            for name, parameter in module.named_parameters():
                counts = total.setdefault(block_of(name), [0, 0])
                counts[0] += parameter.numel() * (name in chosen)
                counts[1] += parameter.numel()
            shares.append({block: trained / max(count, 1) for block, (trained, count) in total.items()})
        return shares

    def _choose(self, number: int, phase: Phase, found: set[str], owner: str) -> list[str]:
        matched = match_names(self.names, phase.train, owner=f"{owner}: phase {number}", kind="parameter")
        chosen = matched if phase.thaw_base else [name for name in matched if name in found]
        if not chosen:
            raise ValueError(
                f"{owner}: phase {number} ({phase.train}) matches {len(matched)} parameters, all of them frozen when "
                f"the run began, first {matched[:3]}. Write Phase(..., thaw_base=True) to free them."
            )
        return chosen

    def _scale(self, number: int, phase: Phase, owner: str) -> dict[str, float]:
        if not isinstance(phase.lr_scale, Mapping):
            return dict.fromkeys(self.chosen[number], phase.lr_scale)
        scales: dict[str, float] = {}
        for glob, factor in phase.lr_scale.items():
            for name in match_names(
                self.chosen[number], glob, owner=f"{owner}: lr_scale of phase {number}", kind="parameter"
            ):
                scales.setdefault(name, factor)
        return scales
