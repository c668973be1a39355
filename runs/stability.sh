#!/usr/bin/env bash
# The table of docs/lyapunov.md, from an empty machine; figures go to out/stability.json. A quarter of an hour of one core;
# with --quick about one minute.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench stability --json out/stability.json "$@"
