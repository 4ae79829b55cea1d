"""What a GPU machine is, in lines: read them before any number of it. Run by scripts/gpu.py, first of all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed


def called(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


def main() -> None:
    print(called("uname", "-m"))
    print(called("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm", "--format=csv"))
    print(called("lscpu").partition("Model name:")[2].partition("\n")[0].strip())
    import torch

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    import triton
    from triton.runtime.cache import triton_key

    # Where it is another than that of the machine that filled the cache, every kernel is compiled here.
    print(f"triton {triton.__version__} {hashlib.sha256(triton_key().encode()).hexdigest()[:16]}")
    from fused_rnn.cuda import module

    device = module.loaded().device(0)
    print(f"_cuda finds sm_{device.arch}, {device.multiprocessors} multiprocessors, {device.shared} bytes, ", end="")
    print(f"clusters of 1 to 16: {device.clusters}")


if __name__ == "__main__":
    main()
