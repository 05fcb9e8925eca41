"""Loading of tokenizers. No code of the directory runs in this process."""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xflow_jax.errors import UserError, require
from xflow_jax.input_files import file_inside, is_cloud, open_regular, read_bytes, to_path
from xflow_jax.tokenizer.chat_template import render_chat
from xflow_jax.types import Tokenizer

# Files that transformers reads. Each of them may be missing but the first.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
MOST_BYTES = 2**29  # of a file of a tokenizer
_SPECIAL = re.compile(r"<\|\w+\|>")  # tokens of a chat template that no text has
_LOG = logging.getLogger("xflow_jax")


def load_tokenizer(directory: str | Path, chat_template: str | None = None) -> Tokenizer | None:
    """Loads the transformers tokenizer of a directory.

    No code of the directory runs, except the chat template, in a process with limits.

    Args:
        directory: directory with tokenizer.json.
        chat_template: template for a tokenizer that has none, in Jinja. It is used only if all of
            its special tokens are in the vocabulary.

    Returns:
        The tokenizer, or None if there is no tokenizer.json.

    Raises:
        UserError: if the file cannot be read as a tokenizer.
    """
    directory = to_path(directory)
    if not file_inside(directory, _FILES[0]).exists():
        return None
    if is_cloud(directory):
        with tempfile.TemporaryDirectory(prefix="xflow-tokenizer-") as folder:
            for name in _FILES:
                if (directory / name).exists():
                    (Path(folder) / name).write_bytes(read_bytes(directory / name, MOST_BYTES))
            return load_tokenizer(folder, chat_template)
    for name in _FILES:
        _check_file(file_inside(directory, name))
    # Without this, transformers warns every user that PyTorch is missing. It is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        tokenizer = _tokenizer_class().from_pretrained(str(directory), trust_remote_code=False)
    except BaseException as error:  # the library raises bare exceptions, and panics of Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{directory}/tokenizer.json cannot be read as a tokenizer: {error}"
        ) from error
    _complete(tokenizer, chat_template)
    return tokenizer


def _complete(tokenizer: Any, chat_template: str | None) -> None:
    """Gives a tokenizer a chat template if it has none."""
    if tokenizer.chat_template is not None or chat_template is None:
        return
    if {*_SPECIAL.findall(chat_template)} <= tokenizer.get_vocab().keys():
        tokenizer.chat_template = chat_template
        _LOG.warning("The model's tokenizer has no chat template. That of its family is used.")


def _check_file(file: Path) -> None:
    """Raises UserError unless it is a regular file of limited size."""
    if not file.exists():
        return
    with open_regular(file) as opened:
        size = opened.seek(0, os.SEEK_END)
    require(size <= MOST_BYTES, f"{file}: cannot be read: it has more than {MOST_BYTES} bytes")


@functools.cache
def _tokenizer_class() -> Any:
    """Makes a transformers class that renders chat templates under limits."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and not always needed

    class LimitedTokenizer(PreTrainedTokenizerFast):
        """Tokenizer whose chat template runs in another process."""

        def apply_chat_template(
            self,
            conversation: Sequence[Mapping[str, object]],
            tokenize: bool = True,
            return_dict: bool = True,
            **options: object,
        ) -> object:
            """Renders a chat, and converts it to token ids."""
            try:
                return self._chat(conversation, tokenize, return_dict, options)
            except UserError:
                raise
            except Exception as error:  # of any kind, for wrong values in tokenizer_config.json
                raise UserError(
                    f"the model's tokenizer cannot read a chat ({type(error).__name__}): {error}"
                ) from error

        def _chat(
            self,
            conversation: Sequence[Mapping[str, object]],
            tokenize: bool,
            return_dict: bool,
            options: Mapping[str, object],
        ) -> object:
            text = render_chat(
                self.get_chat_template(),
                # transformers leaves out None too, which templates cannot handle.
                [{k: v for k, v in turn.items() if v is not None} for turn in conversation],
                {**self.special_tokens_map, **options},
            )
            if not tokenize:
                return text
            encoded = self(text, add_special_tokens=False)
            return encoded if return_dict else encoded["input_ids"]

    LimitedTokenizer.__name__ = PreTrainedTokenizerFast.__name__  # else transformers warns
    return LimitedTokenizer
