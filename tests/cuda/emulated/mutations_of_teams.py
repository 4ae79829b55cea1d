"""Mistakes of known teams and of narrow weights: see mutations.py."""

from __future__ import annotations

from .cases import Case
from .mutation import (
    BWD,
    DIRECTLY,
    FWD,
    INDEX,
    PRECISION,
    PRODUCT,
    SCATTERS,
    UNIT_BWD,
    UNIT_FWD,
    WEIGHTS,
    WIDEN,
    WRONG,
    Mutation,
)

# Of known teams: backward scatters, forward is a cluster.
SCATTER = Case("lstm", "bf16", "scatter 4", 6, 3, 64)
GRU = SCATTER._replace(cell="gru")  # its depth is 48 of 64
BOTH_WAYS = GRU._replace(T=4, directions="fr")
SCATTER_RESET = SCATTER._replace(reset=True, lengths=True)
SCATTER_WINDOWS = GRU._replace(T=7, directions="fr", save="recompute")
TWO_TILES = SCATTER._replace(T=4, H=128)  # of an owner, in one group
JOINED = Case("lstm", "bf16", "scatter 8", 4, 3, 256)  # a warp has two tiles, both for one owner, in one packet
TWO_GROUPS = JOINED._replace(precision="f16")  # or in two
TWO_OWNERS = JOINED._replace(exchange="scatter 16")  # or for two
UNITLESS_WARPS = SCATTER._replace(exchange="scatter 8", T=3, H=128)  # they multiply alone
IDLE_WARPS = Case("gru", "bf16", "scatter 4", 2, 3, 128)  # in forward's product

# Of known teams whose backward reads its operand directly.
DIRECT = Case("lstm", "bf16", "direct 2", 5, 3, 64, rows=16)
DIRECT_WINDOWS = DIRECT._replace(T=7, directions="fr", save="recompute")
TWO_TEAMS = DIRECT._replace(directions="fr")
ALL_ROWS = DIRECT._replace(B=16)
ONE_M_TILE = Case("lstm", "bf16", "direct 8", 4, 3, 128)

# Of a known team whose forward has a part of its weights in shared memory, and two units a thread.
WIDE = Case("lstm", "bf16", "known grid", 3, 16, 320, rows=16)

# W_hh in fewer bytes; 48 is whole vectors of them, 17 not.
INT8 = Case("lstm", "bf16", "cta", 3, 3, 48, "fr", save="none", narrow="int8")
UNALIGNED = INT8._replace(H=17)
BEYOND = Case("gru", "ieee", "cluster 4", 2, 1, 256, save="none", narrow="bf16")  # more blocks than in registers
KNOWN = INT8._replace(exchange="scatter 4", H=64)
IN_F16, IN_TF32 = INT8._replace(precision="f16"), INT8._replace(precision="tf32")
PAIRS = IN_TF32._replace(narrow="bf16")

OF_TEAMS: dict[str, Mutation] = {
    # ---- sums that are scattered
    "scatter: no barrier between put and product": Mutation(
        SCATTERS, "send() {\n    sync_threads();", "send() {", "races", "RACE", (SCATTER,)
    ),
    "scatter: one copy of the operand": Mutation(
        SCATTERS, "apart * NB * kStride", "0 * NB * kStride", "races", "RACE", (SCATTER,), 2
    ),
    "scatter: one copy of what is received": Mutation(
        SCATTERS, "apart * H * NB", "0 * H * NB", "races", "RACE", (SCATTER,), 2
    ),
    "scatter: the operand's padding is not cleared": Mutation(
        SCATTERS, "clear(operands_, at.operands_count);", "", "plain", WRONG, (GRU,)
    ),
    "scatter: weights past the depth": Mutation(SCATTERS, "at < G * U ?", "true ?", "asan", "AddressSanitizer", (GRU,)),
    "scatter: gates in the wrong order": Mutation(
        SCATTERS, "at % G * H", "(G - 1 - at % G) * H", "plain", WRONG, (SCATTER,)
    ),
    "scatter: one of a tile's sums is left out": Mutation(
        SCATTERS, "width = kChains / 2", "width = kChains / 4", "plain", WRONG, (SCATTER,)
    ),
    "scatter: one sender's sums are left out": Mutation(
        SCATTERS, "w < kSenders; ++w) part", "w < kSenders - 1; ++w) part", "plain", WRONG, (SCATTER,)
    ),
    "scatter: the owner after the one that is meant": Mutation(
        SCATTERS, "(member + 1 +", "(member + 2 +", "plain", WRONG, (SCATTER,)
    ),
    "scatter: the weights of the owner after": Mutation(
        SCATTERS, "(member_ + 1 +", "(member_ + 2 +", "plain", WRONG, (SCATTER,)
    ),
    "scatter: the weights of an owner's first tile for all of its tiles": Mutation(
        SCATTERS, "x % (U / 16) * 16 + ", "", "plain", WRONG, (TWO_TILES,)
    ),
    "scatter: a row's weights for its neighbour, too": Mutation(
        SCATTERS, "unit + n]", "unit]", "plain", WRONG, (SCATTER,)
    ),
    "scatter: sums go to another lane's slot": Mutation(
        SCATTERS, "slot = slot_of(r, c)", "slot = slot_of(r ^ 1, c)", "plain", WRONG, (SCATTER,)
    ),
    "scatter: sums come from another lane's slot": Mutation(
        SCATTERS, "slot_of(r, warp_ % 4)", "slot_of(r, warp_ % 4 ^ 1)", "plain", WRONG, (SCATTER,)
    ),
    "scatter: two lanes have one slot": Mutation(SCATTERS, "* 2 + r % 2", "* 2", "races", "RACE", (SCATTER,)),
    "scatter: the sum of the other row of the batch": Mutation(
        SCATTERS, "* 4 + i);", "* 4 + (i ^ 1));", "plain", WRONG, (SCATTER,)
    ),
    "scatter: an owner's tiles change places": Mutation(
        SCATTERS, "x * kPacket + slot", "(x ^ 1) * kPacket + slot", "plain", WRONG, (TWO_TILES,)
    ),
    "scatter: two tiles of a warp go to one place": Mutation(
        SCATTERS, "to_[o] + place * kPacket * int(sizeof(Sum))", "to_[o]", "plain", WRONG, (TWO_GROUPS,)
    ),
    "scatter: a packet's tiles change places": Mutation(
        SCATTERS, "tile % kJoined * 4", "(tile + 1) % kJoined * 4", "plain", WRONG, (JOINED,)
    ),
    "scatter: a packet has its first tile twice": Mutation(
        SCATTERS, "sums[kJoined - 1]", "sums[0]", "plain", WRONG, (JOINED,)
    ),
    "scatter: two sums of a pair change places": Mutation(
        SCATTERS, "pack<bf16>(s[0], s[1])", "pack<bf16>(s[1], s[0])", "plain", WRONG, (SCATTER,), 2
    ),
    "scatter: two warps expect the group of one packet": Mutation(
        SCATTERS, "warp_ % (4 * kJoined) == 0", "warp_ % 4 == 0", "plain", "barrier_expect", (JOINED,)
    ),
    "scatter: a group's sums are read before it has come": Mutation(
        SCATTERS, "(w * kOwners + o)", "(o * kSenders + w)", "plain", "FAILED", (TWO_OWNERS,)
    ),
    "scatter: nobody waits for a group": Mutation(
        SCATTERS, "barrier_wait(barriers_ +", "(void)(barriers_ +", "plain", "barrier_expect", (SCATTER,)
    ),
    "scatter: the wrong parity": Mutation(
        SCATTERS, "(turn_ - 1) / 2 & 1", "(turn_ + 1) / 2 & 1", "plain", "FAILED", (SCATTER,)
    ),
    "scatter: more bytes expected than come": Mutation(
        SCATTERS, "kWarps * kPacket * int", "16 + kWarps * kPacket * int", "plain", "DEADLOCK", (SCATTER,)
    ),
    "scatter: fewer bytes expected than come": Mutation(
        SCATTERS, "kWarps * kPacket * int", "-16 + kWarps * kPacket * int", "plain", "FAILED", (SCATTER,)
    ),
    "scatter: nothing is expected of the second copy": Mutation(
        SCATTERS, "2 * kPackets; ++i) barrier_expect", "kPackets; ++i) barrier_expect", "plain", "DEADLOCK", (SCATTER,)
    ),
    "scatter: a group is never expected again": Mutation(
        SCATTERS, "barrier_expect(barriers_ +", "(void)(barriers_ +", "plain", "DEADLOCK", (SCATTER,)
    ),
    "scatter: the other copy's group is expected again": Mutation(
        SCATTERS,
        "barrier_expect(barriers_ + group_",
        "barrier_expect(barriers_ + (group_ < kPackets ? group_ + kPackets : group_ - kPackets)",
        "plain",
        "barrier_expect",
        (SCATTER,),
    ),
    "scatter: every warp expects its group again": Mutation(
        SCATTERS, "warp_ % (4 * kJoined) == 0 && ", "", "plain", "barrier_expect", (SCATTER,)
    ),
    "scatter: two warps expect the group of two tiles": Mutation(
        SCATTERS, "(kPackets >= kOwned || warp_ == 0)", "true", "plain", "barrier_expect", (TWO_TILES,)
    ),
    "scatter: one group of two is expected again": Mutation(
        SCATTERS, "lane() < kOwners", "lane() < 1", "plain", "DEADLOCK", (TWO_OWNERS,)
    ),
    "scatter: two tiles are counted in one group": Mutation(
        SCATTERS, "barrier_[o] + place % kPackets * 8", "barrier_[o]", "plain", "DEADLOCK", (TWO_GROUPS,)
    ),
    "scatter: two owners count in one group": Mutation(
        SCATTERS, "barriers_ + o * kOwned % kPackets, owner", "barriers_, owner", "plain", "DEADLOCK", (TWO_OWNERS,)
    ),
    "scatter: peers are sent to before they are ready": Mutation(
        SCATTERS,
        "cluster_wait();\n    if (!resumes)",
        "struct Late {\n      ~Late() { cluster_wait(); }\n    } late;\n    if (!resumes)",
        "races",
        "RACE",
        (SCATTER_WINDOWS,),
    ),
    "scatter: warps without units take those of others": Mutation(
        SCATTERS, "warp_ < U * NB / 32}", "true}", "races", "RACE", (UNITLESS_WARPS,)
    ),
    "scatter: resumes from another member's gradients": Mutation(
        SCATTERS, "g * H + member * U + u]", "g * H + u]", "plain", WRONG, (SCATTER_WINDOWS,)
    ),
    "scatter: the last sums are sent, though nobody waits for them": Mutation(
        BWD, "if (step > p.steps.step0 || p.close)", "if (true)", "plain", "on its way", (SCATTER_WINDOWS,)
    ),
    "scatter: nobody waits for the last sums": Mutation(
        BWD, "if (p.close) {", "if (false) {", "plain", "on its way", (SCATTER,)
    ),
    # ---- an operand that is read directly
    "direct: no barrier between product and units": Mutation(
        DIRECTLY, "partial_);\n    sync_threads();", "partial_);", "races", "RACE", (DIRECT,)
    ),
    "direct: nobody waits for the other members": Mutation(
        DIRECTLY, "wait_for(arrived_, turn_ * uint32_t(H / U));", "", "races", "RACE", (DIRECT,)
    ),
    "direct: one member fewer is waited for": Mutation(
        DIRECTLY, "uint32_t(H / U)", "uint32_t(H / U - 1)", "races", "RACE", (DIRECT,)
    ),
    "direct: members are waited for a turn late": Mutation(
        DIRECTLY, "wait_for(arrived_, turn_ *", "wait_for(arrived_, (turn_ + 1) *", "plain", "DEADLOCK", (DIRECT,)
    ),
    "direct: a member is counted in before all its threads have put": Mutation(
        DIRECTLY,
        "sync_threads();\n    count_in(arrived_);",
        "count_in(arrived_);\n    sync_threads();",
        "races",
        "RACE",
        (DIRECT,),
    ),
    "direct: members are not counted in": Mutation(DIRECTLY, "count_in(arrived_);", "", "plain", "DEADLOCK", (DIRECT,)),
    "direct: one copy of the operand": Mutation(
        DIRECTLY, "int(turn & 1) * apart_", "0 * int(turn & 1) * apart_", "races", "RACE", (DIRECT,)
    ),
    "direct: two teams have one operand": Mutation(
        DIRECTLY, "+ me.team * (NB * G * H)", "+ 0 * me.team * (NB * G * H)", "races", "RACE", (TWO_TEAMS,)
    ),
    "direct: two teams have one counter": Mutation(
        DIRECTLY, "arrived + me.team * 32", "arrived + 0 * me.team * 32", "races", "RACE", (TWO_TEAMS,)
    ),
    "direct: the second copies lie in the first ones of other teams": Mutation(
        DIRECTLY, "me.teams * (NB * G * H)", "NB * G * H", "races", "RACE", (TWO_TEAMS,)
    ),
    "direct: the columns of another member": Mutation(
        DIRECTLY, "G, H, H, U, me.first_u)", "G, H, H, U, H - U - me.first_u)", "plain", WRONG, (DIRECT,)
    ),
    "direct: a member puts where another one does": Mutation(
        DIRECTLY, "u = first_u_ + index[j].u;", "u = index[j].u;", "races", "RACE", (DIRECT,)
    ),
    "direct: gates in the wrong order": Mutation(
        DIRECTLY, "to[g * (H * NB)]", "to[(G - 1 - g) * (H * NB)]", "plain", WRONG, (DIRECT,)
    ),
    "direct: units half a block from their place": Mutation(
        DIRECTLY, "u % kDepth;", "(u + 16) % kDepth;", "plain", WRONG, (ONE_M_TILE,)
    ),
    "direct: the other eight rows of the batch": Mutation(
        DIRECTLY, "* NB + index[j].b)", "* NB + (index[j].b ^ 8))", "plain", WRONG, (DIRECT,)
    ),
    "direct: the first eight rows of the batch for all": Mutation(
        PRODUCT, "operand + (i * NT + n) * 32", "operand + i * NT * 32", "plain", WRONG, (ALL_ROWS,)
    ),
    "direct: a fragment in the place of one that is still to be multiplied": Mutation(
        PRODUCT, "b[i % kOnTheWay][n] = load", "b[(i + 1) % kOnTheWay][n] = load", "plain", WRONG, (DIRECT,)
    ),
    "direct: weights of the first block in shared memory for all there": Mutation(
        PRODUCT,
        "fetch(kept, i - kHeld);\n        multiply(i, sums",
        "fetch(kept, 0);\n        multiply(i, sums",
        "plain",
        WRONG,
        (ONE_M_TILE,),
    ),
    "direct: one block too few": Mutation(
        PRODUCT, "for (int i = 0; i < kBlocks; ++i)", "for (int i = 0; i < kBlocks - 1; ++i)", "plain", WRONG, (DIRECT,)
    ),
    "direct: resumes from another member's gradients": Mutation(
        DIRECTLY, "g * H + first_u_ + index[j].u]", "g * H + index[j].u]", "plain", WRONG, (DIRECT_WINDOWS,)
    ),
    "direct: a member that resumes is not counted in": Mutation(
        DIRECTLY, "    arrive();\n  }", "    ++turn_;\n  }", "plain", "DEADLOCK", (DIRECT_WINDOWS,)
    ),
    # ---- known teams
    "known: one block too few from shared memory": Mutation(
        PRODUCT,
        "i < count(); ++i) {\n      Kept kept",
        "i < count() - 1; ++i) {\n      Kept kept",
        "plain",
        WRONG,
        (WIDE,),
    ),
    "known: the first block in shared memory for all there": Mutation(
        PRODUCT, "fetch(kept, i - kHeld);\n      Fragment", "fetch(kept, 0);\n      Fragment", "plain", WRONG, (WIDE,)
    ),
    "known: warps without a part in the product multiply": Mutation(
        "cuda/known_teams.h",
        "some_idle = team.warps_m",
        "some_idle = false && team.warps_m",
        "asan",
        "AddressSanitizer",
        (IDLE_WARPS,),
    ),
    "known: in reverse a cursor goes forwards": Mutation(
        INDEX,
        "int64_t(walk.stride) * (by",
        "int64_t(walk.pace * walk.stride) * (by",
        "asan",
        "AddressSanitizer",
        (BOTH_WAYS,),
    ),
    "known: a cursor moves by one vector of several": Mutation(
        INDEX, "(by * vectors * kScale)", "(by * kScale)", "plain", WRONG, (BOTH_WAYS,)
    ),
    "known: a cursor begins a window as if it were all of time": Mutation(
        INDEX,
        "Address(array) + (steps_size(s, time,",
        "Address(array) + (steps_size(s, walk.time(step),",
        "asan",
        "AddressSanitizer",
        (SCATTER_WINDOWS,),
    ),
    "known: histories are wide, whatever is told": Mutation(
        INDEX,
        "sizeof(Storage) == 4 || p.histories_are_wide",
        "true || p.histories_are_wide",
        "asan",
        "AddressSanitizer",
        (SCATTER,),
    ),
    "known: a reset past the last step is read": Mutation(
        INDEX, "int64_t(counts ? t : 0) * stride_", "int64_t(t) * stride_", "asan", "AddressSanitizer", (SCATTER_RESET,)
    ),
    "known: resets of rows outside the batch are read": Mutation(
        INDEX, "s.reset && at.inside", "s.reset", "asan", "AddressSanitizer", (SCATTER_RESET._replace(B=1),)
    ),
    "known: a reset counts where it does not, and nowhere else": Mutation(
        INDEX, "counts ? stride_ : 0", "counts ? 0 : stride_", "plain", WRONG, (SCATTER_RESET,)
    ),
    "known: a reset is not seen": Mutation(
        INDEX, "mask_ != 0 && bits_ != 0", "mask_ != 0 && bits_ != bits_", "plain", WRONG, (SCATTER_RESET,)
    ),
    "known: forward: a reset a step early for the states": Mutation(
        UNIT_FWD,
        "resets_.ask(next, counts);",
        "resets_.ask(next, counts), reset_ = resets_.zero();",
        "plain",
        WRONG,
        (SCATTER_RESET,),
    ),
    "known: forward: a reset a step late for the product": Mutation(
        UNIT_FWD, "(kKnown ? resets_.zero()", "(kKnown ? reset_", "plain", WRONG, (SCATTER_RESET,)
    ),
    # ---- W_hh in fewer bytes
    "narrow: the scale of another gate": Mutation(
        WEIGHTS, "scale[(r * G + g) *", "scale[(r * G + (g ^ 1)) *", "plain", WRONG, (INT8,)
    ),
    "narrow: the scale of another recurrence": Mutation(
        WEIGHTS, "scale[(r * G + g) *", "scale[g *", "plain", WRONG, (INT8,)
    ),
    "narrow: the scale of the unit beside": Mutation(
        WEIGHTS, "* width + u] :", "* width + (u ^ 1)] :", "plain", WRONG, (INT8,)
    ),
    "narrow: the scale of another member's unit": Mutation(
        FWD, "width, me.first_u + index[j].u)", "width, index[j].u)", "plain", WRONG, (KNOWN,)
    ),
    "narrow: the scale of a unit past the end": Mutation(
        WEIGHTS, "u < width ? scale", "true ? scale", "asan", "AddressSanitizer", (UNALIGNED,)
    ),
    "narrow: a scale counts twice": Mutation(WEIGHTS, "*= of_[g]", "*= of_[g] * of_[g]", "plain", WRONG, (INT8,)),
    "narrow: a scale does not count": Mutation(FWD, "scales[j].apply(recurrent);", "", "plain", WRONG, (INT8,)),
    "narrow: the sign is lost": Mutation(WIDEN, "word ^ 0x80808080u", "word", "plain", WRONG, (IN_F16,)),
    "narrow: the sign is lost in bf16": Mutation(WIDEN, "word & 0x80808080u", "0", "plain", WRONG, (INT8,)),
    "narrow: the bias stays in f16": Mutation(WIDEN, "0xe480e480u", "0xe400e400u", "plain", WRONG, (IN_F16,)),
    "narrow: the bias stays in tf32": Mutation(WIDEN, "0x1p23f + 128", "0x1p23f", "plain", WRONG, (IN_TF32,)),
    "narrow: one of the bias stays": Mutation(
        WIDEN, "0x1p23f + 128", "0x1p23f + 127", "plain", WRONG, (INT8._replace(precision="ieee"),)
    ),
    "narrow: neighbours change places": Mutation(
        WIDEN, "0x7540u + uint32_t(i)", "0x7540u + uint32_t(i ^ 1)", "plain", WRONG, (IN_TF32,)
    ),
    "narrow: pairs change places": Mutation(WIDEN, "pair = i ?", "pair = !i ?", "plain", WRONG, (INT8,)),
    "narrow: halves change places": Mutation(
        WIDEN, "wide[0] = word << 16;\n  wide[1] =", "wide[1] = word << 16;\n  wide[0] =", "plain", WRONG, (PAIRS,)
    ),
    "narrow: widened by the word beside": Mutation(
        PRECISION, "renewed(int(kept[i]))", "renewed(int(kept[i ^ 1]))", "plain", WRONG, (INT8,)
    ),
    "narrow: a quad of single weights is put over the one before": Mutation(
        "cuda/product.h", "+ first % 4)", "+ 0)", "plain", WRONG, (UNALIGNED,)
    ),
    "narrow: the registers keep the weights of the block before": Mutation(
        "cuda/product.h",
        "weights.load(row0(m), k0(i), kept[m]);\n        hold(",
        "weights.load(row0(m), k0(i ? i - 1 : 0), kept[m]);\n        hold(",
        "plain",
        WRONG,
        (INT8,),
    ),
    "narrow: one block stands for all in shared memory": Mutation(
        "cuda/product.h",
        "fetch(kept, i - kHeld);\n      Fragment",
        "fetch(kept, 0);\n      Fragment",
        "plain",
        WRONG,
        (BEYOND,),
    ),
    "narrow: of known teams, the weights as they were kept": Mutation(
        "cuda/product.h",
        "Policy::widen(kept[m], held[m]);",
        "Policy::widen(kept[0], held[m]);",
        "plain",
        WRONG,
        (KNOWN,),
    ),
    "narrow: shared memory as for whole weights is not there": Mutation(
        "cuda/product.h",
        "(kVectors * 32) + lane()",
        "(MT * kQuads * 32) + lane()",
        "asan",
        "AddressSanitizer",
        (UNALIGNED,),
    ),
    "known: backward: a reset of the step before": Mutation(
        UNIT_BWD,
        "resets_.ask(t, valid_)",
        "resets_.ask(step > p.steps.step0 ? t - walk.pace : t, valid_)",
        "plain",
        WRONG,
        (SCATTER_RESET,),
    ),
}
