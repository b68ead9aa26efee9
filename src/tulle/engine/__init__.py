"""Runs packed models on the CPU with NumPy, safetensors files, tokenizers and the native extension alone."""

from tulle.engine.model import Engine, Generation
from tulle.engine.sampling import Sampling

__all__ = ["Engine", "Generation", "Sampling"]
