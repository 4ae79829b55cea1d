#!/usr/bin/env bash
# Every documented way to install fused_rnn, as a newcomer would: from a bare clone, in fresh environments and other folders.
# Prints pass or fail for each and exits with the number of failures. `make first-hour` runs it; it takes about a quarter of an hour.
#   PYTHON=python3.12    the interpreter            TORCH='torch==2.13.0'    any pip requirement
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} torch=${TORCH:-torch==2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONDONTWRITEBYTECODE FUSED_RNN_CUDA VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1
failures=0

check() {  # check "what it shows" command…
  local name=$1 began=$SECONDS
  shift
  if "$@" >"$work/log" 2>&1; then
    printf 'pass  %4d s  %s\n' $((SECONDS - began)) "$name"
  else
    printf 'FAIL  %4d s  %s\n' $((SECONDS - began)) "$name"
    tail -n 15 "$work/log" | sed 's/^/      /'
    failures=$((failures + 1))
  fi
}

says() { grep -qF -- "$1" "$work/said" || { echo "expected: $1"; cat "$work/said"; return 1; }; }
refuses() {  # refuses "sentence" command…: it fails, says the sentence, and shows no traceback
  local sentence=$1
  shift
  if "$@" >"$work/said" 2>&1; then echo "it did not fail"; return 1; fi
  says "$sentence" && ! grep -q Traceback "$work/said"
}
clone() { rm -rf "$work/$1" && git clone -q "$root" "$work/$1"; }
environment() {  # environment NAME [requirement…]
  rm -rf "${work:?}/$1" && "$python" -m venv "$work/$1" || return
  [ $# -eq 1 ] || "$work/$1/bin/pip" install -q "${@:2}"
}
in_folder() { (cd "$1" && "${@:2}"); }  # in_folder FOLDER command…
works() {  # works PYTHON FOLDER: the kernels are there, and run
  in_folder "$2" "$1" -m fused_rnn info >"$work/said" 2>&1 && says "available: one fused C++ loop" &&
    in_folder "$2" "$1" -W error::RuntimeWarning -c 'import fused_rnn, torch; fused_rnn.LSTM(4, 4, backend="cpu")(torch.randn(2, 1, 4))'
}
everywhere() {  # everywhere PYTHON CLONE: from the clone, its parent folder and elsewhere
  works "$1" "$2" && works "$1" "$(dirname "$2")" && works "$1" /
}
seconds_of_import() {
  in_folder / "$1" -c '
import torch, time
torchs = time.process_time(); import fused_rnn; spent = time.process_time() - torchs
print(f"{1e3 * spent:.0f} ms"); assert spent < max(0.05, 0.05 * torchs)'  # of the processor; a busy one counts more, for torch as well
}

echo "$("$python" --version), $torch, $(nproc) cores"
cd "$work" || exit 1
mkdir -p "$work/a" "$work/b"
clone a/fused_rnn || exit 1
a=$work/a/fused_rnn

# --- no torch, no compiler
environment none
check "no torch, isolated: one sentence, nothing downloaded" \
  refuses "there is none here: pip install torch" in_folder "$a" "$work/none/bin/pip" install .
"$work/none/bin/pip" install -q 'setuptools>=77'
check "no torch, not isolated: the same sentence" \
  refuses "there is none here: pip install torch" in_folder "$a" "$work/none/bin/pip" install --no-build-isolation .

check "an environment with $torch" environment plain "$torch" 'setuptools>=77'
plain=$work/plain/bin
check "without the extension: info says why, and what to do" eval \
  'in_folder "$a" "$plain/python" -m fused_rnn info >"$work/said" 2>&1 && says "where nothing is built: pip install --no-build-isolation ."'
check "without the extension: one warning in a process" eval \
  'in_folder "$a" "$plain/python" -c "import fused_rnn, torch; [fused_rnn.GRU(4, 4)(torch.randn(2, 1, 4)) for _ in range(2)]" 2>"$work/said" &&
   says "RuntimeWarning" && test "$(grep -c RuntimeWarning "$work/said")" = 1'
check "no compiler: one sentence" refuses "fused_rnn needs a C++17 compiler" \
  in_folder "$a" env CC=/nowhere/g++ CXX=/nowhere/g++ "$plain/pip" install --no-build-isolation .

# --- the clone
check "pip install --no-build-isolation .  (everything is compiled)" \
  in_folder "$a" "$plain/pip" install --no-build-isolation .
check "  it works in the clone, in its parent folder, and in /" everywhere "$plain/python" "$a"
check "  the import takes below 50 ms" eval 'seconds_of_import "$plain/python" || seconds_of_import "$plain/python"'
check "  pip uninstall" "$plain/pip" uninstall -y fused_rnn
check "pip install .  (isolated, with the torch that is there)" in_folder "$a" "$plain/pip" install .
check "  it works in the clone, in its parent folder, and in /" everywhere "$plain/python" "$a"
clone b/fused_rnn  # where nothing is built
check "  a clone without a build hides it, and says so" eval \
  'in_folder "$work/b/fused_rnn" "$plain/python" -m fused_rnn info >"$work/said" 2>&1 && says "start Python in another folder, or build here as well"'
"$plain/pip" uninstall -q -y fused_rnn
mkdir -p "$work/c/fused_rnn" && git -C "$root" archive HEAD | tar -x -C "$work/c/fused_rnn"
ln -s "$a/build" "$work/c/fused_rnn/build"  # what is compiled already
check "pip install --no-build-isolation .  in sources without git" \
  in_folder "$work/c/fused_rnn" "$plain/pip" install --no-build-isolation .
check "  it works there, in the parent folder, and in /" everywhere "$plain/python" "$work/c/fused_rnn"
"$plain/pip" uninstall -q -y fused_rnn
check "pip install --no-build-isolation -e ." in_folder "$a" "$plain/pip" install --no-build-isolation -e .
check "  it works in the clone, in its parent folder, and in /" everywhere "$plain/python" "$a"
"$plain/pip" uninstall -q -y fused_rnn
check "pip install --no-build-isolation git+…  (everything is compiled)" \
  in_folder / "$plain/pip" install --no-build-isolation "git+file://$a"
check "  it works in / and in the clone's parent folder" eval 'works "$plain/python" / && works "$plain/python" "$work/a"'
"$plain/pip" uninstall -q -y fused_rnn

# --- make
check "make install" in_folder "$a" make install PYTHON="$(command -v "$python")" TORCH="$torch"
made=$a/.venv/bin
check "  it works in the clone, in its parent folder, and in /" everywhere "$made/python" "$a"
check "  the second make install does nothing" eval 'in_folder "$a" make -q install PYTHON="$(command -v "$python")" TORCH="$torch"'
check "  pip uninstall, then make install: there again" eval \
  '"$made/pip" uninstall -q -y fused_rnn && in_folder "$a" make install PYTHON="$(command -v "$python")" TORCH="$torch" && everywhere "$made/python" "$a"'
check "make demo" in_folder "$a" make demo DEMO_ARGS="--quick --steps 5" PYTHON="$(command -v "$python")" TORCH="$torch"

# --- wheels
check "make wheel" in_folder "$a" make wheel PYTHON="$(command -v "$python")" TORCH="$torch"
sed -n 's/^ *[0-9.]* MiB/            &/p; /no wheel for it/s/^/            /p' "$work/log"
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
check "pip install the wheel, in a fresh environment" eval \
  'environment wheel "$torch" && "$work/wheel/bin/pip" install -q "$a"/dist/*-$tag-*.whl'
check "  it works in / and in the clone's parent folder" eval 'works "$work/wheel/bin/python" / && works "$work/wheel/bin/python" "$work/a"'

echo "$failures failed"
exit "$failures"
