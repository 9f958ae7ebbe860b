"""Data, loss and options of training a generator."""
