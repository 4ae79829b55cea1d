"""How long a step takes, by percentiles; what two threads gain; what memory a server needs. B = 1, one thread a call.

    python examples/deploying/latency.py [--steps 10000] [--json results.json] [--page docs/deploying.md]

Those compared take turns of a hundred steps. The first steps of a turn find the caches cold, and are not counted.
Memory is read from /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.commands import machine

NETWORKS = [("LSTM", 128, 1), ("GRU", 256, 2), ("LSTM", 512, 1)]  # cell, D = H, layers
BLOCK, COLD = 120, 20  # steps of a turn, and how many of them are not counted
STREAMS = 20  # as many as are made to see what one takes
MIB = 1 << 20
BEGIN, END = "<!-- latency:begin -->", "<!-- latency:end -->"


def make(cell: str, size: int, layers: int, package: Any = fused_rnn) -> Any:
    torch.manual_seed(0)
    return getattr(package, cell)(size, size, num_layers=layers).eval()


def contestants(cell: str, size: int, layers: int) -> dict[str, Callable[[Tensor], Any]]:
    """Each runs one step on x_t [1, D] and keeps its state."""

    def stepped(module: Any) -> Callable[[Tensor], Any]:
        state = None

        def step(x_t: Tensor) -> Any:
            nonlocal state
            y, state = module(x_t[None], state)
            return y

        return step

    ours = make(cell, size, layers)
    return {
        "torch.nn": stepped(make(cell, size, layers, nn)),
        "module": stepped(ours),
        "stream": ours.stream().step,
        "stream, int8": ours.stream(weights="int8").step,
    }


def latencies(network: tuple[str, int, int], steps: int) -> list[dict[str, Any]]:
    """A row for each contestant: percentiles of a step's time, in microseconds."""
    runs = contestants(*network)
    inputs = torch.randn(BLOCK, 1, network[1])
    taken: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(-(-steps // (BLOCK - COLD))):
        for name, run in runs.items():
            for x_t in inputs[:COLD]:
                run(x_t)
            for x_t in inputs[COLD:]:
                start = time.perf_counter_ns()
                run(x_t)
                taken[name].append(time.perf_counter_ns() - start)
    rows = []
    for name, all_of_them in taken.items():
        cuts = statistics.quantiles(all_of_them[:steps], n=1000, method="inclusive")
        at = {"p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998]}
        cell, size, layers = network
        times = {p: round(ns / 1e3, 2) for p, ns in at.items()}
        rows.append({"cell": cell, "H": size, "layers": layers, "what": name, "steps": steps, **times})
    return rows


def two_threads(network: tuple[str, int, int], steps: int) -> dict[str, Any]:
    """How many times the steps a second of one thread two threads make, each with a stream of its own."""
    cell, size, layers = network
    streams, x_t = [make(*network).stream() for _ in range(2)], torch.zeros(1, size)

    def run(stream: fused_rnn.Stream) -> None:
        for _ in range(steps):
            stream.step(x_t)

    def seconds(threads: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, streams))
        return time.perf_counter() - start

    ratios = [seconds(1) / seconds(2) for _ in range(7)]
    return {"cell": cell, "H": size, "layers": layers, "throughput": round(statistics.median(ratios), 2)}


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


def own() -> int:
    """Bytes in memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def stream_memory(network: tuple[str, int, int], kept: list[Any]) -> dict[str, Any]:
    """What weights, a stream and its state take, in MiB. Streams go into `kept`, or the next would use their memory."""
    module = make(*network)
    cell, size, layers = network
    row: dict[str, Any] = {"cell": cell, "H": size, "layers": layers}
    row["weights"] = round(sum(p.nbytes for p in module.parameters()) / MIB, 2)
    for weights in (None, "bf16", "int8"):
        before = resident()
        for _ in range(STREAMS):
            kept.append(module.stream(weights=weights))
            kept[-1].step(torch.zeros(1, size))
        row["stream" if weights is None else f"stream, {weights}"] = round((resident() - before) / STREAMS / MIB, 2)
    row["state"] = round(sum(t.nbytes for t in kept[-1].state_dict().values()) / MIB, 4)
    return row


def worker(queue: Any, module: Any, threads: int) -> None:
    """A process of a pool: it answers with the memory that it alone takes."""
    torch.set_num_threads(threads)
    module = module or make("GRU", 256, 2)
    stream = module.stream()
    stream.steps(torch.zeros(100, 1, stream.input_size))
    queue.put(own())


def worker_memory() -> dict[str, Any]:
    """MiB that one more process takes, forked from one that holds the model, or started anew; GRU, 2 layers of 256."""
    module, row = make("GRU", 256, 2), {"this process": round(resident() / MIB, 1)}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=worker, args=(queue, module if method == "fork" else None, 1))
        process.start()
        row[method] = round(queue.get(timeout=120) / MIB, 1)
        process.join()
    return row


def tables(results: dict[str, Any]) -> str:
    """The figures as Markdown, as docs/deploying.md has them between its markers."""
    run = results["run"]
    lines = ["| | µs a step | p50 | p99 | p99.9 |", "|---|---|---|---|---|"]
    for row in results["step_us"]:
        times = " | ".join(f"{row[p]:.4g}" for p in ("p50", "p99", "p99.9"))
        lines.append(f"| {network_name(row)} | {row['what']} | {times} |")
    lines += ["", "| MiB | weights | stream | bf16 | int8 | its state |", "|---|---|---|---|---|---|"]
    for row in results["memory_mib"]:
        sizes = (f"{row[name]:.1f}" for name in ("weights", "stream", "stream, bf16", "stream, int8"))
        lines.append(f"| {network_name(row)} | {' | '.join(sizes)} | {row['state']:.3f} |")
    workers = results["worker_mib"]
    gains = [f"{row['throughput']:.1f}× ({network_name(row)})" for row in results["two_threads"]]
    lines += ["", f"- Two threads, each with a stream, make {', '.join(gains)} the steps of one."]
    lines += [f"- A process with torch and the GRU takes {workers['this process']:.0f} MiB. One more worker takes"]
    lines += [f"  {workers['fork']:.0f} MiB of its own if forked from it, {workers['spawn']:.0f} MiB if spawned."]
    lines += ["", f"({run['device_name']}, torch {run['torch']}, {run['date'][:10]}.)"]
    return "\n".join(lines)


def network_name(row: dict[str, Any]) -> str:
    return f"{row['cell']}, {row['layers']} × {row['H']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of each network")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--page", type=Path, help="a page to write them to, between its markers")
    options = parser.parse_args()
    if options.steps < 1000:
        parser.error(f"--steps: got {options.steps}, expected at least 1000, for a percentile 99.9")
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("latency.py reads memory from /proc/self, which this system has not")

    torch.set_num_threads(1)
    workers, kept = worker_memory(), []
    memory = [stream_memory(network, kept) for network in NETWORKS]
    kept.clear()
    with torch.inference_mode():
        rows = [row for network in NETWORKS for row in latencies(network, options.steps)]
    threads = [two_threads(network, options.steps // 10) for network in NETWORKS]
    facts = machine.describe("cpu") | {"threads": 1, "command": "python examples/deploying/latency.py"}
    results = {"run": facts, "step_us": rows, "two_threads": threads, "memory_mib": memory, "worker_mib": workers}
    print(tables(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.page:
        head, rest = options.page.read_text(encoding="utf-8").split(BEGIN, 1)
        options.page.write_text(f"{head}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
