"""Sweeps: what was typed for each point, where each stands, and how they are run, here or as SLURM job arrays."""
