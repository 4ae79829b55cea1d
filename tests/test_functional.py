"""functional.*: every case by every backend against the float64 reference; unusual and wrong arguments."""

from __future__ import annotations

import pytest
import torch
from cases import Case, inputs, option_cases, shape_cases
from oracle import by_backend, by_reference, by_torch, forward, over_draws, require
from tolerances import assert_as_good_as_torch, assert_same_formula

from fused_rnn import functional
from fused_rnn.cells import CELLS

BACKENDS = ["cpu", "torch", "reference"]


@pytest.mark.parametrize("case", shape_cases() + option_cases(), ids=str)
def test_cpu(case: Case) -> None:
    require("cpu", case)
    ours = over_draws(case, lambda case, given: by_backend(case, given, "cpu"))
    assert_as_good_as_torch(ours, over_draws(case, by_torch), over_draws(case, by_reference))


@pytest.mark.parametrize("case", option_cases((torch.float32, torch.bfloat16)), ids=str)
def test_reference_in_low_precision(case: Case) -> None:
    require("reference", case)
    given = inputs(case)
    assert_as_good_as_torch(by_backend(case, given, "reference"), by_torch(case, given), by_reference(case, given))


@pytest.mark.parametrize("case", option_cases((torch.float64,)), ids=str)
def test_torch_in_float64(case: Case) -> None:
    require("torch", case)
    given = inputs(case)
    ours, reference = by_backend(case, given, "torch"), by_reference(case, given)
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


@pytest.mark.parametrize("case", shape_cases()[::3] + option_cases((torch.float32, torch.bfloat16)), ids=str)
def test_without_gradient_the_values_are_the_same(case: Case) -> None:
    """Nothing kept, another instance of the loop, the same bits."""
    require("cpu", case)
    given = inputs(case)
    kept = by_backend(case, given, "cpu")
    with torch.no_grad():
        plain = forward(case, given, "cpu")
    for name, value in zip(("y", "h_n", "c_n"), plain, strict=False):
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_empty_batch(cell: str, backend: str | None) -> None:
    case = Case(cell, B=0, layers=2, bidirectional=True, lengths=True)
    if backend is not None:
        require(backend, case)
    results = by_backend(case, inputs(case), backend)
    assert results["y"].shape == (5, 0, 34) and results["h_n"].shape == (4, 0, 17)
    assert results["dx"].shape == (5, 0, 4)
    assert all(not g.any() for name, g in results.items() if name.startswith("dweights"))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_no_time_steps_is_torchs_error(backend: str | None) -> None:
    case = Case("gru", T=0)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        forward(case, inputs(case), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_past_a_sequences_end_shows_nowhere(backend: str, cell: str, save: str, dtype: torch.dtype) -> None:
    case = Case(cell, T=40, bidirectional=True, lengths=True, save=save, dtype=dtype)
    require(backend, case)
    given = inputs(case)
    assert given.lengths is not None
    past = (torch.arange(case.T)[:, None] >= given.lengths)[..., None]
    zero, nan = (by_backend(case, given._replace(x=given.x.masked_fill(past, v)), backend) for v in (0, torch.nan))
    for name, value in zero.items():
        assert torch.equal(nan[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs(cell: str, backend: str) -> None:
    """Transposed, sliced and expanded tensors give what their contiguous copies give, gradients included."""
    case = Case(cell, bidirectional=True, lengths=True, dtype=torch.float64)
    require(backend, case)
    given = inputs(case)
    strided = given._replace(
        x=given.x.transpose(0, 1).contiguous().transpose(0, 1),
        weights=[w.t().contiguous().t() if w.dim() == 2 else torch.stack((w, w), 1)[:, 0] for w in given.weights],
        hx=[s[:, :1].expand(-1, 3, -1) for s in given.hx],
        lengths=torch.stack((given.lengths, given.lengths), 1)[:, 0],
    )
    plain = strided._replace(hx=[s.contiguous() for s in strided.hx])
    assert (
        not strided.x.is_contiguous() and not strided.weights[0].is_contiguous() and not strided.hx[0].is_contiguous()
    )
    for one, other in zip(
        forward(case, strided, backend),
        forward(case, plain._replace(x=given.x, weights=given.weights), backend),
        strict=True,
    ):
        assert_same_formula(one, other)
    dout = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in given.dout]
    ours = by_backend(case, strided._replace(dout=dout), backend)
    for name, value in by_backend(case, given._replace(hx=plain.hx), backend).items():
        assert_same_formula(ours[name], value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_any_integer_kind(backend: str) -> None:
    case = Case("lstm", lengths=True)
    require(backend, case)
    given = inputs(case)._replace(lengths=torch.tensor([5, 1, 3]))
    expected = forward(case, given, backend)
    for lengths in (torch.tensor([5, 1, 3], dtype=torch.int32), torch.tensor([5, 1, 3], dtype=torch.uint8), [5, 1, 3]):
        for one, other in zip(forward(case, given._replace(lengths=lengths), backend), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_torchs_mask(cell: str, backend: str) -> None:
    case = Case(cell, layers=3, bidirectional=True, dtype=torch.float64)
    require(backend, case)
    given = inputs(case)
    name = cell.split("_")[0]
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.5} | (
        {"nonlinearity": cell[4:]} if name == "rnn" else {}
    )
    module = getattr(torch.nn, name.upper())(4, 17, dtype=torch.float64, **options)
    for own, w in zip(module.parameters(), given.weights, strict=True):
        own.data = w
    torch.manual_seed(3)
    expected, _ = module(given.x)
    torch.manual_seed(3)
    y, _ = getattr(functional, name)(given.x, given.weights, None, training=True, backend=backend, **options)
    assert_same_formula(y, expected)
    y, _ = getattr(functional, name)(given.x, given.weights, None, training=False, backend=backend, **options)
    assert_same_formula(y, module.eval()(given.x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, backend: str) -> None:
    """Every cell returns autocast's dtype, as if its inputs had been cast; gradients come in the parameters' dtype."""
    case = Case(cell, layers=2)
    require(backend, case)
    given = inputs(case)
    weights = [w.requires_grad_() for w in given.weights]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = forward(case, given, backend)
    cast = forward(case, given.to(torch.bfloat16), backend)
    for one, other in zip(outputs, cast, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)
    for grad in torch.autograd.grad(outputs, weights, [torch.ones_like(o) for o in outputs]):
        assert grad.dtype == torch.float32
    double = case._replace(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(double, inputs(double), backend)[0].dtype == torch.float64


@pytest.mark.parametrize("cell", CELLS)
def test_backward_inside_autocast_is_not_recast(cell: str) -> None:
    case = Case(cell)
    require("cpu", case)
    given = inputs(case)
    weights = [w.requires_grad_() for w in given.weights]
    y = forward(case, given, "cpu")[0]
    outside = torch.autograd.grad(y.sum(), weights, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), weights)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


def test_meta_tensors_have_shapes() -> None:
    case = Case("lstm", layers=2, bidirectional=True, proj=5)
    require("cpu", case)
    given = inputs(case)
    meta = given._replace(
        x=given.x.to("meta"), weights=[w.to("meta") for w in given.weights], hx=[s.to("meta") for s in given.hx]
    )
    for one, other in zip(forward(case, meta, None), forward(case, given, None), strict=True):
        assert one.shape == other.shape and one.device.type == "meta"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_one_step(cell: str, backend: str | None, bias: bool, with_state: bool) -> None:
    """*_cell is a sequence of one step, with and without a gradient."""
    case = Case(cell, T=1, bias=bias, hx=with_state, dtype=torch.float64)
    if backend is not None:
        require(backend, case)
    given = inputs(case)

    def step() -> list[torch.Tensor]:
        state = [s[0] for s in given.hx]
        if cell == "lstm":
            return list(functional.lstm_cell(given.x[0], tuple(state) or None, given.weights, backend=backend))
        h = state[0] if state else None
        if cell == "gru":
            return [functional.gru_cell(given.x[0], h, given.weights, backend=backend)]
        return [functional.rnn_cell(given.x[0], h, given.weights, nonlinearity=cell[4:], backend=backend)]

    tensors = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]
    ours, whole = step(), forward(case, given, "reference")[1:]
    expected = torch.autograd.grad([s[0] for s in whole], tensors, [torch.ones_like(s[0]) for s in whole])
    actual = torch.autograd.grad(ours, tensors, [torch.ones_like(s) for s in ours])
    with torch.no_grad():
        plain = step()
    for one, other, third in zip(ours, whole, plain, strict=True):
        assert_same_formula(one, other[0])
        assert_same_formula(third, other[0])
    for one, other in zip(actual, expected, strict=True):
        assert_same_formula(one, other)


X, W_IH, W_HH, B_IH = torch.ones(5, 3, 4), torch.ones(28, 4), torch.ones(28, 7), torch.ones(28)
WEIGHTS = [W_IH, W_HH, B_IH, B_IH]
WRONG = {
    "x of two dimensions": ({"x": X[0]}, "x: got [3, 4], expected three dimensions"),
    "x too wide": ({"x": torch.ones(5, 3, 6)}, "weights[0]: got [28, 4], expected [28, 6]"),
    "x of another dtype": (
        {"x": X.double()},
        "weights[0]: got torch.float32 on cpu, expected x's torch.float64 on cpu",
    ),
    "x on another device": (
        {"x": X.to("meta")},
        "weights[0]: got torch.float32 on cpu, expected x's torch.float32 on meta",
    ),
    "too few weights": (
        {"weights": WEIGHTS[:1]},
        "weights: got 1 tensors, expected 2, 3, 4 or 5 for each of 1 layer(s) × 1 direction(s)",
    ),
    "weights of one layer": ({"num_layers": 3}, "weights: got 4 tensors, expected 2, 3, 4 or 5 for each of 3 layer(s)"),
    "w_hh of one dimension": (
        {"weights": [W_IH, B_IH, B_IH, B_IH]},
        "weights[1]: got [28], expected w_hh [4·H, H] of a lstm",
    ),
    "w_hh not square": (
        {"weights": [W_IH, torch.ones(28, 6), B_IH, B_IH]},
        "weights[1]: got [28, 6], expected w_hh [4·H, H]",
    ),
    "rows not four gates": (
        {"weights": [torch.ones(27, 4), torch.ones(27, 7)]},
        "weights[1]: got [27, 7], expected w_hh [4·H, H]",
    ),
    "bias too long": ({"weights": [W_IH, W_HH, B_IH, torch.ones(29)]}, "weights[3]: got [29], expected [28]"),
    "mixed weights": (
        {"weights": [W_IH, W_HH.double(), B_IH, B_IH]},
        "weights[1]: got torch.float64 on cpu, expected x's torch.float32",
    ),
    "h0 of two dimensions": (
        {"hx": (torch.ones(3, 7), torch.ones(1, 3, 7))},
        "h0: got [3, 7], expected [L·R, B, P] = [1, 3, 7]",
    ),
    "c0 of another batch": (
        {"hx": (torch.ones(1, 3, 7), torch.ones(1, 2, 7))},
        "c0: got [1, 2, 7], expected [L·R, B, H] = [1, 3, 7]",
    ),
    "h0 of another dtype": ({"hx": (torch.ones(1, 3, 7).half(), torch.ones(1, 3, 7))}, "h0: got torch.float16 on cpu"),
    "lengths negative": (
        {"lengths": torch.tensor([5, -1, 2])},
        "lengths: got values from -1 to 5, expected 0 to T = 5",
    ),
    "lengths too long": ({"lengths": [6, 1, 2]}, "lengths: got values from 1 to 6, expected 0 to T = 5"),
    "lengths of another batch": ({"lengths": [5, 1]}, "lengths: got [2], expected [B] = [3]"),
    "lengths not integers": ({"lengths": torch.ones(3)}, "lengths: got torch.float32, expected an integer dtype"),
    "reset not bool": ({"reset": torch.ones(5, 3)}, "reset: got torch.float32, expected torch.bool"),
    "reset transposed": ({"reset": torch.ones(3, 5, dtype=torch.bool)}, "reset: got [3, 5], expected [T, B] = [5, 3]"),
    "unknown save": ({"save": "all"}, "save: got 'all', expected one of 'gates', 'recompute'"),
    "unknown backend": ({"backend": "tpu"}, "backend: got 'tpu', expected None or one of 'cpu', 'torch', 'reference'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    given, message = WRONG[name]
    arguments = {"x": X, "weights": WEIGHTS} | given
    with pytest.raises(ValueError) as raised:
        functional.lstm(arguments.pop("x"), arguments.pop("weights"), arguments.pop("hx", None), **arguments)
    assert message in str(raised.value)


def test_wrong_arguments_of_other_cells() -> None:
    with pytest.raises(ValueError, match=r"weights: got 3 tensors, expected 2 or 4"):
        functional.gru(X, [torch.ones(21, 4), torch.ones(21, 7), torch.ones(7, 7)])
    with pytest.raises(TypeError, match=r"h0: got tuple, expected a tensor \[L·R, B, P\]"):
        functional.gru(X, [torch.ones(21, 4), torch.ones(21, 7)], (torch.ones(1, 3, 7), torch.ones(1, 3, 7)))
    with pytest.raises(TypeError, match=r"hx: got a tensor \[2, 3, 7\], expected a pair \(h0, c0\) of tensors"):
        functional.lstm(X, WEIGHTS, torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match="num_layers: got 0, expected at least 1"):
        functional.gru(X, [torch.ones(21, 4), torch.ones(21, 7)], num_layers=0)
    with pytest.raises(ValueError, match="nonlinearity: got 'gelu', expected 'tanh' or 'relu'"):
        functional.rnn(X, [torch.ones(7, 4), torch.ones(7, 7)], nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"x: got \[5, 3, 4\], expected two dimensions \[B, D\]"):
        functional.lstm_cell(X, None, WEIGHTS)
    with pytest.raises(ValueError, match=r"h: got \[2, 7\], expected \[B, H\] = \[3, 7\]"):
        functional.lstm_cell(X[0], (torch.ones(2, 7), torch.ones(3, 7)), WEIGHTS)
    with pytest.raises(ValueError, match="with a projection; a single step has none"):
        functional.lstm_cell(X[0], None, [W_IH, torch.ones(28, 5), B_IH, B_IH, torch.ones(5, 7)])
