"""A plan as data and as text: a run's phases, with parameters, learning rates and memory where known; no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import Any, Literal, NamedTuple

from unfreeze_sched._checks import FrozenModel, columns, listed
from unfreeze_sched.schedule import PRESETS, UnfreezeSchedule

_NAMED = 3  # more blocks than these, joining at once at one rate, are told by the first and the last


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


class Part(NamedTuple):
    """What is known of a model's head, or of a block."""

    name: str
    parameters: int
    gradients: int  # bytes
    state: int  # bytes in the optimizer


class Measured(NamedTuple):
    """What is known of a model: the numbers of a plan that follow from it."""

    encoder: Encoder
    parts: Sequence[Part]  # the head, and the blocks from deep to shallow, as they join
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
    """The plan of a schedule by the head's base rate; with `drops` a block frozen again loses its optimizer state."""
    parts = measured.parts[1:] if measured else ()
    # The deepest block comes first, as it does in training.
    names = tuple(part.name for part in parts) or tuple(f"blocks[{i}]" for i in range(schedule.total_blocks))[::-1]
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
            parameters=parts[depth].parameters if parts else None,
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
    trainable = sum(part.parameters for part in measured.parts[: 1 + trained])
    sizes = {
        "weights": measured.weights,
        "gradients": sum(part.gradients for part in measured.parts[: 1 + trained]),
        "optimizer": sum(part.state for part in measured.parts[: 1 + kept]),
        "activations": measured.activations(trained),
    }
    return {
        "trainable_parameters": trainable,
        "trainable_share": trainable / measured.encoder.parameters,
        "memory": Memory(**sizes, total=sum(sizes.values())),
    }


# --- optimizers

Shape = Sequence[int]
_STEP = 4  # torch counts steps in a float of its own for each parameter


def _copies(number: int, step: int = _STEP) -> Callable[[Shape, int], int]:
    return lambda shape, size: number * prod(shape) * size + step


def _factored(shape: Shape, size: int) -> int:
    """Adafactor keeps a matrix's squares as sums over rows and over columns, a vector's as they are."""
    if len(shape) < 2:  # noqa: PLR2004  # a matrix has two dimensions
        return prod(shape) * size + _STEP
    *rest, rows, columns = shape
    return prod(rest) * (rows + columns) * size + _STEP


# From an optimizer's name to the bytes of state of one parameter, by its shape and its bytes a number.
STATES: dict[str, Callable[[Shape, int], int]] = {
    "adamw": _copies(2),
    "adam": _copies(2),
    "amsgrad": _copies(3),
    "sgd": _copies(0, step=0),
    "sgd-momentum": _copies(1, step=0),
    "rmsprop": _copies(1),
    "adagrad": _copies(1),
    "adafactor": _factored,
    "lion": _copies(1, step=0),
}


# --- as text


def as_text(plan: Plan, plot: str | None = None) -> str:
    """A plan in words, 80 columns wide if it can be: what it is, a row a phase, and notes, also on its picture."""
    figures = ["trainable", "share", "grads", "optim", "saved", "sum"] if plan.encoder else []
    rows = [_cells(plan, phase) for phase in plan.phases]
    table = columns(["epochs", "blocks", "joins", "lr", *figures], rows, right={"blocks", "lr", *figures}, gap=1)
    wrapped = [textwrap.fill(note, 80) for note in _notes(plan, plot)]
    return "\n".join([textwrap.fill(title(plan), 80), "", table, "", *wrapped])


def title(plan: Plan) -> str:
    """What was planned, in one sentence."""
    schedule, encoder = plan.schedule, plan.encoder
    preset = next((f"{name}: " for name, preset in PRESETS.items() if preset == schedule.preset), "")
    preset += ", ".join(f"{name} {value}" for name, value in schedule.preset.model_dump(exclude={"kind"}).items())
    what = ""
    if encoder:
        is_timms = encoder.model == "timm"
        what = f"timm's {encoder.name.rpartition('/')[2]}" if is_timms else f"{encoder.name} in {encoder.model}"
        what += f", {in_short(encoder.parameters)} parameters, "
    blocks = f"{schedule.total_blocks} block{'s' if schedule.total_blocks > 1 else ''}"
    epochs = f"{schedule.total_epochs} epoch{'s' if schedule.total_epochs > 1 else ''}"
    return f"{what}{blocks}, {epochs}; {preset}"


def _cells(plan: Plan, phase: Phase) -> list[str]:
    first, last, memory = phase.first_epoch, phase.last_epoch, phase.memory
    epochs = f"{first}-{last}" if last > first else str(last)
    cells = [epochs, f"{phase.unfrozen}/{plan.schedule.total_blocks}"]
    cells += ["\n".join(lines) for lines in zip(*_joins(phase), strict=True)]
    if memory:
        cells += [in_short(phase.trainable_parameters or 0), f"{phase.trainable_share:.1%}"]
        sizes = (memory.gradients, memory.optimizer, memory.activations, memory.total)
        cells += [f"{size / unit_of(plan)[1]:.1f}" for size in sizes]
    return cells


def _joins(phase: Phase) -> Iterator[tuple[str, str]]:
    """What changes at the start of a phase, each line with its learning rate."""
    rates = phase.learning_rates
    if phase.first_epoch == 0:
        yield "head", f"{rates['head']:.1e}"
    for rate, run in groupby(phase.joins, rates.__getitem__):
        names = list(run)
        if len(names) > _NAMED:
            names = [f"{names[0]} to {names[-1]}"]
        yield from ((f"+ {name}", f"{rate:.1e}") for name in names)
    for name in phase.refrozen:
        yield f"- {name}", "frozen"


def _notes(plan: Plan, plot: str | None) -> Iterator[str]:
    """What the table's figures are, and what never trains."""
    encoder = plan.encoder
    yield "epochs: 0-based, inclusive. lr: base rate, from then on; an LR scheduler scales all of them."
    if encoder:
        (unit, size), (height, width) = unit_of(plan), encoder.image_size
        weights = sum(phase.memory.weights for phase in plan.phases[:1] if phase.memory) / size
        yield (
            f"{unit}: gradients, state of {encoder.optimizer}, activations saved for backward (batch of "
            f"{encoder.batch_size} at {height}x{width}, float32, each storage once), and their sum with {weights:.1f} "
            "of weights and buffers; what a step allocates for a moment is not in it."
        )
        if encoder.unused:
            yield f"in no phase, since no gradient reaches it: {listed(encoder.unused)}."
    total, late, never = plan.schedule.total_epochs, [], []
    for depth, block in enumerate(reversed(plan.blocks)):
        epochs = sum(phase.last_epoch + 1 - phase.first_epoch for phase in plan.phases if phase.unfrozen > depth)
        if epochs == 0:
            never.append(block.name)
        elif 10 * epochs < total:
            late.append(f"{block.name}, {epochs} of {total} epochs")
    if late:
        yield f"less than a tenth of the run: {listed(late, 6)}; start earlier or unfreeze faster."
    if never:
        yield f"never within {total} epochs: {listed(never, 6)}; start earlier, unfreeze faster, or train longer."
    if plot:
        yield f"{plot} shows it."


def unit_of(plan: Plan) -> tuple[str, int]:
    """In which unit the plan's memory is told, and its bytes."""
    most = max((phase.memory.total for phase in plan.phases if phase.memory), default=0)
    return ("GiB", 2**30) if most >= 10 * 2**30 else ("MiB", 2**20)


def in_short(number: int) -> str:
    """A number of parameters."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return str(number)
