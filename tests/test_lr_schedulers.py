"""A group that joins late follows every LR scheduler as if it had been there from the start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from unfreeze_sched import Block, OptimizerRebuilder
from unfreeze_sched import lr_schedulers as rows

Ratios = list[float]
BASE = 0.25
# SequentialLR steps a chain within it once while it is made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning"),
]


@dataclass(frozen=True)
class Recipe:
    """How to make the schedulers of an optimizer whose groups stand at these ratios to the first, and what to expect.

    A scheduler's scalar peaks are the template's, so an optimizer of several groups is given the list of theirs.
    """

    name: str
    make: Callable[[torch.optim.Optimizer, Ratios], list[Any]]
    momentum: bool = False

    def __repr__(self) -> str:
        return self.name


def halved(epoch: int) -> float:
    return 0.5 ** (epoch // 3)


def wobble(epoch: int) -> float:
    return 1 + 0.25 * math.sin(epoch)


def peaks(value: float, ratios: Ratios) -> list[float]:
    return [value * ratio for ratio in ratios]


def cosine(optimizer: torch.optim.Optimizer, floor: float = 0.0, period: int = 7) -> Any:
    return lrs.CosineAnnealingLR(optimizer, period, eta_min=floor)


def sequential(optimizer: torch.optim.Optimizer, parts: list[Any], milestones: list[int]) -> list[Any]:
    return [lrs.SequentialLR(optimizer, parts, milestones)]


RECIPES = [
    Recipe("Lambda", lambda o, r: [lrs.LambdaLR(o, halved)]),
    Recipe("Lambda, a list", lambda o, r: [lrs.LambdaLR(o, [wobble] * len(r))]),
    Recipe("Multiplicative", lambda o, r: [lrs.MultiplicativeLR(o, wobble)]),
    Recipe("Step", lambda o, r: [lrs.StepLR(o, 3, gamma=0.3)]),
    Recipe("MultiStep", lambda o, r: [lrs.MultiStepLR(o, [2, 2, 9], gamma=0.3)]),
    Recipe("Constant", lambda o, r: [lrs.ConstantLR(o, factor=0.3, total_iters=6)]),
    Recipe("Linear", lambda o, r: [lrs.LinearLR(o, start_factor=0.2, total_iters=8)]),
    Recipe("Exponential", lambda o, r: [lrs.ExponentialLR(o, 0.9)]),
    Recipe("Polynomial", lambda o, r: [lrs.PolynomialLR(o, 10, power=2)]),
    Recipe("CosineAnnealing", lambda o, r: [cosine(o)]),
    Recipe("CosineAnnealing, eta_min", lambda o, r: [cosine(o, 0.02)]),
    Recipe("CosineAnnealing at its eta_min", lambda o, r: [cosine(o, BASE)]),
    Recipe("WarmRestarts", lambda o, r: [lrs.CosineAnnealingWarmRestarts(o, 3, T_mult=2)]),
    Recipe("WarmRestarts, eta_min", lambda o, r: [lrs.CosineAnnealingWarmRestarts(o, 4, eta_min=0.02)]),
    Recipe("Cyclic", lambda o, r: [lrs.CyclicLR(o, peaks(0.1, r), peaks(0.5, r), 3, 4, cycle_momentum=False)]),
    Recipe("Cyclic, momentum", lambda o, r: [lrs.CyclicLR(o, peaks(0.1, r), peaks(0.5, r), 3)], momentum=True),
    Recipe("Cyclic, triangular2", lambda o, r: [lrs.CyclicLR(o, peaks(0.1, r), peaks(0.5, r), 2, mode="triangular2")]),
    Recipe("Cyclic, exp_range",
           lambda o, r: [lrs.CyclicLR(o, peaks(0.1, r), peaks(0.5, r), 2, mode="exp_range", gamma=0.9)]),
    Recipe("OneCycle", lambda o, r: [lrs.OneCycleLR(o, peaks(0.5, r), total_steps=40)], momentum=True),
    Recipe("OneCycle, no momentum",
           lambda o, r: [lrs.OneCycleLR(o, peaks(0.5, r), total_steps=40, cycle_momentum=False, three_phase=True)]),
    Recipe("Plateau", lambda o, r: [lrs.ReduceLROnPlateau(o, factor=0.5, patience=1)]),
    Recipe("Plateau, a list", lambda o, r: [lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=[1e-9] * len(r))]),
    Recipe("SWALR", lambda o, r: [SWALR(o, peaks(0.05, r), anneal_epochs=5)]),
    Recipe("Step and SWALR", lambda o, r: [lrs.StepLR(o, 4), SWALR(o, peaks(0.05, r), anneal_epochs=5)]),
    Recipe("Step and Plateau", lambda o, r: [lrs.StepLR(o, 4), lrs.ReduceLROnPlateau(o, patience=2)]),
    Recipe("Sequential", lambda o, r: sequential(o, [lrs.LinearLR(o, 0.1, total_iters=4), cosine(o)], [4])),
    Recipe("Sequential, eta_min",
           lambda o, r: sequential(o, [lrs.LinearLR(o, 0.1, total_iters=4), cosine(o, 0.02)], [4])),
    Recipe("Sequential, eta_min first",
           lambda o, r: sequential(o, [cosine(o, 0.02), lrs.ExponentialLR(o, 0.9), lrs.LambdaLR(o, halved)], [4, 9])),
    Recipe("Sequential, restarts",
           lambda o, r: sequential(o, [lrs.ConstantLR(o, 0.5, 3), lrs.CosineAnnealingWarmRestarts(o, 4, eta_min=0.02)], [3])),
    Recipe("Chained", lambda o, r: [lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=4), cosine(o)])]),
    Recipe("Chained of one, eta_min", lambda o, r: [lrs.ChainedScheduler([cosine(o, 0.02)])]),
    Recipe("Chained, two deep", lambda o, r: [lrs.ChainedScheduler(
        [lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.95), lrs.StepLR(o, 5)]), lrs.LambdaLR(o, halved)])]),
    Recipe("Sequential in a chain", lambda o, r: [lrs.ChainedScheduler(
        [lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.9)], [5]), lrs.MultiplicativeLR(o, wobble)])]),
    Recipe("Chain in a sequence", lambda o, r: sequential(
        o, [lrs.ChainedScheduler([lrs.LinearLR(o, 0.2, total_iters=3), lrs.StepLR(o, 2)]), cosine(o, 0.02)], [5])),
]  # fmt: skip
TIMM = pytest.importorskip("timm.scheduler")
NOISE = {"noise_range_t": (3, 9), "noise_pct": 0.3}
RECIPES += [
    Recipe("timm Cosine", lambda o, r: [TIMM.CosineLRScheduler(o, 9, cycle_limit=3, cycle_decay=0.5, warmup_t=4)]),
    Recipe("timm Cosine, noise", lambda o, r: [TIMM.CosineLRScheduler(o, 12, warmup_t=3, warmup_prefix=True, **NOISE)]),
    Recipe("timm MultiStep", lambda o, r: [TIMM.MultiStepLRScheduler(o, [5, 9], decay_rate=0.3, warmup_t=3)]),
    Recipe("timm Plateau", lambda o, r: [TIMM.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1, warmup_t=3)]),
    Recipe("timm Plateau, noise", lambda o, r: [TIMM.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1, **NOISE)]),
    Recipe("timm Poly", lambda o, r: [TIMM.PolyLRScheduler(o, 20, power=2.0)]),
    Recipe("timm Step", lambda o, r: [TIMM.StepLRScheduler(o, 4, decay_rate=0.3, warmup_t=2)]),
    Recipe("timm Tanh", lambda o, r: [TIMM.TanhLRScheduler(o, 20, warmup_t=4)]),
    Recipe("timm Tanh, prefix", lambda o, r: [TIMM.TanhLRScheduler(o, 20, warmup_t=4, warmup_prefix=True)]),
    Recipe("timm WSD", lambda o, r: [TIMM.wsd_lr.WSDLRScheduler(o, 20, decay_t=6, warmup_t=4)]),
]
HF = pytest.importorskip("transformers.optimization")
RECIPES += [
    Recipe(f"transformers {name}", lambda o, r, name=name, arguments=arguments: [getattr(HF, name)(o, **arguments)])
    for name, arguments in {
        "get_constant_schedule": {},
        "get_reduce_on_plateau_schedule": {"patience": 1, "factor": 0.5},
        "get_constant_schedule_with_warmup": {"num_warmup_steps": 4},
        "get_linear_schedule_with_warmup": {"num_warmup_steps": 4, "num_training_steps": 30},
        "get_cosine_schedule_with_warmup": {"num_warmup_steps": 4, "num_training_steps": 30},
        "get_cosine_with_hard_restarts_schedule_with_warmup": {
            "num_warmup_steps": 4, "num_training_steps": 30, "num_cycles": 3},
        "get_polynomial_decay_schedule_with_warmup": {"num_warmup_steps": 4, "num_training_steps": 30, "lr_end": 1e-7},
        "get_inverse_sqrt_schedule": {"num_warmup_steps": 4},
        "get_cosine_with_min_lr_schedule_with_warmup": {
            "num_warmup_steps": 4, "num_training_steps": 30, "min_lr_rate": 0.1},
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": {
            "num_warmup_steps": 4, "num_training_steps": 30, "min_lr_rate": 0.1},
        "get_wsd_schedule": {"num_warmup_steps": 4, "num_decay_steps": 8, "num_training_steps": 30},
    }.items()
]  # fmt: skip
# What only declared groups can follow at another scale: a floor in a product, a plateau at its floor, and timm's floors
# and common first rate, which keep no count from which to tell how far they are.
REFUSED = [
    Recipe("Chained, eta_min", lambda o, r: [lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=4), cosine(o, 0.02)])]),
    Recipe("cosine with eta_min beside another", lambda o, r: [lrs.StepLR(o, 4), cosine(o, 0.02)]),
    Recipe("a product after eta_min",
           lambda o, r: sequential(o, [cosine(o, 0.02), lrs.MultiplicativeLR(o, wobble)], [1])),
    Recipe("Plateau at min_lr", lambda o, r: [lrs.ReduceLROnPlateau(o, factor=0.1, patience=0, min_lr=0.02)]),
    Recipe("timm Cosine, lr_min", lambda o, r: [TIMM.CosineLRScheduler(o, 20, lr_min=0.01)]),
    Recipe("timm Cosine, warmup_lr_init",
           lambda o, r: [TIMM.CosineLRScheduler(o, 20, warmup_t=12, warmup_lr_init=0.003)]),
    Recipe("timm Poly, lr_min", lambda o, r: [TIMM.PolyLRScheduler(o, 20, lr_min=0.01, warmup_t=3)]),
    Recipe("timm Tanh, both", lambda o, r: [TIMM.TanhLRScheduler(o, 20, lr_min=0.01, warmup_t=3, warmup_lr_init=0.002)]),
    Recipe("timm WSD, both",
           lambda o, r: [TIMM.wsd_lr.WSDLRScheduler(o, 20, decay_t=14, lr_min=0.01, warmup_t=3, warmup_lr_init=0.002)]),
    Recipe("Plateau at eps", lambda o, r: [lrs.ReduceLROnPlateau(o, factor=0.1, patience=0, eps=0.02)]),
]  # fmt: skip


def metric(step: int) -> float:
    """A validation loss that stalls now and then."""
    return 1 / (1 + step // 4)


class Twins:
    """An optimizer whose groups join late, and one that had them from the start."""

    def __init__(
        self, recipe: Recipe, ratios: Ratios, *, tensor: bool = False, adam: bool = False, membership: str = "late"
    ) -> None:
        # Ratios of the blocks are those of a scale and a decay: deepest first.
        self.ratios = [1.0, *ratios]
        self.parameters = [nn.Parameter(torch.zeros(1)) for _ in self.ratios]
        self.oracle = self.make(self.ratios, self.parameters, tensor=tensor, adam=adam)
        self.ours = self.make([1.0], self.parameters[:1], tensor=tensor, adam=adam)
        self.oracle_schedulers = recipe.make(self.oracle, self.ratios)
        self.schedulers = recipe.make(self.ours, [1.0])
        for parameter in self.parameters[1:]:
            parameter.requires_grad_(False)
        blocks = [Block(f"block{i}", (p,)) for i, p in enumerate(self.parameters[1:])][::-1]
        scale = ratios[0]
        decay = ratios[1] / ratios[0] if len(ratios) > 1 else 1.0
        self.rebuilder = OptimizerRebuilder(
            self.ours, blocks, self.schedulers, scale, decay, membership=membership  # type: ignore[arg-type]
        )  # fmt: skip
        self.steps = 0

    @staticmethod
    def make(ratios: Ratios, parameters: list[nn.Parameter], *, tensor: bool, adam: bool) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": torch.tensor(BASE * r, dtype=torch.float64) if tensor else BASE * r}
            for p, r in zip(parameters, ratios, strict=True)
        ]
        return torch.optim.AdamW(groups) if adam else torch.optim.SGD(groups, momentum=0.9)

    def join(self, number: int) -> None:
        for parameter in self.parameters[1 : number + 1]:
            parameter.requires_grad_(True)
        self.rebuilder.sync()

    def step(self) -> None:
        for optimizer, schedulers in ((self.ours, self.schedulers), (self.oracle, self.oracle_schedulers)):
            optimizer.step()
            for scheduler in schedulers:
                if isinstance(scheduler, lrs.ReduceLROnPlateau):
                    scheduler.step(metric(self.steps))
                elif hasattr(scheduler, "base_values"):
                    scheduler.step(self.steps + 1, metric(self.steps))
                else:
                    scheduler.step()
        self.steps += 1

    def differences(self, relative: float) -> list[str]:
        found: list[str] = []
        joined = len(self.ours.param_groups)
        for index, (group, twin) in enumerate(zip(self.ours.param_groups, self.oracle.param_groups, strict=False)):
            for key in twin.keys() - {"params"}:
                compare(f"group {index}, {key}", group.get(key), twin[key], relative, found)
        for scheduler, twin in zip(self.schedulers, self.oracle_schedulers, strict=True):
            compare("state", plain(scheduler.state_dict()), plain(twin.state_dict()), relative, found, joined)
        return found


def plain(value: Any) -> Any:
    """A state without functions and other schedulers' objects."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not callable(v) and k not in {"lr_scheduler", "optimizer"}}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value if not callable(v)]
    return value


def compare(where: str, ours: Any, theirs: Any, relative: float, found: list[str], joined: int | None = None) -> None:
    """Note where two states differ; a list of the oracle's may be longer by the groups that are still to join."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            found.append(f"{where} has keys {sorted(ours)} and {sorted(theirs)}")
        for key in ours.keys() & theirs.keys():
            compare(f"{where}, {key}", ours[key], theirs[key], relative, found, joined)
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs) and len(ours) != joined:
            found.append(f"{where} has {len(ours)} entries for {joined} groups")
        for index, pair in enumerate(zip(ours, theirs, strict=False)):
            compare(f"{where}[{index}]", *pair, relative, found, joined)
    elif isinstance(theirs, (float, torch.Tensor)) and isinstance(ours, (int, float, torch.Tensor)):
        if not math.isclose(float(ours), float(theirs), rel_tol=relative, abs_tol=0):
            found.append(f"{where}: {float(ours)!r} and {float(theirs)!r}")
    elif ours != theirs:
        found.append(f"{where}: {ours!r} and {theirs!r}")


def run(twins: Twins, joins: dict[int, int], steps: int, relative: float) -> list[str]:
    """Step both, letting groups join ours; the first differences, or none."""
    for step in range(steps):
        if step in joins:
            twins.join(joins[step])
        if found := twins.differences(relative):
            return [f"before step {step}: {text}" for text in found]
        twins.step()
    return twins.differences(relative)


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("kind", ["sgd", "adam", "tensor"])
def test_every_scheduler(recipe: Recipe, kind: str) -> None:
    """Groups joining before steps 0, 3, 4 and 11 have the oracle's rates, momenta and states at every later step."""
    if kind == "tensor" and recipe.name.startswith("timm Plateau"):
        pytest.skip("timm takes the tensor itself for its base, and its plateau then fills it in place")
    for ratios, relative in (
        ([1.0] * 4, 0.0),
        ([0.5, 0.25, 0.125, 0.0625], 1e-12),
        ([0.1, 0.07, 0.049, 0.0343], 1e-12),
    ):
        twins = Twins(recipe, ratios, tensor=kind == "tensor", adam=kind != "sgd")
        assert run(twins, {0: 1, 3: 2, 4: 3, 11: 4}, 25, relative) == []


@pytest.mark.parametrize("recipe", REFUSED, ids=repr)
def test_what_only_declared_groups_can_follow(recipe: Recipe) -> None:
    """Late joins at another scale are refused with the way out and change nothing; at scale 1, and declared, all is exact."""
    twins = Twins(recipe, [0.1])
    assert run(twins, {}, 8, 0.0) == []
    before = copy.deepcopy((twins.ours.state_dict(), [plain(s.state_dict()) for s in twins.schedulers]))
    with pytest.raises(
        ValueError,
        match=r"`learning_rate_scale` must be 1 to join late where a \w+ with a floor of .* has played .*; pass membership='declared'",
    ):
        twins.join(1)
    assert (twins.ours.state_dict(), [plain(s.state_dict()) for s in twins.schedulers]) == before
    assert run(Twins(recipe, [1.0]), {8: 1}, 25, 0.0) == []
    assert run(Twins(recipe, [0.1], membership="declared"), {8: 1}, 25, 1e-12) == []
    assert run(Twins(recipe, [0.1]), {0: 1}, 25, 1e-12) == []  # nothing has happened before the first step


@pytest.mark.parametrize("recipe", [*RECIPES, *REFUSED], ids=repr)
def test_declared_groups_on_a_scheduler_that_exists(recipe: Recipe) -> None:
    """Empty groups declared to a scheduler at its first value follow it exactly, whenever they are filled."""
    assert run(Twins(recipe, [0.1, 0.07], membership="declared"), {5: 2}, 25, 1e-12) == []


def double_a_base(twins: Twins) -> None:
    for scheduler in twins.schedulers:
        for part in rows._parts(scheduler):
            if hasattr(part, "base_lrs"):
                part.base_lrs[-1] *= 1 + 1e-9


def forget_the_row(twins: Twins) -> None:
    for group in twins.ours.param_groups[1:]:
        group["lr"] = BASE * 0.5


@pytest.mark.parametrize("mutation", [double_a_base, forget_the_row])
@pytest.mark.parametrize("name", ["CosineAnnealing, eta_min", "OneCycle", "Sequential", "Chained"])
def test_the_comparison_can_fail(name: str, mutation: Any) -> None:
    """A base off by a billionth, or a rate that missed the past, is found."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    twins = Twins(recipe, [0.5])
    assert run(twins, {5: 1}, 6, 1e-12) == []
    mutation(twins)
    assert run(twins, {}, 3, 1e-12) != []


@st.composite
def drawn_schedulers(draw: st.DrawFn) -> Recipe:
    """A leaf with drawn arguments, a sequence or a chain of such leaves; floors only where late joins can follow them."""
    whole, share = st.integers(1, 12), st.floats(0.05, 1.0)

    def leaf(*, floors: bool) -> tuple[str, Callable[[Any, Ratios], Any]]:
        name = draw(st.sampled_from(["lambda", "multiplicative", "step", "multistep", "constant", "linear",
                                     "exponential", "polynomial", "cosine", "restarts"]))  # fmt: skip
        n, x, floor = draw(whole), draw(share), draw(st.sampled_from([0.0, 0.01, 0.3])) if floors else 0.0
        table: dict[str, Callable[[Any, Ratios], Any]] = {
            "lambda": lambda o, r: lrs.LambdaLR(o, lambda e: x ** (e % n)),
            "multiplicative": lambda o, r: lrs.MultiplicativeLR(o, lambda e: 1 - x / (n + e)),
            "step": lambda o, r: lrs.StepLR(o, n, x),
            "multistep": lambda o, r: lrs.MultiStepLR(o, [n, n + 2], x),
            "constant": lambda o, r: lrs.ConstantLR(o, x, n),
            "linear": lambda o, r: lrs.LinearLR(o, x, 1.0, n),
            "exponential": lambda o, r: lrs.ExponentialLR(o, x),
            "polynomial": lambda o, r: lrs.PolynomialLR(o, n, 2 * x),
            "cosine": lambda o, r: lrs.CosineAnnealingLR(o, n + 1, floor),
            "restarts": lambda o, r: lrs.CosineAnnealingWarmRestarts(o, n, 1 + n % 2, floor),
        }
        return f"{name}({n}, {x}, {floor})", table[name]

    kind = draw(st.sampled_from(["leaf", "sequential", "chained"]))
    if kind == "leaf":
        name, make = leaf(floors=True)
        return Recipe(name, lambda o, r: [make(o, r)])
    parts = [leaf(floors=False) for _ in range(draw(st.integers(2, 3)))]
    name = f"{kind} of {', '.join(name for name, _ in parts)}"
    if kind == "chained":
        return Recipe(name, lambda o, r: [lrs.ChainedScheduler([make(o, r) for _, make in parts])])
    milestones = sorted(draw(st.sets(st.integers(1, 14), min_size=len(parts) - 1, max_size=len(parts) - 1)))
    return Recipe(f"{name} at {milestones}", lambda o, r: sequential(o, [make(o, r) for _, make in parts], milestones))


@settings(max_examples=80)
@given(
    recipe=drawn_schedulers(),
    scale=st.floats(0.01, 1.0),
    decay=st.floats(0.2, 1.0),
    joins=st.lists(st.integers(0, 18), min_size=3, max_size=3).map(sorted),
)
def test_drawn_schedulers(recipe: Recipe, scale: float, decay: float, joins: list[int]) -> None:
    """Any scheduler, arguments, scale, decay and join steps: the oracle's rates, to rounding."""
    ratios = [scale * decay**depth for depth in range(3)]
    by_step = {step: 1 + max(i for i, other in enumerate(joins) if other == step) for step in joins}
    assert run(Twins(recipe, ratios), by_step, 22, 1e-12) == []
    assert run(Twins(recipe, [1.0] * 3), by_step, 22, 0.0) == []
