"""Networks as pure functions of a flat dict of tensors: ``apply(params, x)``, and where they start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from metacal._typing import Objective

Params = dict[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]


def _normal(generator: torch.Generator, *shape: int, fan_in: int) -> Tensor:
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)


def linear(num_inputs: int, num_outputs: int) -> tuple[Apply, Params]:
    """Softmax regression, from zero."""
    return lambda w, x: x @ w["weight"] + w["bias"], {"weight": torch.zeros(num_inputs, num_outputs), "bias": torch.zeros(num_outputs)}


def mlp(sizes: Sequence[int], seed: int = 0) -> tuple[Apply, Params]:
    """Linear layers with ReLU between them: [n, sizes[0]] -> [n, sizes[-1]]."""
    g = torch.Generator().manual_seed(seed)
    params: Params = {}
    for i, (m, n) in enumerate(pairwise(sizes)):
        params |= {f"{i}.weight": math.sqrt(2) * _normal(g, m, n, fan_in=m), f"{i}.bias": torch.zeros(n)}
    last = len(sizes) - 2

    def apply(w: Params, x: Tensor) -> Tensor:
        for i in range(last):
            x = F.relu(torch.addmm(w[f"{i}.bias"], x, w[f"{i}.weight"]))
        return torch.addmm(w[f"{last}.bias"], x, w[f"{last}.weight"])

    return apply, params


def conv(
    channels: int, num_outputs: int, depth: int = 3, *, batch_norm: bool = False, size: int = 28, seed: int = 0
) -> tuple[Apply, Params]:
    """3 x 3 convolutions of stride 2 with ReLU (and normalised by the batch), a linear layer: [n, 1, size, size] -> [n, num_outputs]."""
    g = torch.Generator().manual_seed(seed)
    params: Params = {}
    channels_in = 1
    for i in range(depth):
        params[f"{i}.weight"] = math.sqrt(2) * _normal(g, channels, channels_in, 3, 3, fan_in=9 * channels_in)
        params[f"{i}.bias"] = torch.zeros(channels)
        if batch_norm:
            params |= {f"{i}.scale": torch.ones(channels), f"{i}.shift": torch.zeros(channels)}
        channels_in, size = channels, -(-size // 2)
    features = channels * size**2
    params |= {"out.weight": _normal(g, features, num_outputs, fan_in=features), "out.bias": torch.zeros(num_outputs)}

    def apply(w: Params, x: Tensor) -> Tensor:
        for i in range(depth):
            x = F.conv2d(x, w[f"{i}.weight"], w[f"{i}.bias"], stride=2, padding=1)
            if batch_norm:
                x = F.batch_norm(x, None, None, w[f"{i}.scale"], w[f"{i}.shift"], training=True)
            x = F.relu(x)
        return torch.addmm(w["out.bias"], x.flatten(1), w["out.weight"])

    return apply, params


def gpt(vocabulary: int, context: int, dim: int, depth: int, heads: int, seed: int = 0) -> tuple[Apply, Params]:
    """A decoder of pre-norm blocks, its embedding tied to its output: tokens [n, t] -> logits [n, t, vocabulary], t <= context."""
    g = torch.Generator().manual_seed(seed)
    params: Params = {"tokens": 0.02 * torch.randn(vocabulary, dim, generator=g), "places": 0.02 * torch.randn(context, dim, generator=g)}
    for i in range(depth):
        params |= {f"{i}.norm1": torch.ones(dim), f"{i}.norm2": torch.ones(dim)}
        params |= {f"{i}.qkv": _normal(g, dim, 3 * dim, fan_in=dim), f"{i}.mix": _normal(g, dim, dim, fan_in=2 * depth * dim)}
        params |= {f"{i}.up": _normal(g, dim, 4 * dim, fan_in=dim), f"{i}.down": _normal(g, 4 * dim, dim, fan_in=8 * depth * dim)}
    params["norm"] = torch.ones(dim)

    def attend(x: Tensor, qkv: Tensor) -> Tensor:
        q, k, v = (x @ qkv).unflatten(-1, (3, heads, -1)).transpose(-2, -4).unbind(-3)  # [n, heads, t, d] each
        t = x.shape[-2]
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        # Written out: the fused attention has no second derivative.
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1)
        return (shares @ v).transpose(-2, -3).flatten(-2)

    def apply(w: Params, tokens: Tensor) -> Tensor:
        x = w["tokens"][tokens] + w["places"][: tokens.shape[-1]]
        for i in range(depth):
            x = x + attend(F.layer_norm(x, (dim,), w[f"{i}.norm1"]), w[f"{i}.qkv"]) @ w[f"{i}.mix"]
            x = x + F.gelu(F.layer_norm(x, (dim,), w[f"{i}.norm2"]) @ w[f"{i}.up"]) @ w[f"{i}.down"]
        return F.layer_norm(x, (dim,), w["norm"]) @ w["tokens"].T

    return apply, params


def cross_entropy(apply: Apply) -> Objective:
    """The mean cross-entropy of a batch of inputs and classes, as an objective that reads no hparams."""
    return lambda w, h, batch: F.cross_entropy(apply(w, batch[0]), batch[1])


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token, [n, t], of tokens [n, t + 1]."""
    return F.cross_entropy(logits.transpose(-1, -2), tokens[:, 1:], reduction="none")
