"""The shape of the package: public names, laziness, the core's dependencies, and the direction of its arrows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unfreeze_sched

ROOT = Path(unfreeze_sched.__file__).parent
CORE = [
    "_fields",
    "_saved",
    "_follower",
    "guards",
    "history",
    "presets",
    "schedule",
    "tracing",
    "partition",
    "blocks",
    "freezing",
    "lr_schedulers",
    "optimizers",
    "parts",
    "warmup",
    "accumulation",
    "ownership",
    "parallel",
    "probe",
    "rebuilder",
    "unfreezer",
]
# What each module of the core may import of this package; the order of CORE, and no more.
ALLOWED = {
    "_fields": set(),
    "_saved": set(),
    "_follower": {"_fields"},
    "guards": {"_fields", "_follower"},
    "history": {"_fields", "_history_table", "_saved", "rate_chart"},
    "presets": {"_fields"},
    "schedule": {"_fields", "presets"},
    "tracing": set(),
    "partition": {"tracing"},
    "blocks": {"partition", "tracing"},
    "freezing": {"blocks"},
    "lr_schedulers": set(),
    "optimizers": set(),
    "parts": {"blocks"},
    "warmup": set(),
    "accumulation": set(),
    "ownership": {"blocks"},
    "parallel": {"blocks", "optimizers"},
    "probe": {"parallel"},
    "rebuilder": {
        "_fields",
        "accumulation",
        "blocks",
        "lr_schedulers",
        "optimizers",
        "ownership",
        "parallel",
        "parts",
        "probe",
        "warmup",
    },
    "unfreezer": {
        "_fields",
        "_saved",
        "blocks",
        "freezing",
        "guards",
        "history",
        "optimizers",
        "parts",
        "probe",
        "rebuilder",
        "schedule",
    },
}


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


@pytest.mark.parametrize("module", CORE)
def test_arrows(module: str) -> None:
    """A module of the core imports of this package what lies before it, and nothing outside the core's dependencies."""
    found = imports(ROOT / f"{module}.py")
    inner = {name.split(".")[1] for name in found if name.startswith("unfreeze_sched.")}
    assert (
        inner - {"lr_schedulers"} <= ALLOWED[module] | {"lr_schedulers"}
        if module == "rebuilder"
        else inner <= ALLOWED[module]
    )
    outer = {name.split(".")[0] for name in found} - {"unfreeze_sched", *sys.stdlib_module_names}
    assert outer <= (
        {"pydantic"} if module in {"_fields", "_follower", "guards", "history", "presets", "schedule"} else {"torch"}
    )


def test_nothing_in_the_core_imports_the_outside() -> None:
    """Integrations, the reference wrapper and the command line are imported by nothing but themselves."""
    inside = {path for path in ROOT.glob("*.py") if path.stem in {*CORE, "__init__"}}
    for path in inside:
        assert not any("distill" in name or "integrations" in name or name == "cli" for name in imports(path)), path


def test_no_module_outgrows_its_job() -> None:
    """A module past 350 lines is probably two."""
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
