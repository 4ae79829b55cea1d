"""torch's own module tests for its RNN, GRU, LSTM and their cells, run on ours: the entries of torch's module database.

An entry has inputs, a reference for the unbatched ones, and calls that must fail, with the words in which they must.
What is tested of each is what torch's TestModule tests of it.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from counterparts import MODULES, flatten
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("expecttest", reason="torch.testing's own tests import expecttest, which is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # it would rather have hypothesis, which nothing here needs
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
    from torch.testing._internal.common_utils import freeze_rng_state

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def replaced(info: ModuleInfo) -> ModuleInfo:
    """The entry with our class in place of torch's."""
    ours = copy.copy(info)
    ours.module_cls = MODULES[info.name.removeprefix("nn.")][0]
    return ours


INFOS = [replaced(info) for info in module_db if info.name.removeprefix("nn.") in MODULES]
DTYPES = (torch.float32, torch.float64)


def test_the_database_has_all_six() -> None:
    assert sorted(info.module_cls.__name__ for info in INFOS) == sorted(MODULES)


def entries(dtypes: tuple[torch.dtype, ...] = DTYPES, modes: tuple[bool, ...] = (True, False)) -> pytest.MarkDecorator:
    """Parametrize over entries, dtypes and, where the two differ, training and evaluation."""
    cases = [
        pytest.param(info, dtype, training, id=f"{info.name}-{str(dtype)[6:]}-{'train' if training else 'eval'}")
        for info in INFOS
        for dtype in dtypes
        for training in (modes if info.train_and_eval_differ else [True])
    ]
    return pytest.mark.parametrize(("info", "dtype", "training"), cases)


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool, requires_grad: bool = False) -> list[ModuleInput]:
    """The entry's inputs, packed ones too where it has them."""
    packed = {"with_packed_sequence": True} if info.module_cls.__name__ in ("RNN", "GRU") else {}
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **packed
        )
    )


def instances(
    info: ModuleInfo, dtype: torch.dtype, training: bool, requires_grad: bool = False
) -> Iterator[tuple[ModuleInput, Any]]:
    """Each input with the module made for it."""
    for sample in samples(info, dtype, training, requires_grad):
        with freeze_rng_state():
            module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        yield sample, module.to("cpu").to(dtype).train(training)


def run(module: Any, sample: ModuleInput) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def assert_equal(got: Any, expected: Any) -> None:
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        torch.testing.assert_close(a, b)


@entries()
def test_forward(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample, module in instances(info, dtype, training):
        got = run(module, sample)
        packed = isinstance(sample.forward_input.args[0], PackedSequence)
        if sample.reference_fn is not None and not packed:  # for packed input torch has none that runs
            expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
            assert_equal(got, expected)
        for convert, to in ((nn.Module.float, torch.float32), (nn.Module.double, torch.float64)):
            assert {p.dtype for p in convert(module).parameters()} == {to}
        assert_equal(run(module.to(dtype), sample), got)


@entries()
def test_factory_arguments(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(info, dtype, training):
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        for device in ("cpu", "meta"):
            module = info.module_cls(*arguments, **keywords, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
            with torch.device(device):
                module = info.module_cls(*arguments, **keywords)
            assert {p.device.type for p in module.parameters()} == {device}


@entries()
def test_repr_and_pickle(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample, module in instances(info, dtype, training):
        before = run(module, sample)
        again = pickle.loads(pickle.dumps(module))
        assert repr(again) == repr(module) == str(module)
        assert_equal(run(again, sample), before)


@entries()
def test_state_dict_round_trip(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample, module in instances(info, dtype, training):
        other = copy.deepcopy(module)
        for p in other.parameters():
            nn.init.constant_(p, 0.5)
        other.load_state_dict(module.state_dict())
        assert_equal(run(other, sample), run(module, sample))


@entries((torch.float64,))
def test_inputs_that_are_not_contiguous(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    def spread(t: Any) -> Any:
        """The same values with a stride of two in the last dimension."""
        if isinstance(t, (tuple, list)):
            return type(t)(spread(part) for part in t)
        return t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(t.requires_grad)

    for sample, module in instances(info, dtype, training, requires_grad=True):
        arguments = sample.forward_input.args
        if isinstance(arguments[0], PackedSequence):
            continue
        results = []
        for given in (arguments, spread(arguments)):
            outputs = flatten(module(*given))
            leaves = [*flatten(given), *module.parameters()]
            grads = torch.autograd.grad([o.sum() for o in outputs], leaves, retain_graph=True)
            results.append([*outputs, *grads])
            strided = [torch.randn(*o.shape, 2, dtype=dtype)[..., 0] for o in outputs]
            torch.autograd.grad(outputs, leaves, strided)
        assert_equal(*results)


def check_gradient(check: Callable[..., bool], info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample, module in instances(info, dtype, training, requires_grad=True):
        given, names = sample.forward_input.args, [name for name, _ in module.named_parameters()]
        packed = isinstance(given[0], PackedSequence)
        inputs = [given[0].data] if packed else flatten(given)

        def function(
            *tensors: Tensor,
            given: Any = given,
            count: int = len(inputs),
            module: Any = module,
            names: list[str] = names,
            packed: bool = packed,
        ) -> Any:
            x: Any = given[0]._replace(data=tensors[0]) if packed else tensors[0]
            hx = tensors[1:count]
            arguments = (x,) if not hx else (x, tuple(hx) if len(hx) == 2 else hx[0])
            outputs = torch.func.functional_call(module, dict(zip(names, tensors[count:], strict=True)), arguments)
            return tuple(t for t in flatten(outputs) if t.is_floating_point())

        assert check(function, (*inputs, *module.parameters()), nondet_tol=info.gradcheck_nondet_tol, fast_mode=True)


@entries((torch.float64,))
def test_gradient(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    check_gradient(gradcheck, info, dtype, training)


@pytest.mark.slow
@entries((torch.float64,), modes=(True,))
def test_second_gradient(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    assert info.supports_gradgrad
    check_gradient(gradgradcheck, info, dtype, training)


@entries((torch.float64,))
def test_training_and_evaluation_differ_only_by_dropout(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample, module in instances(info, dtype, training):
        assert_equal(run(module.train(), sample), run(module.eval(), sample))


@entries()
def test_errors(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    errors = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert errors
    for error in errors:
        sample = error.module_error_input
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.module_cls(*arguments, **keywords)
        else:
            module = info.module_cls(*arguments, **keywords)
            with pytest.raises(error.error_type, match=error.error_regex):
                run(module, sample)
