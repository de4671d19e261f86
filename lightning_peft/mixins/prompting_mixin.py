"""Let a frozen language model classify by a prompt, inside a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_peft.budget import Usage
from lightning_peft.distributed import gather_objects, refuse_sharded
from lightning_peft.mixins.order import refuse_order
from lightning_peft.old_task import untouched
from lightning_peft.prompts.calibration import Calibration, leaning
from lightning_peft.prompts.label_scores import label_log_probabilities
from lightning_peft.prompts.template import Demonstration, PromptTemplate, Row
from lightning_peft.prompts.verbalizer import Verbalizer
from lightning_peft.prompts.writing import parsed_label, write_answers

_KEY = "lightning_peft_prompt"


class PromptingMixin(pl.LightningModule):
    """Validate, test and predict by a prompt: a label's score is the log-probability of its answers; nothing is trained for it.

    ``class Reviews(PromptingMixin, MyModule)`` with a language model of transformers and its ``tokenizer`` in the module.
    ``validation_step`` and ``test_step`` log ``learn/accuracy`` and ``learn/test_accuracy``; ``predict_step`` returns labels and
    scores. With ``answer_by = "writing"`` the model writes freely, and :meth:`parse_answer` finds the label in what it wrote.

    A training step is the module's own, so the mixin stands beside any other: ``class Reviews(PromptingMixin, LoRAMixin,
    MyModule)`` learns what ``MyModule`` trains and is judged by the prompt.

    The prompt is in the checkpoint, as plain data, and comes back with it.

    **The trap:** the wording alone moves accuracy by tens of points, and raw scores lean to one label. Compare with
    ``calibration="batch"`` and a linear probe.

    Args:
        *args: Handed on to the module.
        prompt: The prompt; unset, the class attribute.
        verbalizer: The answers that stand for labels; unset, the class attribute.
        **kwargs: Handed on to the module.

    Raises:
        TypeError: When a class is made, for an order of bases in which the mixin would be skipped.
        ValueError: When a run begins, without prompt, verbalizer, model or tokenizer, and with a strategy that shards weights.
    """

    prompt: PromptTemplate | None = None
    verbalizer: Verbalizer | None = None
    calibration: Calibration = "none"
    """What is taken out of the scores: nothing, or the prompt's own leaning."""
    calibration_rows: int = 50
    """Training rows of ``calibration="batch"``."""
    answer_by: Literal["scores", "writing"] = "scores"
    """How an answer is got: the most probable one, or what the model writes."""
    max_new_tokens: int = 8
    """Most tokens that the model writes."""
    prompt_batch_size: int = 32
    """Inputs of a forward."""
    leaning: Tensor | float = 0.0
    """What is subtracted from scores; each validation, test and prediction sets it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, PromptingMixin)

    def __init__(
        self, *args: Any, prompt: PromptTemplate | None = None, verbalizer: Verbalizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for name in self.hparams.keys() & {"prompt", "verbalizer"}:  # they have a record of their own
            del self.hparams[name]
        self.prompt = prompt or self.prompt
        self.verbalizer = verbalizer or self.verbalizer
        self.prompt_usage = Usage()

    # --- what belongs to the module: override where it is kept elsewhere ------------------------------------------------

    @property
    def language_model(self) -> nn.Module:
        """The language model: the only child that is one of transformers' models.

        Raises:
            ValueError: If there is none, or several.
        """
        found = [
            child for child in self.children() if hasattr(child, "config") and hasattr(child, "get_output_embeddings")
        ]
        if len(found) != 1:
            raise ValueError(
                f"{type(self).__name__}: {len(found)} children are language models of transformers; there must be one. Define a "
                "property language_model that returns it."
            )
        return found[0]

    def prompt_inputs(self, batch: Any) -> tuple[Sequence[Row], Tensor | None]:
        """Return inputs and labels (None where there are none) of a batch.

        By default of ``(inputs, labels)``, of a list of inputs, or of a mapping with the slots of the prompt and ``"label"`` or
        ``"labels"``.
        """
        if isinstance(batch, Mapping):
            slots = self._told()[0].slots
            columns = [batch[name] for name in slots]
            labels = batch.get("label", batch.get("labels"))
            return [dict(zip(slots, texts, strict=True)) for texts in zip(*columns, strict=True)], labels
        if len(batch) == 2 and isinstance(batch[1], Tensor):
            return batch[0], batch[1]
        return batch, None

    def parse_answer(self, text: str) -> int | None:
        """Return the label that a written answer means: the one whose answer comes first in it; None for none."""
        return parsed_label(text, self._told()[1])

    # --- what it does -----------------------------------------------------------------------------------------------------

    def label_scores(self, rows: Sequence[Row]) -> Tensor:
        """Return the score of each label, ``(rows, labels)``: its log-probability without the prompt's leaning."""
        prompt, verbalizer = self._told()
        found = label_log_probabilities(
            self.language_model,
            self._tokenizer(),
            rows,
            prompt,
            verbalizer,
            batch_size=self.prompt_batch_size,
            usage=self.prompt_usage,
        )
        return found - self.leaning

    def calibrate(self, rows: Sequence[Row] = ()) -> None:
        """Set the leaning by ``calibration``, and for ``"batch"`` by these rows; the same on every process."""
        self.leaning = 0.0
        found = leaning(self.calibration, self.label_scores, self._told()[0], rows)
        if isinstance(found, Tensor):
            everybody = gather_objects(found.tolist())
            found = torch.tensor(everybody).mean(0)
        self.leaning = found

    def answers(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | list[str]]:
        """Return the label of each input (-1 for none), and its scores or what was written."""
        if self.answer_by == "scores":
            scores = self.label_scores(rows)
            return scores.argmax(1), scores
        written = write_answers(
            self.language_model,
            self._tokenizer(),
            rows,
            self._told()[0],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.prompt_batch_size,
            usage=self.prompt_usage,
        )
        labels = [self.parse_answer(text) for text in written]
        return torch.tensor([-1 if label is None else label for label in labels]), written

    # A compiled step calls this as it is: the tokenizer and the prompts in it would take long to trace, and gain nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _judge(self, batch: Any, key: str) -> None:
        metric = cast("MulticlassAccuracy", self._accuracies[key])
        rows, labels = self.prompt_inputs(batch)
        if labels is None:
            raise ValueError(f"{type(self).__name__}: the batch has no labels. Define prompt_inputs(self, batch).")
        found, _ = self.answers(rows)
        wrong = (labels.cpu() + 1) % len(self._told()[1])  # no label found: not the right one
        metric.update(torch.where(found < 0, wrong, found).to(self.device), labels.to(self.device))
        self.log(key, metric, on_step=False, on_epoch=True, batch_size=len(rows))

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._judge(batch, "learn/accuracy")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._judge(batch, "learn/test_accuracy")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        found: dict[str, Any] = self._predict(batch)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _predict(self, batch: Any) -> dict[str, Any]:
        labels, told = self.answers(self.prompt_inputs(batch)[0])
        names = self._told()[1].labels
        said = "scores" if isinstance(told, Tensor) else "written"
        return {"label": [names[label] if label >= 0 else None for label in labels.tolist()], said: told}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        refuse_sharded(self.trainer, type(self).__name__)
        _, verbalizer = self._told()
        self._tokenizer()
        self.language_model  # noqa: B018 - its error is better now than at the first batch
        self._accuracies = nn.ModuleDict(
            {
                key: MulticlassAccuracy(len(verbalizer), average="micro")
                for key in ("learn/accuracy", "learn/test_accuracy")
            }
        ).to(self.device)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._calibrate()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self._calibrate()

    @override
    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._calibrate()

    def _calibrate(self) -> None:
        self.calibrate(self._training_rows() if self.calibration == "batch" else ())

    def _training_rows(self) -> list[Row]:
        source = getattr(self.trainer, "datamodule", None) or self
        with untouched(self, self.device):
            try:
                loader = source.train_dataloader()
            except Exception as error:
                raise ValueError(
                    f"{type(self).__name__}: calibration='batch' needs training rows, and neither the module nor a DataModule has "
                    "a train_dataloader. Give one, or use calibration='contextual'."
                ) from error
            rows: list[Row] = []
            for batch in islice(loader, self.calibration_rows):
                rows += self.prompt_inputs(batch)[0]
                if len(rows) >= self.calibration_rows:
                    break
        return rows[: self.calibration_rows]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        prompt, verbalizer = self._told()
        checkpoint[_KEY] = {"prompt": asdict(prompt), "verbalizer": asdict(verbalizer)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if _KEY in checkpoint:
            told = checkpoint[_KEY]["prompt"]
            solved = tuple(
                Demonstration(tuple(map(tuple, one["slots"])), one["answer"]) for one in told["demonstrations"]
            )
            self.prompt = PromptTemplate(**{**told, "demonstrations": solved})
            self.verbalizer = Verbalizer(**checkpoint[_KEY]["verbalizer"])

    def _told(self) -> tuple[PromptTemplate, Verbalizer]:
        if self.prompt is None or self.verbalizer is None:
            raise ValueError(
                f"{type(self).__name__}: prompt={self.prompt!r}, verbalizer={self.verbalizer!r}; both are needed, for instance "
                "prompt=PromptTemplate('Review: {text}\\nSentiment: {answer}'), verbalizer=Verbalizer(['negative', 'positive'])."
            )
        return self.prompt, self.verbalizer

    def _tokenizer(self) -> Any:
        found = getattr(self, "tokenizer", None)
        if found is None:
            raise ValueError(f"{type(self).__name__}: the module has no tokenizer. Set self.tokenizer to the model's.")
        return found
