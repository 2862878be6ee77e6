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

    Whether the module is in training or evaluation mode is read at every call; steps that a backward pass takes again see it as it was
    in the run. Frozen parameters (``requires_grad=False``) are constants. ``batch_norm="batch"`` normalises by the statistics of the
    batch only, with no running ones: nothing to carry, and safe under ``torch.func.vmap``.

    Errors:
        ValueError: an embedding of the module has gradients of sparse layout, or renormalises its weight in place.
        RuntimeError: the module checkpoints activations internally, or changes its own parameters in forward.

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
    _refuse_embeddings(module)
    _ambient.watch(module)
    called = module
    if batch_norm == "batch":
        called = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(module))
    # Each part has a mode of its own (a Dropout left in eval mode): module.train(mode) would overwrite them.
    twins = [] if called is module else list(zip(module.modules(), called.modules(), strict=True))
    trainable = {name: p.detach().clone() for name, p in called.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in called.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in called.named_buffers()}
    places = _places(called)

    def apply(params: dict[str, Tensor], *args: Any, carry: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        _check_names("params", params, trainable)
        if carry is not None:
            _check_names("carry", carry, buffers)
        for own, twin in twins:
            twin.training = own.training
        # What changes in place (BatchNorm's running statistics) changes the tensors that functional_call is given: hand it copies.
        state = {name: b.clone() for name, b in (buffers if carry is None else carry).items()}
        values = {**frozen, **params, **state}
        placed = {place: values[name] for place, name in places.items()}
        with _no_checkpointing(), _twice_differentiable_weight_norm(), _no_moving_parameters(params, frozen, placed):
            output = torch.func.functional_call(called, placed, args, kwargs, tie_weights=False)
        return output if carry is None else (output, _left(placed, places, state))

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


def _check_names(argument: Literal["params", "carry"], given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if isinstance(given, dict) and given.keys() == expected.keys():
        return
    like = {"params": "params", "carry": "buffers"}[argument]
    wanted = f"`{argument}` should be a dict by name, as metacal.functional(module).{like} is"
    if not isinstance(given, dict):
        raise TypeError(f"{wanted}, got {type(given).__name__}.")
    missing, unknown = (sorted(a - b) for a, b in ((expected.keys(), given.keys()), (given.keys(), expected.keys())))
    found = [f"'{name}' is missing" for name in missing[:1]] + [f"'{name}' is none of them" for name in unknown[:1]]
    raise ValueError(f"{wanted}: {' and '.join(found)}.")


def _refuse_embeddings(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if not isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
            continue
        where = f"`module` at '{name}'" if name else "`module`"
        if m.max_norm is not None:
            raise ValueError(
                f"{where} is an {type(m).__name__} with max_norm={m.max_norm}, which changes its weight in place at every call. Set "
                "max_norm=None, and write it out in forward: rows * max_norm / rows.norm(dim=-1, keepdim=True).clamp(min=max_norm)."
            )
        if m.sparse and m.weight.requires_grad:
            raise ValueError(
                f"{where} is an {type(m).__name__} with sparse=True; gradients of sparse layout are not supported. Set sparse=False."
            )


def _left(placed: dict[str, Tensor], places: dict[str, str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers as forward left them: functional_call puts those that were assigned anew into ``placed``."""
    for place, name in places.items():
        if place != name and name in state and placed[place] is not placed[name]:
            raise RuntimeError(
                f"`module` has one buffer in two places, '{name}' and '{place}', and its forward assigned another to one of them. Assign "
                "it to both, change it in place, or register two buffers."
            )
    return {name: placed[name] for name in state}


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


@contextmanager
def _no_moving_parameters(params: dict[str, Tensor], frozen: dict[str, Tensor], placed: dict[str, Tensor]) -> Iterator[None]:
    # The user's own tensors would change, and a step taken again from what was saved would not be the step that was taken.
    if torch.compiler.is_compiling():
        yield
        return
    constant = {**params, **frozen}
    versions = _versions(constant)
    storages = {name: x.untyped_storage() for name, x in frozen.items() if torch._C._has_storage(x)}
    yield
    moved = [name for name, was, now in zip(constant, versions, _versions(constant), strict=False) if was != now]
    moved += [name for name, was in storages.items() if frozen[name].untyped_storage() is not was]  # x.data = y: the same version
    moved += [name for name, x in constant.items() if placed[name] is not x]
    if moved:
        raise RuntimeError(
            f"`module` changed its parameter '{moved[0]}' in forward, and parameters are constant during a call. Register what moves along "
            "(a teacher) as a buffer and carry it: apply(params, x, carry=buffers). Write a constraint as a function of the parameter."
        )


def _versions(tensors: dict[str, Tensor]) -> list[int]:
    try:
        return [x._version for x in tensors.values()]
    except RuntimeError:  # inference tensors count none
        return []


# The parametrisation looks it up in torch; nn.utils.weight_norm has a name of its own for it.
_WEIGHT_NORMS: tuple[Any, ...] = (torch, importlib.import_module("torch.nn.utils.weight_norm"))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # dim=-1 is the norm of the whole, whose forward derivative torch gives another shape.
    return v * (g / (v.norm() if dim == -1 else torch.norm_except_dim(v, 2, dim)))


@contextmanager
def _twice_differentiable_weight_norm() -> Iterator[None]:
    # torch's fused one has no forward mode, and a wrong second derivative by v.
    if torch.compiler.is_compiling():
        yield
        return
    own = torch._weight_norm
    for place in _WEIGHT_NORMS:
        place._weight_norm = _weight_norm
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
