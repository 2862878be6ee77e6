"""The table of methods: every row makes what it says, costs what it says, and stands in the README."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metacal
from metacal import adjoints, linear, optim, single_loop
from metacal.cli import main
from metacal.diagnostics import measure, work
from metacal.registry import FAMILIES, METHODS, Method, Setting, markdown_table, method, written
from problems import F64, Tree, close

ROOT = Path(__file__).parents[1]
SETTING = Setting(number=3, step_size=0.1, penalty=5.0, num_batches=2)

# A ridge regression in matrices, so that torch's flop registry sees all that is done.
X, Y = torch.sin(torch.arange(96, dtype=F64)).reshape(32, 3), torch.cos(torch.arange(32, dtype=F64))[:, None]
PARAMS, HPARAMS = {"w": torch.full((3, 1), 0.3, dtype=F64)}, {"decay": torch.full((3, 1), 0.2, dtype=F64)}
DATA = (X, Y)


def inner(w: Tree, h: Tree, batch: Any) -> torch.Tensor:
    x, y = batch
    return ((x @ w["w"] - y) ** 2).mean() + (h["decay"] * w["w"] ** 2).sum()


def outer(w: Tree, h: Tree, batch: Any) -> torch.Tensor:
    x, y = batch
    return ((x @ w["w"] - y - 0.5) ** 2).mean()


def setting() -> Setting:
    module = nn.Linear(3, 1, bias=False).double()
    return SETTING._replace(
        module=module,
        loss=nn.MSELoss(),
        model=lambda w, h, b: (b[0] @ w["w"], w["w"]),
        outputs_loss=lambda out, h, b: ((out[0] - b[1]) ** 2).mean() + (h["decay"] * out[1] ** 2).sum(),
    )


ADJOINTS = [row for row in METHODS if row.family in ("exact", "approximate", "implicit")]
LOOPS = [row for row in METHODS if row.family == "single loop"]
CODE = {"ids": lambda row: row.code}


@pytest.mark.parametrize("row", ADJOINTS, **CODE)
def test_an_adjoint_is_made_and_estimates_what_its_row_says(row: Method) -> None:
    if "KFAC" in row.code:
        pytest.importorskip("curvlinops")
        assert isinstance(row.make(setting()).solver, linear.KFAC)
        return
    adjoint = row.make(setting())
    assert isinstance(adjoint, adjoints.Adjoint)
    solver = metacal.descent(inner, optim.sgd(0.1))
    hg = metacal.hypergradient(outer, solver, adjoint)(solver.init(PARAMS, HPARAMS), HPARAMS, [DATA] * 6, DATA)
    assert torch.isfinite(hg.hparams["decay"]).all()
    assert bool(metacal.tree.leaves(hg.params)) == row.initial_params
    assert ("initial params" in row.estimates) == row.initial_params


@pytest.mark.parametrize("row", [row for row in ADJOINTS if row.kind in ("exact", "solution")], **CODE)
def test_exact_rows_are_exact_and_rows_of_a_solution_tend_to_it(row: Method) -> None:
    steps = 4 if row.kind == "exact" else 60
    chosen = setting()._replace(number=50 if "Neumann" in row.code else 6)
    solver = metacal.descent(inner, optim.sgd(0.7))
    problem = solver.init(PARAMS, HPARAMS), HPARAMS, [DATA] * steps, DATA
    truth = metacal.hypergradient(outer, solver, adjoints.Unrolled())(*problem).hparams
    found = metacal.hypergradient(outer, solver, row.make(chosen._replace(step_size=0.7)))(*problem).hparams
    close(found, truth, 1e-10 if row.kind == "exact" else 1e-6)


@pytest.mark.parametrize("row", [row for row in ADJOINTS if "KFAC" not in row.code and "auto" not in row.code], **CODE)
def test_work_is_what_the_row_says(row: Method) -> None:
    """Counted operations against the formula: an upper bound where it says "at most", else equal but for the solver's own vectors."""
    solver = metacal.descent(inner, optim.sgd(0.1))
    state, batches = solver.init(PARAMS, HPARAMS), [DATA] * 9
    estimate = metacal.hypergradient(outer, solver, row.make(setting()))
    sizes = measure(solver, state, HPARAMS, batches, number=SETTING.number)
    unit = work(lambda: solver.step(state, HPARAMS, DATA))
    counted = (work(lambda: estimate(state, HPARAMS, batches, DATA)) - unit) / unit  # less the outer gradient
    assert unit > 0
    most = row.work(sizes)
    assert (0.55 * most if "at most" in row.cost or row.family != "implicit" else most - 5) <= counted <= most + 0.5
    if "Krylov" in [base.__name__ for base in type(getattr(estimate.adjoint, "solver", None)).__mro__] and "Gauss" not in row.code:
        products = 2 * SETTING.number if row.code.startswith(("Implicit(linear.NormalCG", "Implicit(linear.BiCGSTAB")) else SETTING.number
        products += "preconditioner" in row.code
        # What is above a whole number are GMRES's own vectors.
        assert counted == pytest.approx(9 + products + 1, abs=0.75), "no product is wasted: each is one gradient of this linear model"


@pytest.mark.parametrize("row", LOOPS, **CODE)
def test_a_loop_is_made_and_takes_its_batches(row: Method) -> None:
    solver, T = metacal.descent(inner, optim.sgd(0.1)), 2
    optimizer = row.make(outer, solver, optim.sgd(0.01), setting())
    assert isinstance(optimizer, metacal.BilevelOptimizer)
    num = row.batches_per_step(T, SETTING.number)
    indexed = "index" in row.needs
    batches, judged = [(0, DATA) if indexed else DATA] * num, (0, DATA) if indexed else DATA
    state = optimizer.init(PARAMS, HPARAMS)
    for _ in range(2):  # linear variables start at zero, and so does their part of the first hypergradient
        state, hg = optimizer.step(state, batches, judged)
    assert torch.isfinite(hg.hparams["decay"]).all()
    # The smallest penalty that makes the gap fall may be none at all: then the hparams wait.
    assert row.code == "bome()" or not torch.equal(state.hparams["decay"], HPARAMS["decay"])
    assert not torch.equal(state.inner.params["w"], optimizer.init(PARAMS, HPARAMS).inner.params["w"])
    if "es(" not in row.code:
        sizes = measure(solver, solver.init(PARAMS, HPARAMS), HPARAMS, [DATA] * T, number=SETTING.number)
        torch.manual_seed(1)  # of those that draw how long a series is
        spent = sum(work(lambda: optimizer.step(state, batches, judged)) for _ in range(10)) / 10
        unit = work(lambda: solver.step(solver.init(PARAMS, HPARAMS), HPARAMS, DATA))
        limit = row.work(sizes) + (SETTING.number if "mean" in row.cost else 0.01)
        assert 0.3 * row.work(sizes) <= spent / unit <= limit


@pytest.mark.parametrize("row", [row for row in METHODS if row.family == "initialisation"], **CODE)
def test_an_initialisation_is_learned(row: Method) -> None:
    plain = lambda w, h, b: inner(w, {"decay": torch.tensor(0.2)}, b)  # noqa: E731
    if "proximal" in row.code:
        solver = metacal.proximal(plain, optim.sgd(0.1), 1.0, anchor=lambda initial: initial)
    else:
        solver = metacal.descent(plain, optim.sgd(0.1))
    optimizer = row.make(lambda w, h, b: outer(w, {}, b), solver, optim.sgd(0.1), setting())
    state = optimizer.init(PARAMS, {})
    moved, _ = optimizer.step(state, [DATA] * 3, DATA)
    assert not torch.equal(moved.inner.params["w"], PARAMS["w"])


def test_every_method_of_the_library_has_a_row() -> None:
    """What the namespaces export, and what no row makes."""
    made = [row.make(setting()) for row in ADJOINTS if "KFAC" not in row.code]
    kinds = {type(a) for a in made} | {type(a.solver) for a in made if isinstance(a, adjoints.Implicit)} | {linear.KFAC}
    bases = {adjoints.Adjoint, linear.LinearSolver, linear.Krylov, linear.Preconditioner}
    for namespace, base in ((adjoints, adjoints.Adjoint), (linear, linear.LinearSolver)):
        exported = {value for _, value in inspect.getmembers(namespace, inspect.isclass) if issubclass(value, base)}
        assert exported - bases <= kinds, "a row is missing"
    algorithms = {name for name, value in inspect.getmembers(single_loop, inspect.isfunction) if not name.startswith("_")}
    rows = {row.code.split("(")[0] for row in LOOPS}
    assert algorithms <= rows
    assert {"soba", "saba", "amigo", "stocbio", "fsla", "ttsa", "mrbo", "sustain", "f2sa", "bome", "pbgd", "scalebio", "es", "pes"} <= rows


def test_a_row_says_everything() -> None:
    assert len({row.code for row in METHODS}) == len(METHODS)
    for row in METHODS:
        for column in ("estimates", "bias", "cost", "memory", "needs", "reference"):
            text = getattr(row, column)
            assert text, (row.code, column)
            assert "|" not in text
        assert (row.kind == "exact") == (row.bias == "none"), row.code
        assert row.family in FAMILIES
        assert row.by_hand or row.symmetric == bool(re.search("symmetric|definite", row.needs)), row.code
    for numbers in re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", markdown_table()):
        assert numbers[0] == numbers[1]
        assert re.fullmatch(r"\d{4}\.\d{4,5}", numbers[0])


def test_rows_are_found_by_their_code() -> None:
    assert method("Unrolled()").family == "exact"
    with pytest.raises(ValueError, match="`code` should be one of the table's"):
        method("Unroled()")
    with pytest.raises(ValueError, match="`setting` should hold the network"):
        method("Implicit(linear.KFAC(module, loss))").make(Setting())


def test_the_table_has_a_line_per_row() -> None:
    for family in FAMILIES:
        header, rule, *lines = markdown_table(family).splitlines()
        assert header == "| method | estimates | bias | cost | memory | needs | reference |"
        assert rule.count("---") == 7
        assert [line.split("`")[1] for line in lines] == [row.code for row in METHODS if row.family == family]
        assert all(line.count("|") == 8 for line in lines)
    assert all(markdown_table(family) in markdown_table() for family in FAMILIES)
    with pytest.raises(ValueError, match="`family` should be one of"):
        markdown_table("none")  # type: ignore[arg-type]


def test_the_table_is_written_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- methods-table -->\nold\n<!-- /methods-table -->\n\nafter\n")
    assert main(["methods", "--write", str(page)]) == 0
    text = page.read_text()
    assert text == f"before\n\n<!-- methods-table -->\n{markdown_table()}\n<!-- /methods-table -->\n\nafter\n"
    assert written(text) == text
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == markdown_table() + "\n"
    with pytest.raises(ValueError, match="`text` should hold one <!-- methods-table -->"):
        written("no markers")


def test_the_readme_holds_the_table_of_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written(text) == text, "run: metacal methods --write README.md"
