"""Beliefs: a model as a denoiser, and wrappers that change what it believes."""

from unmask.denoise.dress import Draws, dress
from unmask.denoise.guide import Blended, Guided
from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Sampled

__all__ = ["Blended", "Draws", "Guided", "Plain", "Sampled", "dress"]
