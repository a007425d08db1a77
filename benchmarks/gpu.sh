#!/usr/bin/env bash
# Everything worth knowing about one machine with a big GPU, in ten minutes: correctness first, then all measurements.
#
#   bash benchmarks/gpu.sh            on the GPU
#   bash benchmarks/gpu.sh --short    the same on a CPU with tiny models, in about a minute: does it all run?
#
# PYTHON   the interpreter (default: python3)
# OUT      folder of the logs tables.txt, tests.txt and stderr.txt (default: benchmarks/out)
# LIMIT    seconds for all of it (default: 580); what does not fit is left out, with a line
# NANOGPT  a checkout of nanoGPT, to be timed too
# GPT_TEST_DATA  folder with gpt2_tokenizer/ and hellaswag/hellaswag_val.jsonl; without it, no HellaSwag
#
# What is missing on the machine (pytest, tokenizers, transformers, a GPU) costs its part and one line, not the rest.
# Exit code 1 if a part failed or ran out of time. All tables come last.
set -u
cd "$(dirname "$0")/.."
short=""
case "${1:-}" in
"") ;;
--short) short=yes ;;
*)
    echo "usage: bash benchmarks/gpu.sh [--short]" >&2
    exit 2
    ;;
esac
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/out}"
limit="${LIMIT:-580}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out" || exit 2
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0

say() { echo "$1" | tee -a "$out/tables.txt"; }

# part NAME SECONDS COMMAND...: runs it with a limit on its time; what it prints joins the logs when it ends.
part() {
    local name="$1" most="$2" left=$((limit - SECONDS)) began=$SECONDS code
    shift 2
    printf '\n=== %s\n' "$name" | tee -a "$out/stderr.txt" >>"$out/tables.txt"
    if [ "$left" -lt 10 ]; then
        say "$name: left out, the $limit seconds are used up"
        failed=1
        return
    fi
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" >"$work/stdout" 2>"$work/stderr"
    code=$?
    cat "$work/stderr" >>"$out/stderr.txt"
    case "$name" in
    tests_*)
        cat "$work/stdout" >>"$out/tests.txt"
        tail -n 15 "$work/stdout" >>"$out/tables.txt"
        ;;
    *) cat "$work/stdout" >>"$out/tables.txt" ;;
    esac
    case "$code" in
    0) say "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: STOPPED after $((SECONDS - began)) s" ;;
    *) say "$name: FAILED with exit code $code, see $out" ;;
    esac
    if [ "$code" != 0 ]; then
        failed=1
        tail -n 5 "$work/stderr" >>"$out/tables.txt"
    fi
}

has() { "$python" -c "import $1" 2>/dev/null; }

skip() { say "$1: skipped, $2"; }

if ! has torch; then
    echo "gpu.sh: error: $python has no torch; name another interpreter with PYTHON=" >&2
    exit 2
fi
device=cuda
[ -n "$short" ] && device=cpu
if [ "$device" = cuda ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: error: torch sees no CUDA device here; --short runs on a CPU" >&2
    exit 2
fi
rm -f "$out"/{tables,tests,stderr}.txt
command -v nvidia-smi >/dev/null &&
    say "$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader)"

# --- correctness

missing=""
for module in pytest hypothesis tokenizers safetensors tqdm transformers; do
    has "$module" || missing="$missing $module"
done
if [ -n "$missing" ]; then
    skip tests "not installed:$missing"
else
    options=(-q -p no:cacheprovider)
    has pytest_timeout || options+=(-W ignore::pytest.PytestConfigWarning) # pyproject.toml's `timeout` is then unknown
    has xdist && options+=(-n 8)
    if [ -n "$short" ]; then
        part tests_model 60 "$python" -m pytest "${options[@]}" tests/test_model.py -k "transformers or loss or cache"
        part tests_train 60 "$python" -m pytest "${options[@]}" tests/test_train.py -k "whole_global_batch or accumulation"
    else
        part tests_model 60 "$python" -m pytest "${options[@]}" tests/test_model.py
        part tests_train 100 "$python" -m pytest "${options[@]}" tests/test_train.py tests/test_muon.py
    fi
fi

# --- measurements; what matters most comes first, for the time may run out

peers=()
[ -n "${NANOGPT:-}" ] && peers=(--nanogpt "$NANOGPT")
tokenizer="${GPT_TEST_DATA:-}/gpt2_tokenizer"
hellaswag="${GPT_TEST_DATA:-}/hellaswag/hellaswag_val.jsonl"
if [ -n "$short" ]; then
    part train 60 "$python" benchmarks/bench_train.py --tiny --device cpu --rounds 2 --profile "${peers[@]}"
    generate=(--tiny --device cpu)
    scenes=(--tiny --device cpu --examples 8 --repeats 1)
    save=(--tiny --device cpu --repeats 2)
    data=(--tiny)
else
    part train_16 200 "$python" benchmarks/bench_train.py --batch_size 16 --compile --profile "${peers[@]}"
    generate=(--device cuda --new_tokens 256 --repeats 3)
    scenes=(--device cuda --examples 200 --repeats 3)
    save=(--device cuda --repeats 3)
    data=(--device cuda --batches 50 --epoch_tokens 50000000 --step_tokens_per_second 400000)
fi
part generate 80 "$python" benchmarks/bench_generate.py "${generate[@]}"
if [ ! -d "$tokenizer" ] || [ ! -f "$hellaswag" ]; then
    skip hellaswag "GPT_TEST_DATA names no folder with gpt2_tokenizer/ and hellaswag/hellaswag_val.jsonl"
elif ! has tokenizers; then
    skip hellaswag "tokenizers is not installed"
else
    part hellaswag 60 "$python" benchmarks/bench_hellaswag.py --data "$hellaswag" --tokenizer "$tokenizer" "${scenes[@]}"
fi
part save 60 "$python" benchmarks/bench_save.py "${save[@]}"
part data 60 "$python" benchmarks/bench_data.py "${data[@]}"
if [ -z "$short" ]; then
    part train_64 170 "$python" benchmarks/bench_train.py --batch_size 64 --compile "${peers[@]}"
    part train_32 150 "$python" benchmarks/bench_train.py --batch_size 32 --compile "${peers[@]}"
fi

# --- all tables

echo
cat "$out/tables.txt"
echo
echo "$SECONDS seconds in all; logs are in $out"
exit "$failed"
