"""The recurrent core of DreamerV3 as TorchRL has it, by a cell of one's own: its parameters stay, the loop is ours.

    pip install 'fused_rnn[integrations]'
    python examples/dreamer.py

The core is a norm, a product and a norm again between one state and the next: three stages of a step, with matrices of
the cell's own. Both are trained for some steps from the same weights; the losses coincide, the times do not.
"""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

BATCH, LENGTH, INPUT, HIDDEN, BLOCKS = 8, 64, 48, 128, 8
EPSILON = 1e-4


@fused_rnn.cell(
    gates=2,
    params=("gain_h", "gain_d", "bias_r", "bias_n", "bias_z"),
    matrices={"dynamics": (1, "H"), "gates": (3, "H")},
)
def dreamer_core(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """Hafner et al. 2023: the state's own projection, a block-linear layer of all that is known, and a GRU's gates."""

    def normed(v: Any, gain: Any) -> Any:
        return F.silu(F.rms_norm(v, v.shape[-1:], gain, EPSILON))

    projected = normed(x[0] + r[0], p.gain_h)
    reset, n, z = m.gates(normed(x[1] + r[1] + m.dynamics(projected), p.gain_d))
    n = torch.tanh(torch.sigmoid(reset + p.bias_r) * (n + p.bias_n))
    z = torch.sigmoid(z + p.bias_z - 1)
    return z * n + (1 - z) * s.h


class FusedCore(nn.Module):
    """A DreamerV3BlockGRU of one layer, its projections H wide: called as that, on its own parameters."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        cell = theirs.cell
        if cell.projection_size != cell.hidden_size or cell.num_layers != 1 or not isinstance(cell.activation, nn.SiLU):
            raise ValueError("theirs: expected projection_size = hidden_size, num_layers = 1 and SiLU")
        self.theirs = theirs
        self.rnn = fused_rnn.FlexRNN(dreamer_core, cell.hidden_size, cell.hidden_size, device="meta")
        for name in list(self.rnn._parameters):
            self.rnn._parameters[name].requires_grad_(False)  # stand-ins, which nobody trains

    def weights(self) -> dict[str, Tensor]:
        """The cell's weights, made of theirs: blocks as the matrix that they stand for."""
        cell, hidden = self.theirs.cell, self.theirs.cell.hidden_size
        units = hidden // cell.num_blocks
        layer, gates = cell.dynamic_linears[0], cell.gates.weight.unflatten(2, (3, units))
        own, of_input, of_state = layer.weight.transpose(1, 2).split((units, hidden, hidden), 2)
        blocks = [torch.block_diag(*gates[:, :, g].transpose(1, 2)) for g in range(3)]
        biases = cell.gates.bias.unflatten(0, (cell.num_blocks, 3, units)).transpose(0, 1).flatten(1)
        zeros = torch.zeros_like(cell.hidden_linear.weight)
        return {
            "weight_ih_l0": torch.cat([zeros, of_input.flatten(0, 1)]),
            "weight_hh_l0": torch.cat([cell.hidden_linear.weight, torch.block_diag(*own)]),
            "bias_ih_l0": torch.cat([cell.hidden_linear.bias, layer.bias]),
            "bias_hh_l0": torch.zeros(2 * hidden, device=layer.bias.device),
            "dynamics_l0": of_state.flatten(0, 1),
            "gates_l0": torch.cat(blocks),
            "gain_h_l0": cell.hidden_norm.weight,
            "gain_d_l0": cell.dynamic_norms[0].weight,
            "bias_r_l0": biases[0],
            "bias_n_l0": biases[1],
            "bias_z_l0": biases[2],
        }

    def forward(self, x: Tensor, hidden: Tensor | None = None, is_init: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] → the states [B, T, H], and the last one."""
        projected = self.theirs.cell._project_input(x).transpose(0, 1)
        hx = None if hidden is None else hidden.unsqueeze(0)
        reset = None if is_init is None else is_init.reshape(x.shape[:2]).T
        y, last = torch.func.functional_call(self.rnn, self.weights(), (projected, hx), {"reset": reset})
        return y.transpose(0, 1), last[0]


def train(core: nn.Module, steps: int) -> tuple[list[float], float]:
    """The losses of predicting a moving average, and seconds a step."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(core.parameters(), lr=1e-3)
    losses, seconds = [], []
    for _ in range(steps):
        x, is_init = torch.randn(BATCH, LENGTH, INPUT), torch.rand(BATCH, LENGTH) < 0.02
        start = time.perf_counter()
        y, _ = core(x, None, is_init)
        loss = F.mse_loss(y[..., :INPUT], x.cumsum(1) / 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, sorted(seconds)[len(seconds) // 2]


def main() -> None:
    """Train both, and print losses and times."""
    try:
        from torchrl.modules import DreamerV3BlockGRU
    except ImportError as error:
        raise SystemExit(f"examples/dreamer.py: {error}; pip install 'fused_rnn[integrations]'") from None
    torch.manual_seed(0)
    theirs = DreamerV3BlockGRU(INPUT, HIDDEN, projection_size=HIDDEN, num_blocks=BLOCKS)
    ours = FusedCore(copy.deepcopy(theirs))
    (before, slow), (after, fast) = train(theirs, 20), train(ours, 20)
    print(f"{'step':>4}  {'TorchRL':>9}  {'fused_rnn':>9}")
    for k in range(0, len(before), 5):
        print(f"{k:>4}  {before[k]:>9.5f}  {after[k]:>9.5f}")
    apart = max(abs(a - b) / a for a, b in zip(before, after, strict=True))
    print(f"losses apart by at most {apart:.1e}")
    print(f"a step takes {1e3 * slow:.1f} ms by TorchRL, {1e3 * fast:.1f} ms by ours: {slow / fast:.1f} times as fast")


if __name__ == "__main__":
    main()
