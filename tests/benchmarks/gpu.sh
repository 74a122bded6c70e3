#!/usr/bin/env bash
# What only a GPU can tell: its tests, and the tables for docs/benchmarks.md. Under 10 minutes on one large GPU.
#   tests/benchmarks/gpu.sh [FOLDER]                     DEVICE=cpu tests/benchmarks/gpu.sh runs through it with tiny sizes
# A part that fails is named at the end, and the others run.
set -uo pipefail
cd "$(dirname "$0")/../.."
device=${DEVICE:-cuda}
folder=${1:-runs/gpu}
mkdir -p "$folder"
failed=()

part() { # NAME SECONDS COMMAND...: run a command for at most so long, and keep what it prints
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$folder/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$folder/gpu.txt"
    part tests 180 pytest -q -m gpu
    model=vit-b-32 experts=(8 20) images=(4 16) sizes=(1b 7b) texts=8 tokens=512 repeats=7
else
    model=demo experts=(2) images=(2) sizes=(110m) texts=2 tokens=8 repeats=1
fi
steps=(python tests/benchmarks/step_time.py --model "$model" --device "$device" --images "${images[@]}" --repeats "$repeats")
part step 120 "${steps[@]}" --experts "${experts[@]}" --autocast bfloat16 --storage device --rows ours "shared graph" floor
part step_float32 60 "${steps[@]}" --experts "${experts[0]}" --storage device --rows ours "shared graph" floor
part step_ram 60 "${steps[@]}" --experts "${experts[0]}" --autocast bfloat16 --storage ram --rows ours floor
part step_stream 90 "${steps[@]}" --experts "${experts[0]}" --autocast bfloat16 --storage stream --rows ours floor
for size in "${sizes[@]}"; do
    part "lora_$size" 150 python tests/benchmarks/lora_step.py --device "$device" --size "$size" --autocast bfloat16 \
        --experts 2 --texts "$texts" --tokens "$tokens" --repeats "$repeats" --rows beside "LoRA fine-tuning"
done
part text 120 python tests/benchmarks/text_step.py --device "$device" --texts "$texts" --repeats "$repeats"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts ran; tables in $folder"
