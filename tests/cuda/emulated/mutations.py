"""Mistakes planted in the CUDA loops, each an edit of a copy of their source, and what must notice it.

One build is named for each, the cheapest that is sure to notice: plain under a few schedules (wrong results, NaN, a
deadlock, what the emulator refuses), the race detector, or AddressSanitizer.
"""

from __future__ import annotations

from .cases import Case
from .mutation import BWD, EXCHANGE, FWD, GATHER, INDEX, PRECISION, UNIT_BWD, UNIT_FWD, WEIGHTS, WRONG, Mutation
from .mutations_of_chunks import OF_CHUNKS
from .mutations_of_stages import OF_STAGES
from .mutations_of_teams import OF_TEAMS, SCATTER_WINDOWS

SEEDS = {"plain": 6, "asan": 1, "races": 1}

CTA = Case("lstm", "bf16", "cta", 4, 3, 17)
CLUSTER = Case("lstm", "bf16", "cluster 2", 7, 3, 17)
CLUSTER_4 = Case("lstm", "bf16", "cluster 4", 4, 3, 50)
GRID = Case("lstm", "bf16", "grid", 4, 3, 33)
ALIGNED = Case("lstm", "bf16", "grid", 4, 3, 48)  # rows of W_hh are whole vectors
RESET = CTA._replace(reset=True, T=7)
RECOMPUTED = CTA._replace(T=7, save="recompute")
PARAMS = Case("three_states", "bf16", "cta", 4, 3, 17, "fr", save="recompute")
ENDS = Case("three_states", "bf16", "cta", 4, 3, 17, "fr", lengths=True, sequences=True)
ALONE = Case("alone", "bf16", "cta", 4, 3, 17, "fr", lengths=True)
PADDED = Case("gru", "bf16", "cta", 4, 3, 3)  # backward's depth is 48 of 64
WINDOWS = Case("gru", "bf16", "cta", 7, 3, 17, "fr", save="recompute")

MUTATIONS: dict[str, Mutation] = {
    # ---- barriers of a CTA
    "forward: no barrier between product and units": Mutation(
        FWD, "\n      sync_threads();", "", "races", "RACE", (CTA,)
    ),
    "backward: no barrier between product and units": Mutation(
        GATHER, "partial_);\n    sync_threads();", "partial_);", "races", "RACE", (CTA,)
    ),
    "backward: what was left, while the operand is being cleared": Mutation(
        GATHER, "sync_threads();\n    exchange_.invite();", "exchange_.invite();", "races", "RACE", (WINDOWS,)
    ),
    "no barrier between a step and the next": Mutation(
        EXCHANGE, "void arrive() {\n    sync_threads();", "void arrive() {", "races", "RACE", (CTA,)
    ),
    "forward: h0 while the operand is being cleared": Mutation(
        FWD, "  sync_threads();\n  exchange.invite();", "  exchange.invite();", "races", "RACE", (CTA,)
    ),
    "forward: no barrier before the first product": Mutation(
        EXCHANGE,
        "cluster_wait();\n    sync_threads();",
        "cluster_wait();",
        "races",
        "RACE",
        (CTA,),
    ),
    "a warp sends before its lanes have put": Mutation(
        EXCHANGE, "ExchangeKind::cluster) sync_warp();", "ExchangeKind::cluster) (void)0;", "races", "RACE", (CLUSTER,)
    ),
    # ---- memory
    "cluster: one copy of the operand": Mutation(
        EXCHANGE,
        "int(turn & 1) * team_.rows",
        "0 * team_.rows",
        "races",
        "RACE",
        (CLUSTER,),
    ),
    "shared memory for one fragment too few": Mutation(
        "cuda/layout.h",
        "t.mt * t.kept / 4 * 32;",
        "t.mt * t.kept / 4 * 32 - 1;",
        "asan",
        "AddressSanitizer",
        (CTA,),
    ),
    "put strides over the operand by one too many": Mutation(
        EXCHANGE, "copy(turn_ + 1) + b * stride_", "copy(turn_ + 1) + b * (stride_ + 1)", "plain", WRONG, (CTA,)
    ),
    "the product strides over the operand by one too many": Mutation(
        "cuda/product.h",
        "stride = operand_stride(team.depth, kTile);",
        "stride = operand_stride(team.depth, kTile) + 1;",
        "asan",
        "misaligned",
        (CTA,),
    ),
    "forward: the operand's padding is not cleared": Mutation(
        FWD, "clear(operands, at.operands_count);", "", "plain", WRONG, (CTA,)
    ),
    "backward: the operand's padding is not cleared": Mutation(
        GATHER, "clear(operands, at.operands_count);", "", "plain", WRONG, (PADDED,)
    ),
    "forward: a row of W_hh past the end": Mutation(
        WEIGHTS, "g < gates_ && u < width_ ?", "g < gates_ && u <= width_ ?", "asan", "AddressSanitizer", (CTA,)
    ),
    # ---- the cluster's exchange
    "cluster: peers are written to before they are ready": Mutation(
        "cuda/primitives/barrier.h",
        "cluster_arrive() { emulator::cluster_arrive(); }\n"
        "FUSED_RNN_DEVICE void cluster_wait() { emulator::cluster_wait(); }",
        "cluster_arrive() {}\nFUSED_RNN_DEVICE void cluster_wait() {}",
        "races",
        "RACE",
        (CLUSTER,),
    ),
    "cluster: nobody waits for the operand": Mutation(
        EXCHANGE, "barrier_wait(barrier, (turn_ - 1) / 2 & 1);", "", "plain", "barrier_expect", (CLUSTER,)
    ),
    "cluster: the wrong parity": Mutation(
        EXCHANGE, "(turn_ - 1) / 2 & 1", "(turn_ + 1) / 2 & 1", "plain", "FAILED", (CLUSTER,)
    ),
    "cluster: more bytes expected than come": Mutation(
        EXCHANGE,
        "barrier_expect(&barriers_[copy], bytes",
        "barrier_expect(&barriers_[copy], 16 + bytes",
        "plain",
        "DEADLOCK",
        (CLUSTER,),
    ),
    "cluster: fewer bytes expected than come": Mutation(
        EXCHANGE,
        "barrier_expect(&barriers_[copy], bytes",
        "barrier_expect(&barriers_[copy], -16 + bytes",
        "plain",
        "FAILED",
        (CLUSTER,),
    ),
    "cluster: nothing is expected of the next operand": Mutation(
        EXCHANGE, "expect(turn_ & 1);", "(void)0;", "plain", "DEADLOCK", (CLUSTER,)
    ),
    "cluster: one peer is left out": Mutation(
        EXCHANGE,
        "if (i >= team_.members - 1) break;",
        "if (i >= team_.members - 2) break;",
        "plain",
        "DEADLOCK",
        (CLUSTER_4,),
    ),
    "cluster: the peer after the one that is meant": Mutation(
        EXCHANGE,
        "after = member_ + 1 + i",
        "after = member_ + 2 + i",
        "plain",
        "FAILED",
        (CLUSTER_4,),
    ),
    "cluster: the last step is sent, though nobody waits for it": Mutation(
        FWD, "if (step + 1 < p.steps.step1) {", "if (true) {", "plain", "on its way", (CLUSTER,)
    ),
    # ---- the grid's exchange
    "grid: members are not counted in": Mutation(
        EXCHANGE, "add_release(arrived, 1);", "(void)0;", "plain", "DEADLOCK", (GRID,)
    ),
    "grid: a member is counted in before all its threads have put": Mutation(
        EXCHANGE,
        "sync_threads();\n    if (team_.exchange == ExchangeKind::grid) count_in(arrived_);",
        "if (team_.exchange == ExchangeKind::grid) count_in(arrived_);\n    sync_threads();",
        "races",
        "RACE",
        (GRID,),
    ),
    "grid: one member fewer is waited for": Mutation(
        EXCHANGE,
        "turn_ * uint32_t(team_.members)",
        "turn_ * uint32_t(team_.members - 1)",
        "races",
        "RACE",
        (GRID,),
    ),
    "grid: threads copy without waiting for the one that waits": Mutation(
        EXCHANGE,
        "pause();\n    }\n  }\n  sync_threads();",
        "pause();\n    }\n  }",
        "races",
        "RACE",
        (GRID,),
    ),
    "grid: copies are not waited for": Mutation(EXCHANGE, "      copy_wait<0>();\n", "", "plain", "FAILED", (GRID,)),
    "grid: threads do not wait for each other's copies": Mutation(
        EXCHANGE, "copy_wait<0>();\n      sync_threads();", "copy_wait<0>();", "races", "RACE", (GRID,)
    ),
    # ---- what is where
    "weights: two registers of a fragment change places": Mutation(
        PRECISION,
        "add(low[m], {a[m][0], a[m][4], a[m][1], a[m][5]}",
        "add(low[m], {a[m][0], a[m][1], a[m][4], a[m][5]}",
        "plain",
        WRONG,
        (CTA,),
    ),
    "operand: the upper half of a block is the lower one again": Mutation(
        PRECISION,
        "high[m], {a[m][2], a[m][6], a[m][3], a[m][7]}, {b.z, b.w}",
        "high[m], {a[m][2], a[m][6], a[m][3], a[m][7]}, {b.x, b.y}",
        "plain",
        WRONG,
        (CTA,),
    ),
    "weights: a block's neighbours change places": Mutation(
        WEIGHTS, "return found[i].of[n];", "return found[i].of[kRows - 1 - n];", "plain", WRONG, (ALIGNED,)
    ),
    "weights: 16 bytes from the row above": Mutation(
        WEIGHTS, "at(row0 + Policy::row(q))", "at(row0 + Policy::row(0))", "plain", WRONG, (ALIGNED,)
    ),
    "forward: gates in the wrong order": Mutation(
        WEIGHTS, "const int g = row / units_, ", "const int g = gates_ - 1 - row / units_, ", "plain", WRONG, (CTA,)
    ),
    "backward: resumes from the input side's gradients": Mutation(
        BWD, " + Cell::apart * width", "", "plain", WRONG, (WINDOWS, SCATTER_WINDOWS)
    ),
    "in reverse a window begins as forwards": Mutation(
        INDEX, "T - s.window1 : s.window0", "s.window0 : s.window0", "asan", "AddressSanitizer", (SCATTER_WINDOWS,)
    ),
    # ---- masks
    "a reset is not seen": Mutation(
        INDEX, "return s.reset ? s.reset[", "return s.reset ? 0 * s.reset[", "plain", WRONG, (RESET,)
    ),
    "forward: h enters the product in spite of a reset": Mutation(
        UNIT_FWD, "? Storage{} : h_", "? h_ : h_", "plain", WRONG, (RESET,)
    ),
    "backward: a gradient passes a reset": Mutation(
        UNIT_BWD, "dstate_[0] += reaches_ ? product", "dstate_[0] += true ? product", "plain", WRONG, (RESET,)
    ),
    # ---- params, states over time, no W_hh
    "backward: a param's gradient of the last step alone": Mutation(
        UNIT_BWD, "dparams_[k] += now.dparams[k]", "dparams_[k] = now.dparams[k]", "plain", WRONG, (PARAMS,)
    ),
    "backward: what another window gave a param is forgotten": Mutation(
        UNIT_BWD, "if (p.dparams) dparams_[k] =", "if (false) dparams_[k] =", "plain", WRONG, (PARAMS,)
    ),
    "backward: the params of the first recurrence": Mutation(
        UNIT_BWD,
        "p.params)[(r * Cell::params",
        "p.params)[(0 * r * Cell::params",
        "plain",
        WRONG,
        (PARAMS,),
    ),
    "backward: two sequences give one sum": Mutation(
        UNIT_BWD, "(int64_t(at.r * p.steps.B + at.b)", "(int64_t(at.r * p.steps.B)", "races", "RACE", (PARAMS,)
    ),
    "forward: a state over time past its end": Mutation(
        UNIT_FWD, "const Acc value = valid ?", "const Acc value = true ?", "plain", WRONG, (ENDS,)
    ),
    "backward: no gradient of a state over time": Mutation(
        UNIT_BWD, "now.dstate[s + 1] += widen(dsequences_[s])", "(void)s", "plain", WRONG, (ENDS,)
    ),
    "backward without W_hh: of the first step alone": Mutation(
        "cuda/pointwise.h",
        "for (int step = p.steps.step1 - 1;",
        "for (int step = p.steps.step0;",
        "plain",
        WRONG,
        (ALONE,),
    ),
    "forward: a checkpoint a step late": Mutation(
        UNIT_FWD, "(step + 1) % p.every == 0", "step % p.every == 0", "plain", WRONG, (RECOMPUTED,)
    ),
    **OF_TEAMS,
    **OF_STAGES,
    **OF_CHUNKS,
}
