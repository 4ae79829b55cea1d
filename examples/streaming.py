"""Serve a recurrent network step by step: the numbers of the whole sequence, in less time than torch.nn's cell takes.

python examples/streaming.py
"""

import time

import torch

import fused_rnn


def main(steps: int = 500) -> None:
    torch.set_num_threads(1)
    lstm = fused_rnn.LSTM(128, 128).eval()
    cell = torch.nn.LSTMCell(128, 128)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x = torch.randn(steps, 1, 128)  # what would come from a microphone, an environment, a market

    with torch.no_grad():
        state, start = None, time.perf_counter()
        for x_t in x:
            state = cell(x_t, state)
        torchs = time.perf_counter() - start

        stream = lstm.stream()
        start = time.perf_counter()
        outputs = [stream.step(x_t) for x_t in x]
        ours = time.perf_counter() - start
        assert torch.equal(torch.stack(outputs), lstm(x)[0])  # the same numbers as one call on all steps

    print(f"torch.nn.LSTMCell {1e6 * torchs / steps:.1f} µs a step, stream {1e6 * ours / steps:.1f} µs")

    # Two sequences side by side; the second begins anew. The first goes on where it was.
    two = lstm.stream(batch_size=2)
    two.step(torch.randn(2, 128))
    two.reset(torch.tensor([False, True]))
    assert not two.state[0][:, 1].any()
    assert two.state[0][:, 0].any()


if __name__ == "__main__":
    main()
