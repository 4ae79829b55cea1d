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

PROGRAMS = {"lstm": LSTM, "gru": GRU, "leaky": LEAKY, "indrnn": INDRNN, "chain": CHAIN}
