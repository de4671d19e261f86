"""What a frozen module says of a batch: the vectors that go into its head, or the hidden states of its network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.adapters.switch import adapter_disabled
from lightning_peft.data.content_digest import key_of
from lightning_peft.matching import nearest
from lightning_peft.mixins.cached_inputs import divided, label_key
from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.probes.layer_probe import layer_features


class ProbeFeatures:
    """Reads features, ``(rows, poolings, layers, width)``, and labels of batches of a LightningModule.

    Args:
        owner: Who asks; errors begin with it.
        head: Dotted name of the head, whose input is then the features; unset, all hidden states of the only transformers model.
        label: Where a batch has its labels: an index or a key; unset, ``labels`` or ``label``, or the last part of a tuple.
        forward: ``forward(module, batch)`` runs the module, for the sake of what goes into the head; unset, ``module(inputs)``.
    """

    def __init__(
        self, owner: str, head: str | None, label: int | str | None, forward: Callable[[Any, Any], Any] | None
    ) -> None:
        self.owner, self.head, self.label, self.forward = owner, head, label, forward

    def check(self, module: pl.LightningModule) -> None:
        """Stop early if the module has no such head, or without one no network to read.

        Raises:
            ValueError: Then.
        """
        if self.head is None:
            self._network(module)
        elif self.head not in (names := [name for name, _ in module.named_modules() if name]):
            raise ValueError(
                f"{self.owner}: head={self.head!r} is no module of {type(module).__name__}. Nearest: {nearest(self.head, names)}."
            )

    def __call__(self, module: pl.LightningModule, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the features and, in a list, the labels of a batch."""
        features = self._into_head(module, batch) if self.head is not None else self._hidden(module, batch)
        return features.detach().float().cpu().contiguous(), [self.labels(batch).cpu()]

    def key(self, module: pl.LightningModule) -> str:
        """Say which network gives the features: what trains behind them has no part in it."""
        if self.head is None:
            return key_of(fingerprint_to_plain(fingerprint(self._network(module))))
        prints = fingerprint_to_plain(fingerprint(module))
        return key_of(self.head, {name: one for name, one in prints.items() if not name.startswith(f"{self.head}.")})

    def labels(self, batch: Any) -> Tensor:
        """Return the labels of a batch, ``(rows,)``.

        Raises:
            ValueError: If there are none, or they are not one number a row.
        """
        key: Any = self.label
        if key is None:
            key = label_key(batch)
        try:
            found = batch[key]
        except (LookupError, TypeError) as error:
            told = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{self.owner}: label={self.label!r} finds no labels in a batch ({told}). Pass the index or key of the labels."
            ) from error
        if not isinstance(found, Tensor) or found.dim() != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.owner}: the labels are {shape}; a probe needs one number a row, (rows,).")
        return found

    def _into_head(self, module: pl.LightningModule, batch: Any) -> Tensor:
        caught: list[Tensor] = []
        hook = module.get_submodule(self.head or "").register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            with torch.compiler.set_stance("force_eager"):  # what was compiled before knows of no hook
                self.forward(module, batch) if self.forward is not None else module(divided(batch)[0])
        finally:
            hook.remove()
        if len(caught) != 1 or not isinstance(caught[0], Tensor) or caught[0].dim() != 2:
            told = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in caught]
            raise ValueError(
                f"{self.owner}: the head {self.head!r} got {told or 'nothing'} in a forward of a batch; it must get one matrix, "
                "(rows, features). Name another head, or pass forward=."
            )
        return caught[0][:, None, None]

    def _hidden(self, module: pl.LightningModule, batch: Any) -> Tensor:
        network = self._network(module)
        inputs = divided(batch)[0]
        if isinstance(module, PromptingMixin):
            texts, _ = module.prompt_inputs(batch)
            prompt, tokenizer = module.prompt, cast("Any", module.tokenizer)
            assert prompt is not None
            asked = [prompt.prompt(text, tokenizer) for text in texts]
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            inputs = tokenizer(asked, padding=True, return_tensors="pt").to(module.device)
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"{self.owner}: a batch is a {type(inputs).__name__}, not what a transformers model takes by name. Pass head=, the "
                "name of the module's head."
            )
        return layer_features(network, inputs)

    def _network(self, module: pl.LightningModule) -> nn.Module:
        if isinstance(module, PromptingMixin):
            return module.language_model
        found = [child for child in module.children() if hasattr(child, "config") and hasattr(child, "base_model")]
        if len(found) != 1:
            raise ValueError(
                f"{self.owner}: {len(found)} children of {type(module).__name__} are transformers models, so head= is needed: the "
                "dotted name of the head, whose input is then the features."
            )
        return found[0]


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Run a module for a while as if nothing had been added to its networks."""
    adapted = [child for child in module.modules() if attachment_of(child) is not None]
    with ExitStack() as stack, torch.no_grad():
        for network in adapted:
            stack.enter_context(adapter_disabled(network))
        yield
