"""`unfreeze-sched distill`: the reference run, from arguments to report."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm

from unfreeze_sched import Block, MilestonePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.arguments import preset_from
from unfreeze_sched.distill.checkpoints import replacing, save_atomically
from unfreeze_sched.distill.command.arms import Arm, Imitating, Settings
from unfreeze_sched.distill.command.data import classes_for, data_of
from unfreeze_sched.distill.command.evaluation import Evaluation, evaluate
from unfreeze_sched.distill.command.imagenet import load_first_weights
from unfreeze_sched.distill.command.ranks import Ranks, joined
from unfreeze_sched.distill.command.records import around_transitions
from unfreeze_sched.distill.command.report import draw_report, phase_table
from unfreeze_sched.distill.command.runfolder import (
    check_output,
    claim,
    held,
    in_words,
    inputs_of,
    parsed,
    refuse_other_inputs,
    remove_left_overs,
    rooted,
    saved_run,
)
from unfreeze_sched.distill.command.runlog import RunLog, check_tensorboard, say, warn, warnings_in_one_line
from unfreeze_sched.distill.command.training import Training
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.wrapper import LATER, DistillationUNetWrapper, StudentUnet, build_unet, freeze_outside
from unfreeze_sched.guards import OverfitGuard

# A teacher is fine-tuned whole, its encoder at this fraction of the head's rate.
_TEACHER_SCALE = 0.3


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Carry out the run that the arguments ask for, on all the ranks that torchrun started.

    Args:
        args: The arguments.
        words: Of the command line, from which they were parsed.

    Raises:
        ValueError, OSError, ModuleNotFoundError: With one line that says what was wrong and what to do; nothing was
            written where something was refused.
    """
    with joined() as ranks, warnings_in_one_line(ranks), ExitStack() as stack:
        _run(args, words, ranks, stack)


def _run(args: argparse.Namespace, words: Sequence[str], ranks: Ranks, stack: ExitStack) -> None:
    begin = time.perf_counter()
    resumed = None if args.resume is None else Path(args.resume)
    # The run's folder is looked at by rank 0 alone, which is about to write there.
    args = ranks.agree(_asked(args, resumed, stack) if ranks.leads else None)
    if args.tensorboard:
        check_tensorboard()
    settings = _settings(args, ranks)
    training, validation, test = data_of(args, partial(say, ranks=ranks))
    _refuse_many_ranks(settings.batch_size, len(training), ranks)
    n_images = len(training) + (len(validation) if args.val is None else 0)
    wrapper, student = _student(args, classes_for(args.teacher, training), settings, n_images)
    arms = [student, _frozen_twin(wrapper, student)] if args.compare_frozen else [student]
    if args.teacher is None:
        arms.insert(0, _teacher(args, wrapper, settings))
    runs = {
        arm.name: Training(
            arm,
            training,
            validation,
            replace(settings, epochs=args.teacher_epochs or settings.epochs) if arm.name == "teacher" else settings,
            ranks,
            None if resumed is None else resumed / arm.name / "last.pth",
        )
        for arm in arms
    }
    # All that can be refused has been, before a teacher is trained for nothing; only now something is written.
    output = resumed or ranks.agree(claim(args.output, words, inputs_of(args)) if ranks.leads else None)
    if ranks.leads and not resumed:
        stack.enter_context(held(output))
    of_ranks = f", {ranks.world} ranks" if ranks.world > 1 else ""
    say(
        f"{n_images} training images, {len(validation)} {'of them ' if args.val is None else ''}for validation, "
        f"{len(test)} for the test; "
        f"{training.classes} classes; {settings.device}{of_ranks}; into {output}",
        ranks,
    )
    for line in _forecast(student.blocks, student.schedule):
        say(line, ranks)
    if student.guard is not None and ranks.leads:
        _warn_of_patience(student.guard.patience, student.schedule)
    with in_words(output):
        _train(runs, wrapper, output, ranks, events=args.tensorboard)
        runs.pop("teacher", None)
        scores = {name: evaluate(each.arm, test, settings, ranks) for name, each in runs.items()}
        if ranks.leads:
            _show(output, runs, scores, len(test), ranks)
            draw_report(output / "report.png", runs, test, settings.device)
    say(f"{output / 'report.png'} shows the run; {time.perf_counter() - begin:.0f} s in all", ranks)


def _train(
    runs: dict[str, Training], wrapper: DistillationUNetWrapper, output: Path, ranks: Ranks, *, events: bool
) -> None:
    """Train the arms, one after the other; the wrapper takes over the weights of a teacher among them."""
    if ranks.leads:
        remove_left_overs([output, *(output / name for name in runs)])
    with RunLog(output, ranks, events=events) as run_log:
        for name, each in runs.items():
            run_log.begin(name, each.steps, each.done)
            each.run(output / name, run_log)
            if ranks.leads:
                save_atomically(each.arm.unet.state_dict(), output / f"{name}.pth")
            if name == "teacher":
                wrapper.teacher.load_state_dict(each.arm.unet.state_dict())
                miou = 100 * each.records[-1].validation_miou
                run_log.tell(f"teacher: validation mIoU {miou:.1f} %; kept as {output / 'teacher.pth'}, for --teacher")


def _asked(args: argparse.Namespace, resumed: Path | None, stack: ExitStack) -> argparse.Namespace:
    """The arguments of the run, or of the interrupted one, which has to find what it was begun with."""
    if resumed is None:
        check_output(args.output)
        return args
    (saved, inputs), args = saved_run(resumed), rooted(args, str(Path.cwd()))
    for name, default in vars(parsed([])).items():
        given, begun = getattr(args, name), getattr(saved, name)
        if name != "resume" and given not in (default, begun):
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be as the run was begun with, {begun}, got {given}; "
                "leave it out beside --resume, or begin a new run"
            )
    with in_words(resumed):
        stack.enter_context(held(resumed))
    refuse_other_inputs(inputs, inputs_of(saved))
    return saved


def _settings(args: argparse.Namespace, ranks: Ranks) -> Settings:
    settings = Settings(
        args.epochs,
        args.lr,
        args.batch_size,
        args.seed,
        ranks.device(args.device),
        args.precision,
        args.accumulate,
        args.gradient_clip,
        args.num_workers,
    )
    settings.check()
    if args.sync_batchnorm and torch.device(settings.device).type != "cuda":
        raise ValueError(
            f"`--sync-batchnorm` must run on CUDA, which alone has such norms, got {settings.device}; leave it out, or "
            "freeze the norms with --norms frozen"
        )
    return settings


def _show(output: Path, runs: dict[str, Training], scores: dict[str, Evaluation], images: int, ranks: Ranks) -> None:
    """The tables, the scores on the test part, and `result.json`."""
    result: dict[str, Any] = {}
    for name, each in runs.items():
        say(phase_table(each.records, f"{name}: loss and mIoU on the validation part"), ranks)
        if each.held:
            say(f"{name}: {each.held}", ranks)
    for name, score in scores.items():
        say(f"test part, {images} images, {name}: loss {score.loss:.3f}, mIoU {100 * score.miou:.1f} %", ranks)
        result[name] = {"test_loss": score.loss, "test_miou": score.miou, **_told(runs[name])}
    with replacing(output / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())


def _refuse_many_ranks(batch_size: int, images: int, ranks: Ranks) -> None:
    """See that each rank gets as many images of a batch as the others, and at least two, which a batch norm needs."""
    least, world = 2 * ranks.world, ranks.world
    if world > 1 and (batch_size % world or batch_size < least):
        raise ValueError(
            f"`--batch-size` must be a multiple of the number of ranks, {world}, and at least {least}, got "
            f"{batch_size}; it is that of all ranks together, so pass {max(least, batch_size // world * world)}"
        )
    if world > 1 and images < least:
        raise ValueError(f"the training images must be at least {least} for {world} ranks, got {images}; start fewer")


def _teacher(args: argparse.Namespace, wrapper: DistillationUNetWrapper, settings: Settings) -> Arm:
    """The teacher to train first, built as the wrapper's own, which takes its weights over."""
    torch.manual_seed(settings.seed)
    classes = wrapper.teacher.segmentation_head[0].out_channels  # type: ignore[index,union-attr]  # smp ships no types
    unet = build_unet(StudentUnet, args.teacher_encoder, classes)
    load_first_weights(unet.encoder, args.teacher_encoder, "imagenet" if args.student_weights == "imagenet" else "none")
    if args.sync_batchnorm:
        convert_sync_batchnorm(unet)
    unet.to(settings.device)
    blocks = encoder_blocks(unet)
    freeze_outside(blocks, unet.encoder)
    schedule, loss = _constant(len(blocks), len(blocks)), DistillationLoss(alpha=0.0)
    return Arm("teacher", unet, Imitating(unet), blocks, schedule, _TEACHER_SCALE, args.norms, loss)


def _student(
    args: argparse.Namespace, classes: int, settings: Settings, n_images: int
) -> tuple[DistillationUNetWrapper, Arm]:
    """The student beside its teacher, whose weights come later where it has to be trained first."""
    if args.guard_restore and args.guard_patience is None:
        raise ValueError("`--guard-restore` must come with --guard-patience, got none; add --guard-patience 3")
    torch.manual_seed(settings.seed)
    preset = preset_from(args, n_images)
    wrapper = DistillationUNetWrapper(
        args.student_encoder,
        LATER if args.teacher is None else args.teacher,
        progressive_unfreeze=preset is not None,
        teacher_encoder=args.teacher_encoder,
        classes=classes,
        student_weights=None,
    )
    load_first_weights(wrapper.student.encoder, args.student_encoder, args.student_weights)
    if args.sync_batchnorm:
        convert_sync_batchnorm(wrapper.student)
    wrapper.to(settings.device)
    total, guard = len(wrapper.blocks), None
    if preset is None:  # as in the guide, the encoder trains from the start
        schedule, scale = _constant(total, total), args.learning_rate_scale or 1.0
    else:
        schedule = UnfreezeSchedule(preset=preset, total_blocks=total, total_epochs=settings.epochs)
        scale = preset.learning_rate_scale
    if args.guard_patience is not None:
        if preset is None:
            raise ValueError(
                "`--guard-patience` must come with progressive unfreezing, got an encoder that trains from epoch 0; "
                "add --preset auto"
            )
        guard = OverfitGuard(args.guard_patience, model=wrapper.student if args.guard_restore else None)
    return wrapper, Arm(
        "student", wrapper.student, wrapper, wrapper.blocks, schedule, scale, args.norms, DistillationLoss(), guard
    )


def _frozen_twin(wrapper: DistillationUNetWrapper, student: Arm) -> Arm:
    """The same student before its training, whose encoder stays frozen; it shares the teacher."""
    twin = copy.deepcopy(wrapper, {id(wrapper.teacher): wrapper.teacher})
    schedule = _constant(0, len(twin.blocks))
    return replace(
        student, name="frozen", unet=twin.student, forward=twin, blocks=twin.blocks, schedule=schedule, guard=None
    )


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


def _told(training: Training) -> dict[str, Any]:
    """What the history and the guard add to an arm's result."""
    around = around_transitions(training.records)
    transitions = []
    for transition in training.history:
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
    return {"transitions": transitions, "held": training.held or None}
