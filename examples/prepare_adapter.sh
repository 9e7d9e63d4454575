#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make an adapter for a model of your own, find its allocation path, look at it, and check it.
#
#     examples/prepare_adapter.sh MODEL TEXT ADAPTER [vllm-mkv calibrate options]
#     examples/prepare_adapter.sh examples/books-4m my-text.txt my-adapter --tokens 20000
#
# MODEL and TEXT: a folder or file here, or a name on the Hub. ADAPTER: the folder to write.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/../.venv/bin:$PATH"

if [ $# -lt 3 ]; then
    sed -n '3,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 text=$2 adapter=$3
shift 3

# The same windows for both, so that quality is measured on none that was fitted on.
both=()
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    case ${!i} in --context | --seed | --dtype) both+=("${!i}" "${!next}") ;; esac
done

vllm-mkv calibrate "$model" --text "$text" --output "$adapter" "$@"
vllm-mkv search "$adapter" --text "$text" --output "$adapter" --model "$model" "${both[@]}"
vllm-mkv info "$adapter" --plot "$adapter/widths.png"
vllm-mkv check "$adapter" "$model"
