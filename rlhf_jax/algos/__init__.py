"""The training steps: pure functions from (state, batch) to (state, metrics)."""
