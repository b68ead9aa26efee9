"""Training-free sparsity of activations: which inputs of a linear a token keeps."""
