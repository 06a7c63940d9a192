"""Depth is read off tensor names: real families from the case files, and what must be refused."""
