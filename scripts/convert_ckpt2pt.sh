#!/usr/bin/env bash
# Convert a TensorFlow checkpoint of the original code into model.pt and net_config.pytorch.json.
#
#   bash scripts/convert_ckpt2pt.sh TF_dir PT_dir [flags of `funneltfm convert-ckpt`]
#   TF_dir=... PT_dir=... bash scripts/convert_ckpt2pt.sh
#
# TensorFlow is installed into an environment of its own, .venv-tf, unless FUNNELTFM_TF_PYTHON names a Python that has it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${TF_dir:-}" ] && [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then TF_dir=$1; shift; fi
if [ -z "${PT_dir:-}" ] && [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then PT_dir=$1; shift; fi
if [ -z "${TF_dir:-}" ] || [ -z "${PT_dir:-}" ]; then
    echo "usage: bash $0 TF_dir PT_dir   (the folder of a TensorFlow checkpoint, and the folder to write)" >&2
    exit 2
fi
bash "$ROOT/scripts/setup.sh"
if [ -z "${FUNNELTFM_TF_PYTHON:-}" ]; then
    bash "$ROOT/scripts/setup_tf.sh"
    export FUNNELTFM_TF_PYTHON=$ROOT/.venv-tf/bin/python
fi
exec "$ROOT/.venv/bin/funneltfm" convert-ckpt --from=tf --to=pt "$TF_dir" "$PT_dir" "$@"
