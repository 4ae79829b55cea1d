"""Results as tensors: whose memory they have, of arguments of any size, of any mode that they were made in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FUNCTIONS
from counterparts import CELLS, MODULES, SEQUENCES, assert_alike, assert_same, flatten, make, states
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import dispatch
from fused_rnn.nn.sequence import run as nn_sequence_run

FORMS = ("batched", "batch_first", "unbatched", "equal lengths", "packed", "unsorted")


def call_in_form(name: str, form: str, steps: int, options: dict[str, Any], backend: str | None) -> tuple[Any, ...]:
    """(ours, torch's, input, hx) for the form."""
    first = {"batch_first": True} if form == "batch_first" else {}
    pair = make(name, 5, 7, **options, **first, extras={"backend": backend})
    x = torch.randn(3, steps, 5) if form == "batch_first" else torch.randn(steps, 3, 5)
    lengths = {"equal lengths": [steps] * 3, "packed": [steps, 1, 1], "unsorted": [1, steps, 1]}.get(form)
    given: Any = x[:, 0] if form == "unbatched" else x
    if lengths is not None:
        given = pack_padded_sequence(x, lengths, enforce_sorted=form != "unsorted")
    return *pair, given, states(pair[1], None if form == "unbatched" else 3)


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_result_is_a_view_only_where_torchs_is(name: str, form: str, grad: bool, backend: str | None) -> None:
    """In-place operations that PyTorch refuses on views, such as h.detach_(), run where they run with torch.nn."""
    for options in ({}, {"num_layers": 2}, {"bidirectional": True}):
        for steps in (1, 3):
            ours, counterpart, *given = call_in_form(name, form, steps, options, backend)
            with torch.set_grad_enabled(grad):
                pairs = list(zip(flatten(ours(*given)), flatten(counterpart(*given)), strict=True))
            for a, b in pairs:
                assert b._is_view() or not a._is_view()
                assert a.shape == b.shape
                if a.is_floating_point() and not a._is_view():
                    a.detach_()


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", CELLS)
def test_a_cells_state_is_no_view(name: str, grad: bool, backend: str | None) -> None:
    ours, _ = make(name, 5, 7, extras={"backend": backend})
    with torch.set_grad_enabled(grad):
        state: Any = None
        for _ in range(2):
            state = ours(torch.randn(3, 5), state)
            for t in flatten(state):
                assert not t._is_view()
                t.detach_()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_residual_in_place(name: str, options: dict[str, Any], backend: str | None) -> None:
    """Of a batch that comes first a copy is kept, so that the caller may write to it, and to the result."""
    results = []
    for module in make(name, 7, 7, batch_first=True, dtype=torch.float64, **options, extras={"backend": backend}):
        torch.manual_seed(0)
        x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
        z = x * 2
        y, _ = module(z)
        z += y[..., :7]
        z.pow(2).sum().backward()
        results.append([z.detach(), x.grad, *(p.grad for p in module.parameters())])
    assert_same(*results)


def test_a_batch_that_comes_first_is_copied_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training forward and backward get one copy; where nothing is kept the kernels read the input as it lies."""
    seen = []
    for name in ("forward", "backward"):
        inner = getattr(dispatch.BACKENDS["cpu"], name)

        def watch(call: Any, inner: Any = inner) -> Any:
            seen.append(call.x)
            return inner(call)

        monkeypatch.setattr(dispatch.BACKENDS["cpu"], name, watch)
    module, given = make("GRU", 5, 7, batch_first=True, extras={"backend": "cpu"})[0], torch.randn(3, 4, 5)
    y, _ = module(given)
    y.sum().backward()
    assert len(seen) == 2
    assert all(x.is_contiguous() and x.data_ptr() == seen[0].data_ptr() != given.data_ptr() for x in seen)
    seen.clear()
    with torch.no_grad():
        nn_sequence_run(module, given, None, None, None)
    assert [x.data_ptr() for x in seen] == [given.data_ptr()]


@pytest.mark.parametrize("backend", [None, "cpu", "reference", "torch"])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("name", CELLS)
def test_input_of_no_features(name: str, batch: int, backend: str | None) -> None:
    pair = make(name, 0, 7, dtype=torch.float64, extras={"backend": backend})
    x = torch.randn(batch, 0, dtype=torch.float64)
    hx: Any = torch.randn(batch, 7, dtype=torch.float64)
    assert_alike(*pair, x, (hx, hx + 1) if name == "LSTMCell" else hx)
    assert_alike(*pair, x)
    with torch.no_grad():
        assert_same(*(module(x) for module in pair))


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_a_sequence_of_no_features_is_one_of_zeros(cell: str) -> None:
    function, gates = FUNCTIONS[cell], {"lstm": 4, "gru": 3}.get(cell, 1)
    weights = [torch.randn(gates * 7, width, dtype=torch.float64, requires_grad=True) for width in (0, 7) * 2]
    x = torch.randn(4, 3, 0, dtype=torch.float64, requires_grad=True)
    y, _ = function(x, weights, bidirectional=True)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weights[0].grad is not None and weights[0].grad.shape == weights[0].shape
    zeros = [w if w.shape[1] else torch.ones(gates * 7, 1, dtype=torch.float64) for w in weights]
    assert_same(y, function(torch.zeros(4, 3, 1, dtype=torch.float64), zeros, bidirectional=True)[0])


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_no_units(name: str) -> None:
    pair = make(name, 5, 0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            a, b = (flatten(module(torch.randn(3, 5))) for module in pair)
            assert [t.shape for t in a] == [t.shape for t in b]
    ours, _ = make(name, 5, 0, extras={"backend": "cpu"})
    with pytest.raises(NotImplementedError, match="it has no loop over no hidden units"):
        ours(torch.randn(3, 5))


@pytest.mark.parametrize("name", MODULES)
def test_a_gradient_asked_for_in_inference_mode(name: str) -> None:
    """As with torch.nn: nothing is recorded there."""
    x = torch.randn(3, 5) if name in CELLS else torch.randn(4, 3, 5)
    with torch.inference_mode(), torch.enable_grad():
        a, b = (flatten(module(x)) for module in make(name, 5, 7))
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t)
        assert (s.is_inference(), s.requires_grad) == (t.is_inference(), t.requires_grad)


@pytest.mark.parametrize("backend", [None, "cpu", "reference", "torch"])
@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", MODULES)
def test_weights_made_in_inference_mode(name: str, steps: int, needs: bool, backend: str | None) -> None:
    """What torch.nn runs with them runs, with a gradient or without; what it refuses, it refuses in its words."""
    with torch.inference_mode():
        pair = make(name, 5, 7, extras={"backend": backend})
    x = torch.randn(3, 5) if name in CELLS else torch.randn(steps, 3, 5)
    with torch.no_grad():
        a, b = (flatten(module(x)) for module in pair)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t)
        assert s.is_inference() == t.is_inference()
    with torch.inference_mode():
        assert all(t.is_inference() for t in flatten(pair[0](x)))
    outcomes = []
    for module in pair:
        try:
            outputs = flatten(module(x.clone().requires_grad_(needs)))
            outputs[0].sum().backward()
            outcomes.append([p.grad for p in module.parameters()])
        except RuntimeError as error:
            outcomes.append(str(error))
    ours, counterpart = outcomes
    if isinstance(counterpart, str):
        assert ours == counterpart or (name, steps, needs) == ("LSTM", 1, False)  # oneDNN saves what it has no use for
    else:
        for p, q in zip(ours, counterpart, strict=True):
            assert p is not None or backend == "torch"
            if q is not None:  # torch loses that of a matrix, whose transpose is an inference tensor again
                torch.testing.assert_close(p, q)
