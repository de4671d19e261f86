"""No beginning of a program is killed; what cannot become one is, soon."""

import random
import string
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_peft.data.packaged import human_eval
from lightning_peft.decoding.scorers import python_prefix
from lightning_peft.decoding.scorers.python_prefix import can_become_program, is_program, last_token


def library(seed: int, most: int | None = None) -> Iterator[str]:
    """Modules of the standard library that this Python parses, in random order."""
    files = [
        file for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) if "site-packages" not in file.parts
    ]
    for file in random.Random(seed).sample(files, most or len(files)):
        text = file.read_bytes().decode("utf-8", errors="replace")
        if "\ufffd" not in text and is_program(text):
            yield text


def problems() -> list[dict[str, str]]:
    try:
        return human_eval()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def killed(text: str, cuts) -> list[str]:
    return [text[max(0, cut - 60) : cut] for cut in cuts if not can_become_program(text[:cut])]


def test_no_beginning_of_sampled_modules_is_killed():
    chosen = random.Random(0)
    texts = [text for text in library(seed=0, most=80) if len(text) < 30_000]
    assert len(texts) > 40
    for text in texts:
        assert killed(text, [chosen.randrange(len(text) + 1) for _ in range(20)]) == []


@pytest.mark.large
def test_no_beginning_of_any_module_is_killed():
    chosen = random.Random(1)
    for text in library(seed=1):
        assert killed(text, [chosen.randrange(len(text) + 1) for _ in range(40)]) == []


@pytest.mark.parametrize("part", range(4))
def test_no_beginning_of_a_solution_is_killed(part):
    for row in problems()[part::4]:
        text = row["prompt"] + row["canonical_solution"]
        assert killed(text, range(len(row["prompt"]), len(text) + 1)) == []


PROGRAMS = [
    "x = 1e-5 + .5 + 0x1f + 1_000.5e+3j\ny = [1if x else 2, ...]\n",
    "def f(a, /, b, *c, d=1, **e) -> int:\n\treturn a[::-1] ** -b // 2 >> 3 != ~c\n",
    "if x:\n    # words\n  # less\n        # more\n    pass\nelif y: pass\n"
    "else:\n\n    z = 'a\\\nb' \"c\" '' r'\\\\' + f'{x!r:>{w}}'\n",
    'async def g():\n    """Say "it"."""\n    async with a as b, c:\n        await d\n    x = \\\n  1\n',
    "match p:\n    case [1, *_] | {'a': b, **c} if d:\n        pass\n",
    "try:\n    pass\nexcept* (A, B) as é:\n    raise E from None\nfinally:\n    del a, b[0]\n",
    "@d\nclass C(B, metaclass=M):\n    a: int = 1; b = lambda *x, y=2: (yield)\n    global_ = rb'\\x00' + Rb'''\n'''\n",
    "x = [\n  (y := 1),\n    {**a, 'b': 2}, {*c},\n# c\n]\r\nprint(x,\r\n end='')\r",
    "x = '\\d' + 'it''s' + '''a''b''' + \"\"\"a\\\"\"\"\"\nx <<= 1; x **= 2; x //= 3; x @= 4; x |= 5\n",
    "from ... import a\nfrom ..b import (c, d as e,)\nfor i, in z: continue\nelse: nonlocal_ = 1\nwhile 1: break\n",
    "print(f'{a[\"b\"]} {{}} {c:#x}', f\"{d['}']}\")\n",
]


@pytest.mark.parametrize("text", PROGRAMS)
def test_no_beginning_of_a_program_with_rare_tokens_is_killed(text):
    assert is_program(text)
    assert killed(text, range(len(text) + 1)) == []


@pytest.mark.parametrize(
    "text",
    [
        "x = )",
        "f(1))",
        "def f(:\n",
        "retrun x\n",
        "x = 'a\n",
        "if x:\npass\n",
        "def f():\n    a\n   b = 1\n",
        "else:\n",
        "f(a b)",
        "import a.b c\n",
        "x = 1 +\n",
        "x\x00",
        "# \x00",
        "'\ud800",
        "a = \\ b",
        "try:\n    pass\nx = 1\n",
        "for x of ",
        "x ++ ;",
        "class C\n",
        "{1: 2, 3, ",
    ],
)
def test_what_cannot_become_a_program_is_killed(text):
    assert not can_become_program(text)


def test_what_stays_dead_was_dead():
    """Nothing appended revives: a beginning that was killed stays so."""
    chosen = random.Random(3)
    for row in problems()[:40]:
        text = broken(row["canonical_solution"], chosen)
        alive = [can_become_program(row["prompt"] + text[:cut]) for cut in range(len(text) + 1)]
        assert alive == sorted(alive, reverse=True)


def broken(text: str, chosen: random.Random) -> str:
    """Put one printable character in another's place."""
    place = chosen.randrange(len(text))
    return text[:place] + chosen.choice(string.printable[:94]) + text[place + 1 :]


def test_nearly_every_wrong_character_is_found():
    chosen, found, delays = random.Random(0), [], []
    for row in problems() * 2:
        text = row["prompt"] + broken(row["canonical_solution"], chosen)
        if not is_program(text):
            found.append(not can_become_program(text))
            first = next(
                (cut for cut in range(len(row["prompt"]), len(text) + 1) if not can_become_program(text[:cut])), None
            )
            good = row["prompt"] + row["canonical_solution"]
            wrong = next(place for place, pair in enumerate(zip(text, good, strict=True)) if pair[0] != pair[1])
            delays += [first - wrong - 1] if first is not None else []
    assert len(found) > 150
    assert sum(found) / len(found) > 0.95
    assert sorted(delays)[len(delays) // 2] <= 2


@pytest.mark.parametrize("text", ["", "   ", "\n", "# later\n", '"', "\\"])
def test_what_says_nothing_can_become_a_program_and_is_none(text):
    assert can_become_program(text)
    assert not is_program(text)


def test_half_a_character_may_become_any():
    assert can_become_program("x = a\ufffd")
    assert can_become_program("x = 'ä\ufffd\ufffd")


def test_warnings_that_are_errors_kill_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_become_program("x = '\\d'\ny = 1if 2else 3\n")
        assert is_program("x = '\\d'\n")


def test_nesting_too_deep_to_tell_is_not_killed():
    assert can_become_program("x = " + "-" * 100_000)


# Quotes of the f-string in its own fields: programs from 3.12 on, whichever Python runs this.
NESTED = ['x = f"{a["b"]} c"\ny = 1', 'x = f"{d["}"]}"\ny = 1', "x = f'{f'{1}'}'\ny", 'f"{x # }"\n}"', 'f"{x:{"a"}}"']


@pytest.mark.parametrize("text", NESTED)
def test_from_312_on_the_cut_is_never_inside_such_an_f_string(text, monkeypatch):
    monkeypatch.setattr(python_prefix, "_NESTS", True)
    begins = text.index("f")
    assert all(last_token(text[:cut]) <= begins for cut in range(begins, len(text) + 1))


def test_plain_fields_are_told_on_every_python(monkeypatch):
    monkeypatch.setattr(python_prefix, "_NESTS", True)
    text = "x = f\"{a['b']:#x} {{c}}\"\ny = "
    assert last_token(text) == len(text)
