"""A plan as data: the phases of a run, with parameters, learning rates and memory where they are known; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

from unfreeze_sched._checks import FrozenModel
from unfreeze_sched.schedule import UnfreezeSchedule


class Memory(FrozenModel):
    """Bytes that a phase keeps, temporaries aside."""

    weights: int  # all parameters and buffers of the model
    gradients: int  # one number for each trainable parameter
    optimizer: int  # state of what has been trained so far; with `on_refreeze="drop"` of what is trained now
    activations: int  # saved for backward by a forward pass in training mode, weights and buffers aside
    total: int  # their sum


class PlannedBlock(FrozenModel):
    """A block of the encoder."""

    name: str  # as `encoder_blocks` calls it; `blocks[i]` where only their number is known
    parameters: int | None  # their number, where it is known
    first_epoch: int | None  # 0-based, at which it is unfrozen first; None if it never is
    learning_rate: float  # its base rate once it is unfrozen, before any LR scheduler


class Phase(FrozenModel):
    """Consecutive epochs with one number of unfrozen blocks."""

    first_epoch: int  # 0-based
    last_epoch: int  # inclusive
    unfrozen: int  # number of blocks, counted from the deep end
    joins: tuple[str, ...]  # names of the blocks unfrozen at its start, deepest first
    refrozen: tuple[str, ...]  # names of those frozen again at its start, shallowest first
    trainable_parameters: int | None = None  # their number, the head's included, where it is known
    trainable_share: float | None = None  # of all the model's parameters, in [0, 1]
    learning_rates: dict[str, float]  # base rates of `head` and of each unfrozen block, deepest first
    memory: Memory | None = None  # where it is known


class Encoder(FrozenModel):
    """The model that was planned for."""

    name: str  # as it was asked for
    model: str  # what was built of it, such as `smp.Unet`
    parameters: int  # all of them
    head_parameters: int  # those outside of the blocks that receive gradients: they train from the first epoch
    unused: tuple[str, ...]  # names of those that train in no phase: never used, or held fixed by the model itself
    image_size: tuple[int, int]  # height and width in pixels
    batch_size: int  # images a batch
    optimizer: str  # whose state was counted


class Plan(FrozenModel):
    """A whole plan; its JSON is what `unfreeze-sched plan --json` prints."""

    version: Literal[1] = 1  # of this shape: new keys may come, none changes its meaning or goes
    schedule: UnfreezeSchedule
    head_learning_rate: float  # its base rate
    encoder: Encoder | None  # None where only the number of blocks was given
    blocks: tuple[PlannedBlock, ...]  # shallow to deep
    phases: tuple[Phase, ...]  # in the order of their epochs; together they are the run


class Measured(NamedTuple):
    """What is known of a model: the numbers of a plan that follow from it; those of blocks are shallow to deep."""

    encoder: Encoder
    names: tuple[str, ...]
    parameters: tuple[int, ...]
    head_bytes: int  # of gradients
    gradient_bytes: tuple[int, ...]
    head_state: int  # bytes of optimizer state
    state_bytes: tuple[int, ...]
    weights: int  # bytes of all parameters and buffers
    activations: Callable[[int], int]  # from a number of unfrozen blocks to the bytes saved for backward


def make_plan(
    schedule: UnfreezeSchedule,
    learning_rate: float,
    layer_decay: float = 1.0,
    *,
    drops: bool = False,
    measured: Measured | None = None,
) -> Plan:
    """The plan of a schedule by the head's base rate; `drops`: a block that is frozen again loses its optimizer state.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> plan = make_plan(UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50), 1e-3)
        >>> [(phase.first_epoch, phase.last_epoch, phase.unfrozen) for phase in plan.phases[:3]]
        [(0, 9, 0), (10, 14, 1), (15, 19, 2)]
        >>> plan.phases[1].joins, plan.phases[1].learning_rates
        (('blocks[6]',), {'head': 0.001, 'blocks[6]': 0.0001})
    """
    total = schedule.total_blocks
    # From here on the deepest block comes first, as it does in training.
    names = (measured.names if measured else tuple(f"blocks[{index}]" for index in range(total)))[::-1]
    rate = learning_rate * schedule.preset.learning_rate_scale
    rates = [("head", learning_rate), *((name, rate * layer_decay**depth) for depth, name in enumerate(names))]
    starts = sorted({0, *(epoch for epoch, _ in schedule.transitions())})
    phases, before = [], 0
    for start, end in zip(starts, [*starts[1:], schedule.total_epochs], strict=True):
        number, peak = schedule.progress_at(start)
        phases.append(
            Phase(
                first_epoch=start,
                last_epoch=end - 1,
                unfrozen=number,
                joins=names[before:number],
                refrozen=names[number:before][::-1],
                learning_rates=dict(rates[: 1 + number]),
                **(_figures(measured, number, number if drops else peak) if measured else {}),
            )
        )
        before = number
    blocks = [
        PlannedBlock(
            name=name,
            parameters=measured.parameters[-1 - depth] if measured else None,
            first_epoch=next((phase.first_epoch for phase in phases if phase.unfrozen > depth), None),
            learning_rate=rates[1 + depth][1],
        )
        for depth, name in enumerate(names)
    ]
    return Plan(
        schedule=schedule,
        head_learning_rate=learning_rate,
        encoder=measured.encoder if measured else None,
        blocks=tuple(blocks[::-1]),
        phases=tuple(phases),
    )


def _figures(measured: Measured, trained: int, kept: int) -> dict[str, Any]:
    """A phase's fields that follow from the model: so many blocks train, and so many are in the optimizer."""

    def deepest(number: int, figures: Sequence[int]) -> int:
        return sum(figures[len(figures) - number :])

    trainable = measured.encoder.head_parameters + deepest(trained, measured.parameters)
    parts = {
        "weights": measured.weights,
        "gradients": measured.head_bytes + deepest(trained, measured.gradient_bytes),
        "optimizer": measured.head_state + deepest(kept, measured.state_bytes),
        "activations": measured.activations(trained),
    }
    return {
        "trainable_parameters": trainable,
        "trainable_share": trainable / measured.encoder.parameters,
        "memory": Memory(**parts, total=sum(parts.values())),
    }


# --- optimizers

Shape = Sequence[int]

# torch counts steps in a float of its own for each parameter.
_STEP = 4


def _copies(number: int, *, counts: bool) -> Callable[[Shape, int], int]:
    return lambda shape, size: number * prod(shape) * size + (_STEP if counts else 0)


def _factored(shape: Shape, size: int) -> int:
    """Adafactor keeps a matrix's squares as sums over rows and over columns, a vector's as they are."""
    if len(shape) < 2:  # noqa: PLR2004  # a matrix has two dimensions
        return prod(shape) * size + _STEP
    *rest, rows, columns = shape
    return prod(rest) * (rows + columns) * size + _STEP


# From an optimizer's name to the bytes of state of one parameter, by its shape and its bytes a number.
STATES: dict[str, Callable[[Shape, int], int]] = {
    "adamw": _copies(2, counts=True),
    "adam": _copies(2, counts=True),
    "amsgrad": _copies(3, counts=True),
    "sgd": _copies(0, counts=False),
    "sgd-momentum": _copies(1, counts=False),
    "rmsprop": _copies(1, counts=True),
    "adagrad": _copies(1, counts=True),
    "adafactor": _factored,
    "lion": _copies(1, counts=False),
}
