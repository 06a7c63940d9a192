"""The front doors for Python: one call each, and the same on tensors in memory."""
