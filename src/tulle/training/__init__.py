"""Training: the corpus, the loop and the recipes they follow. Importing this package loads no torch."""
