"""Every instruction set of this machine, and how far from the limit our kernels are with each.

One process for each runs the grid "machine" with FUSED_RNN_ISA set. torch and its libraries are asked to keep to the
same instructions: their products are part of the limit, which is then that of a machine that has no wider ones. MKL
asks no less of an AMD processor than AVX2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_rnn import ops
from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.limits import Limits
from fused_rnn.commands.bench.results import FLOOR, Results, geometric_mean, setting
from fused_rnn.commands.bench.tables import grid, ratio

PREFIX = "isa-"  # of the result files' names
GRID, OURS = "machine", "auto"
# ours → what keeps torch, oneDNN and MKL to the same
TORCH = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}


def execute(
    cells: Sequence[str], modes: Sequence[str], dtype: str, budget_s: float, out: Path, console: Console
) -> None:
    """Measure with each instruction set, by one thread, and print the table of all. Raises RuntimeError."""
    names = [name for name in TORCH if name in ops._C.available_isas().split(", ")]
    minutes = str(budget_s / 60 / len(names))
    command = [sys.executable, "-m", "fused_rnn", "bench", "--grid", GRID, "--threads", "1", "--dtype", dtype]
    command += ["--provider", "torch", "--provider", OURS, "--no-memory", "--minutes", minutes, "--out", str(out)]
    command += [word for cell in cells for word in ("--cell", cell)] + [w for mode in modes for w in ("--mode", mode)]
    with console.status("") as status:
        for name in names:
            status.update(name)
            own = os.environ | TORCH[name] | {"FUSED_RNN_ISA": name}
            done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"the process with FUSED_RNN_ISA={name} failed: {(done.stderr or done.stdout)[-400:]}"
                )
    for loaded in _loaded(out):
        console.print(terminal(loaded))
        console.print(caption(loaded), soft_wrap=True)
    console.print(f"Written to {out}/{PREFIX}*-{GRID}-*.json", soft_wrap=True, markup=False)


def _loaded(directory: Path) -> Iterator[list[Results]]:
    """The files of a folder, those of one machine, dtype and number of threads together, the narrowest first."""
    found: dict[tuple[Any, ...], list[Results]] = {}
    for path in sorted(directory.glob(f"{PREFIX}*-{GRID}-*.json")):
        results = Results.load(path)
        run = results.runs[-1]
        found.setdefault((run["dtype"] != "fp32", setting(run), run["device_name"]), []).append(results)
    for _, group in sorted(found.items()):
        yield sorted(group, key=lambda results: [*TORCH].index(results.runs[-1]["kernels"]))


def shares(results: Results) -> dict[Point, float]:
    """The limit over our time, at every point."""
    return {point: 1 / value for point, value in results.ratios(OURS, FLOOR).items()}


def _rows(loaded: list[Results]) -> Iterator[tuple[str, list[str]]]:
    """(what, an entry for each instruction set): shares of the limit by mode, B and H, and what the limits are."""
    points = {point for results in loaded for point in shares(results)}
    for mode, B, H in sorted({(p.mode, p.B, p.H) for p in points}, key=lambda key: (SEQUENCES.index(key[0]), *key[1:])):
        yield f"{mode}, B={B}, H={H}", [_share(results, mode, B, H) for results in loaded]
    for mode in SEQUENCES:
        speedups = [[v for p, v in results.speedups(OURS).items() if p.mode == mode] for results in loaded]
        if any(speedups):
            entries = [f"{ratio(geometric_mean(v))}× ({ratio(min(v))})" if v else "–" for v in speedups]
            yield f"× torch.nn's speed, {mode}", entries
    limits = [_limits(results.runs[-1]) for results in loaded]
    yield "GFLOP/s, and whose", [f"{known.flops / 1e9:.0f} ({_whose(known.by)})" for known in limits]
    for place, size in places(loaded[0].runs[-1], limits[0]).items():
        yield f"GB/s from {place}", [f"{known.bandwidth(size) / 1e9:.0f}" for known in limits]


def _whose(by: str) -> str:
    return "torch" if by == "torch.mm" else "ours"


def _limits(run: dict[str, Any]) -> Limits:
    known = run["limits"]
    return Limits(known["flops"], tuple((size, rate) for size, rate in known["read"]), by=known["by"])


def _share(results: Results, mode: str, B: int, H: int) -> str:
    """Geometric mean of the cells, and the one that is farthest off."""
    found = {p: share for p, share in shares(results).items() if (p.mode, p.B, p.H) == (mode, B, H)}
    if not found:
        return "–"
    least = min(found, key=lambda point: found[point])
    worst = f" ({least.cell} {100 * found[least]:.0f})" if len(found) > 1 else ""
    return f"{100 * geometric_mean(found.values()):.0f}{worst}"


def places(run: dict[str, Any], limits: Limits) -> dict[str, int]:
    """L1, L2, … and memory → a buffer that was read from there: half as large as the cache, or twice the last one."""
    sizes, found = [size for size, _ in limits.read], {}
    for name, cache in run.get("caches", {}).items():
        if fitting := [size for size in sizes if 2 * size <= cache]:
            found[name] = fitting[-1]
    if sizes[-1] >= 2 * max(run.get("caches", {}).values(), default=sizes[-1]):
        found["memory"] = sizes[-1]
    return found


def terminal(loaded: list[Results]) -> Table:
    names = tuple(results.runs[-1]["kernels"] for results in loaded)
    table = grid(f"{setting(loaded[0].runs[-1])}: % of the limit, mean of the cells (least)", ("",), names)
    for what, entries in _rows(loaded):
        table.add_row(what, *entries)
    return table


def tables(directory: Path) -> str:
    """Markdown: a table of all instruction sets for each machine, dtype and number of threads; "" of no files."""
    return "\n\n".join(map(_markdown, _loaded(directory)))


def _markdown(loaded: list[Results]) -> str:
    names = [results.runs[-1]["kernels"] for results in loaded]
    lines = [f"| {setting(loaded[0].runs[-1])}: % of the limit, mean of the cells (least) | {' | '.join(names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    lines += [f"| {what} | {' | '.join(entries)} |" for what, entries in _rows(loaded)]
    return "\n".join([*lines, "", f"<sub>{caption(loaded)}</sub>"])


def caption(loaded: list[Results]) -> str:
    run = loaded[0].runs[-1]
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in run.get("caches", {}).items())
    points = [point for results in loaded for point in shares(results)]
    steps = ", ".join(f"T={T}" for T in sorted({point.T for point in points}))
    cells = ", ".join(cell for cell in CELLS if any(point.cell == cell for point in points))
    dates = dict.fromkeys(f"commit {r['commit'] or 'unknown'}, {r['date']}" for results in loaded for r in results.runs)
    where = f"{run['device_name']} ({caches}), torch {run['torch']}, {'; '.join(dates)}"
    return f"{cells}, {steps}; {where}; `python -m fused_rnn bench --isas`"
