"""What is said where a compiled part of the package is not there: why, what to do; a warning once for each reason."""

from __future__ import annotations

import re
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BUILD = "pip install --no-build-isolation ."

_warned: set[str] = set()  # the reasons of which there was a warning


def reason(name: str, error: ImportError, package: Path = PACKAGE) -> str:
    """Why the module fused_rnn.`name` did not load, and the remedy, in a sentence."""
    said = f"the compiled extension fused_rnn.{name} did not load"
    is_source = (package.parent / "setup.py").exists()
    remedy = BUILD if is_source else "install fused_rnn again"
    if any((package / f"{name}{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return f"{said} ({error}): it was built beside another torch, or not to its end: {remedy}"
    others = sorted(path.name for path in package.glob(f"{name}.*.so"))
    if others:
        return f"{said}: {package} has {', '.join(others)}, none for this Python: {remedy}"
    if not is_source:
        return f"{said}: {package} has none ({error}): {remedy}"
    hidden = _installed_elsewhere(package)
    if hidden is not None:
        return (
            f"{said}: this is the source folder {package.parent}, where nothing is built, and it hides the fused_rnn"
            f" that is installed in {hidden}: start Python in another folder, or build here as well, {BUILD}"
        )
    return f"{said}: this is the source folder {package.parent}, where nothing is built: {BUILD}"


def _installed_elsewhere(package: Path) -> Path | None:
    """The folder of another fused_rnn that would be imported if this one were not found first."""
    for entry in sys.path:
        other = Path(entry or ".", package.name)
        if (other / "__init__.py").exists() and not other.samefile(package):
            return other.resolve().parent
    return None


def warn_once(reason: str) -> None:
    """Say that torch's own kernels run in the place of ours: nothing falls back in silence."""
    kind = re.sub(r"\d+", "", reason)  # once for all sizes
    if kind not in _warned:
        _warned.add(kind)
        said = f"fused_rnn runs without its own kernels, at torch's speed or less: {reason}"
        warnings.warn(said, RuntimeWarning, stacklevel=2)


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo: Dynamo calls it for real.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
