#!/usr/bin/env bash
# Runs all rows of a recipe, one after another, each in its own folder:
#
#   launch/sweep.sh CONFIG WORKDIR [PATTERN] [--flag …]
#   launch/sweep.sh configs/ibd_ablations.py runs/ibd_ablations 'alpha-*' --config.seed=1
#
# CONFIG is a recipe's file or name, the rows are those of its variable ROWS; PATTERN is a shell pattern. Finished rows are not run again, so the
# same command continues a sweep. A row that fails is reported at the end and does not stop the others; a row that is
# preempted (exit code 75) or interrupted (130) ends the sweep. DRY=1 only prints the commands.
set -uo pipefail
usage="usage: launch/sweep.sh CONFIG WORKDIR [PATTERN] [--flag …]"
config=${1:?$usage} workdir=${2:?$usage}
shift 2
pattern='*'
if (($#)) && [[ $1 != --* ]]; then
  pattern=$1
  shift
fi
rows=$(python -m ibjax.main --list "--config=$config") || exit 2
failed=() count=0
while read -r row; do
  # shellcheck disable=SC2053  # the right side is a pattern
  [[ $row == $pattern ]] || continue
  count=$((count + 1))
  command=(python -m ibjax.main "--config=$config:$row" "--workdir=$workdir/$row" "$@")
  if [[ ${DRY:-} ]]; then
    printf '%q ' "${command[@]}" && echo
    continue
  fi
  "${command[@]}" </dev/null && code=0 || code=$?
  ((code == 75 || code == 130)) && exit "$code"
  ((code)) && failed+=("$row ($code)")
done <<<"$rows"
if ((!count)); then
  echo "error: '$pattern' matches none of the rows: ${rows//$'\n'/, }" >&2
  exit 2
fi
if ((${#failed[@]})); then
  echo "failed rows, with their exit codes: ${failed[*]}" >&2
  exit 1
fi
