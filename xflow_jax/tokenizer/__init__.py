"""Tokenizers: loading, chat template, left padding, decoding."""

from xflow_jax.tokenizer.ids import chat_ids, decode_responses, pad_left
from xflow_jax.tokenizer.loading import load_tokenizer

__all__ = ["chat_ids", "decode_responses", "load_tokenizer", "pad_left"]
