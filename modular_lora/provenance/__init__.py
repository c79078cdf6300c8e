"""What an image is known to be: attestations, the tensors they are bound to, signed statements, keys, the record."""
