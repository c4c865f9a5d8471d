#!/bin/bash
# checks/bare.sh [SUITE...]: README's first commands on a Debian that has nothing, and how long each took.
# Needs root, debootstrap and a network. Writes docs/first-run-SUITE.txt; the system stays in
# build/bare/SUITE, so that the next call begins at once. Suites: bookworm (12) and trixie (13).
set -eu
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "error: $0 makes a system of its own, and so must be root" >&2; exit 1; }
command -v debootstrap > /dev/null || { echo "error: there is no debootstrap: apt-get install debootstrap" >&2; exit 1; }

# Every line of a command's output, after the seconds since the first command after apt.
stamped() { while IFS= read -r line; do printf '%6.1f  %s\n' "$(seconds)" "$line"; done; }
seconds() { awk -v now="$(date +%s.%N)" -v then="$began" 'BEGIN { print now - then }'; }
# What is typed, and what it prints.
typed() {
    echo "        \$ $1"
    { TIMEFORMAT='(%U + %S s of processor time)'; time inside "$1" 2>&1; } 2>&1 | stamped
}
# A command in the new system, which sees nothing of this one but its processor and its devices.
inside() {
    unshare --mount sh -c 'mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" &&
        exec chroot "$0" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive http_proxy="${http_proxy:-}" sh -c "cd /tinygpt && $1"' "$root" "$1"
}

[ $# -gt 0 ] || set -- bookworm trixie
for suite in "$@"; do
    root=$PWD/build/bare/$suite out=docs/first-run-$suite.txt
    mkdir -p "$(dirname "$root")"
    [ -f "$root/etc/debian_version" ] || debootstrap --variant=minbase "$suite" "$root" > "$root.log"
    rm -rf "$root/tinygpt"
    git clone -q . "$root/tinygpt"
    began=$(date +%s)
    inside "apt-get update -q && apt-get install -y -q g++ make doctest-dev" > "$root.apt.log" 2>&1
    apt=$(($(date +%s) - began))
    {
        echo "checks/bare.sh, Debian $(cat "$root/etc/debian_version") with nothing installed, $(date -u +%F);"
        echo "$(nproc) processors, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), load $(cut -d" " -f1 /proc/loadavg), niceness $(nice)"
        echo "        # apt-get install -y g++ make doctest-dev: $apt s"
        began=$(date +%s.%N)
        typed "make train_gpt"
        echo "        \$ ./train_gpt            # interrupted at the first training loss"
        inside 'echo $$ > ../pid; exec ./train_gpt' 2>&1 | stamped | while IFS= read -r line; do
            echo "$line"
            case $line in *" loss "*) # once: a second signal would not let it save
                [ ! -f "$root/pid" ] || kill -INT "$(cat "$root/pid")"
                rm -f "$root/pid" ;;
            esac
        done
    } | tee "$out"
done
