#!/usr/bin/env python3
# checks/kernels.py TABLE LOG...: what ptxas -v says of every kernel, one LOG for each architecture. Fails on a
# warning, on an attention kernel that spills or keeps an array in memory, and where TABLE is no longer true: lines of
# static shared memory and registers (the most of all architectures), by which the emulator counts. --write: writes it.
import re
import subprocess
import sys

write = "--write" in sys.argv
table, *logs = [a for a in sys.argv[1:] if a != "--write"]
static, registers, mistakes = {}, {}, []
for log in logs:
    name = ""
    for line in subprocess.run(["c++filt"], stdin=open(log), capture_output=True, text=True, check=True).stdout.splitlines():
        if re.search("warning|Performance Loss", line, re.I):
            mistakes.append(f"{log}: {line}")
        if found := re.search(r"Compiling entry function '(?:void )?tinygpt::([^(]*)\(", line):
            name = found.group(1)
        elif "attention" in name and re.search(r"[1-9]\d* bytes (stack|spill)", line):
            mistakes.append(f"{log}: {name}: {line.strip()}")
        elif found := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            registers[name] = max(registers.get(name, 0), int(found.group(1)))
            static[name] = max(static.get(name, 0), int(smem.group(1)) if smem else 0)
text = "".join(f"{static[name]} {registers[name]} {name}\n" for name in sorted(registers))
if write and not mistakes:
    open(table, "w").write(text)
old = open(table).read()
# Registers are the compiler's choice: another version may take others, up to what a launch has for each thread.
for name in sorted(set(registers) | {line.split(" ", 2)[2] for line in old.splitlines()}):
    if f"{static.get(name)} " not in re.findall(rf"^(\d+ )\d+ {re.escape(name)}$", old, re.M):
        mistakes.append(f"{table} is not what ptxas says of {name}: type make kernel_table")
print("\n".join(mistakes) or f"{len(registers)} kernels on {len(logs)} architectures: no warning, no spill; the most "
      f"registers {max(registers.values())}")
sys.exit(bool(mistakes))
