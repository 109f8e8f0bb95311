"""Processes: who is in the run, and how they are laid out."""
