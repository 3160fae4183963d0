"""The loops: what happens between a config and a folder with a finished stage in it."""
