"""A masked autoencoder (experimental)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metacal.nets.vit import Block, ViT, patches, pick, positions


class Reconstruction(NamedTuple):
    """Prediction and truth of the masked patches, [..., masked, P], and the encoder's (calibrated) tokens, [..., visible, dim]."""

    p: Tensor
    target: Tensor
    tokens: Tensor


class MaskedAutoencoder(nn.Module):
    """Encodes a few patches of an image and predicts the pixels of the others from them. Experimental: its interface may change.

    The :class:`metacal.nets.ViT` in ``encoder`` sees only the visible patches; its tokens, calibrated on the way where
    ``calibrate`` is given, go through the :class:`metacal.nets.MaskedDecoder` in ``decoder``. Which patches are visible is an
    argument and not drawn inside: two passes over one ``order`` see one mask. Afterwards ``encoder`` alone is what users get.

    Args:
        encoder: sees the visible patches.
        in_channels: C.
        visible: the share of patches that the encoder sees, at least one and not all; the paper has a quarter.
        dim, depth, heads: of the decoder.

    Errors:
        ValueError: a share that is not in (0, 1), images of one patch.

    Source: He et al. 2022, arXiv 2111.06377.

    >>> import torch
    >>> from metacal import nets, objectives
    >>> net = nets.MaskedAutoencoder(nets.ViT(1, dim=12, depth=1), in_channels=1, dim=8, depth=1, heads=2)
    >>> x = torch.rand(4, 2, 1, 16, 16)  # 4 images, 2 masks each
    >>> p, target, tokens = net(x, nets.random_order(4, 2, patches=16))
    >>> p.shape, tokens.shape
    (torch.Size([4, 2, 12, 16]), torch.Size([4, 2, 4, 12]))
    >>> objectives.MAE()(objectives.Outputs(tokens, p, target)).shape
    torch.Size([])
    """

    def __init__(self, encoder: ViT, in_channels: int = 3, *, visible: float = 0.25, dim: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        if not 0 < visible < 1:
            raise ValueError(f"`visible` should be a share of the patches, in (0, 1), got {visible!r}.")
        self.encoder, self.visible = encoder, visible
        self.decoder = MaskedDecoder(encoder.dim, in_channels * encoder.patch**2, dim, depth, heads)

    def forward(self, x: Tensor, order: Tensor, calibrate: Callable[[Tensor], Tensor] | None = None) -> Reconstruction:
        """Images [..., C, H, W] and, for each, an order of its patches [..., patches], the visible ones first."""
        truth = patches(x, self.encoder.patch)
        shown, hidden = order.tensor_split([num_visible(self.visible, truth.shape[-2])], -1)
        tokens = self.encoder(x, shown)
        if calibrate is not None:
            tokens = calibrate(tokens)
        grid = (x.shape[-2] // self.encoder.patch, x.shape[-1] // self.encoder.patch)
        return Reconstruction(self.decoder(tokens, order, grid), pick(truth, hidden), tokens)


class MaskedDecoder(nn.Module):
    """Predicts the pixels of masked patches from the tokens of the visible ones. Experimental: its interface may change.

    The tokens, and a learned mask token in every other place, go through a narrow transformer.

    Args:
        dim_in: size of the tokens.
        pixels: P = C patch^2, of a patch.
        dim, depth, heads: width, blocks and heads of the attention.

    Errors:
        ValueError: a dim that is no multiple of 4 and of heads.

    >>> import torch
    >>> from metacal import nets
    >>> decoder = nets.MaskedDecoder(12, pixels=16, dim=8, depth=1, heads=2)
    >>> decoder(torch.zeros(5, 4, 12), nets.random_order(5, patches=16), grid=(4, 4)).shape  # 4 visible, 12 masked
    torch.Size([5, 12, 16])
    """

    def __init__(self, dim_in: int, pixels: int, dim: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        if dim % 4 or dim % heads:
            raise ValueError(f"`dim` should be a multiple of 4 (positions) and of heads = {heads}, got {dim}.")
        self.dim = dim
        self.widen = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, 4.0) for _ in range(depth)), nn.LayerNorm(dim))
        self.pixels = nn.Linear(dim, pixels)

    def forward(self, tokens: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [..., visible, dim_in] and the order [..., patches] of all patches of an h x w grid, to pixels [..., masked, P]."""
        visible = tokens.shape[-2]
        known = self.widen(tokens)
        unknown = self.mask_token.expand(*order[..., visible:].shape, self.dim)
        where = positions(*grid, self.dim).to(known)
        # In the shuffled order: attention does not care, and positions go along.
        decoded = self.blocks(torch.cat([known, unknown], -2) + pick(where.expand(*order.shape, self.dim), order))
        predicted: Tensor = self.pixels(decoded[..., visible:, :])
        return predicted


def random_order(*shape: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random permutations of the patches, [*shape, patches]: which ones an autoencoder sees. Drawn on the CPU."""
    return torch.rand(*shape, patches, generator=generator).argsort(-1)


def num_visible(share: float, num_patches: int) -> int:
    """How many patches an encoder sees that sees a share of them: whole ones, at least one, and not all."""
    if num_patches < 2:
        raise ValueError(f"`x` should be images of at least 2 patches, one to see and one to predict, got {num_patches}. Resize them.")
    return min(max(round(share * num_patches), 1), num_patches - 1)


def with_mask(x: Tensor, patch: int, visible: float) -> Tensor:
    """Draws a mask as one more channel, 1 on the patches that are seen and 0 on the others: [..., C, H, W] -> [..., C + 1, H, W]."""
    num_patches = patches(x[..., :1, :, :], patch).shape[-2]
    rank = random_order(*x.shape[:-3], patches=num_patches)
    seen = (rank < num_visible(visible, num_patches)).to(x).unflatten(-1, (1, -1, x.shape[-1] // patch))
    return torch.cat([x, seen.repeat_interleave(patch, -2).repeat_interleave(patch, -1)], -3)


def without_mask(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The images [..., C, H, W], and the order of their patches [..., patches], the visible ones first, which ``with_mask`` drew."""
    seen = patches(x[..., -1:, :, :], patch)[..., 0]
    return x[..., :-1, :, :], seen.argsort(dim=-1, descending=True, stable=True)
