"""The ways to let frozen parameters join a live optimizer that `transition.py` times, and what each leaves behind."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unfreeze_sched import Block, MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.optimizer.groups import BLOCK_KEY

SCALE = 0.1
LR = 1e-3
PERIOD = 100
NO_OPS = 1_000
STEPS_BEFORE = 1


@dataclass
class Network:
    """What is to be trained: a head, and an encoder in blocks, shallow to deep."""

    head: list[nn.Parameter]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, tensors: int, device: str = "cpu") -> Network:
        """As many tensors of 16 numbers, half of them in the head, half in one block."""
        head, body = ([nn.Parameter(torch.randn(16, device=device)) for _ in range(tensors // 2)] for _ in range(2))
        return cls(head, (Block("body", (nn.ParameterList(body),)),))

    @property
    def bodies(self) -> list[list[nn.Parameter]]:
        """Each block's parameters, deepest first: the order in which their groups stand."""
        return [list(block.parameters()) for block in reversed(self.blocks)]


@dataclass
class Setting:
    """A network whose head has been trained for some steps, with AdamW and a cosine scheduler; its blocks are frozen.

    Attributes:
        declared: The library's objects, where they were there before the scheduler.
    """

    network: Network
    optimizer: Any
    scheduler: Any
    declared: Any = None
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network, arm: Arm) -> Setting:
        """Ready for one transition; the network's flags, gradients and values are set anew."""
        for parameter in [*network.head, *(p for body in network.bodies for p in body)]:
            parameter.grad = None
        for body in network.bodies:
            for parameter in body:
                parameter.requires_grad = arm.flags_are_set
        optimizer: Any = arm.optimizer(network)
        declared = arm.declare(network, optimizer) if arm.declare else None
        scheduler = CosineAnnealingLR(optimizer, PERIOD) if isinstance(optimizer, Optimizer) else None
        for parameter in network.head:
            parameter.grad = torch.ones_like(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(STEPS_BEFORE):
                optimizer.step()
                if scheduler:
                    scheduler.step()
        for parameter in network.head:
            parameter.grad = None
        return cls(network, optimizer, scheduler, declared)

    @property
    def lr(self) -> float:
        """The head's rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def groups(self) -> list[dict[str, Any]]:
        """Those of an optimizer that is made anew; the first is the head's."""
        joined = [{"params": body, "lr": self.lr * SCALE} for body in self.network.bodies]
        return [{"params": self.network.head, "lr": self.lr}, *joined]


def adamw(network: Network) -> Optimizer:
    return AdamW(network.head, lr=LR)


Transition = Callable[[], object]


@dataclass(frozen=True)
class Arm:
    """A way to make a transition.

    Attributes:
        make: From a setting to the transition, which leaves `setting.optimizer` and `.scheduler` as they go on.
        declare: What is made before the scheduler.
        flags_are_set: Whether `requires_grad` is set beforehand, and no part of the transition.
        calls: Within one timing.
        most: Tensors at which it is still run: some grow with the square.
        package: That it needs.
    """

    make: Callable[[Setting], Transition]
    declare: Callable[[Network, Any], Any] | None = None
    flags_are_set: bool = True
    calls: int = 1
    most: int = 10**9
    package: str = "torch"
    optimizer: Callable[[Network], Any] = adamw

    @property
    def is_there(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None


# --- the common ways


def add_group(setting: Setting) -> Transition:
    """Torch's own method at the right learning rate, with no eye on the scheduler and on anything else."""
    _, *groups = setting.groups()

    def transition() -> None:
        for group in groups:
            setting.optimizer.add_param_group(group)

    return transition


def add_group_and_flags(setting: Setting) -> Transition:
    """The same with the loop that lets the parameters train."""
    _, *groups = setting.groups()

    def transition() -> None:
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad = True
            setting.optimizer.add_param_group(group)

    return transition


def recreate(setting: Setting) -> Transition:
    """The guide's way: a new AdamW over everything that trains; the scheduler stays with the old one."""

    def transition() -> None:
        setting.optimizer = AdamW(setting.groups())

    return transition


def recreate_and_move(setting: Setting) -> Transition:
    """The same, with the state tensors handed over by reference, and a new scheduler set to the old one's place."""

    def transition() -> None:
        old = setting.optimizer
        new = AdamW(setting.groups())
        for parameter, state in old.state.items():
            new.state[parameter] = state
        _follow(setting, new)

    return transition


def recreate_and_load(setting: Setting) -> Transition:
    """The same by `state_dict` and `load_state_dict`, the documented way to carry a state over, which copies it."""

    def transition() -> None:
        new = AdamW(setting.groups())
        saved, shape = setting.optimizer.state_dict(), new.state_dict()
        new.load_state_dict({"state": saved["state"], "param_groups": shape["param_groups"]})
        _follow(setting, new)

    return transition


def _follow(setting: Setting, optimizer: Optimizer) -> None:
    """Put a new scheduler onto a new optimizer, where the old one stood."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] / setting.lr * LR
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = setting.scheduler.state_dict()
    scheduler = CosineAnnealingLR(optimizer, PERIOD)
    bases = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler.load_state_dict({**saved, "base_lrs": bases, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    setting.optimizer, setting.scheduler = optimizer, scheduler


# --- the library's ways


def _schedule(blocks: int) -> UnfreezeSchedule:
    return UnfreezeSchedule(preset=MilestonePreset(milestones={1: blocks}), total_blocks=blocks, total_epochs=2)


def declared_unfreezer(network: Network, optimizer: Any) -> ProgressiveUnfreezer:
    unfreezer = ProgressiveUnfreezer(
        network.blocks, optimizer, _schedule(len(network.blocks)), (), SCALE, membership="declared", norms="train"
    )
    unfreezer.apply(0)
    return unfreezer


def declared_rebuilder(network: Network, optimizer: Any) -> OptimizerRebuilder:
    return OptimizerRebuilder(optimizer, network.blocks, (), SCALE, membership="declared")


def _unfreezer(setting: Setting) -> ProgressiveUnfreezer:
    if setting.declared is not None:
        return setting.declared  # type: ignore[no-any-return]
    schedule = _schedule(len(setting.network.blocks))
    unfreezer = ProgressiveUnfreezer(
        setting.network.blocks, setting.optimizer, schedule, [setting.scheduler], SCALE, norms="train"
    )
    unfreezer.apply(0)
    return unfreezer


def apply(setting: Setting) -> Transition:
    """Schedule, flags, stale gradients and norm modes, and the diff of the blocks that changed."""
    unfreezer = _unfreezer(setting)
    return lambda: unfreezer.apply(1)


def no_op(setting: Setting) -> Transition:
    """`apply` where nothing changes, as in most epochs; too short to be timed singly."""
    unfreezer = _unfreezer(setting)
    unfreezer.apply(1)

    def transition() -> None:
        for _ in range(NO_OPS):
            unfreezer.apply(1)

    return transition


def sync(setting: Setting) -> Transition:
    """A full diff of `requires_grad` against the optimizer; the flags are set already."""
    rebuilder = setting.declared or OptimizerRebuilder(
        setting.optimizer, setting.network.blocks, [setting.scheduler], SCALE
    )
    return rebuilder.sync


# --- peers


@cache
def _imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what they import in their turn
        return import_module(name)


def lightning(setting: Setting) -> Transition:
    """`BaseFinetuning.unfreeze_and_add_param_group`, which sets the flags too."""
    finetuning = _imported("lightning.pytorch.callbacks").BaseFinetuning
    modules = [_holding(body) for body in setting.network.bodies]

    def transition() -> None:
        for module in modules:
            finetuning.unfreeze_and_add_param_group(module, setting.optimizer, initial_denom_lr=1 / SCALE)

    return transition


def _holding(parameters: list[nn.Parameter]) -> nn.Module:
    """One module, since a list of parameters is taken for a list of modules."""
    module = nn.Module()
    for index, parameter in enumerate(parameters):
        module.register_parameter(str(index), parameter)
    return module


def finetuning_scheduler(setting: Setting) -> Transition:
    """`ScheduleImplMixin.add_optimizer_groups`: its groups and the schedulers' base rates, without its Trainer."""
    supporters = _imported("finetuning_scheduler.fts_supporters").ScheduleImplMixin
    names = {f"p{index}": p for index, p in enumerate(p for body in setting.network.bodies for p in body)}
    of = {id(parameter): name for name, parameter in names.items()}
    configs = [types.SimpleNamespace(scheduler=setting.scheduler)]
    module = types.SimpleNamespace(
        trainer=types.SimpleNamespace(lr_scheduler_configs=configs), named_parameters=names.items
    )
    phases = [[of[id(parameter)] for parameter in body] for body in setting.network.bodies]
    rate = setting.lr * SCALE

    def transition() -> None:
        for thawed in phases:
            supporters.add_optimizer_groups(module, setting.optimizer, thawed, lr=rate)

    return transition


def fastai_adam(network: Network) -> Any:
    """All parameters are in from the start, in lists, shallow to deep."""
    adam = _imported("fastai.optimizer").Adam([*network.bodies[::-1], network.head], lr=LR)
    adam.freeze_to(len(network.blocks))
    return adam


def fastai(setting: Setting) -> Transition:
    """What `Learner.freeze_to(0)` does: flags of all parameters, and no state any more."""

    def transition() -> None:
        setting.optimizer.freeze_to(0)
        setting.optimizer.clear_state()

    return transition


FLOOR = "add_param_group, the floor"
ARMS = {
    FLOOR: Arm(add_group),
    "add_param_group, and the flags": Arm(add_group_and_flags, flags_are_set=False),
    "apply, late": Arm(apply, flags_are_set=False),
    "apply, declared": Arm(apply, declared_unfreezer, flags_are_set=False),
    "sync, late": Arm(sync),
    "sync, declared": Arm(sync, declared_rebuilder),
    "apply, nothing to do": Arm(no_op, flags_are_set=False, calls=NO_OPS),
    "re-creating AdamW": Arm(recreate),
    "re-creating, state by reference": Arm(recreate_and_move),
    "re-creating, state by load_state_dict": Arm(recreate_and_load),
    "Lightning": Arm(lightning, flags_are_set=False, most=2_000, package="lightning"),
    "finetuning-scheduler": Arm(finetuning_scheduler, most=20_000, package="finetuning_scheduler"),
    "fastai's freeze_to": Arm(fastai, flags_are_set=False, package="fastai", optimizer=fastai_adam),
}


def groups_of(optimizer: Any) -> list[Any]:
    """What arms must agree on: parameters and hyperparameters by group; tags and the scheduler's key aside."""
    left_out = {"params", BLOCK_KEY, "initial_lr"}
    return [
        (list(map(id, group["params"])), {key: value for key, value in group.items() if key not in left_out})
        for group in optimizer.param_groups
    ]


def agreeing(network: Network, tensors: int = 0) -> list[str]:
    """Names of the arms that give the very groups of the floor; asked before anything is timed.

    Lightning leaves out parameters that equal another by value, and fastai's optimizer has no groups of torch's kind.
    """
    found = {}
    for name, arm in ARMS.items():
        if arm.is_there and arm.optimizer is adamw and tensors <= arm.most:
            setting = Setting.of(network, arm)
            arm.make(setting)()
            found[name] = groups_of(setting.optimizer)
    return [name for name, groups in found.items() if _close(groups, found[FLOOR])]


def _close(groups: list[Any], others: list[Any]) -> bool:
    """Equal, rates to rounding: some divide by 10 where others multiply by 0.1."""
    if len(groups) != len(others):
        return False
    for (ids, keys), (other_ids, other_keys) in zip(groups, others, strict=True):
        rate, other_rate = float(keys["lr"]), float(other_keys["lr"])
        same_rate = abs(rate - other_rate) <= 1e-15 * LR * 10
        if ids != other_ids or not same_rate or {**keys, "lr": 0} != {**other_keys, "lr": 0}:
            return False
    return True


# --- what survives


def survival(network: Network, arm: Arm, *, counted: bool = True) -> dict[str, str]:
    """What is left of the head's state and of the LR schedule, looked up after a transition; and what it cost."""
    setting = Setting.of(network, arm)
    before = {parameter: copy.deepcopy(setting.optimizer.state.get(parameter, {})) for parameter in network.head}
    transition = arm.make(setting)
    # The slow ones make so many operations that watching each would take minutes.
    allocations = Allocations()
    with allocations if counted else nullcontext():
        transition()
    after = setting.optimizer.state
    moments, counts = _kept(before, after, arm.optimizer is adamw)
    bodies = [parameter for body in network.bodies for parameter in body]
    inside = _inside(setting.optimizer)
    return {
        "moments": moments,
        "step counts": counts,
        "LR schedule": _schedule_left(setting),
        "joined": f"{sum(id(parameter) in inside for parameter in bodies)} of {len(bodies)}",
        "tensor bytes, peak": f"{allocations.peak:,}" if counted else "-",
        "tensor bytes, kept": f"{allocations.live:,}" if counted else "-",
    }


def _kept(before: dict[Any, Any], after: Any, torchs: bool) -> tuple[str, str]:
    keys = ("exp_avg", "exp_avg_sq") if torchs else ("grad_avg", "sqr_avg")
    moments = all(
        key in after.get(parameter, {}) and _same(after[parameter][key], state[key])
        for parameter, state in before.items()
        for key in keys
    )
    counts = all("step" in after.get(p, {}) and bool(after[p]["step"] == s["step"]) for p, s in before.items())
    return ("kept" if moments else "lost"), ("kept" if counts else "lost")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit; on the meta device there are shapes alone."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _inside(optimizer: Any) -> set[int]:
    lists = (
        optimizer.param_lists if hasattr(optimizer, "param_lists") else [g["params"] for g in optimizer.param_groups]
    )
    return {id(parameter) for parameters in lists for parameter in parameters}


def _schedule_left(setting: Setting) -> str:
    """Whether the rates of all groups go along the cosine, over one and a half periods."""
    if setting.scheduler is None:
        return "its own, by batch"
    if setting.scheduler.optimizer is not setting.optimizer:
        return "lost: drives the old optimizer"
    head = nn.Parameter(torch.ones(1))
    groups: list[dict[str, Any]] = [{"params": [head]}, {"params": [nn.Parameter(torch.ones(1))], "lr": LR * SCALE}]
    target = AdamW(groups, lr=LR)
    course = CosineAnnealingLR(target, PERIOD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(PERIOD * 3 // 2):
            course.step()
            if step < STEPS_BEFORE:
                continue
            try:
                setting.scheduler.step()
            except Exception as error:  # noqa: BLE001  # what it does is the result
                return f"crashes: {type(error).__name__} at step {step + 1} of a period of {PERIOD}"
            for place, group in enumerate(setting.optimizer.param_groups):
                wanted = target.param_groups[min(place, 1)]["lr"]
                if abs(group["lr"] - wanted) > 1e-12:
                    return f"wrong from step {step + 1} of a period of {PERIOD}"
    return "goes on"


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that operations make, while they are alive; as shapes, so that it counts on meta too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}
        self._outside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._outside.update(key for tensor in given if (key := _key(tensor)) not in self._known)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._outside:
                self._count(tensor)
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._known:
            self._known[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._known[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known[key] -= 1
        if not self._known[key]:
            del self._known[key]
            self.live -= size


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # meta storages have no address
