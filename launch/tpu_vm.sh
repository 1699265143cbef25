#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice:
#
#   TPU=name ZONE=us-central2-b launch/tpu_vm.sh --config=configs/ibd_wrn.py --workdir=/mnt/shared/runs/ibd_wrn
#   TPU=name ZONE=us-west4-a TYPE=v5litepod-64 SPOT=1 launch/tpu_vm.sh --config=… --workdir=…
#
# Copies this source tree to all workers, or the wheel WHEEL=ibjax-….whl where this script lies in an installation;
# installs it with the extra [tpu], and starts the same command on each. The workers find each other through the TPU's
# metadata. The workdir must be a folder that all workers share (Filestore, a mounted bucket).
#
# With TYPE the slice is a queued resource of that name: it is requested and waited for, again if it is reclaimed
# (RESTARTS=20 times at most), and deleted at the end unless KEEP=1. VERSION is its runtime (v2-alpha-tpuv5-lite),
# SPOT=1 asks for spot capacity, POLL=30 is the pause between two looks in seconds.
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
state() { queued describe --format='value(state.state)' 2>/dev/null || true; } # empty: there is none of that name

obtain() { # returns when the slice is there
  local now last=
  while :; do
    now=$(state)
    [[ $now == "$last" ]] || echo "tpu_vm.sh: the queued resource $TPU is ${now:-not there}" >&2
    last=$now
    case $now in
    ACTIVE) return ;;
    '')
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

train() { # returns the workers' exit code, or 255 if none was reported: gcloud's own says too little
  local code codes
  gcloud compute tpus tpu-vm scp "$scratch/ibjax.tar.gz" "$TPU":ibjax.tar.gz --zone="$ZONE" --worker=all || return 255
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    trap 'echo ibjax.main on this worker ended with exit code \$?' EXIT
    set -e
    mkdir -p ibjax && tar -C ibjax -xzf ibjax.tar.gz && cd ibjax
    python3 -m venv .venv && . .venv/bin/activate && pip install -q $(printf %q "${what}[tpu]")
    python -m ibjax.main $arguments" 2>&1 | tee "$scratch/output" || true
  codes=$(sed -n 's/.*ibjax\.main on this worker ended with exit code \([0-9]*\).*/\1/p' "$scratch/output" | sort -n)
  code=$(grep -vxE '0|69|75' <<<"$codes" | head -n 1) || code=$(tail -n 1 <<<"$codes") # a failure, rather than its echo
  return "${code:-255}"
}

arguments=$(printf '%q ' "$@")
for ((start = 0; start <= ${RESTARTS:-20}; start++)); do
  if [[ ${TYPE:-} ]]; then obtain; fi
  train && code=0 || code=$?
  [[ ${TYPE:-} ]] || break
  # 75: preempted, the state is saved; 69: another worker was lost; else only a slice that is gone is worth another try
  ((code == 75 || code == 69)) || { ((code == 255)) && [[ $(state) != ACTIVE ]]; } || break
  echo "tpu_vm.sh: exit code $code; the run continues from its last checkpoint" >&2
done
if [[ ${TYPE:-} && ! ${KEEP:-} ]]; then queued delete --force --quiet; fi
exit "$code"
