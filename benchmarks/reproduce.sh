#!/bin/sh
# Every figure of quality, recall and calibration of one model, most important first, on a GPU (a CPU takes hours).
# Runs again from where it stopped: finished cells are in OUT already.
#
#     sh benchmarks/reproduce.sh vq_kvcache/data/tiny-llama OUT [SEQUENCES]
#
# OUT gets codec-MODEL.safetensors and the JSON files of benchmarks/results. For the shape of 8 billion parameters:
#     python benchmarks/calibration.py llama-8b --out OUT/calibration-llama-8b.json
# Speed and long runs, on a GPU of 80 GB, each saved cell by cell, too:
#     python benchmarks/kernel.py && python benchmarks/speed.py && python benchmarks/memory.py --long
set -u
model=$1 out=$2 sequences=${3:-64}
name=$(basename "$model")
python=${PYTHON:-python3}
here=$(dirname "$0")
codec=$out/codec-$name.safetensors
mkdir -p "$out"
export MLX_ENABLE_TF32=0  # or rounding would be taken for the quantizers' doing
step() {
    limit=$1
    shift
    start=$(date +%s)
    timeout "$limit" "$python" "$here/$@" 2>> "$out/log-$name.txt" || echo "FAILED ($?): $*"
    echo "$(($(date +%s) - start)) s: $1"
}
quality() {
    limit=$1 context=$2 mode=$3
    shift 3
    step "$limit" quality.py "$model" --codec "$codec" --context "$context" --mode "$mode" \
        --out "$out/quality-$name-$context-$mode.json" "$@"
}
[ -f "$codec" ] || step 150 calibration.py "$model" --float32 --sequences "$sequences" --save "$codec" \
    --out "$out/calibration-$name-$sequences.json"
quality 120 1024 decode
quality 210 4096 decode
quality 60 1024 prefill
quality 60 4096 prefill
step 90 recall.py "$model" --codec "$codec" --out "$out/recall-$name.json"
[ -f "$codec.scalar" ] || step 120 calibration.py "$model" --float32 --sequences "$sequences" --scalar \
    --save "$codec.scalar" --out "$out/calibration-$name-scalar.json"
quality 60 1024 decode --scalar-codec "$codec.scalar" --only scalar --bits 1,2,3
