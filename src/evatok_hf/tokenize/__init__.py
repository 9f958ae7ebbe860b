"""Whole videos of any length to tokens and back."""
