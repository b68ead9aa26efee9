"""The packed checkpoint: `spec` says which tensors a linear has, `pack` makes and reads their bytes.

docs/reference/format.md is the specification. Both modules need NumPy and the native extension only.
"""
