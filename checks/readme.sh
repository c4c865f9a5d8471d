#!/usr/bin/env bash
# Runs every command of README.md, in order, in a fresh clone: build/readme. Fails at the first that
# exits non-zero. The commands are the lines of its ```sh blocks, the lines of its ```console blocks
# that begin with "$ ", and what stands between backquotes in its text and begins with "./" or "make
# "; "a && b" is two commands. A command that stood there before is not run twice.
#
#   checks/readme.sh --list              only say what would be run
#   WITH="network time" checks/readme.sh run those too that need a network (and root, for apt-get), or
#                                        minutes that `make check` spends elsewhere
#   STEPS=100                            training runs are shortened: --max-steps 100 is appended;
#                                        STEPS=all runs them as printed (some 25 minutes with the rest)
#
# Each line of the output has the command as it was run. What was skipped is listed with the reason.
set -eu
cd "$(dirname "$0")/.."
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset MAKEFLAGS MAKELEVEL MFLAGS  # a make that runs this does not decide how those below build
STEPS=${STEPS:-100} WITH=" ${WITH:-} " CLONE=build/readme LOG=$PWD/build/readme.log

# What this machine, or this call, lacks for a command; nothing where it can be run.
lacks() {
    case "$1" in
        *apt-get* | "make gpt2"* | "make shakespeare"* | *shakespeare.conf)
            wanted network || echo "a network, and root for apt-get (WITH=network)" ;;
        "make test" | "make test FILTER"* | "make torture"* | "make check"* | "make nightly"*)
            wanted time || echo "minutes; make check or make nightly has it (WITH=time)" ;;
        "make plot") command -v gnuplot > /dev/null || echo "gnuplot" ;;
        "make train_gpt_mpi" | mpirun*) command -v mpicxx > /dev/null || echo "MPI" ;;
        "make train_gpt_cu_mpi")
            command -v mpicxx > /dev/null && has_nvcc && ld -lnccl -o /dev/null 2> /dev/null ||
                echo "MPI, the CUDA Toolkit and NCCL" ;;
        "make grammar") [ "$STEPS" = all ] || echo "the default run, not shortened (STEPS=all)" ;;
        "make train_gpt_cu" | "make test_gpt_cu"*) has_nvcc || echo "the CUDA Toolkit" ;;
        "./train_gpt_cu" | "./train_gpt_cu "*)
            has_nvcc && nvidia-smi > /dev/null 2>&1 || echo "an NVIDIA GPU and the CUDA Toolkit" ;;
    esac
}
wanted() { [ "${WITH#* "$1" }" != "$WITH" ]; }
has_nvcc() { command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ]; }

# The command as it is run: words that stand for the reader's own are filled in, and a training run is
# shortened.
filled_in() {
    local command
    command=$(sed 's|--init-from DIR|--init-from out/stories/best|; s|--data DIR|--data data/stories|
                   s|--prompt TEXT|--prompt Once|; s|--output FILE|--output model.gguf|' <<< "$1")
    case "$command" in
        ./train_gpt | "./train_gpt --"* | "./train_gpt data/"* | mpirun* | "./train_gpt train"* | ./train_gpt_cu | "./train_gpt_cu --"*)
            [[ "$STEPS" == all || "$command" == *--help* ]] || command+=" --max-steps $STEPS" ;;
    esac
    echo "$command"
}

# One command on each line.
commands() {
    awk '
        function spans(   parts, n, i) {  # the text so far: every second part is between backquotes
            n = split(text, parts, "`")
            for (i = 2; i <= n; i += 2) if (parts[i] ~ /^(\.\/|make )/) print parts[i]
            text = ""
        }
        /^```/ { if (fence) fence = ""; else { spans(); fence = substr($0, 4) "." } next }
        !fence { text = text $0 " "; next }
        fence == "console." { if (!sub(/^\$ /, "")) next }
        fence == "sh." || fence == "console." {
            if (sub(/\\$/, "")) { line = line $0; next }
            print line $0; line = ""
        }
        END { spans() }' README.md | sed 's/ *&& */\n/g; s/ \+# .*//' | grep -v '^ *\(#.*\)\?$'
}

mapfile -t all < <(commands)
[ "${#all[@]}" -ge 5 ] || { echo "readme.sh: found only ${#all[@]} commands in README.md"; exit 1; }

if [ "${1:-}" != --list ]; then
    rm -rf "$CLONE"
    mkdir -p build
    git clone -q . "$CLONE"
    if ! git diff --quiet HEAD; then
        echo "with the changes that are not committed"
        git diff --binary HEAD | git -C "$CLONE" apply
    fi
    # The texts of the reader's own that README speaks of.
    cat ./*.hpp ./*.cpp > "$CLONE/book.txt"
    cat ./*.cu > "$CLONE/letters.txt"
    : > "$LOG"
fi

ran=0 skipped=0
declare -A seen
for command in "${all[@]}"; do
    [ -z "${seen[$command]:-}" ] || continue
    seen[$command]=1
    lack=$(lacks "$command") run=$(filled_in "$command")
    if [ -n "$lack" ]; then
        printf 'skipped  %-64s needs %s\n' "$command" "$lack"
        skipped=$((skipped + 1))
        continue
    fi
    if [[ "$run" =~ (^|[[:space:]])[A-Z]+([[:space:]]|$) ]]; then
        echo "readme.sh: what is ${BASH_REMATCH[0]} in '$run'? Say it in filled_in"
        exit 1
    fi
    printf 'run      %-64s ' "$run"
    ran=$((ran + 1))
    [ "${1:-}" != --list ] || { echo; continue; }
    began=$SECONDS
    printf '\n$ %s\n' "$run" >> "$LOG"
    if ! (cd "$CLONE" && timeout 1200 bash -c "$run" < /dev/null >> "$LOG" 2>&1); then
        echo "FAILED; the end of $LOG:"
        tail -20 "$LOG"
        exit 1
    fi
    echo "$((SECONDS - began)) s"
done
echo "README.md: $ran commands ran, $skipped were skipped"
