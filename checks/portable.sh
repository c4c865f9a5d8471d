#!/bin/bash
# Each platform, built and run as far as that is possible here: make portable, or checks/portable.sh [ROW...].
# Every row compiles train_gpt and prepare_data, trains three steps of the default job (on one thread, where the
# platform runs here) and compares the losses with those of g++ for plain x86-64. Ends with a table; a warning, another
# loss or a missing message fails. What is not on this machine is skipped, with what to install.
#   CHROOT=DIR   more compilers: a Debian 13 system in that folder, made by debootstrap where it is missing
#   LIBOMP=FILE  LLVM's libomp.a for musl, to run that row too
set -u
cd "$(dirname "$0")/.."
work=$PWD/build/portable
mkdir -p "$work"
[ -f data/stories/dataset.json ] || make data/stories/dataset.json > /dev/null || exit 1
flags="-std=c++20 -O1 -fno-math-errno -Wall -Wextra -Wpedantic"
job="--max-steps 3 --eval-interval 0 --sample-interval 0 --threads 1"
export OMP_WAIT_POLICY=passive  # or the program starts itself again, outside of qemu
table="" failures=0 expected="" root=""

# row NAME COMPILED RUN LOSSES
row() {
    printf -v line '| %-34s | %-12s | %-24s | %s |' "$1" "$2" "$3" "$4"
    echo "$line"
    table+="$line"$'\n'
}
fail() { failures=$((failures + 1)); row "$1" "$2" "FAILED" "$3"; }
wants() { [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]]; }
only=("$@")

# compile NAME COMMAND...: both programs; prints what the compiler said. 0 where it said nothing.
compile() {
    local name=$1 program said status=0
    shift
    for program in train_gpt prepare_data; do
        said=$($root "$@" $program.cpp -o "build/portable/$program-$name" 2>&1) || status=1
        said=$(grep -v "unused during compilation: '-c'" <<< "$said")
        [ -z "$said" ] || { echo "$said" | head -20 >&2; status=1; }
    done
    return $status
}
# losses OF_PROGRAM RUNNER...: the training losses of the job, one line.
losses() {
    local program=$1
    shift
    rm -rf build/portable/out
    $root "$@" "./build/portable/$program" $job --output build/portable/out > build/portable/said.txt 2>&1 || { tail -3 build/portable/said.txt >&2; return 1; }
    awk -F, 'NR > 2 {printf "%s ", $4}' build/portable/out/log.csv
}
# platform ROW TITLE RUNNER COMPILER...: all of it. RUNNER "-": it cannot be run here.
platform() {
    local name=$1 title=$2 runner=$3
    shift 3
    wants "$name" || return
    compile "$name" "$@" || { fail "$title" "warnings" ""; return; }
    [ "$runner" != - ] || { row "$title" "no warning" "not on this machine" ""; return; }
    compare "$name" "$title" "$runner"
}
# compare ROW TITLE RUNNER: the losses of the row's program with those of the first.
compare() {
    local name=$1 title=$2 runner=$3 found
    found=$(losses "train_gpt-$name" $runner) || { fail "$title" "no warning" ""; return; }
    [ -n "$expected" ] || expected=$found
    # The fifth digit and later ones differ with fused multiply-adds and another libm.
    if awk -v a="$expected" -v b="$found" 'BEGIN {n = split(a, x); if (n < 3 || split(b, y) != n) exit 1
        for (i = 1; i <= n; i++) {d = x[i] - y[i]; if (d < 0) d = -d; if (d > 1e-5 * x[i]) exit 1}}'; then
        local same="equal"
        [ "$found" = "$expected" ] || same="within 1e-5"
        row "$title" "no warning" "${runner:-natively}" "$same: $found"
    else
        fail "$title" "no warning" "$found, expected $expected"
    fi
}
# refuses TITLE QEMU PROGRAM WORDS: on that CPU model the program says what is missing, with --help too.
refuses() {
    local said
    said=$($2 "build/portable/$3" --help 2>&1)
    if [ $? -eq 1 ] && [[ $said == *"error: this program was built for a CPU with"*"$4"* ]]; then
        row "$1" "" "$2" "says that $4 is missing"
    else
        fail "$1" "" "$said"
    fi
}
missing() { row "$1" "" "skipped: $2" ""; }

echo "compiling and running each platform; this takes about twenty minutes"
row "platform" "compiled" "run" "losses of the first three steps"
row "---" "---" "---" "---"
platform x86-64 "g++ $(g++ -dumpversion), x86-64" "" g++ $flags -fopenmp
wants clang14 && command -v clang++-14 > /dev/null && platform clang14 "clang++ 14, x86-64" "" clang++-14 $flags -fopenmp

# The compilers of Debian 13 and Ubuntu 24.04, in a system of their own. chroot starts in its root.
if [ -n "${CHROOT-}" ]; then
    [ -d "$CHROOT/usr" ] || debootstrap --variant=minbase --include=g++,g++-13,clang-19,libomp-19-dev,doctest-dev \
        trixie "$CHROOT" > "$work/debootstrap.log" || { tail -3 "$work/debootstrap.log"; exit 1; }
    mkdir -p "$CHROOT/src" && mount --bind "$PWD" "$CHROOT/src" && trap 'umount "$CHROOT/src"' EXIT
    root="chroot $CHROOT env -C /src"
    for compiler in g++-13 g++-14 clang++-19; do
        platform "$compiler" "$compiler, x86-64" "" "$compiler" $flags -fopenmp
    done
    if wants tests-14; then
        $root g++-14 $flags -fopenmp -O0 -fsyntax-only test_gpt.cpp 2> "$work/said.txt" && [ ! -s "$work/said.txt" ] &&
            row "g++-14, the tests" "no warning" "" "" || { head -5 "$work/said.txt"; fail "g++-14, the tests" "warnings" ""; }
    fi
    root=""
else
    missing "g++ 13, 14, clang++ 19" "CHROOT=build/trixie"
fi

# Instruction sets. qemu has none of AVX-512, so v4 runs natively.
if command -v qemu-x86_64 > /dev/null; then
    wants x86-64 && compare x86-64 "the same on x86-64-v1" "qemu-x86_64 -cpu qemu64"
    platform v3 "x86-64-v3" "qemu-x86_64 -cpu Haswell" g++ $flags -fopenmp -march=x86-64-v3
    grep -q avx512vl /proc/cpuinfo && here= || here=-
    platform v4 "x86-64-v4" "$here" g++ $flags -fopenmp -march=x86-64-v4
    wants v3 && refuses "x86-64-v3 on a CPU of 2008" "qemu-x86_64 -cpu Nehalem" train_gpt-v3 avx2
    wants v4 && refuses "x86-64-v4 on a CPU of 2013" "qemu-x86_64 -cpu Haswell" train_gpt-v4 avx512f
    wants v4 && refuses "prepare_data, the same" "qemu-x86_64 -cpu Haswell" prepare_data-v4 avx512f
else
    missing "x86-64 v1, v3, v4" "apt-get install qemu-user"
fi
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
    arm="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    platform aarch64 "aarch64" "$arm" aarch64-linux-gnu-g++ $flags -fopenmp
    if wants sve; then
        compile sve aarch64-linux-gnu-g++ $flags -fopenmp -march=armv8.2-a+sve
        refuses "aarch64 with SVE on a cortex-a57" "$arm -cpu cortex-a57" train_gpt-sve sve
    fi
else
    missing "aarch64" "apt-get install g++-aarch64-linux-gnu qemu-user"
fi

# macOS and musl, by zig's clang, which brings the headers of both, and LLVM's OpenMP for macOS.
zig=$work/zig
if [ ! -d "$zig/omp-x86_64" ]; then
    pip download -q --no-deps -d "$zig" ziglang && pip install -q --no-deps --target "$zig" "$zig"/ziglang-*.whl &&
        for a in arm64 x86_64; do
            pip download -q --no-deps -d "$zig" --platform macosx_11_0_$a --only-binary :all: cmeel-libomp &&
                python3 -m zipfile -e "$zig"/cmeel_libomp-*_$a.whl "$zig/omp-$a"
        done
fi > "$work/pip.log" 2>&1
if [ -d "$zig/omp-x86_64" ]; then
    for a in arm64 x86_64; do
        omp=$zig/omp-$a/cmeel.prefix
        platform "macos-$a" "macOS, $a" - "$zig/ziglang/zig" c++ -target ${a/arm64/aarch64}-macos $flags \
            -Xclang -fopenmp "-I$omp/include" "-L$omp/lib" -lomp
    done
    if [ -n "${LIBOMP-}" ]; then
        platform musl "musl, x86-64" "" "$zig/ziglang/zig" c++ -target x86_64-linux-musl $flags -static \
            -Xclang -fopenmp "-I$zig/omp-x86_64/cmeel.prefix/include" "$LIBOMP"
    else
        platform musl "musl, x86-64" - "$zig/ziglang/zig" c++ -target x86_64-linux-musl $flags -c \
            -Xclang -fopenmp "-I$zig/omp-x86_64/cmeel.prefix/include"
    fi
else
    missing "macOS, musl" "pip install ziglang"
fi

echo "$table" > "$work/table.md"
echo "$failures failed"
[ $failures -eq 0 ]
