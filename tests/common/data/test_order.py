"""The order is a function of (seed, epoch, global index), however a batch is divided."""

from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest

from common.data.order import Division, Draw, Order, evaluation_batches, micro_batches
from common.errors import ConfigError


def stream(order, world, accumulation, batch_size, steps, first=0):
    """Global batches, put together again from all processes' micro-batches."""
    parts = [
        list(micro_batches(order, Division(batch_size, accumulation, world, rank), first, steps))
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1, "every rank has equally many micro-batches"
    for step in range(steps - first):
        micros = range(step * accumulation, (step + 1) * accumulation)
        yield list(chain.from_iterable(parts[rank][micro] for micro in micros for rank in range(world)))


@pytest.mark.parametrize("world, accumulation", [(1, 2), (2, 1), (2, 3), (3, 1), (8, 1), (5, 2)])
@pytest.mark.parametrize("batch_size", [32, 33])
def test_processes_and_accumulation_only_divide_a_batch(world, accumulation, batch_size):
    expected = list(stream(Order(101, seed=3), 1, 1, batch_size, 12))
    assert list(stream(Order(101, seed=3), world, accumulation, batch_size, 12)) == expected
    assert all(len(batch) == batch_size for batch in expected)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_sample_once_an_epoch(world):
    n, batch = 96, 16
    draws = list(chain.from_iterable(stream(Order(n, seed=0), world, 1, batch, 18)))
    for epoch in range(3):
        seen = [draw.sample for draw in draws if draw.epoch == epoch]
        assert sorted(seen) == list(range(n))
    assert draws[:n] != [Draw(0, d.sample) for d in draws[n : 2 * n]], "epochs differ in their order"


def test_epochs_join_without_a_gap_where_batches_cross_them():
    draws = list(chain.from_iterable(stream(Order(10, seed=0), 1, 1, 4, 10)))
    assert Counter(draws) == Counter(Draw(epoch, sample) for epoch in range(4) for sample in range(10))


def test_starting_late_continues_the_same_stream():
    expected = list(stream(Order(50, seed=1), 1, 1, 8, 20))
    assert list(stream(Order(50, seed=1), 3, 1, 8, 20, first=13)) == expected[13:]


def test_seeds_give_different_orders():
    assert [Order(50, 0)[i] for i in range(50)] != [Order(50, 1)[i] for i in range(50)]


def test_repeated_augmentation_draws_each_sample_three_times_in_a_row():
    order = Order(30, seed=0, repeats=3)
    epoch = [order[index] for index in range(30)]
    assert [draw.copy for draw in epoch] == [0, 1, 2] * 10
    assert set(Counter(draw.sample for draw in epoch).values()) == {3}


@pytest.mark.parametrize("world, accumulation", [(1, 3), (2, 2), (3, 1), (7, 1)])
def test_neighbours_stay_together(world, accumulation):
    for rank in range(world):
        for micro in range(accumulation):
            part = Division(64, accumulation, world, rank).micro_batch(micro)
            assert part.start % 2 == 0
            assert part.stop % 2 == 0
            assert part.stop > part.start


def test_a_batch_too_small_to_divide_is_an_error():
    with pytest.raises(ConfigError, match="expected at least 12"):
        Division(8, accumulation=2, world=3)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 30, 97])
def test_evaluation_sees_every_sample_once_in_equally_many_batches(world, samples):
    ranks = [list(evaluation_batches(samples, 8, world, rank)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    (size,) = {len(batch) for rank in ranks for batch in rank}
    assert size <= 8
    assert sum(draw is None for rank in ranks for batch in rank for draw in batch) < len(ranks[0]) * world
    seen = [draw.sample for rank in ranks for batch in rank for draw in batch if draw is not None]
    assert sorted(seen) == list(range(samples))


def test_an_epoch_is_shuffled_as_a_whole():
    """Rank correlation of positions: of a random permutation its deviation is 1/√(n − 1)."""
    n = 50_000
    samples = np.arange(n)
    epochs = [Order(n, seed=1).table(range(epoch * n, (epoch + 1) * n))[:, 1] for epoch in range(4)]
    places = [np.argsort(epoch) for epoch in epochs]
    bound = 4 / np.sqrt(n - 1)
    for place in places:
        assert abs(np.corrcoef(samples, place)[0, 1]) < bound  # with the order in the files
        assert (
            abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < bound
        )  # neighbours in the files are not neighbours
    for one, other in combinations(places, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound  # epochs with each other


def test_a_batch_of_sorted_data_has_all_classes():
    n, classes, batch = 50_000, 10, 500
    labels = np.arange(n) * classes // n
    drawn = labels[Order(n, seed=2).table(range(n))[:, 1]].reshape(-1, batch)
    counts = np.stack([(drawn == label).sum(1) for label in range(classes)], axis=1)
    # Drawn without regard to the class, a count has the mean 50 and the deviation √(500 · 0.1 · 0.9) = 6.7.
    assert 0.9 < counts.std() / np.sqrt(batch * 0.1 * 0.9) < 1.1
    assert counts.min() > 15
