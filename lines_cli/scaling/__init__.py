"""How deep a tensor lies, and what coefficient that gives it."""
