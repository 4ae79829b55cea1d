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
from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import LayerCall, Weights, all_or_none
from fused_rnn.cells import Cell

# ONNX's node for a cell, which of our gates stands in each of its places, and its other attributes.
NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i, o, f, g
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, n
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
_DIRECTIONS = {(1,): "forward", (-1,): "reverse", (1, -1): "bidirectional"}


NAME = "onnx"
DIFFERENTIABLE = False
stack = wavefront = None


def is_exporting() -> bool:
    """Whether torch.onnx is making a model; not by its older exporter, which traces and knows no such nodes."""
    return torch.onnx.is_in_onnx_export() and not torch._C._is_tracing()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo takes torch's own for False


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our ops by ONNX's nodes, for a program of torch.export's:

    torch.onnx.export(program.run_decompositions(fused_rnn.onnx.decompositions()))
    """
    ours: dict[str, Callable[..., Any]] = {"forward": _forward_op, "step": step}
    ours |= {f"{backend}_forward": _forward_op for backend in ("cuda", "triton")}
    there = torch.ops.fused_rnn  # all that this build has
    return {getattr(there, name).default: function for name, function in ours.items() if hasattr(there, name)}


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """A matrix of int8 with a scale for each row, as ONNX's node for it makes float32 of it."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", [weight, scale], {"axis": 0}, dtype=torch.float32, shape=weight.shape
    )


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """fused_rnn::step by ONNX's node."""
    entering = [s.unsqueeze(0) for s in states]
    call = LayerCall(x.unsqueeze(0), weights, entering, None, None, cell, [1])
    return [state.squeeze(0) for state in forward(call)[1:]]


def _forward_op(*args: Any) -> list[Tensor]:
    """fused_rnn::forward by ONNX's node."""
    return forward(LayerCall(*args))


def forward(call: LayerCall) -> list[Tensor]:
    """One layer by ONNX's node; result as of the op fused_rnn::forward."""
    x, _, states, lengths, reset, cell, directions, save, _, sequences = call
    if cell not in NODES or sequences:
        what = "return_sequences: got 'states'" if cell in NODES else f"cell: got {call.spec.title!r}"
        raise NotImplementedError(f"{what}, for which ONNX has no node; its nodes are LSTM, GRU and RNN")
    name, recurrences = NODES[cell][0], len(directions)
    if reset is not None:
        raise NotImplementedError(f"reset: got a tensor, expected None: ONNX's {name} forgets nothing in a sequence")
    if tuple(directions) not in _DIRECTIONS or x.dim() != 3:
        raise NotImplementedError(
            f"directions: got {list(directions)}, expected {' or '.join(str(list(d)) for d in _DIRECTIONS)}"
            f" on one input: ONNX's {name} runs no ensemble"
        )
    if save != "none":
        raise NotImplementedError(f"save: got {save!r}, expected 'none': ONNX's {name} keeps nothing for a backward")
    each = call.each
    w_hr = [w.w_hr for w in each if w.w_hr is not None]
    if not w_hr:
        return _node(x, each, states, lengths, call.spec, directions)
    # A projection is none of ONNX's: its state is m, before the projection, and what it multiplies m by is W_hh W_hr.
    # That m_0 is not known, but h_0 = W_hr m_0 is: W_hh h_0 comes in as a further input, at the first step.
    if states:
        entered = [_at_first_step(x, h, lengths, direction) for h, direction in zip(states[0], directions, strict=True)]
        x = torch.cat([x, *entered], -1)
    inner = []
    for r, (w_ih, w_hh, b_ih, b_hh, w, *_) in enumerate(each):
        if states:
            zeros = torch.zeros_like(w_hh)
            w_ih = torch.cat([w_ih, *(w_hh if r == other else zeros for other in range(recurrences))], -1)
        inner.append(Weights(w_ih, w_hh @ w, b_ih, b_hh, None))
    m, m_n, c_n = _node(x, inner, [None, *states[1:]] if states else [], lengths, call.spec, directions)
    hidden = m.shape[-1] // recurrences
    y = torch.cat([m.narrow(-1, r * hidden, hidden) @ w.t() for r, w in enumerate(w_hr)], -1)
    h_n = torch.stack([m_n[r] @ w.t() for r, w in enumerate(w_hr)])
    if lengths is not None and states:
        h_n = torch.where((lengths == 0).reshape(1, -1, 1), states[0], h_n)
    return [y, h_n, c_n]


def _at_first_step(x: Tensor, h: Tensor, lengths: Tensor | None, direction: int) -> Tensor:
    """h [B, P] at the step where a direction begins, zeros elsewhere: [T, B, P]."""
    t = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    first = 0 if direction > 0 else x.shape[0] - 1 if lengths is None else lengths - 1
    return (t == first).unsqueeze(-1).to(h.dtype) * h


def _node(
    x: Tensor,
    weights: Sequence[Weights],
    states: Sequence[Any],
    lengths: Tensor | None,
    spec: Cell,
    directions: Sequence[int],
) -> list[Tensor]:
    """One layer without a projection: [y [T, B, R·H], h_n] and of an LSTM c_n."""
    name, order, attributes = NODES[spec.name]
    (steps, batch), recurrences, count = x.shape[:2], len(directions), len(spec.states)
    hidden = weights[0].w_hh.shape[1]

    def stacked(kind: int) -> Tensor:
        """One kind of the weights, [R, ...], its gates in ONNX's order."""
        each = [[w[:4][kind].narrow(0, gate * hidden, hidden) for gate in order] for w in weights]
        # No split, of several results, and no view of all: the exporter's optimiser folds these into the weights.
        return torch.cat([torch.cat(gates).unsqueeze(0) for gates in each])

    biases = None if weights[0].b_ih is None else torch.cat([stacked(2), stacked(3)], 1)
    given = all_or_none(states, count)
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * recurrences}
    outputs = torch.onnx.ops.symbolic_multi_out(
        name,
        [x, stacked(0), stacked(1), biases, None if lengths is None else lengths.to(torch.int32), *given],
        {"hidden_size": hidden, "direction": _DIRECTIONS[tuple(directions)], **attributes},
        dtypes=[x.dtype] * (1 + count),
        shapes=[(steps, recurrences, batch, hidden), *[(recurrences, batch, hidden)] * count],
    )
    y, *after = (t if t.device == x.device else t.to(x.device) for t in outputs)  # symbolic ops are the CPU's
    if lengths is not None:
        # Of a sequence of no steps onnxruntime returns zeros.
        none = (lengths == 0).reshape(1, -1, 1)
        after = [a if s is None else torch.where(none, s, a) for a, s in zip(after, given, strict=True)]
    return [torch.cat([y[:, r] for r in range(recurrences)], -1), *after]
