"""How often a step waits for memory: read from the machine code of a kernel with a resident W_hh."""

from __future__ import annotations

import re

# As cuobjdump prints an instruction: name, operands, the upper half of its bits.
LINE = re.compile(
    r"/\*[0-9a-f]{4,6}\*/\s+(?:@\S+\s+)?(\S+)\s*([^;]*);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)
SCOREBOARDS = range(6)


def trips(sass: str) -> int:
    """Loads of a product's left side that are asked for one after the other: the longest chain; 1 if all are at once.

    They stand between the wait for the team, whose acquire drops what L1 holds (CCTL.IVALL), and the last product, and
    are the only ones there that L1 is not asked for (.STRONG). A load sets a scoreboard; who reads the result waits for
    it, and with it for all other loads that have set the same.
    """
    code = [(name, operands, int(bits, 16) >> 41) for name, operands, bits in LINE.findall(sass)]
    names = [name for name, *_ in code]
    if "CCTL.IVALL" not in names:
        raise ValueError("no team is waited for")
    last = max(place for place, name in enumerate(names) if name.startswith("HMMA"))
    under_way = [0 for _ in SCOREBOARDS]  # of the loads that have set it, the longest chain
    come = longest = 0
    for name, operands, control in code[names.index("CCTL.IVALL") : last]:
        for board in SCOREBOARDS:
            if control >> 11 + board & 1 or (name.startswith("DEPBAR") and f"SB{board}" in operands):
                come, under_way[board] = max(come, under_way[board]), 0
        if name.startswith("LDG.") and ".STRONG" in name:
            longest = max(longest, come + 1)
            under_way[control >> 5 & 7] = come + 1
    return longest
