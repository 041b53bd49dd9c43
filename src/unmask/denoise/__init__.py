"""Beliefs: a model as a denoiser, and wrappers that change what it believes."""

from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Sampled

__all__ = ["Plain", "Sampled"]
