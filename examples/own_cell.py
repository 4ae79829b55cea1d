"""A cell of your own: an LSTM with peepholes in six lines, trained as FlexRNN and by a Python loop over the same lines.

    python examples/own_cell.py

Both train the same character model on Python's own source, from the same seed. The losses coincide; the times do not.
"""

import time
from itertools import islice
from typing import Any

import torch
from text import Characters, corpus
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

HIDDEN, BATCH, LENGTH = 96, 8, 64


@fused_rnn.cell(gates=4, states=("h", "c"), params=("p_i", "p_f", "p_o"))
def peephole_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Gers and Schmidhuber 2000: the gates see the cell state, the last one the new one."""
    i = torch.sigmoid(x[0] + r[0] + p.p_i * s.c)
    f = torch.sigmoid(x[1] + r[1] + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x[2] + r[2])
    o = torch.sigmoid(x[3] + r[3] + p.p_o * c)
    return o * torch.tanh(c), c


def looped(rnn: fused_rnn.FlexRNN, x: Tensor) -> Tensor:
    """What FlexRNN stands in for: the same step on the same weights, called in a loop over time."""
    sides = F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0)  # the product with W_ih, at once for all steps
    h = c = x.new_zeros(x.shape[1], HIDDEN)
    params = {"p_i": rnn.p_i_l0, "p_f": rnn.p_f_l0, "p_o": rnn.p_o_l0}
    outputs = []
    for side in sides:
        recurrent = F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)
        h, c = rnn.cell(side.chunk(4, -1), recurrent.chunk(4, -1), (h, c), params)
        outputs.append(h)
    return torch.stack(outputs)


class CharModel(nn.Module):
    """Embedding → the cell → the next character's logits."""

    def __init__(self, symbols: int, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, HIDDEN)
        self.rnn = fused_rnn.FlexRNN(peephole_lstm, HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, symbols)
        self.fused = fused

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        return self.head(self.rnn(x)[0] if self.fused else looped(self.rnn, x))


def train(fused: bool, codes: Tensor, symbols: int, steps: int) -> tuple[list[float], float]:
    """The losses, and the seconds of the median step."""
    torch.manual_seed(0)
    model = CharModel(symbols, fused)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses, seconds = [], []
    columns = codes[: len(codes) // BATCH * BATCH].view(BATCH, -1).t()
    for start in islice(range(0, len(columns) - LENGTH, LENGTH), steps):
        window = columns[start : start + LENGTH + 1]
        began = time.perf_counter()
        loss = F.cross_entropy(model(window[:-1]).flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    return losses, sorted(seconds)[len(seconds) // 2]


def main(steps: int = 150) -> None:
    torch.set_num_threads(1)  # what the loop does a step is too little for more
    characters = Characters()
    codes = characters.encode(corpus()[0][:400_000])
    found = {}
    for name, fused in (("loop", False), ("FlexRNN", True)):
        losses, seconds = found[name] = train(fused, codes, len(characters), steps)
        print(f"{name:<8} loss {losses[0]:.4f} → {losses[-1]:.4f}   {1e3 * seconds:.1f} ms a step")
    (theirs, slow), (ours, fast) = found.values()
    apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"FlexRNN is {slow / fast:.1f} times as fast; the losses differ by {apart:.1e} at most")
    assert apart < 1e-2


if __name__ == "__main__":
    main()
