"""Gradients of weights that N samples share, a gradient for each: vmap of grad.

One launch runs backward over all samples as one batch. What it gives the weights would be their sum; so it is asked for
the gradients of the gates, and the products that make gradients of weights of them are batched over the samples here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.reference.sequence import entering, zero_past_end


def supports(call: LayerCall) -> bool:
    """Not with a projection, whose gradient takes another exchange, nor where the gates' gradients do not tell all
    (parameter vectors, matrices, gates whose sides are apart), but for a GRU's, if its gates were kept, nor with blocks
    of W_hh."""
    spec = call.spec
    whole = not (spec.params or spec.matrices or spec.masks or spec.diagonal > 1)
    tells_all = whole and (not spec.apart or call.cell == "gru")
    return call.save == "gates" and not call.kinds.projects and tells_all


def backward(op: Callable[..., list[Tensor]], n: int, call: BackwardCall) -> list[Tensor]:
    """As fused_rnn::backward, of a batch of N·B rows; [dx, dstates] of that batch, then per weight [N, ...]."""
    x, layer = call.x, call.layer
    spec, each, recurrences = layer.spec, layer.each, layer.recurrences
    with torch.autocast(x.device.type, enabled=False):
        (steps, rows), width = x.shape[:2], call.weights[0].shape[0]
        # With the identity for W_ih, the gradient of the input product is what comes out as x's.
        one = torch.eye(width, dtype=x.dtype, device=x.device)
        count = layer.kinds.number
        through = [one if k % count == 0 else w for k, w in enumerate(call.weights)]
        nothing = x.new_zeros(steps, rows, recurrences, width)
        dgates, *dstates = op(*call._replace(x=nothing, weights=through, need_dx=True, need_dw=False))
        dx = x.new_empty(0)
        if call.need_dx:
            parts = [torch.matmul(dgates[:, :, r], w.w_ih) for r, w in enumerate(each)]
            dx = torch.stack(parts, 2) if x.dim() == 4 else torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        x = zero_past_end(x, call.lengths)
        outputs = [dx, *dstates]
        hidden, h0 = call.hidden.unflatten(2, (recurrences, -1)), layer.initial()[0]
        for r, (w, direction) in enumerate(zip(each, call.directions, strict=True)):
            d = recurrent = dgates[:, :, r]
            if spec.apart:  # of a GRU the reset gate multiplies the recurrent side of the last gate
                units = width // spec.gates
                opened = zero_past_end(call.saved[:, :, r, 0], call.lengths)
                recurrent = torch.cat([d[..., :-units], d[..., -units:] * opened], -1)
            outputs.append(_product(d, x if x.dim() == 3 else x[:, :, r], n))
            if spec.recurrent:
                before = entering(hidden[:, :, r], h0[r], call.lengths, call.reset, direction)
                outputs.append(_product(recurrent, before, n))
            if w.b_ih is not None:
                sides = (d, recurrent) if spec.recurrent else (d,)
                outputs += [side.sum(0).unflatten(0, (n, -1)).sum(1) for side in sides]
        return outputs


def _split(t: Tensor, n: int) -> Tensor:
    """[T, N·B, ·] → [N, T·B, ·]."""
    apart: Tensor = t.unflatten(1, (n, -1))
    return apart.movedim(1, 0).flatten(1, 2)


def _product(d: Tensor, by: Tensor, n: int) -> Tensor:
    return torch.bmm(_split(d, n).transpose(1, 2), _split(by, n))
