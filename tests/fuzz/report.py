"""What was called, by kind, and what was found."""

from __future__ import annotations

from collections import Counter

from .generate import Call
from .parent import Answer

TOLD = ("kind", "cell", "dtype", "backend", "form", "memory", "lengths", "reset", "hx", "mode", "transform", "autocast")
TOLD += ("threads", "layers", "bidirectional", "proj", "dropout", "save", "special", "narrow")


class Report:
    """Counts of the calls made and their outcomes."""

    def __init__(self) -> None:
        self.calls = 0
        self.outcomes: Counter[str] = Counter()
        self.found = 0
        self._valid: dict[str, Counter[str]] = {name: Counter() for name in TOLD}
        self._broken: Counter[str] = Counter()

    def add(self, call: Call, answer: Answer) -> None:
        self.calls += 1
        self.outcomes[answer.kind] += 1
        self.found += answer.is_finding
        if call.broken:
            self._broken[call.broken] += 1
            return
        for name, counts in self._valid.items():
            value = getattr(call, name)
            counts[str(min(value, 1) if name == "proj" else value)] += 1

    def __str__(self) -> str:
        lines = ["valid calls:"]
        lines += [f"  {name}: {_counts(counts)}" for name, counts in self._valid.items()]
        lines += [f"broken calls, by what is wrong: {_counts(self._broken)}"]
        lines += [f"outcomes: {_counts(self.outcomes)}"]
        return "\n".join([*lines, f"{self.calls} calls, {self.found} findings"])


def line(call: Call, answer: Answer, plant: str | None) -> str:
    """A finding in one line that repeats it, with what was called."""
    planted = f" --plant {plant}" if plant else ""
    reason = " ".join(answer.reason.split())
    return f"python -m tests.fuzz --repeat {call.seed}:{call.index}{planted}  # {answer.kind}: {reason} | {call}"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
