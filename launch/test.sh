#!/usr/bin/env bash
# Fresh machine -> linted and tested. Arguments go to pytest: `bash launch/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh requirements.txt tests/requirements.txt

ruff check --quiet .
ruff format --quiet --check .
python -m pytest "$@"
