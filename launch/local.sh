#!/usr/bin/env bash
# N processes on this machine, as a rehearsal of a pod:   launch/local.sh N --config=… --workdir=…
# Each process sees its share of the CPU's fake devices (DEVICES of them, default 1), or all accelerators it is given.
# Where one of them ends with an error, dies or is stopped, all end: they have time to say why, then they are killed.
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
code=0 deadline=0 running=("${!pids[@]}")
while ((${#running[@]})); do
  still=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then # also where it is stopped
      still+=("$i")
      continue
    fi
    wait "${pids[i]}" && status=0 || status=$?
    ((status > code)) && code=$status || true
    if ((status && status != 75 && !deadline)); then # 69: the one that ended has noticed that another one was lost
      deadline=$((SECONDS + (status == 69 ? 15 : 60)))
    fi
  done
  running=("${still[@]}")
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
