#!/usr/bin/env bash
# One 80 GB GPU: LLaDA-8B with LoRA. Further key=value changes are arguments.
#   RECIPE=gdpo/full RUN=runs/gdpo launch/one-gpu.sh model.path=/models/LLaDA-8B-Instruct
set -euo pipefail
RECIPE=${RECIPE:-diffu_grpo/full}
RUN=${RUN:-runs/${RECIPE//\//-}}

if compgen -G "$RUN/checkpoints/update-*" > /dev/null; then
    exec unveil train --resume "$RUN"
fi
exec unveil train "$RECIPE" --run "$RUN" "$@"
