#!/bin/bash
# checks/gpu.sh: what only a real GPU can tell: are the kernels right there, and how fast are they?
# Needs nvcc, a C++ compiler and, for proof, doctest; no network.
#
#     checks/gpu.sh              is it right, and how fast: the parts first, proof and speed
#     checks/gpu.sh PART...      these parts:
#         first     a minute that tells most: every precision trains, GPT-2 steps, what cuBLASLt refuses
#         proof     all CUDA tests, compute-sanitizer; GPT-2 trains, saves, resumes, samples
#         speed     GPT-2 124M at B=64, or as many as fit: tokens a second, memory, every kernel; two runs are equal
#         gpt2      2,000 steps of GPT-2 124M, ours and PyTorch's
#         sizes     B=8, B=1, 350M, 774M, tf32 and fp32; SIZES="b1 774m": these only
#         curves    the default run beside the CPU's and PyTorch's; two runs are equal bit for bit
#     checks/gpu.sh dry [PART]   no GPU: the same steps at toy sizes, with the kernels run by the CPU
#
# A call ends within LIMIT seconds (590). A step that fails or finds no time left gets a row that
# says so, and the next one goes on. $OUT (default out/gpu) gets table.txt, row by row, and log.txt,
# the output of all steps. PYTHON names a Python with torch; PEER, a script that times PyTorch's
# GPT-2 and prints "tok_s": N. Without them there is nothing beside ours.
set -u
cd "$(dirname "$0")/.." || exit 1
dry=
[ "${1:-}" = dry ] && dry=yes && shift
parts=${*:-first proof speed} bf16=bf16 reduced="bf16 tf32"
for part in $parts; do
    case $part in
        first | proof | speed | gpt2 | sizes | curves) ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
OUT=${OUT:-out/gpu} LIMIT=${LIMIT:-590} SIZES=${SIZES:-b8 b1 350m 774m b8-tf32 b8-fp32}
PYTHON=${PYTHON:-python3} PEER=${PEER:-}
work=out/gpu-work
rm -rf "$work" && mkdir -p "$OUT" "$work" && : > "$OUT/table.txt" && : > "$OUT/log.txt" || exit 1

# ---- Rows and steps ------------------------------------------------------------------------------
# row WHAT FOUND VERDICT
row() { printf '%-44s %-50s %s\n' "$@" | tee -a "$OUT/table.txt"; }
# judge WHAT FOUND RELATION WANTED UNIT: RELATION is >= or <=. dry wants any figure.
judge() {
    local verdict="MISSED, wanted $3 $4"
    [ -n "$2" ] && awk "BEGIN { exit !($2 $3 $4) }" && verdict=ok
    [ -n "$2" ] && [ -n "$dry" ] && verdict=dry
    row "$1" "${2:-no figure} $5" "$verdict"
}
# attempt NAME SECONDS COMMAND...: its output goes to $work/NAME.log and into the log. A row says
# if it failed, or had no time.
attempt() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) status
    shift 2
    [ "$left" -ge 5 ] || { row "$name" "no time was left" SKIPPED; return 1; }
    [ "$limit" -le "$left" ] || limit=$left
    timeout -k 5 "$limit" "$@" > "$work/$name.log" 2>&1
    status=$?
    { echo "==== $name: $* (status $status)"; tail -c 150000 "$work/$name.log"; } >> "$OUT/log.txt"
    case $status in
        0) return 0 ;;
        124) row "$name" "stopped after $limit s" FAILED ;;
        *) row "$name" "$(complaint "$name")" FAILED ;;
    esac
    return 1
}
complaint() { grep -m1 -iE 'error|failed|fatal' "$work/$1.log" | cut -c1-100; }
quiet=(--sample-interval 0 --eval-batches 0 --log-interval 0)
# train PROGRAM NAME SECONDS OPTION...: a run into $work/NAME.
train() {
    local program=$1 name=$2 limit=$3
    shift 3
    attempt "train-$name" "$limit" "$program" --output "$work/$name" "${quiet[@]}" "$@"
}
# score NAME FOLDER OPTION...: the validation loss of a model; "" where there is none.
score() {
    attempt "eval-$1" 60 $cu eval --init-from "$2" --precision fp32 --eval-batches 0 "${@:3}" > /dev/null
    awk '/^val loss/ { print $3 }' "$work/eval-$1.log" 2> /dev/null
}
# apart A B: by how many percent.
apart() {
    awk -v a="$1" -v b="$2" 'BEGIN { if (a && b) { d = 100 * (b / a - 1); printf "%.3f", d < 0 ? -d : d } }'
}
# difference A B STEPS: the largest of two runs' training losses.
difference() {
    awk -F, -v n="$3" 'FNR == 1 { file++; next } file == 1 { loss[$1] = $4 }
        file == 2 && $1 > 0 && $1 <= n { d = loss[$1] - $4; if (d < 0) d = -d; if (d > most) most = d; seen++ }
        END { if (seen) printf "%.2g", most }' "$work/$1/log.csv" "$work/$2/log.csv" 2> /dev/null
}
# last_of NAME COLUMN: of a run's log, the last value that is there.
last_of() { awk -F, -v c="$2" '$c != "" { last = $c } END { print last }' "$work/$1/log.csv" 2> /dev/null; }
# equal WHAT A B: whether two files are the same.
equal() {
    if cmp -s "$2" "$3"; then row "$1" equal ok; else row "$1" "they differ" MISSED; fi
}
torch_is_here() { "$PYTHON" -c 'import torch' > /dev/null 2>&1; }

# ---- Sizes and build -----------------------------------------------------------------------------
stories=(--data data/stories) shard=data/stories/train_000001.bin
shards=(--train-shards 'data/stories/train_*.bin' --val-shards 'data/stories/val_*.bin')
if [ -n "$dry" ]; then
    cu=./train_gpt_cu_on_cpu device=cpu shard=data/reference/gpt2-tied/batch.bin
    steps=4 skip=1 seq=16 batch=2 small=2 long=12
    stories=(--train-shards "$shard" --val-shards "$shard") shards=("${stories[@]}")
    tiny=(--vocab-size 1024 --n-layer 1 --n-head 2 --n-embd 16 --n-positions 16)
    gpt2=("${tiny[@]}" --seq-len 16)
    default=("${tiny[@]}" --seq-len 16 --batch-size 2 --max-steps 6)
else
    cu=./train_gpt_cu device=cuda steps=40 skip=10 seq=1024 small=8 long=2000
    gpt2=(--model gpt2 --vocab-size 50257 --seq-len 1024) default=()
    # 64 sequences of GPT-2 take 30 GB. Before 8.0 there is neither bf16 nor tf32.
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | head -1)
    batch=$(awk -v mib="$memory" 'BEGIN { b = int((mib - 3000) / 4000) * 8; print b < 8 ? 8 : b > 64 ? 64 : b }')
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | grep -q '^[5-7]' && bf16=fp32 reduced=
fi
# nvcc finds cuBLASLt, or it lies where the Toolkit or PyTorch has put it. ("stubs" are for linking.)
find_cublaslt() {
    printf '#include <cublasLt.h>\nint main() { return cublasLtGetVersion() == 0; }\n' > "$work/probe.cu"
    nvcc "$work/probe.cu" -o "$work/probe" -lcublasLt > "$work/probe.log" 2>&1 &&
        "$work/probe" >> "$work/probe.log" 2>&1 && return
    local lib header
    lib=$(find / -name 'libcublasLt.so*' -not -path '/proc/*' -not -path '*/stubs/*' 2> /dev/null | sort | tail -1)
    header=$(find / -name cublasLt.h -not -path '/proc/*' -not -path '*/cuda_on_cpu/*' 2> /dev/null | sort | tail -1)
    if [ -z "$lib" ] || [ -z "$header" ]; then
        row cuBLASLt "$(tail -1 "$work/probe.log" | cut -c1-100)" FAILED
        return
    fi
    mkdir -p "$work/lib" && ln -sf "$lib" "$work/lib/libcublasLt.so"
    export LIBRARY_PATH=$PWD/$work/lib:${LIBRARY_PATH:-}
    export LD_LIBRARY_PATH=${lib%/*}:${LD_LIBRARY_PATH:-} CPATH=${header%/*}
}
build() {
    local targets=(train_gpt_cu prepare_data)
    [ -z "$dry" ] || { attempt build "$LIMIT" make train_gpt train_gpt_cu_on_cpu prepare_data; return; }
    command -v nvcc > /dev/null || PATH=$PATH:/usr/local/cuda/bin
    find_cublaslt
    [[ $parts == *curves* ]] && targets+=(train_gpt)
    [[ $parts == *proof* ]] && targets+=(build/test_gpt_cu)
    attempt build 400 make -j8 "${targets[@]}"
}

# ---- first: does it run at all? ------------------------------------------------------------------
# The library's own log of one step of GPT-2, and of it what it refused.
refusals() {
    CUBLASLT_LOG_LEVEL=5 CUBLASLT_LOG_FILE=$PWD/$work/cublaslt.log train $cu refused 60 "${gpt2[@]}" "${shards[@]}" \
        --batch-size "$small" --max-steps 2 --eval-interval 0 --save-interval 0 || return
    grep -iE 'error|warning|not.supported' "$work/cublaslt.log" 2> /dev/null | cut -c1-300 > "$OUT/cublaslt.txt"
    row "cuBLASLt's log of refusals" "$(wc -l < "$OUT/cublaslt.txt") lines: $OUT/cublaslt.txt" ""
}
first() {
    local precision
    for precision in fp32 $reduced; do
        train $cu "first-$precision" 60 "${stories[@]}" "${default[@]}" --precision "$precision" --max-steps 20 &&
            row "the default model, $precision: 20 steps" "loss $(last_of "first-$precision" 4)" ok
    done
    train $cu first-gpt2 60 "${gpt2[@]}" "${shards[@]}" --batch-size "$small" --max-steps 3 --eval-interval 0 \
        --save-interval 0 && row "GPT-2: 3 steps" "loss $(last_of first-gpt2 4)" ok
    grep -h 'wgmma differ' "$work"/train-first-*.log | while read -r line; do row wgmma "$line" FAILED; done
    refusals
}

# ---- proof: is it right? -------------------------------------------------------------------------
# sanitize TOOL PRECISION. racecheck and synccheck look at our kernels only: the library's
# synchronise in ways that such tools call errors. GOMP_SPINCOUNT: the program does not restart
# itself, which such tools may lose.
sanitize() {
    local ours=()
    [[ $1 == racecheck || $1 == synccheck ]] && ours=(--kernel-name kns=tinygpt)
    attempt "$1-$2" 150 env GOMP_SPINCOUNT=10000 compute-sanitizer --tool "$1" "${ours[@]}" \
        --error-exitcode 9 $cu "${stories[@]}" --n-layer 2 --n-head 2 --n-embd 128 --n-positions 64 \
        --batch-size 4 --precision "$2" --max-steps 3 --eval-interval 0 "${quiet[@]}" \
        --output "$work/$1-$2" && row "compute-sanitizer $1, $2" "$(tail -1 "$work/$1-$2.log")" ok
}
proof() {
    if [ -z "$dry" ] && command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            for precision in fp32 ${reduced:+bf16}; do sanitize $tool $precision; done &
        done
    else
        row compute-sanitizer "not here" SKIPPED
    fi
    if [ -z "$dry" ] && attempt tests 280 build/test_gpt_cu; then
        row "CUDA checks, fp32, tf32, bf16" "$(grep 'test cases' "$work/tests.log" | cut -c10-60)" ok
    fi
    local gpt2=("${gpt2[@]}" "${shards[@]}" --batch-size "$small" --save-interval 2 --eval-interval 0)
    train $cu gpt2 120 "${gpt2[@]}" --max-steps 2 &&
        train $cu gpt2 120 "${gpt2[@]}" --max-steps 4 --resume auto --override &&
        attempt sample-gpt2 60 $cu sample --init-from "$work/gpt2/checkpoint-4" --prompt "1 2" --max-new-tokens 8 &&
        row "GPT-2: train, save, resume, sample" "loss $(last_of gpt2 4) at step 4" ok
    wait
}

# ---- speed and sizes: is it fast? ----------------------------------------------------------------
# ours NAME PRECISION BATCH OPTION...: trains until $steps steps are logged, then is stopped, because
# saving is not measured. Sets $rate, the median of tokens a second after $skip steps, and $peak, MiB.
ours() {
    local name=$1 end=$((SECONDS + 90)) pid used rows=0
    rate='' peak=0
    [ $((LIMIT - SECONDS)) -ge 5 ] || { row "$name: B=$3, $2" "no time was left" SKIPPED; return; }
    [ $end -le "$LIMIT" ] || end=$LIMIT
    $cu "${gpt2[@]}" "${shards[@]}" --precision "$2" --batch-size "$3" "${quiet[@]}" --eval-interval 0 \
        --save-interval 0 --max-steps 1000000 --warmup-steps 10 --output "$work/$name" "${@:4}" \
        > "$work/$name.log" 2>&1 &
    pid=$!
    while kill -0 $pid 2> /dev/null && [ "$rows" -le $steps ] && [ $SECONDS -lt "$end" ]; do
        sleep 0.3
        rows=$(wc -l 2> /dev/null < "$work/$name/log.csv" || echo 0)
        used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2> /dev/null | head -1)
        [ "${used:-0}" -gt "$peak" ] && peak=$used
    done
    kill -9 $pid 2> /dev/null
    wait $pid 2> /dev/null
    { echo "==== $name: $*"; cat "$work/$name.log"; } >> "$OUT/log.txt"
    rate=$(awk -F, -v skip=$skip '$1 > skip && $11 != "" { print $11 }' "$work/$name/log.csv" 2> /dev/null |
        sort -g | awk '{ v[NR] = $1 } END { if (NR) printf "%.0f", v[int((NR + 1) / 2)] }')
    if [ -n "$rate" ]; then
        row "$name: B=$3, $2" "$rate tokens/s, peak memory $peak MiB, MFU $(last_of "$name" 12)" ""
    else
        row "$name: B=$3, $2" "$(complaint "$name")" FAILED
    fi
}
# theirs NAME PRECISION BATCH OPTION...: the best of the peer's variants, beside the $rate of ours.
theirs() {
    local best
    if [ ! -f "$PEER" ] || ! torch_is_here; then
        row "$1: beside PyTorch" "there is no PEER, or no torch" SKIPPED
        return
    fi
    attempt "torch-$1" 170 "$PYTHON" "$PEER" --device $device --dtype "$2" --batch "$3" --seq $seq \
        --steps 10 "${@:4}" || return
    best=$(grep -oE '"tok_s": [0-9.]+' "$work/torch-$1.log" | sort -k2g | tail -1 | cut -d' ' -f2)
    row "$1: beside PyTorch" "${best:-?} tokens/s; ours over it $(awk -v a="$rate" -v b="$best" \
        'BEGIN { if (a && b) printf "%.2f", a / b }')" ""
}
# percent ROW: what a row of bench reached of the peak that binds it.
percent() {
    awk -v name="$1" 'index($0, name) == 1 && substr($0, length(name) + 1) ~ /^( \([^)]*\))?  / {
        for (i = 1; i <= NF; ++i) if ($i == "%") { print $(i - 1); exit } }' "$work/bench.log" 2> /dev/null
}
losses() { cut -d, -f1,4,10 "$work/$1/log.csv" | head -$steps; }
speed() {
    local name
    ours untuned $bf16 "$batch"
    ours speed $bf16 "$batch" --tune-matmul
    if [ -n "$rate" ]; then
        ours again $bf16 "$batch" --tune-matmul
        equal "two runs: losses and norms" <(losses speed) <(losses again)
    fi
    theirs speed $bf16 "$batch" --sweep
    attempt bench 120 $cu bench "${gpt2[@]}" --precision $bf16 --batch-size "$batch" --tune-matmul
    row "bench: peaks" "$(grep -m1 '^measured peaks' "$work/bench.log" | cut -c19-)" ""
    for name in "linear c_attn" "linear attn.c_proj" "linear c_fc" "linear mlp.c_proj" "head, both ways" \
        attention "d attention"; do
        row "bench: $name" "$(percent "$name") % of the peak" ""
    done
    for name in layernorm "d layernorm" "gradient norm" adamw; do
        judge "bench: $name" "$(percent "$name")" '>=' 90 "% of a copy's GB/s"
    done
    row "bench: a step" "$(grep -m1 '^sum of the above' "$work/bench.log" | cut -c19-)" ""
}
sizes() {
    local one shape
    for one in $SIZES; do
        shape=()
        case $one in
            b8) set -- bf16 8 ;;
            b1) set -- bf16 1 ;;
            b8-tf32) set -- tf32 8 ;;
            b8-fp32) set -- fp32 8 ;;
            350m) set -- bf16 32 --model gpt2-medium; shape=(--layers 24 --heads 16 --channels 1024) ;;
            774m) set -- bf16 16 --model gpt2-large; shape=(--layers 36 --heads 20 --channels 1280) ;;
            *) row "$one" "no such size" FAILED; continue ;;
        esac
        [ -n "$dry" ] && set -- fp32 1
        ours "$one" "$@" --tune-matmul
        theirs "$one" "$1" "$2" "${shape[@]}" --compile
    done
}

# ---- gpt2 and curves: does it learn the same? ----------------------------------------------------
# beside_torch NAME PRECISION BATCH SEQ RATE WARMUP OPTION...: $long steps from the same weights on the
# same batches, ours and PyTorch's, both scored by ours.
beside_torch() {
    torch_is_here || { row "$1: loss beside PyTorch's" "there is no torch" SKIPPED; return; }
    local name=$1 options=("${@:7}" "${stories[@]}" --shuffle 0 --eval-interval 0 --max-steps "$long")
    options+=(--batch-size "$3" --seq-len "$4" --learning-rate "$5" --warmup-steps "$6")
    local init=$work/$name-init/checkpoint-1 a b
    train $cu "$name-init" 60 "${options[@]}" --precision fp32 --max-steps 1 --learning-rate 0 || return
    train $cu "$name-ours" 120 "${options[@]}" --precision "$2" --init-from "$init" || return
    attempt "$name-torch" 200 "$PYTHON" checks/torch_curve.py --weights "$init" --device $device --dtype "$2" \
        --batch "$3" --seq "$4" --lr "$5" --warmup "$6" --shard $shard --steps $long \
        --log "$OUT/$name-torch.csv" --save "$work/$name-torch" || return
    cp "$work/$name-ours/log.csv" "$OUT/$name-ours.csv"
    a=$(score "$name-ours" "$work/$name-ours/checkpoint-$long" "${stories[@]}" --seq-len "$4")
    b=$(score "$name-torch" "$work/$name-torch" "${stories[@]}" --seq-len "$4")
    judge "$name, $2: val loss ${a:-?}, PyTorch's ${b:-?}" "$(apart "$a" "$b")" '<=' 1 "% apart"
    rm -rf "$work/$name-"{init,ours,torch}
}
gpt2() {
    local precision=$bf16
    [ -z "$dry" ] || precision=fp32
    beside_torch gpt2 $precision $small $seq 6e-4 100 "${gpt2[@]}"
}
curves() {
    local precision
    train ./train_gpt cpu 240 "${stories[@]}" "${default[@]}" --precision fp32
    for precision in fp32 bf16; do
        train $cu $precision 60 "${stories[@]}" "${default[@]}" --precision $precision || continue
        [ $precision = bf16 ] ||
            judge "CPU and GPU, fp32: loss, 50 steps" "$(difference cpu fp32 50)" '<=' 1e-3 "nats apart"
        judge "CPU and GPU, $precision: val loss at the end" \
            "$(apart "$(last_of cpu 6)" "$(last_of $precision 6)")" '<=' 1 "% apart"
        beside_torch "default-$precision" $precision $small $((seq < 128 ? seq : 128)) 3e-3 50 "${default[@]}"
    done
    train $cu bf16-again 60 "${stories[@]}" "${default[@]}" --precision bf16
    equal "two bf16 runs: weights" "$work"/{bf16,bf16-again}/checkpoint-"$(last_of bf16 1)"/model.safetensors
}

row machine "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -1)" ""
row compiler "$(nvcc --version 2> /dev/null | tail -1)" ""
row source "$(git log -1 --format='%h %cs' 2> /dev/null) $(date -u +%FT%TZ)" ""
if build; then
    # Why subshells: a mistake in a part must not end the others.
    for part in $parts; do (rate='' && $part; true) || row "$part" "checks/gpu.sh is wrong" FAILED; done
fi
row "all of it" "$SECONDS s" ""
! grep -qE ' (FAILED|MISSED.*)$' "$OUT/table.txt"
