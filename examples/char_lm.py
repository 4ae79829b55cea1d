"""Train a character model with torch.nn.LSTM, swap one line, train it again: the same losses, in less time.

    python examples/char_lm.py

`python -m fused_rnn demo` is the same with a progress bar, a GRU, generated text and a plot; the model and the training
step are in fused_rnn/commands/demo/char_lm.py.
"""

from itertools import islice
from statistics import median

import torch

import fused_rnn
from fused_rnn.commands.demo.char_lm import Characters, CharLM, Trainee, corpus, generate, windows


def train(rnn: type[torch.nn.Module], text: str, steps: int) -> Trainee:
    characters = Characters(text)
    torch.manual_seed(0)
    trainee = Trainee(CharLM(rnn, len(characters)))
    for window in islice(windows(characters.encode(text)), steps):
        trainee.step(*window)
    return trainee


def main(steps: int = 20) -> None:
    text = corpus()
    for rnn in (torch.nn.LSTM, fused_rnn.LSTM):  # the one-line swap
        trainee = train(rnn, text, steps)
        name = f"{rnn.__module__.split('.')[0]}.{rnn.__name__}"
        print(f"{name:<16} loss {trainee.losses[-1]:.4f}   {1e3 * median(trainee.seconds):.0f} ms a step")
    print(generate(trainee.model, Characters(text), "def ", 100))


if __name__ == "__main__":
    main()
