"""A step's program, and the CPU's loops over it, against autograd through the step itself, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn import UserCell, layers


def grads_of(reached: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor | None]:
    """Of (output, its gradient) those of the inputs."""
    outputs, given = zip(*reached, strict=True)
    return list(torch.autograd.grad(outputs, inputs, given, allow_unused=True))


def agrees_with_autograd(cell: UserCell, seed: int = 0, rows: int = 3, units: int = 5, rtol: float = 1e-8) -> None:
    """The states after and all gradients, of values at random."""
    program, states, count = cell.program, len(cell.states), cell.gates
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)

    x = [draw(rows, units) for _ in range(count)]
    r = [draw(rows, units) for _ in range(count)] if cell.recurrent else []
    s, p = [draw(rows, units) for _ in range(states)], [draw(units) for _ in cell.params]
    expected = [after.to(torch.float64).expand(rows, units) for after in cell(x, r or None, s, p)]
    dafter = [draw(rows, units).detach() for _ in expected]
    inputs = [*x, *r, *s, *p]
    reached = [(after, d) for after, d in zip(expected, dafter, strict=True) if after.requires_grad]
    zeros = [torch.zeros_like(i) for i in inputs]
    given = grads_of(reached, inputs) if reached else zeros
    grads = [zero if g is None else g for g, zero in zip(given, zeros, strict=True)]

    joined = count - program.apart
    a = [own + other for own, other in zip(x[:joined], r, strict=False)] + x[joined:] + r[joined:] if r else x
    after, saved = program.forward.run([*a, *s, *p], units=units)
    saved = [value.expand(rows, units) for value in saved]
    for made, right in zip(after, expected, strict=True):
        torch.testing.assert_close(made.expand(rows, units), right, rtol=1e-9, atol=1e-11)
    dgates, dbefore, dparams = program.backward.run([*saved, *s, *after, *p, *dafter], units=units)
    dx, dr = grads[:count], grads[count : count + len(r)]
    right_gates = [*dx[joined:], *dr] if r else dx
    pairs = [*zip(dgates, right_gates, strict=True), *zip(dbefore, grads[count + len(r) :], strict=False)]
    pairs += [
        (made.expand(rows, units).sum(0), right)
        for made, right in zip(dparams, grads[len(inputs) - len(p) :], strict=True)
    ]
    for made, right in pairs:
        torch.testing.assert_close(made.expand_as(right), right, rtol=rtol, atol=1e-10)


def loops_agree_with_autograd(cell: UserCell, seed: int = 0, steps: int = 3, rtol: float = 1e-8) -> None:
    """A layer of two rows by the CPU's loops: y, the states after, and all gradients."""
    random = torch.Generator().manual_seed(seed)
    units, width = 3, 2

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random, dtype=torch.float64) * 0.7).requires_grad_()

    rows = cell.gates * units
    shapes = [(rows, width), (rows, units), (rows,), (rows,)] if cell.recurrent else [(rows, width), (rows,)]
    weights = [draw(*shape) for shape in shapes] + [draw(units) for _ in cell.params]
    x, states = draw(steps, 2, width), [draw(1, 2, units) for _ in cell.states]
    inputs = [x, *states, *weights]

    def plain() -> list[Tensor]:
        now, ys, params = [s[0] for s in states], [], weights[len(shapes) :]
        for x_t in x:
            sides = linear(x_t, weights[0], weights[len(shapes) // 2]).chunk(cell.gates, -1)
            other = linear(now[0], weights[1], weights[3]).chunk(cell.gates, -1) if cell.recurrent else None
            now = [state.expand(2, units) for state in cell(sides, other, now, params)]
            ys.append(now[0])
        return [torch.stack(ys), *(s.unsqueeze(0) for s in now)]

    made = layers.run(cell.descriptor().name, x, weights, states, backend="cpu")
    expected = plain()
    given = [torch.randn(y.shape, generator=random, dtype=torch.float64) for y in expected]
    pairs = list(zip(made, expected, strict=True))
    loss = sum((y * d).sum() for y, d in zip(expected, given, strict=True))
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    pairs += zip(torch.autograd.grad(list(made), inputs, given), grads, strict=True)
    for ours, right in pairs:
        torch.testing.assert_close(ours, right, rtol=rtol, atol=1e-9)
