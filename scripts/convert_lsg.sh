#!/usr/bin/env bash
# Convert a checkpoint of transformers into an LSG model for long texts.
#
#   bash scripts/convert_lsg.sh --initial_model=roberta-base --model_name=lsg-roberta [flags of `funneltfm convert-lsg`]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=hf bash "$ROOT/scripts/setup.sh"
exec "$ROOT/.venv/bin/python" "$ROOT/pytorch/convert_checkpoint.py" "$@"
