"""Derivatives of functions of trees: gradients, vector-Jacobian and Jacobian-vector products.

Outside any ``torch.func`` transform that is plain autograd, which does not record a graph of its own backward pass unless somebody
differentiates the result; inside a transform it is ``torch.func``, and nothing is detached there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from metacal import _checks, tree
from metacal._typing import Tree

with warnings.catch_warnings():
    # The first forward-mode pass of a process makes torch load tables through its own deprecated torch.jit.script. Do it here,
    # where the warning can be silenced without silencing the user's.
    warnings.simplefilter("ignore")
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def transforming() -> bool:
    """Whether a ``torch.func`` transform (or a compiler) is looking at what is computed now."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def forward_levels() -> int:
    """How many levels of forward mode (``torch.func.jvp``) look at what is computed now.

    In an autograd.Function's jvp rule torch switches forward mode off for all of them at once: those below its own would take its
    tangent for a constant, and a level that a rule itself begins is alone.
    """
    functorch, found = torch._C._functorch, 0
    for level in reversed(functorch.get_interpreter_stack() or []):
        if level.key() == functorch.TransformType.Jvp:
            found += 1
            if not functorch.CJvpInterpreterPtr(level).prevFwdGradMode():
                break
    return found


def alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a Function saved or is handed in its backward, out of the wrappers of ``torch.func`` levels that have ended since.

    A pullback of ``torch.func.vjp`` is called after the level that recorded it.
    """
    return [torch._C._functorch.unwrap_if_dead(x) for x in tensors]


def is_tracked(x: Any) -> bool:
    """Whether a ``torch.func`` level, at whatever depth, differentiates by something that x was computed from."""
    functorch = torch._C._functorch
    while isinstance(x, Tensor):
        batched = functorch.is_batchedtensor(x)
        if x.requires_grad or not (batched or forward_ad._current_level < 0 or forward_ad.unpack_dual(x).tangent is None):
            return True
        if not (batched or functorch.is_gradtrackingtensor(x)):
            break
        x = functorch.get_unwrapped(x)
    return False


def in_every_lane(outputs: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies of a Function's outputs, under vmap one for each lane of any input.

    torch sums over the lanes of a tangent whose output has none.
    """
    lanes = torch.stack([x.new_zeros((), dtype=torch.float32, device=outputs[0].device) for x in inputs]).sum()
    return [x + lanes.to(x.dtype) for x in outputs]


def attached(*trees: Tree) -> bool:
    """Whether somebody may differentiate what is computed from these trees: then nothing may be detached."""
    return transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(trees)))


def released(value: Tree, attached: bool) -> Tree:
    """``value``, cut from any graph unless somebody may differentiate it."""
    return value if attached else tree.detach(value)


def accumulator(like: Tree) -> Tree:
    """Zeros to add terms to, in float32 at least: a sum in bfloat16 stops growing after some hundred terms."""
    return tree.map(lambda x: torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)), like)


def _tensors(value: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]


def _alias(x: Tensor, keep_graph: bool) -> Tensor:
    # A fresh node: d/d(alias) is the partial derivative, even where one argument was computed from another.
    return x.view_as(x) if keep_graph and x.requires_grad else x.detach().requires_grad_()


def value_and_grad(
    fn: Callable[..., tuple[Tensor, Any]], *primals: Tree, constants: Tree = (), name: str = "objective"
) -> tuple[Tensor, Any, Any]:
    """``(value, aux, gradients)`` of ``fn(*primals) -> (scalar, aux)`` with respect to every primal.

    A primal that the value does not depend on has a zero gradient; a value that depends on none of the first primal's
    leaves is an error, for it is a mistake every time. ``constants`` are what ``fn`` reads besides: the gradients stay in their
    graph.
    """
    flat, treedef = tree.flatten(primals)
    if transforming():
        structure: Any = None  # of aux: torch.func takes a None in it for a leaf, and refuses it

        def scalar(leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, list[Any]]]:
            nonlocal structure
            value, aux = fn(*tree.unflatten(treedef, leaves))
            value = _checks.scalar(name, value)
            aux_leaves, structure = tree.flatten(aux)
            return value, (value, aux_leaves)

        with differentiable_attention():
            grads, (value, aux_leaves) = seen_through(torch.func.grad(scalar, has_aux=True), flat)
        return value, tree.unflatten(structure, aux_leaves), tree.unflatten(treedef, grads)
    keep_graph = attached(flat, constants)
    with torch.enable_grad(), differentiable_attention() if keep_graph else nullcontext():
        flat = [_alias(x, keep_graph) for x in flat]
        value, aux = fn(*tree.unflatten(treedef, flat))
        value = _checks.scalar(name, value)
        if not value.requires_grad:
            raise ValueError(_independent(name))
        grads = torch.autograd.grad(value, flat, create_graph=keep_graph, allow_unused=True)
    if any(g is None for g in grads):
        of_params = grads[: len(tree.leaves(primals[0]))]
        if of_params and all(g is None for g in of_params):
            raise ValueError(_independent(name))
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, flat, strict=True)]
    if not keep_graph:  # an autograd.Function may return what it saved, with the graph that hangs on it
        grads = [g.detach() for g in grads]
    return *released((value, aux), keep_graph), tree.unflatten(treedef, grads)


def seen_through(transform: Callable[..., Any], *args: Any) -> Any:
    """``transform(*args)`` of torch.func, which says itself neither what it cannot look into nor what helps."""
    try:
        return transform(*args)
    except RuntimeError as error:
        if "support saved tensor hooks" in str(error):
            raise RuntimeError(
                "The objective saves tensors by hooks (torch.utils.checkpoint), which a torch.func transform does not support (vmap, grad, "
                "jvp ...; also Forward and compiled steps). Use an adjoint of plain autograd outside of any transform, such as Unrolled(), "
                "or leave out the checkpoint."
            ) from error
        if "not differentiable wrt running_mean" in str(error):
            raise RuntimeError(
                "A BatchNorm in evaluation mode reads running statistics that came in as `carry`, which torch cannot take a forward-mode "
                "derivative of inside a torch.func transform (vmap, grad, jvp ...; also Forward). Leave `carry` out there, for then "
                "apply(params, x) reads the module's own statistics, or leave out the transform (a loop over tasks)."
            ) from error
        if "it must override the setup_context" not in str(error):
            raise
        raise RuntimeError(
            "The objective calls a torch.autograd.Function without setup_context. A torch.func transform (vmap, grad, jvp ...) cannot see "
            "into it, so there is no derivative here. Write it as forward(*inputs) and setup_context(ctx, inputs, output), with "
            "generate_vmap_rule = True for vmap; or leave out the transform (a loop over tasks, Unrolled without a level above)."
        ) from error


def _independent(name: str) -> str:
    return (
        f"`{name}` should depend on its first argument, the params: its derivative is zero everywhere. Use the params that are "
        "passed in (with a module: metacal.functional(module).apply(params, x), not module(x)), and do not detach them, as "
        "torch.utils.checkpoint does unless use_reentrant=False."
    )


def vjp(fn: Callable[..., Tree], *primals: Tree, constants: Tree = ()) -> tuple[Tree, Callable[[Tree], Any]]:
    """``(fn(*primals), pullback)``: the pullback maps a cotangent of the output to those of the primals, once.

    ``constants`` are what ``fn`` reads besides: the result stays in their graph.
    """
    if transforming():
        return func_vjp(fn, *primals)
    keep_graph = attached(primals, constants)
    flat, treedef = tree.flatten(primals)
    with torch.enable_grad(), differentiable_attention():  # here, and not again in every step of a run
        flat = [_alias(x, keep_graph) for x in flat]
        out = fn(*tree.unflatten(treedef, flat))
    outs = tree.leaves(out)

    def pullback(cotangent: Tree) -> Any:
        cotangents = tree.leaves(cotangent)
        create_graph = keep_graph or attached(cotangents)
        return tree.unflatten(treedef, _pulled(outs, flat, cotangents, retain_graph=create_graph, create_graph=create_graph))

    return released(out, keep_graph), pullback


def pullbacks(fn: Callable[..., Tree], *primals: Tree) -> tuple[Tree, list[Callable[[Tree], Tree]]]:
    """``fn(*primals)``, and for each primal the map from a cotangent of the output to its own, as often as it is wanted.

    Recorded once; plain autograd, which nobody differentiates or transforms (see :func:`attached`).
    """
    with torch.enable_grad(), differentiable_attention():
        primals = tree.map(lambda x: x.detach().requires_grad_(), primals)
        out = fn(*primals)
    outs = tree.leaves(out)

    def pullback(primal: Tree) -> Callable[[Tree], Tree]:
        flat, treedef = tree.flatten(primal)
        return lambda cotangent: tree.unflatten(treedef, _pulled(outs, flat, tree.leaves(cotangent), retain_graph=True))

    return tree.detach(out), [pullback(primal) for primal in primals]


def _pulled(
    ys: list[Tensor], xs: list[Tensor], cotangents: list[Tensor], *, retain_graph: bool, create_graph: bool = False
) -> list[Tensor]:
    """The cotangents of ``xs``: zeros where nothing depends on one."""
    pairs = [(y, ct) for y, ct in zip(ys, cotangents, strict=True) if y.requires_grad]
    if not (pairs and xs):
        return [torch.zeros_like(x) for x in xs]
    live, cts = zip(*pairs, strict=True)
    with torch.enable_grad():
        try:
            found = torch.autograd.grad(live, xs, cts, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:  # as of nn.EmbeddingBag and ctc_loss
            if "derivative" not in str(error) or "not implemented" not in str(error):
                raise
            said = str(error).split(". ")[0].rstrip(".")
            raise RuntimeError(
                f"An operation of the objective has no second derivative, which this hypergradient needs ({said}). Write it out of others, "
                "or use an adjoint without second derivatives (FiniteDifference, FirstOrder)."
            ) from error
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]


def func_vjp(fn: Callable[..., Tree], *primals: Tree) -> tuple[Tree, Callable[[Tree], Any]]:
    """``torch.func.vjp`` of trees as :mod:`metacal.tree` knows them: the pullback may be called again and differentiated."""
    flat, treedef = tree.flatten(primals)
    if not flat:
        return fn(*primals), lambda cotangent: primals
    structure = None

    def on_leaves(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal structure
        out, structure = tree.flatten(fn(*tree.unflatten(treedef, leaves)))
        return tuple(out)

    with differentiable_attention():
        outs, pull = seen_through(torch.func.vjp, on_leaves, *flat)[:2]
    return tree.unflatten(structure, outs), lambda cotangent: tree.unflatten(treedef, pull(tuple(tree.leaves(cotangent))))


def func_jvp(fn: Callable[..., Tree], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Tree:
    """The tangent of ``fn(*primals)`` by ``torch.func.jvp``, of trees as :mod:`metacal.tree` knows them."""
    flat, treedef = tree.flatten(primals)
    if not flat:
        return tree.zeros_like(fn(*primals))
    structure = None

    def on_leaves(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal structure
        out, structure = tree.flatten(fn(*tree.unflatten(treedef, leaves)))
        return tuple(out)

    with differentiable_attention():
        out, tangent = seen_through(torch.func.jvp, on_leaves, tuple(flat), tuple(tree.leaves(tangents)))
    return tree.unflatten(structure, in_dtype_of(out, tangent))


def in_dtype_of(outputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """The tangents in their outputs' dtypes: torch makes that of a number over a 0-dim float32 tensor float64."""
    return [d.to(x.dtype) for x, d in zip(outputs, tangents, strict=True)]


def differentiable_attention() -> AbstractContextManager[None]:
    """Inside, attention is computed by the mathematics backend: fused attention has neither a double backward nor forward AD."""
    if torch.compiler.is_compiling() or _fused_attention():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _fused_attention() -> bool:
    # Flags of every device, in spite of their module's name.
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()


def leaves_of(value: Tree, besides: Tree = ()) -> list[Tensor]:
    """The tensors that a tree's graph begins at, as those on which ``backward`` would leave a gradient."""
    own = {id(x) for x in _tensors(besides)}
    found = [x for x in _tensors(value) if x.requires_grad and x.is_leaf]
    found += [node.variable for node in graph_nodes(value) if hasattr(node, "variable")]
    return [x for x in found if id(x) not in own]


def graph_nodes(value: Tree) -> Iterator[Node]:
    """Every node of the autograd graph that a tree hangs on, once."""
    seen: set[Node] = set()
    waiting = [leaf.grad_fn for leaf in _tensors(value)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)
