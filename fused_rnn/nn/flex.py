"""FlexRNN: layers of a user's own cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._jit_internal import unused
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.checks import kind, shape_text
from fused_rnn.flex import UserCell
from fused_rnn.nn import extras
from fused_rnn.nn.frozen import keeper
from fused_rnn.nn.heads import by_block, by_head
from fused_rnn.nn.plain import FAST_PATH, STEPPING
from fused_rnn.nn.recurrent import Recurrent, overrides_checks, read_weights
from fused_rnn.nn.sequence import run

Init = Real | Tensor | Callable[[Tensor], Any]
State = Tensor | tuple[Tensor, ...]

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class FlexRNN(Recurrent):
    r"""__init__(cell,input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,heads=1,init=None,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    Layers of a user's own cell, which run in the loops that fused_rnn.LSTM runs in. Letters: T time, B batch,
    D input_size, H hidden_size, L num_layers, R directions (1 or 2), G the cell's gates, N heads.

    Args:
        cell: a step in PyTorch under :func:`fused_rnn.cell`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: torch.nn.LSTM's.
        heads: N recurrences of H/N units each in the place of one, a block-diagonal W_hh: units n·H/N … of every gate
            belong to head n. Keyword only, as are all that follow.
        init: initial values of the cell's params by name: a number, a tensor [H] or a function of a tensor such as
            ``torch.nn.init.ones_``. Zeros for all others.
        return_sequences: "h" for the first state of every step, "states" for a tuple of all states', of which only the
            first may be changed in place before backward.
        backend: "cpu", "reference", "cuda" or "triton" to force one; None takes the one that is fastest.
        save: what training keeps for backward, "gates" (fastest) or "recompute" (least memory).
        recurrent_dropout, zoneout, weight_dropout, return_gates: as :class:`LSTM`'s, zoneout a number or one for each
            state. The gates are the sums of both sides, by the names in the cell's `gates`, or "0", "1", and so on.

    Inputs:
        input, lengths, reset: as :class:`LSTM`'s.
        hx: of a cell with one state h_0 [L·R, B, H], of others a tuple with one for each state, in their order; without
            B for unbatched input; zeros if None.

    Returns:
        output, h_n, or output, (h_n, c_n, ...): output [T, B, R·H], laid out, and packed, as the input was; with
        return_sequences="states" a tuple of such, one for each state, of the last layer; the final states shaped as hx.

    Its parameters are weight_ih_l0 [G·H, D or R·H]; weight_hh_l0 [G·H, H], with heads, or of a cell with diagonal=N,
    [N, G·H/N, H/N], rows of a head or block gate by gate; bias_ih_l0 and bias_hh_l0 [G·H]; for each of the cell's
    matrices u_l0 [n·H, H], with heads [N, n·H/N, H/N]; for each of its params p_l0 [H]; all with _reverse for the other
    direction. A cell that is not recurrent has no weight_hh and bias_hh. Initial values are uniform in ±1/√H as
    torch.nn.LSTM's; those of weight_hh and of the cell's matrices in ±1/√(H/N), for that is how many terms each of
    their sums has.

    Raises:
        TypeError, ValueError: for arguments that do not fit, from the cell for a step that cannot be traced.
        RuntimeError: for input and hx of other sizes than the module's, in torch.nn's words.
        NotImplementedError: with every backend's reason, where the backend asked for cannot run the call; for tensors
            of other classes than torch's own.

    Twice differentiable in input, hx and all weights. An instance of torch.nn.RNNBase. It pickles where its cell and
    init do: a cell by reference, where it stands at the top of an importable module under its own name; what stands in
    a function does not, and there state_dict() does. torch.jit.script raises.

    Examples:
        >>> @fused_rnn.cell(gates=1, states=("h",), params=("a",))
        ... def leaky(x, r, s, p):
        ...     return s.h + p.a * (torch.tanh(x[0] + r[0]) - s.h)
        >>> rnn = fused_rnn.FlexRNN(leaky, 10, 20, init={"a": 0.1})
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _fused_counterpart = None  # torch.nn has none
    _fused_cell: str = ""  # the program's text
    _fused_user: UserCell
    _fused_init: Mapping[str, Init]

    def __init__(
        self,
        cell: UserCell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        init: Mapping[str, Init] | None = None,
        return_sequences: str = "h",
        backend: str | None = None,
        save: str = "gates",
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        return_gates: bool = False,
    ) -> None:
        if not isinstance(cell, UserCell):
            raise TypeError(
                f"cell: got {kind(cell)}, expected a cell, as @fused_rnn.cell(gates=..., states=...) makes one"
            )
        # torch's own, for what it requires of its arguments and whatever attributes it has; its weights take no memory.
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, "meta",
            backend=backend, save=save,
        )  # fmt: skip
        if clash := [name for name in (*cell.params, *cell.matrices) if name in _WEIGHTS]:
            kind_of = "param" if clash[0] in cell.params else "matrix"
            raise ValueError(
                f"cell: got a {kind_of} {clash[0]!r}, expected another name: the module has a weight of this one"
            )
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
            raise ValueError(f"heads: got {heads!r}, expected a positive divisor of hidden_size = {hidden_size}")
        if hidden_size % cell.diagonal:
            raise ValueError(
                f"hidden_size: got {hidden_size}, expected a multiple of the cell's diagonal = {cell.diagonal}"
            )
        if heads > 1 and cell.diagonal > 1:
            raise ValueError(f"heads: got {heads}, expected 1 of a cell with diagonal = {cell.diagonal}")
        if return_sequences not in ("h", "states"):
            raise ValueError(f"return_sequences: got {return_sequences!r}, expected 'h' or 'states'")
        self.mode = cell.name
        self._fused_user, self._fused_states = cell, len(cell.states)
        self._fused_heads = heads if cell.recurrent or cell.descriptor().staged else 1  # else they are one
        self._fused_options = (self._fused_heads, return_sequences == "states")
        self._fused_init = _checked_init(init, cell, hidden_size)
        self._fused_cell = cell.descriptor().name
        for name in list(self._parameters):
            del self._parameters[name]
        self._flat_weights_names, self._all_weights = [], []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                shapes = self._shapes(input_size if layer == 0 else hidden_size * (1 + bidirectional))
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        self._init_flat_weights()
        self.reset_parameters()
        extras.give(
            self,
            {
                "recurrent_dropout": recurrent_dropout, "zoneout": zoneout, "weight_dropout": weight_dropout,
                "return_gates": return_gates,
            },
        )  # fmt: skip

    @property
    def _fused_gates(self) -> tuple[str, ...]:
        return self._fused_user.gate_names

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fused_checks = overrides_checks(cls, FlexRNN)

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        """The weights of a recurrence by name, in torch's order."""
        cell, hidden = self._fused_user, self.hidden_size
        rows = cell.gates * hidden
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size)}
        if cell.recurrent:
            shapes["weight_hh"] = self._matrix(rows, self._fused_heads * cell.diagonal)
        if self.bias:
            shapes["bias_ih"] = (rows,)
            if cell.recurrent:
                shapes["bias_hh"] = (rows,)
        shapes |= {name: self._matrix(count * hidden, self._fused_heads) for name, count in cell.matrices.items()}
        return shapes | dict.fromkeys(cell.params, (hidden,))

    def _matrix(self, rows: int, blocks: int) -> tuple[int, ...]:
        """The shape of a matrix [rows, H] of so many blocks."""
        hidden = self.hidden_size
        return (rows, hidden) if blocks == 1 else (blocks, rows // blocks, hidden // blocks)

    @property
    @unused
    def cell(self) -> Any:
        """The cell."""
        return self._fused_user

    @property
    @unused
    def heads(self) -> int:
        """N, how many recurrences stand for one. Of a cell whose units do not see each other it is 1."""
        return self._fused_heads

    @property
    @unused
    def return_sequences(self) -> str:
        """What a call returns over time, "h" or "states"."""
        return "states" if self._fused_options[1] else "h"

    def reset_parameters(self) -> None:
        """Draw the weights anew, and set the params to what `init` says."""
        if not self._fused_cell:  # torch.nn.RNNBase calls it on its own weights
            return
        bound = 1.0 / math.sqrt(self.hidden_size)
        params = self._fused_user.params
        for names in self._all_weights:
            for name, param in zip(reversed(names), reversed(params), strict=False):
                _set(getattr(self, name), self._fused_init.get(param, 0.0))
            for name in names[: len(names) - len(params)]:
                weight = getattr(self, name)
                square = name.rpartition("_l")[0] in ("weight_hh", *self._fused_user.matrices)
                own = 1.0 / math.sqrt(weight.shape[-1]) if square else bound
                nn.init.uniform_(weight, -own, own)

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN, for which torch.nn's modules lay their weights out as one, knows no such cell."""

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """As torch.nn.LSTM's: the shape of every state."""
        return self.get_expected_hidden_size(input, batch_sizes)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """As torch.nn.LSTM's: whether input and states have the module's sizes. Raises RuntimeError."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        if self._fused_states == 1:
            self.check_hidden_size(hidden, expected)
            return
        for k, state in enumerate(hidden):
            self.check_hidden_size(state, expected, f"Expected hidden[{k}] size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """As torch.nn.LSTM's: the states in another order of the batch."""
        if permutation is None or hx is None:
            return hx
        if self._fused_states == 1:
            return hx.index_select(1, permutation)
        return tuple(state.index_select(1, permutation) for state in hx)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers: output and the final states. Shapes and errors stand in the class's docstring."""
        if not is_grad_enabled() and not is_compiling() and self._fused_is_plain():
            time = 1 if self.batch_first else 0
            cell, (parameters, bias) = self._fused_cell, self._fused_by_name()
            kept = self._fused_frozen
            stepped = FAST_PATH(parameters, bias, input, hx, cell, time, lengths, reset, 1, False, kept)  # type: ignore[misc]
            if stepped is not None:
                return stepped[0], stepped[1] if len(stepped) == 2 else tuple(stepped[1:])
        result: tuple[Any, Any] = run(self, input, hx, lengths, reset, self._fused_weights())
        return result

    def _fused_by_name(self) -> tuple[Mapping[str, Any], bool]:
        """The first layer's weights as the cell has them, by name, and whether there are biases: for the fast path."""
        return self._parameters, self.bias

    def _fused_is_plain(self) -> bool:
        """Whether the layers are one recurrence that returns h, as quick.call runs one: past the dispatcher."""
        alone = self._fused_options == (1, False) and self.num_layers == 1 and not self.bidirectional
        alone = alone and not self._fused_extras and self._fused_user.diagonal == 1  # else W_hh lies otherwise
        return alone and FAST_PATH is not None and self._fused_backend in STEPPING and not self._fused_checks

    def _fused_names(self) -> list[str] | None:
        weights = self._fused_by_name()[0] if self._fused_is_plain() else {}
        return (self._flat_weights_names if weights is self._parameters else list(weights)) or None

    def _fused_weights(self) -> list[Tensor]:
        """The weights of a call."""
        return self._fused_read()

    def _fused_read(self) -> list[Tensor]:
        """The weights of every recurrence, of all heads, as `layers` wants them."""
        weights = read_weights(self)
        rows = self._fused_user.gates * self.hidden_size
        if not self._fused_user.recurrent and weights[0].shape[:1] != (rows,):  # no W_hh says what H is
            raise ValueError(f"weight_ih_l0: got {shape_text(weights[0].shape)}, expected [{rows}, {self.input_size}]")
        if self._fused_user.diagonal > 1:
            return by_block(self, weights)
        return weights if self._fused_heads == 1 else by_head(self, weights)

    def extra_repr(self) -> str:
        """The cell's name, torch.nn's, and the extra arguments where they are not the default."""
        heads = f", heads={self._fused_heads}" if self._fused_heads > 1 else ""
        returned = ", return_sequences='states'" if self._fused_options[1] else ""
        return f"{self.mode}, {super().extra_repr()}{heads}{returned}"

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {key: value for key, value in state.items() if key not in ("_fused_cell", "_fused_views")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._fused_cell = self._fused_user.descriptor().name  # of the step as it is here, which may have changed
        if self._fused_frozen is not None:
            self._fused_frozen = keeper(self._fused_cell, *self._fused_frozen.arguments[1:])


def _checked_init(init: Mapping[str, Init] | None, cell: UserCell, hidden: int) -> Mapping[str, Init]:
    """The initial values, if they are of the cell's params. Raises ValueError, TypeError for what is no value."""
    if init is None:
        return {}
    if not isinstance(init, Mapping):
        raise TypeError(f"init: got {kind(init)}, expected values by the names of params")
    for name, value in init.items():
        if name not in cell.params:
            known = ", ".join(cell.params) or "none"
            raise ValueError(f"init: got {name!r}, expected the name of a param of {cell.name}: {known}")
        if isinstance(value, Tensor):
            if value.shape not in ((), (hidden,)):
                raise ValueError(f"init[{name!r}]: got {shape_text(value.shape)}, expected [H] = [{hidden}]")
        elif isinstance(value, bool) or not (isinstance(value, Real) or callable(value)):
            raise TypeError(f"init[{name!r}]: got {kind(value)}, expected a number, a tensor or a function of a tensor")
    return dict(init)


def _set(param: Tensor, value: Any) -> None:
    with torch.no_grad():
        if isinstance(value, Tensor):
            param.copy_(value)
        elif callable(value):
            made = value(param.zero_())
            if isinstance(made, Tensor) and made is not param:  # it returns what it was to write
                if made.shape != param.shape:
                    raise ValueError(
                        f"init: its function made {shape_text(made.shape)}, expected {shape_text(param.shape)}"
                    )
                param.copy_(made)
        else:
            param.fill_(value)
