"""Data: rows, templates and masks, the token cache, the order of examples."""
