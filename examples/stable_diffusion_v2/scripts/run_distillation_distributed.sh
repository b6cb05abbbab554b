#!/bin/sh
# train_distillation.py on several devices, in parallel:
#   scripts/run_distillation_distributed.sh [--launcher msrun|mpirun] [--device Ascend|CPU] [--ranks N] \
#       [--hosts FILE] [--port P] -- [options of train_distillation.py]
# --help lists the launcher's options; docs/distributed.md explains the rest.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m ldm.parallel.launch train_distillation.py "$@"
