"""Decoding rules: how far each position moves after a forward pass."""
