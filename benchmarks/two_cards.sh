#!/bin/bash
# The GPU part of docs/depth.md that two cards do side by side: about 25 minutes on two H100s.
#   benchmarks/two_cards.sh MODEL DATA OUT
# Each benchmark keeps what it finished and goes on when this is run again. The cards are filled in
# an order in which an early end loses seeds, not methods; what depends on a quiet card comes first.
set -u
model=$1 data=$2 out=$3
mkdir -p "$out/trim"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

order() { # healed on the first card; exported by the processor, scored on the card beside the trims
  CUDA_VISIBLE_DEVICES=0 python3 -m benchmarks.order "$model" --out "$out/order" \
    --text "$data/general/wikitext2/validation.jsonl" --test "$data/general/wikitext2/test.jsonl" \
    --general "$data/general/tinyshakespeare" "$data/general/gsm8k" "$data/legal/contracts_text" \
    "$data/finance/finqa" --drop 4 8 12 --tokens 3000000 --rate 1e-3 --window-tokens 512 \
    --batch-windows 8 --eval-steps 100 --jobs 6 --windows 240 --device cuda:0 \
    >"$out/order.md" 2>"$out/order.log"
}
depth() { # on the first card, beside trims; repairs run on the processor
  python3 -m benchmarks.depth "$model" --data "$data" --out "$out/depth" --depths 12 15 \
    --tokens 5000000 --sampled 0 --rate 1e-3 --batch 8 --test --devices cuda:0 --jobs 2 \
    --threads 8 "$@" >>"$out/depth.md" 2>>"$out/depth.log"
}
trim() { # CARD JOBS NAME MODEL MODES OPTIONS
  local card=$1 jobs=$2 name=$3 from=$4 modes=$5
  shift 5
  # shellcheck disable=SC2086
  python3 benchmarks/trim.py "$from" --data "$data" --devices "cuda:$card" --jobs "$jobs" \
    --threads 2 --name "$name" --modes $modes --out "$out/trim" --work /dev/shm "$@" \
    --set ratio=1 objective=choices epochs=2 last_epochs=2 drop_per_step=4 \
    >"$out/trim-$card-$name-${modes// /-}.md" 2>>"$out/trim.log"
}

first() {
  order &
  local ordering=$!
  until [ "$(ls "$out"/order/*/healed/config.json 2>/dev/null | wc -l)" = 6 ] || ! kill -0 $ordering; do
    sleep 2
  done
  {
    depth --methods greedy repaired
    depth --methods cosine-run --states cut repaired
  } &
  trim 0 3 healed "$out/order/cut-8/healed" progressive --units 60 --seeds 0 1 2
  trim 0 3 choices "$model" "full progressive" --seeds 1
  wait
}
second() {
  CUDA_VISIBLE_DEVICES=1 python3 -m benchmarks.cost --device cuda --layers 8 16 32 \
    --tokens 262144 >"$out/cost.md" 2>"$out/cost.log"
  trim 1 4 choices "$model" "full progressive" --seeds 2 0
  trim 1 4 choices "$model" one-shot --seeds 0 1 2
}

first &
second &
wait
python3 benchmarks/trim.py --out "$out/trim"
