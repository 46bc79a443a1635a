#!/usr/bin/env bash
# Everything that needs a GPU, in one command:  bash bench/gpu_check.sh
# Builds with CUDA, runs the GPU tests, the CUDA ops under compute-sanitizer, the kernels against
# their peers, and a rollout; 9 minutes at most. A step that fails does not stop the next.
# Results go to $OUT (default: out/gpu); python -m bench --report out/gpu makes a page of them.
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
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  tail -n 25 "$OUT/$name.log"
  echo "$name: exit $rc, $((SECONDS - begin)) s" | tee -a "$summary"
}

step device 10 nvidia-smi
MEM1_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="9.0a" MAX_JOBS=$(nproc) \
  step build 105 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
step info 10 "$PYTHON" -m mem1_kernels.info
# Most of their time compiles kernels, on the host: hence the workers.
step tests 100 "$PYTHON" -m pytest -q -n 8 -m gpu -p no:cacheprovider python_tests
step triton 55 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider python_tests/test_triton_*.py
# Without torch's memory pool, in which a write into the neighbour looks like one's own.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer 45 compute-sanitizer --error-exitcode 9 \
  "$PYTHON" -m pytest -q -p no:cacheprovider python_tests/test_prune_kv_gpu.py \
  -k "rotation and half or paged_bytes"
step attention 75 "$PYTHON" -m bench.attention --device cuda --dtypes bfloat16 --head-dim 128 \
  --heads 32 --kv-heads 8 --tokens 8192 32768 --layouts qa turns1000 causal \
  --rounds 10 --seconds 1 --out "$OUT"
step attention_long 30 "$PYTHON" -m bench.attention --device cuda --dtypes bfloat16 \
  --head-dim 128 --heads 32 --kv-heads 8 --tokens 131072 --layouts qa \
  --rounds 10 --seconds 1 --out "$OUT" --name attention_long
step kv_cache 40 "$PYTHON" -m bench.kv_cache --device cuda --parts prune paged \
  --batch 1 64 --survivors 100 356 4000 --seconds 0.4 --out "$OUT"
step attend 35 "$PYTHON" -m bench.kv_cache --device cuda --parts attend --models qwen2.5-7b \
  --batch 1 32 64 --rounds 10 --seconds 0.4 --out "$OUT" --name cached_attention
step rollout 35 "$PYTHON" -m bench.rollout --device cuda --dtype bfloat16 --layers 8 --hidden 1024 \
  --batch 16 --turns 2 16 --ways reprefill full --rounds 1 --out "$OUT"
echo "=== summary"
cat "$summary"
! grep -qv ": exit 0," "$summary"  # fails if a step failed
