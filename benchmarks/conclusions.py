"""What the numbers of a problem say, in a sentence or three."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.measure import Row
from benchmarks.targets import least, right
from metacal.diagnostics.verdict import percent

NEAR = 0.5
"""Further off than this, relatively, an estimate is none of the number."""
NEAR_BEST = 0.005
"""Of accuracy: less than what another draw of the test data would change."""


def conclusion(rows: Sequence[Row]) -> str:
    """What the numbers of one problem say, in a sentence or three."""
    ran = [row for row in rows if row.get("seconds") is not None and row["kind"] != "limit"]
    if not ran:
        return "Nothing ran."
    exact = [row for row in ran if right(row)]
    said = []
    fastest, leanest = least(exact, "seconds"), least(exact, "peak_bytes")
    if fastest and leanest:
        said.append(
            f"Exact: {_who(fastest)} is the fastest, {fastest['seconds']:.3g} s{_over(fastest)}; {_who(leanest)} is the leanest, "
            f"{leanest['peak_bytes'] / 1e6:.3g} MB, in {leanest['seconds']:.3g} s."
        )
    peer, own = (least((r for r in exact if (r["library"] == "metacal") == mine), "seconds") for mine in (False, True))
    if peer and own:
        faster = own["seconds"] <= peer["seconds"]
        share = max(own["seconds"], peer["seconds"]) / min(own["seconds"], peer["seconds"])
        first, second = (own, peer) if faster else (peer, own)
        said.append(f"{_who(first)} is {share:.2f} times as fast as {_who(second)}.")
    cheaper = [r for r in ran if r["kind"] != "exact" and fastest and r["seconds"] < fastest["seconds"]]
    near = least(cheaper, "relative_error")
    if near and fastest:
        share, off = near["seconds"] / fastest["seconds"], _percent(near["relative_error"])
        if near["relative_error"] <= NEAR:
            said.append(f"Of what is cheaper than that, {_who(near)} is the nearest: off by {off} in {share:.2f} of the time.")
        else:
            said.append(f"Nothing cheaper is near: {_who(near)} is off by {off}.")
    elif fastest:
        said.append("Nothing approximate was cheaper.")
    solved = [r for r in ran if r["kind"] == "implicit" and r.get("solution_error") is not None]
    best = least(solved, "solution_error")
    if best:
        said.append(f"Against the solution's own hypergradient {_who(best)} is the nearest, {_percent(best['solution_error'])} off.")
    wrong = [f"{_who(row)} ({_percent(row.get('relative_error'))} off)" for row in ran if row["kind"] == "exact" and not right(row)]
    if wrong:
        said.append(f"Called exact, and not: {', '.join(wrong)}.")
    return " ".join(said)


def ends(rows: Iterable[Row]) -> list[Row]:
    """Of every course the last row."""
    return list({(row["problem"], row["method"]): row for row in rows}.values())


def course_conclusion(rows: Sequence[Row]) -> str:
    """Who learned most on one whole problem, and who came near that first."""
    learned = [row for row in rows if row.get("accuracy") is not None and row["outer_step"]]
    if not learned:
        return "Nothing ran."
    best = max(ends(learned), key=lambda row: (row["accuracy"], -row["seconds"]))
    first = min((row for row in learned if row["accuracy"] >= best["accuracy"] - NEAR_BEST), key=lambda row: row["seconds"])
    before = next((f" ({100 * row['accuracy']:.1f}% before)" for row in rows if row["library"] == "none"), "")
    return (
        f"{_who(best)} ends highest, at {100 * best['accuracy']:.1f}%{before} after {best['seconds']:.3g} s; {_who(first)} was the first "
        f"within half a point of that, after {first['seconds']:.3g} s."
    )


def _who(row: Row) -> str:
    return f"{row['method']} ({row['library']})" if row["library"] == "metacal" else str(row["method"])


def _over(row: Row) -> str:
    return f" or {row['over_plain_steps']:.2f} times the plain steps" if row.get("over_plain_steps") else ""


def _percent(x: float | None) -> str:
    return "an unknown amount" if x is None else percent(x)
