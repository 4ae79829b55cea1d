"""onnxruntime: one LSTM, GRU or RNN node, inference.

The weights are constants of the model, so it packs them once and keeps them: more than a call of a module may, whose
weights can change. Input and output are bound to torch's own memory, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_rnn import onnx as ours
from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.rivals.rival import Build, Rival, installed, restricted

PACKAGES = ("onnx", "onnxruntime")
NODES = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}  # whose node is a cell of torch.nn's names
STATES = {"LSTM": ("h", "c"), "GRU": ("h",), "RNN": ("h",)}


def session(cell: str, parameters: Sequence[Tensor], T: int, B: int, stateful: bool) -> Any:
    """A session over a layer with torch.nn's parameters: x → y, or stateful with a state in and out.

    y is [T, 1, B, H], states are [1, B, H]. As many threads as torch has now.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node, order, attributes = ours.NODES[NODES[cell]]
    w_ih, w_hh, b_ih, b_hh = (torch.cat([p.detach().chunk(len(order))[gate] for gate in order]) for p in parameters)
    given = {"w": w_ih, "r": w_hh, "b": torch.cat([b_ih, b_hh])}
    weights = [numpy_helper.from_array(tensor.unsqueeze(0).numpy(), name) for name, tensor in given.items()]
    states = STATES[cell] if stateful else ()
    H, D = w_hh.shape[1], w_ih.shape[1]

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [value("x", T, B, D), *(value(name, 1, B, H) for name in states)]
    outputs = [value("y", T, 1, B, H), *(value(f"{name}_n", 1, B, H) for name in states)]
    names = ["x", *given, *(["", *states] if states else [])]
    one = helper.make_node(node, names, [output.name for output in outputs], hidden_size=H, **attributes)
    model = helper.make_model(
        helper.make_graph([one], cell, inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 14)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # not beside whoever has the next turn
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bind(session: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
    """The memory of tensors as a session's inputs and outputs: contiguous float32."""
    import numpy

    binding = session.io_binding()
    for bound, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            bound(name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())
    return binding


class OrtCall(Call):
    """A run of the session over a whole sequence."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.point, call.module, call.forward, call.x, call.dy)
        point = call.point
        self.session = session(point.cell, call.parameters, point.T, point.B, stateful=False)
        self.output = torch.empty(point.T, 1, point.B, point.H, device="cpu")
        self.binding = bind(self.session, {"x": self.x}, {"y": self.output})

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.y = self.output.squeeze(1)


class OrtStream:
    """A step at a time, B = 1: two bindings take turns, and what is one's state after is the other's before."""

    def __init__(self, cell: str, parameters: Sequence[Tensor], x: Tensor) -> None:
        H = parameters[1].shape[1]
        self.session = session(cell, parameters, 1, 1, stateful=True)
        self.y = torch.empty(1, 1, 1, H, device="cpu")
        self.states = [{name: torch.zeros(1, 1, H, device="cpu") for name in STATES[cell]} for _ in range(2)]
        self.bindings = []
        for before, after in (self.states, self.states[::-1]):
            outputs = {"y": self.y} | {f"{name}_n": state for name, state in after.items()}
            self.bindings.append(bind(self.session, {"x": x.unsqueeze(0)} | before, outputs))

    def step(self) -> Tensor:
        """y [1, H]: after x [1, H], whose memory is bound."""
        binding, other = self.bindings
        self.bindings = [other, binding]
        self.session.run_with_iobinding(binding)
        return self.y[0, 0]


def missing(_: str = "") -> str | None:
    lacking = [package for package in PACKAGES if package not in installed(package)]
    return f"pip install {' '.join(lacking)}" if lacking else None


def _supports(point: Point) -> str | None:
    return restricted(point, ("inference",), ("fp32",))


@contextmanager
def _opened(_: str) -> Iterator[Build]:
    yield OrtCall


RIVAL = Rival("onnxruntime", _supports, missing, lambda _: installed("onnxruntime"), _opened)
