#!/bin/bash
# checks/gpu.sh: everything that wants a real GPU, in one call of less than ten minutes, on a bare
# machine without a network: an H100 or H200, nvcc, a C++ compiler, and doctest (installed, or in the
# folder DOCTEST_DIR). With PyTorch there and its script named by PEER (torch_gpt2.py), it is measured
# beside. Prints a table of what was asked for and what came; logs lie in $OUT (default out/gpu).
#
#     checks/gpu.sh            all of it
#     checks/gpu.sh check      without the measurements of speed
#     checks/gpu.sh measure    without the checks
set -u
cd "$(dirname "$0")/.." || exit 1
what=${1:-all}
logs=${OUT:-out/gpu}
peer=${PEER:-../shared/peers/torch_gpt2.py}
export DOCTEST_DIR=${DOCTEST_DIR:-}
mkdir -p "$logs"
rm -rf out/gpu-runs
: > "$logs/table"
began=$SECONDS

# row NAME RESULT: a line of the table.
row() {
    printf '%-46s %s\n' "$1" "$2" | tee -a "$logs/table"
}
# attempt NAME SECONDS COMMAND...: runs it with a limit of time; its output is a log of that name.
attempt() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$logs/$name.log" 2>&1
    local status=$?
    case $status in
    0) row "$name" "ok, $((SECONDS - start)) s" ;;
    124) row "$name" "TOO SLOW: stopped after $limit s" ;;
    *) row "$name" "FAILED with status $status: $(grep -m1 -iE 'error|failed' "$logs/$name.log" | cut -c1-90)" ;;
    esac
    return $status
}

row machine "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
row compiler "$(nvcc --version | tail -1)"
row source "$(git log -1 --format='%h %cs' 2> /dev/null || echo 'no git') $(date -u +%FT%TZ)"

# ---- Build: everything at once, then the table of registers -------------------------------------
attempt build 240 make -j8 CUDA_ARCHS=90a train_gpt train_gpt_cu prepare_data build/test_gpt_cu || exit 1

# ---- Is it right? -------------------------------------------------------------------------------
tiny=(--n-layer 2 --n-head 2 --n-embd 128 --seq-len 64 --n-positions 64 --batch-size 4 --sample-interval 0)
# train PROGRAM NAME OPTION...: a run into out/gpu-runs/NAME.
train() {
    local program=$1 name=$2 limit=$3
    shift 3
    attempt "train-$name" "$limit" "./$program" --output "out/gpu-runs/$name" --sample-interval 0 "$@"
}
# Largest difference of two runs' training losses over the first N steps; and of their last val losses.
curves() {
    awk -F, -v n="$3" -v a="$1" -v b="$2" '
        FNR == 1 { file++; next }
        file == 1 { loss[$1] = $4; if ($6 != "") val = $6 }
        file == 2 { if ($1 <= n && $4 != "") { d = loss[$1] - $4; if (d < 0) d = -d; if (d > most) most = d }
                    if ($6 != "") other = $6 }
        END { printf "loss differs by %.2g at most in %d steps, val loss by %.2f %% at the end", most, n,
              100 * (other / val - 1) }' "out/gpu-runs/$1/log.csv" "out/gpu-runs/$2/log.csv"
}
check() {
    train train_gpt cpu 150 --precision fp32 &
    attempt tests 150 build/test_gpt_cu
    wait
    for precision in fp32 tf32 bf16; do
        train train_gpt_cu "$precision" 60 --precision $precision
        row "  CPU against GPU, $precision" "$(curves cpu $precision 50)"
    done
    train train_gpt_cu again 60 --precision bf16
    cmp -s out/gpu-runs/bf16/best/model.safetensors out/gpu-runs/again/best/model.safetensors &&
        row "  two bf16 runs" "equal bit for bit" || row "  two bf16 runs" "DIFFER"

    # GPT-2's size, on any tokens; then it goes on from where it stopped.
    local gpt2=(--model gpt2 --vocab-size 50257 --batch-size 16 --seq-len 1024 --train-shards 'data/stories/train_*.bin'
                --val-shards 'data/stories/val_*.bin' --save-interval 10 --eval-interval 10 --eval-batches 1)
    train train_gpt_cu gpt2 90 "${gpt2[@]}" --max-steps 10
    train train_gpt_cu gpt2 90 "${gpt2[@]}" --max-steps 20 --resume auto --override
    attempt sample-gpt2 30 ./train_gpt_cu sample --init-from out/gpu-runs/gpt2/best --prompt "" --max-new-tokens 20

    for tool in memcheck racecheck initcheck synccheck; do
        for precision in fp32 bf16; do
            attempt "$tool-$precision" 60 compute-sanitizer --tool $tool --error-exitcode 9 ./train_gpt_cu "${tiny[@]}" \
                --precision $precision --max-steps 2 --eval-interval 0 --eval-batches 0 --output "out/gpu-runs/$tool-$precision"
        done
    done
}

# ---- Is it fast? --------------------------------------------------------------------------------
# speed NAME PRECISION BATCH OPTION...: the bench of that size; the table gets its last line.
speed() {
    local name=$1 precision=$2 batch=$3
    shift 3
    attempt "bench-$name" 60 ./train_gpt_cu bench --precision "$precision" --batch-size "$batch" --seq-len 1024 "$@"
    row "  $name" "$(grep 'whole step' "$logs/bench-$name.log" | tail -1)"
}
# torch NAME OPTION...: the peer; the table gets its best variant.
torch() {
    local name=$1
    shift
    [ -f "$peer" ] || return
    attempt "torch-$name" 150 python3 "$peer" --device cuda --seq 1024 --steps 20 "$@"
    grep -h '"tok' "$logs/torch-$name.log" | while read -r line; do row "  torch $name" "$line"; done
}
measure() {
    speed b64-bf16 bf16 64 --model gpt2 --vocab-size 50257
    torch b64-bf16 --dtype bf16 --batch 64 --sweep
    speed b8-bf16 bf16 8 --model gpt2 --vocab-size 50257
    speed b1-bf16 bf16 1 --model gpt2 --vocab-size 50257
    speed 350m-bf16 bf16 32 --model gpt2-medium --vocab-size 50257
    speed b8-tf32 tf32 8 --model gpt2 --vocab-size 50257
    speed b8-fp32 fp32 8 --model gpt2 --vocab-size 50257
    [ -f "$peer" ] && attempt ceilings 60 python3 "$peer" --device cuda --ceilings
    torch b8-bf16 --dtype bf16 --batch 8 --compile
    torch b8-tf32 --dtype tf32 --batch 8 --compile
}

[ "$what" = measure ] || check
[ "$what" = check ] || measure
row "all of it" "$((SECONDS - began)) s"
echo
cat "$logs/table"
! grep -qE 'FAILED|DIFFER|TOO SLOW' "$logs/table"
