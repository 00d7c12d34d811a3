#!/usr/bin/env bash
# Train on the hosts of a file by mpirun: cluster/mpi/train.sh RECIPE [OPTIONS], from the project's folder.
# Ctrl-C saves; the same command goes on.

HOSTFILE=${HOSTFILE:-cluster/mpi/hostfile.example}   # copy it, and put your hosts in
VENV=${VENV:-$PWD/.venv}                             # the same on all hosts
RUN_DIR=${RUN_DIR:-$PWD/runs/mpi}                    # on storage that all hosts share
LAUNCH=${LAUNCH:-}                                   # options of launch, such as --nic ib0 --dry-run

set -euo pipefail
export PATH="$VENV/bin:$PATH"
[ $# -gt 0 ] || set -- digits

# shellcheck disable=SC2086  # several options
exec hvdtrain launch --hostfile "$HOSTFILE" --launcher mpirun $LAUNCH "$@" --run-dir "$RUN_DIR" --resume
