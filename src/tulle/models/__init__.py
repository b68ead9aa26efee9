"""What a model is made of: its description, its checkpoint on disk, and the plain decoder, block by block."""
