#!/bin/bash
# checks/cuda_build.sh: for which GPUs does the Makefile build, and what does it say where it cannot? With an nvcc and
# an nvidia-smi that only talk, in a folder of their own.
set -u
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
cp -r Makefile checks train_gpt.cu train_gpt.cpp tinygpt.hpp test_gpt.cpp prepare_data.cpp "$work"
mkdir -p "$work/data/stories" "$work/bin" && touch "$work/data/stories/dataset.json"
cat > "$work/bin/nvcc" <<'END'
#!/bin/sh
[ "$1" = --list-gpu-code ] && { printf 'sm_%s\n' 75 80 86 89 90 100 120; exit; }
echo "nvcc $*"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "$CARDS" > "$2"; shift; done
END
cat > "$work/bin/nvidia-smi" <<'END'
#!/bin/sh
echo asked >> asked
[ -n "$CARDS" ] || { echo "NVIDIA-SMI has failed"; exit 9; }
printf '%s\n' $CARDS
END
chmod +x "$work"/bin/*
failed=0 passed=0
# says CARDS PATTERN [make's arguments]
says() {
    local out
    out=$(cd "$work" && CARDS=$1 PATH=$work/bin:$PATH make train_gpt_cu NVCC=nvcc "${@:3}" 2>&1)
    if [[ $out == *$2* ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "$1: expected $2, found $out"; fi
}
ptx=arch=compute_80,code=compute_80
code() { echo "-gencode=arch=compute_$1,code=sm_$1"; }
says "8.6" "$(code 86) -gencode=$ptx"
says "9.0 7.5 9.0" "$(code 75) $(code 90a) -gencode=$ptx" # all of them, whichever is CUDA's first
says "" "$(code 75) $(code 80) $(code 90a) -gencode=$ptx"
says "12.1" "nvcc " # too new for this nvcc: PTX alone
says "12.1" "building for compute capability, and later ones"
says "7.0" "does not compile for compute capability 70"
says "8.6" "$(code 120)" CUDA_ARCHS=120
# Another machine's program is not this one's; the same one's is not built again.
says "8.0" "$(code 80)"
[ "$(cat "$work/train_gpt_cu")" = 8.0 ] && says "8.9" "$(code 89)" && [ "$(cat "$work/train_gpt_cu")" = 8.9 ] || failed=$((failed + 1))
says "8.0" "up to date"
# Who builds no CUDA asks for no GPU.
rm -f "$work/asked" && (cd "$work" && PATH=$work/bin:$PATH make -n clean NVCC=nvcc > /dev/null 2>&1)
[ ! -e "$work/asked" ] || { failed=$((failed + 1)); echo "make clean ran nvidia-smi"; }
echo "cuda_build: $passed passed, $failed failed"
[ $failed = 0 ]
