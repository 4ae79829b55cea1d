"""Two processes over gloo train as one does, and checkpoints go from any number of processes to any other."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_same_formula
from torch import Tensor, nn

import fused_rnn

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch was built without torch.distributed or gloo", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from user_cells import leaky

PROCESSES, LIMIT = 2, 120  # seconds, for all scenarios together
T, B, D, H = 7, 6, 3, 5
CELLS = ("LSTM", "GRU", "RNN", "FlexRNN")


class Model(nn.Module):
    """Two bidirectional layers and a head; lengths and reset as an application would hand them on."""

    def __init__(self, cell: str, library: Any = fused_rnn) -> None:
        super().__init__()
        torch.manual_seed(1)
        own = (leaky,) if cell == "FlexRNN" else ()
        self.rnn = getattr(library, cell)(*own, D, H, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * H, 4)
        self.double()

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        y, _ = self.rnn(x, **masks)
        return self.head(y).relu()  # FSDP2 warns of a module whose output is a view, as a Linear's is


def batch(rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
    """x [T, B, D], and lengths and reset, of these rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, B, D, dtype=torch.float64, generator=generator)
    reset = torch.rand(T, B, generator=generator) < 0.2
    return x[:, rows], {"lengths": torch.tensor([7, 3, 5, 1, 7, 6])[rows], "reset": reset[:, rows]}


def backward(model: nn.Module, rows: slice = slice(None), masked: bool = True) -> None:
    x, masks = batch(rows)
    model(x, **(masks if masked else {})).square().mean().backward()


def one_process(model: nn.Module, masked: bool = True) -> nn.Module:
    """A copy with the gradients of the whole batch."""
    model = copy.deepcopy(model)
    backward(model, masked=masked)
    return model


def own_rows() -> slice:
    share = B // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model: nn.Module, single: nn.Module) -> None:
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert_same_formula(full(p.grad), q.grad)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def ddp(_: Path) -> None:
    for cell in CELLS:
        model = Model(cell)
        single = one_process(model)
        parallel = DistributedDataParallel(model)
        backward(parallel, own_rows())
        assert_same_gradients(model, single)


def ddp_converted(_: Path) -> None:
    """convert below a DistributedDataParallel, whose hooks sit at the parameters."""
    model = Model("LSTM", nn)
    single = one_process(model, masked=False)
    parallel = fused_rnn.convert(DistributedDataParallel(model))
    assert type(model.rnn) is fused_rnn.LSTM
    backward(parallel, own_rows(), masked=False)
    assert_same_gradients(model, single)


def fsdp(_: Path) -> None:
    """Two steps of an optimizer, so that what the first leaves behind would show in the second."""
    for cell in CELLS:
        single = Model(cell)
        model = shard(copy.deepcopy(single))
        assert isinstance(model.rnn.weight_hh_l0, DTensor)
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (single, model)]
        for _step in range(2):
            backward(single)
            backward(model, own_rows())
            assert_same_gradients(model, single)
            norms = [clip_grad_norm_(m.parameters(), 0.01) for m in (single, model)]
            assert_same_formula(full(norms[1]), norms[0])
            assert_same_gradients(model, single)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            model.rnn.flatten_parameters()
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            assert_same_formula(p.full_tensor(), q)


def fsdp_converted(_: Path) -> None:
    """convert of what is sharded already: FSDP2 gave it a class of its own, derived from torch.nn's."""
    single = one_process(Model("GRU", nn), masked=False)
    model = fused_rnn.convert(shard(Model("GRU", nn)))
    assert isinstance(model.rnn, fused_rnn.GRU)
    backward(model, own_rows(), masked=False)
    assert_same_gradients(model, single)


def fsdp_bfloat16(_: Path) -> None:
    """FSDP2's mixed precision: products in bfloat16, the sum over processes in float32."""
    half = Model("LSTM").bfloat16()
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in half.parameters()]
    share = B // PROCESSES
    for start in range(0, B, share):
        x, masks = batch(slice(start, start + share))
        gradients = torch.autograd.grad(half(x.bfloat16(), **masks).square().mean(), list(half.parameters()))
        expected = [total + g.float() / PROCESSES for total, g in zip(expected, gradients, strict=True)]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(Model("LSTM").float(), mp_policy=policy)
    x, masks = batch(own_rows())
    model(x.float(), **masks).square().mean().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        torch.testing.assert_close(full(p.grad), gradient)


def checkpoint(folder: Path) -> None:
    """Two processes to one, and one to two. Afterwards the test loads the first into a model of torch.nn."""
    model = shard(Model("LSTM"))
    backward(model, own_rows())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "from_two")
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
        dcp.save(whole, checkpoint_id=folder / "from_one", no_dist=True)
    dist.barrier()
    other = shard(Model("LSTM"))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "from_one")
    set_model_state_dict(other, state)
    for name, value in other.state_dict().items():
        assert torch.equal(value.full_tensor(), whole[name])


SCENARIOS: list[Callable[[Path], None]] = [ddp, ddp_converted, fsdp, fsdp_converted, fsdp_bfloat16, checkpoint]


def worker(rank: int, folder: Path) -> None:
    """Runs every scenario, and leaves behind what went wrong in each: an empty file if nothing did."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, as in conftest.py
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=30),
    )
    for scenario in SCENARIOS:
        try:
            scenario(folder)
            wrong = ""
        except Exception:
            wrong = traceback.format_exc()
        (folder / f"{scenario.__name__}.{rank}").write_text(wrong)
    dist.barrier()  # nobody leaves while the other still waits for him
    dist.destroy_process_group()
    os._exit(0)  # as examples/distributed.py leaves, and why


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left behind; they start once, for importing torch takes them most of their time."""
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.start_processes(worker, (folder,), PROCESSES, join=False, start_method="spawn")
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the processes took more than {LIMIT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_two_processes_are_as_one(folder: Path, scenario: Callable[[Path], None]) -> None:
    for rank in range(PROCESSES):
        wrong = (folder / f"{scenario.__name__}.{rank}").read_text()
        assert not wrong, f"process {rank}: {wrong}"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled.*single process:UserWarning")  # as no_dist asks
@pytest.mark.parametrize("library", [fused_rnn, nn], ids=["fused_rnn", "torch.nn"])
def test_a_sharded_checkpoint_loads_into_one_process(folder: Path, library: Any) -> None:
    model = Model("LSTM", library)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / "from_two", no_dist=True)
    model.load_state_dict(state)
    for name, value in torch.load(folder / "whole.pt").items():
        assert torch.equal(model.state_dict()[name], value)


# A process of its own that counts gloo's threads after destroy_process_group, with torch's own layer.
GLOO_THREADS = """
import gc, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
if sys.argv[1] == "fsdp":
    fully_shard(torch.nn.LSTM(4, 4), mesh=mesh)(torch.randn(3, 2, 4))[0].sum().backward()
del mesh
gc.collect()
dist.barrier()
dist.destroy_process_group()
gc.collect()
print(sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir()), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_gloo_threads_outlive_fsdp_of_torchs_own_layers() -> None:
    """Why examples/distributed.py ends by os._exit: what is left running there is torch's."""

    def left(kind: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", GLOO_THREADS, kind]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT).stdout)

    assert left("plain") == 0
    if left("fsdp") == 0:
        pytest.skip(f"torch {torch.__version__} ends them: leave() in examples/distributed.py is needed no more")
