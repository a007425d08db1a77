#!/usr/bin/env bash
# What is worth knowing of a machine with a big GPU, most valuable first, in two parts of 9 and 3.5 minutes.
#
#   bash benchmarks/gpu.sh A          correctness, our speed, two short runs, exact resume, HellaSwag
#   bash benchmarks/gpu.sh B          others beside ours, sampling, saving, memory
#   bash benchmarks/gpu.sh --short    both on a CPU with tiny models, in a few minutes: does it all run?
#
# PYTHON   the interpreter (default: python3)
# OUT      folder of the logs tables.txt and stderr.txt, and of the runs (default: benchmarks/out)
# LIMIT    seconds for all of it (default: 540 for A, 210 for B, 900 for --short); what does not fit is left out, with a line
# SHARDS   folder of prepared training shards, beside SHARDS_val; without it they are made from GPT_TEST_DATA
# NANOGPT  a checkout of nanoGPT, to be timed too
# GPT_TEST_DATA  folder with gpt2_tokenizer/, corpus/{train,val}/*.parquet and hellaswag/hellaswag_val.jsonl
#
# Every row is printed, and written to $OUT/tables.txt, the moment it is known. A part that fails, or lacks what it needs,
# costs its rows and one line. Both parts share one cache of compiled code, $OUT/compiled. Exit code 1 if a part failed.
set -u
cd "$(dirname "$0")/.."
which="${1:-}"
case "$which" in
A) limit="${LIMIT:-540}" ;;
B) limit="${LIMIT:-210}" ;;
--short) limit="${LIMIT:-900}" ;;
*)
    echo "usage: bash benchmarks/gpu.sh A | B | --short" >&2
    exit 2
    ;;
esac
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/out}"
mkdir -p "$out" || exit 2
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR="$out/compiled"
device=cuda
[ "$which" = --short ] && device=cpu
[ "$which" != B ] && rm -f "$out"/{tables,stderr}.txt
failed=0

say() { echo "$1" | tee -a "$out/tables.txt"; }

has() { "$python" -c "import $1" 2>/dev/null; }

# part NAME SECONDS COMMAND...: runs it with a limit on its time.
part() {
    local name="$1" most="$2" left=$((limit - SECONDS)) began=$SECONDS code
    shift 2
    [ "$which" = --short ] && most=$limit # a CPU is slow, and nothing there is measured
    say ""
    say "=== $name"
    if [ "$left" -lt 5 ]; then
        say "$name: left out, the $limit seconds are used up"
        failed=1
        return 1
    fi
    echo "=== $name" >>"$out/stderr.txt"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" 2>>"$out/stderr.txt" | tee -a "$out/tables.txt"
    code=${PIPESTATUS[0]}
    case "$code" in
    0) say "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: STOPPED after $((SECONDS - began)) s" ;;
    *) say "$name: FAILED with exit code $code, see $out" ;;
    esac
    if [ "$code" != 0 ]; then
        failed=1
        tail -n 5 "$out/stderr.txt" | tee -a "$out/tables.txt"
    fi
    return "$code"
}

skip() { say "$1: skipped, $2"; }

if ! has torch; then
    echo "gpu.sh: error: $python has no torch; name another interpreter with PYTHON=" >&2
    exit 2
fi
if [ "$device" = cuda ] && ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: error: torch sees no CUDA device here; --short runs on a CPU" >&2
    exit 2
fi
given="${GPT_TEST_DATA:-}"
tokenizer="$given/gpt2_tokenizer"
hellaswag="$given/hellaswag/hellaswag_val.jsonl"
data="${SHARDS:-$out/shards}"
peers=()
[ -n "${NANOGPT:-}" ] && peers=(--nanogpt "$NANOGPT")
if [ "$which" = --short ]; then
    tiny=(--tiny)
    step=(--rounds 1 --tiny --device cpu)
    shape=(--n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --batch_size 2 --total_batch_tokens 256 --max_steps 8
        --val_tokens 1024 --device cpu --dtype float32)
    tokens=200000 examples=(--limit 8) workers=1
else
    tiny=()
    step=(--compile --rounds 3 --device cuda)
    shape=(--max_steps 380 --val_tokens 1048576)
    tokens=38000000 examples=() workers=16
fi

# shards: prepares the training shards, unless they are there.
shards() {
    [ -n "${SHARDS:-}" ] && return 0
    [ -f "$data/manifest.json" ] && return 0
    if [ ! -d "$tokenizer" ] || [ ! -d "$given/corpus" ]; then
        skip prepare "GPT_TEST_DATA names no folder with gpt2_tokenizer/ and corpus/; SHARDS may name prepared ones"
        return 1
    fi
    part prepare 60 "$python" prepare_fineweb.py --out_dir "$data" --tokenizer "$tokenizer" --max_tokens "$tokens" \
        --num_proc "$workers" --local_files "$given/corpus/train/*.parquet" --val_files "$given/corpus/val/*.parquet"
}

# training NAME SECONDS FLAGS...: a short run with its own schedule.
training() {
    part "$1" "$2" "$python" train.py --preset "$1" --checkpoint_dir "$out/runs" --data_dir "$data" "${shape[@]}" \
        --eval_interval 100 --hellaswag_interval 0 --sample_interval 0 --save_interval 0 "${@:3}"
}

part_a() {
    part facts 60 "$python" benchmarks/check_gpu.py facts --device "$device" "${tiny[@]}"
    part bits 90 "$python" benchmarks/check_gpu.py bits --device "$device" "${tiny[@]}"
    part train_16 120 "$python" benchmarks/bench_train.py --batch_size 16 --accumulation 1,4 --only ours,muon --profile \
        "${step[@]}"
    [ "$which" = --short ] || # everything is tiny there, and this is the same once more
        part train_64 90 "$python" benchmarks/bench_train.py --batch_size 64 --only ours,muon "${step[@]}"
    if shards; then
        training fast-124m 120
        training gpt2-124m 120
        part resume 120 "$python" benchmarks/check_gpu.py resume --device "$device" --data_dir "$data" "${tiny[@]}"
        if [ ! -f "$hellaswag" ]; then
            skip hellaswag "GPT_TEST_DATA names no folder with hellaswag/hellaswag_val.jsonl"
        else
            part hellaswag 60 "$python" hellaswag_eval.py --checkpoint "$out/runs/fast-124m" --data "$hellaswag" \
                --device "$device" "${examples[@]}"
        fi
    fi
}

part_b() {
    part train 100 "$python" benchmarks/bench_train.py --batch_size 16 "${step[@]}" "${peers[@]}"
    part loss 60 "$python" benchmarks/bench_train.py --loss --batch_size 16 "${step[@]}"
    part generate 60 "$python" benchmarks/bench_generate.py --new_tokens 256 --device "$device" "${tiny[@]}"
    part save 40 "$python" benchmarks/bench_parts.py saving --repeats 3 --device "$device" "${tiny[@]}"
    [ "$which" = --short ] ||
        part train_32 60 "$python" benchmarks/bench_train.py --batch_size 32 --only ours "${step[@]}"
    part checkpointed 60 "$python" benchmarks/bench_train.py --batch_size 32 --only ours --grad_checkpoint "${step[@]}"
    part data 40 "$python" benchmarks/bench_parts.py data --device cpu "${tiny[@]}"
}

say "gpu.sh $which, $(date -u '+%Y-%m-%d %H:%M') UTC, commit $(git rev-parse --short HEAD 2>/dev/null)"
command -v nvidia-smi >/dev/null &&
    say "$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader)"
[ "$which" != B ] && part_a
[ "$which" != A ] && part_b
say ""
say "$SECONDS seconds in all; logs are in $out"
exit "$failed"
