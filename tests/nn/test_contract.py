"""All that torch.nn's modules are besides what they compute: arguments, state, errors, and what others do to them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counterparts import CELLS, MODULES, SEQUENCES, assert_alike, flatten, leaves, make, outputs_and_gradients, states
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn

# Every positional argument there is, in torch.nn's order.
POSITIONAL: dict[str, tuple[Any, ...]] = {
    "LSTM": (5, 7, 2, False, True, 0.25, True, 3, "cpu", torch.float64),
    "GRU": (5, 7, 2, False, True, 0.25, True, 0, "cpu", torch.float64),
    "RNN": (5, 7, 2, "relu", False, True, 0.25, True, 0, "cpu", torch.float64),
    "LSTMCell": (5, 7, False, "cpu", torch.float64),
    "GRUCell": (5, 7, False, "cpu", torch.float64),
    "RNNCell": (5, 7, False, "relu", "cpu", torch.float64),
}


def sample(name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input for the module of this name with input_size 5."""
    return torch.randn(batch, 5, dtype=dtype) if name in CELLS else torch.randn(4, batch, 5, dtype=dtype)


def assert_same_state(ours: nn.Module, counterpart: nn.Module) -> None:
    a, b = ours.state_dict(), counterpart.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# ours, and what must be true of it


@pytest.mark.parametrize("name", MODULES)
def test_every_positional_argument_stands_where_torch_has_it(name: str) -> None:
    for count in range(2, len(POSITIONAL[name]) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, counterpart = make(name, *POSITIONAL[name][:count])
        assert repr(ours) == repr(counterpart)
        assert_same_state(ours, counterpart)
        plain = {
            key: value for key, value in vars(counterpart).items() if isinstance(value, (int, float, str, bool, list))
        }
        assert all(key.startswith("_flat_weight") or getattr(ours, key) == value for key, value in plain.items())


@pytest.mark.parametrize("name", MODULES)
def test_attributes_and_methods(name: str) -> None:
    ours, counterpart = make(name, 5, 7)
    assert set(vars(counterpart)) <= set(vars(ours))
    assert set(dir(counterpart)) <= set(dir(ours))
    assert {key for key, value in vars(type(counterpart)).items() if callable(value)} <= set(vars(type(ours)))
    for key, value in vars(type(counterpart)).items():
        if inspect.isfunction(value) and key not in ("__init__", "forward"):
            assert inspect.signature(getattr(type(ours), key)) == inspect.signature(value)
    assert list(inspect.signature(type(ours).forward).parameters)[:3] == ["self", "input", "hx"]
    assert type(ours).__constants__ == type(counterpart).__constants__
    if name in SEQUENCES:
        shapes = [[[p.shape for p in layer] for layer in module.all_weights] for module in (ours, counterpart)]
        assert shapes[0] == shapes[1]
        assert ours._flat_weights_names == counterpart._flat_weights_names
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
        assert ours.flatten_parameters() is None


def test_what_they_are_instances_of() -> None:
    """Dynamo refuses instances of torch.nn.LSTM, GRU and RNN themselves."""
    for name, (ours, counterpart) in MODULES.items():
        assert issubclass(ours, nn.RNNBase if name in SEQUENCES else nn.RNNCellBase)
        assert not issubclass(ours, counterpart)
        assert ours.__name__ == name


@pytest.mark.parametrize("name", MODULES)
def test_extras_are_keywords(name: str) -> None:
    ours, counterpart = MODULES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cls in (ours, counterpart):
            with pytest.raises(TypeError):
                cls(*POSITIONAL[name], "cpu")
    module = ours(5, 7, backend="reference")
    assert module.backend == "reference"
    assert repr(module) == f"{name}(5, 7, backend='reference')"
    with pytest.raises(ValueError, match="backend"):
        ours(5, 7, backend="gpu")
    if name in SEQUENCES:
        assert repr(ours(5, 7, save="recompute")) == f"{name}(5, 7, save='recompute')"
        with pytest.raises(ValueError, match="save: got 'all'"):
            ours(5, 7, save="all")
        with pytest.raises(TypeError):
            module(torch.randn(4, 3, 5), None, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", MODULES)
def test_initialisation_takes_the_same_random_numbers(name: str) -> None:
    ours, counterpart = make(name, 5, 7, seed=3)
    assert_same_state(ours, counterpart)
    after = []
    for cls in MODULES[name]:
        torch.manual_seed(3)
        cls(5, 7).reset_parameters()
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages append to torch.nn.LSTM.__doc__, and document whatever has a docstring."""
    ours, _ = MODULES[name]
    assert ours.__doc__ and ours.forward.__doc__
    monkeypatch.setattr(ours, "__doc__", ours.__doc__ + "\nmore")
    assert ours.__doc__.endswith("\nmore")


# state


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_load_both_ways(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True} if name in SEQUENCES else {}
    ours, counterpart = make(name, 5, 7, **options)
    (other, _), (_, third) = make(name, 5, 7, seed=4, **options), make(name, 5, 7, seed=5, **options)
    other.load_state_dict(counterpart.state_dict())
    assert_same_state(other, ours)
    third.load_state_dict(ours.state_dict())
    assert_same_state(ours, third)
    other.load_state_dict({key: t.clone() for key, t in counterpart.state_dict().items()}, assign=True)
    assert_alike(other, counterpart, sample(name))
    for wrong in ({}, {"extra": torch.zeros(1)}, {key: torch.zeros(2) for key in counterpart.state_dict()}):
        messages = []
        for module in (ours, counterpart):
            with pytest.raises(RuntimeError) as caught:
                module.load_state_dict(wrong)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str, duplicate: Callable[[Any], Any]) -> None:
    ours, counterpart = make(name, 5, 7, extras={"backend": "reference"})
    ours.eval()
    again = duplicate(ours)
    assert type(again) is type(ours) and again.backend == "reference" and not again.training
    assert repr(again) == repr(ours)
    assert vars(again).keys() == vars(ours).keys()
    assert_alike(again, counterpart, sample(name))
    if duplicate is not copy.copy:
        with torch.no_grad():
            next(again.parameters()).zero_()
        assert_same_state(ours, counterpart)
    assert_alike(again.double(), copy.deepcopy(again), sample(name, dtype=torch.float64))


@pytest.mark.parametrize("name", MODULES)
def test_a_state_that_torch_saved(name: str) -> None:
    """A whole torch.nn module pickled before torch.nn.LSTM was rebound to ours comes back as ours."""
    _, counterpart = make(name, 5, 7)
    ours = MODULES[name][0].__new__(MODULES[name][0])
    ours.__setstate__(
        pickle.loads(pickle.dumps(counterpart.__getstate__() if name in SEQUENCES else vars(counterpart)))
    )
    assert ours.backend is None
    assert repr(ours) == repr(counterpart)
    assert_alike(ours, counterpart, sample(name))


@pytest.mark.parametrize("name", SEQUENCES)
def test_checkpoints_of_old_torch(name: str) -> None:
    """Before 1.8 there was no proj_size, before 1.4 no names of the flat weights, and all_weights held them."""
    outcomes = []
    for module in make(name, 5, 7, 2, bidirectional=True):
        state = module.__getstate__()
        state["_all_weights"] = module.all_weights
        for key in ("proj_size", "_flat_weights_names", "_flat_weights", "backend", "save"):
            state.pop(key, None)
        old = type(module).__new__(type(module))
        old.__setstate__(state)
        assert old.proj_size == 0
        assert old._flat_weights_names == module._flat_weights_names
        outcomes.append(old)
    assert_alike(*outcomes, sample(name))


@pytest.mark.parametrize("name", MODULES)
def test_conversions(name: str) -> None:
    ours, counterpart = make(name, 5, 7)
    x = sample(name)
    for convert in (
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to("cpu", torch.float64),
    ):
        ours, counterpart = convert(ours), convert(counterpart)
        assert_same_state(ours, counterpart)
        assert_alike(ours, counterpart, x.to(next(counterpart.parameters()).dtype))
    ours.to("meta"), counterpart.to("meta")
    got, expected = flatten(ours(x.double().to("meta"))), flatten(counterpart(x.double().to("meta")))
    assert [(t.shape, t.dtype, t.device) for t in got] == [(t.shape, t.dtype, t.device) for t in expected]
    ours.to_empty(device="cpu").reset_parameters()
    ours(x.double())


@pytest.mark.parametrize("name", MODULES)
def test_made_on_meta_and_materialised(name: str) -> None:
    with torch.device("meta"):
        ours = MODULES[name][0](5, 7)
    _, counterpart = make(name, 5, 7)
    ours.to_empty(device="cpu").load_state_dict(counterpart.state_dict())
    assert_alike(ours, counterpart, sample(name))


# weights that are not what they were


@pytest.mark.parametrize("name", SEQUENCES)
def test_tied_weights(name: str) -> None:
    pair = make(name, 7, 7, 2, bidirectional=True, dtype=torch.float64)
    for module in pair:
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.weight_hh_l1 = nn.Parameter(module.weight_hh_l0.detach() * 2)
        module.bias_ih_l1 = module.bias_hh_l1
    assert len(list(pair[0].parameters())) == len(list(pair[1].parameters())) == 14
    assert_alike(*pair, torch.randn(4, 3, 7, dtype=torch.float64))


def with_old_weight_norm(module: nn.Module, weight: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, weight, dim=None)


def with_pruning(module: nn.Module, weight: str) -> None:
    prune.l1_unstructured(module, weight, amount=0.5)


def with_squares(module: nn.Module, weight: str) -> None:
    class Square(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return t * t

    parametrize.register_parametrization(module, weight, Square())


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": with_old_weight_norm,
    "prune": with_pruning,
    "parametrize": with_squares,
    "parametrized weight_norm": lambda module, weight: parametrizations.weight_norm(module, weight, dim=None),
}


@pytest.mark.parametrize("change", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
@pytest.mark.parametrize("name", MODULES)
def test_reparametrized_weights(name: str, change: Callable[[nn.Module, str], Any]) -> None:
    """Any weight, one after the other; with a gradient and without one; a step of an optimizer in between is seen."""
    ours, counterpart = make(name, 5, 7, dtype=torch.float64)
    weights = [key for key, _ in counterpart.named_parameters()]
    x = sample(name, dtype=torch.float64)
    step = x if name in CELLS else x[:1]
    for weight in weights:
        for module in (ours, counterpart):
            change(module, weight)
        assert list(ours.state_dict()) == list(counterpart.state_dict())
        assert_alike(ours, counterpart, x)
        for module in (ours, counterpart):
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        with torch.no_grad():
            for a, b in zip(flatten((ours(step), ours(x))), flatten((counterpart(step), counterpart(x))), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_reparametrizations_are_removed_again(name: str) -> None:
    ours, counterpart = make(name, 5, 7, dtype=torch.float64)
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    for module in (ours, counterpart):
        with_squares(module, weight)
        assert type(module).__name__ == f"Parametrized{name}"
        parametrize.remove_parametrizations(module, weight)
        with_pruning(module, weight)
        prune.remove(module, weight)
        with_old_weight_norm(module, weight)
        module(sample(name, dtype=torch.float64))
        nn.utils.remove_weight_norm(module, weight)
    assert type(ours) is MODULES[name][0]
    assert sorted(ours.state_dict()) == sorted(counterpart.state_dict())
    counterpart.load_state_dict(ours.state_dict())
    assert_alike(ours, counterpart, sample(name, dtype=torch.float64))


@pytest.mark.parametrize("name", MODULES)
def test_a_parametrized_weight_is_computed_once_a_call(name: str) -> None:
    ours, _ = make(name, 5, 7)
    calls = []

    class Count(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            calls.append(t)
            return t.clone()

    parametrize.register_parametrization(ours, "weight_hh" if name in CELLS else "weight_hh_l0", Count())
    calls.clear()
    ours(sample(name))
    assert len(calls) == 1


@pytest.mark.parametrize("name", SEQUENCES)
def test_dropped_weights(name: str) -> None:
    """A hook that deletes the parameter and sets a plain tensor before each call, as weight drop does."""
    pair = make(name, 5, 7, dtype=torch.float64)
    for module in pair:
        raw = nn.Parameter(module.weight_hh_l0.detach())
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)

        def drop(module: Any, _: Any) -> None:
            torch.manual_seed(0)
            module.weight_hh_l0 = nn.functional.dropout(module.weight_hh_l0_raw, 0.5)

        module.register_forward_pre_hook(drop)
    assert_alike(*pair, sample(name, dtype=torch.float64))


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name: str) -> None:
    ours, counterpart = make(name, 5, 7, dtype=torch.float64)
    x, results = sample(name, dtype=torch.float64), []
    before = copy.deepcopy(counterpart.state_dict())
    for module in (ours, counterpart):
        params = {key: (p.detach() * 2).requires_grad_() for key, p in module.named_parameters()}
        outputs = flatten(torch.func.functional_call(module, params, (x,)))
        results.append([*outputs, *torch.autograd.grad(sum(t.pow(2).sum() for t in outputs), list(params.values()))])
        with torch.no_grad():
            results[-1] += flatten(torch.func.functional_call(module, params, (x if name in CELLS else x[:1],)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    counterpart.load_state_dict(before)
    assert_alike(ours, counterpart, x)  # nothing of the call is left behind


@pytest.mark.parametrize("name", SEQUENCES)
def test_functional_call_in_another_dtype(name: str) -> None:
    ours, counterpart = make(name, 5, 7)
    params = {key: p.detach().double() for key, p in ours.named_parameters()}
    x = sample(name, dtype=torch.float64)
    for a, b in zip(*(flatten(torch.func.functional_call(m, params, (x,))) for m in (ours, counterpart)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SEQUENCES)
def test_replicas(name: str) -> None:
    """What torch.nn.parallel.replicate does: no parameters, but plain tensors in their places."""
    results = []
    for module in make(name, 5, 7, dtype=torch.float64):
        replica = module._replicate_for_data_parallel()
        copies = {key: p * 1 for key, p in module.named_parameters()}
        for key, t in copies.items():
            setattr(replica, key, t)
        x = torch.ones(4, 2, 5, dtype=torch.float64)
        y = flatten(replica(x))
        sum(t.sum() for t in y).backward()
        results.append([*y, *(p.grad for p in module.parameters())])
        with torch.no_grad():
            results[-1] += flatten(replica(x[:1]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SEQUENCES)
def test_swapping_parameters_on_conversion(name: str) -> None:
    ours, counterpart = make(name, 5, 7)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module in (ours, counterpart):
            # Swapping needs tensors with no weak references; the modules drop theirs for it.
            module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_alike(ours, counterpart, sample(name, dtype=torch.float64))


@pytest.mark.parametrize("name", SEQUENCES)
def test_expanded_weights(name: str) -> None:
    """Per-sample gradients by torch's own tensor subclass, which only torch's operators know."""
    results = []
    for module in make(name, 5, 7, batch_first=True, dtype=torch.float64):
        caller = call_for_per_sample_grads(module, batch_size=3, batch_first=True)
        y, _ = caller(torch.ones(3, 4, 5, dtype=torch.float64))
        y.pow(2).sum().backward()
        results.append([p.grad_sample for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class Labelled(Tensor):
    """A tensor subclass of a user."""


@pytest.mark.parametrize("name", MODULES)
def test_tensor_subclasses_are_torchs(name: str) -> None:
    ours, counterpart = make(name, 5, 7)
    x = sample(name).as_subclass(Labelled)
    for a, b in zip(flatten(ours(x)), flatten(counterpart(x)), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b)
    ours.backend = "reference"
    with pytest.raises(NotImplementedError, match="Labelled"):
        ours(x)
    if name in SEQUENCES:
        ours.backend = None
        with pytest.raises(NotImplementedError, match="lengths, reset"):
            ours(x, lengths=torch.tensor([1, 2, 3]))


# classes made from them


@pytest.mark.parametrize("name", MODULES)
def test_mixins_and_keyword_arguments_pass_through(name: str) -> None:
    ours, counterpart = MODULES[name]

    class Mixin(nn.Module):
        def __init__(self, *args: Any, label: str, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.label = label

    made = [type(name, (Mixin, cls), {})(5, hidden_size=7, label="a", bias=False) for cls in (ours, counterpart)]
    made[1].load_state_dict(made[0].state_dict())
    assert made[0].label == "a"
    assert repr(made[0]) == repr(made[1])
    assert_alike(*made, sample(name))


@pytest.mark.parametrize("name", MODULES)
def test_a_subclass_may_use_names_that_torch_leaves_free(name: str) -> None:
    """Only names that begin with _fused are ours, but for a few, which may be overridden too."""
    ours, counterpart = MODULES[name]
    taken = set(dir(ours)) | set(vars(ours(5, 7)))
    free = (
        taken
        - set(dir(counterpart))
        - set(vars(counterpart(5, 7)))
        - {"backend", "save", "stream", "freeze", "unfreeze", "__prepare_scriptable__"}
    )
    assert all(key.startswith("_fused") for key in free)

    class Saving(ours):  # type: ignore[misc, valid-type]
        def save(self, path: str) -> str:
            return path

    module = Saving(5, 7)
    assert module.save("a") == "a"
    module(sample(name))


@pytest.mark.parametrize("name", SEQUENCES)
def test_checks_that_a_subclass_overrides_are_asked(name: str) -> None:
    asked = []
    for cls in SEQUENCES[name]:

        class Strict(cls):  # type: ignore[misc, valid-type]
            def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
                asked.append((type(self).__mro__[1], input.shape, [h.shape for h in flatten(hidden)], batch_sizes))
                super().check_forward_args(input, hidden, batch_sizes)

        module = Strict(5, 7, batch_first=True)
        hx = states(module, None)
        with torch.no_grad():
            module(torch.randn(3, 1, 5))
            module(torch.randn(4, 5))
            module(torch.randn(4, 5), hx)
    half = len(asked) // 2
    assert half == 3
    assert [a[1:] for a in asked[:half]] == [a[1:] for a in asked[half:]]


@pytest.mark.parametrize("name", SEQUENCES)
def test_permute_hidden_of_a_subclass_is_used_on_packed_input(name: str) -> None:
    counts = []
    for cls in SEQUENCES[name]:
        permuted: list[Any] = []

        class Watching(cls):  # type: ignore[misc, valid-type]
            def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
                permuted.append(permutation)  # noqa: B023
                return super().permute_hidden(hx, permutation)

        module = Watching(5, 7)
        packed = pack_padded_sequence(torch.randn(4, 3, 5), [2, 4, 3], enforce_sorted=False)
        module(packed, states(module, 3))
        counts.append([p.tolist() for p in permuted])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", MODULES)
def test_torch_nn_may_be_rebound_to_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = MODULES[name]
    monkeypatch.setattr(nn, name, ours)
    monkeypatch.setattr(nn.modules.rnn, name, ours)
    module = getattr(nn, name)(5, 7)
    assert type(module) is ours
    with pytest.raises((RuntimeError, ValueError)):
        module(torch.randn(2, 6))
    again = pickle.loads(pickle.dumps(module))
    assert_same_state(again, module)


@pytest.mark.parametrize("name", MODULES)
def test_arguments_are_left_as_they_were(name: str) -> None:
    ours, _ = make(name, 5, 7)
    x = sample(name)
    size = (3, 7) if name in CELLS else (1, 3, 7)
    hx: Any = (torch.randn(size), torch.randn(size)) if "LSTM" in name else torch.randn(size)
    before = [t.clone() for t in flatten((x, hx))]
    with torch.no_grad():
        ours(x if name in CELLS else x[:1], hx)
        ours(x, hx)
    outputs_and_gradients(ours, x, hx)
    assert all(torch.equal(a, b) for a, b in zip(flatten((x, hx)), before, strict=True))
    assert all(t.requires_grad for t in flatten(leaves(hx)))


def test_the_package_exports_them() -> None:
    assert set(MODULES) <= set(fused_rnn.__all__)
