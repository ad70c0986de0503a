"""Statistics, tables and plots of the unfreezing study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(result: dict[str, Any], output: Path) -> None:
    """Write `unfreezing.json`."""
    (output / "unfreezing.json").write_text(json.dumps(result) + "\n")
