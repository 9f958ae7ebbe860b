"""Data that training reads: streams of clips, curated tables, data sets of tokens."""
