#!/bin/bash
# What docs/cards.md still lacks, the most wanted first: start it once for each card, they share the list.
#   CUDA_VISIBLE_DEVICES=0 benchmarks/card_queue.sh MODEL DATA MODELS GGUF OUT LLAMA_BENCH
# MODEL: SmolLM2's folder; DATA: folders of rows; MODELS and GGUF: what `benchmarks.formats make` wrote, 160 GB
# of memory or disk, four minutes with 8 jobs on 32 cores; OUT: records and logs. An item is taken by making
# OUT/queue/ITEM, and kept: remove that folder to run it again. Nothing else may run on the host: processes
# that train or certify beside it took 90 seconds a campaign to 200, and `busy` is in their records.
# Each process is given one card: PyTorch and llama.cpp open 0.5 GB on every card they see.
# ITEMS="early packed" in the environment takes these, in that order, instead of all.
set -u
model=$1 data=$2 models=$3 gguf=$4 out=$5 llama_bench=$6
mkdir -p "$out/queue" "$out/small"
export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$out/pycache} # imports are half of a short trial

formats() { python3 -m benchmarks.formats bench "$models" --big "$gguf" --out "$out/formats" --device cuda:0 --threads 8 "$@"; }
beside() { python3 -m benchmarks.side_by_side "$@" --device cuda:0 --threads 8 --rounds 6; }
small() { # TO OPTIONS...: SmolLM2 as an export, certified
  [ -e "$out/small/${1/:/-}" ] || python3 -m shortstack export "$model" --to "$1" -o "$out/small/${1/:/-}" \
    --max-perplexity-ratio 1.5 --threads 8 --quiet "${@:2}"
}
item() {
  case $1 in
    llama-bench) small gguf:Q8_0; beside "$gguf/32-layers-Q4_0.gguf" "$out"/small/gguf-Q8_0/*.gguf \
      --llama-bench "$llama_bench" --json "$out/llama-bench.json" >"$out/llama-bench.md" ;;
    genai) small onnx:fp16; small onnx:int4 --option activations=float16
      beside "$out/small/onnx-fp16" "$out/small/onnx-int4" --json "$out/genai.json" >"$out/genai.md" ;;
    tests) python3 -m pytest -q -p no:cacheprovider -W "ignore:invalid escape sequence" \
      -W 'ignore:`torch.jit:DeprecationWarning' tests/runtimes/test_packed_card.py tests/runtimes/test_pytorch_card.py ;;
    packed) python3 -m benchmarks.packed_memory --device cuda:0 --shape 7b --nvcomp -o "$out/packed" ;;
    early) python3 -m benchmarks.early_exit "$model" --data "$data" --out "$out/early" --device cuda:0 ;;
    early-plain) python3 -m benchmarks.early_exit "$model" --data "$data" --out "$out/early-plain" --device cuda:0 --exit-loss 0 ;;
    generation) python3 -m benchmarks.early_generation "$model" --data "$data" --out "$out/generation" --device cuda:0 --part exit ;;
    exit-speed) python3 -m benchmarks.exit_speed bench "$model" --work "$out/exit-work" \
      --out "$out/exit-speed" --device cuda:0 --threads 8 ;;
    *energy) formats --only "$1" ;;
    *) formats --repeats 2 --only "$1" ;;
  esac
}

every="eager-32-16-b1 genai llama-bench graph-24-12-b8 onnx-24-12-b8 eager-32-16-b8 onnx-32-16-b1-energy
  torchao-int4-graph-32-16-b1-energy bnb-nf4-graph-32-16-b1-energy eager-24-12-b1 eager-24-12-b8 bnb-int8-32-16-b1
  graph-32-16-b8-energy onnx-32-16-b8-energy gguf-32-16-b8-energy early early-plain generation tests packed exit-speed
  graph-32-16-b1 onnx-32-16-b1 gguf-32-16-b1"
for name in ${ITEMS:-$every}; do
  mkdir "$out/queue/$name" 2>/dev/null || continue
  began=$(date +%s)
  item "$name" >"$out/log-$name.txt" 2>&1
  echo "card ${CUDA_VISIBLE_DEVICES:-all} $name: exit $?, $(($(date +%s) - began)) s"
done
