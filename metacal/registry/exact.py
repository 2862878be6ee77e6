"""Rows: the derivative of the steps that were taken."""

from __future__ import annotations

import math

from metacal import adjoints
from metacal.registry.costs import graph, graph_in_segments, replayed
from metacal.registry.row import BOTH, HPARAMS, Method, Sizes, cite


def _tangents(s: Sizes) -> str | None:
    most = adjoints.Forward.max_hparams
    return f"one tangent for each of {s.num_hparams} hparams" if s.num_hparams > most else None


EXACT = (
    Method(
        "Unrolled()", "exact", lambda s: adjoints.Unrolled(), BOTH, "none",
        "5.25 T at most", "√(2 T) states, one step's double-backward graph; inside a transform gradients too",
        "a double backward of the objective; inside a transform forward-mode AD where there is", cite("Kemaev et al. 2025", "2505.00793"),
        lambda s: 5.25 * s.num_steps, lambda s: replayed(s, s.num_steps), initial_params=True, path=True,
    ),
    Method(
        "Unrolled(segment=1)", "exact", lambda s: adjoints.Unrolled(segment=1), BOTH, "none",
        "4.25 T at most", "T states, one step's double-backward graph", "the same", "the same",
        lambda s: 4.25 * s.num_steps,
        lambda s: s.num_steps * s.state_bytes + 3 * s.activation_bytes, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="reverse")', "exact", lambda s: adjoints.Unrolled(mode="reverse"), BOTH, "none",
        "4.25 T at most", "√T states, the graph of √T steps", "double backward; any solver",
        f"{cite('Maclaurin et al. 2015', '1502.03492')}; {cite('Franceschi et al. 2017', '1703.01785')}",
        lambda s: 4.25 * s.num_steps,
        lambda s: graph_in_segments(s._replace(number=math.ceil(math.sqrt(s.num_steps)) or 1)), initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="graph")', "exact", lambda s: adjoints.Unrolled(mode="graph"), BOTH, "none",
        "3.25 T at most, the fastest", "the graph of all T steps", "no `torch.func` transform around it", "the same",
        lambda s: 3.25 * s.num_steps, graph, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="graph", segment=k)', "exact", lambda s: adjoints.Unrolled(mode="graph", segment=s.number), BOTH, "none",
        "4.25 T at most", "T / k states, the graph of k steps", "the same", cite("Chen et al. 2016", "1604.06174"),
        lambda s: 4.25 * s.num_steps, graph_in_segments, initial_params=True, path=True,
    ),
    Method(
        'Unrolled(mode="auto")', "exact", lambda s: adjoints.Unrolled(mode="auto"), BOTH, "none",
        "that of `graph` or of `mixed`, and 1", "the smaller of the two, to 10%", "nothing", "the same",
        lambda s: (3.25 if graph(s) < replayed(s, s.num_steps) else 5.25) * s.num_steps + 1,
        lambda s: min(graph(s), replayed(s, s.num_steps)), initial_params=True, path=True,
    ),
    Method(
        "Unrolled(offload=True)", "exact", lambda s: adjoints.Unrolled(offload=True), BOTH, "none",
        "5.25 T at most, and copies", "on the device one state, one step's activations; the rest on the host", "host memory", "the same",
        lambda s: 5.5 * s.num_steps, lambda s: s.state_bytes + 3 * s.activation_bytes, initial_params=True, path=True,
        limit=lambda s: "one state is no burden" if s.num_steps == 1 else None,
    ),
    Method(
        "Forward()", "exact", lambda s: adjoints.Forward(), HPARAMS, "none",
        "T (1 + 2 m) at most, m hparams scalars", "2 m states, one step's activations for m tangents; none of it grows with T",
        "few hparams; forward-mode AD of the step; any solver", cite("Franceschi et al. 2017", "1703.01785"),
        lambda s: s.num_steps * (1 + 2 * s.num_hparams),
        lambda s: 2 * s.num_hparams * s.state_bytes + (1 + s.num_hparams) * s.activation_bytes, path=True, limit=_tangents,
    ),
)  # fmt: skip
