#!/bin/sh
# The whole grid of scenarios: every case under every policy, one page, CSV and figures. Hours; stop it at will,
# finished cells are kept and not run again. With recordings: TRACES=folder REQUESTS=file runs/scenarios.sh, and
# CUT_GAPS=1 where their recorders paused (the message names them) and the pauses are to be left out.
set -e
cd "$(dirname "$0")/.."
make venv
mkdir -p out/cells
.venv/bin/splitwise bench scenarios --keep out/cells --html out/scenarios.html --csv out/scenarios.csv \
  --json out/scenarios.json ${TRACES:+--traces "$TRACES"} ${REQUESTS:+--requests "$REQUESTS"} \
  ${CUT_GAPS:+--cut-gaps}
