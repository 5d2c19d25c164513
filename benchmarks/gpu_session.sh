#!/usr/bin/env bash
# The benchmarks that want a GPU, the most wanted first, each within a limit, so that a session that is cut short has kept
# what was done. From a clone, in an environment with `.[test]`:
#
#     bash benchmarks/gpu_session.sh                    # at most 50 minutes; CASES="tiny:256" for fewer
#     DEVICE=cpu DTYPE=float32 CASES=atto:2 bash benchmarks/gpu_session.sh
#
# Figures go to benchmarks/results/ (a file for each device), what is printed to gpu_session.log.
set -u
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
dtype=${DTYPE:-bfloat16}
cases=${CASES:-"atto:1024 tiny:256 base:128 large:64"}
log=${LOG:-gpu_session.log}

step() { # seconds, command...
    local limit=$1 started=$SECONDS
    shift
    echo "== $* (at most $limit s)" | tee -a "$log"
    timeout "$limit" "$@" >>"$log" 2>&1
    echo "== exit status $?, $((SECONDS - started)) s" | tee -a "$log"
}

on="--device $device --dtype $dtype"
# are the kernels right on this GPU; then which backend is the fastest, and where its time goes
step 300 python -m pytest -m cuda -q
step 600 python -m benchmarks.pretrain_step $on --cases $cases --rounds 15 --profile
step 900 python -m benchmarks.pretrain_step $on --cases $cases --rounds 9 --compile
step 300 python -m benchmarks.depthwise $on --batch 256 --backends eager fused triton
# these take the backend of the environment
[ "$device" = cpu ] || export TIMM_CONVNEXTV2_BACKEND=${TIMM_CONVNEXTV2_BACKEND:-triton}
step 300 python -m benchmarks.official $on --cases ${OFFICIAL_CASES:-tiny:256} --no-compile
step 300 python -m benchmarks.inference $on
step 300 python -m benchmarks.scaling $on --batch 64
