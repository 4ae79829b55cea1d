"""What bf16 and int8 weights cost in accuracy, on a real sequence: the table of docs/streaming.md, as Markdown.

Trains the character model of examples/text.py (two layers of 256) for some steps, then streams held-out text through
it: the error of the last layer's output against the stream of float32 weights, as the root of its mean square over that
of the output and at its largest, and the loss of the model on that text.

    python scripts/stream_accuracy.py [--steps 150] [--characters 20000]
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import fused_rnn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from side_by_side import Side
from text import RATE, Characters, CharLM, Windows, corpus, loss_of


def rows(cell: str, steps: int, length: int) -> list[str]:
    characters = Characters()
    read, held_out = (characters.encode(text) for text in corpus())
    windows, held_out = Windows(read), held_out[: length + 1]
    torch.manual_seed(0)
    side = Side(CharLM(getattr(fused_rnn, cell), len(characters)), RATE)
    for step in range(steps):
        side.step(lambda model, step, state: loss_of(model, *windows[step], state), step, RATE)
    model = side.model.eval()
    found = []
    with torch.no_grad():
        x = model.embed(held_out[:-1, None])
        exact = model.rnn.stream().steps(x)
        for weights in (None, "bf16", "int8"):
            y = model.rnn.stream(weights=weights).steps(x)
            loss = F.cross_entropy(model.head(y)[:, 0], held_out[1:])
            off = y - exact
            relative = off.square().mean().sqrt() / exact.square().mean().sqrt()
            entries = (weights or "float32", f"{relative:.1e}", f"{off.abs().max():.1e}", f"{loss:.4f}")
            found.append(f"| {cell} | " + " | ".join(entries) + " |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--characters", type=int, default=20_000)
    arguments = parser.parse_args()
    print("| | weights | error, relative | largest error | loss, nats a character |\n|---|---|---|---|---|")
    for cell in ("LSTM", "GRU"):
        print("\n".join(rows(cell, arguments.steps, arguments.characters)), flush=True)


if __name__ == "__main__":
    main()
