"""Peak memory in bytes of what several methods do: estimates, made to tell orders of magnitude apart."""

from __future__ import annotations

import math

from metacal.registry.row import Sizes


def replayed(s: Sizes, T: int) -> float:
    """sqrt(2 T) states, those of the run, and one step's double-backward graph."""
    return (math.ceil(math.sqrt(2 * T)) + 4) * s.state_bytes + 3 * s.activation_bytes


def graph(s: Sizes) -> float:
    """The graph of all T steps."""
    # A step's graph keeps its activations, those of its backward pass, and the state that it makes.
    return s.num_steps * (2 * s.activation_bytes + s.state_bytes)


def graph_in_segments(s: Sizes) -> float:
    """The graph of ``number`` steps at a time, and the states where the others start."""
    k = min(s.number, s.num_steps)
    return graph(s._replace(num_steps=k)) + math.ceil(s.num_steps / k) * s.state_bytes


def one_step(s: Sizes) -> float:
    """One state and one step's activations, twice."""
    return s.state_bytes + 2 * s.activation_bytes
