"""The only generators of presets, schedules, models and optimizers that the property tests draw from."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from unfreeze_sched import FractionPreset, MilestonePreset, RatePreset, UnfreezeSchedule

scales = st.floats(min_value=1e-6, max_value=1.0)
total_blocks = st.integers(1, 12)
total_epochs = st.integers(1, 80)


@st.composite
def rate_presets(draw: st.DrawFn, epochs: int) -> RatePreset:
    return RatePreset(
        unfreeze_start_epoch=draw(st.integers(0, epochs - 1)),
        unfreeze_rate=draw(st.integers(1, 20)),
        learning_rate_scale=draw(scales),
    )


@st.composite
def milestone_presets(draw: st.DrawFn, epochs: int, blocks: int) -> MilestonePreset:
    # The first within the run; later ones may lie past its end.
    first = draw(st.integers(0, epochs - 1))
    later = draw(st.sets(st.integers(first + 1, epochs + 20), max_size=6))
    milestones = {epoch: draw(st.integers(0, blocks)) for epoch in [first, *sorted(later)]}
    return MilestonePreset(milestones=milestones, learning_rate_scale=draw(scales))


@st.composite
def fraction_presets(draw: st.DrawFn) -> FractionPreset:
    # Decimals such as a person writes, and arbitrary floats.
    shares = st.one_of(st.integers(0, 100).map(lambda percent: percent / 100), st.floats(0, 1, allow_subnormal=False))
    start, end = sorted(draw(st.tuples(shares, shares).filter(lambda pair: pair[0] != pair[1])))
    return FractionPreset(start=start, end=end, learning_rate_scale=draw(scales))


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[str, ...] = ("rate", "milestones", "fraction")) -> UnfreezeSchedule:
    blocks, epochs = draw(total_blocks), draw(total_epochs)
    presets: dict[str, st.SearchStrategy[Any]] = {
        "rate": rate_presets(epochs),
        "milestones": milestone_presets(epochs, blocks),
        "fraction": fraction_presets(),
    }
    preset = draw(st.one_of([presets[kind] for kind in kinds]))
    return UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=epochs)
