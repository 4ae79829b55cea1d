"""FlexRNN of cells with diagonal=N, and BlockGRU: one recurrence with a W_hh of blocks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tolerances import GRADCHECK, assert_same_formula
from torch import Tensor

import fused_rnn
from fused_rnn import BlockGRU, FlexRNN, ops
from fused_rnn.cells.diagonal import by_gate, cut, dense
from fused_rnn.nn.field.block_gru import block_gru

F64 = torch.float64
BACKENDS = ["reference", *(["cpu"] if ops.MISSING is None else [])]


def step(x: Any, r: Any, s: Any, p: Any) -> Any:
    """A GRU's gates, a sum over all units, of all blocks."""
    reset, z = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + reset * r[2])
    c = 0.5 * s.c + n
    return (1 - z) * n + z * s.h + p.a * c.mean(-1, keepdim=True), c


options: dict[str, Any] = {"gates": ("reset", "z", "n"), "states": ("h", "c"), "params": ("a",)}
one = fused_rnn.cell(**options)(step)
three = fused_rnn.cell(**options, diagonal=3)(step)
# Pickled by their names.
one.__qualname__ = "one"
three.__qualname__ = "three"


def whole_of(module: FlexRNN) -> FlexRNN:
    """The module of one block with the same weights and zeros, where `module` has none."""
    made = FlexRNN(
        one, module.input_size, module.hidden_size, module.num_layers, bidirectional=module.bidirectional,
        return_sequences=module.return_sequences, dtype=F64,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in module.named_parameters():
            blocks = "weight_hh" in name
            made.get_parameter(name).copy_(dense(by_gate(weight, 3), 3, 3) if blocks else weight)
    return made


def test_dense_and_back() -> None:
    w = torch.randn(4 * 15, 5)
    whole = dense(w, 4, 3)
    for g, gate in enumerate(whole.chunk(4)):
        torch.testing.assert_close(gate, torch.block_diag(*w.chunk(4)[g].chunk(3)))
    assert torch.equal(cut(whole, 4, 3), w)
    public = torch.randn(3, 20, 5)  # [N, G·H/N, H/N]
    for n, block in enumerate(public):
        for g, gate in enumerate(block.chunk(4)):
            assert torch.equal(by_gate(public, 4)[g * 15 + n * 5 : g * 15 + n * 5 + 5], gate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_zeros_say_the_same(backend: str, save: str) -> None:
    if save == "recompute" and backend == "reference":
        save = "gates"
    module = FlexRNN(
        three, 4, 21, 2, bidirectional=True, init={"a": 0.3}, return_sequences="states", save=save, backend=backend,
        dtype=F64,
    )  # fmt: skip
    assert module.weight_hh_l0.shape == (3, 21, 7) and module.heads == 1
    whole = whole_of(module)
    x, lengths, reset = torch.randn(66, 3, 4, dtype=F64), torch.tensor([66, 0, 31]), torch.rand(66, 3) < 0.2
    results = []
    for one_of in (module, whole):
        ys, after = one_of(x, lengths=lengths, reset=reset)
        out = [*ys, *after]
        names, weights = zip(*one_of.named_parameters(), strict=True)
        grads = torch.autograd.grad(sum((t * t.detach().cos()).sum() for t in out), weights)
        results.append((out, dict(zip(names, grads, strict=True))))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert_same_formula(a, b)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        if "weight_hh" in name:
            gradient, other = by_gate(gradient, 3), cut(other, 3, 3)
        assert_same_formula(gradient, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    """First and second derivatives."""
    module = FlexRNN(three, 2, 6, init={"a": 0.3}, bidirectional=True, backend=backend, dtype=F64)
    names, weights = zip(*module.named_parameters(), strict=True)
    hx = [torch.randn(2, 2, 6, dtype=F64) for _ in range(2)]
    lengths, reset = torch.tensor([3, 2]), torch.tensor([[False, False], [True, False], [False, False]])

    def run(x: Tensor, h: Tensor, c: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        given = {"lengths": lengths, "reset": reset}
        y, after = torch.func.functional_call(module, dict(zip(names, own, strict=True)), (x, (h, c)), given)
        return y, *after

    inputs = [t.detach().requires_grad_() for t in (torch.randn(3, 2, 2, dtype=F64), *hx, *weights)]
    assert torch.autograd.gradcheck(run, inputs, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, inputs, **GRADCHECK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recurrent_sides_that_no_formula_reads(backend: str) -> None:
    """They have no product, and h no gradient by one, whatever scratch holds of the blocks of another call."""

    @fused_rnn.cell(gates=2, diagonal=3)
    def unread(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] - x[0].mean(-1, keepdim=True) + x[1] * s.h)

    read = FlexRNN(three, 4, 21, backend=backend, dtype=F64)
    read(torch.randn(5, 3, 4, dtype=F64))[0].sum().backward()
    module = FlexRNN(unread, 4, 21, backend=backend, dtype=F64)
    x, h = torch.randn(5, 3, 4, dtype=F64), torch.randn(1, 3, 21, dtype=F64, requires_grad=True)
    (made,) = torch.autograd.grad(module(x, h)[0].sum(), h)
    now, total = h[0], torch.zeros((), dtype=F64)
    for gates in torch.nn.functional.linear(x, module.weight_ih_l0, module.bias_ih_l0):
        (now,) = unread(gates.chunk(2, -1), None, (now,))
        total = total + now.sum()
    (expected,) = torch.autograd.grad(total, h)
    assert_same_formula(made, expected)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_weights_and_samples(shared: bool) -> None:
    module = FlexRNN(three, 4, 6, init={"a": 0.3}, dtype=F64)
    x = torch.randn(5, 3, 2, 4, dtype=F64)
    own = {name: torch.stack([p.detach(), -p.detach()]) for name, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()  # type: ignore[no-any-return]

    if shared:
        weights = {name: w[0] for name, w in own.items()}
        made = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, x)
        expected = [torch.func.grad(loss)(weights, x[:, b]) for b in range(3)]
    else:
        made = torch.func.vmap(torch.func.grad(loss), (0, None))(own, x[:, 0])
        expected = [torch.func.grad(loss)({k: w[n] for k, w in own.items()}, x[:, 0]) for n in range(2)]
    for name, value in made.items():
        assert_same_formula(value, torch.stack([each[name] for each in expected]))


def test_regularisers_and_gates() -> None:
    """A variant of the cell has its blocks."""
    kinds: dict[str, Any] = {"recurrent_dropout": 0.3, "zoneout": 0.2, "return_gates": True}
    for backend in BACKENDS:
        results = []
        module = FlexRNN(three, 4, 6, init={"a": 0.3}, dtype=F64, backend=backend, **kinds)
        whole = whole_of(module)
        for name, value in kinds.items():
            setattr(whole, name, value)
        for one_of in (module, whole):
            torch.manual_seed(3)
            y, after, gates = one_of(torch.ones(5, 3, 4, dtype=F64))
            results.append([y, *after, *gates.values()])
        for a, b in zip(*results, strict=True):
            assert_same_formula(a, b)
    module = FlexRNN(three, 4, 6, weight_dropout=0.5, dtype=F64)
    module(torch.randn(5, 3, 4, dtype=F64))[0].sum().backward()
    grad = module.weight_hh_l0.grad
    assert grad is not None and bool((grad == 0).any()) and bool((grad != 0).any())


def test_a_stream_and_single_steps() -> None:
    for module in (FlexRNN(three, 4, 21, 2, init={"a": 0.3}), BlockGRU(4, 21, 2, blocks=3)):
        stream, x = module.stream(2), torch.randn(5, 2, 4)
        with torch.no_grad():
            y, _ = module(x)
            module.weight_hh_l0.mul_(0.5)
            other, _ = module(x)
        torch.testing.assert_close(torch.stack([stream.step(x[t]).clone() for t in range(5)]), y)
        stream.refresh()
        stream.reset()
        torch.testing.assert_close(torch.stack([stream.step(x[t]).clone() for t in range(5)]), other)
        assert not torch.equal(y, other)


def test_a_nan_stays_in_its_block() -> None:
    @fused_rnn.cell(gates=1, diagonal=2)
    def elman(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0])

    for backend in BACKENDS:
        module = FlexRNN(elman, 4, 10, backend=backend)
        h = torch.zeros(1, 3, 10)
        h[..., 7] = float("nan")
        y, _ = module(torch.randn(3, 3, 4), h)
        assert bool(y[..., :5].isfinite().all()) and bool(y[..., 5:].isnan().all())


def test_copies_and_pickles() -> None:
    for module in (FlexRNN(three, 4, 6, init={"a": 0.3}), BlockGRU(4, 6, blocks=3), BlockGRU(4, 6)):
        x = torch.randn(5, 3, 4)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert again.cell is module.cell
            assert torch.equal(again(x)[0], module(x)[0])
    assert BlockGRU(4, 6, blocks=3).cell is BlockGRU(4, 12, blocks=3).cell is not block_gru
    assert repr(three) == "<cell step: gates=3, states=('h', 'c'), params=('a',), diagonal=3>"
    assert "diagonal=3|" in three.program.text and "diagonal" not in one.program.text


def test_initial_values() -> None:
    module = FlexRNN(three, 4, 48)
    assert 0.9 * 16**-0.5 < float(module.weight_hh_l0.detach().abs().max()) <= 16**-0.5
    assert float(module.weight_ih_l0.detach().abs().max()) <= 48**-0.5


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size: got 7, expected a multiple of the cell's diagonal = 3"):
        FlexRNN(three, 4, 7)
    with pytest.raises(ValueError, match="heads: got 2, expected 1 of a cell with diagonal = 3"):
        FlexRNN(three, 4, 6, heads=2)
    for number in (0, -1, True, 2.0, "2"):
        with pytest.raises(ValueError, match=r"diagonal: got .*, expected a positive number of blocks"):
            fused_rnn.cell(gates=1, diagonal=number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="diagonal: got 2, expected 1: without W_hh"):
        fused_rnn.cell(gates=1, recurrent=False, diagonal=2)
    module = FlexRNN(three, 4, 6)
    module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(18, 2))
    with pytest.raises(ValueError, match=r"weight_hh_l0: got \[18, 2\], expected \[3, 6, 2\]"):
        module(torch.randn(5, 3, 4))
    text = three.program.text
    for rows, columns in ((18, 6), (21, 2), (20, 2)):
        weights = [torch.zeros(rows, 4), torch.zeros(rows, columns), torch.zeros(6)]
        with pytest.raises(ValueError, match=r"weights\[1\]: got .*, expected w_hh \[3·H, H/3\] of a step"):
            fused_rnn.layers.run(text, torch.randn(5, 3, 4), weights)
