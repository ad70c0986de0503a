"""`unfreeze-sched distill`: the reference run, from arguments to report."""

from __future__ import annotations

import argparse
import json
import reprlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unfreeze_sched import Block, MilestonePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.distill.arguments import add_arguments, preset_from
from unfreeze_sched.distill.checkpoints import classes_of, save_atomically
from unfreeze_sched.distill.data import SegmentationData, load_folder, load_sample
from unfreeze_sched.distill.imagenet import IMAGENET_NORMALISATION, Normalisation, normalisation
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.report import draw_report, phase_table
from unfreeze_sched.distill.training import Arm, EpochRecord, Settings, evaluate, imitating, train
from unfreeze_sched.distill.wrapper import DistillationUNetWrapper, StudentUnet, build_unet, load_student_weights

# A fifth of the training images validates; of a folder a fifth is set aside as the test part first.
_HELD_OUT = 0.2
# A teacher is fine-tuned whole, its encoder at this fraction of the head's rate.
_TEACHER_SCALE = 0.3


def run(args: argparse.Namespace) -> None:
    """Carry out the run that the arguments ask for.

    Raises:
        ValueError, OSError, ModuleNotFoundError: With one line that says what was wrong and what to do.
    """
    begin = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    resumed = args.resume is not None
    output = Path(args.resume) if resumed else _new_folder(args.output)
    args = _saved_arguments(output) if resumed else args
    settings = Settings(args.epochs, args.lr, args.batch_size, args.seed, _device(args.device))
    training, validation, test = _data(args)
    n_images = len(training) + len(validation)
    classes = _classes(args.teacher, training)
    console.print(
        f"{n_images} training images, {len(validation)} of them for validation, {len(test)} for the test; "
        f"{training.classes} classes; {settings.device}; into {output}"
    )
    # All that can be refused is, before a teacher has been trained for nothing.
    for line in _plan(*_foreseen(args, classes, settings, n_images)):
        console.print(line)
    if not resumed:
        _save_arguments(args, output)
    with _Teller(console, output) as teller:
        teacher = args.teacher
        if teacher is None:
            teacher = _train_teacher(args, classes, training, validation, settings, output, teller)
        student = _student(args, teacher, classes, settings, n_images)
        arms = [student]
        if args.compare_frozen:
            frozen = _student(args, teacher, classes, settings, n_images)
            arms.append(replace(frozen, name="frozen", schedule=_constant(0, len(frozen.blocks))))
        records = {}
        for arm in arms:
            (output / arm.name).mkdir(exist_ok=True)
            teller.begin(arm.name, settings.epochs, training, settings)
            torch.manual_seed(settings.seed)  # stochastic depth draws alike in both arms
            records[arm.name] = train(arm, training, validation, settings, output / arm.name, teller)
            save_atomically(arm.unet.state_dict(), output / f"{arm.name}.pth")
    for arm in arms:
        console.print(phase_table(records[arm.name], f"{arm.name}: loss and mIoU on the validation part"))
    scores = {arm.name: evaluate(arm, test, settings) for arm in arms}
    for name, score in scores.items():
        console.print(f"test part, {len(test)} images, {name}: loss {score.loss:.3f}, mIoU {100 * score.miou:.1f} %")
    result = {name: {"test_loss": score.loss, "test_miou": score.miou} for name, score in scores.items()}
    (output / "result.json").write_text(json.dumps(result, indent=2))
    draw_report(output / "report.png", student, records["student"], records.get("frozen", []), test, settings.device)
    console.print(f"{output / 'report.png'} shows the run; {time.perf_counter() - begin:.0f} s in all")


class _Teller:
    """Tells the console of the run, and `metrics.jsonl` of its epochs."""

    def __init__(self, console: Console, output: Path) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._metrics = (output / "metrics.jsonl").open("w", encoding="utf-8")
        self._task: Any = None
        self._name = ""
        self._steps = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()

    def begin(self, name: str, epochs: int, training: SegmentationData, settings: Settings) -> None:
        """A new arm, of so many epochs."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._name = name
        self._steps = -(-len(training) // settings.batch_size)
        self._task = self._progress.add_task(name, total=epochs * self._steps)

    def step(self) -> None:
        """One optimizer step was taken."""
        self._progress.advance(self._task)

    def transition(self, line: str) -> None:
        """Blocks joined."""
        self._progress.console.print(line)

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""
        self._metrics.write(json.dumps(record.as_dict()) + "\n")
        self._metrics.flush()
        self._progress.update(
            self._task,
            completed=(record.epoch + 1) * self._steps,
            description=f"{self._name}, epoch {record.epoch}: loss {record.train_loss:.3f}, "
            f"mIoU {100 * record.validation_miou:.1f} %",
        )


def _train_teacher(
    args: argparse.Namespace,
    classes: int,
    training: SegmentationData,
    validation: SegmentationData,
    settings: Settings,
    output: Path,
    teller: _Teller,
) -> Path:
    torch.manual_seed(settings.seed)
    unet = build_unet(StudentUnet, args.teacher_encoder, classes)
    load_student_weights(unet.encoder, args.teacher_encoder, "imagenet" if args.student_weights == "imagenet" else None)
    unet.to(settings.device)
    blocks = encoder_blocks(unet)
    settings = replace(settings, epochs=args.teacher_epochs or settings.epochs)
    schedule = _constant(len(blocks), len(blocks))
    arm = Arm(
        "teacher", unet, imitating(unet), blocks, schedule, _TEACHER_SCALE, args.norms, DistillationLoss(alpha=0.0)
    )
    (output / arm.name).mkdir(exist_ok=True)
    teller.begin(arm.name, settings.epochs, training, settings)
    record = train(arm, training, validation, settings, output / arm.name, teller)[-1]
    path = output / "teacher.pth"
    save_atomically(unet.state_dict(), path)
    teller.transition(f"teacher: validation mIoU {100 * record.validation_miou:.1f} %; kept as {path}, for --teacher")
    return path


def _student(args: argparse.Namespace, teacher: Any, classes: int, settings: Settings, n_images: int) -> Arm:
    torch.manual_seed(settings.seed)
    wrapper = DistillationUNetWrapper(
        args.student_encoder,
        teacher,
        progressive_unfreeze=preset_from(args, n_images) is not None,
        teacher_encoder=args.teacher_encoder,
        classes=classes,
        student_weights=_weights(args),
    ).to(settings.device)
    schedule, scale = _schedule(args, len(wrapper.blocks), settings.epochs, n_images)
    return Arm("student", wrapper.student, wrapper, wrapper.blocks, schedule, scale, args.norms, DistillationLoss())


def _schedule(args: argparse.Namespace, blocks: int, epochs: int, n_images: int) -> tuple[UnfreezeSchedule, float]:
    """The student's schedule, and the ratio of its blocks' learning rates to the head's."""
    preset = preset_from(args, n_images)
    if preset is None:  # as in the guide, the encoder trains from the start
        return _constant(blocks, blocks), args.learning_rate_scale or 1.0
    schedule = UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=epochs)
    return schedule, preset.learning_rate_scale


def _foreseen(
    args: argparse.Namespace, classes: int, settings: Settings, n_images: int
) -> tuple[tuple[Block, ...], UnfreezeSchedule]:
    """The student's blocks and schedule, with all that its construction may refuse."""
    unet = build_unet(StudentUnet, args.student_encoder, classes)
    load_student_weights(unet.encoder, args.student_encoder, _weights(args))
    blocks = encoder_blocks(unet)
    return blocks, _schedule(args, len(blocks), settings.epochs, n_images)[0]


def _weights(args: argparse.Namespace) -> str | None:
    return None if args.student_weights == "none" else args.student_weights


def _constant(number: int, total: int) -> UnfreezeSchedule:
    """The same number of blocks at every epoch."""
    return UnfreezeSchedule(preset=MilestonePreset(milestones={0: number}), total_blocks=total, total_epochs=1)


def _plan(blocks: tuple[Block, ...], schedule: UnfreezeSchedule) -> list[str]:
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


def _data(args: argparse.Namespace) -> tuple[SegmentationData, SegmentationData, SegmentationData]:
    """Training, validation and test part."""
    mean, std = _normalisation(args.student_encoder)
    if args.data is None:
        whole, test = (load_sample(part, image_size=args.image_size, mean=mean, std=std) for part in ("train", "test"))
    else:
        folder = load_folder(args.data, image_size=args.image_size, mean=mean, std=std)
        whole, test = folder.split(_HELD_OUT, seed=args.seed)
    training, validation = whole.split(_HELD_OUT, seed=args.seed)
    for part in (training, validation, test):
        part.check()
    return training, validation, test


def _normalisation(encoder: str) -> Normalisation:
    try:
        return normalisation(encoder)
    except ValueError:  # a name that timm does not know; most of these weights were trained with the usual constants
        return IMAGENET_NORMALISATION


def _classes(teacher: str | None, data: SegmentationData) -> int:
    """Output channels: one for a binary teacher, else one a class."""
    return 1 if teacher is not None and data.classes == 2 and classes_of(teacher) == 1 else data.classes  # noqa: PLR2004  # two classes are a binary mask


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`--device` must be a device of this machine, got {name!r}; leave it out or say cpu"
        ) from error
    return name


def _save_arguments(args: argparse.Namespace, output: Path) -> None:
    """Keep the arguments for a resume, which may be started from another folder."""
    for name in ("data", "teacher", "student_weights"):
        value = getattr(args, name)
        if value is not None and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    partial = output / "arguments.json.partial"
    partial.write_text(json.dumps({name: value for name, value in vars(args).items() if name != "command"}, indent=2))
    partial.replace(output / "arguments.json")


def _saved_arguments(output: Path) -> argparse.Namespace:
    path = output / "arguments.json"
    known = argparse.ArgumentParser()
    add_arguments(known)
    expected, problem = set(vars(known.parse_args([]))), "arguments of another version"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        saved, problem = None, type(error).__name__
    actions = known._actions  # noqa: SLF001  # argparse has no public name for them
    fits = isinstance(saved, dict) and set(saved) == expected
    if fits and (wrong := [a.dest for a in actions if a.dest in saved and not _takes(a, saved[a.dest])]):
        fits, problem = False, f"{wrong[0]} is {reprlib.repr(saved[wrong[0]])}"
    if not fits:
        raise ValueError(
            f"`--resume` must be the folder of a run of this command, got {output}, whose arguments.json cannot be "
            f"read ({problem}); give the folder that the run named at its start"
        )
    return argparse.Namespace(**saved)


def _takes(action: argparse.Action, value: Any) -> bool:
    """Whether an option of the command line gives such a value."""
    if action.nargs == 0:
        return isinstance(value, bool)
    if value is None or value == action.default:
        return type(value) is type(action.default)
    read = action.type if callable(action.type) else str
    try:
        again = read(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return type(again) is type(value) and again == value and (action.choices is None or value in action.choices)


def _new_folder(name: str | None) -> Path:
    folder = Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"`--output` must be a new or empty folder, got {folder}; name another, nothing is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
