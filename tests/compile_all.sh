#!/usr/bin/env bash
# The real launches, compiled with each Triton version and for each capability; no GPU. Some minutes; not in CI.
# A launch that needs a stack or spills is printed, and makes the script fail.
#
#     PYTHON=.venv/bin/python tests/compile_all.sh [FOLDER]     # FOLDER keeps the Triton versions

set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)} python=${PYTHON:-python3} failed=0
export TRITON_INTERPRET=0 OMP_NUM_THREADS=1
for version in 3.6.0 3.7.1 3.9.0; do
    [ -d "$folder/$version" ] || "$python" -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
    for capability in 80 90 100 120; do
        records=$(PYTHONPATH="$folder/$version" "$python" tests/test_kernels_compile.py "$capability" 2> "$folder/errors") || {
            tail -n 3 "$folder/errors"
            failed=1
        }
        bad=$(grep -v '"stack": 0, "local": 0' <<< "$records" || true)
        echo "Triton $version, $capability: $(wc -l <<< "$records") launches${bad:+, of which}"
        [ -z "$bad" ] || { echo "$bad"; failed=1; }
    done
done
exit "$failed"
