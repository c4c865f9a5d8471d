#!/usr/bin/env python3
# checks/mutate.py: would the tests see it if the code were wrong? Breaks the code in one place after another;
# a test must fail each time.
#
#     checks/mutate.py cuda             every kernel of train_gpt.cu: one sign, one term, every barrier in turn.
#                                       About four minutes; needs g++ and doctest, no GPU
#     checks/mutate.py cuda layernorm   the mutants of functions whose name contains that
#     checks/mutate.py header           forty places of tinygpt.hpp, drawn by --seed; twenty minutes and more
#     checks/mutate.py cuda --list      the mutants, nothing built
#
# All mutants are built into one program: an expression becomes (kMutant == number ? (broken) : (original)),
# and the environment chooses the number. A kernel or helper without a mutant, and a line of the table that
# train_gpt.cu no longer has, end it at once.
import argparse
import os
import random
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORK = ROOT + "/build/mutants"

# kernel or helper | which tests | sign or term | original (once in that function) | broken
MUTANTS = """
embed_forward_kernel | embedding | sign | token[i] += position[i] | token[i] -= position[i]
embed_forward_kernel | embedding | term | past + row % T | row % T
embed_forward_kernel | embedding | term | token[i] *= drop.scale(at + i) | token[i] *= 1
embed_backward_tokens_kernel | embedding | term | if (first > 0 && tokens[order[first - 1]] == token) | if (false)
embed_backward_tokens_kernel | embedding | sign | d[j] * drop.scale(at + j) | -d[j] * drop.scale(at + j)
embed_backward_tokens_kernel | embedding | term | d[j] * drop.scale(at + j) | d[j]
add_up_warps | embedding | sign | total += sums[w][i] | total -= sums[w][i]
add_up_warps | embedding | term | add ? to[begin + i] : 0 | 0.0f
column_sums_kernel | embedding | sign | drop.on() ? x[i] * drop.scale(at + i) : x[i] | drop.on() ? -x[i] * drop.scale(at + i) : -x[i]
column_sums_kernel | embedding | term | drop.on() ? x[i] * drop.scale(at + i) : x[i] | x[i]
layernorm_forward_kernel | layernorm | sign | (values[0][i] - m) * r * w[i] + b[i] | (values[0][i] - m) * r * w[i] - b[i]
layernorm_forward_kernel | layernorm | term | warp_sum(squares) / C + eps | warp_sum(squares) / C + 0.0f
layernorm_forward_kernel | layernorm | term | (values[0][i] - m) * (values[0][i] - m) | values[0][i] * values[0][i]
pass | layernorm | term | t < kTables && begin != loaded | t < kTables && loaded < 0
pass | layernorm | term | values[t] | values[0]
layernorm_backward_kernel | layernorm | sign | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - mean_g + n * mean_gn
layernorm_backward_kernel | layernorm | term | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - n * mean_gn
layernorm_backward_kernel | layernorm | term | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - mean_g
layernorm_backward_kernel | layernorm | term | dresidual ? joined[i] : 0 | 0
layernorm_backward_kernel | layernorm | term | joined[i] *= drop.scale(start + c + i) | joined[i] *= 1
layernorm_backward_kernel | layernorm | term | sums[i * kWarp] += d[i] * n | sums[i * kWarp] += d[i]
layernorm_backward_kernel | layernorm | sign | sums[width + i * kWarp] += d[i] | sums[width + i * kWarp] -= d[i]
layernorm_backward_kernel | layernorm | sign | sums[2 * width + i * kWarp] += joined[i] | sums[2 * width + i * kWarp] -= joined[i]
sum_partials_kernel | layernorm | sign | total += sums[i][threadIdx.x] | total -= sums[i][threadIdx.x]
sum_partials_kernel | layernorm | term | accumulate ? to[c] : 0 | 0.0f
sum_partials_kernel | layernorm | term | blockIdx.y * C + c | c
sum_partials_kernel | linear | term | part += blockDim.y | part += blockDim.y + 1
warp_sum | update | term | step > 0 | step > 1
warp_max | head | sign | fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step)) | fminf(x, __shfl_xor_sync(0xffffffffu, x, step))
over_block | head | term | parts[warp] = x | parts[warp] = x + x
over_block | update | term | lane < warps ? parts[lane] : nothing | lane < 1 ? parts[lane] : nothing
block_sum | update | sign | over_block(x, T(0), warp_sum<T>) | -over_block(x, T(0), warp_sum<T>)
unpack | layernorm<*bf16 | term | words[i] << 16 | words[i]
unpack | layernorm<*float | term | __uint_as_float(raw.z) | __uint_as_float(raw.y)
load_pack | layernorm | term | reinterpret_cast<const uint4*>(from) | reinterpret_cast<const uint4*>(from + kPack<A>)
store_pack | layernorm<*bf16 | term | pack_bf16(x[6], x[7]) | pack_bf16(x[6], x[6])
store_pack | layernorm<*float | term | make_float4(x[0], x[1], x[2], x[3]) | make_float4(x[0], x[1], x[2], x[2])
sum_index | layernorm | term | c % N * kWarp | c % N
blocks_for | layernorm | term | (count + per_block - 1) / per_block | count / per_block
result_operand | attention<*bf16 | term | pack_bf16(right[0], right[1]) | pack_bf16(left[0], left[1])
result_row | attention<*bf16 | term | (e >> 1) * 8 | (e >> 2) * 8
result_column | attention<*bf16 | term | (e & 1) | (e & 0)
tile_descriptor | attention by groups | term | uint64_t(64) << 32 | uint64_t(32) << 32
tile_descriptor | attention by groups | term | uint64_t(1) << 62 | uint64_t(2) << 62
group_rows_product | attention by groups | term | tile + k * 16 | tile
group_rows_product | attention by groups | term | k > 0 | true
group_columns_product | attention by groups | term | tile + k * 16 * 64 | tile
wait_for | attention by groups | term | group_wait<0>(d[i]) | 0
wait_for_tiles | attention | term | group_publish() | 0
store_weights | update<*bf16 | term | pack_bf16(w[2], w[3]) | pack_bf16(w[2], w[2])
gelu_of | linear | sign | 1 + tanhf(kGeluScale * (x + kGeluCube * x * x * x)) | 1 - tanhf(kGeluScale * (x + kGeluCube * x * x * x))
gelu_of | linear | term | 1 + tanhf(kGeluScale * (x + kGeluCube * x * x * x)) | 1 + tanhf(kGeluScale * x)
gelu_slope | linear | sign | 1 - t * t | 1 + t * t
gelu_slope | linear | term | 3 * kGeluCube * x * x | 0.0f
gelu_kernel | linear | sign | gelu_of(x[i]) | -gelu_of(x[i])
gelu_kernel | linear | term | gelu_of(x[i]) | x[i]
column_sums_kernel | linear | term | x[i] *= gelu_slope(before[i]) | x[i] *= 1
residual_kernel | linear | sign | branch[i] * drop.scale(at + i) | -branch[i] * drop.scale(at + i)
residual_kernel | linear | term | branch[i] * drop.scale(at + i) | branch[i]
softmax_step | attention<*bf16 | sign | (highest[half] - top) * scale2 | (top - highest[half]) * scale2
softmax_step | attention<*bf16 | term | total[half] * shrink | total[half]
softmax_step | attention<*bf16 | term | o[n][2 * half + 1] *= shrink | o[n][2 * half + 1] *= 1
drop_scores | attention<*bf16 | term | query + result_row(e) | query + 0 * e
mask_scores | attention<*bf16 | term | query + (kForKeys ? across : down) | query + (kForKeys ? across : down) + 1
backward_element | attention<*bf16 | sign | s * scale2 - lse2 | s * scale2 + lse2
backward_element | attention<*bf16 | sign | w * dp - delta | w * dp + delta
backward_element | attention<*bf16 | term | w * dp - delta | dp - delta
backward_element | attention<*bf16 | term | p * w | p
statistics_rows | attention<*bf16 | term | T + T % 2 | T
begin_step_kernel | update | sign | state->lr = lr | state->lr = -lr
begin_step_kernel | update | term | state->loss = 0 | state->loss += 0
square_sums_kernel | update | sign | sum += double(g[j]) * double(g[j]) | sum -= double(g[j]) * double(g[j])
square_sums_kernel | update | term | sum += double(g[j]) * double(g[j]) | sum += double(g[j])
add_kernel | ten training | sign | to[i] += from[i] | to[i] -= from[i]
add_kernel | ten training | term | to[i] += from[i] | to[i] = from[i]
judge_step_kernel | update | sign | judge_step(state, guards) | judge_step(state, Guards{-guards.grad_clip, 0})
judge_step_kernel | update | term | judge_step(state, guards) | (void)0
adamw_kernel | update | sign | g4[j] * clip | -g4[j] * clip
adamw_kernel | update | term | g4[j] * clip | g4[j]
adamw_kernel | update | term | i < decayed ? float(hyper.weight_decay) : 0 | float(hyper.weight_decay)
adamw_kernel | update | term | store_weights(weights + i, w4) | (void)0
round_weights_kernel | update | sign | load_pack(w, masters + i) | (load_pack(w, masters + i), void(w[0] = -w[0]))
round_weights_kernel | update | term | store_weights(weights + i, w) | (void)0
Head | attention<*bf16 | term | q = qkv + size_t(b) * T * stride + h * HS | q = qkv + size_t(b) * T * stride
Head | attention<*float | term | (size_t(b) * T + t) * C + h * HS | (size_t(b) * T + t) * C
Head | attention<*bf16 | term | (size_t(b) * gridDim.x + blockIdx.x) * stride + h * HS | size_t(b) * gridDim.x * stride + h * HS
chunk_at | attention<*bf16 | term | kLong ? row & 7 : row >> 1 & 3 | kLong ? row & 7 : row >> 1 & 7
load_channels | attention<*float | term | i < left ? float(from[i]) : 0 | float(from[i])
load_channels | attention<*float | term | left % kPack<A> == 0 && left > 0 | left > 0
copy_tile | attention<*bf16 | term | first + row + i < T | first + i < T
copy_tile | attention<*float | term | valid ? size - chunk * N : 0 | size - chunk * N
copy_tile | attention<*bf16 | term | valid && chunk * N < size | valid
load | attention<*bf16 | term | 2 * k + lane / 16 | 2 * k
load | attention<*float | term | rows = tile + row * HS | rows = tile
round_operand | attention<*Tf32 | term | to_tf32(__uint_as_float(x)) | x << 13
mma_pair | attention<*bf16 | term | mma_bf16_16x8x16(right, a, b_right) | mma_bf16_16x8x16(right, a, b_left)
mma_pair | attention<*Tf32 | term | mma_tf32_16x8x8(right, a, b_right) | mma_tf32_16x8x8(right, a, b_left)
store_two | attention<*float | term | make_float2(x, y) | make_float2(x, x)
store_two | attention<*bf16 | term | pack_bf16(x, y) | pack_bf16(x, x)
plain_rows_product | attention<*float | sign | a[i][c] * b[c] | -a[i][c] * b[c]
plain_rows_product | attention<*float | term | 2 * i + j | 2 * i
plain_columns_product | attention<*float | sign | d[n][2 * i] += a[i] * b.x | d[n][2 * i] -= a[i] * b.x
plain_columns_product | attention<*float | term | 2 * n ^ (j & 6) | 2 * n
plain_columns_product | attention<*float | term | j % 8 / 2 | 0 * j
rows_product | attention<*bf16 | term | 2 * k + side | 2 * k
add_columns_product | attention<*bf16 | term | k * 16 + lane % 16 | lane % 16
add_columns_product | attention<*Tf32 | term | e % 2 * 2 + e / 2 | e
add_columns_product | attention<*Tf32 | term | result_column(k, e) | result_column(k, 0 * e)
store_rows | attention<*bf16 | term | factor * d[n][2 * half] | d[n][2 * half]
store_rows | attention<*float | term | c + 1 < size | c < size
attention_forward_kernel | attention<*bf16 | sign | highest[i][half] * scale + logf(total[i][half]) | highest[i][half] * scale - logf(total[i][half])
attention_forward_kernel | attention<*bf16 | term | highest[i][half] * scale + logf(total[i][half]) | logf(total[i][half])
attention_forward_kernel | attention<*bf16 | term | if (!kGroup && key >= mine + 16 * kM) | if (!kGroup && key > 0 && key >= mine)
attention_forward_kernel | attention<*bf16 | term | if (!kGroup && key + kKeys - 1 > mine) | if (!kGroup && key + kKeys - 1 > mine + 16)
attention_forward_kernel | attention by groups | term | if (kGroup && key + kKeys - 1 > query) | if (kGroup && key + kKeys - 1 > query + 16)
attention_forward_kernel | attention by groups | term | if (kGroup && kM == 2 && key >= first + 64) | if (kGroup && kM == 2 && key >= first)
attention_forward_kernel | attention by groups | term | group_wait<kM - 1 - kFrom>(s[i]) | 0
attention_forward_kernel | attention<*bf16 | term | kGroup ? 16 : 16 * kM | kGroup ? 16 : 16
attention_forward_kernel | attention by groups | term | kGroup ? 16 : 16 * kM | kGroup ? 64 : 16 * kM
attention_forward_kernel | attention<*float | term | past + (gridDim.x - 1 - blockIdx.x) * kQueries | (gridDim.x - 1 - blockIdx.x) * kQueries
attention_forward_kernel | attention by groups | term | kGroup && shared_address(attention_tiles) % 1024 != 0 | kGroup && shared_address(attention_tiles) % 1024 == 0
block_column_sums | attention<*bf16 | sign | d[i][n][e] + d[i][n][e + 2] | d[i][n][e] - d[i][n][e + 2]
block_column_sums | attention<*bf16 | term | factor * total | total
warp_delta | attention<*bf16 | sign | x[j] * y[j] | -x[j] * y[j]
warp_delta | attention<*bf16 | term | x[j] * y[j] | (j == 3 ? 0 : x[j] * y[j])
warp_delta | attention<*float | sign | lse[row] * kLog2E | -lse[row] * kLog2E
attention_backward_kernel | attention<*float | sign | lse[head.bh_T + query] * kLog2E | -lse[head.bh_T + query] * kLog2E
attention_backward_kernel | attention<*bf16 | term | add_columns_product<E, HS, kGroup>(d0, dp, streamed_0 + at) | add_columns_product<E, HS, kGroup>(d0, s, streamed_0 + at)
attention_backward_kernel | attention<*bf16 | term | add_columns_product<E, HS, kGroup>(d1, s, streamed_1 + at) | add_columns_product<E, HS, kGroup>(d1, s, streamed_0 + at)
attention_backward_kernel | attention<*bf16 | term | if (!kGroup && query + (kForKeys ? kSlice : 16 * kM) <= key) | if (!kGroup && key > 0 && query <= key)
attention_backward_kernel | attention<*bf16 | term | if (key + (kForKeys ? 16 * kM : kSlice) - 1 > query) | if (key + (kForKeys ? 16 * kM : kSlice) - 1 > query + 16)
attention_backward_kernel | attention<*float | term | size_t(blockIdx.y) * statistics_rows(T) | size_t(blockIdx.y) * 0
attention_backward_kernel | attention<*bf16 | sign | e % 2 ? two.z : two.x | e % 2 ? -two.z : -two.x
attention_backward_kernel | attention<*bf16 | term | e % 2 ? two.w : two.y | two.y
softmax_cross_entropy_kernel | head | sign | logf(sum) + top - at_target | logf(sum) + top + at_target
softmax_cross_entropy_kernel | head | term | logf(sum) + top - at_target | logf(sum) - at_target
softmax_cross_entropy_kernel | head | term | v + i == target ? scale : 0 | 0.0f
softmax_cross_entropy_kernel | head | term | target / N == v / N | target / N == v / N + 1
softmax_cross_entropy_kernel | head | term | v + i < V ? x[i] : -INFINITY | x[i]
softmax_cross_entropy_kernel | head | term | sum * exp2_approx((highest - top) * kLog2E) | sum
sum_kernel | update | sign | *total + scale * sum | *total - scale * sum
sum_kernel | update | term | *total + scale * sum | *total + sum
sum_kernel | update | term | sqrt(sum) | sum
"""



def fail(message):
    sys.exit("mutate: " + message)


class Mutant:
    """One place [start, end) of a source, and what it becomes; `tests` are tried first."""
    def __init__(self, where, kind, start, original, broken, tests):
        self.where, self.kind, self.start, self.end = where, kind, start, start + len(original)
        self.original, self.broken, self.tests = original, broken, tests

    def __str__(self):
        return "%-8s %s: %s -> %s" % (self.kind, self.where, self.original, self.broken)


def chosen(original, choices):
    """The text that stands for `original` and picks one of its broken forms."""
    condition = original.startswith("if (")
    inner = (lambda text: text[4:-1]) if condition else (lambda text: text)
    # Assignments and calls of functions without a result have no value to choose.
    void = re.search(r"[^=!<>]=[^=]", original) or re.match(
        r"(add_columns_product|store_weights|load_pack|judge_step|mma_bf16_16x8x16|__sync\w+|copy_async_\w+|group_wait|group_publish)\b", original)
    kind = "bool" if condition else "(void)" if void else ""
    result = kind + "(" + inner(original) + ")"
    for number, broken in choices:
        result = "(kMutant == %d ? %s(%s) : %s)" % (number, kind, inner(broken), result)
    return "if (" + result + ")" if condition else result


def plant(source, mutants):
    """The source with all mutants in it, to be chosen by kMutant."""
    places = {}
    for number, mutant in enumerate(mutants, 1):
        places.setdefault((mutant.start, mutant.end), []).append((number, mutant.broken))
    order = sorted(places)
    for (_, end), (start, _) in zip(order, order[1:]):
        if end > start:
            fail("two mutants overlap: " + source[start:end])
    for start, end in reversed(order):
        source = source[:start] + chosen(source[start:end], places[start, end]) + source[end:]
    return "#pragma once\n#include <cstdlib>\nstatic const int kMutant = std::getenv(\"MUTANT\") ? std::atoi(std::getenv(\"MUTANT\")) : 0;\n" + source


def compile_tests(*more):
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fopenmp", "-march=native", "-fno-math-errno", "-w",
                "-D_GLIBCXX_ASSERTIONS"]
    doctest = os.environ.get("DOCTEST_DIR")
    return subprocess.run([*compiler, *(["-I" + doctest] if doctest else []), *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def passes(number, tests, order="ascending"):
    """Whether the program's tests of these names pass with that mutant."""
    environment = dict(os.environ, MUTANT=str(number), CUDA_ON_CPU_ORDER=order, OMP_WAIT_POLICY="passive")
    try:
        run = subprocess.run([WORK + "/mutants", "-tc=" + tests, "--abort-after=1"], cwd=ROOT, timeout=300 if tests != "*" else 1200,
                             capture_output=True, env=environment)
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


# --- The kernels, by the table above

def functions_at(source, name):
    """Where definitions of `name` start and end: from the name to the brace in column 0."""
    found_at = []
    for found in re.finditer(r"\b%s\(" % name, source):
        start, line = found.start(), source[source.rfind("\n", 0, found.start()) + 1:found.start()]
        # Its line, or where it is too long the line before, says that it is a function of the GPU.
        before = source[:found.start() - len(line)].rstrip("\n").rsplit("\n", 1)[-1]
        if "__global__" in line or "__device__" in line or (not line.strip() and "__global__" in before):
            one_line = source[start:source.index("\n", start)]
            end = source.index("\n", start) if re.search(r"}\s*(//.*)?$", one_line) else source.index("\n}", start)
            found_at.append((start, end))
    return found_at or fail("there is no function %s in train_gpt.cu" % name)


def cuda_mutants(source):
    """The table's mutants, and every barrier of the functions in it as a mutant of its own."""
    mutants, barriers, tests, kinds = [], {}, {}, {}
    for line in MUTANTS.strip().splitlines():
        name, test, kind, original, broken = (part.strip() for part in line.split(" | "))
        tests.setdefault(name, set()).add("cuda: %s*" % test)
        kinds.setdefault(name, set()).add(kind)
        # Wherever its line breaks are.
        pattern = re.compile(r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", original)))
        places = [m for start, end in functions_at(source, name) for m in pattern.finditer(source, start, end)]
        if len(places) != 1:
            fail("%s has %d times, not once: %s" % (name, len(places), original))
        mutants.append(Mutant(name, kind, places[0].start(), places[0].group(), broken, "cuda: %s*" % test))
    for name in tests:
        for start, end in functions_at(source, name):
            for m in re.compile(r"(__syncthreads|__syncwarp|copy_async_wait<0>|copy_async_commit)\(\)").finditer(source, start, end):
                barriers[m.start()] = Mutant(name, "barrier", m.start(), m.group(), "0", ",".join(sorted(tests[name])))
    kernels = re.findall(r"__global__ void\s+(?:__launch_bounds__\([\w, ]+\)\s+)?(\w+)\(", source)
    # The words of PTX are checked against NVIDIA's tables by cuda_on_cpu/test_emulator.cu.
    helpers = re.findall(r"__device__ (?:inline )?(?:\w+\*? )?(\w+)\(", source[source.index("// PTX wrappers end"):])
    lacking = [name for name in kernels if not {"sign", "term"} <= kinds.get(name, set())] + \
        [name for name in helpers if name not in kinds and name not in ("row", "partial")]
    if lacking:
        fail("no broken sign or no broken term for: " + ", ".join(lacking))
    return mutants + [barriers[start] for start in sorted(barriers)]


def build_cuda(planted):
    emulator = ROOT + "/cuda_on_cpu"
    with open(WORK + "/train_gpt.cu", "w") as file:
        file.write(planted)
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", emulator + "/translate.cpp", "-o", WORK + "/translate"], check=True)
    subprocess.run([WORK + "/translate", WORK + "/train_gpt.cu", WORK + "/train_gpt_cu.cpp"], check=True)
    return compile_tests("-I" + emulator, "-I" + WORK, "-I" + ROOT, "-DTINYGPT_TEST_CUDA", "-DDOCTEST_CONFIG_IMPLEMENT_WITH_MAIN",
                         "test_gpt.cpp", "-o", WORK + "/mutants").stderr


# --- The header, by a seeded rule

# Section: how many mutants, and the tests that are tried first.
SECTIONS = {
    "2": (3, "data*"), "4": (5, "gradients*,reference*,attention*,dropout*,training*"), "7": (4, "adamw*,schedule*,guards*"),
    "9": (4, "evaluation*,generation*"), "11": (5, "matmul*,attention*,exp*,gelu*"), "13": (5, "tokenizer*"),
    "15": (4, "checkpoints*,run*"), "17": (10, "run*"),
}
# Kind: what is looked for in an expression, and what it becomes.
RULES = {
    "sign": [(r" [+-] ", lambda m: " - " if m.group() == " + " else " + ")],
    "term": [(r" [+-] \w[\w.]*(?![\w.(\[{<:-]| [*/%])|(?<![\w.]) ?\* [a-z]\w*(?![\w.(\[{<:])", lambda m: "")],
    "off by 1": [(r"(?<![\w.<])[0-9](?![\w.>'])", lambda m: str(int(m.group()) + 1))],
    "bound": [(r" [<>]=? ", lambda m: m.group()[:2] + " " if "=" in m.group() else m.group()[:2] + "= "),
              (r"std::(min|max)\b", lambda m: "std::max" if m.group(1) == "min" else "std::min")],
    "constant": [(r"(?<![\w.])\d+\.\d*[1-9]\d*f?(?![\w.])|(?<![\w:])k[A-Z]\w+(?![\w(:<])", lambda m: "(2 * %s)" % m.group())],
}
# Where breaking changes no result: members that are set before they are read, room, work shared out otherwise, layout of JSON, no limit
# at all, comparisons of measured times with a bound, or of 0 by 0 seconds, and an end of text that is -1 or the last id.
NO_EFFECT = ("int64_t tokens = 0;", "int64_t begin = 0;", "int64_t count = 0;", "int32_t broken = 0;", "epoch_steps));", "double clip_scale = 1;", "int32_t skip = 0;", "square = size_t(kQueries)", "cuts = across < threads", "json.write(2)",
             "kNoLimit", "fit / 32", "waited / seconds", "o_.max_minutes * 60", "end_of_text >= 0")
# What may be chosen at run time: what is returned, assigned or asked.
EXPRESSIONS = (r"\s*return (.+);$", r"\s*[\w:<>&* .\[\]()-]+? [-+*/]?= (.+);$", r"\s*(?:} )?(?:else )?(?:if|while) \((.+)\)(?: \{| [\w(].*;)?$",
               r"\s*for \([^;]*; ([^;]+); .*$")


def candidates(source):
    """Every mutant that the rules know, by section and kind."""
    found, section, at = {}, "", 0
    for line in source.splitlines(keepends=True):
        if heading := re.match(r"// §(\d+) ", line):
            section = heading.group(1)
        code = re.sub(r"\s*//.*", "", line.rstrip("\n"))
        for pattern in EXPRESSIONS if section in SECTIONS and not any(text in code for text in NO_EFFECT) and not re.search(r"constexpr|static|template|requires|[\"'{}]", code.rstrip(" {")) else ():
            match = re.match(pattern, code)
            if not match or any(match.group(1).count(a) != match.group(1).count(b) for a, b in ("()", "[]")) or re.search(r",(?![^(\[]*[)\]])", match.group(1)):
                continue
            for kind, rules in RULES.items():
                for rule, replace in rules:
                    for m in re.finditer(rule, match.group(1)):
                        broken = match.group(1)[:m.start()] + replace(m) + match.group(1)[m.end():]
                        found.setdefault((section, kind), []).append(
                            Mutant("§" + section, kind, at + match.start(1), match.group(1), broken, SECTIONS[section][1]))
            break
        at += len(line)
    return found


def header_mutants(source, seed):
    """Draws a kind, then one of its places; what does not compile is drawn anew."""
    draw, known, mutants = random.Random(seed), candidates(source), []
    while True:
        for section, (count, _) in SECTIONS.items():
            while sum(m.where == "§" + section for m in mutants) < count:
                kind = draw.choice(sorted(RULES))
                if not known.get((section, kind)):
                    continue
                drawn = known[section, kind].pop(draw.randrange(len(known[section, kind])))
                if all(drawn.start != m.start for m in mutants):
                    mutants.append(drawn)
        errors = build_header(plant(source, mutants), "-fsyntax-only")
        bad = {int(n) - 3 for n in re.findall(r"tinygpt\.hpp:(\d+):\d+: (?:error|  required)", errors)}
        kept = [m for m in mutants if source.count("\n", 0, m.start) + 1 not in bad]
        if not errors:
            return mutants
        if len(kept) == len(mutants):
            fail(errors[:2000])
        mutants = kept


def build_header(planted, *flags):
    with open(WORK + "/tinygpt.hpp", "w") as file:
        file.write(planted)
    for name in ("train_gpt.cpp", "prepare_data.cpp", "test_gpt.cpp"):
        with open(ROOT + "/" + name) as original, open(WORK + "/" + name, "w") as copy:
            copy.write(original.read())
    result = compile_tests("-I" + WORK, "-I" + ROOT, WORK + "/test_gpt.cpp", *(flags or ["-o", WORK + "/mutants"]))
    return result.stderr if result.returncode else ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("subject", choices=("cuda", "header"))
    parser.add_argument("where", nargs="?", default="", help="only mutants in functions or sections (§7) whose name has this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    cuda = arguments.subject == "cuda"
    os.makedirs(WORK, exist_ok=True)
    with open(ROOT + ("/train_gpt.cu" if cuda else "/tinygpt.hpp")) as file:
        source = file.read()
    mutants = cuda_mutants(source) if cuda else header_mutants(source, arguments.seed)
    names = ["line %d, %s" % (source.count("\n", 0, mutant.start) + 1, mutant) for mutant in mutants]
    if arguments.list:
        print(*names, sep="\n")
        sys.exit()
    errors = (build_cuda if cuda else build_header)(plant(source, mutants))
    if errors:
        fail(errors[:2000])
    for tests in sorted({mutant.tests for mutant in mutants}):
        if not passes(0, tests):
            fail("the tests of %s fail without any mutant" % tests)
    survivors = tried = 0
    for number, (mutant, name) in enumerate(zip(mutants, names), 1):
        if arguments.where not in mutant.where:
            continue
        # A missing barrier shows where the threads' order makes it matter.
        orders = ["ascending", "warps", "warps:7", "descending", "random:7"] if mutant.kind == "barrier" else ["ascending"]
        alive = all(passes(number, mutant.tests, order) for order in orders) and (cuda or passes(number, "*"))
        print("SURVIVED" if alive else "caught  ", name, flush=True)
        tried, survivors = tried + 1, survivors + alive
    print("%d mutants, %d survived" % (tried, survivors))
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
