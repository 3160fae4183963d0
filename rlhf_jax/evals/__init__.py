"""What a stage achieved, one file per question; each returns the numbers of
``eval.json``.
"""
