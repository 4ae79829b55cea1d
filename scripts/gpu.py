"""Everything that needs a GPU, stage by stage: `make gpu`, or one of `make gpu-build`, gpu-smoke, gpu-test, ...

    python scripts/gpu.py [STAGE[:SECONDS] | PLAN ...] [--out build/gpu] [--minutes 8] [--total 9.5]

Builds in place, for this machine's GPU unless TORCH_CUDA_ARCH_LIST says otherwise, with the Python that runs it:
nothing is installed and nothing is fetched. Or unpacks what scripts/gpu_pack.py made elsewhere. Each stage is stopped
after its seconds or --minutes, all together after --total, and leaves what it has by then. A plan is a list of stages:
`first` for a GPU that nothing has run on yet, `next` for what comes after it, on the same machine: where kernels failed
in the smoke, those again, with waits that end, and what works; else more of what is measured. HOST_ARGS, SMOKE_ARGS,
AGAIN_ARGS, TEST_ARGS, STEPS_ARGS, SANITIZE_ARGS, FIELD_ARGS, BENCH_ARGS, VARIANTS_ARGS and TRITON_ARGS are handed on to
their stages; without the last three the benches are quick.

Logs are in build/gpu-work. --out gets a few files, written anew every half minute: summary.txt, summary.json, tests.xml
(JUnit), results.tar.gz with all logs and results, and after a build the extension modules, with which another machine
of the kind needs none. The summary is also printed, last. Exits with 1 if a stage failed. benchmarks/GPU.md has the
order for a first half hour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tests

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # a checkout built in place, with nothing installed
WORK = ROOT / "build" / "gpu-work"
PACK = ROOT / "build" / "pack"  # scripts/gpu_pack.py's
TRITON_CACHE = Path("/tmp/fused_rnn-triton")  # absolute, since paths in it are; the same on both machines
STAGES = ("build", "unpack", "parts", "host", "smoke", "again", "test", "steps", "sanitize", "bench", "variants",
          "triton", "field", "profile")  # fmt: skip
APART = ("unpack", "parts", "host", "again", "variants", "triton", "field")
ALL = tuple(stage for stage in STAGES if stage not in APART)
PLANS = {
    "first": [
        "unpack:45",
        "parts:20",
        "smoke:75",
        "steps:60",
        "host:30",
        "test:140",
        "bench:100",
        "profile:30",
        "sanitize:40",
    ],
    "green": ["unpack:25", "variants:90", "triton:60", "sanitize:50"],
    "red": ["again:70", "unpack:30", "steps:60", "sanitize:80"],
}
TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = "kns=fused_rnn"  # by a part of their names; torch's own kernels are not under test
# What they are measured with unless told otherwise; all in one folder, where rows that are not measured again stay.
IN_TORCH = "--quick --no-memory --provider torch --provider torch-fp16"
BENCHES = {
    "bench": f"{IN_TORCH} --provider cell --provider cuda --dtype bf16 --dtype tf32 --dtype fp16",
    "variants": f"{IN_TORCH} --provider cuda --dtype bf16 --variant lengths --variant resets --variant ragged"
    " --variant layers --variant bidirectional --variant graph",
    "triton": f"{IN_TORCH} --provider triton --dtype bf16",
}
LARGEST = 15 << 20  # bytes of a file under --out
MOST_FIGURES = 30  # lines
PACK_EVERY, TO_PACK = 30.0, 25.0  # seconds; and for a stage to stop


class Result(NamedTuple):
    stage: str
    status: str  # "ok", "failed", "timed out", "running"
    seconds: float
    said: str


def run(name: str, command: list[str], work: Path, seconds: float, tree: Path = ROOT, **environment: str) -> Result:
    """A command with its log; interrupted when its time is up, so that it can still write what it has."""
    began, log = time.monotonic(), work / f"{name}.log"
    print(f"--- {name}: {' '.join(command)}", flush=True)
    with log.open("w") as stream:
        child = subprocess.Popen(
            command, cwd=tree, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
            # A shell's background jobs ignore the interrupt, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        status = "ok"
        for patience, sent in ((seconds, signal.SIGINT), (20, signal.SIGKILL), (20, signal.SIGKILL)):
            try:
                status = status if child.wait(patience) == 0 or status != "ok" else "failed"
                break
            except subprocess.TimeoutExpired:
                status = "timed out"
                os.killpg(child.pid, sent)
    return Result(name, status, time.monotonic() - began, last_line(log))


def last_line(log: Path, most: int | None = 160) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:most] if lines else ""


def architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major == 9 else "")


def build(work: Path, seconds: float) -> list[Result]:
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = run("build", command, work, seconds, FUSED_RNN_CUDA="1", TORCH_CUDA_ARCH_LIST=chosen)
    info = run("info", [sys.executable, "-m", "fused_rnn", "info"], work, 60)
    return [result._replace(said=f"for {chosen}") if result.status == "ok" else result, info._replace(said="")]


def put(module: Path, folder: Path) -> None:
    """In the place of one that may be loaded here: that keeps its file, which is not written over."""
    new = folder / f"{module.name}.new"
    shutil.copyfile(module, new)
    new.replace(folder / module.name)


def unpack(work: Path, seconds: float) -> list[Result]:
    """What gpu_pack.py made, put where it belongs; and what this machine is."""
    began, modules = time.monotonic(), sorted(PACK.glob("*.so"))
    if not modules:
        return [Result("unpack", "failed", 0.0, f"no module in {PACK}: make gpu-pack")]
    for module in modules:
        put(module, ROOT / "fused_rnn")
    if (cache := PACK / "triton.tar.gz").exists():
        with tarfile.open(cache) as archive:
            archive.extractall(TRITON_CACHE.parent, filter="data")
    machine = [sys.executable, "scripts/gpu_machine.py"]
    described = run("machine", machine, work, seconds - (time.monotonic() - began))
    return [described._replace(stage="unpack")]


def target_of(arch: str) -> str:
    """nvcc's argument for an architecture of TORCH_CUDA_ARCH_LIST: 9.0a."""
    name = arch.replace(".", "")
    return f"-gencode=arch=compute_{name},code=sm_{name}"


def compile_exchange(program: Path, target: str) -> list[str]:
    """The command."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", target]
    return ["nvcc", *flags, str(ROOT / "benchmarks" / "exchange.cu"), "-o", str(program)]


def parts(work: Path, seconds: float) -> list[Result]:
    """The exchanges between multiprocessors, with nothing around them: lines of JSON in parts.log."""
    program = PACK / "exchange"
    if not program.exists():
        program = work / "exchange"
        compiled = run("compile-exchange", compile_exchange(program, target_of(architecture())), work, seconds)
        if compiled.status != "ok":
            return [compiled]
    return [run("parts", [str(program)], work, seconds)]


def more(stage: str) -> list[str]:
    """What is handed on to it."""
    return shlex.split(os.environ.get(f"{stage.upper()}_ARGS", ""))


def host(work: Path, seconds: float) -> list[Result]:
    return [run("host", [sys.executable, "scripts/gpu_host.py", *more("host")], work, seconds)]


def smoke(work: Path, seconds: float) -> list[Result]:
    return [run("smoke", [sys.executable, "scripts/gpu_smoke.py", *more("smoke")], work, seconds)]


def failed_kernels(work: Path) -> list[str]:
    """Of the last smoke."""
    log = work / "smoke.log"
    last = last_line(log, None) if log.exists() else ""
    return last.partition("; not ")[2].split(", ") if "; not " in last else []


def again(work: Path, seconds: float) -> list[Result]:
    """The kernels that failed in the smoke, by the build that says what it waits for, if one was packed."""
    for module in PACK.glob("debug/_cuda.*"):
        put(module, ROOT / "fused_rnn")
    only = [argument for name in failed_kernels(work) for argument in ("--only", name)]
    return [run("again", [sys.executable, "scripts/gpu_smoke.py", *only, *more("again")], work, seconds)]


def test(work: Path, seconds: float) -> list[Result]:
    out = work / "tests"
    command = [sys.executable, "scripts/gpu_tests.py", "--out", str(out), "--minutes", f"{seconds / 60 - 0.3:.2f}"]
    result = run("test", [*command, *more("test")], work, seconds)
    if not any(out.glob("*.jsonl")):
        return [result]
    late = gpu_tests.unfinished(out)
    said = gpu_tests.counts(gpu_tests.read(out)) + (f"; not to their end: {', '.join(late)}" if late else "")
    return [result._replace(said=said)]


def steps(work: Path, seconds: float) -> list[Result]:
    """Of what is built; and of each other build of the CUDA loops in the pack, in a tree of its own, the same steps."""
    trees = {"steps": ROOT}
    for module in sorted(PACK.glob("variants/*/_cuda.*")):
        tree = work / "trees" / module.parent.name
        shutil.rmtree(tree, ignore_errors=True)
        for part in ("fused_rnn", "scripts"):
            shutil.copytree(ROOT / part, tree / part)
        shutil.copyfile(module, tree / "fused_rnn" / module.name)
        trees[f"steps-{module.parent.name}"] = tree
    results = []
    for name, tree in trees.items():
        out, share = work / name, seconds / len(trees)
        command = [sys.executable, "scripts/gpu_steps.py", "--out", str(out), "--minutes", f"{share / 60 - 0.1:.2f}"]
        results.append(run(name, [*command, *more("steps")], work, share, tree))
    return results


def sanitize(work: Path, seconds: float) -> list[Result]:
    """All tools side by side: most of their time goes into the host."""
    if shutil.which("compute-sanitizer") is None:
        return [Result("sanitize", "failed", 0.0, "compute-sanitizer is not on the PATH")]
    cases = [sys.executable, "scripts/gpu_sanitize.py", *more("sanitize")]

    def check(tool: str) -> Result:
        name = f"sanitize-{tool}"
        # Not the API's errors: torch asks for what may not be, and what fails of ours raises.
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        command += ["--print-limit", "20", "--kernel-name", KERNELS]
        # Each tensor in an allocation of its own, so that memcheck sees where one ends.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        result = run(name, [*command, *cases], work, seconds, **alone)
        log = (work / f"{name}.log").read_text(errors="replace")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)[-1:]
        found += re.findall(r"^(?:all )?\d+ .*ran.*", log, re.MULTILINE)[-1:]
        return result._replace(said="; ".join(found) or result.said)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return list(pool.map(check, TOOLS))


def _measured(stage: str, work: Path, seconds: float) -> list[Result]:
    chosen = more(stage) or BENCHES[stage].split()
    dtypes = max(1, chosen.count("--dtype"))
    minutes = ["--minutes", f"{0.8 * seconds / 60 / dtypes:.2f}"] if "--minutes" not in chosen else []
    command = [sys.executable, "-m", "fused_rnn", "bench", "--device", "cuda", "--out", str(work / "bench")]
    return [run(stage, [*command, *minutes, *chosen], work, seconds, COLUMNS="200")]


def bench(work: Path, seconds: float) -> list[Result]:
    return _measured("bench", work, seconds)


def variants(work: Path, seconds: float) -> list[Result]:
    """What departs from a plain batch: its rows are compared with those of `bench`."""
    return _measured("variants", work, seconds)


def triton(work: Path, seconds: float) -> list[Result]:
    """By itself: Triton compiles each problem before it is timed."""
    return _measured("triton", work, seconds)


def field(work: Path, seconds: float) -> list[Result]:
    """The cells of the literature, in whole calls."""
    command = [sys.executable, "scripts/gpu_field.py", "--out", str(work / "field")]
    return [run("field", [*command, "--minutes", f"{seconds / 60 - 0.1:.2f}", *more("field")], work, seconds)]


def profile(work: Path, seconds: float) -> list[Result]:
    command = [sys.executable, "scripts/gpu_profile.py", "--results", str(work / "bench"), "--out", str(work)]
    return [run("profile", [*command, "--minutes", f"{seconds / 60 - 0.3:.2f}"], work, seconds)]


def table(results: list[Result]) -> str:
    rows = [("stage", "status", "seconds", ""), *((r.stage, r.status, f"{r.seconds:.0f}", r.said) for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def left_out(entry: tarfile.TarInfo) -> bool:
    """Copies of the sources, and profiles so large that they would keep all else from coming back."""
    return entry.name == "gpu/trees" or (entry.name.endswith(".ncu-rep") and entry.size > LARGEST // 2)


def figures(work: Path) -> list[str]:
    """The first of what was measured, in as few lines as a screen has: steps by the estimate, ratios to torch.nn."""
    try:
        measured = [*steps_measured(work / "steps" / "steps.json"), *stacks_measured(work / "steps" / "stacks.json")]
        return [*measured, *ratios_measured(work / "bench")]
    except Exception as error:  # a file that is being written right now; whatever it is, the rest must come back
        return [f"no figures: {error!r}"]


def steps_measured(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines, rows = ["a step: microseconds, cycles / estimated"], map(json.loads, path.read_text().splitlines())
    for row in [row for row in rows if (row["cell"], row["number"]) == ("lstm", "bf16")][:MOST_FIGURES]:
        case = " ".join(str(row[name]) for name in ("cell", "number", "H", "B", "way", "exchange", "members"))
        cycles, estimated = 1e3 * row["gigahertz"] * row["micros"], sum(row["cycles"].values())
        lines.append(f"  {case:<44} {row['micros']:6.2f}  {cycles:6.0f} / {estimated:.0f}")
    return lines


def stacks_measured(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines, found = ["a stack: milliseconds by chunks of time"], dict[str, list[str]]()
    for row in map(json.loads, path.read_text().splitlines()):
        case = " ".join(str(row[name]) for name in ("kind", "H", "B", "L", "T", "way"))
        found.setdefault(case, []).append(f"{row['chunks'] or 'as planned'}: {row['ms']:.2f}")
    return [*lines, *(f"  {case:<36} {', '.join(times)}" for case, times in found.items())]


def ratios_measured(folder: Path) -> list[str]:
    from fused_rnn.commands.bench.results import Results, geometric_mean

    lines = []
    for path in sorted(folder.glob("*.json")):
        results = Results.load(path)
        for provider, mode in product(("cuda", "triton", "auto"), ("inference", "training")):
            found = results.speedups(provider, lambda point, mode=mode: point.mode == mode).values()
            if found:
                mean = f"{geometric_mean(found):.2f} ({min(found):.2f}) of {len(found)} points"
                lines.append(f"  {path.stem} {provider} {mode}: {mean}")
    return ["x torch.nn: geometric mean (least)", *lines] if lines else []


class Report:
    """What goes under --out: written anew after each stage and, while one runs, every half minute."""

    def __init__(self, work: Path, out: Path, machine: dict[str, str]) -> None:
        self.work, self.out, self.machine = work, out, machine
        self.results: list[Result] = []
        self.running: tuple[str, float] | None = None
        self.over = threading.Event()
        self.packer = threading.Thread(target=self._pack_now_and_then, daemon=True)
        self.packer.start()

    def stage(self, name: str, seconds: float) -> list[Result]:
        self.running = name, time.monotonic()
        results = globals()[name](self.work, seconds)
        self.running = None
        self.results += results
        return results

    def text(self) -> str:
        head = f"{self.machine['gpu']}, torch {self.machine['torch']}"
        return "\n".join([head, table(self.known()), *figures(self.work)])

    def known(self) -> list[Result]:
        if self.running is None:
            return self.results
        name, began = self.running
        return [*self.results, Result(name, "running", time.monotonic() - began, "")]

    def close(self) -> None:
        self.over.set()
        self.packer.join()
        self.pack()

    def _pack_now_and_then(self) -> None:
        while not self.over.wait(PACK_EVERY):
            try:
                self.pack()
            except (OSError, ValueError, KeyError, tarfile.TarError) as error:  # of a file that is being written
                print(f"not packed this time: {error!r}", file=sys.stderr, flush=True)

    def pack(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        summary = {**self.machine, "stages": [result._asdict() for result in self.known()]}
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (self.out / "summary.txt").write_text(self.text() + "\n")
        if any((self.work / "tests").glob("*.jsonl")):
            gpu_tests.write_junit(gpu_tests.read(self.work / "tests"), self.out / "tests.xml")
        for module in (ROOT / "fused_rnn").glob("_*.so"):
            if any(result.stage == "build" for result in self.results) and module.stat().st_size < LARGEST:
                shutil.copyfile(module, self.out / module.name)
        unfinished = self.out / "results.tar.gz.new"
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(self.work, "gpu", filter=lambda entry: None if left_out(entry) else entry)
        unfinished.replace(self.out / "results.tar.gz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").splitlines()[0])
    plans = ", ".join(["first", "next", *(name for name in PLANS if name != "first")])
    told = f"of {', '.join(STAGES)}, with :SECONDS or without; or a plan: {plans}; {', '.join(ALL)} where none is named"
    parser.add_argument("stages", nargs="*", help=told)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of a stage at most")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds of each stage")
    parser.add_argument("--total", type=float, default=float("inf"), help="minutes of all stages together at most")
    chosen = parser.parse_args()
    now = [("red" if failed_kernels(WORK) else "green") if stage == "next" else stage for stage in chosen.stages]
    stages = [part for stage in now or ALL for part in PLANS.get(stage, [stage])]
    unknown = {stage for stage in stages if stage.partition(":")[0] not in STAGES}
    if unknown:
        parser.error(f"stages: got {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}, {plans}")
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU here (python -m fused_rnn info says more)", file=sys.stderr)
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    os.environ.setdefault("TRITON_CACHE_DIR", str(TRITON_CACHE))
    report = Report(WORK, chosen.out.resolve(), machine)
    end = time.monotonic() + 60 * chosen.total - TO_PACK
    for stage, _, most in (stage.partition(":") for stage in stages):
        seconds = min(chosen.patience * float(most or 60 * chosen.minutes), end - time.monotonic())
        if seconds < 10:
            report.results.append(Result(stage, "no time left", 0.0, ""))
            continue
        results = report.stage(stage, seconds)
        if stage in ("build", "unpack") and results[0].status != "ok":
            break  # what follows would run something else
    report.close()
    for result in report.results:
        if result.status != "ok" and (log := WORK / f"{result.stage}.log").exists():
            print(f"--- the end of {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))
    print(report.text())
    return 0 if all(result.status == "ok" for result in report.results) else 1


if __name__ == "__main__":
    sys.exit(main())
