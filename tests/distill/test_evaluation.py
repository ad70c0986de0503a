"""The reference run's metric, and how its ranks share batches."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("segmentation_models_pytorch")

from unfreeze_sched.distill.command.ranks import Ranks
from unfreeze_sched.distill.command.training import mean_iou, pixel_counts, shares_of  # after the skip


def brute_force(predictions: list[int], masks: list[int], classes: int) -> float:
    """The mean IoU by sets of pixels."""
    pixels = [(i, t, p) for i, (t, p) in enumerate(zip(masks, predictions, strict=True)) if t != 255]
    ious = []
    for c in range(classes):
        truth, guess = {i for i, t, _ in pixels if t == c}, {i for i, _, p in pixels if p == c}
        if truth | guess:
            ious.append(len(truth & guess) / len(truth | guess))
    return sum(ious) / len(ious) if ious else math.nan


def logits_of(predictions: list[int], classes: int) -> torch.Tensor:
    """Logits (1, C, 1, W) whose largest is the predicted class's."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(predictions, dtype=torch.int64), classes)
    return one_hot.float().T[None, :, None]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    classes = draw(st.integers(2, 5) | st.just(255))
    index = st.integers(0, classes - 1)
    pixels = draw(st.lists(st.tuples(index, index | st.just(255)), min_size=1, max_size=24))
    return [p for p, _ in pixels], [t for _, t in pixels], classes


@given(cases())
def test_the_metric_is_its_brute_force_twin(case: tuple[list[int], list[int], int]) -> None:
    """The mean agrees with a count by sets: ignored pixels are out, absent classes too, predicted ones count as 0."""
    predictions, masks, classes = case
    counts = pixel_counts(logits_of(predictions, classes), torch.tensor(masks)[None, None], classes)
    assert mean_iou(counts) == pytest.approx(brute_force(predictions, masks, classes), rel=1e-12, nan_ok=True)


def test_counts_of_batches_add_up() -> None:
    """The counts over batches sum to those of the whole, and one channel tells two classes apart."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, generator=generator)
    masks = torch.randint(0, 3, (4, 5, 6), generator=generator)
    whole = pixel_counts(logits, masks, 3)
    assert torch.equal(whole, pixel_counts(logits[:1], masks[:1], 3) + pixel_counts(logits[1:], masks[1:], 3))
    assert (whole[0] + whole[2]).sum() == masks.numel()
    one = pixel_counts(torch.tensor([[[[1.0, -1.0, 2.0, 0.0]]]]), torch.tensor([[[1, 1, 0, 0]]]), 2)
    assert one.tolist() == [[1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares(world: int) -> None:
    """Shares of a training batch are disjoint and equally large, and leave out less than an image a rank."""
    for number in range(2 * world, 23):
        ranks = [shares_of(number, 2 * world, Ranks(rank, world)) for rank in range(world)]
        for shares in zip(*ranks, strict=True):
            assert len({len(share) for share in shares}) == 1
            assert len(shares[0]) >= 2
        places = sorted(chain(*chain(*ranks)))
        assert len(set(places)) == len(places) > number - 2 * world
        if world == 1:
            assert places == list(range(number - (number % 2)))
