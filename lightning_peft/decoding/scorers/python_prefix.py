r"""Tell whether a text can still become a Python program, by asking Python's own parser how far it gets.

The parser asks for a token only after some rule has accepted all tokens before it, and it cannot know those that follow. So cut the
text where its last token begins, unless nothing can lengthen that token, and let the file end there in the middle of a line: a
backslash, and nothing after it. Either the parser asks for what stands there, as it would in every longer text, and reports
"incomplete input"; or it gives up before, as it would in every longer text: then the text is dead.

No other message and no position of the parser is read. That one message is what ``codeop`` of the standard library relies on.
"""

from __future__ import annotations

import ast
import codeop
import re
import sys
import warnings

_FLAGS = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]
_END = "\\\n"


def _string(name: str, quote: str) -> str:
    """Return a pattern of a string: to its closing quotes, which are the group, or to where it breaks off."""
    char, long = quote[0], len(quote) == 3
    inside = rf"[^{char}\\]*" if long else rf"[^{char}\\\n]*"
    more = rf"\\.|{char}(?!{char}{char})" if long else r"\\."
    broken = r"\\?\Z" if long else r"(?=\n)|\\?\Z"
    return rf"{quote}{inside}(?:(?:{more}){inside})*(?:(?P<{name}>{quote})|{broken})"


_QUOTES = {"long": "'''", "LONG": '"""', "short": "'", "SHORT": '"'}
# Strings and comments, and what lies between. What is open reaches the end of the text.
_PIECES = re.compile(
    r"(?P<plain>(?:[^'\"#\\]|\\\n)+)|(?P<comment>#[^\n]*)|(?P<backslash>\\)|(?P<string>"
    + "|".join(_string(name, quote) for name, quote in _QUOTES.items())
    + ")",
    re.DOTALL,
)
# Of a number all that may belong to one (1e-5), and dots together (one of ... is no token): a piece longer than a token is safe.
_TOKENS = re.compile(
    r"(?P<closed>[()\[\]{},;~\s]) | (?:\d|\.\d)(?:[eE][+-]|[\w.])* | [\w\u0080-\U0010ffff]+"
    r"| \.+ | (?:\*\*|//|>>|<<|->|[-+*/%@&|^=<>!:])=? | .",
    re.VERBOSE,
)
# From 3.12 on the field of an f-string may hold its quotes, and comments. Of these fields it is certain that they do not.
_CERTAIN_FIELDS = re.compile(
    r"""(?:[^{}\\]|\\.|\{\{|\}\}|\{(?:[^{}'"\\\#]|(?<=:)\#|'[^'"{}\\]*'|"[^'"{}\\]*")*\})*""", re.DOTALL
)
_NESTS = sys.version_info >= (3, 12)


def can_become_program(text: str) -> bool:
    r"""Return whether something appended can make the text a program; never ``False`` for the beginning of one.

    The converse does not hold: a mistake in the last token shows once the token has ended. Names, ``return`` outside of
    functions and the like are not judged, nor is what stands after an f-string whose fields have quotes or braces in them,
    from Python 3.12 on.

    >>> can_become_program("def f(x):\n    retur"), can_become_program("def f(x):\n    retur x")
    (True, True)
    >>> can_become_program("def f(x):\n    retur x\n"), can_become_program("f(1))"), can_become_program("")
    (False, False, True)
    """
    text = _newlines(text)
    if "\0" in text:
        return False
    try:
        text.encode()
        with warnings.catch_warnings():
            # Of escapes that a later Python refuses: where warnings are errors they would kill.
            warnings.simplefilter("ignore")
            compile(text[: last_token(text)] + _END, "<prefix>", "exec", _FLAGS)
    except SyntaxError as error:
        return error.msg == "incomplete input"
    except ValueError:  # half of a surrogate pair
        return False
    except (MemoryError, RecursionError):  # nested too deep to tell
        return True
    return True


def is_program(text: str) -> bool:
    r"""Return whether the text parses as it stands, with at least one statement.

    >>> is_program("x = 1"), is_program("x ="), is_program("# only words\n")
    (True, False, False)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def last_token(text: str) -> int:
    r"""Return where the last token begins, or the end of the text if nothing can lengthen that token.

    >>> [last_token(text) for text in ("x = 12", "x = (", "x = 'a", "x = 'a'", "if x:\n  ", "x = 1  # on")]
    [4, 5, 4, 7, 6, 7]
    """
    start = _last_piece(text)
    # Before a statement's first token its line stands for nothing: a comment may follow, indented as it likes.
    line = text.rfind("\n", 0, start) + 1
    return line if not text[line:start].strip(" \t\f") else start


def _last_piece(text: str) -> int:
    last = None
    for piece in _PIECES.finditer(text):
        last = piece
        if _NESTS and piece["string"] and _may_nest(piece):
            return _word_start(piece)
    if last is None:
        return len(text)
    if last["plain"]:
        return _open_token(text, max(last.start(), text.rfind("\n") + 1))
    if last["string"]:
        # Two quotes may be the first of three.
        closed = any(last[name] for name in _QUOTES) and last["string"] not in ("''", '""')
        return last.end() if closed else _word_start(last)
    return last.start()


def _open_token(text: str, start: int) -> int:
    for token in _TOKENS.finditer(text, start):
        start = token.end() if token["closed"] else token.start()
    return start


def _word_start(string: re.Match[str]) -> int:
    """Return where the word right before a string begins: its prefix."""
    start = string.start()
    while start and (string.string[start - 1].isalnum() or string.string[start - 1] == "_"):
        start -= 1
    return start


def _may_nest(string: re.Match[str]) -> bool:
    prefix = string.string[_word_start(string) : string.start()]
    return "f" in prefix.lower() and _CERTAIN_FIELDS.fullmatch(string["string"].strip("'\"")) is None


def _newlines(text: str) -> str:
    # Bytes of a character that was cut in two are decoded to U+FFFD, and may still become any character.
    text = text.rstrip("\ufffd")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
