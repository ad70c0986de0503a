"""Broken states of an unfreezer: each is refused in one line with nothing changed, or loads as what it holds."""

from __future__ import annotations

import collections
import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import JUNK, all_of, broken, flat, places, seeded
from oracle import Net

from unfreeze_sched import MilestonePreset, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger

ODD = [*JUNK, np.ones(2), torch.ones(2), object(), {1, 2}, iter([1]), 2 * (1 << 63), "x" * 10_000, b"x" * 10_000, ...]
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
DOWN = MilestonePreset(milestones={1: 1, 2: 3, 3: 1, 4: 2})


def new_unfreezer(**keywords: Any) -> tuple[ProgressiveUnfreezer, Net]:
    net = Net()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    schedule = UnfreezeSchedule(preset=DOWN, total_blocks=3, total_epochs=6)
    if "caps" in keywords:
        keywords = {**keywords, "caps": [kind(patience=1) for kind in keywords["caps"]]}
    return ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, **keywords), net


KEYWORDS: dict[str, dict[str, Any]] = {
    "late": {},
    "declared": {"membership": "declared"},
    "drop, no decay": {"on_refreeze": "drop", "no_decay": True},
    "caps": {"caps": [OverfitGuard, PlateauTrigger]},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KEYWORDS)
@pytest.mark.parametrize("begun", [False, True])
def test_broken_states_of_an_unfreezer(kind: str, *, begun: bool, strict: bool) -> None:
    """A state that is not as it was saved is a TypeError or ValueError of one short line, and changes nothing."""
    draw, counts, keywords = seeded(f"{kind}{begun}{strict}"), collections.Counter[str](), KEYWORDS[kind]
    saving, _ = new_unfreezer(**keywords)
    for epoch in range(4):
        saving.apply(epoch)
        for cap in saving.caps:
            cap.step(1.0 + epoch)
    good = saving.state_dict()

    def renew() -> tuple[ProgressiveUnfreezer, Net, dict[str, Any]]:
        unfreezer, net = new_unfreezer(**keywords)
        if begun:
            unfreezer.apply(2)
            net(torch.ones(2, 4).double()).sum().backward()
            unfreezer.rebuilder.optimizer.step()
            unfreezer.rebuilder.optimizer.zero_grad()
        return unfreezer, net, dict(flat(all_of(unfreezer, net, unfreezer.rebuilder.optimizer)))

    unfreezer, net, before = renew()
    # The numbers of blocks apart, which are most of what can still be right.
    states = [broken(good, draw, ODD) for _ in range(150)]
    states += [({**good, "applied": [draw.randrange(-1, 5), draw.randrange(-1, 5)]}, ["applied"]) for _ in range(10)]
    for index in range(len(list(places(good)))):  # too deep to be printed, in each place
        deep = copy.deepcopy(good)
        path, box, key = list(places(deep))[index]
        box[key] = DEEP
        states.append((deep, [f"deep {path}"]))
    states += [(thing, [type(thing).__name__]) for thing in (*ODD, DEEP)]
    for state, done in states:
        try:
            unfreezer.load_state_dict(state, strict=strict)
        except (TypeError, ValueError) as error:
            text = str(error)
            assert re.fullmatch("`(state_dict|saved|total).{,3000}", text), (done, text)
            assert dict(flat(all_of(unfreezer, net, unfreezer.rebuilder.optimizer))) == before, done
            counts["refused"] += 1
            continue
        counts["loaded"] += 1
        saved_now = unfreezer.state_dict()
        if state["applied"] is not None:
            number, peak = state["applied"]
            assert saved_now["applied"] == [number, peak], done
            trainable = [all(p.requires_grad for p in block.parameters()) for block in unfreezer.blocks]
            assert trainable == [index >= 3 - number for index in range(3)]
        if strict:
            assert saved_now["schedule"] == state["schedule"], done
        assert saved_now["blocks"] == state["blocks"], done
        unfreezer.apply(5)
        unfreezer, net, before = renew()
    print(f"{kind}, begun={begun}, strict={strict}: {sum(counts.values())} states, {dict(counts)}")  # noqa: T201  # pytest -rP shows it
    assert counts["refused"] > 50
    assert counts["loaded"]
