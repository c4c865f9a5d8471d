#!/bin/sh
# checks/plot.sh: draws the logs of runs over each other, as OUT.png and OUT.svg, with gnuplot.
#
#   make plot RUNS="out/a out/b"              loss against steps and tokens, learning rate, norm
#   RUNS     folders of runs, or log.csv files
#   OUT      where to draw, without .png (out/plot)
#   TITLE    what stands above (nothing)
#   LABELS   names of the runs, separated by | (the folders' names)
#   PANELS   what to draw: of steps tokens train val gap lr norm difference best last speed samples
#            (steps tokens lr norm)
#   LETTERS  of a sample that the panel samples shows (44)
#   COINCIDE not empty: curves that lie on each other are all to be seen
#   SIZE     of the figure, as width,height (by the number of panels)
set -u
RUNS=${RUNS:-} OUT=${OUT:-out/plot} TITLE=${TITLE:-} LABELS=${LABELS:-}
PANELS=${PANELS:-steps tokens lr norm}
give_up() {
    echo "error: $1" >&2
    exit "${2:-1}"
}
[ -n "$RUNS" ] || give_up 'which runs? make plot RUNS="out/stories out/other"' 2
command -v gnuplot > /dev/null ||
    give_up "gnuplot draws the figures, and is not installed (Debian: apt-get install gnuplot-nox)"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/plot.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

# ---- The logs, as columns -----------------------------------------------------------------------
# N.train: step, tokens, loss, smoothed loss, rate, norm, smoothed norm, difference from run 1
# N.val:   step, tokens, val_loss, eval_train_loss
# N.facts: shell variables of the run: how many rows, its extremes, its last and best losses
columns='
function least(x) { if (x > 0 && (low == "" || x < low)) low = x }
function most(x) { if (x < 1e30 && x > high) high = x }
function smooth(of, i,   w, sum, count, k) {
    w = half; if (i - 1 < w) w = i - 1
    for (k = i - w; k <= i + w && k <= n; k++) if (of[k] != "") { sum += of[k]; count++ }
    return count ? sum / count : "NaN"
}
FNR == 1 { next }
FNR == NR && NF == 13 && $4 != "" { first[$1] = $4; next }
FNR == NR { next }
NF != 13 { next }
{ last_step = $1; last_tokens = $3; if ($8 != "") floor = $8; if ($13 != "") seconds = $13 }
$4 != "" {
    n++; step[n] = $1; tokens[n] = $3; loss[n] = $4; rate[n] = $9; norm[n] = $10; speed[n] = $11
    if ($4 !~ /nan|inf/) { least($4 + 0); if (n == 1) top = $4 * 1.25; most($4 + 0) }
    else loss[n] = ""
    if ($10 ~ /nan|inf/) norm[n] = ""
    logs[n] = norm[n] > 0 ? log(norm[n]) : ""
}
$5 != "" || $6 != "" {
    v++; print $1, $3, ($6 == "" ? "NaN" : $6), ($5 == "" ? "NaN" : $5) > (base ".val")
    if ($1 == 0) print "" > (base ".val")  # a point of its own: the fall to the next is no line
    if ($6 != "" && $6 !~ /nan|inf/) {
        vals++; least($6 + 0); most($6 + 0); val = $6
        if (best == "" || $6 + 0 < best) best = $6 + 0
        if ($1 == 0) top = $6 * 1.25
    }
    if ($5 != "" && $5 !~ /nan|inf/) { fixed = $5; least($5 + 0); most($5 + 0) }
}
END {
    half = int(n / 80)
    for (i = 1; i <= n; i++) {
        d = "NaN"
        if (step[i] in first && loss[i] != "") {
            d = loss[i] - first[step[i]]; if (d < 0) d = -d
            if (d > widest) widest = d
            if (d == 0) d = "NaN"
        }
        s = smooth(logs, i); if (s != "NaN") s = exp(s)
        if (norm[i] > 0) {
            if (norm_low == "" || norm[i] + 0 < norm_low) norm_low = norm[i] + 0
            if (norm[i] + 0 > norm_high) norm_high = norm[i] + 0
        }
        print step[i], tokens[i], (loss[i] == "" ? "NaN" : loss[i]), smooth(loss, i), \
              (rate[i] == "" ? "NaN" : rate[i]), (norm[i] == "" ? "NaN" : norm[i]), s, \
              d > (base ".train")
        m = i; x = speed[i] + 0       # insertion sort: the median is the middle
        while (m > 1 && sorted[m - 1] > x) { sorted[m] = sorted[m - 1]; m-- }
        sorted[m] = x
    }
    if (top != "" && high > top) high = top
    printf "rows=%d vals=%d fixed=%s low=%s high=%s floor=%s ", n, vals, fixed, low, high, floor
    printf "best=%s val=%s steps=%d tokens=%.0f ", best, val, last_step, last_tokens
    printf "widest=%.3g norm_low=%s norm_high=%s ", widest, norm_low, norm_high
    printf "speed=%.0f seconds=%.1f\n", sorted[int((n + 1) / 2)], seconds
}'

count=0 first_log=
for run in $RUNS; do
    case $run in
    *.csv) log=$run name=$(basename "$run" .csv) ;;
    *) log=$run/log.csv name=$(basename "$run") ;;
    esac
    [ -f "$log" ] || give_up "there is no $log: is $run the --output of a run?"
    count=$((count + 1))
    : "${first_log:=$log}"
    : > "$scratch/$count.train"
    : > "$scratch/$count.val"
    [ -s "$log" ] || give_up "$log is empty: let the run make a step first"
    head -1 "$log" | grep -q '^step,epoch,tokens,train_loss,' ||
        give_up "$log does not begin like a log of train_gpt (step,epoch,tokens,train_loss,...)"
    [ "$(wc -l < "$log")" -gt 1 ] || give_up "$log has no rows yet: let the run make a step first"
    awk -F, -v base="$scratch/$count" "$columns" "$first_log" "$log" > "$scratch/$count.facts" ||
        give_up "could not read $log"
    label=$(echo "$LABELS" | cut -d'|' -f"$count")
    printf '%s\n' "${label:-$name}" | tr -d "'\\\\" > "$scratch/$count.label"
done

fact() { # fact N NAME: that variable of run N
    tr ' ' '\n' < "$scratch/$1.facts" | sed -n "s/^$2=//p"
}
extreme() { # extreme NAME OP: over all runs; OP is < or >
    cat "$scratch"/*.facts | tr ' ' '\n' | sed -n "s/^$1=\(..*\)/\1/p" |
        awk "NR == 1 || \$1 + 0 $2 best { best = \$1 + 0 } END { if (NR) print best }"
}
runs() { seq 1 "$count"; }
label() { cat "$scratch/$1.label"; }
low=$(extreme low '<') high=$(extreme high '>') floor=$(extreme floor '<')

# ---- Colours and axes ---------------------------------------------------------------------------
# Okabe and Ito's palette (2008): told apart by colour-blind readers too.
palette="0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000 8B6914"
set_colours() {
    i=0
    for colour in $palette; do
        i=$((i + 1))
        printf "set linetype $i lc rgb '#$colour' lw 2 pt 7 ps 0.6; "
    done
    echo "set linetype cycle 8"
}
# faint N: the colour of run N, mostly transparent.
faint() {
    echo "'#B0$(echo "$palette" | cut -d' ' -f$((($1 - 1) % 8 + 1)))'"
}
# axis x|y LOW HIGH: logarithmic where the numbers differ much, with tics at round ones.
axis() {
    awk -v a="$1" -v low="$2" -v high="$3" 'BEGIN {
        if (low == "" || high == "" || low <= 0) { print "unset logscale " a; exit }
        if (high <= low) { low *= 0.95; high *= 1.05 }
        if (high / low < 2.5) {
            margin = (high - low) * 0.08
            printf "unset logscale %s\nset %stics auto\n", a, a
            printf "set %srange [%.9g:%.9g]\n", a, low - margin, high + margin
            exit
        }
        margin = exp(log(high / low) * 0.04)
        printf "set logscale %s\nset %srange [%.9g:%.9g]\n", a, a, low / margin, high * margin
        wide = high / low > 30
        n = split(high / low > 3000 ? "1" : wide ? "1 2 5" : "1 1.5 2 3 4 5 6 8", digit, " ")
        for (e = -12; e < 9; e++)
            for (i = 1; i <= n; i++) list = list (list == "" ? "" : ", ") digit[i] "e" e
        printf "set %stics (%s)\n", a, list
    }'
}
across() { # across steps|tokens: the x axis, as far as the longest run goes
    echo "set xrange [0:$(extreme "$1" '>' | awk '{ print ($1 > 1 ? $1 : 1) }')]"
}
every() { # every N: draws at most about 1000 points of a run
    rows=$(fact "$1" rows)
    echo "every $((rows / 1000 + 1))"
}

width() { # width N W: W, but where curves coincide the first are drawn wider, to be seen
    [ -n "${COINCIDE:-}" ] && echo "$(((count - $1) * 2)) $2" | awk '{ print $1 + $2 }' || echo "$2"
}

# ---- Panels: each prints the gnuplot lines that draw it -----------------------------------------
nothing() { # nothing TEXT
    echo "set xrange [0:1]; set yrange [0:1]; unset logscale; set format '%g'"
    echo "set label 1 '$1' at graph 0.5,0.5 center textcolor rgb '#777777'"
    echo "plot -1 notitle; unset label 1"
}
# curves COLUMN WHAT...: loss against step (1) or tokens (2); WHAT of train val fixed
curves() {
    column=$1
    shift
    least=$low
    [ -n "$floor" ] && least=$(echo "$floor $least" | awk '{ print $1 < $2 || $2 == "" ? $1 : $2 }')
    [ -n "$least" ] || { nothing "no losses yet"; return; }
    axis y "$least" "$high"
    across "$([ "$column" = 1 ] && echo steps || echo tokens)"
    [ "$column" = 2 ] && echo "set format x '%.1s%c'; set xtics add ('0' 0)"
    plot='' found=
    for i in $(runs); do
        case " $* " in
        *" train "*) [ "$(fact "$i" rows)" -gt 0 ] &&
            plot="$plot '$scratch/$i.train' $(every "$i") using $column:3 with lines lw 0.6
                lc rgb $(faint "$i") notitle," ;;
        esac
    done
    for i in $(runs); do
        title=$(label "$i")
        for what in "$@"; do
            case $what in
            train)
                [ "$(fact "$i" rows)" -gt 0 ] || continue
                from="'$scratch/$i.train' $(every "$i") using $column:4"
                style="linespoints lt $i lw $(width "$i" 1.2) pt 0" one='train, smoothed' ;;
            val)
                [ "$(fact "$i" vals)" -gt 0 ] || continue
                from="'$scratch/$i.val' using $column:3" one='validation'
                style="linespoints lt $((i + (count == 1))) lw $(width "$i" 2.2) pt 7 ps 0.7" ;;
            fixed)
                [ -n "$(fact "$i" fixed)" ] || continue
                from="'$scratch/$i.val' using $column:4" one='train, the same batches each time'
                style="lines lt $i lw 1.6 dt (6,4)" ;;
            esac
            found=1
            if [ "$count" = 1 ]; then
                plot="$plot $from with $style title '$one',"
            else
                plot="$plot $from with $style title '$title',"
                title=
            fi
        done
    done
    [ -n "$found" ] || { nothing "not measured in these runs"; return; }
    [ -n "$floor" ] && plot="$plot $floor with lines lc rgb '#555555' lw 1.6 dt (4,3)
        title 'floor $(printf %.4f "$floor")',"
    echo "plot ${plot%,}" | tr '\n' ' ' | sed "s/title ''/notitle/g"
    echo
}
panel_steps() {
    echo "set title 'Loss against steps'; set xlabel 'step'; set ylabel 'loss (nats a token)'"
    curves 1 train val
}
panel_tokens() {
    echo "set title 'Loss against tokens seen'; set xlabel 'tokens'"
    echo "set ylabel 'loss (nats a token)'"
    curves 2 train val
}
panel_train() {
    echo "set title 'Training loss'; set xlabel 'step'; set ylabel 'loss (nats a token)'"
    curves 1 train
}
panel_val() {
    echo "set title 'Validation loss'; set xlabel 'step'; set ylabel 'loss (nats a token)'"
    curves 1 val
}
panel_gap() {
    echo "set title 'Validation (solid) against training text (dashed)'"
    echo "set xlabel 'step'; set ylabel 'loss (nats a token)'"
    curves 1 val fixed
}
panel_lr() {
    echo "set title 'Learning rate'; set xlabel 'step'; unset ylabel; set format y '%g'"
    across steps; echo "set yrange [0:*]; set key off"
    plot=
    for i in $(runs); do
        wide=$((count - i + 2 > 6 ? 6 : count - i + 2))  # rates are often equal
        [ "$(fact "$i" rows)" -gt 0 ] &&
            plot="$plot '$scratch/$i.train' using 1:5 with linespoints lt $i pt 0 lw $wide,"
    done
    [ -n "$plot" ] && echo "plot ${plot%,}" || nothing "no steps yet"
}
panel_norm() {
    echo "set title 'Gradient norm, before clipping'; set xlabel 'step'; unset ylabel; set key off"
    [ -n "$(extreme norm_low '<')" ] || { nothing "no steps yet"; return; }
    axis y "$(extreme norm_low '<')" "$(extreme norm_high '>')"
    across steps
    faint='' clear=''
    for i in $(runs); do
        [ "$(fact "$i" rows)" -gt 0 ] || continue
        from="'$scratch/$i.train' $(every "$i") using"
        faint="$faint $from 1:6 with lines lw 0.6 lc rgb $(faint "$i"),"
        clear="$clear $from 1:7 with linespoints lt $i lw 1.4 pt 0,"
    done
    clear="$faint$clear"
    echo "plot ${clear%,}"
}
panel_difference() {
    echo "set title 'Training loss: how far from \"$(label 1)\"'; set xlabel 'step'; unset ylabel"
    echo "set logscale y; set format y '10^{%L}'"; across steps
    echo "set yrange [1e-8:*]; set ytics auto enhanced; set key bottom right"
    plot=
    for i in $(runs); do
        [ "$i" -gt 1 ] && [ "$(fact "$i" widest)" != 0 ] || continue
        plot="$plot '$scratch/$i.train' using 1:8 with points lt $i pt 7 ps 0.4"
        plot="$plot title '$(label "$i")',"
    done
    [ -n "$plot" ] && echo "plot ${plot%,}" || nothing "equal to the last bit"
}
# dots NAME FORMAT LINE RING ZERO: a number of each run as a dot, another as a ring, a line through
# all; with ZERO the axis begins there
dots() {
    : > "$scratch/dots"
    for i in $(runs); do
        [ -n "$(fact "$i" "$1")" ] &&
            echo "$i $(fact "$i" "$1") $(fact "$i" "${4:-$1}")" >> "$scratch/dots"
    done
    [ -s "$scratch/dots" ] || { nothing "not measured in these runs"; return; }
    echo "set key off; set ylabel; set grid noy; set yrange [$count.6:0.4]; set xtics auto"
    printf "set ytics ("
    for i in $(runs); do
        printf "%s'%s' %d" "$([ "$i" = 1 ] || echo ', ')" "$(label "$i")" "$i"
    done
    echo ")"
    awk -v floor="$3" -v zero="${5:-}" '
        NR == 1 || $2 < low { low = $2 } NR == 1 || $3 > high { high = $3 }
        END { if (zero) low = 0
              if (floor != "" && floor < low) low = floor
              margin = (high - low) * 0.1 + (high == low) * 0.1 * high
              low = zero ? 0 : low - margin
              printf "set xrange [%.9g:%.9g]\n", low, high + 3 * margin }' "$scratch/dots"
    plot=
    [ -n "$3" ] && plot="'+' using ($3):(0.4+(\$0)*($count.2)/100) with lines lc rgb '#555555'
        lw 1.4 dt (3,3) notitle,"
    echo "set samples 101; set rmargin 3"
    [ -n "${4:-}" ] &&
        plot="$plot '$scratch/dots' using 3:1:1 with points pt 6 ps 1.6 lw 1.5 lc variable,"
    [ -n "${4:-}" ] && where="center offset 0,1.2" || where="left offset 1.2,0"
    plot="$plot '$scratch/dots' using 2:1:1 with points pt 7 ps 1.6 lc variable,
        '' using 2:1:(sprintf('$2', \$2)) with labels $where"
    echo "$plot" | tr '\n' ' ' | sed 's/^/plot /'
    echo
    echo "set grid y; set rmargin -1"
}
panel_best() {
    echo "set title 'Best validation loss$([ -n "$floor" ] && echo "; dashed: the floor")'"
    echo "set xlabel 'loss (nats a token)'"
    dots best '%.3f' "$floor"
}
panel_last() {
    echo "set title 'Validation loss: best (dot), at the end (ring)'"
    echo "set xlabel 'loss (nats a token)'"
    dots best '%.3f' "$floor" val
}
panel_speed() {
    echo "set title 'Tokens a second (median step)'; unset xlabel"
    dots speed '%.0f' '' '' 1
}
# What the first run wrote on its way: its samples, beside the step.
panel_samples() {
    log=$(echo "$RUNS" | awk '{ print $1 }')
    awk -v letters="${LETTERS:-44}" '
        function twelfth(i) { return n <= 12 ? i : i < 1 ? -1 : int((i - 1) * 11 / (n - 1)) }
        /^=== / && match($0, /step [0-9]+/) { step = substr($0, RSTART + 5, RLENGTH - 5); next }
        step != "" && length { text[++n] = $0; at[n] = step; step = "" }
        END { for (i = 1; i <= n; i++)
                  if (twelfth(i) != twelfth(i - 1))
                      printf "%6d  %s\n", at[i], substr(text[i], 1, letters) }' "$log/samples.txt" |
        LC_ALL=C sed "s/[^ -~]/./g; s/'/''/g; s/\\\\/./g" > "$scratch/samples"
    echo "set title 'What it writes (a dot is no letter)'; unset border; unset tics"
    echo "unset xlabel; unset ylabel; set key off"
    echo "set xrange [0:1]; set yrange [0:1]"
    echo "set label 1 '  step' at 0.02,0.97 font 'monospace' textcolor rgb '#777777' noenhanced"
    awk '{ printf "set label %d '"'%s'"' at 0.02,%.3f font '"'monospace'"' noenhanced\n", \
                  NR + 1, $0, 0.97 - NR * 0.075 }' "$scratch/samples"
    echo "plot -1; unset label; set border; set tics"
}

# ---- The figure ---------------------------------------------------------------------------------
figure() {
    set -- $PANELS
    case $# in
    1) layout=1,1 ;; 2) layout=1,2 ;; 3) layout=1,3 ;; *) layout=$((($# + 1) / 2)),2 ;;
    esac
    set_colours
    echo "set multiplot layout $layout title '$(printf %s "$TITLE" | tr -d "'\\\\")' noenhanced"
    for panel in "$@"; do
        echo "reset; $(set_colours)"
        echo "set border 3 lc rgb '#777777'; set tics nomirror out textcolor rgb '#333333'"
        echo "set grid lc rgb '#e4e4e4' lt 1 lw 0.6"
        echo "set key noenhanced samplen 2 textcolor rgb '#333333'"
        [ "$count" -le 2 ] && echo "set key top right" ||
            echo "set key bmargin center horizontal; set bmargin $((4 + (count + 3) / 3))"
        echo "set title noenhanced; set ytics noenhanced"
        "panel_$panel"
    done
    echo "unset multiplot"
}
case $(echo "$PANELS" | wc -w) in
1) size=820,500 ;; 2) size=1240,480 ;; 3) size=1560,480 ;; *) size=1240,860 ;;
esac
size=${SIZE:-$size}
for panel in $PANELS; do
    command -v "panel_$panel" > /dev/null ||
        give_up "there is no panel $panel: see checks/plot.sh" 2
done
mkdir -p "$(dirname "$OUT")" || exit 1
figure > "$scratch/figure.gp"
double=$(echo "$size" | awk -F, '{ print 1.5 * $1 "," 1.5 * $2 }')
{
    echo "set terminal svg size $size font 'sans-serif,13' background 'white'"
    echo "set output '$OUT.svg'"
    cat "$scratch/figure.gp"
    echo "set output"
    echo "set terminal pngcairo size $double font 'sans,10' \\"
    echo "    fontscale 1.5 linewidth 1.5 pointscale 1.5"
    echo "set output '$OUT.png'"
    cat "$scratch/figure.gp"
} > "$scratch/both.gp"
gnuplot "$scratch/both.gp" 2> "$scratch/errors" || {
    cat "$scratch/errors" >&2
    give_up "gnuplot could not draw $OUT.png"
}
grep -v -i 'warning' "$scratch/errors" >&2
echo "$OUT.png $OUT.svg"
