"""Methods that set weights to zero. One file per method; none imports another."""
