#!/usr/bin/env bash
# The table of docs/peers.md, from an empty machine: builds llama.cpp with its RPC server from the source package of
# llama-cpp-python into out/llama (a quarter of an hour on one core; JOBS=1 for that), then `splitwise bench peers`,
# figures to out/peers.json. A C++ compiler is needed; cmake and ninja are taken from pip where they are missing. 20 GB
# on disk and 12 GB of memory; --quick needs less. Run nothing else meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
make venv
here=$PWD/out/llama
version=0.3.36
sum=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
mkdir -p "$here"
if ! test -x "$here/build/bin/ggml-rpc-server"; then
  command -v c++ > /dev/null || { echo "a C++ compiler is missing: apt-get install g++"; exit 1; }
  if ! command -v cmake > /dev/null || ! command -v ninja > /dev/null; then
    test -x "$here/tools/bin/ninja" || python3 -m venv "$here/tools"
    "$here/tools/bin/pip" install --quiet cmake ninja
    PATH="$here/tools/bin:$PATH"
  fi
  archive=$here/llama_cpp_python-$version.tar.gz
  test -f "$archive" ||
    .venv/bin/python -m pip download --no-deps --no-binary llama-cpp-python "llama_cpp_python==$version" -d "$here"
  echo "$sum  $archive" | sha256sum --check --quiet
  tar xzf "$archive" -C "$here"
  source=$here/llama_cpp_python-$version/vendor/llama.cpp
  # gcc 12 believes that _tile_loadconfig reads 8 bytes, not 64, and drops the stores to the rest: with AMX every
  # quantised model then ends in SIGILL. The empty asm says that all of it is read.
  amx=$source/ggml/src/ggml-cpu/amx/mmq.cpp
  sed -i 's|^    _tile_loadconfig(&tc);|    __asm__ volatile("" : : "r"(\&tc) : "memory"); _tile_loadconfig(\&tc);|' "$amx"
  grep -q '__asm__ volatile.*_tile_loadconfig' "$amx" || { echo "$amx has changed: look at its _tile_loadconfig"; exit 1; }
  cmake -S "$source" -B "$here/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF
  ninja -C "$here/build" -j "${JOBS:-$(nproc)}" llama-server llama-quantize ggml-rpc-server
fi
.venv/bin/splitwise bench peers --llamacpp "$here" --folder out/models --json out/peers.json "$@"
