"""Words of the vocabulary that microcode's tokenizer has as single tokens."""

from __future__ import annotations

import re

# A word, a digit or a punctuation mark with the space before it, or a line break with the
# indentation after it.
WORD = r"\n\n|\n *| ?[A-Za-z_]+| ?[0-9]| ?(?:\*\*|==|!=|\+=|\)\:|\[\]|\[::-|[^\sA-Za-z_0-9])|\s"


def split_words(text: str) -> list[str]:
    """Splits a text into words, each of them one known token."""
    return re.findall(WORD, text)
