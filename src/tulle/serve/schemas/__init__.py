"""What clients send, as pydantic models: bounded, strict, and with a word for what is not supported."""
