"""Prototypes: the head that SwAV reads."""

from __future__ import annotations

from torch import Tensor, nn

from metacal._safe import unit


class Prototypes(nn.Module):
    """Cosines between representations and k learned prototypes: [..., dim_in] -> [..., k].

    Both are brought to unit length, as ``z / sqrt(|z|^2 + 1e-12)``: zero, with finite derivatives, at zero. Normalising the
    prototypes inside the function takes the place of SwAV's renormalisation after every step, and so holds in inner steps too.

    Args:
        dim_in: entries of the representations.
        k: number of prototypes; also the attribute ``dim``.

    Errors:
        ValueError: a size below 1.

    Source: Caron et al. 2020, arXiv 2006.09882.

    >>> import torch
    >>> from metacal import nets
    >>> nets.Prototypes(8, 30)(torch.randn(4, 2, 8)).shape
    torch.Size([4, 2, 30])
    """

    def __init__(self, dim_in: int, k: int) -> None:
        super().__init__()
        if dim_in < 1 or k < 1:
            raise ValueError(f"`dim_in` and `k` should be at least 1, got {dim_in} and {k}.")
        self.dim = k
        self.weight = nn.Linear(dim_in, k, bias=False).weight

    def forward(self, z: Tensor) -> Tensor:
        return unit(z) @ unit(self.weight).T
