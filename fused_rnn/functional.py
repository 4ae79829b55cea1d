"""A whole stack of layers, and single steps, as functions of plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn import checks, layers


def lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence[Sequence[bool]] | None = None,
    save: str = "gates",
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a stack of LSTM layers over a sequence.

    Args:
        x: [T, B, D], float32, float64, bfloat16 or float16.
        weights: of x's dtype, in the order of torch's `_flat_weights`: per layer, per direction w_ih [4H, D or R·P],
            w_hh [4H, P], (b_ih, b_hh [4H]), (w_hr [P, H]); gate order i, f, g, o. R is 2 if bidirectional, else 1; P is
            the projection's width, H without one.
        hx: (h0 [L·R, B, P], c0 [L·R, B, H]), None for zeros.
        num_layers: L.
        bidirectional: whether each layer has a second recurrence, from the end to the beginning.
        dropout: probability on the output of every layer but the last, if training; torch.nn.LSTM's mask for the same
            seed.
        training: whether there is dropout.
        lengths: [B] integers, any device, any order. Outputs at t ≥ lengths[b] are zero, the final state is that of the
            last valid step; the reverse direction starts there, as with a PackedSequence. On the CPU they must be
            0 … T.
        reset: [T, B] bool, a tensor or lists. Where true, the state (h and c) that enters step t of sequence b is zero,
            in both directions.
        save: what is kept for backward, if a gradient is needed: "gates" (fastest) or "recompute" (states now and
            then).
        backend: "cpu", "torch", "reference", "cuda", "triton", or None for what measured fastest.

    Returns:
        y [T, B, R·P] and (h_n [L·R, B, P], c_n [L·R, B, H]), in x's dtype; sums of 16-bit values, and c, are kept in
        float32 inside. Under autocast all tensors but float64 ones are cast to its dtype, and so is the result.

    Raises:
        ValueError: naming the argument, what it got and what it expected; TypeError likewise, for what is no tensor.
        RuntimeError: for T = 0.
        NotImplementedError: with each backend's reason when none, or not the one named, can run it.

    Twice differentiable in x, weights and hx (by "torch" as often as torch's kernels); in forward mode by "reference".
    Source: Hochreiter & Schmidhuber 1997; gates as in torch.nn.LSTM.

    Examples:
        >>> weights = [torch.randn(80, 10), torch.randn(80, 20), torch.randn(80), torch.randn(80)]
        >>> y, (h_n, c_n) = fused_rnn.functional.lstm(torch.randn(5, 3, 10), weights)
        >>> y.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), torch.Size([1, 3, 20]))
    """
    y, h_n, c_n = layers.run(
        "lstm", x, weights, _pair(hx), num_layers, bidirectional, dropout, training, lengths, reset, save, backend
    )
    return y, (h_n, c_n)


def gru(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence[Sequence[bool]] | None = None,
    save: str = "gates",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a stack of GRU layers (the reset gate after the recurrent product) over a sequence.

    Arguments that are not named here, errors and differentiability are those of :func:`lstm`.

    Args:
        weights: w_ih [3H, D or R·H], w_hh [3H, H], (b_ih, b_hh [3H]), gate order r, z, n.
        hx: h0 [L·R, B, H], None for zeros.

    Returns:
        y [T, B, R·H] and h_n [L·R, B, H].

    Source: Cho et al. 2014; gates as in torch.nn.GRU.

    Examples:
        >>> weights = [torch.randn(60, 10), torch.randn(60, 20)]
        >>> y, h_n = fused_rnn.functional.gru(torch.randn(5, 3, 10), weights, lengths=[5, 0, 2])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
    y, h_n = layers.run(
        "gru", x, weights, [hx], num_layers, bidirectional, dropout, training, lengths, reset, save, backend
    )
    return y, h_n


def rnn(
    x: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence[Sequence[bool]] | None = None,
    save: str = "gates",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a stack of plain recurrent layers over a sequence.

    Arguments that are not named here, errors and differentiability are those of :func:`lstm`.

    Args:
        weights: w_ih [H, D or R·H], w_hh [H, H], (b_ih, b_hh [H]).
        hx: h0 [L·R, B, H], None for zeros.
        nonlinearity: "tanh" or "relu".

    Returns:
        y [T, B, R·H] and h_n [L·R, B, H].

    Source: Elman 1990; as in torch.nn.RNN.

    Examples:
        >>> weights = [torch.randn(20, 10), torch.randn(20, 20)]
        >>> y, h_n = fused_rnn.functional.rnn(torch.randn(5, 3, 10), weights, nonlinearity="relu")
    """
    cell = _rnn_cell_name(nonlinearity)
    y, h_n = layers.run(
        cell, x, weights, [hx], num_layers, bidirectional, dropout, training, lengths, reset, save, backend
    )
    return y, h_n


def lstm_cell(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        x: [B, D].
        hx: (h [B, H], c [B, H]), None for zeros.
        weights: w_ih, w_hh, (b_ih, b_hh), as a layer's in :func:`lstm`.
        backend: as :func:`lstm`'s.

    Returns:
        (h', c'), each [B, H]. Dtypes, errors, differentiability and source as in :func:`lstm`.

    Examples:
        >>> weights = [torch.randn(80, 10), torch.randn(80, 20)]
        >>> h, c = fused_rnn.functional.lstm_cell(torch.randn(3, 10), None, weights)
    """
    h, c = layers.step("lstm", x, _pair(hx, is_cell=True), weights, backend)
    return h, c


def gru_cell(x: Tensor, h: Tensor | None, weights: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """One step of a GRU.

    Args:
        x: [B, D].
        h: [B, H], None for zeros.
        weights: w_ih, w_hh, (b_ih, b_hh), as a layer's in :func:`gru`.
        backend: as :func:`lstm`'s.

    Returns:
        h' [B, H]. All else as in :func:`gru`.

    Examples:
        >>> weights = [torch.randn(60, 10), torch.randn(60, 20)]
        >>> h = fused_rnn.functional.gru_cell(torch.randn(3, 10), None, weights)
    """
    return layers.step("gru", x, [h], weights, backend)[0]


def rnn_cell(
    x: Tensor, h: Tensor | None, weights: Sequence[Tensor], *, nonlinearity: str = "tanh", backend: str | None = None
) -> Tensor:
    """One step of a plain RNN.

    Args:
        x: [B, D].
        h: [B, H], None for zeros.
        weights: w_ih, w_hh, (b_ih, b_hh), as a layer's in :func:`rnn`.
        nonlinearity: "tanh" or "relu".
        backend: as :func:`lstm`'s.

    Returns:
        h' [B, H]. All else as in :func:`rnn`.

    Examples:
        >>> weights = [torch.randn(20, 10), torch.randn(20, 20)]
        >>> h = fused_rnn.functional.rnn_cell(torch.randn(3, 10), None, weights)
    """
    return layers.step(_rnn_cell_name(nonlinearity), x, [h], weights, backend)[0]


def _pair(hx: tuple[Tensor, Tensor] | None, is_cell: bool = False) -> Sequence[Tensor | None]:
    if hx is None:
        return ()
    checks.check_pair(hx, "(h, c)" if is_cell else "(h0, c0)", is_cell)
    return hx


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity == "tanh":
        return "rnn_tanh"
    if nonlinearity == "relu":
        return "rnn_relu"
    raise ValueError(f"nonlinearity: got {nonlinearity!r}, expected 'tanh' or 'relu'")
