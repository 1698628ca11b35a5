#!/usr/bin/env bash
# Set up, then run the tests. Arguments go to pytest: bash scripts/test.sh tests/funnel -k rel_shift
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=test bash "$ROOT/scripts/setup.sh"
for argument in "$@"; do
    if [ -e "$argument" ]; then exec "$ROOT/.venv/bin/python" -m pytest --rootdir "$ROOT" -c "$ROOT/pyproject.toml" "$@"; fi
done
cd "$ROOT"
# The files of tests are dealt to as many processes as there are cores, each with one thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
