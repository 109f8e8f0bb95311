"""Where processes come from. Imports neither torch nor dsft."""
