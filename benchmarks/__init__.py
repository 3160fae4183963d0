"""Measurements: what the figures in the docs come from. Nothing imports them."""
