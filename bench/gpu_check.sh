#!/usr/bin/env bash
# Everything that needs a GPU, in one command:  bash bench/gpu_check.sh
# Builds with CUDA, runs the GPU tests, the CUDA ops under compute-sanitizer, the kernels against
# their peers, and a rollout; 9 minutes at most. A step that fails does not stop the next.
# Results go to $OUT (default: out/gpu).
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

step device 10 nvidia-smi
MEM1_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="9.0a" MAX_JOBS=$(nproc) \
  step build 110 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
step info 15 "$PYTHON" -m mem1_kernels.info
step tests 120 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests
step triton 50 "$PYTHON" -m pytest -q -x -p no:cacheprovider python_tests/test_triton_*.py
step sanitizer 45 compute-sanitizer --error-exitcode 9 \
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests -k "prune and not bench"
step attention 80 "$PYTHON" -m bench.attention --device cuda --dtypes bfloat16 --head-dim 128 \
  --heads 32 --kv-heads 8 --tokens 8192 32768 131072 --layouts qa turns1000 causal \
  --rounds 10 --seconds 1 --out "$OUT/attention.json"
step kv_cache 40 "$PYTHON" -m bench.kv_cache --device cuda --parts prune paged \
  --batch 1 64 --survivors 100 356 4000 --seconds 0.4 --out "$OUT/kv_cache.json"
step attend 35 "$PYTHON" -m bench.kv_cache --device cuda --parts attend --models qwen2.5-7b \
  --batch 1 32 128 --rounds 10 --seconds 0.4 --out "$OUT/cached_attention.json"
step rollout 30 "$PYTHON" -m bench.rollout --device cuda --dtype bfloat16 --layers 8 --hidden 1024 \
  --batch 16 --turns 2 16 --ways reprefill full --rounds 1 --out "$OUT/rollout.json"
echo "=== summary"
cat "$summary"
