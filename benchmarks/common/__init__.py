"""The machine, measuring and counting."""
