"""Server of a model: continuous batching, an OpenAI-compatible API, and a page."""

__all__: list[str] = []
