"""Let SmolLM2 complete functions by greedy decoding, beams, beams that a parser prunes, and samples that are chosen from.

Every arm writes after the same prompts: small functions of our own and HumanEval's. What counts is whether the text parses and
whether the function passes its tests, against tokens and seconds. Programs run shut in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_peft.counts import check_counts
from lightning_peft.data.packaged import language_model
from lightning_peft.decoding.scorers.sandbox import Isolation, chosen_isolation
from lightning_peft.files import write_text
from lightning_peft.recipes.code_search_arms import Arms, CodeRow, as_data
from lightning_peft.recipes.code_search_page import report
from lightning_peft.recipes.code_search_problems import CodeProblem, mixed_problems

__all__ = ["CodeSearchRun", "main", "run"]

CHUNK = 4
"""Problems between two savings; a killed run loses no more."""


@dataclass
class CodeSearchRun:
    """Complete functions with SmolLM2 by search, and count what parses and what passes its tests.

    Args:
        problems: How many of each suite: our own small ones, and HumanEval.
        beams: Widths of the beams.
        samples: Texts of each pool that selectors choose from.
        max_new_tokens: Greatest length of a text.
        temperature: Of the samples.
        seed: Of the samples.
        model: Name or folder of a causal language model; unset, the packaged SmolLM2-135M-Instruct.
        accelerator: "cpu", or "gpu" for the first one.
        isolation: How programs are shut in, as in RunsTests; "none" runs what the model wrote with your rights.
        quick: 4 problems of each suite, beams of 4, 4 samples, 48 tokens.
        out: Folder for results, logs and pictures; a run that was killed goes on there.
        page: A page to write the table into; unset, decoding.md in the folder.
    """

    problems: int = 16
    beams: tuple[int, ...] = (2, 4)
    samples: int = 8
    max_new_tokens: int = 64
    temperature: float = 0.8
    seed: int = 0
    model: str | None = None
    accelerator: str = "cpu"
    isolation: Isolation = "auto"
    quick: bool = False
    out: str = "runs/code_search"
    page: str | None = None

    def __post_init__(self) -> None:
        """Check what can be known before the model is read.

        Raises:
            ValueError: For counts below 1, no beam, or a temperature that is not above 0.
        """
        check_counts(self, "problems", "samples", "max_new_tokens")
        if not self.beams or min(self.beams) < 1 or not self.temperature > 0:
            raise ValueError(
                f"code_search: beams={self.beams!r} must be widths of at least 1, temperature={self.temperature!r} above 0."
            )


def run(options: CodeSearchRun) -> list[CodeRow]:
    """Run all arms on all problems, write table, pictures and logs; return what was found."""
    if options.quick:
        options.problems, options.beams, options.samples = min(options.problems, 4), (4,), min(options.samples, 4)
        options.max_new_tokens = min(options.max_new_tokens, 48)
    arms = Arms(
        tuple(options.beams),
        options.samples,
        options.max_new_tokens,
        options.temperature,
        options.seed,
        chosen_isolation(options.isolation),
    )
    problems = mixed_problems(options.problems)
    rows: list[CodeRow] = []
    loaded: tuple[Any, Any] | None = None
    for start in tqdm(range(0, len(problems), CHUNK), desc="code_search", unit=f"{CHUNK} problems"):
        chunk = problems[start : start + CHUNK]
        file = saved_at(options, arms, chunk)
        if not file.exists():
            loaded = loaded or coder(options)
            write_text(file, json.dumps(as_data(arms.rows(*loaded, chunk)), indent=1))
        rows += [CodeRow(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    report(rows, options)
    return rows


def saved_at(options: CodeSearchRun, arms: Arms, chunk: list[CodeProblem]) -> Path:
    """Return where the results of some problems stand: under a name that all they depend on goes into."""
    known = json.dumps([asdict(arms), options.model, [asdict(problem) for problem in chunk]])
    return Path(options.out) / "found" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"


def coder(options: CodeSearchRun) -> tuple[Any, Any]:
    """Return model and tokenizer; a text also ends where the model closes its block of code."""
    model, tokenizer = language_model(options.model)
    model.to("cuda" if options.accelerator == "gpu" else options.accelerator)
    fence = tokenizer("```", add_special_tokens=False).input_ids
    ends = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config.eos_token_id = [*ends, *(fence if len(fence) == 1 else [])]
    return model, tokenizer


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft code_search", description=(CodeSearchRun.__doc__ or "").splitlines()[0])
    parser.add_argument("--beams", nargs="+", type=int, default=[2, 4], help="widths of the beams")
    parser.add_argument(
        "--quick", action="store_true", help="4 problems of each suite, beams of 4, 4 samples, 48 tokens: some minutes"
    )
    parser.add_class_arguments(CodeSearchRun, skip={"beams", "quick"})
    found = parser.parse_args(args).as_dict()
    run(CodeSearchRun(**found | {"beams": tuple(found["beams"])}))


if __name__ == "__main__":
    main()
