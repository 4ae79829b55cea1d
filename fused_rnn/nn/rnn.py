"""LSTM, GRU and RNN: drop-in for torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# Bound now: who rebinds torch.nn.LSTM to ours would otherwise find ours as its own counterpart.
from torch.nn import GRU as TorchGRU
from torch.nn import LSTM as TorchLSTM
from torch.nn import RNN as TorchRNN
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.nn import quick
from fused_rnn.nn.recurrent import Recurrent, SequenceCall
from fused_rnn.nn.sequence import run


class LSTM(Recurrent):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,proj_size=0,device=None,dtype=None,*,backend=None,save='gates',recurrent_dropout=0.0,recurrent_dropout_on='h',zoneout=0.0,weight_dropout=0.0,return_sequences='h',return_gates=False)

    A multi-layer long short-term memory RNN over a sequence, in place of torch.nn.LSTM, whose arguments, attributes,
    methods, state_dict, initialisation and errors it has. Letters: T time, B batch, D input_size, H hidden_size,
    P proj_size or else H, L num_layers, R directions (1 or 2). ::

        i_t = σ(W_i x_t + b_i + U_i h_{t-1} + d_i)
        f_t = σ(W_f x_t + b_f + U_f h_{t-1} + d_f)
        g_t = tanh(W_g x_t + b_g + U_g h_{t-1} + d_g)
        o_t = σ(W_o x_t + b_o + U_o h_{t-1} + d_o)
        c_t = f_t c_{t-1} + i_t g_t
        h_t = o_t tanh(c_t), or with a projection V o_t tanh(c_t)

    Beside torch.nn.LSTM's arguments, which stand in the same positions, there are:

    Args:
        backend: "cpu", "torch", "reference", "cuda" or "triton" to force one; None takes the one that measured
            fastest. Keyword only.
        save: what training keeps for backward, "gates" (fastest) or "recompute" (least memory). Keyword only.
        recurrent_dropout: in training the probability for a unit of h to be zero where W_hh reads it, the same units at
            all steps, all others times 1/(1-p) (Gal & Ghahramani 2016). Keyword only, as are all that follow.
        recurrent_dropout_on: "h", or "g" to drop units of g in the place of h's (Semeniuta et al. 2016).
        zoneout: in training the probability for a unit to keep its state in a step, in eval mode the share of it that
            is kept (Krueger et al. 2017); a pair for h and c apart.
        weight_dropout: in training the probability for a weight of W_hh to be zero throughout a call (Merity et al.
            2018).
        return_sequences: "h", or "states" for output to be a pair of h and c of every step.
        return_gates: return a third result, the last layer's gates of every step after their activation: a dict of
            "i", "f", "g", "o", each laid out as output.

    Inputs:
        input: [T, B, D], [B, T, D] if batch_first, [T, D], or a PackedSequence; of the weights' dtype: float32,
            float64, bfloat16 or float16.
        hx: (h_0 [L·R, B, P], c_0 [L·R, B, H]), without B for unbatched input; zeros if None.
        lengths: [B] integers on any device, in any order, [] for unbatched input. Past its length a sequence's output
            is zero; its final state is that of its last valid step, where the reverse direction starts, as with a
            PackedSequence. Keyword only.
        reset: [T, B] bool, [B, T] if batch_first, [T] for unbatched input, a tensor or lists. Where true, the state
            entering the step is zero. Keyword only.

    Returns:
        output, (h_n, c_n): output [T, B, R·P], [B, T, R·P], [T, R·P] or a PackedSequence, as the input was;
        h_n [L·R, B, P] and c_n [L·R, B, H], without B for unbatched input; all of the input's dtype.

    Raises:
        Exception: what torch.nn.LSTM raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a pair of tensors.
        ValueError: for lengths or reset that do not fit, for an unknown backend or save, and for recurrent_dropout,
            zoneout or return_gates with proj_size.
        NotImplementedError: with every backend's reason, where the backend asked for cannot run the call.

    Twice differentiable in input, hx and all weights. Under no_grad nothing is kept; train() and eval() decide of
    dropout and zoneout alone. Masks are drawn by torch's generator at each call, for each layer and direction, and kept
    for backward. An instance of torch.nn.RNNBase, not of torch.nn.LSTM, whose instances torch.compile refuses; of both
    with convert(model, keep_class=True).
    torch.jit.trace and torch.jit.script record torch's own operators.

    Source: Hochreiter & Schmidhuber 1997; gates i, f, g, o and both biases as in torch.nn.LSTM; projection:
    arXiv:1402.1128.

    Examples:
        >>> lstm = fused_rnn.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))

        Ragged sequences, without packing:

        >>> output, _ = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
        >>> output[2:, 1].any().item()
        False
    """

    _fused_counterpart = TorchLSTM
    _fused_states = 2

    if TYPE_CHECKING:  # at run time the arguments are whatever the torch installed takes
        __call__: SequenceCall[tuple[Tensor, Tensor]]

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            backend: str | None = None,
            save: str = "gates",
            recurrent_dropout: float = 0.0,
            recurrent_dropout_on: str = "h",
            zoneout: float | Sequence[float] = 0.0,
            weight_dropout: float = 0.0,
            return_sequences: str = "h",
            return_gates: bool = False,
        ) -> None: ...
        def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]: ...

    else:

        def __init__(self, *args: Any, backend: str | None = None, save: str = "gates", **kwargs: Any) -> None:
            super().__init__("LSTM", *args, backend=backend, save=save, **kwargs)

        # Torch's own, so that whoever calls or copies them from here has the messages of the torch installed.
        get_expected_cell_size = TorchLSTM.get_expected_cell_size
        check_forward_args = TorchLSTM.check_forward_args
        permute_hidden = TorchLSTM.permute_hidden

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Run the layers: output, (h_n, c_n). Shapes and errors stand in the class's docstring."""
        made = quick.call(self, input, hx, lengths, reset)
        if made is not None:
            return made[0], (made[1], made[2])
        result: tuple[Any, tuple[Tensor, Tensor]] = run(self, input, hx, lengths, reset)
        return result


class GRU(Recurrent):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,backend=None,save='gates',recurrent_dropout=0.0,recurrent_dropout_on='h',zoneout=0.0,weight_dropout=0.0,return_sequences='h',return_gates=False)

    A multi-layer gated recurrent unit RNN over a sequence, in place of torch.nn.GRU, whose arguments, attributes,
    methods, state_dict, initialisation and errors it has. ::

        r_t = σ(W_r x_t + b_r + U_r h_{t-1} + d_r)
        z_t = σ(W_z x_t + b_z + U_z h_{t-1} + d_z)
        n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + d_n))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    Beside torch.nn.GRU's arguments, which stand in the same positions, there are:

    Args:
        backend: keyword only, as :class:`LSTM`'s.
        save: keyword only, as :class:`LSTM`'s.
        recurrent_dropout, recurrent_dropout_on, zoneout, weight_dropout, return_sequences, return_gates: keyword only,
            as :class:`LSTM`'s. recurrent_dropout_on="g" drops units of n; the gates are "r", "z", "n"; the state is h.

    Inputs:
        input: as :class:`LSTM`'s.
        hx: h_0 [L·R, B, H], without B for unbatched input; zeros if None.
        lengths: keyword only, as :class:`LSTM`'s.
        reset: keyword only, as :class:`LSTM`'s.

    Returns:
        output, h_n: output as :class:`LSTM`'s, R·H wide; h_n [L·R, B, H], without B for unbatched input.

    Raises:
        Exception: what torch.nn.GRU raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a tensor.
        ValueError: as :class:`LSTM` does.
        NotImplementedError: as :class:`LSTM` does.

    Twice differentiable in input, hx and all weights. Source: Cho et al. 2014, with the reset gate
    applied after the recurrent product, as in torch.nn.GRU; gates r, z, n.

    Examples:
        >>> gru = fused_rnn.GRU(10, 20, batch_first=True, bidirectional=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))

        A state that begins anew inside the loop:

        >>> reset = torch.zeros(3, 5, dtype=torch.bool)
        >>> reset[0, 2] = True
        >>> output, h_n = gru(torch.randn(3, 5, 10), reset=reset)
    """

    _fused_counterpart = TorchGRU

    if TYPE_CHECKING:  # at run time the arguments are whatever the torch installed takes
        __call__: SequenceCall[Tensor]

        def __init__(
            self,
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
            backend: str | None = None,
            save: str = "gates",
            recurrent_dropout: float = 0.0,
            recurrent_dropout_on: str = "h",
            zoneout: float | Sequence[float] = 0.0,
            weight_dropout: float = 0.0,
            return_sequences: str = "h",
            return_gates: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args: Any, backend: str | None = None, save: str = "gates", **kwargs: Any) -> None:
            if "proj_size" in kwargs:
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            super().__init__("GRU", *args, backend=backend, save=save, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Any, Tensor]:
        """Run the layers: output, h_n. Shapes and errors stand in the class's docstring."""
        made = quick.call(self, input, hx, lengths, reset)
        result: tuple[Any, Tensor] = run(self, input, hx, lengths, reset) if made is None else (made[0], made[1])
        return result


class RNN(Recurrent):
    r"""__init__(input_size,hidden_size,num_layers=1,nonlinearity='tanh',bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,backend=None,save='gates',recurrent_dropout=0.0,recurrent_dropout_on='h',zoneout=0.0,weight_dropout=0.0,return_sequences='h',return_gates=False)

    A multi-layer Elman RNN over a sequence, in place of torch.nn.RNN, whose arguments, attributes, methods,
    state_dict, initialisation and errors it has. ::

        h_t = tanh(W x_t + b + U h_{t-1} + d), or with relu in place of tanh

    Beside torch.nn.RNN's arguments, which stand in the same positions, there are:

    Args:
        backend: keyword only, as :class:`LSTM`'s.
        save: keyword only, as :class:`LSTM`'s.
        recurrent_dropout, zoneout, weight_dropout, return_sequences, return_gates: keyword only, as :class:`LSTM`'s.
            The only state is h, the only gate "0": what tanh or relu are of.

    Inputs:
        input: as :class:`LSTM`'s.
        hx: h_0 [L·R, B, H], without B for unbatched input; zeros if None.
        lengths: keyword only, as :class:`LSTM`'s.
        reset: keyword only, as :class:`LSTM`'s.

    Returns:
        output, h_n: output as :class:`LSTM`'s, R·H wide; h_n [L·R, B, H], without B for unbatched input.

    Raises:
        Exception: what torch.nn.RNN raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a tensor.
        ValueError: as :class:`LSTM` does.
        NotImplementedError: as :class:`LSTM` does.

    Twice differentiable in input, hx and all weights. Source: Elman 1990; both biases as in torch.nn.RNN.

    Examples:
        >>> rnn = fused_rnn.RNN(10, 20, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(1, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _fused_counterpart = TorchRNN

    if TYPE_CHECKING:  # at run time the arguments are whatever the torch installed takes
        __call__: SequenceCall[Tensor]

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            backend: str | None = None,
            save: str = "gates",
            recurrent_dropout: float = 0.0,
            recurrent_dropout_on: str = "h",
            zoneout: float | Sequence[float] = 0.0,
            weight_dropout: float = 0.0,
            return_sequences: str = "h",
            return_gates: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args: Any, backend: str | None = None, save: str = "gates", **kwargs: Any) -> None:
            if "proj_size" in kwargs:
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            if isinstance(self, TorchRNN):  # whose own __init__ comes next, and sees to the nonlinearity
                super().__init__("", *args, backend=backend, save=save, **kwargs)
                return
            if len(args) > 3:
                self.nonlinearity = args[3]
                args = args[:3] + args[4:]
            else:
                self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
            modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
            if self.nonlinearity not in modes:
                raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
            super().__init__(modes[self.nonlinearity], *args, backend=backend, save=save, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Any, Tensor]:
        """Run the layers: output, h_n. Shapes and errors stand in the class's docstring."""
        made = quick.call(self, input, hx, lengths, reset)
        result: tuple[Any, Tensor] = run(self, input, hx, lengths, reset) if made is None else (made[0], made[1])
        return result
