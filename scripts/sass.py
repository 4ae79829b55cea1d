"""Machine code of sm_90, read and run: which instructions one thread executes, and when one warp issues them.

`listing` reads what `cuobjdump -sass` prints of one kernel, with the control bits of each instruction: the cycles until
the next one may issue, the scoreboards that it sets, and those that it waits for. A `Thread` computes integers and
predicates as the hardware does, reads zeros from memory but for counters, which stand high enough for every wait, and
takes every float for zero: enough to know which way it branches, since loops branch on sizes. `issue` gives each
instruction of its path a cycle: fixed latencies are in the code, the others in LATENCY. One warp alone: what warps take
from each other is not in it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

WORD, LONG = (1 << 32) - 1, (1 << 64) - 1
SCOREBOARDS = 6
ALL = tuple(range(SCOREBOARDS))
L2 = 270
# Cycles until what an instruction sets its scoreboard for is there, to 20 %. Of loads, `issue` is told.
LATENCY = {"LDS.128": 36, "LDS": 30, "LDC": 30, "S2R": 25, "S2UR": 30, "MUFU": 23, "SYNCS": 28, "STS": 12, "STG": 12}
LATENCY |= {
    "STAS": 14,
    "POPC": 20,
    "I2F": 20,
    "F2I": 20,
    "LDGDEPBAR": L2,
    "LDG.E.STRONG.GPU": L2,
    "LDG.E.128.STRONG.GPU": L2,
}
OTHER_LATENCY, READ_LATENCY = 25, 12
# Cycles that the warp stands still: until all threads have come; until L2 has what the thread has stored.
STANDSTILL = {"BAR.SYNC": 25, "MEMBAR.ALL.GPU": L2}


class Instruction(NamedTuple):
    at: int
    guard: str  # "", P0, !UP1: executed where it holds
    name: str  # LDG.E.U16
    operands: tuple[str, ...]
    stall: int  # cycles until the next instruction may issue
    sets: int | None  # scoreboard that is released when the result is there
    reads: int | None  # and when the operands have been read
    waits: tuple[int, ...]  # scoreboards that must be released before it issues

    def __str__(self) -> str:
        return f"{self.at:05x} {self.name} {', '.join(self.operands)}"


Listing = dict[int, Instruction]
LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/")


@lru_cache(maxsize=8)  # the same kernel is run by several teams
def listing(text: str) -> Listing:
    """The instructions of one function, by their addresses."""
    found = {}
    for at, code, high in LINE.findall(text):
        control = int(high, 16) >> 41
        guard, body = re.fullmatch(r"(?:@(\S+)\s+)?(.*)", code).groups("")  # type: ignore[union-attr]
        name, _, rest = body.partition(" ")
        sets, reads, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        if name.startswith("DEPBAR"):  # waits for a scoreboard by its operand, too
            waits |= sum(1 << int(i) for i in re.findall(r"SB(\d)", rest))
        found[int(at, 16)] = Instruction(
            int(at, 16),
            guard,
            name,
            tuple(part.strip().removesuffix(".reuse") for part in rest.split(",")) if rest.strip() else (),
            control & 15,
            sets if sets < SCOREBOARDS else None,
            reads if reads < SCOREBOARDS else None,
            tuple(i for i in ALL if waits >> i & 1),
        )
    return found


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def as_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def round_up(value: int) -> int:
    """The bits of the least float32 that is not below."""
    bits = as_bits(float(value))
    return bits if as_float(bits) >= value else bits + 1


def look_up(table: int, a: int, b: int, c: int) -> int:
    """Bit by bit."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


# Memory, and what threads do together: no result. Floats and loads: a result of zero.
NO_RESULT = {"STG", "STS", "STAS", "STL", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "LDGSTS"}
NO_RESULT |= {"MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "FENCE", "NANOSLEEP", "REDG", "UCGABAR_ARV", "UCGABAR_WAIT"}
ZERO = {"LDG", "LDS", "LDL", "LDSM", "FADD", "FMUL", "FFMA", "FSEL", "HADD2", "HMMA", "F2FP", "MUFU", "CS2R"}
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b,
    "OR": lambda a, b: a or b,
    "XOR": lambda a, b: a != b,
}


def is_look(name: str) -> bool:
    """At a counter in L2."""
    return name.startswith("LDG.E.STRONG")


def is_load(name: str) -> bool:
    """Of a kernel's input; not of what its team's members have written."""
    return name.startswith("LDG.") and "STRONG" not in name


class Thread:
    """Thread 0 of CTA 0; constants: the bank that launches fill, sizes of the launch first."""

    def __init__(self, code: Listing, constants: bytes) -> None:
        self.code, self.constants = code, constants
        self.registers: dict[str, int] = {}
        self.predicates: dict[str, bool] = {}

    def trace(self, most: int = 1_000_000) -> Iterator[tuple[Instruction, bool]]:
        """The instructions that it meets, in order, and whether their guard held: they issue where it did not, too."""
        order = sorted(self.code)
        after = dict(pairwise(order))
        at = order[0]
        for _ in range(most):
            instruction = self.code[at]
            executed = not instruction.guard or self.truth(instruction.guard)
            yield instruction, executed
            at = after.get(at, -1)
            if not executed or instruction.name == "BRA.DIV":  # the threads of a warp diverge nowhere here
                continue
            if instruction.name == "EXIT":
                return
            if instruction.name.split(".")[0] != "BRA":
                self.execute(instruction)
            elif all(self.truth(operand) for operand in instruction.operands[:-1]):
                at = int(instruction.operands[-1], 16)
        raise RuntimeError(f"more than {most} instructions")

    # Operands

    def truth(self, name: str) -> bool:
        if name.startswith("!"):
            return not self.truth(name[1:])
        return name in ("PT", "UPT") or self.predicates.get(name, False)

    def value(self, operand: str) -> int:
        if operand[0] in "-~":
            inverse = ~self.value(operand[1:]) & WORD
            return inverse if operand[0] == "~" else inverse + 1  # not masked: where it carries, adding it does
        if operand.startswith("|"):
            return abs(signed(self.value(operand.strip("|"))))
        if operand.startswith("c["):
            return self.constant(operand, 4)
        if re.fullmatch(r"U?R(\d+|Z)", operand):
            return self.registers.get(operand, 0)
        return int(operand, 16) & WORD

    def constant(self, operand: str, size: int) -> int:
        if not operand.startswith("c[0x0]"):
            return 0  # another bank: where the module's own data are
        inside = re.fullmatch(r"c\[0x0\]\[(?:(R\d+|RZ|UR\d+)\+?)?(?:(0x[0-9a-f]+))?\]", operand)
        if inside is None:
            raise ValueError(f"a constant: {operand}")
        at = (self.value(inside[1]) if inside[1] else 0) + int(inside[2] or "0", 16)
        return int.from_bytes(self.constants[at : at + size], "little")

    @staticmethod
    def above(name: str) -> str:
        """The register of the upper half."""
        head, digits = re.fullmatch(r"(U?R)(\d+|Z)", name).groups()  # type: ignore[union-attr]
        return name if digits == "Z" else f"{head}{int(digits) + 1}"

    def pair(self, operand: str) -> int:
        """64 bits in two registers."""
        if operand.startswith("-"):
            return -self.pair(operand[1:]) & LONG
        if operand.startswith("c["):
            return self.constant(operand, 8)
        return self.value(operand) | (self.value(self.above(operand)) << 32)

    def put(self, name: str, value: int) -> None:
        if not name.endswith("RZ"):
            self.registers[name] = value & WORD

    def put_pair(self, name: str, value: int) -> None:
        self.put(name, value)
        self.put(self.above(name), value >> 32)

    def put_predicate(self, name: str, value: bool) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = value

    # Instructions

    def execute(self, instruction: Instruction) -> None:
        name, *kinds = instruction.name.split(".")
        if name in NO_RESULT:
            return
        if name in ZERO and "RCP" not in kinds:
            to = instruction.operands[0]
            if is_look(instruction.name):
                return self.put(to, WORD >> 1)  # all peers have been counted in
            for _ in range({"64": 2, "128": 4}.get(kinds[-1] if kinds else "", 2 if name == "CS2R" else 1)):
                self.put(to, 0)
                to = self.above(to)
            return
        if not hasattr(self, f"do_{name.removeprefix('U').lower()}"):
            raise NotImplementedError(f"an instruction that scripts/sass.py does not know: {instruction}")
        getattr(self, f"do_{name.removeprefix('U').lower()}")(kinds, *instruction.operands)

    def sources(self, operands: Iterable[str]) -> tuple[list[str], list[str]]:
        """Registers and numbers; predicates."""
        numbers: list[str] = []
        predicates: list[str] = []
        for name in operands:
            (predicates if re.fullmatch(r"!?U?P(\d|T)", name) else numbers).append(name)
        return numbers, predicates

    def total(self, values: Iterable[int], kinds: list[str], operands: tuple[str, ...]) -> None:
        """Their sum to operands[0], its carry to the predicate behind it; .X adds the carries that come last."""
        carries = self.sources(operands[2:])[1] if "X" in kinds else []
        whole = sum(values) + sum(self.truth(name) for name in carries)
        self.put(operands[0], whole)
        if re.fullmatch(r"U?P\d", operands[1]):
            self.put_predicate(operands[1], whole >> 32 != 0)

    def do_iadd3(self, kinds: list[str], *operands: str) -> None:
        numbers, _ = self.sources(operands[1:])
        self.total((self.value(name) for name in numbers), kinds, operands)

    def do_viadd(self, kinds: list[str], to: str, a: str, b: str) -> None:
        self.put(to, self.value(a) + self.value(b))

    def do_imad(self, kinds: list[str], to: str, a: str, b: str, c: str, carry: str = "!PT") -> None:
        unsigned = "U32" in kinds
        if "WIDE" in kinds or "HI" in kinds:
            left, right = (self.value(x) & WORD if unsigned else signed(self.value(x) & WORD) for x in (a, b))
            whole = left * right + self.pair(c)
            if "HI" in kinds:
                self.put(to, whole >> 32)
            else:
                self.put_pair(to, whole)
        else:
            self.put(to, self.value(a) * self.value(b) + self.value(c) + ("X" in kinds and self.truth(carry)))

    def do_lea(self, kinds: list[str], *operands: str) -> None:
        numbers, _ = self.sources(operands[1:])
        a, b, *upper, shift = numbers
        wide = self.value(a) & WORD
        if "SX32" in kinds:
            wide = signed(wide)
        elif upper:
            wide |= (self.value(upper[0]) & WORD) << 32
        moved = (wide << int(shift, 16)) >> (32 if "HI" in kinds else 0)
        self.total((moved & WORD, self.value(b)), kinds, operands)

    def do_lop3(self, kinds: list[str], *operands: str) -> None:
        numbers, predicates = self.sources(operands)
        to, a, b, c, table = numbers
        result = look_up(int(table, 16), self.value(a), self.value(b), self.value(c))
        self.put(to, result)
        if len(predicates) > 1:
            self.put_predicate(predicates[0], result != 0 or self.truth(predicates[-1]))

    def do_plop3(self, kinds: list[str], to: str, other: str, a: str, b: str, c: str, table: str, table2: str) -> None:
        for predicate, entries in ((to, table), (other, table2)):
            result = look_up(int(entries, 16), self.truth(a), self.truth(b), self.truth(c))
            self.put_predicate(predicate, bool(result & 1))

    def do_isetp(self, kinds: list[str], to: str, other: str, a: str, b: str, *predicates: str) -> None:
        left, right = (self.value(x) & WORD for x in (a, b))
        if "U32" not in kinds:
            left, right = signed(left), signed(right)
        holds = COMPARE[kinds[0]](left, right)
        if "EX" in kinds and left == right:  # the lower halves decide
            holds = self.truth(predicates[1])
        combine = COMBINE[next(kind for kind in kinds if kind in COMBINE)]
        before = self.truth(predicates[0])
        self.put_predicate(to, combine(holds, before))
        self.put_predicate(other, combine(not holds, before))

    def do_fsetp(self, kinds: list[str], to: str, other: str, *_: str) -> None:
        self.put_predicate(to, False)

    def do_shfl(self, kinds: list[str], *operands: str) -> None:
        """Of this thread's own lane."""
        numbers, predicates = self.sources(operands)
        self.put(numbers[0], self.value(numbers[1]))
        self.put_predicate(predicates[0], True)

    def do_sel(self, kinds: list[str], to: str, a: str, b: str, choice: str) -> None:
        self.put(to, self.value(a if self.truth(choice) else b))

    def do_shf(self, kinds: list[str], to: str, a: str, shift: str, c: str) -> None:
        by = min(self.value(shift) & WORD, 63)
        low, high = self.value(a) & WORD, self.value(c) & WORD
        if kinds[0] == "L":
            self.put(to, ((high << 32 | low) << by) >> 32 if "HI" in kinds else low << by)
        elif "HI" in kinds:
            self.put(to, (signed(high) if "S32" in kinds else high) >> by)
        else:
            self.put(to, (high << 32 | low) >> by)

    def do_prmt(self, kinds: list[str], to: str, a: str, choice: str, c: str) -> None:
        whole = (self.value(a) & WORD) | (self.value(c) & WORD) << 32
        picked = self.value(choice)
        self.put(to, sum((whole >> 8 * (picked >> 4 * i & 7) & 255) << 8 * i for i in range(4)))

    def do_vimnmx(self, kinds: list[str], to: str, a: str, b: str, least: str) -> None:
        choose = min if self.truth(least) else max
        self.put(to, choose(signed(self.value(a) & WORD), signed(self.value(b) & WORD)))

    def do_viaddmnmx(self, kinds: list[str], to: str, a: str, b: str, c: str, least: str) -> None:
        choose = min if self.truth(least) else max
        self.put(to, choose(signed((self.value(a) + self.value(b)) & WORD), signed(self.value(c) & WORD)))

    def do_iabs(self, kinds: list[str], to: str, a: str) -> None:
        self.put(to, abs(signed(self.value(a) & WORD)))

    def do_mov(self, kinds: list[str], to: str, a: str) -> None:
        self.put(to, self.value(a))

    def do_r2ur(self, kinds: list[str], *operands: str) -> None:
        self.put(operands[-2], self.value(operands[-1]))

    def do_s2r(self, kinds: list[str], to: str, special: str) -> None:
        self.put(to, 0)  # every index of the first thread

    def do_s2ur(self, kinds: list[str], to: str, special: str) -> None:
        self.put(to, 0)

    def do_ldc(self, kinds: list[str], to: str, operand: str) -> None:
        if "64" in kinds:
            self.put_pair(to, self.constant(operand, 8))
        else:
            self.put(to, self.constant(operand, 1 if "U8" in kinds else 4))

    def do_hfma2(self, kinds: list[str], to: str, a: str, b: str, high: str, low: str) -> None:
        self.put(to, int.from_bytes(struct.pack("<ee", float(low), float(high)), "little"))  # a constant

    def do_i2f(self, kinds: list[str], to: str, a: str) -> None:
        whole = self.value(a) & WORD
        self.put(to, round_up(whole if "U32" in kinds else signed(whole)))

    def do_mufu(self, kinds: list[str], to: str, a: str) -> None:
        value = as_float(self.value(a))
        self.put(to, as_bits(1 / value if value else math.inf))

    def do_f2i(self, kinds: list[str], to: str, a: str) -> None:
        value = as_float(self.value(a))
        self.put(to, int(value) if math.isfinite(value) else WORD)

    def do_popc(self, kinds: list[str], to: str, a: str) -> None:
        self.put(to, bin(self.value(a) & WORD).count("1"))

    def do_flo(self, kinds: list[str], to: str, a: str) -> None:
        self.put(to, (self.value(a) & WORD).bit_length() - 1)

    def do_p2r(self, kinds: list[str], to: str, all_of_them: str, a: str, mask: str) -> None:
        packed = sum(self.predicates.get(f"P{i}", False) << i for i in range(7))
        self.put(to, (self.value(a) & ~int(mask, 16)) | (packed & int(mask, 16)))

    def do_voteu(self, kinds: list[str], *operands: str) -> None:
        self.do_vote(kinds, *operands)

    def do_vote(self, kinds: list[str], to: str, *operands: str) -> None:
        agreed = self.truth(operands[-1])
        if re.fullmatch(r"U?P\d", to):
            self.put_predicate(to, agreed)
        else:
            self.put(to, int(agreed))

    def do_syncs(self, kinds: list[str], to: str, *_: str) -> None:
        if "TRYWAIT" in kinds:
            self.put_predicate(to, True)  # the phase is complete


def latency(name: str, memory: int) -> int:
    if is_load(name):
        return memory
    return next((LATENCY[kind] for kind in LATENCY if kind in (name, name.split(".")[0])), OTHER_LATENCY)


class Issued(NamedTuple):
    instruction: Instruction
    executed: bool
    cycle: int
    waited: int  # cycles, for scoreboards
    loads: tuple[int, ...]  # of global memory that it waited for: their places in the trace


def issue(trace: Iterable[tuple[Instruction, bool]], memory: int) -> list[Issued]:
    """When one warp issues them; memory: cycles of a load from global memory."""
    found: list[Issued] = []
    free = [0] * SCOREBOARDS  # when each is released
    loads: list[list[int]] = [[] for _ in ALL]  # that have set it since it was last waited for
    now = 0
    for place, (instruction, executed) in enumerate(trace):
        ready = max([now, *(free[i] for i in instruction.waits)])
        waited_for = tuple(load for i in instruction.waits for load in loads[i])
        for i in instruction.waits:
            loads[i] = []
        found.append(Issued(instruction, executed, ready, ready - now, waited_for))
        if executed:
            if instruction.sets is not None:
                free[instruction.sets] = max(free[instruction.sets], ready + latency(instruction.name, memory))
                if is_load(instruction.name):
                    loads[instruction.sets].append(place)
            if instruction.reads is not None:
                free[instruction.reads] = max(free[instruction.reads], ready + READ_LATENCY)
            ready += next((cycles for name, cycles in STANDSTILL.items() if instruction.name.startswith(name)), 0)
        now = ready + max(instruction.stall, 1)
    return found
