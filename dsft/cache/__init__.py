"""The user's cache: where it lies and who may write it, the digests of its folders, digests that are remembered."""
