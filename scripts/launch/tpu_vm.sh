#!/bin/bash
# On every machine of a TPU slice: scripts/launch/tpu_vm.sh NAME ZONE --config=configs/<name>.py --logger.experiment_id=<run> ...
# jax finds the coordinator and each process from the TPU's own metadata. The run is started again on all of them from the
# newest checkpoint, in a folder that all see (--logger.output_dir), while it ends with 75 (preempted) or 5 (one is lost).
set -uo pipefail
name=${1:?the name of the TPU VM} zone=${2:?its zone}
shift 2
flags=$(printf '%q ' "$@")

for ((start = 1; start <= ${STARTS:-20}; start++)); do
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
        "cd ringbpt && exec python -m ringbpt.train --autoresume --jax_distributed.initialize_jax_distributed $flags"
    code=$?
    echo "start $start ended with $code"
    case $code in
        5 | 75 | 129 | 134 | 137 | 143 | 255) sleep 30 ;; # 255: a machine was lost under the connection
        *) exit "$code" ;;
    esac
done
exit "$code"
