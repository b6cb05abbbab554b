#!/usr/bin/env bash
exec "${PYTHON:-python}" "$(dirname "$0")/../eval/results_table.py" "$@"
