#!/usr/bin/env bash
# The table of `splitwise bench drafting`, from an empty machine; figures go to out/drafting.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench drafting --json out/drafting.json "$@"
