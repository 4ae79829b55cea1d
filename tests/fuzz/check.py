"""A call, made and judged: what is wrong with it, in a line."""

from __future__ import annotations

import traceback
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .broken_streams import run_broken
from .generate import Call
from .given import Given, draw
from .run import Results, Subject, by_torch, effective, run, surroundings
from .verdict import excess, same_bits, strange

DRAWS = 32


class Outcome(NamedTuple):
    """What came of a call.

    right; refused: NotImplementedError, as documented; raised: a broken call, as it must. The rest are findings: wrong,
    structure (types, shapes, dtypes), error (where torch has a result), accepted (a broken call), trace (left by it, or
    in what was given), again (another result in a second run); and from outside, crash and hang.
    """

    kind: str
    reason: str = ""
    details: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("right", "refused", "raised")


def check(call: Call) -> Outcome:
    """The outcome of a call. Only a crash or a hang keeps it from returning."""
    filling = torch.utils.deterministic
    torch.use_deterministic_algorithms(call.fill)
    filling.fill_uninitialized_memory = call.fill
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _broken(call) if call.broken else _valid(call)
    finally:
        torch.use_deterministic_algorithms(False)


def _error(error: BaseException) -> tuple[str, str]:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line, traceback.format_exc()


def _is_documented(call: Call, refusal: str) -> bool:
    """Whether a NotImplementedError is one that the call asked for: by a backend's name, or by save="recompute"."""
    if call.backend == "torch" and "forward AD" in refusal:
        return True  # torch's own words
    named = call.backend is not None and refusal.startswith(f"backend {call.backend!r} cannot")
    return named or (call.save == "recompute" and refusal.startswith("no backend can"))


def _valid(call: Call) -> Outcome:
    given = draw(call)
    before, world = _copies(given), _world()
    ours: Any = None
    try:
        subject = Subject(call, given, ours=True)
        ours, told = run(call, subject)
        again = run(call, subject)[0] if call.again else None
    except NotImplementedError as error:
        return Outcome("refused" if _is_documented(call, str(error)) else "error", *_error(error))
    except Exception as error:
        failure = _error(error)
        if call.backend == "torch" and "Batching rule not implemented" in failure[0]:
            return Outcome("refused", failure[0])  # by torch's kernels, which were asked for
        try:
            by_torch(call, given, wide=False)
        except Exception as theirs:
            return Outcome("right", f"both raise: {failure[0]} / {_error(theirs)[0]}")
        return Outcome("error", *failure)
    if (trace := _differs(before, given)) or (trace := _world_differs(world, call)):
        return Outcome("trace", trace)
    if again is not None and (name := same_bits(ours, again)):
        return Outcome("again", f"{name} differs from run to run")
    return _judged(call, given, ours, told)


def _judged(call: Call, given: Given, ours: Results, told: str) -> Outcome:
    torchs, theirs = by_torch(call, given, wide=False)
    wide = torchs if effective(call) == torch.float64 else by_torch(call, given, wide=True)[0]
    # torch.nn has neither streams nor lengths, and under autocast results of another dtype.
    alike = call.kind != "stream" and given.lengths is None and given.reset is None and not call.autocast
    if alike and told != theirs:
        return Outcome("structure", f"{told}, torch {theirs}")
    if wrong := strange(ours, torchs, wide):
        return Outcome("wrong", wrong)
    over = excess(ours, torchs, wide)
    if over and (still := excess(*_of_many_draws(call, (ours, torchs, wide), list(over)))):
        return Outcome("wrong", " / ".join([*over.values(), "of all draws", *still.values()]))
    return Outcome("right", " / ".join(f"by luck: {line}" for line in over.values()))


def _of_many_draws(call: Call, first: tuple[Results, Results, Results], names: list[str]) -> list[Results]:
    """These of the three results of this call and of others like it, with other values, as one tensor a name.

    One draw is little to judge by where a tensor is small: of a sum that cancels to nearly nothing either side's error
    is large, or is not, by luck.
    """
    each = [first]
    for again in range(1, DRAWS):
        given = draw(call, again)
        ours = run(call, Subject(call, given, ours=True))[0]
        torchs = by_torch(call, given, wide=False)[0]
        wide = torchs if effective(call) == torch.float64 else by_torch(call, given, wide=True)[0]
        each.append((ours, torchs, wide))
    sides = zip(*each, strict=True)
    return [{name: torch.stack([results[name] for results in side]) for name in names} for side in sides]


def _broken(call: Call) -> Outcome:
    given = draw(call)
    try:
        subject = Subject(call, given, ours=True)
        before = run(call, subject)[0]
    except Exception as error:
        return Outcome("refused", "the valid call before: " + _error(error)[0])
    copies, world = _copies(given), _world()
    result: Any = None
    try:
        with surroundings(call, ours=True):
            result = run_broken(call, subject)
        raised = None
    except Exception as error:
        raised = _error(error)
    if raised is None:
        return Outcome("accepted", f"{call.broken}: got {type(result).__name__} in place of an exception")
    subject = subject if subject.module is None else _as_before(call, subject)
    if (trace := _differs(copies, given)) or (trace := _world_differs(world, call)):
        return Outcome("trace", f"{call.broken}: {trace}")
    try:
        after = run(call, subject)[0]
    except Exception as error:
        return Outcome("trace", f"{call.broken}: the valid call afterwards: {_error(error)[0]}", _error(error)[1])
    if name := same_bits(before, after):
        return Outcome("trace", f"{call.broken}: {name} of the valid call afterwards differs")
    return Outcome("raised", raised[0])


def _as_before(call: Call, subject: Subject) -> Subject:
    subject.module.train(call.mode != "eval" and call.kind != "stream")
    return subject


def _tensors(given: Given) -> list[Tensor]:
    extras = [t for t in (given.lengths, given.reset, given.batch_sizes, given.order) if t is not None]
    return [given.x, *given.hx, *given.weights, *extras]


def _copies(given: Given) -> list[Tensor]:
    return [t.detach().clone() for t in _tensors(given)]


def _differs(before: list[Tensor], given: Given) -> str | None:
    for k, (old, t) in enumerate(zip(before, _tensors(given), strict=True)):
        if same_bits({"": old}, {"": t.detach()}) is not None:
            return f"argument {k} was written to"
    return None


def _world() -> tuple[Any, ...]:
    """What a call may not change for the process."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*autocast, *modes, torch.get_default_dtype(), torch.get_num_threads())


def _world_differs(before: tuple[Any, ...], call: Call) -> str | None:
    return None if _world() == before else f"torch's settings were {before} and are {_world()}"
