"""Functions that can be differentiated at zero, against what they should be there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from metacal import _safe, tree
from metacal.tc2 import losses

F64 = torch.float64
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tree.norm": lambda x: tree.norm({"a": x[:2], "b": x[2:]}),
    "safe_norm": lambda x: losses.safe_norm(x, dim=None),
}


def test_the_root_has_slope_zero_at_zero_and_keeps_a_nan() -> None:
    x = torch.tensor([0.0, 4.0, math.nan], dtype=F64)
    expected = torch.tensor([0.0, 0.25, math.nan], dtype=F64)
    torch.testing.assert_close(vmap(grad(_safe.root))(x), expected, equal_nan=True, rtol=0, atol=0)


def test_zero_alone_is_replaced() -> None:
    x = torch.tensor([0.0, -2.0, math.nan, math.inf])
    torch.testing.assert_close(_safe.nonzero(x), torch.tensor([1.0, -2.0, math.nan, math.inf]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_first_and_second_derivatives_of_a_norm_are_zero_at_zero(norm: Callable[[Tensor], Tensor]) -> None:
    at_zero = torch.zeros(3, dtype=F64)
    assert norm(at_zero) == 0
    assert torch.equal(grad(norm)(at_zero), at_zero)
    assert torch.equal(hessian(norm)(at_zero), torch.zeros(3, 3, dtype=F64))
    x = at_zero.clone().requires_grad_()
    (first,) = torch.autograd.grad(norm(x), x, create_graph=True)
    assert torch.equal(first, at_zero)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], at_zero)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_norm_is_that_of_torch_elsewhere(norm: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([3.0, -1.0, 0.0], dtype=F64)
    for derivative in (lambda f: f, grad, hessian):
        torch.testing.assert_close(derivative(norm)(x), derivative(torch.linalg.vector_norm)(x), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("scale", [320.0, 1.0, 1e-3, 0.0])
def test_a_unit_vector_in_half_precision_is_that_of_its_numbers(scale: float) -> None:
    x = (scale * torch.tensor([3.0, -4.0])).to(torch.float16)
    y = _safe.unit(x)
    assert y.dtype == torch.float16
    expected = torch.tensor([0.6, -0.8]) if scale else torch.zeros(2)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-3)
