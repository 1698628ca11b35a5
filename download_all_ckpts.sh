#!/usr/bin/env bash
# The published Funnel-Transformer checkpoints, into ./pretrained; see --help.
set -euo pipefail

exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/data-scripts/fetch.py" ckpts "$@"
