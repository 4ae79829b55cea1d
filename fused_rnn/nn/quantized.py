"""LSTM, GRU, RNN and FlexRNN with weights of int8: what `fused_rnn.quantize` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import checks, onnx
from fused_rnn.call import Kinds
from fused_rnn.cells import CELLS
from fused_rnn.gpu.narrow import narrowed, widened
from fused_rnn.nn.flex import FlexRNN
from fused_rnn.nn.frozen import ACTIVATIONS, keeper
from fused_rnn.nn.plain import FAST_PATH, STEPPING
from fused_rnn.nn.recurrent import Recurrent
from fused_rnn.nn.rnn import GRU, LSTM, RNN
from fused_rnn.nn.sequence import run
from fused_rnn.transforms.op_gradient import is_jit_tracing

T = TypeVar("T")


class Quantized(Recurrent):
    """Base of the modules whose matrices are int8 with a scale for each row; biases, states but h, and sums of rows are
    float32. activations: "int8" where the products' other side, x and h, is brought to int8 for them, too, each row at
    each step by a scale of its own; "float32" where it stays as it is.

    Of each matrix there are two buffers, `weight_hh_l0` int8 [rows, columns] and `weight_hh_l0_scale` float32 [rows],
    its rows' largest magnitudes over 127; biases and a cell's params are buffers of float32. They are for inference
    alone: there is no parameter. A call runs on packed panels of them, as after `freeze()`. What such calls do not
    take (torch.compile and torch.export, transforms, autocast) runs on the float32 numbers that they stand for.

    Raises, beside what its float32 class does:
        RuntimeError: for dropout in training mode, and in backward, where a gradient reaches it.
    """

    _fused_counterpart = None  # torch.nn has none: its forward reads float weights
    activations: str

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers: output and the final states, as the float32 module does."""
        if self.training and self.dropout and self.num_layers > 1:
            raise RuntimeError(f"dropout: got {self.dropout} in training mode, expected eval(): int8 is for inference")
        if is_grad_enabled():
            with torch.no_grad():
                y, hx_n = self.forward(input, hx, lengths=lengths, reset=reset)
            graph = is_compiling() or is_jit_tracing()  # what raises in backward is no part of one
            wanting = [] if graph else [t for t in _tensors(input, hx) if t.requires_grad]
            return (_barred(y, wanting), _barred(hx_n, wanting)) if wanting else (y, hx_n)
        if FAST_PATH is not None and not is_compiling() and self._runs_packed():
            done = self._packed(input, hx, lengths, reset)
            if done is None:
                done = self._packed(*_contiguous(input, hx, lengths, reset))
            if done is not None:
                return done[0], done[1] if len(done) == 2 else tuple(done[1:])
        result: tuple[Any, Any] = run(self, input, hx, lengths, reset, self._fused_read())
        return result

    def _runs_packed(self) -> bool:
        return not self._fused_extras and self._fused_options in ((), (1, False)) and self._fused_backend in STEPPING

    def _packed(self, input: Any, hx: Any, lengths: Any, reset: Any) -> Any:
        """A call on the panels; None for one that they do not take."""
        time = 1 if self.batch_first else 0
        return FAST_PATH(  # type: ignore[misc]
            self._buffers, self.bias, input, hx, self._fused_cell, time, lengths, reset, self.num_layers,
            self.bidirectional, self._fused_frozen,
        )  # fmt: skip

    def _fused_read(self) -> list[Tensor]:
        """What the weights stand for, in float32."""
        weights = []
        for name in self._flat_weights_names:
            weight, scale = getattr(self, name), self._buffers.get(f"{name}_scale")
            weights.append(weight if scale is None else _widened(weight, scale))
        return weights

    def _fused_asks(self) -> bool:
        return True

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As torch.nn's, of float32, which the weights stand for."""
        if input.dtype != torch.float32:
            raise ValueError(f"input: got {input.dtype}, expected torch.float32, what int8 weights stand for")
        super().check_input(torch.empty(input.shape, dtype=torch.int8, device="meta"), batch_sizes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self._flat_weights_names:
            given = state_dict.get(prefix + name)
            if f"{name}_scale" in self._buffers and isinstance(given, Tensor) and given.dtype != torch.int8:
                raise ValueError(
                    f"{prefix}{name}: got {given.dtype}, expected torch.int8 with a scale for each row beside it: load"
                    " the float32 model, and quantize it then"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def freeze(self: T) -> T:
        """Nothing: the weights are packed anyway."""
        return self

    unfreeze = freeze

    def flatten_parameters(self) -> None:
        """Nothing: there is no parameter."""

    def reset_parameters(self) -> None:
        """Nothing: there is no parameter."""

    def extra_repr(self) -> str:
        """The float32 module's, and what the weights are."""
        return f"{super().extra_repr()}, weights='int8', activations={self.activations!r}"


class QuantizedLSTM(Quantized, LSTM):
    """fused_rnn.LSTM with weights of int8."""

    _fused_counterpart = None  # type: ignore[assignment]


class QuantizedGRU(Quantized, GRU):
    """fused_rnn.GRU with weights of int8."""

    _fused_counterpart = None  # type: ignore[assignment]


class QuantizedRNN(Quantized, RNN):
    """fused_rnn.RNN with weights of int8."""

    _fused_counterpart = None  # type: ignore[assignment]


class QuantizedFlexRNN(Quantized, FlexRNN):
    """fused_rnn.FlexRNN, or a cell of the literature, with weights of int8."""

    _fused_counterpart = None

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError("weights of int8 have no initial values")


_CLASSES: dict[type[Recurrent], type[Quantized]] = {
    LSTM: QuantizedLSTM,
    GRU: QuantizedGRU,
    RNN: QuantizedRNN,
    FlexRNN: QuantizedFlexRNN,
}
# What a module is called by, which goes over to the one in its place.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def quantized(module: Recurrent, name: str, activations: str) -> Quantized:
    """A module on the same layers, of int8. name: the module's in its model, for errors.  activations: one of
    ACTIVATIONS.

    Raises ValueError for weights that are not finite numbers of float32 on the CPU.
    """
    cell = module._fused_cell
    weights = [w.detach() for w in module._fused_read()]
    for w, own in zip(weights, module._flat_weights_names, strict=False):
        if w.dtype != torch.float32 or w.device.type != "cpu":
            raise ValueError(f"{name}.{own}: got {w.dtype} on {w.device}, expected torch.float32 on the CPU")
        if not bool(w.isfinite().all()):
            raise ValueError(f"{name}.{own}: got a value that is not finite, which int8 cannot hold")
    recurrences = 2 if module.bidirectional else 1
    _, _, kinds = checks.check_shapes(cell, weights, module.input_size, module.num_layers, recurrences)
    made_as = next(ours for kind, ours in _CLASSES.items() if isinstance(module, kind))
    made: Quantized = made_as.__new__(made_as)
    torch.nn.Module.__init__(made)
    hidden = ("_parameters", "_buffers", "_fused_frozen", "_fused_views", "_flat_weights", "_flat_weight_refs")
    made.__dict__.update({
        key: value for key, value in vars(module).items()
        if key in _HOOKS or (key not in hidden and key not in made.__dict__)
    })  # fmt: skip
    made.__dict__["training"] = module.training
    each = [
        [f"{own}_l{k // recurrences}{'_reverse' if k % recurrences else ''}" for own in _names(cell, kinds)]
        for k in range(module.num_layers * recurrences)
    ]
    with torch.inference_mode(False):
        for own, w in zip([n for names in each for n in names], weights, strict=True):
            values, scale = narrowed(w, "int8") if w.dim() == 2 else (w.clone(), None)
            made.register_buffer(own, values)
            if scale is not None:
                made.register_buffer(f"{own}_scale", scale)
    made.__dict__["_all_weights"] = each
    made._flat_weights_names = [n for names in each for n in names]
    made._init_flat_weights()
    made.activations = activations
    narrow = ACTIVATIONS[activations]
    made._fused_frozen = keeper(cell, made._flat_weights_names, module.num_layers, recurrences, narrow)
    return made


def _names(cell: str, kinds: Kinds) -> list[str]:
    """Of a recurrence's weights."""
    spec, sides = CELLS[cell], ("ih", "hh")[: 1 + kinds.recurrent]
    own = [] if spec.program is None else [*dict(spec.program.matrices), *spec.params]
    biases = [f"bias_{side}" for side in sides] * kinds.bias
    return [*(f"weight_{side}" for side in sides), *biases, *["weight_hr"] * kinds.projects, *own]


def _widened(weight: Tensor, scale: Tensor) -> Tensor:
    return onnx.dequantized(weight, scale) if onnx.is_exporting() else widened(weight, scale, torch.float32)


class _Barred(torch.autograd.Function):
    """Results that require a gradient, as those of a module would, and have none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, *wanting: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "quantize: got a gradient through weights of int8, which pass none on; use torch.no_grad(), detach the"
            " input or the output, or train the float32 model and quantize it then"
        )


def _barred(results: Any, wanting: Sequence[Tensor]) -> Any:
    """Results of inputs that require a gradient."""
    if isinstance(results, PackedSequence):
        return results._replace(data=_barred(results.data, wanting))
    if isinstance(results, tuple):
        return tuple(_barred(result, wanting) for result in results)
    return _Barred.apply(results, *wanting)  # type: ignore[no-untyped-call]


def _tensors(input: Any, hx: Any) -> list[Tensor]:
    """What a call is given."""
    data = input.data if isinstance(input, PackedSequence) else input
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    return [t for t in (data, *states) if isinstance(t, Tensor)]


def _contiguous(input: Any, hx: Any, lengths: Any, reset: Any) -> tuple[Any, Any, Any, Any]:
    """A call's arguments as the panels take them, where they fit."""

    def dense(t: Any) -> Any:
        return t.contiguous() if isinstance(t, Tensor) else t

    if isinstance(input, PackedSequence):
        input = input._replace(data=dense(input.data))
    hx = tuple(map(dense, hx)) if isinstance(hx, (tuple, list)) else dense(hx)
    if lengths is not None:
        lengths = checks.as_lengths(lengths)
        if lengths.dtype in checks.INTEGERS:  # others are refused by `run`
            lengths = lengths.to("cpu", torch.int64).contiguous()
    if reset is not None:
        reset = checks.as_reset(reset, torch.device("cpu")).contiguous()
    return dense(input), hx, lengths, reset
