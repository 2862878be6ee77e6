"""Rows: the derivative of a solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metacal import adjoints, linear
from metacal.registry.costs import one_step
from metacal.registry.row import DISTANCE, HPARAMS, Kind, Method, Setting, Sizes, cite

_MOST_ROWS = 5000  # of a matrix that is formed


def _implicit(
    code: str,
    solver: Callable[[Setting], linear.LinearSolver],
    *,
    bias: str,
    products: str,
    count: Callable[[Sizes], int],
    memory: str = "one step's activations",
    vectors: Callable[[Sizes], int] = lambda s: 7,
    needs: str,
    reference: str,
    kind: Kind = "solution",
    symmetric: bool = False,
    limit: Callable[[Sizes], str | None] = lambda sizes: None,
) -> Method:
    """T steps, a recorded gradient and the pulls through it (one to 2.2 gradients each): the products and one mixed product."""
    return Method(
        f"Implicit({code})", "implicit", lambda s: adjoints.Implicit(solver(s)), HPARAMS, bias,
        f"T + {products} + 3.2 at most" if products else "T + 3.2 at most", memory, needs, reference,
        lambda s: s.num_steps + 2.2 * count(s) + 3.2, lambda s: one_step(s) + vectors(s) * s.params_bytes, kind=kind,
        symmetric=symmetric, limit=limit,
    )  # fmt: skip


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError(
            "`setting` should hold the network and its loss for this method: Setting(module=..., loss=...) for K-FAC, "
            "Setting(model=..., outputs_loss=...) for Gauss-Newton."
        )
    return value


IMPLICIT = (
    _implicit(
        "linear.CG(n)", lambda s: linear.CG(s.number), bias=DISTANCE, products="2.2 n", count=lambda s: s.number,
        needs="positive definite Hessian",
        reference=f"{cite('Pedregosa 2016', '1602.02355')}; {cite('Rajeswaran et al. 2019', '1909.04630')}", symmetric=True,
    ),
    _implicit(
        "linear.CG(n, preconditioner=linear.Diagonal(k))", lambda s: linear.CG(s.number, preconditioner=linear.Diagonal(1)),
        bias=DISTANCE, products="2.2 (n + k)", count=lambda s: s.number + 1,
        needs="positive definite Hessian, badly scaled", reference="Hestenes & Stiefel 1952; Bekas et al. 2007", symmetric=True,
    ),
    _implicit(
        "linear.Neumann(K, a)", lambda s: linear.Neumann(s.number, s.step_size),
        bias="distance to the solution; (I - aH)^(K+1) of the linear system", products="2.2 K", count=lambda s: s.number,
        needs="a < 2 / largest eigenvalue", reference=cite("Lorraine et al. 2020", "1911.02590"),
    ),
    _implicit(
        "linear.Neumann(K)", lambda s: linear.Neumann(s.number),
        bias="the same", products="2.2 (K + 8)", count=lambda s: s.number + 8,
        needs="symmetric matrix; a is estimated by 8 power iterations", reference="the same", symmetric=True,
    ),
    Method(
        "Implicit(linear.Neumann(K, a), select=linear.every, stochastic=True)", "implicit",
        lambda s: adjoints.Implicit(linear.Neumann(s.number, s.step_size), select=linear.every, stochastic=True), HPARAMS,
        "distance to the solution; that of K terms, in the mean", "5.2 T + 3.2 K at most", "one step's activations",
        "independent batches", cite("Ji et al. 2021", "2010.07962"),
        lambda s: 5.2 * s.num_steps + 3.2 * s.number, lambda s: one_step(s) + 7 * s.params_bytes, kind="solution",
    ),
    _implicit(
        "linear.NormalCG(n)", lambda s: linear.NormalCG(s.number), bias=DISTANCE, products="4.4 n", count=lambda s: 2 * s.number,
        vectors=lambda s: 9, needs="any matrix; slow where ill-conditioned", reference="Hestenes & Stiefel 1952",
    ),
    _implicit(
        "linear.MINRES(n)", lambda s: linear.MINRES(s.number), bias=DISTANCE, products="2.2 n", count=lambda s: s.number,
        vectors=lambda s: 12, needs="symmetric, also indefinite", reference="Paige & Saunders 1975", symmetric=True,
    ),
    _implicit(
        "linear.GMRES(n)", lambda s: linear.GMRES(s.number), bias=DISTANCE, products="2.2 n", count=lambda s: s.number,
        memory="2 n vectors like the params", vectors=lambda s: 2 * s.number + 5, needs="any matrix", reference="Saad & Schultz 1986",
    ),
    _implicit(
        "linear.BiCGSTAB(n)", lambda s: linear.BiCGSTAB(s.number), bias=DISTANCE, products="4.4 n", count=lambda s: 2 * s.number,
        vectors=lambda s: 9, needs="any matrix; may break down", reference="van der Vorst 1992",
    ),
    _implicit(
        "linear.Lanczos(n)", lambda s: linear.Lanczos(s.number), bias=DISTANCE, products="2.2 n", count=lambda s: s.number,
        memory="2 n vectors like the params", vectors=lambda s: 2 * s.number + 5, needs="symmetric, also indefinite",
        reference="Lanczos 1952", symmetric=True,
    ),
    _implicit(
        "linear.Dense()", lambda s: linear.Dense(), bias="distance to the solution", products="2.2 P", count=lambda s: s.num_params,
        memory="P² numbers", vectors=lambda s: 2 * s.num_params, needs="few params (P); P³ more work",
        reference="the implicit function theorem",
        limit=lambda s: f"a matrix of {s.num_params} rows" if s.num_params > _MOST_ROWS else None,
    ),
    _implicit(
        "linear.Nystroem(k)", lambda s: linear.Nystroem(s.number), bias="distance to the solution; what k rows of H do not span",
        products="2.2 (k + 1)", count=lambda s: s.number + 1, memory="2 k vectors like the params", vectors=lambda s: 2 * s.number,
        needs="positive semi-definite Hessian of low rank", reference=cite("Hataya & Yamada 2023", "2302.09726"), kind="biased",
        symmetric=True,
    ),
    _implicit(
        "linear.Diagonal(k)", lambda s: linear.Diagonal(s.number), bias="distance to the solution; what is off the diagonal of H",
        products="2.2 (k + 1)", count=lambda s: s.number + 1, needs="a dominant diagonal", reference="Bekas et al. 2007", kind="biased",
    ),
    Method(
        "Implicit(linear.KFAC(module, loss))", "implicit",
        lambda s: adjoints.Implicit(linear.KFAC(_given(s.module), _given(s.loss))), HPARAMS,
        "distance to the solution; what is no Kronecker product, layer by layer", "T + 7, C backward passes at most",
        "the layers' factors", "curvlinops; Linear and Conv2d layers; C outputs", cite("Martens & Grosse 2015", "1503.05671"),
        lambda s: s.num_steps + 7 + s.number, lambda s: one_step(s) + 6 * s.params_bytes, kind="biased", by_hand=True,
    ),
    _implicit(
        "linear.Identity()", lambda s: linear.Identity(), bias="H is taken for the identity", products="", count=lambda s: 0,
        needs="nothing", reference=cite("Luketina et al. 2016", "1511.06727"), kind="biased",
    ),
    Method(
        "Implicit(linear.CG(n), operator=linear.GaussNewton(model, loss))", "implicit",
        lambda s: adjoints.Implicit(linear.CG(s.number), operator=linear.GaussNewton(_given(s.model), _given(s.outputs_loss))), HPARAMS,
        "the Gauss-Newton matrix stands for H", "T + 3 n + 4", "one step's activations, one recorded forward pass",
        "model and convex loss apart", "Schraudolph 2002; Martens 2010",
        lambda s: s.num_steps + 3 * s.number + 4, lambda s: one_step(s) + s.activation_bytes + 4 * s.params_bytes, kind="biased",
        symmetric=True, by_hand=True,
    ),
)  # fmt: skip
