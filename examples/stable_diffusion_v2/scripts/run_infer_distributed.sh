#!/bin/sh
# text_to_image.py on several devices, in parallel:
#   scripts/run_infer_distributed.sh [--launcher msrun|mpirun] [--device Ascend|CPU] [--ranks N] \
#       [--hosts FILE] [--port P] -- [options of text_to_image.py]
# --help lists the launcher's options; docs/distributed.md explains the rest.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m ldm.parallel.launch text_to_image.py "$@"
