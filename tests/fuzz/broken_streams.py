"""Steps and states that a stream must refuse; importing it adds them to broken.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .broken import BREAKS, Break, add, breaks, changed, choices, grown, other_dtype, run_broken, zeros
from .given import view, x_shape
from .run import Subject

__all__ = ["BREAKS", "choices", "run_broken"]


def _step(subject: Subject) -> Tensor:
    call, given = subject.call, subject.given
    x = view(given.x, call.memory, x_shape(call))
    return x.select(1 if call.batch_first else 0, 0)


def _stepping(change: Callable[[Tensor], Any]) -> Break:
    return lambda subject: subject.stream.step(change(_step(subject)))


STEPPINGS: dict[str, Callable[[Tensor], Any]] = {
    "step_too_wide": lambda x: grown(x, 1),
    "step_of_a_larger_batch": lambda x: grown(x, 0),
    "step_of_no_batch": lambda x: x[:0],
    "step_1d": lambda x: x[0],
    "step_3d": lambda x: x.unsqueeze(0),
    "step_of_another_dtype": lambda x: x.to(other_dtype(x.dtype)),
    "step_of_integers": lambda x: x.isnan().long(),
    "step_on_meta": lambda x: x.to("meta"),
    "step_a_list": lambda x: x.tolist(),
    "step_sparse": lambda x: x.contiguous().to_sparse(),
}
for _name, _change in STEPPINGS.items():
    add(_name, _stepping(_change), ("stream",))


@breaks("stream")
def _step_that_wants_a_gradient(subject: Subject) -> Any:
    with torch.inference_mode(False), torch.enable_grad():
        return subject.stream.step(_step(subject).detach().clone().requires_grad_())


@breaks("stream")
def _steps_of_none(subject: Subject) -> Any:
    x = _step(subject).unsqueeze(1 if subject.call.batch_first else 0)
    return subject.stream.steps(x.narrow(1 if subject.call.batch_first else 0, 0, 0))


@breaks("stream")
def _out_too_wide(subject: Subject) -> Any:
    x = _step(subject)
    return subject.stream.step(x, out=x.new_empty(subject.call.B, subject.call.P + 1))


@breaks("stream")
def _out_of_another_dtype(subject: Subject) -> Any:
    x = _step(subject)
    return subject.stream.step(x, out=x.new_empty(subject.call.B, subject.call.P, dtype=other_dtype(x.dtype)))


@breaks("stream")
def _mask_of_another_batch(subject: Subject) -> Any:
    return subject.stream.reset(torch.zeros(subject.call.B + 1, dtype=torch.bool)) or "done"


@breaks("stream")
def _mask_of_integers(subject: Subject) -> Any:
    return subject.stream.reset(torch.zeros(subject.call.B, dtype=torch.int64)) or "done"


@breaks("stream")
def _state_too_wide(subject: Subject) -> Any:
    states = [grown(h, 2) for h in zeros(subject)]
    subject.stream.state = tuple(states) if subject.call.has_c else states[0]
    return "set"


@breaks("stream")
def _state_a_number(subject: Subject) -> Any:
    subject.stream.state = 1.0
    return "set"


@breaks("stream")
def _state_dict_of_other_names(subject: Subject) -> Any:
    return subject.stream.load_state_dict({"g": torch.zeros(1)}) or "done"


@breaks("stream")
def _state_dict_of_other_shapes(subject: Subject) -> Any:
    state = subject.stream.state_dict()
    return subject.stream.load_state_dict(state | {"h": grown(state["h"], 1)}) or "done"


@breaks("stream")
def _refresh_of_other_weights(subject: Subject) -> Any:
    with changed(subject, 1, lambda w: grown(w, 0)):
        return subject.stream.refresh() or "done"


@breaks("stream")
def _refresh_of_another_dtype(subject: Subject) -> Any:
    with changed(subject, 0, lambda w: w.to(other_dtype(w.dtype))):
        return subject.stream.refresh() or "done"


@breaks("stream")
def _unknown_narrow_weights(subject: Subject) -> Any:
    return subject.module.stream(1, weights="int4")
