"""The engine: assemble, loop, step."""
