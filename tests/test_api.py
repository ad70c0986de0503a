"""The shape of the package: public names, laziness, the core's dependencies, and the direction of its arrows."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import unfreeze_sched

ROOT = Path(unfreeze_sched.__file__).parent
# The core, by folder or module, and what of this package each may import beside itself.
MAY_IMPORT = {
    "_checks": [],
    "parallel": [],
    "schedule": ["_checks"],
    "model": ["_checks"],
    "optimizer": ["_checks", "model.block", "parallel"],
    "guards": ["_checks", "parallel"],
    "history": ["_checks", "parallel"],
    "unfreezer": ["_checks", "guards", "history", "model", "optimizer", "parallel", "schedule"],
}
OUTSIDE = ["__main__", "arguments", "cli", "distill", "integrations", "plan"]
MOST_NAMES = 16


def files_of(room: str) -> list[Path]:
    """The Python files of a folder or module of the package."""
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def inner(path: Path) -> set[str]:
    """What a file imports of this package, without the package's name."""
    return {name.partition(".")[2] for name in imports(path) if name.partition(".")[0] == "unfreeze_sched"}


def lies_in(name: str, rooms: list[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at any depth of its code, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_public_names() -> None:
    """`__all__` is the contract's list, sorted as ruff sorts, and every name is there."""
    assert set(unfreeze_sched.__all__) == {
        *("UnfreezeSchedule", "RatePreset", "MilestonePreset", "FractionPreset", "SMALL", "MEDIUM", "LARGE"),
        *("preset_for", "Block", "encoder_blocks", "OptimizerRebuilder", "GroupChange", "ProgressiveUnfreezer"),
    }
    for name in unfreeze_sched.__all__:
        assert getattr(unfreeze_sched, name).__doc__
        assert name in dir(unfreeze_sched)


def test_an_unknown_name() -> None:
    """A name that is not there is an AttributeError, as from any module."""
    with pytest.raises(AttributeError, match="module 'unfreeze_sched' has no attribute 'Unfreezer'"):
        _ = unfreeze_sched.Unfreezer


def test_the_core_needs_torch_and_pydantic_alone() -> None:
    """Every public name works where nothing can be imported but the standard library, torch, pydantic and theirs."""
    code = """
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import requires
import re

def closure(*names):
    found, queue = set(), list(names)
    while queue:
        name = queue.pop().lower().replace("-", "_")
        if name not in found:
            found.add(name)
            try:
                needs = requires(name) or []
            except Exception:
                needs = []
            queue += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found

allowed = closure("torch", "pydantic") | {"unfreeze_sched", "torch", "torchgen", "functorch", "yaml"}

class Only(MetaPathFinder):
    # Finds nothing but what is allowed; torch asks for optional modules, so refusing aloud would break it.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top.lower() in allowed or top.startswith("_")
        return self.finder.find_spec(name, path, target) if known else None

sys.meta_path = [Only(finder) for finder in sys.meta_path]
import torch
from torch import nn
from unfreeze_sched import *
for stranger in ("timm", "segmentation_models_pytorch", "matplotlib"):
    try:
        __import__(stranger)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{stranger} was importable, so this proves nothing")
net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
blocks = encoder_blocks(net, patterns=[r"^0\\.0\\.", r"^0\\.1\\."])
optimizer = torch.optim.AdamW(net[1].parameters())
schedule = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=0, unfreeze_rate=1), total_blocks=2, total_epochs=2)
unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule)
assert unfreezer.apply(0) and unfreezer.apply(1)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_name_at_the_top_has_its_place() -> None:
    """Each folder and module is the core's, with what it may import, or outside of it."""
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {"__init__", *MAY_IMPORT, *OUTSIDE}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows(room: str) -> None:
    """A folder or module of the core imports of this package itself and what it may, at any depth of its code."""
    for path in files_of(room):
        for name in inner(path):
            assert lies_in(name, [room, *MAY_IMPORT[room]]), (path, name)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_what_the_core_imports_of_others(room: str) -> None:
    """Torch and pydantic alone; no torch in what is there without it; and matplotlib for the history's picture."""
    without_torch = {"history": {"pydantic", "matplotlib"}} | {
        own: {"pydantic"} for own in ("_checks", "schedule", "guards")
    }
    allowed = without_torch.get(room, {"pydantic", "torch"})
    for path in files_of(room):
        outer = {name.split(".")[0] for name in imports(path)} - {"unfreeze_sched", *sys.stdlib_module_names}
        assert outer <= allowed, path


def test_nothing_in_the_core_imports_the_outside() -> None:
    """Integrations, plan, reference and command line are imported by nothing but themselves."""
    inside = [path for room in ("__init__", *MAY_IMPORT) for path in files_of(room)]
    assert len(inside) > len(MAY_IMPORT)
    for path in inside:
        assert not any(lies_in(name, OUTSIDE) for name in inner(path)), path


def test_the_arrows_can_be_broken(tmp_path: Path) -> None:
    """An import in a function, of a module or of a name in it, is seen."""
    file = tmp_path / "broken.py"
    file.write_text(
        "def f():\n    from unfreeze_sched.model import tracing\n    import unfreeze_sched.schedule.presets\n"
    )
    assert inner(file) == {"model.tracing", "schedule.presets"}
    assert not lies_in("model.tracing", MAY_IMPORT["optimizer"])


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("unfreeze_sched.schedule", "torch"),
        ("unfreeze_sched.guards", "torch"),
        ("unfreeze_sched.history", "torch"),
        ("unfreeze_sched._checks", "torch"),
        ("unfreeze_sched.model", "sympy"),
        ("unfreeze_sched.optimizer", "unfreeze_sched.schedule"),
        ("unfreeze_sched.model", "unfreeze_sched.optimizer"),
    ],
)
def test_what_is_not_loaded(name: str, spared: str) -> None:
    """What a room does not need is not there once it is imported."""
    code = f"import sys, {name}; sys.exit({spared!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_top_is_read_at_a_glance() -> None:
    """So many names lie at the top of the package, the guides aside."""
    names = [path.name for path in ROOT.iterdir() if path.suffix != ".md" and path.name != "__pycache__"]
    assert len(names) <= MOST_NAMES, sorted(names)


def test_each_package_says_what_it_is_for() -> None:
    """Each `__init__` has a docstring, and all that it exports is there and in `dir`."""
    folders = [path for path in (ROOT, *ROOT.rglob("*")) if path.is_dir() and list(path.glob("*.py"))]
    assert len(folders) >= 8
    for folder in folders:
        package = import_module(".".join((ROOT.name, *folder.relative_to(ROOT).parts)))
        assert package.__doc__, folder
        for name in getattr(package, "__all__", ()):
            assert getattr(package, name) is not None
            assert name in dir(package)
