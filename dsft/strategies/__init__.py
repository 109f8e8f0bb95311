"""Strategies: where parameters, gradients and optimizer state live, one file each."""
