"""Workers on other people's packages, each started in a virtual environment of its own.

They import nothing from rlhf_jax; ``gate.py`` is what all workers share.
"""
