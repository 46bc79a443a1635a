#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes:  bash bench/gpu_check.sh
# Builds with CUDA, runs the GPU tests, the CUDA ops under compute-sanitizer, and the kernels against
# their peers. A step that fails does not stop the next. Results go to $OUT (default: out/gpu).
# PYTHON: an interpreter with a CUDA torch, the package's test dependencies and nvcc on the PATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
summary=$OUT/summary.txt
: >"$summary"

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS rc
  shift 2
  echo "=== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  tail -n 25 "$OUT/$name.log"
  echo "$name: exit $rc, $((SECONDS - begin)) s" | tee -a "$summary"
}

step device 20 nvidia-smi
MEM1_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="9.0a" MAX_JOBS=$(nproc) \
  step build 150 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
step info 30 "$PYTHON" -m mem1_kernels.info
step tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests
step sanitizer 60 compute-sanitizer --error-exitcode 9 \
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests -k "prune and not bench"
step attention 100 "$PYTHON" -m bench.attention --device cuda --dtypes bfloat16 --head-dim 128 \
  --heads 32 --kv-heads 8 --tokens 8192 32768 131072 --layouts qa turns1000 causal \
  --rounds 10 --seconds 1.5 --out "$OUT/attention.json"
step kv_cache 60 "$PYTHON" -m bench.kv_cache --device cuda --parts prune paged \
  --out "$OUT/kv_cache.json"
step attend 45 "$PYTHON" -m bench.kv_cache --device cuda --parts attend --models qwen2.5-7b \
  --batch 1 32 128 --rounds 10 --seconds 0.5 --out "$OUT/cached_attention.json"
echo "=== summary"
cat "$summary"
