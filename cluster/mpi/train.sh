#!/usr/bin/env bash
# Train on the hosts of a file by mpirun: cluster/mpi/train.sh RECIPE [OPTIONS], from the project's folder.
# Any program: cluster/mpi/train.sh SCRIPT.py [ARGUMENTS], or ... -- COMMAND [ARGUMENTS].
# Ctrl-C saves; the same command resumes.

HOSTFILE=${HOSTFILE:-cluster/mpi/hostfile.example}   # copy it, and put your hosts in
VENV=${VENV:-$PWD/.venv}                             # the same on all hosts
RUN_DIR=${RUN_DIR:-$PWD/runs/mpi}                    # on storage that all hosts share
LAUNCH=${LAUNCH:-}                                   # options of launch, such as --nic ib0 --dry-run

set -euo pipefail
export PATH="$VENV/bin:$PATH"
[ $# -gt 0 ] || set -- digits

# A recipe is given its run folder; a program finds it in its environment.
export RUN_DIR
if [ "$1" != -- ] && { [ "${1%.py}" = "$1" ] || hvdtrain list "$1" >/dev/null 2>&1; }; then
  set -- "$@" --run-dir "$RUN_DIR" --resume
else
  mkdir -p "$RUN_DIR"
fi

# shellcheck disable=SC2086  # several options
exec hvdtrain launch --hostfile "$HOSTFILE" --launcher mpirun --env RUN_DIR $LAUNCH "$@"
