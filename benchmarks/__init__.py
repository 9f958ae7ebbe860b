"""A script for each question, and in folders what they share. Run them by their path."""
