"""`unfreeze-sched distill`: the reference run, from arguments to report."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm

from unfreeze_sched import MilestonePreset, UnfreezeSchedule
from unfreeze_sched._checks import warn
from unfreeze_sched.arguments import preset_from
from unfreeze_sched.distill.checkpoints import replacing, save_atomically
from unfreeze_sched.distill.command.data import SegmentationData, classes_for, data_of
from unfreeze_sched.distill.command.imagenet import load_first_weights
from unfreeze_sched.distill.command.ranks import Ranks, joined
from unfreeze_sched.distill.command.report import around_transitions, draw_report, phase_table
from unfreeze_sched.distill.command.runfolder import as_begun, check_output, claim, held, inputs_of
from unfreeze_sched.distill.command.runlog import RunLog, say, tensorboard_writer, warnings_in_one_line
from unfreeze_sched.distill.command.training import Arm, Imitating, Settings, Training, evaluate
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.wrapper import LATER, DistillationUNetWrapper, StudentUnet, blocks_of, build_unet
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.parallel import agreed, speaks

# A teacher is fine-tuned whole, its encoder at this fraction of the head's rate.
_TEACHER_SCALE = 0.3


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Carry out the run that the arguments, parsed from `words`, ask for, on all the ranks that torchrun started.

    Raises:
        ValueError, OSError, ModuleNotFoundError: With one line that says what was wrong and what to do; nothing was
            written where something was refused.
    """
    begin, ranks = time.perf_counter(), joined()
    with warnings_in_one_line(), ExitStack() as stack:
        resumed = None if args.resume is None else Path(args.resume)
        if speaks():  # the folder is looked at by the one that is about to write there
            if resumed is None:
                check_output(args.output)
            else:
                args = as_begun(args, resumed)
                stack.enter_context(held(resumed))
        args = agreed(args)
        if args.tensorboard:
            tensorboard_writer()
        settings = _settings(args, ranks)
        training, validation, test = data_of(args, say)
        _refuse_many_ranks(settings.batch_size, len(training), ranks)
        n_images = len(training) + (len(validation) if args.val is None else 0)
        wrapper, student = _student(args, classes_for(args.teacher, training), settings, n_images)
        arms = [student, _frozen_twin(wrapper, student)] if args.compare_frozen else [student]
        if args.teacher is None:
            arms.insert(0, _teacher(args, wrapper, settings))
        runs = {
            arm.name: Training(arm, training, validation, settings, ranks, resumed and resumed / arm.name / "last.pth")
            for arm in arms
        }
        # All that can be refused has been, before a teacher is trained for nothing; only now something is written.
        output = resumed or agreed(claim(args.output, words, inputs_of(args)) if speaks() else None)
        if speaks() and not resumed:
            stack.enter_context(held(output))
        say(
            f"{n_images} training images, {len(validation)} {'of them ' if args.val is None else ''}for validation, "
            f"{len(test)} for the test; {training.classes} classes; {settings.device}"
            f"{f', {ranks.world} ranks' if ranks.world > 1 else ''}; into {output}"
        )
        _forecast(student)
        with RunLog(output, events=args.tensorboard) as log:
            _train(runs, wrapper, output, log)
        runs.pop("teacher", None)
        _show(runs, test, output, ranks)
        say(f"{output / 'report.png'} shows the run; {time.perf_counter() - begin:.0f} s in all")


def _train(runs: dict[str, Training], wrapper: DistillationUNetWrapper, output: Path, log: RunLog) -> None:
    """Train the arms, one after the other; the wrapper takes over the weights of a teacher among them."""
    if speaks():  # what a killed process had not finished
        for left in (*output.glob(".*.tmp"), *output.glob("*/.*.tmp")):
            left.unlink(missing_ok=True)
    for name, each in runs.items():
        log.begin(name, each.steps, each.done)
        each.run(output / name, log)
        if speaks():
            save_atomically(each.arm.unet.state_dict(), output / f"{name}.pth")
        if name == "teacher":
            wrapper.teacher.load_state_dict(each.arm.unet.state_dict())
            miou = 100 * each.records[-1].validation_miou
            log.tell(f"teacher: validation mIoU {miou:.1f} %; kept as {output / 'teacher.pth'}, for --teacher")


def _show(runs: dict[str, Training], test: SegmentationData, output: Path, ranks: Ranks) -> None:
    """The tables, the scores on the test part, `result.json` and the picture."""
    scores = {name: evaluate(each.arm, test, each.settings, ranks) for name, each in runs.items()}
    if not speaks():
        return
    for name, each in runs.items():
        say(phase_table(each.records, f"{name}: loss and mIoU on the validation part"))
        if each.held:
            say(f"{name}: {each.held}")
    for name, (loss, miou) in scores.items():
        say(f"test part, {len(test)} images, {name}: loss {loss:.3f}, mIoU {100 * miou:.1f} %")
    result = {name: _result(each, *scores[name]) for name, each in runs.items()}
    with replacing(output / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    draw_report(output / "report.png", runs, test)


def _settings(args: argparse.Namespace, ranks: Ranks) -> Settings:
    own = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = Settings(**own | {"device": ranks.device(args.device)})
    if args.sync_batchnorm and torch.device(settings.device).type != "cuda":
        raise ValueError(
            f"`--sync-batchnorm` must run on CUDA, which alone has such norms, got {settings.device}; leave it out, or "
            "freeze the norms with --norms frozen"
        )
    return settings


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
    blocks = blocks_of(unet)
    preset = MilestonePreset(milestones={0: len(blocks)}, learning_rate_scale=_TEACHER_SCALE)
    epochs = args.teacher_epochs or args.epochs
    schedule = UnfreezeSchedule(preset=preset, total_blocks=len(blocks), total_epochs=epochs)
    return Arm("teacher", unet, Imitating(unet), blocks, schedule, args.norms, DistillationLoss(alpha=0.0))


def _student(
    args: argparse.Namespace, classes: int, settings: Settings, n_images: int
) -> tuple[DistillationUNetWrapper, Arm]:
    """The student beside its teacher, whose weights come later where it has to be trained first."""
    preset = preset_from(args, n_images)
    if args.guard_restore and args.guard_patience is None:
        raise ValueError("`--guard-restore` must come with --guard-patience, got none; add --guard-patience 3")
    if args.guard_patience is not None and preset is None:
        raise ValueError(
            "`--guard-patience` must come with progressive unfreezing, got an encoder that trains from epoch 0; "
            "add --preset auto"
        )
    torch.manual_seed(settings.seed)
    wrapper = DistillationUNetWrapper(
        args.student_encoder,
        LATER if args.teacher is None else args.teacher,
        progressive_unfreeze=preset is not None,
        teacher_encoder=args.teacher_encoder,
        classes=classes,
        student_weights=None,
    )
    unet = wrapper.student
    load_first_weights(unet.encoder, args.student_encoder, args.student_weights)
    if args.sync_batchnorm:
        convert_sync_batchnorm(unet)
    wrapper.to(settings.device)
    blocks, guard = wrapper.blocks, None
    # As in the guide, the encoder trains from the start where no unfreezing is asked for.
    all_now = MilestonePreset(milestones={0: len(blocks)}, learning_rate_scale=args.learning_rate_scale or 1.0)
    schedule = UnfreezeSchedule(preset=preset or all_now, total_blocks=len(blocks), total_epochs=args.epochs)
    if args.guard_patience is not None:
        guard = OverfitGuard(args.guard_patience, model=unet if args.guard_restore else None)
    return wrapper, Arm("student", unet, wrapper, blocks, schedule, args.norms, DistillationLoss(), guard)


def _frozen_twin(wrapper: DistillationUNetWrapper, student: Arm) -> Arm:
    """The same student before its training, whose encoder stays frozen; it shares the teacher."""
    twin = copy.deepcopy(wrapper, {id(wrapper.teacher): wrapper.teacher})
    schedule = student.schedule.replace(preset=MilestonePreset(milestones={0: 0}))
    own = {"unet": twin.student, "forward": twin, "blocks": twin.blocks, "schedule": schedule}
    return replace(student, name="frozen", guard=None, **own)


def _forecast(student: Arm) -> None:
    """Say what will join when, what never will, and where a guard cannot trip before the last transition."""
    blocks, schedule = student.blocks, student.schedule
    transitions = schedule.transitions()
    for epoch, number in transitions:
        say(f"epoch {epoch}: {number} of {len(blocks)} blocks train")
    if never := [block.name for block in blocks[::-1]][schedule.blocks_at(schedule.total_epochs) :]:
        say(
            f"never within {schedule.total_epochs} epochs: {', '.join(never)}; train longer, or start earlier and at a "
            "smaller rate, to unfreeze them too"
        )
    checks = max((after - before for (before, _), (after, _) in pairwise(transitions)), default=0)
    if student.guard is not None and student.guard.patience > checks:
        warn(
            f"`--guard-patience` {student.guard.patience} holds no block back: the count starts afresh at each "
            f"transition, and the next is at most {checks} checks away"
        )


def _result(training: Training, loss: float, miou: float) -> dict[str, Any]:
    """What `result.json` has of an arm."""
    around = around_transitions(training.records)
    transitions = [
        {
            "epoch": each.epoch,
            "blocks": each.number,
            "learning_rates": each.learning_rates,
            "reason": each.reason,
            "validation_loss_before": around[each.epoch][0] if each.epoch in around else None,
            "validation_loss_after": around[each.epoch][1] if each.epoch in around else None,
        }
        for each in training.history
    ]
    return {"test_loss": loss, "test_miou": miou, "transitions": transitions, "held": training.held or None}
