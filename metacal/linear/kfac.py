"""Kronecker factors of a network's curvature, through curvlinops."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metacal import _checks, derivatives, tree
from metacal._typing import Tree
from metacal.linear.base import Inverse, Matvec, Preconditioner


def _pair(hparams: Tree, batch: Tree) -> tuple[Any, Tensor]:
    inputs, targets = batch
    return inputs, targets


@dataclass(frozen=True)
class KFAC(Preconditioner):
    """``(A x G + damping I)^-1`` layer by layer: the Kronecker factors of the Gauss-Newton matrix of a network.

    A is the second moment of a layer's input (with a 1 for the bias), G that of the gradients of its output. Needs
    ``curvlinops-for-pytorch``. Cost: no products, one forward pass and (with ``fisher="type-2"``) as many backward passes as the
    network has outputs, the eigenvalues of the factors, and one product for the true residual where it solves alone. Bias: couplings
    between layers, and within one what is no Kronecker product; sample weights and other terms of the inner objective are not seen.
    The factors are constants: derivatives of the solution are by ``dv = P (db - dA v)`` with this approximate inverse P.

    Args:
        module: the network whose params, by name, are the inner params: Linear and Conv2d layers only. It is copied, not touched.
        loss: ``nn.MSELoss``, ``nn.CrossEntropyLoss`` or ``nn.BCEWithLogitsLoss``, an instance with the objective's reduction.
        damping: added to every eigenvalue of ``A x G``.
        data: ``(hparams, batch) -> (inputs, targets)``; by default the batch is that pair.
        fisher: "type-2" is exact in the outputs; "mc" draws labels (with curvlinops' own fixed seed); "empirical" takes the labels
            of the batch; "forward-only" takes G for the identity.
        sharing: "expand" or "reduce", how weights shared over positions are treated.

    Errors: ImportError without curvlinops; TypeError outside ``Implicit`` (a bare product does not say where it was taken);
    RuntimeError inside a ``torch.func`` transform, which its hooks do not see.

    Source: Martens & Grosse 2015 (arXiv 1503.05671); Eschenhagen et al. 2023 (arXiv 2311.00636).
    """

    module: nn.Module
    loss: nn.Module
    damping: float = 1e-3
    data: Callable[[Tree, Tree], tuple[Any, Tensor]] = _pair
    fisher: Literal["type-2", "mc", "empirical", "forward-only"] = "type-2"
    sharing: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        _checks.number("damping", self.damping, "Kronecker factors are singular as a rule", positive=True)
        for name, module in (("module", self.module), ("loss", self.loss)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"`{name}` should be an nn.Module, got {type(module).__name__}.")

    def inverse(self, matvec: Matvec, like: Tree) -> Inverse:
        if derivatives.transforming():
            raise RuntimeError(
                "linear.KFAC reads its factors by hooks, which see nothing inside a torch.func transform or torch.compile. Call the "
                "estimate outside of them (a loop instead of vmap), or precondition with linear.Diagonal or linear.Nystroem."
            )
        at = getattr(matvec, "at", None)
        if at is None:
            raise TypeError(
                "linear.KFAC needs to know the params and batches at which the matrix was taken: `matvec` should be a "
                f"linear.LinearMap with `at`, as adjoints.Implicit makes it; got {type(matvec).__name__}."
            )
        names = sorted(at.params)
        network = copy.deepcopy(self.module)
        copied = dict(network.named_parameters())
        if unknown := [name for name in names if name not in copied]:
            raise ValueError(
                f"`module` should have the inner params by name: it has no '{unknown[0]}'. Make them with metacal.functional(module)."
            )
        for name in names:
            copied[name].data = at.params[name].detach().clone()
        curvlinops = _curvlinops()
        data = tree.detach([self.data(at.hparams, batch) for batch in at.batches])
        with torch.enable_grad():
            try:
                factors = curvlinops.KFACLinearOperator(
                    network,
                    self.loss,
                    [copied[name] for name in names],
                    data,
                    check_deterministic=False,
                    separate_weight_and_bias=False,
                    fisher_type=self.fisher,
                    kfac_approx=self.sharing,
                )
            except NotImplementedError as error:
                raise ValueError("`module` should hold its params in Linear and Conv2d layers only, for linear.KFAC.") from error
            factors.compute_kronecker_factors()
        inverse = curvlinops.KFACInverseLinearOperator(factors, damping=self.damping, use_exact_damping=True)

        def apply(b: Tree) -> Tree:
            return dict(zip(names, inverse @ [b[name] for name in names], strict=True))

        return Inverse(apply, 0)


def _curvlinops() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it imports
            return importlib.import_module("curvlinops")
    except ImportError as error:
        raise ImportError("linear.KFAC needs curvlinops: pip install curvlinops-for-pytorch") from error
