"""The points that are measured, and the regions they are summed up in.

Letters: T time steps, B batch, D input size, H hidden size. In the grids the input size equals H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CELLS = tuple(GATES)
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "tf32": torch.float32,  # on a GPU: float32 whose products may round to TF32; "fp32" there means that they do not
}
SEQUENCES = ("inference", "training")
MODES = (*SEQUENCES, "step")
VARIANTS = ("plain", "layers", "bidirectional", "ragged", "lengths", "resets", "graph")
Shape = tuple[int, int, int, int]  # T, B, D, H
RESETS = 0.01  # of all steps and sequences, in the variant of that name


@dataclass(frozen=True)
class Point:
    """One problem: what is run, in which mode, at which size.

    mode is "inference" (forward under no_grad), "training" (forward and backward, the gradient of the input
    included) or "step" (one call with T = 1 under no_grad, the state passed in).
    variant is "plain", or one departure from it: "layers" (three), "bidirectional", "ragged" (a packed sequence),
    "lengths" (the same lengths, of a padded batch), "resets" (to a zero state, of 1 % of all steps), "graph" (a call
    without gradient, replayed as a CUDA graph).
    D is the input size, 0 for H; depth the number of layers, but for the variant "layers".
    """

    cell: str
    mode: str
    dtype: str
    T: int
    B: int
    H: int
    variant: str = "plain"
    D: int = 0
    depth: int = 1
    bidirectional: bool = False

    @property
    def width(self) -> int:
        """Of the input."""
        return self.D or self.H

    @property
    def layers(self) -> int:
        return 3 if self.variant == "layers" else self.depth

    @property
    def directions(self) -> int:
        return 2 if self.variant == "bidirectional" or self.bidirectional else 1

    @property
    def size(self) -> dict[str, int]:
        """What a result file says of the size: T, B and H, and what of the others is not as in the grids."""
        others = {"D": self.D, "depth": self.depth if self.depth > 1 else 0, "bidirectional": self.bidirectional}
        return {"T": self.T, "B": self.B, "H": self.H} | {name: value for name, value in others.items() if value}

    @property
    def shape(self) -> str:
        """The size as tables have it."""
        width = f" D={self.D}" if self.D else ""
        return f"T={self.T} B={self.B}{width} H={self.H}"

    @property
    def lengths(self) -> list[int] | None:
        """Ragged lengths: evenly spread from T down to T/4, so half of the padded work on average is real."""
        if self.variant not in ("ragged", "lengths"):
            return None
        return [max(1, self.T - (3 * self.T * b) // (4 * self.B)) for b in range(self.B)]

    @property
    def flops(self) -> float:
        """Floating-point operations that the matrix products need; backward costs twice the forward.

        A sequence enters from a state of zeros, whose product with W_hh nobody needs; a step is given its state.
        """
        steps = sum(self.lengths) if self.lengths else self.T * self.B
        recurrent = steps - self.B if self.mode in SEQUENCES else steps
        inputs = [self.width] + [self.H * self.directions] * (self.layers - 1)
        each = (2 * GATES[self.cell] * self.H * (steps * width + recurrent * self.H) for width in inputs)
        forward = sum(each) * self.directions
        return float(forward * (3 if self.mode == "training" else 1))

    @property
    def recurrent_bytes(self) -> int:
        """Size of one W_hh, which no step can do without reading."""
        return GATES[self.cell] * self.H * self.H * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        tail = "" if self.variant == "plain" else f" {self.variant}"
        tail += f", {self.depth} layers" if self.depth > 1 else ""
        tail += ", bidirectional" if self.bidirectional else ""
        return f"{self.cell} {self.mode} {self.dtype} {self.shape}{tail}"


@dataclass(frozen=True)
class Grid:
    """Sizes to combine. `steps` are the H of the single-step comparison against the cells of torch.nn.

    listed: sizes (T, B, H) as they are, by mode and cell.  rivals: who is measured too where it is installed.
    minutes: what a run takes, at each dtype and number of threads.
    """

    T: tuple[int, ...] = ()
    B: tuple[int, ...] = ()
    H: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    listed: Mapping[str, Mapping[str, tuple[tuple[int, int, int], ...]]] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    minutes: float = 9

    def points(
        self,
        dtype: str,
        cells: Sequence[str] = CELLS,
        modes: Sequence[str] = MODES,
        variants: Sequence[str] = ("plain",),
    ) -> Iterator[Point]:
        sequences = [mode for mode in modes if mode != "step"]
        for cell, mode, variant in product(cells, sequences, variants):
            if variant == "graph" and mode == "training":
                continue
            for T, B, H in (*product(self.T, self.B, self.H), *self.listed.get(mode, {}).get(cell, ())):
                yield Point(cell, mode, dtype, T, B, H, variant)
        for cell, variant, H in product(cells, ("plain", "graph"), self.steps if "step" in modes else ()):
            if variant in variants:
                yield Point(cell, "step", dtype, 1, 1, H, variant)


def _sizes(H: int, T: int, *batches: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((T, B, H) for B in batches)


# baidu-research/DeepBench, code/kernels/rnn_problems.h, H ≤ 1024: in training what is in its training_set, in inference
# that and what is in its inference_server_set and inference_device_set. The GRU of 1024 units, T=1500, with 32 and 64
# sequences is left out: 0.6 and 1.2 TFLOP forward, on one core of a CPU.
_TRAINING = {
    "LSTM": _sizes(512, 25, 16, 32, 64, 128) + _sizes(1024, 25, 16, 32, 64, 128) + _sizes(256, 150, 16, 32, 64),
    "GRU": _sizes(512, 1, 32),
}
DEEPBENCH = {
    "training": _TRAINING,
    "inference": {
        "LSTM": _sizes(512, 25, 1, 2, 4) + _sizes(1024, 25, 1, 2, 4) + _sizes(256, 150, 1, 2, 4) + _TRAINING["LSTM"],
        "GRU": _sizes(512, 1, 1, 2, 4) + _sizes(1024, 1500, 1, 2, 4) + _TRAINING["GRU"],
        "RNN": _sizes(32, 672, 1) + _sizes(64, 96, 1),
    },
}
COMPILED = dict.fromkeys(CELLS, _sizes(64, 32, 1) + _sizes(256, 32, 32))  # each takes up to half a minute to compile

GRIDS = {
    "cpu": Grid(T=(1, 32, 128), B=(1, 8, 32, 128), H=(32, 128, 256, 512), steps=(32, 64, 128, 256, 512)),
    "quick": Grid(T=(1, 32), B=(1, 8, 32), H=(32, 128, 256), steps=(128,), minutes=1),
    "rivals": Grid(T=(1, 64), B=(1, 8, 32), H=(64, 128, 256, 512), rivals=("onnxruntime", "scan"), minutes=5),
    "deepbench": Grid(listed=DEEPBENCH, rivals=("onnxruntime", "scan"), minutes=4),
    "compiled": Grid(listed=dict.fromkeys(SEQUENCES, COMPILED), rivals=("compile-loop", "compile-scan"), minutes=4),
    "machine": Grid(T=(32,), B=(1, 8, 64), H=(64, 256, 512), minutes=1),
    "quick-cuda": Grid(T=(32, 256), B=(8, 64), H=(128, 256, 512, 1024), steps=(512,), minutes=1),
    "cuda": Grid(
        T=(1, 32, 128, 1024),
        B=(1, 8, 16, 32, 64, 128, 256),
        H=(32, 64, 128, 256, 512, 768, 1024, 1536, 2048),
        steps=(128, 512, 1024),
    ),
}

# The regions a result is summed up in, by geometric mean. On a CPU: one sequence at a time, small layers, large ones.
# On a GPU: what the library is built for, what is larger, and what is shorter.
REGIONS: dict[str, dict[str, Callable[[Point], bool]]] = {
    "cpu": {
        "B=1, T≥32": lambda p: p.B == 1 and p.T >= 32,
        "B≥8, H≤128": lambda p: p.B >= 8 and p.H <= 128,
        "B≥8, H≥256": lambda p: p.B >= 8 and p.H >= 256,
    },
    "cuda": {
        "T≥128, B≤128, H≤1024": lambda p: p.T >= 128 and p.B <= 128 and p.H <= 1024,
        "T≥128, B>128 or H>1024": lambda p: p.T >= 128 and (p.B > 128 or p.H > 1024),
        "1<T<128": lambda p: 1 < p.T < 128,
        "T=1": lambda p: p.T == 1,
    },
}
