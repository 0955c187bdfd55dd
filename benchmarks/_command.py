"""What commands that measure on a GPU share: asking for one, saying which, and handing back their rows."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

Row = dict[str, Any]


def has_gpu(command: str) -> bool:
    """False, and a line on stderr, where there is none."""
    if torch.cuda.is_available():
        return True
    print(f"{command}: got no GPU; only a time on a GPU counts. Run it there", file=sys.stderr)
    return False


def start(heading: str) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print(heading, flush=True)
    torch.manual_seed(0)


def save(path: pathlib.Path | None, rows: Sequence[Row], **more: Any) -> None:
    """Rows and where they were measured, as JSON, if there is a path."""
    if path is not None:
        environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        path.write_text(json.dumps({"environment": environment, "rows": rows, **more}, indent=1) + "\n")


def status(rows: Sequence[Row]) -> int:
    """The command's exit status: 1 if anything has no time."""
    return int(any("us" not in row for row in rows))
