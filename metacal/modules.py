"""``nn.Module`` to a pure function and back: the only file that knows modules."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from metacal import _ambient

_CHECKPOINTING = (
    "`module` recomputes activations internally (torch.utils.checkpoint). The recomputation would run after the module's own "
    "parameters are back in place and give silently wrong gradients. Turn it off in the module (for Hugging Face models: "
    "model.gradient_checkpointing_disable()); to save memory use Unrolled(mode='mixed'), which recomputes whole inner steps."
)


class Functional(NamedTuple):
    """A module as a pure function of its trainable parameters.

    Attributes:
        apply: ``apply(params, *args, **kwargs) -> output`` reads the stored buffers and drops their updates;
            ``apply(params, *args, carry=buffers, **kwargs) -> (output, new_buffers)`` carries them along.
        params: detached copies of the trainable parameters, keyed by name. Tied weights appear once.
        buffers: copies of the buffers, keyed by name: the first ``carry``.
        write: ``write(params, carry=None)`` puts values back into the module.
    """

    apply: Callable[..., Any]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    write: Callable[..., None]


def functional(module: nn.Module, *, batch_norm: Literal["carry", "batch"] = "carry") -> Functional:
    """Turns a module into a pure function; the module itself is left untouched until ``write``.

    Whether the module is in training or evaluation mode is read at every call. Frozen parameters (``requires_grad=False``) are
    constants. ``batch_norm="batch"`` normalises by the statistics of the batch only, with no running ones: nothing to carry, and
    safe under ``torch.func.vmap``.

    Errors:
        RuntimeError: the module checkpoints activations internally; the message names the remedy.

    >>> import torch, metacal
    >>> net = torch.nn.Linear(3, 1)
    >>> f = metacal.functional(net)
    >>> f.apply(f.params, torch.ones(2, 3)).shape
    torch.Size([2, 1])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` should be an nn.Module, got {type(module).__name__}.")
    if batch_norm not in ("carry", "batch"):
        raise ValueError(f"`batch_norm` should be 'carry' or 'batch', got {batch_norm!r}.")
    _ambient.watch(module)
    called = module
    if batch_norm == "batch":
        called = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(module))
    trainable = {name: p.detach().clone() for name, p in called.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in called.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in called.named_buffers()}
    places = _places(called)

    def call(params: dict[str, Tensor], state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if params.keys() != trainable.keys():
            _refuse_names(params, trainable)
        values = {**frozen, **params, **state}
        placed = {place: values[name] for place, name in places.items() if name in values}
        with _no_checkpointing(), _twice_differentiable_weight_norm():
            return torch.func.functional_call(called, placed, args, kwargs, tie_weights=False)

    def apply(params: dict[str, Tensor], *args: Any, carry: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        # functional_call writes BatchNorm's running statistics into the tensors it is given: hand it copies.
        state = {name: b.clone() for name, b in (buffers if carry is None else carry).items()}
        if called is not module:
            called.train(module.training)
        output = call(params, state, args, kwargs)
        return output if carry is None else (output, state)

    def write(params: dict[str, Tensor], carry: dict[str, Tensor] | None = None) -> None:
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        values = {**params, **(carry or {})}
        unknown = sorted(values.keys() - own.keys())
        if unknown:
            raise ValueError(f"`params` should hold names of the module's parameters and buffers; it has none called '{unknown[0]}'.")
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise ValueError(f"`params` at '{name}' should have the module's shape {tuple(own[name].shape)}, got {tuple(value.shape)}.")
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)

    return Functional(apply, trainable, buffers, write)


def _refuse_names(params: dict[str, Tensor], trainable: dict[str, Tensor]) -> None:
    missing, unknown = (sorted(a - b) for a, b in ((trainable.keys(), params.keys()), (params.keys(), trainable.keys())))
    found = [f"'{missing[0]}' is missing"] * bool(missing) + [f"'{unknown[0]}' is none of them"] * bool(unknown)
    raise ValueError(
        f"`params` should hold the module's trainable parameters by name, as metacal.functional(module).params does: {' and '.join(found)}."
    )


def _places(module: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, once, with the name under which ``params`` or ``buffers`` has it.

    torch's own tying of weights names a sub-module that is registered twice twice; its second exchange then takes the first one's
    value for the module's own, and puts that back.
    """
    first: dict[int, str] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        first.setdefault(id(x), name)
    return {
        f"{prefix}.{key}" if prefix else key: first[id(x)]
        for prefix, m in module.named_modules()
        for key, x in [*m._parameters.items(), *m._buffers.items()]
        if x is not None
    }


# The parametrisation looks it up in torch; nn.utils.weight_norm has a name of its own for it.
_WEIGHT_NORMS: tuple[Any, ...] = (torch, importlib.import_module("torch.nn.utils.weight_norm"))


@contextmanager
def _twice_differentiable_weight_norm() -> Iterator[None]:
    # torch's fused one has no forward mode, and a wrong second derivative by v.
    if torch.compiler.is_compiling():
        yield
        return
    own = torch._weight_norm
    for place in _WEIGHT_NORMS:
        place._weight_norm = lambda v, g, dim=0: v * (g / torch.norm_except_dim(v, 2, dim))
    try:
        yield
    finally:
        for place in _WEIGHT_NORMS:
            place._weight_norm = own


class _Refused:
    """Stands in for the autograd Function of reentrant checkpointing."""

    @staticmethod
    def apply(*args: Any) -> Any:
        raise RuntimeError(_CHECKPOINTING)


@contextmanager
def _no_checkpointing() -> Iterator[None]:
    # The non-reentrant kind needs saved-tensor hooks, which torch can forbid; the reentrant kind goes through one Function.
    # It leaves no other trace: where no input requires grad its output is cut from the graph.
    if torch.compiler.is_compiling():
        yield
        return
    own = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Refused  # type: ignore[assignment,misc]
    # Hooks of the caller's own around the call (save_on_cpu) are welcome; torch cannot forbid further ones inside them.
    callers = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    try:
        with nullcontext() if callers else torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTING):
            yield
    finally:
        checkpoint.CheckpointFunction = own  # type: ignore[misc]
