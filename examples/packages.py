"""Models of other packages, trained as they are by torch.nn and by fused_rnn: the same curve, in less time.

    pip install 'fused_rnn[integrations]'
    python examples/packages.py                       # all of them
    python examples/packages.py gluonts --steps 20 --json results.json

Neither package nor model is changed. sb3-contrib and pytorch-forecasting hand out a model, which `fused_rnn.convert`
turns in place; gluonts builds its own where it trains, under `fused_rnn.patch`. The recurrent part is timed by itself:
the calls that a training makes of its layers are recorded, and made again by both, taking turns. Seconds are those of
the processor (with OMP_NUM_THREADS=1 the wall's, had the machine nothing else to do).
"""

import argparse
import copy
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.commands import machine


def sb3_contrib(steps: int, fused: bool) -> tuple[list[float], float]:
    """RecurrentPPO and its MlpLstmPolicy on CartPole without its velocities.

    steps: rollouts of 128 steps in 8 environments, and what is learned from each.
    """
    import gymnasium
    import numpy as np
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Losses(BaseCallback):
        def _on_rollout_start(self) -> None:
            if "train/loss" in self.model.logger.name_to_value:
                curve.append(float(self.model.logger.name_to_value["train/loss"]))

        def _on_step(self) -> bool:
            return True

    def positions(env: gymnasium.Env) -> gymnasium.Env:
        space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        return gymnasium.wrappers.TransformObservation(env, lambda x: x[::2], space)

    curve: list[float] = []
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=positions)
    model = RecurrentPPO("MlpLstmPolicy", envs, batch_size=512, n_epochs=4, seed=0, device="cpu")
    if fused:
        fused_rnn.convert(model.policy)
    start = time.process_time()
    model.learn(steps * model.n_steps * model.n_envs, callback=Losses())
    seconds = time.process_time() - start
    curve.append(float(model.logger.name_to_value["train/loss"]))
    return curve, seconds


def losses(curve: list[float]) -> Any:
    """A Lightning callback that appends the loss of every step to curve."""
    import lightning.pytorch as lightning

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            curve.append(float(outputs["loss"]))

    return Losses()


TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def gluonts(steps: int, fused: bool) -> tuple[list[float], float]:
    """DeepAREstimator on noisy daily seasons by the hour: three days in, one day out."""
    import numpy as np
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    generator = np.random.default_rng(0)
    hours = np.arange(24 * 60)
    series = [np.sin(2 * np.pi * (hours + shift) / 24) + 0.2 * generator.normal(size=len(hours)) for shift in range(20)]
    data = ListDataset([{"start": "2026-01-01", "target": target + 3} for target in series], freq="h")
    curve: list[float] = []
    torch.manual_seed(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:  # it keeps checkpoints, and loads the best
        trainer = TRAINER | {"enable_checkpointing": True, "default_root_dir": folder}
        estimator = DeepAREstimator(
            freq="h",
            prediction_length=24,
            context_length=72,
            num_batches_per_epoch=steps,
            trainer_kwargs=trainer | {"max_epochs": 1, "callbacks": [losses(curve)]},
        )
        start = time.process_time()
        with fused_rnn.patch() if fused else nullcontext():
            estimator.train(data)
        return curve, time.process_time() - start


def pytorch_forecasting(steps: int, fused: bool) -> tuple[list[float], float]:
    """RecurrentNetwork with a GRU: 72 steps of encoder, 24 of decoder."""
    import lightning.pytorch as lightning
    import numpy as np
    import pandas
    from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet

    generator = np.random.default_rng(0)
    frames = []
    for shift in range(10):
        hours = np.arange(400)
        target = np.sin(2 * np.pi * (hours + shift) / 24) + 0.2 * generator.normal(size=len(hours))
        frames.append(pandas.DataFrame({"hour": hours, "target": target.astype("float32"), "series": str(shift)}))
    data = TimeSeriesDataSet(
        pandas.concat(frames, ignore_index=True),
        time_idx="hour",
        target="target",
        group_ids=["series"],
        max_encoder_length=72,
        max_prediction_length=24,
        time_varying_unknown_reals=["target"],
    )
    torch.manual_seed(0)
    np.random.seed(0)
    model = RecurrentNetwork.from_dataset(
        data, cell_type="GRU", hidden_size=64, rnn_layers=2, learning_rate=1e-3, optimizer="adam", log_interval=-1
    )
    if fused:
        fused_rnn.convert(model)
    curve: list[float] = []
    trainer = lightning.Trainer(**TRAINER, max_steps=steps, gradient_clip_val=0.1, callbacks=[losses(curve)])
    start = time.process_time()
    trainer.fit(model, data.to_dataloader(train=True, batch_size=64, num_workers=0))
    return curve, time.process_time() - start


Trainer = Callable[[int, bool], tuple[list[float], float]]
# The package as pip names it: how it is trained, for how many steps (updates of many steps each for RL).
PACKAGES: dict[str, tuple[Trainer, int]] = {
    "sb3-contrib": (sb3_contrib, 4),
    "gluonts": (gluonts, 50),
    "pytorch-forecasting": (pytorch_forecasting, 50),
}
# What each imports, as Python names it.
NEEDED = {
    "sb3-contrib": ("sb3_contrib", "gymnasium", "numpy"),
    "gluonts": ("gluonts", "lightning", "numpy"),
    "pytorch-forecasting": ("pytorch_forecasting", "lightning", "pandas", "numpy"),
}


def missing(packages: Iterable[str]) -> list[str]:
    """What is not installed of what these need, each once."""
    return [name for name in dict.fromkeys(n for p in packages for n in NEEDED[p]) if find_spec(name) is None]


class Calls:
    """The calls that a training makes of its recurrent layers: one of each kind, and how often it was made."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()
        self.first: dict[Any, tuple[nn.Module, Any, Any]] = {}  # the module, its arguments, its keyword arguments

    @contextmanager
    def recorded(self) -> Iterator[None]:
        handle = nn.modules.module.register_module_forward_hook(self._see, with_kwargs=True, always_call=False)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not isinstance(module, nn.RNNBase):
            return
        data = args[0].data if isinstance(args[0], PackedSequence) else args[0]
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        key = (id(module), tuple(data.shape), torch.is_grad_enabled(), data.requires_grad, state is None)
        self.counts[key] += 1
        if key not in self.first:
            self.first[key] = (copy.deepcopy(module), _detached(args), _detached(kwargs))

    def seconds(self, repeats: int = 9, together: int = 8) -> tuple[float, float]:
        """torch.nn's and our seconds for all calls, forward and, where there was a gradient, backward.

        Several calls go into one backward, whose start would else be much of what a single step takes.
        """
        totals = [0.0, 0.0]
        for key, (module, args, kwargs) in self.first.items():
            pair = [module, fused_rnn.convert(copy.deepcopy(module))]
            times: list[list[float]] = [[], []]
            for number in range(repeats):
                for i in (0, 1) if number % 2 else (1, 0):
                    start = time.process_time()
                    _call(pair[i], args, kwargs, together, grad=key[2], into_input=key[3])
                    times[i].append((time.process_time() - start) / together)
            for i in (0, 1):
                totals[i] += self.counts[key] * median(times[i][2:])
        return totals[0], totals[1]


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach().clone())
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return {key: _detached(v) for key, v in value.items()} if isinstance(value, dict) else value


def _call(module: nn.Module, args: Any, kwargs: Any, times: int, grad: bool, into_input: bool) -> None:
    data = args[0].data if isinstance(args[0], PackedSequence) else args[0]
    data.requires_grad_(into_input)
    with torch.set_grad_enabled(grad):
        ys = [module(*args, **kwargs)[0] for _ in range(times)]
    if grad:
        outputs = [y.data if isinstance(y, PackedSequence) else y for y in ys]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        module.zero_grad()
        data.grad = None


def compare(name: str, steps: int | None = None, repeats: int = 5) -> dict[str, Any]:
    """Train both, taking turns; prints and returns what came out."""
    train, usual = PACKAGES[name]
    steps = steps or usual
    calls = Calls()
    with calls.recorded():
        train(steps, False)  # also warms up
    times: tuple[list[float], list[float]] = ([], [])
    curves: list[list[float]] = [[], []]
    for number in range(repeats):
        for fused in (False, True) if number % 2 else (True, False):
            curves[fused], seconds = train(steps, fused)
            times[fused].append(seconds)
    theirs, ours = curves
    pairs = zip(ours, theirs, strict=True)
    difference = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
    whole, part = (median(times[0]), median(times[1])), calls.seconds()
    print(f"{name} {version(name)}: {train.__doc__.splitlines()[0]}", flush=True)
    print(f"  last loss    torch.nn {theirs[-1]:.6f}   fused_rnn {ours[-1]:.6f}   largest difference {difference:.1e}")
    for what, (a, b) in (("training", whole), ("recurrence", part)):
        print(f"  {what:<12} torch.nn {a:8.2f} s   fused_rnn {b:8.2f} s   {a / b:.2f}×")
    return {
        "package": name,
        "version": version(name),
        "steps": steps,
        "last_loss": {"torch": theirs[-1], "ours": ours[-1]},
        "largest_relative_difference": difference,
        "training_s": {"torch": whole[0], "ours": whole[1]},
        "recurrence_s": {"torch": part[0], "ours": part[1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="*", choices=[[], *PACKAGES], help="default: all")
    parser.add_argument("--steps", type=int, help="of training; default: some for each")
    parser.add_argument("--repeats", type=int, default=5, help="trainings of each kind (default: 5)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if absent := missing(options.package or PACKAGES):
        sys.exit(f"packages.py: {', '.join(absent)} not installed: pip install 'fused_rnn[integrations]'")
    logging.disable(logging.WARNING)  # the packages' own
    warnings.simplefilter("ignore")
    results = [compare(name, options.steps, options.repeats) for name in options.package or PACKAGES]
    if options.json:
        facts = machine.describe("cpu") | {"threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"run": facts, "packages": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
