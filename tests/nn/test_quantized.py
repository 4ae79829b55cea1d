"""fused_rnn.quantize: modules with weights of int8, beside float64 loops, torch's quantize_dynamic and onnxruntime."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow_streams import flat, rounded
from tolerances import allowed, error
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from user_cells import leaky

import fused_rnn
from fused_rnn import ops
from fused_rnn.gpu.narrow import narrowed, widened
from fused_rnn.nn.quantized import Quantized, QuantizedGRU, QuantizedLSTM, QuantizedRNN

pytestmark = pytest.mark.skipif(ops.fast_path is None, reason="there is no way past the dispatcher")
needs_bytes = pytest.mark.skipif(ops.ISA not in ("avx512bf16", "amx"), reason=f"{ops.ISA} multiplies no bytes")
KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **more: fused_rnn.LSTM(9, 21, **more),
    "LSTM-proj": lambda **more: fused_rnn.LSTM(9, 21, proj_size=5, **more),
    "GRU": lambda **more: fused_rnn.GRU(9, 21, **more),
    "RNN": lambda **more: fused_rnn.RNN(9, 21, **more),
    "relu": lambda **more: fused_rnn.RNN(9, 21, nonlinearity="relu", **more),
    "no-bias": lambda **more: fused_rnn.GRU(9, 21, bias=False, **more),
    "stack": lambda **more: fused_rnn.LSTM(9, 21, 3, bidirectional=True, **more),
    "large": lambda **more: fused_rnn.GRU(300, 130, 2, **more),
    "FlexRNN": lambda **more: fused_rnn.FlexRNN(leaky, 9, 21, init={"a": 0.4}, **more),
    "BlockGRU": lambda **more: fused_rnn.BlockGRU(9, 24, blocks=4, **more),
    "ResetBeforeGRU": lambda **more: fused_rnn.ResetBeforeGRU(9, 24, **more),
}
# Those whose weights are the cell's as they are.
PLAIN = [kind for kind in KINDS if kind not in ("BlockGRU", "ResetBeforeGRU")]
BUILT_IN = [kind for kind in PLAIN if kind not in ("LSTM-proj", "FlexRNN")]


def make(kind: str, **more: Any) -> Any:
    return KINDS[kind](**more).eval()


def steps(module: Any, batch: int, count: int = 11) -> Tensor:
    return torch.randn(count, batch, module.input_size)


def data(y: Any) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def wide(hx: Any) -> Any:
    return tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx.double()


# ---- the numbers ----


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", PLAIN)
def test_on_float_activations_it_is_as_good_as_the_plain_loop_on_its_weights(kind: str, batch: int) -> None:
    """Beside the plain loop in float32."""
    module = make(kind)
    quantized = fused_rnn.quantize(module, activations="float32")
    exact, plain = rounded(module, "int8", torch.float64), rounded(module, "int8", torch.float32)
    x, lengths, reset = steps(module, batch), torch.randint(0, 12, (batch,)), torch.rand(11, batch) < 0.2
    with torch.no_grad():
        hx = module(x)[1]
        for more in ({}, {"lengths": lengths}, {"reset": reset}):
            for given in (None, hx):
                theirs = None if given is None else wide(given)
                ours, own = quantized(x, given, **more), plain(x, given, **more)
                for a, b, right in zip(flat(ours), flat(own), flat(exact(x.double(), theirs, **more)), strict=True):
                    assert error(a, right) <= allowed(b, right)


def by_bytes(x: Tensor) -> Tensor:
    """What rows that are brought to int8 stand for."""
    flat_x = x.reshape(-1, x.shape[-1])
    return widened(*narrowed(flat_x, "int8"), torch.float64).reshape(x.shape)


@needs_bytes
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
def test_a_step_of_int8_activations_is_that_of_what_they_stand_for(kind: str, batch: int) -> None:
    """A single step, whose bytes are those of float32 numbers: there is nothing to add up."""
    module = make(kind)
    x, exact, plain = (
        steps(module, batch, 1),
        rounded(module, "int8", torch.float64),
        rounded(module, "int8", torch.float32),
    )
    h = torch.randn(1, batch, 21)
    c = torch.randn(1, batch, 21)
    # A GRU's h goes on as it is, which the reference must not see in bytes: it is compared from zeros.
    given = (h, c) if kind == "LSTM" else None if kind == "GRU" else h
    theirs = (by_bytes(h), c.double()) if kind == "LSTM" else None if kind == "GRU" else by_bytes(h)
    with torch.no_grad():
        ours, right = fused_rnn.quantize(module)(x, given), exact(by_bytes(x), theirs)
        own = plain(
            by_bytes(x).float(),
            None if theirs is None else tuple(t.float() for t in theirs) if kind == "LSTM" else theirs.float(),
        )
        for a, b, r in zip(flat(ours), flat(own), flat(right), strict=True):
            assert error(a, r) <= allowed(b, r)


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


@pytest.mark.parametrize("hidden", [64, 256])
@pytest.mark.parametrize(("name", "layers"), [("LSTM", 1), ("LSTM", 2), ("GRU", 1)])
def test_it_is_more_accurate_than_torchs(name: str, layers: int, hidden: int) -> None:
    """The error against float64 over 60 steps of rows of different sizes: at most half of torch's by activations of
    int8, a third by those of float32. torch has one scale for a matrix, and one for a step's activations."""
    torch.manual_seed(3)
    theirs = getattr(nn, name)(hidden, hidden, layers, bidirectional=True).eval()
    x = torch.randn(60, 8, hidden) * torch.logspace(-1, 0.5, 8)[:, None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        by_torch = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), {getattr(nn, name)})
        exact = copy.deepcopy(theirs).double()(x.double())[0]
        error_of_torch = rms(by_torch(x)[0] - exact)
        assert rms(fused_rnn.quantize(theirs)(x)[0] - exact) <= error_of_torch / 2
        assert rms(fused_rnn.quantize(theirs, activations="float32")(x)[0] - exact) <= error_of_torch / 3


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_near_the_module(kind: str, activations: str) -> None:
    """In every kind of call: within 3 % of what it says, in the root mean square."""
    module = make(kind)
    quantized = fused_rnn.quantize(module, activations=activations)
    x = steps(module, 6)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (x, {}), (x[:, 0], {}), (x[:1], {}), (pack_sequence([x[:n, n] for n in (5, 2, 4)], enforce_sorted=False), {}),
        (x, {"lengths": [11, 0, 3, 4, 5, 6]}), (x, {"reset": (torch.rand(11, 6) < 0.3).tolist()}),
        (x.transpose(0, 1).contiguous().transpose(0, 1), {}),
    ]  # fmt: skip
    for input, more in calls:
        with torch.no_grad():
            ours, right = quantized(input, **more), module(input, **more)
        assert type(ours[0]) is type(right[0])
        for a, b in zip(flat((data(ours[0]), ours[1])), flat((data(right[0]), right[1])), strict=True):
            assert a.shape == b.shape
            assert rms(a - b) <= 0.03 * rms(b)


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("kind", BUILT_IN)
def test_threads_and_runs_make_no_difference(kind: str, activations: str) -> None:
    quantized = fused_rnn.quantize(make(kind), activations=activations)
    x, before = steps(quantized, 40, 200), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            made.append(flat(quantized(x)))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@needs_bytes
@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_row_is_the_same_among_any_others(kind: str) -> None:
    quantized = fused_rnn.quantize(make(kind))
    x = steps(quantized, 9)
    y = quantized(x)[0]
    for b in (0, 4, 8):
        assert torch.equal(quantized(x[:, b : b + 1].contiguous())[0], y[:, b : b + 1])


def test_the_first_steps_are_those_of_a_longer_call() -> None:
    quantized = fused_rnn.quantize(make("GRU"))
    x = steps(quantized, 2, 90)
    y, _ = quantized(x)
    h = None
    for t, y_t in enumerate(y[:20]):
        one, h = quantized(x[t : t + 1], h)
        assert torch.equal(one[0], y_t)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_what_is_not_finite_stays_in_its_row(activations: str, value: float) -> None:
    quantized = fused_rnn.quantize(make("relu"), activations=activations)
    x = steps(quantized, 3)
    right = quantized(x)[0]
    x[4, 1, 2] = value
    y = quantized(x)[0]
    assert torch.equal(y[:, ::2], right[:, ::2])
    assert torch.equal(y[:4, 1], right[:4, 1])
    assert not y[4:, 1].isfinite().all()


def test_zeros_and_an_empty_batch() -> None:
    module = make("LSTM")
    with torch.no_grad():
        module.weight_ih_l0[:5] = 0
        module.weight_hh_l0.zero_()
    quantized = fused_rnn.quantize(module)
    assert bool((quantized.weight_ih_l0[:5] == 0).all()) and bool((quantized.weight_hh_l0_scale == 0).all())
    with torch.no_grad():
        assert error(quantized(torch.zeros(3, 2, 9))[0], module(torch.zeros(3, 2, 9))[0]) <= 1e-6
    assert quantized(torch.zeros(3, 0, 9))[0].shape == (3, 0, 21)


# ---- the model ----


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.encoder = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.again = self.encoder
        self.decoder = nn.Sequential(nn.GRU(32, 16, batch_first=True))
        self.last = nn.RNN(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens))[0]
        y: Tensor = self.head(self.last(self.decoder(x)[0])[0])
        return y


def test_a_model() -> None:
    model, tokens = Tagger().eval(), torch.randint(0, 30, (4, 9))
    quantized = fused_rnn.quantize(model)
    kinds = [type(m) for m in (quantized.encoder, quantized.decoder[0], quantized.last, quantized.head)]
    assert kinds == [QuantizedLSTM, QuantizedGRU, QuantizedRNN, nn.Linear]
    assert quantized.again is quantized.encoder
    assert type(model.encoder) is nn.LSTM  # a copy
    y = quantized(tokens)
    with torch.no_grad():
        assert rms(y - model(tokens)) <= 0.03 * rms(y)
    assert y.requires_grad  # by the head, which is what it was
    assert not any("encoder" in name or "last" in name for name, _ in quantized.named_parameters())
    assert fused_rnn.quantize(model, inplace=True) is model
    assert torch.equal(model(tokens), y)
    assert "QuantizedLSTM(12, 16, num_layers=2, batch_first=True, dropout=0.3, bidirectional=True, " in repr(model)


def test_its_bytes_are_few() -> None:
    module = fused_rnn.LSTM(256, 256)
    quantized = fused_rnn.quantize(module)
    held = sum(b.numel() * b.element_size() for b in quantized.buffers())
    panels = quantized._fused_frozen.bytes(quantized._buffers)
    assert held + panels < 0.55 * sum(p.numel() * 4 for p in module.parameters())
    assert list(quantized.parameters()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(kind: str, copied: Callable[[Any], Any]) -> None:
    quantized = fused_rnn.quantize(make(kind))
    x = steps(quantized, 3)
    y, other = quantized(x)[0], copied(quantized)
    assert torch.equal(other(x)[0], y)
    assert repr(other) == repr(quantized)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign: bool) -> None:
    one, other = fused_rnn.quantize(make("stack")), fused_rnn.quantize(make("stack"))
    x, file = steps(one, 3), io.BytesIO()
    y = one(x)[0]
    assert not torch.equal(other(x)[0], y)
    assert {t.dtype for t in one.state_dict().values()} == {torch.int8, torch.float32}
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=assign)
    assert torch.equal(other(x)[0], y)
    with torch.inference_mode():
        other.weight_hh_l0.zero_()
        assert not torch.equal(other(x)[0], y)


def test_hooks_attributes_and_convert() -> None:
    module = nn.LSTM(9, 21, batch_first=True).eval()
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    module.note = "mine"
    quantized = fused_rnn.quantize(nn.Sequential(module))
    quantized(torch.randn(2, 5, 9))
    assert seen == [1]
    assert (quantized[0].note, quantized[0].hidden_size, quantized[0].batch_first) == ("mine", 21, True)
    quantized[0].flatten_parameters()
    assert fused_rnn.quantize(quantized, inplace=True)[0] is quantized[0]
    assert fused_rnn.convert(quantized)[0] is quantized[0]
    assert type(fused_rnn.convert(quantized, keep_class=True)[0]) is QuantizedLSTM
    with pytest.warns(UserWarning, match=r"is a fused_rnn.nn.quantized.QuantizedLSTM"):
        assert isinstance(fused_rnn.to_torch(quantized)[0], Quantized)


# ---- everything around it ----


def test_graphs_of_inputs_that_require_a_gradient() -> None:
    """As those of an embedding do, which is what stands before a layer most often."""
    module = fused_rnn.quantize(nn.LSTM(4, 5))
    x = torch.randn(3, 2, 4, requires_grad=True)
    expected = module(x)[0]
    assert expected.requires_grad
    compiled = torch.compile(module, fullgraph=True, backend="eager")(x)[0]
    exported = torch.export.export(module, (x,), strict=True).module()(x)[0]
    for made in (compiled, exported):
        assert not made.requires_grad
        assert float((made - expected).detach().abs().max()) < 0.02  # of activations in bytes, and not
    with pytest.raises(RuntimeError, match="got a gradient through weights of int8"):
        torch.func.grad(lambda a: module(a)[0].sum())(x.detach())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_floats_is_refused(strict: bool) -> None:
    module, floats = fused_rnn.quantize(nn.LSTM(4, 5)), nn.LSTM(4, 5).state_dict()
    before = module.weight_hh_l0.clone()
    with pytest.raises(ValueError, match=r"weight_ih_l0: got torch.float32, expected torch.int8"):
        module.load_state_dict(floats, strict=strict)
    assert torch.equal(module.weight_hh_l0, before)


def test_compiled_exported_transformed_and_cast() -> None:
    """These run on what the weights stand for."""
    quantized = fused_rnn.quantize(make("stack"), activations="float32")
    x = steps(quantized, 3)
    with torch.no_grad():
        y = quantized(x)[0]
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], y)
        torch.testing.assert_close(torch.export.export(quantized, (x,)).module()(x)[0], y)
        torch.testing.assert_close(torch.vmap(lambda x: quantized(x)[0])(torch.stack([x, x]))[1], y)
        with torch.autocast("cpu", torch.bfloat16):
            assert rms(quantized(x)[0] - y) <= 0.03 * rms(y)
        with torch.profiler.profile():
            torch.testing.assert_close(quantized(x)[0], y)


def test_a_stream() -> None:
    quantized = fused_rnn.quantize(make("LSTM"), activations="float32")
    x = steps(quantized, 3)
    torch.testing.assert_close(quantized.stream(3, weights="int8").steps(x), quantized(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_onnx(kind: str, tmp_path: Any) -> None:
    """By DequantizeLinear before ONNX's own node: the weights are a byte each in the file."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = getattr(fused_rnn, kind)(64, 128, bidirectional=True).eval()
    quantized = fused_rnn.quantize(module, activations="float32")
    x, path = torch.randn(7, 2, 64), tmp_path / "model.onnx"
    program = torch.onnx.export(quantized, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert "DequantizeLinear" in nodes and kind in nodes
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 0.4 * sum(p.numel() * 4 for p in module.parameters())
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), quantized(x)[0])


# ---- errors ----


def test_errors_of_a_call() -> None:
    quantized = fused_rnn.quantize(make("stack"))
    x = steps(quantized, 3)
    wants, none = x.clone().requires_grad_(), torch.zeros(6, 3, 21)
    packed = pack_sequence([wants[:, 0], wants[:4, 1]])
    for results in (quantized(wants), quantized(x, (none.clone().requires_grad_(), none)), quantized(packed)):
        for result in flat((data(results[0]), results[1])):
            with pytest.raises(RuntimeError, match="quantize: got a gradient through weights of int8, which pass none"):
                result.sum().backward()
    with torch.no_grad():
        assert not quantized(wants)[0].requires_grad
    for wrong in (x[:, :, :5], x.double(), torch.zeros(0, 3, 9), x[0, 0]):
        with pytest.raises((ValueError, RuntimeError), match=r"input|x:|weights|dimension|length"):
            quantized(wrong)
    with pytest.raises((ValueError, TypeError), match=r"h0|h_0|hx|state"):
        quantized(x, torch.zeros(6, 3, 21))
    with pytest.raises(ValueError, match="lengths"):
        quantized(x, lengths=[12, 3, 4])
    for wrong in (torch.tensor([2.5, 1, 1]), torch.tensor([True, True, False])):
        with pytest.raises(ValueError, match=r"lengths: got torch\.(float32|bool), expected an integer dtype"):
            quantized(x, lengths=wrong)
    dropping = fused_rnn.quantize(nn.LSTM(9, 21, 2, dropout=0.5))
    with pytest.raises(RuntimeError, match=r"dropout: got 0.5 in training mode, expected eval\(\)"):
        dropping(x)
    dropping.eval()(x)
    with pytest.raises((ValueError, RuntimeError), match="float16"):
        fused_rnn.quantize(make("GRU")).half()(x)


def test_errors_of_quantize() -> None:
    with pytest.raises(TypeError, match=r"model: got int, expected a torch.nn.Module"):
        fused_rnn.quantize(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="activations: got 'bf16', expected 'int8' or 'float32'"):
        fused_rnn.quantize(make("GRU"), activations="bf16")
    with pytest.raises(
        ValueError, match=r"0.weight_ih_l0: got torch.float64 on cpu, expected torch.float32 on the CPU"
    ):
        fused_rnn.quantize(nn.Sequential(nn.GRU(3, 4).double()))
    module = make("GRU")
    with torch.no_grad():
        module.weight_hh_l0[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"GRU.weight_hh_l0: got a value that is not finite"):
        fused_rnn.quantize(module)


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight_hh_l0", 0.5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.LSTMCell(3, 4), "0, a LSTMCell, is a single step"),
        (lambda: fused_rnn.LSTM(3, 4, zoneout=0.1), "0, a LSTM, has regularisers"),
        (lambda: fused_rnn.FlexRNN(leaky, 3, 4, heads=2), "0, a FlexRNN, has heads"),
        (lambda: pruned(nn.LSTM(3, 4)), "0, a LSTM, has weights that a hook computes"),
    ],
)
def test_what_stays_is_named(make: Callable[[], Any], why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        assert not isinstance(fused_rnn.quantize(nn.Sequential(make()), inplace=True)[0], Quantized)
