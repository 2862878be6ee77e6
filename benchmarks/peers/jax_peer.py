"""JAX, an outside reference: optax steps under ``lax.scan``, all of it compiled once, and jaxopt's implicit differentiation.

Only for problems whose objectives are written again below; each twin is compared with the original before it is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of a GPU before torch does

import jax
import optax
import torch
from jax import numpy as jnp
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.methods import Method, Unsupported
from benchmarks.peers.shared import PRODUCTS
from benchmarks.problem import Problem, Rule
from metacal._typing import Tree

with warnings.catch_warnings():  # it says that it is no longer maintained
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import implicit_diff, linear_solve

jax.config.update("jax_enable_x64", True)  # float32 stays what it is


# The problems once more


def _linear(w: Any, x: Any) -> Any:
    return x @ w["weight"] + w["bias"]


def _mlp(w: Any, x: Any) -> Any:
    last = len(w) // 2 - 1
    for i in range(last):
        x = jax.nn.relu(x @ w[f"{i}.weight"] + w[f"{i}.bias"])
    return x @ w[f"{last}.weight"] + w[f"{last}.bias"]


def _conv(w: Any, x: Any) -> Any:
    for i in range(len(w) // 2 - 1):
        x = jax.lax.conv_general_dilated(x, w[f"{i}.weight"], (2, 2), ((1, 1), (1, 1))) + w[f"{i}.bias"][:, None, None]
        x = jax.nn.relu(x)
    return x.reshape(len(x), -1) @ w["out.weight"] + w["out.bias"]


_losses = optax.softmax_cross_entropy_with_integer_labels


def _likelihood(apply: Callable[[Any, Any], Any], w: Any, h: Any, batch: Any) -> Any:
    return _losses(apply(w, batch[0]), batch[1]).mean()


def _squares(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return 0.5 * ((_linear(w, x) - y) ** 2).sum() / len(x)


def _penalised(loss: Callable[..., Any], w: Any, h: Any, batch: Any) -> Any:
    return loss(w, h, batch) + 0.5 * (jnp.exp(h["log_decay"])[:, None] * w["weight"] ** 2).sum()


def _weighted(apply: Callable[[Any, Any], Any], w: Any, h: Any, batch: Any) -> Any:
    x, y, where = batch
    return (h["weights"][where] * _losses(apply(w, x), y)).mean()


def _cleaning(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return (jax.nn.sigmoid(h["logits"]) * _losses(_linear(w, x), y)).mean() + 1e-3 * sum((v**2).sum() for v in w.values())


def _quadratic(w: Any, h: Any, batch: Any) -> Any:
    A, B = batch
    v = jnp.concatenate([w["head"], w["tail"]])
    return (v.T @ (0.5 * A @ v - B @ h["h"])).sum()


def _distance(w: Any, h: Any, target: Any) -> Any:
    return 0.5 * ((jnp.concatenate([w["head"], w["tail"]]) - target) ** 2).sum()


class Twin(NamedTuple):
    inner: Callable[..., Any]
    outer: Callable[..., Any]


_LINEAR = partial(_likelihood, _linear)
# By how a problem's name begins and ends.
TWINS: dict[tuple[str, str], Twin] = {
    ("quadratic", ""): Twin(_quadratic, _distance),
    ("ridge", ""): Twin(partial(_penalised, _squares), _squares),
    ("logistic regression", ""): Twin(partial(_penalised, _LINEAR), _LINEAR),
    ("hyper-cleaning", "a weight per sample"): Twin(_cleaning, _LINEAR),
    ("cost, MLP", ""): Twin(partial(_weighted, _mlp), partial(_likelihood, _mlp)),
    ("cost, conv", ""): Twin(partial(_weighted, _conv), partial(_likelihood, _conv)),
}


def _twin(problem: Problem) -> Twin:
    for (begin, end), twin in TWINS.items():
        if problem.name.startswith(begin) and problem.name.endswith(end):
            return twin
    raise Unsupported("its objectives are not written in JAX")


# The methods


class _Given(NamedTuple):
    """A problem's tensors as arrays; the batches that differ on top of each other, and which of them each step takes."""

    params: Any
    hparams: Any
    batches: Any
    which: Any
    outer_batch: Any

    def batch(self, i: Any) -> Any:
        # All of a single one: a slice would be a copy of the data set at every step.
        return jax.tree.map(lambda x: x[0] if len(x) == 1 else x[i], self.batches)


def _given(problem: Problem) -> _Given:
    try:
        device = jax.devices("cuda" if problem.device.type == "cuda" else "cpu")[0]
    except RuntimeError as error:
        raise Unsupported(f"jax sees no such device: {error}") from error

    def array(x: Tensor) -> Any:
        return jax.device_put(x.detach().cpu().numpy(), device)

    different = list({id(batch): batch for batch in problem.batches}.values())
    places = {id(batch): i for i, batch in enumerate(different)}
    try:
        batches = jax.tree.map(lambda *xs: array(torch.stack(xs)), *different)
    except RuntimeError as error:
        raise Unsupported("lax.scan wants batches of one shape") from error
    which = jax.device_put(jnp.array([places[id(batch)] for batch in problem.batches]), device)
    params, hparams, outer_batch = jax.tree.map(array, (problem.params, problem.hparams, problem.outer_batch))
    return _Given(params, hparams, batches, which, outer_batch)


def _optimizer(rule: Rule) -> Any:
    return optax.adam(rule.lr) if rule.kind == "adam" else optax.sgd(rule.lr, momentum=rule.momentum or None)


def _train(inner: Callable[..., Any], optimizer: Any, params: Any, hparams: Any, given: _Given) -> Any:
    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(inner)(params, hparams, given.batch(i)), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), given.which)[0][0]


def _method(solver: Callable[..., Callable[..., Any]]) -> Callable[[Problem], Callable[[], Tree]]:
    def prepare(problem: Problem) -> Callable[[], Tree]:
        twin, given = _twin(problem), _given(problem)
        _same_values(problem, twin, given)
        train = partial(_train, twin.inner, _optimizer(problem.rule))

        @jax.jit
        def hypergradient(given: _Given) -> Any:
            solve = solver(twin.inner, train, given)
            return jax.grad(lambda hparams: twin.outer(solve(given.params, hparams), hparams, given.outer_batch))(given.hparams)

        def call() -> Tree:
            found = jax.block_until_ready(hypergradient(given))
            return {name: from_dlpack(found[name]) for name in problem.hparams}

        call()  # compiles
        return call

    return prepare


def _same_values(problem: Problem, twin: Twin, given: _Given) -> None:
    with torch.no_grad():
        theirs = (
            problem.inner(problem.params, problem.hparams, problem.batches[0]),
            problem.outer(problem.params, problem.hparams, problem.outer_batch),
        )
    ours = twin.inner(given.params, given.hparams, given.batch(0)), twin.outer(given.params, given.hparams, given.outer_batch)
    for a, b in zip(ours, theirs, strict=True):
        if not abs(float(a) - float(b)) <= 1e-4 * (1 + abs(float(b))):
            raise RuntimeError(f"{problem.name!r} is {float(b)} and its twin in JAX {float(a)}: write the twin again")


def _unrolled(inner: Callable[..., Any], train: Callable[..., Any], given: _Given) -> Callable[..., Any]:
    return lambda params, hparams: train(params, hparams, given)


def _cg(inner: Callable[..., Any], train: Callable[..., Any], given: _Given) -> Callable[..., Any]:
    def optimality(params: Any, hparams: Any) -> Any:
        return jax.grad(inner)(params, hparams, given.batch(given.which[-1]))

    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(given.params))
    solve = partial(linear_solve.solve_cg, maxiter=PRODUCTS, tol=eps)
    return implicit_diff.custom_root(optimality, solve=solve)(lambda params, hparams: train(params, hparams, given))


METHODS = (
    Method("optax unrolled", "optax", "exact", _method(_unrolled)),
    Method("jaxopt CG 20", "jaxopt", "implicit", _method(_cg)),
)
