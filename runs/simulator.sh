#!/bin/sh
# Decisions and simulated events per second, batched and not, and that both decide alike.
set -e
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench simulator --json out/simulator.json
