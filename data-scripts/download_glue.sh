#!/usr/bin/env bash
# The GLUE tasks, into ./data/glue; see --help.
set -euo pipefail

exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/fetch.py" glue "$@"
