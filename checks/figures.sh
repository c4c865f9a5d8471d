#!/bin/sh
# checks/figures.sh: draws docs/*.svg and docs/*.png (make figures). The curve comes from
# docs/default-run.csv, the log.csv of `./train_gpt` without options; the rest from the numbers
# here.
set -u
cd "$(dirname "$0")/.." || exit 1
command -v gnuplot > /dev/null || {
    echo "error: figures are drawn by gnuplot (Debian: apt-get install gnuplot-nox)" >&2
    exit 1
}
scratch=$(mktemp -d "${TMPDIR:-/tmp}/figures.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
mkdir -p docs || exit 1

# Shapes as gnuplot objects: x to the right, y down, in pixels; colours of Okabe and Ito (2008).
shapes='
function box(x, y, w, h, colour, edge) {
    printf "set object rect from %.2f,%.2f to %.2f,%.2f fc rgb \"%s\" ", x, y, x + w, y + h, colour
    printf "fs solid 1 border lc rgb \"%s\" lw 0.7\n", edge == "" ? "#ffffff" : edge
}
function frame(x, y, w, h, colour) {
    printf "set object rect from %.2f,%.2f to %.2f,%.2f ", x, y, x + w, y + h
    printf "fs empty border lc rgb \"%s\" lw 1.6 front\n", colour
}
function shape(points, colour) {
    printf "set object polygon from %s fc rgb \"%s\" fs solid 1 noborder\n", points, colour
}
function text(x, y, words, size, where, colour) {
    gsub(/\047/, "\047\047", words)
    printf "set label \047%s\047 at %.2f,%.2f %s ", words, x, y, where == "" ? "left" : where
    printf "front font \",%d\" textcolor rgb \"%s\" noenhanced\n", size == "" ? 11 : size, \
           colour == "" ? "#222222" : colour
}
function line(x, y, x2, y2, colour, head, dash) {
    printf "set arrow from %.2f,%.2f to %.2f,%.2f %s lc rgb \"%s\" lw 1.2%s front\n", \
           x, y, x2, y2, head == "" ? "nohead" : head, colour == "" ? "#555555" : colour, \
           dash == "" ? "" : " dt (4,3)"
}
BEGIN { blue = "#0072B2"; orange = "#E69F00"; red = "#D55E00"; green = "#009E73"; pink = "#CC79A7"
        sky = "#56B4E9"; pale = "#D6E8F3"; grey = "#BBBBBB"; light = "#EEEEEE"; dark = "#555555" }
'
# draw NAME WIDTH HEIGHT: standard input is awk that calls the shapes above.
draw() {
    { printf '%s\n' "$shapes"; cat; } > "$scratch/$1.awk"
    {
        echo "set lmargin 0; set rmargin 0; set tmargin 0; set bmargin 0"
        echo "unset border; unset tics; unset key; set xrange [0:$2]; set yrange [$3:0]"
        awk -f "$scratch/$1.awk" < /dev/null || exit 1
        echo "plot -1"
    } > "$scratch/$1.gp" || exit 1
    {
        echo "set terminal svg size $2,$3 font 'sans-serif,11' background 'white'"
        echo "set output 'docs/$1.svg'; load '$scratch/$1.gp'; set output; reset"
        echo "set terminal pngcairo size $((2 * $2)),$((2 * $3)) fontscale 1.5 linewidth 2"
        echo "set output 'docs/$1.png'; load '$scratch/$1.gp'"
    } > "$scratch/both.gp"
    gnuplot "$scratch/both.gp" || exit 1
    echo "docs/$1.png docs/$1.svg"
}

# ---- The curve of the default run ---------------------------------------------------------------
RUNS=docs/default-run.csv PANELS=steps OUT=docs/default-run SIZE=820,460 \
    TITLE='./train_gpt: the default model on the default corpus' LABELS='' checks/plot.sh || exit 1

# ---- The blocking of the matrix product (header, "The fast product") ----------------------------
draw matmul 900 560 << 'END'
BEGIN {
    text(450, 24, "c = a b on the CPU: what is kept where", 15, "center")
    ax = 60; ay = 250; K = 180; M = 240           # a [m, k]
    bx = 290; by = 55; N = 352                    # b [k, n]
    cx = bx; cy = ay                              # c [m, n]
    box(ax, ay, K, M, light, dark); box(bx, by, N, K, light, dark); box(cx, cy, N, M, light, dark)
    # The part of k in work, the panels, the tile.
    d0 = 45; d = 75; row = 105; high = 28; col = 192; wide = 64
    box(ax + d0, ay, d, M, pale, blue); box(bx, by + d0, N, d, pale, blue)
    for (y = ay + 21; y < ay + M; y += high) line(ax + d0, y, ax + d0 + d, y, "#9CC4DE")
    for (x = bx + wide; x < bx + N; x += wide) line(x, by + d0, x, by + d0 + d, "#9CC4DE")
    box(ax + d0, ay + row, d, high, orange, dark); box(bx + col, by + d0, wide, d, sky, dark)
    box(cx, cy + row, N, high, "#FBEBC8", dark); box(cx + col, cy + row, wide, high, red, dark)
    line(ax + K, ay + row + high / 2, cx + col - 3, cy + row + high / 2, orange, "head")
    line(bx + col + wide / 2, by + K, cx + col + wide / 2, cy + row - 3, blue, "head")
    # One step: a column of a's rows, a row of b's panel.
    box(ax + d0 + 40, ay + row, 5, high, "#7A4E00", "#7A4E00")
    box(bx + col, by + d0 + 40, wide, 5, "#003E66", "#003E66")
    text(ax + K / 2, ay + M + 18, "a  [m, k]", 12, "center")
    text(bx - 12, by + 14, "b  [k, n]", 12, "right")
    text(cx + N / 2, cy + M + 18, "c  [m, n]", 12, "center")
    text(ax + d0 + d / 2, ay - 10, "kDepth = 512 steps of k", 10, "center", blue)
    x = 668
    box(x, 262, 14, 14, red, dark)
    text(x + 22, 269, "the tile of c: kTileRows x kCols", 11)
    text(x + 22, 286, "14 x 32 sums with AVX-512 (6 x 16", 10, "left", dark)
    text(x + 22, 301, "with AVX2), in registers for 512 steps", 10, "left", dark)
    box(x, 325, 14, 14, orange, dark)
    text(x + 22, 332, "14 rows of a, in the first cache", 11)
    text(x + 22, 349, "28 KB; they meet the panels of b in turn", 10, "left", dark)
    box(x, 373, 14, 14, sky, dark)
    text(x + 22, 380, "panel of b: 32 columns, 64 KB", 11)
    text(x + 22, 397, "16 of them, 1 MB, stay in the", 10, "left", dark)
    text(x + 22, 412, "second cache", 10, "left", dark)
    box(x, 436, 6, 14, "#7A4E00", "#7A4E00"); box(x + 8, 436, 6, 14, "#003E66", "#003E66")
    text(x + 22, 443, "one step reads 14 + 32 numbers and", 11)
    text(x + 22, 460, "does 14 x 32 = 448 multiply-adds", 11)
    text(450, 545, "b's panels are copies, made once for each block: they lie together, whatever " \
         "b's own layout. a is read where it lies, unless it is a transpose or becomes bf16.", 11, "center", dark)
}
END

# ---- The shape of causal attention --------------------------------------------------------------
draw attention 900 560 << 'END'
function lower_half(x, y, s) {
    shape(sprintf("%.1f,%.1f to %.1f,%.1f to %.1f,%.1f to %.1f,%.1f", \
                  x, y, x + s, y + s, x, y + s, x, y), orange)
}
BEGIN {
    n = 16; s = 28; x0 = 70; y0 = 70; T = 1024; tile = T / n
    text(450, 24, "Causal attention: which scores are computed (one head, T = 1024, tiles of 64 " \
         "x 64 as on the GPU)", 15, "center")
    for (i = 0; i < n; i++)
        for (j = 0; j < n; j++) {
            x = x0 + j * s; y = y0 + i * s
            box(x, y, s, s, j < i ? sky : j == i ? "#F9E4B3" : light, "#ffffff")
            if (j == i) lower_half(x + 1, y + 1, s - 2)
        }
    q = 11
    frame(x0, y0 + q * s, (q + 1) * s, s, red)
    text(x0 + n * s / 2, y0 - 14, "keys 0 ... 1023  (what can be looked at)", 11, "center")
    printf "set label \"queries 0 ... 1023  (who looks)\" at %d,%d center ", x0 - 22, y0 + n * s / 2
    print "rotate by 90 font \",11\""
    whole = n * (n - 1) / 2
    x = x0 + n * s + 36
    box(x, 90, 16, 16, sky, dark); text(x + 26, 98, whole " tiles computed whole", 12)
    text(x + 26, 116, "every key comes before every query", 10, "left", dark)
    box(x, 142, 16, 16, "#F9E4B3", orange); lower_half(x, 142, 16)
    text(x + 26, 150, n " tiles on the diagonal", 12)
    text(x + 26, 168, "computed, then masked: half the scores", 10, "left", dark)
    text(x + 26, 183, "become -infinity, e^-infinity = 0", 10, "left", dark)
    box(x, 208, 16, 16, light, dark); text(x + 26, 216, whole " tiles skipped", 12)
    text(x + 26, 234, "the future: neither read nor computed", 10, "left", dark)
    done = (whole + n) * tile * tile; ideal = T * (T + 1) / 2
    text(x, 284, sprintf("computed %d of %d scores: %.0f %% of the square,", done, T * T,
                         100 * done / T / T), 11)
    text(x, 302, sprintf("%.2f times what the mask leaves (%d)", done / ideal, ideal), 11)
    larger = 8 * 9 / 2 * 128 * 128 / ideal
    text(x, 320, sprintf("with tiles of 128 x 128 it would be %.2f times", larger), 11)
    y = y0 + (q + 0.5) * s
    line(x - 6, y, x0 + (q + 1) * s + 4, y, red, "head")
    text(x, y, "one block of 64 queries: it walks over its keys", 11, "left", red)
    text(x, y + 18, "from the left and keeps, for each query, the", 11, "left", red)
    text(x, y + 36, "highest score, the sum of e^(score - highest)", 11, "left", red)
    text(x, y + 54, "and the weighted sum of values. The T x T", 11, "left", red)
    text(x, y + 72, "square is never in memory.", 11, "left", red)
    text(450, 545, "Rows below have more work than rows above: blocks of queries are handed out " \
         "longest first. On the CPU a tile is 14 queries by 32 keys.", 11, "center", dark)
}
END

# ---- A timeline of one GPU step -----------------------------------------------------------------
# Every kernel takes at least its operations at 798 TFLOP/s (the best matrix product that others
# have measured on an H100, bf16) and at least its bytes at 3.0 TB/s; drawn is the larger of these.
# One batch of B = 64 texts of T = 1024 tokens, GPT-2 124M, vocabulary padded to 50304, bf16.
draw step 1000 560 << 'END'
function kernel(name, operations, bytes, colour,   a, b) {
    a = operations / 798e12 * 1e3; b = bytes / 3e12 * 1e3
    n++; label[n] = name; ms[n] = a > b ? a : b; paint[n] = colour; memory[n] = b > a
}
function product(name, m, o, k, bytes) { kernel(name, 2 * m * o * k, bytes, blue) }
function total(from, to,   i, sum) { for (i = from; i <= to; i++) sum += ms[i]; return sum }
# Kernels from..to as a bar from x on, wide pixels for all of them; names under the narrow ones.
function bar(from, to, x, y, wide, high, unit,   i, w, all, low, value, side, ink) {
    all = total(from, to)
    for (i = from; i <= to; i++) {
        w = wide * ms[i] / all
        box(x, y, w, high, paint[i], "#ffffff")
        for (h = 4; memory[i] && h < w - 1; h += 5)
            line(x + h, y + 1, x + h, y + high - 1, "#ffffff")
        value = unit == "us" ? sprintf("%.0f us", 1000 * ms[i]) : sprintf("%.1f ms", ms[i])
        if (w > 62) {
            if (!turned) k = 0
            ink = paint[i] == sky || memory[i] ? "#000000" : "#ffffff"
            text(x + w / 2, y + high / 2 - 8, label[i], 10, "center", ink)
            text(x + w / 2, y + high / 2 + 8, value, 10, "center", ink)
        } else {
            side = x + w / 2 > 900 ? "right" : "left"
            if (side == "right" && !turned) { turned = 1; k = 0 }
            low = y + high + 16 + 15 * (turned ? k % 3 : 2 - k % 3); k++
            line(x + w / 2, y + high, x + w / 2, low - 8, grey)
            text(x + w / 2 + (turned ? 2 : -2), low, label[i] " " value, 10, side)
        }
        x += w
    }
    k = turned = 0
}
BEGIN {
    R = 64 * 1024; C = 768; V = 50304; L = 12; T = 1024; P = 124475904; X = R * C * 2
    W = 2 * C                                     # bytes of a row of C weights
    # Scores and weighted sums: 4 C operations for each of (T+1)/2 keys; backward 5 products, not 2.
    attention = 4 * C * (T + 1) / 2 * R
    # One layer forward: kernels 1..7. Backward: 8..18.
    kernel("layernorm", 0, 2 * X, green)
    product("q, k, v", R, 3 * C, C, 4 * X + 3 * C * W)
    kernel("attention", attention, 4 * X, orange)
    product("projection", R, C, C, 3 * X + C * W)
    kernel("layernorm", 0, 2 * X, green)
    product("MLP up + GELU", R, 4 * C, C, 9 * X + 4 * C * W)
    product("MLP down", R, C, 4 * C, 6 * X + 4 * C * W)
    forward = total(1, 7); f1 = n; b0 = n + 1
    product("MLP down dX", R, 4 * C, C, 9 * X + 4 * C * W)
    product("dW", 4 * C, C, R, 5 * X + 8 * C * W)
    product("MLP up dX", R, C, 4 * C, 5 * X + 4 * C * W)
    product("dW", C, 4 * C, R, 5 * X + 8 * C * W)
    kernel("layernorm", 0, 4 * X, green)
    product("proj. dX", R, C, C, 2 * X + C * W)
    product("dW", C, C, R, 2 * X + 2 * C * W)
    kernel("attention", attention * 2.5, 8 * X, orange)
    product("q, k, v dX", R, C, 3 * C, 4 * X + 3 * C * W)
    product("dW", C, 3 * C, R, 4 * X + 6 * C * W)
    kernel("layernorm", 0, 4 * X, green)
    backward = total(b0, n); b1 = n; s0 = n + 1
    # The whole step.
    kernel("embed", 0, 2 * X, pink)
    kernel("12 layers forward", 0, 0, sky); ms[n] = L * forward; memory[n] = 0
    kernel("layernorm", 0, 2 * X, green)
    product("head", R, V, C, X + V * W + R * V * 2)
    kernel("softmax, loss", 0, 2 * R * V * 2, pink)
    product("head dX, dW", R, V, 2 * C, 2 * (X + V * W + R * V * 2))
    kernel("layernorm", 0, 4 * X, green)
    kernel("12 layers backward", 0, 0, sky); ms[n] = L * backward; memory[n] = 0
    kernel("embed", 0, 3.6 * X, pink)
    kernel("norm", 0, 2 * P, grey)
    kernel("AdamW", 0, 28 * P, grey)
    all = total(s0, n)

    text(500, 24, "One training step of GPT-2 124M on an H100: computed lower bounds, not " \
         "measurements", 15, "center")
    text(500, 46, "B = 64, T = 1024, bf16; each kernel at 798 TFLOP/s or 3.0 TB/s, whichever " \
         "takes longer", 11, "center", dark)
    x = 40; wide = 920
    text(x, 84, sprintf("the step: %.1f ms, %.0f,000 tokens a second at best", all, R / all), 12)
    bar(s0, n, x, 98, wide, 52, "ms")
    text(x, 236, sprintf("one layer forward: %.0f us", 1000 * forward), 12)
    fw = wide * forward / backward
    bar(1, f1, x, 250, fw, 52, "us")
    text(x, 384, sprintf("one layer backward: %.0f us, to the same scale", 1000 * backward), 12)
    bar(b0, b1, x, 398, wide, 52, "us")
    y = 532
    box(x, y - 7, 14, 14, blue); text(x + 20, y, "matrix products", 11)
    box(x + 145, y - 7, 14, 14, orange); text(x + 165, y, "attention", 11)
    box(x + 250, y - 7, 14, 14, green); text(x + 270, y, "layernorm", 11)
    box(x + 360, y - 7, 14, 14, pink); text(x + 380, y, "embedding, loss", 11)
    box(x + 505, y - 7, 14, 14, grey); text(x + 525, y, "update", 11)
    box(x + 600, y - 7, 14, 14, dark)
    for (h = 4; h < 14; h += 5) line(x + 600 + h, y - 6, x + 600 + h, y + 6, "#ffffff")
    text(x + 620, y, "striped: limited by memory; plain: by arithmetic", 11)
}
END
