"""MAE: reconstruct the patches of an image that the encoder did not see (experimental)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from metacal._typing import Tree
from metacal.objectives._base import Outputs, SSLObjective
from metacal.objectives._input import like, weight


@final
@dataclass(frozen=True)
class MAE(SSLObjective):
    """The mean squared error of the predicted pixels of masked patches. Experimental: its interface may change.

    With t the pixels of a masked patch and p the decoder's prediction, P entries each ::

        |p - (t - mean(t)) / sqrt(var(t) + eps)|^2 / P              (normalise; var has the divisor P - 1)
        |p - t|^2 / P                                               (normalise=False)

    averaged over samples, views (other masks of the same image) and masked patches. :func:`metacal.tc2.network` of a
    :class:`metacal.nets.ViT`, or :class:`metacal.nets.MaskedAutoencoder` by hand, makes p and t; what TC² calibrates are the
    encoder's tokens. The pixels are constants in derivatives of every order.

    Not estimated: nothing compares views, so m = 1 will do.

    Shapes: reads ``p`` and ``target`` [n, m, masked patches, P]; ``z`` may be anything. Cost: one pass over the pixels.

    Args:
        normalise: every patch by its own mean and variance, which the paper reports as the better target.
        eps: > 0; keeps a patch of one colour finite.
        visible: the share of patches that the encoder sees, in (0, 1), for whoever builds the network; the paper has a quarter.

    Errors:
        ValueError: an eps that is not positive, a share that is none; p or target is missing, differs from the other in shape, or
            is no [n, m, patches, P] with P >= 2.

    Source: He et al. 2022, arXiv 2111.06377.

    >>> import torch
    >>> from metacal import objectives
    >>> target = torch.rand(4, 1, 12, 16)
    >>> nothing = torch.zeros_like(target)  # predicting the mean of every patch leaves its variance, (P - 1) / P
    >>> round(objectives.MAE()(objectives.Outputs(nothing, p=nothing, target=target)).item(), 4)
    0.9375
    """

    heads: ClassVar[tuple[str, ...]] = ("decoder",)

    normalise: bool = True
    eps: float = 1e-6
    visible: float = 0.25

    def __post_init__(self) -> None:
        weight("eps", self.eps, positive=True)
        if not 0 < self.visible < 1:
            raise ValueError(f"`visible` should be a share of the patches, in (0, 1), got {self.visible!r}.")

    def __call__(self, outputs: Outputs, carry: Tree = ()) -> Tensor:
        p = _patches("p", outputs.p)
        pixels = like("target", _patches("target", outputs.target), "p", p).detach()
        if self.normalise:
            pixels = (pixels - pixels.mean(-1, keepdim=True)) * (pixels.var(-1, keepdim=True) + self.eps).rsqrt()
        return (p - pixels).square().mean()


def _patches(name: str, value: Tensor | None) -> Tensor:
    if value is None or value.ndim != 4 or value.shape[-1] < 2:
        got = "None" if value is None else str(tuple(value.shape))
        raise ValueError(
            f"`outputs.{name}` should have shape [n, m, masked patches, P] with P >= 2 pixels, got {got}. Take it from "
            "nets.MaskedAutoencoder; map several tasks with torch.func.vmap."
        )
    return value
