"""Coefficient rules: from a tensor's place in the depth to the number its task vector is scaled by. Plain
floats; no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """LiNeS's layer-increasing scaling (Wang et al., ICLR 2025, arXiv 2410.17146, eq. 2), times a global factor.

        c(l) = gamma * (alpha + beta * (l - 1) / (L - 1)),   l = 1..L

    A stack of one layer (L = 1), for which the paper's formula divides by zero, gets gamma * (alpha + beta), the
    deepest value. What lies outside the blocks gets gamma * alpha, as in the paper's reference code.
    """

    alpha: float
    beta: float
    gamma: float = 1.0

    def inside(self, index: int, layers: int) -> float:
        """The coefficient of layer `index` (from 0) of a stack of `layers`, in float64."""
        if layers == 1:
            return self.gamma * (self.alpha + self.beta)
        return self.gamma * (self.alpha + self.beta * index / (layers - 1))

    def outside(self) -> float:
        """The coefficient of a tensor outside the blocks, in float64."""
        return self.gamma * self.alpha

    @property
    def needs_depth(self) -> bool:
        """Whether two layers could differ at all."""
        return self.beta != 0
