# SPDX-License-Identifier: Apache-2.0
"""Files that a measurement ends in: checked before it, written whole or not at all after it."""

from __future__ import annotations

import json
import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_file(file: str | Path) -> None:
    """Raises ValueError unless `file` can be written: its folder is there, and it is no folder itself."""
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} to write {file.name} into; make it, or name another")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"{file.parent} is not writable; name a file in another folder")


def check_drawing(file: str | Path) -> None:
    """Raises ValueError unless matplotlib can write a file of this name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if Path(file).suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"cannot draw to {file}; name a file that ends in .png, .pdf or .svg")
    check_file(file)


def write_drawing(file: str | Path, figure: Figure) -> None:
    """Writes a figure as `write_whole` does, in the format that the name ends in."""
    stream = BytesIO()
    figure.savefig(stream, format=Path(file).suffix.lower().removeprefix("."), dpi=150)
    write_whole(file, stream.getvalue())


def write_json(file: str | Path, found: dict[str, Any]) -> None:
    """Writes figures as `write_whole` does."""
    write_whole(file, f"{json.dumps(found, indent=2)}\n".encode())


def write_whole(file: str | Path, data: bytes) -> None:
    """Writes a file at once: after an interruption, or on a full disk, it is what it was before."""
    file = Path(file)
    handle, staging = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(staging, 0o644)
        os.replace(staging, file)
    finally:
        Path(staging).unlink(missing_ok=True)
