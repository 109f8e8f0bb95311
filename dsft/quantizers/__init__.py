"""Quantizers: how frozen linears are packed, one file each."""
