#!/usr/bin/env bash
# The table of `splitwise bench link`, from an empty machine; figures go to out/link.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench link --json out/link.json "$@"
