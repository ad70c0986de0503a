"""LR schedulers x ways to join: what a group that joins late gets, against one that was there from the start.

`Twins` steps an optimizer whose groups join late beside one that had them from the start, under equal schedulers, and
compares every rate, momentum and state. `benchmarks/conformance.py` renders the table; the tests go over many
more join steps and ratios.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.scheduler
import timm.scheduler.wsd_lr
import torch
import transformers.optimization
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from unfreeze_sched import Block, OptimizerRebuilder

Ratios = list[float]
BASE = 0.25
RATIO = 0.1
JOIN_AT, STEPS = 5, 25


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


def swa(optimizer: torch.optim.Optimizer, ratios: Ratios) -> Any:
    return SWALR(optimizer, peaks(0.05, ratios), anneal_epochs=5)  # type: ignore[arg-type]  # it takes lists as well


def sequential(optimizer: torch.optim.Optimizer, parts: list[Any], milestones: list[int]) -> list[Any]:
    return [lrs.SequentialLR(optimizer, parts, milestones)]


RECIPES: list[Recipe] = [
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
    Recipe("SWALR", lambda o, r: [swa(o, r)]),
    Recipe("Step and SWALR", lambda o, r: [lrs.StepLR(o, 4), swa(o, r)]),
    Recipe("Step and Plateau", lambda o, r: [lrs.StepLR(o, 4), lrs.ReduceLROnPlateau(o, patience=2)]),
    Recipe("Sequential", lambda o, r: sequential(o, [lrs.LinearLR(o, 0.1, total_iters=4), cosine(o)], [4])),
    Recipe("Sequential, eta_min",
           lambda o, r: sequential(o, [lrs.LinearLR(o, 0.1, total_iters=4), cosine(o, 0.02)], [4])),
    Recipe("Sequential, eta_min first",
           lambda o, r: sequential(o, [cosine(o, 0.02), lrs.ExponentialLR(o, 0.9), lrs.LambdaLR(o, halved)], [4, 9])),
    Recipe("Sequential, a product after eta_min",
           lambda o, r: sequential(o, [cosine(o, 0.02), lrs.MultiplicativeLR(o, wobble)], [2])),
    Recipe("Sequential, SWALR after eta_min", lambda o, r: sequential(o, [cosine(o, 0.02), swa(o, r)], [2])),
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
NOISE = {"noise_range_t": (3, 9), "noise_pct": 0.3}
RECIPES += [
    Recipe(
        "timm Cosine", lambda o, r: [timm.scheduler.CosineLRScheduler(o, 9, cycle_limit=3, cycle_decay=0.5, warmup_t=4)]
    ),
    Recipe(
        "timm Cosine, noise",
        lambda o, r: [timm.scheduler.CosineLRScheduler(o, 12, warmup_t=3, warmup_prefix=True, **NOISE)],
    ),
    Recipe("timm MultiStep", lambda o, r: [timm.scheduler.MultiStepLRScheduler(o, [5, 9], decay_rate=0.3, warmup_t=3)]),
    Recipe(
        "timm Plateau", lambda o, r: [timm.scheduler.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1, warmup_t=3)]
    ),
    Recipe(
        "timm Plateau, noise",
        lambda o, r: [timm.scheduler.PlateauLRScheduler(o, decay_rate=0.5, patience_t=1, **NOISE)],
    ),
    Recipe("timm Poly", lambda o, r: [timm.scheduler.PolyLRScheduler(o, 20, power=2.0)]),
    Recipe("timm Step", lambda o, r: [timm.scheduler.StepLRScheduler(o, 4, decay_rate=0.3, warmup_t=2)]),
    Recipe("timm Tanh", lambda o, r: [timm.scheduler.TanhLRScheduler(o, 20, warmup_t=4)]),
    Recipe("timm Tanh, prefix", lambda o, r: [timm.scheduler.TanhLRScheduler(o, 20, warmup_t=4, warmup_prefix=True)]),
    Recipe("timm WSD", lambda o, r: [timm.scheduler.wsd_lr.WSDLRScheduler(o, 20, decay_t=6, warmup_t=4)]),
]


def of_transformers(name: str, arguments: Any) -> Recipe:
    return Recipe(f"transformers {name}", lambda o, r: [getattr(transformers.optimization, name)(o, **arguments)])


RECIPES += [
    of_transformers(name, arguments)
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
    Recipe("Plateau at min_lr", lambda o, r: [lrs.ReduceLROnPlateau(o, factor=0.1, patience=0, min_lr=0.02)]),
    Recipe("timm Cosine, lr_min", lambda o, r: [timm.scheduler.CosineLRScheduler(o, 20, lr_min=0.01)]),
    Recipe("timm Cosine, warmup_lr_init",
           lambda o, r: [timm.scheduler.CosineLRScheduler(o, 20, warmup_t=12, warmup_lr_init=0.003)]),
    Recipe("timm Poly, lr_min", lambda o, r: [timm.scheduler.PolyLRScheduler(o, 20, lr_min=0.01, warmup_t=3)]),
    Recipe("timm Tanh, both", lambda o, r: [timm.scheduler.TanhLRScheduler(o, 20, lr_min=0.01, warmup_t=3, warmup_lr_init=0.002)]),
    Recipe("timm WSD, both",
           lambda o, r: [timm.scheduler.wsd_lr.WSDLRScheduler(o, 20, decay_t=14, lr_min=0.01, warmup_t=3, warmup_lr_init=0.002)]),
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
        self.parameters = [nn.Parameter(torch.full((1,), float(i))) for i in range(len(ratios) + 1)]
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
        """An optimizer of one group a parameter, at these ratios to the base rate."""
        groups = [
            {"params": [p], "lr": torch.tensor(BASE * r, dtype=torch.float64) if tensor else BASE * r}
            for p, r in zip(parameters, ratios, strict=True)
        ]
        return torch.optim.AdamW(groups) if adam else torch.optim.SGD(groups, momentum=0.9)

    def join(self, number: int) -> None:
        """Let the first `number` blocks join ours."""
        for parameter in self.parameters[1 : number + 1]:
            parameter.requires_grad_(True)
        self.rebuilder.sync()

    def step(self) -> None:
        """One step of both optimizers and of all schedulers."""
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
        """Where rates, momenta and states differ, to the bit at 0."""
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


# --- the matrix: the library, late and declared, beside what is done without it


def bare(twins: Twins) -> None:
    """A bare `add_param_group` at the right learning rate."""
    lr = float(twins.ours.param_groups[0]["lr"]) * RATIO
    twins.ours.add_param_group({"params": [twins.parameters[1]], "lr": lr})


def recreated(twins: Twins) -> None:
    """The common recipe: a new optimizer at the right learning rates; the schedulers go on driving the old one."""
    lr = float(twins.ours.param_groups[0]["lr"])
    groups = [{"params": [p], "lr": lr * r} for p, r in zip(twins.parameters, twins.ratios, strict=True)]
    twins.ours = type(twins.ours)(groups, momentum=0.9)  # type: ignore[call-arg]


def lightning(twins: Twins) -> None:
    """Lightning's `BaseFinetuning.unfreeze_and_add_param_group` at the right learning rate."""
    from lightning.pytorch.callbacks import BaseFinetuning  # noqa: PLC0415  # for this column alone

    module = nn.Module()
    module.weight = twins.parameters[1]
    BaseFinetuning.unfreeze_and_add_param_group(module, twins.ours, initial_denom_lr=1 / RATIO)


WAYS: dict[str, tuple[str, Callable[[Twins], None]]] = {
    "late": ("late", lambda twins: twins.join(1)),
    "declared": ("declared", lambda twins: twins.join(1)),
    "bare add_param_group": ("late", bare),
    "re-creating the optimizer": ("late", recreated),
    "Lightning's": ("late", lightning),
}


def verdict(recipe: Recipe, way: str) -> str:
    """What becomes of a group that joins before step 5 at a tenth of the head's rate, in 25 steps."""
    membership, join = WAYS[way]
    exact, worst = True, 0.0
    try:
        twins = Twins(recipe, [RATIO], membership=membership)
        for step in range(STEPS):
            if step == JOIN_AT:
                join(twins)
            if step >= JOIN_AT:
                exact = exact and not twins.differences(0.0)
                worst = max(worst, off(twins))
                if way in {"late", "declared"} and twins.differences(1e-12):
                    return "FAILING"
            twins.step()
    except ValueError as error:
        if "pass membership='declared'" in str(error):
            return "refused: only declared groups can be exact"
        return f"crashes: {type(error).__name__}"
    except (KeyError, IndexError, RuntimeError) as error:
        return f"crashes: {type(error).__name__}"
    if exact:
        return "bit-exact"
    return "within 1e-12" if worst <= 1e-12 else f"wrong: rate off by {worst:.0%}"


def off(twins: Twins) -> float:
    """The largest error of a group's learning rate, as a part of the larger of the two, 1 at most."""
    pairs = zip(twins.ours.param_groups, twins.oracle.param_groups, strict=False)
    errors = [
        abs(float(a["lr"]) - float(b["lr"])) / max(abs(float(a["lr"])), abs(float(b["lr"])))
        for a, b in pairs
        if float(a["lr"]) != float(b["lr"])
    ]
    return max(errors, default=0.0)


def rows(*, quick: bool = False) -> list[dict[str, str]]:
    """One row a scheduler, one cell a way.

    Args:
        quick: Every fourth scheduler alone.
    """
    recipes = [*RECIPES, *REFUSED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            {"scheduler": recipe.name, **{way: verdict(recipe, way) for way in WAYS}}
            for recipe in (recipes[::4] if quick else recipes)
        ]
