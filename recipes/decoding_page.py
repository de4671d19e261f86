"""The sections of the page about decoding, each written by the script that measures it."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_peft.files import write_text

HEADING = "# Decoding\n"


def write_section(page: Path, name: str, text: str) -> None:
    """Put a section into the page, in place of the one that stands there.

    Args:
        page: The page; one that is missing begins with a heading.
        name: Of the section; comments with it mark its ends.
        text: Markdown.
    """
    whole = page.read_text(encoding="utf-8") if page.exists() else HEADING
    part = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    write_text(page, pattern.sub(lambda _: part, whole) if pattern.search(whole) else f"{whole.rstrip()}\n\n{part}\n")
