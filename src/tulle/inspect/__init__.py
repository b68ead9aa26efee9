"""Looking into models: their weights, outliers of activations, what a token reads, which linears are sensitive."""
