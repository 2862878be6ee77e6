"""Vision transformers for small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ViT(nn.Module):
    """A vision transformer with mean pooling: [..., C, H, W] -> [..., dim]. The defaults are ViT-Tiny's width and depth.

    Patches, fixed sine-cosine positions, ``depth`` pre-norm blocks of attention and MLP, LayerNorm, the mean over patches. There
    is no class token, and positions are computed from the image at hand: any height and width that ``patch`` divides will do. 5.3
    million parameters; a 32 x 32 image makes 64 patches and costs 0.36 billion multiplications forward. No image sees another
    and nothing is drawn or carried: the same function alone, in a batch and under ``torch.func`` transforms.

    Given the numbers of some patches [..., visible] beside the images it sees these alone, and returns their tokens
    [..., visible, dim] in place of the mean.

    Attention is written out, softmax(q k^T / sqrt(d)) v, because torch's fused one has neither a double backward nor a forward-mode
    derivative. At 64 patches its [patches, patches] weights are small.

    Args:
        in_channels: C.
        patch: side of a patch in pixels.
        dim: width, a multiple of 4 and of heads; also the attribute ``dim``.
        depth: blocks.
        heads: of the attention.
        mlp_ratio: hidden width of the blocks' MLP over dim.

    Errors:
        ValueError: a size that is not positive, a dim that is no multiple of 4 and of heads, images that patches do not tile.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929; sizes of Touvron et al. 2021, arXiv 2012.12877; positions and pooling as in
    Beyer et al. 2022, arXiv 2205.01580.

    >>> import torch
    >>> from metacal import nets
    >>> nets.ViT(in_channels=1, dim=12, depth=2)(torch.zeros(4, 2, 1, 28, 28)).shape
    torch.Size([4, 2, 12])
    """

    def __init__(
        self, in_channels: int = 3, patch: int = 4, dim: int = 192, depth: int = 12, heads: int = 3, *, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        if min(in_channels, patch, dim, depth, heads) < 1 or mlp_ratio <= 0:
            raise ValueError("`in_channels`, `patch`, `dim`, `depth`, `heads` and `mlp_ratio` should be positive.")
        if dim % 4 or dim % heads:
            raise ValueError(f"`dim` should be a multiple of 4 (positions) and of heads = {heads}, got {dim}.")
        self.in_channels, self.patch, self.dim = in_channels, patch, dim
        self.embed = nn.Linear(in_channels * patch**2, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        if shown is None:
            return self.encode(self.tokens(x)).mean(-2)
        return self.encode(pick(self.tokens(x), shown))

    def tokens(self, x: Tensor) -> Tensor:
        """Embedded patches with their positions: [..., C, H, W] -> [..., patches, dim]."""
        embedded: Tensor = self.embed(patches(x, self.patch))
        return embedded + positions(x.shape[-2] // self.patch, x.shape[-1] // self.patch, self.dim).to(embedded)

    def encode(self, tokens: Tensor) -> Tensor:
        """The blocks and the last norm, on any number of tokens: [..., tokens, dim] -> [..., tokens, dim]."""
        encoded: Tensor = self.norm(self.blocks(tokens))
        return encoded


class Block(nn.Module):
    """A pre-norm transformer block: [..., tokens, dim] -> [..., tokens, dim]."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def attend(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, head by head."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-2, -4)  # [..., heads, 3, tokens, d]
        q, k, v = split.unbind(-3)
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # [..., heads, tokens, tokens]
        return (shares @ v).transpose(-2, -3).flatten(-2)


def patches(x: Tensor, patch: int) -> Tensor:
    """Cuts images into patches, row by row: [..., C, H, W] -> [..., H/patch W/patch, C patch patch].

    >>> import torch
    >>> patches(torch.arange(16).reshape(1, 4, 4), 2)[0]  # the patch at the top left
    tensor([0, 1, 4, 5])
    """
    if x.shape[-1] % patch or x.shape[-2] % patch:
        raise ValueError(f"`x` should be images that patches of {patch} x {patch} tile, got {tuple(x.shape)}. Pad or crop them.")
    cut = x.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [..., C, h, patch, w, patch]
    return cut.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def pick(tokens: Tensor, order: Tensor) -> Tensor:
    """tokens[..., order, :]."""
    return tokens.gather(-2, order[..., None].expand(*order.shape, tokens.shape[-1]))


def positions(h: int, w: int, dim: int) -> Tensor:
    """Sines and cosines of the row and the column, dim / 4 frequencies each: [h w, dim], from 1 down to 1/10,000."""
    frequencies = 10_000 ** -torch.linspace(0, 1, dim // 4)
    row = (torch.arange(h)[:, None] * frequencies)[:, None].expand(h, w, dim // 4)
    column = (torch.arange(w)[:, None] * frequencies)[None].expand(h, w, dim // 4)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], -1).flatten(0, 1)
