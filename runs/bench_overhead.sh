#!/usr/bin/env bash
# The table of `splitwise bench overhead`, from an empty machine; figures go to out/overhead.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench overhead --json out/overhead.json "$@"
