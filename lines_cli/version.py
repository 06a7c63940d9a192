"""The version of the package."""

__version__ = "0.1.0"

ABOUT = {"schema": 1, "lines": __version__}
"""What every JSON object that lines prints begins with: the version of its keys, and of the program (docs/json.md)."""
