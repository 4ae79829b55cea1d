"""The extension modules for another machine's Python and torch, built here: there, minutes are dear.

    python scripts/gpu_prebuild.py --python PYTHON --torch FOLDER [--out build/prebuilt]

PYTHON: an interpreter of that machine's version, with headers and setuptools 77; it needs no torch. FOLDER: of an
installed torch of that machine's version, for any Python, whose headers and libraries are used. TORCH_CUDA_ARCH_LIST
says for which GPUs, 9.0a if it is not set. There, before anything else: cp build/prebuilt/*.so fused_rnn/. What lies
in build/prebuilt/debug is fused_rnn/_cuda as FUSED_RNN_CUDA_DEBUG=1 makes it, whose kernels fail where others hang.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(python: str, torch: Path, out: Path, tree: Path = ROOT, debug: bool = True) -> list[Path]:
    """The modules, below `out`; debug: and the one whose waits are bounded."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for place, bounded in ((out, "0"), *[(out / "debug", "1")] * debug):
            environment = {
                "TORCH_CUDA_ARCH_LIST": "9.0a",
                **os.environ,
                "FUSED_RNN_TORCH": str(torch),
                "FUSED_RNN_CUDA": "1",
                "FUSED_RNN_CUDA_DEBUG": bounded,
            }
            fresh = Path(folder, place.name)
            command = [python, "setup.py", "build_ext", "-t", folder, "-b", str(fresh)]
            subprocess.run(command, cwd=tree, env=environment, check=True)
            place.mkdir(parents=True, exist_ok=True)
            for module in (fresh / "fused_rnn").glob("_cuda.*" if bounded == "1" else "_*"):
                made.append(place / module.name)
                shutil.copyfile(module, made[-1])
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_prebuild", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--torch", type=Path, required=True, help="the folder of the package")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "prebuilt")
    chosen = parser.parse_args()
    if not (chosen.torch / "include").is_dir():
        parser.error(f"--torch: got {chosen.torch}, expected a folder with torch's include and lib")
    for module in build(chosen.python, chosen.torch.resolve(), chosen.out.resolve()):
        print(f"{module.stat().st_size / 2**20:5.1f} MiB  {module}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
