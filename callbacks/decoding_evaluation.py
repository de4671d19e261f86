"""What a language model writes while it trains: texts after fixed prompts, judged by a verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override

from lightning_peft.callbacks.measuring import forward_context
from lightning_peft.decoding.draft import Draft, Scorer
from lightning_peft.decoding.result import Decoder, DecodeResult
from lightning_peft.distributed import gather_objects, rank, refuse_sharded, together, world_size
from lightning_peft.logging import log_text, log_values, register_chart
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.randomness import random_state_kept

_OWNER = "DecodingEvaluation"


class DecodingEvaluation(pl.Callback):
    """Decode after fixed prompts before training and after every validation, and log how often a verifier is content.

    For each decoder: ``decoding/<name>_right``, the share of prompts whose chosen text is right; ``_covered``, the share with a
    right text in the pool; ``_tokens``, the mean cost of a prompt. TensorBoard also has the first texts, with their verdicts. It
    only looks: training is bit-identical with and without it. The processes of DDP share the prompts.

    **The trap:** a verifier that was also a scorer of the search is no judge of it.

    Args:
        decoders: A decoder, or several by name.
        prompts: What to write after.
        verifier: Says which texts are right: above 0.5.
        tokenizer: Of the model.
        model: Dotted name of the causal language model in the module; unset, the only one there is.
        every_n_epochs: Decode after the validation of every so many epochs.
        shown: How many texts TensorBoard shows.

    Raises:
        ValueError: Without prompts or decoders, and for ``every_n_epochs`` below 1; at ``setup``, if the model is not found, or its
            weights are spread over processes.
    """

    def __init__(
        self,
        decoders: Decoder | Mapping[str, Decoder],
        prompts: Sequence[str],
        verifier: Scorer,
        *,
        tokenizer: Any,
        model: str | None = None,
        every_n_epochs: int = 1,
        shown: int = 4,
    ) -> None:
        self.decoders = dict(decoders) if isinstance(decoders, Mapping) else {type(decoders).__name__.lower(): decoders}
        if isinstance(prompts, str) or not prompts or not self.decoders:
            raise ValueError(f"{_OWNER}: prompts={prompts!r} must be a list of texts, and there must be a decoder.")
        if every_n_epochs < 1:
            raise ValueError(f"{_OWNER}: every_n_epochs={every_n_epochs!r} must be at least 1.")
        self.prompts, self.verifier, self.tokenizer = list(prompts), verifier, tokenizer
        self.model, self.every_n_epochs, self.shown = model, every_n_epochs, shown
        self.history: list[dict[str, float]] = []
        """What was logged, with the step."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        refuse_sharded(trainer, _OWNER)
        causal_lm(pl_module, self.model, _OWNER)
        for kind in ("right", "covered", "tokens"):
            register_chart(trainer, "Decoding", kind, [f"decoding/{name}_{kind}" for name in self.decoders])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.history = []
            self._evaluate(trainer, pl_module)
        elif self.history:  # a resumed run: what monitors look at is as it was
            last = {key: torch.tensor(value) for key, value in self.history[-1].items() if key != "step"}
            trainer.callback_metrics.update(last)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn == "fit" and not trainer.sanity_checking and due:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values: dict[str, float] = {}
        for name, decoder in self.decoders.items():
            with random_state_kept(pl_module.device), forward_context(trainer):
                found = together(_OWNER, partial(self._own_part, pl_module, decoder))
            rows = sorted(row for part in gather_objects(found) for row in part)
            for number, kind in enumerate(("right", "covered", "tokens"), start=1):
                values[f"decoding/{name}_{kind}"] = sum(row[number] for row in rows) / len(rows)
            log_text(trainer, f"decoding/{name}", "\n\n".join(row[4] for row in rows[: self.shown]))
        self.history.append({"step": trainer.global_step, **values})
        log_values(trainer, values)

    def _own_part(self, pl_module: pl.LightningModule, decoder: Decoder) -> list[tuple[int, float, float, float, str]]:
        """Return a row for each prompt of this process: its place, what is logged, and what is shown."""
        places = range(rank(), len(self.prompts), world_size())
        if not places:
            return []
        prompts = [
            Draft("", prompt=self.prompts[place], problem=place) for place in places
        ]  # numbered as in one process
        result = decoder.decode(causal_lm(pl_module, self.model, _OWNER), self.tokenizer, prompts)
        rows = []
        for number, place in enumerate(places):
            pool = [candidate.draft for candidate in result.pool[number]]
            verdicts = [value > 0.5 for value in torch.as_tensor(self.verifier(pool)).tolist()]
            tokens = float(result.usage[number].tokens)
            shown = _shown(pool[0], verdicts[0], result, number)
            rows.append((place, float(verdicts[0]), float(any(verdicts)), tokens, shown))
        return rows

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


def causal_lm(module: nn.Module, name: str | None, owner: str) -> nn.Module:
    """Return the causal language model in a module.

    Args:
        module: Whose.
        name: Its dotted name; unset, the only one there is.
        owner: Who asks.

    Raises:
        ValueError: If there is none, or several, or nothing of that name.
    """
    if name is not None:
        found: nn.Module | None = dict(module.named_modules()).get(name)
        if found is None:
            known = [key for key, _ in module.named_children()]
            raise ValueError(f"{owner}: model={name!r} is no module of {type(module).__name__}; it has {known}.")
        return found
    writers: dict[str, nn.Module] = {}
    for key, child in module.named_modules():
        inside = any(key.startswith(f"{outer}.") for outer in writers)
        if hasattr(child, "prepare_inputs_for_generation") and not inside:
            writers[key] = child
    if len(writers) != 1:
        raise ValueError(
            f"{owner}: {type(module).__name__} holds {len(writers)} causal language models {list(writers)}. Say which: model='...'."
        )
    return next(iter(writers.values()))


def _shown(draft: Draft, right: bool, result: DecodeResult, number: int) -> str:
    mark, stopped = "right" if right else "wrong", result.stopped[number] if result.stopped else None
    code = "\n".join(
        f"    {line}" for line in str(draft).splitlines()
    )  # indented: Markdown's way to leave a text alone
    return f"**{mark}**, score {result.scores[number]:.3f}{f', stopped at {stopped}' if stopped else ''}\n\n{code}"
