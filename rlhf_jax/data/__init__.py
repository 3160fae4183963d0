"""From files to batches: read ``sources``, ``formats``, then ``pipeline``."""
