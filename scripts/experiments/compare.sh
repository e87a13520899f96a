#!/usr/bin/env bash
# Runs every arm of recipes/compare with several seeds and compares them: does the report's stalemate reproduce, and what
# moves it? Stopped and repeated, it continues.
#
#   PROMPTS=FILE YARDSTICK=DIR bash scripts/experiments/compare.sh
#
# PROMPTS    hub id, file or directory of prompts (hh-rlhf, say)          YARDSTICK  a reward model of human pairs (make yardstick)
# ARMS       recipes, default: report report-steps recommended ppo-only   SEEDS      default: 1 2 3
# OUT        default: runs/compare
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${PROMPTS:?PROMPTS=FILE is needed: the prompts, in any form that arete-curation prompts reads}"
out=${OUT:-runs/compare}
read -ra arms <<<"${ARMS:-report report-steps recommended ppo-only}"
read -ra seeds <<<"${SEEDS:-1 2 3}"
mkdir -p "$out"
runs=()
for seed in "${seeds[@]}"; do # all arms of a seed before the next seed: what is there early can be compared early
    for arm in "${arms[@]}"; do
        recipe=$out/$arm-$seed.toml
        sed "s/^seed = .*/seed = $seed/" "recipes/compare/$arm.toml" >"$recipe.new"
        cmp -s "$recipe.new" "$recipe" || mv "$recipe.new" "$recipe" # make looks at its time
        rm -f "$recipe.new"
        start=$SECONDS
        make all RECIPE="$recipe" RUN="$out/$arm-$seed" PROMPTS="$PROMPTS" ${YARDSTICK:+YARDSTICK="$YARDSTICK"}
        echo "$arm, seed $seed: $((SECONDS - start)) s"
        runs+=("$arm=$out/$arm-$seed")
    done
done
target/release/arete-scoring compare "${runs[@]}" | tee "$out/comparison.txt"
