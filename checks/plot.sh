#!/bin/sh
# checks/plot.sh: draws the logs of runs over each other, as OUT.png and OUT.svg, with gnuplot.
#
#   make plot RUNS="out/a out/b"       loss against steps and tokens, learning rate, norm
#   RUNS     folders of runs, or log.csv files
#   OUT      where to draw, without .png (out/plot)
#   TITLE    above all panels (none)
#   LABELS   names of the runs, separated by | (the folders' names)
#   PANELS   of: steps tokens train gap lr norm difference best last speed (steps tokens lr norm)
set -u
RUNS=${RUNS:-} OUT=${OUT:-out/plot} TITLE=${TITLE:-} LABELS=${LABELS:-}
PANELS=${PANELS:-steps tokens lr norm}
give_up() {
    echo "error: $1" >&2
    exit "${2:-1}"
}
[ -n "$RUNS" ] || give_up 'there is no run in out/: ./train_gpt makes one; make plot RUNS="out/a out/b" names runs' 2
command -v gnuplot > /dev/null ||
    give_up "gnuplot draws the figures, and is not here: $(command -v sudo > /dev/null && echo 'sudo ')apt-get install gnuplot-nox; without it: ./train_gpt show --runs $RUNS"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/plot.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT

# ---- The logs, as columns -----------------------------------------------------------------------
# N.train: step, tokens, loss, running mean of the loss, rate, norm, distance from run 1's loss
# N.val:   step, tokens, val_loss, eval_train_loss
# facts:   N, best and last val_loss, mean tokens a second, label, floor
columns='
function number(x) { return x == "" || x ~ /nan|inf/ ? "NaN" : x }
FNR == 1 { file++; next }
NF != 13 { next }
file == 1 { first[$1] = $4; next }
{ if ($8 != "") floor = $8; if ($6 != "") last = $6 }
$6 != "" && (best == "" || $6 + 0 < best) { best = $6 + 0 }
$5 != "" || $6 != "" { print $1, $3, number($6), number($5) >> (base ".val") }
$4 != "" {
    n++; row[n] = $1 " " $3 " " number($4); loss[n] = $4; speed += $11
    apart = first[$1] == "" ? 0 : $4 - first[$1]
    rest[n] = number($9) " " number($10) " " (apart == 0 ? "NaN" : apart < 0 ? -apart : apart)
}
END {
    half = int(n / 80)
    for (i = 1; i <= n; i++) {
        sum = 0
        for (k = i - half; k <= i + half; k++) sum += k < 1 ? loss[1] : k > n ? loss[n] : loss[k]
        print row[i], number(sum / (2 * half + 1)), rest[i] > (base ".train")
    }
    print run, number(best), number(last), n ? speed / n : "NaN", "\"" label "\"", floor
}'
count=0 first_log=
for run in $RUNS; do
    case $run in
    *.csv) log=$run name=$(basename "$run" .csv) ;;
    *) log=$run/log.csv name=$(basename "$run") ;;
    esac
    head -1 "$log" 2> /dev/null | grep -q '^step,epoch,tokens,train_loss,' ||
        give_up "$log is no log of train_gpt: is $run the --output of a run?"
    count=$((count + 1))
    label=$(echo "$LABELS" | cut -d'|' -f$count | tr -d '"\\')
    echo "0 0 NaN NaN" > "$scratch/$count.val"
    awk -F, -v base="$scratch/$count" -v run=$count -v label="${label:-$name}" "$columns" \
        "${first_log:=$log}" "$log" >> "$scratch/facts" || give_up "could not read $log"
    [ -s "$scratch/$count.train" ] || give_up "$log has no steps yet: let the run make one first"
done
floor=$(sed -n 's/.*" \(..*\)/\1/p' "$scratch/facts" | head -1)
ends=$(cat "$scratch"/*.train "$scratch"/*.val | awk -v low="${floor:-NaN}" '
    $3 != "NaN" { if (low == "NaN" || $3 < low) low = $3; if ($3 + 0 > high) high = $3 }
    { if ($1 > steps) steps = $1; if ($2 > tokens) tokens = $2 }
    END { printf "low = %g; high = %g", low / 1.05, high * 1.05
          printf "; steps = %d; tokens = %d", steps, tokens }')

# ---- The panels ---------------------------------------------------------------------------------
train="for [i=1:n] train(i) using" val="for [i=1:n] val(i) using"
# losses TITLE COLUMN PLOTS: against steps (column 1) or tokens (2), with the floor
losses() {
    echo "x = $2; set title '$1'; set ylabel 'loss (nats a token)'; set yrange [low:high]"
    echo "if (high > 2 * low) { set logscale y; set ytics (.2, .3, .5, .7, 1, 1.5, 2, 3, 5, 8) }"
    [ "$2" = 1 ] || echo "set xlabel 'tokens'; set xrange [0:tokens]; set format x '%.1s%c'"
    echo "plot $3 ${floor:+, $floor lc rgb '#555555' dt (4,3) title sprintf('floor %.4f', $floor)}"
}
# dots TITLE COLUMN FORMAT [MORE]: a number of each run, as a dot beside the run's name
dots() {
    echo "set title '$1'; unset xlabel; set xrange [*:*]"
    echo "set yrange [n + .6:.4]; set offsets graph .1, graph .1"
    echo "plot facts using $2:1:1:ytic(5) with points pt 7 ps 1.6 lc variable notitle, \\"
    echo "    facts using $2:1:(sprintf('%$3', \$$2)) with labels offset 0,1 notitle ${4:-}"
}
panel() {
    loss="$train x:3 lc i lw 0.3 notitle, $train x:4 lc i title label[i]"
    scored="$val x:3 with linespoints lc i + (n == 1) lw 2 title"
    case $1 in
    steps) losses "Loss against steps" 1 "$loss, $scored n == 1 ? 'validation' : ''" ;;
    tokens) losses "Loss against tokens" 2 "$loss, $scored n == 1 ? 'validation' : ''" ;;
    train) losses "Training loss" 1 "$loss" ;;
    gap) losses "Validation (solid) against training text (dashed)" 1 \
        "$scored label[i], $val x:4 lc i dt (6,4) notitle" ;;
    lr) echo "set title 'Learning rate'; plot $train 1:5 lc i notitle" ;;
    norm) echo "set title 'Gradient norm'; set logscale y; plot $train 1:6 lc i lw 0.6 notitle" ;;
    difference) echo "set title 'Training loss: distance from the first run'; set logscale y"
        echo "set yrange [1e-8:10]; set format y '10^{%L}'; set ytics enhanced"
        echo "plot $train 1:7 with points lc i ps 0.4 title label[i]" ;;
    best) dots "Best validation loss" 2 .4f ;;
    last) dots "Validation loss: best (dot), at the end (ring)" 2 .4f \
        ", facts using 3:1:1 with points pt 6 ps 1.6 lc variable notitle" ;;
    speed) dots "Tokens a second (mean)" 4 .0f ;;
    *) give_up "there is no panel $1: see checks/plot.sh" 2 ;;
    esac
}

# ---- The figure ---------------------------------------------------------------------------------
# shellcheck disable=SC2086  # words on purpose
set -- $PANELS
columns=$(($# > 1 ? 2 : 1)) rows=$((($# + 1) / 2))
size=$((640 * columns)),$((440 * rows))
{
    cat << EOF
$ends; n = $count; facts = '$scratch/facts'; array label[n]
train(i) = sprintf('$scratch/%d.train', i)
val(i) = sprintf('$scratch/%d.val', i)
stats facts using (label[int(\$1)] = strcol(5), 0) nooutput
# Okabe and Ito's palette (2008): told apart by colour-blind readers too.
colours = '0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 8B6914'
do for [i=1:8] { set linetype i lc rgb '#'.word(colours, i) lw 1.4 pt 7 ps 0.6 }
set linetype cycle 8
set multiplot layout $rows,$columns title "$(printf %s "$TITLE" | tr -d '"\\')" noenhanced
EOF
    for panel in "$@"; do
        echo "set style data lines; set border 3 lc rgb '#777777'; set tics nomirror"
        echo "set grid lc rgb '#e4e4e4' lt 1 lw 0.6; set key noenhanced samplen 2"
        echo "set title noenhanced; set ytics noenhanced; set xlabel 'step'; set xrange [0:steps]"
        panel "$panel"
        echo "reset"
    done
    echo "unset multiplot"
} > "$scratch/figure.gp"
mkdir -p "$(dirname "$OUT")" || exit 1
{
    echo "set terminal svg size $size font 'sans-serif,13' background 'white'"
    echo "set output '$OUT.svg'; load '$scratch/figure.gp'; set output"
    echo "set terminal pngcairo size $size font 'sans,10'"
    echo "set output '$OUT.png'; load '$scratch/figure.gp'"
} | gnuplot 2> "$scratch/errors" || give_up "gnuplot could not draw it: $(cat "$scratch/errors")"
echo "$OUT.png $OUT.svg"
