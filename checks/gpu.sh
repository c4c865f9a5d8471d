#!/bin/bash
# checks/gpu.sh: everything that wants a real GPU, on a bare machine without a network: an H100 or
# H200, nvcc, a C++ compiler, doctest. With PyTorch there it is measured beside. Each call takes less
# than ten minutes (BUDGET seconds, 585): what no longer fits is named in the table, and another call
# with that part alone gets it. Every step has a limit of time and goes on after the failure of
# another. The table has what was asked for, what came, and a verdict, and grows as it goes.
#
#     checks/gpu.sh            every figure once: speed, gpt2 and sizes, shortened to fit into one call
#     checks/gpu.sh proof      is it right? all tests, the sanitizers, GPT-2 trains, resumes, samples
#     checks/gpu.sh speed      GPT-2 at B=64, every kernel, beside PyTorch and the card's ceilings
#     checks/gpu.sh gpt2       2,000 steps of GPT-2 124M, ours and PyTorch's, each twice
#     checks/gpu.sh sizes      B=8, B=1, 350M, 774M, tf32, fp32 beside PyTorch; SIZES="b1 774m": these
#     checks/gpu.sh curves     losses beside the CPU's and PyTorch's; two runs bit for bit
#     checks/gpu.sh pack       on a machine that has them: copies doctest, the peer and 20 million
#                              tokens of English (from TEXT, by ./prepare_data) into out/carry
#     checks/gpu.sh dry [...]  no GPU: the same steps at toy sizes, with the kernels run by the CPU
#
# $OUT (default out/gpu) gets table.txt, log.txt (all output of all steps), curves.csv, kernels.txt,
# peer.jsonl and the tuned plans. Doctest and the peer (torch_gpt2.py) are taken from out/carry,
# DOCTEST_DIR, PEER, the system, ../shared/peers. PYTHON names a Python with torch.
set -u
cd "$(dirname "$0")/.." || exit 1
dry=
[ "${1:-}" = dry ] && dry=yes && shift
parts=" ${*:-speed gpt2 sizes} " once=
[ $# = 0 ] && once=yes  # every figure once
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-585} SIZES=${SIZES:-b8 b1 350m 774m b8-tf32 b8-fp32}
work=out/gpu-work
began=$SECONDS
wants() { [[ "$parts" == *" $1 "* ]]; }

if wants pack; then
    mkdir -p out/carry
    cp -r "${DOCTEST_DIR:-/usr/include}/doctest" out/carry/ && cp "${PEER:-../shared/peers/torch_gpt2.py}" out/carry/ || exit
    # Without GPT-2's vocabulary the default corpus is trained on instead.
    [ -f data/gpt2/vocab.bpe ] && make -s prepare_data || exit 0
    find "${TEXT:-/usr/share/doc}" -type f \( -name '*.txt' -o -name copyright -o -name '*.html' -o -name '*.gz' \) -print0 | sort -z |
        xargs -0 zcat -f 2> /dev/null | tr -cd '\11\12\40-\176' | head -c 60000000 > out/carry/english.txt
    ./prepare_data --tokenizer gpt2 --input out/carry/english.txt --output out/carry/english --val-fraction 0.02
    status=$?
    rm -f out/carry/english.txt
    exit $status
fi
for part in $parts; do
    case $part in proof | speed | sizes | curves | gpt2) ;; *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
done
for place in "${PEER:-}" out/carry/torch_gpt2.py ../shared/peers/torch_gpt2.py; do
    [ -f "$place" ] && peer=$place && break
done
peer=${peer:-}
[ -d out/carry/doctest ] && export DOCTEST_DIR=${DOCTEST_DIR:-$PWD/out/carry}
rm -rf "$work" && mkdir -p "$OUT" "$work" || exit 1
for file in table.txt log.txt curves.csv peer.jsonl; do : > "$OUT/$file" || exit 1; done

# ---- Rows, judgements, attempts -----------------------------------------------------------------
# row WHAT ASKED FOUND VERDICT
row() { printf '%-42s %-22s %-44s %s\n' "$1" "$2" "$3" "$4" | tee -a "$OUT/table.txt"; }
# judge WHAT FOUND RELATION ASKED UNIT: RELATION is >= or <=
judge() {
    if [ -z "$2" ]; then row "$1" "$3 $4 $5" "no figure" MISSED; return; fi
    row "$1" "$3 $4 $5" "$2 $5" "$(awk "BEGIN { print ($2 $3 $4) ? \"ok\" : \"MISSED\" }")"
}
left() { echo $((BUDGET - SECONDS + began)); }
# attempt NAME SECONDS COMMAND...: its output goes to $work/NAME.log and into the log. Says so only
# where it failed.
attempt() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 3 ]; then row "$name" "" "no time was left" SKIPPED; return 1; fi
    timeout -k 5 "$limit" "$@" > "$work/$name.log" 2>&1
    status=$?
    {
        echo "==== $name: $*"
        echo "==== status $status after $((SECONDS - start)) s"
        tail -c 150000 "$work/$name.log"
    } >> "$OUT/log.txt"
    [ $status = 0 ] && return 0
    local why
    why=$(grep -m1 -iE 'error|failed|fatal' "$work/$name.log" | cut -c1-100)
    [ $status = 124 ] && why="stopped after $limit s"
    row "$name" "" "${why:-status $status}" FAILED
    return $status
}
have() { command -v "$1" > /dev/null 2>&1; }
torch_is_here() { [ -n "$peer" ] && "$PYTHON" -c 'import torch' > /dev/null 2>&1; }

# ---- Sizes ---------------------------------------------------------------------------------------
if [ -n "$dry" ]; then
    cu=./train_gpt_cu_on_cpu tests="build/nothing" steps=4 skip=1 seq=16 device=cpu curve_steps=12
    size=(--n-layer 1 --n-head 2 --n-embd 16 --n-positions 16 --vocab-size 1024)
    default_run=("${size[@]}" --seq-len 16 --batch-size 2 --max-steps 6 --eval-interval 0)
    torch_size=(--layers 1 --heads 2 --channels 16 --vocab 1024 --steps 2 --warmup 1)
else
    cu=./train_gpt_cu tests=build/test_gpt_cu steps=60 skip=10 seq=1024 device=cuda curve_steps=2000
    size=(--vocab-size 50257)
    default_run=()
    torch_size=(--steps 20)
fi
few=$steps  # steps where fewer than for the headline will do
[ -z "$once" ] || [ -n "$dry" ] || few=30 torch_size=(--steps 10)
stories=(--data data/stories)
shards=(--train-shards 'data/stories/train_*.bin')
quiet=(--sample-interval 0 --eval-batches 0 --log-interval 0)

# ---- Build ---------------------------------------------------------------------------------------
# Where nvcc, or a program of its, does not find cuBLASLt, the Toolkit has it elsewhere, or PyTorch
# brought one along. (What lies in a folder "stubs" is good for linking only.)
find_cublaslt() {
    printf '#include <cublasLt.h>\nint main() { return cublasLtGetVersion() == 0; }\n' > "$work/probe.cu"
    nvcc "$work/probe.cu" -o "$work/probe" -lcublasLt > "$work/probe.log" 2>&1 && "$work/probe" >> "$work/probe.log" 2>&1 && return
    local lib header
    lib=$(find / -name 'libcublasLt.so*' -not -path '/proc/*' -not -path '*/stubs/*' 2> /dev/null | sort | tail -1)
    header=$(find / -name cublasLt.h -not -path '/proc/*' -not -path '*/cuda_on_cpu/*' 2> /dev/null | sort | tail -1)
    [ -n "$lib" ] && [ -n "$header" ] || { row "cuBLASLt" "" "$(tail -1 "$work/probe.log" | cut -c1-100)" FAILED; return; }
    mkdir -p "$work/lib" && ln -sf "$lib" "$work/lib/libcublasLt.so"
    export LIBRARY_PATH=$PWD/$work/lib:${LIBRARY_PATH:-}
    LD_LIBRARY_PATH=$(dirname "$lib"):${LD_LIBRARY_PATH:-}
    export LD_LIBRARY_PATH
    CPATH=$(dirname "$header")
    export CPATH
}
build() {
    if [ -n "$dry" ]; then
        attempt build "$BUDGET" make train_gpt train_gpt_cu_on_cpu prepare_data
        return
    fi
    have nvcc || PATH=$PATH:/usr/local/cuda/bin
    find_cublaslt
    local targets=(train_gpt_cu prepare_data)
    wants curves && targets+=(train_gpt)
    wants proof && targets+=(build/test_gpt_cu)
    attempt build 300 make -j8 "${targets[@]}"  # for the GPU that is here: 9.0 becomes sm_90a
}

# ---- Is it right? --------------------------------------------------------------------------------
# train PROGRAM NAME SECONDS OPTION...: a run into $work/NAME.
train() {
    local program=$1 name=$2 limit=$3
    shift 3
    attempt "train-$name" "$limit" "$program" --output "$work/$name" "${quiet[@]}" "$@"
}
# column NAME COLUMN: of a run's log.csv, the last value that is there.
last_of() { awk -F, -v c="$2" '$c != "" { last = $c } END { print last }' "$work/$1/log.csv" 2> /dev/null; }
# difference A B STEPS: the largest of two runs' training losses.
difference() {
    awk -F, -v n="$3" 'FNR == 1 { file++; next } file == 1 { loss[$1] = $4 }
        file == 2 && $1 > 0 && $1 <= n && $4 != "" { d = loss[$1] - $4; if (d < 0) d = -d; if (d > most) most = d; seen++ }
        END { if (seen) printf "%.2g", most }' "$work/$1/log.csv" "$work/$2/log.csv" 2> /dev/null
}
apart() { awk -v a="$1" -v b="$2" 'BEGIN { if (a && b) { d = 100 * (b / a - 1); printf "%.3f", d < 0 ? -d : d } }'; }

# The two that look at how a block's threads meet look at our kernels only: the library's synchronise
# in ways of their own, which such tools have called errors before. GOMP_SPINCOUNT: without it the
# program starts itself again, which tools of this kind may lose.
sanitize() { # TOOL PRECISION
    local ours=()
    [[ $1 == racecheck || $1 == synccheck ]] && ours=(--kernel-name kns=tinygpt)
    attempt "$1-$2" 150 env GOMP_SPINCOUNT=10000 compute-sanitizer --tool "$1" "${ours[@]}" --error-exitcode 9 $cu "${stories[@]}" --n-layer 2 --n-head 2 \
        --n-embd 128 --seq-len 64 --n-positions 64 --batch-size 4 "${quiet[@]}" --precision "$2" --max-steps 3 \
        --eval-interval 0 --output "$work/$1-$2" && row "compute-sanitizer $1, $2" clean "$(tail -1 "$work/$1-$2.log")" ok
}
check_curves() {
    train ./train_gpt cpu 240 "${stories[@]}" "${default_run[@]}" --precision fp32
    for precision in fp32 tf32 bf16; do
        train $cu "$precision" 60 "${stories[@]}" "${default_run[@]}" --precision $precision || continue
        [ $precision = tf32 ] && continue
        local most=0.5
        [ $precision = bf16 ] && most=1
        [ $precision = fp32 ] &&
            judge "CPU and GPU, $precision: loss, 50 steps" "$(difference cpu $precision 50)" '<=' 1e-3 nats
        [ -z "$dry" ] &&
            judge "CPU and GPU, $precision: val loss at the end" "$(apart "$(last_of cpu 6)" "$(last_of $precision 6)")" '<=' $most %
    done
    train $cu again 60 "${stories[@]}" "${default_run[@]}" --precision bf16
    local last
    last=checkpoint-$(last_of bf16 1)
    if cmp -s "$work/bf16/$last/model.safetensors" "$work/again/$last/model.safetensors"; then
        row "two bf16 runs" "equal bit for bit" equal ok
    else
        row "two bf16 runs" "equal bit for bit" "they differ" MISSED
    fi
}
# GPT-2's size trains, evaluates, saves, resumes, samples.
check_gpt2() {
    local gpt2=(--model gpt2 "${size[@]}" --batch-size 16 --seq-len "$seq" "${shards[@]}" --val-shards 'data/stories/val_*.bin'
                --save-interval 10 --eval-interval 10)
    [ -n "$dry" ] && gpt2=("${size[@]}" --batch-size 2 --seq-len 16 "${shards[@]}" --save-interval 2 --eval-interval 0)
    local first=10 second=20 name
    [ -n "$dry" ] && first=2 second=4
    train $cu gpt2 120 "${gpt2[@]}" --max-steps $first || return
    train $cu gpt2 120 "${gpt2[@]}" --max-steps $second --resume auto --override || return
    name=$work/gpt2/checkpoint-$second
    attempt sample-gpt2 60 $cu sample --init-from "$name" --prompt "1 2 3" --max-new-tokens 8 &&
        row "GPT-2, B=16: train, save, resume, sample" "works" "loss $(last_of gpt2 4) at step $second" ok
    rm -rf "$work/gpt2"
}
# The same initial weights and the same batches, by PyTorch: is it equal work?
check_equal_work() {
    torch_is_here || { row "loss after $curve_steps steps against PyTorch" "" "there is no PyTorch here" SKIPPED; return; }
    local options=("${stories[@]}" --shuffle 0 --learning-rate 3e-3 --warmup-steps 50)
    local shape=(--batch 8 --seq 128) own=()
    [ -n "$dry" ] && own=(--n-layer 1 --n-head 2 --n-embd 16 --n-positions 16 --seq-len 16 --batch-size 2) shape=(--batch 2 --seq 16)
    [ -n "$dry" ] || own=(--seq-len 128 --batch-size 8)
    train $cu init 60 "${options[@]}" "${own[@]}" --precision fp32 --max-steps 1 --learning-rate 0 --eval-interval 0 || return
    for precision in fp32 bf16; do
        train $cu "equal-$precision" 90 "${options[@]}" --init-from "$work/init/checkpoint-1" --seq-len "${shape[3]}" \
            --batch-size "${shape[1]}" --precision $precision --max-steps $curve_steps --eval-interval 0 || continue
        attempt "torch-equal-$precision" 120 "$PYTHON" checks/torch_curve.py --weights "$work/init/checkpoint-1" --device $device \
            --dtype $precision --shard data/stories/train_000001.bin "${shape[@]}" --steps $curve_steps \
            --log "$work/torch-$precision.csv" --save "$work/torch-$precision" || continue
        for who in "equal-$precision/checkpoint-$curve_steps" "torch-$precision"; do
            attempt "eval-$(dirname "$who/x" | tr / -)" 60 $cu eval "${stories[@]}" --init-from "$work/$who" --precision fp32 \
                --seq-len "${shape[3]}" --eval-batches 0
        done
        local a b
        a=$(awk '/^val loss/ { print $3 }' "$work/eval-equal-$precision-checkpoint-$curve_steps.log" 2> /dev/null)
        b=$(awk '/^val loss/ { print $3 }' "$work/eval-torch-$precision.log" 2> /dev/null)
        row "val loss after $curve_steps steps, $precision" "equal within noise" "ours ${a:-?}, PyTorch ${b:-?}" \
            "$(awk -v d="$(apart "$a" "$b")" 'BEGIN { print d == "" ? "MISSED" : d <= 1 ? "ok" : "MISSED" }')"
        paste -d, <(cut -d, -f1,4 "$work/equal-$precision/log.csv" | tail -n +3) \
            <(cut -d, -f2 "$work/torch-$precision.csv" | tail -n +2) | sed "s/^/$precision,/" >> "$OUT/curves.csv"
    done
}
# The same at GPT-2's size: ours with fixed and with tuned plans, PyTorch's twice (its backward adds
# in any order). How far the two of each lie apart is what a difference has to be measured by.
check_gpt2_curve() {
    torch_is_here || { row "GPT-2: loss after $curve_steps steps against PyTorch" "" "there is no PyTorch here" SKIPPED; return; }
    local from=out/carry/english shape=(--batch 8 --seq 1024) rate=6e-4
    [ -f $from/train_000001.bin ] || from=data/stories
    local own=(--model gpt2) precision=bf16
    [ -n "$dry" ] && shape=(--batch 2 --seq 16) own=() precision=fp32 from=data/stories
    local options=(--data "$from" "${own[@]}" "${size[@]}" --seq-len "${shape[3]}" --batch-size "${shape[1]}" --shuffle 0
        --learning-rate "$rate" --warmup-steps 100 --eval-interval 0)
    train $cu gpt2-init 60 "${options[@]}" --precision fp32 --max-steps 1 --learning-rate 0 || return
    local init=$work/gpt2-init/checkpoint-1 losses=() one folder who="ours ours-tuned torch torch-again"
    [ -z "$once" ] || who="ours-tuned torch"
    for one in $who; do
        case $one in
            ours*)
                folder=$work/gpt2-$one/checkpoint-$curve_steps
                local plans=()
                [ -n "$dry" ] || [ $one = ours ] || plans=(--tune-matmul)
                train $cu "gpt2-$one" 120 "${options[@]}" --init-from "$init" --precision $precision --max-steps "$curve_steps" "${plans[@]}"
                ;;
            torch*)
                folder=$work/gpt2-$one
                attempt "gpt2-$one" 200 "$PYTHON" checks/torch_curve.py --weights "$init" --device $device --dtype $precision \
                    --shard $from/train_000001.bin "${shape[@]}" --steps "$curve_steps" --lr $rate --warmup 100 \
                    --log "$work/gpt2-$one.csv" --save "$folder"
                ;;
        esac || { losses+=(""); continue; }
        attempt "gpt2-eval-$one" 60 $cu eval --data $from --init-from "$folder" --precision fp32 --seq-len "${shape[3]}" \
            --batch-size "${shape[1]}" --eval-batches 0
        losses+=("$(awk '/^val loss/ { print $3 }' "$work/gpt2-eval-$one.log" 2> /dev/null)")
        [[ $one = ours* ]] && cp "$work/gpt2-$one/log.csv" "$OUT/gpt2-ours.csv"
        [ $one = torch ] && cp "$work/gpt2-torch.csv" "$OUT/gpt2-torch.csv"
        rm -rf "${folder:?}"
    done
    # Once each: the noise is not known, and 0.005 nats stand for it.
    [ -z "$once" ] || losses=("${losses[0]}" "${losses[0]}" "${losses[1]}" "${losses[1]}")
    row "GPT-2 B=${shape[1]} T=${shape[3]}, val loss, step $curve_steps" "equal within noise" "ours ${losses[0]:-?} ${losses[1]:-?}, PyTorch ${losses[2]:-?} ${losses[3]:-?}" \
        "$(awk -v a="${losses[0]:-}" -v b="${losses[1]:-}" -v c="${losses[2]:-}" -v d="${losses[3]:-}" 'function abs(x) { return x < 0 ? -x : x }
            BEGIN {
                if (a == "" || b == "" || c == "" || d == "") { print "MISSED"; exit }
                noise = abs(a - b) + abs(c - d)
                print abs(a + b - c - d) / 2 <= (noise > 0.005 ? noise : 0.005) ? "ok" : "MISSED"
            }')"
}
proof() {
    # The sanitizers take their time beside the rest: nothing is timed here.
    local tools=()
    if [ -z "$dry" ] && have compute-sanitizer; then
        for tool in memcheck racecheck initcheck synccheck; do
            { sanitize $tool fp32; sanitize $tool bf16; } &
            tools+=($!)
        done
    else
        row compute-sanitizer clean "not here" SKIPPED
    fi
    [ -z "$dry" ] && attempt tests 280 $tests &&
        row "CUDA checks, fp32, tf32, bf16" "all pass" "$(grep 'test cases' "$work/tests.log" | cut -c10-60)" ok
    check_gpt2
    [ ${#tools[@]} = 0 ] || wait "${tools[@]}"
}
curves() {
    check_curves
    check_equal_work
}

# ---- Is it fast? ---------------------------------------------------------------------------------
# ours NAME PRECISION BATCH OPTION...: trains until $steps steps are logged, then is stopped, because
# saving is not measured. Sets $rate, the median of tokens a second after $skip steps, and $peak.
ours() {
    local name=$1 precision=$2 batch=$3 limit start=$SECONDS pid rows=0 used
    shift 3
    rate='' peak=0
    limit=$(left)
    [ "$limit" -le 90 ] || limit=90
    if [ "$limit" -lt 8 ]; then row "$name" "" "no time was left" SKIPPED; return; fi
    $cu "${shards[@]}" "${size[@]}" --precision "$precision" --batch-size "$batch" --seq-len $seq "${quiet[@]}" --eval-interval 0 \
        --save-interval 0 --max-steps 1000000 --warmup-steps 10 --output "$work/$name" "$@" > "$work/$name.log" 2>&1 &
    pid=$!
    while kill -0 $pid 2> /dev/null && [ "$rows" -le "$steps" ] && [ $((SECONDS - start)) -lt "$limit" ]; do
        sleep 0.3
        rows=$(wc -l 2> /dev/null < "$work/$name/log.csv" || echo 0)
        used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2> /dev/null | head -1)
        [ "${used:-0}" -gt "$peak" ] && peak=$used
    done
    kill -9 $pid 2> /dev/null
    wait $pid 2> /dev/null
    rate=$(awk -F, -v skip=$skip '$1 > skip && $11 != "" { print $11 }' "$work/$name/log.csv" 2> /dev/null | sort -g |
        awk '{ v[NR] = $1 } END { if (NR) printf "%.0f", v[int((NR + 1) / 2)] }')
    { echo "==== $name: $precision, B=$batch $*: ${rate:-no} tokens/s, peak $peak MiB"; cat "$work/$name.log"; } >> "$OUT/log.txt"
    if [ -z "$rate" ]; then
        peak=0
        row "$name" "" "$(grep -m1 -i error "$work/$name.log" | cut -c1-100)" FAILED
    fi
    cp "$work/$name/log.csv" "$work/$name.csv" 2> /dev/null
    rm -rf "${work:?}/$name"
}
# theirs NAME DTYPE BATCH OPTION...: the peer; sets $best, the most tokens a second of its variants.
theirs() {
    local name=$1 dtype=$2 batch=$3
    shift 3
    best=''
    torch_is_here || return
    attempt "torch-$name" 170 "$PYTHON" "$peer" --device $device --dtype "$dtype" --batch "$batch" --seq $seq "${torch_size[@]}" "$@"
    best=$(grep -oE '"tok_s": [0-9.]+' "$work/torch-$name.log" 2> /dev/null | awk '{ if ($2 > m) m = $2 } END { if (m) printf "%.0f", m }')
    grep -h '^{' "$work/torch-$name.log" 2> /dev/null >> "$OUT/peer.jsonl"
}
# against NAME TIMES: what ours gave beside theirs.
against() {
    local times
    times=$(awk -v a="$rate" -v b="$best" 'BEGIN { if (a && b) printf "%.2f", a / b }')
    row "$1: tokens/s" "" "ours ${rate:-?}, PyTorch ${best:-?}" "$([ -n "$best" ] || echo SKIPPED)"
    [ -z "$best" ] || judge "$1: ours over PyTorch's best" "$times" '>=' "$2" times
}
# What the peer compiles is kept in a cache: that is filled while other things are built, as far as it
# goes. Nothing runs beside what is timed.
warm_peer() {
    torch_is_here || return
    local all=()
    wants speed && all+=("bf16 64")
    for one in $SIZES; do wants sizes && all+=("$(peer_size "$one")"); done
    # Two at a time: more would not fit into the GPU's memory.
    for half in 0 1; do
        for ((i = half; i < ${#all[@]}; i += 2)); do
            [ -f "$work/built" ] && break
            # shellcheck disable=SC2086  # words on purpose
            set -- ${all[i]}
            timeout 100 "$PYTHON" "$peer" --device cuda --dtype "$1" --batch "$2" --seq $seq --steps 1 --warmup 1 --compile "${@:3}"
        done > "$work/warm-$half.log" 2>&1 &
    done
    wait
}
# percent of a row of bench: percent NAME
percent() { awk -v name="$1" 'index($0, name) == 1 { for (i = 1; i <= NF; ++i) if ($i == "%") { print $(i - 1); exit } }' "$work/bench-b64.log" 2> /dev/null; }
# gflops ROW [PART]: a row's rate; without the time of its part, another row
gflops() {
    awk -v name="$1" -v part="${2:-none}" '
        index($0, name) == 1 && !rate { split(substr($0, 36), f, " "); time = f[2]; rate = f[3] }
        index($0, part) == 1 && !less { split(substr($0, 36), f, " "); less = f[2] }
        END { if (rate && time > less) printf "%.1f", rate * time / (time - less) }' "$work/bench-b64.log" 2> /dev/null
}
# matmul BENCH-ROW CEILING [PART]: the row's rate over the ceiling for the same shape
matmul() {
    local mine theirs
    mine=$(gflops "$1" "${3:-}")
    theirs=$(grep -F "\"ceiling\": \"$2\"" "$work/ceilings.log" 2> /dev/null | grep -oE '"TFLOP_s": [0-9.]+' | awk '{ print $2 }')
    if [ -z "$theirs" ]; then row "$1 over '$2'" ">= 95 % of the ceiling" "ours ${mine:-?} GFLOP/s, no ceiling" SKIPPED; return; fi
    judge "$1 over '$2'" "$(awk -v a="$mine" -v b="$theirs" 'BEGIN { if (a && b) printf "%.1f", a / 10 / b }')" '>=' 95 '% of the ceiling'
}
# same A B: are losses and norms of two runs the same in all steps that both have?
same() {
    paste -d, <(cut -d, -f1,4,10 "$work/$1.csv" 2> /dev/null) <(cut -d, -f1,4,10 "$work/$2.csv" 2> /dev/null) |
        awk -F, 'NR > 1 && $1 != "" && $4 != "" { seen++; if ($1 != $4 || $2 != $5 || $3 != $6) { print "step " $1 " differs"; bad = 1; exit } }
            END { if (!bad) print (seen > 3 ? "equal in " seen " steps" : "no figure") }'
}
headline() {
    local batch=64 tuned asked=560000 equal
    [ -n "$dry" ] && batch=2
    nvidia-smi -L 2> /dev/null | grep -q H200 && asked=588000
    [ -n "$once" ] || ours b64-fixed-plans bf16 $batch --model gpt2
    [ -n "$once" ] || row "B=64, fixed plans: tokens/s" "" "${rate:-?}" ""
    ours b64 bf16 $batch --model gpt2 --tune-matmul
    tuned=$rate
    cp data/matmul-plans.txt "$OUT/" 2> /dev/null
    judge "B=64 T=1024 bf16: tokens/s" "$tuned" '>=' $asked tokens/s
    judge "B=64: peak memory" "$(awk -v m="$peak" 'BEGIN { if (m > 0) printf "%.1f", m * 1048576 / 1e9 }')" '<=' 32 GB
    row "B=64: memory said before the run" "" "$(awk '$1 == "memory" { print $2, $3; exit }' "$work/b64.log" | tr -d :)" ""
    steps=$few ours b64-again bf16 $batch --model gpt2 --tune-matmul
    equal=$(same b64 b64-again)
    row "B=64: two runs, losses and norms" "equal to the digit" "$equal" "$([[ $equal == equal* ]] && echo ok || echo MISSED)"
    rate=$tuned
}
# PyTorch's eager and compiled, with each attention, against the rate that headline left.
against_headline() {
    theirs b64 bf16 "$([ -n "$dry" ] && echo 2 || echo 64)" --sweep
    against "B=64 T=1024 bf16" 1.2
}
layers() {
    local batch=64
    [ -n "$dry" ] && batch=2
    torch_is_here && [ -z "$dry" ] && attempt ceilings 60 "$PYTHON" "$peer" --device cuda --batch 64 --seq 1024 --ceilings
    attempt bench-b64 120 $cu bench --model gpt2 "${size[@]}" --precision bf16 --batch-size $batch --seq-len $seq --tune-matmul
    row "bench, measured peaks" "" "$(grep -m1 '^measured peaks' "$work/bench-b64.log" | cut -c19-)" ""
    matmul "linear c_attn" qkv
    matmul "linear attn.c_proj" "attn proj"
    matmul "linear c_fc, gelu" fc
    matmul "linear mlp.c_proj" "mlp proj"
    matmul "head, both ways" head "  softmax"
    row "attention, as tuned" "" "$(grep -oE '^(d )?attention \([a-z.]+\)' "$work/bench-b64.log" | head -2 | paste -sd, -)" ""
    judge "attention forward" "$(gflops "attention " | awk '{ printf "%.0f", $1 / 1000 }')" '>=' 229 TFLOP/s
    judge "attention backward" "$(gflops "d attention" | awk '{ printf "%.0f", $1 / 1000 }')" '>=' 170 TFLOP/s
    judge "layernorm forward" "$(percent "layernorm")" '>=' 90 '% of a copy'
    judge "layernorm backward" "$(percent "d layernorm")" '>=' 90 '% of a copy'
    judge "classifier" "$(percent "  softmax")" '>=' 90 '% of a copy'
    judge "adamw" "$(percent "adamw")" '>=' 90 '% of a copy'
    row "bench, sum against step" "" "$(grep -m1 '^sum of the above' "$work/bench-b64.log" | cut -c19-)" ""
}
# Every kernel by name, from the hardware's counters: one step, before it is recorded.
kernels() {
    [ -z "$once" ] || return 0
    if [ -z "$dry" ] && have ncu; then
        attempt kernels 90 env GOMP_SPINCOUNT=10000 ncu --clock-control none --print-units base --csv --log-file "$work/kernels.csv" --metrics gpu__time_duration.sum,dram__bytes.sum $cu "${shards[@]}" "${size[@]}" \
            --model gpt2 --precision bf16 --batch-size 64 --seq-len 1024 "${quiet[@]}" --eval-interval 0 --max-steps 1 \
            --output "$work/ncu" --tune-matmul
        rm -rf "$work/ncu"
        "$PYTHON" - "$work/kernels.csv" > "$OUT/kernels.txt" 2>> "$OUT/log.txt" << 'PY'
import csv, re, sys, collections
lines = [l for l in open(sys.argv[1], errors="replace") if l.startswith('"')]
time, size, calls = collections.Counter(), collections.Counter(), collections.Counter()
scale = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "usecond": 1e-6, "nsecond": 1e-9}
for r in csv.DictReader(lines):
    name = re.sub(r"\(.*", "", r["Kernel Name"])[:60]
    value = float(r["Metric Value"].replace(",", "")) * scale.get(r["Metric Unit"], 1)
    if r["Metric Name"].startswith("gpu__time"):
        time[name] += value; calls[name] += 1
    else:
        size[name] += value
print("%-60s %6s %10s %10s" % ("kernel", "calls", "ms", "GB/s"))
for name, t in time.most_common():
    print("%-60s %6d %10.3f %10.0f" % (name, calls[name], t * 1e3, size[name] / t / 1e9 if t else 0))
print("%-60s %6d %10.3f" % ("all", sum(calls.values()), sum(time.values()) * 1e3))
PY
    else
        row "each kernel's time (ncu)" "" "not here" SKIPPED
    fi
}
# The peer's options for a size.
peer_size() {
    case $1 in
        b8) echo bf16 8 ;; b1) echo bf16 1 ;; b8-tf32) echo tf32 8 ;; b8-fp32) echo fp32 8 ;;
        350m) echo bf16 32 --layers 24 --heads 16 --channels 1024 ;;
        774m) echo bf16 16 --layers 36 --heads 20 --channels 1280 ;;
    esac
}
sizes() {
    for one in $SIZES; do
        local model=gpt2
        [ "$one" = 350m ] && model="gpt2-medium"
        [ "$one" = 774m ] && model="gpt2-large"
        # shellcheck disable=SC2046  # words on purpose
        set -- $(peer_size "$one")
        if [ $# = 0 ]; then row "$one" "" "no such size: b8 b1 350m 774m b8-tf32 b8-fp32" FAILED; continue; fi
        if [ -n "$dry" ]; then
            [ "$one" = b1 ] || continue
            ours "$one" fp32 1
            theirs "$one" fp32 1
        else
            steps=$few ours "$one" "$1" "$2" --model $model --tune-matmul
            theirs "$one" "$1" "$2" --compile "${@:3}"
        fi
        against "$one, $1 B=$2 T=1024" 1
    done
}

# ---- All of it -----------------------------------------------------------------------------------
row machine "" "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -1)" ""
row compiler "" "$(nvcc --version 2> /dev/null | tail -1)" ""
row source "" "$(git log -1 --format='%h %cs' 2> /dev/null || echo 'no git') $(date -u +%FT%TZ)" ""
[ -n "$dry" ] || { warm_peer & warm=$!; }
if build; then
    touch "$work/built"
    [ -f data/stories/dataset.json ] || attempt corpus 120 ./prepare_data
    wants proof && proof
    [ -z "${warm:-}" ] || wait "$warm"
    wants speed && { headline; layers; against_headline; kernels; }
    wants gpt2 && check_gpt2_curve
    wants sizes && sizes
    wants curves && curves
fi
kill "${warm:-}" 2> /dev/null
row "lines of code in train_gpt.cu" "<= about 1800" "$(make -s count 2> /dev/null | grep -m1 train_gpt.cu | grep -oE '[0-9]+ lines of code')" ""
row "all of it" "<= 600 s" "$((SECONDS - began)) s" ""
printf '\n'
cat "$OUT/table.txt"
! grep -qE ' (FAILED|MISSED)$' "$OUT/table.txt"
