# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and what their values are parsed with."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_text_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE|DATASET",
        help="UTF-8 files, folders of .txt files, or datasets as NAME[:CONFIG[:SPLIT]]",
    )


def add_window_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--eval-windows",
        type=int,
        default=16,
        metavar="N",
        help="windows to measure quality on, which no step of the same --text, --seed and --context fits on; 0 for "
        "none (default: %(default)s)",
    )
    add_run_options(sub)


def add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--context", type=int, metavar="N", help="tokens per window (default: 1024, or the model's longest if shorter)"
    )
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the draw of windows (default: %(default)s)"
    )
    add_dtype_option(sub, "what the model is stored in, whose bytes count whatever this is")
    add_model_options(sub)


def add_dtype_option(sub: argparse.ArgumentParser, auto: str) -> None:
    sub.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help=f"dtype to compute in (default: auto, {auto})",
    )


def add_allocation_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--allocation",
        choices=("path", "uniform"),
        default="path",
        help="path gives bits as the adapter orders them, uniform to all latent groups alike (default: %(default)s)",
    )


def add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        default="auto",
        help="torch device to compute on: cpu, cuda, cuda:1, .. (default: %(default)s, cuda where there is one)",
    )
    add_repository_options(sub)


def add_repository_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--revision",
        help="branch, tag or commit of the model's Hub repository (default: the newest, or that of an adapter which "
        "names the model)",
    )
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that the model's Hub repository brings (default: do not)",
    )


def widths(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no list of bits such as 16,8,4,2,0") from None


def names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(","))


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; give one such as '{{\"mode\": 0}}'")
    return found
