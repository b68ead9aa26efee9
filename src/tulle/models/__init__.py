"""What a model is made of: anatomy, checkpoints on disk, one block at a time."""
