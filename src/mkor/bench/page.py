"""Pages that a command writes in part: what stands outside its marks is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import UsageError


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a block that a command writes.

    Args:
        name: The block's name.

    Returns:
        Two comments that a reader of the page does not see.
    """
    return f"<!-- begin {name}: made by a command -->", f"<!-- end {name} -->"


def put(text: str, name: str, content: str, heading: str = "") -> str:
    """Replaces a block of a page, or appends it where there is none.

    Args:
        text: The page.
        name: The block's name.
        content: What stands in the block from now on.
        heading: What comes before a block that is appended.

    Returns:
        The page with the block; all else as it was.

    Raises:
        UsageError: If only one of the block's marks is there, or the end comes first.
    """
    begin, end = marks(name)
    block = f"{begin}\n{content.strip()}\n{end}"
    if begin not in text and end not in text:
        parts = (text.rstrip(), heading.strip(), block)
        return "\n\n".join(part for part in parts if part) + "\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UsageError(f"the page needs both {begin!r} and, after it, {end!r}, or neither.")
    return before + block + after


def write_page(path: Path, title: str, blocks: Mapping[str, tuple[str, str]]) -> None:
    """Writes the blocks of a page and keeps the rest.

    Args:
        path: The page.
        title: How a new page begins.
        blocks: For each name the heading, used where the block is new, and the content.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else title
    for name, (heading, content) in blocks.items():
        text = put(text, name, content, heading)
    path.write_text(text, encoding="utf-8")
