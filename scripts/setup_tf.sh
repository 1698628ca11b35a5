#!/usr/bin/env bash
# Make .venv-tf, an environment with TensorFlow alone, for reading and writing TensorFlow checkpoints.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv-tf
WANTED=tensorflow-cpu==2.21.0
if [ "$(cat "$VENV/.setup" 2>/dev/null)" != "$WANTED" ]; then
    echo "setup: installing $WANTED into $VENV" >&2
    "${PYTHON:-python3}" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$WANTED"
    echo "$WANTED" >"$VENV/.setup"
fi
