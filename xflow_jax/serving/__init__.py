"""Server of a model: continuous batching, an OpenAI-compatible API, and a page."""

from xflow_jax.serving.page import (
    TracedDecode,
    current_tokens,
    live_page,
    token_texts,
    write_trajectory_page,
)

__all__ = ["TracedDecode", "current_tokens", "live_page", "token_texts", "write_trajectory_page"]
