"""What torch.nn has no argument for: lengths without packing, and states that are reset inside the loop.

python examples/lengths_and_resets.py
"""

import torch

import fused_rnn


def main() -> None:
    gru = fused_rnn.GRU(16, 32)
    x = torch.randn(100, 4, 16)  # [T, B, D]

    # Ragged sequences, in any order. Outputs past the end are zero; h_n is the state at each sequence's own last step.
    lengths = torch.tensor([100, 37, 1, 64])
    y, h_n = gru(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(h_n[0, b], y[length - 1, b])
        assert not y[length:, b].any()

    # Episodes that end inside a rollout: reset[t, b] makes the state that enters step t zero.
    reset = torch.zeros(100, 4, dtype=torch.bool)
    reset[40, 2] = True
    y, _ = gru(x, reset=reset)
    alone, _ = gru(x[40:, 2:3])
    torch.testing.assert_close(y[40:, 2:3], alone)
    print("lengths and resets do what they say")


if __name__ == "__main__":
    main()
