"""The quality of reconstruction: scripts, and what they compute and draw."""
