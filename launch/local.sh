#!/usr/bin/env bash
# Runs N processes on this machine, as a rehearsal of a multi-host job:   launch/local.sh N --config=… --workdir=…
# Each process has DEVICES simulated CPU devices (default 1), or all accelerators that are visible to it.
# If one process fails, is killed or is stopped, all end: the others have time to report the reason before they are
# killed.
set -euo pipefail
n=${1:?usage: launch/local.sh N --config=… --workdir=…}
shift
export JAX_COORDINATOR_ADDRESS=localhost:${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
export JAX_NUM_PROCESSES=$n JAX_NUM_CPU_DEVICES=${DEVICES:-1}
pids=()
# ${pids[@]+…}: for bash before 4.4, as on macOS, an empty array is an unset variable
trap 'kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true' TERM INT # a preemption notice reaches every process
for ((i = 0; i < n; i++)); do
  JAX_PROCESS_ID=$i python -m ibjax.main "$@" &
  pids+=($!)
done
code=0 deadline=0 running=("${!pids[@]}")
while ((${#running[@]})); do
  still=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then # still there, running or stopped
      still+=("$i")
      continue
    fi
    wait "${pids[i]}" && status=0 || status=$?
    case $code in 0 | 69 | 75 | 134) ((status == 0)) || code=$status ;; esac # the first failure, not its echoes
    if ((status && status != 75 && !deadline)); then # 69: this process ended because it lost another one
      deadline=$((SECONDS + (status == 69 ? 15 : 60)))
    fi
  done
  running=(${still[@]+"${still[@]}"})
  if ((deadline && SECONDS > deadline && ${#running[@]})); then
    for i in "${running[@]}"; do
      echo "launch/local.sh: process $i of $n did not end after another one had: it is killed" >&2
      kill -KILL "${pids[i]}" 2>/dev/null || true
    done
    deadline=0
  fi
  sleep 0.2
done
exit "$code"
