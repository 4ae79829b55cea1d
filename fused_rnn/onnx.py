"""Export to ONNX: our ops as ONNX's own LSTM, GRU and RNN nodes, which its runtimes have kernels for.

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=fused_rnn.onnx.translations())

Not imported with the package: it needs onnx and onnxscript, as torch.onnx.export itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_rnn import ops
from fused_rnn.cells import CELLS

# ONNX's node for a cell, which of our gates stands in each of its places, and its other attributes.
_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i, o, f, g
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, n
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
_DIRECTIONS = {(1,): "forward", (1, -1): "bidirectional"}
_INT32 = 6  # onnx.TensorProto.INT32, the type of sequence_lens

Table = dict[Callable[..., Any], Callable[..., Any]]


def translations() -> Table:
    """The custom_translation_table with which torch.onnx.export(..., dynamo=True) exports our modules.

    Every layer, both its directions, becomes one LSTM, GRU or RNN node, and so does a cell: any number of layers, with
    or without biases, batch_first, initial states, `lengths` (ONNX's sequence_lens); T and B may be dynamic. The dtype
    is float32 in practice: onnxruntime's kernels on a CPU know no other. Inference only.

    Raises:
        ImportError: without onnxscript.
        NotImplementedError: without the compiled extension, whose ops these are. At export `reset`, a projection and
            an ensemble, for which ONNX's nodes have no place, raise it, too; torch.onnx reports it as the cause of its
            own error.

    Source: onnx.ai/onnx/operators: LSTM, GRU and RNN of opset 14.

    Examples:
        >>> import fused_rnn.onnx
        >>> table = fused_rnn.onnx.translations()
        >>> sorted(str(op) for op in table)
        ['fused_rnn.forward.default', 'fused_rnn.step.default']
    """
    import onnxscript

    if ops.MISSING is not None:
        raise NotImplementedError(ops.MISSING)
    op: Any = onnxscript.opset18
    names = list(ops.CODES)

    # As in the ops' schemas, by position.
    def forward(*args: Any) -> tuple[Any, ...]:
        x, weights, h0, c0, lengths, reset, cell, directions, *_ = args
        return _layer(op, x, weights, h0, c0, lengths, reset, cell, directions)

    def step(*args: Any) -> tuple[Any, ...]:
        x, h, c, *weights, code = args
        time = op.Constant(value_ints=[0])
        x, h, c = (t if t is None else op.Unsqueeze(t, time) for t in (x, h, c))
        weights = [w for w in weights if w is not None]
        states = _layer(op, x, weights, h, c, None, None, names[code], [1])[1:]
        return tuple(op.Squeeze(state, time) for state in states)

    return {torch.ops.fused_rnn.forward.default: forward, torch.ops.fused_rnn.step.default: step}


def _layer(
    op: Any,
    x: Any,
    weights: Sequence[Any],
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    cell: str,
    directions: Sequence[int],
) -> tuple[Any, ...]:
    """One layer as one node: (y [T, B, R·H], h_n), of an LSTM c_n, too. op: an opset of onnxscript's."""
    name, order, attributes = _NODES[cell]
    recurrences = len(directions)
    count = len(weights) // recurrences
    if reset is not None:
        raise NotImplementedError(f"reset: got a tensor, expected None: ONNX's {name} forgets nothing in a sequence")
    if count in (3, 5):
        raise NotImplementedError(f"proj_size: got a projection, expected none: ONNX's {name} has none")
    if tuple(directions) not in _DIRECTIONS or len(x.shape) != 3:
        raise NotImplementedError(
            f"directions: got {list(directions)}, expected {' or '.join(str(list(d)) for d in _DIRECTIONS)}"
            f" on one input: ONNX's {name} runs no ensemble"
        )

    def stacked(kind: int) -> Any:
        """One kind of the weights, [R, ...], its gates in ONNX's order."""
        first = op.Constant(value_ints=[0])
        own = [_reordered(op, weights[r * count + kind], order) for r in range(recurrences)]
        return _joined(op, [op.Unsqueeze(w, first) for w in own], 0)

    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * recurrences}
    y, *after = getattr(op, name)(
        x,
        stacked(0),
        stacked(1),
        _joined(op, [stacked(2), stacked(3)], 1) if count >= 4 else None,
        None if lengths is None else op.Cast(lengths, to=_INT32),
        *((h0, c0) if CELLS[cell].has_c else (h0,)),
        hidden_size=weights[1].shape[1],
        direction=_DIRECTIONS[tuple(directions)],
        **attributes,
    )
    # [T, R, B, H] → [T, B, R·H]
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return (y, *after)


def _joined(op: Any, parts: Sequence[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)


def _reordered(op: Any, weight: Any, order: Sequence[int]) -> Any:
    """A weight or bias of G·H rows, its gates in this order."""
    if len(order) == 1:
        return weight
    hidden = weight.shape[0] // len(order)
    rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
    # One node with one result: the exporter's optimiser folds it into the weight, as it does no Split.
    return op.Gather(weight, op.Constant(value_ints=rows), axis=0)
