#!/usr/bin/env bash
# Run named experiments one after another.
#
#   bash scripts/run.sh --list
#   bash scripts/run.sh bert_100k sparse_80_kd_onecycle_lr_rigl
#
# Arguments go to `funneltfm run`; docs/experiments.md explains them, --help lists them.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=datasets,hf bash "$ROOT/scripts/setup.sh"
exec "$ROOT/.venv/bin/python" "$ROOT/pytorch/run.py" "$@"
