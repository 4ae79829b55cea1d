"""The child process that makes the calls: an index a line comes in, an outcome a line goes out."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from contextlib import ExitStack
from typing import TextIO

from .generate import generate


def work(seed: int, plant: str | None, answers: TextIO) -> None:
    """Answer until there are no more indices. What the calls print goes to stderr, and so does a crash's trace."""
    faulthandler.enable()
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
    import torch

    from . import plants
    from .check import check

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # in the emulator too: torch's float32 here is float32
    with ExitStack() as emulating:
        if plant is not None:
            plants.plant(plant)
        emulated = False
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            call = generate(seed, int(line))
            if call.backend == "cuda" and not emulated:
                from emulated import on_the_emulator

                emulating.enter_context(on_the_emulator())
                emulated = True
            outcome = check(call)
            print(json.dumps(outcome._asdict()), file=answers, flush=True)
