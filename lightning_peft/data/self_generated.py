"""Text that a model writes before it is fine-tuned: old rows for whoever has none."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.adapters.switch import adapter_disabled
from lightning_peft.data.streams import key
from lightning_peft.distillation import adapted_networks
from lightning_peft.distributed import rank
from lightning_peft.files import write_text
from lightning_peft.randomness import random_state_kept

_OWNER = "SelfGenerated"
Prompt = str | Sequence[int]
Generate = Callable[..., Sequence[Any]]


class SelfGenerated(Dataset[dict[str, Any]]):
    """Rows that a model writes itself, before it is fine-tuned: a map-style dataset for ``ReplayMixing`` or as KL inputs.

    Row ``i`` continues prompt ``i % len(prompts)``. A row is a dictionary: ``"prompt"`` as given; ``"ids"``, the tokens of
    prompt and continuation, and ``"prompt_tokens"``, how many are the prompt's; with a tokenizer ``"text"``, the decoded whole.
    The model writes with its adapters off, in eval mode, without gradient; its modes and the generators of random numbers are
    as before. The same arguments give the same rows, on every process.

    Samples come from the model's own distribution at ``temperature``: what its ``generation_config`` says of ``top_k``,
    penalties and the like is set aside.

    With ``cache_dir`` the rows are kept as JSON lines, and beside them, as ``.json``, all settings and a digest of the weights.
    The file's name is a hash of these: rows of other settings, or of other weights, are not used.

    Huang et al. 2024, arXiv:2403.01244 (SSR: self-synthesized rehearsal).

    **The trap:** the prompts decide what is practised. And a model that was fine-tuned already rehearses that.

    Args:
        model: A transformers model that generates, or, with ``generate``, any module.
        prompts: Texts, or sequences of token ids.
        tokenizer: Called with a text it gives ``"input_ids"``; it has ``decode``. Needed for texts only.
        generate: For other models: ``generate(model, prompts, temperature=..., max_new_tokens=...)`` returns for each prompt of
            a batch a text, or token ids, prompt included. It draws from the global generators, which are seeded.
        count: Number of rows; unset, one for each prompt.
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Of the draws.
        max_new_tokens: Most tokens to add; a row ends earlier at the model's end token, which it keeps.
        batch_size: Rows that are written together; the draws depend on it, as on the seed.
        cache_dir: Folder for the rows.

    Raises:
        ValueError: For settings out of range, no or empty prompts, texts without a tokenizer, a model that cannot generate, or
            a ``generate`` that does not return one row for each prompt.

    >>> echo = lambda model, prompts, **options: [prompt + " and more" for prompt in prompts]
    >>> rows = SelfGenerated(nn.Identity(), ["once", "twice"], generate=echo, count=3)
    >>> [row["text"] for row in rows]
    ['once and more', 'twice and more', 'once and more']
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        tokenizer: Any = None,
        *,
        generate: Generate | None = None,
        count: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        cache_dir: str | Path | None = None,
    ) -> None:
        _check_source(model, prompts, tokenizer, generate)
        count = len(prompts) if count is None else count
        for name, value in {"count": count, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{_OWNER}: {name}={value!r} must be a whole number of at least 1.")
        if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"{_OWNER}: temperature={temperature!r} must be a number of at least 0; 0 is greedy.")
        self.settings: dict[str, Any] = {
            "prompts": [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts],
            "count": count,
            "temperature": float(temperature),
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "tokenizer": _tokenizer_key(tokenizer),
            "generate": _function_key(generate),
        }
        with _as_pretrained(model):
            self.settings |= {"model": type(model).__name__, "weights": _weights_key(model)}
            self.path = (
                None if cache_dir is None else Path(cache_dir) / f"self_generated-{_digest(self.settings)}.jsonl"
            )
            kept = None if self.path is None else _read(self.path, self.settings)
            self.rows = list(self._write(model, tokenizer, generate)) if kept is None else kept
        if self.path is not None and kept is None:
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
            write_text(_beside(self.path), json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def _write(self, model: nn.Module, tokenizer: Any, generate: Generate | None) -> Iterator[dict[str, Any]]:
        told, device = self.settings, _device(model)
        options = {name: told[name] for name in ("temperature", "max_new_tokens")}
        prompts = [told["prompts"][i % len(told["prompts"])] for i in range(told["count"])]
        starts = range(0, len(prompts), told["batch_size"])
        for start in tqdm(starts, desc="self-generated", delay=2, leave=False, disable=rank() > 0):
            batch = prompts[start : start + told["batch_size"]]
            _seed_generators(key(told["seed"], "self-generated", start), device)
            if generate is not None:
                yield from _told_rows(batch, generate(model, list(batch), **options))
                continue
            encoded = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in batch]
            if [] in encoded:
                raise ValueError(f"{_OWNER}: the prompt {batch[encoded.index([])]!r} has no tokens; begin it with one.")
            for prompt, given, ids in zip(batch, encoded, _continued(model, encoded, options), strict=True):
                row = {"prompt": prompt, "ids": ids, "prompt_tokens": len(given)}
                yield row if tokenizer is None else {**row, "text": tokenizer.decode(ids, skip_special_tokens=True)}


def _continued(model: Any, prompts: list[list[int]], options: Mapping[str, Any]) -> list[list[int]]:
    """Let a transformers model continue a batch of prompts, padded on the left; what comes after its end token is cut."""
    from transformers import GenerationConfig  # noqa: PLC0415 - slow to import

    longest, device, own = max(map(len, prompts)), _device(model), model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, Sequence) else [own.eos_token_id]
    padding = next((token for token in (own.pad_token_id, *ends) if token is not None), 0)
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    counts = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    how = {"do_sample": True, "top_k": 0, "temperature": options["temperature"]} if options["temperature"] else {}
    # Set aside: what is unset in the options of a call would be filled in from it.
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, pad_token_id=padding, max_new_tokens=options["max_new_tokens"], **how
    )
    try:
        written: Tensor = model.generate(input_ids=ids, attention_mask=counts)
    finally:
        model.generation_config = own
    rows = [row.tolist() for row in written[:, longest:]]
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [prompt + row[:length] for prompt, row, length in zip(prompts, rows, lengths, strict=True)]


def _told_rows(prompts: list[Any], found: Sequence[Any]) -> Iterator[dict[str, Any]]:
    if isinstance(found, str) or len(found) != len(prompts):
        raise ValueError(
            f"{_OWNER}: generate returned {len(found)} rows for {len(prompts)} prompts; it must return a text, or token ids, for "
            "each."
        )
    for prompt, row in zip(prompts, found, strict=True):
        ids = row.tolist() if isinstance(row, Tensor) else row
        yield (
            {"prompt": prompt, "text": ids}
            if isinstance(ids, str)
            else {"prompt": prompt, "ids": [int(i) for i in ids]}
        )


def _check_source(model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, generate: Generate | None) -> None:
    if isinstance(prompts, str) or not len(prompts) or not all(map(len, prompts)):
        raise ValueError(
            f"{_OWNER}: prompts={prompts!r:.200} must be at least one text or sequence of token ids, none empty."
        )
    if generate is not None:
        return
    if not hasattr(model, "generate") or not hasattr(model, "generation_config"):
        raise ValueError(
            f"{_OWNER}: {type(model).__name__} cannot generate as transformers models do. Pass such a model, or generate=, "
            "a function of (model, prompts)."
        )
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{_OWNER}: prompts are texts, but tokenizer=None. Pass the model's tokenizer, or token ids.")


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _as_pretrained(model: nn.Module) -> Iterator[None]:
    """Take adapters off for a while, in eval mode and without gradient; keep the generators of random numbers."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack, random_state_kept(_device(model)), torch.no_grad():
        for _, network, _ in adapted_networks(model):
            stack.enter_context(adapter_disabled(network))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed what :func:`~lightning_peft.randomness.random_state` takes down, and no other device's generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _weights_key(model: nn.Module) -> str:
    """Digest a network's own weights: what adapters added to it does not count."""
    added = {
        path + name
        for path, network, attachment in adapted_networks(model)
        for name in network.state_dict().keys() - attachment.base.keys()
    }
    prints = fingerprint_to_plain(fingerprint(model))
    return _digest({name: found for name, found in prints.items() if name not in added})


def _tokenizer_key(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return f"{type(tokenizer).__name__}-{_digest(words)}"


def _function_key(generate: Generate | None) -> str | None:
    if generate is None:
        return None
    name = getattr(generate, "__qualname__", type(generate).__qualname__)
    code = getattr(generate, "__code__", None)
    plain = [] if code is None else [one for one in code.co_consts if isinstance(one, str | int | float | bytes)]
    body = "" if code is None else repr((code.co_code, code.co_names, plain))
    return f"{generate.__module__}.{name}-{_digest(body)}"


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of a file whose settings are these; None if it, or the record beside it, is missing or damaged."""
    try:
        if json.loads(_beside(path).read_text(encoding="utf-8")) != settings:
            return None
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError):
        return None
    return rows if len(rows) == settings["count"] else None
