"""What the cells with norms and with a second product have beside the others: parameters and formulas of others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from field_loop import Case, by_loop, given
from plain_loop import by_module
from tolerances import assert_as_good_as_torch, assert_same_formula
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn
from fused_rnn.nn import flex
from fused_rnn.nn.plain import FAST_PATH

F64 = torch.float64


def by_haste(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The formula of Haste's layers in their own layout: LSTM i, g, f, o; GRU z, r, h."""
    gates = 4 if "gamma_h" in w else 3
    rows = w["recurrent_kernel"].shape[1]
    h = c = x.new_zeros(x.shape[1], rows // gates)
    outputs = []
    for t in range(len(x)):
        own = F.layer_norm(x[t] @ w["kernel"], (rows,), w["gamma"][0]) + w["bias"]
        other = F.layer_norm(h @ w["recurrent_kernel"], (rows,), w["gamma"][1])
        if gates == 4:
            i, g, f, o = (own + other).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, h.shape[1:], w["gamma_h"], w["beta_h"]))
        else:
            (x_z, x_r, x_n), (h_z, h_r, h_n) = own.chunk(3, 1), (other + w["recurrent_bias"]).chunk(3, 1)
            z = torch.sigmoid(x_z + h_z)
            h = z * h + (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(("name", "gates"), [("LayerNormLSTM", 4), ("LayerNormGRU", 3)])
def test_hastes_state_dict_loads(name: str, gates: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (5, gates * 6), "recurrent_kernel": (6, gates * 6), "bias": (gates * 6,), "gamma": (2, gates * 6),
    }  # fmt: skip
    shapes |= {"gamma_h": (6,), "beta_h": (6,)} if gates == 4 else {"recurrent_bias": (gates * 6,)}
    theirs = {key: torch.randn(shape, dtype=F64) for key, shape in shapes.items()}
    given = {f"1.{key}": value for key, value in theirs.items()}
    model = nn.Sequential(nn.Identity(), getattr(fused_rnn, name)(5, 6, dtype=F64))
    model.load_state_dict(given)
    assert set(given) == {f"1.{key}" for key in shapes}  # the caller's own is as it was
    x = torch.randn(7, 3, 5, dtype=F64)
    assert_same_formula(model(x)[0], by_haste(x, theirs))
    again = getattr(fused_rnn, name)(5, 6, dtype=F64)
    again.load_state_dict(model[1].state_dict())
    assert_same_formula(again(x)[0], by_haste(x, theirs))
    del given["1.kernel"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_ih_l0"):
        model.load_state_dict(given)
    with pytest.raises(RuntimeError, match="size mismatch for gamma_ih_l0"):
        again.load_state_dict(theirs | {"gamma": torch.ones(3, gates * 6)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*recurrent_kernel"):
        getattr(fused_rnn, name)(5, 6, 2).load_state_dict(theirs)


def test_onnx_has_the_formula_of_reset_before_gru() -> None:
    """Its GRU with linear_before_reset=0, whose gates are z, r, h, in onnxruntime."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    gru, x = fused_rnn.ResetBeforeGRU(4, 6), torch.randn(7, 3, 4)

    def reordered(w: Tensor) -> Tensor:
        r, z, n = w.detach().chunk(3)
        return torch.cat([z, r, n])

    values = {
        "W": reordered(gru.weight_ih_l0).unsqueeze(0), "R": reordered(gru.weight_hh_l0).unsqueeze(0),
        "B": torch.cat([reordered(gru.bias_ih_l0), reordered(gru.bias_hh_l0)]).unsqueeze(0),
    }  # fmt: skip
    node = helper.make_node("GRU", ["X", "W", "R", "B"], ["Y", "Y_h"], hidden_size=6, linear_before_reset=0)
    kinds = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in ("X", "Y", "Y_h")]
    weights = [helper.make_tensor(key, TensorProto.FLOAT, v.shape, v.flatten().tolist()) for key, v in values.items()]
    graph = helper.make_graph([node], "gru", kinds[:1], kinds[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString())
    y, last = (torch.from_numpy(value) for value in session.run(None, {"X": x.numpy()}))
    with torch.no_grad():
        ours, h_n = gru(x)
    torch.testing.assert_close(ours, y[:, 0])
    torch.testing.assert_close(h_n, last)


def test_torchs_state_dict_loads_into_reset_before_gru() -> None:
    gru, theirs = fused_rnn.ResetBeforeGRU(4, 6, 2, bidirectional=True), nn.GRU(4, 6, 2, bidirectional=True)
    assert list(gru.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for name, bias in theirs.named_parameters():
            if name.startswith("bias"):
                bias[:6] = 50  # with r = 1 there is nothing before or after
    gru.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(gru(x), theirs(x))


def test_initial_values() -> None:
    lstm = fused_rnn.LayerNormLSTM(4, 6, forget_bias=2.0)
    assert lstm.bias_ih_l0.detach().unflatten(0, (4, 6))[:, 0].tolist() == [0, 2, 0, 0]
    assert bool((lstm.gamma_ih_l0 == 1).all()) and bool((lstm.gamma_c_l0 == 1).all()) and not lstm.beta_c_l0.any()
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(6))
    assert 0.9 * 0.6**0.5 < fused_rnn.LayerNormGRU(4, 6).weight_ih_l0.abs().max() <= 0.6**0.5  # √(6 / (D + H))
    gru = fused_rnn.BlockGRU(48, 64, blocks=4)
    assert gru.weight_hh_l0.shape == (4, 48, 16)
    assert gru.weight_hh_l0.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert gru.weight_ih_l0.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not gru.bias_ih_l0.any() and list(fused_rnn.BlockGRU(4, 6, bias=False).state_dict())[-1] == "beta_l0"


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("BlockGRU", {"blocks": 4}, "blocks: got 4, expected a positive divisor of hidden_size = 6"),
        ("MGU", {"weight_dropout": 0.5}, "weight_dropout: got 0.5, expected 0: a gate stands before"),
        ("LayerNormLSTM", {"forget_bias": "1"}, "forget_bias: got '1', expected a number"),
    ],
)
def test_errors(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(fused_rnn, name)(4, 6, **option)


def test_a_mean_that_is_large_beside_the_deviation() -> None:
    """E[v²] - E[v]² would have no digits left."""
    case = Case("BlockGRU", H=30)
    rnn = case.module()
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(1e3)
    call = given(case, 1)
    results = (by_loop(rnn, case.variant, call, dtype) for dtype in (torch.float32, F64))
    assert_as_good_as_torch(by_module(rnn, call), *results)


@pytest.mark.parametrize("name", ["LayerNormLSTM", "LayerNormGRU", "BlockGRU", "ResetBeforeGRU", "MGU"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_path_reads_the_parameters_as_they_are(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they were changed since the last call."""
    module, x = getattr(fused_rnn, name)(4, 6, bias=bias), torch.randn(5, 3, 4)
    if FAST_PATH is None:
        pytest.skip("there is no fast path")
    calls: list[bool] = []

    def counting(*args: Any) -> Any:
        made = FAST_PATH(*args)
        calls.append(made is not None)
        return made

    monkeypatch.setattr(flex, "FAST_PATH", counting)

    def check(module: Any, fast: bool) -> None:
        calls.clear()
        own = next(module.parameters())
        given = x.to(own.dtype)
        with torch.no_grad():
            made = module(given)[0]
        assert calls == [fast]
        expected = module(given)[0].detach()
        torch.testing.assert_close(made, expected)

    check(module, True)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    check(module, True)
    module.weight_ih_l0.data.add_(1)
    check(module, True)
    module.weight_hh_l0 = nn.Parameter(torch.rand_like(module.weight_hh_l0))
    check(module, True)
    module.weight_hh_l0.data = torch.randn_like(module.weight_hh_l0)
    check(module, True)
    check(copy.deepcopy(module), True)
    check(pickle.loads(pickle.dumps(module)), True)
    check(module.double(), True)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    check(module, False)
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(3)
    check(module, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", fused_rnn.list_cells())
def test_made_in_16_bits(name: str, dtype: torch.dtype) -> None:
    module = getattr(fused_rnn, name)(4, 6, dtype=dtype)
    y = module(torch.randn(3, 2, 4, dtype=dtype))[0]
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("name", [n for n in fused_rnn.list_cells() if n not in ("LSTM", "GRU", "RNN")])
def test_arguments_that_a_cell_has_not(name: str) -> None:
    kind = getattr(fused_rnn, name)
    with pytest.raises(TypeError, match=f"{name}.*'proj_size'"):
        kind(4, 6, proj_size=2)
    if name not in ("SLSTM", "PeepholeLSTM", "CoupledLSTM"):
        with pytest.raises((TypeError, ValueError), match="heads"):
            kind(4, 6, heads=2)


def test_slstm_with_a_closed_input_gate() -> None:
    """At the beginning nothing is divided by nothing: exp(m) of what is not there."""
    module = fused_rnn.SLSTM(3, 4)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        module.bias_ih_l0[:4] = -100
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    y, _ = module(torch.randn(6, 2, 3), reset=reset)
    y.sum().backward()
    assert y.isfinite().all() and all(w.grad.isfinite().all() for w in module.parameters())


def test_ligru_under_autocast() -> None:
    """Every layer has the batch's statistics, whatever dtype the layer below returns."""
    module = fused_rnn.LiGRU(3, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(20, 5, 3))
        module(torch.randn(20, 5, 3, dtype=torch.bfloat16))
    counts = [int(buffer) for name, buffer in module.named_buffers() if name.startswith("num_batches")]
    assert counts == [2, 2]


def test_ligru_forgets_its_own_statistics_alone() -> None:
    module = fused_rnn.LiGRU(3, 4)
    module.register_buffer("mine", torch.ones(2))
    module(torch.randn(5, 2, 3))
    module.reset_parameters()
    assert module.mine.eq(1).all() and module.running_var_l0.eq(1).all() and module.running_mean_l0.eq(0).all()
