"""What the peers share: a problem's objectives as a module, its leaves, a gradient by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PRODUCTS = 20
"""Hessian products of every linear solve: those of this library's rows."""

Tensors = dict[str, Tensor]


class Model(nn.Module):
    """The tensors of a flat dict as parameters; called with an objective, it is that objective at them.

    The libraries that want a module see one whose parameters they may replace by tensors of their own.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.names = {name: f"tensor/{name.replace('.', '/')}" for name in tensors}  # no dots, and no module's attribute
        for name, tensor in tensors.items():
            self.register_parameter(self.names[name], nn.Parameter(tensor.clone()))

    def tensors(self) -> Tensors:
        return {name: getattr(self, own) for name, own in self.names.items()}

    def forward(self, objective: Callable[..., Tensor], hparams: Tensors, batch: object) -> Tensor:
        return objective(self.tensors(), hparams, batch)


def fresh(tensors: Tensors) -> Tensors:
    """Leaves of their own graph, with the same storage."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def gradient(value: Tensor, wrt: Tensors) -> Tensors:
    """``d value / d wrt``, zeros where nothing depends on it; the graph is used up."""
    return dict(zip(wrt, torch.autograd.grad(value, list(wrt.values()), allow_unused=True, materialize_grads=True), strict=True))
