"""Take in what the programs of examples/ have written, and fill docs/gallery.md and the README with it.

    python scripts/gallery.py [FOLDER]

NAME.json goes to benchmarks/results/examples, NAME.png to docs/gallery. Then, without a folder only this, the tables
between `<!-- NAME:begin -->` and `<!-- NAME:end -->` are made of benchmarks/results/examples; in the README those of
`gallery`, a line a program: what it reached in short, and the slowest and fastest of its trainings. Runs of
other options than the standard ones are refused.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fused_rnn.commands.demo import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/examples"
PICTURES = ROOT / "docs/gallery"
PAGE = ROOT / "docs/gallery.md"
README = ROOT / "README.md"


def take(folder: Path) -> None:
    """Copy the results of full runs into the repository: all of them with their pictures, or none."""
    found = sorted(folder.glob("*.json"))
    if not found:
        raise SystemExit(f"gallery.py: {folder} has no results: run examples/NAME.py --out {folder} first")
    for path in found:
        if not json.loads(path.read_text(encoding="utf-8"))["standard"]:
            raise SystemExit(f"gallery.py: {path} is of a quick run, or of other options than the standard ones")
        if not path.with_suffix(".png").exists():
            raise SystemExit(f"gallery.py: {path} has no picture beside it")
    for path in found:
        for source, target in ((path, RESULTS), (path.with_suffix(".png"), PICTURES)):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def number(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def tables(record: dict[str, Any]) -> str:
    """What it was given, what it reached, what a step took; then which machine."""
    given = "; ".join(f"{name}: {number(value)}" for name, value in record["data"].items())
    lines = [f"Data: {given}.", "", "| reached | |", "|---|---|"]
    lines += [f"| {name} | {number(value)} |" for name, value in record["quality"].items()]
    lines += [
        "",
        "| training | ms a step, torch.nn → ours | times as fast | memory of a step, MiB | losses differ by |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, training in record["trainings"].items():
        times, memory = training["step_ms"], training["step_memory_mib"]
        if times["torch"] is None:
            lines.append(f"| {name} | {number(times['ours'])} | – | {number(memory['ours'] or '–')} | – |")
            continue
        exact = training["largest_difference_in_float64"]
        differ = f"{training['largest_difference']:.0e}"
        if exact is not None:
            differ += f" (in float64 {exact:.0e}; torch.nn's own {training['torch_in_float32_from_float64']:.0e})"
        both = [number(memory[side]) if memory[side] is not None else "–" for side in ("torch", "ours")]
        lines.append(
            f"| {name}, {training['steps']:,} steps | {number(times['torch'])} → {number(times['ours'])}"
            f" | **{times['torch'] / times['ours']:.2f}×** | {both[0]} → {both[1]} | {differ} |"
        )
    machine, plural = record["machine"], "s" * (record["machine"]["threads"] > 1)
    setting = f"{machine['device_name']}, {machine['threads']} thread{plural}, torch {machine['torch']}"
    told = f"commit {machine['commit']}, {machine['date']}; `python examples/{record['program']}.py`"
    return "\n".join([*lines, "", f"<sub>{setting}, {told}</sub>"])


def summary(records: list[dict[str, Any]]) -> str:
    lines = ["| | in short | a step of training, times as fast as by `torch.nn` |", "|---|---|---|"]
    for record in records:
        times = [training["step_ms"] for training in record["trainings"].values()]
        ratios = sorted(each["torch"] / each["ours"] for each in times if each["torch"] is not None)
        span = " to ".join(f"{ratio:.2f}×" for ratio in dict.fromkeys((ratios[0], ratios[-1]))) if ratios else "–"
        lines.append(
            f"| [{record['program']}](docs/gallery.md#{record['program']}) | {record['quality']['in short']} | {span} |"
        )
    machines = dict.fromkeys(f"{r['machine']['device_name']}, {r['machine']['threads']} threads" for r in records)
    return "\n".join([*lines, "", f"<sub>{'; '.join(machines)}; `make gallery`</sub>"])


def fill(page: Path, blocks: dict[str, str]) -> bool:
    """Write each text between the marks of its name; whether the page changed. ValueError: it has no such marks."""
    text = before = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = (f"<!-- {name}:{which} -->" for which in ("begin", "end"))
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page}: expected {begin} and {end}")
        text = f"{head}{begin}\n{block}\n{end}{tail}"
    if text != before:
        page.write_text(text, encoding="utf-8")
    return text != before


def write(page: Path = PAGE, readme: Path = README, results: Path = RESULTS) -> list[str]:
    """Fill both; what changed."""
    paths = [path for program in PROGRAMS if (path := results / f"{program}.json").exists()]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    blocks = {page: {record["program"]: tables(record) for record in records}, readme: {"gallery": summary(records)}}
    return [path.name for path, texts in blocks.items() if fill(path, texts)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]))
    print(f"written: {', '.join(write()) or 'nothing, all is up to date'}")
