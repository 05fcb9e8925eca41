"""Extraction of code from answers, by name of the protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Extraction(NamedTuple):
    """Function that finds the code in an answer.

    Attributes:
        extract: answer -> code.
        about: description for the legend of a table.
    """

    extract: Callable[[str], str]
    about: str


def _first_fence(text: str) -> str:
    fence = re.search(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fence.group(1) if fence else text).strip("\n")


def _begin_or_fence(text: str) -> str:
    code = text.partition("[BEGIN]")[2] if "[BEGIN]" in text else text
    if "```" in code:
        return _first_fence(code)
    code = code.strip()
    return code[1:].removesuffix("'") if code.startswith("'") else code


def _closed_fence(text: str) -> str:
    """Equals humaneval_postprocess_v2 of OpenCompass (opencompass/datasets/humaneval.py).

    Only a closed fence counts, with nothing but letters and digits after its opening marks.
    """
    fence = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)
    return (fence.group(1) if fence else text).lstrip()


def _marker_pairs() -> list[tuple[str, str]]:
    """Lists (opening, closing) of an MBPP answer in order of preference."""
    pairs = [
        (rf"{begin}\s*{opening}", rf"{closing}{done}")
        for opening, closing in (("'", r"'\s*"), ("'", ""), ("", ""))
        for done in (r"\[DONE\]", "DONE")
        for begin in (r"\[BEGIN\]", "BEGIN")
    ]
    fences = (r"```python\s*", r"```\s*")
    pairs += [(fence, closing) for closing in ("```", r"\Z") for fence in fences]
    return [*pairs, (r"\[BEGIN\]\s*'", r"\Z"), (r"\[BEGIN\]", r"\Z"), ("'", r"'\s*\[DONE\]")]


_MARKER_PAIRS = [
    # A lookahead finds ends that overlap, such as those in four backticks.
    (re.compile(opening), re.compile(f"(?={closing})"))
    for opening, closing in _marker_pairs()
]


def _marked_code(text: str) -> str:
    """Equals MBPPEvaluator._process_answer of OpenCompass (opencompass/datasets/mbpp.py).

    The code reaches from the first opening marker to the last closing one, for the first pair that
    occurs. Whatever follows a fence or DONE inside it is cut off. The time grows linearly with the
    text, while that of the original's regular expressions does not.
    """
    for opening, closing in _MARKER_PAIRS:
        start = opening.search(text)
        if start is None:
            continue
        end = max((match.start() for match in closing.finditer(text)), default=-1)
        if start.end() <= end:
            text = text[start.end() : end]
            break
    text = text.partition("```")[0]
    head, done, _ = text.partition("DONE")
    if done:
        text = head.removesuffix("[").rstrip().removesuffix("'")
    return text.replace(r"\_", "_").strip()


def _unquoted_code(text: str) -> str:
    """Equals _process_answer in the OpenCompass of LLaDA's repository (ML-GSAI/LLaDA).

    It differs from the original in one point: a quote at either end of the code is removed.
    """
    return _marked_code(text).removeprefix("'").removesuffix("'")


EXTRACTIONS = {
    "first-fence": Extraction(
        _first_fence, "the first fence, closed or not, or an answer without a fence"
    ),
    "opencompass-humaneval-v2": Extraction(
        _closed_fence, "the first closed fence, or an answer without one"
    ),
    "llada-mbpp": Extraction(
        _unquoted_code, "between [BEGIN] and [DONE], or in a fence, without quotes around it"
    ),
    "opencompass-mbpp": Extraction(_marked_code, "between [BEGIN] and [DONE], or in a fence"),
    "begin-or-fence": Extraction(
        _begin_or_fence, "after [BEGIN], and there in the first fence, closed or not, if any"
    ),
}
