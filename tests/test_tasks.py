"""Splitting is a partition, the same for the same generator, and refuses what does not divide."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
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
    masks = torch.tensor([2, 0, 3, 1], dtype=torch.uint8), torch.ones(4, dtype=torch.bool)  # as an index these pick by truth
    for bad in (torch.tensor([0, 1, 1, 3]), torch.arange(5), torch.arange(1, 5), *masks):
        with pytest.raises(ValueError, match=r"`permutation` should hold each of 0 ... 3 once"):
            tasks.split(torch.zeros(4), 2, permutation=bad)
    with pytest.raises(ValueError, match=r"`generator`.*`permutation`.*one of the two"):
        tasks.split(torch.zeros(4), 2, permutation=torch.arange(4), generator=torch.Generator())


def test_blocks_are_the_split_that_leaves_the_order_alone_and_share_memory():
    batch = {"image": torch.randn(12, 3), "label": torch.arange(12)}
    cut, dealt = tasks.blocks(batch, 4), tasks.split(batch, 4, permutation=torch.arange(12))
    assert all(torch.equal(cut[name], dealt[name]) for name in batch)
    assert cut["image"].data_ptr() == batch["image"].data_ptr()
    assert torch.equal(tasks.unsplit(cut)["label"], batch["label"])
    with pytest.raises(ValueError, match=r"N = 12 samples do not make K = 5 equal tasks"):
        tasks.blocks(batch, 5)


@settings(deadline=None)  # the first call imports scipy
@given(K=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_clusters_are_balanced_and_nothing_is_drawn(K, n, seed):
    x = torch.randn(K * n, 3, generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state()
    order = tasks.clusters(x, K)
    assert torch.equal(order, tasks.clusters(x, K))
    assert torch.equal(torch.get_rng_state(), before)
    parts = tasks.split(torch.arange(K * n), K, permutation=order)  # refuses what is no permutation
    assert torch.equal(parts, parts.sort(1).values)  # within a task samples keep their order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_planted_clusters_are_found(dtype):
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(5)[:4]
    member = torch.arange(4).repeat(8)[torch.randperm(32, generator=generator)]
    x = (centres[member] + torch.randn(32, 5, generator=generator)).to(dtype)
    found = member[tasks.clusters(x, 4)].reshape(4, 8)
    assert (found == found[:, :1]).all()
    assert sorted(found[:, 0].tolist()) == [0, 1, 2, 3]


def spread(x, order, K):
    """sum_i ||x_i - c_k(i)||^2"""
    parts = x[order].reshape(K, -1, x.shape[1])
    return (parts - parts.mean(1, keepdim=True)).square().sum().item()


def test_clustering_ends_where_no_other_balanced_assignment_is_nearer_to_the_centres():
    for seed in range(5):
        x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        spreads = [spread(x, tasks.clusters(x, 3, num_steps=steps), 3) for steps in (1, 2, 3, 20)]
        assert spreads == sorted(spreads, reverse=True) or max(a - b for a, b in zip(spreads[1:], spreads, strict=False)) < 1e-12
        order = tasks.clusters(x, 3, num_steps=20)
        centres = x[order].reshape(3, 2, 2).mean(1)
        places = torch.tensor(list(itertools.permutations([0, 0, 1, 1, 2, 2])))  # all assignments, each several times
        costs = (x - centres[places]).square().sum((1, 2))
        assert spread(x, order, 3) == pytest.approx(costs.min().item(), abs=1e-12)


def test_clusters_are_constants_to_differentiation_and_refuse_bad_features():
    x = torch.randn(6, 2, requires_grad=True)
    assert not tasks.clusters(x, 2).requires_grad
    with pytest.raises(ValueError, match=r"`features` should be finite.*diverged"):
        tasks.clusters(torch.tensor([[0.0], [float("nan")]]), 2)
    with pytest.raises(ValueError, match=r"`features` should be floating point of shape \[N, d\], got \(4,\)"):
        tasks.clusters(torch.zeros(4), 2)
    with pytest.raises(ValueError, match=r"N = 6 samples do not make K = 4"):
        tasks.clusters(x, 4)
    with pytest.raises(ValueError, match=r"`num_steps` should be at least 1, got 0"):
        tasks.clusters(x, 2, num_steps=0)


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
