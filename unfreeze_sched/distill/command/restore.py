"""Bring the parts of a run to where a checkpoint left them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unfreeze_sched.distill.checkpoints import CheckpointError, read_checkpoint
from unfreeze_sched.distill.command.records import EpochRecord


def restore(parts: Mapping[str, Any], path: Path) -> list[EpochRecord]:
    """Load a checkpoint's states into a new run, each once it has been found to have the run's own names and shapes.

    Args:
        parts: The new run's `unfreezer`, `model`, `scheduler`, `scaler` and `optimizer` (an AdamW), in this order: the
            unfreezer makes the groups that the others' states are of.
        path: The checkpoint.

    Returns:
        The records of the epochs before.

    Raises:
        CheckpointError: It is damaged, or of another run; `parts` are then of no more use.
    """
    saved = read_checkpoint(path)
    if not isinstance(saved, dict) or set(saved) != {*parts, "records"}:
        raise CheckpointError(
            f"{path}: must be a checkpoint of this command, got another file; remove it to begin anew"
        )
    try:
        records = [EpochRecord.model_validate(record) for record in saved["records"]]
        if [record.epoch for record in records] != list(range(len(records))):
            _refuse(iter(["records of other epochs"]))
        for name, part in parts.items():
            if name != "unfreezer":  # which looks at all of its state itself
                _refuse(_misfits(name, saved[name], _expected(name, part)))
            part.load_state_dict(saved[name])
        _refuse(_other_rates(parts["scheduler"], parts["optimizer"]))
    except Exception as error:  # a state that does not fit makes torch raise nearly anything
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(
            f"{path}: must be a checkpoint of this run, got one that does not fit ({text}); resume with its own folder"
        ) from error
    return records


def _refuse(misfits: Iterator[str]) -> None:
    for misfit in misfits:
        raise ValueError(misfit)


def _expected(name: str, part: Any) -> Any:
    """What a state has to look like: the part's own, and that of an AdamW which has taken a step."""
    own = part.state_dict()
    if name == "optimizer":
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        own["state"] = {
            index: {"step": torch.zeros(()), "exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()}
            for index, parameter in enumerate(parameters)
        }
    return own


def _other_rates(scheduler: Any, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    for last, group in zip(scheduler.get_last_lr(), optimizer.param_groups, strict=True):
        if last != group["lr"]:
            yield f"a learning rate is {group['lr']}, not the scheduler's {last}"


def _misfits(where: str, saved: Any, own: Any) -> Iterator[str]:
    """The places at which a state has another structure than a run's own, in words."""
    if type(saved) is not type(own):
        yield f"{where} is of type {type(saved).__name__}, not {type(own).__name__}"
    elif isinstance(own, dict):
        yield from (f"{where} should not have {key!r}" for key in saved if key not in own)
        for key, value in own.items():
            if key in saved:
                yield from _misfits(f"{where}[{key!r}]", saved[key], value)
            elif not where.endswith("['state']"):  # a parameter that has not trained yet has none
                yield f"{where} lacks {key!r}"
    elif isinstance(own, (list, tuple)):
        if len(saved) != len(own):
            yield f"{where} has {len(saved)} entries, not {len(own)}"
        for index, pair in enumerate(zip(saved, own, strict=False)):
            yield from _misfits(f"{where}[{index}]", *pair)
    elif _fixed(where, saved) != _fixed(where, own):
        yield f"{where} is {reprlib.repr(_fixed(where, saved))}, not {_fixed(where, own)}"


def _fixed(where: str, value: Any) -> Any:
    """What of a value every state of a run has in common: names, places of parameters, shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.layout, value.is_meta
    if where.endswith("['T_max']"):
        return "above 0" if value > 0 else value  # other ranks may share an epoch into other steps
    return value if isinstance(value, str) or "['params']" in where else None
