# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM beside MKV on one model at the same cache memory: tokens of cache, bytes per token, perplexity, KL, text.

    make demo
    python examples/demo.py --model MODEL --text TEXT.txt --budget 0.3

MKV serves at the smallest budget whose KL divergence from the full model is under that of a cache of 4 bits per token
and head; `vllm-mkv eval` measures both first. Each of the two servers is started, asked and stopped in turn. Exit
status 0 says that every step happened and that the second server really served from a projected cache; anything else
ends with the reason and the end of the server's log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
MAX_MODEL_LEN = 1024
NAME = "demo"
"""What the model is called in requests, whatever its path."""

console = Console()


class DemoError(Exception):
    """A step did not happen; the message says which and why."""


FOUR_BIT = "int4"
"""Of the caches that `vllm-mkv eval` knows: 4 bits per token and head."""
BUDGETS = (0.3, 0.28, 0.26, 0.24, 0.22, 0.2, 0.18, 0.16, 0.14)
FAILURES = (DemoError, OSError, OpenAIError, KeyError, TypeError, ValueError)
"""A server that is away or answers with something else shows as any of these."""


@dataclass(frozen=True)
class Projection:
    """What the line that begins `MKV:` in the server's log says."""

    line: str
    reached: float
    bytes_per_token: int
    own_bytes_per_token: int


@dataclass(frozen=True)
class Measured:
    """What a server did, but for the KL divergence, which `vllm-mkv eval` measured."""

    cache_tokens: int
    bytes_per_token: int
    perplexity: float
    kl: float


@dataclass(frozen=True)
class Choice:
    """Rows of `vllm-mkv eval`: of MKV at the budget to serve at, and of 4 bits per token and head."""

    budget: float
    mkv: dict
    four_bit: dict


class Server:
    """`vllm serve` in a process group of its own."""

    def __init__(self, title: str, model: str, options: list[str], log: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.title, self.log, self.url = title, log, f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)
        program = shutil.which("vllm", path=os.path.dirname(sys.executable)) or shutil.which("vllm")
        if program is None:
            raise DemoError("there is no `vllm` command in this environment; run `make env`")
        command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_until_up(self, seconds: float) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        with console.status("") as status:
            while (waited := time.monotonic() - start) < seconds:
                status.update(f"starting {self.title}: {waited:.0f} s")
                self.check_alive()
                with contextlib.suppress(OSError):
                    self.get("/health")
                    return time.monotonic() - start
                time.sleep(0.5)
        raise DemoError(f"{self.title} was not up after {seconds:.0f} s (--timeout)")

    def check_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            raise DemoError(f"{self.title} ended with exit status {code}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def cache_tokens(self) -> int:
        """From the server's own metrics."""
        found = re.search(r"^vllm:cache_config_info\{(.*)\}", self.get("/metrics"), re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found.group(1))) if found else {}
        try:
            return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError) as error:
            raise DemoError(
                f"{self.title}: /metrics has no number of cache blocks ({labels or 'no labels'})"
            ) from error

    def perplexity(self, windows: list[list[int]]) -> float:
        losses: list[float] = []
        for window in track(
            windows,
            description=f"perplexity of {self.title}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            answer = self.client.completions.create(
                model=NAME, prompt=window, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
            )
            scored = answer.choices[0].model_dump()["prompt_logprobs"][1:]
            losses += [-entry[str(token)]["logprob"] for token, entry in zip(window[1:], scored, strict=True)]
        perplexity = math.exp(sum(losses) / len(losses))
        if not math.isfinite(perplexity):
            raise DemoError(f"{self.title}: the perplexity is {perplexity}")
        return perplexity

    def stream(self, prompt: str, max_tokens: int) -> Iterator[str]:
        """Pieces of an answer as they arrive."""
        chunks = self.client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.7,
            seed=0,
            stream=True,
            extra_body={"min_tokens": max_tokens // 2},
        )
        for chunk in chunks:
            if chunk.choices:
                yield chunk.choices[0].text

    def projection(self) -> Projection:
        """What the plugin logged at start-up."""
        lines = [line for line in self.log.read_text("utf-8", "replace").splitlines() if "MKV: " in line]
        for line in lines:
            said = line[line.index("MKV: ") :]
            if found := re.search(r"([\d.]+) reached: (\d+) bytes per token in place of (\d+)", said):
                return Projection(said, float(found.group(1)), int(found.group(2)), int(found.group(3)))
        raise DemoError(f"{self.title}: no line of its log says what MKV made of the cache ({lines or 'no MKV: line'})")

    def stop(self) -> None:
        """The whole process group, kindly at first."""
        for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if self.process.poll() is None:
            raise DemoError(f"{self.title} could not be stopped (process group {self.process.pid})")


@contextlib.contextmanager
def serving(title: str, options: list[str], args: argparse.Namespace, logs: Path) -> Iterator[Server]:
    """A server that is up, and is stopped at the end, whatever happens; its log is shown if it failed."""
    common = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--enforce-eager"]
    common += ["--kv-cache-memory-bytes", str(args.cache_mib << 20), "--uvicorn-log-level", "warning"]
    server = Server(title, args.model, [*common, *options], logs / f"{title.replace(' ', '-')}.log")
    try:
        console.print(f"{title}: up after {server.wait_until_up(args.timeout):.0f} s")
        yield server
        server.check_alive()
    except FAILURES:
        server.stop()
        tail = server.log.read_text("utf-8", "replace").splitlines()[-40:]
        console.print(f"the end of {server.log}:", style="red", soft_wrap=True)
        console.print("\n".join(tail), markup=False, highlight=False, soft_wrap=True)
        raise
    finally:
        server.stop()
    console.print(f"{title}: stopped")


def choose(args: argparse.Namespace, folder: Path) -> Choice:
    """The budget asked for, or the smallest of `BUDGETS` whose KL divergence is under that of 4 bits."""
    budgets = BUDGETS if args.budget is None else (args.budget,)
    figures = folder / "eval.json"
    program = shutil.which("vllm-mkv", path=os.path.dirname(sys.executable)) or shutil.which("vllm-mkv")
    if program is None:
        raise DemoError("there is no `vllm-mkv` command in this environment; run `make env`")
    command = [program, "eval", args.model, "--text", str(args.text), "--against", FOUR_BIT, "--json", str(figures)]
    command += ["--context", str(args.window), "--windows", str(args.windows), "--budgets", *map(str, budgets)]
    command += ["--adapter", args.adapter] if args.adapter else []
    with console.status("measuring KL divergences with `vllm-mkv eval`"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        raise DemoError(f"`vllm-mkv eval` ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    rows = json.loads(figures.read_text("utf-8"))["rows"]
    (four_bit,) = (row for row in rows if row["name"] == FOUR_BIT)
    ours = dict(zip(budgets, (row for row in rows if row["name"] == "mkv"), strict=True))
    good = [budget for budget, row in ours.items() if row["kl"] < four_bit["kl"]]
    if args.budget is None and not good:
        raise DemoError(
            f"at none of the budgets {BUDGETS} is the KL divergence under the {four_bit['kl']:.4f} of 4 bits; name a "
            "budget with --budget, or give the adapter tiers with `vllm-mkv search`"
        )
    chosen = args.budget or min(good)
    return Choice(chosen, ours[chosen], four_bit)


def cut_windows(server: Server, args: argparse.Namespace) -> list[list[int]]:
    """The same windows of tokens for both servers."""
    tokens = server.post("/tokenize", {"model": NAME, "prompt": args.text.read_text("utf-8")})["tokens"]
    size = args.window
    windows = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)][: args.windows]
    if not windows:
        raise DemoError(f"{args.text} has {len(tokens)} tokens, less than one window of {size}")
    return windows


def answer(server: Server, args: argparse.Namespace) -> None:
    console.print(f"\n[bold]{escape(args.prompt)}[/bold]", end="")
    pieces = []
    for piece in server.stream(args.prompt, args.max_tokens):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        pieces.append(piece)
    console.print("\n")
    if len(pieces) < 2 or not "".join(pieces).strip():
        raise DemoError(f"{server.title} streamed no answer, but {pieces}")


def check(stock: Measured, mkv: Measured, reached: float, budget: float, args: argparse.Namespace) -> None:
    """Raises DemoError unless the second server used a projected cache of the size that it claims."""
    memory, gain = args.cache_mib << 20, mkv.cache_tokens / stock.cache_tokens
    if not 0 < reached <= budget:
        raise DemoError(f"budget {budget:g} was asked and {reached:g} reached")
    if abs(gain * reached - 1) > 0.01:
        raise DemoError(f"{gain:.3f} times the tokens of cache at budget {reached:g}; {1 / reached:.3f} were due")
    for row in (stock, mkv):
        if abs(row.cache_tokens * row.bytes_per_token / memory - 1) > 0.01:
            raise DemoError(f"{row.cache_tokens} tokens of {row.bytes_per_token} bytes are not {args.cache_mib} MiB")
    if mkv.perplexity == stock.perplexity:
        raise DemoError("both servers have the very same perplexity, so the cache was not projected")


def report(stock: Measured, mkv: Measured, choice: Choice, args: argparse.Namespace, num_windows: int) -> Table:
    title = (
        f"{Path(args.model).name}, {args.cache_mib} MiB of cache; perplexity and KL on {num_windows} x {args.window} "
        "tokens"
    )
    table = Table(title=title)
    table.add_column("cache", no_wrap=True)
    for column in ("tokens of cache", "bytes per token", "x smaller", "perplexity", "KL"):
        table.add_column(column, justify="right", no_wrap=column == "perplexity")
    four_bit = choice.four_bit
    rows = (
        ("stock vLLM", f"{stock.cache_tokens:,}", stock.bytes_per_token, stock.perplexity, stock.kl),
        ("4 bits, not served", "-", four_bit["bytes_per_token"], None, four_bit["kl"]),
        (f"MKV, budget {choice.budget:g}", f"{mkv.cache_tokens:,}", mkv.bytes_per_token, mkv.perplexity, mkv.kl),
    )
    for name, tokens, used, perplexity, kl in rows:
        smaller = f"{stock.bytes_per_token / used:.2f}"
        table.add_row(name, tokens, f"{used:,}", smaller, f"{perplexity:.2f}" if perplexity else "-", f"{kl:.4f}")
    return table


def run(args: argparse.Namespace, logs: Path) -> None:
    choice = choose(args, logs)
    with serving("stock vLLM", [], args, logs) as server:
        windows = cut_windows(server, args)
        stock_tokens, stock_perplexity = server.cache_tokens(), server.perplexity(windows)
    settings = {"budget": choice.budget} | ({"adapter": args.adapter} if args.adapter else {})
    options = ["--attention-backend", "mkv", "--additional-config", json.dumps({"mkv": settings})]
    with serving("MKV", options, args, logs) as server:
        projection = server.projection()
        console.print(projection.line, markup=False, highlight=False, soft_wrap=True)
        stock = Measured(stock_tokens, projection.own_bytes_per_token, stock_perplexity, 0.0)
        mkv = Measured(server.cache_tokens(), projection.bytes_per_token, server.perplexity(windows), choice.mkv["kl"])
        check(stock, mkv, projection.reached, choice.budget, args)
        if mkv.bytes_per_token != choice.mkv["bytes_per_token"]:
            raise DemoError(
                f"{mkv.bytes_per_token} bytes per token are served, {choice.mkv['bytes_per_token']} measured"
            )
        answer(server, args)
    console.print(report(stock, mkv, choice, args, len(windows)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "books-4m"), help="folder or Hub name (default: the bundled one)")
    parser.add_argument("--adapter", help="folder or Hub name (default: MODEL/mkv)")
    parser.add_argument("--budget", type=float, help="share of the model's own cache (default: the least under 4 bits)")
    parser.add_argument("--text", type=Path, help="text to measure perplexity on (default: the bundled excerpt)")
    parser.add_argument("--windows", type=int, default=16, help="windows of text (default: 16)")
    parser.add_argument("--window", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--prompt", default="The old man opened the door, and")
    parser.add_argument("--max-tokens", type=int, default=96, help="length of the answer (default: 96)")
    parser.add_argument("--cache-mib", type=int, default=256, help="cache of each server (default: 256)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a server may take to start (default: 600)")
    args = parser.parse_args()
    if args.text is None:
        texts = sorted((HERE / "data").glob("*.txt"))
        if not texts:
            parser.error("there is no text in examples/data; name one with --text")
        args.text = texts[0]
    if not 1 < args.window < MAX_MODEL_LEN:
        parser.error(f"--window must be between 2 and {MAX_MODEL_LEN - 1}")
    return args


def main() -> int:
    args = parse_args()
    # Ended by a signal, the servers are stopped just as after an error.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    logs = Path(tempfile.mkdtemp(prefix="mkv-demo-"))
    try:
        run(args, logs)
    except FAILURES as error:
        console.print(f"failed: {escape(str(error) or repr(error))}", style="bold red", soft_wrap=True)
        return 1
    except SystemExit:
        shutil.rmtree(logs)
        raise
    shutil.rmtree(logs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
