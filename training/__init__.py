"""A script for each stage, and in folders what they share. Run them by their path."""
