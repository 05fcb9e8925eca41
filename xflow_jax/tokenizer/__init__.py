"""Tokenizers: loading, chat template, messages, left padding, decoding."""

from xflow_jax.tokenizer.ids import chat_ids, decode_responses, pad_left
from xflow_jax.tokenizer.loading import load_tokenizer
from xflow_jax.tokenizer.messages import Messages, check_messages, read_messages, with_system

__all__ = [
    "Messages",
    "chat_ids",
    "check_messages",
    "decode_responses",
    "load_tokenizer",
    "pad_left",
    "read_messages",
    "with_system",
]
