"""What the CUDA loops would run for a problem, on any device, asked on any machine: `fused_rnn.plan(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fused_rnn import ops
from fused_rnn.call import NARROW
from fused_rnn.cells import CELLS, Cell, is_program
from fused_rnn.cells.program import MATRIX_PRODUCTS, PUBLISHING, REDUCTIONS
from fused_rnn.gpu.narrow import refusal_of_narrow
from fused_rnn.gpu.precision import tf32_allowed

EXCHANGES = ("cta", "cluster", "grid", "scatter", "direct")
_FORWARD = {"scatter": "cluster", "direct": "grid"}  # where backward has an exchange of its own
PRECISIONS = ("bf16", "f16", "tf32", "ieee", "f64")  # how products are taken; csrc/cuda/tiles.h's Precision
# Of which dtypes the loops can keep W_hh in fewer bytes.
NARROWED = {"bf16": (torch.float32,), "int8": (torch.float32, torch.bfloat16, torch.float16)}
_KIB = 1024


class Device(NamedTuple):
    """What a plan depends on.

    arch: 90 for sm_90.  shared: bytes that a CTA may have.  clusters: at place n - 1 how many clusters of n CTAs are
    resident together, each CTA on a multiprocessor of its own; () for no clusters.
    """

    arch: int
    multiprocessors: int
    shared: int
    clusters: tuple[int, ...] = ()

    @classmethod
    def of(cls, found: Any) -> Device:
        """Of what a compiled module says."""
        return cls(found.arch, found.multiprocessors, found.shared, found.clusters)


class Stages(NamedTuple):
    """What the stages of a cell's step need of a team, in one direction: csrc/cuda/layout.h's Stages.

    number: of stages.  pairs: of numbers that a row's units are reduced to in a stage, at most.  operands: of products
    with blocks of the cell's own matrices, and products, in all stages.  at_once: products in a stage, at most.
    """

    number: int = 1
    pairs: int = 0
    operands: int = 0
    products: int = 0
    at_once: int = 0


def stages_of(cell: Cell, backward: bool) -> Stages:
    """Of a user's cell; a built-in one has one stage."""
    if not cell.staged or cell.program is None:
        return Stages()
    graph = cell.program.backward if backward else cell.program.forward
    pairs, operands, products = [], [], []
    for stage in graph.stages:
        own = [graph.code[i] for i in stage if graph.code[i].op in PUBLISHING]
        numbers = 0  # a variance takes both of a pair
        for op, *_ in own:
            if op in REDUCTIONS:
                numbers = numbers + 1 if op == "sum" else (numbers + 1) // 2 * 2 + 2
        made = [args[0] for op, args, _ in own if op in MATRIX_PRODUCTS]
        pairs.append((numbers + 1) // 2)
        operands.append(len(set(made)))
        products.append(len(made))
    return Stages(len(graph.stages), max(pairs), sum(operands), sum(products), max(products))


class Forced(NamedTuple):
    """Parts of a plan that are not left to the planner."""

    exchange: str | None = None
    members: int = 0
    rows: int = 0
    known: bool = True  # whether a kernel may be taken that is compiled for the team


def _clusters(largest: int, *gpcs: int) -> tuple[int, ...]:
    """A cluster stays within a GPC. gpcs: multiprocessors of each. A GPU itself is asked how many it really has."""
    return tuple(sum(gpc // size for gpc in gpcs) for size in range(1, largest + 1))


# A common part of each architecture, full-size: NVIDIA's data sheets and the CUDA C++ Programming Guide. Which GPCs
# lack how many multiprocessors differs from one GPU to the next: where none was asked, these are likely.
DEVICES = {
    "sm_80": Device(80, 108, 163 * _KIB),  # A100
    "sm_86": Device(86, 82, 99 * _KIB),  # RTX 3090
    "sm_89": Device(89, 128, 99 * _KIB),  # RTX 4090
    "sm_90": Device(90, 132, 227 * _KIB, (132, 66, 39, 30, 22, 17, 15, 15, 9, *7 * [7])),  # an H200 that was asked
    "sm_100": Device(100, 148, 227 * _KIB, _clusters(16, *6 * [18], *2 * [20])),  # B200
    "sm_120": Device(120, 170, 99 * _KIB, _clusters(8, *8 * [16], *3 * [14])),  # RTX 5090
}


class Cycles(NamedTuple):
    """Estimated cycles of a step's critical path, by part; cell: all that is not one of the others."""

    product: float
    loads: float
    cell: float
    exchange: float


@dataclass(frozen=True)
class Plan:
    """How a loop over time would run. Where no kernel keeps W_hh resident, exchange is "stepwise" and reason says why.

    Attributes:
        exchange: how a team shares its state between steps, "cta", "cluster", "grid" or, backward, "scatter": a cluster
            whose members send each other sums, or "direct": members of the grid read each other's gradients as their
            product needs them; "stepwise" is a matrix product and a pointwise launch a step; "none", of a cell without
            W_hh, a thread that runs all of a unit's steps.
        number: how products are taken, "bf16", "f16", "tf32", "ieee" (float32) or "f64".
        device: what the plan was made for.
        members: CTAs of a team.
        units: hidden units of a member.
        rows: of the batch, for each team.
        warps: of a member, as groups of rows of the product × shares of its depth.
        threads: of a member; those beyond its warps have cells, and no part in the product.
        shared: bytes of shared memory of a member.
        tiles: of the batch.
        tiles_at_once: how many of them run beside each other.
        waves: of teams until all have run.
        known: whether the kernel is compiled for the team, and not for any.
        cycles: estimated, of a step.
        reason: why there is no team, or None.
    """

    exchange: str
    number: str
    device: Device
    members: int = 0
    units: int = 0
    rows: int = 0
    warps: tuple[int, int] = (0, 0)
    threads: int = 0
    shared: int = 0
    tiles: int = 0
    tiles_at_once: int = 0
    waves: int = 0
    known: bool = False
    cycles: Cycles = Cycles(0, 0, 0, 0)  # noqa: RUF009 (a named tuple)
    reason: str | None = None

    def __str__(self) -> str:
        if self.exchange == "none":
            return f"no team: {self.reason}"
        if self.reason is not None:
            return f"stepwise: {self.reason}"
        team = {
            "cta": "one CTA",
            "cluster": f"a cluster of {self.members}",
            "grid": f"{self.members} CTAs of the grid",
            "scatter": f"a cluster of {self.members} that scatters sums",
            "direct": f"{self.members} CTAs of the grid that read each other's gradients directly",
        }
        return (
            f"{team[self.exchange]}{', compiled for it' * self.known}, {self.number}, {self.units} units x"
            f" {self.rows} rows a CTA, {self.threads} threads, {self.shared} bytes shared, {self.tiles} team(s) a"
            f" recurrence in {self.waves} wave(s), "
            f"about {sum(self.cycles):.0f} cycles a step"
        )


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """How products of this dtype are taken, one of PRECISIONS; raises ValueError for another dtype."""
    precisions = {
        torch.bfloat16: "bf16",
        torch.float16: "f16",
        torch.float32: "tf32" if tf32 else "ieee",
        torch.float64: "f64",
    }
    if dtype not in precisions:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, precisions))}")
    return precisions[dtype]


def make(
    planner: Any,
    sizes: tuple[int, ...],
    device: Any,
    forced: Forced,
    known: bool = True,
    fewer: int = 0,
    narrow: str | None = None,
    stages: Stages = Stages(),  # noqa: B008 (a named tuple)
) -> Any:
    """The plan and the device as a compiled module has them. sizes: the precision's place, backward, G, B, H, R.
    known: whether a kernel may be one that is compiled for its team.  fewer: as `fewer_blocks` says.
    narrow: what forward keeps W_hh in, one of call.NARROW.  stages: of the cell."""
    name, backward = forced.exchange, sizes[1]
    if name is not None and not backward:
        name = _FORWARD.get(name, name)
    exchange = -1 if name is None else EXCHANGES.index(name)
    # Such kernels have all of W_hh in registers, and one stage.
    known = known and forced.known and not fewer and stages.number == 1
    return planner.make_plan(
        *sizes, device, exchange, forced.members, forced.rows, known, fewer, NARROW[narrow], stages
    )


def without_product(cell: Cell) -> str:
    """How a cell without W_hh runs, which has no team."""
    way = "a row's CTA runs its stages, a step at a time" if cell.staged else "a unit's thread runs all of its steps"
    return f"the cell has no W_hh, and {way}"


def fewer_blocks(cell: Cell, precision: str, backward: bool) -> int:
    """How many blocks of W_hh the kernels of a user's cell move from registers to shared memory, where it has more
    numbers a unit than an LSTM: csrc/cuda/tiles.h's kFewerBlocks. Of a built-in cell none."""
    if cell.program is None:
        return 0
    states, params = len(cell.states), len(cell.params)
    if backward:
        before, after = (sum(flags) for flags in cell.program.backward_reads())
        numbers = states + before + after + cell.gradients + cell.saved + 2 * params + cell.masks - 12
    else:
        numbers = cell.carried + cell.gates + cell.apart + cell.saved + params + cell.masks - 9
    # Two units a thread, in several stages one; a block is 8 registers an m tile, of which forward has two, or 16 of an
    # FMA lane.
    units, block = 1 + (stages_of(cell, backward).number == 1), 8 if backward and precision != "ieee" else 16
    return max(0, -(-units * numbers // block))


def read(native: Any, precision: str, device: Device) -> Plan:
    """A plan as the compiled modules give it, of either of them."""
    if native.refusal:
        return Plan("stepwise", precision, device, reason=native.refusal)
    return Plan(
        EXCHANGES[native.exchange], precision, device, native.members, native.units, native.rows, native.warps,
        native.threads, native.shared, native.tiles, native.tiles_at_once, native.waves, native.shape >= 0,
        Cycles(**native.cycles),
    )  # fmt: skip


def _asked(where: torch.device) -> Device | None:
    """What the compiled loops find out about a device, its clusters above all; None where they cannot."""
    try:
        loops = import_module("fused_rnn._cuda")
        found = loops.device(torch.cuda.current_device() if where.index is None else where.index)
    except (ImportError, RuntimeError):
        return None
    return Device.of(found)


def _device(device: str | torch.device | tuple[int, int, int, tuple[int, ...]] | None) -> Device:
    if isinstance(device, tuple):
        return Device(*device)
    if device is None and not torch.cuda.is_available():
        return DEVICES["sm_90"]
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    where = torch.device("cuda" if device is None else device)
    if where.type != "cuda":
        raise ValueError(
            f"device: got {device!r}, expected a CUDA device, one of {', '.join(DEVICES)}, "
            "or (arch, multiprocessors, shared, clusters)"
        )
    if (asked := _asked(where)) is not None:
        return asked
    properties = torch.cuda.get_device_properties(where)
    arch = 10 * properties.major + properties.minor
    likely = next(known for known in reversed(DEVICES.values()) if known.arch <= max(arch, 80))
    shared = getattr(properties, "shared_memory_per_block_optin", likely.shared)
    count = properties.multi_processor_count
    return Device(arch, count, shared, tuple(n * count // likely.multiprocessors for n in likely.clusters))


def plan(
    cell: str,
    batch: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    tf32: bool | None = None,
    recurrences: int = 1,
    backward: bool = False,
    device: str | torch.device | tuple[int, int, int, tuple[int, ...]] | None = None,
    exchange: str | None = None,
    members: int = 0,
    rows: int = 0,
    weights: str | None = None,
) -> Plan:
    """What backend="cuda" runs for one layer: kernel, team, memory, estimated cycles; or why it runs step by step.

    Needs neither a GPU nor a build with CUDA kernels. T has no say in it. Where the teams of all layers of a stack in
    one direction fit on the GPU together, and T is long, the layers run side by side, each a chunk of time behind the
    one below it (a wavefront; not yet run on a GPU): what the plan says of one layer then holds of each.

    Args:
        cell: lstm, gru, rnn_tanh or rnn_relu, or the name of a user's cell.
        batch: B.
        hidden_size: H.
        dtype: float32, bfloat16, float16, float64.
        tf32: for float32, whether products may round their operands to TF32; None: as torch.backends.cudnn has it.
        recurrences: R, 2 for a bidirectional layer.
        backward: the loop of the gradients instead of the forward one.
        device: "cuda:0", or an architecture ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120": a full-size part
            of each), or (arch, multiprocessors, shared bytes a CTA, clusters): at place n - 1 of the last, how many
            clusters of n CTAs are resident together. None: the current GPU, or where there is none "sm_90".
        exchange: insist on "cta", "cluster", "grid", "scatter" or "direct". The last two are backward's alone: forward
            is a "cluster" or the "grid".
        members: insist on CTAs of a team.
        rows: insist on rows of the batch a team.
        weights: what W_hh is kept in, as in `module.stream(weights=...)`, "bf16" of float32, "int8" of that and of 16
            bits; None: dtype. Without backward.

    Raises:
        ValueError: naming the argument.
        NotImplementedError: where the compiled extension is missing.

    Examples:
        >>> fused_rnn.plan("lstm", batch=32, hidden_size=512, dtype=torch.bfloat16, device="sm_90").exchange
        'cluster'
    """
    if ops._C is None:
        raise NotImplementedError(ops.MISSING)
    if cell not in CELLS and not is_program(cell):
        raise ValueError(f"cell: got {cell!r}, expected one of {', '.join(CELLS)}")
    for name, size in (("batch", batch), ("hidden_size", hidden_size), ("recurrences", recurrences)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange: got {exchange!r}, expected None or one of {', '.join(EXCHANGES)}")
    precision, found = precision_of(dtype, tf32_allowed() if tf32 is None else tf32), _device(device)
    if weights not in NARROW:
        raise ValueError(f"weights: got {weights!r}, expected None, 'bf16' or 'int8'")
    if weights is not None and (backward or dtype not in NARROWED[weights]):
        dtypes = ", ".join(map(str, NARROWED[weights]))
        raise ValueError(f"weights: got {weights!r} with {dtype}, backward={backward}, expected forward in {dtypes}")
    spec = CELLS[cell]
    if hidden_size % spec.diagonal:
        raise ValueError(f"hidden_size: got {hidden_size}, expected a multiple of diagonal = {spec.diagonal}")
    if weights is not None and (reason := refusal_of_narrow(spec)) is not None:
        raise ValueError(f"weights: got {weights!r}, expected None: there are no {reason}")
    if not spec.recurrent:
        return Plan("none", precision, found, reason=without_product(spec))
    sizes = (PRECISIONS.index(precision), backward, spec.gates, batch, hidden_size, recurrences)
    forced, fewer = Forced(exchange, members, rows), fewer_blocks(spec, precision, backward)
    stages = stages_of(spec, backward)
    native = make(ops._C, sizes, ops._C.Device(*found), forced, fewer=fewer, narrow=weights, stages=stages)
    return read(native, precision, found)
