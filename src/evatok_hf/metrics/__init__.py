"""Distances of a reconstruction from its video: pixels, perceptual distances, features of clips, Frechet distance."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"pixels": "CodebookUse psnr ssim", "perceptual": "load_perceptual"})
