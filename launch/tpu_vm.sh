#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice:
#
#   TPU=name ZONE=us-central2-b launch/tpu_vm.sh --config=configs/ibd_wrn.py --workdir=/mnt/shared/runs/ibd_wrn
#
# Copies this source tree to all workers, or the wheel WHEEL=ibjax-….whl where this script lies in an installation;
# installs it with the extra [tpu], and starts the same command on each. The workers find each other through the TPU's
# metadata. The workdir must be a folder that all workers share (Filestore, a mounted bucket).
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
here=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
if [[ -f $here/pyproject.toml ]]; then
  tar -C "$here" --exclude=.git --exclude=runs --exclude=.venv -czf "$archive" .
  what=.
else
  wheel=${WHEEL:?of ibjax, to be copied to the workers: this script lies outside the source tree}
  tar -C "$(dirname "$wheel")" -czf "$archive" "$(basename "$wheel")"
  what=./$(basename "$wheel")
fi
gcloud compute tpus tpu-vm scp "$archive" "$TPU":ibjax.tar.gz --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  mkdir -p ibjax && tar -C ibjax -xzf ibjax.tar.gz && cd ibjax
  python3 -m venv .venv && . .venv/bin/activate && pip install -q $(printf %q "${what}[tpu]")
  python -m ibjax.main $(printf '%q ' "$@")"
