#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a model to a server: calibrate, search, train, search again, compare on held-out text, check, serve and ask.
#
#     examples/walkthrough.sh MODEL TEXT HELD_OUT FOLDER [vllm-mkv train options]
#     examples/walkthrough.sh MODEL my-text held-out.txt made --steps 1000 --dtype bfloat16
#
# MODEL, TEXT and HELD_OUT: a folder or file here, or a name on the Hub. FOLDER: where all that is made goes. DTYPE is what
# to compute in, if not in what the model is stored in. A run that was interrupted goes on where it stopped when it is
# started again. walkthrough.md shows what comes of it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/../.venv/bin:$PATH"

if [ $# -lt 4 ]; then
    sed -n '3,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 text=$2 held_out=$3 folder=$4
shift 4
[ $# -gt 0 ] || set -- --steps 1000
as=(--dtype "${DTYPE:-auto}")
budgets=(0.25 0.222 0.156 0.125 0.094 0.07)
mkdir -p "$folder"

# say TITLE; make ADAPTER COMMAND ..: once
say() { printf '\n== %s\n' "$*"; }
make() {
    local adapter=$1
    shift
    if [ -f "$adapter/adapter_config.json" ]; then
        echo "$adapter is there already"
    else
        "$@" --output "$adapter"
    fi
}

say "1. calibrate: bases from what queries look at"
make "$folder/calibrated" vllm-mkv calibrate "$model" --text "$text" "${as[@]}"

say "2. search: who gets how many bits at which budget"
make "$folder/searched" vllm-mkv search "$folder/calibrated" --text "$text" "${as[@]}"

say "3. train: turn the bases until predictions with a small cache are those without one"
resume=()
if compgen -G "$folder/trained.checkpoints/checkpoint-*" >/dev/null; then resume=(--resume); fi
make "$folder/trained" vllm-mkv train "$folder/searched" --text "$text" \
    --json "$folder/losses.json" --plot "$folder/losses.png" "${as[@]}" "$@" "${resume[@]}"

say "4. search again: other bases, other errors"
make "$folder/adapter" vllm-mkv search "$folder/trained" --text "$text" "${as[@]}"

say "5. eval on text that nothing was fitted to: before training, after it"
vllm-mkv eval "$folder/searched" --text "$held_out" --budgets "${budgets[@]}" "${as[@]}" \
    --json "$folder/searched.json"
vllm-mkv eval "$folder/adapter" --text "$held_out" --budgets "${budgets[@]}" --against int4,int3,turboquant3_nc \
    "${as[@]}" --json "$folder/adapter.json" --plot "$folder/kl.png"

say "6. look at it, and check that full rank is exact"
vllm-mkv info "$folder/adapter" --plot "$folder/widths.png"
vllm-mkv check "$folder/adapter" "$model"

say "7. serve it at a quarter of the cache, and ask it"
"$here/serve_and_query.sh" "$model" 0.25 "$folder/adapter"
