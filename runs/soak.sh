#!/usr/bin/env bash
# Half an hour of sessions under random faults on two cores; figures go to out/soak.json.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out
if command -v taskset >/dev/null; then
  exec taskset -c 0,1 .venv/bin/splitwise bench soak --seconds 1800 --json out/soak.json "$@"
fi
exec .venv/bin/splitwise bench soak --seconds 1800 --json out/soak.json "$@"
