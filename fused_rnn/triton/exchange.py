"""How a team of programs shares a step's result: by one counter per recurrence and batch tile, which only grows.

Every step has its own place in y or dgates, so nothing is ever overwritten, and one counter is all the synchronisation
there is: a program that has stored its part of a step adds one; who needs the whole step waits until all of the team
have. The counters order memory and carry no data: no gradient is made by an atomic.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter, LANES: tl.constexpr):
    """Publish everything this program stored. counter: int32*. LANES: the program's on AMD; 0 elsewhere."""
    if LANES > 0:
        # AMD's barrier waits for no store; a release waits for its own wave's. So one lane of every wave releases, by
        # adding nothing to a word that nobody reads. A wave has 64 lanes or 32.
        lane = tl.arange(0, LANES)
        tl.atomic_add(counter + 1 + lane * 0, 0, mask=lane % 32 == 0, sem="release", scope="gpu")
    tl.debug_barrier()  # all threads' stores, before one thread's release stands for them
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target):
    """Return when `target` arrivals have been counted; what those programs stored is visible from here on."""
    # An atomic, not a volatile load: one thread polls and acquires, and what it read reaches the others through a
    # barrier, so that no thread can leave the loop before another.
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
