# SPDX-License-Identifier: Apache-2.0
"""A folder that is written at once: complete or as it was before, with all that others put into it."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux: fcntl.h, fs.h."""


def check_replaceable(folder: Path) -> None:
    """Raises ValueError unless `replaced` can write `folder`, whose links are resolved."""
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced; name a folder in it")
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is where this command runs, and cannot be replaced; name another or run elsewhere")
    home = next(parent for parent in folder.parents if parent.exists())
    if not home.is_dir():
        raise ValueError(f"{home} is a file, so that {folder} cannot be made; name a folder in another place")
    try:
        # To try is all that tells: permissions say nothing to root, nor of what is mounted to be read alone.
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
    except OSError as error:
        raise ValueError(f"cannot write into {home} ({error.strerror}); name a folder in another place") from error


@contextmanager
def replaced(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """Gives a new folder to write into, which takes the place of `folder` unless the block raises.

    What `folder` holds beside `ours`, names of files, is copied over first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if folder.exists():
            shutil.copytree(
                folder,
                staging,
                symlinks=True,
                ignore=lambda place, _: ours if place == str(folder) else (),
                dirs_exist_ok=True,
            )
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_aside(folder: Path) -> Path | None:
    """What was `folder` before a replacement that was killed half-way."""
    return max(folder.parent.glob(f".{glob.escape(folder.name)}.*.old"), default=None)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Moves `staging` to `folder`; what was there is `staging` afterwards."""
    if not folder.exists():
        os.replace(staging, folder)
    elif not _exchange(staging, folder):
        aside = staging.with_name(f"{staging.name}.old")
        try:
            os.replace(folder, aside)
            os.replace(staging, folder)
        except BaseException:
            if aside.exists() and not folder.exists():
                os.replace(aside, folder)
            raise
        os.replace(aside, staging)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders get each other's names in one step; False where the system or the file system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))
