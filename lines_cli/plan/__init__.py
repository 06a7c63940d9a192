"""Recipe and headers -> every byte of the output, before a tensor is read."""
