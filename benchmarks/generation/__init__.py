"""Generated clips and predicted frames: `measure.py`, and its parts."""
