"""The page of decodes: live from the server, or one recorded trace."""

from xflow_jax.serving.page.trace import (
    TracedDecode,
    current_tokens,
    live_page,
    token_texts,
    write_trajectory_page,
)

__all__ = ["TracedDecode", "current_tokens", "live_page", "token_texts", "write_trajectory_page"]
