"""Runs packed models on the CPU with NumPy, safetensors files, tokenizers and the native extension alone."""

from tulle.engine.model import Engine, Generation
from tulle.engine.request import Event, Request, Sequence
from tulle.engine.sampling import Sampling
from tulle.engine.scheduler import QueueFull, Scheduler

__all__ = ["Engine", "Event", "Generation", "QueueFull", "Request", "Sampling", "Scheduler", "Sequence"]
