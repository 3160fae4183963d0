"""Pure array maths: masked reductions, log-probabilities, KL, advantages, policy
losses.
"""
