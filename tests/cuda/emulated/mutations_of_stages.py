"""Mistakes planted in what runs between two stages of a step, sums over units and own products; in masks."""

from __future__ import annotations

from .cases import Case
from .mutation import INDEX, UNIT_FWD, WRONG, Mutation

REDUCE, STAGES, ROWS = "cuda/reduce.h", "cuda/stages.h", "cuda/by_stages.h"

NORM = Case("layer_norm", "ieee", "cta", 4, 3, 29)
SUMS = Case("centred", "bf16", "cta", 3, 3, 29)
SUMS_OF_CLUSTER, SUMS_OF_GRID = (SUMS._replace(exchange=name, H=33) for name in ("cluster 2", "grid"))
DEEP = Case("deep", "bf16", "cta", 3, 3, 29)
DEEP_ON_GRID = DEEP._replace(exchange="grid", H=33)
ALONE, NORM_ALONE, DEEP_ALONE = (case._replace(exchange="stepwise") for case in (SUMS, NORM, DEEP))
MASKED = Case("masked_product", "bf16", "cta", 4, 3, 29, "fr")

OF_STAGES: dict[str, Mutation] = {
    # ---- how sums travel
    "sums: slots are read before they are written": Mutation(
        REDUCE, "sync_threads();\n    if (team_.exchange != ", "if (team_.exchange != ", "races", "RACE", (SUMS,)
    ),
    "sums, cluster: one copy of the slots": Mutation(
        REDUCE, "int(turn_ & 1) * copy_", "0 * copy_", "races", "RACE", (SUMS_OF_CLUSTER,)
    ),
    "sums, cluster: a warp sends before its lanes have read": Mutation(
        REDUCE, " * pairs * 8);\n    sync_warp();", " * pairs * 8);", "races", "RACE", (SUMS_OF_CLUSTER,)
    ),
    "sums, cluster: a member fewer is expected": Mutation(
        REDUCE, "team_.members * (team_.units / 16)", "(team_.members - 1) * (team_.units / 16)", "plain", "FAILED",
        (SUMS_OF_CLUSTER,),
    ),
    "sums, cluster: the parity of every turn": Mutation(
        REDUCE, "turn_ / 2 & 1", "turn_ & 1", "plain", "FAILED", (SUMS_OF_CLUSTER,)
    ),
    "sums, grid: the members of the turn before are waited for": Mutation(
        REDUCE, "(turn_ + 1) * uint32_t", "turn_ * uint32_t", "races", "RACE", (SUMS_OF_GRID,)
    ),
    "sums, grid: one copy in global memory": Mutation(
        REDUCE, "int(turn_ & 1) * copies_apart_", "0 * copies_apart_", "races", "RACE", (SUMS_OF_GRID,), times=2
    ),
    "sums, grid: copies are not waited for": Mutation(
        REDUCE, "    copy_wait<0>();\n", "", "plain", "FAILED", (SUMS_OF_GRID,)
    ),
    "sums, grid: threads do not wait for each other's copies": Mutation(
        REDUCE, "copy_wait<0>();\n    sync_threads();", "copy_wait<0>();", "races", "RACE", (SUMS_OF_GRID,)
    ),
    # ---- what they are
    "a unit beyond H counts": Mutation(REDUCE, "counts(unit) ? value : 0", "true ? value : 0", "plain", WRONG, (NORM,)),
    "the last units count as 16": Mutation(
        REDUCE, "width_ - 16 * k < 16 ? width_ - 16 * k : 16", "16", "plain", WRONG, (NORM,)
    ),
    "a variance without what the means differ by": Mutation(
        REDUCE, "part.y + float(units_in(k)) * off * off", "part.y + 0 * off", "plain", WRONG, (NORM,)
    ),
    "two sums of a pair change places": Mutation(
        REDUCE, "second ? of[k].y : of[k].x", "second ? of[k].x : of[k].y", "plain", WRONG, (NORM,)
    ),
    "the last units are left out": Mutation(
        REDUCE, "if (count / 4 * 4 + i < count)", "if (count / 4 * 4 + i + 1 < count)", "plain", WRONG, (NORM,)
    ),
    # ---- products
    "products: sums before all warps have left theirs": Mutation(
        STAGES, "sync_threads();\n    FUSED_RNN_UNROLL", "FUSED_RNN_UNROLL", "races", "RACE", (DEEP,)
    ),
    "products: of the first block all": Mutation(
        STAGES, "Cell::blocks + block) * width", "Cell::blocks + 0 * block) * width", "plain", WRONG, (DEEP,)
    ),
    "products: two leave their sums in one place": Mutation(
        STAGES, "at_.partial + i * (", "at_.partial + 0 * i * (", "plain", WRONG, (DEEP,)
    ),
    "products, grid: members of another operand are counted": Mutation(
        STAGES, "workspace.arrived + i * me.teams * 32", "workspace.arrived + 0 * i * me.teams * 32", "plain", "FAILED",
        (DEEP_ON_GRID,),
    ),
    # ---- without a team
    "a row: sums before all threads have put theirs": Mutation(
        ROWS, "partial_[thread] = sum;\n    sync_threads();", "partial_[thread] = sum;", "races", "RACE", (ALONE,)
    ),
    "a row: a sum of half of the threads": Mutation(
        ROWS, "half = kStageThreads / 2; half > 0", "half = kStageThreads / 2; half > 1", "plain", WRONG, (ALONE,)
    ),
    "a row: the next sum before this one is read": Mutation(
        ROWS, "sum = partial_[0];\n    sync_threads();", "sum = partial_[0];", "races", "RACE", (ALONE,)
    ),
    "a row: a variance of what it is not": Mutation(
        ROWS, "(from[u] - mean) * (from[u] - mean)", "from[u] * from[u]", "plain", WRONG, (NORM_ALONE,)
    ),
    "a row: what crosses is that of the first row": Mutation(
        ROWS, "int64_t(row) * s.H", "0 * int64_t(row) * s.H", "races", "RACE", (ALONE,)
    ),
    "a row: every launch runs the first stages": Mutation(
        ROWS, "int(stage) >= own.stage0 &&", "", "plain", WRONG, (DEEP_ALONE,)
    ),
    # ---- masks
    "a mask of the first step": Mutation(INDEX, "(times > 1 ? t : 0)", "0 * t", "plain", WRONG, (MASKED,)),
    "a mask of the first recurrence": Mutation(
        INDEX, "int64_t(r * times + ", "int64_t(0 * times + ", "plain", WRONG, (MASKED,)
    ),
    "forward: the mask of another place": Mutation(
        UNIT_FWD, "now.masks[k] = widen(masks_[k])", "now.masks[k] = widen(masks_[0])", "plain", WRONG, (MASKED,)
    ),
}  # fmt: skip
