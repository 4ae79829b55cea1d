"""Files that several processes write, and where those are kept that outlive them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """FUSED_RNN_CACHE_DIR, else fused_rnn in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FUSED_RNN_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(own) if own else home / "fused_rnn"


def replace(path: Path, content: bytes) -> None:
    """Writes a whole file at once, so that nobody ever reads half of one. A failure leaves nothing behind."""
    descriptor, part = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
