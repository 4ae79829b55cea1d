"""Which of cuDNN's algorithms PyTorch asks for: the rules of get_algo in its aten/src/ATen/native/cudnn/RNN.cpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fused_rnn.commands.bench.grid import DTYPES, Point

STANDARD, PERSISTENT, SMALL = "STANDARD", "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H"
NATIVE = "none: ATen's own loop"
# Largest hidden size of the kernel for small ones, forward and backward.
_SMALL_HIDDEN = {"RNN": (384, 256), "LSTM": (192, 128), "GRU": (192, 128)}


class Gpu(NamedTuple):
    """What the rules ask of a device. dtypes: for which cuDNN is used at all, by their names in the grid."""

    capability: tuple[int, int]
    multiprocessors: int
    dtypes: tuple[str, ...]


def accepted_dtypes() -> list[str]:
    """Names of the grid's dtypes for which cuDNN runs recurrent layers on the current GPU."""
    empty = ((name, torch.empty(1, device="cuda", dtype=dtype)) for name, dtype in DTYPES.items())
    return [name for name, tensor in empty if torch.cudnn_is_acceptable(tensor)]


def gpu_of(run: dict[str, Any]) -> Gpu:
    """The device of a run, by its description in a result file."""
    major, minor = map(int, run["capability"].split("."))
    return Gpu((major, minor), run["multiprocessors"], tuple(run["cudnn_dtypes"]))


def algorithm(point: Point, device: Gpu) -> str:
    """The algorithm of a point's forward, and after a comma of its backward where that is another one."""
    if point.dtype not in device.dtypes:
        return NATIVE
    ways = [_one(point, device, backward) for backward in (False, True)[: 1 + (point.mode == "training")]]
    return ", ".join(dict.fromkeys(ways))


def _one(point: Point, device: Gpu, backward: bool) -> str:
    if point.variant in ("ragged", "lengths"):  # a packed sequence
        return STANDARD
    if point.dtype != "fp64" and _SMALL_HIDDEN[point.cell][backward] >= point.H:
        return SMALL
    alone = point.layers == point.directions == 1 and point.H <= 1024 and point.H % 128 == point.width % 128 == 0
    return PERSISTENT if point.dtype == "fp16" and alone and _fits(point, device) else STANDARD


def _fits(point: Point, device: Gpu) -> bool:
    major, minor = device.capability
    if major < 8 or minor == 6 or device.multiprocessors < 98 or point.cell == "GRU":
        return False
    batch = point.B % 8 == 0 and point.B <= 128
    return batch and (point.cell == "LSTM" or point.B < 96 or point.H < 896)
