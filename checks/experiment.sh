#!/bin/sh
# checks/experiment.sh NAME: the runs of one experiment, one after another, then a figure of them
# all and three lines on what to see.
#
#   make experiment NAME=rate          data/experiments/rate-*.conf, in the order of rate.txt
#   make experiment                    the list of experiments
# Runs lie in out/experiments/NAME/VARIANT, what they printed beside them in VARIANT.txt; the figure
# is out/experiments/NAME.png and .svg. ARGS="--max-steps 20" goes to every run.
set -u
cd "$(dirname "$0")/.." || exit 1
name=${1:-} recipes=data/experiments out=out/experiments note=
give_up() {
    echo "error: $1" >&2
    exit 1
}
# What an experiment says about itself: the lines "# key: value" of its .txt.
about() { sed -n "s/^# $1: //p" "$recipes/${2:-$name}.txt"; }
if [ -z "$name" ] || [ ! -f "$recipes/$name.txt" ]; then
    [ -z "$name" ] || exec >&2
    [ -z "$name" ] && echo "which experiment? make experiment NAME=..." ||
        echo "error: there is no experiment \"$name\"; there are"
    for file in "$recipes"/*.txt; do
        each=$(basename "$file" .txt)
        printf '  %-12s %s\n' "$each" "$(about title "$each")"
    done
    [ -z "$name" ] && exit 0 || exit 2
fi
for program in train_gpt prepare_data; do
    [ -x "./$program" ] || give_up "there is no ./$program: type make $program"
done
rm -rf "${out:?}/$name" "$out/$name.png" "$out/$name.svg"
mkdir -p "$out/$name" || exit 1

# ---- Data that one experiment alone needs -------------------------------------------------------
# data OPTION...: tokenizes standard input into data/NAME.
data() {
    cat > "$out/$name.text"
    ./prepare_data --input "$out/$name.text" --output "data/$name" "$@" > "$out/$name.text.log" 2>&1 ||
        give_up "could not prepare data/$name: $(cat "$out/$name.text.log")"
}
case $name in
cat) printf 'The cat sat on the mat' | data --tokenizer byte --val-fraction 0 ;;
# The beginning of the header: a text, but not much of one.
small-data) head -c 30000 tinygpt.hpp | data --vocab-size 512 --val-fraction 0.2 ;;
device) head -c 20000 tinygpt.hpp | data --tokenizer byte --val-fraction 0.01 ;;
*) [ -f data/stories/dataset.json ] || ./prepare_data || exit 1 ;;
esac

# ---- Which runs, with which program -------------------------------------------------------------
program_of() { echo ./train_gpt; }
conf_of() { echo "$recipes/$name-$1.conf"; }
label_of() { sed -n '1s/^# //p' "$(conf_of "$1")"; }
if [ "$name" = device ]; then
    if nvidia-smi -L 2> /dev/null | grep -q GPU; then
        cuda=train_gpt_cu size=gpu where="on the GPU"
    else
        cuda=train_gpt_cu_on_cpu size=tiny where="on the CPU"
        note="There is no GPU here: its kernels ran on the CPU (train_gpt_cu_on_cpu), tiny sizes."
    fi
    make -s $cuda || give_up "$cuda did not build"
    program_of() { [ "$1" = cpu ] && echo ./train_gpt || echo "./$cuda --precision ${1#cuda-}"; }
    conf_of() { echo "$recipes/device-$size.conf"; }
    label_of() { [ "$1" = cpu ] && echo "CPU, fp32" || echo "CUDA $where, ${1#cuda-}"; }
fi

# ---- The runs -----------------------------------------------------------------------------------
about title
printf '%-38s %6s %8s %8s %8s %9s %8s\n' "" steps train val "best val" tokens/s seconds
set --
labels=''
for variant in $(about variants); do
    run=$out/$name/$variant label=$(label_of "$variant") began=$(date +%s)
    printf '%-38s ' "$label"
    # shellcheck disable=SC2046,SC2086  # words on purpose
    $(program_of "$variant") --config "$(conf_of "$variant")" ${ARGS:-} --output "$run" > "$run.txt" 2>&1
    status=$?
    [ $status != 130 ] || { echo "interrupted"; exit 130; }
    if [ $status != 0 ]; then
        why=$(sed -n 's/^error: //p' "$run.txt" | tail -1)
        [ -s "$run/log.csv" ] && [ "$(wc -l < "$run/log.csv")" -gt 2 ] ||
            { echo "failed"; give_up "$why (all it printed: $run.txt)"; }
        echo "ended early: $why" | cut -c1-100
        printf '%-38s ' ""
    fi
    awk -F, -v wall=$(($(date +%s) - began)) '
        function shown(x) { return x == "" ? "-" : sprintf("%.4f", x) }
        NR == 1 { next }
        { n = $1 } $4 != "" { loss[++k] = $4 }
        $6 != "" { val = $6 + 0; if (best == "" || val < best) best = val }
        $11 != "" { speed += $11; m++ }
        END { for (i = (k > 20 ? k - 19 : 1); i <= k; i++) { train += loss[i]; of++ }
              printf "%6d %8.4f %8s %8s %9.0f %8d\n", n, (of ? train / of : 0), shown(val), shown(best),
                     (m ? speed / m : 0), wall }' "$run/log.csv"
    set -- "$@" "$run"
    labels="$labels${labels:+|}$label"
done

# ---- What to see --------------------------------------------------------------------------------
echo
if [ "$(about samples)" = yes ]; then  # what it wrote at every tenth step, on its way
    awk -v letters="$(about letters)" '
        /^=== / && match($0, /step [0-9]+/) { step = substr($0, RSTART + 5, RLENGTH - 5); next }
        step % 10 == 0 && step + 0 > shown + 0 { printf "step %4d  %s\n", step, substr($0, 1, letters)
                                         shown = step + 0 }' "$1/samples.txt" | LC_ALL=C sed "s/[^ -~]/./g"
    echo
fi
if [ "$(about differences)" = yes ]; then  # how far each run lies from the first
    for run in "$@"; do
        [ "$run" = "$1" ] || awk -F, -v run="$(basename "$run")" '
            function abs(x) { return x < 0 ? -x : x }
            FNR == 1 { next }
            FNR == NR { if ($4 != "") loss[$1] = $4; if ($6 != "") val[$1] = $6; next }
            $1 in loss && $4 != "" && $1 <= 50 {
                d = abs($4 - loss[$1]); if (d > widest) { widest = d; at = " (step " $1 ")" } }
            $1 in val && $6 != "" { end = sprintf("; val loss after step %d by %.3g", $1, abs($6 - val[$1])) }
            END { printf "%s: train loss differs by at most %.3g in the first 50 steps%s%s\n", run, widest,
                         at, end }' "$1/log.csv" "$run/log.csv"
    done
    echo
fi
RUNS=$* LABELS=$labels TITLE=$(about title) PANELS=$(about panels) OUT=$out/$name checks/plot.sh
drawn=$?
[ -z "$note" ] || echo "$note"
echo
grep -v '^#' "$recipes/$name.txt"
exit $drawn
