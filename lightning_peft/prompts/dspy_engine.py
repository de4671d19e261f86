"""DSPy's optimizers on a language model that is in this process: each request is answered by the module itself."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.budget import Budget, Usage
from lightning_peft.data.content_digest import key_of
from lightning_peft.old_task import untouched

_UNKNOWN = (
    "response_format", "tool_choice", "reasoning", "logprobs", "probabilities", "frequency_penalty", "presence_penalty",
    "extensions",
)  # fmt: skip
"""What a request may ask that no answer here could honour."""
_ENGINES: weakref.WeakValueDictionary[int, DSPyEngine] = weakref.WeakValueDictionary()
"""Those that live, by their number: a saved program finds its model among them."""
_NUMBERS = itertools.count()


class DSPyEngine:
    r"""Answers DSPy's requests with a causal language model of transformers (Khattab et al. 2023, arXiv:2310.03714).

    ``dspy.configure(lm=DSPyEngine(model, tokenizer).lm())``; then every DSPy program and optimizer runs on it. One call is one
    prompt, and calls from several threads wait for each other. A conversation takes the tokenizer's chat form; without one, its
    texts stand one after the other with an empty line between. Temperature 0, or none, is greedy; above it, an answer is drawn
    from the seed, the request, and how often the same was asked before, so that a run can be repeated, whatever the threads do.

    The module is left as it was: modes, gradients, generators. A saved program holds no weights: when it is loaded, an engine on
    the same model must live in the process (``program.load(path, allow_unsafe_lm_state=True)``).

    **The traps:** the budget is asked before each call with the most that it may take, its ``max_tokens`` included. A refused call
    is an error to DSPy, which goes on after some of them (``max_errors``) and counts them as wrong answers; :attr:`refused` says
    whether it happened. And DSPy keeps answers on disk under the name of :meth:`lm`, which has the weights' fingerprint in it:
    after training take a new one.

    Args:
        module: The model, or a LightningModule with a ``language_model`` (:class:`PromptingMixin` has one).
        tokenizer: The model's.
        budget: What all calls together may spend; unset, there is no limit.
        max_tokens: Most tokens of an answer, where a request does not say.
        seed: Of all draws.

    Raises:
        ImportError: Without dspy.
        ValueError: For a module without a language model, or ``max_tokens`` below 1.

    Example::

        engine = DSPyEngine(model, tokenizer, budget=Budget(max_tokens=1_000_000))
        dspy.configure(lm=engine.lm(max_tokens=32))
        optimizer = dspy.BootstrapFewShot(metric=lambda example, said, trace: example.label == said.label)
        program = optimizer.compile(dspy.Predict("text -> label"), trainset=examples)
        print(engine.usage)
    """

    def __init__(
        self, module: Any, tokenizer: Any, *, budget: Budget | None = None, max_tokens: int = 256, seed: int = 0
    ) -> None:
        self._lm15 = _dspy().lm15
        self.module, self.tokenizer, self.budget = module, tokenizer, budget or Budget()
        self.max_tokens, self.seed = max_tokens, seed
        self.usage = Usage()
        """What all calls together have spent."""
        self.refused = ""
        """The limit that has refused a call; empty while there is room."""
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        if max_tokens < 1:
            raise ValueError(f"DSPyEngine: max_tokens={max_tokens!r} must be at least 1.")
        if not getattr(self.model, "can_generate", bool)():
            raise ValueError(
                f"DSPyEngine: {type(module).__name__} cannot write. Give a causal language model of transformers, or a "
                "LightningModule whose language_model is one."
            )
        _ENGINES[next(_NUMBERS)] = self

    @property
    def model(self) -> Any:
        """The language model."""
        return (
            getattr(self.module, "language_model", None) if isinstance(self.module, pl.LightningModule) else self.module
        )

    @property
    def name(self) -> str:
        """A name that changes with whatever an answer depends on: weights, tokenizer, seed, length."""
        prints = fingerprint_to_plain(fingerprint(self.model))
        about = (getattr(self.tokenizer, "chat_template", None), len(self.tokenizer), self.seed, self.max_tokens)
        return f"local/{type(self.model).__name__}-{key_of(prints, *about)[:12]}"

    def lm(self, **options: Any) -> Any:
        """Return a ``dspy.LM`` that this engine answers.

        Args:
            **options: Handed on to ``dspy.LM``: ``max_tokens``, ``temperature``, ``cache`` and others.
        """
        return _dspy().LM(self.name, engine=self, **options)

    def complete(self, request: Any) -> Any:
        """Answer one request: DSPy calls this.

        Raises:
            dspy.lm15.BillingError: If the budget does not suffice for the most that the call may take.
            dspy.lm15.ContextLengthError: For a prompt that leaves the model no position for an answer.
            dspy.lm15.UnsupportedFeatureError: For a request with tools, images, or settings that would not be honoured.
        """
        self._check(request)
        prompt = self._prompt(request)
        with self._lock:
            new = self._room(prompt, request.config.max_tokens or self.max_tokens)
            written = self._written(prompt, new, request.config)
        text, stopped = self._text(written, request.config.stop)
        return self._lm15.Response(
            id=None,
            model=request.model,
            message=self._lm15.Message.assistant(text),
            finish_reason="stop" if stopped else "length",
            usage=self._lm15.Usage(input_tokens=len(prompt), output_tokens=len(written)),
        )

    def dump_state(self) -> dict[str, Any]:
        """Return what a saved program keeps of the engine: the name of the model."""
        return {"name": self.name}

    @classmethod
    def load_state(cls, state: Mapping[str, Any]) -> DSPyEngine:
        """Return the living engine on the model that a program was saved with, the latest one.

        Raises:
            ValueError: If there is none.
        """
        for number in sorted(_ENGINES.keys(), reverse=True):
            engine = _ENGINES.get(number)
            if engine is not None and engine.name == state["name"]:
                return engine
        raise ValueError(
            f"DSPyEngine: the program was saved with {state['name']!r}, and no engine here has this model. Make it first, with the "
            "same weights, tokenizer, max_tokens and seed: engine = DSPyEngine(module, tokenizer)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DSPyEngine:
        return self  # DSPy copies programs with their language models; there is one model and one account

    def _check(self, request: Any) -> None:
        """Refuse what an answer would not honour."""
        wanted = [name for name in _UNKNOWN if getattr(request.config, name, None) not in (None, {})]
        wanted += ["tools"] if request.tools else []
        parts = [part for message in request.messages for part in message.parts]
        wanted += sorted({part.type for part in parts} - {"text"})
        if wanted:
            raise self._lm15.UnsupportedFeatureError(
                f"DSPyEngine: {wanted[0]!r} is not possible here; requests are text, with max_tokens, temperature, top_p, top_k, "
                "stop and seed. Leave it out."
            )

    def _prompt(self, request: Any) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins."""
        system = request.system or ()
        said = [system] if isinstance(system, str) else [part.text for part in system]
        turns = [{"role": "system", "content": "\n".join(said)}] if said else []
        for message in request.messages:
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": "\n".join(part.text for part in message.parts)})
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer("".join(f"{turn['content']}\n\n" for turn in turns))["input_ids"])
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def _room(self, prompt: Sequence[int], most: int) -> int:
        """Return how many tokens may be written, and see that the budget suffices for them."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or len(prompt) + most
        new = min(most, positions - len(prompt))
        if new < 1:
            raise self._lm15.ContextLengthError(
                f"DSPyEngine: a prompt has {len(prompt)} tokens and the model {positions} positions. Give fewer demonstrations."
            )
        refused = self.budget.refuses(self.usage, Usage(forwards=new, tokens=len(prompt) + new - 1))
        if refused:
            self.refused = refused
            raise self._lm15.BillingError(
                f"DSPyEngine: {refused} does not suffice for an answer of up to {new} tokens to a prompt of {len(prompt)}; "
                f"{self.usage.tokens:,} tokens in {self.usage.forwards:,} forwards are spent. Raise it, or lower max_tokens."
            )
        return new

    def _written(self, prompt: list[int], new: int, config: Any) -> list[int]:
        """Return the tokens that the model writes."""
        start, model, tokenizer = time.perf_counter(), self.model, self.tokenizer
        device = next(model.parameters()).device
        options: dict[str, Any] = {"do_sample": False}
        if config.temperature:
            options = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k or 0}
            options["top_p"] = 1.0 if config.top_p is None else config.top_p
        if config.stop:
            options |= {"stop_strings": list(config.stop), "tokenizer": tokenizer}
        ids = torch.tensor([prompt], device=device)
        with torch.no_grad(), untouched(model, device):
            torch.manual_seed(self._draw_seed(prompt, config))
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **options,
            )
        written: list[int] = output[0, len(prompt) :].tolist()
        seconds = time.perf_counter() - start
        self.usage += Usage(forwards=len(written), tokens=len(prompt) + len(written) - 1, seconds=seconds)
        return written

    def _draw_seed(self, prompt: list[int], config: Any) -> int:
        """Return the seed of an answer: another one each time that the same is asked, unless the request says which."""
        key = key_of(self.seed, prompt, config.temperature, config.top_p, config.top_k, config.seed)
        self._asked[key] += config.seed is None
        return int(key_of(key, self._asked[key])[:15], 16)

    def _text(self, written: list[int], stops: Sequence[str]) -> tuple[str, bool]:
        """Return what was written, up to where it stops, and whether it has stopped by itself."""
        ends = self.model.generation_config.eos_token_id
        ended = bool(written) and written[-1] in (ends if isinstance(ends, list) else [ends])
        text: str = self.tokenizer.decode(written, skip_special_tokens=True)
        cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
        return (text[: min(cuts)], True) if cuts else (text, ended)


def _dspy() -> Any:
    try:
        import dspy  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as missing:
        raise ImportError('DSPyEngine: dspy is not installed. Run: pip install "lightning-peft[dspy]"') from missing
    import dspy.lm15  # noqa: PLC0415

    return dspy
