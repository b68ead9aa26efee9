"""Transformers integration. Importing this package teaches transformers to load what Tulle writes.

``register`` holds the hooks that transformers calls, ``packed_linear`` the torch module that computes with packed
tensors, ``attention`` quantised queries, keys and values, ``pack`` the way from a method's result to packed tensors.
"""

from tulle.hf.register import (
    fits_two_of_four,
    load,
    load_checkpoint,
    packed_linears,
    require_packed_tensors,
    use_sparse_tensor_cores,
)

__all__ = [
    "fits_two_of_four",
    "load",
    "load_checkpoint",
    "packed_linears",
    "require_packed_tensors",
    "use_sparse_tensor_cores",
]
