"""A folder a topic, with its scripts and what these share; `common/` is shared by all. Run scripts by their path."""
