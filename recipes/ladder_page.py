"""Tables, pictures and the page of the ladder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_peft.files import write_text
from lightning_peft.recipes.ladder_bench import BACKWARD, RUNGS, TRAIN_JUDGED
from lightning_peft.recipes.ladder_pictures import Group, draw, draw_shots
from lightning_peft.recipes.ladder_task import LadderTask, named
from lightning_peft.recipes.ladder_verdicts import verdicts
from lightning_peft.reporting import TextTable

Row = Mapping[str, Any]


def grouped(rows: Mapping[str, Row]) -> dict[Group, list[Row]]:
    """Return rows of one rung and number of labels together, over seeds; in the ladder's order."""
    found: dict[Group, list[Row]] = {}
    for row in rows.values():
        found.setdefault((row["arm"], str(row["shots"])), []).append(row)
    names = list(RUNGS)

    def place(group: Group) -> tuple[bool, int, float]:
        rung, _, encoder = group[0].partition(" ")
        return bool(encoder), names.index(rung), math.inf if group[1] == "all" else float(group[1])  # type: ignore[arg-type]

    return {group: found[group] for group in sorted(found, key=place)}


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Return mean and standard deviation over seeds.

    >>> spread([0.5, 0.7], 2), spread([0.5]), spread([None])
    ('0.60 ± 0.14', '0.500', '-')
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    told = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{told}"


def learned_table(groups: Mapping[Group, Sequence[Row]]) -> TextTable:
    """Return what each rung learned and forgot."""
    columns = (
        "",
        "rung",
        "labels",
        "n",
        "accuracy",
        "validation - test",
        "train - test",
        "forgotten attached",
        "detached",
        "mergeable",
        "needs",
    )
    lines = []
    for (arm, shots), rows in groups.items():
        lost = [[row[f"forgotten {how}"] for row in rows] for how in ("attached", "detached")]
        lines.append([
            rows[0]["rung"], arm, shots, str(len(rows)),
            spread([row["accuracy"] for row in rows]),
            spread([row["gap"] for row in rows]),
            spread([row["train"] - row["accuracy"] for row in rows]),
            *(spread(values) for values in lost),
            rows[0]["mergeable"], rows[0]["white-box"],
        ])  # fmt: skip
    return TextTable("What is learned and forgotten (mean ± standard deviation over n seeds)", columns, lines)


def cost_table(groups: Mapping[Group, Sequence[Row]]) -> TextTable:
    """Return what each rung costs."""
    columns = (
        "rung",
        "labels",
        "trainable",
        "stored bytes",
        "seconds",
        "peak MB",
        "step ms",
        "call ms",
        "extra tokens",
    )
    lines = []
    for (arm, shots), rows in groups.items():
        lines.append([
            arm, shots, f"{rows[0]['trainable']:,}", f"{round(statistics.fmean(row['stored bytes'] for row in rows)):,}",
            spread([row["seconds"] for row in rows], 0), spread([row["peak memory"] and row["peak memory"] / 1e6 for row in rows],
            0), spread([row["step ms"] for row in rows], 0), spread([row["call ms"] for row in rows], 0),
            spread([float(row["extra tokens"]) for row in rows], 0),
        ])  # fmt: skip
    return TextTable("What it costs", columns, lines)


@rank_zero_only
def report(file: Path, rows: Mapping[str, Row], options: Any, task: LadderTask) -> None:
    """Print the tables, and write the page and its pictures."""
    groups = grouped(rows)
    learned, cost = learned_table(groups), cost_table(groups)
    said = [] if options.quick else answers(groups, min(TRAIN_JUDGED, options.train_rows))
    draw(file.with_suffix(".png"), groups)
    pictures = f"![Accuracy against parameters, time and forgetting]({file.with_suffix('.png').name})"
    if len({shots for _, shots in groups}) > 1:
        curve = file.with_name(f"{file.stem}_shots.png")
        draw_shots(curve, groups, options.train_rows)
        pictures += f"\n\n![Accuracy by number of labelled rows]({curve.name})"
    heading = "A smoke run: nothing is compared.\n\n" if options.quick else ""
    verdict = "\n".join(f"- {line}" for line in said)
    text = PAGE
    for word, value in {
        "SETUP": heading + setup(options, task),
        "PICTURES": pictures,
        "RUNGS": "\n".join(f"- {number} `{name}`: {what}." for name, (number, what, _) in RUNGS.items()),
        "LEARNED": learned.markdown(),
        "COST": cost.markdown(),
        "VERDICTS": f"## What the lecture says\n\n{verdict}\n\n" if said else "",
        "LAYERS": layers(rows) + neighbours(rows),
        "COMMAND": options.command(),
    }.items():
        text = text.replace(word, value)
    write_text(file, text)
    learned.show()
    cost.show()
    for line in said:
        print(line)
    print(f"Results   {options.out}/results.json, results.csv\nPage      {file}\nPicture   {file.with_suffix('.png')}")
    print(f"Curves    tensorboard --logdir {options.out}/logs")


def answers(groups: Mapping[Group, Sequence[Row]], train_rows: int) -> list[str]:
    """Return the verdicts; where several numbers of labels were tried, for the most and the fewest."""
    sizes = list(
        dict.fromkeys(
            shots for _, shots in sorted(groups, key=lambda group: math.inf if group[1] == "all" else float(group[1]))
        )
    )
    found = []
    for shots in dict.fromkeys((sizes[-1], sizes[0])):
        own = {arm: rows for (arm, size), rows in groups.items() if size == shots}
        count = train_rows if shots == "all" else min(train_rows, int(shots))
        found += [f"{line} ({shots} labels)" if len(sizes) > 1 else line for line in verdicts(own, count)]
    return found


def setup(options: Any, task: LadderTask) -> str:
    """Say what was run."""
    encoder = f" The encoder is {named(options.encoder) or 'MiniLM (packaged)'}." if options.encoder_rungs else ""
    model = named(options.model) or "SmolLM2-135M-Instruct (packaged; its weights were unpacked from four bits)"
    return (
        f"Task: {task.name}, {len(task.labels)} classes; {len(task.train)} training, {len(task.validation)} validation and "
        f"{len(task.test)} test rows. Language model: {model}.{encoder} Budget: {options.budget:,} tokens through the network to "
        f"learn; a training token counts as {BACKWARD}."
    )


def layers(rows: Mapping[str, Row]) -> str:
    """Return the probe's accuracy by layer beside the prompts', for the first seed: what prompting does not bring out."""
    probes = [row for row in rows.values() if "by layer" in row and row["shots"] == "all" and row["seed"] == 0]
    if not probes:
        return ""
    lines = []
    for row in probes:
        values = row["by layer"]
        prompts = [
            f"{other['arm']} {other['validation']:.3f}"
            for other in rows.values()
            if other["arm"] in ("prompt", "search")
            and other["shots"] == "all"
            and other["seed"] == 0
            and "(" not in row["arm"]
        ]
        beside = f" On the same validation rows: {', '.join(prompts)}." if prompts else ""
        table = TextTable(
            f"`{row['arm']}`, ridge regression on each layer ({row['pooling']} of tokens), validation rows, seed 0.{beside}",
            ["layer", *map(str, range(len(values)))],
            [["accuracy", *(f"{value:.2f}" for value in values)]],
        )
        lines.append(table.markdown())
    return "## What each layer knows\n\n" + "\n\n".join(lines) + "\n"


def neighbours(rows: Mapping[str, Row]) -> str:
    """Return what the soft prompt of the first seed has become: the words that its vectors lie nearest to."""
    found = [row["near"] for row in rows.values() if "near" in row and row["shots"] == "all" and row["seed"] == 0]
    if not found:
        return ""
    lines = [
        [str(place), *(f"`{token.replace('|', '¦')}` {value:.2f}" for token, value in zip(*one, strict=True))]
        for place, one in enumerate(found[0])
    ]
    title = "Nearest tokens of each vector, by cosine (`nearest_tokens`), seed 0. A neighbour is not a meaning."
    return (
        f"\n## What the soft prompt has become\n\n{TextTable(title, ['vector', 'nearest', '', ''], lines).markdown()}\n"
    )


PAGE = """# The ladder

SETUP

RUNGS

Prompts, soft prompts, prefixes, LoRA and full fine-tuning answer in words: the label whose words are most probable. Rungs that
train see the plain form of the prompt, without instruction and demonstrations. Of a training, what was best on validation rows is
kept.

PICTURES

LEARNED

Forgotten: of the language model, what the loss on general text (paragraphs of the manual that comes with Python) has risen by, in
nats per token; of the encoder, the share of such paragraphs whose second half it no longer finds. Attached: with the prompt, the
soft prompt, prefix or update in place. A prompt forgets nothing, but what stands before a text moves the model too. `needs`: what
of the network a rung must see.

COST

Seconds: of learning (steps, or the search, or features and fits), without validation. Peak: resident memory of the whole process,
or the GPU's. A call is one text; LoRA is merged before it. Stored: what must be kept beside the network.

VERDICTS## Which rung

- A handful of labels, or none: a prompt, calibrated on rows without labels. If the wording decides the result, search, and look at
  the gap between validation and test.
- An interface that gives scores only: prompt and search; nothing else can be had.
- Hidden states and labels: the probe, first of all; it is fitted in seconds once the features are there. The best layer's accuracy
  says what the network knows, and whether to go on.
- Many tasks on one network that stays as it is: soft prompts or prefixes, some kilobytes a task, rows of several tasks in one
  batch, while calls may get longer.
- One task, and calls that must not get dearer: LoRA, merged afterwards.
- Enough labels and memory, and no other use of the network: full fine-tuning, if the test rows can tell it from LoRA.

What must not be forgotten is another matter: see [forgetting](forgetting.md).

LAYERS
Made by `COMMAND`.
"""
