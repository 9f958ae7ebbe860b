"""What a repository of the Hub carries beside its weights. It imports nothing of the package outside itself."""
