"""Tables and page of the recipe ``head_init``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.files import write_text
from lightning_peft.reporting import TextTable

Row = Mapping[str, Any]
DIFFERENT = {
    "error": "ID error",
    "shifted_error": "OOD error",
    "drift": "drift",
    "lost_recall": "lost recall@1",
}
FORMS = dict.fromkeys(DIFFERENT, ".3f") | {"drift": ".5f"}


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def kinds(rows: Sequence[Row], key: str) -> list[Any]:
    """Return the different values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def seeds_of(rows: Sequence[Row]) -> str:
    """Return how many seeds there are, in words.

    >>> seeds_of([{"seed": 0}, {"seed": 1}]), seeds_of([{"seed": 0}])
    ('2 seeds', '1 seed')
    """
    count = len(kinds(rows, "seed"))
    return f"{count} seed" + "s" * (count > 1)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; of a single value it is not known.

    >>> standard_error([1.0, 3.0]), standard_error([1.0])
    (1.0, nan)
    """
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def spread(values: Sequence[float], form: str = "#.3g") -> str:
    """Return mean ± standard error, or what all values are.

    >>> spread([0.0, 0.0]), spread([1.0, 3.0]), spread([1e-13, 2e-13])
    ('0', '2.00 ± 1.0', '< 1e-12')
    """
    if len(set(values)) == 1:
        return "0" if values[0] == 0 else format(values[0], form)
    if 0 < max(values) < 1e-12:
        return "< 1e-12"
    return f"{statistics.mean(values):{form}} ± {standard_error(values):{form.replace('#.3g', '#.2g')}}"


def linear_table(rows: Sequence[Row]) -> TextTable:
    """Return what each head does in the linear model."""
    keys = ("error", "shifted_error", "drift", "first_gradient")
    lines = []
    for noise in kinds(rows, "noise"):
        for head in kinds(rows, "head"):
            found = where(rows, noise=noise, head=head)
            steps = statistics.mean(row["steps"] for row in found)
            lines.append([f"{noise:g}", head, *(spread([row[key] for row in found]) for key in keys), f"{steps:,.0f}"])
    columns = ("eps", "head", "ID error", "OOD error", "‖B - B₀‖", "first ‖∂L/∂B‖", "steps")
    return TextTable(f"Linear model, mean ± standard error over {seeds_of(rows)}", columns, lines)


def minilm_table(rows: Sequence[Row]) -> TextTable:
    """Return what each head has done to MiniLM after so many steps of the backbone."""
    lines = []
    for step in kinds(rows, "step"):
        for head in kinds(rows, "head"):
            found = where(rows, step=step, head=head)
            cells = [spread([row[key] for row in found], FORMS[key]) for key in DIFFERENT]
            gradient = spread([row["first_gradient"] for row in found])
            lines.append([f"{found[0]['head_steps']} + {step}", head, *cells, gradient])
    columns = ("steps: head + backbone", "head", *DIFFERENT.values(), "first gradient")
    return TextTable(f"MiniLM, mean ± standard error over {seeds_of(rows)}", columns, lines)


def difference_table(rows: Sequence[Row], counts: Mapping[str, int]) -> TextTable:
    """Return how each head differs from the random one of the same seed, which saw the same rows.

    A star marks what has one sign at every seed and is beyond two standard errors, over seeds and over test rows together.

    Args:
        rows: Rows of MiniLM.
        counts: Over how many test rows each share is taken; a measure without is none.
    """
    lines = []
    for step in kinds(rows, "step")[1:]:
        for head in kinds(rows, "head")[1:]:
            pairs = list(zip(where(rows, step=step, head=head), where(rows, step=step, head="random"), strict=True))
            lines.append([str(step), head, *(difference(pairs, key, counts.get(key)) for key in DIFFERENT)])
    return TextTable("Less random head, paired by seed", ("backbone steps", "head", *DIFFERENT.values()), lines)


def verdict(differences: TextTable) -> str:
    """Say in a sentence which differences have a star.

    >>> verdict(TextTable("", ("steps", "head", "drift"), [("10", "zero", "-0.1 ± 0.0 *"), ("50", "zero", "-0.1 ± 0.2")]))
    'Starred: zero after 10, drift -0.1.'
    """
    starred = [
        f"{row[1]} after {row[0]}, {measure} {cell.split()[0]}"
        for row in differences.rows
        for measure, cell in zip(differences.columns[2:], row[2:], strict=True)
        if cell.endswith("*")
    ]
    return f"Starred: {'; '.join(starred)}." if starred else "Nothing has one: all may be chance."


def difference(pairs: Sequence[tuple[Row, Row]], key: str, count: int | None) -> str:
    """Return the mean difference of a measure over pairs of runs, its standard error over seeds, and the star."""
    differences = [one[key] - other[key] for one, other in pairs]
    mean, error = statistics.mean(differences), standard_error(differences)
    noise = 0.0
    if count:  # as if the two had been judged on rows of their own, which overstates it
        shares = [statistics.mean(abs(row[key]) for row in side) for side in zip(*pairs, strict=True)]
        noise = sum(share * (1 - share) for share in shares) / count
    one_sign = min(differences) > 0 or max(differences) < 0
    form = FORMS[key]
    star = " *" if one_sign and abs(mean) > 2 * (error**2 + noise) ** 0.5 else ""
    return f"{mean:+{form}} ± {error:{form}}{star}"


# --- page -------------------------------------------------------------------------------------------------------------

INTRODUCTION = """# How a new head should start

A new head sends gradients into pretrained features before it knows anything. Kumar et al. 2022, arXiv:2202.10054, show in a
linear model that this distorts them where the training data does not look. Four heads are compared: torch's random one, the
same at a tenth of its size, zero (`ZeroInitHead`), and one that is trained first, on features that stand still
(`FreezeSchedule.head_first`).

![What each head did to the features](PICTURE)
"""

LINEAR = """## Linear model

The setting of section 3 of the paper: the truth is `v*ᵀ B* x`, the model `vᵀ B x`, trained whole by gradient descent on half
the mean squared error (rate 0.02, until the ID error is below 1e-12). 40 noiseless inputs lie in 15 random of 60
dimensions; `B` has 5 rows, orthonormal at the start, and begins `eps` away from `B*`. Both errors are exact expectations: in
distribution (ID) over normal inputs in the 15 dimensions, out of it (OOD) in all 60. `probe` is the least-squares head on
features that stay as they are; `head first` goes on from there. All is float64; a seed has the same truth and inputs at every
`eps`.

TABLE

- The zero head's first gradient of the backbone is exactly 0, since it is `v gᵀ`. That holds for one step.
- Gradient descent nearly keeps `v vᵀ - B Bᵀ`. From a zero head `B Bᵀ = I + v vᵀ` ever after: the head cannot grow unless the
  backbone does. A zero head spares the features what a random one adds; only a head that is right already leaves them alone.
"""

MINILM = """## MiniLM

Full fine-tuning of the packaged MiniLM on Rotten Tomatoes sentences: BATCH rows a step, AdamW with the rates that the recipe
`sentiment` has for full fine-tuning (1e-4, head 5e-3, decay 0.01), constant, as a warm-up would hide the first steps; no
dropout. Nothing was tuned for this page. In one seed, step `n` of the backbone sees the same rows in every arm, and all random
heads are one draw.

- ID error: of ROWS other sentences, by critics. OOD error: of ROWS IMDB reviews (their first 64 tokens), by viewers.
- Drift: `‖w - w₀‖ / ‖w₀‖` over the encoder's weights. First gradient: the norm over them, before their first step.
- Lost recall@1: before less after, in finding the next 50 words of an IMDB review from its first 50, among PAIRS. No row has
  two uses.
- Steps count from the first that may move the backbone. `head first` has HEAD steps of its head alone before that, on rows of
  their own: it has seen more rows than the others, and its step 0 is a linear probe.

TABLE

DIFFERENCES

A star: the same sign at every seed, and beyond two standard errors of seeds and test rows together. The error behind ± is that
of seeds only. SEEN

- The zero head's first gradient is exactly 0 here too.
- AdamW divides each gradient by its own size, so that how far the backbone goes depends little on how loud the head is: what a
  head does to the first gradient is not what it does to the drift.
"""


def page(file: Path, found: Mapping[str, Sequence[Row]], options: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Write the page as Markdown; all its figures are of this run, and its prose is true of any.

    Args:
        file: Where it goes; the picture of the same name lies beside it.
        found: Rows by part.
        options: The recipe's options.
        usual: Their defaults.
    """
    text = [INTRODUCTION.replace("PICTURE", file.with_suffix(".png").name)]
    if "linear" in found:
        text.append(LINEAR.replace("TABLE", linear_table(found["linear"]).markdown()))
    if "minilm" in found:
        counts = {"error": options["rows"], "shifted_error": options["rows"], "lost_recall": options["pairs"]}
        differences = difference_table(found["minilm"], counts)
        words = {
            "TABLE": minilm_table(found["minilm"]).markdown(),
            "DIFFERENCES": differences.markdown(),
            "SEEN": verdict(differences),
            "BATCH": str(options["batch_size"]),
            "ROWS": str(options["rows"]),
            "PAIRS": str(options["pairs"]),
            "HEAD": str(options["head_steps"]),
        }
        part = MINILM
        for word, value in words.items():
            part = part.replace(word, value)
        text.append(part)
    text.append(f"Made by `{command(options, usual)}`.\n")
    write_text(file, "\n".join(text))


def command(options: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Return the command that makes the page again.

    >>> command({"steps": [5, 6], "rows": 500, "out": "elsewhere"}, {"steps": [10, 50], "rows": 500, "out": "runs"})
    'lightning-peft head_init --steps 5 6'
    """
    words = ["lightning-peft head_init"]
    for name, value in options.items():
        if value != usual[name] and name not in {"out", "resume", "accelerator"}:
            words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)
