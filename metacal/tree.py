"""Trees of tensors: nested dicts, lists, tuples and NamedTuples.

One backend (optree, which torchopt uses too): dictionary keys are sorted, so two dicts with equal keys in
different insertion order pair the right tensors, and ``None`` is an empty tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from metacal._safe import root
from metacal._typing import Tree


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """The leaves, and the structure that :func:`unflatten` wants."""
    flat, treedef = optree.tree_flatten(tree)
    return flat, treedef


def unflatten(treedef: Any, leaves: Iterable[Any]) -> Tree:
    """The tree of a structure and its leaves."""
    return optree.tree_unflatten(treedef, leaves)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in the order of :func:`flatten`."""
    return optree.tree_leaves(tree)


def structure(tree: Tree) -> Any:
    """The structure, comparable with ``==``."""
    return optree.tree_structure(tree)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies ``fn`` leaf by leaf; the trees in ``rest`` must have the structure of ``tree``."""
    return optree.tree_map(fn, tree, *rest)


def paths(tree: Tree) -> list[str]:
    """The dotted name of every leaf, in the order of :func:`leaves`: ``{"a": (x, y)} -> ["a.0", "a.1"]``."""
    return [_dotted(accessor) for accessor in optree.tree_accessors(tree)]


def _dotted(accessor: optree.PyTreeAccessor) -> str:
    return ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf can be differentiated: a floating-point or complex tensor."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor of any kind."""
    return isinstance(leaf, Tensor)


def partition(tree: Tree, keep: Callable[[Any], bool] = is_floating) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tree]]:
    """Splits off the leaves to ``keep``: by default the floating ones.

    Returns them with a function that puts others (new values, cotangents, tracers) in their place. Step counters and
    other integer leaves stay where they are: ``torch.func.vjp`` refuses them.
    """
    every, treedef = flatten(tree)
    where = [i for i, leaf in enumerate(every) if keep(leaf)]
    rest = [None if keep(leaf) else leaf for leaf in every]

    def combine(kept: Sequence[Tensor]) -> Tree:
        filled = list(rest)
        for i, leaf in zip(where, kept, strict=True):
            filled[i] = leaf
        return unflatten(treedef, filled)

    return [every[i] for i in where], combine


def add(a: Tree, b: Tree) -> Tree:
    """``a + b``."""
    return map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    return map(torch.sub, a, b)


def scale(a: float | Tensor, x: Tree) -> Tree:
    """``a x`` for a scalar ``a``."""
    return map(lambda leaf: a * leaf, x)


def axpy(a: float | Tensor, x: Tree, y: Tree) -> Tree:
    """``a x + y`` for a scalar ``a``."""
    if isinstance(a, Tensor):
        return map(lambda xi, yi: a * xi + yi, x, y)
    return map(lambda xi, yi: torch.add(yi, xi, alpha=a), x, y)  # one kernel


def mean(trees: list[Tree]) -> Tree:
    """The leafwise mean of several trees."""
    return trees[0] if len(trees) == 1 else map(lambda *xs: torch.stack(xs).mean(0), *trees)


def vdot(a: Tree, b: Tree) -> Tensor:
    """The inner product ``Re <a, b>``, a real 0-dim tensor (0 for empty trees), of half precision leaves in float32."""
    # .sum() of the product and not torch.dot: leaves have any shape, and 0-dim ones are welcome.
    products = [_product(x, y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]
    if len(products) == 1:
        return products[0]
    return torch.stack(products).sum() if products else torch.zeros(())


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``Re conj(x) y``, elementwise."""
    if x.is_complex() or y.is_complex():
        return (x.conj() * y).real
    return _wide(x) * _wide(y)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32: in float16 the square of 300 is infinite, that of 1e-4 zero."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def norm(a: Tree) -> Tensor:
    """The Euclidean norm of all leaves together, a real 0-dim tensor, of half precision leaves in float32.

    Its first and second derivatives at zero are zero: sqrt's would be infinite.
    """
    return root(vdot(a, a))


def zeros_like(tree: Tree) -> Tree:
    """Zeros of the same shapes."""
    return map(torch.zeros_like, tree)


def detach(tree: Tree) -> Tree:
    """Every tensor detached; other leaves as they are."""
    return map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def clone(tree: Tree) -> Tree:
    """Every tensor detached and copied."""
    return map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def to(tree: Tree, target: torch.device | torch.dtype | str) -> Tree:
    """Moves every tensor to a device, or casts the floating ones to a dtype: complex ones to its complex, integers keep theirs."""
    if isinstance(target, torch.dtype):
        return map(lambda leaf: leaf.to(target.to_complex() if leaf.is_complex() else target) if is_floating(leaf) else leaf, tree)
    return map(lambda leaf: leaf.to(target) if isinstance(leaf, Tensor) else leaf, tree)


def stack(trees: list[Tree]) -> Tree:
    """Equal trees as one tree with a new leading axis."""
    return map(lambda *xs: torch.stack(xs), *trees)


def index(tree: Tree, i: int | slice | Tensor) -> Tree:
    """``leaf[i]`` for every leaf: one entry of a stacked tree."""
    return map(lambda leaf: leaf[i], tree)


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """One vector of all the leaves, and the function that turns such a vector back into the tree."""
    flat, treedef = flatten(tree)
    shapes, sizes, dtypes = [x.shape for x in flat], [x.numel() for x in flat], [x.dtype for x in flat]
    vector = torch.cat([x.reshape(-1) for x in flat]) if flat else torch.zeros(0)

    def unravel(v: Tensor) -> Tree:
        parts = zip(v.split(sizes), shapes, dtypes, strict=True)
        return unflatten(treedef, [part.reshape(shape).to(dtype) for part, shape, dtype in parts])

    return vector, unravel


def num_elements(tree: Tree) -> int:
    """The number of scalars in the tree."""
    return sum(leaf.numel() for leaf in leaves(tree))


def num_bytes(tree: Tree) -> int:
    """The memory of the tree's tensors, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree) if isinstance(leaf, Tensor))


def state_dict(tree: Tree) -> dict[str, Tensor]:
    """A flat dict ``{dotted path: tensor}``, which ``torch.load(weights_only=True)`` reads back.

    Errors:
        TypeError: a leaf is not a tensor.
        ValueError: two leaves have the same dotted path.
    """
    names = paths(tree)
    flat = dict(zip(names, leaves(tree), strict=True))
    if len(flat) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`tree` has two leaves at '{double}': a dict key contains a dot. Rename one of them.")
    for path, leaf in flat.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"`tree` should hold tensors only; the leaf at '{path}' is a {type(leaf).__name__}. Wrap it in torch.as_tensor."
            )
    return flat


def load_state_dict(like: Tree, state: Mapping[str, Tensor]) -> Tree:
    """The tree with the structure, devices and dtypes of ``like`` and the values of :func:`state_dict`'s dict.

    Errors:
        ValueError: a path is missing, unexpected, or has another shape; the message names the first one.
    """
    wanted = dict(zip(paths(like), leaves(like), strict=True))
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            "`state` does not fit `like`: "
            + (f"'{missing[0]}' is missing (of {len(missing)}). " if missing else "")
            + (f"'{unexpected[0]}' is unexpected (of {len(unexpected)}). " if unexpected else "")
            + "Build `like` with the same configuration that wrote the state."
        )
    for path, leaf in wanted.items():
        if state[path].shape != leaf.shape:
            raise ValueError(
                f"`state` does not fit `like`: '{path}' should have shape {tuple(leaf.shape)}, got {tuple(state[path].shape)}."
            )
    values = [state[path].to(device=leaf.device, dtype=leaf.dtype) for path, leaf in wanted.items()]
    return unflatten(structure(like), values)


def stand_in(leaf: Any) -> Any:
    """A leaf's value without what transforms wrap around it: under vmap, that of the first entries."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.func.debug_unwrap(leaf).detach().flatten()[: leaf.numel()].reshape(leaf.shape)
