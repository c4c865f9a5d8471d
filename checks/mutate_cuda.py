#!/usr/bin/env python3
# checks/mutate_cuda.py: would the CUDA tests see it if a kernel were wrong? In every kernel of
# train_gpt.cu one sign and one term are broken in turn, and a test must fail each time.
#
#     checks/mutate_cuda.py            about four minutes; needs g++ and doctest, no GPU
#     checks/mutate_cuda.py layernorm  the mutants of kernels whose name contains that
#
# All mutants are built into one program: the expression `original` of a kernel becomes
# (kMutant == number ? (broken) : (original)), and the environment chooses the number.
import os
import re
import subprocess
import sys

# kernel or helper | which tests | sign or term | original (once in that function) | broken
MUTANTS = """
embed_forward_kernel | embedding | sign | token[i] += place[i] | token[i] -= place[i]
embed_forward_kernel | embedding | term | past + row % T | row % T
embed_forward_kernel | embedding | term | token[i] *= drop.scale(at + i) | token[i] *= 1
token_starts_kernel | embedding | sign | tokens[order[i]] == tokens[order[i - 1]] | tokens[order[i]] != tokens[order[i - 1]]
token_starts_kernel | embedding | term | starts[atomicAdd(count, 1)] = i | starts[atomicAdd(count, 1)] = i + (i > 2)
embed_backward_tokens_kernel | embedding | sign | total += sums[w][i] | total -= sums[w][i]
embed_backward_tokens_kernel | embedding | term | d[j] * drop.scale(at + j) | d[j]
embed_backward_places_kernel | embedding | sign | d[i] * drop.scale(from + i) | -d[i] * drop.scale(from + i)
embed_backward_places_kernel | embedding | term | sum[i] = dwpe[at + i] | sum[i] = 0
layernorm_forward_kernel | layernorm | sign | (values[i] - m) * r * w[i] + b[i] | (values[i] - m) * r * w[i] - b[i]
layernorm_forward_kernel | layernorm | term | float(kLayernormEps) | 0.0f
layernorm_forward_kernel | layernorm | term | (values[i] - m) * (values[i] - m) | values[i] * values[i]
layernorm_backward_kernel | layernorm | sign | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - mean_g + n * mean_gn
layernorm_backward_kernel | layernorm | term | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - n * mean_gn
layernorm_backward_kernel | layernorm | term | d[i] * w[i] - mean_g - n * mean_gn | d[i] * w[i] - mean_g
layernorm_backward_kernel | layernorm | term | if (dresidual) | if (false)
layernorm_backward_kernel | layernorm | term | joined[i] *= drop.scale(start + c + i) | joined[i] *= 1
layernorm_backward_kernel | layernorm | term | sums[i * kWarp] += d[i] * n | sums[i * kWarp] += d[i]
layernorm_backward_kernel | layernorm | sign | sums[places + i * kWarp] += d[i] | sums[places + i * kWarp] -= d[i]
layernorm_backward_kernel | layernorm | sign | sums[2 * places + i * kWarp] += joined[i] | sums[2 * places + i * kWarp] -= joined[i]
sum_partials_kernel | layernorm | sign | total += sums[i][threadIdx.x] | total -= sums[i][threadIdx.x]
sum_partials_kernel | layernorm | term | accumulate ? to[c] : 0 | 0.0f
gelu_of | linear | sign | 1 + tanhf(kGeluScale * (x + kGeluCube * x * x * x)) | 1 - tanhf(kGeluScale * (x + kGeluCube * x * x * x))
gelu_of | linear | term | 1 + tanhf(kGeluScale * (x + kGeluCube * x * x * x)) | 1 + tanhf(kGeluScale * x)
gelu_slope | linear | sign | 1 - t * t | 1 + t * t
gelu_slope | linear | term | 3 * kGeluCube * x * x | 0.0f
gelu_kernel | linear | sign | gelu_of(x[i]) | -gelu_of(x[i])
gelu_kernel | linear | term | gelu_of(x[i]) | x[i]
column_sums_kernel | linear | sign | sum[i] += x[i] | sum[i] -= x[i]
column_sums_kernel | linear | term | x[i] *= gelu_slope(before[i]) | x[i] *= 1
take_bias_gradient_kernel | linear | sign | float(from[i]) | -float(from[i])
take_bias_gradient_kernel | linear | term | accumulate ? to[i] : 0 | 0.0f
residual_dropout_kernel | linear | sign | branch[i] * drop.scale(at + i) | -branch[i] * drop.scale(at + i)
residual_dropout_kernel | linear | term | branch[i] * drop.scale(at + i) | branch[i]
plain_dots | attention<*float | sign | x0 * y.x + x1 * y.y + x2 * y.z + x3 * y.w | x0 * y.x + x1 * y.y - x2 * y.z + x3 * y.w
plain_dots | attention<*float | term | x0 * y.x + x1 * y.y + x2 * y.z + x3 * y.w | x0 * y.x + x1 * y.y + x2 * y.z
plain_add | attention<*float | sign | p[r * 32 + j] * x[e] | -p[r * 32 + j] * x[e]
plain_add | attention<*float | term | d < HS | d < HS - 1
attention_plain_forward_kernel | attention<*float | sign | score - highest[r] | highest[r] - score
attention_plain_forward_kernel | attention<*float | term | total[r] * shrink | total[r]
attention_plain_forward_kernel | attention<*float | term | o[r][i] *= shrink | o[r][i] *= 1
attention_plain_forward_kernel | attention<*float | term | s[r] * scale | s[r]
attention_plain_forward_kernel | attention<*float | term | key <= query | key < query + 2
attention_plain_forward_kernel | attention<*float | term | e * drop.scale(place) | e
attention_plain_forward_kernel | attention<*float | term | highest[r] + logf(total[r]) | logf(total[r])
attention_delta_kernel | attention<*float | sign | float(out[i * HS + d]) * float(dout[i * HS + d]) | -float(out[i * HS + d]) * float(dout[i * HS + d])
attention_delta_kernel | attention<*float | term | float(out[i * HS + d]) * float(dout[i * HS + d]) | float(out[i * HS + d])
attention_plain_backward_kernel | attention<*float | sign | expf(s[r] * scale - lse[at]) | expf(s[r] * scale + lse[at])
attention_plain_backward_kernel | attention<*float | sign | probability * (w * dp[r] - delta[at]) * scale | probability * (w * dp[r] + delta[at]) * scale
attention_plain_backward_kernel | attention<*float | term | probability * (w * dp[r] - delta[at]) * scale | probability * (dp[r] - delta[at]) * scale
attention_plain_backward_kernel | attention<*float | term | probability * (w * dp[r] - delta[at]) * scale | probability * (w * dp[r] - delta[at])
attention_plain_backward_kernel | attention<*float | term | probability * w | probability
attention_plain_backward_kernel | attention<*float | term | key <= query && query < T | key < query && query < T
softmax_step | attention<*bf16 | sign | (highest[half] - top) * scale2 | (top - highest[half]) * scale2
softmax_step | attention<*bf16 | term | total[half] * shrink | total[half]
softmax_step | attention<*bf16 | term | o[n][2 * half + 1] *= shrink | o[n][2 * half + 1] *= 1
drop_scores | attention<*bf16 | term | query + result_row(e) | query + 0 * e
attention_forward_kernel | attention<*bf16 | sign | highest[i][half] * scale + logf(total[i][half]) | highest[i][half] * scale - logf(total[i][half])
attention_forward_kernel | attention<*bf16 | term | highest[i][half] * scale + logf(total[i][half]) | logf(total[i][half])
mask_scores | attention<*bf16 | term | query + (kForKeys ? across : down) | query + (kForKeys ? across : down) + 1
attention_forward_kernel | attention<*bf16 | term | if (key >= mine + 16 * kM) | if (key > 0 && key >= mine)
attention_forward_kernel | attention<*bf16 | term | if (key + kKeys - 1 > query) | if (key + kKeys - 1 > query + 16)
backward_element | attention<*bf16 | sign | s * scale2 - lse2 | s * scale2 + lse2
backward_element | attention<*bf16 | sign | w * dp - delta | w * dp + delta
backward_element | attention<*bf16 | term | w * dp - delta | dp - delta
backward_element | attention<*bf16 | term | p * w | p
warp_delta | attention<*bf16 | sign | x[j] * y[j] | -x[j] * y[j]
warp_delta | attention<*bf16 | term | x[j] * y[j] | (j == 3 ? 0 : x[j] * y[j])
warp_delta | attention<*bf16 | sign | lse[row] * kLog2E | -lse[row] * kLog2E
block_column_sums | attention<*bf16 | sign | d[i][n][e] + d[i][n][e + 2] | d[i][n][e] - d[i][n][e + 2]
block_column_sums | attention<*bf16 | term | factor * total | total
store_rows | attention<*bf16 | term | factor * d[n][2 * half] | d[n][2 * half]
attention_backward_queries_kernel | attention<*bf16 | sign | lse[head.bh_T + query] * kLog2E | -lse[head.bh_T + query] * kLog2E
attention_backward_queries_kernel | attention<*bf16 | term | add_columns_product<HS, kM, kSlice>(dq, dp, k_tiles + at) | add_columns_product<HS, kM, kSlice>(dq, s, k_tiles + at)
attention_backward_queries_kernel | attention<*bf16 | term | if (key >= mine + 16 * kM) | if (key > 0 && key >= mine)
attention_backward_queries_kernel | attention<*bf16 | term | if (key + kSlice - 1 > query) | if (key + kSlice - 1 > query + 16)
attention_backward_keys_kernel | attention<*bf16 | sign | lse2[column] | -lse2[column]
attention_backward_keys_kernel | attention<*bf16 | term | add_columns_product<HS, kM, kSlice>(dv, s, d_tiles + at) | add_columns_product<HS, kM, kSlice>(dv, s, q_tiles + at)
attention_backward_keys_kernel | attention<*bf16 | term | if (query + kSlice <= mine) | if (query <= mine)
attention_backward_keys_kernel | attention<*bf16 | term | if (key + 15 > query) | if (key + 15 > query + 16)
softmax_cross_entropy_kernel | head | sign | logf(sum) + top - at_target | logf(sum) + top + at_target
softmax_cross_entropy_kernel | head | term | logf(sum) + top - at_target | logf(sum) - at_target
softmax_cross_entropy_kernel | head | term | begin + i == target ? one : 0 | 0.0f
softmax_cross_entropy_kernel | head | term | v == target ? one : 0 | 0.0f
softmax_cross_entropy_kernel | head | term | sum * exp2_approx((highest - top) * kLog2E) | sum
begin_step_kernel | update | sign | state->lr = lr | state->lr = -lr
begin_step_kernel | update | term | state->loss = 0 | state->loss += 0
add_loss_kernel | update | sign | state->loss += scale * sum | state->loss -= scale * sum
add_loss_kernel | update | term | state->loss += scale * sum | state->loss += sum
sum_of_squares_kernel | update | sign | sum += double(g[j]) * double(g[j]) | sum -= double(g[j]) * double(g[j])
sum_of_squares_kernel | update | term | sum += double(g[j]) * double(g[j]) | sum += double(g[j])
gradient_norm_kernel | update | sign | sum += sums[i] | sum -= sums[i]
gradient_norm_kernel | update | term | sqrt(sum) | sum
judge_step_kernel | update | sign | judge(*state, guards) | judge(*state, Guards{-guards.grad_clip, 0})
judge_step_kernel | update | term | judge(*state, guards) | (void)0
adamw_kernel | update | sign | g4[j] * clip | -g4[j] * clip
adamw_kernel | update | term | g4[j] * clip | g4[j]
adamw_kernel | update | term | i < decayed ? float(hyper.weight_decay) : 0 | float(hyper.weight_decay)
adamw_kernel | update | term | store_weights(weights + i, w4) | (void)0
round_weights_kernel | update | sign | load_pack(w, masters + i) | (load_pack(w, masters + i), void(w[0] = -w[0]))
round_weights_kernel | update | term | store_weights(weights + i, w) | (void)0
"""


def fail(message):
    sys.exit("mutate_cuda: " + message)


def function_at(source, name):
    """Where the definition of `name` starts and ends: from its name to the brace in column 0."""
    for found in re.finditer(r"\b%s\(" % name, source):
        start, line = found.start(), source[source.rfind("\n", 0, found.start()) + 1:found.start()]
        # Its line, or where it is too long the line before, says that it is a function of the GPU.
        before = source[:found.start() - len(line)].rstrip("\n").rsplit("\n", 1)[-1]
        if "__global__" in line or "__device__" in line or (not line.strip() and "__global__" in before):
            one_line = source[start:source.index("\n", start)]
            return start, source.index("\n", start) if one_line.endswith("}") else source.index("\n}", start)
    fail("there is no function %s in train_gpt.cu" % name)


def places_of(text, source, start, end):
    """Where `text` stands in source[start:end], whatever its line breaks."""
    pattern = r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", text))
    return [(m.start(), m.end()) for m in re.compile(pattern).finditer(source, start, end)]


def plant(source, mutants):
    """The source with all mutants in it, to be chosen by kMutant."""
    edits = {}
    for number, (name, _, _, original, broken) in enumerate(mutants, 1):
        start, end = function_at(source, name)
        places = places_of(original, source, start, end)
        if len(places) != 1:
            fail("%s has %d times, not once: %s" % (name, len(places), original))
        edits.setdefault(places[0] + (original,), []).append((number, broken))
    order = sorted(edits)
    for (_, end, text), (start, _, other) in zip(order, order[1:]):
        if end > start:
            fail("two mutants overlap: %s and %s" % (text, other))
    for start, end, original in reversed(order):
        source = source[:start] + chosen(original, edits[(start, end, original)]) + source[end:]
    return source


def chosen(original, choices):
    """The text that stands for `original` and picks one of its broken forms."""
    condition = original.startswith("if (")
    strip = (lambda text: text[4:-1]) if condition else (lambda text: text)
    # Assignments and calls of functions without a result have no value to choose.
    void = re.search(r"[^=!<>]=[^=]", original) or re.match(r"(add_columns_product|store_weights|load_pack|judge)\b", original)
    kind = "bool" if condition else "(void)" if void else ""
    result = kind + "(" + strip(original) + ")"
    for number, broken in choices:
        result = "(kMutant == %d ? %s(%s) : %s)" % (number, kind, strip(broken), result)
    return "if (" + result + ")" if condition else result


def kernels_without_mutants(source, mutants):
    """The kernels that lack a broken sign or a broken term."""
    kinds = {}
    for name, _, kind, _, _ in mutants:
        kinds.setdefault(name, set()).add(kind)
    lacking = []
    for name in re.findall(r"__global__ void\s+(?:__launch_bounds__\(\w+\)\s+)?(\w+)\(", source):
        if kinds.get(name, set()) != {"sign", "term"}:
            lacking.append(name)
    return lacking


def build(root, work, source):
    """One program with all mutants in it."""
    top = "#include <cstdlib>\nstatic const int kMutant = std::getenv(\"MUTANT\") ? std::atoi(std::getenv(\"MUTANT\")) : 0;\n"
    with open(work + "/train_gpt.cu", "w") as file:
        file.write(top + source)
    compiler = os.environ.get("CXX", "g++")
    emulator = root + "/cuda_on_cpu"
    doctest = os.environ.get("DOCTEST_DIR")
    flags = ["-std=c++20", "-fopenmp", "-Wno-all"]
    for command in (
        [compiler, "-std=c++20", "-O1", emulator + "/translate.cpp", "-o", work + "/translate"],
        [work + "/translate", work + "/train_gpt.cu", work + "/train_gpt_cu.cpp"],
        [compiler, *flags, "-O1", "-march=native", "-I" + emulator, "-I" + work, "-I" + root,
         *(["-I" + doctest] if doctest else []), "-DTINYGPT_TEST_CUDA", "-DDOCTEST_CONFIG_IMPLEMENT_WITH_MAIN",
         root + "/test_gpt.cpp", "-o", work + "/mutants"],
    ):
        subprocess.run(command, check=True)


def passes(root, work, number, tests):
    try:
        run = subprocess.run([work + "/mutants", "-tc=cuda: %s*" % tests, "--abort-after=1"], cwd=root, timeout=120,
                             capture_output=True, text=True, env=dict(os.environ, MUTANT=str(number)))
    except subprocess.TimeoutExpired:
        return False, "it hangs"
    return run.returncode == 0, run.stdout


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    mutants = [tuple(part.strip() for part in line.split(" | ")) for line in MUTANTS.strip().splitlines()]
    with open(root + "/train_gpt.cu") as file:
        source = file.read()
    lacking = kernels_without_mutants(source, mutants)
    if lacking:
        fail("no broken sign or no broken term for: " + ", ".join(lacking))
    work = root + "/build/mutants"
    os.makedirs(work, exist_ok=True)
    build(root, work, plant(source, mutants))
    for tests in sorted({tests for _, tests, _, _, _ in mutants}):
        good, output = passes(root, work, 0, tests)
        if not good:
            fail("the tests of %s fail without any mutant:\n%s" % (tests, output))
    wanted, survivors = sys.argv[1] if len(sys.argv) > 1 else "", []
    for number, (name, tests, kind, original, broken) in enumerate(mutants, 1):
        if wanted not in name:
            continue
        alive, _ = passes(root, work, number, tests)
        print("%-9s %s: %s -> %s" % ("SURVIVED" if alive else "caught", name, original, broken), flush=True)
        if alive:
            survivors.append(name)
    print("%d survived%s" % (len(survivors), ": " + ", ".join(survivors) if survivors else ""))
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
