"""Splitting is a partition, the same for the same generator, and refuses what does not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metacal import tasks


@given(K=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_split_is_a_partition_that_keeps_samples_whole(K, n, seed):
    x = torch.arange(K * n * 3).reshape(K * n, 3)
    parts = tasks.split(x, K, generator=torch.Generator().manual_seed(seed))
    assert parts.shape == (K, n, 3)
    assert sorted(parts.flatten(0, 1).tolist()) == x.tolist()


def test_split_is_the_generators():
    x = torch.arange(64)

    def draw(seed):
        return tasks.split(x, 4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1).flatten(), x)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(tasks.split(x, 4), draw(1))
        assert not torch.equal(tasks.split(x, 4), draw(1))


def test_split_is_uniform_over_tasks():
    # Sample 0 lands in each of 4 tasks with probability 1/4: 2,000 draws, 5 standard deviations are 0.049.
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(8)
    first = torch.stack([(tasks.split(x, 4, generator=generator) == 0).any(1) for _ in range(2000)]).double().mean(0)
    assert (first - 0.25).abs().max() < 0.049


def test_split_follows_a_given_permutation_and_keeps_trees_together():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    batch = {"image": torch.arange(12.0).reshape(6, 2), "label": torch.arange(6)}
    parts = tasks.split(batch, 3, permutation=order)
    assert parts["label"].tolist() == [[5, 0], [3, 1], [4, 2]]
    assert torch.equal(parts["image"][..., 0], 2.0 * parts["label"])
    back = tasks.unsplit(parts, permutation=order)
    assert torch.equal(back["image"], batch["image"])
    assert torch.equal(back["label"], batch["label"])


def test_unsplit_without_a_permutation_concatenates_the_tasks():
    parts = torch.arange(12).reshape(3, 2, 2)
    assert torch.equal(tasks.unsplit(parts), torch.cat(list(parts)))


def test_split_is_differentiable():
    x = torch.randn(6, 2, dtype=torch.float64)
    weights = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    gradient = torch.func.grad(lambda x: (weights * tasks.split(x, 2, permutation=order)).sum())(x)
    assert torch.equal(gradient[order], weights.flatten(0, 1))


@pytest.mark.parametrize(("N", "K", "nearest"), [(250, 4, 248), (251, 4, 252), (3, 4, 4), (0, 4, 4), (1797, 4, 1796), (7, 5, 5)])
def test_split_names_the_nearest_batch_size(N, K, nearest):
    with pytest.raises(ValueError, match=rf"`num_tasks`.*N = {N} .*K = {K} .*nearest batch size that does is {nearest}\b") as error:
        tasks.split(torch.zeros(N), K)
    assert (f"x[:{nearest}]" in str(error.value)) == (0 < nearest < N)


def test_split_refuses_what_it_cannot_deal():
    with pytest.raises(ValueError, match=r"`num_tasks` should be at least 1, got 0"):
        tasks.split(torch.zeros(4), 0)
    with pytest.raises(ValueError, match=r"`x` should hold tensors that share.*'a': 4.*'b': 5"):
        tasks.split({"a": torch.zeros(4), "b": torch.zeros(5)}, 2)
    with pytest.raises(ValueError, match=r"`x` should hold tensors that share.*None"):
        tasks.split(torch.tensor(1.0), 2)
    for bad in (torch.tensor([0, 1, 1, 3]), torch.arange(5), torch.arange(1, 5)):
        with pytest.raises(ValueError, match=r"`permutation` should hold each of 0 ... 3 once"):
            tasks.split(torch.zeros(4), 2, permutation=bad)
    with pytest.raises(ValueError, match=r"`generator`.*`permutation`.*one of the two"):
        tasks.split(torch.zeros(4), 2, permutation=torch.arange(4), generator=torch.Generator())


@pytest.mark.parametrize(("by", "axis"), [("views", 2), ("samples", 1)])
@pytest.mark.parametrize("num_support", [None, 1, 3])
def test_support_and_query_are_the_two_parts_of_one_axis(by, axis, num_support):
    x = torch.randn(2, 5, 5, 3)  # an odd axis: the query has the larger half
    support, query = tasks.support_query(x, by=by, num_support=num_support)
    assert support.shape[axis] == (2 if num_support is None else num_support)
    assert torch.equal(torch.cat([support, query], axis), x)


def test_support_and_query_are_split_by_views_by_default_and_take_trees():
    x = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    support, query = tasks.support_query(x)
    assert torch.equal(support, x[:, :, :2])
    assert torch.equal(query, x[:, :, 2:])
    support, query = tasks.support_query({"x": x, "label": torch.arange(6).reshape(2, 3)}, by="samples")
    assert support["label"].tolist() == [[0], [3]]
    assert query["x"].shape == (2, 2, 4)


def test_support_query_refuses_empty_parts_and_missing_axes():
    x = torch.zeros(2, 3, 4)
    for by, size in (("views", 4), ("samples", 3)):
        for bad in (0, size, -1):
            with pytest.raises(ValueError, match=rf"`num_support`.*{size} {by} each, got {bad}. Use between 1 and {size - 1}"):
                tasks.support_query(x, by=by, num_support=bad)
    with pytest.raises(ValueError, match=r"`num_support`.*1 views.*at least two views"):
        tasks.support_query(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match=r"`x` at 'label' should have shape \[K, n, m, ...\], got \(2, 3\)"):
        tasks.support_query({"image": x, "label": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r'`by` should be "views" or "samples", got \'rows\''):
        tasks.support_query(x, by="rows")
