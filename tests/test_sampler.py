"""The data order and the batch sizes that follow from the number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladir.config import TrainSettings
from training.runtime.sampler import BatchSizeError, DataOrder, MicroBatch, micro_batch_size
from training.runtime.schedule import Progress, learning_rate


def numbered(step_batch: list[MicroBatch]) -> list[tuple[int, int]]:
    """(number, index) of every sample of a step's batch."""
    return [pair for indices, numbers in step_batch for pair in zip(numbers, indices, strict=True)]


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(1, 8), st.integers(0, 2**31))
def test_any_number_of_ranks_sees_the_same_global_batches(samples: int, per_rank: int, world: int, most: int, seed: int) -> None:
    batch = per_rank * world
    for step in range(3):
        alone = DataOrder(samples, batch, seed).micro_batches(step * batch, 0, 1, micro_batch_size(batch, 1, most))
        micro = micro_batch_size(batch, world, most)
        shared = [DataOrder(samples, batch, seed).micro_batches(step * batch, rank, world, micro) for rank in range(world)]
        expected = sorted(numbered(alone))
        assert sorted(pair for step_batch in shared for pair in numbered(step_batch)) == expected
        assert [number for number, _ in expected] == list(range(step * batch, (step + 1) * batch))
        assert {len(step_batch) for step_batch in shared} == {per_rank // micro} and micro <= most


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([2, 3, 4]), st.integers(1, 8), st.integers(0, 2**31))
def test_known_lengths_change_only_who_gets_a_sample(samples: int, per_rank: int, world: int, most: int, seed: int) -> None:
    batch, lengths = per_rank * world, [(7 * i * i) % 41 for i in range(samples)]
    micro, order = micro_batch_size(batch, world, most), DataOrder(samples, batch, seed, lengths.__getitem__)
    alone, plain = order.micro_batches(batch, 0, 1, micro), DataOrder(samples, batch, seed)
    assert alone == plain.micro_batches(batch, 0, 1, micro)
    shared = [order.micro_batches(batch, rank, world, micro) for rank in range(world)]
    assert sorted(pair for step_batch in shared for pair in numbered(step_batch)) == sorted(numbered(alone))
    assert {len(part) for step_batch in shared for part, _ in step_batch} == {micro}
    assert all(numbers == sorted(numbers) for step_batch in shared for _, numbers in step_batch)


def test_ranks_get_equal_shares_of_the_work_in_every_pass() -> None:
    """Lengths as of DART-Math, roughly log-normal; the mean rank's work over the most that any has, summed over passes."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.7, 2000).astype(int)

    def balance(order: DataOrder, batch: int, ranks: int, micro: int) -> float:
        batches = [[order.micro_batches(step * batch, rank, ranks, micro) for rank in range(ranks)] for step in range(4)]
        work = np.array([[[lengths[indices].sum() for indices, _ in rank] for rank in step_batch] for step_batch in batches])
        return float(work.mean(axis=1).sum() / work.max(axis=1).sum())

    for batch, ranks, micro, before, after in ((64, 32, 2, 0.4, 0.45), (64, 8, 2, 0.55, 0.8), (256, 32, 2, 0.45, 0.75)):
        plain = DataOrder(2000, batch, 0)
        dealt = DataOrder(2000, batch, 0, lambda index: int(lengths[index]))
        assert balance(plain, batch, ranks, micro) < before
        assert balance(dealt, batch, ranks, micro) > after


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 9))
def test_no_sample_is_dropped_or_repeated_within_an_epoch(samples: int, batch: int, seed: int) -> None:
    order = DataOrder(samples, batch, seed)
    counts = Counter(order.index(number) for number in range(samples, 3 * samples))
    assert counts == Counter(dict.fromkeys(range(samples), 2))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    order = DataOrder(50, 10, 0)
    first, second = ([order.index(epoch * 50 + n) for n in range(50)] for epoch in (0, 1))
    other = [DataOrder(50, 10, 1).index(n) for n in range(50)]
    assert first != second and first != other and first != sorted(first)


def test_batches_that_ranks_cannot_share_name_valid_ones() -> None:
    with pytest.raises(BatchSizeError, match="use 9 or 12"):
        micro_batch_size(10, 3, 4)
    with pytest.raises(BatchSizeError, match="use 4"):
        micro_batch_size(2, 4, 4)
    with pytest.raises(ValueError, match="no training samples"):
        DataOrder(0, 4, 0)
    assert [micro_batch_size(24, 2, most) for most in (1, 2, 5, 8, 99)] == [1, 2, 4, 6, 12]


@given(st.sampled_from(["constant", "cosine", "linear", "wsd"]), st.floats(0, 1))
def test_learning_rate_stays_between_zero_and_the_peak(schedule: str, fraction: float) -> None:
    settings = TrainSettings(lr=2.0, schedule=schedule, warmup_fraction=0.1, min_lr_ratio=0.1)
    lr = learning_rate(settings, fraction)
    assert 0 <= lr <= 2.0 + 1e-9
    if fraction >= 0.1:
        assert lr >= 0.2 - 1e-9


def test_schedules_at_their_corners() -> None:
    settings = TrainSettings(lr=2.0, warmup_fraction=0.1, min_lr_ratio=0.1, decay_fraction=0.2)
    for schedule in ("cosine", "linear", "wsd"):
        settings.schedule = schedule
        assert learning_rate(settings, 0.05) == pytest.approx(1.0)
        assert learning_rate(settings, 0.1) == pytest.approx(2.0)
        assert learning_rate(settings, 1.0) == pytest.approx(0.2)
        assert learning_rate(settings, 1.7) == pytest.approx(0.2)
    assert learning_rate(settings, 0.8) == pytest.approx(2.0)
    assert learning_rate(settings, 0.9) == pytest.approx(1.1)


def test_progress_is_the_furthest_limit() -> None:
    progress = Progress(step=5, samples=40, seconds=3.0)
    assert progress.fraction(TrainSettings(max_steps=10, max_epochs=8.0, max_seconds=4.0), 10) == 0.75
    assert progress.fraction(TrainSettings(max_epochs=4.0), 10) == 1.0
    assert progress.after(8).fraction(TrainSettings(max_steps=10), 10) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="max_steps, max_epochs or max_seconds"):
        progress.fraction(TrainSettings(), 10)
