#!/usr/bin/env bash
# N processes on this machine, as a rehearsal of a pod:   launch/local.sh N --config=… --workdir=…
# Each process sees its share of the CPU's fake devices (DEVICES of them, default 1), or all accelerators it is given.
set -euo pipefail
n=${1:?usage: launch/local.sh N --config=… --workdir=…}
shift
export JAX_COORDINATOR_ADDRESS=localhost:${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
export JAX_NUM_PROCESSES=$n JAX_NUM_CPU_DEVICES=${DEVICES:-1}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # a notice reaches every process
for ((i = 0; i < n; i++)); do
  JAX_PROCESS_ID=$i python -m ibjax.main "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do # a signal ends `wait` before the process has saved
    wait "$pid" && status=0 || status=$?
  done
  wait "$pid" && status=0 || status=$?
  ((status > code)) && code=$status || true
done
exit "$code"
