"""What a step that is attached to a graph keeps in memory, found out by taking one."""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from metacal import _random, tree
from metacal._typing import Tree
from metacal.derivatives import graph_nodes
from metacal.inner import InnerSolver, InnerState


class Footprint(NamedTuple):
    """Bytes of one step.

    Attributes:
        params, state: of the params, and of params and optimizer state together.
        graph: what the step's graph has saved, beside the hparams, the batch and constants that the objective closes over.
        activations: what the gradient's part of it has saved, beside the state as well.
    """

    params: int
    state: int
    graph: int
    activations: int


def footprint(solver: InnerSolver, state: InnerState, hparams: Tree, batch: Tree) -> Footprint:
    """Takes a step, and forgets it: the generators stand where they stood. Work: one gradient that records a graph of itself."""
    with _random.preserved(state.params):
        graph, activations = _saved_by_a_step(solver, state, hparams, batch)
    start = _storages((state.params, state.opt_state))
    # What outlives the graph was none of its cost: somebody else's. The start is ours, for later steps have one of their own.
    others = _storages((hparams, batch)).keys() | {storage for storage in graph if not storage.expired()} - start.keys()
    return Footprint(
        tree.num_bytes(state.params), sum(start.values()), _bytes_beside(others, graph), _bytes_beside(others | start.keys(), activations)
    )


Storages = dict[StorageWeakRef, int]  # and their bytes


def _saved_by_a_step(solver: InnerSolver, state: InnerState, hparams: Tree, batch: Tree) -> tuple[Storages, Storages]:
    params, hparams = tree.map(lambda x: x.detach().requires_grad_(), (state.params, hparams))
    state = state._replace(params=params)
    with torch.enable_grad():
        after, grads = solver.taken_apart.step(state, hparams, batch) if solver.taken_apart else (solver.step(state, hparams, batch), None)
    graph = _saved_by_graph(after)
    return graph, graph if grads is None else _saved_by_graph(grads)


def _bytes_beside(others: Set[StorageWeakRef], storages: Storages) -> int:
    return sum(size for storage, size in storages.items() if storage not in others)


def _storages(value: Tree) -> Storages:
    """The storages of a tree's tensors, and their bytes."""
    storages = [x.untyped_storage() for x in tree.leaves(value) if isinstance(x, Tensor) and x.layout == torch.strided]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def _saved_by_graph(value: Tree) -> Storages:
    """The storages that the autograd graph of a tree keeps for its backward pass, and their bytes."""
    saved = Storages()
    for node in graph_nodes(value):
        saved |= _storages([getattr(node, name) for name in _names_of_saved(type(node))])
    return saved


@cache
def _names_of_saved(node: type) -> list[str]:
    # What torch exposes of a node's saved tensors: `_saved_self` and the like, and `saved_tensors` of Python's Functions.
    return [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
