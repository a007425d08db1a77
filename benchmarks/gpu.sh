#!/usr/bin/env bash
# What is worth knowing of a machine with a big GPU, most valuable first, in two parts of 9 and 3.5 minutes.
#
# Step 1, where the data or the network is (needs requirements.txt):
#
#   bash benchmarks/gpu.sh pack       makes benchmarks/out/packed, 58 MB: shards of 25M training tokens and of the
#                                     validation text with their tokenizer, and HellaSwag, compressed
#
# Step 2, on the machine with the GPU: copy the repository there together with benchmarks/out/packed. That machine needs
# no network, and of the packages only torch, numpy, tokenizers, safetensors and matplotlib; transformers is timed too
# where it is installed.
#
#   bash benchmarks/gpu.sh A          correctness, our speed, a short run, the same bits, exact resume, HellaSwag
#   bash benchmarks/gpu.sh B          others beside ours, sampling, saving, memory
#
# To see on a CPU whether all of it runs, with tiny models, in a few minutes, with or without the packed folder:
#
#   bash benchmarks/gpu.sh --short
#
# A folder after the first word takes the place of benchmarks/out/packed. Paths are relative to the repository.
#
# For all of them:
# PYTHON   the interpreter (default: python3)
# OUT      folder of the results, a few small files: tables.txt, stderr.txt and the metrics of the two runs
#          (default: benchmarks/out)
# WORK     folder of what is large: compiled code, checkpoints. B finds there what A has compiled
#          (default: benchmarks/out/work)
# LIMIT    seconds for all of it (default: 540 for A, 210 for B, 900 for --short); what does not fit is left out, with a line
# For pack:
# GPT_TEST_DATA  folder with gpt2_tokenizer/, corpus/{train,val}/*.parquet and hellaswag/hellaswag_val.jsonl, which are
#                packed instead of what would be downloaded
# NANOGPT        a checkout of nanoGPT, whose model.py is packed and then timed beside ours
#
# Every row is printed, and written to $OUT/tables.txt, the moment it is known. A part that fails, or lacks what it needs,
# costs its rows and one line. Exit code 1 if a part failed.
set -u
cd "$(dirname "$0")/.."
which="${1:-}"
packed="${2:-benchmarks/out/packed}"
python="${PYTHON:-python3}"

# pack: makes the folder of all that A and B read. 380 steps of 65,536 tokens are 24.9M.
pack() {
    local given="${GPT_TEST_DATA:-}" source=(--val_share 0.04) hellaswag=hellaswag/hellaswag_val.jsonl
    if [ -n "$given" ]; then
        source=(--tokenizer "$given/gpt2_tokenizer" --local_files "$given/corpus/train/*.parquet"
            --val_files "$given/corpus/val/*.parquet")
        hellaswag="$given/hellaswag/hellaswag_val.jsonl"
    fi
    mkdir -p "$packed" || return
    "$python" prepare_fineweb.py --out_dir "$packed/shards" --max_tokens 24950000 "${source[@]}" || return
    [ -n "$given" ] ||
        "$python" -c "import sys, hellaswag_eval as h; sys.exit(h.run(lambda: h.download_examples(h.CACHE)))" || return
    gzip -9 -c "$hellaswag" >"$packed/hellaswag_val.jsonl.gz" || return
    if [ -n "${NANOGPT:-}" ]; then
        mkdir -p "$packed/nanogpt" && cp "$NANOGPT/model.py" "$packed/nanogpt/" || return
    fi
    echo "$packed: $(($(find "$packed" -type f -exec cat {} + | wc -c) / 1000000)) MB, for gpu.sh A and B"
}

case "$which" in
A) limit="${LIMIT:-540}" ;;
B) limit="${LIMIT:-210}" ;;
--short) limit="${LIMIT:-900}" ;;
pack)
    pack
    exit
    ;;
*)
    echo "usage: bash benchmarks/gpu.sh pack | A | B | --short [FOLDER]; the comment at its top says how to begin" >&2
    exit 2
    ;;
esac
out="${OUT:-benchmarks/out}"
work="${WORK:-benchmarks/out/work}"
mkdir -p "$out" "$work" || exit 2
work="$(cd "$work" && pwd)"
compiled="$work/compiled"
case "$compiled" in # the compiler for CPUs fails in a folder with a space in its name (seen with torch 2.11)
*" "*) compiled="${TMPDIR:-/tmp}/gpu_sh_compiled_$UID" ;;
esac
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR="$compiled"
device=cuda
[ "$which" = --short ] && device=cpu
if [ "$which" != B ]; then
    rm -f "$out"/{tables,stderr}.txt "$out"/{fast,gpt2}-124m.jsonl
    rm -rf "$work/runs" # a run that is there would be finished already
fi
failed=0

say() { echo "$1" | tee -a "$out/tables.txt"; }

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
    # a run that is stopped saves a checkpoint of 1.5 GB first
    timeout --kill-after=10 "$((most < left ? most : left))" "$@" 2>>"$out/stderr.txt" | tee -a "$out/tables.txt"
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

"$python" -c "import sys, torch; sys.exit(3 * ('$device' == 'cuda' and not torch.cuda.is_available()))" 2>/dev/null
case $? in
0) ;;
3)
    echo "gpu.sh: error: torch sees no CUDA device here; --short runs on a CPU" >&2
    exit 2
    ;;
*)
    echo "gpu.sh: error: $python has no torch; name another interpreter with PYTHON=" >&2
    exit 2
    ;;
esac
if [ "$which" = --short ]; then
    tiny=(--tiny)
    step=(--device cpu --tiny)
    shape=(--n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --batch_size 2 --total_batch_tokens 256 --max_steps 8
        --val_tokens 1024 --device cpu --dtype float32)
    examples=(--limit 8)
else
    tiny=()
    step=(--device cuda --compile)
    shape=(--max_steps 380 --val_tokens 1048576)
    examples=()
fi
data="$packed/shards"
peers=()
[ -f "$packed/nanogpt/model.py" ] && peers=(--nanogpt "$packed/nanogpt")

# bench NAME SECONDS FLAGS...: a table of training steps.
bench() { part "$1" "$2" "$python" benchmarks/bench_train.py "${step[@]}" "${@:3}"; }

# check WHAT SECONDS FLAGS...: a part of check_gpu.py.
check() { part "$1" "$2" "$python" benchmarks/check_gpu.py "$1" --device "$device" "${tiny[@]}" "${@:3}"; }

# training NAME SECONDS: a short run with its own schedule.
training() {
    part "$1" "$2" "$python" train.py --preset "$1" --checkpoint_dir "$work/runs" --data_dir "$data" "${shape[@]}" \
        --eval_interval 100 --hellaswag_interval 0 --sample_interval 0 --save_interval 0
    cp "$work/runs/$1/metrics.jsonl" "$out/$1.jsonl" 2>/dev/null
}

hellaswag() {
    if ! gunzip -c "$packed/hellaswag_val.jsonl.gz" >"$work/hellaswag_val.jsonl"; then
        say "hellaswag: left out, there is no $packed/hellaswag_val.jsonl.gz"
        return
    fi
    part hellaswag 80 "$python" hellaswag_eval.py --checkpoint "$work/runs/fast-124m" --device "$device" \
        --data "$work/hellaswag_val.jsonl" "${examples[@]}"
}

# The limits of time are about twice what is expected. Parts with the same shapes find each other's compiled code: facts,
# train_16 and fast-124m; the two halves of bits with gpt2-124m and with resume.
part_a() {
    local have=yes
    if [ ! -f "$data/manifest.json" ]; then
        have=
        say "no shards in $data, see 'gpu.sh pack': fast-124m, resume, hellaswag and gpt2-124m are left out"
    fi
    check facts 100
    bench train_16 120 --rounds 3 --batch_size 16 --accumulation 1,4 --only ours,muon --profile
    [ "$which" = --short ] || # everything is tiny there, and this is the same once more
        bench train_64 110 --rounds 2 --batch_size 64 --only ours,muon
    [ "$have" ] && training fast-124m 140
    check bits 100
    [ "$have" ] && check resume 130 --data_dir "$data"
    [ "$have" ] && hellaswag
    [ "$have" ] && training gpt2-124m "$limit" # what is left
}

part_b() {
    bench train 120 --rounds 2 --batch_size 16 --only ours,transformers,nanogpt "${peers[@]}"
    part generate 45 "$python" benchmarks/bench_generate.py --new_tokens 256 --batches 1 --repeats 2 --device "$device" \
        "${tiny[@]}"
    part save 40 "$python" benchmarks/bench_parts.py saving --repeats 2 --device "$device" "${tiny[@]}"
    [ "$which" = --short ] || bench train_32 60 --rounds 1 --batch_size 32 --only ours
    # not compiled, as the second row of train_32: the memory of the two is what is asked
    part checkpointed 40 "$python" benchmarks/bench_train.py --rounds 1 --batch_size 32 --only ours --grad_checkpoint \
        --device "$device" "${tiny[@]}"
    bench loss 40 --loss --rounds 2 --batch_size 16
    [ "$which" = --short ] && # it says nothing of a GPU
        part data 40 "$python" benchmarks/bench_parts.py data --device cpu "${tiny[@]}"
}

say "gpu.sh $which, $(date -u '+%Y-%m-%d %H:%M') UTC, commit $(git rev-parse --short HEAD 2>/dev/null)"
command -v nvidia-smi >/dev/null &&
    say "$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader)"
[ "$which" != B ] && part_a
[ "$which" != A ] && part_b
say ""
say "$SECONDS seconds in all; results are in $out"
exit "$failed"
