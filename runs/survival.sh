#!/usr/bin/env bash
# The whole fault matrix and every figure of `splitwise bench survival`; stop it at will, finished cells are kept and
# not played again while the source stays as it is. Figures go to out/survival.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out/survival
.venv/bin/splitwise bench survival --full --keep out/survival --json out/survival.json "$@"
