"""The models, as a repository of the Hub carries them beside its weights; nothing else of the package is imported."""
