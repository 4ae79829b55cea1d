"""Runs cases in a process of its own, which may be a sanitizer's: with NumPy alone, and all memory from malloc.

    python drive.py LIBRARY CASES [CUT]

CASES: as cases.write wrote it. CUT names an output that is made one element too short, to see that somebody notices.
Prints a line for each failure, and ends with how many runs there were.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
KINDS = {"bf16": 0, "f16": 1, "tf32": 2, "ieee": 3, "f64": 4}
TYPES: dict[str, Any] = {"bf16": np.int16, "f16": np.float16, "tf32": np.float32, "ieee": np.float32, "f64": np.float64}
#            G  S  DG
SHAPES = {"lstm": (4, 4, 4), "gru": (3, 4, 4), "rnn_tanh": (1, 0, 1), "rnn_relu": (1, 0, 1)}
cut = sys.argv[3] if len(sys.argv) > 3 else ""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def widen(a: Array) -> Array:
    if a.dtype == np.int16:
        return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def narrow(a: Array, dtype: Any) -> Array:
    if dtype != np.int16:
        return np.ascontiguousarray(a.astype(dtype))
    bits = np.ascontiguousarray(a.astype(np.float32)).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return (bits >> 16).astype(np.uint16).view(np.int16)


class Run:
    """One case under one schedule. Every array is an allocation of its own; outputs start as NaN in every format."""

    def __init__(self, module: ModuleType, job: dict[str, Any]) -> None:
        self.module, self.case, self.right, self.allowed = module, job["case"], job["right"], job["allowed"]
        case = self.case
        self.cell, self.T, self.B, self.H, self.R = (
            case["cell"],
            case["T"],
            case["B"],
            case["H"],
            len(case["directions"]),
        )
        self.code, self.kind = CODES[self.cell], KINDS[case["number"]]
        self.G, self.S, self.DG = SHAPES[self.cell]
        self.storage = TYPES[case["number"]]
        self.wide = np.float64 if self.storage is np.float64 else np.float32
        self.given = {name: np.array(a) for name, a in job["given"].items()}
        self.backwards = [direction == "r" for direction in case["directions"]]
        self.held: list[Array] = []  # arrays must outlive the calls that were given their addresses
        self.bad: list[str] = []
        self.has_state = self.cell in ("lstm", "gru")
        self.y = self.poisoned("y", self.T, self.B, self.R, self.H)
        self.dgates = self.poisoned("dgates", self.T, self.B, self.R, self.DG, self.H)
        self.dh, self.dc = self.given["dh"].copy(), self.given["dc"].copy()

    def poisoned(self, name: str, *shape: int, dtype: Any = None) -> Array:
        dtype = np.dtype(dtype or self.storage)
        size = int(np.prod(shape)) - (name == cut)
        made = np.full(size * dtype.itemsize, 0xFF, np.uint8)
        self.held.append(made)
        return made.view(dtype) if name == cut else made.view(dtype).reshape(shape)

    def address(self, a: Array | None) -> int:
        if a is None:
            return 0
        self.held.append(a)
        return int(a.ctypes.data)

    def told(self, **given: Any) -> dict[str, Any]:
        """A loop's arguments: arrays become addresses."""
        all_of = {
            "T": self.T,
            "B": self.B,
            "R": self.R,
            "H": self.H,
            "reversed": sum(1 << r for r, is_reverse in enumerate(self.backwards[:2]) if is_reverse),
            "period": min(self.R, 2),
            "lengths": self.given["lengths"] if self.case["lengths"] else None,
            "reset": self.given["reset"] if self.case["reset"] else None,
            **given,
        }
        return {name: v if isinstance(v, int) else self.address(v) for name, v in all_of.items()}

    def plan(self, backward: bool) -> tuple[Any, int]:
        device = self.module.device(0)
        shape = (self.G, self.B, self.H, self.R)
        plan = self.module.make_plan(
            self.kind, backward, *shape, device, self.case["kind"], self.case["members"], self.case["rows"]
        )
        if plan.refusal:
            raise RuntimeError(plan.refusal)
        # What was here before must not matter.
        size = int(self.module.workspace_bytes(plan, self.kind, self.R))
        return plan, self.address(np.full(size, 0xFF, np.uint8)) if size else 0

    def check(self, name: str, ours: Array, right: Array | None = None) -> None:
        if name == cut:
            return
        right = self.right[name] if right is None else right
        off = np.abs(widen(ours) - right)
        made = float(off.max()) if not np.isnan(off).any() else float("inf")
        if not made <= self.allowed[name]:
            self.bad.append(f"{name}: error {made:.3g}, allowed {self.allowed[name]:.3g}")

    # ---- the walk of a recurrence

    def time(self, r: int, step: int) -> int:
        return self.T - 1 - step if self.backwards[r] else step

    def window(self, a: Array, first: int, last: int) -> Array:
        """Of [T, B, R, ..]: steps first .. last - 1 of each recurrence, as the loops want them."""
        parts = [
            a[self.T - last : self.T - first, :, r] if b else a[first:last, :, r] for r, b in enumerate(self.backwards)
        ]
        return np.ascontiguousarray(np.stack(parts, 2))

    def entering(self, r: int, step: int) -> Array:
        """h before a step, [B, H]; anything where the sequence is not alive."""
        t, h0 = self.time(r, step), widen(self.given["h0"][r])
        before = t + 1 if self.backwards[r] else t - 1
        if not 0 <= before < self.T:
            return h0
        begins = (t == self.given["lengths"] - 1) if self.backwards[r] else np.zeros(self.B, bool)
        return np.where(begins[:, None], h0, widen(self.y[before, :, r]))

    def product(self, h: Array) -> Array:
        """[R, B, H] → [B, R, G, H]"""
        rounded = widen(narrow(np.nan_to_num(h), self.storage))
        return np.asarray(np.einsum("rbk,rguk->brgu", rounded, widen(self.given["w"])))

    # ---- forward

    def forward(self) -> None:
        case, given = self.case, self.given
        save, every = case["save"], case["every"]
        lstm = self.cell == "lstm"
        steps = (self.T, self.B, self.R)
        self.saved = self.poisoned("saved", *steps, self.S, self.H) if self.S and save == "saved" else None
        self.cells_are_wide = case["every"] == 3  # both occur
        self.cells = (
            self.poisoned("cells", *steps, self.H, dtype=self.wide if self.cells_are_wide else None)
            if lstm and save == "saved"
            else None
        )
        self.checkpoints = (
            self.poisoned("checkpoints", -(-self.T // every), self.R, self.B, self.H, dtype=self.wide)
            if self.has_state and save == "recompute"
            else None
        )
        state, h_n = given["state"].copy(), self.poisoned("h_n", self.R, self.B, self.H)
        loop = {name: given[name] for name in ("gx", "w", "bias", "h0")}
        loop |= {"state": state, "y": self.y, "h_n": h_n, "saved": self.saved, "cells": self.cells}
        loop |= {"cells_are_wide": int(self.cells_are_wide), "checkpoints": self.checkpoints, "every": every}
        if case["kind"] < 0:
            self.forward_by_steps(loop)
        else:
            plan, workspace = self.plan(False)
            self.module.forward(self.code, self.kind, plan, workspace, 0, self.told(**loop))
        self.check("y", self.y)
        self.check("h_n", h_n)
        if lstm:
            self.check("c_n", state)
        if self.checkpoints is not None:
            self.check("entered", self.checkpoints, self.right["entered"][::every])

    def forward_by_steps(self, loop: dict[str, Any]) -> None:
        entering = self.poisoned("entering", self.R, self.B, self.H)
        h = widen(self.given["h0"])
        for step in range(self.T):
            products = narrow(self.product(h), self.storage)
            told = self.told(**loop, given=products, entering=entering, step0=step, step1=step + 1)
            self.module.pointwise_forward(self.code, self.kind, 0, told)
            h = widen(entering)

    # ---- backward

    def backward(self) -> None:
        save, every, lstm = self.case["save"], self.case["every"], self.cell == "lstm"
        if save == "none" and self.S:
            return
        if save == "recompute":
            for first in range((self.T - 1) // every * every, -1, -every):
                self.backward_over(first, min(first + every, self.T))
        else:
            states, first_state = (self.cells, self.given["c0"]) if lstm else (self.y, self.given["h0"])
            if lstm and self.cells_are_wide:
                first_state = self.given["state"]
            wide = int(lstm and self.cells_are_wide)
            self.backward_by(
                {"states": states, "first_state": first_state, "saved": self.saved, "states_are_wide": wide}, 0, self.T
            )
        self.check("dgates", self.dgates)
        self.check("dh0", self.dh)
        if lstm:
            self.check("dc0", self.dc)

    def backward_over(self, first: int, last: int) -> None:
        """A window whose gates are made again from its first state and from y."""
        lstm, steps = self.cell == "lstm", (last - first, self.B, self.R)
        given = self.poisoned("given", self.T, self.B, self.R, self.G, self.H)
        for step in range(first, last):
            found = narrow(self.product(np.stack([self.entering(r, step) for r in range(self.R)])), self.storage)
            for r in range(self.R):
                given[self.time(r, step), :, r] = found[:, r]
        saved = self.poisoned("saved", *steps, self.S, self.H)
        cells = self.poisoned("cells", *steps, self.H, dtype=self.wide) if lstm else None
        assert self.checkpoints is not None
        checkpoint = np.ascontiguousarray(self.checkpoints[first // self.case["every"]])
        loop = {"gx": self.window(self.given["gx"], first, last), "given": self.window(given, first, last)}
        loop |= {
            "bias": self.given["bias"],
            "h0": self.given["h0"],
            "state": checkpoint.copy(),
            "saved": saved,
            "cells": cells,
        }
        window = {"window0": first, "window1": last}
        told = self.told(**loop, **window, cells_are_wide=1, step0=first, step1=last)
        self.module.pointwise_forward(self.code, self.kind, 0, told)
        states, first_state = (cells, checkpoint) if lstm else (self.y, self.given["h0"])
        back = {"states": states, "first_state": first_state, "saved": saved, "states_are_wide": int(lstm), **window}
        self.backward_by(back, first, last)

    def backward_by(self, loop: dict[str, Any], first: int, last: int) -> None:
        loop = {
            **loop,
            "dy": self.given["dy"],
            "w": self.given["w"],
            "dgates": self.dgates,
            "dh": self.dh,
            "dc": self.dc,
        }
        if self.case["kind"] >= 0:
            plan, workspace = self.plan(True)
            told = self.told(**loop, step0=first, step1=last, close=int(first == 0))
            self.module.backward(self.code, self.kind, plan, workspace, 0, told)
            return
        for step in range(last - 1, first - 1, -1):
            told = self.told(**loop, given=self.pulled(step + 1), step0=step, step1=step + 1)
            self.module.pointwise_backward(self.code, self.kind, 0, told)
        if first == 0:
            self.module.pointwise_backward(
                self.code, self.kind, 0, self.told(**loop, given=self.pulled(0), step0=0, step1=0, close=1)
            )

    def pulled(self, step: int) -> Array | None:
        """The recurrent side's gradients of a step through W_hh: [R, B, H]."""
        if step == self.T:
            return None
        d = np.stack([widen(self.dgates[self.time(r, step), :, r, self.DG - self.G :]) for r in range(self.R)])
        return narrow(np.einsum("rbgu,rguk->rbk", d, widen(self.given["w"])), self.storage)


def main() -> int:
    module = load(sys.argv[1])
    with open(sys.argv[2], "rb") as file:
        told = pickle.load(file)
    runs = failures = 0
    for job in told["jobs"]:
        for seed in range(told["seeds"]):
            module.seed(seed)
            run = Run(module, job)
            try:
                run.forward()
                run.backward()
            except RuntimeError as error:
                run.bad.append(str(error))
            runs += 1
            if run.bad:
                failures += 1
                print(f"FAILED {job['case']['name']}, seed {seed}: " + "; ".join(run.bad), flush=True)
    print(f"{runs} runs, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
