"""The order of training: complete, of one modality, independent of the number of processes, resumable."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmoe_fast.train.sampler import ModalityLengthSampler, steps_per_epoch


def make(lengths, images, *, world_size=1, rank=0, batch_size=2, accumulation=2, **options):
    options = {"seed": 3, "steps": 4} | options
    return ModalityLengthSampler(
        lengths, images, batch_size=batch_size, accumulation=accumulation, world_size=world_size, rank=rank, **options
    )


@given(
    images=st.lists(st.booleans(), min_size=1, max_size=60),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    megabatch=st.integers(1, 3),
)
def test_an_epoch_shows_every_sample_and_repeats_less_than_a_batch(images, batch_size, accumulation, megabatch):
    size = batch_size * accumulation
    lengths = [7 * i % 13 for i in range(len(images))]
    sampler = make(lengths, images, batch_size=batch_size, accumulation=accumulation, megabatch=megabatch)
    batches = sampler.epoch_batches(0)
    counts = Counter(sample for batch in batches for sample in batch)
    assert all(len(batch) == size for batch in batches)
    assert set(counts) == set(range(len(images)))
    assert sum(counts.values()) - len(images) < size
    assert len(batches) == steps_per_epoch(images, size)
    # Mixed batches only from what is left over of each modality, which is less than a batch of each.
    assert sum(len({images[i] for i in batch}) > 1 for batch in batches) <= 2


@given(world_size=st.sampled_from([1, 2, 4]), accumulation=st.sampled_from([1, 2]))
def test_processes_share_the_batches_that_one_would_take(world_size, accumulation):
    lengths, images = [5 * i % 17 for i in range(37)], [i % 3 > 0 for i in range(37)]
    whole = make(lengths, images, batch_size=8, accumulation=1, steps=12)
    parts = [
        list(
            make(
                lengths,
                images,
                batch_size=8 // world_size // accumulation,
                accumulation=accumulation,
                world_size=world_size,
                rank=rank,
                steps=12,
            )
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert sorted(sample for part in parts for m in micro for sample in part[m]) == sorted(batch)


@pytest.mark.parametrize("first_step", [1, 7, 11])  # inside the first epoch, at its end (7 steps), in the second
def test_resumes_at_any_step(first_step):
    lengths, images = list(range(26)), [i < 13 for i in range(26)]
    assert steps_per_epoch(images, 4) == 7
    whole = list(make(lengths, images, steps=14))
    resumed = make(lengths, images, steps=14, first_step=first_step)
    assert list(resumed) == whole[first_step * 2 :]
    assert len(resumed) == len(list(resumed))


def test_epochs_and_seeds_differ():
    lengths, images = [1] * 32, [True] * 32
    orders = [make(lengths, images, seed=seed).epoch_batches(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4


def test_batches_are_sorted_by_length():
    lengths = [31 * i % 64 for i in range(64)]
    spread = {}
    for megabatch in (1, 8):
        batches = make(lengths, [True] * 64, batch_size=8, accumulation=1, megabatch=megabatch).epoch_batches(0)
        assert all(sorted(batch, key=lambda i: -lengths[i]) == batch for batch in batches)
        spread[megabatch] = max(lengths[batch[0]] - lengths[batch[-1]] for batch in batches)
    assert spread[8] == 7  # sorted as a whole: each batch of 8 holds 8 neighbouring lengths
    assert spread[1] > 30
