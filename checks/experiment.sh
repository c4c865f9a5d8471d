#!/bin/sh
# checks/experiment.sh NAME: the runs of one experiment, one after another, then a figure of them
# all and three lines on what to see.
#
#   make experiment NAME=rate          data/experiments/rate-*.conf, in the order of rate.txt
#   make experiment                    the list of experiments
# Runs lie in out/experiments/NAME/VARIANT, what they printed beside them in VARIANT.txt; the figure
# is out/experiments/NAME.png and .svg. ARGS="--max-steps 20" goes to every run.
set -u
name=${1:-}
args=${ARGS:-}
cd "$(dirname "$0")/.." || exit 1
recipes=data/experiments
give_up() {
    echo "error: $1" >&2
    exit "${2:-1}"
}
# What NAME.txt says about itself: its lines "# key: value".
about() {
    sed -n "s/^# $2: //p" "$recipes/$1.txt"
}
list() {
    for file in "$recipes"/*.txt; do
        each=$(basename "$file" .txt)
        printf '  %-12s %s\n' "$each" "$(about "$each" title)"
    done
}
if [ -z "$name" ]; then
    echo "which experiment? make experiment NAME=..."
    list
    exit 0
fi
case $name in
*[!a-z-]*) unknown=1 ;;
*) [ -f "$recipes/$name.txt" ] && unknown='' || unknown=1 ;;
esac
[ -z "$unknown" ] || {
    echo "error: there is no experiment \"$name\"; there are" >&2
    list >&2
    exit 2
}
for program in train_gpt prepare_data; do
    [ -x "./$program" ] || give_up "there is no ./$program: type make $program"
done

# ---- Data that one experiment alone needs -------------------------------------------------------
out=out/experiments
mkdir -p "$out" || exit 1
# data NAME OPTION...: tokenizes out/experiments/NAME.text, as bytes unless OPTION says otherwise.
data() {
    folder=data/$1 text=$out/$1.text
    shift
    ./prepare_data --input "$text" --output "$folder" "$@" > "$text.log" 2>&1 && return
    cat "$text.log" >&2
    give_up "could not prepare $folder"
}
case $name in
cat)
    printf 'The cat sat on the mat' > $out/cat.text
    data cat --tokenizer byte --val-fraction 0 ;;
small-data)
    # The beginning of the header: a text, but not much of one.
    head -c 30000 tinygpt.hpp > $out/small-data.text
    data small-data --vocab-size 512 --val-fraction 0.2 ;;
device)
    head -c 20000 tinygpt.hpp > $out/device.text
    data device --tokenizer byte --val-fraction 0.01 ;;
*)
    [ -f data/stories/dataset.json ] || ./prepare_data || exit 1 ;;
esac

# ---- Which runs, with which program -------------------------------------------------------------
note=
variants=$(about "$name" variants)
program_of() { echo ./train_gpt; }
conf_of() { echo "$recipes/$name-$1.conf"; }
label_of() { sed -n '1s/^# //p' "$(conf_of "$1")"; }
if [ "$name" = device ]; then
    if nvidia-smi -L 2> /dev/null | grep -q GPU; then
        make -s train_gpt_cu ||
            give_up "train_gpt_cu did not build: it needs the CUDA Toolkit (nvcc)"
        cuda=./train_gpt_cu size=gpu where="on the GPU"
    else
        make -s train_gpt_cu_on_cpu || give_up "train_gpt_cu_on_cpu did not build"
        cuda=./train_gpt_cu_on_cpu size=tiny where="on the CPU"
        note="There is no GPU here: its kernels ran on the CPU (train_gpt_cu_on_cpu), tiny sizes."
    fi
    program_of() { [ "$1" = cpu ] && echo ./train_gpt || echo "$cuda --precision ${1#cuda-}"; }
    conf_of() { echo "$recipes/device-$size.conf"; }
    label_of() {
        case $1 in
        cpu) echo "CPU, fp32" ;;
        *) echo "CUDA $where, ${1#cuda-}" ;;
        esac
    }
fi

# ---- The runs -----------------------------------------------------------------------------------
rm -rf "${out:?}/$name" "$out/$name.png" "$out/$name.svg"
mkdir -p "$out/$name" || exit 1
echo "$(about "$name" title)"
printf '%-38s %6s %8s %8s %8s %9s %8s\n' "" steps train val "best val" tokens/s seconds
done_runs='' labels=''
for variant in $variants; do
    run=$out/$name/$variant label=$(label_of "$variant")
    conf=$(conf_of "$variant")
    [ -f "$conf" ] || give_up "there is no $conf, which $recipes/$name.txt names"
    printf '%-38s ' "$label"
    began=$(date +%s)
    # shellcheck disable=SC2046,SC2086  # words on purpose
    $(program_of "$variant") --config "$conf" $args --output "$run" > "$run.txt" 2>&1
    status=$?
    [ $status != 130 ] || { echo "interrupted"; exit 130; }
    if [ $status != 0 ]; then
        why=$(grep '^error: ' "$run.txt" | tail -1)
        if [ "$name" = precision ] && [ "$variant" = bf16 ] && [ ! -s "$run/log.csv" ]; then
            echo "not on this machine"
            note="No bf16 here: the CPU has no bf16 dot products, or the build is not for it."
            continue
        fi
        [ -s "$run/log.csv" ] && [ "$(wc -l < "$run/log.csv")" -gt 2 ] ||
            { echo "failed"; give_up "${why#error: } (all it printed: $run.txt)"; }
        echo "ended early: ${why#error: }" | cut -c1-100
        printf '%-38s ' ""
    fi
    awk -F, -v wall=$(($(date +%s) - began)) '
        NR > 1 { n = $1 } NR > 1 && $4 != "" { loss[++k] = $4 }
        $6 != "" && NR > 1 { val = $6; if (best == "" || $6 + 0 < best) best = $6 + 0 }
        NR > 1 && $11 != "" { speed += $11; m++ }
        END { for (i = (k > 20 ? k - 19 : 1); i <= k; i++) { train += loss[i]; of++ }
              printf "%6d %8.4f %8s %8s %9.0f %8d\n", n, (of ? train / of : 0),
                     (val == "" ? "-" : sprintf("%.4f", val)),
                     (best == "" ? "-" : sprintf("%.4f", best)), (m ? speed / m : 0), wall }' \
        "$run/log.csv"
    done_runs="$done_runs $run"
    labels="$labels${labels:+|}$label"
done

# differences A B...: how far each of the runs B lies from run A.
differences() {
    first=$1/log.csv
    shift
    for run in "$@"; do
        awk -F, -v run="$(basename "$run")" '
            function abs(x) { return x < 0 ? -x : x }
            FNR == 1 { next }
            FNR == NR { if ($4 != "") loss[$1] = $4; if ($6 != "") val[$1] = $6; next }
            $1 in loss && $4 != "" && $1 <= 50 {
                d = abs($4 - loss[$1]); if (d > widest) { widest = d; at = $1 } }
            $1 in val && $6 != "" { d_val = abs($6 - val[$1]); last = $1 }
            END { printf "%s: train loss differs by at most %.3g in the first 50 steps", run, widest
                  if (at) printf " (step %d)", at
                  if (last) printf "; val loss after step %d by %.3g", last, d_val
                  print "" }' "$first" "$run/log.csv"
    done
}
# samples RUN: what it wrote at every tenth step, on its way.
samples() {
    awk -v letters="$(about "$name" letters)" '
        /^=== / && match($0, /step [0-9]+/) { step = substr($0, RSTART + 5, RLENGTH - 5); next }
        step % 10 == 0 && step + 0 > shown + 0 { printf "step %4d  %s\n", step, substr($0, 1, letters)
                                         shown = step + 0 }' "$1/samples.txt" |
        LC_ALL=C sed "s/[^ -~]/./g"
}
echo
[ "$(about "$name" samples)" = yes ] && samples "${done_runs# }" && echo
# shellcheck disable=SC2086  # words on purpose
[ "$(about "$name" differences)" = yes ] && differences $done_runs && echo
RUNS=$done_runs LABELS=$labels TITLE=$(about "$name" title) PANELS=$(about "$name" panels) \
    OUT=$out/$name checks/plot.sh
drawn=$?
[ -z "$note" ] || echo "$note"
echo
grep -v '^#' "$recipes/$name.txt"
exit $drawn
