"""Rows: the loops of :mod:`metacal.single_loop`, per outer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metacal import single_loop
from metacal.registry.costs import one_step
from metacal.registry.row import HPARAMS, Kind, Method, Setting, Sizes, cite


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
    path: bool = False,
    differentiates: bool = True,
) -> Method:
    return Method(
        code, "single loop", make, HPARAMS, bias, gradients, memory, needs, reference,
        lambda s: work(s.num_steps, s.number), lambda s: one_step(s) + vectors(s), kind=kind, batches_per_step=batches,
        path=path, differentiates=differentiates,
    )  # fmt: skip


SINGLE_LOOP = (
    _loop(
        "soba(a)", lambda f, solver, opt, s: single_loop.soba(f, solver, opt, s.step_size),
        bias="distances of w and v to their solutions", gradients="5", work=lambda T, K: 5, memory="one copy of the params",
        vectors=lambda s: s.params_bytes, batches=lambda T, K: 1, reference=cite("Dagréou et al. 2022", "2201.13409"),
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
        reference=cite("Arbel & Mairal 2022", "2111.14580"),
    ),
    _loop(
        "stocbio(a, num_products=K)", lambda f, solver, opt, s: single_loop.stocbio(f, solver, opt, s.step_size, num_products=s.number),
        bias="distance of w to its solution; that of K terms", gradients="T + 3 K + 4", work=lambda T, K: T + 3 * (K + 1) + 1,
        memory="nothing kept", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: T + K + 1,
        reference=cite("Ji et al. 2021", "2010.07962"),
    ),
    _loop(
        "ttsa(a, num_terms=K)", lambda f, solver, opt, s: single_loop.ttsa(f, solver, opt, s.step_size, num_terms=s.number),
        bias="the same in the mean, with K - 1 terms", gradients="3.5 + 1.5 K in the mean", work=lambda T, K: 1 + 3 * ((K - 1) / 2 + 1) + 1,
        memory="nothing kept", vectors=lambda s: s.params_bytes, batches=lambda T, K: K + 1,
        reference=cite("Hong et al. 2023", "2007.05170"),
    ),
    _loop(
        "fsla(a)", lambda f, solver, opt, s: single_loop.fsla(f, solver, opt, s.step_size),
        bias="distances of w and v; the momentum's lag", gradients="12", work=lambda T, K: 12,
        memory="one copy of the params, two of the hparams", vectors=lambda s: s.params_bytes, batches=lambda T, K: 3,
        reference=cite("Li et al. 2022", "2112.04660"),
    ),
    _loop(
        "mrbo(a, num_products=K)", lambda f, solver, opt, s: single_loop.mrbo(f, solver, opt, s.step_size, num_products=s.number),
        bias="that of stocbio; the momenta's lag", gradients="6 K + 10", work=lambda T, K: 2 + 6 * (K + 1) + 2,
        memory="two copies of the params and of the hparams", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: K + 2,
        reference=cite("Yang et al. 2021", "2106.04692"),
    ),
    _loop(
        "sustain(a, num_terms=K)", lambda f, solver, opt, s: single_loop.sustain(f, solver, opt, s.step_size, num_terms=s.number),
        bias="that of ttsa; the momenta's lag", gradients="7 + 3 K in the mean", work=lambda T, K: 2 + 6 * ((K - 1) / 2 + 1) + 2,
        memory="two copies of the params and of the hparams", vectors=lambda s: 2 * s.params_bytes, batches=lambda T, K: K + 1,
        reference=cite("Khanduri et al. 2021", "2102.07367"),
    ),
    _loop(
        "f2sa(λ)", lambda f, solver, opt, s: single_loop.f2sa(f, solver, opt, s.penalty),
        bias="O(1 / λ) with the copies solved for", gradients="3 (T + 1)", work=lambda T, K: 3 * (T + 1), memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=cite("Kwon et al. 2023", "2301.10945"),
    ),
    _loop(
        "f2sa(λ, order=2)", lambda f, solver, opt, s: single_loop.f2sa(f, solver, opt, s.penalty, order=2),
        bias="O(1 / λ²) with the copies solved for", gradients="4 (T + 1)", work=lambda T, K: 4 * (T + 1), memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only; g - f / λ bounded below", kind="biased",
        reference=cite("Chen et al. 2026", "2509.02937"),
    ),
    _loop(
        "bome()", lambda f, solver, opt, s: single_loop.bome(f, solver, opt),
        bias="no estimate at a point; stationary in the limit", gradients="T + 3", work=lambda T, K: T + 3, memory="nothing kept",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=cite("Liu et al. 2022", "2209.08709"),
    ),
    _loop(
        "pbgd(λ)", lambda f, solver, opt, s: single_loop.pbgd(f, solver, opt, s.penalty),
        bias="O(1 / λ)", gradients="T + 3", work=lambda T, K: T + 3, memory="nothing kept",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: T + 1, needs="first derivatives only", kind="biased",
        reference=cite("Shen & Chen 2023", "2302.05185"),
    ),
    _loop(
        "scalebio(λ)", lambda f, solver, opt, s: single_loop.scalebio(f, solver, opt, s.penalty),
        bias="O(1 / λ); λ times the distances of w and u to their solutions", gradients="3", work=lambda T, K: 3, memory="one inner state",
        vectors=lambda s: s.state_bytes, batches=lambda T, K: 1, needs="first derivatives only", kind="biased",
        reference=cite("Pan et al. 2024", "2406.19976"),
    ),
    _loop(
        "es(2 N, radius)", lambda f, solver, opt, s: single_loop.es(f, solver, opt, 2 * s.number, s.step_size),
        bias="steps before this unroll are left out; O(radius²)", gradients="2 N (T + 1)", work=lambda T, K: 2 * K * (T + 1),
        memory="2 N inner states", vectors=lambda s: 2 * s.number * s.state_bytes, batches=lambda T, K: T,
        needs="nothing is differentiated, nor is the outer objective", kind="biased", path=True, differentiates=False,
        reference=cite("Salimans et al. 2017", "1703.03864"),
    ),
    _loop(
        "pes(2 N, radius)", lambda f, solver, opt, s: single_loop.pes(f, solver, opt, 2 * s.number, s.step_size),
        bias="O(radius²) in the mean, whatever the unrolls", gradients="2 N (T + 1)", work=lambda T, K: 2 * K * (T + 1),
        memory="2 N inner states", vectors=lambda s: 2 * s.number * s.state_bytes, batches=lambda T, K: T,
        needs="the same", kind="unbiased", path=True, differentiates=False, reference=cite("Vicol et al. 2021", "2112.13835"),
    ),
)  # fmt: skip
