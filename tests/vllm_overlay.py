# SPDX-License-Identifier: Apache-2.0
"""A vLLM whose CPU build is not out yet, for the tests: its Python on the libraries of the CPU build that is installed.

    .venv/bin/python tests/vllm_overlay.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 tests/serving tests/e2e

What it shows is whether this project suits that version's Python. Operators of the older library that the newer Python
calls otherwise would fail loudly, by their signatures.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

NEEDED = ("orjson",)
"""Packages that 0.33 needs and 0.32 did not, of those that its servers and tools import."""


def overlay(version: str, folder: Path) -> None:
    """Raises FileExistsError where the folder has anything, CalledProcessError where pip finds no such version."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name another folder")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*pip, "download", "--no-deps", "--dest", wheels, f"vllm=={version}"], check=True)
        with zipfile.ZipFile(next(Path(wheels).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if not name.endswith((".so", ".cubin"))])
    installed = Path(str(distribution("vllm").locate_file("vllm")))
    for library in installed.glob("*.so"):
        shutil.copy(library, folder / "vllm")
    # By this ending vLLM knows its CPU platform.
    replace(folder / "vllm" / "_version.py", f"'{version}'", f"'{version}+cpu'")
    about = folder / f"vllm-{version}.dist-info"
    replace(about / "METADATA", f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n")
    about.rename(folder / f"vllm-{version}+cpu.dist-info")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *NEEDED], check=True)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    if old not in text:
        raise ValueError(f"{file} has no {old.strip()}; this version is packed in another way")
    file.write_text(text.replace(old, new, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vLLM, as on the package index")
    parser.add_argument("folder", type=Path, help="an empty one, or none yet")
    args = parser.parse_args()
    overlay(args.version, args.folder)
    print(f"PYTHONPATH={args.folder.resolve()}")
