#!/usr/bin/env bash
# Fresh machine -> linted, its types checked and tested, by two processes. Arguments go to pytest: `bash launch/test.sh -k
# storage`. What is slow runs in groups, by launch/nightly.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh requirements.txt tests/requirements.txt

ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
python -m pytest -n 2 --dist worksteal "$@"
