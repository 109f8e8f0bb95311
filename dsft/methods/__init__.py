"""Methods: what learns, one file each."""
