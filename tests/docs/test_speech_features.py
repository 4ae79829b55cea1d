"""The features of examples/speech.py are those of Sphinx, whose source archive holds recordings with their features."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def speech(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_module("speech")


@pytest.fixture
def archive(speech: ModuleType) -> Iterator[tarfile.TarFile]:
    try:
        path = speech.source_archive("pocketsphinx", "5.1.1")
    except SystemExit as error:
        pytest.skip(f"the source archive of pocketsphinx cannot be had: {error}")
    with tarfile.open(path) as found:
        yield found


def content(archive: tarfile.TarFile, name: str) -> bytes:
    return archive.extractfile(f"pocketsphinx-5.1.1/test/{name}").read()


def samples(archive: tarfile.TarFile, name: str) -> Tensor:
    return torch.frombuffer(bytearray(content(archive, name)), dtype=torch.int16).float()


def test_log_energies(speech: ModuleType, archive: tarfile.TarFile) -> None:
    """Sphinx took noise away: all bands of the first frame by one factor, hardly any of what is loud."""
    front = speech.FrontEnd(
        rate=11025, frames=105, window=0.024, filters=36, low=130, high=5400, round_filters=True, remove_dc=False
    )
    ours = front.log_mel(samples(archive, "regression/chan3.raw"))
    theirs = torch.frombuffer(bytearray(content(archive, "regression/chan3.logspec")[4:]), dtype=torch.float32)
    apart = ours[:32] - theirs.view(-1, 36)[:32]
    torch.testing.assert_close(apart[0], apart[0].mean().expand(36), atol=1e-4, rtol=0)
    torch.testing.assert_close(apart[27:32], torch.zeros(5, 36), atol=0.03, rtol=0)


def test_cepstra(speech: ModuleType, archive: tarfile.TarFile) -> None:
    """Those of a file of Sphinx, which took noise away from them and liftered them."""
    front = speech.FrontEnd(window=0.025625, filters=25, low=130, high=6800, round_filters=True, remove_dc=False)
    ours = front.log_mel(samples(archive, "data/goforward.raw")) @ speech.cosines(25).t()
    ours = ours * (1 + 11 * torch.sin(torch.arange(13) * math.pi / 22))
    theirs = speech.read_mfc(content(archive, "data/goforward.mfc"))
    for a, b in zip(ours[: len(theirs)].t(), theirs.t(), strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
        assert (a - b).abs().median() < 0.2 * b.std()


def test_files_of_either_byte_order(speech: ModuleType) -> None:
    cepstra = torch.randn(7, 13)
    little = (91).to_bytes(4, "little") + cepstra.numpy().astype("<f4").tobytes()
    big = (91).to_bytes(4, "big") + cepstra.numpy().astype(">f4").tobytes()
    assert torch.equal(speech.read_mfc(little), cepstra)
    assert torch.equal(speech.read_mfc(big), cepstra)
    with pytest.raises(ValueError, match="360 bytes"):
        speech.read_mfc(little[:-8])


def test_word_errors(speech: ModuleType) -> None:
    assert speech.error_rate([("123", "123"), ("4", "")]) == 25
    assert speech.edits("12345", "1345") == speech.edits("1345", "12345") == speech.edits("12345", "12945") == 1
    assert speech.edits("", "oo") == 2
    assert speech.digits(torch.eye(12)[[0, 3, 3, 0, 3, 4, 4, 0]]) == "112"
