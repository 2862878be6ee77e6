"""A function as one graph of ``torch.compile``, wherever that is right and possible."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from metacal import _dropout, tree
from metacal._typing import Tree
from metacal.derivatives import attached
from metacal.operators import Loss


def refuse_without_cuda(how: bool | str, params: Tree = ()) -> None:
    """Raises ValueError where CUDA graphs are asked for, but there is no CUDA device or the params are elsewhere."""
    if how == "cuda-graphs" and not (torch.cuda.is_available() and all(leaf.is_cuda for leaf in tree.leaves(params))):
        raise ValueError(
            '`compile="cuda-graphs"` needs the params on a CUDA device: metacal.tree.to(params, "cuda"). Elsewhere pass compile=True.'
        )


def compiled(fn: Any, how: bool | str, second_order_of: Loss | None = None) -> Callable[..., Any]:
    """``fn`` as one graph of ``torch.compile``, and as it is where that would be wrong or impossible.

    Compiled code has one derivative: where somebody differentiates ``fn``, it is eager. So are second-order products without forward
    mode: of an ``autograd.Function`` without a jvp rule, traced code drops the second derivative and says nothing.
    """
    from torch._dynamo.exc import TorchDynamoException  # a second of imports

    cuda_graphs = how == "cuda-graphs"
    backend = "inductor" if cuda_graphs or not isinstance(how, str) else how
    # Noise as eager code draws it: the step and its pullback have to see the same, and so have a compiled run and an eager one.
    options: Any = {"fallback_random": True, "triton.cudagraphs": cuda_graphs} if backend == "inductor" else None
    # A code object of its own: torch counts recompilations per code object, and gives up after eight.
    own = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    fast = torch.compile(own, fullgraph=True, backend=backend, options=options)

    tried = False

    def call(*args: Any) -> Any:
        nonlocal tried
        if attached(args) or _get_current_dispatch_mode() is not None:  # a counter of flops sees eager code only
            return fn(*args)
        if not tried:  # eagerly: it shows a user's mistakes as they are, and learns what forward mode cannot do
            tried = True
            with _dropout.Refused():
                return fn(*args)
        if second_order_of is not None and not second_order_of.seen.has_forward_mode:
            return fn(*args)
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch.enable_grad():  # one mode, whoever calls: another would be another graph
                out = fast(*tree.detach(args))
        except TorchDynamoException as error:
            raise RuntimeError(
                f"The objective (or the optimizer) cannot be compiled as one graph: {' '.join(str(error).split()[:40])} ... "
                "Pass compile=False, or rewrite the operation that torch names here."
            ) from error
        return tree.clone(out) if cuda_graphs else out  # the next replay overwrites the graph's buffers

    return call
