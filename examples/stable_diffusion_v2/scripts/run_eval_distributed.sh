#!/bin/sh
# eval/eval_fid.py on several devices, in parallel:
#   scripts/run_eval_distributed.sh [--launcher msrun|mpirun] [--device Ascend|CPU] [--ranks N] \
#       [--hosts FILE] [--port P] -- [options of eval_fid.py]
# --help lists the launcher's options; docs/distributed.md explains the rest.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m ldm.parallel.launch eval/eval_fid.py "$@"
