"""Cells as programs, written by hand: what a tracer makes of a step is not needed to test who runs one."""

from __future__ import annotations

from fused_rnn.cells.program import PREFIX

LSTM = (
    PREFIX + "lstm|4 0 1|h c||"
    "sigmoid 0,sigmoid 1,tanh 2,sigmoid 3,mul 6 8,fma 7 5 10,tanh 11,mul 9 12>13 11;6 7 8 9|"
    "tanh 7,mul 8 3,tanh_backward 11 10,add 9 12,mul 13 2,sigmoid_backward 14 0,mul 13 5,sigmoid_backward 16 1,"
    "mul 13 0,tanh_backward 18 2,mul 8 10,sigmoid_backward 20 3,const 0.0,mul 13 1>15 17 19 21;22 23;"
)
GRU = (
    PREFIX + "gru|3 1 1|h||"
    "sigmoid 0,sigmoid 1,fma 5 3 2,tanh 7,sub 4 8,fma 6 9 8>10;5 6 8 3|"
    "const 1.0,sub 7 1,mul 6 8,tanh_backward 9 2,mul 10 3,sigmoid_backward 11 0,sub 4 2,mul 6 13,"
    "sigmoid_backward 14 1,mul 10 0,mul 6 1>10 12 15 16;17;"
)
# h' = h + a (tanh(x + r) - h), with a number a per unit.
LEAKY = (
    PREFIX + "leaky|1 0 1|h|a|tanh 0,sub 3 1,fma 2 4 1>5;3|"
    "mul 4 3,tanh_backward 5 0,sub 4 5,sub 0 1,mul 4 8>6;7;9"
)  # fmt: skip
# h' = relu(x + u h), without W_hh: Li et al. 2018.
INDRNN = PREFIX + "indrnn|1 0 0|h|u|fma 2 1 0,relu 3>4;|relu_backward 3 1,mul 4 2,mul 4 0>4;5;6"
# Three states, one after the other: m' = a m + x + r, k' = b k + m', h' = tanh(k').
CHAIN = (
    PREFIX + "chain|1 0 1|h m k|a b|fma 4 2 0,fma 5 3 6,tanh 7>8 6 7;8|"
    "tanh_backward 9 0,add 12 11,add 10 13,mul 14 7,mul 13 8,const 0.0,mul 14 2,mul 13 3>14;17 15 16;18 19"
)

# c' = f c + (1 - f) x_0, h' = r tanh(c') + (1 - r) x_3: no W_hh, and h is not read. As Lei et al. 2018.
SRU = (
    PREFIX + "sru|4 0 0|h c|v_f v_r|"
    "fma 6 5 1,sigmoid 8,fma 7 5 2,sigmoid 10,sub 5 0,fma 9 12 0,tanh 13,sub 14 3,fma 11 15 3>16 13;9 11 12 15|"
    "mul 10 3,sigmoid_backward 12 1,mul 10 1,tanh 7,tanh_backward 14 15,add 11 16,mul 17 2,sigmoid_backward 18 0,"
    "const 1.0,sub 20 0,mul 17 21,sub 20 1,mul 10 23,mul 17 0,mul 19 8,mul 13 9,add 25 26,add 28 27,const 0.0,"
    "mul 19 5,mul 13 5>22 19 13 24;30 29;31 32"
)
PROGRAMS = {"lstm": LSTM, "gru": GRU, "leaky": LEAKY, "indrnn": INDRNN, "chain": CHAIN, "sru": SRU}


def program_of(gates: int, apart: int = 0, states: int = 1, params: int = 0, recurrent: bool = True) -> str:
    """A cell of these counts: state i is the sum of tanh(a) of every states-th pre-activation, times 1 / gates, and of
    itself times the sum of every states-th param and 0.25."""
    pre = gates + apart
    names = ("h", "c", "n", "m", *(f"s{k}" for k in range(4, states)))[:states]
    code, next_value = [], pre + states + params

    def add(text: str) -> int:
        nonlocal next_value
        code.append(text)
        next_value += 1
        return next_value - 1

    def with_params(factor: int, i: int, first: int) -> int:
        """The factor and state i's params, of which `first` is the first of all, added up."""
        for k in range(i, params, states):
            factor = add(f"add {factor} {first + k}")
        return factor

    scale = add(f"const {1 / gates!r}")
    kept = add("const 0.25")
    saved = [add(f"tanh {g}") for g in range(pre)]
    after = []
    for i in range(states):
        total = add(f"mul {with_params(kept, i, pre + states)} {pre + i}")
        for g in range(i, pre, states):
            total = add(f"fma {scale} {saved[g]} {total}")
        after.append(total)
    forward = f"{','.join(code)}>{' '.join(map(str, after))};{' '.join(map(str, saved))}"
    first, first_param = 2 * states + params + pre, 2 * states + pre
    code, next_value = [], first + states
    scale, kept = add(f"const {1 / gates!r}"), add("const 0.25")
    scaled = [add(f"mul {scale} {first + i}") for i in range(states)]
    gradients = [add(f"tanh_backward {scaled[g % states]} {g}") for g in range(pre)]
    before = [add(f"mul {with_params(kept, i, first_param)} {first + i}") for i in range(states)]
    of_params = [add(f"mul {first + k % states} {pre + k % states}") for k in range(params)]
    # Gradients come in another order: the input sides of the gates apart, then the recurrent sides of all.
    joined = gates - apart
    ordered = [*gradients[joined:gates], *gradients[:joined], *gradients[gates:]]
    groups = (ordered, before, of_params)
    backward = f"{','.join(code)}>{';'.join(' '.join(map(str, group)) for group in groups)}"
    vectors = " ".join(f"p{k}" for k in range(params))
    return f"{PREFIX}any|{gates} {apart} {int(recurrent)}|{' '.join(names)}|{vectors}|{forward}|{backward}"
