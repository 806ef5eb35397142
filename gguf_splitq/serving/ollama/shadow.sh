#!/bin/sh
# SPDX-License-Identifier: MIT
# shadow.sh EXECUTABLE LIBRARIES RUNTIME SHADOW: makes the folder SHADOW, an Ollama with another llama-server.
#
# Ollama looks for its runner beside its own executable, links resolved: so SHADOW/bin/ollama is a copy of EXECUTABLE, and
# SHADOW/lib/ollama has links to all in LIBRARIES, Ollama's folder, but for llama-server, which chooses between Ollama's and
# the one in RUNTIME. Nothing outside SHADOW is changed. To be run at every start: then an upgraded Ollama is shadowed anew.
set -eu
executable=$1 libraries=$2 runtime=$3 shadow=$4
for file in "$executable" "$libraries/llama-server" "$runtime/llama-server"; do
    [ -x "$file" ] || { echo "$file: not there" >&2 && exit 1; }
done
rm -rf "$shadow.new" "$shadow.old"
mkdir -p "$shadow.new/bin" "$shadow.new/lib/ollama"
cp "$executable" "$shadow.new/bin/ollama"
for file in "$libraries"/*; do
    [ "${file##*/}" = llama-server ] || ln -s "$file" "$shadow.new/lib/ollama/"
done
ln -s "$libraries" "$shadow.new/theirs"
ln -s "$runtime" "$shadow.new/ours"
cp "${0%/*}/llama-server" "$shadow.new/lib/ollama/llama-server"
chmod 755 "$shadow.new/bin/ollama" "$shadow.new/lib/ollama/llama-server"
[ ! -e "$shadow" ] || mv "$shadow" "$shadow.old"
mv "$shadow.new" "$shadow"
rm -rf "$shadow.old"
