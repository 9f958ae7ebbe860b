"""The generator in other engines."""
