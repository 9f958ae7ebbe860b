"""Protocols of evaluation: a JSON file each, what they mean, and what is measured."""
