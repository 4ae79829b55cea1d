"""Export to ONNX: our ops as ONNX's own LSTM, GRU and RNN nodes, which its runtimes have kernels for.

    torch.onnx.export(model, args, "model.onnx")

Every layer, both its directions, becomes one node, and so does a cell: any number of layers, with or without biases,
batch_first, initial states, `lengths` (ONNX's sequence_lens), projections; T and B may be dynamic. The dtype is float32
in practice: onnxruntime's kernels on a CPU know no other. Inference only. At export `reset` and an ensemble, for which
the nodes have no place, raise NotImplementedError, which torch.onnx reports as the cause of its own error.

A program that torch.export made before has our ops in it: `decompositions` says what they become.

Source: onnx.ai/onnx/operators: LSTM, GRU and RNN of opset 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.reference.loop import weights_per_recurrence

# ONNX's node for a cell, which of our gates stands in each of its places, and its other attributes.
_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i, o, f, g
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, n
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
_DIRECTIONS = {(1,): "forward", (-1,): "reverse", (1, -1): "bidirectional"}


NAME = "onnx"
DIFFERENTIABLE = False
stack = None


def is_exporting() -> bool:
    """Whether torch.onnx is making a model; not by its older exporter, which traces and knows no such nodes."""
    return torch.onnx.is_in_onnx_export() and not torch._C._is_tracing()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo takes torch's own for False


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our ops by ONNX's nodes, for a program of torch.export's:

    torch.onnx.export(program.run_decompositions(fused_rnn.onnx.decompositions()))
    """
    ours: dict[str, Callable[..., Any]] = {"forward": forward, "step": _step_op}
    ours |= {f"{backend}_forward": forward for backend in ("cuda", "triton")}
    there = torch.ops.fused_rnn  # all that this build has
    return {getattr(there, name).default: function for name, function in ours.items() if hasattr(there, name)}


def _step_op(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    cell: int,
) -> list[Tensor]:
    """fused_rnn::step by ONNX's node."""
    leading = x.shape[:-1]
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    h, c = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (h, c))
    y, *after = _sequence(x.reshape(1, prod(leading), x.shape[-1]), h, c, weights, list(CELLS)[cell])
    if len(leading) == 1:
        return [state.squeeze(0) for state in after]
    return [y.reshape(*leading, y.shape[-1]), *after]


def step(x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step, as of any backend, by ONNX's node."""
    return [state.squeeze(0) for state in _sequence(x.unsqueeze(0), h, c, weights, cell)[1:]]


def _sequence(x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """x [1, B, D], h [B, P], c [B, H] → y and the states after it."""
    h0, c0 = (None if t is None else t.unsqueeze(0) for t in (h, c))
    return forward(x, weights, h0, c0, None, None, cell, [1], "none", False)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
) -> list[Tensor]:
    """One layer by ONNX's node; arguments and result as those of the op fused_rnn::forward."""
    name, recurrences = _NODES[cell][0], len(directions)
    if reset is not None:
        raise NotImplementedError(f"reset: got a tensor, expected None: ONNX's {name} forgets nothing in a sequence")
    if tuple(directions) not in _DIRECTIONS or x.dim() != 3:
        raise NotImplementedError(
            f"directions: got {list(directions)}, expected {' or '.join(str(list(d)) for d in _DIRECTIONS)}"
            f" on one input: ONNX's {name} runs no ensemble"
        )
    if save != "none":
        raise NotImplementedError(f"save: got {save!r}, expected 'none': ONNX's {name} keeps nothing for a backward")
    each: list[list[Any]] = weights_per_recurrence(weights, recurrences)
    w_hr = [w[-1] for w in each if w[-1] is not None]
    if not w_hr:
        return _node(x, each, h0, c0, lengths, cell, directions)
    # A projection is none of ONNX's: its state is m, before the projection, and what it multiplies m by is W_hh W_hr.
    # That m_0 is not known, but h_0 = W_hr m_0 is: W_hh h_0 comes in as a further input, at the first step.
    if h0 is not None:
        entered = [_at_first_step(x, h, lengths, direction) for h, direction in zip(h0, directions, strict=True)]
        x = torch.cat([x, *entered], -1)
    inner = []
    for r, (w_ih, w_hh, b_ih, b_hh, w) in enumerate(each):
        if h0 is not None:
            zeros = torch.zeros_like(w_hh)
            w_ih = torch.cat([w_ih, *(w_hh if r == other else zeros for other in range(recurrences))], -1)
        inner.append((w_ih, w_hh @ w, b_ih, b_hh, None))
    m, m_n, c_n = _node(x, inner, None, c0, lengths, cell, directions)
    hidden = m.shape[-1] // recurrences
    y = torch.cat([m.narrow(-1, r * hidden, hidden) @ w.t() for r, w in enumerate(w_hr)], -1)
    h_n = torch.stack([m_n[r] @ w.t() for r, w in enumerate(w_hr)])
    if lengths is not None and h0 is not None:
        h_n = torch.where((lengths == 0).reshape(1, -1, 1), h0, h_n)
    return [y, h_n, c_n]


def _at_first_step(x: Tensor, h: Tensor, lengths: Tensor | None, direction: int) -> Tensor:
    """h [B, P] at the step where a direction begins, zeros elsewhere: [T, B, P]."""
    t = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    first = 0 if direction > 0 else x.shape[0] - 1 if lengths is None else lengths - 1
    return (t == first).unsqueeze(-1).to(h.dtype) * h


def _node(
    x: Tensor,
    weights: Sequence[Sequence[Any]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    directions: Sequence[int],
) -> list[Tensor]:
    """One layer without a projection: [y [T, B, R·H], h_n] and of an LSTM c_n."""
    name, order, attributes = _NODES[cell]
    (steps, batch), recurrences, states = x.shape[:2], len(directions), 1 + CELLS[cell].has_c
    hidden = weights[0][1].shape[1]

    def stacked(kind: int) -> Tensor:
        """One kind of the weights, [R, ...], its gates in ONNX's order."""
        each = [[w[kind].narrow(0, gate * hidden, hidden) for gate in order] for w in weights]
        # No split, of several results, and no view of all: the exporter's optimiser folds these into the weights.
        return torch.cat([torch.cat(gates).unsqueeze(0) for gates in each])

    biases = None if weights[0][2] is None else torch.cat([stacked(2), stacked(3)], 1)
    given = [h0, c0][:states]
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * recurrences}
    outputs = torch.onnx.ops.symbolic_multi_out(
        name,
        [x, stacked(0), stacked(1), biases, None if lengths is None else lengths.to(torch.int32), *given],
        {"hidden_size": hidden, "direction": _DIRECTIONS[tuple(directions)], **attributes},
        dtypes=[x.dtype] * (1 + states),
        shapes=[(steps, recurrences, batch, hidden), *[(recurrences, batch, hidden)] * states],
    )
    y, *after = (t if t.device == x.device else t.to(x.device) for t in outputs)  # symbolic ops are the CPU's
    if lengths is not None:
        # Of a sequence of no steps onnxruntime returns zeros.
        none = (lengths == 0).reshape(1, -1, 1)
        after = [a if s is None else torch.where(none, s, a) for a, s in zip(after, given, strict=True)]
    return [torch.cat([y[:, r] for r in range(recurrences)], -1), *after]
