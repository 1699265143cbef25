#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice:
#
#   TPU=name ZONE=us-central2-b launch/tpu_vm.sh --config=trades_wrn --workdir=/mnt/runs/trades_wrn
#   TPU=name ZONE=us-west4-a TYPE=v5litepod-64 SPOT=1 SETUP='…' launch/tpu_vm.sh --config=… --workdir=…
#
# Copies this source tree to all workers, or the wheel WHEEL=ibjax-….whl where this script lies in an installation;
# installs it with the extra [tpu], and starts the same command on each. The workers find each other through the TPU's
# metadata. The workdir must be a folder that all workers share. SETUP is a command that each runs first. A slice that is
# requested again consists of new machines, so SETUP must mount that folder; it may also export variables:
#
#   SETUP='mountpoint -q /mnt/runs || { sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/runs &&
#          sudo mount FILESTORE_IP:/SHARE /mnt/runs; }'
#
# With TYPE the slice is a queued resource of that name: it is requested and waited for, again if it is reclaimed
# (RESTARTS=20 times at most), and deleted at the end unless KEEP=1. VERSION is its runtime (v2-alpha-tpuv5-lite),
# SPOT=1 asks for spot capacity, POLL=30 is the pause between two looks in seconds.
#
# The script must run as long as the training: start it in tmux, on a machine that stays on. If it loses its connection it
# keeps the slice, as the training may go on there. To stop a training, interrupt the script, then end the workers'
# processes, which save their state first, and delete the slice:
#
#   gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command='pkill -TERM -x python'
#   gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ -f $here/pyproject.toml ]]; then
  tar -C "$here" --exclude=.git --exclude=runs --exclude=.venv -czf "$scratch/ibjax.tar.gz" .
  what=.
else
  wheel=${WHEEL:?of ibjax, to be copied to the workers: this script lies outside the source tree}
  tar -C "$(dirname "$wheel")" -czf "$scratch/ibjax.tar.gz" "$(basename "$wheel")"
  what=./$(basename "$wheel")
fi

queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
state() { # of the queued resource; "none" if there is none of that name, "unknown" if gcloud cannot tell
  if queued describe --format='value(state.state)' 2>"$scratch/why"; then return; fi
  if grep -q NOT_FOUND "$scratch/why"; then echo none && return; fi
  cat "$scratch/why" >&2
  echo unknown
}

obtain() { # returns when the slice is there
  local now last="" blind=0
  while :; do
    now=$(state)
    [[ $now == "$last" ]] || echo "tpu_vm.sh: state of the queued resource $TPU: $now" >&2
    last=$now
    [[ $now == unknown ]] && blind=$((blind + 1)) || blind=0
    if ((blind == 10)); then echo "tpu_vm.sh: gcloud cannot describe $TPU; see above" >&2 && exit 2; fi
    case $now in
    ACTIVE) return ;;
    none)
      queued create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="${VERSION:-v2-alpha-tpuv5-lite}" \
        ${SPOT:+--spot}
      ;;
    SUSPENDED) queued delete --force --quiet ;; # reclaimed: it never comes back
    FAILED)
      echo "error: the request for $TPU ($TYPE) failed; 'gcloud compute tpus queued-resources describe' says why" >&2
      exit 1
      ;;
    esac
    sleep "${POLL:-30}"
  done
}

copy() { gcloud compute tpus tpu-vm scp "$scratch/ibjax.tar.gz" "$TPU":ibjax.tar.gz --zone="$ZONE" --worker=all; }

train() { # returns the workers' exit code, or 255 if none was reported: gcloud's own says too little
  local code codes
  copy || { sleep "${POLL:-30}" && copy; } || return 255 # new machines may not answer at once
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    trap 'echo ibjax.main on this worker ended with exit code \$?' EXIT
    set -e
    ${SETUP:-}
    mkdir -p ibjax && tar -C ibjax -xzf ibjax.tar.gz && cd ibjax
    curl -LsSf https://astral.sh/uv/install.sh | sh # the system may have an older Python
    ~/.local/bin/uv venv -q --python 3.12 --allow-existing .venv && . .venv/bin/activate
    ~/.local/bin/uv pip install -q $(printf %q "${what}[tpu]")
    python -m ibjax.main $arguments" 2>&1 | tee "$scratch/output" || true
  codes=$(sed -n 's/.*ibjax\.main on this worker ended with exit code \([0-9]*\).*/\1/p' "$scratch/output" | sort -n)
  # a failure, rather than its echo; 137: a worker's process was killed; 134: it was process 0, the others abort
  code=$(grep -vxE '0|69|75|134|137' <<<"$codes" | head -n 1) || code=$(tail -n 1 <<<"$codes")
  return "${code:-255}"
}

arguments=$(printf '%q ' "$@")
for ((start = 0; start <= ${RESTARTS:-20}; start++)); do
  if [[ ${TYPE:-} ]]; then obtain; fi
  train && code=0 || code=$?
  [[ ${TYPE:-} ]] || break
  case $code in
  75 | 69 | 134 | 137) ;; # preempted, the state is saved; or a worker was lost
  255) # no worker has said how it ended: either the slice was reclaimed, or this script has lost its connection
    sleep "${POLL:-30}"
    case $(state) in
    ACTIVE | unknown)
      echo "tpu_vm.sh: $TPU does not answer, and is kept; the head of this script says how to stop and delete it" >&2
      exit 255
      ;;
    esac
    ;;
  *) break ;;
  esac
  echo "tpu_vm.sh: exit code $code; the run continues from its last checkpoint" >&2
done
if [[ ${TYPE:-} && ! ${KEEP:-} ]]; then queued delete --force --quiet; fi
exit "$code"
