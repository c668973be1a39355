#!/usr/bin/env bash
# The table of docs/bars.md: what the policy splitwise must reach, row by row, from an empty machine; and its two rows of
# running processes (runs/live_bars.sh). Two to three hours of one core, most of it the stability of 32 long traces and
# rush-hour's nine crowds of 120 devices, then two of both; stop it at will, finished cases are kept and not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
mkdir -p out/cells
scenarios=()
for name in healthy-cloud capable-edge private-mec private-wan flaky-wan tunnel day long-prompt rush-hour; do
  scenarios+=(--scenario "$name")
done
.venv/bin/splitwise bench scenarios --few --worlds 12 --requests-per-trace 60 --keep out/cells --bars out/bars.md \
  --json out/bars.json --html out/bars.html "${scenarios[@]}" "$@"
runs/live_bars.sh
