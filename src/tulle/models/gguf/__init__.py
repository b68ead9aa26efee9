"""GGUF, the file format of llama.cpp: read without torch (``source.py``), written by ``tulle.export.gguf``."""
