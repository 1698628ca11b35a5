#!/usr/bin/env bash
# The text classification sets, into ./data/textcls; see --help.
set -euo pipefail

exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/fetch.py" textcls "$@"
