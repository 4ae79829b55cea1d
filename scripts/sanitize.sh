#!/usr/bin/env bash
# Builds the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and runs it there: every odd size, dtype,
# direction, mask and save mode, and the tests of the ops, on each instruction set this processor has (or those named as arguments).
# PYTHON is the interpreter of an environment that has torch and the test tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
out=$PWD/build/sanitize
mkdir -p "$out"

FUSED_RNN_SANITIZE=address,undefined "$python" setup.py -q build_ext --build-lib "$out" --build-temp "$out/objects"
cp -R fused_rnn/. "$out/fused_rnn.new/"
find "$out/fused_rnn.new" -name '_C*.so' -delete
cp -R "$out/fused_rnn.new/." "$out/fused_rnn/"
rm -rf "$out/fused_rnn.new"

export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
# Python and torch keep memory to the end of the process; that is not ours to report.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 OMP_NUM_THREADS=2
export PYTHONPATH=$out  # the package there is the one that is imported
cd "$out"
tests=()
for name in test_functional test_nonfinite test_stream cpu/test_activations cpu/test_threads ops/test_ops ops/test_fast_path ops/test_watchers; do
  tests+=("../../tests/$name.py")
done
isas=${*:-$("$python" -c 'import fused_rnn._C as C; print(C.available_isas().replace(",", " "))')}
for isa in $isas; do  # --capture=sys: what a sanitizer writes as it ends the process is not swallowed
  export FUSED_RNN_ISA=$isa
  "$python" ../../scripts/sanitize_cases.py
  "$python" -m pytest -q -x --capture=sys -p no:cacheprovider -c ../../pyproject.toml --rootdir ../.. "${tests[@]}" \
    -k "one_step or strided or empty or integer_kind or activation or bits or memory or stays_there or refuses or harmless or fast_path or infinity or nan or watch or (test_stream and not instruction_set and not compiled) or threads"
done
