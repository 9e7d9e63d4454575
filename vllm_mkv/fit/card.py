# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_mkv.adapter import AdapterConfig
from vllm_mkv.fit.held_out import measured_apart

TEMPLATE = """\
---
{front}library_name: vllm-mkv
tags:
- vllm
- kv-cache
---

# Projected KV cache for {model}

Bases and an allocation path with which [vLLM](https://github.com/vllm-project/vllm) and the plugin vllm-mkv keep only
the most important coordinates of this model's keys and values. One adapter serves every budget.

```bash
vllm serve {model} --attention-backend mkv \\
    --additional-config '{{"mkv": {{"adapter": "ADAPTER", "budget": {budget:g}}}}}'
```

Without a GPU, add `--kv-cache-memory-bytes 268435456`: vLLM takes most of the memory for its cache otherwise.

| | |
|---|---|
| base model | `{model}`{revision} |
| attention | {layers} layers, {heads} query heads, {kv_heads} KV heads of {head_size} |
| basis | `{basis}`, {group_heads} KV heads per latent group |
| default budget | {budget:g} of the bytes per token of the model's own cache |

## Quality
{quality}
## How it was made

```json
{made}
```
"""


def model_card(config: AdapterConfig) -> str:
    """The text of `README.md`."""
    model = config.base_model_name_or_path
    # The Hub refuses a card whose base model is not the name of a repository.
    front = "" if Path(model).exists() or model.count("/") > 1 else f"base_model: {model}\n"
    return TEMPLATE.format(
        front=front,
        model=model,
        revision=f", revision `{config.revision}`" if config.revision else "",
        layers=len(config.layers),
        heads=config.model.num_attention_heads,
        kv_heads=config.model.num_key_value_heads,
        head_size=config.model.head_size,
        basis=config.basis,
        group_heads=config.group_heads,
        budget=config.default_budget,
        quality=quality_table(config),
        made=json.dumps(config.made, indent=2),
    )


def quality_table(config: AdapterConfig) -> str:
    """A Markdown table of `AdapterConfig.quality`, and what it was measured on."""
    if not config.quality:
        return "\nNot measured.\n"
    apart = "that no step fitted on" if measured_apart(config.made) else "on some of which a step may have been fitted"
    lines = [
        "",
        f"On windows of the text below {apart}; KL divergence from the full",
        "model in nats per token, and how often both find the same token most likely.",
        "",
        "| cache | budget | bytes per token | perplexity | KL | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for row in config.quality:
        lines.append(
            f"| {row.get('name', 'mkv')} | {row['budget']:.3f} | {row['bytes_per_token']} | {row['perplexity']:.2f} "
            f"| {row['kl']:.4f} | {row['top1']:.1%} |"
        )
    return "\n".join([*lines, ""])
