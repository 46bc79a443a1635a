#!/usr/bin/env bash
# Runs a command in an environment with vLLM: `vllm_env.sh VENV COMMAND ...`.
set -euo pipefail
venv="$(cd "$1" && pwd)"
shift
export PATH="$venv/bin:$PATH"
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
# Intel's OpenMP, which vLLM's CPU build is made for.
if [ -e "$venv/lib/libiomp5.so" ]; then export LD_PRELOAD="$venv/lib/libiomp5.so"; fi
exec "$@"
