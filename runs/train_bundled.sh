#!/bin/sh
# The bundled model, from an empty machine: under an hour on two processor cores, minutes with a GPU.
#
#     runs/train_bundled.sh BOOKS=DIR
#
# DIR holds three plain-text files from Project Gutenberg: middlemarch.txt (number 145),
# moby_dick.txt (2701) and war_and_peace.txt (2600). A second call goes on where the first was stopped.
set -eu
case "${1:-}" in
BOOKS=?*) books=$(cd "${1#BOOKS=}" && pwd) ;;
*) echo "usage: $0 BOOKS=DIR" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
make venv
# Threads that wait sleep instead of spinning: beside other work, a step is then several times faster.
OMP_WAIT_POLICY=passive nice -n 10 .venv/bin/python runs/train_bundled.py --books "$books" --work out/bundled
mkdir -p src/splitwise_llm/data/bundled
install -m 644 out/bundled/export/* src/splitwise_llm/data/bundled/
