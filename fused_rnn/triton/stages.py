"""What ends a stage of a step: sums and variances over the units of a row, products with the cell's own matrices.

A printed cell calls these. One program that has all units makes a sum by itself. Members of a team put their parts into
memory (`put_*`), arrive at the team's counter and wait (`meet`), and read everybody's, in the members' order: all have
the same bits. What a step puts the step after next writes over: by then all have come past the step between.
With launches of one stage each (HOW's stage) a launch makes again what led to its stage, and ends when it has put it.

team: (units n, own, partials [SLOTS, TEAM, BB], operands [OPERANDS, BB, H], matrices [N, H, H], counter, arrivals
before this step), then the blocks of the matrices if they are resident.
HOW: of compile.constants_stages.  E: which stage ends.
"""

import triton
import triton.language as tl

from fused_rnn.triton.exchange import arrive, wait
from fused_rnn.triton.forward import product_streamed as streamed_fwd
from fused_rnn.triton.product import dot, rounded
from fused_rnn.triton.product_bwd import product_streamed as streamed_bwd


@triton.jit
def _row_sum(a, n, H: tl.constexpr):
    """Over the program's units, [BB]. Beyond H a formula may have made a NaN."""
    return tl.sum(tl.where((n < H)[None, :], a, 0.0), 1)


@triton.jit
def _squares(a, mean, n, H: tl.constexpr):
    d = a - mean[:, None]
    return _row_sum(d * d, n, H)


@triton.jit
def _of_member(partials, SLOT: tl.constexpr, member, TEAM: tl.constexpr, BB: tl.constexpr):
    """Where a member's numbers of a slot lie, [BB] pointers."""
    return partials + (SLOT * TEAM + member) * BB + tl.arange(0, BB)


@triton.jit
def _of_all(partials, SLOT: tl.constexpr, BB: tl.constexpr, HOW: tl.constexpr):
    """A slot's numbers of all members, [BB, WIDTH], zeros beyond the team; from L2: see product_fwd.product_held."""
    TEAM: tl.constexpr = HOW[1]
    WIDTH: tl.constexpr = HOW[2]
    m = tl.arange(0, WIDTH)
    at = partials + (SLOT * TEAM + m)[None, :] * BB + tl.arange(0, BB)[:, None]
    return tl.load(at, mask=(m < TEAM)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def put_sum(a, SLOT: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """A member's part of a sum."""
    TEAM: tl.constexpr = HOW[1]
    STAGE: tl.constexpr = HOW[7]
    if TEAM > 1 and (STAGE < 0 or STAGE == E):
        member = tl.program_id(0) % TEAM
        tl.store(_of_member(team[2], SLOT, member, TEAM, a.shape[0]), _row_sum(a, team[0], HOW[0]))


@triton.jit
def put_variance(a, SLOT: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """A member's part of a variance: the mean of its units, and the sum of the squares of what they differ by."""
    H: tl.constexpr = HOW[0]
    TEAM: tl.constexpr = HOW[1]
    STAGE: tl.constexpr = HOW[7]
    if TEAM > 1 and (STAGE < 0 or STAGE == E):
        member = tl.program_id(0) % TEAM
        mean = _row_sum(a, team[0], H) / tl.minimum(a.shape[1], H - member * a.shape[1])
        tl.store(_of_member(team[2], SLOT, member, TEAM, a.shape[0]), mean)
        tl.store(_of_member(team[2], SLOT + 1, member, TEAM, a.shape[0]), _squares(a, mean, team[0], H))


@triton.jit
def put(a, OPERAND: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """A member's part of what a matrix multiplies."""
    STAGE: tl.constexpr = HOW[7]
    HELD: tl.constexpr = HOW[4]
    if (STAGE < 0 or STAGE == E) and not HELD:
        n = team[0]
        row = OPERAND * a.shape[0] + tl.arange(0, a.shape[0])
        narrow = tl.where(team[1], a, 0.0).to(team[3].dtype.element_ty)
        tl.store(team[3] + row[:, None] * HOW[0] + n[None, :], narrow, mask=(n < HOW[0])[None, :])


@triton.jit
def meet(E: tl.constexpr, team, HOW: tl.constexpr):
    """What all members have put is there from here on."""
    TEAM: tl.constexpr = HOW[1]
    HELD: tl.constexpr = HOW[4]
    COUNT: tl.constexpr = HOW[5]
    STAGE: tl.constexpr = HOW[7]
    if COUNT:
        if STAGE < 0 or STAGE == E:
            arrive(team[5], HOW[6])
        if STAGE < 0 or STAGE > E:
            wait(team[5], team[6] + TEAM * (E + 1))
    elif TEAM == 1 and not HELD:
        tl.debug_barrier()  # what its threads put is what its threads read


@triton.jit
def sum_of(a, SLOT: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """The sum of a over a row's units, [BB, 1]."""
    STAGE: tl.constexpr = HOW[7]
    TEAM: tl.constexpr = HOW[1]
    if TEAM == 1:
        total = _row_sum(a, team[0], HOW[0])
    elif STAGE < 0 or STAGE > E:
        total = tl.sum(_of_all(team[2], SLOT, a.shape[0], HOW), 1)
    else:
        total = tl.full((a.shape[0],), 0.0, tl.float32)
    return total[:, None]


@triton.jit
def variance_of(a, SLOT: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """The biased variance of a over a row's units, [BB, 1]: in two passes, or of the members' means and squares."""
    H: tl.constexpr = HOW[0]
    TEAM: tl.constexpr = HOW[1]
    WIDTH: tl.constexpr = HOW[2]
    STAGE: tl.constexpr = HOW[7]
    if TEAM == 1:
        squares = _squares(a, _row_sum(a, team[0], H) / H, team[0], H)
    elif STAGE < 0 or STAGE > E:
        means = _of_all(team[2], SLOT, a.shape[0], HOW)
        first = tl.arange(0, WIDTH) * a.shape[1]
        counts = tl.maximum(0, tl.minimum(a.shape[1], H - first)).to(tl.float32)[None, :]
        apart = means - (tl.sum(means * counts, 1) / H)[:, None]
        squares = tl.sum(_of_all(team[2], SLOT + 1, a.shape[0], HOW) + counts * (apart * apart), 1)
    else:
        squares = tl.full((a.shape[0],), 0.0, tl.float32)
    return (squares / H)[:, None]


@triton.jit
def _product(
    a, OPERAND: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, team, BACKWARD: tl.constexpr, HOW: tl.constexpr
):
    H: tl.constexpr = HOW[0]
    BK: tl.constexpr = HOW[3]
    HELD: tl.constexpr = HOW[4]
    STAGE: tl.constexpr = HOW[7]
    ALIGN: tl.constexpr = HOW[8]
    PRECISION: tl.constexpr = HOW[9]
    out = tl.full(a.shape, 0.0, tl.float32)
    if HELD:
        narrow = tl.where(team[1], a, 0.0).to(team[4].dtype.element_ty)
        out = dot(rounded(narrow, PRECISION), team[7 + BLOCK], out, PRECISION)
    elif STAGE < 0 or STAGE > E:
        there = tl.arange(0, a.shape[0])
        row = tl.multiple_of(team[3] + (OPERAND * a.shape[0] + there) * H, [ALIGN])
        if BACKWARD:
            out = streamed_bwd(row, there >= 0, team[4] + BLOCK * H * H, team[0], 1, H, BK, PRECISION)
        else:
            out = streamed_fwd(row, there >= 0, team[4] + BLOCK * H * H, team[0], 1, H, BK, PRECISION)[0]
    return out


@triton.jit
def product(a, OPERAND: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """Of the program's units what a block of the matrices makes of a."""
    return _product(a, OPERAND, BLOCK, E, team, False, HOW)


@triton.jit
def transposed(a, OPERAND: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, team, HOW: tl.constexpr):
    """The same of a block's transpose."""
    return _product(a, OPERAND, BLOCK, E, team, True, HOW)
