"""Let a decoder write while a language model trains, and log how much of it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_peft.callbacks.measuring import averaged, check_intervals, come_first, forward_context
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.result import Candidate, Decoder
from lightning_peft.distributed import gather_objects, rank, refuse_sharded, together, world_size
from lightning_peft.logging import check_key, log_text, log_values, register_chart
from lightning_peft.matching import nearest
from lightning_peft.old_task import untouched
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "DecodingEvaluation"
_VALUES = ("accuracy", "coverage", "finished", "tokens")


class DecodingEvaluation(pl.Callback):
    """Log how many of a decoder's texts a verifier accepts, before the first step, now and then, and after the last.

    ``decoding/accuracy`` is the share of prompts whose chosen text is right, ``decoding/coverage`` of those for which any text
    that was found is, ``decoding/finished`` of those whose chosen text ended by itself, and ``decoding/tokens`` what a prompt
    costs. Processes share the prompts. Training is bit-identical with and without it. Where a ``WeightAveraging`` callback has
    begun to average the weights, the averaged ones are measured.

    Args:
        decoder: Any decoder of ``lightning_peft.decoding``.
        prompts: Texts.
        verifier: Takes drafts, which know their prompt and its place, and says for each whether it is right.
        tokenizer: The model's.
        network: Dotted name of the transformers language model inside the module.
        name: A part of the keys, ``decoding/<name>/accuracy``, where several stand side by side.
        every_n_epochs: Measure at the end of every so many epochs.
        every_n_steps: Measure after every so many optimizer steps, at the end of the batch that reaches them.
        cut_counts: Whether a text that a limit has cut can be right; else it is wrong without a question, as is in any case one
            that a scorer has ruled out.
        samples: How many prompts' texts TensorBoard shows.

    Raises:
        ValueError: For no prompt, for both intervals or one below 1; at ``setup``, where ``network`` names nothing, and for
            strategies that shard weights.
        TypeError: At ``setup``, where what it names is no language model of transformers.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[str],
        verifier: Callable[[list[Draft]], Any],
        *,
        tokenizer: Any,
        network: str = "model",
        name: str | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        cut_counts: bool = False,
        samples: int = 4,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{_OWNER}: prompts={prompts!r} must be a list of at least one text.")
        check_intervals(_OWNER, every_n_epochs, every_n_steps)
        self.decoder, self.verifier, self.tokenizer = decoder, verifier, tokenizer
        self.drafts = [Draft("", prompt=prompt, problem=place) for place, prompt in enumerate(prompts)]
        self.network, self.name, self.cut_counts, self.samples = network, name, cut_counts, samples
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.history: list[dict[str, float]] = []
        self.texts: list[str] = []
        self._measured_at = -1

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; callbacks of different names may stand side by side."""
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_sharded(trainer, _OWNER)
            come_first(trainer, self)
            keys = [self._key(value) for value in ("accuracy", "coverage")]
            register_chart(trainer, "Decoding", self.name or "texts that are right", keys)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured_at = min(self._measured_at, trainer.global_step)  # it may be of an earlier fit
        if not self.history or trainer.global_step == 0:  # a resumed run goes on with what it has measured
            self.history = []
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step // self.every_n_steps > self._measured_at // self.every_n_steps:
            self._measure(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure_once(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure_once(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "texts": list(self.texts), "measured_at": self._measured_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.texts = list(state_dict["history"]), list(state_dict["texts"])
        self._measured_at = state_dict["measured_at"]

    def _measure_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at:  # accumulation and ends of epochs come back to the same step
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = language_model_of(pl_module, self.network)
        with averaged(trainer, pl_module), untouched(pl_module, pl_module.device), forward_context(trainer):
            mine = together(_OWNER, lambda: self._rows(model))
        # Every process knows every row, in the order of the prompts: all log, stop and resume by the same values.
        rows = sorted((row for part in gather_objects(mine) for row in part), key=lambda row: row["problem"])
        means = {value: sum(row[value] for row in rows) / len(rows) for value in _VALUES}
        self.history.append({"step": trainer.global_step, **means})
        self.texts, self._measured_at = [row["text"] for row in rows], trainer.global_step
        log_values(trainer, {self._key(value): mean for value, mean in means.items()})
        self._show(trainer, rows[: self.samples])

    def _rows(self, model: Any) -> list[dict[str, Any]]:
        """Return what this process's share of the prompts has come to."""
        drafts = self.drafts[rank() :: world_size()]
        if not drafts:
            return []
        result = self.decoder.decode(model, self.tokenizer, drafts)
        found = [one for pool in result.pool for one in pool if one.viable and (one.finished or self.cut_counts)]
        said = self.verifier([one.draft for one in found]) if found else []
        right = dict(zip(map(id, found), map(bool, said), strict=True))
        return [
            _row(draft, pool, [right.get(id(one), False) for one in pool], usage.tokens)
            for draft, pool, usage in zip(drafts, result.pool, result.usage, strict=True)
        ]

    def _key(self, value: str) -> str:
        return check_key(f"decoding/{self.name}/{value}" if self.name else f"decoding/{value}")

    def _show(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        # Indented by four, Markdown leaves a text as it is.
        shown = [
            f"**{'right' if row['accuracy'] else 'wrong'}**\n\n"
            + "\n".join(f"    {line}" for line in f"{self.drafts[row['problem']]}{row['text']}".splitlines())
            for row in rows
        ]
        if shown:
            log_text(trainer, self._key("samples"), "\n\n".join(shown))


def language_model_of(module: nn.Module, name: str) -> Any:
    """Return the language model of transformers that a module holds under a dotted name.

    Raises:
        ValueError: If there is nothing of that name.
        TypeError: If it is something else, or an encoder with a decoder.
    """
    children = dict(module.named_modules())
    if name not in children:
        models = [key for key, child in children.items() if key and _is_language_model(child)]
        near = ", ".join(models) or nearest(name, [key for key in children if key])
        raise ValueError(f"{_OWNER}: {type(module).__name__} has no network={name!r}. Nearest: {near}.")
    found = children[name]
    if not _is_language_model(found):
        raise TypeError(
            f"{_OWNER}: network={name!r} is a {type(found).__name__}; a decoder needs a causal language model of transformers."
        )
    return found


def _is_language_model(module: Any) -> bool:
    config: Any = getattr(module, "config", None)
    return hasattr(module, "generate") and hasattr(config, "vocab_size") and not config.is_encoder_decoder


def _row(draft: Draft, pool: Sequence[Candidate], right: Sequence[bool], tokens: int) -> dict[str, Any]:
    return {
        "problem": draft.problem,
        "text": pool[0].text,
        "accuracy": float(right[0]),
        "coverage": float(any(right)),
        "finished": float(pool[0].finished),
        "tokens": float(tokens),
    }
