"""Every optimizer at hand through a run of late joins, against the run that the joins promise to equal.

Two arms train equal networks on equal data, and weights and states are compared after every step. One is the
library's; the other is one of three targets:

- *oracle*: the optimizer that held every parameter from the start, frozen.
- *fresh*: a new optimizer for each block when it joins. An optimizer that counts its steps by group would otherwise
  have counted while the block was frozen. Where nothing is counted by group it equals the oracle.
- *reset*: the oracle, where the keys that steps wrote into a group are as made when its block joins. For what couples
  all parameters, such as by a norm of all gradients, and counts by group too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore

from unfreeze_sched import Block, OptimizerRebuilder

LR, WIDTH = 0.01, 4
SCRIPT = ((0, 3), (1, 5), (2, 5), (1, 2), (2, 4))
"""(number of deepest blocks that train, steps): joins, a refreezing, a thaw."""
MEMBERSHIPS = ("late", "declared")
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """An optimizer to try.

    Args:
        name: As in the table.
        make: From groups to the optimizer.
        target: `"fresh"`, `"oracle"` or `"reset"`.
        why: Why the target is not `"fresh"`.
        shape: Of the parameters: `"mixed"` matrices and vectors, `"matrices"`, `"pairs"` of them, or `"sparse"` ones.
        closure: What a step is given: nothing, a closure that gives the `"loss"`, or one that also goes `"backward"`.
        second_order: Whether a step differentiates the gradients.
        distributed: Whether it needs a process group.
        modes: Whether it is switched by `train()` and `eval()`.
        schedulers: `lr_schedulers` of the rebuilder.
    """

    name: str
    make: Callable[[Groups], Any]
    target: str = "fresh"
    why: str = ""
    shape: str = "mixed"
    closure: str = ""
    second_order: bool = False
    distributed: bool = False
    modes: bool = False
    schedulers: tuple[()] | None = ()


class Net(nn.Module):
    """Two blocks and a head of the case's shape."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        make: dict[str, Callable[[], nn.Module]] = {
            "mixed": lambda: nn.Linear(WIDTH, WIDTH),
            "matrices": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
            "pairs": lambda: nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)),
            "sparse": lambda: nn.Embedding(8, WIDTH, sparse=True),
        }
        *blocks, self.head = (make[case.shape]() for _ in range(3))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The head's output."""
        if isinstance(self.head, nn.Embedding):
            index = (x[:, 0] * 4 + 4).long().clamp(0, 7)
            return torch.stack([layer(index) for layer in (self.head, *self.blocks)]).sum(0)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return torch.as_tensor(self.head(x))


@dataclass
class Arm:
    """A network under training, what steps it, and what happens when the deepest blocks train."""

    net: Net
    optimizers: list[Any]
    join: Callable[[list[Any], int], object]

    def bring_to(self, case: Case, number: int) -> None:
        """Let the deepest `number` blocks train."""
        if case.modes:  # as around a validation
            for optimizer in self.optimizers:
                optimizer.eval()
                optimizer.train()
        for depth, block in enumerate(reversed(self.net.blocks)):
            for parameter in block.parameters():
                if parameter.requires_grad != (depth < number):
                    parameter.requires_grad_(depth < number)
                    parameter.grad = None
        self.join(self.optimizers, number)

    def step(self, case: Case, x: Tensor, y: Tensor, seed: int) -> None:
        """One step on a batch; random numbers follow from the seed."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # what Kron draws from

        def backward() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss: Tensor = (self.net(x) - y).square().mean()
            loss.backward(create_graph=case.second_order)  # type: ignore[no-untyped-call]
            return loss

        loss = backward()
        closure = {"": None, "loss": lambda: loss, "backward": backward}[case.closure]
        for optimizer in self.optimizers:
            optimizer.step(*([] if closure is None else [closure]))

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps for a parameter."""
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                return dict(optimizer.state[parameter])
        return {}


def net_of(case: Case) -> Net:
    torch.manual_seed(0)
    net = Net(case)
    for parameter in net.blocks.parameters():
        parameter.requires_grad_(False)
    return net


def made(case: Case, groups: Groups) -> Any:
    torch.manual_seed(0)
    optimizer = case.make(groups)
    if case.modes:
        optimizer.train()
    return optimizer


def group_of(module: nn.Module, lr: float) -> dict[str, Any]:
    return {"params": list(module.parameters()), "lr": lr}


def library_arm(case: Case, membership: Any, scale: float) -> Arm:
    """The run of the library."""
    net = net_of(case)
    optimizer = made(case, [group_of(net.head, LR)])
    blocks = [Block(f"block{i}", (block,)) for i, block in enumerate(net.blocks)]
    rebuilder = OptimizerRebuilder(
        optimizer, blocks, lr_schedulers=case.schedulers, learning_rate_scale=scale, membership=membership
    )

    def join(_: list[Any], __: int) -> None:
        torch.manual_seed(0)
        rebuilder.sync()

    return Arm(net, [optimizer], join)


def oracle_arm(case: Case, scale: float, *, reset: bool = False) -> Arm:
    """The run that had every parameter from the start."""
    net = net_of(case)
    optimizer = made(case, [group_of(net.head, LR), *(group_of(b, LR * scale) for b in reversed(net.blocks))])
    as_made = [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    joined = [0]

    def join(_: list[Any], number: int) -> None:
        for index in range(joined[0] + 1, number + 1):
            group = optimizer.param_groups[index]
            kept = {"params": group["params"], **({"train_mode": group["train_mode"]} if "train_mode" in group else {})}
            if reset:
                group.clear()
                group.update({**as_made[index], **kept})
        joined[0] = max(joined[0], number)

    return Arm(net, [optimizer], join)


def fresh_arm(case: Case, scale: float) -> Arm:
    """The run with an optimizer of its own for each block."""
    net = net_of(case)

    def join(optimizers: list[Any], number: int) -> None:
        while len(optimizers) <= number:
            optimizers.append(made(case, [group_of(net.blocks[-len(optimizers)], LR * scale)]))

    return Arm(net, [made(case, [group_of(net.head, LR)])], join)


def target_arm(case: Case, scale: float) -> Arm:
    return fresh_arm(case, scale) if case.target == "fresh" else oracle_arm(case, scale, reset=case.target == "reset")


def distance(a: Any, b: Any) -> float:
    """The largest difference over the largest number, through nested states; what is no number must be equal."""
    if isinstance(a, (Tensor, float, int)) and isinstance(b, (Tensor, float, int)):
        if isinstance(a, Tensor) and a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(torch.as_tensor(b))
        a, b = (torch.as_tensor(value).detach().double() for value in (a, b))
        if a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b) or a.numel() == 0:
            return 0.0
        return float((a - b).abs().max() / b.abs().max())
    if isinstance(a, dict) and isinstance(b, dict):
        return float("inf") if a.keys() != b.keys() else max((distance(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return float("inf") if len(a) != len(b) else max(map(distance, a, b), default=0.0)
    return 0.0 if type(a) is type(b) else float("inf")


def deviation(
    case: Case,
    ours: Arm,
    theirs: Arm,
    mutate: Callable[[Arm], object] = lambda _: None,
    script: tuple[tuple[int, int], ...] = SCRIPT,
) -> float:
    """Train both; the largest distance between weights and between states, after any step.

    Args:
        case: What is tried.
        ours: The library's run.
        theirs: Its target.
        mutate: Done to our run when its first block has joined: a defect that must show.
        script: What is trained, as `SCRIPT`.
    """
    generator = torch.Generator().manual_seed(1)
    before = [p.detach().clone() for p in theirs.net.parameters()]
    worst, seed = 0.0, 0
    for stage, (number, steps) in enumerate(script):
        for arm in (ours, theirs):
            arm.bring_to(case, number)
        if stage == 1:
            mutate(ours)
        for _ in range(steps):
            x, y = torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator)
            seed += 1
            ours.step(case, x, y, seed)
            theirs.step(case, x, y, seed)
            for a, b in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
                if not bool(torch.isfinite(b).all()):
                    raise FloatingPointError("the target diverges")
                worst = max(worst, distance(a, b))
                if a.grad is not None:
                    worst = max(worst, distance(ours.state(a), theirs.state(b)))
    if script is SCRIPT and any(torch.equal(a, b) for a, b in zip(before, theirs.net.parameters(), strict=True)):
        raise AssertionError("a parameter stood still")
    return worst


@contextlib.contextmanager
def surroundings(case: Case) -> Iterator[None]:
    """A process group where one is needed, silence, and nothing compiled, which takes a minute for timm's Kron."""
    if case.distributed:
        distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield
    finally:
        if case.distributed:
            distributed.destroy_process_group()


def tried(case: Case, membership: str, scale: float, **keywords: Any) -> float:
    """The deviation of a case, with what `deviation` takes."""
    with surroundings(case):
        return deviation(case, library_arm(case, membership, scale), target_arm(case, scale), **keywords)


def verdict(case: Case, membership: str, scale: float, target: str | None = None) -> str:
    """Try a case: "bit-exact", "within 1e-12", "refused: reason" or "failing: what"."""
    try:
        worst = tried(case if target is None else dataclasses.replace(case, target=target), membership, scale)
    except Exception as error:  # noqa: BLE001  # one broken optimizer is a row of the table
        text = str(error)
        refused = isinstance(error, ValueError) and text.startswith("`")
        return f"refused: {text}" if refused else f"failing: {type(error).__name__}: {text}"
    return "bit-exact" if worst == 0 else "within 1e-12" if worst < 1e-12 else f"failing: {worst:.0e} off"


Keywords = dict[str, Any]
# Torch's own, with what of foreach, fused and the rest runs on a CPU; `capturable` does not, and `differentiable` is
# for parameters that are no leaves.
COMMON: tuple[Keywords, ...] = ({}, {"foreach": True}, {"foreach": False}, {"maximize": True}, {"weight_decay": 0.1})
TORCH: dict[str, tuple[Keywords, ...]] = {
    "SGD": (
        {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.9, "dampening": 0.5},
        {"fused": True}, {"fused": True, "momentum": 0.9}, {"fused": True, "momentum": 0.9, "dampening": 0.5},
        {"fused": True, "momentum": 0.9, "nesterov": True},
    ),
    "Adam": (
        {"amsgrad": True}, {"fused": True}, {"fused": True, "amsgrad": True, "maximize": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"foreach": True, "amsgrad": True},
    ),
    "AdamW": ({"amsgrad": True}, {"fused": True}, {"fused": True, "amsgrad": True}, {"foreach": True, "amsgrad": True}),
    "Adamax": (),
    "NAdam": ({"decoupled_weight_decay": True, "weight_decay": 0.1},),
    "RAdam": ({"decoupled_weight_decay": True, "weight_decay": 0.1},),
    "RMSprop": ({"momentum": 0.9, "centered": True}, {"momentum": 0.9, "foreach": True}),
    "Rprop": (),
    "ASGD": ({"t0": 3.0},),
    "Adadelta": (),
    "Adagrad": ({"fused": True}, {"initial_accumulator_value": 0.1}, {"lr_decay": 0.1}),
    "Adafactor": (),
}  # fmt: skip
SHAPED: tuple[tuple[str, str, Keywords], ...] = (
    ("Muon", "matrices", {}),
    ("Muon", "matrices", {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    ("SparseAdam", "sparse", {}),
    ("SparseAdam", "sparse", {"maximize": True}),
    ("SGD", "sparse", {}),
    ("Adagrad", "sparse", {}),
)
TENSOR_RATE: dict[str, Keywords] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"foreach": False},
    "AdamW": {"fused": True},
    "RMSprop": {},
}


def _plain(groups: Groups, path: str, keywords: Keywords) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(groups, lr=LR, **keywords)


def _tensor_rate(groups: Groups, path: str, keywords: Keywords) -> Any:
    return _plain([{**g, "lr": torch.tensor(g["lr"], dtype=torch.float64)} for g in groups], path, keywords)


def _named(groups: Groups, path: str, keywords: Keywords) -> Any:
    named = [{**g, "params": [(f"p{i}", p) for i, p in enumerate(g["params"])]} for g in groups]
    return _plain(named, path, keywords)


def torch_cases() -> Iterator[Case]:
    """All of torch.optim; the target is the oracle, since nothing there is counted by group."""
    mixed = [
        (name, "mixed", keywords)
        for name, variants in TORCH.items()
        # Rprop has no weight decay.
        for keywords in (*(COMMON if name != "Rprop" else COMMON[:-1]), *variants)
    ]
    for name, shape, keywords in (*mixed, *SHAPED):
        text = ", ".join(f"{key}={value}" for key, value in keywords.items())
        make = functools.partial(_plain, path=f"torch.optim.{name}", keywords=keywords)
        yield Case(f"torch {name}({text})" + (", sparse" if shape == "sparse" else ""), make, "oracle", shape=shape)
    for name, keywords in TENSOR_RATE.items():
        path = f"torch.optim.{name}"
        yield Case(f"torch {name}, tensor lr", functools.partial(_tensor_rate, path=path, keywords=keywords), "oracle")
        yield Case(f"torch {name}, named", functools.partial(_named, path=path, keywords=keywords), "oracle")
    yield Case("torch LBFGS", functools.partial(_plain, path="torch.optim.LBFGS", keywords={}), closure="backward")


D_ADAPTATION = "one step size for all parameters"
PYPI = "pytorch_optimizer"
# Short clocks, so that what they trigger falls within the run.
KEYWORDS: dict[str, Keywords] = {
    "adagc": {"warmup_steps": 4}, "adahessian": {"update_period": 3}, "adashift": {"keep_num": 3},
    "ademamix": {"t_alpha_beta3": 8}, "alice": {"update_interval": 3}, "apollodqn": {"warmup_steps": 6},
    "bsam": {"num_data": 8}, "conda": {"update_proj_gap": 3}, "dadaptsgd": {"d0": 1e-4}, "prodigy": {"d0": 1e-4},
    "dash": {"precondition_frequency": 3, "start_preconditioning_step": 3},
    "grokfastadamw": {"grokfast_after_step": 3}, "laprop": {"centered": True, "steps_before_using_centered": 3},
    "ranger": {"k": 3}, "ranger21": {"num_iterations": 20, "lookahead_merge_time": 3},
    "sara": {"progressive_iter": 4, "threshold": 0.4}, "schedulefreeadamw": {"warmup_steps": 5},
    "schedulefreesgd": {"warmup_steps": 5}, "scalableshampoo": {
        "start_preconditioning_step": 3, "preconditioning_compute_steps": 2,
    }, "shampoo": {"preconditioning_compute_steps": 2}, "simplifiedademamix": {"beta1_warmup": 8},
    "soap": {"precondition_frequency": 3}, "sophiah": {"update_period": 3}, "spam": {
        "grad_accu_steps": 2, "update_proj_gap": 12, "warmup_epoch": 3,
    }, "splus": {"inverse_steps": 3}, "srmm": {"memory_length": 4}, "stablespam": {"update_proj_gap": 6, "t_max": 8},
}  # fmt: skip
# (target, why): where a fresh optimizer of the new parameters alone is not what they would see.
COUPLED: dict[str, tuple[str, str]] = {
    "adagc": ("reset", "clips by the norm of all gradients while it warms up"),
    "adahessian": ("reset", "one second-order pass for all parameters, at random"),
    "adai": ("reset", "a mean over all parameters"),
    "adams": ("reset", "a sum over all parameters"),
    "bsam": ("reset", "perturbs all parameters at once"),
    "emofact": ("reset", "one average of the loss for all groups"),
    "emolynx": ("reset", "one average of the loss for all groups"),
    "emonavi": ("reset", "one average of the loss for all groups"),
    "lorarite": ("reset", "clips by the norm of all gradients"),
    "madgrad": ("oracle", "one step count for all groups"),
    "ranger21": ("reset", "a sum over all parameters"),
    "sophiah": ("reset", "one second-order pass for all parameters, at random"),
    "spam": ("reset", "one clock for all masks"),
    "stablespam": ("reset", "one clock for all groups"),
    **dict.fromkeys(
        ("dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "dadaptsgd", "prodigy"), ("oracle", D_ADAPTATION)
    ),
}
MUONS = ("muon", "muonclip", "adamuon", "adago", "normuon", "distributedmuon")
SHAPES = {
    **dict.fromkeys((*MUONS, "spectralsphere", "scion", "scionlight"), "matrices"),
    "lorarite": "pairs",
}
CLOSURES = {"bsam": "backward", **dict.fromkeys(("alig", "emonavi", "emolynx", "emofact"), "loss")}
OF_A_MODEL = ("adalomo", "adammini", "lomo")
MISSING = {"demo": "needs einops, which is not installed here"}


def _listed(groups: Groups, name: str) -> Any:
    package = importlib.import_module(PYPI)
    keywords = KEYWORDS.get(name, {})
    if name in OF_A_MODEL:
        net = nn.Module()
        for i, parameter in enumerate(p for group in groups for p in group["params"]):
            net.register_parameter(f"p{i}", parameter)
        return package.load_optimizer(name)(net, lr=LR)
    if name in MUONS:
        groups = [{**group, "use_muon": True} for group in groups]
    if name == "alig":  # has a cap on its rate, no rate
        return package.load_optimizer(name)([{"params": group["params"]} for group in groups], max_lr=LR)
    return package.load_optimizer(name)(groups, lr=LR, **keywords)


def listed_cases() -> Iterator[Case]:
    """All of pytorch-optimizer's list that can be made here."""
    for name in importlib.import_module(PYPI).get_supported_optimizers():
        if name in MISSING:
            continue
        target, why = COUPLED.get(name, ("fresh", ""))
        yield Case(
            f"{PYPI} {name}",
            functools.partial(_listed, name=name),
            target,
            why,
            shape=SHAPES.get(name, "mixed"),
            closure=CLOSURES.get(name, "backward" if name == "lbfgs" else ""),
            second_order=name in {"adahessian", "sophiah"},
            distributed=name == "distributedmuon",
            modes=name.startswith("schedulefree"),
            schedulers=None if name == "flashadamw" else (),  # it writes `initial_lr` itself
        )


NEEDS_CUDA = ("bnb", "fused")
"""How those of timm's names begin that are bitsandbytes' or apex', without which they cannot be made here."""


def _timm(groups: Groups, name: str, keywords: Keywords) -> Any:
    parameters = [parameter for group in groups for parameter in group["params"]]
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)  # AdaHessian makes its state for what is trainable when it is made
    optimizer = importlib.import_module("timm.optim").create_optimizer_v2(groups, opt=name, **keywords)
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    return optimizer


def timm_cases() -> Iterator[Case]:
    """All of timm's registry that can be made here; the target is the oracle, where nothing is counted by group."""
    package = importlib.import_module("timm.optim")
    if not hasattr(package, "list_optimizers"):  # before timm 1.0.12
        return
    for name in package.list_optimizers():
        target, why = "oracle", ""
        if "adan" in name:
            target = "fresh"
        if "lamb" in name:
            target, why = "reset", "clips by the norm of all gradients"
        if not name.startswith(NEEDS_CUDA):
            make = functools.partial(_timm, name=name, keywords={"lr": LR})
            yield Case(f"timm {name}", make, target, why, second_order=name == "adahessian")
    relative = functools.partial(_timm, name="adafactor", keywords={"lr": None})
    yield Case("timm adafactor, lr=None", relative, "oracle")
    yield Case("timm lookahead_adamw", functools.partial(_timm, name="lookahead_adamw", keywords={"lr": LR}))


def _wrapped(groups: Groups, wrapper: str, keywords: Keywords) -> Any:
    package = importlib.import_module(PYPI)
    inner = torch.optim.AdamW(groups, lr=LR)
    return getattr(package.optimizer if hasattr(package, "optimizer") else package, wrapper)(inner, **keywords)


def _sam(groups: Groups, wrapper: str, keywords: Keywords) -> Any:
    wrapper_class = getattr(importlib.import_module(f"{PYPI}.optimizer.sam"), wrapper)
    return wrapper_class(groups, base_optimizer=torch.optim.SGD, lr=LR, momentum=0.9, **keywords)


def _accelerated(groups: Groups) -> Any:
    accelerate = importlib.import_module("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(groups, lr=LR))


def _adafactor(groups: Groups, *, relative: bool) -> Any:
    adafactor = importlib.import_module("transformers.optimization").Adafactor
    if relative:
        return adafactor([{"params": group["params"]} for group in groups])
    return adafactor(groups, lr=LR, relative_step=False, scale_parameter=False, beta1=0.9)


def other_cases() -> Iterator[Case]:
    """The other packages, and the wrappers."""
    for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "AdamWScheduleFreeReference",
                 "SGDScheduleFreeReference", "AdamWScheduleFreePaper"):  # fmt: skip
        warm: dict[str, Any] = {} if name.startswith("RAdam") else {"warmup_steps": 5}
        make = functools.partial(_plain, path=f"schedulefree.{name}", keywords=warm)
        yield Case(f"schedulefree {name}", make, modes=True)
    prodigies: dict[str, Keywords] = {
        "d0=1e-4": {"d0": 1e-4},
        "use_bias_correction=True, d0=1e-4": {"use_bias_correction": True, "d0": 1e-4},
    }
    for text, keywords in prodigies.items():
        make = functools.partial(_plain, path="prodigyopt.Prodigy", keywords=keywords)
        yield Case(f"prodigyopt Prodigy({text})", make, "oracle", D_ADAPTATION)
    yield Case("lion-pytorch Lion", functools.partial(_plain, path="lion_pytorch.Lion", keywords={}), "oracle")
    yield Case("transformers Adafactor", functools.partial(_adafactor, relative=False), "oracle")
    yield Case("transformers Adafactor, lr=None", functools.partial(_adafactor, relative=True), "oracle")
    wrappers: dict[str, Keywords] = {
        "Lookahead": {"k": 3}, "OrthoGrad": {}, "Magma": {}, "ScheduleFreeWrapper": {}, "TRAC": {"s_prev": 0.1},
    }  # fmt: skip
    for name, keywords in wrappers.items():
        target, why = ("reset", "one factor of the update for all parameters") if name == "TRAC" else ("fresh", "")
        make = functools.partial(_wrapped, wrapper=name, keywords=keywords)
        yield Case(f"wrapper {name}(AdamW)", make, target, why, modes=name == "ScheduleFreeWrapper")
    for name in ("SAM", "LookSAM", "FriendlySAM"):
        if hasattr(importlib.import_module(f"{PYPI}.optimizer.sam"), name):
            make = functools.partial(_sam, wrapper=name, keywords={})
            yield Case(f"wrapper {name}(SGD)", make, "reset", "perturbs all parameters at once", closure="backward")
    yield Case("accelerate AcceleratedOptimizer(AdamW)", _accelerated, "oracle")


def cases() -> Iterator[Case]:
    """Every optimizer at hand."""
    yield from torch_cases()
    yield from other_cases()
    yield from timm_cases()
    yield from listed_cases()


def rows(quick: bool) -> list[dict[str, Any]]:
    """The matrix.

    Args:
        quick: Whether each optimizer is tried at one scale alone, 0.5 where it takes that.

    Returns:
        A row for each optimizer, membership and scale: `optimizer`, `membership`, `scale`, `target`, `why` and
        `verdict`: "bit-exact", "within 1e-12", "refused: reason" or "failing: what".
    """
    table = []
    for case in cases():
        for membership in MEMBERSHIPS:
            for scale in (0.5, 1.0):
                said = verdict(case, membership, scale)
                row = {"optimizer": case.name, "membership": membership, "scale": scale, "verdict": said}
                table.append({**row, "target": case.target, "why": case.why})
                if quick and not said.startswith("refused: `learning_rate_scale`"):
                    break
    return table
