"""Beliefs: a model as a denoiser, and wrappers that change what it believes."""

from unmask.denoise.cfg import ClassifierFree
from unmask.denoise.dress import dress
from unmask.denoise.guide import Blended, Guided
from unmask.denoise.plain import Plain
from unmask.denoise.sampled import Draws, Sampled

__all__ = ["Blended", "ClassifierFree", "Draws", "Guided", "Plain", "Sampled", "dress"]
