"""The code of the guides, as their tests run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import unfreeze_sched

ROOT = Path(unfreeze_sched.__file__).parent


def snippets(guide: str, kind: str = "python") -> list[str]:
    """A guide's blocks of one kind; its name is found anywhere in the package."""
    (path,) = ROOT.rglob(guide)
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def side(diff: str, which: str) -> str:
    """A diff's code before or after."""
    mark = {"before": "+", "after": "-"}[which]
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(mark))


def added(diff: str) -> int:
    """By how many lines the code becomes longer, blank ones aside."""
    return len(re.findall(r"^\+[ ]*\S", diff, re.MULTILINE)) - len(re.findall(r"^-[ ]*\S", diff, re.MULTILINE))


def run(code: str, names: dict[str, Any], instead: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a guide's code, with what a test cannot afford replaced; each replacement has to apply."""
    for old, new in (instead or {}).items():
        assert old in code, f"{old} is not in the guide any more"
        code = code.replace(old, new)
    exec(compile(code, "<guide>", "exec"), names)  # noqa: S102  # the guide's own code
    return names
