"""Other libraries' hypergradients, each used as its own documentation and examples do."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from benchmarks.methods import Method, Unsupported
from benchmarks.problem import Problem
from metacal._typing import Tree

# The file here, the package that it imports, and how to have that.
_FILES = {
    "by_hand": ("torch", "pip install torch"),
    "higher_peer": ("higher", "pip install higher"),
    "torchopt_peer": ("torchopt", "pip install torchopt"),
    # Its metadata asks for Python < 3.11, without need; of 0.1, which does not, pip >= 24.1 refuses the specifiers.
    "betty_peer": ("betty", "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"),
    "jax_peer": ("jaxopt", "pip install jax jaxopt optax"),
}


def peers() -> dict[str, Method]:
    """The methods of every peer by name; one that cannot be imported is a single row, whose ``prepare`` says why."""
    found: dict[str, Method] = {}
    for file, (package, install) in _FILES.items():
        try:
            rows = import_module(f"benchmarks.peers.{file}").METHODS
        except Exception as error:  # whatever a package of another year raises: it must not stop the others
            rows = (_refusing(package, f"{package} cannot be imported ({type(error).__name__}: {error}). To have it: {install}"),)
        found |= {row.name: row for row in rows}
    return found


def _refusing(package: str, reason: str) -> Method:
    def prepare(problem: Problem) -> Callable[[], Tree]:
        raise Unsupported(reason)

    return Method(package, package, "exact", prepare)
