"""The embedded worlds and the public data sets that recipes name.

``tiny_tldr`` (articles and summaries, of ``tiny_world`` and its people), ``tiny_math``,
``tiny_judgements`` and ``tiny_critiques`` are made by rule; ``gsm8k``, ``safe_rlhf``
and ``sentiment`` read public data. No other layer below the commands needs them.
"""
