"""Every method in one table: what it estimates, what it gets wrong, what it costs, and how it is made.

`metacal methods` prints the table of the README; `metacal methods --write README.md` writes it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from metacal import adjoints, linear, single_loop
from metacal.bilevel import meta_initialisation
from metacal.single_loop import evolution

Family = Literal["exact", "approximate", "implicit", "single loop", "initialisation"]
FAMILIES: dict[Family, str] = {
    "exact": "The derivative of the steps that were taken",
    "approximate": "Truncated, sketched and difference estimates of it",
    "implicit": "The derivative of a solution",
    "single loop": "Loops of their own (`metacal.single_loop`), per outer step",
    "initialisation": "Learned initial params, per task",
}

Kind = Literal["exact", "solution", "unbiased", "biased"]
"""Whose derivative a method gives: that of the run; that of the solution, as the linear solve and the steps converge; that of the
run in the mean; or another one."""


class Setting(NamedTuple):
    """What a method is made with: the field that it has no use for is ignored.

    Attributes:
        number: K, n, k, N or C: terms, products, directions, window, rank, pairs of particles, outputs of the network.
        step_size: of a series or of a linear variable; also the radius of zeroth-order methods.
        penalty: lambda of the penalty methods.
        num_batches: inner batches that there are, for those that keep a table.
        module, loss: the network and the loss that K-FAC reads.
        model, outputs_loss: ``(params, hparams, batch) -> outputs`` and ``(outputs, hparams, batch) -> scalar``, for Gauss-Newton.
    """

    number: int = 10
    step_size: float = 0.1
    penalty: float = 10.0
    num_batches: int = 1
    module: nn.Module | None = None
    loss: nn.Module | None = None
    model: Callable[..., Any] | None = None
    outputs_loss: Callable[..., Any] | None = None


class Sizes(NamedTuple):
    """What costs depend on.

    Attributes:
        num_steps: T, inner steps per hypergradient.
        num_params, num_hparams: P and m, scalars.
        params_bytes, state_bytes: of the params, and of params and optimizer state together.
        activation_bytes: peak of one plain training step.
        number: K, n or k, as in :class:`Setting`.
    """

    num_steps: int
    num_params: int
    num_hparams: int
    params_bytes: int
    state_bytes: int
    activation_bytes: int
    number: int = 10


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        code: how one writes it; the row's name.
        make: for adjoints ``make(setting) -> Adjoint``; for the others ``make(outer, solver, optimizer, setting) ->
            BilevelOptimizer``.
        estimates, bias, cost, memory, needs, reference: the columns of the table, Markdown.
        work: the cost as a function, in plain training steps; an upper bound where the text says "at most".
        bytes: the peak memory as a function, an estimate.
        kind: whose derivative it gives.
        initial_params: it estimates the derivative by the initial params.
        path: it sees what only shapes the path (learning rates).
        differentiates: it needs a differentiable inner step.
        num_batches: inner batches of one outer step, of T and the setting's number; by default one per step.
    """

    code: str
    family: Family
    make: Callable[..., Any]
    estimates: str
    bias: str
    cost: str
    memory: str
    needs: str
    reference: str
    work: Callable[[Sizes], float]
    bytes: Callable[[Sizes], float]
    kind: Kind = "exact"
    initial_params: bool = False
    path: bool = False
    differentiates: bool = True
    num_batches: Callable[[int, int], int] = lambda T, K: T


def _cite(authors: str, *arxiv: str) -> str:
    return f"{authors} ({', '.join(f'[{number}](https://arxiv.org/abs/{number})' for number in arxiv)})"


def _root(T: int) -> int:
    return math.ceil(math.sqrt(T))


def _mixed(s: Sizes, T: int) -> float:
    return 2 * _root(T) * s.state_bytes + 3 * s.activation_bytes


def _graph(s: Sizes) -> float:
    # A step's graph keeps its activations, those of its backward pass, and the state that it makes.
    return s.num_steps * (2 * s.activation_bytes + s.state_bytes)


def _graph_in_segments(s: Sizes) -> float:
    k = min(s.number, s.num_steps)
    return _graph(s._replace(num_steps=k)) + math.ceil(s.num_steps / k) * s.state_bytes


def _one_step(s: Sizes) -> float:
    return s.state_bytes + 2 * s.activation_bytes


_BOTH, _H = "hparams, initial params", "hparams"
_UNROLLED = (
    Method(
        "Unrolled()", "exact", lambda s: adjoints.Unrolled(), _BOTH, "none",
        "5.25 T at most", "2 √T states, one step's double-backward graph; inside a transform gradients too",
        "a double backward of the objective; inside a transform forward-mode AD where there is", _cite("Kemaev et al. 2025", "2505.00793"),
        lambda s: 5.25 * s.num_steps, lambda s: _mixed(s, s.num_steps), initial_params=True, path=True,
    ),
    Method(
        "Unrolled(segment=1)", "exact", lambda s: adjoints.Unrolled(segment=1), _BOTH, "none",
        "4.25 T at most", "T states, one step's double-backward graph", "the same", "the same",
        lambda s: 4.25 * s.num_steps,
        lambda s: s.num_steps * s.state_bytes + 3 * s.activation_bytes, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="reverse")', "exact", lambda s: adjoints.Unrolled(mode="reverse"), _BOTH, "none",
        "5.25 T at most; 4.25 T with `segment=1`", "2 √T states, one step's double-backward graph", "double backward; any solver",
        f"{_cite('Maclaurin et al. 2015', '1502.03492')}; {_cite('Franceschi et al. 2017', '1703.01785')}",
        lambda s: 5.25 * s.num_steps,
        lambda s: _mixed(s, s.num_steps), initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="graph")', "exact", lambda s: adjoints.Unrolled(mode="graph"), _BOTH, "none",
        "3.25 T at most, the fastest", "the graph of all T steps", "no `torch.func` transform around it", "the same",
        lambda s: 3.25 * s.num_steps, _graph, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="graph", segment=k)', "exact", lambda s: adjoints.Unrolled(mode="graph", segment=s.number), _BOTH, "none",
        "4.25 T at most", "T / k states, the graph of k steps", "the same", _cite("Chen et al. 2016", "1604.06174"),
        lambda s: 4.25 * s.num_steps, _graph_in_segments, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="auto")', "exact", lambda s: adjoints.Unrolled(mode="auto"), _BOTH, "none",
        "that of `graph` or of `mixed`, and 1", "the smaller of the two, to 10%", "nothing", "the same",
        lambda s: (3.25 if _graph(s) < _mixed(s, s.num_steps) else 5.25) * s.num_steps + 1,
        lambda s: min(_graph(s), _mixed(s, s.num_steps)), initial_params=True, path=True,
    ),
    Method(
        "Unrolled(offload=True)", "exact", lambda s: adjoints.Unrolled(offload=True), _BOTH, "none",
        "5.25 T at most, and copies", "on the device one state, one step's activations; the rest on the host", "host memory", "the same",
        lambda s: 5.5 * s.num_steps, lambda s: s.state_bytes + 3 * s.activation_bytes, initial_params=True, path=True,
    ),
    Method(
        "Forward()", "exact", lambda s: adjoints.Forward(), _H, "none",
        "T (1 + 2 m) at most, m hparams scalars", "2 m states, one step's activations for m tangents; none of it grows with T",
        "few hparams; forward-mode AD of the step; any solver", _cite("Franceschi et al. 2017", "1703.01785"),
        lambda s: s.num_steps * (1 + 2 * s.num_hparams),
        lambda s: 2 * s.num_hparams * s.state_bytes + (1 + s.num_hparams) * s.activation_bytes, path=True,
    ),
)  # fmt: skip

_APPROXIMATE = (
    Method(
        "Unrolled(window=k)", "approximate", lambda s: adjoints.Unrolled(window=s.number), _H,
        "steps before the last k are left out", "T + 4.25 k at most; T + 3.25 k with `segment=1`",
        "2 √k states, one step's double-backward graph", "as its mode", _cite("Shaban et al. 2019", "1810.10667"),
        lambda s: s.num_steps + 4.25 * min(s.number, s.num_steps), lambda s: _mixed(s, min(s.number, s.num_steps)),
        kind="biased", path=True,
    ),
    Method(
        "ForwardSketch(k)", "approximate", lambda s: adjoints.ForwardSketch(s.number), _H,
        "none in the mean; variance (m - 1) / k of its square", "T (1 + 2 k) at most", "2 k states, one step's activations for k tangents",
        "forward-mode AD of the step; any solver", _cite("Shen et al. 2024", "2406.14095"),
        lambda s: s.num_steps * (1 + 2 * s.number),
        lambda s: 2 * s.number * s.state_bytes + (1 + s.number) * s.activation_bytes, kind="unbiased", path=True,
    ),
    Method(
        "ZerothOrder(k, radius)", "approximate", lambda s: adjoints.ZerothOrder(s.number, s.step_size), _H,
        "O(radius²) in the mean; variance as above", "T (1 + 2 k)", "two states, one step's activations",
        "a run that can be repeated: its steps are not differentiated", _cite("Salimans et al. 2017", "1703.03864"),
        lambda s: s.num_steps * (1 + 2 * s.number), lambda s: 2 * s.state_bytes + s.activation_bytes,
        kind="unbiased", path=True, differentiates=False,
    ),
    Method(
        "FiniteDifference(radius, a)", "approximate", lambda s: adjoints.FiniteDifference(step_size=s.step_size), _H,
        "the last step stands for all, H for the identity; O(radius²)", "T + 2", "one step's activations",
        "an inner objective; first derivatives only", _cite("DARTS: Liu et al. 2019", "1806.09055"),
        lambda s: s.num_steps + 2, _one_step, kind="biased",
    ),
    Method(
        "SAMA(radius)", "approximate", lambda s: adjoints.SAMA(), _H,
        "the last step stands for all, seen through its optimizer; O(radius²)", "T + 2", "one step's activations",
        "an update differentiable by its gradient", _cite("Choe et al. 2023", "2310.05674"),
        lambda s: s.num_steps + 2, _one_step, kind="biased",
    ),
    Method(
        "FirstOrder()", "approximate", lambda s: adjoints.FirstOrder(), "initial params; hparams directly only",
        "all that is of second order", "T", "one state", "nothing", _cite("Finn et al. 2017", "1703.03400"),
        lambda s: s.num_steps, lambda s: s.state_bytes + s.activation_bytes, kind="biased", initial_params=True,
    ),
)  # fmt: skip


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
    **options: Any,
) -> Method:
    """T steps, a recorded gradient and the pulls through it (one to 2.2 gradients each), one mixed product and one gradient."""
    return Method(
        f"Implicit({code})", "implicit", lambda s: adjoints.Implicit(solver(s), **options), _H, bias,
        f"T + {products} + 5 at most" if products else "T + 5 at most", memory, needs, reference,
        lambda s: s.num_steps + 2.2 * count(s) + 5, lambda s: _one_step(s) + vectors(s) * s.params_bytes, kind=kind,
    )  # fmt: skip


_DISTANCE = "distance to the solution; the reported linear residual"
_IMPLICIT = (
    _implicit(
        "linear.CG(n)", lambda s: linear.CG(s.number), bias=_DISTANCE, products="2.2 n", count=lambda s: s.number,
        needs="positive definite Hessian",
        reference=f"{_cite('Pedregosa 2016', '1602.02355')}; {_cite('Rajeswaran et al. 2019', '1909.04630')}",
    ),
    _implicit(
        "linear.CG(n, preconditioner=linear.Diagonal(k))", lambda s: linear.CG(s.number, preconditioner=linear.Diagonal(1)),
        bias=_DISTANCE, products="2.2 (n + k)", count=lambda s: s.number + 1,
        needs="positive definite Hessian, badly scaled", reference="Hestenes & Stiefel 1952; Bekas et al. 2007",
    ),
    _implicit(
        "linear.Neumann(K, a)", lambda s: linear.Neumann(s.number, s.step_size),
        bias="distance to the solution; (I - aH)^(K+1) of the linear system", products="2.2 K", count=lambda s: s.number,
        needs="a < 2 / largest eigenvalue", reference=_cite("Lorraine et al. 2020", "1911.02590"),
    ),
    _implicit(
        "linear.Neumann(K)", lambda s: linear.Neumann(s.number),
        bias="the same", products="2.2 (K + 8)", count=lambda s: s.number + 8,
        needs="symmetric matrix; a is estimated by 8 power iterations", reference="the same",
    ),
    Method(
        "Implicit(linear.Neumann(K, a), select=linear.every, stochastic=True)", "implicit",
        lambda s: adjoints.Implicit(linear.Neumann(s.number, s.step_size), select=linear.every, stochastic=True), _H,
        "distance to the solution; that of K terms, in the mean", "5.2 T + 3.2 K at most", "one step's activations",
        "independent batches", _cite("Ji et al. 2021", "2010.07962"),
        lambda s: 5.2 * s.num_steps + 3.2 * s.number, lambda s: _one_step(s) + 7 * s.params_bytes, kind="solution",
    ),
    _implicit(
        "linear.NormalCG(n)", lambda s: linear.NormalCG(s.number), bias=_DISTANCE, products="4.4 n", count=lambda s: 2 * s.number,
        vectors=lambda s: 9, needs="any matrix; slow where ill-conditioned", reference="Hestenes & Stiefel 1952",
    ),
    _implicit(
        "linear.MINRES(n)", lambda s: linear.MINRES(s.number), bias=_DISTANCE, products="2.2 n", count=lambda s: s.number,
        vectors=lambda s: 12, needs="symmetric, also indefinite", reference="Paige & Saunders 1975",
    ),
    _implicit(
        "linear.GMRES(n)", lambda s: linear.GMRES(s.number), bias=_DISTANCE, products="2.2 n", count=lambda s: s.number,
        memory="2 n vectors like the params", vectors=lambda s: 2 * s.number + 5, needs="any matrix", reference="Saad & Schultz 1986",
    ),
    _implicit(
        "linear.BiCGSTAB(n)", lambda s: linear.BiCGSTAB(s.number), bias=_DISTANCE, products="4.4 n", count=lambda s: 2 * s.number,
        vectors=lambda s: 9, needs="any matrix; may break down", reference="van der Vorst 1992",
    ),
    _implicit(
        "linear.Lanczos(n)", lambda s: linear.Lanczos(s.number), bias=_DISTANCE, products="2.2 n", count=lambda s: s.number,
        memory="2 n vectors like the params", vectors=lambda s: 2 * s.number + 5, needs="symmetric, also indefinite",
        reference="Lanczos 1952",
    ),
    _implicit(
        "linear.Dense()", lambda s: linear.Dense(), bias="distance to the solution", products="2.2 P", count=lambda s: s.num_params,
        memory="P² numbers", vectors=lambda s: 2 * s.num_params, needs="few params (P); P³ more work",
        reference="the implicit function theorem",
    ),
    _implicit(
        "linear.Nystroem(k)", lambda s: linear.Nystroem(s.number), bias="distance to the solution; what k rows of H do not span",
        products="2.2 (k + 1)", count=lambda s: s.number + 1, memory="2 k vectors like the params", vectors=lambda s: 2 * s.number,
        needs="positive semi-definite Hessian of low rank", reference=_cite("Hataya & Yamada 2023", "2302.09726"), kind="biased",
    ),
    _implicit(
        "linear.Diagonal(k)", lambda s: linear.Diagonal(s.number), bias="distance to the solution; what is off the diagonal of H",
        products="2.2 (k + 1)", count=lambda s: s.number + 1, needs="a dominant diagonal", reference="Bekas et al. 2007", kind="biased",
    ),
    Method(
        "Implicit(linear.KFAC(module, loss))", "implicit",
        lambda s: adjoints.Implicit(linear.KFAC(_given(s.module), _given(s.loss))), _H,
        "distance to the solution; what is no Kronecker product, layer by layer", "T + 7, C backward passes at most",
        "the layers' factors", "curvlinops; Linear and Conv2d layers; C outputs", _cite("Martens & Grosse 2015", "1503.05671"),
        lambda s: s.num_steps + 7 + s.number, lambda s: _one_step(s) + 6 * s.params_bytes, kind="biased",
    ),
    _implicit(
        "linear.Identity()", lambda s: linear.Identity(), bias="H is taken for the identity", products="", count=lambda s: 0,
        needs="nothing", reference=_cite("Luketina et al. 2016", "1511.06727"), kind="biased",
    ),
    Method(
        "Implicit(linear.CG(n), operator=linear.GaussNewton(model, loss))", "implicit",
        lambda s: adjoints.Implicit(linear.CG(s.number), operator=linear.GaussNewton(_given(s.model), _given(s.outputs_loss))), _H,
        "the Gauss-Newton matrix stands for H", "T + 3 n + 4", "one step's activations, one recorded forward pass",
        "model and convex loss apart", "Schraudolph 2002; Martens 2010",
        lambda s: s.num_steps + 3 * s.number + 4, lambda s: _one_step(s) + s.activation_bytes + 4 * s.params_bytes, kind="biased",
    ),
)  # fmt: skip


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError(
            "`setting` should hold the network and its loss for this method: Setting(module=..., loss=...) for K-FAC, "
            "Setting(model=..., outputs_loss=...) for Gauss-Newton."
        )
    return value


def _loop(
    code: str,
    make: Callable[[Any, Any, Any, Setting], Any],
    *,
    bias: str,
    gradients: str,
    work: Callable[[int, int], float],
    memory: str,
    vectors: Callable[[Sizes], float],
    batches: Callable[[int, int], int],
    needs: str = "a = step size of the linear variable",
    reference: str,
    kind: Kind = "solution",
    **flags: bool,
) -> Method:
    return Method(
        code, "single loop", make, _H, bias, gradients, memory, needs, reference,
        lambda s: work(s.num_steps, s.number), lambda s: _one_step(s) + vectors(s), kind=kind, num_batches=batches, **flags,
    )  # fmt: skip


_SINGLE_LOOP = (
    _loop(
        "soba(a)", lambda f, solver, opt, s: single_loop.soba(f, solver, opt, s.step_size),
        bias="distances of w and v to their solutions", gradients="5", work=lambda T, K: 5, memory="one copy of the params",
        vectors=lambda s: s.params_bytes, batches=lambda T, K: 1, reference=_cite("Dagréou et al. 2022", "2201.13409"),
    ),
    _loop(
        "saba(a, num_inner, num_outer)",
        lambda f, solver, opt, s: single_loop.saba(f, solver, opt, s.step_size, num_inner=s.num_batches, num_outer=1),
        bias="the same, and no noise left at the solution", gradients="5", work=lambda T, K: 5,
        memory="a table: 2 copies of the params and one of the hparams per batch", vectors=lambda s: 2 * s.num_steps * s.params_bytes,
        batches=lambda T, K: 1, needs="a fixed set of batches, `(index, batch)`", reference="the same",
    ),
    _loop(
        "amigo(a, num_linear_steps=K)",
        lambda f, solver, opt, s: single_loop.amigo(f, solver, opt, s.step_size, num_linear_steps=s.number),
        bias="distances of w and v to their solutions", gradients="T + 3 K + 4", work=lambda T, K: T + 3 * (K + 1) + 1,
        memory="one copy of the params", vectors=lambda s: s.params_bytes, batches=lambda T, K: T + K + 1,
        reference=_cite("Arbel & Mairal 2022", "2111.14580"),
    ),
    _loop(
        "stocbio(a, num_products=K)", lambda f, solver, opt, s: single_loop.stocbio(f, solver, opt, s.step_size, num_products=s.number),
        bias="distance of w to its solution; that of K terms", gradients="T + 3 K + 4", work=lambda T, K: T + 3 * (K + 1) + 1,
        memory="nothing kept", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: T + K + 1,
        reference=_cite("Ji et al. 2021", "2010.07962"),
    ),
    _loop(
        "ttsa(a, num_terms=K)", lambda f, solver, opt, s: single_loop.ttsa(f, solver, opt, s.step_size, num_terms=s.number),
        bias="the same in the mean, with K - 1 terms", gradients="3.5 + 1.5 K in the mean", work=lambda T, K: 1 + 3 * ((K - 1) / 2 + 1) + 1,
        memory="nothing kept", vectors=lambda s: s.params_bytes, batches=lambda T, K: K + 1,
        reference=_cite("Hong et al. 2023", "2007.05170"),
    ),
    _loop(
        "fsla(a)", lambda f, solver, opt, s: single_loop.fsla(f, solver, opt, s.step_size),
        bias="distances of w and v; the momentum's lag", gradients="12", work=lambda T, K: 12,
        memory="one copy of the params, two of the hparams", vectors=lambda s: s.params_bytes, batches=lambda T, K: 3,
        reference=_cite("Li et al. 2022", "2112.04660"),
    ),
    _loop(
        "mrbo(a, num_products=K)", lambda f, solver, opt, s: single_loop.mrbo(f, solver, opt, s.step_size, num_products=s.number),
        bias="that of stocbio; the momenta's lag", gradients="6 K + 10", work=lambda T, K: 2 + 6 * (K + 1) + 2,
        memory="two copies of the params and of the hparams", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: K + 2,
        reference=_cite("Yang et al. 2021", "2106.04692"),
    ),
    _loop(
        "sustain(a, num_terms=K)", lambda f, solver, opt, s: single_loop.sustain(f, solver, opt, s.step_size, num_terms=s.number),
        bias="that of ttsa; the momenta's lag", gradients="7 + 3 K in the mean", work=lambda T, K: 2 + 6 * ((K - 1) / 2 + 1) + 2,
        memory="two copies of the params and of the hparams", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: K + 1,
        reference=_cite("Khanduri et al. 2021", "2102.07367"),
    ),
    _loop(
        "f2sa(λ)", lambda f, solver, opt, s: single_loop.f2sa(f, solver, opt, s.penalty),
        bias="O(1 / λ) with the copies solved for", gradients="3 (T + 1)", work=lambda T, K: 3 * (T + 1), memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=_cite("Kwon et al. 2023", "2301.10945"),
    ),
    _loop(
        "f2sa(λ, order=2)", lambda f, solver, opt, s: single_loop.f2sa(f, solver, opt, s.penalty, order=2),
        bias="O(1 / λ²) with the copies solved for", gradients="4 (T + 1)", work=lambda T, K: 4 * (T + 1), memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only; g - f / λ bounded below", kind="biased",
        reference=_cite("Chen et al. 2026", "2509.02937"),
    ),
    _loop(
        "bome()", lambda f, solver, opt, s: single_loop.bome(f, solver, opt),
        bias="no estimate at a point; stationary in the limit", gradients="T + 3", work=lambda T, K: T + 3, memory="nothing kept",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=_cite("Liu et al. 2022", "2209.08709"),
    ),
    _loop(
        "pbgd(λ)", lambda f, solver, opt, s: single_loop.pbgd(f, solver, opt, s.penalty),
        bias="O(1 / λ)", gradients="T + 3", work=lambda T, K: T + 3, memory="nothing kept",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=_cite("Shen & Chen 2023", "2302.05185"),
    ),
    _loop(
        "scalebio(λ)", lambda f, solver, opt, s: single_loop.scalebio(f, solver, opt, s.penalty),
        bias="O(1 / λ); λ times the distances of w and u to their solutions", gradients="3", work=lambda T, K: 3, memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: 1, needs="first derivatives only", kind="biased",
        reference=_cite("Pan et al. 2024", "2406.19976"),
    ),
    _loop(
        "es(2 N, radius)", lambda f, solver, opt, s: evolution.es(f, solver, opt, 2 * s.number, s.step_size),
        bias="steps before this unroll are left out; O(radius²)", gradients="2 N (T + 1)", work=lambda T, K: 2 * K * (T + 1),
        memory="2 N inner states", vectors=lambda s: 2 * s.number * s.state_bytes, batches=lambda T, K: T,
        needs="nothing is differentiated, nor is the outer objective", kind="biased", path=True, differentiates=False,
        reference=_cite("Salimans et al. 2017", "1703.03864"),
    ),
    _loop(
        "pes(2 N, radius)", lambda f, solver, opt, s: evolution.pes(f, solver, opt, 2 * s.number, s.step_size),
        bias="O(radius²) in the mean, whatever the unrolls", gradients="2 N (T + 1)", work=lambda T, K: 2 * K * (T + 1),
        memory="2 N inner states", vectors=lambda s: 2 * s.number * s.state_bytes, batches=lambda T, K: T,
        needs="the same", kind="unbiased", path=True, differentiates=False, reference=_cite("Vicol et al. 2021", "2112.13835"),
    ),
)  # fmt: skip

_INITIALISATION = (
    Method(
        "meta_initialisation(outer, solver, Unrolled(), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.Unrolled(), opt),
        "initial params; hparams too with `hparams_optimizer`", "none",
        "5.25 T at most", "2 √T states and gradients, one step's activations", "as `Unrolled()`",
        _cite("MAML: Finn et al. 2017", "1703.03400"),
        lambda s: 5.25 * s.num_steps, lambda s: _mixed(s, s.num_steps), initial_params=True, path=True,
    ),
    Method(
        "meta_initialisation(outer, solver, FirstOrder(), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.FirstOrder(), opt), "initial params",
        "all that is of second order", "T", "one state", "nothing", "FOMAML: the same",
        lambda s: s.num_steps, lambda s: s.state_bytes + s.activation_bytes, kind="biased", initial_params=True,
    ),
    Method(
        "meta_initialisation(outer, proximal(...), Implicit(linear.CG(n)), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.Implicit(linear.CG(s.number)), opt),
        "initial params, as the anchor", _DISTANCE, "T + 3 n + 4 at most", "one step's activations",
        "`proximal`; positive definite Hessian", _cite("iMAML: Rajeswaran et al. 2019", "1909.04630"),
        lambda s: s.num_steps + 3 * s.number + 4, lambda s: _one_step(s) + 4 * s.params_bytes, kind="solution", initial_params=True,
    ),
)  # fmt: skip

METHODS: tuple[Method, ...] = (*_UNROLLED, *_APPROXIMATE, *_IMPLICIT, *_SINGLE_LOOP, *_INITIALISATION)

_HEADER = ("method", "estimates", "bias", "cost", "memory", "needs", "reference")


def method(code: str) -> Method:
    """The row with that code.

    Errors: ValueError, with the codes that there are.
    """
    for row in METHODS:
        if row.code == code:
            return row
    raise ValueError(f"`code` should be one of the table's, got {code!r}. There are: {', '.join(row.code for row in METHODS)}.")


def markdown_table(family: Family | None = None) -> str:
    """The methods of a family as a Markdown table; by default all families, each under a line that says what they share.

    >>> print(markdown_table("initialisation").splitlines()[0])
    | method | estimates | bias | cost | memory | needs | reference |
    """
    if family is None:
        return "\n\n".join(f"**{title}.**\n\n{markdown_table(name)}" for name, title in FAMILIES.items())
    if family not in FAMILIES:
        raise ValueError(f"`family` should be one of {', '.join(FAMILIES)}, got {family!r}.")
    chosen = [row for row in METHODS if row.family == family]
    rows = [(f"`{row.code}`", row.estimates, row.bias, row.cost, row.memory, row.needs, row.reference) for row in chosen]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (_HEADER, ["---"] * len(_HEADER), *rows))


BLOCK = re.compile(r"(<!-- methods-table -->\n).*?(\n?<!-- /methods-table -->)", re.DOTALL)


def written(text: str) -> str:
    """``text`` with the table between its markers ``<!-- methods-table -->`` and ``<!-- /methods-table -->``.

    Errors: ValueError unless there is one pair of them.
    """
    if len(BLOCK.findall(text)) != 1:
        raise ValueError("`text` should hold one <!-- methods-table --> and after it one <!-- /methods-table -->, each on a line.")
    return BLOCK.sub(lambda found: f"<!-- methods-table -->\n{markdown_table()}\n<!-- /methods-table -->", text)
