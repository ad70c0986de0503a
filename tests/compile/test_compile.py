"""Unfreezing under `torch.compile`: no stale graph, no fall back to eager, over more transitions than torch's limit."""

from __future__ import annotations

import copy
import inspect
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import Net
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.optim import lr_scheduler

from unfreeze_sched import Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule, encoder_blocks

pytestmark = [
    pytest.mark.skipif(
        not {"recompile_limit", "isolate_recompiles"} <= inspect.signature(torch.compile).parameters.keys(),
        reason="torch.compile takes recompile_limit from torch 2.12 on, isolate_recompiles from 2.13 on",
    ),
    # Dynamo itself looks at the `.grad` of a compiled stage's input.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STAGES = 12
SCHEDULE = UnfreezeSchedule(
    preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=STAGES, total_epochs=STAGES + 2
)
Forward = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def torchs_own_limit() -> Iterator[None]:
    """The optimizers of timm raise it for the whole process where they are imported."""
    with config.patch(recompile_limit=8):
        yield


class Stages(nn.Module):
    """Stages of different widths, as an encoder's are, each with a norm that has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(4 + i, 5 + i, bias=False), nn.BatchNorm1d(5 + i)) for i in range(STAGES)
        )
        self.head = nn.Linear(4 + STAGES, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    def make_blocks(self) -> list[Block]:
        return [Block(f"stage{i}", (stage,), (f"stages.{i}",)) for i, stage in enumerate(self.stages)]


class Counted:
    """A backend that counts the graphs that it is given."""

    def __init__(self, name: str) -> None:
        self.graphs = 0
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No test finds what another compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_unfreezer(model: Stages) -> tuple[torch.optim.Optimizer, ProgressiveUnfreezer]:
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    return optimizer, ProgressiveUnfreezer(model.make_blocks(), optimizer, SCHEDULE, None)


def whole(model: Stages, backend: Any) -> Forward:
    return torch.compile(model, backend=backend, fullgraph=True, recompile_limit=4 * (STAGES + 1))


def by_stage(model: Stages, backend: Any) -> Forward:
    for stage in model.stages:
        stage.compile(backend=backend, fullgraph=True, isolate_recompiles=True)
    return model


def with_resets(model: Stages, backend: Any) -> Forward:
    return torch.compile(model, backend=backend, fullgraph=True)


def shared_limit(model: Stages, backend: Any) -> Forward:
    for stage in model.stages:
        stage.compile(backend=backend, fullgraph=True)
    return model


def difference(model: Stages, twin: Stages, live: tuple[str, ...], relative: float) -> str:
    """What differs first in gradients, weights and buffers; only `live` parameters are to have a gradient."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=relative, atol=relative) if relative else torch.equal(a, b)

    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if (p.grad is not None) != name.startswith(live):
            return f"{name} has {'a' if p.grad is not None else 'no'} gradient"
        if p.grad is not None and not same(p.grad, q.grad):  # type: ignore[arg-type]
            return f"another gradient of {name}"
    values = twin.state_dict()
    return next((f"another {name}" for name, value in model.state_dict().items() if not same(value, values[name])), "")


def compare(
    wrap: Callable[[Stages, Any], Forward], backend: Any, *, relative: float = 0.0, epochs: int = STAGES + 2
) -> list[str]:
    """Train a compiled model and its eager twin through all transitions; what differs first, or nothing.

    To the bit, or in float64 up to a `relative` difference. Which parameters have a gradient is known from the schedule
    alone. In mid-run a forward pass in evaluation is compared as well.
    """
    kind = torch.float64 if relative else torch.float32
    torch.manual_seed(0)
    model = Stages().to(kind)
    twin = copy.deepcopy(model)
    optimizer, unfreezer = make_unfreezer(model)
    twin_optimizer, twin_unfreezer = make_unfreezer(twin)
    forward = wrap(model, backend)
    for epoch in range(epochs):
        change = unfreezer.apply(epoch)
        twin_unfreezer.apply(epoch)
        if change and wrap is with_resets:
            torch.compiler.reset()
        live = ("head.", *(f"stages.{i}." for i in range(STAGES - min(epoch, STAGES), STAGES)))
        for step in range(2):
            x, y = torch.randn(8, 4, dtype=kind), torch.randn(8, 2, dtype=kind)
            for net, run, opt in ((model, forward, optimizer), (twin, twin, twin_optimizer)):
                net.train()
                opt.zero_grad()
                (run(x) - y).square().mean().backward()
                opt.step()
            if found := difference(model, twin, live, relative):
                return [f"epoch {epoch}, step {step}: {found}"]
        if epoch == STAGES // 2:
            model.eval()
            twin.eval()
            with torch.no_grad():
                torch.testing.assert_close(forward(x), twin(x), rtol=relative, atol=relative)
    return []


@pytest.mark.parametrize("wrap", [whole, by_stage])
def test_gradients_at_each_transition(wrap: Callable[[Stages, Any], Forward]) -> None:
    """Over 12 transitions a compiled model has its eager twin's gradients and statistics to the bit, from new graphs.

    `aot_eager` runs the same kernels from a traced backward pass; `fullgraph` makes torch's limit an error.
    """
    backend = Counted("aot_eager" if wrap is by_stage else "eager")
    assert compare(wrap, backend) == []
    assert backend.graphs > STAGES


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["inductor", "aot_eager"])
@pytest.mark.parametrize("wrap", [whole, by_stage, with_resets])
def test_gradients_at_each_transition_slow(name: str, wrap: Callable[[Stages, Any], Forward]) -> None:
    """The same with the whole model's backward pass traced, and with inductor, whose fused kernels round otherwise."""
    backend = Counted(name)
    assert compare(wrap, backend, relative=1e-9 if name == "inductor" else 0.0) == []
    assert backend.graphs > STAGES


def test_the_limit_is_an_error_under_fullgraph() -> None:
    """Stages that are compiled one by one share torch's limit of 8 unless they are isolated, since they share code."""
    with pytest.raises(FailOnRecompileLimitHit):
        compare(shared_limit, "eager")


def test_the_limit_falls_back_to_eager() -> None:
    """Without fullgraph the ninth phase of a whole model runs eagerly, rightly and slowly; only torch's log says so."""
    backend = Counted("eager")
    assert compare(lambda model, _: torch.compile(model, backend=backend), None, epochs=11) == []
    assert backend.graphs == config.recompile_limit


def test_a_stale_graph_is_noticed() -> None:
    """The comparison fails for a graph that is used past a transition: here torch is told to leave its guards out."""

    def stale(model: Stages, backend: Any) -> Forward:
        compiled = torch.compile(model, backend=backend)

        def forward(x: Tensor) -> Tensor:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return compiled(x)

        model.train()
        compiled(torch.randn(8, 4))
        return forward

    assert compare(stale, "aot_eager") != []


@pytest.mark.parametrize("inside", [False, True])
def test_blocks_of_a_compiled_model(inside: bool) -> None:
    """The blocks of a compiled model, or of one whose stages are, hold the model's own parameters by their own names."""
    model = Stages()
    expected = [(block.name, list(block.named_parameters())) for block in encoder_blocks(model, head=model.head)]
    wrapped = by_stage(model, "eager") if inside else torch.compile(model, backend="eager")
    found = [(block.name, list(block.named_parameters())) for block in encoder_blocks(wrapped, head=model.head)]  # type: ignore[arg-type]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert all(p is q for (_, p), (_, q) in zip(ours, theirs, strict=True))


# The compiled step.


class Weights(Net):
    """Twelve blocks of one matrix each, since a compiled step grows with the number of tensors."""

    def __init__(self) -> None:
        super().__init__(0, dtype=torch.float32)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(STAGES))


def train_with_step(
    wrap: Callable[[torch.optim.Optimizer, list[Any]], Callable[[], Any]],
    make: Callable[..., torch.optim.Optimizer],
    lr: Any,
    *,
    warmup: int = 0,
    epochs: int = SCHEDULE.total_epochs,
    steps: int = 4,
) -> tuple[list[dict[str, Tensor]], list[list[float]]]:
    """Train through the transitions with a step of one's own; weights and learning rates after each."""
    torch.manual_seed(0)
    model = Weights()
    optimizer = make(model.head.parameters(), lr=copy.deepcopy(lr))
    schedulers = [lr_scheduler.CosineAnnealingLR(optimizer, 100)]
    unfreezer = ProgressiveUnfreezer(model.make_blocks(), optimizer, SCHEDULE, schedulers, warmup_steps=warmup)
    step = wrap(optimizer, schedulers)
    weights, rates = [], []
    for epoch in range(epochs):
        unfreezer.apply(epoch)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - torch.randn(8, 2)).square().mean().backward()
            step()
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return weights, rates


def eager_step(optimizer: torch.optim.Optimizer, schedulers: list[Any]) -> Callable[[], Any]:
    def step() -> None:
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    return step


def momentum(parameters: Any, lr: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def compiled_step(backend: Any, *, whole: bool) -> Callable[[torch.optim.Optimizer, list[Any]], Callable[[], Any]]:
    """The optimizer's step compiled by itself, or a function that steps optimizer and scheduler."""

    def wrap(optimizer: torch.optim.Optimizer, schedulers: list[Any]) -> Callable[[], Any]:
        limit = 8 * (STAGES + 1)
        if whole:
            return torch.compile(eager_step(optimizer, schedulers), backend=backend, recompile_limit=limit)
        step = torch.compile(optimizer.step, backend=backend, recompile_limit=limit)

        def both() -> None:
            step()
            for scheduler in schedulers:
                scheduler.step()

        return both

    return wrap


@pytest.mark.parametrize(
    ("make", "lr", "whole"),
    [
        (momentum, 0.01, False),
        pytest.param(momentum, torch.tensor(0.01), True, marks=pytest.mark.slow),
        pytest.param(torch.optim.AdamW, 0.01, False, marks=pytest.mark.slow),
        pytest.param(torch.optim.AdamW, torch.tensor(0.01), True, marks=pytest.mark.slow),
    ],
)
@config.patch(fail_on_recompile_limit_hit=True)
def test_a_compiled_step(make: Any, lr: Any, whole: bool) -> None:
    """Over 12 transitions with warm-up and cosine a compiled step has the eager step's rates to the bit, and weights.

    SGD's weights at a float rate are equal to the bit. With a tensor rate, and in AdamW, whose bias correction becomes
    a tensor under the compiler, torch rounds in another order.
    """
    backend = Counted("eager")
    weights, rates = train_with_step(compiled_step(backend, whole=whole), make, lr, warmup=3)
    expected, expected_rates = train_with_step(eager_step, make, lr, warmup=3)
    assert rates == expected_rates
    assert backend.graphs > STAGES
    exact = make is momentum and isinstance(lr, float)
    for ours, theirs in zip(weights, expected, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0 if exact else 1e-5)


def test_a_warm_up_does_not_recompile_each_step() -> None:
    """A longer warm-up costs a compiled step no more graphs: torch turns a rate that changes into an input."""
    graphs = []
    for warmup in (4, 20):
        backend = Counted("eager")
        torch.compiler.reset()
        train_with_step(compiled_step(backend, whole=False), momentum, 0.01, warmup=warmup, epochs=3, steps=24)
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1] < 24


def test_the_probe_under_a_compiled_step() -> None:
    """A compiled step still reports, once and by name, what was unfrozen and has no gradient."""

    class Dead(Weights):
        def forward(self, x: Tensor) -> Tensor:
            for block in list(self.blocks)[:-1]:
                x = x + block(x)
            return self.head(x)

    model = Dead()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.01)
    unfreezer = ProgressiveUnfreezer(model.make_blocks(), optimizer, SCHEDULE, None)
    step = torch.compile(optimizer.step, backend="eager", recompile_limit=32)
    found = []
    for epoch in range(3):
        unfreezer.apply(epoch)
        for _ in range(2):
            model(torch.randn(4, 4)).sum().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
            found += [(epoch, str(w.message)) for w in caught if "no gradient reached" in str(w.message)]
            optimizer.zero_grad()
    assert [(epoch, f"blocks.{STAGES - 1}.weight" in text) for epoch, text in found] == [(1, True)]
