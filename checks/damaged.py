#!/usr/bin/env python3
# checks/damaged.py PROGRAM FOLDER: opens every damaged model folder below FOLDER by the program, five times,
# and says the medians of time and memory: at most 0.1 s and 64 MB. Why Python: the peak memory of a process
# counts from what its parent had.
import os
import subprocess
import sys
import time

program, folder = sys.argv[1:]
worst = [0, 0]
for name in sorted(os.listdir(folder)):
    tries = []
    for _ in range(5):
        began = time.time()
        child = subprocess.Popen([program, "sample", "--init-from", os.path.join(folder, name)],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        message = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 1 or message.count("\n") != 1:
            sys.exit(f"{name}: status {child.returncode}, and it said:\n{message}")
        tries.append((1000 * (time.time() - began), used.ru_maxrss / 1024))
    median = sorted(tries)[2]
    worst = [max(pair) for pair in zip(worst, median)]
    print("%s %8.1f ms %6.1f MB  %.100s" % (name, *median, message.strip()))
print("the worst: %.1f ms, %.1f MB" % tuple(worst))
sys.exit(worst[0] > 100 or worst[1] > 64)
