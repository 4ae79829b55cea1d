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
KINDS = ("bf16", "f16", "tf32", "ieee", "f64")
TYPES: dict[str, Any] = {"bf16": np.int16, "f16": np.float16, "tf32": np.float32, "ieee": np.float32, "f64": np.float64}
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
        case, spec = self.case, job["spec"]
        self.T, self.B, self.H, self.R = case["T"], case["B"], case["H"], len(case["directions"])
        self.cell, self.kind = case["cell"], KINDS.index(case["precision"])
        self.G, self.S, self.apart, self.states = spec["gates"], spec["saved"], spec["apart"], spec["states"]
        self.first = 0 if spec["reads_h"] else 1  # state that is carried
        self.blocks, self.stages, self.runs = spec["blocks"], spec["stages"], spec["runs"]
        self.recurrent, self.persistent_sequences = spec["recurrent"], spec["persistent_sequences"]
        self.storage = TYPES[case["precision"]]
        self.wide = np.float64 if self.storage is np.float64 else np.float32
        self.given = {name: np.array(a) for name, a in job["given"].items() if a is not None}
        self.backwards = [direction == "r" for direction in case["directions"]]
        self.held: list[Array] = []  # arrays must outlive the calls that were given their addresses
        self.bad: list[str] = []
        lengths, reset = (self.address(self.given[name]) if case[name] else 0 for name in ("lengths", "reset"))
        self.steps = module.Steps(
            T=self.T, B=self.B, R=self.R, H=self.H, lengths=lengths, reset=reset, period=min(self.R, 2),
            reversed=sum(1 << r for r, is_reverse in enumerate(self.backwards[:2]) if is_reverse),
        )  # fmt: skip
        masks = [self.given[f"mask{k}"] for k in range(spec["masks"])]
        times = [mask.shape[1] for mask in masks]
        self.own = {"masks": masks, "times": np.array(times).tolist(), "matrices": self.given.get("matrices")}
        self.y = self.poisoned("y", self.T, self.B, self.R, self.H)
        self.dgates = self.poisoned("dgates", self.T, self.B, self.R, self.G + self.apart + self.blocks, self.H)
        self.dstates = [self.given[f"ds{i}"].copy() for i in range(self.states)]
        # Others have left something there.
        self.dparams = np.ones((self.R, self.B, spec["params"], self.H), self.wide) if spec["params"] else None

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

    def told(self, given: dict[str, Any]) -> dict[str, Any]:
        """A loop's arguments: arrays become addresses."""

        def one(v: Any) -> Any:
            if isinstance(v, list):
                return [self.address(a) for a in v]
            return self.address(v) if v is None or isinstance(v, np.ndarray) else v

        return {name: one(v) for name, v in given.items()}

    def bind(self, direction: str, plan: Any, given: dict[str, Any], of: str = "") -> Any:
        """of: what follows the cell's name."""
        told = {
            **self.told(given | {"masks": self.own["masks"], "matrices": self.own["matrices"]}),
            "times": self.own["times"],
        }
        return getattr(self.module, direction)(self.cell + of, self.kind, plan, self.steps, **told)

    def run_planned(self, direction: str, given: dict[str, Any]) -> None:
        loop = self.bind(direction, self.plan(direction == "Backward"), given)
        # What was here before must not matter.
        size = loop.workspace_bytes
        loop.run(self.address(np.full(size, 0xFF, np.uint8)) if size else 0, 0)

    def plan(self, backward: bool) -> Any:
        shape = (self.G, self.B, self.H, self.R)
        exchange, rows, known = (self.case[name] for name in ("kind", "rows", "known"))
        if not backward and exchange == 3:
            exchange = 1
        elif known and exchange == (2 if backward else 4):  # there the smallest of the general kernels
            exchange, rows, known = 2, 8, False
        plan = self.module.make_plan(
            self.kind, backward, *shape, self.module.device(0), exchange, self.case["members"], rows, known, 0,
            self.case["narrow"], self.stages[backward],
        )  # fmt: skip
        if plan.refusal:
            raise RuntimeError(plan.refusal)
        assert (plan.shape >= 0) == known
        return plan

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
        t, h0 = self.time(r, step), widen(self.given["s0"][r])
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
        case, given, others = self.case, self.given, range(1, self.states)
        save, every = case["save"], case["every"]
        steps = (self.T, self.B, self.R)
        self.saved = self.poisoned("saved", *steps, self.S, self.H) if self.S and save == "saved" else None
        self.are_wide = every == 3  # histories: both occur
        kept = self.wide if self.are_wide else None
        if case["sequences"]:
            self.are_wide, kept = False, None
        over_time = save == "saved" or case["sequences"]
        self.histories = [self.poisoned("history", *steps, self.H, dtype=kept) for _ in others if over_time]
        rows = (-(-self.T // every), self.R, self.B, self.H)
        self.checkpoints = [self.poisoned("checkpoint", *rows, dtype=self.wide) for _ in others if save == "recompute"]
        carried = [given[f"wide s{i}"].copy() for i in range(self.first, self.states)]
        h_n = self.poisoned("h_n", self.R, self.B, self.H)
        loop = {
            "gx": given["gx"], "w": given.get("w"), "scale": given.get("scale"), "bias": given["bias"],
            "params": given.get("params"), "h0": given["s0"], "carried": carried, "y": self.y, "h_n": h_n,
            "saved": self.saved, "histories": self.histories, "wide": self.are_wide, "checkpoints": self.checkpoints,
            "every": every,
        }  # fmt: skip
        if case["chunk"]:
            self.forward_by_chunks(loop, carried)
        elif not self.recurrent:
            self.bind("Forward", None, loop).run(0, 0)
        elif case["kind"] < 0:
            self.forward_by_steps(loop)
        else:
            self.run_planned("Forward", loop)
        self.check("y", self.y)
        self.check("end0", h_n)
        for i in others:
            self.check(f"end{i}", carried[i - self.first])
        for i, over_time in enumerate(self.histories, 1):
            self.check(f"sequence{i}", over_time)
        for i, rows in enumerate(self.checkpoints, 1):
            self.check(f"entered{i}", rows, self.right[f"entered{i}"][::every])

    # ---- stages without a team, as fused_rnn/cuda/stepwise.py has them run

    def crossing(self, backward: bool) -> Array | None:
        if self.runs is None:
            return None
        return self.poisoned("crossing", max(self.runs[backward][0], 1), self.R, self.B, self.H, dtype=self.wide)

    def run_step(self, bound: Any, step: int, crossing: Array | None, backward: bool) -> None:
        if crossing is None:
            bound.run_step(step, 0)
            return
        for first, last, products in self.runs[backward][1] if step >= 0 else ((0, 1, ()),):
            bound.run_stages(step, first, last, 0)
            for _, _, block, operand, result in products:
                w, rounded = widen(self.own["matrices"][:, block]), narrow(crossing[operand], self.storage)
                form = "rbk,rku->rbu" if backward else "rbk,ruk->rbu"
                crossing[result] = np.einsum(form, np.nan_to_num(widen(rounded)), w)

    # ---- chunks of time side by side, as fused_rnn/cuda/launch.py has them run

    def chunks(self, states: int, count: int, backward: bool) -> list[Array]:
        """[chunks, R, B, H] each: zeros for the states, and ones for the factors of `count` of them and for one more.
        Of the chunk that runs last nobody may use them."""
        shape = (-(-self.T // self.case["chunk"]), self.R, self.B, self.H)
        made = [self.poisoned("chunks", *shape, dtype=self.wide) for _ in range(states + count + 1)]
        for i, one in enumerate(made):
            (one[1:] if backward else one[:-1])[:] = i >= states
        return made

    def join(self, sums: list[Array], factors: list[Array], initial: list[Array], uncut: Array, backward: bool) -> None:
        told = self.told({"sums": sums, "factors": factors, "initial": initial, "uncut": uncut})
        sizes = {"size": initial[0].size, "chunks": len(uncut), "is_double": self.wide is np.float64}
        self.module.join(**told, **sizes, backward=backward, forgets=0, stream=0)  # nothing here is infinite

    def forward_by_chunks(self, loop: dict[str, Any], carried: list[Array]) -> None:
        count, chunk = len(carried), self.case["chunk"]
        made = self.chunks(count, count, False)
        told = {name: loop[name] for name in ("gx", "params", "h0")} | {"carried": made}
        self.bind("Forward", None, told | {"chunks": (0, (len(made[0]) - 1) * chunk, chunk)}, "_summary").run(0, 0)
        self.join(made[:count], made[count : 2 * count], carried, made[-1], False)
        self.bind("Forward", None, loop | {"carried": made[:count], "chunks": (0, self.T, chunk)}).run(0, 0)
        for state, each in zip(carried, made, strict=False):
            state[:] = each[-1]

    def backward_by_chunks(self, loop: dict[str, Any]) -> None:
        states, chunk, own = self.states, self.case["chunk"], self.states - self.first
        made = self.chunks(states, own, True)
        loop["last"] = self.dstates[0]
        told = {"dgates": None, "dparams": None, "dstates": [one[1:] for one in made], "chunks": (chunk, self.T, chunk)}
        self.bind("Backward", None, loop | told, "_summary").run(0, 0)
        self.join(made[self.first : states], made[states : states + own], self.dstates[self.first :], made[-1], True)
        parts = None if self.dparams is None else np.zeros((len(made[0]), *self.dparams.shape), self.wide)
        told = {"dparams": parts, "dstates": made[:states], "chunks": (0, self.T, chunk)}
        self.bind("Backward", None, loop | told).run(0, 0)
        for d, each in zip(self.dstates, made, strict=False):
            d[:] = each[0]
        if self.dparams is not None and parts is not None:
            self.dparams += parts.sum(0)

    def forward_by_steps(self, loop: dict[str, Any]) -> None:
        entering = self.poisoned("entering", self.R, self.B, self.H)
        products = self.poisoned("given", self.B, self.R, self.G, self.H)
        own = self.crossing(False)
        bound = self.bind("Forward", None, loop | {"given": products, "entering": entering, "crossing": own})
        h = widen(self.given["s0"])
        for step in range(self.T):
            products[:] = narrow(self.product(h), self.storage)
            self.run_step(bound, step, own, False)
            h = widen(entering)

    # ---- backward

    def backward(self) -> None:
        save, every = self.case["save"], self.case["every"]
        if (save == "none" and self.S) or self.case["narrow"]:
            return
        if save == "recompute":
            for first in range((self.T - 1) // every * every, -1, -every):
                self.backward_over(first, min(first + every, self.T))
        else:
            first_of = [self.given[f"{'wide ' * self.are_wide}s{i}"] for i in range(1, self.states)]
            if not self.histories:  # nothing is saved, and nothing of it read
                first_of = []
            self.backward_by(self.histories, first_of, self.saved, self.are_wide, (0, self.T))
        self.check("dgates", self.dgates)
        for i, d in enumerate(self.dstates):
            self.check(f"d{i}", d)
        if self.dparams is not None:
            self.check("dparams", self.dparams - 1)

    def backward_over(self, first: int, last: int) -> None:
        """A window whose gates are made again from its first states and from y."""
        steps = (last - first, self.B, self.R)
        given = self.poisoned("given", self.T, self.B, self.R, self.G, self.H)
        for step in range(first, last) if self.recurrent else ():
            found = narrow(self.product(np.stack([self.entering(r, step) for r in range(self.R)])), self.storage)
            for r in range(self.R):
                given[self.time(r, step), :, r] = found[:, r]
        saved = self.poisoned("saved", *steps, self.S, self.H)
        histories = [self.poisoned("history", *steps, self.H, dtype=self.wide) for _ in self.checkpoints]
        entered = [np.ascontiguousarray(rows[first // self.case["every"]]) for rows in self.checkpoints]
        h = self.poisoned("h", self.R, self.B, self.H, dtype=self.wide)
        loop = {
            "window": (first, last), "gx": self.window(self.given["gx"], first, last), "bias": self.given["bias"],
            "given": self.window(given, first, last) if self.recurrent else None, "params": self.given.get("params"),
            "h0": self.given["s0"], "hidden": self.y, "saved": saved, "histories": histories,
            "wide": True, "carried": [h, *(rows.copy() for rows in entered)][self.first :],
        }  # fmt: skip
        self.bind("Forward", None, loop).run(0, 0)
        self.backward_by(histories, entered, saved, True, (first, last))

    def backward_by(
        self, histories: list[Array], first_of: list[Array], saved: Array | None, wide: bool, window: tuple[int, int]
    ) -> None:
        first, last = window
        loop = {
            "window": window, "states": [self.y, *histories], "first": [self.given["s0"], *first_of], "saved": saved,
            "wide": wide, "dy": self.given["dy"], "w": self.given.get("w"), "dgates": self.dgates,
            "dstates": self.dstates, "params": self.given.get("params"), "dparams": self.dparams,
            "dsequences": [self.given[f"dq{i}"] for i in range(1, self.states) if self.case["sequences"]],
        }  # fmt: skip
        if self.case["chunk"] and window == (0, self.T):
            self.backward_by_chunks(loop)
            return
        if not self.recurrent:
            self.bind("Backward", None, loop).run(0, 0)
            return
        if self.case["kind"] >= 0 and (self.persistent_sequences or not self.case["sequences"]):
            self.run_planned("Backward", loop)
            return
        product = self.poisoned("product", self.R, self.B, self.H)
        own = self.crossing(True)
        bound = self.bind("Backward", None, loop | {"given": product, "crossing": own})
        for step in range(last - 1, first - 1, -1):
            self.pull(step + 1, product)
            self.run_step(bound, step, own, True)
        if first == 0:
            self.pull(0, product)
            self.run_step(bound, -1, own, True)

    def pull(self, step: int, product: Array) -> None:
        """product [R, B, H]: the recurrent side's gradients of a step through W_hh."""
        if step == self.T:
            return
        sides = slice(self.apart, self.apart + self.G)
        d = np.stack([widen(self.dgates[self.time(r, step), :, r, sides]) for r in range(self.R)])
        product[:] = narrow(np.einsum("rbgu,rguk->rbk", d, widen(self.given["w"])), self.storage)


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
