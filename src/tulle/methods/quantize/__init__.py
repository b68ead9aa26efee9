"""Methods that put weights on an integer grid. One file per method; none imports another."""
