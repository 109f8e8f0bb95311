"""Objectives: what the loss is, one file each."""
