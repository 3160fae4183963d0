"""Preference losses, one file each: functions of scores or log-probabilities of a
pair.
"""
