"""What is called: a description drawn from (seed, index) alone, so that any call can be repeated by its two numbers."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = ("float32", "float64", "bfloat16", "float16")
SLOW = ("triton", "cuda")  # by an interpreter and an emulator: small problems, now and then
BROKEN_SHARE = 0.25


class Call(NamedTuple):
    """One call. A string says which of the choices of that name in run.py or broken.py it makes."""

    seed: int
    index: int
    kind: str  # module, cell, functional, functional_cell, stream
    cell: str
    T: int
    B: int
    D: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    batch_first: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    backend: str | None = None
    save: str = "gates"
    form: str = "plain"  # plain, unbatched, packed, unsorted
    memory: str = "contiguous"  # of x: contiguous, strided, transposed, expanded
    lengths: str = "none"  # none, tensor, int32, list
    reset: bool = False
    hx: str = "none"  # none, given, strided, expanded
    wants: str = "all"  # what requires a gradient: all, none, x, hx, weights
    mode: str = "grad"  # grad, eval, twice, no_grad, inference, forward_ad, forward_ad_no_grad
    transform: str = "none"  # none, vmap, grad, jvp
    autocast: bool = False
    threads: int = 1
    special: str = "none"  # none, inf, nan, large, zeros, denormal, past_end
    target: str = "x"  # where the special values stand: x, hx, weights
    again: bool = False  # whether a second run must be bitwise the first
    fill: bool = False  # whether memory that torch hands out is full of NaN
    narrow: str | None = None  # a stream's weights
    broken: str | None = None

    def __str__(self) -> str:
        """What differs from a plain call."""
        default = Call(0, 0, "", "", 0, 0, 0, 0)
        told = [f"{self.kind} {self.cell} T={self.T} B={self.B} D={self.D} H={self.H} {self.dtype}"]
        for name in self._fields[8:]:
            value = getattr(self, name)
            if value != getattr(default, name) and name not in ("dtype", "broken"):
                told.append(name if value is True else f"{name}={value}")
        return " ".join(told) + (f" BROKEN: {self.broken}" if self.broken else "")

    @property
    def R(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        return self.proj or self.H

    @property
    def is_cell(self) -> bool:
        return self.kind in ("cell", "functional_cell")

    @property
    def has_c(self) -> bool:
        return self.cell == "lstm"

    @property
    def differentiates(self) -> bool:
        """Whether gradients are compared."""
        return self.mode in ("grad", "eval", "twice") and self.wants != "none" and self.transform == "none"


class _Dice(random.Random):
    def pick(self, **weights: float) -> str:
        return self.choices(list(weights), list(weights.values()))[0]

    def chance(self, share: float) -> bool:
        return self.random() < share


def _sizes(dice: _Dice, kind: str) -> dict[str, int]:
    """Mostly small, so that many calls are made; odd, 1, and beyond a vector (16), a panel (64) and a range (1,024)."""
    sizes = {
        "T": dice.choice((1, 1, 2, 3, 5, 7, 12)),
        "B": dice.choice((1, 1, 2, 3, 4, 5, 9)),
        "D": dice.choice((1, 2, 3, 5, 8, 13, 17, 33)),
        "H": dice.choice((1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48)),
    }
    large = dice.pick(none=0.75, T=0.04, B=0.06, D=0.05, H=0.08, empty=0.02)
    if large == "empty":
        sizes["B"] = 0
    elif large != "none":
        beyond = {"T": (33, 65, 257), "B": (17, 33, 66), "D": (65, 130), "H": (64, 65, 97, 130)}
        sizes[large] = dice.choice(beyond[large])
    if kind in ("cell", "functional_cell"):
        sizes["T"] = 1
    if kind == "stream":
        sizes["B"] = max(1, sizes["B"])
    return sizes


def _layers(dice: _Dice, kind: str, cell: str, H: int) -> dict[str, Any]:
    if kind in ("cell", "functional_cell"):
        return {"bias": dice.chance(0.7)}
    options: dict[str, Any] = {
        "layers": dice.choice((1, 1, 1, 2, 3)),
        "bidirectional": kind != "stream" and dice.chance(0.3),
        "bias": dice.chance(0.75),
        "batch_first": kind != "functional" and dice.chance(0.35),
    }
    if cell == "lstm" and H > 2 and dice.chance(0.2):
        options["proj"] = dice.randint(1, H - 1)
    return options


def _form(dice: _Dice, kind: str, B: int, layers: int) -> dict[str, Any]:
    """How the batch is given: packed, with lengths, with resets, as a view."""
    options: dict[str, Any] = {
        "memory": dice.pick(contiguous=0.55, strided=0.15, transposed=0.15, expanded=0.15),
        "hx": dice.pick(none=0.35, given=0.4, strided=0.15, expanded=0.1),
    }
    if kind in ("module", "cell"):
        options["form"] = dice.pick(plain=0.8, unbatched=0.2)
    if kind == "module" and B > 0 and dice.chance(0.25):
        options["form"] = dice.pick(packed=0.5, unsorted=0.5)
    if kind == "functional" or (kind == "module" and options["form"] == "plain"):
        options["lengths"] = dice.pick(none=0.65, tensor=0.2, int32=0.08, list=0.07)
        options["reset"] = dice.chance(0.2)
    # Beside lengths the masks are drawn for padded rows here, and for packed ones by torch; and torch knows no reset.
    extras = options.get("reset") or options.get("lengths", "none") != "none"
    if kind in ("module", "functional") and layers > 1 and not extras and dice.chance(0.2):
        options["dropout"] = dice.choice((0.5, 0.2, 1.0))
    return options


def is_watched(mode: str) -> bool:
    """Whether derivatives are taken of which torch's fastest kernels have none."""
    return mode == "twice" or mode.startswith("forward_ad")


def _mode(dice: _Dice, kind: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Who watches the call: autograd and its modes, autocast, a transform."""
    if kind == "stream":
        return {"mode": dice.pick(no_grad=0.5, inference=0.2, grad=0.3), "wants": "none"}
    options: dict[str, Any] = {
        "mode": dice.pick(
            grad=0.45, eval=0.1, twice=0.05, no_grad=0.22, inference=0.1, forward_ad=0.05, forward_ad_no_grad=0.03
        ),
        "wants": dice.pick(all=0.6, none=0.1, x=0.1, hx=0.1, weights=0.1),
        "autocast": dice.chance(0.08),
    }
    plain = chosen.get("form", "plain") == "plain" and chosen.get("lengths", "none") == "none"
    if plain and not chosen.get("dropout") and not chosen.get("reset") and dice.chance(0.08):
        options |= {"transform": dice.pick(vmap=0.4, grad=0.35, jvp=0.25), "mode": "grad", "wants": "all"}
    if options["mode"].startswith("forward_ad"):
        options["wants"] = "none"
    if options["wants"] == "hx" and chosen["hx"] == "none":
        options["wants"] = "x"
    if is_watched(options["mode"]) or options.get("transform", "none") != "none":
        options["autocast"] = False
    return options


def _special(dice: _Dice, chosen: dict[str, Any]) -> dict[str, Any]:
    """Values that are no ordinary numbers.

    Beside lengths in x alone: what judges goes on past a sequence's end and selects, whose gradient is 0 * inf there,
    as is that of any product of a row of zeros with such a weight.
    Beside a reset or in a second derivative inf and NaN have no comparison: torch has no reset, so that the tests' loop
    over its cells multiplies by zero; and of a second derivative torch's own formulas are several.
    """
    if dice.chance(0.8):
        return {}
    options = {
        "special": dice.pick(inf=0.25, nan=0.2, large=0.2, zeros=0.2, denormal=0.15),
        "target": dice.pick(x=0.6, hx=0.2, weights=0.2),
    }
    if options["target"] == "hx" and chosen["hx"] == "none":
        options["target"] = "x"
    if chosen.get("lengths", "none") != "none" and (options["target"] != "x" or dice.chance(0.5)):
        options = {"special": "past_end"}
    if chosen["cell"] == "rnn_relu" and options["special"] == "denormal":
        options["special"] = "zeros"  # which is what ours takes them for; at a relu's kink that decides on its gradient
    odd = options["special"] in ("inf", "nan", "past_end")
    watched = is_watched(chosen["mode"]) or chosen.get("transform", "none") != "none"
    return {} if odd and (chosen.get("reset") or watched) else options


def _slow(dice: _Dice, kind: str, call: dict[str, Any]) -> dict[str, Any]:
    """A problem that an interpreter runs in less than a second."""
    call["backend"] = dice.choice(SLOW)
    call |= {name: min(call[name], most) for name, most in (("T", 2), ("B", 3), ("D", 5), ("H", 17))}
    call |= {"layers": 1, "proj": min(call.get("proj", 0), max(0, call["H"] - 1)), "dropout": 0.0, "again": False}
    if call.get("mode") == "twice":
        call["mode"] = "grad"
    if call["backend"] == "cuda" and call["dtype"] == "float16" and call.get("special") == "large":
        call["special"] = "none"  # a saturated gate may be off by tanh.approx's 2^-11, its ulp, times a large number
    return call


def generate(seed: int, index: int) -> Call:
    """The call of this number."""
    from .broken_streams import choices

    dice = _Dice(f"{seed}:{index}")
    kind = dice.pick(module=0.5, cell=0.17, functional=0.15, functional_cell=0.06, stream=0.12)
    call: dict[str, Any] = {"kind": kind, "cell": dice.choice(CELLS)}
    call |= _sizes(dice, kind)
    call |= _layers(dice, kind, call["cell"], call["H"])
    call["dtype"] = dice.choices(DTYPES, (5, 2, 3, 1.5))[0]
    call |= _form(dice, kind, call["B"], call.get("layers", 1))
    call |= _mode(dice, kind, call)
    call |= _special(dice, call)
    backend = dice.pick(none=0.5, cpu=0.34, reference=0.06, torch=0.1)
    forward = call["mode"].startswith("forward_ad") or call.get("transform") == "jvp"
    if forward and dice.chance(0.8):  # the others have none, and say so
        backend = dice.pick(none=0.7, reference=0.3)
    call["backend"] = None if backend == "none" else backend
    if kind in ("module", "functional"):
        call["save"] = dice.pick(gates=0.75, recompute=0.25)
    if kind == "stream":
        # Only the cpu backend has narrow weights, of float32.
        call["hx"] = "none" if call["hx"] == "none" else "given"
        if call["dtype"] == "float32" and call["backend"] in (None, "cpu"):
            call["narrow"] = dice.choices((None, "bf16", "int8"), (6, 2, 2))[0]
        if call.get("special") in ("inf", "nan") and call.get("target") == "weights" and call.get("narrow"):
            call["special"] = "none"  # int8 has no such value
    # Two threads that spin for each other take long where others use the processor, too.
    threads = 2 if call["T"] <= 12 and dice.chance(0.2) else 1
    call |= {"threads": threads, "again": dice.chance(0.1), "fill": dice.chance(0.5)}
    if dice.chance(0.01) and kind != "stream":
        call = _slow(dice, kind, call)
    elif dice.chance(BROKEN_SHARE):
        call |= {"transform": "none", "again": False}
        if is_watched(call["mode"]):
            call["mode"] = "grad"
        call["broken"] = dice.choice(choices(Call(seed, index, **call)))
    return Call(seed, index, **call)
