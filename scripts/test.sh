#!/usr/bin/env bash
# Set up, then run the tests. Arguments go to pytest: bash scripts/test.sh tests/funnel -k rel_shift
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=test bash "$ROOT/scripts/setup.sh"
for argument in "$@"; do
    if [ -e "$argument" ]; then exec "$ROOT/.venv/bin/python" -m pytest --rootdir "$ROOT" -c "$ROOT/pyproject.toml" "$@"; fi
done
cd "$ROOT"
exec .venv/bin/python -m pytest "$@"
