"""A call on its way from tensors to a backend: checks, autocast, dispatch, layer by layer, dropout between them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import pad

from fused_rnn import autograd, checks
from fused_rnn.autograd import stack as autograd_stack
from fused_rnn.call import Kinds, LayerCall, StackCall, known_save
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import resolve
from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.problem import Problem
from fused_rnn.transforms.op_gradient import functionalizes, is_jit_tracing, stands_alone

_DIRECTIONS: tuple[tuple[int, ...], ...] = ((1,), (1, -1))

States = Sequence[Tensor | None]  # () or None for zeros


def run(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    states: States = (),
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence[Sequence[bool]] | None = None,
    save: str = "gates",
    backend: str | None = None,
    heads: int = 1,
    sequences: bool = False,
) -> Sequence[Tensor]:
    """A stack of layers of any cell: y [T, B, R·P] and the states after, h [L·R, B, P], the others [L·R, B, H].

    states: shaped as those returned.
    heads: N recurrences of H/N units stand for one of H, in y and the states one beside the other. weights: of each.
    sequences: return each state but h over time too, of the last layer, [T, B, R·H].
    All else as in fused_rnn.functional.lstm.
    """
    checks.check_tensor("x", x)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x, weights, states = _autocast(x, weights, states)
    known_save(save)
    directions = _DIRECTIONS[1 if bidirectional else 0]
    if heads > 1:
        directions = tuple(way for way in directions for _ in range(heads))
    recurrences = len(directions)
    steps, batch, input_size = checks.check_sequence(x)
    hidden, width, kinds = checks.check_weights(cell, x, weights, input_size, num_layers, recurrences)
    if kinds.masks:
        checks.check_masks(kinds, weights, steps, batch)
    given: Sequence[Tensor] = ()
    if states:
        lead, sizes = (num_layers * recurrences // heads, batch), (width * heads, hidden * heads)
        given = check_states(cell, states, x, lead, sizes)
        if heads > 1:
            given = [_by_head(s, heads) for s in given]
    if lengths is not None:
        lengths = checks.check_lengths(lengths, x)
    if reset is not None:
        reset = checks.check_reset(reset, x)
    if input_size == 0:
        (x, weights), input_size = _with_a_feature(x, weights, recurrences, kinds), 1
    # An exported program holds the op as inference wants it; transforms.op_gradient has its gradient.
    needs_grad, alone = wants_gradient(x, weights, given), stands_alone()
    keeps, transformed = needs_grad and not alone, checks.in_transform()
    if keeps and num_layers == 1 and steps == 1:
        weights = _savable(weights, x, *given)
    problem = Problem(
        cell, x.dtype, device, steps == 1, batch, input_size, hidden, width, num_layers, recurrences, kinds.bias,
        keeps, _forward_ad(), save if keeps else "none", lengths is not None, reset is not None,
        transformed, device == "cuda" and tf32_allowed(), transformed and needs_grad and _functionalizes_gradient(),
        sequences,
    )  # fmt: skip
    chosen = resolve(problem, backend)
    if alone and not given:
        given = _explicit(chosen, cell, x, (num_layers * recurrences, batch), (width, hidden))
    if chosen.stack is not None:
        whole: Sequence[Tensor] = chosen.stack(
            x, weights, given, lengths, cell, num_layers, recurrences, dropout, training
        )
        return whole
    keep = save if keeps else "none"  # not by an index: Dynamo of torch 2.11 takes no bool for one
    if num_layers == 1:
        call = LayerCall(x, weights, given, lengths, reset, cell, directions, keep, keeps, sequences)
        outputs = autograd.layer(chosen, call)
        return outputs if heads == 1 and not sequences else _joined(outputs, cell, heads)
    if (wave := _wavefront(chosen, problem, kinds, x, weights, given, lengths, reset, dropout * training)) is not None:
        x, finals = autograd_stack.stack(chosen, wave)
        return [x, *map(torch.cat, zip(*finals, strict=True))]
    finals = []
    for layer in range(num_layers):
        last, first = layer == num_layers - 1, layer * recurrences
        own = weights[first * kinds.number : (first + recurrences) * kinds.number]
        entering = [s[first : first + recurrences] for s in given]
        # The caller's own y, which he may change in place, gets a copy for backward.
        call = LayerCall(x, own, entering, lengths, reset, cell, directions, keep, keeps and last, sequences and last)
        x, *after = autograd.layer(chosen, call)
        finals.append(after)
        if dropout > 0 and training and not last:
            x = torch.dropout(x, dropout, True)
    over_time = finals[-1][len(finals[0]) :] if sequences else ()
    outputs = (x, *map(torch.cat, zip(*finals, strict=not sequences)), *over_time)
    return outputs if heads == 1 and not sequences else _joined(outputs, cell, heads)


def _wavefront(
    backend: ModuleType,
    problem: Problem,
    kinds: Kinds,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: float,
) -> StackCall | None:
    """The layers as a call of the backend's wavefront, where it can run them and it pays."""
    if backend.wavefront is None or problem.recurrences > 1 or kinds.projects or problem.sequences or kinds.masks:
        return None
    if CELLS[problem.cell].diagonal > 1:
        return None
    if problem.forward_ad or problem.save == "recompute" or not 0 <= dropout < 1:
        return None
    if not checks.is_plain([x, *weights, *states]) or not backend.wavefront.pays(problem, x):
        return None
    each = range(problem.layers)
    by_layer = [weights[n * kinds.number : (n + 1) * kinds.number] for n in each]
    entering = [[s[n : n + 1] for s in states] for n in each]
    return StackCall(
        x, by_layer, entering, lengths, reset, problem.cell, dropout, problem.save, keep_hidden=problem.needs_grad
    )


def _by_head(state: Tensor, heads: int) -> Tensor:
    """A state [L·R, B, H] by recurrences: [L·R·N, B, H/N]."""
    by_head: Tensor = state.unflatten(-1, (heads, -1))
    return by_head.movedim(-2, 1).flatten(0, 1)


def _joined(outputs: Sequence[Tensor], cell: str, heads: int) -> Sequence[Tensor]:
    """y, the states after and over time, as `run` returns them, of a layer's by recurrences."""
    count = 1 + len(CELLS[cell].states)
    y, *after = outputs[:count]
    if heads > 1:
        after = [s.unflatten(0, (-1, heads)).movedim(1, -2).flatten(-2) for s in after]
    return [y, *after, *(s.flatten(2) for s in outputs[count:])]


def step(
    cell: str, x: Tensor, states: States, weights: Sequence[Tensor], backend: str | None = None
) -> Sequence[Tensor]:
    """One step: x [B, D], states [B, H] → the states after. All else as in fused_rnn.functional.lstm_cell."""
    checks.check_tensor("x", x)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x, weights, states = _autocast(x, weights, states)
    if x.dim() != 2:
        raise ValueError(f"x: got {checks.shape_text(x.shape)}, expected two dimensions [B, D]")
    batch, input_size = x.shape
    hidden, _, kinds = checks.check_weights(cell, x, weights, input_size, 1, 1)
    if kinds.projects:
        raise ValueError(
            f"weights: got {len(weights)} tensors, with a projection; a single step has none, expected 2 or 4"
        )
    given = check_states(cell, states, x, (batch,), (hidden, hidden), "", "[B, H]") if states else ()
    if kinds.masks:
        checks.check_masks(kinds, weights, 1, batch)
    if input_size == 0:
        (x, weights), input_size = _with_a_feature(x, weights, 1, kinds), 1
    needs_grad, alone = wants_gradient(x, weights, given), stands_alone()
    keeps, transformed = needs_grad and not alone, checks.in_transform()  # as in `run`
    if keeps:
        weights = _savable(weights, x, *given)
    problem = Problem(
        cell, x.dtype, device, True, batch, input_size, hidden, hidden, 1, 1, kinds.bias,
        keeps, _forward_ad(), "gates" if keeps else "none", False, False, transformed,
        device == "cuda" and tf32_allowed(), transformed and needs_grad and _functionalizes_gradient(),
    )  # fmt: skip
    chosen = resolve(problem, backend)
    if alone and not given:
        given = _explicit(chosen, cell, x, (batch,), (hidden, hidden))
    # A trace, which is checked without gradients, is to be the same with and without: the op of one step has none.
    if chosen.DIFFERENTIABLE or not (needs_grad or is_jit_tracing()):
        after: Sequence[Tensor] = chosen.step(x, weights, given, cell)
        return after
    entering = [s.unsqueeze(0) for s in given]
    save = "gates" if keeps else "none"
    _, *after = autograd.layer(chosen, LayerCall(x.unsqueeze(0), weights, entering, None, None, cell, (1,), save))
    return [_first(s) for s in after]


def check_states(
    cell: str,
    states: States,
    x: Tensor,
    lead: tuple[int, ...],
    sizes: tuple[int, int],
    suffix: str = "0",
    letters: str = "[L·R, B, {}]",
) -> Sequence[Tensor]:
    """The states, zeros for what is None; () where all are. sizes: (P, H). Raises ValueError."""
    if all(s is None for s in states):
        return ()
    given = []
    for name, state, (letter, size) in zip(CELLS[cell].states, states, _widths(cell, sizes), strict=True):
        if state is None:
            state = x.new_zeros(*lead, size)
        else:
            checks.check_state(name + suffix, state, x, (*lead, size), letters.format(letter))
        given.append(state)
    return given


def _explicit(
    backend: ModuleType, cell: str, x: Tensor, lead: tuple[int, ...], sizes: tuple[int, int]
) -> Sequence[Tensor]:
    """States of zeros where torch.export makes a program of an op, for AOTInductor takes no empty list; else ()."""
    if backend.DIFFERENTIABLE or backend.NAME == "onnx" or not torch.compiler.is_exporting():
        return ()
    return [x.new_zeros(*lead, size) for _, size in _widths(cell, sizes)]


def _widths(cell: str, sizes: tuple[int, int]) -> list[tuple[str, int]]:
    """Of each state its last dimension, by letter and size: P of h, H of the others. sizes: (P, H)."""
    return [("P", sizes[0]), *[("H", sizes[1])] * (len(CELLS[cell].states) - 1)]


def wants_gradient(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
    """Whether a call is to keep what a backward reads."""
    if not torch.is_grad_enabled() or (not is_compiling() and torch.is_inference_mode_enabled()):
        return False
    if x.requires_grad:
        return True
    for tensors in (weights, states):
        for t in tensors:
            if t.requires_grad:
                return True
    # A tensor that is batched inside a gradient does not say that it requires one.
    return checks.in_transform()


def _savable(weights: Sequence[Tensor], *inputs: Tensor) -> Sequence[Tensor]:
    """The weights of a single step. Made in inference mode they cannot be saved for backward, which where no input asks
    for a gradient has no use for them: torch does not save them then, so our Functions get copies."""
    if torch.compiler.is_compiling() or not weights[0].is_inference():
        return weights
    if any(t.requires_grad for t in inputs):
        return weights
    return [w.clone() for w in weights]


def _forward_ad() -> bool:
    return forward_ad._current_level >= 0


_forward_ad._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as checks.in_transform


def _functionalizes_gradient() -> bool:
    """Whether functionalize is under way together with grad, vjp or the like of torch.func: ops that are registered
    with a gradient have none in these."""
    if not functionalizes():
        return False
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


def _autocast(x: Tensor, weights: Sequence[Tensor], states: States) -> tuple[Tensor, Sequence[Tensor], States]:
    """The rule of autocast's own list for lstm_cell and the like: floating tensors, but for float64, take its dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        casts = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if casts else t

    return cast(x), [cast(w) for w in weights], [cast(s) for s in states]


def _with_a_feature(
    x: Tensor, weights: Sequence[Tensor], recurrences: int, kinds: Kinds
) -> tuple[Tensor, Sequence[Tensor]]:
    """Input of no features as one of a feature that is zero: no loop over time need know of it."""
    first = range(0, recurrences * kinds.number, kinds.number)  # the w_ih of the first layer
    return pad(x, (0, 1)), [pad(w, (0, 1)) if k in first else w for k, w in enumerate(weights)]


def _first(state: Tensor) -> Tensor:
    """state [1, B, H], which nobody else holds, as [B, H], and no view: detach_() works on it, as it does in torch."""
    return state.squeeze_(0) if checks.is_as_it_seems(state) else state.squeeze(0)
