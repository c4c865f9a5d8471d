#!/usr/bin/env bash
# One run, whatever the number of ranks: the same bytes for 1, 2, 4 and 8, and after every fault.
# make mpi_test. Needs Open MPI; about a minute. With CUDA_MPI=..., that program on the CPU, too.
set -eu
BUILD=$(readlink -f "$1") CUDA_MPI=${2:-} CUDA=${3:-}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_WAIT_POLICY=passive
export NO_COLOR=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT
failed=0
bad() { echo "FAILED: $*"; failed=1; }
mpi() { local n=$1; shift; timeout 120 mpirun --oversubscribe -np "$n" "$@"; }

# Data: unequal shards of this repository's own text.
for i in 1 2 3 4; do
    head -c $((i * i * 2900)) tinygpt.hpp | tail -c $((i * 2300)) > "$T/text$i"
    "$BUILD/prepare_data" --input "$T/text$i" --tokenizer byte --val-fraction 0 --output "$T/d$i" > "$T/log"
done
mkdir "$T/data" && cp "$T"/d4/{*.json,merges.txt} "$T/data/"
for i in 1 2 3; do cp "$T/d$i/train_000001.bin" "$T/data/train_00000$i.bin"; done
cp "$T/d4/train_000001.bin" "$T/data/val_000000.bin"

SMALL="--data $T/data --n-layer 2 --n-head 4 --n-embd 48 --n-positions 48 --batch-size 4 --grad-accum-steps 8
    --dropout 0.1 --eval-batches 3 --sample-interval 0 --warmup-steps 5 --keep 99 --patience 9 --threads 1"
SMALL=$(echo $SMALL)  # one line
A="$SMALL --max-steps 40 --eval-interval 20 --save-interval 20"

# The first ten columns of the log, the weights and the moments, and the best model where there is one.
same() { # name, other name, step, what was done
    cmp -s <(cut -d, -f1-10 "$T/$1/log.csv") <(cut -d, -f1-10 "$T/$2/log.csv") || bad "$4: log.csv differs"
    for f in checkpoint-$3/model checkpoint-$3/optimizer best/model; do
        [ $f = best/model ] && [ ! -e "$T/$1/best" ] && [ ! -e "$T/$2/best" ] ||
            cmp -s "$T/$1/$f.safetensors" "$T/$2/$f.safetensors" || bad "$4: $f differs"
    done
    echo "done: $4"
}
# Whether a program has failed with that status (x: any but 0), saying so in one line.
says() { # what, status, words, file
    [ "$2" = x ] && [ "$status" != 0 ] || [ "$2" = "$status" ] || bad "$1: exit status $status"
    [ "$(grep -c "error: .*$3" "$4")" = 1 ] || { bad "$1: no line, or several, with '$3':"; cat "$4"; }
    echo "done: $1"
}

"$BUILD/train_gpt" $A --output "$T/one" > "$T/log"
for n in 1 2 4 8; do mpi $n "$BUILD/train_gpt_mpi" $A --output "$T/n$n" > "$T/log" && same one n$n 40 "$n ranks"; done
mpi 2 "$BUILD/train_gpt_mpi" $A --threads 2 --output "$T/t2" > "$T/log" && same one t2 40 "2 ranks of 2 threads"

# Another number of ranks at every resume. A signal to one rank stops, and saves, all.
one_rank() { pgrep -f "^[^ ]*/train_gpt_mpi .*$T/$1( |\$)" | sed -n "$2p"; }
rows() { wc -l 2> /dev/null < "$T/$1/log.csv" || echo 0; }
until_row() { for _ in $(seq 3000); do [ "$(rows "$1")" -gt "$2" ] && return; sleep 0.01; done; }
row=8
for n in 8 1 4; do
    mpi $n "$BUILD/train_gpt_mpi" $A --output "$T/changing" --resume auto > "$T/log" & pid=$!
    until_row changing $row
    kill -USR1 "$(one_rank changing "$n")" || true
    status=0; wait $pid || status=$?
    [ $status = 130 ] || bad "stopped by a signal to a rank of $n: exit status $status"
    row=$((row + 8))
done
mpi 2 "$BUILD/train_gpt_mpi" $A --output "$T/changing" --resume auto > "$T/log"
same one changing 40 "8, 1, 4 and 2 ranks, by turns"

# Early stopping is decided on all ranks.
B="$SMALL --max-steps 40 --eval-interval 2 --save-interval 0 --learning-rate 0 --patience 2"
"$BUILD/train_gpt" $B --output "$T/early" > "$T/log" && mpi 4 "$BUILD/train_gpt_mpi" $B --output "$T/early4" > "$T/log"
same early early4 "$(ls "$T/early" | sed -n 's/checkpoint-//p')" "early stopping"

# eval is shared out too.
evaluated() { "$@" eval --init-from "$T/one/best" --data "$T/data" --batch-size 3 2>&1 | grep -v speed | tr -d '\r'; }
[ "$(evaluated "$BUILD/train_gpt")" = "$(evaluated mpi 4 "$BUILD/train_gpt_mpi")" ] || bad "eval differs"
echo "done: eval on 4 ranks"

# A rank that is killed, each in turn; the loop around goes on.
for rank in 1 2 3 4; do
    mpi 4 "$BUILD/train_gpt_mpi" $A --output "$T/killed" --save-interval 5 --resume auto > "$T/log" 2>&1 & pid=$!
    until_row killed $((rank * 7))
    kill -9 "$(one_rank killed $rank)" || true
    status=0; wait $pid || status=$?
    [ $status != 0 ] || bad "killed: exit status 0"
done
mpi 4 "$BUILD/train_gpt_mpi" $A --output "$T/killed" --save-interval 5 --resume auto > "$T/log"
same one killed 40 "killed four times"

# One that hangs: the others end, and name it.
TINYGPT_RANK_TIMEOUT=2 mpi 2 "$BUILD/train_gpt_mpi" $A --max-steps 4000 --output "$T/hangs" > "$T/log" 2>&1 & pid=$!
until_row hangs 5
kill -STOP "$(one_rank hangs 2)"
status=0; wait $pid || status=$?
says "a rank that hangs" x "rank [01] on .* has not answered for 2 seconds" "$T/log"

# mpirun is told to end.
mpi 2 "$BUILD/train_gpt_mpi" $A --max-steps 4000 --output "$T/term" > "$T/log" 2>&1 & pid=$!
until_row term 5
kill -TERM "$(pgrep -f "^mpirun .*--output $T/term\$")"
status=0; wait $pid || status=$?
step=$(ls "$T/term" | sed -n 's/checkpoint-//p' | sort -n | tail -1)
[ "$(rows term)" = $((${step:-0} + 2)) ] || bad "SIGTERM to mpirun: checkpoint $step, $(rows term) rows"
echo "done: SIGTERM to mpirun"

# Rank 1 has something else than rank 0.
other() { # what rank 1 runs, and its data
    mpi 2 bash -c '[ "$OMPI_COMM_WORLD_RANK" = 1 ] || exec '"$BUILD/train_gpt_mpi $A --output $T/other"'; exec '"$1 $2 --output $T/other" > "$T/log" 2>&1
}
cp -r "$T/data" "$T/data2" && cp "$T/d4/train_000001.bin" "$T/data2/train_000002.bin"
cp "$BUILD/train_gpt_mpi" "$T/version" && printf x >> "$T/version"
status=0; other "$BUILD/train_gpt_mpi" "$A --data $T/data2" || status=$?
says "another shard" 1 "rank 1 on .* has train: .* tokens" "$T/log"
status=0; other "$T/version" "$A" || status=$?
says "another program" 1 "rank 1 on .* has version" "$T/log"
status=0; other "$BUILD/train_gpt_mpi" "$A --dropout 0.2" || status=$?
says "another option" 1 "rank 1 on .* has --dropout 0.2" "$T/log"
[ ! -e "$T/other" ] || bad "a run was left behind by ranks that differ"
status=0; mpi 2 "$BUILD/train_gpt_mpi" $A --grad-accum-steps 3 --output "$T/other" > "$T/log" 2>&1 || status=$?
says "three micro-batches for two ranks" 2 "--grad-accum-steps 4 would do" "$T/log"

# A full disk at rank 0: the end of the run cannot be saved; with more room it goes on.
mkdir "$T/full"
if mount -t tmpfs -o size=600k tmpfs "$T/full" 2> /dev/null; then
    trap 'umount "$T/full"; rm -rf "$T"' EXIT
    F="$SMALL --max-steps 40 --eval-interval 20 --save-interval 0"
    status=0; mpi 2 "$BUILD/train_gpt_mpi" $F --output "$T/full/run" > "$T/log" 2>&1 || status=$?
    says "a full disk" 1 "could not be saved there" "$T/log"
    mount -o remount,size=20m "$T/full"
    mpi 2 "$BUILD/train_gpt_mpi" $F --output "$T/full/run" --resume auto > "$T/log" 2>&1 || true
    tail -1 "$T/log" | cut -c1-99
else
    echo "[skipped] a full disk: no tmpfs can be mounted here"
fi

# The CUDA program, on the CPU.
if [ -n "$CUDA_MPI" ]; then
    C="--data $T/data --n-layer 1 --n-head 2 --n-embd 32 --n-positions 16 --batch-size 1 --grad-accum-steps 4
        --max-steps 3 --eval-interval 0 --eval-batches 0 --save-interval 3 --sample-interval 0 --threads 1"
    export CUDA_ON_CPU_DEVICES=8
    for precision in fp32 bf16; do
        "$CUDA" $C --precision $precision --output "$T/c1$precision" > "$T/log"
        for n in 2 4; do
            mpi $n "$CUDA_MPI" $C --precision $precision --output "$T/c$n$precision" > "$T/log"
            same c1$precision c$n$precision 3 "CUDA on the CPU, $precision, $n ranks"
        done
    done
fi
exit $failed
