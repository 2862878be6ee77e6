"""What is asked of these is time and memory: three networks, each sample with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.methods import Method
from benchmarks.problem import Problem, Rule, Size, with_steps
from benchmarks.problems.nets import Apply, Params, conv, cross_entropy, gpt, mlp, token_losses
from metacal._typing import Tree

STEPS: dict[Size, int] = {"tiny": 3, "small": 50, "full": 50}
RULE = Rule("sgd", 0.02, 0.9)


def asks(method: Method) -> bool:
    """Whether a method's time and memory are what these networks are for: those that are exact. Far from a minimum others are no match."""
    return method.kind == "exact"


def mlp_cost(size: Size) -> Problem:
    """784-256-256-10 on batches of 100; small and full are the same."""
    hidden, batch, features = (8, 4, 12) if size == "tiny" else (256, 100, 784)
    return replace(weighted_mlp(STEPS[size], width=hidden, batch=batch, features=features), compile=True)


def weighted_mlp(num_steps: int, *, width: int, batch: int, features: int = 784, num_weights: int = 1000) -> Problem:
    """Two hidden layers."""
    apply, params = mlp([features, width, width, 10])
    return _classifier("MLP", apply, params, (features,), num_steps, batch, num_weights)


def conv_cost(size: Size) -> Problem:
    """Three layers of 16 channels, or 32."""
    channels, batch, side = {"tiny": (2, 4, 8), "small": (16, 32, 28), "full": (32, 100, 28)}[size]
    apply, params = conv(channels, 10, size=side)
    problem = _classifier("conv", apply, params, (1, side, side), STEPS[size], batch, 1000)
    # At larger rates kinks of the ReLU are crossed a step earlier or later in float32, and its exact hypergradient is another.
    return replace(problem, rule=Rule("sgd", 0.0001, 0.9), compile=size == "full")


def transformer_cost(size: Size) -> Problem:
    """A GPT of two blocks on random tokens."""
    context, dim, heads, batch = {"tiny": (5, 8, 2, 3), "small": (32, 64, 4, 4), "full": (64, 128, 4, 16)}[size]
    num_weights, vocabulary, T = 1000, 64, STEPS[size]
    apply, params = gpt(vocabulary, context, dim, 2, heads)
    g = torch.Generator().manual_seed(0)

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, where = batch
        return (h["weights"][where] * token_losses(apply(w, tokens[:, :-1]), tokens).mean(-1)).mean()

    def outer(w: Tree, h: Tree, tokens: Tensor) -> Tensor:
        return token_losses(apply(w, tokens[:, :-1]), tokens).mean()

    def tokens() -> Tensor:
        return torch.randint(vocabulary, (batch, context + 1), generator=g)

    batches = [(tokens(), torch.randint(num_weights, (batch,), generator=g)) for _ in range(T)]
    weights = {"weights": torch.ones(num_weights)}
    return Problem("cost, transformer", inner, outer, params, weights, batches, tokens(), RULE, step_size=0.02, compile=size == "full")


def _classifier(name: str, apply: Apply, params: Params, shape: Sequence[int], num_steps: int, batch: int, num_weights: int) -> Problem:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(10, *shape, generator=g)

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, where = batch
        return (h["weights"][where] * F.cross_entropy(apply(w, x), y, reduction="none")).mean()

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (batch,), generator=g)
        return 0.3 * centres[y] + torch.randn(batch, *shape, generator=g), y

    # At most 50 batches, which a longer run sees again.
    batches = [(*draw(), torch.randint(num_weights, (batch,), generator=g)) for _ in range(min(num_steps, 50))]
    weights = {"weights": torch.ones(num_weights)}
    problem = Problem(f"cost, {name}", inner, cross_entropy(apply), params, weights, batches, draw(), RULE, step_size=0.02)
    return with_steps(problem, num_steps)
