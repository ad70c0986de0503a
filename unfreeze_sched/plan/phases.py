"""A plan as data: the phases of a run, with parameters, learning rates and memory where they are known; no torch.

Also the bytes of state that each optimizer keeps, which are known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from unfreeze_sched._checks import FrozenModel
from unfreeze_sched.schedule import UnfreezeSchedule


class Memory(FrozenModel):
    """Bytes that a phase keeps, temporaries aside.

    Attributes:
        weights: All parameters and buffers of the model.
        gradients: One number for each trainable parameter.
        optimizer: State of the parameters that have been trained so far, the head's included; with
            `on_refreeze="drop"` of those that are trained now.
        activations: What a forward pass in training mode saves for backward, weights and buffers left out, each
            storage once.
        total: Their sum.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int


class PlannedBlock(FrozenModel):
    """A block of the encoder.

    Attributes:
        name: As `encoder_blocks` calls it; `blocks[i]` where only their number is known.
        parameters: Their number, or None where it is not known.
        first_epoch: 0-based epoch at which it is unfrozen first; None if it never is.
        learning_rate: Its base rate once it is unfrozen, before any LR scheduler.
    """

    name: str
    parameters: int | None
    first_epoch: int | None
    learning_rate: float


class Phase(FrozenModel):
    """Consecutive epochs with one number of unfrozen blocks.

    Attributes:
        first_epoch: 0-based.
        last_epoch: 0-based, inclusive.
        unfrozen: Number of unfrozen blocks, counted from the deep end.
        joins: Names of the blocks unfrozen at its start, deepest first.
        refrozen: Names of the blocks frozen again at its start, shallowest first.
        trainable_parameters: Their number, the head's included, or None where it is not known.
        trainable_share: In [0, 1], of all the model's parameters, or None.
        learning_rates: `head` and each unfrozen block, deepest first: base rates, before any LR scheduler.
        memory: None where it is not known.
    """

    first_epoch: int
    last_epoch: int
    unfrozen: int
    joins: tuple[str, ...]
    refrozen: tuple[str, ...]
    trainable_parameters: int | None
    trainable_share: float | None
    learning_rates: dict[str, float]
    memory: Memory | None


class Encoder(FrozenModel):
    """The model that was planned for.

    Attributes:
        name: As it was asked for.
        model: What was built of it, such as `smp.Unet`.
        parameters: All of them.
        head_parameters: Those outside of the blocks that receive gradients; they train from the first epoch.
        unused: Names of those that train in no phase, since the forward pass never uses them or the model itself holds
            them fixed.
        image_size: Height and width in pixels.
        batch_size: Images a batch.
        optimizer: Whose state was counted.
    """

    name: str
    model: str
    parameters: int
    head_parameters: int
    unused: tuple[str, ...]
    image_size: tuple[int, int]
    batch_size: int
    optimizer: str


class Plan(FrozenModel):
    """A whole plan; its JSON is what `unfreeze-sched plan --json` prints.

    Attributes:
        version: Of this shape. New keys may come without a new version; none changes its meaning or goes.
        schedule: JSON of the `UnfreezeSchedule`.
        head_learning_rate: The head's base rate.
        encoder: None where only the number of blocks was given.
        blocks: Shallow to deep.
        phases: In the order of their epochs; together they are the run.
    """

    version: Literal[1] = 1
    schedule: UnfreezeSchedule
    head_learning_rate: float
    encoder: Encoder | None
    blocks: tuple[PlannedBlock, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Measured:
    """What is known of a model: the numbers of a plan that follow from it.

    Attributes:
        encoder: As in the plan.
        names: Of the blocks, shallow to deep.
        parameters: Of each block.
        head_bytes: Gradients of the head's parameters.
        gradient_bytes: Of each block.
        head_state: Bytes of optimizer state of the head's parameters.
        state_bytes: Of each block.
        weights: Bytes of all parameters and buffers.
        activations: From a number of unfrozen blocks to the bytes saved for backward.
    """

    encoder: Encoder
    names: tuple[str, ...]
    parameters: tuple[int, ...]
    head_bytes: int
    gradient_bytes: tuple[int, ...]
    head_state: int
    state_bytes: tuple[int, ...]
    weights: int
    activations: Callable[[int], int]


def make_plan(
    schedule: UnfreezeSchedule,
    learning_rate: float,
    layer_decay: float = 1.0,
    *,
    drops: bool = False,
    measured: Measured | None = None,
) -> Plan:
    """The plan of a schedule.

    Args:
        schedule: For as many blocks as the model has.
        learning_rate: The head's base rate.
        layer_decay: In (0, 1], as for `ProgressiveUnfreezer`.
        drops: Whether a block that is frozen again loses its optimizer state.
        measured: What is known of the model; None for a number of blocks alone.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> plan = make_plan(UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50), 1e-3)
        >>> [(phase.first_epoch, phase.last_epoch, phase.unfrozen) for phase in plan.phases[:3]]
        [(0, 9, 0), (10, 14, 1), (15, 19, 2)]
        >>> plan.phases[1].joins, plan.phases[1].learning_rates
        (('blocks[6]',), {'head': 0.001, 'blocks[6]': 0.0001})
    """
    total = schedule.total_blocks
    names = measured.names if measured else tuple(f"blocks[{index}]" for index in range(total))
    scale = schedule.preset.learning_rate_scale
    rates = [learning_rate * scale * layer_decay**depth for depth in reversed(range(total))]
    starts = [epoch for epoch, _ in schedule.transitions()]
    if starts[:1] != [0]:
        starts.insert(0, 0)
    phases, before = [], 0
    for start, end in zip(starts, [*starts[1:], schedule.total_epochs], strict=True):
        number, peak = schedule.progress_at(start)
        deepest_first = names[::-1]
        trained = range(total - number, total)
        parameters = share = memory = None
        if measured:
            parameters = measured.encoder.head_parameters + sum(measured.parameters[index] for index in trained)
            share = parameters / measured.encoder.parameters
            memory = _memory(measured, number, number if drops else peak)
        phases.append(
            Phase(
                first_epoch=start,
                last_epoch=end - 1,
                unfrozen=number,
                joins=deepest_first[before:number],
                refrozen=deepest_first[number:before][::-1],
                trainable_parameters=parameters,
                trainable_share=share,
                learning_rates={"head": learning_rate, **{names[index]: rates[index] for index in reversed(trained)}},
                memory=memory,
            )
        )
        before = number
    blocks = tuple(
        PlannedBlock(
            name=name,
            parameters=measured.parameters[index] if measured else None,
            first_epoch=next((phase.first_epoch for phase in phases if phase.unfrozen >= total - index), None),
            learning_rate=rates[index],
        )
        for index, name in enumerate(names)
    )
    return Plan(
        schedule=schedule,
        head_learning_rate=learning_rate,
        encoder=measured.encoder if measured else None,
        blocks=blocks,
        phases=tuple(phases),
    )


def _memory(measured: Measured, trained: int, kept: int) -> Memory:
    """Memory with so many blocks trained, and so many in the optimizer."""

    def of_deepest(number: int, sizes: Sequence[int]) -> int:
        return sum(sizes[len(sizes) - number :])

    gradients = measured.head_bytes + of_deepest(trained, measured.gradient_bytes)
    optimizer = measured.head_state + of_deepest(kept, measured.state_bytes)
    activations = measured.activations(trained)
    return Memory(
        weights=measured.weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        total=measured.weights + gradients + optimizer + activations,
    )


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
"""From an optimizer's name to the bytes of state of one parameter, by its shape and its bytes a number."""
