#!/usr/bin/env bash
# What the learned low level's plans are worth beside those of the exact search, with three and four unlike machines,
# from an empty machine: figures in docs/mind.md. Some five minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
.venv/bin/splitwise bench low-level --states 80 --machines 3 --json out/low_level_3.json
.venv/bin/splitwise bench low-level --states 40 --machines 4 --json out/low_level_4.json
