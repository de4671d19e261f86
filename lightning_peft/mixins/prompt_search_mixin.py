"""Search for a better prompt under a Trainer: an epoch is a round, and nothing in the model moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.data.content_digest import key_of
from lightning_peft.data.mix_loader import carried_options
from lightning_peft.distributed import gather_objects, rank, world_size
from lightning_peft.logging import log_text, log_values, register_chart
from lightning_peft.mixins.order import is_mixin, refuse_order
from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.prompts.score_cache import ScoreCache
from lightning_peft.prompts.search import PromptSearch, SearchReport, SearchRun
from lightning_peft.prompts.trials import Example
from lightning_peft.train_loader import change_train_loader, leave_loaders, validation_loader

_KEY = "lightning_peft_prompt_search"
_OWNER = "PromptSearchMixin"


class PromptSearchMixin(PromptingMixin):
    """Let ``fit`` search for a prompt: an epoch is one round, training rows try candidates, validation rows choose among the best.

    ``class Reviews(PromptSearchMixin, MyModule)``, with a ``search``. The training loader's rows are read once; each epoch has one
    step, which tries what the strategy proposes on as many of them as it says. At the end of validation the best candidates are
    compared on the validation loader's rows, and ``prompt`` and ``verbalizer`` become the chosen ones. ``fit`` ends where the
    search does: at its rounds, budget or patience, or at ``max_epochs``. ``test`` judges the chosen prompt by test rows.

    All processes share the work and come to what one would; rows that a distributed sampler repeats count once. DDP needs
    something that trains: there is one number of no effect, which no checkpoint holds. With ``score_cache`` a killed search pays
    for nothing twice; from a checkpoint it goes on at its round.

    Logged are ``search/train`` and ``search/validation`` (the best accuracies so far), ``search/tokens``, ``search/forwards``,
    ``search/cached``, and in TensorBoard the prompt as text.

    **The trap:** the best of many is partly lucky. ``report.luck`` says how much at most; test once.

    Args:
        *args: Handed on to the module.
        search: What to search, and how.
        score_cache: A file for scores; unset, memory.
        **kwargs: Handed on to the module, ``prompt`` and ``verbalizer`` to :class:`PromptingMixin`.

    Raises:
        TypeError: When a class is made, together with a mixin that trains something.
        ValueError: When a fit begins, without a search, without validation rows, or with a callback of ours that acts on
            training; of these only ``ExactResume`` and ``ProbeBaseline`` have anything to do in a search.
    """

    search: PromptSearch | None = None
    search_run: SearchRun | None = None
    """The search under way."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, PromptSearchMixin)
        training = [base for base in cls.__mro__[1:] if is_mixin(base) and not issubclass(PromptSearchMixin, base)]
        if training:
            raise TypeError(
                f"{cls.__name__}: {training[0].__name__} is there to train, and a fit of PromptSearchMixin trains nothing. Train a "
                f"class {cls.__name__}(PromptingMixin, {training[0].__name__}, ...); before or after, search for its prompt with "
                "PromptSearch(...).run(net.language_model, net.tokenizer, train, validation)."
            )

    def __init__(
        self, *args: Any, search: PromptSearch | None = None, score_cache: str | Path | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for name in self.hparams.keys() & {"search", "score_cache"}:
            del self.hparams[name]
        self.search, self.score_cache = search or self.search, score_cache
        if self.search is not None:
            self.calibration = self.search.calibration
        self.search_anchor = nn.Parameter(torch.zeros(()))
        self._rows: list[Example] = []
        self._seen: dict[str, Example] = {}
        self._flags: dict[nn.Parameter, bool] = {}
        self._state: dict[str, Any] | None = None
        if self.search is not None and self.prompt is None:
            self.prompt, self.verbalizer = self.search.space.forms[0], self.search.space.verbalizers[0]

    @property
    def training_rows(self) -> list[Example]:
        """The rows that candidates are tried on, with their labels; known once a fit has begun."""
        return self._rows

    @property
    def report(self) -> SearchReport:
        """What the search has found so far.

        Raises:
            ValueError: Before the first validation.
        """
        if self.search_run is None or not self.search_run.judged:
            raise ValueError(f"{type(self).__name__}: nothing has been found yet. Call trainer.fit first.")
        return self.search_run.report()

    @override
    def configure_callbacks(self) -> Any:
        """Refuse callbacks that act on training, before their ``setup`` has changed anything."""
        mine = super().configure_callbacks()
        if self.trainer.state.fn == "fit":
            given: list[Any] = [*cast("Any", self.trainer).callbacks, *(mine if isinstance(mine, Sequence) else [mine])]
            idle = [type(callback).__name__ for callback in given if _acts_on_training(callback)]
            if idle:
                raise ValueError(
                    f"{type(self).__name__}: {', '.join(idle)} would have nothing to act on: this fit searches for a prompt "
                    "and trains nothing. Leave it out, or train with PromptingMixin."
                )
        return mine

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.search is None:
            raise ValueError(
                f"{type(self).__name__}: search=None; pass one, for instance search=PromptSearch(PromptSpace(...), Halving())."
            )
        if not self.trainer.limit_val_batches:
            raise ValueError(f"{type(self).__name__}: limit_val_batches=0 leaves no rows to choose a prompt by.")
        self._flags = {parameter: parameter.requires_grad for parameter in self.parameters()}
        for parameter in self._flags:
            parameter.requires_grad_(parameter is self.search_anchor)
        change_train_loader(self.trainer, _OWNER, self._one_step, rows=True)
        register_chart(self.trainer, "Prompt search", "accuracy", ["search/train", "search/validation"])
        register_chart(self.trainer, "Prompt search", "spent", ["search/tokens"])

    @override
    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if stage == "fit":
            leave_loaders(self.trainer, _OWNER)
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)

    def _one_step(self, loaders: Any) -> DataLoader[int]:
        """Take all rows of the training loader, in the dataset's order, and give the trainer one step for each epoch."""
        if not isinstance(loaders, DataLoader):
            raise ValueError(
                f"{type(self).__name__}: the training loader is {loaders!r}; a search needs one DataLoader."
            )
        options = {**carried_options(loaders), "num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
        plain = DataLoader(loaders.dataset, loaders.batch_size or 1, generator=torch.Generator(), **options)
        self._rows = [example for batch in plain for example in self._examples(batch)]
        return DataLoader(range(world_size()), 1)  # type: ignore[arg-type]

    def _examples(self, batch: Any) -> list[Example]:
        rows, labels = self.prompt_inputs(batch)
        if labels is None:
            raise ValueError(f"{type(self).__name__}: the batch has no labels. Define prompt_inputs(self, batch).")
        return list(zip(rows, map(int, labels), strict=True))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.search_anchor], lr=0.0)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.search is not None
        cache = ScoreCache(self.score_cache)
        self.search_run = self.search.start(self.language_model, self._tokenizer(), self._rows, cache=cache)
        if self._state is not None:
            self.search_run.load_state_dict(self._state)
            self._state = None
        self.search_run.reserved = self._validation_rows()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._try_round()
        return self.search_anchor * 0.0

    # A compiled step calls this as it is: a search would take long to trace, and gain nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _try_round(self) -> None:
        assert self.search_run is not None
        if not self.search_run.stopped:
            self.search_run.try_round()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.state.fn != "fit":
            super().validation_step(batch, batch_idx)
        else:
            self._see(batch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(self, batch: Any) -> None:
        for row, label in self._examples(batch):
            self._seen[key_of(row if isinstance(row, str) else dict(row), label)] = (row, label)

    def _validation_rows(self) -> list[Example]:
        """Read the validation loaders once, before the first round: what judging takes must be left over."""
        found = validation_loader(self.trainer)
        with isolate_rng():
            for loader in found if isinstance(found, list | tuple) else [found] * (found is not None):
                for batch in loader:
                    self._see(batch)
        return self._together()

    def _together(self) -> list[Example]:
        """Return the rows that were seen by all processes; those that a distributed sampler repeats count once."""
        seen, self._seen = self._seen, {}
        together: dict[str, Example] = {}
        for part in gather_objects(seen):
            together |= part
        return [together[key] for key in sorted(together)]

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking or self.search_run is None:
            self._seen = {}
            return
        self.search_run.judge(self._together())
        report = self.search_run.report()
        self.prompt, self.verbalizer = report.prompt, report.verbalizer
        self._log(report)
        self.trainer.should_stop = self.trainer.should_stop or bool(report.stopped)

    @override
    def _calibrate(self) -> None:
        if self.search_run is None or not self.search_run.judged:
            super()._calibrate()
        else:
            self.leaning = self.search_run.scorer.leaning(self.report.validation.candidate)

    def _log(self, report: SearchReport) -> None:
        best = min((result for found in report.rounds for result in found), key=lambda result: result.order)
        log_values(
            self.trainer,
            {
                "search/train": best.accuracy,
                "search/validation": report.validation.accuracy,
                "search/tokens": report.usage.tokens,
                "search/forwards": report.usage.forwards,
                "search/cached": report.usage.cached,
                "learn/accuracy": report.validation.accuracy,
            },
        )
        if rank() == 0:
            slots = {name: "{" + name + "}" for name in report.prompt.slots}
            text = report.prompt.prompt(slots).replace("\n", "  \n")
            log_text(self.trainer, "search/prompt", text)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].pop("search_anchor", None)
        if self.search_run is not None:
            checkpoint[_KEY] = self.search_run.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"].setdefault("search_anchor", torch.zeros(()))  # WeightAveraging asks for it
        self._state = checkpoint.get(_KEY)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights, with or without the number of no effect."""
        return super().load_state_dict({"search_anchor": torch.zeros(()), **state_dict}, *args, **kwargs)


def _acts_on_training(callback: Any) -> bool:
    """Whether a callback is one of ours, or made from one, and not only there to resume or to compare."""
    ours = [kind for kind in type(callback).__mro__ if kind.__module__.startswith("lightning_peft.callbacks.")]
    return bool(ours) and all(kind.__name__ not in {"ExactResume", "ProbeBaseline"} for kind in ours)
