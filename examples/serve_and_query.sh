#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve a model with a projected KV cache, ask it once with curl, and stop it.
#
#     examples/serve_and_query.sh [MODEL [BUDGET [ADAPTER]]]
#
# Without arguments: the bundled model. Without an adapter: the one in MODEL/mkv. PORT chooses the port.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/../.venv/bin:$PATH"

model=${1:-$here/books-4m}
budget=${2:-0.25}
adapter=${3:-}
port=${PORT:-8123}
url=http://127.0.0.1:$port

options="{\"mkv\": {\"budget\": $budget${adapter:+, \"adapter\": \"$adapter\"}}}"
vllm serve "$model" --served-model-name demo --host 127.0.0.1 --port "$port" --kv-cache-memory-bytes 268435456 \
    --attention-backend mkv --additional-config "$options" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT

until curl --silent --fail --output /dev/null "$url/health"; do
    kill -0 "$server" 2>/dev/null || { echo "the server ended; its last lines say why" >&2; exit 1; }
    sleep 1
done

curl --silent --show-error --fail "$url/v1/completions" --header 'Content-Type: application/json' --data '{
    "model": "demo", "prompt": "The old man opened the door, and", "max_tokens": 64, "temperature": 0.7, "seed": 0
}'
echo
curl --silent --show-error --fail "$url/metrics" | grep -o 'kv_cache_size_tokens="[0-9]*"'
