"""Answer requests in a pool of processes, each with a stream of its own.

python examples/deploying/pool.py            workers are started anew, and load the checkpoint
python examples/deploying/pool.py --fork     workers are forked, and share the memory of what was loaded before
"""

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import fused_rnn

stream = None  # of this process


def load(checkpoint):
    global stream
    gru = fused_rnn.GRU(64, 128, num_layers=2)
    gru.load_state_dict(torch.load(checkpoint))
    stream = gru.eval().stream()


def start(checkpoint):
    """In each worker, once."""
    torch.set_num_threads(1)  # before anything else: torch's threads do not survive a fork
    if stream is None:
        load(checkpoint)


def answer(x):
    """A request: x [T, D] → y [T, H], arrays, from a state of zeros."""
    stream.reset()
    return stream.steps(torch.from_numpy(x)[:, None])[:, 0].numpy()


def main():
    method = "fork" if "--fork" in sys.argv else "spawn"
    gru = fused_rnn.GRU(64, 128, num_layers=2).eval()
    checkpoint = Path(tempfile.mkdtemp()) / "gru.pt"
    torch.save(gru.state_dict(), checkpoint)
    if method == "fork":
        load(checkpoint)  # once, in the parent

    requests = [np.random.randn(steps, 64).astype(np.float32) for steps in (10, 100, 35, 70)]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context, initializer=start, initargs=(checkpoint,)) as pool:
        answers = list(pool.map(answer, requests))

    with torch.no_grad():
        for x, y in zip(requests, answers, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), gru(torch.from_numpy(x)[:, None])[0][:, 0])
    print(f"{method}: {len(answers)} requests answered")


if __name__ == "__main__":
    main()
