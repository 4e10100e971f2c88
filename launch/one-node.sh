#!/usr/bin/env bash
# The GPUs of one node: all weights of LLaDA-8B, split over them. Further key=value changes are arguments.
#   GPUS=8 RECIPE=mdpo/full RUN=runs/mdpo launch/one-node.sh model.path=/models/LLaDA-8B-Instruct
set -euo pipefail
GPUS=${GPUS:-8}
RECIPE=${RECIPE:-mdpo/full}
RUN=${RUN:-runs/${RECIPE//\//-}}

# An update under way may take minutes to finish after Ctrl-C.
TORCHRUN=(torchrun --standalone --nproc-per-node "$GPUS" --shutdown-timeout 900 -m --)
if compgen -G "$RUN/checkpoints/update-*" > /dev/null; then
    exec "${TORCHRUN[@]}" unveil train --resume "$RUN"
fi
exec "${TORCHRUN[@]}" unveil train "$RECIPE" --run "$RUN" distributed.shard=full "$@"
