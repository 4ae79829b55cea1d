"""Mistakes planted in chunks of time side by side, and in what joins them."""

from __future__ import annotations

from .cases import Case
from .mutation import INDEX, UNIT_BWD, UNIT_FWD, WRONG, Mutation

JOIN, POINTWISE = "cuda/join.h", "cuda/pointwise.h"

CHUNKS = Case("sru", "ieee", "cta", 7, 5, 3, "fr", lengths=True, chunk=2)
CUT = CHUNKS._replace(reset=True)
READ = Case("linear_indrnn", "bf16", "cta", 7, 3, 17, "fr", chunk=3)
STATES = Case("many", "f64", "stepwise", 8, 3, 5, "r", sequences=True, chunk=2)
KEPT = CHUNKS._replace(save="recompute")

OF_CHUNKS: dict[str, Mutation] = {
    "chunks: a border is a step late": Mutation(
        POINTWISE, "p.steps.step0 += chunk * p.steps.chunk;", "p.steps.step0 += chunk * p.steps.chunk + (chunk > 0);",
        "plain", WRONG, (CHUNKS,),
    ),
    "chunks: two run the step between them": Mutation(
        POINTWISE, "p.steps.step1 = p.steps.step0 + p.steps.chunk;",
        "p.steps.step1 = p.steps.step0 + p.steps.chunk + 1;", "races", "RACE", (CHUNKS,),
    ),
    "chunks: all begin as the first": Mutation(
        POINTWISE, "(p.carried[k]) + elements", "(p.carried[k]) + 0 * elements", "races", "RACE", (READ,)
    ),
    "chunks: gradients come from the first": Mutation(
        POINTWISE, "(p.dstates[k]) + elements", "(p.dstates[k]) + 0 * elements", "races", "RACE", (STATES,)
    ),
    "chunks: all give a param their gradients in one place": Mutation(
        POINTWISE, "+ elements * Cell::params", "+ 0 * elements", "races", "RACE", (READ,)
    ),
    "chunks: h is taken of a step that runs meanwhile": Mutation(
        UNIT_FWD, "if (p.y && !by_chunks(p))", "if (p.y)", "races", "RACE", (CHUNKS,)
    ),
    "chunks: the last h of all": Mutation(
        UNIT_FWD, "by_chunks(p) ? walk.ends(p.steps, at.length)", "by_chunks(p) ? true", "races", "RACE", (CHUNKS,)
    ),
    "chunks: the last h where time ends": Mutation(
        INDEX, "length == 0 ? 1 : pace < 0 ? T : length", "T", "plain", WRONG, (CHUNKS,)
    ),
    "chunks: the last h where the sequence begins": Mutation(
        INDEX, "length == 0 ? 1 : pace < 0 ? T : length", "length == 0 ? 1 : length", "plain", WRONG, (CHUNKS,)
    ),
    "chunks: the gradient of the last h enters all": Mutation(
        UNIT_BWD, "p.steps.step1 < walk.end(at.length) ?", "false ?", "plain", WRONG, (CHUNKS,)
    ),
    "chunks: it enters none but the last": Mutation(
        UNIT_BWD, "p.steps.step1 < walk.end(at.length) ?", "p.steps.step1 < p.steps.T ?", "plain", WRONG, (CHUNKS,)
    ),
    "join: a factor is forgotten": Mutation(
        JOIN, "factor[k] * now + sum[k]", "now + 0 * factor[k] + sum[k]", "plain", WRONG, (CHUNKS,)
    ),
    "join: a chunk's own sum is forgotten": Mutation(
        JOIN, "factor[k] * now + sum[k]", "factor[k] * now", "plain", WRONG, (CHUNKS,)
    ),
    "join: what a chunk makes enters it": Mutation(
        JOIN, "sums[at(k)] = now;\n", "", "plain", WRONG, (CHUNKS,)
    ),
    "join: backward in the order of forward": Mutation(
        JOIN, "p.backward ? p.chunks - 1 - first - k : first + k", "first + k", "plain", WRONG, (CHUNKS,)
    ),
    "join: the factors of the first state": Mutation(
        JOIN, "p.factors[state])", "p.factors[0])", "plain", WRONG, (STATES,)
    ),
    "join: the chunks beyond the first eight are left out": Mutation(
        JOIN, "first < p.chunks; first", "first < kJoinedAtOnce; first", "plain", WRONG,
        (CHUNKS._replace(T=19),),
    ),
    "chunks: a reset at a border is not seen": Mutation(
        UNIT_FWD, "    } else if (at.valid(t)) {", "    } else if (at.valid(t) && !by_chunks(p)) {", "plain", WRONG,
        (CUT,),
    ),
    "chunks: a checkpoint of the first alone": Mutation(
        UNIT_FWD, "(step + 1) % p.every == 0 &&", "step < p.every && (step + 1) % p.every == 0 &&", "plain", WRONG,
        (KEPT,),
    ),
}  # fmt: skip
