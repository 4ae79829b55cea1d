"""BlockGRU of eight blocks on the CPU beside a Python loop over its step, whose blocks torch.bmm multiplies.

python benchmarks/block_gru.py writes benchmarks/results/cpu/block-gru-1t.md. Both ways run in one process, on one
thread, and take turns; what counts is the time that the thread had a core, as medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import fused_rnn
from fused_rnn import _C
from fused_rnn.commands.machine import describe
from fused_rnn.nn.field.block_gru import EPSILON, UPDATE

BLOCKS, STEPS = 8, 64
SIZES = [(H, B) for H in (256, 512, 1024) for B in (1, 16)]
RESULTS = Path(__file__).parent / "results" / "cpu" / "block-gru-1t.md"


def loop(module: fused_rnn.BlockGRU, x: Tensor) -> Tensor:
    """The same as `module(x)[0]`, of one layer."""
    (T, B, _), H = x.shape, module.hidden_size
    units, w = H // BLOCKS, module.weight_hh_l0.transpose(1, 2)
    of_input = linear(x, module.weight_ih_l0, module.bias_ih_l0).view(T, B, 3, H)
    h, ys = x.new_zeros(B, H), []
    for t in range(T):
        product = torch.bmm(h.view(B, BLOCKS, units).transpose(0, 1), w).view(BLOCKS, B, 3, units)
        gates = (of_input[t] + product.permute(1, 2, 0, 3).reshape(B, 3, H)).flatten(1)
        r, n, z = layer_norm(gates, (3 * H,), module.gamma_l0, module.beta_l0, EPSILON).chunk(3, -1)
        h = h + torch.sigmoid(z + UPDATE) * (torch.tanh(torch.sigmoid(r) * n) - h)
        ys.append(h)
    return torch.stack(ys)


def share(H: int, B: int, training: bool, seconds: float) -> float:
    """The module's time over the loop's."""
    module, x = fused_rnn.BlockGRU(H, H, blocks=BLOCKS), torch.randn(STEPS, B, H)
    torch.testing.assert_close(module(x)[0], loop(module, x), rtol=1e-3, atol=1e-3)
    found: dict[bool, list[float]] = {True: [], False: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[True]) < 6:
        for ours in (True, False, False, True):
            start = time.thread_time()
            with torch.set_grad_enabled(training):
                y = module(x)[0] if ours else loop(module, x)
                if training:
                    y.sum().backward()
            found[ours].append(time.thread_time() - start)
    return statistics.median(found[True]) / statistics.median(found[False])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of each comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| D = H | B | forward | training |", "|---:|---:|---:|---:|"]
    for H, B in SIZES:
        times = [f"{share(H, B, training, options.seconds):.2f}" for training in (False, True)]
        lines.append(f"| {H} | {B} | {' | '.join(times)} |")
        print(lines[-1], flush=True)
    facts = describe("cpu")
    text = f"{facts['device_name']}, {_C.isa()}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}."
    title = f"# BlockGRU(blocks={BLOCKS}) as a share of a Python loop with torch.bmm: T = {STEPS}, one thread"
    RESULTS.write_text("\n".join([title, "", text, "", *lines, "", "`python benchmarks/block_gru.py`", ""]))
    print(RESULTS)


if __name__ == "__main__":
    main()
