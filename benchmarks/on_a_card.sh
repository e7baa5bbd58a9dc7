#!/bin/bash
# Everything that needs a card, on card cuda:N of a machine that does nothing else: about 40 minutes on an H100.
#   benchmarks/on_a_card.sh MODEL SCRATCH OUT [N] [LLAMA_BENCH]
# MODEL: a small real model (SmolLM2); SCRATCH: 160 GB of memory or disk for models of a 7 B shape.
# Tests first, then the device against others' figures, then one shape in every format. Nothing else
# may run on the machine: wait for what was started before, or the records say `foreign process`.
set -u
model=$1 scratch=$2 out=$3 card=${4:-0} llama_bench=${5:-}
device=cuda:$card
mkdir -p "$scratch" "$out"

# torchao 0.18, where it is installed, warns while Python compiles and transformers imports it
python3 -m pytest -q -W "ignore:invalid escape sequence" -W 'ignore:`torch.jit:DeprecationWarning' \
  tests/devices/test_real_card.py tests/runtimes/test_pytorch_card.py \
  tests/runtimes/test_ort_card.py tests/devices/test_roofline_ceilings.py 2>&1 | tee "$out/tests.txt"
python3 -m shortstack doctor >"$out/doctor.txt" 2>&1

python3 -m benchmarks.formats make "$scratch/models" --big "$scratch/gguf" >"$out/make.txt" 2>&1 || exit 1

for to in gguf:Q8_0 gguf:Q4_0 onnx:fp16; do
  python3 -m shortstack export "$model" --to $to -o "$scratch/small/${to/:/-}" \
    --max-perplexity-ratio 1.5 --quiet
done
if [ -n "$llama_bench" ]; then
  python3 -m benchmarks.side_by_side "$scratch/gguf/32-layers-Q4_0.gguf" "$scratch"/small/gguf-*/*.gguf \
    --llama-bench "$llama_bench" --device "$device" --json "$out/llama-bench.json" >"$out/llama-bench.md"
fi
python3 -m benchmarks.side_by_side "$scratch/small/onnx-fp16" --device "$device" \
  --json "$out/genai.json" >"$out/genai.md"

for lane in gguf onnx pytorch; do
  python3 -m benchmarks.formats bench "$scratch/models" --big "$scratch/gguf" --out "$out/formats" \
    --lane $lane --device "$device" 2>&1 | tee -a "$out/formats.txt"
done
python3 -m shortstack report "$out/formats" -o "$out/report"
