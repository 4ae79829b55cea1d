"""Train the character model of text.py in several processes: DistributedDataParallel, or FSDP2 with --fsdp.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py [--fsdp]

Nothing in it is particular to fused_rnn: its layers are modules whose parameters torch may copy, shard and gather. The
loss is that of one process on the whole batch. In the end the model is saved as a distributed checkpoint, which then
loads into a model in one process.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from text import RATE, Characters, CharLM, Windows, corpus
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fused_rnn


def parallel(model: CharLM, fsdp: bool) -> torch.nn.Module:
    """The model, for every process to train on its share of the batch."""
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh)  # gathered when the layers run, and let go after them
    return fully_shard(model, mesh=mesh)


def train(model: torch.nn.Module, codes: torch.Tensor, steps: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rank, world = dist.get_rank(), dist.get_world_size()
    state = None
    windows = Windows(codes)
    for number in range(steps):
        text, target = windows[number]
        logits, state = model(text[:, rank::world], state)
        loss = cross_entropy(logits.flatten(0, 1), target[:, rank::world].flatten())
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        state = tuple(s.detach() for s in state)
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {number + 1}  loss {mean / world:.4f}", flush=True)


def load_in_one_process(folder: str, symbols: int) -> CharLM:
    model = CharLM(fused_rnn.LSTM, symbols)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state)
    return model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = arguments.add_mutually_exclusive_group()
    kind.add_argument("--ddp", action="store_true", help="a whole model in every process (the default)")
    kind.add_argument("--fsdp", action="store_true", help="shard the parameters (FSDP2)")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--out", default="demo-out/checkpoint", help="the folder of the checkpoint")
    options = arguments.parse_args()
    dist.init_process_group("gloo")
    characters = Characters()
    torch.manual_seed(0)
    model = CharLM(fused_rnn.LSTM, len(characters))
    train(parallel(model, options.fsdp), characters.encode(corpus()[0]), options.steps)

    dcp.save(get_model_state_dict(model), checkpoint_id=options.out)
    if dist.get_rank() == 0:
        loaded = load_in_one_process(options.out, len(characters))
        print(f"loaded {sum(p.numel() for p in loaded.parameters())} parameters from {options.out}")
    dist.barrier()
    dist.destroy_process_group()
    if options.fsdp:
        leave()


def leave() -> None:
    """End the process without Python's own end.

    torch's caches of DTensors keep FSDP2's mesh, and with it the destroyed process group. Its gloo threads run on while
    Python takes down what they use, and now and then the process aborts there, all work done, whosever layers it has.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
