"""The architectures that loops are planned for."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """What the planner must know of a GPU. shared: bytes of shared memory one program may take."""

    arch: str  # sm_90, gfx942; "interpreter"
    processors: int
    shared: int
    cooperative: bool = True  # all programs of a launch can be made resident at once

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


# Shared memory that a block can opt in to; processors of a usual card (a running device says its own).
ARCHITECTURES = {
    "sm_80": Target("sm_80", 108, 163 * KIB),
    "sm_86": Target("sm_86", 84, 99 * KIB),
    "sm_87": Target("sm_87", 16, 163 * KIB),
    "sm_89": Target("sm_89", 128, 99 * KIB),
    "sm_90": Target("sm_90", 132, 227 * KIB),
    "sm_100": Target("sm_100", 148, 227 * KIB),
    "sm_103": Target("sm_103", 148, 227 * KIB),
    "sm_120": Target("sm_120", 170, 99 * KIB),
    "sm_121": Target("sm_121", 48, 99 * KIB),
    "gfx90a": Target("gfx90a", 104, 64 * KIB),
    "gfx942": Target("gfx942", 304, 64 * KIB),
    "gfx950": Target("gfx950", 256, 160 * KIB),
}
INTERPRETER = Target("interpreter", 1 << 20, 1 << 40)
