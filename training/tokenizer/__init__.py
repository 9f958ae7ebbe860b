"""Losses, teachers and options of training a tokenizer."""
