"""A state machine drives the real optimizer beside a model that knows only names."""

from __future__ import annotations

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import Net

from unfreeze_sched import OptimizerRebuilder
from unfreeze_sched.model.freezing import freeze, unfreeze
from unfreeze_sched.optimizer.groups import BLOCK_KEY

BLOCKS = 3
block_indices = st.integers(0, BLOCKS - 1)


class RebuilderMachine(RuleBasedStateMachine):
    """Freezing, unfreezing, stepping, syncing, saving and loading, in any order.

    The trusted side is `steps`: the name of each parameter in the optimizer -> how often AdamW has stepped it, None
    before the first; and `order`: the blocks in the order in which they got their groups.
    """

    @initialize(on_refreeze=st.sampled_from(["keep", "drop"]), decay=st.sampled_from([1.0, 0.5]))
    def begin(self, on_refreeze: str, decay: float) -> None:
        torch.manual_seed(0)
        self.net = Net(BLOCKS)
        self.keywords = {"learning_rate_scale": 0.5, "layer_decay": decay, "on_refreeze": on_refreeze}
        self.optimizer = torch.optim.AdamW(self.net.head.parameters(), lr=0.25, weight_decay=0.1)
        self.rebuilder = OptimizerRebuilder(self.optimizer, self.net.make_blocks(), **self.keywords)  # type: ignore[arg-type]
        self.head = self.optimizer.param_groups[0]
        self.names = {id(p): name for name, p in self.net.named_parameters()}
        self.trainable = {name for name, _ in self.net.named_parameters()}
        self.steps: dict[str, int | None] = {"head.weight": None, "head.bias": None}
        self.order: list[int] = []

    def names_of(self, index: int) -> list[str]:
        return [f"blocks.{index}.{name}" for name, _ in self.net.blocks[index].named_parameters()]

    @rule(index=block_indices)
    def freeze(self, index: int) -> None:
        freeze(self.rebuilder.blocks[index])
        self.trainable -= set(self.names_of(index))

    @rule(index=block_indices)
    def unfreeze(self, index: int) -> None:
        unfreeze(self.rebuilder.blocks[index])
        self.trainable |= set(self.names_of(index))

    @rule(index=block_indices, place=st.integers(0, 3))
    def freeze_one_parameter(self, index: int, place: int) -> None:
        name = self.names_of(index)[place]
        parameter = self.net.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.grad = None
        self.trainable.discard(name)

    @rule()
    def step(self) -> None:
        before = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.net(torch.ones(2, 4).double()).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, p in self.net.named_parameters():
            p.grad = None  # also of what is trainable and not in the optimizer yet
            moves = name in self.steps and name in self.trainable
            assert torch.equal(p, before[name]) is not moves
            if moves:
                self.steps[name] = (self.steps[name] or 0) + 1

    @rule()
    def sync(self) -> None:
        change = self.rebuilder.sync()
        added, dropped = [], []
        for index in reversed(range(BLOCKS)):
            new = [name for name in self.names_of(index) if name in self.trainable and name not in self.steps]
            if new and (index not in self.order or any(name in self.steps for name in self.names_of(index))):
                self.order.append(index)
            added += new
            if self.keywords["on_refreeze"] == "drop":
                dropped += [n for n in self.names_of(index) if n in self.steps and n not in self.trainable]
        self.steps.update(dict.fromkeys(added))
        for name in dropped:
            del self.steps[name]
        assert (list(change.added), list(change.dropped)) == (added, dropped)
        assert not self.rebuilder.sync()

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh: bool) -> None:
        state = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.load_state_dict(state)
        self.head = self.optimizer.param_groups[0]
        if fresh:
            self.rebuilder = OptimizerRebuilder(self.optimizer, self.net.make_blocks(), **self.keywords)  # type: ignore[arg-type]

    @invariant()
    def the_optimizer_holds_what_the_model_says(self) -> None:
        groups = self.optimizer.param_groups
        held = [self.names[id(p)] for group in groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == set(self.steps)
        assert groups[0] is self.head
        for name, steps in self.steps.items():
            state = self.optimizer.state.get(self.net.get_parameter(name), {})
            assert (int(state["step"]) if state else None) == steps

    @invariant()
    def groups_stand_in_order_at_their_rates(self) -> None:
        groups = self.optimizer.param_groups[1:]
        tags = [group[BLOCK_KEY] for group in groups]
        assert list(dict.fromkeys(tags)) == [f"block{i}" for i in dict.fromkeys(self.order)]
        for group in groups:
            index = int(group[BLOCK_KEY].removeprefix("block"))
            assert group["lr"] == 0.25 * 0.5 * float(self.keywords["layer_decay"]) ** (BLOCKS - 1 - index)
            assert group["weight_decay"] == 0.1


TestRebuilder = RebuilderMachine.TestCase
TestRebuilder.settings = settings(max_examples=40, stateful_step_count=25)
