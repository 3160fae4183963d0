"""Who says which response is better, and how far to trust them: read ``records``."""
