"""What a machine with a GPU is asked in a few minutes: see docs/gpu.md."""
