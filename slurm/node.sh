#!/bin/bash
# One node's ranks under torchrun:  node.sh RECIPE [key=value ...]
# Which node, and where they meet, torchrun reads from PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR
# and PET_MASTER_PORT. The exit status is the ranks', which torchrun turns into 1: 0 done, 2 the input is wrong,
# 75 stopped in good order, start it again.
report=$(mktemp)
exec 3> >(tee "$report" >&2)
copy=$!
torchrun -m amid_ds train "$@" 2>&3 &
agent=$! asked=
# The ranks are asked to save and stop. torchrun would kill them after 30 s, and report nothing. Before there are ranks,
# or one that listens, nothing is to be saved: 75 too.
trap 'asked=75; pkill -USR1 -P "$agent" || kill "$agent"' TERM INT
while wait "$agent"; status=$?; kill -0 "$agent" 2>/dev/null; do :; done      # a signal ends `wait`
exec 3>&-
wait "$copy"
ranks=$(sed -n 's/^ *exitcode *: *\([0-9]*\) .*/\1/p' "$report" | tail -n 1)  # of the first that failed
rm -f "$report"
[ "$status" -eq 0 ] || exit "${ranks:-${asked:-1}}"
