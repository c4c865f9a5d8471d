#!/bin/bash
# checks/screens.sh: what the commands print in terminals of 80 x 24 and 120 x 40, and in a file, to be looked
# at: build/screens/COMMAND-80x24.txt. Fails where a line was wider than its terminal. Needs tmux.
#
#   checks/screens.sh eval walk    only these; STEPS=2500 makes the run as long as the default one
set -eu
cd "$(dirname "$0")/.."
command -v tmux > /dev/null || { echo "error: there is no tmux: apt-get install tmux" >&2; exit 1; }
[ -x train_gpt ] && [ -d data/stories ] || { echo "error: type make train_gpt first" >&2; exit 1; }
STEPS=${STEPS:-300} out=build/screens server=
mkdir -p $out
trap 'tmux -L $server kill-server 2> /dev/null || true' EXIT

# The command of that name. The first makes the model that the others want.
command_of() {
    case $1 in
        run) echo "rm -rf $out/a; ./train_gpt --max-steps $STEPS --eval-interval $((STEPS / 3)) --output $out/a" ;;
        tuning) echo "rm -rf $out/b; ./train_gpt --init-from $out/a/best --max-steps 60 --eval-interval 20 --output $out/b" ;;
        eval) echo "./train_gpt eval --init-from $out/a/best" ;;
        sample) echo "./train_gpt sample --init-from $out/a/best --prompt Once" ;;
        walk | info | bench | help) echo "./train_gpt $1" ;;
        test) echo "make test TEST_PARTS=cpu FILTER='options*,walk*,json*'" ;;
        *) echo "echo there is no screen $1; false" ;;
    esac
}
# Runs a command in a terminal, waits for its end, and keeps what it showed, as lines before they were wrapped.
screen() {
    local done=$out/done file=$out/$1-$2.txt
    server=tinygpt-$$-$1-$2  # of its own: the last one may still be ending
    rm -f $done
    tmux -L $server -f /dev/null new-session -d -x "${2%x*}" -y "${2#*x}" "sh"
    tmux -L $server set -g history-limit 50000
    tmux -L $server respawn-pane -k "$(command_of "$1") 2>&1; echo \"[exit \$?]\"; touch $done; sleep 1000"
    until [ -e $done ]; do sleep 0.2; done
    tmux -L $server capture-pane -p -J -S - | sed -e 's/ *$//' -e '/^\[exit/q' > "$file"
    tmux -L $server kill-server
    tail -1 "$file" | grep -q '^\[exit 0\]' || { echo "$1 at $2 failed: $file"; bad=1; }
    # A command to paste is one line, however long.
    LC_ALL=C.UTF-8 awk -v wide="${2%x*}" -v name="$1 at $2" 'length($0) > wide && !/^[a-z ]* \.\/train_gpt/ {
        print name ": wraps: " $0; bad = 1 } END { exit bad }' "$file" || bad=1
    echo "$file: $(wc -l < "$file") lines"
}
unset MAKEFLAGS MFLAGS  # or the make that runs the tests warns of the one that runs this
bad=0
[ $# -gt 0 ] || set -- run tuning eval sample walk info bench help test
for name in "$@"; do
    for size in 80x24 120x40; do screen "$name" $size; done
    sh -c "$(command_of "$name")" > "$out/$name-file.txt" 2>&1 || { echo "$name into a file failed"; bad=1; }
done
exit $bad
