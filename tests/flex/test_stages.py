"""Cells that see all units of a row, or multiply by matrices of their own: programs of several stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from program_calls import by_reference, by_steps, gradients_of, make_call
from stage_cells import MASKED, STAGED
from tolerances import GRADCHECK
from torch import Tensor
from torch.nn import functional as F

import fused_rnn
from fused_rnn import ops
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX, PUBLISHING, Program, parse
from fused_rnn.flex.source import StepError
from fused_rnn.reference.loop import run_layer

PROGRAMS: dict[str, Program] = {name: cell.program for name, cell in STAGED.items()} | {
    name: CELLS[text].program for name, text in MASKED.items()
}


def inputs_of(program: Program, batch: int, units: int) -> dict[str, list[Tensor]]:
    """What a step gets, in double."""
    random = torch.Generator().manual_seed(0)

    def make(count: int, *shape: int) -> list[Tensor]:
        drawn = [torch.randn(*shape, generator=random, dtype=torch.float64) for _ in range(count)]
        return [t.requires_grad_() for t in drawn]

    return {
        "pre": make(program.gates + program.apart, batch, units),
        "states": make(len(program.states), batch, units),
        "params": make(len(program.params), units),
        "masks": make(len(program.masks), batch, units),
        "blocks": make(program.blocks, units, units),
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_backward_is_the_gradient_of_the_forward(name: str) -> None:
    program, batch, units = PROGRAMS[name], 3, 5
    given = inputs_of(program, batch, units)
    pre, states, params, masks, blocks = given.values()
    after, saved = program.forward.run([*pre, *states, *params, *masks], blocks, units)
    after, saved = ([t.expand(batch, units) for t in group] for group in (after, saved))
    grads = [torch.randn_like(t) for t in after]
    leaves = [*pre, *states, *params, *blocks]
    expected = torch.autograd.grad(after, leaves, grads, materialize_grads=True)
    with torch.no_grad():
        made = program.backward.run([*saved, *states, *after, *params, *masks, *grads], blocks, units)
    dpre, dstates, dparams, *dproducts = ([t.expand(batch, units) for t in group] for group in made)
    joined, gates = program.gates - program.apart, program.gates
    order = [*range(joined, gates), *range(joined), *range(gates, len(pre))]
    of_blocks = dproducts[0] if dproducts else []
    operands = [saved[j] for j, (_, count) in enumerate(program.matrices) for _ in range(count)]
    found = [dpre[order.index(i)] for i in range(len(pre))] + dstates + [d.sum(0) for d in dparams]
    found += [d.t() @ v for d, v in zip(of_blocks, operands, strict=True)]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_order_of_stages(name: str) -> None:
    """What publishes reads nothing of its own run, and stands at the end of a stage."""
    program = PROGRAMS[name]
    assert parse(program.text) == program
    for graph in (program.forward, program.backward):
        ends = [graph.code[stage.stop - 1].op for stage in graph.stages[:-1]]
        assert all(op in PUBLISHING for op in ends)
        for stage in graph.stages:
            ops = [graph.code[k].op in PUBLISHING for k in stage]
            assert ops == sorted(ops)
            own = {graph.inputs + k for k in stage if graph.code[k].op in PUBLISHING}
            assert not own & {a for k in stage for a in graph.code[k].args}
    assert program.stages == max(len(program.forward.stages), len(program.backward.stages))


def test_few_stages() -> None:
    """Mean and variance of a layer norm are published together, and so are the two sums of its gradient."""
    normed = PROGRAMS["layer_norm"]
    assert (len(normed.forward.stages), len(normed.backward.stages)) == (2, 2)
    assert len(PROGRAMS["reset_before"].forward.stages) == 2


@pytest.mark.parametrize("values", [1, 3])
def test_the_gradient_of_a_norm_takes_two_sums(values: int) -> None:
    """As its formula has it, scale (d - mean(d) - y mean(d y)), of one value or of several side by side. Forward keeps
    what is normed, and one number of the row."""

    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return sum(torch.tanh(y) for y in _side_by_side([a + b for a, b in zip(x, r, strict=True)]))

    program = fused_rnn.cell(gates=values)(step).program
    graph = program.backward
    assert sum(i.op == "sum" for i in graph.code) == 2
    assert not [i for i in graph.code if i.op == "variance"]
    assert len(program.forward.outputs[1]) == values + 1
    inside = sum(n not in graph.rows and i.op not in ("const", "units") for n, i in enumerate(graph.code, graph.inputs))
    tanh, of_sums, last = 2 * values, 2 * values - 1 + values - 1, 3 * values
    assert inside <= tanh + of_sums + last


def _side_by_side(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Their layer norm together."""
    whole = torch.cat(tuple(values), -1)
    return F.layer_norm(whole, whole.shape[-1:]).chunk(len(values), -1)


def test_nothing_published_is_made_again() -> None:
    """Backward has sums of its own, never those of forward again: they are kept."""
    for name in ("layer_norm", "rms_norm"):
        program = PROGRAMS[name]
        published = [i for i in program.backward.code if i.op in PUBLISHING]
        for instruction in published:
            assert depends_on_gradients(program, instruction.args[0]), name


def depends_on_gradients(program: Program, value: int) -> bool:
    graph = program.backward
    if value < graph.inputs:
        return value >= graph.inputs - len(program.states)
    return any(depends_on_gradients(program, a) for a in graph.code[value - graph.inputs].args)


@pytest.mark.parametrize("name", [*STAGED, *MASKED])
def test_the_loop_over_a_program_is_the_loop_over_its_step(name: str) -> None:
    """The reference loop in double, over a step at a time: lengths, resets, both directions."""
    cell = PROGRAMS[name].text
    call = make_call(cell, T=6, H=5, directions=(1, -1), lengths=True, reset=True, dtype=torch.float64)
    expected = by_steps(call)
    for what, value in by_reference(call).items():
        torch.testing.assert_close(value, expected[what], msg=what)


@pytest.mark.parametrize("name", STAGED)
def test_a_module(name: str) -> None:
    """Against the step as it is, called by a plain loop, with heads."""
    cell, heads, units = STAGED[name], 2, 3
    rnn = fused_rnn.FlexRNN(cell, 4, heads * units, heads=heads, dtype=torch.float64, backend="reference")
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.uniform_(-0.7, 0.7)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    y, _ = rnn(x)
    weights = dict(rnn.named_parameters())
    for n in range(heads):
        own = slice(n * units, (n + 1) * units)
        states = {state: x.new_zeros(2, units) for state in cell.states}
        for t in range(5):
            x_sides = side(x[t], weights["weight_ih_l0"], weights["bias_ih_l0"], cell.gates, own)
            r_sides = None
            if cell.recurrent:
                bias = weights["bias_hh_l0"].unflatten(0, (cell.gates, -1))[:, own].flatten()
                h = next(iter(states.values()))
                r_sides = F.linear(h, weights["weight_hh_l0"][n], bias).chunk(cell.gates, -1)
            params = {name: weights[f"{name}_l0"][own] for name in cell.params}
            matrices = {name: weights[f"{name}_l0"][n] for name in cell.matrices}
            after = cell(x_sides, r_sides, states, params, matrices)
            states = dict(zip(cell.states, after, strict=True))
            torch.testing.assert_close(y[t][:, own], after[0])


def side(x: Tensor, w: Tensor, b: Tensor, gates: int, own: slice) -> Sequence[Tensor]:
    return [s[:, own] for s in F.linear(x, w, b).chunk(gates, -1)]


@pytest.mark.parametrize("name", [*STAGED, *MASKED])
def test_derivatives(name: str) -> None:
    """First and second ones against differences; of masks there are none."""
    call = make_call(PROGRAMS[name].text, T=2, B=2, D=2, H=3, dtype=torch.float64)
    kinds = call.kinds
    own = [k for k in range(len(call.weights)) if not kinds.is_mask(k)]

    def run(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        states, weights = leaves[: len(call.states)], list(call.weights)
        for k, leaf in zip(own, leaves[len(call.states) :], strict=True):
            weights[k] = leaf
        return tuple(run_layer(call._replace(x=x, states=states, weights=weights)))

    leaves = [t.clone().requires_grad_() for t in (call.x, *call.states, *(call.weights[k] for k in own))]
    assert torch.autograd.gradcheck(run, leaves, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, **GRADCHECK)


def test_reductions_are_torchs() -> None:
    """Of every kind that a step may call, and their gradients, by the program and by torch."""
    x = torch.randn(4, 7, dtype=torch.float64)
    for name, function in REDUCTIONS.items():
        cell = fused_rnn.cell(gates=1, recurrent=False)(lambda x, r, s, p, function=function: x[0] * function(x[0]))
        program = cell.program
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = other * function(other)
        (after,), saved = program.forward.run([own, torch.zeros_like(x)], units=7)
        torch.testing.assert_close(after, expected, msg=name)
        grad = torch.randn_like(x)
        (expected,) = torch.autograd.grad(expected, other, grad)
        with torch.no_grad():
            saved = [s.expand(4, 7) for s in saved]
            ((dx,), *_) = program.backward.run([*saved, torch.zeros_like(x), after, grad], units=7)
        torch.testing.assert_close(dx.expand(4, 7), expected, msg=name)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda v: v.sum(-1, keepdim=True),
    "mean": lambda v: v.mean(-1, keepdim=True),
    "mean by dim 1": lambda v: v.mean(dim=1, keepdim=True),
    "biased variance": lambda v: v.var(-1, unbiased=False, keepdim=True),
    "variance": lambda v: v.var(-1, keepdim=True),
    "standard deviation": lambda v: torch.std(v, -1, keepdim=True),
    "both": lambda v: sum(torch.var_mean(v, -1, correction=0, keepdim=True)),
    "norm": lambda v: torch.linalg.vector_norm(v, dim=-1, keepdim=True),
    "norm of differences": lambda v: torch.linalg.vector_norm(v, 1, dim=-1, keepdim=True),
    "layer norm": lambda v: F.layer_norm(v, v.shape[-1:]),
    "rms norm": lambda v: F.rms_norm(v, v.shape[-1:], eps=1e-6),
    "of a constant": lambda v: torch.ones_like(v).sum(-1, keepdim=True),
    "of a number of the row": lambda v: v.mean(-1, keepdim=True).expand_as(v).sum(-1, keepdim=True),
}


def row_of_a_sum(x: Any, r: Any, s: Any, p: Any) -> Any:
    """A number of the row goes into a vector, and that into another number of the row."""
    v = x[0] + r[0]
    return torch.tanh(v + (v - v.mean(-1, keepdim=True)).mean(-1, keepdim=True))


def norm_of_a_norm(x: Any, r: Any, s: Any, p: Any) -> Any:
    v = x[0] + r[0]
    far = torch.where(v > 0, v, v.mean(-1, keepdim=True))
    return torch.tanh(v) + F.layer_norm(far, v.shape[-1:]).square().mean(-1, keepdim=True) * v.var(-1, keepdim=True)


def norm_of_three(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Side by side, with what is the same for all units among them, and of a norm a norm."""
    a, b, c = _side_by_side([x[0], r[0], s.h])
    d, e = _side_by_side([a * b, (b + c).mean(-1, keepdim=True).expand_as(a)])
    f, g = _side_by_side([d + c, e * s.h])
    return torch.tanh(f - 2 * g) * c


def norm_with_vectors(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Weights and biases side by side, too."""
    whole, weight = torch.cat([x[0], r[0]], 1), torch.cat([s.h.new_full(s.h.shape[1:], n) for n in (0.5, 2.0)])
    a, b = F.layer_norm(whole, whole.shape[-1:], weight, weight).split(s.h.shape[1], 1)
    return torch.sigmoid(a) * b


@pytest.mark.parametrize("step", [row_of_a_sum, norm_of_a_norm, norm_of_three, norm_with_vectors])
def test_gradients_through_several_numbers_of_a_row(step: Any) -> None:
    program = fused_rnn.cell(gates=1)(step).program
    pre = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(1 + program.apart)]
    h = torch.randn(3, 5, dtype=torch.float64)
    (after,), saved = program.forward.run([*pre, h], units=5)
    grad = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.autograd.grad(after, pre, grad)
    with torch.no_grad():
        made = program.backward.run([*(t.expand(3, 5) for t in saved), h, after, grad], units=5)[0]
    for own, other in zip(made, expected, strict=True):
        torch.testing.assert_close(own.expand(3, 5), other)


def test_a_norm_without_gradient() -> None:
    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        with torch.no_grad():
            a, b = _side_by_side([x[0], s.h])
        return torch.tanh(a + b + r[0])

    assert not [i for i in fused_rnn.cell(gates=1)(step).program.backward.code if i.op in PUBLISHING]


def test_products_without_gradient() -> None:
    """As all that a step makes under no_grad."""

    def step(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
        with torch.no_grad():
            a = m.u(s.h)
        return torch.tanh(x[0] + r[0] + a)

    program = fused_rnn.cell(gates=1, matrices={"u": (1, "H")})(step).program
    assert not [i for i in program.backward.code if i.op == "transposed"]


def test_a_product_that_is_summed_over_its_units() -> None:
    """Its gradient is one number a row, of which the product with the matrix needs a vector."""

    @fused_rnn.cell(gates=1, matrices={"u": (1, "H")})
    def pooled(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
        return torch.tanh(x[0] + r[0]) * m.u(s.h).mean(-1, keepdim=True)

    assert not any(
        set(i.args) & pooled.program.backward.rows for i in pooled.program.backward.code if i.op == "transposed"
    )
    rnn = fused_rnn.FlexRNN(pooled, 3, 5, dtype=torch.float64, backend=None if ops.MISSING else "cpu")
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *args: rnn(*args[:2])[0], (x, h, *rnn.parameters()), **GRADCHECK)


def no_such_dim(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] - x[0].mean(0, keepdim=True)


def without_keepdim(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] * x[0].mean(-1)


def of_a_row(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] * x[0].mean(-1, keepdim=True).sum(-1, keepdim=True)


def other_shape(x: Any, r: Any, s: Any, p: Any) -> Any:
    return F.layer_norm(x[0], x[0].shape)


def scaled_side_by_side(x: Any, r: Any, s: Any, p: Any) -> Any:
    return (2 * torch.cat([x[0], r[0]], -1)).chunk(2, -1)[0]


def other_parts(x: Any, r: Any, s: Any, p: Any) -> Any:
    return torch.cat([x[0], r[0]], -1).split(2, -1)[0]


def part_in_place(x: Any, r: Any, s: Any, p: Any) -> Any:
    whole = torch.cat([x[0], r[0]], -1)
    whole.chunk(2, -1)[0].mul_(2)
    return F.layer_norm(whole, whole.shape[-1:]).chunk(2, -1)[0]


def argument_in_place(x: Any, r: Any, s: Any, p: Any) -> Any:
    x[0].chunk(1, -1)[0].mul_(2)
    return torch.tanh(x[0] + r[0])


def short_weight(x: Any, r: Any, s: Any, p: Any) -> Any:
    whole = torch.cat([x[0], r[0]], -1)
    return F.layer_norm(whole, whole.shape[-1:], torch.ones(x[0].shape[-1:])).chunk(2, -1)[0]


def long_bias(x: Any, r: Any, s: Any, p: Any) -> Any:
    bias = torch.ones(x[0].shape[-1:])
    return F.layer_norm(x[0] + r[0], x[0].shape[-1:], bias, torch.cat([bias, bias]))


def along_rows(x: Any, r: Any, s: Any, p: Any) -> Any:
    return torch.cat([x[0], r[0]], 0)


def third_norm(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] * torch.linalg.vector_norm(x[0], 3, dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (no_such_dim, "mean: dim: got [0], expected -1"),
        (without_keepdim, "mean: keepdim: got False, expected True: a number for each row, [B, 1]"),
        (of_a_row, "sum: expected a tensor of the units, [B, H], got [B, 1]"),
        (other_shape, "native_layer_norm: normalized_shape: got [B, H], expected [H]"),
        (scaled_side_by_side, "it has 2 tensors side by side, for layer norm, split and chunk alone"),
        (other_parts, "split: got parts of 2 along -1, expected of H along -1"),
        (part_in_place, "mul_ changes in place a tensor that the step also has under another view"),
        (argument_in_place, "mul_ changes in place a tensor that the step also has under another view"),
        (short_weight, "native_layer_norm: weight: got 1·H numbers, expected 2·H"),
        (long_bias, "native_layer_norm: bias: got 2·H numbers, expected 1·H"),
        (along_rows, "cat is no operation that a cell can run; it changes the shape"),
        (third_norm, "linalg_vector_norm: ord: got 3, expected 1 or 2"),
    ],
)
def test_refused_reductions(step: Any, said: str) -> None:
    with pytest.raises(StepError) as caught:
        _ = fused_rnn.cell(gates=1)(step).program
    assert said in str(caught.value) and step.__name__ in str(caught.value)


def twice(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    return torch.tanh(m.u(x[0]) + m.u(r[0]))


def never(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    return torch.tanh(x[0] + r[0])


def of_a_number(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    return m.u(x[0].mean(-1, keepdim=True)) + r[0]


def of_the_same_number(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    return m.u(x[0].mean(-1, keepdim=True).expand_as(x[0])) + r[0]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (twice, "matrix 'u' multiplies two vectors in a step, expected one"),
        (never, "the step does not multiply by its matrix 'u'"),
        (of_a_number, "matrix 'u' got [B, 1], expected a tensor [B, H]"),
        (of_the_same_number, "matrix 'u' got the same number for all units"),
    ],
)
def test_refused_products(step: Any, said: str) -> None:
    with pytest.raises(StepError) as caught:
        _ = fused_rnn.cell(gates=1, matrices={"u": (1, "H")})(step).program
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("matrices", "error", "said"),
    [
        (("u",), TypeError, "matrices: got ('u',), expected shapes by name"),
        ({"h": (1, "H")}, ValueError, "matrices: got 'h', which is a state or a param"),
        ({"u": (0, "H")}, ValueError, "matrices: got (0, 'H') for 'u', expected (n, 'H')"),
        ({"u": (1, "D")}, ValueError, "matrices: got (1, 'D') for 'u', expected (n, 'H')"),
        ({"u": 3}, ValueError, "matrices: got 3 for 'u', expected (n, 'H')"),
        ({"a b": (1, "H")}, ValueError, "matrices: got 'a b', expected names that are Python's"),
    ],
)
def test_refused_matrices(matrices: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        fused_rnn.cell(gates=1, matrices=matrices)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "x|1 0 1|h||sum 0,sum 2,mul 2 3>4;|const 0.0>2;2;",  # a sum of a sum of its own run
        "x|1 0 1 0 1|h|;u;|product 1 0>2;0|const 0.0,transposed 0 2>4;4;;4",  # no such block
        "x|1 0 1 0 1|h|;u;|transposed 0 0>2;0|const 0.0>4;4;;4",  # backward's product in forward
        "x|1 0 1 0 1|h|;u;|product 0 0>2;|const 0.0>3;3;;3",  # its operand is not kept
        "x|1 0 1 0 1|h|;u;|product 0 0>2;0|const 0.0>4;4;",  # no gradient of the product
        "x|1 0 1 0 0|h|;u;|tanh 0>2;0|const 0.0>4;4;;",  # a matrix of nothing
        "x|1 0 1 2|h|;;k|mul 0 2>3;|const 0.0>4;4;",  # two masks, of which one has a name
        "x|1 0 1 1|h|a|mul 0 2>3;|const 0.0>4;4;",  # names left out
    ],
)
def test_texts_that_are_no_programs(text: str) -> None:
    with pytest.raises(ValueError, match="expected a cell as"):
        parse(PREFIX + text)


def test_the_gradients_of_masks_are_none() -> None:
    call = make_call(next(iter(MASKED.values())), T=3, H=4)
    leaves = [w.clone().requires_grad_() for w in call.weights]
    outputs = run_layer(call._replace(weights=leaves))
    assert all(w.requires_grad for w in leaves) and outputs[0].shape == (3, 3, 4)
    assert len(gradients_of(call)[1]) == len(call.spec.states)
