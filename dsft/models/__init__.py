"""Models: built on meta, read from safetensors shard by shard."""
