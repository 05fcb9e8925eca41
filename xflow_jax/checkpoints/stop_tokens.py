"""Tokens beside EOS that end a text, from a model's files.

Chat models end a turn with a token of its own, which config.json rarely names.
"""

from __future__ import annotations

from pathlib import Path

from xflow_jax.checkpoints.huggingface import GENERATION_FILE
from xflow_jax.checkpoints.mask_token import TOKENIZER_FILES, added_tokens, read_object
from xflow_jax.types import ModelConfig


def resolve_stop_ids(config: ModelConfig, directory: Path) -> ModelConfig:
    """Completes a configuration with the tokens that end a text.

    These are the end tokens of generation_config.json, and the added tokens of the tokenizer that
    have one of the family's names for them.

    Args:
        config: the configuration.
        directory: directory with the files.

    Returns:
        The configuration. Ids outside the vocabulary and the mask token are left out.
    """
    ends = read_object(directory, GENERATION_FILE).get("eos_token_id")
    found = [*config.stop_ids, *(ends if isinstance(ends, list) else [ends])]
    for file in TOKENIZER_FILES if config.stop_token_names else ():
        tokens = added_tokens(read_object(directory, file))
        found += [token for name, token in tokens if name in config.stop_token_names]
    return config.with_stop_ids(
        {
            token
            for token in found
            if isinstance(token, int)
            and 0 <= token < config.vocab_rows
            and token != config.given_mask_id
        }
    )
