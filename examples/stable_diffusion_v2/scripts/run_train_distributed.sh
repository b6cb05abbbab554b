#!/bin/sh
# train_text_to_image.py on several devices, in parallel:
#   scripts/run_train_distributed.sh [--launcher msrun|mpirun] [--device Ascend|CPU] [--ranks N] \
#       [--hosts FILE] [--port P] -- [options of train_text_to_image.py]
# --help lists the launcher's options; docs/distributed.md explains the rest.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m ldm.parallel.launch train_text_to_image.py "$@"
