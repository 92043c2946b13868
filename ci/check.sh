#!/usr/bin/env bash
# Format, lint, types, tests: the same here and in CI. Tools come from PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
lint-imports --no-cache
# A process for each core: most of the time goes into tracing, which uses one.
python -m pytest --numprocesses logical --dist worksteal "$@"
