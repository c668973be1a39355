#!/usr/bin/env bash
# The table of `splitwise bench fidelity`, from an empty machine; figures go to out/fidelity.json. Run nothing else
# meanwhile: both "machines" and the links between are processes of this one.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench fidelity --json out/fidelity.json "$@"
