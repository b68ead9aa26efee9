"""The published methods, one file each. ``contract`` says what the walker gives a method and what it wants back."""
