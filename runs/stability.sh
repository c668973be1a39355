#!/usr/bin/env bash
# The table of docs/lyapunov.md, from an empty machine; figures go to out/stability.json. Half an hour of one core; with
# --quick two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench stability --json out/stability.json "$@"
