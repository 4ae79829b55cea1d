"""JAX's lax.scan over torch.nn's cells, in a process of its own, `python scan_worker.py CLOCK`, led by scan.py.

A request a line on stdin, an answer a line on stdout, both JSON. It imports nothing of this package, for the
interpreter that has JAX may have no torch. The input's product stands before the loop, as one. The whole is compiled
and warmed up before it is timed, and a call ends when its results are there. Its time is the clock's ("wall"), or what
all threads of this process had a core ("process").
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CLOCKS = {"wall": time.perf_counter_ns, "process": time.process_time_ns}


def lstm(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    """y [T, B, H] of x [T, B, D]."""
    size = w_hh.shape[1]

    def step(state: Any, own: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(own + h @ w_hh.T, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], size), x.dtype)
    return lax.scan(step, (zeros, zeros), x @ w_ih.T + (b_ih + b_hh))[1]


def gru(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    """y [T, B, H] of x [T, B, D]."""
    size = w_hh.shape[1]

    def step(h: Any, own: Any) -> Any:
        x_r, x_z, x_n = jnp.split(own, 3, -1)
        h_r, h_z, h_n = jnp.split(h @ w_hh.T + b_hh, 3, -1)
        z = jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
        h = (1 - z) * n + z * h
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], size), x.dtype), x @ w_ih.T + b_ih)[1]


def rnn(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    """y [T, B, H] of x [T, B, D]."""

    def step(h: Any, own: Any) -> Any:
        h = jnp.tanh(own + h @ w_hh.T)
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype), x @ w_ih.T + (b_ih + b_hh))[1]


CELLS = {"LSTM": lstm, "GRU": gru, "RNN": rnn}
NAMES = ("x", "w_ih", "w_hh", "b_ih", "b_hh")


def build(cell: str, training: bool, inputs: str, results: str) -> tuple[Any, list[Any], float]:
    """The compiled function, its arguments and the seconds it took to compile and run once.

    Writes its results beside, as they are to be compared.
    """
    given = np.load(inputs)
    arguments = [jnp.asarray(given[name]) for name in NAMES]
    dy = jnp.asarray(given["dy"])

    def loss(*arguments: Any) -> Any:
        y = CELLS[cell](*arguments)
        return jnp.vdot(y, dy), y

    start = time.perf_counter()
    if training:
        function = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(NAMES))), has_aux=True))
        (_, y), gradients = jax.block_until_ready(function(*arguments))
    else:
        function = jax.jit(CELLS[cell])
        y, gradients = jax.block_until_ready(function(*arguments)), ()
    compile_s = time.perf_counter() - start
    np.savez(results, *map(np.asarray, (y, *gradients)))
    return function, arguments, compile_s


def main(clock: str) -> None:
    """Answer every request: "inputs" builds a problem, "times" times it."""
    now = CLOCKS[clock]
    function: Any = None
    arguments: list[Any] = []
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "inputs" in request:
            function, arguments, answer["compile_s"] = build(**request)
        else:
            answer["seconds"] = []
            for _ in range(request["times"]):
                start = now()
                jax.block_until_ready(function(*arguments))
                answer["seconds"].append((now() - start) * 1e-9)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
