"""Time and memory: a script for each part of `all.py`, which runs them and makes one report; and some more."""
