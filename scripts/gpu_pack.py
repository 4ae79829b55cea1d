"""What travels to a GPU machine whose minutes are dear: everything that can be made without it.

    python scripts/gpu_pack.py --python PYTHON [--torch FOLDER] [--variant NAME=TREE ...] [--out build/pack]

PYTHON: an interpreter of that machine's version with its torch and its Triton, and setuptools 77: they need no GPU.
Makes, for sm_90a unless TORCH_CUDA_ARCH_LIST says otherwise, in --out:

    _C.*.so, _cuda.*.so             the extension modules; debug/_cuda.*.so, whose kernels fail where others hang
    variants/NAME/_cuda.*.so        the CUDA loops of another checkout, to be timed beside them
    primitives, exchange            the programs of the smoke and of the exchanges
    triton.tar.gz                   Triton's cache, filled with the kernels of the smoke and of the quick bench

There, `make gpu-first` unpacks it. Prints the sizes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_prebuild
from gpu import PACK, ROOT, TRITON_CACHE, compile_exchange, target_of
from gpu_smoke import compile_primitives


def programs(out: Path, target: str) -> None:
    compile_primitives(out / "primitives", target)
    subprocess.run(compile_exchange(out / "exchange", target), check=True)


def triton_cache(python: str, archive: Path) -> None:
    """Filled by that machine's own JIT, under a driver that launches nothing."""
    shutil.rmtree(TRITON_CACHE, ignore_errors=True)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(TRITON_CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    subprocess.run([python, ROOT / "scripts" / "gpu_triton_cache.py"], cwd=ROOT, env=environment, check=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(TRITON_CACHE, TRITON_CACHE.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_pack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--torch", type=Path, help="the folder of its torch; that of PYTHON if not named")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=TREE")
    parser.add_argument("--out", type=Path, default=PACK)
    parser.add_argument("--without-triton", action="store_true")
    chosen = parser.parse_args()
    out, aside = chosen.out.resolve(), ROOT / "build" / "pack-variants"
    find = "from importlib.util import find_spec; print(find_spec('torch').submodule_search_locations[0])"
    torch = chosen.torch or Path(subprocess.check_output([chosen.python, "-c", find], text=True).strip())
    out.mkdir(parents=True, exist_ok=True)
    gpu_prebuild.build(chosen.python, torch.resolve(), out)
    for name, _, tree in (variant.partition("=") for variant in chosen.variant):
        made = gpu_prebuild.build(chosen.python, torch.resolve(), aside / name, Path(tree).resolve(), debug=False)
        place = out / "variants" / name
        place.mkdir(parents=True, exist_ok=True)
        for module in made:
            if module.name.startswith("_cuda"):
                shutil.copyfile(module, place / module.name)
    programs(out, target_of(os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")))
    if not chosen.without_triton:
        triton_cache(chosen.python, out / "triton.tar.gz")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(out)}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:6.1f} MiB  together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
