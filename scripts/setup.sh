#!/usr/bin/env bash
# Make .venv if it is not there and install the project with its tested versions. Quick when nothing has changed.
#   PYTHON=python3.12 bash scripts/setup.sh     another Python (3.11 or newer)
#   EXTRAS=test bash scripts/setup.sh           which extras; several with commas. They add up over the calls.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=${PYTHON:-python3}
EXTRAS=${EXTRAS:-}

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # not there, or left half-made
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setup: Python 3.11 or newer is needed, and '$PYTHON' is not. Name one: PYTHON=python3.11 bash $0" >&2
        exit 1
    fi
    echo "setup: making $VENV" >&2
    "$PYTHON" -m venv --clear "$VENV"
fi

# What an installation depends on; the stamp is written when it has succeeded. dev includes test, and any of them nothing.
STAMP=$VENV/.setup-${EXTRAS//[^a-z]/_}
WANTED=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" <("$VENV/bin/python" -VV) | sha256sum)
case $EXTRAS in
    "") stamps=("$VENV"/.setup-*) ;;
    test) stamps=("$STAMP" "$VENV/.setup-dev") ;;
    *) stamps=("$STAMP") ;;
esac
if ! grep -qsxF "$WANTED" "${stamps[@]}"; then
    echo "setup: installing (the first time takes some minutes)" >&2
    # torch first and pinned, so that no other package chooses its build.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" torch
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" \
        -e "$ROOT${EXTRAS:+[$EXTRAS]}"
    echo "$WANTED" >"$STAMP"
fi
