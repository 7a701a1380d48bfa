"""The rotation of a group: a 64-point Walsh-Hadamard transform in natural (Sylvester) order."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["GROUP", "hadamard", "rotate"]

GROUP = 64
"""Input channels in a group."""


@cache
def hadamard() -> NDArray[np.float32]:
    """The matrix of the rotation, float32 [64, 64]: symmetric and its own inverse."""
    matrix: NDArray[np.float32] = np.ones((1, 1), np.float32)
    while len(matrix) < GROUP:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotation: NDArray[np.float32] = (matrix / np.sqrt(np.float32(GROUP))).astype(np.float32)
    rotation.flags.writeable = False
    return rotation


def rotate(values: torch.Tensor) -> torch.Tensor:
    """`values` [..., 64 n] with every run of 64 transformed; the shape stays. Undone by itself.

    Raises ValueError if the last dimension is not a multiple of 64.
    """
    import torch

    if values.shape[-1] % GROUP:
        raise ValueError(f"the last dimension, {values.shape[-1]}, is not a multiple of {GROUP}")
    matrix = torch.from_numpy(hadamard().copy()).to(values)
    return (values.reshape(-1, GROUP) @ matrix).reshape(values.shape)
