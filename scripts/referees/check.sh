#!/usr/bin/env bash
# Judges the files of one run by other people's code: datasets, TRL, peft, transformers, tensorboard, wandb.
#   bash scripts/referees/check.sh runs/demo          (`make referees RUN=runs/demo`)
# What a run does not have is said and left out; a run without anything to check is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run=${1:?"usage: check.sh RUN"}
here=scripts/referees
python=.venv/bin/python
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -d "$run" ] || {
    echo "referees: $run does not exist: run \`make demo\`, or name another run with RUN=…" >&2
    exit 1
}
checked=0
check() {
    "$python" "$@" 2>"$work/errors" || {
        cat "$work/errors" >&2
        exit 1
    }
    checked=$((checked + 1))
}

mapfile -t tables < <(find "$run" -name '*.parquet' -not -path '*.tmp-*' -printf '%h\n' | sort -u)
[ ${#tables[@]} -eq 0 ] || check $here/check_parquet.py "${tables[@]}"
mapfile -t events < <(find "$run" -name 'events.out.tfevents.*' -printf '%h\n' | sort -u)
[ ${#events[@]} -eq 0 ] || check $here/check_tfevents.py "${events[@]}"
if [ ${#events[@]} -gt 0 ]; then
    target/release/arete wandb --run "$run" --output "$work/wandb" >"$work/wandb.log"
    check $here/check_wandb.py "$run" "$work/wandb"
fi

trl=()
[ ! -d "$run/preferences/action" ] || trl+=(--preferences "$run"/preferences/{action,motivation,consequence})
[ ! -f "$run/demonstrations/demonstrations.parquet" ] || trl+=(--demonstrations "$run/demonstrations/demonstrations.parquet")
[ ${#trl[@]} -eq 0 ] || check $here/check_trl.py --model tests/fixtures/tiny-chat "${trl[@]}"

# Log-probabilities of one conversation of ours, by our binary and by theirs.
jsonl=$work/conversations.jsonl
cat >"$jsonl" <<'JSON'
{"messages":[{"role":"user","content":"How can I make up with my brother?"},{"role":"assistant","content":"Tell him what you regret, ask how he saw it, and give him time."}]}
{"messages":[{"role":"user","content":"Is it wrong to keep money I found?"},{"role":"assistant","content":"Try to return it first."},{"role":"user","content":"What is the motivation behind the answer?"},{"role":"assistant","content":"Honesty."}]}
JSON
logprobs() { # logprobs OUTPUT MODEL [ADAPTER]
    target/release/arete-model logprobs --model "$2" ${3:+--adapter "$3"} --dtype f32 --jsonl "$jsonl" >"$1"
}
scores() { # scores OUTPUT MODEL [ADAPTER]
    target/release/arete-reward score --model "$2" ${3:+--adapter "$3"} --dtype f32 --input "$jsonl" --output "$1"
}

# ORIGINAL: the model the run started from, as a Hugging Face directory; ours reads the file that the adapter names.
original=${ORIGINAL:-.deps/smollm2/hf}
base=$original
named_base() { sed -n 's/^ *"base_model": "\(.*\)",$/\1/p' "$1/arete_adapter.json"; }
if [ -d "$run/sft/merged" ]; then
    base=$run/sft/merged
    logprobs "$work/sft" "$base"
    check $here/check_model.py "$base" --logprobs "$work/sft" --tolerance 2e-4
fi
mapfile -t adapters < <(find "$run" -name adapter_config.json -not -path '*/checkpoint*' -printf '%h\n' | sort)
for adapter in "${adapters[@]}"; do
    over=$base
    ours=$base
    if [[ $adapter == "$run/sft"* || $base == "$original" ]]; then
        over=$original
        ours=$(named_base "$adapter")
    fi
    if grep -q '"SEQ_CLS"' "$adapter/adapter_config.json"; then
        scores "$work/scores" "$ours" "$adapter"
        check $here/check_adapter.py --base "$over" --adapter "$adapter" --scores "$work/scores" --conversations "$jsonl" --tolerance 1e-4
    else
        logprobs "$work/adapter" "$ours" "$adapter"
        check $here/check_adapter.py --base "$over" --adapter "$adapter" --logprobs "$work/adapter" --tolerance 2e-4
    fi
done
mapfile -t models < <(find "$run" -name config.json -not -path "$run/sft/merged/*" -not -path '*/checkpoint*' -printf '%h\n' | sort)
for model in "${models[@]}"; do
    if grep -q ForSequenceClassification "$model/config.json"; then
        scores "$work/scores" "$model"
        check $here/check_model.py "$model" --scores "$work/scores" --conversations "$jsonl"
    else
        check $here/check_model.py "$model"
    fi
done

[ $checked -gt 0 ] || {
    echo "referees: $run holds nothing to check" >&2
    exit 1
}

# The original in four bits, as `arete-model quantize` writes it, read by transformers with bitsandbytes.
for scales in nested single; do
    four_bit=$work/four-bit-$scales
    flags=(--dtype f32)
    [ $scales = single ] || flags+=(--double-quantize)
    target/release/arete-model quantize --model "$original" --output "$four_bit" "${flags[@]}"
    logprobs "$work/four-bit" "$four_bit"
    check $here/check_model.py "$four_bit" --logprobs "$work/four-bit" --tolerance 2e-4
    rm -r "$four_bit"
done
echo "referees: all checks of $run passed"
