"""Tensor mathematics that several methods share. Imports nothing of ours but the error type."""
