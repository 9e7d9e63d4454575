# SPDX-License-Identifier: Apache-2.0
"""Answer a batch of prompts with a projected KV cache, without a server.

python examples/offline_batch.py
python examples/offline_batch.py --model MODEL --adapter ADAPTER --budget 0.3 --prompts PROMPTS.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPTS = [
    "Once upon a time there was a little girl who",
    "The old man opened the door, and",
    "It was late in the evening when the ship",
    '"I do not believe you," said',
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "books-4m"), help="folder or Hub name (default: the bundled one)")
    parser.add_argument("--adapter", help="folder or Hub name (default: MODEL/mkv)")
    parser.add_argument("--budget", type=float, help="share of the model's own cache (default: the adapter's)")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line (default: four of its own)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--cache-mib", type=int, default=256, help="memory for the cache (default: 256)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompts = [line for line in args.prompts.read_text("utf-8").splitlines() if line] if args.prompts else PROMPTS

    from vllm import LLM, SamplingParams

    options = {"adapter": args.adapter, "budget": args.budget}
    llm = LLM(
        args.model,
        attention_backend="mkv",
        additional_config={"mkv": {name: value for name, value in options.items() if value is not None}},
        kv_cache_memory_bytes=args.cache_mib << 20,
    )
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=0)
    for output in llm.generate(prompts, sampling):
        print(f"{output.prompt} >>>{output.outputs[0].text}\n")


# vLLM starts its workers by importing this file anew.
if __name__ == "__main__":
    main()
