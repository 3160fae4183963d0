"""Flax Linen modules: one configurable Transformer, the heads, and named sizes."""
