"""`unfreeze-sched distill`: the reference run, from arguments to report."""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unfreeze_sched import Block, MilestonePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.distill.checkpoints import save_atomically
from unfreeze_sched.distill.command import board
from unfreeze_sched.distill.command.arguments import preset_from
from unfreeze_sched.distill.command.arms import Arm, Settings, imitating
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.evaluation import Evaluation, evaluate
from unfreeze_sched.distill.command.inputs import classes_for, data_of
from unfreeze_sched.distill.command.ranks import Ranks, joined
from unfreeze_sched.distill.command.records import Outcome, around_transitions
from unfreeze_sched.distill.command.report import draw_report, phase_table
from unfreeze_sched.distill.command.runfolder import new_folder, save_arguments, saved_arguments
from unfreeze_sched.distill.command.runlog import RunLog, warn, warnings_in_one_line
from unfreeze_sched.distill.command.training import train
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.wrapper import (
    LATER,
    DistillationUNetWrapper,
    StudentUnet,
    build_unet,
    freeze_outside,
    load_student_weights,
)
from unfreeze_sched.guards import OverfitGuard

# A teacher is fine-tuned whole, its encoder at this fraction of the head's rate.
_TEACHER_SCALE = 0.3


def run(args: argparse.Namespace) -> None:
    """Carry out the run that the arguments ask for, on all the ranks that torchrun started.

    Raises:
        ValueError, OSError, ModuleNotFoundError: With one line that says what was wrong and what to do.
    """
    with joined() as ranks, warnings_in_one_line(ranks):
        _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    begin = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True, quiet=not ranks.leads)
    resumed = args.resume is not None
    # Files are looked at by rank 0 alone, which is about to write there.
    output, args = ranks.agree(_folder_and_arguments(args) if ranks.leads else None)
    if args.tensorboard and ranks.leads:
        board.check()
    _refuse_many_ranks(args.batch_size, ranks)
    settings = Settings(args.epochs, args.lr, args.batch_size, args.seed, ranks.device(args.device))
    training, validation, test = data_of(args, partial(console.print, markup=False))
    n_images = len(training) + (len(validation) if args.val is None else 0)
    classes = classes_for(args.teacher, training)
    console.print(
        f"{n_images} training images, {len(validation)} {'of them ' if args.val is None else ''}for validation, "
        f"{len(test)} for the test; "
        f"{training.classes} classes; {settings.device}{f', {ranks.world} ranks' if ranks.world > 1 else ''}; "
        f"into {output}"
    )
    # All that can be refused is, before a teacher has been trained for nothing.
    wrapper, student = _student(args, classes, settings, n_images)
    for line in _forecast(student.blocks, student.schedule):
        console.print(line)
    if student.guard is not None and ranks.leads:
        _warn_of_patience(student.guard.patience, student.schedule)
    if ranks.leads and not resumed:
        save_arguments(args, output)
    with RunLog(console, output, ranks, events=args.tensorboard) as run_log:
        if args.teacher is None:
            path = _train_teacher(args, classes, training, validation, settings, output, run_log, ranks)
            wrapper.load_teacher(path)
        arms = [student, _frozen_twin(wrapper, student)] if args.compare_frozen else [student]
        outcomes: dict[str, Outcome] = {}
        for arm in arms:
            _make_folder(output / arm.name, ranks)
            run_log.begin(arm.name, settings.epochs, training, settings)
            torch.manual_seed(settings.seed)  # stochastic depth draws alike in both arms
            outcomes[arm.name] = train(arm, training, validation, settings, output / arm.name, run_log, ranks)
            if ranks.leads:
                save_atomically(arm.unet.state_dict(), output / f"{arm.name}.pth")
    scores = {arm.name: evaluate(arm, test, settings, ranks) for arm in arms}
    if ranks.leads:
        _show(console, output, outcomes, scores, len(test))
        frozen = outcomes["frozen"].records if "frozen" in outcomes else ()
        draw_report(output / "report.png", student, outcomes["student"], frozen, test, settings.device)
        console.print(f"{output / 'report.png'} shows the run; {time.perf_counter() - begin:.0f} s in all")


def _show(
    console: Console, output: Path, outcomes: dict[str, Outcome], scores: dict[str, Evaluation], images: int
) -> None:
    """The tables, the scores on the test part, and `result.json`."""
    result: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        console.print(phase_table(outcome.records, f"{name}: loss and mIoU on the validation part"), markup=False)
        if outcome.held:
            console.print(f"{name}: {outcome.held}")
    for name, score in scores.items():
        console.print(f"test part, {images} images, {name}: loss {score.loss:.3f}, mIoU {100 * score.miou:.1f} %")
        result[name] = {"test_loss": score.loss, "test_miou": score.miou, **_told(outcomes[name])}
    (output / "result.json").write_text(json.dumps(result, indent=2))


def _frozen_twin(wrapper: DistillationUNetWrapper, student: Arm) -> Arm:
    """The same student before its training, whose encoder stays frozen; it shares the teacher."""
    twin = copy.deepcopy(wrapper, {id(wrapper.teacher): wrapper.teacher})
    schedule = _constant(0, len(twin.blocks))
    return replace(
        student, name="frozen", unet=twin.student, forward=twin, blocks=twin.blocks, schedule=schedule, guard=None
    )


def _folder_and_arguments(args: argparse.Namespace) -> tuple[Path, argparse.Namespace]:
    if args.resume is not None:
        output = Path(args.resume)
        return output, saved_arguments(output)
    if args.guard_restore and args.guard_patience is None:
        raise ValueError("`--guard-restore` must come with --guard-patience, got none; add --guard-patience 3")
    return new_folder(args.output), args


def _make_folder(folder: Path, ranks: Ranks) -> None:
    if ranks.leads:
        folder.mkdir(exist_ok=True)
    ranks.agree(None)


def _refuse_many_ranks(batch_size: int, ranks: Ranks) -> None:
    if batch_size < ranks.world:
        raise ValueError(
            f"`--batch-size` must be at least the number of ranks, {ranks.world}, got {batch_size}; "
            "it is that of all ranks together, so raise it or start fewer"
        )


def _train_teacher(
    args: argparse.Namespace,
    classes: int,
    training: SegmentationData,
    validation: SegmentationData,
    settings: Settings,
    output: Path,
    run_log: RunLog,
    ranks: Ranks,
) -> Path:
    torch.manual_seed(settings.seed)
    unet = build_unet(StudentUnet, args.teacher_encoder, classes)
    load_student_weights(unet.encoder, args.teacher_encoder, "imagenet" if args.student_weights == "imagenet" else None)
    unet.to(settings.device)
    blocks = encoder_blocks(unet)
    freeze_outside(blocks, unet.encoder)
    settings = replace(settings, epochs=args.teacher_epochs or settings.epochs)
    schedule = _constant(len(blocks), len(blocks))
    arm = Arm(
        "teacher", unet, imitating(unet), blocks, schedule, _TEACHER_SCALE, args.norms, DistillationLoss(alpha=0.0)
    )
    _make_folder(output / arm.name, ranks)
    run_log.begin(arm.name, settings.epochs, training, settings)
    record = train(arm, training, validation, settings, output / arm.name, run_log, ranks).records[-1]
    path = output / "teacher.pth"
    if ranks.leads:
        save_atomically(unet.state_dict(), path)
    ranks.agree(None)  # the file is there
    run_log.transition(f"teacher: validation mIoU {100 * record.validation_miou:.1f} %; kept as {path}, for --teacher")
    return path


def _student(
    args: argparse.Namespace, classes: int, settings: Settings, n_images: int
) -> tuple[DistillationUNetWrapper, Arm]:
    """The student beside its teacher, whose weights come later where it has to be trained first."""
    torch.manual_seed(settings.seed)
    wrapper = DistillationUNetWrapper(
        args.student_encoder,
        LATER if args.teacher is None else args.teacher,
        progressive_unfreeze=preset_from(args, n_images) is not None,
        teacher_encoder=args.teacher_encoder,
        classes=classes,
        student_weights=None if args.student_weights == "none" else args.student_weights,
    ).to(settings.device)
    schedule, scale = _schedule(args, len(wrapper.blocks), settings.epochs, n_images)
    guard = None
    if args.guard_patience is not None:
        if preset_from(args, n_images) is None:
            raise ValueError(
                "`--guard-patience` must come with progressive unfreezing, got an encoder that trains from epoch 0; "
                "add --preset auto"
            )
        guard = OverfitGuard(args.guard_patience, model=wrapper.student if args.guard_restore else None)
    return wrapper, Arm(
        "student", wrapper.student, wrapper, wrapper.blocks, schedule, scale, args.norms, DistillationLoss(), guard
    )


def _schedule(args: argparse.Namespace, blocks: int, epochs: int, n_images: int) -> tuple[UnfreezeSchedule, float]:
    """The student's schedule, and the ratio of its blocks' learning rates to the head's."""
    preset = preset_from(args, n_images)
    if preset is None:  # as in the guide, the encoder trains from the start
        return _constant(blocks, blocks), args.learning_rate_scale or 1.0
    schedule = UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=epochs)
    return schedule, preset.learning_rate_scale


def _constant(number: int, total: int) -> UnfreezeSchedule:
    """The same number of blocks at every epoch."""
    return UnfreezeSchedule(preset=MilestonePreset(milestones={0: number}), total_blocks=total, total_epochs=1)


def _forecast(blocks: tuple[Block, ...], schedule: UnfreezeSchedule) -> list[str]:
    """What will join when, and what never will."""
    names = [block.name for block in blocks][::-1]
    lines = [f"epoch {epoch}: {number} of {len(names)} blocks train" for epoch, number in schedule.transitions()]
    never = names[schedule.blocks_at(schedule.total_epochs) :]
    if never:
        lines.append(
            f"never within {schedule.total_epochs} epochs: {', '.join(never)}; train longer, or start earlier and at a "
            "smaller rate, to unfreeze them too"
        )
    return lines


def _warn_of_patience(patience: int, schedule: UnfreezeSchedule) -> None:
    """Say so where a guard will never hold a block back before the last transition."""
    epochs = [epoch for epoch, _ in schedule.transitions()]
    most = max((after - before for before, after in pairwise(epochs)), default=0)
    if most == 0:
        warn("`--guard-patience` has nothing to hold back: no block joins after the first transition")
    elif patience > most:
        warn(
            f"`--guard-patience` should be at most {most}, the checks from one transition to the next, got {patience}: "
            "each transition starts the count afresh, so the guard cannot trip before the last"
        )


def _told(outcome: Outcome) -> dict[str, Any]:
    """What the history and the guard add to an arm's result."""
    around = around_transitions(outcome.records)
    transitions = []
    for transition in outcome.history:
        before, after = around.get(transition.epoch, (None, None))
        transitions.append(
            {
                "epoch": transition.epoch,
                "blocks": transition.number,
                "learning_rates": transition.learning_rates,
                "reason": transition.reason,
                "validation_loss_before": before,
                "validation_loss_after": after,
            }
        )
    return {"transitions": transitions, "held": outcome.held or None}
