"""The one-line swap: the same arguments, state_dict, results and gradients as torch.nn.

python examples/swap.py
"""

import torch
from torch import nn

import fused_rnn


def main() -> None:
    theirs = nn.LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)
    ours = fused_rnn.LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)  # <- the swap
    ours.load_state_dict(theirs.state_dict())  # a checkpoint of one loads into the other

    x = torch.randn(8, 50, 64)  # [B, T, D]
    for name, layer in (("torch.nn", theirs), ("fused_rnn", ours)):
        y, (h_n, c_n) = layer(x)
        y.square().mean().backward()
        gradient = layer.weight_hh_l0.grad.norm()
        print(f"{name:<9}  y {tuple(y.shape)}  h_n {tuple(h_n.shape)}  c_n {tuple(c_n.shape)}  |dW_hh| {gradient:.6f}")


if __name__ == "__main__":
    main()
