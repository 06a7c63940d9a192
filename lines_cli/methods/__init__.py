"""The merge methods: plain functions over tensors, each with what it says about itself (`Method`).

Each file is a family of methods; docs/add-a-merge-method.md says how to add one.
"""

from lines_cli.methods.calibration import CALIBRATIONS, Calibration
from lines_cli.methods.method import CannotMergeError, Chosen, Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.registry import METHODS, find_method
from lines_cli.methods.said import Said, Values
from lines_cli.methods.sparsify import ByMagnitude, Drawn

__all__ = [
    "CALIBRATIONS",
    "METHODS",
    "ByMagnitude",
    "Calibration",
    "CannotMergeError",
    "Chosen",
    "Drawn",
    "Measured",
    "Method",
    "Parameter",
    "Said",
    "Values",
    "find_method",
]
