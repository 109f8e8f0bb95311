"""Checkpoints: written aside, hashed, committed by a manifest; loaded only if every byte verifies."""
