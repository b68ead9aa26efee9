"""Compression: a recipe, the walk over a model's blocks, and the folder that survives a kill.

``job`` composes them; ``tulle.compress`` is its function. ``recipe`` reads YAML, ``survey`` looks at the dense model
before the walk, ``walker`` compresses block after block, ``run_folder`` keeps what is done on disk.
"""
