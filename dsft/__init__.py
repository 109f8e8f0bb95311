"""dsft: the fine-tuning framework that proves the run was right."""

__version__ = "0.1.0"
