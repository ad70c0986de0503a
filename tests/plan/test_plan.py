"""`unfreeze-sched plan`: its figures against real runs, its shape, its speed, and what it says to wrong input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import schedules
from torch import nn

import unfreeze_sched
from unfreeze_sched import (
    LARGE,
    MEDIUM,
    SMALL,
    FractionPreset,
    MilestonePreset,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
    encoder_blocks,
)
from unfreeze_sched.cli import main
from unfreeze_sched.plan import memory
from unfreeze_sched.plan.phases import STATES, Plan, as_text, make_plan

# smp deprecates the `timm-` prefix, which users still have, in favour of `tu-`.
pytestmark = pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")

GUIDE = Path(unfreeze_sched.__file__).parent / "schedule" / "choosing.md"
RUN = ["plan", "--total-epochs", "50"]


def planned(capsys: Any, *words: str) -> Plan:
    """The plan that the command prints as JSON."""
    assert main(["plan", *words, "--json"]) == 0
    return Plan.model_validate_json(capsys.readouterr().out)


# --- phases


@given(schedules())
def test_phases_are_the_schedule(schedule: UnfreezeSchedule) -> None:
    """Written out epoch by epoch, the phases are the schedule; joins and refreezes add up; rates follow the formula."""
    plan = make_plan(schedule, 2.0, 0.5)
    epochs = [(e, phase) for phase in plan.phases for e in range(phase.first_epoch, phase.last_epoch + 1)]
    assert [e for e, _ in epochs] == list(range(schedule.total_epochs))
    assert [phase.unfrozen for _, phase in epochs] == list(schedule)
    names = [f"blocks[{i}]" for i in range(schedule.total_blocks)]
    trained: list[str] = []
    for phase in plan.phases:
        assert [trained.pop() for _ in phase.refrozen] == list(phase.refrozen)
        trained += phase.joins
        assert trained == names[::-1][: phase.unfrozen]
        assert list(phase.learning_rates) == ["head", *trained]
    for i, block in enumerate(plan.blocks):
        assert block.learning_rate == pytest.approx(
            2.0 * schedule.preset.learning_rate_scale * 0.5 ** (schedule.total_blocks - 1 - i)
        )
        first = [e for e, number in enumerate(schedule) if number >= schedule.total_blocks - i]
        assert block.first_epoch == (first[0] if first else None)


# --- memory, against real runs


def real_run(name: str, size: int, schedule: UnfreezeSchedule, norms: Any = "eval") -> list[int]:
    """Bytes that a real forward pass saves for backward in each phase, with blocks and norms as the unfreezer has them."""
    model = make_real(name, size)
    blocks = encoder_blocks(model)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    head = [parameter for parameter in model.parameters() if parameter not in inside and parameter.requires_grad]
    unfreezer = ProgressiveUnfreezer(blocks, torch.optim.SGD(head, lr=1.0), schedule, norms=norms)
    kept = []
    for epoch in (0, *(epoch for epoch, _ in schedule.transitions())):
        unfreezer.apply(epoch)
        model.train()
        with memory.saved_for_backward(model) as saved:
            output = model(torch.randn(2, 3, size, size))
        kept.append(sum(storage.nbytes() for storage in saved))
        del output, saved
    return kept


def make_real(name: str, size: int) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    timm = pytest.importorskip("timm")
    if name.startswith(("vit", "convnext")):
        keywords = {"img_size": size} if name.startswith("vit") else {}
        return timm.create_model(name, pretrained=False, **keywords)  # type: ignore[no-any-return]
    return smp.Unet(name, encoder_weights=None)  # type: ignore[no-any-return]


def planned_run(name: str, size: int, schedule: UnfreezeSchedule, norms: Any = "eval") -> list[int]:
    measured = memory.measure(name, (size, size), 2, "sgd", norms)
    plan = make_plan(schedule, 1.0, measured=measured)
    return [phase.memory.activations for phase in plan.phases if phase.memory]


def one_a_epoch(blocks: int) -> UnfreezeSchedule:
    preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)
    return UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=blocks + 1)


ENCODERS = {
    "resnet18": (4, 64),
    "timm-efficientnet-b0": (7, 64),
    "mit_b0": (4, 64),
    "vit_tiny_patch16_224": (12, 48),
    "convnext_atto": (4, 64),
    "mobilenet_v2": (17, 32),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_activations_are_those_of_a_real_run(name: str) -> None:
    """In every phase the figure is the real one, to the byte on the CPU, and so within the 10 % that are promised."""
    blocks, size = ENCODERS[name]
    schedule = one_a_epoch(blocks)
    assert planned_run(name, size, schedule) == real_run(name, size, schedule)


@pytest.mark.parametrize("norms", ["frozen", "fixed", "train"])
def test_activations_follow_the_norms(norms: str) -> None:
    """The same for norms held in evaluation for good, and for norms left in training."""
    schedule = one_a_epoch(4)
    assert planned_run("resnet18", 64, schedule, norms) == real_run("resnet18", 64, schedule, norms)


def test_fixed_norms_are_no_parameters_of_their_blocks() -> None:
    """Nor of the head, and they are not unused; what trains is what a real run has in its optimizer."""
    fixed, trained = (memory.measure("resnet18", (64, 64), 2, "sgd", norms) for norms in ("fixed", "eval"))
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = smp.Unet("resnet18", encoder_weights=None).encoder
    norms = sum(m.weight.numel() + m.bias.numel() for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert sum(t.parameters - f.parameters for t, f in zip(trained.parts, fixed.parts, strict=True)) == norms > 0
    assert fixed.encoder == trained.encoder


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of the wrong phase, of every view anew, or of the weights, is more than 10 % off the real figure."""
    schedule = one_a_epoch(4)
    real = real_run("mit_b0", 64, schedule)

    def is_off() -> bool:
        figures = zip(planned_run("mit_b0", 64, schedule), real, strict=True)
        return any(abs(figure / truth - 1) > 0.1 for figure, truth in figures)

    assert not is_off()
    counting = memory.saved_activations
    for name, wrong in {
        "saved_activations": lambda fake, blocks, number, norms: counting(fake, blocks, max(number - 1, 0), norms),
        "_key": id,  # not even a name of the tensor, let alone of its storage
        "chain": lambda *_: [],
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, wrong)
            assert is_off(), name


def test_gradients_and_optimizer_state_are_exact() -> None:
    """With AdamW and refreezing, bytes of gradients and states after a real step are the plan's, kept or dropped."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    schedule = UnfreezeSchedule(
        preset=MilestonePreset(milestones={1: 1, 2: 3, 3: 1, 4: 2}), total_blocks=4, total_epochs=5
    )
    measured = memory.measure("resnet18", (32, 32), 2, "adamw", "eval")
    for on_refreeze in ("keep", "drop"):
        plan = make_plan(schedule, 1e-3, drops=on_refreeze == "drop", measured=measured)
        model = smp.Unet("resnet18", encoder_weights=None)
        head = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
        optimizer = torch.optim.AdamW(head)
        unfreezer = ProgressiveUnfreezer(encoder_blocks(model), optimizer, schedule, on_refreeze=on_refreeze)  # type: ignore[arg-type]
        for phase in plan.phases:
            unfreezer.apply(phase.first_epoch)
            model(torch.randn(2, 3, 32, 32)).mean().backward()
            optimizer.step()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            states = [v for state in optimizer.state.values() for v in state.values()]
            assert phase.memory is not None
            assert phase.memory.gradients == sum(g.nbytes for g in gradients)
            assert phase.memory.optimizer == sum(v.nbytes for v in states)
            assert phase.memory.weights == sum(t.nbytes for t in model.state_dict().values())
            assert phase.trainable_parameters == sum(p.numel() for p in model.parameters() if p.grad is not None)
            optimizer.zero_grad()


OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_by_the_optimizers_themselves(name: str, dtype: torch.dtype) -> None:
    """A real step of each optimizer leaves the bytes of state that are stated, for a scalar to a kernel."""
    make = OPTIMIZERS.get(name) or pytest.importorskip("lion_pytorch").Lion
    for shape in [(), (3,), (4, 5), (2, 3, 4, 5)]:
        parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
        optimizer = make([parameter])
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        kept = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        assert STATES[name](shape, parameter.element_size()) == sum(v.nbytes for v in kept), shape


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_a_billion_parameters_are_not_allocated() -> None:
    """A model of four gigabytes is planned within the memory that torch itself needs, more or less."""
    pytest.importorskip("timm")
    code = (
        "import sys; from unfreeze_sched.cli import main;"
        "code = main(['plan', '--total-epochs', '1', '--unfreeze_start', '0', '--encoder', 'eva_giant_patch14_224',"
        "'--json']);"
        "print(open('/proc/self/status').read(), file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    plan = Plan.model_validate_json(result.stdout)
    assert plan.encoder is not None
    assert plan.encoder.parameters > 10**9
    assert plan.phases[0].memory is not None
    assert plan.phases[0].memory.weights > 4 * 10**9
    peak = re.search(r"VmHWM:\s+(\d+) kB", result.stderr)  # getrusage's peak is inherited from whoever forked
    assert peak
    assert int(peak[1]) * 1024 < 1.5 * 10**9


# --- the command


def test_without_an_encoder_there_is_no_torch() -> None:
    """With a number of blocks the answer is there without torch, which takes longer to import than all the rest."""
    code = "import sys; from unfreeze_sched.cli import main; main({}); sys.exit('torch' in sys.modules)"
    for words in (["--blocks", "7"], ["--blocks", "7", "--json"], ["--blocks", "7", "--preset", "large"]):
        result = subprocess.run([sys.executable, "-c", code.format([*RUN, *words])], check=False, capture_output=True)
        assert result.returncode == 0, result.stderr


def test_json_has_a_stable_shape(capsys: Any) -> None:
    """The keys of version 1, all of them, and figures that belong together."""
    plan = planned(capsys, *("--total-epochs", "50", "--encoder", "timm-efficientnet-b0", "--image-size", "64x96"))
    data = plan.model_dump(mode="json")
    assert list(data) == ["version", "schedule", "head_learning_rate", "encoder", "blocks", "phases"]
    assert data["version"] == 1
    assert set(data["encoder"]) == {
        *("name", "model", "parameters", "head_parameters", "unused", "image_size", "batch_size", "optimizer"),
    }
    assert set(data["blocks"][0]) == {"name", "parameters", "first_epoch", "learning_rate"}
    assert set(data["phases"][0]) == {
        *("first_epoch", "last_epoch", "unfrozen", "joins", "refrozen", "trainable_parameters", "trainable_share"),
        *("learning_rates", "memory"),
    }
    assert set(data["phases"][0]["memory"]) == {"weights", "gradients", "optimizer", "activations", "total"}
    assert UnfreezeSchedule.model_validate(data["schedule"]) == UnfreezeSchedule(
        preset=MEDIUM, total_blocks=7, total_epochs=50
    )
    assert data["encoder"]["image_size"] == [64, 96]
    # smp keeps a head that its encoder never uses.
    assert "encoder.conv_head.weight" in data["encoder"]["unused"]
    assert data["phases"][-1]["trainable_share"] < 1
    for phase in data["phases"]:
        parts = dict(phase["memory"])
        assert parts.pop("total") == sum(parts.values())
        assert parts["optimizer"] > 2 * parts["gradients"]


def test_the_table_fits_80_columns(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of usual names is not broken at 80 columns, and is the same in a narrower terminal."""
    words = ["--encoder", "mobilenet_v2", "--image-size", "64", "--unfreeze_start", "0", "--unfreeze_rate", "1"]
    assert main([*RUN, *words]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^0 +1/18? *", shown, flags=re.MULTILINE)
    monkeypatch.setenv("COLUMNS", "40")
    assert main([*RUN, *words]) == 0
    assert capsys.readouterr().out == shown


def test_the_command_needs_no_rich(tmp_path: Path) -> None:
    """Neither the table nor a picture imports rich, which is no part of the `plan` extra."""
    code = (
        "import sys; from unfreeze_sched.cli import main;"
        "main([*sys.argv[1:], '--blocks', '7']); sys.exit('rich' in sys.modules)"
    )
    for words in ([], ["--plot", str(tmp_path / "plan.png")]):
        command = [sys.executable, "-c", code, *RUN, *words]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_the_table() -> None:
    """Joins with their rates, many at once as a range, refrozen blocks, and what never trains."""
    preset = MilestonePreset(milestones={0: 1, 2: 6, 4: 5}, learning_rate_scale=0.5)
    plan = make_plan(UnfreezeSchedule(preset=preset, total_blocks=7, total_epochs=5), 0.01)
    assert as_text(plan, "x.png").splitlines() == [
        "7 blocks, 5 epochs; milestones {0: 1, 2: 6, 4: 5}, learning_rate_scale 0.5",
        "",
        "epochs blocks joins                         lr",
        "------ ------ ------------------------ -------",
        "0-1       1/7 head                     1.0e-02",
        "              + blocks[6]              5.0e-03",
        "2-3       6/7 + blocks[5] to blocks[1] 5.0e-03",
        "4         5/7 - blocks[1]               frozen",
        "",
        "epochs: 0-based, inclusive. lr: base rate, from then on; an LR scheduler scales",
        "all of them.",
        "never within 5 epochs: blocks[0]; start earlier, unfreeze faster, or train",
        "longer.",
        "x.png shows it.",
    ]


@pytest.mark.parametrize(
    ("preset", "epochs", "late"),
    [
        (MilestonePreset(milestones={10: 3, 46: 4}), 50, "blocks[0], 4 of 50 epochs"),
        (MilestonePreset(milestones={10: 2, 46: 3, 48: 4}), 50, "blocks[1], 4 of 50 epochs, blocks[0], 2 of 50 epochs"),
        (MilestonePreset(milestones={10: 3, 45: 4}), 50, None),  # exactly a tenth
        (MilestonePreset(milestones={10: 3, 49: 4}), 55, None),  # above a tenth
        (MilestonePreset(milestones={10: 4, 12: 3, 48: 4}), 50, "blocks[0], 4 of 50 epochs"),  # two and two
        (MilestonePreset(milestones={10: 4, 13: 3, 48: 4}), 50, None),  # three and two
        (MilestonePreset(milestones={10: 2, 49: 3}), 50, "blocks[1], 1 of 50 epochs"),  # blocks[0] never joins
        (MilestonePreset(milestones={10: 3}), 50, None),
    ],
)
def test_blocks_with_little_time(preset: Any, epochs: int, late: str | None) -> None:
    """A block of less than a tenth of the run is named with its epochs, over all phases; one that never joins is not."""
    text = as_text(make_plan(UnfreezeSchedule(preset=preset, total_blocks=4, total_epochs=epochs), 1.0))
    notes = " ".join(text.partition("all of them.\n")[2].split())
    said = f"less than a tenth of the run: {late}; start earlier or unfreeze faster."
    assert notes.partition("never within")[0].strip() == (said if late else "")
    assert ("never within 50 epochs: blocks[0]; start" in notes) == (max(preset.milestones.values()) < 4)


def test_a_model_whose_stem_has_little_time(capsys: Any) -> None:
    """The same for a model's blocks, by their names; of many blocks the first are listed."""
    assert main(["plan", *RESNET, "--image-size", "32", "--unfreeze_rate", "12"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.endswith("less than a tenth of the run: layer1, 4 of 50 epochs; start earlier or unfreeze faster.")
    assert (
        main(["plan", "--total-epochs", "100", "--blocks", "9", "--unfreeze_start", "91", "--unfreeze_rate", "1"]) == 0
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "run: blocks[8], 9 of 100 epochs, blocks[7], 8 of 100 epochs, " in out
    assert ", blocks[3], 4 of 100 epochs and 3 more; start earlier or unfreeze faster." in out


def test_refreezing_and_decay_in_the_table() -> None:
    """Blocks of different rates stand one a line, however many join at once."""
    preset = MilestonePreset(milestones={0: 4})
    text = as_text(make_plan(UnfreezeSchedule(preset=preset, total_blocks=4, total_epochs=2), 1.0, 0.5))
    rates = re.findall(r"[+] (\S+) +(\S+)$", text, flags=re.MULTILINE)
    assert rates == [(f"blocks[{3 - depth}]", f"{0.1 * 0.5**depth:.1e}") for depth in range(4)]


def test_a_large_model_is_told_in_gib() -> None:
    """From ten GiB on the table's unit is GiB."""
    encoder = memory.Encoder(
        name="x", model="timm", parameters=10**10, head_parameters=10**9, unused=(), image_size=(8, 8), batch_size=1,
        optimizer="sgd",
    )  # fmt: skip
    parts = [memory.Part("head", 10**9, 4 * 10**9, 0), memory.Part("a", 9 * 10**9, 36 * 10**9, 0)]
    measured = memory.Measured(encoder, parts, 40 * 10**9, lambda n: n * 2**30)
    preset = RatePreset(unfreeze_start_epoch=1)
    text = as_text(make_plan(UnfreezeSchedule(preset=preset, total_blocks=1, total_epochs=2), 1.0, measured=measured))
    assert "timm's x, 10.00 B parameters, 1 block, 2 epochs" in text
    assert "GiB: gradients, state of sgd" in text
    assert re.search(r"^1 +1/1 [+] a +1.0e-01 +10.00 B +100.0% +37.3 +0.0 +1.0 +75.5$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text", "preset"),
    [
        ("a.json", '{"kind": "fraction", "start": 0.1, "end": 0.5}', FractionPreset(start=0.1, end=0.5)),
        ("a.yaml", "kind: fraction\nstart: 0.1\nend: 0.5\n", FractionPreset(start=0.1, end=0.5)),
        ("a.yml", "kind: milestones\nmilestones:\n  3: 1\n  9: 7\n", MilestonePreset(milestones={3: 1, 9: 7})),
        ("a.json", '{"preset": {"kind": "rate"}}', RatePreset()),
        ("a.json", '{"preset": {"kind": "rate"}, "total_blocks": 7, "total_epochs": 50}', RatePreset()),
        ("a.conf", '{"kind": "rate", "unfreeze_rate": 2}', RatePreset(unfreeze_rate=2)),
    ],
)
def test_schedule_files(name: str, text: str, preset: Any, tmp_path: Path, capsys: Any) -> None:
    """A file holds a preset or a schedule, in YAML by its suffix, else in JSON."""
    (tmp_path / name).write_text(text)
    plan = planned(capsys, "--total-epochs", "50", "--blocks", "7", "--schedule", str(tmp_path / name))
    assert plan.schedule == UnfreezeSchedule(preset=preset, total_blocks=7, total_epochs=50)


def test_a_flag_overrides_the_file(tmp_path: Path, capsys: Any) -> None:
    """As it does a preset's value; and the file's own number of epochs does where none is given."""
    path = tmp_path / "whole.json"
    path.write_text(UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=60).model_dump_json())
    words = ["--blocks", "7", "--schedule", str(path), "--unfreeze_start", "3", "--learning-rate-scale", "0.5"]
    plan = planned(capsys, *words)
    assert plan.schedule.preset == MEDIUM.replace(unfreeze_start_epoch=3, learning_rate_scale=0.5)
    assert plan.schedule.total_epochs == 60


def test_flags_of_the_preset(capsys: Any) -> None:
    """The guide's flags are there in both spellings, and the medium preset is the default."""
    assert planned(capsys, *("--total_epochs", "50", "--blocks", "7")).schedule.preset == MEDIUM
    words = ["--progressive_unfreeze", "--unfreeze-start", "1", "--unfreeze_rate", "2", "--layer-decay", "0.5"]
    plan = planned(capsys, *("--total-epochs", "50", "--blocks", "7", "--lr", "2"), *words)
    assert plan.schedule.preset == MEDIUM.replace(unfreeze_start_epoch=1, unfreeze_rate=2)
    assert [block.learning_rate for block in plan.blocks[-2:]] == [0.1, 0.2]


@pytest.mark.parametrize(("number", "preset"), [(999, SMALL), (2500, MEDIUM), (10_001, LARGE)])
def test_a_number_of_images(number: int, preset: RatePreset, capsys: Any) -> None:
    """`--n-images` takes what `preset_for` takes, in both spellings; a flag overrides its value."""
    assert planned(capsys, *SEVEN, "--n-images", str(number)).schedule.preset == preset
    plan = planned(capsys, *SEVEN, "--n_images", str(number), "--unfreeze_start", "1")
    assert plan.schedule.preset == preset.replace(unfreeze_start_epoch=1)


# --- the picture


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture(suffix: str, tmp_path: Path, capsys: Any) -> None:
    """Blocks, epochs of the transitions and rates are in it; the command says where it is."""
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    assert main([*RUN, "--blocks", "7", "--layer-decay", "0.5", "--plot", str(path)]) == 0
    assert f"{path.name}showsit." in "".join(capsys.readouterr().out.split())  # wherever the lines break
    head = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(head)
    if suffix == ".svg":
        text = path.read_text()
        for word in ("head", "blocks[6]", "blocks[0]", "40", "1.0e-04", "grey: frozen"):
            assert f"<!-- {word} -->" in text


def test_a_picture_of_refreezing_and_memory(tmp_path: Path) -> None:
    """With an encoder the picture has the memory of each phase too; a block may have several bars."""
    matplotlib = pytest.importorskip("matplotlib")
    plot = pytest.importorskip("unfreeze_sched.plan.plot")
    preset = MilestonePreset(milestones={1: 2, 3: 0, 4: 4})
    schedule = UnfreezeSchedule(preset=preset, total_blocks=4, total_epochs=6)
    measured = memory.measure("resnet18", (32, 32), 2, "sgd", "eval")
    plan = make_plan(schedule, 1e-3, measured=measured)
    figures: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a)))
        plot.draw(plan, tmp_path / "a.png")
    top, bottom, *_ = figures[0].axes
    assert [label.get_text().split()[0] for label in top.get_yticklabels()] == [
        "head",
        *(f"layer{4 - i}" for i in range(4)),
    ]
    bars = [
        sorted((box.x0, box.x1) for box in (path.get_extents() for path in bar.get_paths())) for bar in top.collections
    ]
    head = [(0, 1), (1, 3), (3, 4), (4, 6)]  # a bar a phase
    assert bars == [head, [(1, 3), (4, 6)], [(1, 3), (4, 6)], [(4, 6)], [(4, 6)]]
    heights = [sum(bar.get_height() for bar in bars) for bars in zip(*bottom.containers, strict=True)]
    assert heights == pytest.approx([phase.memory.total / 2**20 for phase in plan.phases if phase.memory])


# --- wrong input

FILES = {
    "broken.yaml": "kind: [rate",
    "broken.json": "{",
    "keys.json": '{"kind": "rate", "unfreeze_strat": 3}',
    "kind.json": '{"kind": "rat"}',
    "list.json": "[1, 2]",
    "other.json": '{"a": 1}',
    "empty.yaml": "",
    "twice.yaml": "kind: rate\nunfreeze_rate: 5\nunfreeze_rate: 9\n",
    "twice.json": '{"kind": "rate", "unfreeze_rate": 5, "unfreeze_rate": 9}',
    # Nine lines of ten aliases each unfold to gigabytes.
    "bomb.yaml": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "number.yaml": "preset: {kind: rate}\n5: 3\n",
    "binary.json": "\udcff\udcfe",
    "deep.json": "[" * 100_000,
    "huge.json": f'{{"kind": "rate", "unfreeze_start_epoch": {"9" * 5000}}}',
    "nan.json": '{"kind": "rate", "learning_rate_scale": NaN}',
    "without.json": '{"kind": "milestones"}',
    "nine.yaml": "kind: milestones\nmilestones: {10: 1, 20: 9}\n",
    "whole.json": '{"preset": {"kind": "rate"}, "total_blocks": 5, "total_epochs": 50}',
}
SEVEN = ["--total-epochs", "50", "--blocks", "7"]
RESNET = ["--total-epochs", "50", "--encoder", "resnet18"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--total-epochs", "50"], "plan: one of the arguments --blocks --encoder is required; see unfreeze-sched plan"),
        ([*SEVEN, "--encoder", "resnet18"], "argument --encoder: not allowed with argument --blocks; see"),
        (["--blocks", "7"], "`--total-epochs` must be given, got none; pass the number of epochs of the run, such as 50"),
        (["--total-epochs", "50", "--blocks", "0"], "--blocks: must be an integer of at least 1 and at most 1000, got '0'"),
        (["--total-epochs", "-3", "--blocks", "7"], "must be an integer of at least 1 and at most 1000000000, got '-3'"),
        (["--total-epochs", "9" * 6000, "--blocks", "7"], "9" * 97 + "'; see unfreeze-sched plan --help"),
        (["--total-epochs", "50", "--blocks", "9" * 30], "--blocks: must be an integer of at least 1 and at most 1000"),
        (["--total-epochs", "5", "--blocks", "7"], "`unfreeze_start_epoch` must start before `total_epochs`, 5, got 10; no"),
        ([*SEVEN, "--unfreeze_rate", "0"], "--unfreeze-rate: must be an integer of at least 1, got '0'"),
        ([*SEVEN, "--lr", "inf"], "argument --lr: must be a number above 0, got 'inf'"),
        ([*SEVEN, "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        ([*SEVEN, "--preset", "small", "--schedule", "whole.json"], "--schedule: not allowed with argument --preset"),
        ([*SEVEN, "--n-images", "0"], "--n-images: must be an integer of at least 1, got '0'; see unfreeze-sched plan"),
        ([*SEVEN, "--n-images", "many"], "--n-images: must be an integer of at least 1, got 'many'; see"),
        ([*SEVEN, "--n-images", "9", "--preset", "small"], "--preset: not allowed with argument --n_images/--n-images; see"),
        ([*SEVEN, "--schedule", "whole.json", "--n-images", "9"], "--n-images: not allowed with argument --schedule; see"),
        ([*SEVEN, "--schedule", "broken.yaml"], "broken.yaml: must be YAML, got what does not parse (while parsing a flow"),
        ([*SEVEN, "--schedule", "broken.json"], "broken.json: must be JSON, got what does not parse (Expecting property"),
        ([*SEVEN, "--schedule", "keys.json"], "keys.json: `unfreeze_strat` must not be given to RatePreset, got 3; it takes"),
        ([*SEVEN, "--schedule", "kind.json"], "`preset` must have a `kind` among rate, milestones, fraction, got 'rat'; add"),
        ([*SEVEN, "--schedule", "list.json"], "must hold a preset, with `kind`, or a schedule, with `preset`, got [1, 2]; w"),
        ([*SEVEN, "--schedule", "other.json"], "other.json: `preset` must have a `kind` among rate, milestones, fraction, got None"),
        ([*SEVEN, "--schedule", "twice.yaml"], "twice.yaml: must be YAML, got what does not parse (the key 'unfreeze_rate' twi"),
        ([*SEVEN, "--schedule", "twice.json"], "twice.json: must be JSON, got what does not parse (the key 'unfreeze_rate' twi"),
        ([*SEVEN, "--schedule", "bomb.yaml"], "bomb.yaml: must be YAML, got what does not parse (the alias *a0); write lines"),
        (["--total-epochs", "5", "--blocks=--"], "argument --blocks: must have a value, got '--'; write ./-- for a path of"),
        ([*SEVEN, "--schedule", "no\x1b[2Jwhere"], "got no\\x1b[2Jwhere (No such file or directory); check the path"),
        ([*SEVEN, "--optimizer", "\x1b[2J"], "\\x1b[2J"),
        ([*SEVEN, "--schedule", "empty.yaml"], "with `preset`, got None; write lines such as `kind: rate` and"),
        ([*SEVEN, "--schedule", "number.yaml"], "`5` must not be given to UnfreezeSchedule, got 3; it takes preset, total"),
        ([*SEVEN, "--schedule", "binary.json"], "must be JSON, got what does not parse ('utf-8' codec can't decode byte 0xff"),
        ([*SEVEN, "--schedule", "deep.json"], "deep.json: must be JSON, got what does not parse (maximum recursion depth"),
        ([*SEVEN, "--schedule", "huge.json"], "huge.json: must be JSON, got what does not parse (Exceeds the limit"),
        ([*SEVEN, "--schedule", "nan.json"], "nan.json: `learning_rate_scale` must be a number in (0, 1], got nan; 0.1"),
        ([*SEVEN, "--schedule", "without.json"], "without.json: `milestones` must be given, got none; add it"),
        ([*SEVEN, "--schedule", "nine.yaml"], "nine.yaml: `milestones[20]` must be at most `total_blocks`, 7, got 9; lower"),
        ([*SEVEN, "--schedule", "whole.json"], "whole.json: `total_blocks` must be 7, --blocks, got 5; change it, or keep"),
        ([*RESNET, "--schedule", "whole.json"], "must be 4, the number of blocks of resnet18, got 5; change it, or"),
        (["--blocks", "5", "--total-epochs", "9", "--schedule", "whole.json"], "`total_epochs` must be 9, --total-epochs, go"),
        ([*SEVEN, "--schedule", "nowhere.json"], "must be a readable file, got nowhere.json (No such file or directory); ch"),
        ([*SEVEN, "--schedule", "."], "`--schedule` must be a readable file, got . (Is a directory); check the path"),
        (
            ["--total-epochs", "50", "--blocks", "9", "--schedule", "nine.yaml", "--unfreeze_start", "3"],
            "nine.yaml: `unfreeze_start_epoch` must not be given to MilestonePreset, got 3; it takes kind, milestones",
        ),
        ([*SEVEN, "--plot", "plan.bmp"], "`--plot` must end in one of .png, .pdf, .svg, got plan.bmp; name it plan.png"),
        ([*SEVEN, "--plot", "plan"], "`--plot` must end in one of .png, .pdf, .svg, got plan; name it plan.png"),
        ([*SEVEN, "--plot", "no/plan.png"], "must be a file that can be written, got no/plan.png (no folder no); name an"),
        ([*SEVEN, "--plot", "folder.png"], "must be a file that can be written, got folder.png (a folder); name another"),
        ([*SEVEN, "--plot", "/proc/plan.png"], "must be a file that can be written, got /proc/plan.png (No such file or"),
        (["--total-epochs", "50", "--encoder", "resnet19"], "a name that smp or timm knows, got 'resnet19'; did you mean res"),
        (["--total-epochs", "50", "--encoder", "tu-efficientnet_b99"], "got 'tu-efficientnet_b99'; did you mean efficientnet"),
        (["--total-epochs", "50", "--encoder", "timm-vit_tiny_patch16_224"], "knows, got 'timm-vit_tiny_patch16_224'; did you"),
        (["--total-epochs", "50", "--encoder", "?"], "knows, got '?'; see smp.encoders.get_encoder_names() and timm.list_m"),
        (["--total-epochs", "50", "--encoder", "hf-hub:some/resnet18"], "a name that smp or timm knows, got 'hf-hub:some/r"),
        (
            ["--total-epochs", "50", "--encoder", "tu-vit_tiny_patch16_224"],
            "must be one that can be built without weights, got tu-vit_tiny_patch16_224 (ValueError: Unsupported model dow",
        ),
        (
            ["--total-epochs", "50", "--encoder", "tu-swin_tiny_patch4_window7_224", "--image-size", "64"],
            "`--image-size` must be one that tu-swin_tiny_patch4_window7_224 runs on, got 64x64 (",
        ),
        ([*RESNET, "--image-size", "0"], "must be a side in pixels or HxW, up to 65536, got '0'; see"),
        ([*RESNET, "--image-size", "9" * 9], "must be a side in pixels or HxW, up to 65536, got '999999999'; see"),
        ([*RESNET, "--image-size", "1x2x3"], "must be a side in pixels or HxW, up to 65536, got '1x2x3'; see"),
        ([*RESNET, "--batch-size", "-1"], "must be an integer of at least 1 and at most 1048576, got '-1'"),
        ([*RESNET, "--image-size", "32", "--batch-size", "1"], "`--batch-size` must suit batch norms in training, got 1 (Val"),
        ([*RESNET, "--optimizer", "lamb"], "argument --optimizer: invalid choice: 'lamb' (choose from 'adamw'"),
    ],
)  # fmt: skip
def test_wrong_input(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Wrong input is one line on standard error, with what and why, and exit code 2; nothing else is printed."""
    monkeypatch.chdir(tmp_path)
    for name in FILES.keys() & set(words):
        (tmp_path / name).write_text(FILES[name], encoding="utf-8", errors="surrogateescape")
    (tmp_path / "folder.png").mkdir()
    try:
        code = main(["plan", *words])
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (
            "yaml",
            ["--blocks", "7", "--schedule", "a.yaml"],
            "`--schedule` needs PyYAML for a YAML file, which is not installed; pip install 'unfreeze-sched[plan]', or wri",
        ),
        (
            "matplotlib",
            ["--blocks", "7", "--plot", "a.png"],
            "`--plot` needs matplotlib, which is not installed; pip install 'unfreeze-sched[plot]'",
        ),
        (
            "timm",
            ["--encoder", "resnet18"],
            "`--encoder` needs segmentation_models_pytorch or timm, of which none is ins",
        ),
    ],
)
def test_missing_extras(
    module: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without an optional package the command says what needs it and what to install; JSON needs none of them."""
    monkeypatch.delitem(sys.modules, "unfreeze_sched.plan.plot", raising=False)
    for name in [*(key for key in sys.modules if key.startswith(f"{module}.")), "segmentation_models_pytorch", module]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*RUN, *words]) == 2
    assert capsys.readouterr().err.startswith(f"unfreeze-sched: {message}")


@pytest.mark.parametrize("name", ["timm-regnety_002", "timm-mobilenetv3_small_100"])
def test_old_names_that_smp_still_maps(name: str) -> None:
    """Names in no list of smp's, which its Unet takes all the same, are its Unet here too."""
    pytest.importorskip("segmentation_models_pytorch")
    measured = memory.measure(name, (64, 64), 2, "sgd", "eval")
    assert (measured.encoder.name, measured.encoder.model) == (name, "smp.Unet")


@pytest.mark.parametrize("prefix", ["timm/", "hf_hub:timm/", "hf-hub:timm/"])
def test_a_model_cards_name(prefix: str, capsys: Any) -> None:
    """A name as the hub spells it is timm's model, for whose plan no weights are asked."""
    words = ["plan", "--total-epochs", "50", "--json", "--encoder"]
    assert main([*words, "resnet18.a1_in1k"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*words, f"{prefix}resnet18.a1_in1k"]) == 0
    hub = json.loads(capsys.readouterr().out)
    assert plain["encoder"].pop("name") == "resnet18.a1_in1k"
    assert hub["encoder"].pop("name") == f"{prefix}resnet18.a1_in1k"
    assert hub == plain
    assert main([*words[:-2], "--encoder", f"{prefix}resnet18"]) == 0
    assert capsys.readouterr().out.startswith("timm's resnet18, ")  # and not smp's of that name
    assert main([*words, f"{prefix}resnet18s"]) == 2
    assert "did you mean resnet18 " in capsys.readouterr().err


def test_timm_alone_will_do(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without smp, a name is timm's model with its classifier."""
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    plan = planned(capsys, *RESNET, "--image-size", "32")
    assert plan.encoder is not None
    assert plan.encoder.model == "timm"
    assert plan.encoder.head_parameters == 512 * 1000 + 1000


def test_a_reader_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that is closed early, as by `head`, ends the command without a traceback."""
    words = [sys.executable, "-m", "unfreeze_sched", *RUN, "--blocks", "1000", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_the_version(capsys: Any) -> None:
    """`--version` is the installed package's, without a command; of source that is not installed it is one line."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"unfreeze-sched {metadata.version('unfreeze-sched')}\n"


def test_no_version_of_bare_source(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Source that was never installed has no version, which is said; all else works there."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit, match="2"):
        main(["--version"])
    assert "`--version` must be asked of an installed package, got bare source; pip install" in capsys.readouterr().err
    assert main([*RUN, "--blocks", "3"]) == 0


# --- the guide


def guide(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def test_the_guides_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block of the guide runs as it stands."""
    monkeypatch.chdir(tmp_path)
    for code in guide("python"):
        exec(compile(code, "choosing.md", "exec"), {})  # noqa: S102  # the point


def test_the_guides_commands_print_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each command of the guide runs, and each that is followed by an output prints it to the letter."""
    monkeypatch.chdir(tmp_path)
    (yaml,) = guide("yaml")
    Path("schedule.yaml").write_text(yaml)
    shown = dict(re.findall(r"```sh\n(.*?)```\n\n```text\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL))
    assert len(shown) == 2
    for command in guide("sh"):
        program, *words = shlex.split(command)
        assert program == "unfreeze-sched"
        assert main(words) == 0
        out = capsys.readouterr().out
        if command in shown:
            assert [line.rstrip() for line in out.splitlines()] == [
                line.rstrip() for line in shown[command].splitlines()
            ]


def test_the_guides_presets() -> None:
    """The guide's table is that of the presets."""
    for name, preset in unfreeze_sched.arguments.PRESETS.items():
        row = next(line for line in GUIDE.read_text().splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.split("|")[3:-1]]
        assert cells == [
            str(preset.unfreeze_start_epoch), f"{preset.unfreeze_rate} epochs", str(preset.learning_rate_scale)
        ]  # fmt: skip


def test_json_is_json(capsys: Any) -> None:
    """Nothing but JSON is printed, a picture's name included."""
    assert main([*RUN, "--blocks", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encoder"] is None


@pytest.mark.parametrize("words", [[*SEVEN, "--preset", "large"], ["--version"]])
def test_output_that_goes_nowhere(words: list[str]) -> None:
    """A closed output is nothing to complain of; a full disk under it is one line, and no more at the process's end."""
    command = [sys.executable, "-m", "unfreeze_sched", *([] if words == ["--version"] else ["plan"]), *words]
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command], check=False, capture_output=True, text=True
    )
    assert (closed.returncode, closed.stderr) == (0, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert done.stderr == "unfreeze-sched: [Errno 28] No space left on device\n"
