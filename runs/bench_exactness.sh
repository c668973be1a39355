#!/usr/bin/env bash
# The table of `splitwise bench exactness`, from an empty machine; figures go to out/exactness.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench exactness --json out/exactness.json "$@"
