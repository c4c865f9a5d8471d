#!/bin/sh
# checks/compare.sh: trains one model from one seed on the same batches on the CPU and on the GPU
# (where there is none, with the CUDA kernels run by the CPU, at a tiny size), lays their curves
# over each other, and prints how far apart they are. It is the experiment "device".
set -u
exec "$(dirname "$0")/experiment.sh" device
