"""Error feedback for the deepest plies.

With all plies every group has the same depth, and nothing of the ladder helps any more; then it
pays to let each column make good for the errors of the columns before it (GPTQ: Frantar et al.
2022, after OBQ). Only the choice among the 256 leaves follows the feedback. It moves a weight by
about the size of a leaf, far less than the cells of shallow depths, so prefixes stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pliant.codec.rotate import GROUP

if TYPE_CHECKING:
    import torch

__all__ = ["choose_leaves", "factor"]

_DAMPING = 0.03


def factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What `choose_leaves` needs of the inputs.

    `moments` [columns, columns] is the mean of x xᵀ in source order, `order` the channel order.
    Returns the upper Cholesky factor of the inverse of the damped moments of the rotated inputs,
    float32 [64 groups, 64 groups].
    """
    import torch

    from pliant.codec.rotate import rotate

    columns = len(order)
    padded = -(-columns // GROUP) * GROUP
    ordered = torch.zeros(padded, padded)
    ordered[:columns, :columns] = moments.float()[order][:, order]
    rotated = rotate(rotate(ordered).T.contiguous()).double()
    mean = float(rotated.diagonal().mean())
    rotated.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(rotated))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return upper


def choose_leaves(
    values: torch.Tensor,
    scale: torch.Tensor,
    thresholds: torch.Tensor,
    levels: torch.Tensor,
    upper: torch.Tensor,
) -> torch.Tensor:
    """Leaves of rotated weights, each chosen after the errors of the columns before it.

    values:     float32 [rows, groups, 64], overwritten
    scale:      float32 [rows, groups]; rows with scale 0 get leaves without a meaning
    thresholds: float32 [255], levels: float32 [256], of the tree
    upper:      from `factor`
    Returns int32 [rows, groups, 64].
    """
    import torch

    rows, groups, _ = values.shape
    weights = values.reshape(rows, -1).T.contiguous()  # columns lie together
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    leaves = torch.empty(groups * GROUP, rows, dtype=torch.int32)
    errors = torch.empty(GROUP, rows)
    for g in range(groups):
        first, last = g * GROUP, (g + 1) * GROUP
        s, i = scale[:, g].contiguous(), inverse[:, g].contiguous()
        block = weights[first:last]
        for c in range(GROUP):
            column = first + c
            leaf = torch.bucketize(block[c] * i, thresholds, out_int32=True)
            leaves[column] = leaf
            error = (block[c] - levels[leaf] * s) / upper[column, column]
            errors[c] = error
            block[c + 1 :].addr_(upper[column, column + 1 : last], error, alpha=-1)
        weights[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return leaves.T.reshape(rows, groups, GROUP)
