# SPDX-License-Identifier: Apache-2.0
"""The tree is the architecture: which part may import which, and what every file carries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vllm_mkv", "kernels", "tests", "examples")
SOURCES = sorted(file for folder in FOLDERS for suffix in ("py", "sh") for file in (ROOT / folder).rglob(f"*.{suffix}"))
OTHERS = [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run")]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported_modules(file: Path) -> set[str]:
    """Full names of all modules that a file imports anywhere, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(folder: str, *roots: str, excluding: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Per file below `folder`, what it imports from the packages or modules `roots`."""
    files = [file for file in (ROOT / folder).rglob("*.py") if not relative(file).startswith(excluding)]
    assert files
    found = {
        relative(file): {
            name for name in imported_modules(file) if any(f"{name}.".startswith(f"{root}.") for root in roots)
        }
        for file in files
    }
    return {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("file", [*SOURCES, *OTHERS], ids=relative)
def test_names_its_licence(file: Path) -> None:
    head = file.read_text("utf-8").splitlines()[:2]
    assert "# SPDX-License-Identifier: Apache-2.0" in head


def test_shelves_are_no_packages() -> None:
    # A package `kernels` would shadow the one that transformers imports; test folders share module names.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    allowed = {"mkv_kernels", "torch", "triton", *sys.stdlib_module_names}
    for file in (ROOT / "kernels" / "mkv_kernels").rglob("*.py"):
        roots = {name.partition(".")[0] for name in imported_modules(file)}
        # Compiled kernels are imported where numba is, and by whoever asked for them.
        if file.parent.name == "compiled":
            roots -= {"llvmlite", "numba", "numpy"}
        assert roots <= allowed, f"{relative(file)} imports {sorted(roots - allowed)}"


def test_vllm_is_imported_by_serving_alone() -> None:
    assert not imports_of("vllm_mkv", "vllm", excluding=("vllm_mkv/serving/",))


def test_only_the_plugin_reaches_into_serving() -> None:
    excluding = ("vllm_mkv/serving/", "vllm_mkv/plugin.py")
    # Scores and times through the engine are all that tools ask of serving; they do so when it comes to that.
    stepper = "vllm_mkv.serving.stepper"
    measuring = {
        "vllm_mkv/evaluation/engine.py": {"vllm_mkv.serving.score.log_probabilities"},
        "vllm_mkv/evaluation/bench.py": {f"{stepper}.{name}" for name in ("hardware", "on_cpu", "running_stepper")},
    }
    assert imports_of("vllm_mkv", "vllm_mkv.serving", excluding=excluding) == measuring


def test_what_makes_adapters_does_not_need_what_measures_them() -> None:
    assert not imports_of("vllm_mkv/fit", "vllm_mkv.evaluation")


def test_serving_does_not_need_the_tools_that_prepare_models() -> None:
    tools = ("vllm_mkv.fit", "vllm_mkv.evaluation", "transformers", "datasets", "accelerate", "matplotlib")
    assert not imports_of("vllm_mkv/serving", *tools)


@pytest.mark.parametrize(
    "module",
    [
        "vllm_mkv",
        "vllm_mkv.adapter",
        "vllm_mkv.cli",
        "vllm_mkv.plugin",
        "vllm_mkv.serving.compat",
        "mkv_kernels.layout",
    ],
)
def test_importing_loads_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("script", [*(ROOT / "examples").glob("*.sh"), ROOT / ".ci" / "run"], ids=relative)
def test_shell_scripts_are_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    assert script.stat().st_mode & 0o111, f"{relative(script)} is not executable"
    assert "set -euo pipefail" in script.read_text("utf-8")
