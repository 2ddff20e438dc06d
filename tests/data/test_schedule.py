"""Order, cut and learning rate are functions of the step; here against their definitions."""

import math

import pytest

from nanodpo.data.schedule import epoch_order, learning_rate, micro_batches_of, pairs_of_step, steps_of


def test_an_epoch_is_a_permutation_that_does_not_change():
    """The literal order pins it across versions and machines: a resumed or repeated run must see the same pairs."""
    assert epoch_order(8, 42, 0) == epoch_order(8, 42, 0) and sorted(epoch_order(100, 1, 3)) == list(range(100))
    assert len({epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert epoch_order(8, 42, 0) == (1, 2, 5, 7, 6, 0, 3, 4)


@pytest.mark.parametrize("n, per_step", [(11, 4), (12, 4), (3, 4), (1, 1), (7, 7)])
def test_each_epoch_visits_every_pair_once(n, per_step):
    steps = math.ceil(n / per_step)
    for epoch in range(3):
        windows = [pairs_of_step(n, per_step, 42, epoch * steps + i) for i in range(steps)]
        assert sorted(i for window in windows for i in window) == list(range(n))
        assert [len(w) for w in windows[:-1]] == [per_step] * (steps - 1)


@pytest.mark.parametrize("n", range(1, 14))
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_equal_counts_and_every_pair_counts_once(n, batch, world):
    """The same number of forward passes on every rank; the extra ones weigh nothing."""
    dealt = [micro_batches_of(list(range(n)), batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    counted = [i for batches in dealt for indices, factor in batches for i in indices if factor == 1.0]
    assert sorted(counted) == list(range(n))
    assert all(factor in (0.0, 1.0) and len(indices) <= batch for batches in dealt for indices, factor in batches)


def test_learning_rates_by_hand():
    rates = [learning_rate(step, 10, 1.0, 2, "cosine") for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert [learning_rate(step, 4, 2.0, 0, "linear") for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert {learning_rate(step, 4, 2.0, 0, "constant") for step in range(4)} == {2.0}


@pytest.mark.parametrize("epochs, per_epoch, steps", [(1.1, 50, 55), (2.2, 25, 55), (1.0, 7, 7), (0.5, 7, 4),
                                                        (1e-9, 7, 1)])
def test_epochs_come_to_steps_without_rounding_up_dust(epochs, per_epoch, steps):
    """1.1 * 50 is 55.00000000000001 in binary; half of seven steps is four."""
    assert steps_of(-1, epochs, per_epoch) == steps and steps_of(3, epochs, per_epoch) == 3
