#!/bin/bash
# What the documents have from cards; first what was not measured to its end (tests, generation, exit-speed's graphs, double in
# one go). Start it once for each card, they share the list:
#   CUDA_VISIBLE_DEVICES=0 benchmarks/card_queue.sh MODEL DATA MODELS GGUF OUT LLAMA_BENCH
# MODEL: SmolLM2's folder; DATA: folders of rows; MODELS and GGUF: what `benchmarks.formats make` wrote, 160 GB
# of memory or disk, five minutes with 4 jobs; OUT: records and logs. An item is taken by making
# OUT/queue/ITEM, and kept: remove that folder to run it again. What needs a quiet host comes first: processes
# that certify or fit on all cores beside it took 90 seconds a campaign to 200, and `busy` is in their records.
# Each process is given one card: PyTorch and llama.cpp open 0.5 GB on every card they see.
# ITEMS="early packed" in the environment takes these, in that order, instead of all.
# Records, for a machine that may be taken away at any time, after every item:
#   cd OUT && find . \( -name '*.json*' -o -name '*.md' -o -name 'log-*' \) -size -2M | tar czf FILE -T -
set -u
model=$(realpath "$1") data=$2 models=$3 gguf=$4 out=$5 llama_bench=$6
mkdir -p "$out/queue" "$out/small" "$out/exits"
out=$(realpath "$out")
export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$out/pycache} # imports are half of a short trial
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}                   # fits on all cores slow down what is measured beside them

formats() { python3 -m benchmarks.formats bench "$models" --big "$gguf" --out "$out/formats" --device cuda:0 --threads 8 "$@"; }
beside() { python3 -m benchmarks.side_by_side "$@" --device cuda:0 --threads 8 --rounds 6; }
small() { # FORMAT PRECISION OUT OPTION=VALUE...: SmolLM2 as an export; not certified, which takes all cores for minutes
  [ -e "$out/small/$3" ] || CUDA_VISIBLE_DEVICES='' python3 - "$model" "$1" "$2" "$out/small/$3" "${@:4}" <<'PY'
import sys
from pathlib import Path
from benchmarks.formats import export
from shortstack.artifact import ExportSpec
source, fmt, precision, out, *options = sys.argv[1:]
export(Path(source), ExportSpec(fmt, precision, tuple(tuple(o.split("=")) for o in options)), Path(out))
PY
}
learn() { # OUT BITS...
  python3 -m benchmarks.learn_codes "$model" --data "$data" --bits "${@:2}" --restored 0 --rates 0.002 --reaches 0.45 \
    --sweep-tokens 400000 --tokens 16000000 --minutes 7 --self-generated 3000000 --device cuda:0 --test -o "$out/$1"
}
exits() { python3 -m benchmarks.exits "$1" "$model" --data "$data" --out "$out/exits" "${@:2}"; }
best_rate() { # NAME...: of trained exits, the rate that ended lowest by KL on selection text, summed over exits
  python3 - "$out/exits" "$@" <<'PY'
import json, sys
from pathlib import Path
facts = [json.loads((Path(sys.argv[1]) / name / "facts.json").read_text()) for name in sys.argv[2:]]
print(min(facts, key=lambda one: sum(e["after"]["kl"] for e in one["losses"].values()))["rate"])
PY
}
balcony() { # short runs choose the rate of the long one
  local rate rates=(4e-3 8e-3 1.6e-2)
  for rate in "${rates[@]}"; do exits train --kind balcony --name "probe-$rate" --tokens 3000000 --rate "$rate" || return; done
  rate=$(best_rate "${rates[@]/#/probe-}") || return
  exits train --kind balcony --tokens 50000000 --rate "$rate" && exits eval balcony --split test --device cuda:0
}
sampled() { # wait for the card that samples text; fails where none does, or where it failed
  until [ -e "$out/exits/sampled" ]; do
    if [ ! -d "$out/queue/sample" ] || [ -e "$out/queue/sample/exit" ]; then
      [ -e "$out/exits/sampled" ] && return
      echo "there is no sampled text: run the item sample"
      return 1
    fi
    sleep 1
  done
}
early_cpu() { # the model that the item early tuned, prompts one by one on cores of the host
  until [ -e "$out/queue/early/exit" ]; do
    [ -d "$out/queue/early" ] || { echo "there is no tuned model: run the item early"; return 1; }
    sleep 1
  done
  [ -d "$out/early/tuned" ] || { echo "the item early left no tuned model"; return 1; }
  mkdir -p "$out/early-cpu"
  ln -sfn "$out/early/tuned" "$out/early-cpu/tuned"
  python3 -m benchmarks.early_exit "$model" --data "$data" --out "$out/early-cpu" --device cpu --rows 120 --checks answers probe
}
double() { # NAME LAYERS_CUT...: cuts of so many layers (0: the model itself), healed; all in every kind of file, in OUT/NAME
  local cut name=$1 models=()
  python3 - "$data" "$out/texts.jsonl" <<'PY'
import json, sys
from pathlib import Path
from benchmarks.learn_codes import documents
lines = [json.dumps({"text": text}) + "\n" for text in documents(Path(sys.argv[1]))]
Path(sys.argv[2]).write_text("".join(lines), encoding="utf-8")
PY
  mkdir -p "$out/cuts"
  for cut in "${@:2}"; do
    if [ "$cut" = 0 ]; then
      ln -sfn "$model" "$out/cuts/30-layers"
    else
      python3 -m benchmarks.depth "$model" --data "$data" --out "$out/depth" --methods cosine-run --depths "$cut" --states healed \
        --tokens 5000000 --sampled 0 --rate 1e-3 --batch 8 --devices cuda:0 --jobs 2 --keep --threads 8 --limit 16 || return # double scores them
      ln -sfn "$out/depth/cosine-run-$cut/healed" "$out/cuts/$((30 - cut))-layers"
    fi
    models+=("$out/cuts/$((30 - cut))-layers")
  done
  python3 -m benchmarks.double "${models[@]}" --out "$out/$name" --text "$data/general/wikitext2/test.jsonl" --limit 16 \
    --bits 5 4.5 3.86 --gguf Q8_0 Q4_K_M Q4_0 --calibration "$out/texts.jsonl" --device cuda:0 --threads 8
}
item() {
  case $1 in
    llama-bench) small gguf Q8_0 model-Q8_0.gguf
      beside "$gguf/32-layers-Q4_0.gguf" "$out/small/model-Q8_0.gguf" \
        --llama-bench "$llama_bench" --json "$out/llama-bench.json" >"$out/llama-bench.md" ;;
    genai) small onnx fp16 onnx-fp16; small onnx int4 onnx-int4 imatrix=no activations=float16
      beside "$out/small/onnx-fp16" "$out/small/onnx-int4" --json "$out/genai.json" >"$out/genai.md" ;;
    tests) python3 -m shortstack doctor; python3 -m pytest -q -p no:cacheprovider -W "ignore:invalid escape sequence" \
      -W 'ignore:`torch.jit:DeprecationWarning' tests/runtimes/test_packed_card.py tests/runtimes/test_pytorch_card.py \
      tests/runtimes/test_early_exit_checks.py \
      tests/runtimes/test_ort_card.py tests/devices/test_real_card.py tests/devices/test_roofline_ceilings.py ;;
    kernels) python3 -m benchmarks.direct_kernels --shapes 12288x4096 4096x4096 22016x4096 4096x11008 --json "$out/kernels.json" ;;
    packed) python3 -m benchmarks.packed_memory --device cuda:0 --shape 7b -o "$out/packed" ;;
    exit-speed) python3 -m benchmarks.exit_speed bench "$model" --work "$out/exit-work" \
      --out "$out/exit-speed" --device cuda:0 --threads 8 --repeats 3 --minutes 9 --runtimes llama.cpp onnxruntime pytorch-graph ;;
    early) python3 -m benchmarks.early_exit "$model" --data "$data" --out "$out/early" --device cuda:0 ;;
    early-cpu) early_cpu ;;
    early-plain) python3 -m benchmarks.early_exit "$model" --data "$data" --out "$out/early-plain" --device cuda:0 --exit-loss 0 ;;
    generation) python3 -m benchmarks.early_generation "$model" --data "$data" --out "$out/generation" --device cuda:0 --part exit ;;
    sample) exits sample --tokens 9000000 --batch 768 && touch "$out/exits/sampled" ;;
    balcony) sampled && balcony ;;
    cut-15) sampled && exits train --kind cut --at 15 --name cut15 --tokens 50000000 --rate 1e-3 && exits eval cut15 --split test --device cuda:0 ;;
    double) double double 0 8 15 ;;
    double-15) double double-15 15 ;; # its table is over the cut itself
    learn) learn learn 4.9 3.77 ;; # a packed file takes 0.07 bits a weight more with coder=smallest
    learn-*) learn "$1" "${1#learn-}" ;;
    *energy) formats --only "$1" ;;
    *) formats --repeats 2 --only "$1" ;;
  esac
}

every="tests generation exit-speed double kernels packed early early-cpu gguf-32-16-b8-energy learn sample cut-15
  balcony early-plain llama-bench genai graph-24-12-b8 onnx-24-12-b8 bnb-int8-32-16-b1 onnx-32-16-b1-energy
  torchao-int4-graph-32-16-b1-energy bnb-nf4-graph-32-16-b1-energy graph-32-16-b8-energy onnx-32-16-b8-energy eager-24-12-b8
  eager-32-16-b1-energy graph-32-16-b1 onnx-32-16-b1 gguf-32-16-b1"
for name in ${ITEMS:-$every}; do
  mkdir "$out/queue/$name" 2>/dev/null || continue
  began=$(date +%s)
  item "$name" >"$out/log-$name.txt" 2>&1
  code=$?
  echo "$code" >"$out/queue/$name/exit"
  echo "card ${CUDA_VISIBLE_DEVICES:-all} $name: exit $code, $(($(date +%s) - began)) s"
done
