// tinygpt.hpp - v0.2.0 - train a GPT-2, on a CPU or a GPU, in one header
//
// The model, an explicit forward and backward for every layer, the update, and the training loop.
// Two programs use it: train_gpt.cpp on a CPU, train_gpt.cu on an NVIDIA GPU. It is GPT-2 exactly,
// in fp32 or bf16, from scratch or from a Hugging Face checkpoint. It is not a framework: no
// autograd, no other model. Several processes may train one (§10).
//
//   make train_gpt && ./train_gpt   learns the default corpus in about a minute
//   ./train_gpt walk                shows one training step, with every number
//   make test                       checks every gradient against finite differences, and much more
//
// Read it from the top: it follows one batch through one training step.
//
//   §1  ground rules        errors, random numbers
//   §2  one batch           tokens, and the same text shifted by one
//   §3  the model           sizes, and the one list of parameters
//   §4  the layers          embedding, layernorm, linear, attention, GELU, residual, head and loss
//   §5  forward             GPT-2 on one screen
//   §6  backward            the same lines upside down
//   §7  the update          learning rate, clipping, guards, AdamW
//   §8  one training step   all of it on one screen
//   §9  evaluate, generate
//   ----  the model ends here; the rest is plumbing
//   §10 device, memory, processes   §11 the fast CPU   §12 systems, files, JSON   §13 tokenizer
//   §14 Hugging Face folders   §15 checkpoints   §16 log, terminal   §17 the training loop
//   §18 options
//
// Notation. x is a layer's input, out its output, w and b its weight and bias; dx is the gradient
// of the loss with respect to x. [B, T, C]: B rows of T tokens of C channels, the last index
// running fastest. Outputs are the first arguments. Comments say what a function sets and what it
// adds to; "Why" gives a reason, "Careful" marks a trap, "walk>" quotes ./train_gpt walk.
//
// If you know Python, this is the C++ you need:
//   const real* x           an array that is only read: the address of its first number. Its length
//                           is stated nearby; nothing checks it
//   x + size_t(row) * C     the address of a row, as x[row] of a NumPy array with C columns. size_t
//                           has 64 bits; an int overflows at 2^31, which rows * 4C can exceed
//   a / b                   of two ints: Python's a // b, for numbers that are not negative
//   template <class real>   compiled once for each type: float to train, double to check gradients
//   [&](int i) { ... }      a lambda that sees the variables around it; [=] gives it copies
//   auto& y = x             another name for x, not a copy; auto: the type of the right side
//   std::vector<float>      a list that owns its numbers; std::span, std::string_view: slices
//   {.B = 1, .T = 8}        a struct with these members set, the others at their defaults
//   #pragma omp parallel for   shares out the iterations of the next loop among the threads
//   #pragma omp simd        does several iterations at once, in one register
//   c ? a : b               a if c else b;   a = 1, b = 2: two assignments, one after the other
//   p->x, p.x, A::x         x of the object that p points to; of p itself; of the type A
//   p - q, if (p)           how many elements lie between two addresses; whether p is not null
//   if constexpr            decided when it is compiled; (f(x), ...): f of every argument
//   real *p = a, s = 0      p is an address, s a number
//   auto operator<=>(...) = default;   two of them can be compared, member by member
//   ~Name()                 runs when an object's scope ends, as __exit__ at the end of a `with`
// Ignore the other words (inline, explicit, noexcept, [[...]]): they are for the compiler.
//
// In a program of your own: C++20, -fopenmp, one #include, in as many files as you like. Everything
// is in namespace tinygpt. Licence: MIT, see LICENSE.
//
#ifndef TINYGPT_HPP_INCLUDED
#define TINYGPT_HPP_INCLUDED

#define TINYGPT_VERSION 200  // major * 10000 + minor * 100 + patch

#include <fcntl.h>      // open
#include <glob.h>       // glob: shard patterns
#include <omp.h>        // threads
#include <signal.h>     // sigaction: Ctrl-C saves before it stops
#include <sys/file.h>   // flock: one run per folder
#include <sys/ioctl.h>  // TIOCGWINSZ: how wide the terminal is
#include <sys/mman.h>   // madvise: large pages
#include <sys/stat.h>
#include <unistd.h>  // pread, fsync
#ifdef __APPLE__
#include <xlocale.h>
#else
#include <sys/auxv.h>     // getauxval: what an ARM CPU can do
#include <sys/syscall.h>  // calls that a C library may lack
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <clocale>
#include <cmath>
#include <compare>
#include <concepts>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <queue>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

// Why: masked attention needs -infinity and the guards need NaN; finite-math builds break both.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "tinygpt needs infinities and NaN: build without -ffast-math, -Ofast or -ffinite-math-only"
#endif

// A function marked so is compiled for the GPU too when nvcc reads this header.
#ifdef __CUDACC__
#define TINYGPT_HD __host__ __device__
#else
#define TINYGPT_HD
#endif

namespace tinygpt {

// =================================================================================================
// §1 Ground rules: errors, and random numbers
// =================================================================================================
// What you have now: three rules.
//   Nothing fails silently: checks stay on in every build, and say what to do.
//   A run repeats bit for bit, with 1 thread or 16, interrupted or not: a random number depends on
//   where it is used (below), a sum has one order for any number of threads, the order of the data
//   depends on the seed.
//   Nothing is hidden: what a step computes is in this file, and `walk` prints it.

// Every failure is thrown as an Error. main prints the message and exits with the status.
struct Error : std::runtime_error {
    int status;  // 1: failed at run time, 2: bad usage
    Error(int status, const std::string& message) : std::runtime_error(message), status(status) {}
};

// Until the end of the scope, this thread's decimal point is a dot, whatever the program's locale.
class DotForDecimals {
    locale_t chosen_;

public:
    DotForDecimals() {
        static const locale_t plain = ::newlocale(LC_ALL_MASK, "C", nullptr);
        chosen_ = ::uselocale(plain);
    }
    DotForDecimals(const DotForDecimals&) = delete;
    ~DotForDecimals() { ::uselocale(chosen_); }
};

// printf into a string: format("%d of %s", 3, "x") is "3 of x".
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
    const DotForDecimals dot;
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    std::string out(size_t(std::vsnprintf(nullptr, 0, pattern, args)), '\0');
    std::vsnprintf(out.data(), out.size() + 1, pattern, again);
    va_end(args);
    va_end(again);
    return out;
}

// Text and numbers joined: to_text("expected ", 3, ", found ", name).
inline void append(std::string& out, std::string_view part) { out += part; }
inline void append(std::string& out, char part) { out += part; }
inline void append(std::string& out, double part) { out += format("%g", part); }
inline void append(std::string& out, std::integral auto part) { out += std::to_string(part); }
template <class... Parts>
std::string to_text(const Parts&... parts) {
    std::string out;
    (append(out, parts), ...);
    return out;
}

// Throws an Error. The message says what was expected, what was found, where, and what to do.
// fail_usage is for what the command line can put right.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw Error(1, to_text(parts...));
}
template <class... Parts>
[[noreturn]] void fail_usage(const Parts&... parts) {
    throw Error(2, to_text(parts...));
}

// A failed system call. code is its errno; the message ends with that reason.
struct FileError : Error {
    int code;
    FileError(int code, const std::string& message) : Error(1, message), code(code) {}
};
template <class... Parts>
[[noreturn]] void fail_errno(const Parts&... parts) {
    const int code = errno;
    throw FileError(code, to_text(parts..., ": ", std::strerror(code)));
}

// a / b, rounded up; and a, rounded up to a multiple of b.
constexpr auto ceil_div(auto a, auto b) { return (a + b - 1) / b; }
constexpr auto round_up(auto a, auto b) { return ceil_div(a, b) * b; }

// bf16: the upper half of a float, with its range but 8 significant bits instead of 24.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    // Rounds to nearest, ties to even. Adding 0x7fff, and 1 more if the last bit that stays is 1,
    // carries into the upper half exactly when the value must be rounded up. A NaN stays a NaN.
    TINYGPT_HD explicit bf16(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = uint16_t(nan ? (u >> 16) | 0x40 : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
    TINYGPT_HD operator float() const {  // exact, so it need not be asked for
        uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};
// The type that computes with numbers stored as A: for bf16 float, otherwise A itself.
template <class A>
using RealOf = std::conditional_t<std::is_same_v<A, bf16>, float, A>;

// A random number is a pure function: random_bits(key, i) is number i of the stream `key`. None is
// drawn "next", so threads, resumed runs and GPUs see the same ones. mix_bits is the finaliser of
// SplitMix64 (Steele, Lea, Flood 2014): different inputs give different outputs.
TINYGPT_HD inline uint64_t mix_bits(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
// A value for each use, so that no two share a stream; and what random_key's `number` counts there.
enum RandomUse : uint64_t {
    kBlockOrder = 1,  // §2, epochs
    kCutOffset,       // §2, epochs
    kInitialWeights,  // §3, tensors
    kDropoutMask,     // §5, dropouts of the model
    kMicroBatch,      // §8, micro-batches
    kGeneration       // §9
};
TINYGPT_HD inline uint64_t random_key(uint64_t seed, uint64_t number, uint64_t use) {
    return mix_bits(mix_bits(mix_bits(seed + 0x9e3779b97f4a7c15ull) + number) + use);
}
// The multiplier, 2^64 / golden ratio, spreads 0, 1, 2, ... evenly.
TINYGPT_HD inline uint64_t random_bits(uint64_t key, uint64_t i) {
    return mix_bits(key + i * 0x9e3779b97f4a7c15ull);
}
// Uniform in [0, 1).
TINYGPT_HD inline double random_uniform(uint64_t key, uint64_t i) {
    return double(random_bits(key, i) >> 11) * 0x1.0p-53;
}
// Standard normal (Box, Muller 1958): for uniform u and v, the point at distance sqrt(-2 log u) and
// angle 2 pi v is normal in both coordinates. Why 1 - ...: log 0 is infinite.
inline double random_normal(uint64_t key, uint64_t i) {
    double u = 1.0 - random_uniform(key, 2 * i), v = random_uniform(key, 2 * i + 1);
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * v);
}

// =================================================================================================
// §2 One batch: B rows of T tokens, and the same text shifted by one
// =================================================================================================
// What you have now: errors and random numbers. A model reads tokens: numbers below 65,536 that
// each stand for a piece of text (§13).
//
//   text      the   cat   sat   on   the   mat   and
//   inputs    the   cat   sat   on                       one row of a batch, with T = 4
//   targets         cat   sat   on   the                 the same text, one token later
//
// So a row asks T questions: what comes after "the", what after "the cat", and so on. Tokens are
// stored in shards, all numbers with the lowest byte first:
//
//   byte     0  88 d8 34 01   20240520: this is a shard
//            4  01 00 00 00   version 1
//            8  31 a3 13 00   1,286,961 tokens follow the header
//           12  zeros, up to byte 1023
//         1024  9f 03         token 927, end-of-text, which stands before every text
//         1026  51 01         token 337, and so on: two bytes each, to the end of the file
//
// The public FineWeb shards for GPT-2 have this layout and work as they are.

constexpr int kShardHeaderBytes = 1024;
constexpr int32_t kShardMagic = 20240520;
constexpr int32_t kIgnore = -1;  // a target that is not scored: no loss, no gradient

// What forward and backward read. From inputs[b][0..t] the model predicts targets[b][t], which is
// the token that follows inputs[b][t] in the text.
//   walk> row 0, t=0   input  0 the   target  1 cat
//   walk> row 0, t=1   input  1 cat   target  2 sat
struct Batch {
    int B, T;
    std::vector<int32_t> inputs, targets;  // [B, T] each
    int64_t scored = 0;                    // targets that are not kIgnore
    // Empty: inputs 0, nothing to score.
    explicit Batch(int B = 0, int T = 0)
        : B(B), T(T), inputs(size_t(B) * size_t(T)), targets(inputs.size(), kIgnore) {}
};

// A shard. Its file is opened for each read: so many may not be open at once. How it is read, and
// what is checked, is in §12.
struct Shard {
    std::string path;
    int64_t tokens = 0;
    std::filesystem::file_time_type written;  // the last time it was
    explicit Shard(const std::string& path);
    size_t bytes() const { return kShardHeaderBytes + 2 * size_t(tokens); }
    // Every token but the first is predicted.
    int64_t predictions() const { return std::max<int64_t>(0, tokens - 1); }
    // Sets out[count] to the tokens from `begin` on. Fails on one that is not below vocab_size: wte
    // has no row for it.
    void read(uint16_t* out, int64_t begin, int64_t count, int vocab_size = 65536) const;
};

// The shards of one split: training or validation.
struct Shards {
    std::string pattern;
    std::vector<Shard> files;
    // Every file that matches the pattern (as in a shell: *, ?, [...]), in name order; there may be
    // none. The name of a file that exists means that file, whatever is in the name.
    explicit Shards(const std::string& pattern);
    bool empty() const { return files.empty(); }
    int64_t tokens() const;
    int64_t predictions() const;
    // Reads all, so that a token that is not below vocab_size is reported now, not hours later.
    void check_tokens(int vocab_size) const;
};

// `count` neighbouring positions of a shard's text; they fill one row of a batch. Prediction i
// reads the tokens up to i and is scored by token i + 1.
struct Window {
    const Shard* shard = nullptr;
    int64_t begin = 0;  // the first prediction
    int64_t count = 0;  // how many; on a ring: after the shard's last one comes its first
    int64_t skip = 0;   // this many of the first are context only, not scored
};

// A batch [B, T] with a window in each row; the rest is not scored. Here inputs and targets part:
// both are copied from the same text, targets from one token later. Needs at most B windows of T
// predictions.
inline Batch read_batch(std::span<const Window> windows, int B, int T, int vocab_size) {
    Batch batch(B, T);
    std::vector<uint16_t> text(size_t(T) + 1);
    for (size_t b = 0; b < windows.size(); ++b) {
        const Window& window = windows[b];
        const int64_t ring_size = window.shard->predictions();
        // One read, or two where the window runs over the end of the ring.
        for (int64_t t = 0, n = 0; t < window.count; t += n) {
            const int64_t from = (window.begin + t) % ring_size;
            n = std::min(window.count - t, ring_size - from);
            window.shard->read(text.data(), from, n + 1, vocab_size);
            for (int64_t i = 0; i < n; ++i) {
                const size_t at = b * size_t(T) + size_t(t + i);
                batch.inputs[at] = text[size_t(i)];
                if (t + i >= window.skip) batch.targets[at] = text[size_t(i) + 1];  // the shift
            }
        }
        batch.scored += window.count - window.skip;
    }
    return batch;
}

// Where i goes when 0 .. n-1 are shuffled: a permutation without a list. The bits of i are cut into
// two halves, and each round mixes one into the other (a Feistel cipher):
//   (left, right) -> (right, left ^ mix(right))     undone by     (l, r) -> (r ^ mix(l), l)
// Each round can be undone, so the rounds are a permutation of 4^half >= n numbers. A
// result >= n goes through again until it is below (Black, Rogaway 2002): fewer than four times on
// average.
inline uint64_t shuffled(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;
    while (half < 32 && (uint64_t(1) << (2 * half)) < n) ++half;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 4; ++round) {
            const uint64_t mixed = left ^ (random_bits(key + right, round) & mask);
            left = right, right = mixed;
        }
        i = (left << half) | right;
    } while (i >= n);
    return i;
}

// The order in which training reads the text. Shards are cut into blocks of T predictions (the last
// of a shard may be shorter). A block is one sample, so an epoch makes every prediction once. With
// shuffle, every epoch has its own order of the blocks, and cuts each shard from an offset of its
// own. All of it is a function of the seed and the sample's number: there is no state to save. With
// 10 tokens, so predictions 0 to 8, and T = 4:
//   in order    0 1 2 3 | 4 5 6 7 | 8            in every epoch
//   shuffled    6 7 8 0 | 1 2 3 4 | 5            from offset 6, say; the blocks in any order
struct DataOrder {
    const Shards& shards;
    int B = 1, T = 1;
    uint64_t seed = 0;
    bool shuffle = false;
    bool overfit_batch = false;  // the first B blocks of the first shard, over and over

    int64_t blocks_of(const Shard& shard) const { return ceil_div(shard.predictions(), T); }
    int64_t blocks_per_epoch() const {
        int64_t blocks = 0;
        for (const Shard& shard : shards.files) blocks += blocks_of(shard);
        return overfit_batch ? B : blocks;
    }
    // The epoch of sample i, counted from the start of training.
    int64_t epoch(int64_t i) const { return i / blocks_per_epoch(); }

    // The block that is sample i.
    Window window(int64_t i) const {
        const int64_t blocks = blocks_per_epoch();
        int64_t block = i % blocks;
        if (overfit_batch) return {&shards.files[0], block * T, T};
        auto key = [&](RandomUse use) { return random_key(seed, uint64_t(epoch(i)), use); };
        if (shuffle) block = int64_t(shuffled(uint64_t(block), uint64_t(blocks), key(kBlockOrder)));
        // Blocks are numbered through all shards; from here on, block counts within shard s.
        size_t s = 0;
        for (; block >= blocks_of(shards.files[s]); ++s) block -= blocks_of(shards.files[s]);
        const Shard& shard = shards.files[s];
        const int64_t ring = shard.predictions(), begin = block * T;
        const uint64_t offset = shuffle ? random_bits(key(kCutOffset), s) % uint64_t(ring) : 0;
        return {&shard, (begin + int64_t(offset)) % ring, std::min<int64_t>(T, ring - begin)};
    }
    // The batch of samples i .. i + B - 1.
    Batch batch(int64_t i, int vocab_size) const {
        std::vector<Window> windows;
        for (int b = 0; b < B; ++b) windows.push_back(window(i + b));
        return read_batch(windows, B, T, vocab_size);
    }
};

// =================================================================================================
// §3 What a model is made of: its sizes, and the one list of its parameters
// =================================================================================================
// What you have now: a batch, inputs and targets [B, T]. A token becomes a vector x of C numbers, L
// layers add to it, and at the end it is compared with the vectors of all V tokens:
//
//   tokens --> wte[token] + wpe[position] --> x           the residual stream, C numbers a position
//                                             |
//                +-- x += attention(ln_1(x))              positions look at each other
//      L times   |
//                +-- x += mlp(ln_2(x))                    each position thinks for itself
//                                             |
//                                        ln_f(x) wte^T --> a score for every token
//
// The last line uses the embedding table again (the "tied head"): one vector reads and predicts a
// token. Nearly all parameters are in wte and in the four matrices of each layer. For GPT-2 small,
// with C = 768, L = 12, V = 50257, P = 1024:
//   a layer   3 C^2 (c_attn) + C^2 (attn's c_proj) + 4 C^2 (c_fc) + 4 C^2 (mlp's c_proj) = 12 C^2,
//             9 C of biases and 4 C of two norms: 7,087,872
//   in all    V C + P C + 12 * 7,087,872 + 2 C (ln_f) = 124,439,808
// Dimensions:
//   B batch   T sequence   C channels (n_embd)   NH heads   HS = C / NH head size
//   L layers  V vocabulary  P positions

// L, NH, C, P, V under Hugging Face's names. C must be a multiple of NH.
struct Config {
    int n_layer = 0, n_head = 0, n_embd = 0, n_positions = 0, vocab_size = 0;
    bool untied_head = false;          // lm_head.weight is a tensor of its own, not wte.weight
    float dropout = 0;                 // the share of elements set to 0 (§4), in training only
    bool recompute_gelu = false;       // backward computes the GELUs again, to save memory (§5)
    double layer_norm_epsilon = 1e-5;  // added to variances (§4.2); a checkpoint may have its own
    int head_size() const { return n_embd / n_head; }
};

// The sizes as config.json names them, another name that transformers reads, and the maximum
// (tokens have 16 bits). `int Config::*size` says which member of a Config.
struct SizeLimit {
    const char *name, *also;
    int Config::*size;
    int most;
};
inline constexpr SizeLimit kSizes[] = {
    {"n_layer", "num_hidden_layers", &Config::n_layer, 1000},
    {"n_head", "num_attention_heads", &Config::n_head, 65536},
    {"n_embd", "hidden_size", &Config::n_embd, 65536},
    {"n_positions", "n_ctx", &Config::n_positions, 1 << 20},
    {"vocab_size", "vocab_size", &Config::vocab_size, 65536},
};

struct Preset {
    const char* name;
    Config config;
};
// All but `tiny` are GPT-2's, as published (Radford et al. 2019).
inline const Preset kPresets[] = {
    // n_layer, n_head, n_embd, n_positions, vocab_size
    {"tiny", {2, 4, 128, 128, 1024}},
    {"gpt2", {12, 12, 768, 1024, 50257}},
    {"gpt2-medium", {24, 16, 1024, 1024, 50257}},
    {"gpt2-large", {36, 20, 1280, 1024, 50257}},
    {"gpt2-xl", {48, 25, 1600, 1024, 50257}},
};

// Every tensor by name: pointers into a flat array of weights, or of gradients.
template <class Element>
struct Parameters {
    struct Layer {
        Element *ln_1_weight, *ln_1_bias, *c_attn_weight, *c_attn_bias;
        Element *attn_proj_weight, *attn_proj_bias;
        Element *ln_2_weight, *ln_2_bias, *c_fc_weight, *c_fc_bias;
        Element *mlp_proj_weight, *mlp_proj_bias;
    };
    Element *wte, *wpe;    // token and position embeddings
    std::vector<Layer> h;  // the layers, as Hugging Face calls them
    Element *ln_f_weight, *ln_f_bias;
    Element* lm_head;  // the tied head is wte itself
};

// What a tensor holds before training. residual: normal, scaled by 1/sqrt(2L).
enum class Init { zeros, ones, normal, residual };

// The one list. Calls visit(name, pointer, shape, init) once for every tensor. Allocation,
// initialisation, weight decay, checkpoints, the parameter table and the gradient test all use it,
// so none forgets a tensor. visit gets p.wte itself, not a copy: see point_into. Names and shapes
// are Hugging Face's: linear weights are [in, out], y = x W + b.
template <class Element, class Visit>
void for_each_tensor(const Config& config, Parameters<Element>& p, Visit&& visit) {
    using Shape = std::vector<int64_t>;
    const int64_t C = config.n_embd, V = config.vocab_size, P = config.n_positions;
    visit("wte.weight", p.wte, Shape{V, C}, Init::normal);
    visit("wpe.weight", p.wpe, Shape{P, C}, Init::normal);
    for (int l = 0; l < config.n_layer; ++l) {
        auto& h = p.h[size_t(l)];
        const std::string at = "h." + std::to_string(l) + ".";
        visit(at + "ln_1.weight", h.ln_1_weight, Shape{C}, Init::ones);
        visit(at + "ln_1.bias", h.ln_1_bias, Shape{C}, Init::zeros);
        visit(at + "attn.c_attn.weight", h.c_attn_weight, Shape{C, 3 * C}, Init::normal);
        visit(at + "attn.c_attn.bias", h.c_attn_bias, Shape{3 * C}, Init::zeros);
        visit(at + "attn.c_proj.weight", h.attn_proj_weight, Shape{C, C}, Init::residual);
        visit(at + "attn.c_proj.bias", h.attn_proj_bias, Shape{C}, Init::zeros);
        visit(at + "ln_2.weight", h.ln_2_weight, Shape{C}, Init::ones);
        visit(at + "ln_2.bias", h.ln_2_bias, Shape{C}, Init::zeros);
        visit(at + "mlp.c_fc.weight", h.c_fc_weight, Shape{C, 4 * C}, Init::normal);
        visit(at + "mlp.c_fc.bias", h.c_fc_bias, Shape{4 * C}, Init::zeros);
        visit(at + "mlp.c_proj.weight", h.mlp_proj_weight, Shape{4 * C, C}, Init::residual);
        visit(at + "mlp.c_proj.bias", h.mlp_proj_bias, Shape{C}, Init::zeros);
    }
    visit("ln_f.weight", p.ln_f_weight, Shape{C}, Init::ones);
    visit("ln_f.bias", p.ln_f_bias, Shape{C}, Init::zeros);
    if (config.untied_head) visit("lm_head.weight", p.lm_head, Shape{V, C}, Init::normal);
}

// Where a tensor lies in the flat array that holds all of them.
struct TensorInfo {
    std::string name;
    std::vector<int64_t> shape;
    Init init;
    size_t count = 1, room = 0;  // elements, without and with padding
    size_t offset = 0;
    bool decays() const { return shape.size() >= 2; }  // only tensors of two dimensions do
};

// All parameters lie in one flat array, and so do their gradients and moments: the update is one
// loop. First come the tensors that decay (matrices and both embeddings), then those that do not
// (biases, layernorms): element i decays if i < decayed. Why not all: decay pulls a weight towards
// 0, and a bias or a scale has no reason to be small. Each tensor starts at a multiple of 64
// elements: at a cache line. Tables of V tokens are padded to a multiple of 64 rows, because a GPU
// multiplies whole tiles. Padding is 0, with gradient 0.
struct Layout {
    std::vector<TensorInfo> tensors;  // in the order of the list
    size_t size = 0, decayed = 0;     // elements with padding; how many of them decay
    size_t count = 0;                 // parameters, without padding
};

// The rows of a table of V tokens, padding included.
inline int table_rows(int V) { return round_up(V, 64); }

// Two passes: collect the shapes (the pointers in `none` are not used), then assign the offsets.
inline Layout layout_of(const Config& config) {
    Layout layout;
    Parameters<char> none;
    none.h.resize(size_t(config.n_layer));
    for_each_tensor(config, none, [&](auto name, char*, const auto& shape, Init init) {
        TensorInfo t{name, shape, init};
        for (int64_t n : shape) t.count *= size_t(n);
        const int V = config.vocab_size;
        const bool table = t.decays() && shape[0] == V;
        const size_t padding = table ? size_t(table_rows(V) - V) * size_t(config.n_embd) : 0;
        t.room = round_up(t.count + padding, size_t(64));
        layout.count += t.count;
        layout.tensors.push_back(t);
    });
    for (bool decays : {true, false})
        for (TensorInfo& t : layout.tensors)
            if (t.decays() == decays) {
                t.offset = layout.size, layout.size += t.room;
                if (decays) layout.decayed = layout.size;
            }
    return layout;
}

// Points every tensor of p into the array at base. `Element*& pointer` is a reference: to set it is
// to set p.wte, then p.wpe, and so on.
template <class Element>
void point_into(Parameters<Element>& p, Element* base, const Config& config, const Layout& layout) {
    p.h.resize(size_t(config.n_layer));
    size_t i = 0;
    for_each_tensor(config, p, [&](const auto&, Element*& pointer, const auto&, Init) {
        pointer = base + layout.tensors[i++].offset;
    });
    if (!config.untied_head) p.lm_head = p.wte;
}

// Sets weights[layout.size]: normal with mean 0 and deviation 0.02; biases and padding 0, the
// norms' scales 1. The two projections of a layer that write into the residual stream are scaled by
// 1/sqrt(2L) (Radford et al. 2019, §2.3). Why: variances of independent numbers add up. 2L
// additions of variance s^2 give the stream 2L s^2, which grows with depth; with s^2/(2L) each, it
// is s^2. All numbers are rounded to float, so that double starts from the same weights.
template <class real>
void initialise(real* weights, const Config& config, const Layout& layout, uint64_t seed) {
    std::fill(weights, weights + layout.size, real(0));
    for (size_t tensor = 0; tensor < layout.tensors.size(); ++tensor) {
        const TensorInfo& info = layout.tensors[tensor];
        if (info.init == Init::zeros) continue;
        const uint64_t key = random_key(seed, tensor, kInitialWeights);
        const double scale =
            info.init == Init::residual ? 0.02 / std::sqrt(2.0 * config.n_layer) : 0.02;
        real* w = weights + info.offset;
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < int64_t(info.count); ++i)
            w[i] = info.init == Init::ones ? real(1)
                                           : real(float(scale * random_normal(key, uint64_t(i))));
    }
}

// =================================================================================================
// §4 The layers, in the order the batch meets them
// =================================================================================================
// What you have now: one batch of tokens [B, T] and the parameters. rows = B*T positions lie below
// each other, and x [rows, C] is the residual stream. What computes is called the device (a CPU or
// a GPU); the host is the CPU's side. In this section both are the same.
//
// Backward is the chain rule. If the loss depends on out, and out on x, then
//   dx_i = sum over j of dout_j (d out_j / d x_i)
// dx_i adds up all the ways in which x_i reaches the loss. Each backward function is that sum for
// one layer, written out: the gradients of a value that is used twice are added, and those of a
// weight, which serves every row, are summed over the rows. No Jacobian matrix is made.
//
// A backward function stands below its forward, except where layers are fused: the backward of the
// residual's sum (§4.7) is in layernorm_backward; and forward computes GELU inside the MLP's
// first linear layer, c_fc, backward inside that of its second. `accumulate`: add to a parameter's
// gradient, otherwise set it (§8: a step may have several micro-batches).
//
// Activations and weights are stored as A and computed with as `real`: where A is bf16, real is
// float, else both are one type. Parameter gradients, statistics, losses and every sum are real.

// Dropout multiplies each element by a mask, 0 with probability p, otherwise 1/(1-p), so that the
// mean stays (Srivastava et al. 2014). out_i = m_i x_i, so dx_i = m_i dout_i. The mask depends on
// the element's index alone, so backward makes it again.
struct Dropout {
    uint64_t key = 0;
    float p = 0;  // 0: off
    auto operator<=>(const Dropout&) const = default;
    TINYGPT_HD bool on() const { return p > 0; }
    TINYGPT_HD float scale(uint64_t i) const {
        const auto dropped = uint32_t(std::ceil(p * 0x1p32f));  // p 2^32 is not rounded
        return uint32_t(random_bits(key, i) >> 32) < dropped ? 0.0f : 1.0f / (1.0f - p);
    }
};

// A sum must not depend on the number of threads: (a + b) + c and a + (b + c) differ in their last
// bit. So rows are cut into a fixed number of stripes; one thread sums a stripe, and the stripes
// are added in order.
constexpr int kStripes = 32;
inline int stripe_begin(int rows, int stripe) { return int(int64_t(rows) * stripe / kStripes); }

// --- §4.1 Embedding: the vector of the token plus the vector of the position
//   out[b,t] = drop(wte[tokens[b,t]] + wpe[past + t])
// Why wpe: to attention (§4.5) the tokens before a position are a bag, without an order.
//   walk> embedded     [8,  8]   -0.0054  -0.0335   0.1426   0.0302  -0.0398  -0.0485 ...

// sets out [B*T, C] from tokens [B*T] (each below V), wte [V, C], wpe [P, C]. past: the position of
// the first column, 0 except in generation; past + T is at most P.
template <class A, class real>
void embed_forward(A* out, const int32_t* tokens, const A* wte, const A* wpe, int B, int T, int C,
                   int past, Dropout drop) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < B * T; ++row) {
        const A* token = wte + size_t(tokens[row]) * C;
        const A* position = wpe + size_t(past + row % T) * C;
        A* o = out + size_t(row) * C;
        for (int c = 0; c < C; ++c) {
            const real sum = token[c] + position[c];
            o[c] = A(drop.on() ? sum * drop.scale(size_t(row) * C + c) : sum);
        }
    }
}

// A sum passes its gradient on to both addends. With d = mask dout:
//   dwte[v] = sum over all rows whose token is v of d[row]      dwpe[t] = sum over b of d[b,t]
// adds to dwte [V, C] and dwpe [P, C]; reads dout [B*T, C], tokens [B*T]. Threads share out the
// channels, not the rows: two could add to one token's vector at once. `order` (rows sorted by
// token) is for a GPU, where a thread takes a token.
template <class A, class real>
void embed_backward(real* dwte, real* dwpe, const A* dout, const int32_t* tokens,
                    const int32_t* /*order*/, int B, int T, int C, Dropout drop) {
    const int slice = 16;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += slice)
        for (int row = 0; row < B * T; ++row) {
            const A* d = dout + size_t(row) * C;
            real* token = dwte + size_t(tokens[row]) * C;
            real* position = dwpe + size_t(row % T) * C;
            for (int c = first; c < std::min(C, first + slice); ++c) {
                const real value = drop.on() ? d[c] * drop.scale(size_t(row) * C + c) : d[c];
                token[c] += value, position[c] += value;
            }
        }
}

// --- §4.2 Layernorm (Ba et al. 2016): each row is shifted to mean 0 and scaled to variance 1
//   m = mean(x)   r = 1/sqrt(mean((x - m)^2) + eps)   n = (x - m) r   out = n weight + bias
// So a layer's inputs have about the same size however much was added to the stream before. eps,
// 1e-5 in GPT-2, keeps r finite for a row of equal numbers.
//   walk>   ln_1       [8,  8]   -0.4404  -0.7322   1.0990  -0.0701  -0.7977  -0.8881 ...

// sets out [rows, C], and for backward mean and rstd (m and r) [rows], from x [rows, C], weight and
// bias [C]. Why two passes: mean(x^2) - m^2, in one, loses digits where m is large.
template <class A, class real>
void layernorm_forward(A* out, real* mean, real* rstd, const A* x, const A* weight, const A* bias,
                       int rows, int C, double eps) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int row = 0; row < rows; ++row) {
        const A* in = x + size_t(row) * C;
        A* o = out + size_t(row) * C;
        real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; ++c) sum += in[c];
        const real m = sum / C;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; ++c) squares += (in[c] - m) * (in[c] - m);
        const real r = 1 / std::sqrt(squares / C + real(eps));
        for (int c = 0; c < C; ++c) o[c] = A((in[c] - m) * r * weight[c] + bias[c]);
        mean[row] = m, rstd[row] = r;
    }
}

// With g = dout * weight, the gradient of the normalised n:
//   dx_j = sum_i g_i dn_i/dx_j,   n_i = (x_i - m) r
//   dm/dx_j = 1/C,  dr/dx_j = -(r^3/2) 2 (x_j - m)/C = -r^2 n_j/C
//   dn_i/dx_j = r [i=j] - r/C - n_i n_j r / C       ([i=j]: 1 where i is j, else 0)
//   dx_j = r g_j - r (sum_i g_i)/C - r n_j (sum_i g_i n_i)/C
// so dx = r (g - mean(g) - n mean(g n)): three terms, for x itself, for the mean, for the scale.
// Why the last two: adding a constant to the row, or scaling it, does not change out (apart from
// eps), so dx is orthogonal to equal numbers, and to n. And out_i = n_i weight_i + bias_i in every
// row, so
//   dweight_i = sum over rows of dout_i n_i      dbias_i = sum over rows of dout_i
// x, the residual stream, also flows on past the layernorm. dresidual, the gradient that comes that
// way, is added:
//   dx = dresidual + the above        (dresidual: null where nothing else read x; may be dx itself)
// dbranch and dbranch_bias belong to the backward of §4.7: skip them until then. Why here: dx is
// still in the cache. x was made by x = residual + drop(branch), where branch is the output of a
// linear layer and dbranch_bias the gradient of that layer's bias:
//   dbranch = drop(dx) (written only when drop is on)   dbranch_bias = column sums of dbranch
// reads dout, dresidual, x [rows, C], mean, rstd [rows], weight [C]. sets dx and dbranch [rows, C];
// sets dweight, dbias, dbranch_bias [C], or adds to them if accumulate. dbranch_bias may be null.
template <class A, class real>
void layernorm_backward(A* dx, real* dweight, real* dbias, A* dbranch, real* dbranch_bias,
                        const A* dout, const A* dresidual, const A* x, const real* mean,
                        const real* rstd, const A* weight, int rows, int C, Dropout drop,
                        bool accumulate) {
    std::vector<real> sums(size_t(kStripes) * 3 * C);  // of dweight, dbias, dbranch_bias
#pragma omp parallel for schedule(static)
    for (int stripe = 0; stripe < kStripes; ++stripe) {
        real* sum_w = sums.data() + size_t(stripe) * 3 * C;
        real *sum_b = sum_w + C, *sum_branch = sum_b + C;
        for (int row = stripe_begin(rows, stripe); row < stripe_begin(rows, stripe + 1); ++row) {
            const size_t at = size_t(row) * C;
            const A *in = x + at, *d = dout + at;
            const real m = mean[row], r = rstd[row];
            real mean_g = 0, mean_gn = 0;
#pragma omp simd reduction(+ : mean_g, mean_gn)
            for (int c = 0; c < C; ++c) {
                const real g = d[c] * weight[c], n = (in[c] - m) * r;
                mean_g += g, mean_gn += g * n;
            }
            mean_g /= C, mean_gn /= C;
            for (int c = 0; c < C; ++c) {
                const real g = d[c] * weight[c], n = (in[c] - m) * r;
                const real joined = dresidual ? dresidual[at + c] : real(0);
                sum_w[c] += d[c] * n, sum_b[c] += d[c];
                dx[at + c] = A(joined + r * (g - mean_g - n * mean_gn));
            }
            if (drop.on())
                for (int c = 0; c < C; ++c) dbranch[at + c] = A(dx[at + c] * drop.scale(at + c));
            const A* branch = drop.on() ? dbranch : dx;
            for (int c = 0; c < C; ++c) sum_branch[c] += branch[at + c];
        }
    }
    // The stripes in order: which = 0, 1, 2 for dweight, dbias, dbranch_bias.
    auto sum_stripes = [&](real* to, int which) {
        for (int c = 0; to && c < C; ++c) {
            real total = accumulate ? to[c] : real(0);
            for (int stripe = 0; stripe < kStripes; ++stripe)
                total += sums[(size_t(stripe) * 3 + which) * C + c];
            to[c] = total;
        }
    };
    sum_stripes(dweight, 0), sum_stripes(dbias, 1), sum_stripes(dbranch_bias, 2);
}

// --- §4.3 Products of matrices: where nearly all the arithmetic is

// A matrix [rows, cols] in memory, not owned: element (i, j) is data[i * row_stride + j *
// col_stride]; one of the strides is 1. A transpose swaps them and copies nothing, as in NumPy.
// (ptrdiff_t: a 64-bit integer with a sign.)
template <class real>
struct View {
    const real* data;
    int rows, cols;
    ptrdiff_t row_stride, col_stride;
    View(const real* data, int rows, int cols, ptrdiff_t row_stride, ptrdiff_t col_stride = 1)
        : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
    View(const real* data, int rows, int cols) : View(data, rows, cols, cols) {}  // row by row
    const real& operator()(ptrdiff_t i, ptrdiff_t j) const {
        return data[i * row_stride + j * col_stride];
    }
    // The part [rows, cols] whose first element is (i, j).
    View part(ptrdiff_t i, ptrdiff_t j, int rows, int cols) const {
        return {&(*this)(i, j), rows, cols, row_stride, col_stride};
    }
    View from(ptrdiff_t i, ptrdiff_t j) const { return part(i, j, rows - int(i), cols - int(j)); }
    View transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

// What a layer does with finished sums while they are in the cache (bias, GELU, residual):
// finish(row, col, count, values) changes `count` of them, from column col of a row. (Read
// type_identity_t<real> as real.)
template <class real>
using Finish = std::function<void(int row, int col, int count, std::type_identity_t<real>* values)>;

// e^x, and the two loops of a softmax. §11 has their fast versions for float.
inline double exp_of(double x) { return std::exp(x); }
// The largest of n >= 1 numbers.
inline double maximum(const double* x, int n) { return *std::max_element(x, x + n); }
// x [count] becomes e^(x - shift); returns the sum.
inline double exp_and_sum(double* x, double shift, int count) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - shift);
    return sum;
}
inline float exp_of(float x);
inline float maximum(const float* x, int n);
inline float exp_and_sum(float* x, float shift, int count, float factor = 1);

// The operations that take nearly all of a step's time, as they are defined. Layers get it as their
// argument Ops: §11 has the same, fifty times faster, and tests compare the two.
struct PlainOps {
    // c = finish(a b), or finish(c + a b) if accumulate, with a [m, k], b [k, n] and c [m, n]: m n
    // dot products of length k, so 2 m n k operations. c is row-major, and shares no memory with a
    // or b.
    template <class real>
    static void matmul(real* c, View<real> a, View<real> b, bool accumulate = false,
                       const Finish<real>& finish = {}) {
        for (int i = 0; i < a.rows; ++i, c += b.cols) {
            for (int j = 0; j < b.cols; ++j) {
                double sum = accumulate ? c[j] : 0;
                for (int p = 0; p < a.cols; ++p) sum += double(a(i, p)) * double(b(p, j));
                c[j] = real(sum);
            }
            if (finish) finish(i, 0, b.cols, c);
        }
    }
    // One head of attention, and its backward: §4.5.
    template <class real>
    static void attend(real* out, real* lse, const real* qkv, int first, int last, int C, int HS,
                       Dropout drop, uint64_t head);
    template <class real>
    static void attend_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                                const real* qkv, int T, int C, int HS, Dropout drop, uint64_t head);
};

// --- §4.4 The linear layer: every output is a weighted sum of all inputs, plus a bias
//   out = x w + bias        x [rows, C], bias [OC]
// w is [in, out], as Hugging Face stores GPT-2; PyTorch's nn.Linear is the other way round.

// sets out [rows, OC] = x w + b, from x [rows, C], w [C, OC], b [OC].
template <class Ops, class A, class real>
void linear_forward(A* out, const A* x, const A* w, const A* b, int rows, int C, int OC) {
    Ops::matmul(out, View(x, rows, C), View(w, C, OC), false,
                [=](int, int col, int count, real* values) {
                    for (int j = 0; j < count; ++j) values[j] += b[col + j];
                });
}

// out_ro = sum over c of x_rc w_co + b_o is linear in x, w and b, so each gradient is dout times
// its factor, summed over all uses:
//   dx_rc = sum_o dout_ro w_co      dx = dout w^T      every output the input fed
//   dw_co = sum_r x_rc dout_ro      dw = x^T dout      every row the weight served
//   db_o  = sum_r dout_ro           column sums        every row the bias was added to
// So x must be kept for backward, which takes twice as long as forward: two products. No db here:
// the function that makes dout also sums its columns.
// sets dx [rows, C]; sets dw [C, OC], or adds to it if accumulate.
template <class Ops, class A, class real>
void linear_backward(A* dx, real* dw, const A* dout, const A* x, const A* w, int rows, int C,
                     int OC, bool accumulate) {
    Ops::matmul(dx, View(dout, rows, OC), View(w, C, OC).transposed());
    Ops::matmul(dw, View(x, rows, C).transposed(), View(dout, rows, OC), accumulate);
}

// sets out [n] to the column sums of x [rows, n], added in the order of rows; if accumulate, adds
// them to it.
template <class A, class real>
void column_sums(real* out, const A* x, int rows, int n, bool accumulate) {
    constexpr int width = 256;
#pragma omp parallel for schedule(static)
    for (int j0 = 0; j0 < n; j0 += width) {
        const int count = std::min(width, n - j0);
        real sums[width] = {};
        for (int row = 0; row < rows; ++row)
            for (int j = 0; j < count; ++j) sums[j] += x[size_t(row) * n + j0 + j];
        for (int j = 0; j < count; ++j) out[j0 + j] = accumulate ? out[j0 + j] + sums[j] : sums[j];
    }
}

// --- §4.5 Causal self-attention (Vaswani et al. 2017): every position looks back at all before it
// qkv [B*T, 3C]: a row holds the queries of all NH heads, then the keys, then the values; a head is
// HS neighbouring channels, C = NH*HS. For each head, for query t and keys t2 <= t:
//   s[t,t2] = q[t].k[t2] / sqrt(HS)    p[t,t2] = e^s[t,t2] / sum of e^s[t,.]
//   out[t] = sum over t2 of p[t,t2] v[t2]
// A query says what position t looks for, a key what t2 offers, a value what t2 hands over; out[t]
// is a mean of the values, weighted by how well the keys fit. 1/sqrt(HS): if the entries of q and k
// have variance 1, q.k has variance HS; divided by sqrt(HS) it has 1, and the softmax is not all on
// one key. The causal mask, t2 <= t: no position sees what it is to predict. It saves half of the
// work, since later scores are not made. Backward makes p again from q, k and lse[t], the log of
// the sum of e^s, so no T x T matrix is kept. Dropout multiplies the finished p[t,t2] by its mask.
//   walk> att of t=0 is its own value, qkv[16..23], since it sees nobody else:
//   walk>   v of t=0   [1,  8]   -0.1347   1.1790  -0.1055   0.5021   0.3746  -0.3026 ...
//   walk>   att        [8,  8]   -0.1347   1.1790  -0.1055   0.5021   0.3746  -0.3026 ...

// One head: queries first..last-1 over keys 0..last-1. qkv: the head's query of row 0, rows 3C
// apart. Sets out [last - first, HS], rows C apart, and lse [last - first] unless null. The mask's
// index is (head T + t) T + t2, with head = b NH + h and T = last. Careful: e^s overflows at s = 88
// in float, so a row's maximum is subtracted; p, a quotient, stays the same.
template <class real>
void PlainOps::attend(real* out, real* lse, const real* qkv, int first, int last, int C, int HS,
                      Dropout drop, uint64_t head) {
    const View<real> q(qkv, last, HS, 3 * C), k(qkv + C, last, HS, 3 * C),
        v(qkv + 2 * C, last, HS, 3 * C);
    std::vector<real> p(last);
    for (int t = first; t < last; ++t) {
        for (int t2 = 0; t2 <= t; ++t2) {
            real s = 0;
            for (int i = 0; i < HS; ++i) s += q(t, i) * k(t2, i);
            p[t2] = s / std::sqrt(real(HS));
        }
        const real highest = maximum(p.data(), t + 1);
        const real sum = exp_and_sum(p.data(), highest, t + 1);  // p is e^(s - highest) now
        if (lse) lse[t - first] = highest + std::log(sum);
        real* o = out + size_t(t - first) * C;
        std::fill_n(o, HS, real(0));
        for (int t2 = 0; t2 <= t; ++t2) {
            const real m = drop.scale((head * last + t) * last + t2);
            for (int i = 0; i < HS; ++i) o[i] += m * p[t2] / sum * v(t2, i);
        }
    }
}

// All heads of all sequences: sets out [B*T, C] and lse [B, NH, T] from qkv [B*T, 3C].
template <class Ops, class A, class real>
void attention_forward(A* out, real* lse, const A* qkv, int B, int T, int NH, int HS,
                       Dropout drop) {
    const int C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; ++head) {
        const size_t row = size_t(head / NH) * T, first = size_t(head % NH) * HS;  // of the head
        Ops::attend(out + row * C + first, lse + size_t(head) * T, qkv + row * 3 * C + first, 0, T,
                    C, HS, drop, uint64_t(head));
    }
}

// Forward's three lines upside down. dp and ds are the gradients of p and s; @ is a partial
// derivative; z is the sum of e^s. Sums over t are over the queries that see key t2: t >= t2.
//   out[t] = sum p[t,t2] v[t2]:  dv[t2] = sum over t of p[t,t2] dout[t],   dp[t,t2] = dout[t].v[t2]
//   p = softmax(s), of one row:  p_j = e^s_j / z and @z/@s_i = e^s_i, so by the quotient rule
//                                @p_j/@s_i = [i=j] e^s_j/z - e^s_j e^s_i/z^2 = p_j ([i=j] - p_i)
//                                ds_i = sum_j dp_j p_j ([i=j] - p_i) = p_i (dp_i - D)
//                                D = sum_j p_j dp_j = dout . sum_j p_j v_j = dout . out
//   s = q k^T / sqrt(HS):        dq[t] = sum over t2 of ds[t,t2] k[t2] / sqrt(HS)
//                                dk[t2] = sum over t of ds[t,t2] q[t] / sqrt(HS)
// D is one number a row, from dout and out alone; p = e^(s - lse) is made again from q, k and lse
// (Dao et al. 2022). With dropout out[t] = sum m p v, so dv has m p for p, and dp = m (dout.v); D
// is dout . out as before, since sum_j p_j dp_j = dout . sum_j m_j p_j v_j.

// One head: sets its channels of dqkv. Rows of dqkv and qkv are 3C apart, those of dout and out C.
template <class real>
void PlainOps::attend_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                               const real* qkv, int T, int C, int HS, Dropout drop, uint64_t head) {
    const View<real> q(qkv, T, HS, 3 * C), k(qkv + C, T, HS, 3 * C), v(qkv + 2 * C, T, HS, 3 * C);
    const View<real> d(dout, T, HS, C), o(out, T, HS, C);
    const real scale = 1 / std::sqrt(real(HS));
    for (int t = 0; t < T; ++t) {
        real* dq = dqkv + q.row_stride * t;
        real D = 0;
        for (int third = 0; third < 3; ++third) std::fill_n(dq + third * C, HS, real(0));
        for (int i = 0; i < HS; ++i) D += d(t, i) * o(t, i);
        for (int t2 = 0; t2 <= t; ++t2) {
            real *dk = dqkv + q.row_stride * t2 + C, *dv = dk + C;
            real s = 0, dp = 0;
            for (int i = 0; i < HS; ++i) s += q(t, i) * k(t2, i), dp += d(t, i) * v(t2, i);
            const real m = drop.scale((head * T + t) * T + t2);
            const real p = exp_of(s * scale - lse[t]), ds = p * (m * dp - D);
            for (int i = 0; i < HS; ++i) {
                dq[i] += ds * k(t2, i) * scale;
                dk[i] += ds * q(t, i) * scale;
                dv[i] += m * p * d(t, i);
            }
        }
    }
}

// sets dqkv [B*T, 3C] from dout, out [B*T, C], lse [B, NH, T] and qkv [B*T, 3C]; sets dqkv_bias
// [3C], the bias gradient of the layer that made qkv, or adds to it if accumulate.
template <class Ops, class A, class real>
void attention_backward(A* dqkv, real* dqkv_bias, const A* dout, const A* out, const real* lse,
                        const A* qkv, int B, int T, int NH, int HS, Dropout drop, bool accumulate) {
    const int C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; ++head) {
        const size_t row = size_t(head / NH) * T, first = size_t(head % NH) * HS;
        const size_t at = row * C + first, at3 = row * 3 * C + first;
        Ops::attend_backward(dqkv + at3, dout + at, out + at, lse + size_t(head) * T, qkv + at3, T,
                             C, HS, drop, uint64_t(head));
    }
    column_sums(dqkv_bias, dqkv, B * T, 3 * C, accumulate);
}

// Generation: sets out [n, C] for positions past..past+n-1 of one sequence, from the KV cache, its
// qkv rows 0..past+n-1.
template <class Ops, class A, class real>
void attention_cached(A* out, const A* qkv, int past, int n, int NH, int HS) {
    real* no_lse = nullptr;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < NH; ++head)
        Ops::attend(out + head * HS, no_lse, qkv + head * HS, past, past + n, NH * HS, HS,
                    Dropout{}, 0);
}

// --- §4.6 The MLP's first layer: linear, then GELU with tanh (Hendrycks and Gimpel 2016)
//   gelu(x) = x/2 (1 + tanh u),   u = sqrt(2/pi) (x + 0.044715 x^3)
// Without it two linear layers would be one. tanh u = (1 - e^(-2u)) / (1 + e^(-2u)), so
//   (1 + tanh u)/2 = 1/(1 + e^(-2u)) = s, the logistic function:  gelu(x) = x s, one exponential
//   ds/du = 2 e^(-2u) / (1 + e^(-2u))^2 = 2 s (1 - s)
//   gelu'(x) = s + x ds/dx = s + x s (1 - s) 2 du/dx,   2 du/dx = 2 sqrt(2/pi) (1 + 3*0.044715 x^2)
// Below, 1.5957691216057308 = 2 sqrt(2/pi), inner = -2u, slope = 2 du/dx.
//   walk>   gelu       [8, 32]   -0.1343  -0.0577   0.6315  -0.0934   0.0724  -0.0707 ...

// Careful: x is clamped, or for very negative x the exponential overflows and the derivative is
// infinity * 0, a NaN. At -10 gelu is -1e-37, and the derivative within 1e-35 of 0; at 10, of 1.
template <class real>
real gelu(real x) {
    x = x < -10 ? real(-10) : x;
    const real inner = real(-1.5957691216057308) * x * (1 + real(0.044715) * x * x);
    return x / (1 + exp_of(inner));
}
template <class real>
real gelu_derivative(real x) {
    x = x < -10 ? real(-10) : x;
    x = x > 10 ? real(10) : x;
    const real slope = real(1.5957691216057308) * (1 + 3 * real(0.044715) * x * x);
    const real inner = real(-1.5957691216057308) * x * (1 + real(0.044715) * x * x);
    const real s = 1 / (1 + exp_of(inner));
    return s + x * s * (1 - s) * slope;
}

// sets fc [rows, OC] = x w + b, kept for GELU's derivative, and gelu [rows, OC] = GELU(fc). x
// [rows, C], w [C, OC], b [OC].
template <class Ops, class A, class real>
void linear_gelu_forward(A* gelu, A* fc, const A* x, const A* w, const A* b, int rows, int C,
                         int OC) {
    Ops::matmul(gelu, View(x, rows, C), View(w, C, OC), false,
                [=](int row, int col, int count, real* values) {
                    A* kept = fc + size_t(row) * OC + col;
                    for (int j = 0; j < count; ++j) kept[j] = A(values[j] + b[col + j]);
                    for (int j = 0; j < count; ++j) values[j] = tinygpt::gelu(real(kept[j]));
                });
}

// The same GELU, to the bit, for --recompute-gelu (§5): sets gelu [count] from fc.
template <class A, class real>
void gelu_forward(A* gelu, const A* fc, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; ++i) gelu[i] = A(tinygpt::gelu(real(fc[i])));
}

// From the gradient of the MLP's output back to fc: the backward of its second linear layer (w),
// whose input was gelu = GELU(fc), then that of GELU:
//   dfc = (dout w^T) gelu'(fc)     dw = gelu^T dout     dfc_bias = column sums of dfc
// dfc_bias is the bias gradient of the layer that made fc. Shapes: dfc, gelu, fc [rows, C], dout
// [rows, OC], w [C, OC]; here C is 4 n_embd, OC n_embd.
// sets dfc; sets dw, dfc_bias [C], or adds to them if accumulate.
template <class Ops, class A, class real>
void linear_gelu_backward(A* dfc, real* dw, real* dfc_bias, const A* dout, const A* gelu,
                          const A* fc, const A* w, int rows, int C, int OC, bool accumulate) {
    Ops::matmul(dfc, View(dout, rows, OC), View(w, C, OC).transposed(), false,
                [=](int row, int col, int count, real* values) {
                    const A* x = fc + size_t(row) * C + col;
                    for (int j = 0; j < count; ++j) values[j] *= gelu_derivative(real(x[j]));
                });
    Ops::matmul(dw, View(gelu, rows, C).transposed(), View(dout, rows, OC), accumulate);
    column_sums(dfc_bias, dfc, rows, C, accumulate);
}

// --- §4.7 The residual stream: a branch ends in a linear layer whose output is added to x
//   out = x + drop(branch w + bias)
// The sum passes its gradient on unchanged to both sides (He et al. 2016):
//   dx = dout + what the branch sends back      dbias = column sums of drop(dout)
// So a deep model can learn: the gradient reaches every layer without a multiplication.

// sets out [rows, OC] = residual + drop(x w + b), from residual [rows, OC], x [rows, C], w [C, OC],
// b [OC]. Its backward: layernorm_backward (§4.2) makes drop(dout) and the bias gradient,
// linear_backward the rest; the residual's gradient is dout itself.
template <class Ops, class A, class real>
void linear_residual_forward(A* out, const A* residual, const A* x, const A* w, const A* b,
                             int rows, int C, int OC, Dropout drop) {
    Ops::matmul(out, View(x, rows, C), View(w, C, OC), false,
                [=](int row, int col, int count, real* values) {
                    const size_t at = size_t(row) * OC + col;
                    for (int j = 0; j < count; ++j) values[j] += b[col + j];
                    if (drop.on())
                        for (int j = 0; j < count; ++j) values[j] *= drop.scale(at + j);
                    for (int j = 0; j < count; ++j) values[j] += residual[at + j];
                });
}

// --- §4.8 The head: logits, softmax and cross-entropy in one
//   logits = x w^T,  w [V, C]      p = softmax(logits)      loss = -log p[target]
// Every token gets a score. The loss is how surprised the softmax is by the one that came: 0 if it
// was certain of it, log V if it knows nothing. e^loss, the perplexity, is the number of tokens it
// seems to guess among. x is ln_f; w is wte where the head is tied.
//   walk> loss of the batch: mean of 8 such = 2.433049; knowing nothing is log 11 = 2.3979
//   walk> cat     -0.8429       0.4305        0.0351   <- the target
//   walk> sum of exp 12.2585; loss = log(sum) - logit = 2.5062 - -0.8429 = 3.3491
// logits [rows, V] would be by far the largest array (0.8 GB for 4 x 1024 rows of GPT-2), so they
// are made and used up for some rows at a time.

constexpr int kHeadRows = 1024;  // enough for a fast product

// sets logits [rows, V] = x w^T.
template <class Ops>
void head_logits(auto* logits, const auto* x, const auto* w, int rows, int C, int V) {
    Ops::matmul(logits, View(x, rows, C), View(w, V, C).transposed());
}

// Loss of a row: -log p[target] = log(sum exp(logits)) - logits[target], with the maximum
// subtracted so that exp cannot overflow. With scale > 0 the logits are overwritten by their
// gradient, else by e^l. The log of the sum has the slope e^l_v / sum = p_v, so
//   dloss/dlogits_v = d/dlogits_v (log sum_u exp(logits_u) - logits_target) = p_v - [v = target]
// softmax minus one-hot: push every token down by the probability it was given, and the target up
// by what it lacked. Times scale (1/8 in the walk):
//   walk> dlogits of row 0, (p - [target]) / 8:  0.0094 -0.1206  0.0051  0.0179
// sets losses [rows], 0 where the target is kIgnore; works on logits [rows, V] in place.
template <class A, class real>
void softmax_cross_entropy(real* losses, A* logits, const int32_t* targets, int rows, int V,
                           real scale) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; ++row) {
        A* stored = logits + size_t(row) * V;
        const int target = targets[row];
        if (target < 0) {
            losses[row] = 0;
            if (scale > 0) std::fill(stored, stored + V, A(0));
            continue;
        }
        // In bf16 the row is copied to float, so that only the result is rounded. Otherwise wide is
        // empty, and l is the row itself.
        std::vector<real> wide(std::is_same_v<A, real> ? 0 : V);
        std::copy_n(stored, wide.size(), wide.begin());
        real* l = wide.empty() ? reinterpret_cast<real*>(stored) : wide.data();
        const real highest = maximum(l, V);
        const real at_target = l[target];
        const real sum = exp_and_sum(l, highest, V);  // l[v] = exp(l[v] - highest)
        losses[row] = std::log(sum) + highest - at_target;
        if (scale <= 0) continue;
        const real factor = scale / sum;
        for (int v = 0; v < V; ++v) l[v] *= factor;
        l[target] -= scale;
        for (size_t v = 0; v < wide.size(); ++v) stored[v] = A(wide[v]);
    }
}

// sets losses [rows], in nats, 0 where the target is kIgnore. x [rows, C], w [V, C], targets
// [rows]; logits [at most kHeadRows, V] is scratch.
template <class Ops, class A, class real>
void head_forward(real* losses, A* logits, const A* x, const A* w, const int32_t* targets, int rows,
                  int C, int V) {
    for (int first = 0; first < rows; first += kHeadRows) {
        const int n = std::min(kHeadRows, rows - first);
        head_logits<Ops>(logits, x + size_t(first) * C, w, n, C, V);
        softmax_cross_entropy(losses + first, logits, targets + first, n, V, real(0));
    }
}

// As head_forward, and the gradients of scale * (sum of losses). logits_rv = sum_c x_rc w_vc is a
// linear layer with w transposed, so
//   dx_rc = sum_v dlogits_rv w_vc     dx = dlogits w
//   dw_vc = sum_r dlogits_rv x_rc     dw = dlogits^T x
// A tied w is wte, which is used twice, so its gradient is a sum: embed_backward adds to this dw.
// sets losses [rows], dx [rows, C]; sets dw [V, C], or adds to it if accumulate.
template <class Ops, class A, class real>
void head_forward_backward(real* losses, A* dx, real* dw, A* logits, const A* x, const A* w,
                           const int32_t* targets, int rows, int C, int V, real scale,
                           bool accumulate) {
    for (int first = 0; first < rows; first += kHeadRows) {
        const int n = std::min(kHeadRows, rows - first);
        const A* x_rows = x + size_t(first) * C;
        head_logits<Ops>(logits, x_rows, w, n, C, V);
        softmax_cross_entropy(losses + first, logits, targets + first, n, V, scale);
        const View dlogits(logits, n, V);
        Ops::matmul(dx + size_t(first) * C, dlogits, View(w, V, C));
        Ops::matmul(dw, dlogits.transposed(), View(x_rows, n, C), accumulate || first > 0);
    }
}

// =================================================================================================
// §5 Forward: GPT-2 on one screen
// =================================================================================================
// What you have now: every layer. Here they are put together, for B rows of T tokens. device.f(...)
// calls the function f of §4, or what the device has in its place (the table is in §10):
//
//   inputs [B, T] -> embedded [rows, C]
//   each layer    -> ln_1 [rows, C] -> qkv [rows, 3C] -> att [rows, C]  -> x_mid [rows, C]
//                 -> ln_2 [rows, C] -> fc [rows, 4C]  -> gelu [rows, 4C] -> x_out [rows, C]
//   at the end    -> ln_f [rows, C] -> logits [rows, V], at most 1024 rows at a time
//
// Memory limits training, so forward keeps only what backward needs. Of each layer:
//   ln_1, att, ln_2, gelu     the input of each matmul: its weight gradient is input^T dout
//   x, x_mid, mean, rstd      the input of each layernorm, and what it was normalised by
//   qkv, lse (and att)        attention computes its probabilities again from these
//   fc                        the GELU's derivative is taken at its input
// These are 16 C numbers a position and layer: for GPT-2 small, 4 x 1024 tokens and fp32, 2.4 GB in
// all. A quarter is gelu: with --recompute-gelu all layers share one buffer, which backward refills
// from fc. The gradients of activations need one set of buffers for all layers.

// The buffers of one pass, by name. (typename Device::Real is the type that Device calls Real.)
template <class Device>
struct Activations {
    using Activation = typename Device::Activation;
    using Real = typename Device::Real;
    struct Layer {
        Activation *ln_1, *qkv, *att, *x_mid;  // [rows, C], [rows, 3C], [rows, C], [rows, C]
        Activation *ln_2, *fc, *gelu, *x_out;  // [rows, C], [rows, 4C], [rows, 4C], [rows, C]
        Real *ln_1_mean, *ln_1_rstd, *ln_2_mean, *ln_2_rstd;  // [rows]
        Real* lse;                                            // [B*NH, T]
    };
    int32_t *inputs, *targets, *order;  // [rows] each
    Activation* embedded;               // [rows, C]
    std::vector<Layer> layers;
    Activation* ln_f;             // [rows, C]
    Real *ln_f_mean, *ln_f_rstd;  // [rows]
    Activation* logits;           // the head's scratch: on a CPU at most 1024 rows
    Real* losses;                 // [rows]
    Real* next_logits;            // [V], of one row, for generation
    // Gradients: dx of the residual stream; dbranch of a branch's output (without dropout dx
    // itself); dnarrow and dwide within a branch.
    Activation *dx, *dbranch, *dwide, *dnarrow;  // [rows, C], [rows, C], [rows, 4C], [rows, C]
};

// Training keeps the buffers of all layers. Evaluation and generation have one layer's, which all
// share; but in generation each has its own qkv, whose rows are the key/value cache.
enum class Use { training, evaluation, generation };

// A model on a device. What it is made of stands in §10, with the memory it takes:
//   config, layout, device     the sizes, where every tensor lies in a flat array, the layers
//   weights, grads, moments    flat arrays of all parameters, of their gradients, of AdamW's means
//   masters                    in fp32 the weights themselves; in bf16 their fp32 originals, of
//                              which `weights` are rounded copies
//   w, g                       weights and gradients by name: w.wte, g.h[0].c_fc_bias
//   a                          the activations of one pass, above
//   state                      loss, learning rate and norm of a step
template <class Device>
struct Gpt2;

// One pass over a batch of B x T tokens: no more than is reserved.
struct Pass {
    int B = 0, T = 0;
    // Training. Evaluation and generation leave these as they are.
    double scale = 0;   // of the losses: 1 / (number of scored targets in the whole step)
    bool first = true;  // the first micro-batch of a sum: backward sets gradients, else adds
    bool last = true;   // the last one of its step: the update follows
    // Of §8's tree of sums; both 0 where a step has one micro-batch.
    int into = 0;          // which array gets this sum: 0 is grads, i is spares[i - 1]
    int folds = 0;         // how many pairs of arrays are added afterwards
    Dropout dropout = {};  // its key differs in every micro-batch of every step
    // Generation: the tokens follow `past` earlier ones in the key/value cache, and B is 1.
    int past = 0;
    bool cached = false;
    auto operator<=>(const Pass&) const = default;

    // The mask of dropout number i. Number 0 follows the embedding. Layer l has 3l + 1 on
    // attention's probabilities, and 3l + 2 and 3l + 3 on what its two branches add to x.
    Dropout drop(int i) const {
        return {random_key(dropout.key, uint64_t(i), kDropoutMask), dropout.p};
    }
};

// The whole of GPT-2 but its head: from tokens a.inputs [B, T] sets a.ln_f [B*T, C], and on the way
// what backward needs. Logits and loss are made at the beginning of backward, because logits
// [rows, V] are too large to keep (§4.8).
template <class Device>
void forward(Gpt2<Device>& model, const Pass& pass) {
    const Config& config = model.config;
    Device& device = model.device;
    auto& a = model.a;
    auto& w = model.w;
    const int B = pass.B, T = pass.T, rows = B * T, C = config.n_embd;
    const int NH = config.n_head, HS = config.head_size();
    const double eps = config.layer_norm_epsilon;

    await_weights(model, 0);  // with several processes; alone this does nothing
    device.embed_forward(a.embedded, a.inputs, w.wte, w.wpe, B, T, C, pass.past, pass.drop(0));
    auto* x = a.embedded;  // the residual stream: every layer reads it and adds to it
    for (int i = 0; i < config.n_layer; ++i) {
        auto& l = a.layers[size_t(i)];
        const auto& p = w.h[size_t(i)];
        auto* qkv = l.qkv + size_t(pass.past) * 3 * C;  // new rows go behind the cached ones
        await_weights(model, i + 1);
        // x_mid = x + proj(attention(c_attn(ln_1(x))))
        device.layernorm_forward(l.ln_1, l.ln_1_mean, l.ln_1_rstd, x, p.ln_1_weight, p.ln_1_bias,
                                 rows, C, eps);
        device.linear_forward(qkv, l.ln_1, p.c_attn_weight, p.c_attn_bias, rows, C, 3 * C);
        if (pass.cached)
            device.attention_cached(l.att, l.qkv, pass.past, T, NH, HS);
        else
            device.attention_forward(l.att, l.lse, qkv, B, T, NH, HS, pass.drop(3 * i + 1));
        device.linear_residual_forward(l.x_mid, x, l.att, p.attn_proj_weight, p.attn_proj_bias,
                                       rows, C, C, pass.drop(3 * i + 2));
        // x_out = x_mid + proj(gelu(c_fc(ln_2(x_mid))))
        device.layernorm_forward(l.ln_2, l.ln_2_mean, l.ln_2_rstd, l.x_mid, p.ln_2_weight,
                                 p.ln_2_bias, rows, C, eps);
        device.linear_gelu_forward(l.gelu, l.fc, l.ln_2, p.c_fc_weight, p.c_fc_bias, rows, C,
                                   4 * C);
        device.linear_residual_forward(l.x_out, l.x_mid, l.gelu, p.mlp_proj_weight, p.mlp_proj_bias,
                                       rows, 4 * C, C, pass.drop(3 * i + 3));
        x = l.x_out;
    }
    device.layernorm_forward(a.ln_f, a.ln_f_mean, a.ln_f_rstd, x, w.ln_f_weight, w.ln_f_bias, rows,
                             C, eps);
}

// =================================================================================================
// §6 Backward: the same lines upside down
// =================================================================================================
// What you have now: a.ln_f [rows, C], the targets, and what forward kept. The head makes the loss
// of them, and the gradients of ln_f and of its own weight. Then every line of forward has its
// mirror image, last first. dx is the gradient of the residual stream. As x_out = x_mid + branch,
// dx goes into the branch and also past it, and layernorm's backward adds the two up again. The
// second half of a layer, for one; read the right side from the bottom:
//
//   forward                                        backward
//   ln_2  = layernorm(x_mid)                       dx      = dx + layernorm'(dnarrow)
//   gelu  = GELU(ln_2 c_fc + bias)                 dnarrow = dwide c_fc^T,  dc_fc = ln_2^T dwide
//   x_out = x_mid + drop(gelu proj + bias)         dwide   = (dbranch proj^T) gelu'(fc)
//                                                  dbranch = drop(dx),  dx of x_out comes in
//
//   walk> wte.weight                  -0.50763749  -0.50763749
//   walk> h.0.attn.c_attn.weight       0.00059701   0.00059701
// (The gradient of one weight by backward, and by moving that weight a little.)

// Sets every parameter gradient, or adds to it where not pass.first; sets a.losses, not scaled.
// Reads a.targets, a.order, and what forward of the same pass has kept. After each layer calls
// on_final(i), for several processes: the matrices from element i of the flat array on have their
// gradients, which may be sent.
template <class Device>
void backward(Gpt2<Device>& model, const Pass& pass,
              const std::function<void(size_t)>& on_final = nullptr) {
    const Config& config = model.config;
    Device& device = model.device;
    auto& a = model.a;
    auto& w = model.w;
    auto g = model.g;
    if (pass.into > 0) point_into(g, model.spares[size_t(pass.into - 1)], config, model.layout);
    const bool add = !pass.first;
    const int B = pass.B, T = pass.T, rows = B * T, C = config.n_embd, V = config.vocab_size;
    const int NH = config.n_head, HS = config.head_size(), L = config.n_layer;
    auto input_of = [&](int i) { return i > 0 ? a.layers[size_t(i - 1)].x_out : a.embedded; };
    auto* dbranch = pass.dropout.on() ? a.dbranch : a.dx;

    device.head_forward_backward(a.losses, a.dnarrow, g.lm_head, a.logits, a.ln_f, w.lm_head,
                                 a.targets, rows, C, V, typename Device::Real(pass.scale), add);
    // layernorm_backward also sets a bias's gradient: that of the linear layer whose output was
    // added to x just before. For ln_1 of layer i it is mlp_proj_bias of layer i - 1, and its
    // dropout has number 3 i.
    auto bias_below = [&](int i) { return i > 0 ? g.h[size_t(i - 1)].mlp_proj_bias : nullptr; };
    device.layernorm_backward(a.dx, g.ln_f_weight, g.ln_f_bias, dbranch, bias_below(L), a.dnarrow,
                              nullptr, input_of(L), a.ln_f_mean, a.ln_f_rstd, w.ln_f_weight, rows,
                              C, pass.drop(3 * L), add);
    for (int i = L - 1; i >= 0; --i) {
        auto& l = a.layers[size_t(i)];
        const auto& p = w.h[size_t(i)];
        const auto& d = g.h[size_t(i)];
        // MLP: projection and GELU, then c_fc, then ln_2, which adds to dx.
        if (config.recompute_gelu) device.gelu_forward(l.gelu, l.fc, size_t(rows) * 4 * C);
        device.linear_gelu_backward(a.dwide, d.mlp_proj_weight, d.c_fc_bias, dbranch, l.gelu, l.fc,
                                    p.mlp_proj_weight, rows, 4 * C, C, add);
        device.linear_backward(a.dnarrow, d.c_fc_weight, a.dwide, l.ln_2, p.c_fc_weight, rows, C,
                               4 * C, add);
        device.layernorm_backward(a.dx, d.ln_2_weight, d.ln_2_bias, dbranch, d.attn_proj_bias,
                                  a.dnarrow, a.dx, l.x_mid, l.ln_2_mean, l.ln_2_rstd, p.ln_2_weight,
                                  rows, C, pass.drop(3 * i + 2), add);
        // Attention: projection, attention itself (dwide serves as dqkv), c_attn, then ln_1.
        device.linear_backward(a.dnarrow, d.attn_proj_weight, dbranch, l.att, p.attn_proj_weight,
                               rows, C, C, add);
        device.attention_backward(a.dwide, d.c_attn_bias, a.dnarrow, l.att, l.lse, l.qkv, B, T, NH,
                                  HS, pass.drop(3 * i + 1), add);
        device.linear_backward(a.dnarrow, d.c_attn_weight, a.dwide, l.ln_1, p.c_attn_weight, rows,
                               C, 3 * C, add);
        // Below layer 0 is the embedding, which drops for itself.
        device.layernorm_backward(a.dx, d.ln_1_weight, d.ln_1_bias, dbranch, bias_below(i),
                                  a.dnarrow, a.dx, input_of(i), l.ln_1_mean, l.ln_1_rstd,
                                  p.ln_1_weight, rows, C, i > 0 ? pass.drop(3 * i) : Dropout{},
                                  add);
        if (on_final) on_final(size_t(d.c_attn_weight - g.wte));
    }
    // embed_backward only adds, so both tables begin at 0; but a tied wte has the head's gradient.
    if (pass.first) device.zero(g.wpe, size_t(config.n_positions) * C);
    if (pass.first && config.untied_head) device.zero(g.wte, size_t(V) * C);
    device.embed_backward(g.wte, g.wpe, a.dx, a.inputs, a.order, B, T, C, pass.drop(0));
}

// =================================================================================================
// §7 The update: how far, whether at all, and which step each weight takes
// =================================================================================================
// What you have now: a gradient for every parameter, in one flat array: which way is uphill. How
// far to go (schedule), how far to trust it (clipping, guards), and which step does each weight
// take (AdamW)?

// Warm-up: at the start AdamW's moments are estimates from few batches; small steps do no harm.
// Decay: near the end the noise of single batches keeps the loss up; smaller steps average it away.
//
//            cosine            linear            constant          wsd
//   peak     /``-.             /`-.              /-----------      /-------.
//           /     `.          /    `-.          /                 /         `.
//   lo     /        `-..     /        `-.      /                 /            `-.

enum class Schedule { cosine, linear, constant, wsd };
inline Schedule schedule_named(const std::string& name) {
    const std::vector<std::string> names = {"cosine", "linear", "constant", "wsd"};
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) fail("there is no schedule ", name);
    return Schedule(found - names.begin());
}
struct LearningRate {
    Schedule schedule = Schedule::cosine;
    double peak = 1e-3, min_fraction = 0.1;  // where the decay ends, as a fraction of the peak
    int64_t warmup = 0, steps = 1;           // warm-up steps; N, all steps
    auto operator<=>(const LearningRate&) const = default;
};

// The rate of step s = 0 .. N-1. Warm-up: peak (s+1)/warmup. Then, with r going from 0 to 1 and lo
// = peak min_fraction:
//   cosine     lo + (peak - lo)(1 + cos(pi r))/2                      (Loshchilov, Hutter 2017)
//   linear     peak - (peak - lo) r
//   constant   peak
//   wsd        peak for 80 % of all steps, then lo + (peak - lo)(1 - sqrt(r')), with r' going from
//              0 to 1 in the rest               (warm-up, stable, decay; Hu et al. 2024)
inline double learning_rate(const LearningRate& rate, int64_t s) {
    const double peak = rate.peak, lo = peak * rate.min_fraction;
    const double N = double(rate.steps), warmup = double(rate.warmup);
    if (s < rate.warmup) return peak * double(s + 1) / warmup;
    const double r = std::clamp((double(s) - warmup) / std::max(1.0, N - warmup), 0.0, 1.0);
    switch (rate.schedule) {
        case Schedule::cosine: return lo + (peak - lo) * (1 + std::cos(M_PI * r)) / 2;
        case Schedule::linear: return peak - (peak - lo) * r;
        case Schedule::constant: return peak;
        case Schedule::wsd: break;
    }
    const double stable = 0.8 * N;
    if (double(s) < stable) return peak;
    return lo + (peak - lo) * (1 - std::sqrt(std::min(1.0, (double(s) - stable) / (N - stable))));
}

// The numbers of a step that live on the device, so that no step has to wait for the host: what the
// host set (lr), what the device found, and the guards' memory.
struct StepState {
    static constexpr int kWindow = 128;  // how many past steps an outlier is judged by
    double lr = 0, loss = 0, grad_norm = 0;
    double spare_losses[3] = {};        // of the sums in the spare gradients (§8)
    double clip_scale = 1;              // gradients are multiplied by this in the update
    int32_t skip = 0;                   // 1: this update is not made
    int32_t broken = 0;                 // 1: loss or norm was NaN or infinite
    int64_t updates = 0;                // updates made so far: AdamW's t
    int64_t skipped = 0, outliers = 0;  // totals of the run
    int64_t seen = 0;                   // steps in the window so far
    double losses[kWindow] = {}, norms[kWindow] = {};
    TINYGPT_HD double* loss_of(int into) { return into == 0 ? &loss : &spare_losses[into - 1]; }
};

// When to clip a gradient, and when to skip an update.
struct Guards {
    double grad_clip = 1;      // limit of the global norm; 0: none
    double skip_outliers = 0;  // z-score above which an update is skipped; 0: never
    auto operator<=>(const Guards&) const = default;
};
// AdamW's settings, by default GPT-3's (Brown et al. 2020, appendix B).
struct AdamW {
    // For every weight it keeps two numbers, m and v: their prefixes in a checkpoint.
    static constexpr std::array kMoments = {"m.", "v."};
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    auto operator<=>(const AdamW&) const = default;
};
// How many standard deviations `value` lies above the mean of window[count]; 0 if all are equal.
TINYGPT_HD inline double z_score(const double* window, int64_t count, double value) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i) mean += window[i];
    mean /= double(count);
    for (int64_t i = 0; i < count; ++i) squares += (window[i] - mean) * (window[i] - mean);
    const double deviation = sqrt(squares / double(count));
    return deviation > 0 ? (value - mean) / deviation : 0;
}

// From the loss and the norm in `state` decides about the update: sets broken, skip and clip_scale,
// counts, and remembers both. A NaN or an infinity always skips: it must never reach the weights.
// An outlier, a loss or a norm more than skip_outliers deviations above the mean of the last 128,
// skips too. Clipping (Pascanu et al. 2013): a norm above the limit scales the gradient to the
// limit's length, in the same direction.
//   walk> norm of all gradients 2.550270; the limit is 0.5: each is multiplied by 0.196058
TINYGPT_HD inline void judge_step(StepState* state, const Guards& guards) {
    const int64_t window = StepState::kWindow;
    const double largest = 1.7976931348623157e308;  // a NaN fails each comparison: broken, too
    state->broken =
        !(state->loss <= largest && state->loss >= -largest && state->grad_norm <= largest);
    bool outlier = false;
    if (!state->broken && guards.skip_outliers > 0 && state->seen >= window)
        outlier = z_score(state->losses, window, state->loss) > guards.skip_outliers ||
                  z_score(state->norms, window, state->grad_norm) > guards.skip_outliers;
    state->skip = state->broken || outlier;
    state->outliers += outlier, state->skipped += state->skip, state->updates += !state->skip;
    state->clip_scale = guards.grad_clip > 0 && state->grad_norm > guards.grad_clip
                            ? guards.grad_clip / state->grad_norm
                            : 1.0;
    if (state->broken) return;
    state->losses[state->seen % window] = state->loss;
    state->norms[state->seen % window] = state->grad_norm;
    ++state->seen;
}

// AdamW (Loshchilov, Hutter 2019). For every weight, m is a running mean of its gradient g, and v
// of g^2. The step m / sqrt(v) has no unit: it is about 1 if g always points the same way, and
// about 0 if g only jitters, however large it is. So a weight moves by about lr at most.
//   m <- beta1 m + (1-beta1) g        v <- beta2 v + (1-beta2) g^2
//   w <- w - lr (m/(1-beta1^t) / (sqrt(v/(1-beta2^t)) + eps) + weight_decay w)
// t is the number of this update, from 1. Why divide by 1-beta1^t: m starts at 0, so
//   m_t = (1-beta1) (g_t + beta1 g_(t-1) + ... + beta1^(t-1) g_1)
// whose factors add up to 1 - beta1^t (a geometric series), not to 1. Divided by it, m is a
// weighted mean; so is v. eps avoids 0/0 where a weight has had no gradient yet. The decay is not
// part of the gradient, since sqrt(v) would divide it too. With beta2 = 0.95, v looks back on about
// 1/(1-beta2) = 20 steps. One element, with m_scale = 1/(1-beta1^t), v_scale = 1/(1-beta2^t):
//   walk> g  = -0.507637 * 0.196058 = -0.099526
//   walk> w  = 0.141984 - 0.1 (-0.099526 / (sqrt(0.009905) + 1e-8) + 0.1 * 0.141984)
template <class real>
TINYGPT_HD inline void adamw_element(real& w, real& m, real& v, real g, real lr, real m_scale,
                                     real v_scale, real beta1, real beta2, real eps, real decay) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    w -= lr * (m * m_scale / (std::sqrt(v * v_scale) + eps) + decay * w);
}

// Called first in a step: sets the rate, and the loss to 0; add_loss then adds to it.
inline void begin_step(StepState* state, double lr) { state->lr = lr, state->loss = 0; }

// Adds scale * sum of losses [rows], in order, to the loss of array `into`.
template <class real>
void add_loss(StepState* state, const real* losses, int rows, double scale, int into = 0) {
    double sum = 0;
    for (int row = 0; row < rows; ++row) sum += double(losses[row]);
    *state->loss_of(into) += scale * sum;
}

// The gradient's norm is its length as one vector: sqrt(sum of squares). Chunks of fixed size are
// added in order, for any number of threads and ranks. Padding is 0 and adds nothing.
constexpr size_t kNormChunk = 1 << 14;

// sums[i] = the sum of squares of chunk i of grads [count].
template <class real>
void square_sums(double* sums, const real* grads, size_t count) {
    const size_t chunk = kNormChunk, chunks = ceil_div(count, chunk);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < chunks; ++i) {
        const real* g = grads + i * chunk;
        const size_t n = std::min(chunk, count - i * chunk);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < n; ++j) sum += double(g[j]) * double(g[j]);
        sums[i] = sum;
    }
}
inline void norm_of_sums(StepState* state, const double* sums, size_t chunks) {
    state->grad_norm = std::sqrt(std::accumulate(sums, sums + chunks, 0.0));
}

// Why a function: a temporary bf16 in a simd loop keeps GCC 12 from vectorising it.
template <class A, class real>
TINYGPT_HD inline void store_as(A& to, real value) {
    to = A(value);
}

// Updates masters, m and v [count] from grads times clip_scale, unless state.skip. Elements below
// `decayed` decay (see Layout). In bf16 the weights are rounded from the masters.
template <class A, class real>
void adamw(A* weights, real* masters, real* m, real* v, const real* grads, size_t count,
           size_t decayed, const StepState* state, const AdamW& hyper) {
    if (state->skip) return;
    const double t = double(state->updates);
    const real m_scale = real(1 / (1 - std::pow(hyper.beta1, t)));
    const real v_scale = real(1 / (1 - std::pow(hyper.beta2, t)));
    const real lr = real(state->lr), clip = real(state->clip_scale);
    const real beta1 = real(hyper.beta1), beta2 = real(hyper.beta2), eps = real(hyper.eps);
    auto update = [&](size_t begin, size_t end, real decay) {
#pragma omp parallel for simd schedule(static)
        for (size_t i = begin; i < end; ++i) {
            adamw_element(masters[i], m[i], v[i], grads[i] * clip, lr, m_scale, v_scale, beta1,
                          beta2, eps, decay);
            if constexpr (!std::is_same_v<A, real>) store_as(weights[i], masters[i]);
        }
    };
    update(0, decayed, real(hyper.weight_decay)), update(decayed, count, real(0));
}

// =================================================================================================
// §8 One training step
// =================================================================================================
// What you have now: all of it. A step is forward and backward for every micro-batch, and then one
// update. The gradients of the micro-batches add up, each scaled by 1 / (targets of the whole
// step). So k micro-batches of B rows make the same update as one batch of k B rows (up to
// rounding, and without dropout), with a k-th of the activations. With n targets in all:
//   gradient = sum over the micro-batches of (1/n) d(sum of its losses)
// Careful: with unequal numbers of targets, the mean of the micro-batches' means is another number.
//
// The sum is a binary tree, so that it can be shared out: ranks take neighbouring micro-batches,
// and then 1, 2, 4 or 8 of them make the same sum in the same order, and so the same bits.
//   micro-batch    0   1   2   3
//                  0 + 1   2 + 3        of 2 ranks each makes one, of 4 ranks each pair
//                  (0 + 1) + (2 + 3)    2 ranks or 4 make it together; 1 rank makes all three
// A tree has at most 8 leaves. A leaf is one micro-batch, or a few neighbours, added in place.

// What all steps of a run have in common.
struct StepOptions {
    uint64_t seed = 0;
    LearningRate rate;
    AdamW adamw;
    Guards guards;
    auto operator<=>(const StepOptions&) const = default;
};

// 0 .. n-1, sorted by inputs[i], equal ones in their order (for §4.1).
inline std::vector<int32_t> rows_by_token(const std::vector<int32_t>& inputs) {
    std::vector<int32_t> order(inputs.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t i, int32_t j) { return inputs[size_t(i)] < inputs[size_t(j)]; });
    return order;
}

// Sets a.inputs, a.targets and a.order. Needs reserve(>= B, >= T).
template <class Device>
void set_batch(Gpt2<Device>& model, const Batch& batch) {
    const size_t rows = batch.inputs.size();
    model.device.upload(model.a.inputs, batch.inputs.data(), rows);
    model.device.upload(model.a.targets, batch.targets.data(), rows);
    model.device.upload(model.a.order, rows_by_token(batch.inputs).data(), rows);
}

// Which micro-batches of a step a rank has: neighbours, from number `first` on. A process alone has
// all of them.
struct StepShare {
    size_t first = 0, all = 0;  // all: of the step
    int64_t scored = 0;         // targets in the whole step
};

// From the gradients of a step to new weights. A process alone has one share: own and at are 0, n
// is everything, and nothing is gathered. Then this is: square_sums, norm_of_sums, judge_step,
// adamw. (Several share out the arrays: §10.)
template <class Device>
void update(Gpt2<Device>& model, const StepOptions& o) {
    Device& device = model.device;
    const auto& shares = model.shares;
    sum_over_ranks(model);  // then the gradients are complete: what changes them all goes below
    shares.for_each([&](size_t, size_t at, size_t n) {
        device.square_sums(model.sums + at / kNormChunk, model.grads + at, n);
    });
    device.gather(model.sums, shares.part / kNormChunk, shares.rounds);
    device.norm_of_sums(model.state, model.sums, ceil_div(shares.size, kNormChunk));
    device.judge_step(model.state, o.guards);
    shares.for_each([&](size_t own, size_t at, size_t n) {
        // Of these elements so many decay: max(0, decayed - at).
        const size_t decayed = model.layout.decayed - std::min(at, model.layout.decayed);
        device.adamw(model.weights + at, model.masters + (Device::kSeparateMasters ? own : at),
                     model.moments[0] + own, model.moments[1] + own, model.grads + at, n,
                     std::min(decayed, n), model.state, o.adamw);
    });
    model.gathered = {};
    await_weights(model, -1);  // begins to gather them
}

// Step s (from 0). Afterwards model.state has the loss and the gradient norm of the step's batches,
// from before the update. Why replay: what changes from step to step (tokens, learning rate, loss)
// is in the device's memory, so a GPU can record the calls once, as a CUDA graph, and replay it.
// (Not with dropout: its keys are arguments of the calls.)
template <class Device>
void train_step(Gpt2<Device>& model, const std::vector<Batch>& micro_batches, const StepOptions& o,
                int64_t s, const StepShare& share = {}) {
    model.device.begin_step(model.state, learning_rate(o.rate, s));
    for (size_t i = 0; i < micro_batches.size(); ++i) {
        const Pass pass = training_pass(model.config, micro_batches, i, o.seed, s, share);
        set_batch(model, micro_batches[i]);
        model.make_spares(pass.into);       // arrays for the tree; none for one leaf
        model.device.replay(pass, o, [&] {  // on a CPU: just does it
            forward(model, pass);
            backward(model, pass, [&](size_t final) { exchange_gradients(model, pass, final); });
            add_up(model, pass);  // losses, and the sums of the tree above
            if (pass.last) update(model, o);
        });
    }
}

// =================================================================================================
// §9 Evaluate and generate
// =================================================================================================
// What you have now: a model that trains. How good is it on text it has not seen, and what does it
// write? Both need forward passes only. The loss is a mean over tokens, in nats (natural
// logarithms), and
//   perplexity = e^loss            bits per byte = (sum of losses) / log 2 / (bytes of the text)
// Careful: only bits per byte compare models with different tokenizers. A longer token is harder.

// Windows, one after the other, that score every prediction once. With a document_start >= 0 (the
// end-of-text token) a window begins where its document does; what was scored before is context
// only. So every token is predicted from all of its document so far, as the floor of the default
// corpus assumes. (A document longer than T is cut.) With T = 8 and the documents Abcdef Ghij
// Klmno, whose first tokens are the capitals:
//   inputs of window 0     A b c d e f G h        8 are scored; targets b ... i
//             window 1     G h i j K l m n        2 are context, 6 are scored; targets j ... o
// Only the first `limit` predictions are scored; 0: all.
inline std::vector<Window> evaluation_windows(const Shards& shards, int T, int document_start,
                                              int64_t limit = 0) {
    std::vector<Window> windows;
    int64_t left = limit > 0 ? limit : shards.predictions();
    for (const Shard& shard : shards.files) {
        const int64_t end = std::min(left, shard.predictions());
        left -= end;
        std::vector<uint16_t> tokens(document_start < 0 ? 0 : size_t(end));
        shard.read(tokens.data(), 0, int64_t(tokens.size()));
        for (int64_t scored = 0; scored < end;) {
            int64_t begin = scored;
            if (document_start >= 0) {
                while (begin > 0 && tokens[size_t(begin)] != document_start) --begin;
                if (scored - begin >= T) begin = scored;  // a document longer than the window
            }
            const int64_t count = std::min<int64_t>(T, end - begin);
            windows.push_back({&shard, begin, count, scored - begin});
            scored = begin + count;
        }
    }
    return windows;
}

struct Evaluation {
    double total = 0;               // sum of -log p, in nats
    int64_t tokens = 0, bytes = 0;  // scored; what they decode to
    bool stopped = false;           // before all were
    double loss() const { return total / double(std::max<int64_t>(1, tokens)); }
    double perplexity() const { return std::exp(loss()); }
    double bits_per_byte() const {
        return total / std::log(2.0) / double(std::max<int64_t>(1, bytes));
    }
};

// The losses of one batch [B*T], without dropout. Needs reserve(>= B, >= T).
template <class Device>
std::vector<typename Device::Real> batch_losses(Gpt2<Device>& model, const Batch& batch) {
    const int rows = batch.B * batch.T;
    set_batch(model, batch);
    forward(model, {.B = batch.B, .T = batch.T});
    model.device.head_forward(model.a.losses, model.a.logits, model.a.ln_f, model.w.lm_head,
                              model.a.targets, rows, model.config.n_embd, model.config.vocab_size);
    std::vector<typename Device::Real> losses(static_cast<size_t>(rows));
    model.device.download(losses.data(), model.a.losses, losses.size());
    return losses;
}

// Scores every window, model.B at a time on each rank. token_bytes[id]: how many bytes a token
// stands for; may be empty. Before each batch go_on(tokens scored) may return false, on all ranks.
template <class Device>
Evaluation evaluate(Gpt2<Device>& model, std::span<const Window> windows,
                    const std::vector<int>& token_bytes,
                    const std::function<bool(int64_t)>& go_on = nullptr) {
    Evaluation result;
    auto& ranks = *model.device.ranks;
    const size_t rows = size_t(model.B) * size_t(model.T);
    std::vector<typename Device::Real> losses(rows * size_t(ranks.count));
    while (!windows.empty()) {
        if (go_on && !go_on(result.tokens)) {
            result.stopped = true;
            break;
        }
        std::vector<int32_t> targets;  // of all ranks
        for (int rank = 0; rank < ranks.count; ++rank) {
            const size_t n = std::min(windows.size(), size_t(model.B));
            const Batch batch =
                read_batch(windows.first(n), model.B, model.T, model.config.vocab_size);
            windows = windows.subspan(n);
            targets.insert(targets.end(), batch.targets.begin(), batch.targets.end());
            if (rank == ranks.rank && n > 0)
                std::ranges::copy(batch_losses(model, batch), &losses[rows * size_t(rank)]);
        }
        ranks.gather(losses.data(), rows * sizeof losses[0], 1);
        for (size_t i = 0; i < losses.size(); ++i) {
            if (targets[i] < 0) continue;
            result.total += double(losses[i]), ++result.tokens;
            if (!token_bytes.empty()) result.bytes += token_bytes[size_t(targets[i])];
        }
    }
    return result;
}

// --- Generation: predict one token, append it, predict the next
// The key/value cache: positions do not look ahead, so a new token changes nothing in the rows
// before it. Their keys and values are kept, and only the new row is computed: a pass over the
// weights for each token, whose time goes into reading them.
//   pass 1   reads "the cat"   T = 2, past = 0   rows 0, 1 of every layer's qkv   -> " sat", say
//   pass 2   reads " sat"      T = 1, past = 2   row 2                            -> " on"

// How tokens are picked (see candidates and likeliest), and how many.
struct SampleOptions {
    int max_new_tokens = 100;
    double temperature = 0.8;  // 0: always the likeliest token
    int top_k = 0;             // 0: all tokens
    double top_p = 1;          // 1: all tokens
    uint64_t seed = 0;
    int end_of_text = -1;  // the token at which generation stops; -1: none
    int vocab_size = 0;    // ids from here on have no token and are never drawn; 0: all have one
};

struct Candidate {
    int token;
    double probability;
};

// The softmax of logits / temperature, in the order of ids. A temperature below 1 makes likely
// tokens likelier, since e^(l/t) = (e^l)^(1/t). At 0 the list is made with 1: only the
// likeliest will be used.
inline std::vector<Candidate> candidates(const std::vector<float>& logits, double temperature) {
    const double highest = double(*std::max_element(logits.begin(), logits.end()));
    std::vector<Candidate> list(logits.size());
    double total = 0;
    for (size_t i = 0; i < list.size(); ++i) {
        const double below = (double(logits[i]) - highest) / (temperature > 0 ? temperature : 1);
        list[i] = {int(i), std::exp(below)};
        total += list[i].probability;
    }
    if (!std::isfinite(total))
        fail(
            "the model's scores are no numbers, so nothing can be sampled: use an earlier "
            "checkpoint");
    for (Candidate& c : list) c.probability /= total;
    return list;
}

// The top_k likeliest, and of those the fewest whose probabilities reach top_p of their sum
// (nucleus sampling, Holtzman et al. 2020), likeliest first, equal ones by id; scaled to sum 1. For
// example .5 .3 .15 .05: top_k = 3 leaves .5 .3 .15, whose sum is .95; of these top_p = .8 takes
// two, as .5 + .3 >= .8 * .95; the result is .625 .375.
inline std::vector<Candidate> likeliest(std::vector<Candidate> list, int top_k, double top_p) {
    auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    };
    if (top_k > 0 && size_t(top_k) < list.size()) {
        std::partial_sort(list.begin(), list.begin() + top_k, list.end(), likelier);
        list.resize(size_t(top_k));
    }
    double total = 0, reached = 0;
    for (const Candidate& c : list) total += c.probability;
    // A heap yields the likeliest one by one. Why: few are needed, and sorting all 50,257 is slow.
    auto less_likely = [&](const Candidate& a, const Candidate& b) { return likelier(b, a); };
    std::make_heap(list.begin(), list.end(), less_likely);
    std::vector<Candidate> kept;
    while (!list.empty() && (kept.empty() || top_p >= 1 || reached < top_p * total)) {
        std::pop_heap(list.begin(), list.end(), less_likely);
        kept.push_back(list.back()), list.pop_back();
        reached += kept.back().probability;
    }
    for (Candidate& c : kept) c.probability /= reached;
    return kept;
}

// What may come next, and how likely.
inline std::vector<Candidate> choices(std::vector<float> logits, const SampleOptions& o) {
    if (o.vocab_size > 0) logits.resize(std::min(logits.size(), size_t(o.vocab_size)));
    const int top_k = o.temperature > 0 ? o.top_k : 1;
    std::vector<Candidate> list = candidates(logits, o.temperature);
    return top_k > 0 || o.top_p < 1 ? likeliest(std::move(list), top_k, o.top_p) : list;
}

// Picks by a uniform number u in [0, 1): the first token at which the sum of probabilities exceeds
// u. Why the last line: rounding may leave the sum a little below 1.
inline int pick(const std::vector<Candidate>& list, double u) {
    for (const Candidate& c : list)
        if ((u -= c.probability) < 0) return c.token;
    return list.back().token;
}

// Reads tokens into the key/value cache (the rows of qkv), after `past` earlier ones; returns the
// logits of the token that comes next [V]. Needs past + tokens.size() <= the reserved rows, and <=
// n_positions.
template <class Device>
std::vector<float> next_logits(Gpt2<Device>& model, const std::vector<int32_t>& tokens, int past) {
    using Real = typename Device::Real;
    const int n = int(tokens.size()), C = model.config.n_embd, V = model.config.vocab_size;
    model.device.upload(model.a.inputs, tokens.data(), tokens.size());
    forward(model, {.B = 1, .T = n, .past = past, .cached = true});
    model.device.head_logits(model.a.next_logits, model.a.ln_f + size_t(n - 1) * C, model.w.lm_head,
                             1, C, V);
    std::vector<Real> real_logits(static_cast<size_t>(V));
    model.device.download(real_logits.data(), model.a.next_logits, real_logits.size());
    return std::vector<float>(real_logits.begin(), real_logits.end());
}

// Continues `tokens` (at least one) and calls on_token(token) for each new one, until it returns
// false, at end_of_text, or after max_new_tokens. A full context slides: its later half is read
// again as a new beginning. Returns how often.
template <class Device, class OnToken>
int generate(Gpt2<Device>& model, std::vector<int32_t> tokens, const SampleOptions& o,
             OnToken&& on_token) {
    const int context = std::min(model.config.n_positions, model.T);
    const uint64_t key = random_key(o.seed, 0, kGeneration);
    int cached = 0, slides = 0;
    for (int i = 0; i < o.max_new_tokens; ++i) {
        if (int(tokens.size()) > context) {
            tokens.erase(tokens.begin(), tokens.end() - std::max(1, context / 2));
            cached = 0, ++slides;
        }
        const std::vector<int32_t> fresh(tokens.begin() + cached, tokens.end());
        const std::vector<Candidate> list = choices(next_logits(model, fresh, cached), o);
        cached = int(tokens.size());
        const int token = pick(list, random_uniform(key, uint64_t(i)));
        if (token == o.end_of_text || !on_token(token)) break;
        tokens.push_back(token);
    }
    return slides;
}

// =================================================================================================
// What follows is plumbing: the fast CPU, files, and the run.
// =================================================================================================

// =================================================================================================
// §10 The device, memory, and many processes
// =================================================================================================
// What you have now: the model. Here is the device that it runs on, its memory, and how several
// processes (ranks) train it together: each computes the gradients of some micro-batches, all
// gradients are added up, and each updates its part of the weights.

// --- The device: all that the model asks for, in one table

// The processes that train one model together. A process alone has nothing to do here;
// train_gpt.cpp has the ranks of MPI. All ranks make the same calls in the same order.
struct Ranks {
    int rank = 0, count = 1;
    int here = 1, rank_here = 0;    // the same, of those on this machine
    double seconds = 0, bytes = 0;  // spent on the calls below, and sent by them
    virtual ~Ranks() = default;
    // Begins to send: rank r gets the part at from + r * bytes, and finds that of s at to + s *
    // bytes.
    virtual void exchange(void* /*to*/, const void* /*from*/, size_t /*bytes*/) {}
    // Begins one round of gather, below.
    virtual void begin_gather(void* /*array*/, size_t /*bytes*/) {}
    // Whether the oldest of what was begun is done, and forgets it; with `wait`, waits for it.
    virtual bool arrived(bool /*wait*/) { return true; }
    // array [rounds, count, bytes]: each rank has set its part of every round; sets the others.
    virtual void gather(void* /*array*/, size_t /*bytes*/, size_t /*rounds*/) {}
    // Sets data [bytes] to what it is at rank 0.
    virtual void broadcast(void* /*data*/, size_t /*bytes*/) {}
    // "rank 1 on host: ", before this rank's errors; and the end of all ranks, after one.
    virtual std::string name() const { return ""; }
    virtual void end_all(int /*status*/) {}
};
inline Ranks alone;
inline Ranks* world = &alone;  // the ranks of this program

inline void use_large_pages(void* start, size_t bytes);  // §12

// Uninitialised memory for count elements, aligned to 64 bytes. Large arrays get large pages: fewer
// TLB misses.
template <class Element>
Element* allocate(size_t count) {
    const size_t large_page = size_t(1) << 21;
    size_t bytes = std::max<size_t>(count, 1) * sizeof(Element);
    const size_t unit = bytes >= large_page / 2 ? large_page : 64;
    bytes = round_up(bytes, unit);
    void* pointer = std::aligned_alloc(unit, bytes);
    if (!pointer)
        fail("out of memory: ", format("%.2f", double(bytes) / 1e9), " GB more were needed");
    if (unit == large_page) use_large_pages(pointer, bytes);
    return static_cast<Element*>(pointer);
}

// A device is a struct with the names below. Model, training and generation (§5-9) are written
// once, over any device. Layers passes each name on to the function of §4 or §7: with PlainOps it
// is called Reference, with §11's operations Cpu. Cuda, in train_gpt.cu, has the same names, as
// kernels. (auto... a: any arguments, passed on, as *args in Python.)
template <class A, class Ops = PlainOps>
struct Layers {
    // In bf16 small updates would be rounded away. So AdamW changes an fp32 copy of each weight,
    // its master, and layers read weights rounded from it. In fp32 both are the same array.
    using Activation = A;                                               // and their gradients
    using Weight = A;                                                   // what the layers read
    using Real = RealOf<A>;                                             // masters, moments, losses
    using Gradient = Real;                                              // of parameters
    static constexpr bool kSeparateMasters = !std::is_same_v<A, Real>;  // weights are copies
    static constexpr bool kHostMemory = true;  // the host may read and write its arrays
    Ranks* ranks = world;

    void embed_forward(auto... a) { tinygpt::embed_forward<A, Real>(a...); }
    void embed_backward(auto... a) { tinygpt::embed_backward<A, Real>(a...); }
    void layernorm_forward(auto... a) { tinygpt::layernorm_forward<A, Real>(a...); }
    void layernorm_backward(auto... a) { tinygpt::layernorm_backward<A, Real>(a...); }
    void linear_forward(auto... a) { tinygpt::linear_forward<Ops, A, Real>(a...); }
    void linear_backward(auto... a) { tinygpt::linear_backward<Ops, A, Real>(a...); }
    void attention_forward(auto... a) { tinygpt::attention_forward<Ops, A, Real>(a...); }
    void attention_backward(auto... a) { tinygpt::attention_backward<Ops, A, Real>(a...); }
    void attention_cached(auto... a) { tinygpt::attention_cached<Ops, A, Real>(a...); }
    void linear_gelu_forward(auto... a) { tinygpt::linear_gelu_forward<Ops, A, Real>(a...); }
    void gelu_forward(auto... a) { tinygpt::gelu_forward<A, Real>(a...); }
    void linear_gelu_backward(auto... a) { tinygpt::linear_gelu_backward<Ops, A, Real>(a...); }
    void linear_residual_forward(auto... a) {
        tinygpt::linear_residual_forward<Ops, A, Real>(a...);
    }
    static size_t head_workspace(int rows, int V) {  // elements of `logits`
        return size_t(std::min(rows, kHeadRows)) * size_t(V);
    }
    void head_logits(auto... a) { tinygpt::head_logits<Ops>(a...); }
    void head_forward(auto... a) { tinygpt::head_forward<Ops, A, Real>(a...); }
    void head_forward_backward(auto... a) { tinygpt::head_forward_backward<Ops, A, Real>(a...); }

    // The update of all parameters at once, and what it depends on.
    void begin_step(auto... a) { tinygpt::begin_step(a...); }
    void add_loss(auto... a) { tinygpt::add_loss<Real>(a...); }
    void square_sums(auto... a) { tinygpt::square_sums<Real>(a...); }
    void norm_of_sums(auto... a) { tinygpt::norm_of_sums(a...); }
    void judge_step(auto... a) { tinygpt::judge_step(a...); }
    void adamw(auto... a) { tinygpt::adamw<A, Real>(a...); }

    // Memory. upload copies to the device, download from it.
    template <class Element>
    Element* allocate(size_t count) {
        return tinygpt::allocate<Element>(count);
    }
    void release(auto* pointer) { std::free(pointer); }
    void zero(auto* to, size_t count) {
        if (count > 0) std::memset(static_cast<void*>(to), 0, count * sizeof *to);
    }
    // Why count > 0, here and above: memcpy takes no null, not even for nothing.
    void upload(auto* to, const auto* from_host, size_t count) {
        if (count > 0) std::memcpy(static_cast<void*>(to), from_host, count * sizeof *to);
    }
    void download(auto* to_host, const auto* from, size_t count) { upload(to_host, from, count); }
    void weights_from_masters(Weight* weights, const Real* masters, size_t count) {
        if constexpr (kSeparateMasters)
            for (size_t i = 0; i < count; ++i) weights[i] = Weight(masters[i]);
    }

    // Sums over micro-batches and ranks.
    void add(auto* to, const auto* from, size_t count) {
#pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < count; ++i) to[i] += from[i];
    }
    void copy(auto* to, const auto* from, size_t count) { upload(to, from, count); }
    void exchange(auto* to, const auto* from, size_t count) {
        ranks->exchange(to, from, count * sizeof *to);
    }
    void begin_gather(auto* array, size_t count) {
        ranks->begin_gather(array, count * sizeof *array);
    }
    bool arrived(bool wait) { return ranks->arrived(wait); }
    void gather(auto* array, size_t count, size_t rounds) {
        ranks->gather(array, count * sizeof *array, rounds);
    }

    // A GPU works while the CPU prepares later steps, up to kStepsBehind of them. post: copy the
    // state when the work so far is done; fetch: wait for the oldest such copy. replay does the
    // work; a GPU keeps it as a CUDA graph for the same pass and options.
    static constexpr int kStepsBehind = 0;
    void replay(const auto& /*pass*/, const auto& /*options*/, auto&& work) { work(); }
    void post(const StepState*) {}
    StepState fetch(const StepState* state) { return *state; }
    void synchronize() {}  // waits until all work is done
};
template <class real>
using Reference = Layers<real, PlainOps>;

// --- The buffers of a pass

// Hands out aligned parts of one allocation. Without one (base is null) it only counts.
// take<float>(n) has room for n floats.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    template <class Element>
    Element* take(size_t count) {
        Element* part = base ? reinterpret_cast<Element*>(base + used) : nullptr;
        used += round_up(count * sizeof(Element), 256);
        return part;
    }
};

// Sets every buffer that this use needs: the second list of this program, beside §3's.
template <class Device>
void take_buffers(Activations<Device>& a, Arena& arena, const Config& config, int B, int T,
                  Use use) {
    using Activation = typename Device::Activation;
    using Real = typename Device::Real;
    const size_t rows = size_t(B) * T, C = config.n_embd;
    auto wide = [&](size_t columns) { return arena.take<Activation>(rows * columns); };
    auto per_row = [&] { return arena.take<Real>(rows); };
    a.inputs = arena.take<int32_t>(rows), a.targets = arena.take<int32_t>(rows);
    a.order = arena.take<int32_t>(rows);
    a.embedded = wide(C);
    a.layers.resize(size_t(config.n_layer));
    for (auto& l : a.layers) {
        if (use == Use::training || &l == &a.layers[0]) {
            l.ln_1 = wide(C), l.att = wide(C), l.x_mid = wide(C), l.ln_2 = wide(C);
            l.qkv = wide(3 * C), l.fc = wide(4 * C), l.x_out = wide(C);
            const bool shared = config.recompute_gelu && &l != &a.layers[0];
            l.gelu = shared ? a.layers[0].gelu : wide(4 * C);
            l.ln_1_mean = per_row(), l.ln_1_rstd = per_row();
            l.ln_2_mean = per_row(), l.ln_2_rstd = per_row();
            l.lse = arena.take<Real>(rows * size_t(config.n_head));
        } else {
            l = a.layers[0];  // x_out too: a layer reads its input before it overwrites it
            if (use == Use::generation) l.qkv = wide(3 * C);
        }
    }
    a.ln_f = wide(C), a.ln_f_mean = per_row(), a.ln_f_rstd = per_row();
    a.next_logits = arena.take<Real>(size_t(config.vocab_size));
    if (use == Use::generation) return;
    a.logits = arena.take<Activation>(Device::head_workspace(int(rows), config.vocab_size));
    a.losses = per_row();
    if (use != Use::training) return;
    a.dx = wide(C), a.dwide = wide(4 * C), a.dnarrow = wide(C);
    a.dbranch = config.dropout > 0 ? wide(C) : a.dx;
}

// --- The model

// How ranks share out a flat array of `size` elements: it is cut into rounds of one part for each,
// and part r of every round is rank r's. Only there it updates weights, and keeps moments (ZeRO
// stage 1, Rajbhandari et al. 2020). Why rounds: one is sent while another is added up.
//   2 ranks, 2 rounds    | rank 0 | rank 1 | rank 0 | rank 1 |    the last may end in padding
struct Shares {
    size_t size = 0, part = 0, rounds = 1, rank = 0, count = 1;
    Shares(size_t size, const Ranks& ranks)
        : size(size), part(size), rank(size_t(ranks.rank)), count(size_t(ranks.count)) {
        if (count == 1) return;
        rounds = ceil_div(size, count << 18);
        part = round_up(ceil_div(size, count * rounds), kNormChunk);
    }
    size_t own() const { return rounds * part; }           // elements of a rank
    size_t room() const { return rounds * count * part; }  // of all, with the padding
    // Calls visit(own, at, n) for every part of this rank: n elements, at `own` in an array of its
    // own elements, at `at` in one of all.
    void for_each(auto&& visit) const {
        for (size_t t = 0; t < rounds; ++t) {
            const size_t at = (t * count + rank) * part;
            if (at < size) visit(t * part, at, std::min(part, size - at));
        }
    }
};

// Rounds that are sent one after another, in the background.
struct Rounds {
    static constexpr size_t kInFlight = 16;  // that many may be on their way
    size_t begun = 0, done = 0;
    // Begins rounds below `ready`, and ends them in the same order: those below `wanted` in any
    // case, later ones where they have come. begin(i) and end(i) say how.
    void advance(auto& device, size_t ready, size_t wanted, auto&& begin, auto&& end) {
        while (done < ready) {
            if (begun < std::min(ready, done + kInFlight)) {
                begin(begun++);
                continue;
            }
            if (!device.arrived(done < wanted)) return;
            end(done++);
        }
    }
};

// A model on a device: it owns its parameters, what training adds to them, and a pass's buffers.
template <class Device>
struct Gpt2 {
    using Real = typename Device::Real;
    using Weight = typename Device::Weight;
    using Gradient = typename Device::Gradient;
    Config config;
    Layout layout;
    Device device;
    Shares shares;
    // Flat arrays of layout.size elements; moments and separate masters have only those of this
    // rank.
    Weight* weights = nullptr;
    Real* masters = nullptr;  // the weights themselves, unless the device keeps them apart
    Gradient* grads = nullptr;
    std::vector<Gradient*> spares;  // more of them, for sums over micro-batches (§8)
    std::array<Real*, AdamW::kMoments.size()> moments{};
    Gradient* received = nullptr;  // rounds of parts, one part from each rank
    Rounds summed, gathered;       // of this step: gradients, and new weights
    double* sums = nullptr;        // of squares, and each rank's loss
    StepState* state = nullptr;
    Parameters<Weight> w;    // weights by name
    Parameters<Gradient> g;  // grads by name
    Activations<Device> a;
    int B = 0, T = 0;          // what a has room for
    char* buffers = nullptr;   // the memory of a
    std::vector<void*> owned;  // the other arrays

    explicit Gpt2(const Config& config, Device on = {})
        : config(config), layout(layout_of(config)), device(on),
          shares(layout.size, *device.ranks) {
        make(weights, shares.room());
        masters = reinterpret_cast<Real*>(weights);
        if (Device::kSeparateMasters) make(masters, shares.own());
        gathered = {shares.rounds, shares.rounds};
        point_into(w, weights, config, layout);
        zeros(state, 1);
    }
    Gpt2(const Gpt2&) = delete;
    ~Gpt2() {
        for (void* array : owned) device.release(array);
        device.release(buffers);
    }

    // Makes room for batches of up to B x T; for training also for gradients and moments, all 0.
    // take_buffers runs twice: first it counts.
    void reserve(int rows, int columns, Use use) {
        device.release(std::exchange(buffers, nullptr));
        Arena arena;
        take_buffers(a, arena, config, rows, columns, use);
        buffers = device.template allocate<char>(arena.used), B = rows, T = columns;
        arena = {buffers, 0};
        take_buffers(a, arena, config, rows, columns, use);
        if (use != Use::training || grads) return;
        zeros(grads, shares.room());
        for (Real*& moment : moments) zeros(moment, shares.own());
        point_into(g, grads, config, layout);
        zeros(sums, ceil_div(shares.room(), kNormChunk) + shares.count);
        if (shares.count > 1) zeros(received, Rounds::kInFlight * shares.count * shares.part);
    }
    // Makes so many spare arrays of gradients.
    void make_spares(int count) {
        while (int(spares.size()) < count) zeros(spares.emplace_back(), shares.room());
    }
    template <class Element>
    void make(Element*& array, size_t count) {
        owned.push_back(array = device.template allocate<Element>(count));
    }
    void zeros(auto*& array, size_t count) { make(array, count), device.zero(array, count); }

    // Whether an array of Real has only the elements of this rank.
    bool is_shared_out(const Real* array) const {
        return shares.count > 1 && (Device::kSeparateMasters || array != masters);
    }
    // Sets elements of masters or a moment, count from `first` on, as far as this rank has them.
    void set(Real* array, size_t first, const Real* host, size_t count) {
        if (!is_shared_out(array)) return device.upload(array + first, host, count);
        shares.for_each([&](size_t own, size_t at, size_t n) {
            const size_t begin = std::max(at, first), end = std::min(at + n, first + count);
            if (begin < end)
                device.upload(array + own + (begin - at), host + (begin - first), end - begin);
        });
    }
    // The whole of masters or a moment. Careful: what was shared out overwrites grads.
    const Real* whole(const Real* array) {
        await_weights(*this, config.n_layer);
        if (!is_shared_out(array)) return array;
        shares.for_each(
            [&](size_t own, size_t at, size_t n) { device.copy(grads + at, array + own, n); });
        device.gather(grads, shares.part, shares.rounds);
        return reinterpret_cast<const Real*>(grads);
    }
    // Rounds the weights from the masters, where they are apart.
    void round_weights() {
        if (!Device::kSeparateMasters) return;
        shares.for_each([&](size_t own, size_t at, size_t n) {
            device.weights_from_masters(weights + at, masters + own, n);
        });
        device.gather(weights, shares.part, shares.rounds);
    }
    // Sets masters from the host's array, and rounds the weights from them.
    void set_weights(const Real* host) {
        set(masters, 0, host, layout.size);
        round_weights();
    }
    // The masters, on the host.
    std::vector<Real> get_weights() {
        std::vector<Real> host(layout.size);
        device.download(host.data(), whole(masters), layout.size);
        return host;
    }
    // Fresh weights. Why on the host: every device begins with the same ones.
    void initialise(uint64_t seed) {
        std::vector<Real> host(layout.size);
        tinygpt::initialise(host.data(), config, layout, seed);
        set_weights(host.data());
    }
};

// Bytes. In fp32, training takes 16 a parameter: weight, gradient, two moments.
struct MemoryNeed {
    size_t weights = 0, gradients = 0, moments = 0, activations = 0;
    size_t total() const { return weights + gradients + moments + activations; }
};
// What the constructor and reserve(B, T, use) would take, and training with so many spare arrays of
// gradients.
template <class Device>
MemoryNeed memory_need(const Config& config, int B, int T, Use use, const Ranks& ranks = alone,
                       int spares = 0) {
    const Shares shares(layout_of(config).size, ranks);
    const size_t real = shares.own() * sizeof(typename Device::Real);
    Activations<Device> a;
    Arena arena;
    take_buffers(a, arena, config, B, T, use);
    MemoryNeed need{.weights = shares.room() * sizeof(typename Device::Weight),
                    .activations = arena.used};
    if (Device::kSeparateMasters) need.weights += real;
    if (use != Use::training) return need;
    need.gradients = (size_t(spares) + 1) * shares.room() * sizeof(typename Device::Gradient);
    need.moments = AdamW::kMoments.size() * real;
    return need;
}

// --- The sum over micro-batches and ranks: a binary tree (§8)

// How many leaves of the tree a rank has. Where they cannot be shared out evenly, one.
inline size_t leaves_of_rank(size_t micro_batches, size_t ranks) {
    const size_t leaves = std::gcd(micro_batches, size_t(8));
    return leaves % ranks == 0 ? leaves / ranks : 1;
}
// How many arrays of gradients that takes beside the first.
inline int spares_needed(size_t micro_batches, size_t ranks) {
    return std::countr_zero(leaves_of_rank(micro_batches, ranks));
}

// The pass of micro-batch i of step s, of those that this rank has. Sums wait as the digits of a
// binary counter do: leaf 3 = 011b goes into array 2, and is added to 1 and then to 0.
inline Pass training_pass(const Config& config, const std::vector<Batch>& micro_batches, size_t i,
                          uint64_t seed, int64_t s, StepShare share = {}) {
    const size_t n = micro_batches.size();
    if (share.all == 0) {
        share.all = n;
        for (const Batch& batch : micro_batches) share.scored += batch.scored;
    }
    const size_t each = n / leaves_of_rank(share.all, share.all / n), leaf = i / each;
    Pass pass{.B = micro_batches[i].B, .T = micro_batches[i].T};
    pass.scale = 1.0 / double(std::max<int64_t>(1, share.scored));
    pass.first = i % each == 0, pass.last = i + 1 == n;
    pass.into = std::popcount(leaf);
    if (i % each == each - 1) pass.folds = std::countr_one(leaf);
    if (config.dropout > 0)
        pass.dropout = {random_key(seed, uint64_t(s) * share.all + share.first + i, kMicroBatch),
                        config.dropout};
    return pass;
}

// Adds the losses of a pass to their sum. After a leaf's last pass, adds sums that wait to each
// other.
template <class Device>
void add_up(Gpt2<Device>& model, const Pass& pass) {
    model.device.add_loss(model.state, model.a.losses, pass.B * pass.T, pass.scale, pass.into);
    auto sum = [&](int into) { return into == 0 ? model.grads : model.spares[size_t(into - 1)]; };
    for (int i = pass.into; i > pass.into - pass.folds; --i) {
        model.device.add(sum(i - 1), sum(i), model.layout.size);
        model.device.add(model.state->loss_of(i - 1), model.state->loss_of(i), 1);
        model.device.zero(model.state->loss_of(i), 1);
    }
}

// The rest of the tree, over parts [ranks, count] that came from all ranks: sets the first.
template <class Device>
void add_over_ranks(Device& device, auto* parts, size_t count) {
    const int ranks = device.ranks->count;
    for (int width = 1; width < ranks; width *= 2)
        for (int r = 0; r + width < ranks; r += 2 * width)
            device.add(parts + r * count, parts + (r + width) * count, count);
}
// Exchanges the gradients of all ranks, a round at a time, and adds them up, while backward of the
// last pass goes on. From the last matrix to the first, as backward makes them, then what does not
// decay. Those below `final` may not go yet; at the end it is 0, and this returns when all rounds
// are added.
template <class Device>
void exchange_gradients(Gpt2<Device>& model, const Pass& pass, size_t final) {
    Device& device = model.device;
    const Shares& s = model.shares;
    if (s.count == 1 || !pass.last || pass.into > 0) return;
    const size_t round = s.count * s.part, matrices = model.layout.decayed / round;
    const size_t not_yet = ceil_div(final, round);  // rounds of matrices
    const size_t ready = final == 0 ? s.rounds : matrices - std::min(not_yet, matrices);
    auto at = [&](size_t i) { return (i < matrices ? matrices - 1 - i : i) * round; };
    auto buffer = [&](size_t i) { return model.received + i % Rounds::kInFlight * round; };
    model.summed.advance(
        device, ready, final == 0 ? s.rounds : 0,
        [&](size_t i) { device.exchange(buffer(i), model.grads + at(i), s.part); },
        [&](size_t i) {
            add_over_ranks(device, buffer(i), s.part);
            device.copy(model.grads + at(i) + s.rank * s.part, buffer(i), s.part);
        });
}
// Sets this rank's parts of grads to their sum over all ranks, and so the state's loss.
template <class Device>
void sum_over_ranks(Gpt2<Device>& model) {
    Device& device = model.device;
    const Shares& s = model.shares;
    if (s.count == 1) return;
    exchange_gradients(model, {}, 0);
    model.summed = {};
    double* losses = model.sums + s.room() / kNormChunk;
    device.copy(losses + s.rank, &model.state->loss, 1);
    device.gather(losses, 1, 1);
    add_over_ranks(device, losses, 1);
    device.copy(&model.state->loss, losses, 1);
}

// Gathers the weights that the ranks have updated, a round at a time, while forward of the next
// step goes on: what does not decay, then the matrices, in the order in which forward reads them.
// Returns when those of the embedding and of `layers` layers are here; -1: at once.
template <class Device>
void await_weights(Gpt2<Device>& model, int layers) {
    Device& device = model.device;
    const Shares& s = model.shares;
    if (s.count == 1) return;
    const size_t round = s.count * s.part, matrices = model.layout.decayed / round;
    const size_t rest = s.rounds - matrices;
    size_t wanted = s.rounds;
    if (layers < 0)
        wanted = 0;
    else if (layers < model.config.n_layer)
        wanted =
            rest + ceil_div(size_t(model.w.h[size_t(layers)].c_attn_weight - model.w.wte), round);
    auto at = [&](size_t i) { return (i < rest ? matrices + i : i - rest) * round; };
    model.gathered.advance(
        device, s.rounds, std::min(wanted, s.rounds),
        [&](size_t i) { device.begin_gather(model.weights + at(i), s.part); }, [](size_t) {});
}

// =================================================================================================
// §11 The CPU at full speed: products of matrices, attention and e^x
// =================================================================================================
// What you have now: a model that trains, in plain loops. Here are its slowest operations again,
// fast. A product does n^3 operations on n^2 numbers. A core does 32 multiply-adds a cycle, but
// loads far fewer numbers, and hardly any from memory. So: keep sums in registers and operands in
// the caches, and store what is read often in the order of reading.

// --- Vectors: arithmetic on a whole register at a time, on any CPU
#ifdef __CUDACC__
#pragma nv_diag_suppress 1675  // nvcc does not know "GCC unroll"
#endif
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// Vec<Number>: kLanes numbers of 32 bits in one register. + - * / < work lane by lane; a number
// beside a vector acts on every lane.
constexpr int kLanes = kVectorBytes / 4;
template <class Number>
struct VectorOf {
    typedef Number type __attribute__((vector_size(kVectorBytes)));
};
template <class Number>
using Vec = typename VectorOf<Number>::type;

// From and to memory, one instruction each, at any address.
template <class Number>
Vec<Number> load(const Number* from) {
    Vec<Number> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
void store(auto* to, auto v) { std::memcpy(to, &v, sizeof v); }
// As many bf16 numbers as Vec has lanes: in memory, and their bits in the lower halves of lanes.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
inline Vec<uint32_t> widen(HalfVec bits) { return __builtin_convertvector(bits, Vec<uint32_t>); }
inline Vec<uint32_t> load_bits(const bf16* from) {
    HalfVec bits;
    std::memcpy(&bits, from, sizeof bits);
    return widen(bits);
}
// What bf16 (§1) does, for a vector.
inline HalfVec rounded(Vec<float> x) {
    const auto u = std::bit_cast<Vec<uint32_t>>(x);
    const auto up = (u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u);
    return __builtin_convertvector(up >> 16, HalfVec);
}
// Numbers of either type as floats, from and to memory.
inline Vec<float> load_floats(const float* from) { return load(from); }
inline Vec<float> load_floats(const bf16* from) {
    return std::bit_cast<Vec<float>>(load_bits(from) << 16);
}
// The numbers of low, rounded, and then those of high. (The instruction counts subnormals as 0.)
inline Vec<uint32_t> round_both(Vec<float> low, Vec<float> high) {
#ifdef __AVX512BF16__
    Vec<uint32_t> both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
    return both;
#else
    return std::bit_cast<Vec<uint32_t>>(std::array{rounded(low), rounded(high)});
#endif
}
inline void store_rounded(float* to, const float* from, int n) { std::copy_n(from, n, to); }
inline void store_rounded(bf16* to, const float* from, int n) {
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) store(to + j, rounded(load(from + j)));
    for (; j < n; ++j) to[j] = bf16(from[j]);
}
// Prefetches into L2: L1 allows far fewer outstanding loads. Any address is safe.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// --- e^x without a library call: the same lines for one float and for a vector of them
//   x = n ln2 + r,  |r| <= ln2/2,  n whole:   e^x = 2^n e^r,  and e^r = 1 + r + r^2 q(r)
// q is a minimax fit (relative error of e^r: 3.2e-9, far below float's 6e-8). ln2 is subtracted in
// two parts, so that n * 0.693359375 is exact (Cody and Waite 1980). Adding 1.5 * 2^23 rounds to
// whole numbers and leaves n in the low bits.

// For -87.3 < x < 88.3 within 2 units in the last place; below 0, above infinity; NaN stays NaN.
template <class V>
V exp_fast(V x) {
    // int32_t for a float; for a vector the type of its comparisons, a vector of int32_t.
    using Bits = std::conditional_t<std::is_same_v<V, float>, int32_t, decltype(x < x)>;
    x = x < -88.0f ? -88.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const V shifted = x * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const V q =
        (((1.38138782e-3f * r + 8.36906396e-3f) * r + 4.16684225e-2f) * r + 1.66665182e-1f) * r +
        0.49999994f;
    // The exponent of a float begins at bit 23; that of 2^n is n + 127.
    const Bits power = (std::bit_cast<Bits>(shifted) << 23) + (127 << 23);
    return ((r * r) * q + r + 1.0f) * std::bit_cast<V>(power);
}
inline float exp_of(float x) { return exp_fast(x); }

// Joins all lanes into one number: halves, then halves of those.
float join_lanes(Vec<float> v, auto join) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
    return lanes[0];
}
inline float sum_of_lanes(Vec<float> v) { return join_lanes(v, std::plus<float>()); }

// Whole vectors first, then the rest; the order of additions is fixed.
inline float maximum(const float* x, int n) {
    Vec<float> most = Vec<float>{} + x[0];
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) most = load(x + j) > most ? load(x + j) : most;
    float top = join_lanes(most, [](float a, float b) { return a > b ? a : b; });
    for (; j < n; ++j) top = std::max(top, x[j]);
    return top;
}
// x becomes e^(factor x - shift).
inline float exp_and_sum(float* x, float shift, int count, float factor) {
    Vec<float> sums = {};
    int j = 0;
    for (; j + kLanes <= count; j += kLanes) {
        const Vec<float> e = exp_fast(factor * load(x + j) - shift);
        store(x + j, e);
        sums += e;
    }
    float sum = sum_of_lanes(sums);
    for (; j < count; ++j) sum += x[j] = exp_fast(factor * x[j] - shift);
    return sum;
}

// --- Scratch memory

// A thread's scratch buffer i, of at least so many bytes, not cleared; growing loses what it holds.
// Careful: a function must not use those of its caller.
inline void* scratch_bytes(int i, size_t bytes) {
    struct Buffer {
        std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
        size_t size = 0;
    };
    static thread_local Buffer buffers[10];  // attention's backward needs so many
    Buffer& buffer = buffers[i];
    if (bytes > buffer.size) {
        buffer.memory.reset(), buffer.size = 0;
        try {
            buffer.memory.reset(allocate<char>(bytes)), buffer.size = bytes;
        } catch (const Error& error) {
            if (omp_get_level() == 0) throw;
            std::fprintf(stderr, "error: %s\n", error.what());  // no exception may leave a thread
            std::_Exit(1);
        }
    }
    return buffer.memory.get();
}
template <class Number>
Number* scratch(int i, size_t count) {
    return static_cast<Number*>(scratch_bytes(i, count * sizeof(Number)));
}

// --- The fast product
//
//              n                   b, kDepth rows at a time, is cut into panels of kCols
//         +---------+              columns, each copied so that it is read from start to end.
//  kDepth |  | |b|  |
//         +---------+              a is read where it lies, if its rows are rows in memory. Else
//         |  | | |  |              some rows and kDepth columns at a time are copied.
//
//   a          c                   A tile of c is kTileRows rows of a times one panel of b. Its
// +---+---+ +---------+            sums stay in registers for kDepth steps. Each step takes one
// |   |   | |         |            number of each row of a and one row of b's panel, and does
// |===|===| |--- [] --| <- tile    kTileRows * kCols multiply-adds with them.
// |   |   | |         |
// +---+---+ +---------+
//
// A tile's rows of a, in L1, meet b's panels in turn, from L2; so c is written along its rows. That
// is the blocking of Goto and van de Geijn (2008), with the operands exchanged. At ragged edges
// panels are padded with zeros, and smaller micro-kernels make the last rows.
//
// In bf16 a packed element is a pair of numbers, two neighbouring steps of k. Sums are fp32, and
// rounded once, after `finish`.

// Registers: two of sums a row, two for b's row, one for a's number: 2 * 14 + 3, or 2 * 6 + 3.
constexpr int kTileRows = kVectorRegisters == 32 ? 14 : 6;
constexpr int kDepth = 512;             // steps of k at a time: a tile's rows of a fit into L1
constexpr int kPackedB = 512 * kDepth;  // elements of b packed at a time: they fit into L2
// From row to row of attention's scores. Careful: rows 512 numbers apart would share 2 of L1's 64
// sets, and evict each other where they are read downwards.
constexpr int kStride = kDepth + 16;

// One step of the product: sum += a b. Careful: not inlined, the sums would live in memory, and
// products take twice as long.
[[gnu::always_inline]] inline void multiply_add(Vec<float>& sum, float a, Vec<float> b) {
    sum += a * b;
}

// Of a pair one instruction adds both products: sum += a.low b.low + a.high b.high, in fp32.
#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
[[gnu::always_inline]] inline void multiply_add(Vec<float>& sum, uint32_t a, Vec<uint32_t> b) {
    Vec<float> kept = sum;  // a copy: asm would keep an array's element in memory
    asm("vdpbf16ps %2, %1, %0" : "+v"(kept) : "v"(b), "v"(Vec<uint32_t>{} + a));  // a in every lane
    sum = kept;
}
#else
constexpr bool kHasPairs = false;
#endif

// Tile [rows, 2 L] (+)= a [rows, k] * panel of b [k, 2 L]. The tile's rows are ldc apart. down: k
// runs down a's columns, else along its rows. Why templates: to give each sum a register, the
// compiler must know how many there are.
template <int rows, bool down, class Packed>
void micro_kernel(float* tile, ptrdiff_t ldc, View<Packed> a, const Packed* b, int k, bool add) {
    constexpr int L = kLanes;
    const ptrdiff_t row = down ? 1 : a.row_stride, step = down ? a.col_stride : 1;
    Vec<float> c0[rows], c1[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) c0[i] = c1[i] = Vec<float>{};
    for (int p = 0; p < k; ++p, a.data += step, b += 2 * L) {
        const Vec<Packed> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
            Packed x;  // a pair need not lie where a uint32_t would
            std::memcpy(&x, a.data + i * row, sizeof x);
            multiply_add(c0[i], x, b0), multiply_add(c1[i], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
        float* out = tile + i * ldc;
        store(out, add ? load(out) + c0[i] : c0[i]);
        store(out + L, add ? load(out + L) + c1[i] : c1[i]);
    }
}

// One step of a transpose: exchanges the lanes of a whose number has bit `step` with those of b
// whose number has not. With step 1: a0 a1 a2 a3, b0 b1 b2 b3 become a0 b0 a2 b2, a1 b1 a3 b3.
template <int step, class V, int... lane>
[[gnu::always_inline]] inline void exchange_lanes(V& a, V& b, std::integer_sequence<int, lane...>) {
    const V x = a, y = b;
    a = V{(lane & step ? y[lane ^ step] : x[lane])...};
    b = V{(lane & step ? y[lane] : x[lane ^ step])...};
}

// v[i][j] = v[j][i], in registers, for kLanes vectors: in squares of 2 by 2, then 4 by 4, ...
template <int step = 1>
[[gnu::always_inline]] inline void transpose_square(auto* v) {
    if constexpr (step < kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            if (!(i & step))
                exchange_lanes<step>(v[i], v[i + step], std::make_integer_sequence<int, kLanes>());
        transpose_square<2 * step>(v);
    }
}

// A packed operand: element (i, j) is data[j / N * panel + i * N + j % N].
template <class Packed, int N>
struct Panels {
    Packed* data;
    size_t panel;
    // The same from an element whose column begins a panel.
    Panels from(ptrdiff_t i, ptrdiff_t j) const { return {data + i * N + j / N * panel, panel}; }
};

// A way to compute tiles: that of fp32, and of bf16 where the CPU has nothing better. The two ways
// to multiply pairs are below.
struct PlainTiles {
    using Packed = float;                          // an element of a packed operand
    static constexpr int kNumbers = 1;             // that it holds, of neighbouring steps of k
    static int steps(int depth) { return depth; }  // elements that `depth` steps of k become
    static constexpr int kRows = kTileRows, kCols = 2 * kLanes;
    static constexpr int kPanel = kCols;      // columns of a panel
    static constexpr int kSteps = kDepth;     // that tile() makes at a time
    static constexpr bool kIsMatrix = false;  // a is in panels too, and tile() writes all kRows
    static float element(float number, float /*of the next step*/) { return number; }
    // A vector of elements. The numbers of pair e are from[e] and from[e + next], but where next is
    // 1, from[2 e] and from[2 e + 1].
    static Vec<float> elements(const auto* from, ptrdiff_t /*next*/) { return load_floats(from); }
    // c [rows, kCols] (+)= a b, with b one panel: 14 rows at a time, then 8, 4, 2, 1.
    template <int some = kTileRows, class Element>
    static void tile(float* c, ptrdiff_t ldc, View<Element> a, Panels<Element, kPanel> b, int rows,
                     int k, bool add) {
        for (; rows >= some; rows -= some, c += some * ldc, a.data += some * a.row_stride)
            if (a.col_stride == 1)
                micro_kernel<some, false>(c, ldc, a, b.data, k, add);
            else
                micro_kernel<some, true>(c, ldc, a, b.data, k, add);
        if constexpr (some > 1)
            if (rows > 0) tile<int(std::bit_floor(unsigned(some - 1)))>(c, ldc, a, b, rows, k, add);
    }
};

// Packs an operand x as elements [i_end, j_end], in panels of N columns; beyond x are zeros. down:
// k runs down the columns, else along the rows; an element is made of I numbers of a column, or J
// of a row. L by L elements at a time, transposed unless x's rows are rows in memory. Then the
// edges: rows in memory by vectors, the rest one by one.
template <class Tiles, int N, bool down, class Packed, class Number>
void pack(Packed* out, ptrdiff_t apart, View<Number> x, int i_end, int j_end) {
    constexpr int L = kLanes, I = down ? Tiles::kNumbers : 1, J = Tiles::kNumbers / I;
    const bool copy = x.col_stride == 1;
    const int i_whole = x.rows / I / L * L, j_whole = x.cols / J / L * L;
    const auto at = [&](int i, int j) {
        return out + j / N * size_t(N) * i_end + i * apart + j % N;
    };
    for (int row = 0; row < (copy ? i_whole : j_whole); row += L)
        for (int col = 0; col < (copy ? j_whole : i_whole); col += L) {
            const int i = copy ? row : col, j = copy ? col : row;
            const Number* from = &x(i * I, j * J);
            const ptrdiff_t next = copy ? I * x.row_stride : J * x.col_stride;
            Vec<Packed> square[L] = {};
#pragma GCC unroll 16
            for (int p = 0; p < L; ++p, from += next) {
                if (copy) prefetch(from + L * next);
                square[p] = Tiles::elements(from, down ? x.row_stride : x.col_stride);
            }
            if (!copy) transpose_square(square);
#pragma GCC unroll 16
            for (int p = 0; p < L; ++p) store(at(i + p, j), square[p]);
        }
    const auto number = [&](int i, int j) { return i < x.rows && j < x.cols ? float(x(i, j)) : 0; };
    for (int i = 0; i < i_end; ++i) {
        int j = i < i_whole ? j_whole : 0;
        for (; copy && i < x.rows / I && j < j_whole; j += L)
            store(at(i, j), Tiles::elements(&x(i * I, j * J), down ? x.row_stride : x.col_stride));
        for (; j < j_end; ++j)
            *at(i, j) = Tiles::element(number(i * I, j * J), number(i * I + down, j * J + !down));
    }
}

// The left operand: where it lies, if tiles can read it there, or packed into scratch(buffer), in
// the direction in which it lies or, for the matrix unit, in panels.
template <class Tiles, class Number>
auto pack_left(int buffer, View<Number> a) {
    using Packed = typename Tiles::Packed;
    constexpr int N = Tiles::kPanel;
    const int high = round_up(a.rows, Tiles::kRows), steps = Tiles::steps(a.cols);
    if constexpr (Tiles::kIsMatrix) {
        Packed* out = scratch<Packed>(buffer, size_t(high) * steps);
        pack<Tiles, N, false>(out, N, a, high, steps);
        return Panels<Packed, N>{out, size_t(high) * N};
    } else {
        // Floats: rows in memory, or those of attention's scores, a column of which stays in L1.
        // bf16 as pairs: if each row begins at an even place and no half pair is left over.
        const bool in_place = std::is_same_v<Number, Packed>
                                  ? a.col_stride == 1 || a.col_stride == kStride
                                  : std::is_same_v<Number, bf16> && Tiles::kNumbers == 2 &&
                                        a.col_stride == 1 && a.cols % 2 == 0 &&
                                        a.row_stride % 2 == 0 &&
                                        reinterpret_cast<uintptr_t>(a.data) % 4 == 0;
        if (in_place)
            return View(reinterpret_cast<const Packed*>(a.data), a.rows, steps,
                        a.row_stride / Tiles::kNumbers, a.col_stride);
        constexpr int kOnePanel = 1 << 30;
        const bool down = a.col_stride != 1;
        const int apart = round_up(down ? a.rows : steps, 32) + 16;  // see kStride
        Packed* out = scratch<Packed>(buffer, size_t(down ? steps : a.rows) * apart);
        if (down) {
            pack<Tiles, kOnePanel, true>(out, apart, a.transposed(), steps, a.rows);
            return View<Packed>(out, a.rows, steps, 1, apart);
        }
        pack<Tiles, kOnePanel, false>(out, apart, a, a.rows, steps);
        return View<Packed>(out, a.rows, steps, apart);
    }
}

// The right operand, packed into scratch(buffer) in panels; the last is padded with zeros.
template <class Tiles, class Number>
auto pack_right(int buffer, View<Number> b) {
    constexpr int N = Tiles::kPanel;
    const int steps = Tiles::steps(b.rows), wide = round_up(b.cols, Tiles::kCols);
    auto* out = scratch<typename Tiles::Packed>(buffer, size_t(steps) * wide);
    pack<Tiles, N, true>(out, N, b, steps, wide);
    return Panels<typename Tiles::Packed, N>{out, size_t(steps) * N};
}

// A row of tiles, at most kRows high: c [rows, cols] (+)= a b, `steps` packed elements deep. A tile
// that the edge of c cuts off is made beside it. Meanwhile the tile's part of c, or the one below,
// is prefetched, some rows in each pass.
template <class Tiles>
void multiply_tiles(float* c, ptrdiff_t ldc, auto a, auto b, int rows, int cols, int steps,
                    bool add) {
    constexpr int R = Tiles::kRows, N = Tiles::kCols, S = Tiles::kSteps;
    const int passes = ceil_div(steps, S);
    alignas(64) float edge[R * N];
    for (int pass = 0; pass < passes; ++pass, add = true)
        for (int j = 0; j < cols; j += N) {
            const int count = std::min(N, cols - j), k = std::min(S, steps - pass * S);
            const bool whole = count == N && (rows == R || !Tiles::kIsMatrix);
            float *out = c + j, *later = out + (Tiles::kIsMatrix ? R * ldc : 0);
            for (int i = pass; whole && i < rows; i += passes)
                prefetch(later + i * ldc), prefetch(later + i * ldc + N / 2);
            Tiles::tile(whole ? out : edge, whole ? ldc : N, a.from(0, pass * S),
                        b.from(pass * S, j), rows, k, whole && add);
            for (int i = 0; !whole && i < rows; ++i)
                for (int x = 0; x < count; ++x)
                    out[i * ldc + x] = (add ? out[i * ldc + x] : 0) + edge[i * N + x];
        }
}

// As PlainOps::matmul; only floats can accumulate. c is cut into tasks, some columns by some or all
// rows. A thread takes one after another and packs what it needs: columns of b, which stay in its
// L2, and some rows of a, where a cannot be read in place. One thread makes the whole sum of an
// element, in order, so no result depends on the number of threads. Sums are made in c where it is
// float, else in scratch: a row of tiles, or all the task's rows if k is more than is packed at a
// time.
template <class Tiles, class C, class Number>
void multiply(C* c, View<Number> a, View<Number> b, bool accumulate, const Finish<float>& finish) {
    const int m = a.rows, n = b.cols, k = a.cols;
    constexpr int R = Tiles::kRows, N = Tiles::kCols;
    constexpr bool rounds = !std::is_same_v<C, float>;
    // Rows of a that are packed at a time: whole tiles, and whole squares to transpose.
    constexpr int kSome = round_up(100, std::lcm(R, kLanes));
    // Why deeper where sums are rounded: then they seldom have to be kept for all rows.
    constexpr int most_depth = (rounds ? 4 : 1) * Tiles::kNumbers * kDepth;
    // A task's columns: at most about kPackedB elements, at least four panels, and as many tasks
    // for each thread where whole panels allow it.
    const int threads = omp_get_max_threads();
    const int most_cols = kPackedB / Tiles::steps(std::min(k, most_depth));
    const int wanted = round_up(ceil_div(n, most_cols), threads);
    const int task_cols = std::max(4 * N, round_up(ceil_div(n, wanted), N));
    const int across = ceil_div(n, task_cols);
    // Its rows: all, unless that makes fewer tasks than threads; then about two tasks a thread.
    const int cuts = across < threads ? 2 * threads / across : 1;
    const int task_rows = round_up(ceil_div(m, cuts), R), down = ceil_div(m, task_rows);
    const int strip = task_cols + 16;  // see kStride
    const bool all_rows = k > most_depth;
#pragma omp parallel
    {
        [[maybe_unused]] Tiles setup{};  // what a thread needs first: see MatrixTiles
        float* sums = scratch<float>(2, rounds ? size_t(all_rows ? task_rows : R) * strip : 0);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < across * down; ++task) {
            const int j0 = task / down * task_cols, cols = std::min(task_cols, n - j0);
            const int i0 = task % down * task_rows, end = std::min(m, i0 + task_rows);
            for (int k0 = 0; k0 < k; k0 += most_depth) {
                const int depth = std::min(most_depth, k - k0);
                const auto right = pack_right<Tiles>(1, b.part(k0, j0, depth, cols));
                for (int i1 = i0; i1 < end; i1 += kSome) {
                    const int some = std::min(kSome, end - i1);
                    const auto left = pack_left<Tiles>(0, a.part(i1, k0, some, depth));
                    for (int i = i1; i < i1 + some; i += R) {
                        const int rows = std::min(R, i1 + some - i);
                        const ptrdiff_t apart = rounds ? strip : n;
                        C* to = c + i * ptrdiff_t(n) + j0;
                        float* out;
                        if constexpr (rounds)
                            out = sums + (all_rows ? (i - i0) * apart : 0);
                        else
                            out = to;
                        multiply_tiles<Tiles>(out, apart, left.from(i - i1, 0), right, rows, cols,
                                              Tiles::steps(depth), k0 > 0 || accumulate);
                        for (int r = 0; k0 + depth == k && r < rows; ++r) {
                            if (finish) finish(i + r, j0, cols, out + r * apart);
                            if (rounds) store_rounded(to + r * ptrdiff_t(n), out + r * apart, cols);
                        }
                    }
                }
            }
        }
    }
}

// --- A product of one row, as in generation

// How far ahead to prefetch operands that come from memory.
constexpr ptrdiff_t kAheadBytes = 8192;

// a.b of k numbers: four vectors of partial sums, then their lanes, then the rest. Prefetches
// `ahead` numbers beyond those of b.
template <class X, class Number>
float dot(const X* a, const Number* b, int k, ptrdiff_t ahead = kAheadBytes / sizeof(Number)) {
    constexpr int L = kLanes;
    Vec<float> sums[4] = {};
    int p = 0;
    for (; p + 4 * L <= k; p += 4 * L)
        for (int i = 0; i < 4; ++i) {
            prefetch(b + p + i * L + ahead);
            sums[i] += load_floats(a + p + i * L) * load_floats(b + p + i * L);
        }
    float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; p < k; ++p) sum += a[p] * b[p];
    return sum;
}

// sum[n] = rows first..last-1 of b [k, n], each times its number in x; prefetches as dot does.
template <class Number>
void add_rows(float* sum, const float* x, View<Number> b, int first, int last,
              ptrdiff_t ahead = kAheadBytes / sizeof(Number)) {
    std::fill(sum, sum + b.cols, 0.0f);
    for (int p = first; p < last; ++p) {
        const Number* row = &b(p, 0);
        int j = 0;
        for (; j + kLanes <= b.cols; j += kLanes) {
            prefetch(row + j + ahead);
            store(sum + j, load(sum + j) + x[p] * load_floats(row + j));
        }
        for (; j < b.cols; ++j) sum[j] += x[p] * row[j];
    }
}

// c[1, n] of one row a. Each number of b is used once, so nothing is packed, and memory sets the
// speed: a thread should read one part of b from start to end. A row-major b is cut into kStripes
// stripes of rows, whose sums are added in order; a transposed one into columns, as dot products.
template <class C, class Number>
void multiply_row(C* c, View<Number> a, View<Number> b, bool accumulate,
                  const Finish<float>& finish) {
    const int n = b.cols, k = b.rows;
    const bool row_major = b.col_stride == 1;
    float *x = scratch<float>(0, k), *sums = scratch<float>(1, size_t(kStripes) * n);
    for (int p = 0; p < k; ++p) x[p] = a(0, p);
    constexpr int kSome = 256;
#pragma omp parallel
    {
        if (row_major) {
#pragma omp for schedule(static)
            for (int stripe = 0; stripe < kStripes; ++stripe)
                add_rows(sums + size_t(stripe) * n, x, b, stripe_begin(k, stripe),
                         stripe_begin(k, stripe + 1));
        }
#pragma omp for schedule(static)
        for (int j0 = 0; j0 < n; j0 += kSome) {
            const int count = std::min(kSome, n - j0);
            float out[kSome] = {};
            for (int stripe = 0; row_major && stripe < kStripes; ++stripe)
                for (int j = 0; j < count; ++j) out[j] += sums[size_t(stripe) * n + j0 + j];
            for (int j = 0; !row_major && j < count; ++j) out[j] = dot(x, &b(0, j0 + j), k);
            for (int j = 0; accumulate && j < count; ++j) out[j] += c[j0 + j];
            if (finish) finish(0, j0, count, out);
            store_rounded(c + j0, out, count);
        }
    }
}

// --- Tiles of pairs, in two ways

// With the vector unit's dot product.
struct PairTiles : PlainTiles {
    using Packed = uint32_t;
    static constexpr int kNumbers = 2;
    static int steps(int depth) { return ceil_div(depth, 2); }
    static uint32_t element(float low, float high) {
        return bf16(low).bits | uint32_t(bf16(high).bits) << 16;
    }
    // Numbers that are bf16 already are only moved.
    static Vec<uint32_t> elements(const bf16* from, ptrdiff_t next) {
        if (next != 1) return load_bits(from) | load_bits(from + next) << 16;
        Vec<uint32_t> pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        return pairs;
    }
    // Others, attention's scores, are rounded.
    static Vec<uint32_t> elements(const float* from, ptrdiff_t next) {
        if (next == 1) return round_both(load(from), load(from + kLanes));
        const auto both =
            std::bit_cast<std::array<HalfVec, 2>>(round_both(load(from), load(from + next)));
        return widen(both[0]) | widen(both[1]) << 16;
    }
};

// With the matrix unit, where the CPU has one (AMX; Intel 64 manual, volume 1, chapter 18): eight
// registers of 16 rows of 64 bytes; one instruction multiplies 16 x 32 by 32 x 16 numbers. Unit:
// its instructions; register numbers are part of the code, so template arguments.
template <class Unit>
struct MatrixTiles : PairTiles {
    // Both operands in panels of 16 columns: a register takes 1 KB without gaps. Why fewer steps:
    // 32 rows of 192 pairs, 24 KB, stay in L1 while b's panels come from L2.
    static constexpr int kRows = 32, kCols = 32, kPanel = 16, kSteps = 192;
    static constexpr bool kIsMatrix = true;
    // Careful: steps beyond k are zeros in both operands. 0 times a NaN would be a NaN.
    static int steps(int depth) { return round_up(depth, 32) / 2; }
    Unit unit;  // sets up the registers of its thread

    // Registers 0 to 3 are the quarters of c, 4 and 5 of a, 6 and 7 of b. Why this order: each
    // product waits for one load only.
    static void tile(float* c, ptrdiff_t ldc, Panels<Packed, 16> a, Panels<Packed, 16> b, int,
                     int k, bool add) {
        float* low = c + 16 * ldc;
        const ptrdiff_t row = 4 * ldc;  // bytes
        if (add) {
            Unit::template load<0>(c, row), Unit::template load<1>(c + 16, row);
            Unit::template load<2>(low, row), Unit::template load<3>(low + 16, row);
        } else {
            Unit::template zero<0>(), Unit::template zero<1>();
            Unit::template zero<2>(), Unit::template zero<3>();
        }
        for (int p = 0; p < k; p += 16, a.data += a.panel, b.data += 256) {
            Unit::template load<4>(a.data, 64), Unit::template load_once<6>(b.data, 64);
            Unit::template load_once<7>(b.data + b.panel, 64), Unit::template multiply<0, 4, 6>();
            Unit::template load<5>(a.data + 256, 64), Unit::template multiply<1, 4, 7>();
            Unit::template multiply<2, 5, 6>(), Unit::template multiply<3, 5, 7>();
        }
        Unit::template store<0>(c, row), Unit::template store<1>(c + 16, row);
        Unit::template store<2>(low, row), Unit::template store<3>(low + 16, row);
    }
};

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define TINYGPT_MATRIX_UNIT
struct MatrixUnit {
    // Linux lends the unit to a process that asks: ARCH_REQ_XCOMP_PERM, for tile data.
    static bool usable() {
        static const bool lent = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return lent;
    }
    template <int t>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(t));
    }
    template <int t>
    static void load(const void* from, ptrdiff_t row) {
        asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(row), "i"(t) : "memory");
    }
    template <int t>
    static void load_once(const void* from, ptrdiff_t row) {  // need not stay in L1
        asm volatile("tileloaddt1 (%0,%1), %%tmm%c2" ::"r"(from), "r"(row), "i"(t) : "memory");
    }
    template <int t>
    static void store(void* to, ptrdiff_t row) {
        asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(row), "i"(t) : "memory");
    }
    template <int c, int a, int b>
    static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
    }
    MatrixUnit() {
        alignas(64) uint8_t setup[64] = {1};  // eight registers of 16 rows of 64 bytes
        for (int i = 0; i < 8; ++i) setup[16 + 2 * i] = 64, setup[48 + i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(setup));
    }
    ~MatrixUnit() { asm volatile("tilerelease"); }
};
#endif

// Calls use(Tiles{}) with the fastest way to multiply such numbers that this CPU has.
template <class Number>
auto with_tiles(auto&& use) {
    if constexpr (std::is_same_v<Number, bf16> && kHasPairs) {
#ifdef TINYGPT_MATRIX_UNIT
        if (MatrixUnit::usable()) return use(MatrixTiles<MatrixUnit>{});
#endif
        return use(PairTiles{});
    } else {
        return use(PlainTiles{});
    }
}

// --- Attention, forward
// A tile of queries meets kDepth keys at a time; their scores stay in L1. The softmax is updated as
// keys come (Milakov and Gimelshein 2018):
//   new max = max(old max, s)    p = e^(s - new max)    old sums shrink by e^(old max - new max)
// In bf16 scores, p and sums are fp32; p is rounded where it is multiplied as a pair.

// One step of that softmax, for one query: factor * s[count] become p; updates max, total and
// sums[HS].
inline void running_softmax(float* s, float factor, int count, float& max, float& total,
                            float* sums, int HS) {
    const float top = std::max(max, factor * maximum(s, count));
    const float shrink = exp_fast(max - top);
    total = total * shrink + exp_and_sum(s, top, count, factor);
    max = top;
    for (int j = 0; j < HS; ++j) sums[j] *= shrink;
}

// One query, the last of n rows, in one head. Nothing is used twice, so nothing is packed. The CPU
// does not prefetch rows so far apart by itself.
template <class A>
void attend_one(A* out, const A* qkv, int n, int C, int HS) {
    float *p = scratch<float>(0, n), *sums = scratch<float>(1, HS);
    const ptrdiff_t stride = 3 * ptrdiff_t(C), ahead = 8 * stride;
    const View q(qkv, n, HS, stride), k = q.part(0, C, n, HS), v = q.part(0, 2 * C, n, HS);
    for (int t = 0; t < n; ++t)
        p[t] = dot(&q(n - 1, 0), &k(t, 0), HS, ahead) / std::sqrt(float(HS));
    const float total = exp_and_sum(p, maximum(p, n), n);
    for (int t = 0; t < n; ++t) p[t] /= total;
    add_rows(sums, p, v, 0, n, ahead);
    store_rounded(out, sums, HS);
}

template <class Tiles, class A>
void attend(A* out, float* lse, const A* qkv, int first, int last, int C, int HS, Dropout drop,
            uint64_t head) {
    if (first + 1 == last && !lse) return attend_one(out, qkv, last, C, HS);
    constexpr int R = Tiles::kRows;
    [[maybe_unused]] Tiles setup{};
    const View q(qkv, last, HS, 3 * ptrdiff_t(C));
    const auto keys = pack_right<Tiles>(0, q.part(0, C, last, HS).transposed());
    const auto values = pack_right<Tiles>(1, q.part(0, 2 * C, last, HS));
    // Why pairs are not divided by sqrt(HS) as keys: that would round them again.
    const float scale = 1 / std::sqrt(float(HS)), left_over = Tiles::kNumbers == 1 ? 1 : scale;
    if constexpr (Tiles::kNumbers == 1)
        for (size_t i = 0; i < size_t(HS) * round_up(last, Tiles::kCols); ++i)
            keys.data[i] *= scale;
    float* p = scratch<float>(2, size_t(R) * kStride);  // scores, then p
    float* sums = scratch<float>(3, size_t(R) * HS);    // of p v, not yet divided by total
    for (int t = first; t < last; t += R) {
        const int count = std::min(R, last - t), end = t + count;
        const auto queries = pack_left<Tiles>(4, q.part(t, 0, count, HS));
        float max[R], total[R] = {};
        std::fill(max, max + R, -INFINITY);
        std::fill_n(sums, R * HS, 0.0f);
        for (int k0 = 0; k0 < end; k0 += kDepth) {
            const int n = std::min(kDepth, end - k0), wide = round_up(n, Tiles::kCols);
            multiply_tiles<Tiles>(p, kStride, queries, keys.from(0, k0), count, wide,
                                  Tiles::steps(HS), false);
            for (int i = 0; i < count; ++i) {
                float* row = p + i * kStride;
                const int seen = std::clamp(t + i + 1 - k0, 0, n);
                std::fill(row + seen, row + wide, -INFINITY);  // keys later than the query
                running_softmax(row, left_over, wide, max[i], total[i], sums + i * HS, HS);
                for (int j = 0; drop.on() && j < seen; ++j)
                    row[j] *= drop.scale((head * last + t + i) * last + k0 + j);
            }
            const auto left = pack_left<Tiles>(5, View<float>(p, count, wide, kStride));
            multiply_tiles<Tiles>(sums, HS, left, values.from(Tiles::steps(k0), 0), count, HS,
                                  Tiles::steps(n), true);
        }
        for (int i = 0; i < count; ++i) {
            A* o = out + (t - first + i) * ptrdiff_t(C);
            for (int j = 0; j < HS; ++j) o[j] = A(sums[i * HS + j] / total[i]);
            if (lse) lse[t - first + i] = max[i] + std::log(total[i]);
        }
    }
}

// --- Attention, backward
// kDepth keys at a time, and the queries that see them: p = e^(s - lse) is made again, then dp =
// dout v^T and ds = p (dp - D). ds is the left operand of dq = ds k; read downwards, p and ds are
// those of dv = p^T dout and dk = ds^T q.

// One query: products p = q k^T and ds = dout v^T [count] become p (times the mask) and
// ds / sqrt(HS), zero from `seen` on. D: dout . out (§4.5); index: that of the first of these keys
// in dropout's mask. Careful: both must be set up to `seen` rounded up to kLanes.
inline void softmax_row_backward(float* p, float* ds, float lse, float D, int count, int seen,
                                 int HS, Dropout drop, uint64_t index) {
    const float scale = 1 / std::sqrt(float(HS));
    float mask[kDepth];
    for (int j = 0; drop.on() && j < seen; ++j) ds[j] *= mask[j] = drop.scale(index + j);
    for (int j = 0; j < seen; j += kLanes) {
        const Vec<float> e = exp_fast(load(p + j) * scale - lse);
        store(p + j, e), store(ds + j, e * (load(ds + j) - D) * scale);
    }
    for (int j = 0; drop.on() && j < seen; ++j) p[j] *= mask[j];
    std::fill(p + seen, p + count, 0.0f), std::fill(ds + seen, ds + count, 0.0f);
}

template <class Tiles, class A>
void attend_backward(A* dqkv, const A* dout, const A* out, const float* lse, const A* qkv, int T,
                     int C, int HS, Dropout drop, uint64_t head) {
    constexpr int R = Tiles::kRows, kQueries = 8 * R;
    [[maybe_unused]] Tiles setup{};
    const View q(qkv, T, HS, 3 * ptrdiff_t(C)), k = q.part(0, C, T, HS),
                                                v = q.part(0, 2 * C, T, HS);
    const View d(dout, T, HS, C), o(out, T, HS, C);
    const ptrdiff_t apart = 3 * HS;  // from row to row of the gradients, here in float
    float *dq = scratch<float>(8, T * apart), *dk = dq + HS, *dv = dk + HS;
    const size_t square = size_t(kQueries) * kStride;  // [queries][keys]
    float *p = scratch<float>(0, square), *ds = scratch<float>(1, square);
    const auto q_right = pack_right<Tiles>(2, q), d_right = pack_right<Tiles>(3, d);
    const int deep = Tiles::steps(HS);
    for (int k0 = 0; k0 < T; k0 += kDepth) {
        const int keys = std::min(kDepth, T - k0);
        const auto k_right = pack_right<Tiles>(4, k.part(k0, 0, keys, HS)),
                   k_across = pack_right<Tiles>(5, k.part(k0, 0, keys, HS).transposed()),
                   v_across = pack_right<Tiles>(6, v.part(k0, 0, keys, HS).transposed());
        for (int t = k0; t < T; t += kQueries) {
            const int queries = std::min(kQueries, T - t);
            for (int i = 0; i < queries; i += R) {
                const int rows = std::min(R, queries - i), n = std::min(keys, t + i + rows - k0),
                          wide = round_up(n, Tiles::kCols);
                float *p_i = p + i * kStride, *ds_i = ds + i * kStride;
                multiply_tiles<Tiles>(p_i, kStride, pack_left<Tiles>(7, q.part(t + i, 0, rows, HS)),
                                      k_across, rows, wide, deep, false);
                multiply_tiles<Tiles>(ds_i, kStride,
                                      pack_left<Tiles>(7, d.part(t + i, 0, rows, HS)), v_across,
                                      rows, wide, deep, false);
                for (int s = t + i; s < t + i + rows; ++s)
                    softmax_row_backward(p + (s - t) * kStride, ds + (s - t) * kStride, lse[s],
                                         dot(&d(s, 0), &o(s, 0), HS), wide, std::min(n, s + 1 - k0),
                                         HS, drop, (head * T + s) * T + k0);
                multiply_tiles<Tiles>(dq + (t + i) * apart, apart,
                                      pack_left<Tiles>(7, View<float>(ds_i, rows, wide, kStride)),
                                      k_right, rows, HS, Tiles::steps(n), k0 > 0);
            }
            const auto p_down = pack_left<Tiles>(7, View<float>(p, keys, queries, 1, kStride)),
                       ds_down = pack_left<Tiles>(9, View<float>(ds, keys, queries, 1, kStride));
            for (int j = 0; j < keys; j += R) {
                const int first = std::max(0, k0 + j - t);  // the first query that sees key j
                if (first >= queries) break;
                const int rows = std::min(R, keys - j), steps = Tiles::steps(queries - first),
                          from = Tiles::steps(first), from_all = Tiles::steps(t + first);
                const ptrdiff_t at = (k0 + j) * apart;
                const bool add = t > k0 + j;  // earlier queries have seen it
                multiply_tiles<Tiles>(dv + at, apart, p_down.from(j, from),
                                      d_right.from(from_all, 0), rows, HS, steps, add);
                multiply_tiles<Tiles>(dk + at, apart, ds_down.from(j, from),
                                      q_right.from(from_all, 0), rows, HS, steps, add);
            }
        }
    }
    for (int i = 0; i < 3 * T; ++i) store_rounded(dqkv + i * ptrdiff_t(C), dq + i * HS, HS);
}

// --- The operations of §4.3 again, now fast

struct FastOps {
    // c is what its operands are, or float.
    template <class C, class Number>
    static void matmul(C* c, View<Number> a, View<Number> b, bool accumulate = false,
                       const Finish<float>& finish = {}) {
        if (a.rows == 1) return multiply_row(c, a, b, accumulate, finish);
        with_tiles<Number>(
            [&](auto tiles) { multiply<decltype(tiles)>(c, a, b, accumulate, finish); });
    }
    template <class A>
    static void attend(A* out, auto... a) {
        with_tiles<A>([&](auto tiles) { tinygpt::attend<decltype(tiles)>(out, a...); });
    }
    template <class A>
    static void attend_backward(A* dqkv, auto... a) {
        with_tiles<A>([&](auto tiles) { tinygpt::attend_backward<decltype(tiles)>(dqkv, a...); });
    }
};

// The CPU as a device: the layers of §4 with the operations above.
template <class A>
using CpuOf = Layers<A, FastOps>;
using Cpu = CpuOf<float>;

// =================================================================================================
// §12 Systems, files and JSON
// =================================================================================================
// What you have now: a model that trains, in memory. Here is what differs between systems, how
// files are read and written, and two formats of text: UTF-8 and JSON. A file must survive a kill,
// a full disk and a power cut: it is written under another name, then renamed.

// --- What differs between systems: Linux with glibc or musl, macOS; x86-64, ARM

// Ends the program where this CPU lacks instructions that the compiler was free to use (of those
// that came together, one is asked for). Careful: it runs before the initialisers of globals (101
// is the first priority a program may use), and is itself compiled without those instructions.
#define TINYGPT_TEXT_OF(macro) #macro  // "1" for a macro that is defined as 1
#define TINYGPT_NEEDS(macro, name, is_there)             \
    if (TINYGPT_TEXT_OF(macro)[0] == '1' && !(is_there)) \
    std::fputs(missing++ ? " " name : "error: this program was built for a CPU with " name, stderr)
#define TINYGPT_X86(macro, name) TINYGPT_NEEDS(macro, name, __builtin_cpu_supports(name))
#ifdef __x86_64__
__attribute__((target("no-sse3,no-bmi,no-bmi2,no-movbe,no-lzcnt,no-popcnt")))
#endif
__attribute__((constructor(101))) static void
check_cpu() {
    int missing = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    TINYGPT_X86(__AVX2__, "avx2");
    TINYGPT_X86(__FMA__, "fma");
    TINYGPT_X86(__AVX512F__, "avx512f");
    TINYGPT_X86(__AVX512VNNI__, "avx512vnni");
    TINYGPT_X86(__AVX512VBMI2__, "avx512vbmi2");
    TINYGPT_X86(__AVX512BF16__, "avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
    TINYGPT_NEEDS(__ARM_FEATURE_ATOMICS, "lse", ::getauxval(AT_HWCAP) & HWCAP_ATOMICS);
    TINYGPT_NEEDS(__ARM_FEATURE_DOTPROD, "dotprod", ::getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
    TINYGPT_NEEDS(__ARM_FEATURE_SVE, "sve", ::getauxval(AT_HWCAP) & HWCAP_SVE);
    TINYGPT_NEEDS(__ARM_FEATURE_BF16, "bf16", ::getauxval(AT_HWCAP2) & HWCAP2_BF16);
#endif
    if (missing == 0) return;
    std::fputs(
        ", which this one lacks: build it here (make clean, then make as before), or for every CPU "
        "of the kind (MARCH=x86-64 behind make; on ARM MARCH=armv8-a)\n",
        stderr);
    ::_exit(1);
}

// Maps a large array in pages of 2 MB, where the system can.
inline void use_large_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    ::madvise(start, bytes, MADV_HUGEPAGE);
#endif
}
// 0: the file is on the disk. On macOS, fsync leaves it in the disk's own memory.
inline int sync_file(int fd) {
#ifdef F_FULLFSYNC
    if (::fcntl(fd, F_FULLFSYNC) == 0) return 0;
#endif
    return ::fsync(fd);
}

// --- Files and folders

// An open file, closed at the end of its scope. It can be moved, not copied.
struct FileHandle {
    int fd;
    explicit FileHandle(int fd) : fd(fd) {}
    // Opens it, or fails. O_CLOEXEC: child processes do not inherit it.
    FileHandle(const std::string& path, int flags)
        : fd(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
        const bool reads = (flags & O_ACCMODE) == O_RDONLY;
        if (fd < 0) fail_errno(reads ? "cannot read " : "cannot write ", path);
    }
    FileHandle(FileHandle&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    ~FileHandle() {
        if (fd >= 0) ::close(fd);
    }
};

// A file of known length, which several threads may read at once. Why not memory-mapped: if the
// file shrinks, pread reports it, but a mapping raises SIGBUS.
struct InputFile {
    std::string path;
    FileHandle file;
    size_t bytes = 0;

    // Why O_NONBLOCK: opening a pipe would wait for a writer.
    explicit InputFile(const std::string& path) : path(path), file(path, O_RDONLY | O_NONBLOCK) {
        struct stat info;
        if (::fstat(file.fd, &info) != 0) fail_errno("cannot read ", path);
        if (!S_ISREG(info.st_mode)) fail(path, ": expected a file, found a folder, pipe or device");
        bytes = size_t(info.st_size);
    }
    // Sets out[count] from the bytes at `offset`. pread may return fewer, or EINTR (a signal).
    void read_bytes(void* out, size_t count, size_t offset) const {
        for (char* to = static_cast<char*>(out); count > 0;) {
            const ssize_t got = ::pread(file.fd, to, count, off_t(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail_errno("cannot read ", path);
            if (got == 0) fail(path, ": the file became shorter while it was read");
            to += got, offset += size_t(got), count -= size_t(got);
        }
    }
};

// Writes all the bytes. Returns how many were written; where they are fewer, errno says why.
inline size_t write_all(int fd, const void* data, size_t bytes) {
    const char* from = static_cast<const char*>(data);
    size_t done = 0;
    while (done < bytes) {
        const ssize_t written = ::write(fd, from + done, bytes - done);
        if (written < 0 && errno != EINTR) break;
        done += size_t(std::max<ssize_t>(written, 0));
    }
    return done;
}

// stat's mode of what has that name (file, folder, device); 0: nothing has.
inline mode_t mode_of(const std::string& path) {
    struct stat info;
    return ::stat(path.c_str(), &info) == 0 ? info.st_mode : 0;
}
inline bool folder_exists(const std::string& path) { return S_ISDIR(mode_of(path)); }
// Pipes and devices count.
inline bool file_exists(const std::string& path) { return mode_of(path) && !folder_exists(path); }
// "a/b/c" -> "a/b", "c" -> ".", "/c" -> "/".
inline std::string parent_folder(std::string path) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

// The names in a folder, sorted, without "." and "..".
inline std::vector<std::string> list_folder(const std::string& path) {
    std::vector<std::string> names;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(path, error), end; entry != end && !error;
         entry.increment(error))
        names.push_back(entry->path().filename().string());
    errno = error.value();
    if (error) fail_errno("cannot list folder ", path);
    std::sort(names.begin(), names.end());
    return names;
}

// The whole file, or all that comes through a pipe: at most max_bytes.
inline std::string read_file(const std::string& path, size_t max_bytes = SIZE_MAX) {
    const FileHandle file(path, O_RDONLY);
    std::string bytes;
    std::vector<char> part(1 << 16);
    for (ssize_t got; (got = ::read(file.fd, part.data(), part.size())) != 0;) {
        if (got < 0 && errno != EINTR) fail_errno("cannot read ", path);
        bytes.append(part.data(), size_t(std::max<ssize_t>(got, 0)));
        if (bytes.size() > max_bytes)
            fail(path, ": expected at most ", max_bytes, " bytes, found more");
    }
    return bytes;
}

// What a file with this beginning is, and what to do about it; "": not known.
inline const char* other_form(std::string_view begin) {
    static constexpr std::pair<std::string_view, const char*> forms[] =
        {{"version https://git-lfs",
          "a pointer of Git LFS: fetch the file itself with git lfs pull"},
         {"<!", "an HTML page, saved instead of the file: download it again"},
         {"<h", "an HTML page, saved instead of the file: download it again"},
         {"PK\3\4",
          "PyTorch's own form or another zip file: save it again with transformers, "
          "save_pretrained(folder)"},
         {"GGUF", "a GGUF file, for llama.cpp: take the Hugging Face folder that it was made from"},
         {"\xa1\xd9\x34\x01",
          "a shard of llm.c with 32-bit tokens (Llama 3's); tokens here have 16 bits: tokenize the "
          "text with ./prepare_data"}};
    for (auto& [start, text] : forms)
        if (begin.starts_with(start)) return text;
    return "";
}
// For an error: what a file that is no shard may be, and what to do.
inline std::string no_shard_hint(const std::string& path, std::string_view begin) {
    if (*other_form(begin)) return to_text("It is ", other_form(begin));
    return to_text(
        "Make shards of text with ./prepare_data --input FILE --output DIR; of tokens of 16 bits "
        "without a header, as nanoGPT writes them, with python3 -c \"import struct; t = open('",
        path, "', 'rb').read(); open('train_000001.bin', 'wb').write(struct.pack('<256i', ",
        kShardMagic, ", 1, len(t) // 2, *[0] * 253) + t)\"");
}

// A whole text file, without the byte-order mark that some editors put before it.
inline std::string read_text(const std::string& path, size_t max_bytes) {
    std::string text = read_file(path, max_bytes);
    if (text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);
    if (*other_form(text)) fail(path, ": found ", other_form(text));
    return text;
}
// "a|b" -> "a", "b". Always at least one part, which may be empty.
inline std::vector<std::string> split_at(std::string_view text, char separator) {
    std::vector<std::string> parts;
    for (size_t end; (end = text.find(separator)) != text.npos; text.remove_prefix(end + 1))
        parts.emplace_back(text.substr(0, end));
    parts.emplace_back(text);
    return parts;
}

// Makes the names in a folder survive a power cut. Some network file systems cannot (EINVAL,
// ENOTSUP).
inline void sync_folder(const std::string& path) {
    const FileHandle folder(path, O_RDONLY | O_DIRECTORY);
    const bool synced = sync_file(folder.fd) == 0;
    if (!synced && errno != EINVAL && errno != ENOTSUP) fail_errno("cannot sync folder ", path);
}

// A folder to write into, made with those above it where they are missing. Those that were made
// and are still empty at the end of the scope are removed.
class FolderToFill {
    FolderToFill() = default;
    void make(const std::string& path) {
        const std::string above = parent_folder(path);
        if (folder_exists(path)) return;
        if (above != path) make(above);
        const bool is_new = ::mkdir(path.c_str(), 0777) == 0;
        if (is_new) made.push_back(path);
        // EEXIST: another program may have made it meanwhile.
        if (!is_new && (errno != EEXIST || !folder_exists(path)))
            fail_errno("cannot create folder ", path);
        sync_folder(above);
    }

public:
    std::vector<std::string> made;  // from the top down
    // Why two constructors: after the first, the destructor runs even if this one throws.
    explicit FolderToFill(const std::string& path) : FolderToFill() { make(path); }
    FolderToFill(const FolderToFill&) = delete;
    ~FolderToFill() {
        for (; !made.empty(); made.pop_back()) ::rmdir(made.back().c_str());
    }
};
inline void make_folders(const std::string& path) { FolderToFill(path).made.clear(); }

// Replaces a file of the new name, on the disk too.
inline void rename_path(const std::string& from, const std::string& to) {
    if (::rename(from.c_str(), to.c_str()) != 0) fail_errno("cannot rename ", from, " to ", to);
    sync_folder(parent_folder(to));
}
// A file that is not there is no error.
inline void remove_file(const std::string& path) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail_errno("cannot remove ", path);
}
// Removes a folder and all in it; links are removed, not followed.
inline void remove_folder(const std::string& path) {
    for (const std::string& name : list_folder(path)) {
        const std::string inner = path + "/" + name;
        struct stat info;
        const bool folder = ::lstat(inner.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
        folder ? remove_folder(inner) : remove_file(inner);
    }
    if (::rmdir(path.c_str()) != 0) fail_errno("cannot remove folder ", path);
}

// A file that appears whole or not at all. What could be left without each step:
//     open a temporary name    half of the new file under the real name, and the old one gone
//     write
//     fsync                    the new name with an empty file: the disk may write names first
//     rename                   (in one step, the name means the new file)
//     fsync of the folder      the old file, although the program went on as if it had saved
// commit() makes the last three; without it the old file stays.
class FileWriter {
    std::string path_, temporary_;
    FileHandle file_{-1};  // of the temporary

public:
    explicit FileWriter(const std::string& path)
        : path_(path), temporary_(to_text(path, ".tmp-", ::getpid())) {
        const mode_t old = mode_of(path);  // a rename over /dev/null would be a surprise
        if (old != 0 && !S_ISREG(old)) fail("cannot write ", path, ": it exists and is not a file");
        std::remove(temporary_.c_str());  // left by a killed process that had our number
        file_.fd = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (file_.fd < 0) fail_errno("cannot write ", path);
    }
    ~FileWriter() {
        if (file_.fd >= 0) std::remove(temporary_.c_str());
    }
    void write(const void* data, size_t bytes) {
        if (write_all(file_.fd, data, bytes) < bytes) fail_errno("cannot write ", path_);
    }
    // What is written next replaces the beginning of the file.
    void rewind() {
        if (::lseek(file_.fd, 0, SEEK_SET) < 0) fail_errno("cannot write ", path_);
    }
    // Careful: here, and only here, a disk may report that an earlier write was lost.
    void commit() {
        if (sync_file(file_.fd) != 0) fail_errno("cannot write (fsync) ", path_);
        rename_path(temporary_, path_);
        ::close(std::exchange(file_.fd, -1));
    }
};

inline void write_file(const std::string& path, std::string_view bytes) {
    FileWriter writer(path);
    writer.write(bytes.data(), bytes.size());
    writer.commit();
}

// --- What containers leave of the machine
// Linux keeps processes in control groups, one inside the other, each with its limits: a folder
// under /sys/fs/cgroup; in version 1, one for each resource.
//                          version 2                   version 1
//     /proc/self/cgroup    0::/box/run                 4:memory:/box/run
//     cores                cpu.max: 150000 100000      cpu.cfs_quota_us, cpu.cfs_period_us
//     memory               memory.max, .current        memory.limit_in_bytes, .usage_in_bytes

// A file's text; empty where it cannot be read.
inline std::string text_if_any(const std::string& path) {
    return ::access(path.c_str(), R_OK) == 0 ? read_file(path) : "";
}
// The two numbers behind `name` in a text; 0 where there are none.
inline std::array<double, 2> numbers_behind(const std::string& text, std::string_view name = "") {
    std::array<double, 2> numbers{};
    const size_t at = text.find(name);
    if (at != text.npos) std::sscanf(&text[at + name.size()], "%lf %lf", &numbers[0], &numbers[1]);
    return numbers;
}
// What the files of these names say, joined, in each group of this process.
inline std::vector<std::string> of_groups(const std::string& root, auto... names) {
    std::vector<std::string> texts;
    for (const std::string& line : split_at(text_if_any(root + "/proc/self/cgroup"), '\n')) {
        const std::vector<std::string> parts = split_at(line, ':');  // number, resources, path
        if (parts.size() != 3) continue;
        for (std::string path = parts[2];; path = parent_folder(path)) {
            const std::string folder = root + "/sys/fs/cgroup/" + parts[1] + path + "/";
            texts.push_back(to_text(text_if_any(folder + names)...));
            if (path.size() < 2) break;
        }
    }
    return texts;
}
// The cores that this process can keep busy; one and a half count as two. Tests have another root.
inline int usable_cores(const std::string& root = "") {
    double cores = omp_get_num_procs();
    for (const std::string& limit :
         of_groups(root, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")) {
        const auto [quota, period] = numbers_behind(limit);
        if (quota > 0 && period > 0) cores = std::min(cores, std::ceil(quota / period));
    }
    return int(cores);
}

// As many threads as that, unless OMP_NUM_THREADS says how many.
inline void use_all_cores() {
    if (!std::getenv("OMP_NUM_THREADS")) omp_set_num_threads(usable_cores());
}

// --- Shards of tokens (§2)

inline Shard::Shard(const std::string& path) : path(path) {
    const InputFile file(path);
    int32_t header[kShardHeaderBytes / 4] = {};
    const size_t there = std::min(file.bytes, sizeof header);
    file.read_bytes(header, there, 0);
    if (there < sizeof header || header[0] != kShardMagic || header[1] != 1)
        fail(path, " is no token shard: expected a header of ", sizeof header, " bytes with ",
             kShardMagic, " and version 1, found ", file.bytes, " bytes with ", header[0], " and ",
             header[1], ". ", no_shard_hint(path, {reinterpret_cast<const char*>(header), there}));
    tokens = header[2], written = std::filesystem::last_write_time(path);
    if (tokens < 0 || file.bytes != bytes())
        fail(path, " is damaged: its header promises ", tokens, " tokens, which take ",
             kShardHeaderBytes + 2 * tokens, " bytes, but it has ", file.bytes);
}
inline void Shard::read(uint16_t* out, int64_t begin, int64_t count, int vocab_size) const {
    const InputFile file(path);
    if (file.bytes != bytes() || std::filesystem::last_write_time(path) != written)
        fail(path, " was changed, replaced or cut while it was in use: go on with the data ",
             "as it was, or start a new run");
    file.read_bytes(out, 2 * size_t(count), kShardHeaderBytes + 2 * size_t(begin));
    for (int64_t i = 0; i < count; ++i)
        if (out[i] >= vocab_size)
            fail("token ", begin + i, " of ", path, " is ", out[i],
                 ", but the vocabulary has only ", vocab_size,
                 " entries: this data was made with another tokenizer; give its folder, or "
                 "--vocab-size");
}

inline Shards::Shards(const std::string& pattern) : pattern(pattern) {
    glob_t found{};
    const bool is_name = ::access(pattern.c_str(), F_OK) == 0;
    const bool matches = !is_name && ::glob(pattern.c_str(), 0, nullptr, &found) == 0;
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + (matches ? found.gl_pathc : 0));
    ::globfree(&found);
    if (is_name) paths = {pattern};
    for (const std::string& path : paths) {
        if (folder_exists(path))
            fail(path, " is a folder: say --data ", path, ", or name its files: '", path,
                 "/train_*.bin'");
        files.emplace_back(path);
    }
}
inline int64_t Shards::tokens() const {
    int64_t sum = 0;
    for (const Shard& shard : files) sum += shard.tokens;
    return sum;
}
inline int64_t Shards::predictions() const {
    int64_t sum = 0;
    for (const Shard& shard : files) sum += shard.predictions();
    return sum;
}
inline void Shards::check_tokens(int vocab_size) const {
    std::vector<uint16_t> buffer(1 << 18);
    for (const Shard& shard : files)
        for (int64_t at = 0; at < shard.tokens; at += int64_t(buffer.size())) {
            const int64_t count = std::min(int64_t(buffer.size()), shard.tokens - at);
            shard.read(buffer.data(), at, count, vocab_size);
        }
}

// The number that the whole text is; none where it is none of that type. Strict: no blanks, "+5",
// hexadecimal, infinity or NaN; an integer has digits only. Why not from_chars for both: Apple's
// library has none for double.
template <class Number>
std::optional<Number> number_of(const std::string& text) {
    if constexpr (std::is_integral_v<Number>) {
        Number n{};
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, n);
        return error == std::errc() && stop == end ? std::optional(n) : std::nullopt;
    } else {
        const DotForDecimals dot;
        const bool plain = text.find_first_not_of("0123456789+-.eE") == text.npos;
        char* stop = nullptr;
        errno = 0;
        const Number n = std::strtod(text.c_str(), &stop);
        const bool fits = !std::isinf(n) && (n != 0 || errno != ERANGE);
        if (!plain || !fits || text.empty() || text[0] == '+' || *stop) return {};
        return n;
    }
}

// --- Characters in UTF-8
// UTF-8 writes a character's number, its code point, in one to four bytes (x: its bits).
//     0xxxxxxx                               up to U+007F: ASCII
//     110xxxxx 10xxxxxx                      up to U+07FF: most of Europe, the Middle East
//     1110xxxx 10xxxxxx 10xxxxxx             up to U+FFFF: nearly all that is written today
//     11110xxx 10xxxxxx 10xxxxxx 10xxxxxx    up to U+10FFFF: old scripts, emoji
// So "é", U+00E9, whose bits are 00011 101001, is the bytes c3 a9.

// The character that a text begins with: its bytes and its code point. 0 bytes: not valid UTF-8.
struct Utf8Character {
    size_t bytes;
    uint32_t code;
};
inline Utf8Character utf8_character(std::string_view text) {
    const uint32_t lead = text.empty() ? 0xff : uint8_t(text[0]);
    if (lead < 0x80) return {1, lead};
    // c0 and c1 would be ASCII in two bytes; f5 and more are beyond U+10FFFF.
    const size_t bytes = lead < 0xc2 || lead > 0xf4 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (bytes == 0 || bytes > text.size()) return {0, 0};
    uint32_t code = lead & (0x7f >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        if ((text[i] & 0xc0) != 0x80) return {0, 0};
        code = code << 6 | (text[i] & 0x3f);
    }
    // Careful: only the shortest form is valid, or a character could evade a check.
    const bool too_long = (bytes == 3 && code < 0x800) || (bytes == 4 && code < 0x10000);
    const bool surrogate = code >= 0xd800 && code < 0xe000;
    return {too_long || surrogate || code > 0x10ffff ? 0 : bytes, code};
}

// Appends a code point (below 0x110000, no surrogate).
inline void append_utf8(std::string& out, uint32_t code) {
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const uint32_t lead[] = {0, 0xc0, 0xe0, 0xf0};
    out += char(lead[more] | code >> (6 * more));
    for (int i = more - 1; i >= 0; i--) out += char(0x80 | (code >> (6 * i) & 0x3f));
}

// Takes all whole characters from the front of some bytes. Sampled bytes may end inside one: these
// stay for the next call, unless the text has ended. Invalid bytes become U+FFFD.
inline std::string take_characters(std::string& bytes, bool ended) {
    std::string out;
    size_t at = 0;
    while (at < bytes.size()) {
        const std::string_view rest = std::string_view(bytes).substr(at, 4);
        const size_t size = utf8_character(rest).bytes;
        if (size == 0 && rest.size() < 4 && !ended) break;  // the longest has four
        out += size ? rest.substr(0, size) : "\xef\xbf\xbd";
        at += std::max<size_t>(1, size);
    }
    bytes.erase(0, at);
    return out;
}

// --- JSON (RFC 8259)
//     {"model_type": "gpt2", "n_layer": 12, "layer_norm_epsilon": 1e-05, "n_inner": null}

inline std::string json_string(std::string_view text) {
    std::string out = "\"", bytes(text);
    for (char c : take_characters(bytes, true))
        out += c == '"' || c == '\\' ? std::string{'\\', c}
               : c == '\n'           ? "\\n"
               : uint8_t(c) < 0x20   ? format("\\u%04x", c)
                                     : std::string(1, c);
    return out + '"';
}
// A text for a message: as it is where it is short and plain, else as a JSON string, cut.
inline std::string shown(std::string_view text) {
    auto is_plain = [](char c) { return c > ' ' && c < 127; };
    if (!text.empty() && text.size() <= 60 && std::all_of(text.begin(), text.end(), is_plain))
        return std::string(text);
    return json_string(text.substr(0, 40)) + (text.size() > 40 ? "..." : "");
}

// A value. Numbers, texts, bool convert to one: Json::object().set("step", 7).set("done", true).
struct Json {
    enum class Kind { null, boolean, number, string, array, object };
    Kind kind = Kind::null;
    std::string text = "null";  // what a string says; a number, true, false, null: as written
    std::vector<std::pair<std::string, Json>> members;  // in order; an array's have no names

    Json(std::nullptr_t = nullptr) {}
    explicit Json(Kind kind) : kind(kind), text() {}
    Json(bool value) : kind(Kind::boolean), text(value ? "true" : "false") {}
    Json(std::integral auto value) : kind(Kind::number), text(std::to_string(value)) {}
    // In the fewest digits that give the same bits. NaN and infinity become null.
    Json(double value) {
        if (!std::isfinite(value)) return;
        char digits[32];
        text.assign(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
        kind = Kind::number;
    }
    Json(std::string value) : kind(Kind::string), text(std::move(value)) {}
    Json(const char* value) : Json(std::string(value)) {}
    template <size_t n>
    Json(const double (&values)[n]) : Json(array(values)) {}
    static Json object() { return Json(Kind::object); }
    static Json array(const auto& values) {
        Json list(Kind::array);
        for (const auto& value : values) list.members.emplace_back("", value);
        return list;
    }

    // The text's value. Errors begin with `where`, a file's name.
    static Json parse(std::string_view text, const std::string& where);
    // As text: in one line with indent 0, else with a line for each member.
    std::string write(int indent = 0, int depth = 0) const {
        if (kind == Kind::string) return json_string(text);
        const bool object = kind == Kind::object;
        if (!object && kind != Kind::array) return text;
        auto line = [&](int level) {
            return indent > 0 ? "\n" + std::string(size_t(indent * level), ' ') : "";
        };
        std::string out;
        for (auto& [name, value] : members) {
            out += (out.empty() ? "" : ",") + line(depth + 1);
            if (object) out += json_string(name) + (indent > 0 ? ": " : ":");
            out += value.write(indent, depth + 1);
        }
        if (!members.empty()) out += line(depth);
        return object ? "{" + out + "}" : "[" + out + "]";
    }

    // The number as int64_t or double, if it is one: 1.0 and 1e3 are no integers.
    template <class Number>
    std::optional<Number> as() const {
        return kind == Kind::number ? number_of<Number>(text) : std::nullopt;
    }

    // Sets a member, where it was or at the end. Careful: looks through all of them.
    Json& set(std::string_view key, Json value) {
        for (auto& [name, old] : members)
            if (name == key) return old = std::move(value), *this;
        members.emplace_back(key, std::move(value));
        return *this;
    }
    const Json* find(std::string_view key) const {
        for (auto& [name, value] : members)
            if (name == key) return &value;
        return nullptr;
    }
    const Json& get(std::string_view key, Kind wanted, const std::string& where) const {
        static constexpr const char* names[] = {"null",     "true or false", "a number",
                                                "a string", "an array",      "an object"};
        const Json* value = find(key);
        if (!value) fail(where, ": \"", key, "\" is missing");
        if (value->kind != wanted)
            fail(where, ": \"", key, "\" must be ", names[int(wanted)], ", found ",
                 names[int(value->kind)]);
        return *value;
    }
    // Fails where the member is there and has none of these values.
    void only(const std::string& where, std::string_view key, const std::vector<Json>& allowed,
              std::string_view why) const {
        const Json* value = find(key);
        auto is_value = [&](const Json& one) {
            const bool number = one.kind == Kind::number;
            return number ? one.as<double>() == value->as<double>() : one.write() == value->write();
        };
        if (value && std::none_of(allowed.begin(), allowed.end(), is_value))
            fail(where, ": \"", key, "\" is ", value->write().substr(0, 60), ": ", why);
    }
    int64_t get_int(std::string_view key, const std::string& where, int64_t lowest = INT64_MIN,
                    int64_t highest = INT64_MAX) const {
        const Json& value = get(key, Kind::number, where);
        const auto n = value.as<int64_t>();
        if (!n || *n < lowest || *n > highest)
            fail(where, ": \"", key, "\" must be an integer from ", lowest, " to ", highest,
                 ", found ", shown(value.text));
        return *n;
    }
    const std::string& get_string(std::string_view key, const std::string& where) const {
        return get(key, Kind::string, where).text;
    }
};

// Text to a value: recursive descent, a function for each rule of the grammar. Each reads from
// text[at] on and moves `at` behind what it read.
struct JsonParser {
    // More is refused before it takes the memory. A vocabulary of 65536 tokens with merges as pairs
    // has 261,000 values.
    static constexpr int kDepth = 64;
    static constexpr size_t kValues = 1 << 18;

    std::string_view text;
    const std::string& where;
    size_t at = 0, values = 0;

    // value: list | string | number | true | false | null
    Json value(int depth) {
        space();
        const char c = peek();
        const bool nests = c == '{' || c == '[';
        if (++values > kValues) error(at, "more than ", kValues, " values");
        if (nests && depth == kDepth) error(at, "more than ", kDepth, " levels");
        if (nests) return list(depth + 1);
        if (accept("\"")) return string();
        if (c == '-' || std::isdigit(uint8_t(c))) return number();
        if (accept("true")) return true;
        if (accept("false")) return false;
        if (!accept("null")) wrong("a value");
        return nullptr;
    }

    // list: [ value , value , ... ]  or  { string : value , string : value , ... }, no name twice.
    // Why std::set: names can be chosen that fall into one slot of a hash table.
    Json list(int depth) {
        const size_t start = at;
        const bool object = text[at++] == '{';
        const char* close = object ? "}" : "]";
        Json out(object ? Json::Kind::object : Json::Kind::array);
        std::unordered_set<std::string> names;
        if (next(close)) return out;
        do {
            std::string name;
            if (object) {
                if (!next("\"")) wrong("a key in quotes");
                name = string();
                if (!names.insert(name).second)
                    error(start, "the object that starts here has the key ", shown(name), " twice");
                if (!next(":")) wrong("':'");
            }
            out.members.emplace_back(std::move(name), value(depth));
        } while (next(","));
        if (!next(close)) wrong(object ? "',' or '}'" : "',' or ']'");
        return out;
    }

    // number: -? (0 | digits) (. digits)? ([eE] [+-]? digits)?     number_of takes "01" and "1."
    Json number() {
        const size_t start = at;
        accept("-");
        if (!accept("0")) digits();
        if (accept(".")) digits();
        if (accept("e") || accept("E")) {
            if (!accept("+")) accept("-");
            digits();
        }
        Json out = 0;
        out.text = text.substr(start, at - start);
        if (!out.as<double>()) error(start, "number out of range");
        return out;
    }
    void digits() {
        if (!std::isdigit(uint8_t(peek()))) wrong("a digit");
        while (std::isdigit(uint8_t(peek()))) at++;
    }

    // string: " (character | \ escape) ... ", whose first quote is read
    std::string string() {
        std::string out;
        while (!accept("\"")) {
            if (uint8_t(peek()) < 0x20) wrong("the rest of a string");
            const size_t start = at;
            while (uint8_t(peek()) >= 0x20 && peek() != '"' && peek() != '\\') at++;
            out += text.substr(start, at - start);
            if (accept("\\")) append_utf8(out, escape());
        }
        return out;
    }
    // escape: a letter, as in \n, or u and four digits, a unit of UTF-16; its \ is read
    uint32_t escape() {
        static constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        const size_t start = at - 1, which = names.find(peek());
        if (which != names.npos) return at++, meanings[which];
        if (!accept("u")) wrong("an escape sequence");
        uint32_t code = hex4();
        // Above U+FFFF: two units, surrogates, with ten bits each of what is above 0x10000.
        // U+1F600 is \ud83d\ude00, as 0xf600 is 0x3d << 10 | 0x200.
        if (code >> 10 == 0xd800 >> 10 && accept("\\u")) {
            const uint32_t low = hex4();
            if (low >> 10 == 0xdc00 >> 10) code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
        }
        if (code >> 11 == 0xd800 >> 11) error(start, "half a surrogate pair");
        return code;
    }
    uint32_t hex4() {
        uint32_t code = 0;
        const char *begin = text.data() + at, *end = text.data() + std::min(at + 4, text.size());
        at = size_t(std::from_chars(begin, end, code, 16).ptr - text.data());
        if (text.data() + at != begin + 4) wrong("four hexadecimal digits");
        return code;
    }

    // The next character; at the end a zero byte, which no rule allows.
    char peek() const { return at < text.size() ? text[at] : '\0'; }
    void space() { at = std::min(text.find_first_not_of(" \t\n\r", at), text.size()); }
    // Passes over `token` if it comes next. next: with any space before it.
    bool accept(std::string_view token) {
        const bool here = text.substr(at).starts_with(token);
        at += here ? token.size() : 0;
        return here;
    }
    bool next(std::string_view token) { return space(), accept(token); }

    [[noreturn]] void wrong(const char* expected) const {
        const bool end = at == text.size();
        error(at, "expected ", expected, ", found ",
              end ? "the end" : json_string(text.substr(at, 1)));
    }
    [[noreturn]] void error(size_t from, const auto&... parts) const {
        const auto line = 1 + std::count(text.begin(), text.begin() + from, '\n');
        fail(where, ": not valid JSON: line ", line, ", byte ", from, ": ", parts...);
    }
};
inline Json Json::parse(std::string_view text, const std::string& where) {
    JsonParser parser{text, where};
    for (size_t at = 0, bytes; at < text.size(); at += bytes)
        if ((bytes = utf8_character(text.substr(at, 4)).bytes) == 0)
            parser.error(at, "invalid UTF-8");
    Json out = parser.value(0);
    parser.space();
    if (parser.at < text.size()) parser.wrong("the end of the text");
    return out;
}

// =================================================================================================
// §13 The tokenizer: text to tokens and back
// =================================================================================================
// What you have now: files of text. A model reads tokens: numbers below its vocabulary's size, each
// of which stands for some bytes of text.
//
// This is GPT-2's tokenizer, a byte-level BPE (byte pair encoding; Sennrich, Haddow, Birch 2016;
// Radford et al. 2019, §2.2). Text is cut into pieces, roughly words with the blank before them. A
// piece starts as its bytes, one token each. Then the two neighbours whose merge was learnt first
// become one token, until no neighbours have a merge. So any bytes can be encoded.
//
//   text    "Hello, world's"
//   pieces  "Hello" | "," | " world" | "'s"
//   tokens   15496     11     995       338        (with GPT-2's vocabulary)
//
// prepare_data.cpp learns vocabularies, and has a faster encoder for whole corpora.

// --- Pieces: merging never crosses from one into the next, or "dog." and "dog!" would be tokens

enum CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };
inline CharClass class_of(uint32_t code);  // of a code point; the table ends this section

// The class of the character at text[at]; sets `bytes` to its length. A byte that begins no valid
// UTF-8 is taken alone, as kOther.
inline CharClass class_at(std::string_view text, size_t at, size_t& bytes) {
    const Utf8Character c = utf8_character(text.substr(at));
    bytes = std::max<size_t>(c.bytes, 1);
    return c.bytes > 0 ? class_of(c.code) : kOther;
}

// The piece that begins at text[at]. This is GPT-2's pattern
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// (openai/gpt-2, src/encoder.py) as a scanner: the first alternative that fits is the piece. \p{L}
// is a letter, \p{N} a number, \s white space; (?!\S) leaves out the last space before a word.
//   's|'t|'re|'ve|'m|'ll|'d   "we'll" is "we" | "'ll"    but "WE'LL" is "WE" | "'" | "LL"
//    ?\p{L}+                  " costs"; "naïve" is one   "x2y" is "x" | "2" | "y"
//    ?\p{N}+                  " 1999", "½"               "3.14" is "3" | "." | "14"
//    ?[^\s\p{L}\p{N}]+        " $", "?!", emoji          the blank before it is U+0020, no other
//   \s+(?!\S)                "a   b" is "a" | "  " | " b"; spaces at a text's end are one piece
//   \s+                      "a\nb" is "a" | "\n" | "b": a line end joins no word
inline std::string_view next_piece(std::string_view text, size_t at) {
    // An ending after an apostrophe, in lower case only.
    if (text[at] == '\'')
        for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
            if (text.substr(at).starts_with(ending)) return text.substr(at, ending.size());
    // A run of one class. A blank before it belongs to it.
    size_t end = at + (text[at] == ' ' && at + 1 < text.size()), last = at, bytes = 0;
    const CharClass kind = class_at(text, end, bytes);
    for (; end < text.size() && class_at(text, end, bytes) == kind; end += bytes) last = end;
    // White space leaves its last character to what follows, if there is anything before it.
    if (kind == kSpace && end < text.size() && last > at) end = last;
    return text.substr(at, end - at);
}

// --- The vocabulary
// A vocabulary is a list of merges, in the order in which they were learnt. Its tokens are the 256
// bytes, what each merge makes, and the end of a text: 256 + 50,000 + 1 = 50,257 in GPT-2. A toy:
//   merge 0   l o      token 256, "lo"          merge 2   (blank) low    token 258, " low"
//   merge 1   lo w     token 257, "low"         merge 3   e r            token 259, "er"
// With it " lower lot" becomes " low" "er" | (blank) "lo" t: five tokens for ten bytes.

// GPT-2 writes each byte as a visible character, so that a vocabulary file is text. The 188 bytes
// that are visible in Latin-1 stand for themselves; the other 68, in order, are U+0100, U+0101, ...
// Ids have the same order: "!" is token 0; the blank, the 33rd of the 68, is U+0120 ("Ġ") and token
// 188 + 32 = 220.
struct ByteAlphabet {
    uint8_t byte_of_id[256] = {};
    uint16_t id_of_byte[256] = {}, character_of_byte[256] = {};
    constexpr ByteAlphabet() {
        int id = 0;
        for (bool visible : {true, false})
            for (int b = 0; b < 256; ++b) {
                if (((b > 32 && b < 127) || (b > 160 && b != 173)) != visible) continue;
                character_of_byte[b] = uint16_t(visible ? b : 256 + id - 188);
                byte_of_id[id] = uint8_t(b), id_of_byte[b] = uint16_t(id++);
            }
    }
};
inline constexpr ByteAlphabet kBytes;

constexpr std::string_view kEndOfText = "<|endoftext|>";  // its name in a vocabulary file
constexpr uint32_t kNoToken = UINT32_MAX;

// Tokens 0..255 are the bytes, token 256 + i is what merge i makes of two earlier tokens, and the
// last token is the end of a text.
class Tokenizer {
public:
    using Merge = std::pair<uint16_t, uint16_t>;

    // Fails if a merge names a token that does not exist before it.
    explicit Tokenizer(std::vector<Merge> merge_list) : merges_(std::move(merge_list)) {
        merged_.reserve(merges_.size());
        if (merges_.size() > 65536 - 257)
            fail("expected at most 65279 merges, found ", merges_.size(), ": ids have 16 bits");
        for (int b : kBytes.byte_of_id) bytes_.emplace_back(1, char(b));
        for (auto [left, right] : merges_) {
            if (left >= bytes_.size() || right >= bytes_.size())
                fail("merge ", bytes_.size() - 256, " joins tokens ", left, " and ", right,
                     ", which do not exist before it");
            merged_[uint32_t(left) << 16 | right] = uint32_t(bytes_.size());
            bytes_.push_back(bytes_[left] + bytes_[right]);
        }
        bytes_.emplace_back();
    }
    static Tokenizer bytes() { return Tokenizer({}); }  // no merges: every byte is a token

    int vocab_size() const { return int(bytes_.size()); }
    int end_of_text() const { return vocab_size() - 1; }
    const std::vector<Merge>& merges() const { return merges_; }
    bool operator==(const Tokenizer& other) const { return merges_ == other.merges_; }

    // A token's bytes: none for the end of a text.
    std::string_view bytes_of(int id) const {
        if (id < 0 || id >= vocab_size())
            fail("there is no token ", id, ": the vocabulary has ", vocab_size());
        return bytes_[size_t(id)];
    }
    // The text of some tokens, with `end_of_text_mark` for every end of text. Careful: a token may
    // be half a character (see take_characters).
    std::string decode(const std::vector<uint16_t>& tokens,
                       std::string_view end_of_text_mark = "") const {
        std::string text;
        for (uint16_t id : tokens) text += id == end_of_text() ? end_of_text_mark : bytes_of(id);
        return text;
    }
    // "<|endoftext|>" in the text is thirteen characters like any others.
    std::vector<uint16_t> encode(std::string_view text) const;

    // A folder with vocab.json and merges.txt, encoder.json and vocab.bpe, or tokenizer.json.
    static Tokenizer load(const std::string& folder);
    // Writes vocab.json, merges.txt and tokenizer.json. Makes the folder where it is missing.
    void save(const std::string& folder) const;
    std::string name_of(int id) const {
        if (id == end_of_text()) return std::string(kEndOfText);
        std::string name;
        for (char b : bytes_of(id)) append_utf8(name, kBytes.character_of_byte[uint8_t(b)]);
        return name;
    }
    // "Ġ t", "Ġ a", ...
    std::vector<std::string> merge_names() const {
        std::vector<std::string> names;
        for (auto [left, right] : merges_) names.push_back(name_of(left) + ' ' + name_of(right));
        return names;
    }
    std::string merges_text() const {
        std::string text = "#version: 0.2\n";
        for (const std::string& names : merge_names()) text += names + '\n';
        return text;
    }
    std::string vocab_json() const;
    std::string tokenizer_json() const;

private:
    std::vector<Merge> merges_;
    std::vector<std::string> bytes_;                 // of every token
    std::unordered_map<uint32_t, uint32_t> merged_;  // left << 16 | right -> what they become
};

// --- Encoding

// Appends the tokens of one piece to `out`, in n log n steps: a piece may be a megabyte of one
// letter. merge(left, right) is what two tokens become, or kNoToken. Tokens are a linked list;
// pairs that have a merge wait in a heap, the earliest merge first, then the leftmost. With merges
// a a -> A and A A -> B, aaaaa goes through
//     tokens        waiting, smallest first           taken
//     a a a a a     A at 0, A at 1, A at 2, A at 3    A at 0
//     A . a a a     A at 1, A at 2, A at 3            A at 1: that a is gone, skip
//     A . a a a     A at 2, A at 3                    A at 2, which adds B at 0
//     A . A . a     A at 3, B at 0                    A at 3: gone; then B at 0
//     B . . . a     nothing                           the result is B a
inline void merge_piece(const auto& merge, std::string_view piece, std::vector<uint16_t>& out) {
    if (piece.size() >= kNoToken) fail("a word of ", piece.size(), " bytes is too long to encode");
    const uint32_t n = uint32_t(piece.size());
    std::vector<uint32_t> token(n), previous(n), next(n);
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> waiting;
    // What token i and its right neighbour make; kNoToken also where its left one took it in.
    auto merged_at = [&](uint32_t i) {
        const bool is_pair = token[i] != kNoToken && next[i] < n;
        return is_pair ? merge(token[i], token[next[i]]) : kNoToken;
    };
    auto offer = [&](uint32_t i) {
        const uint64_t merged = merged_at(i);
        if (merged != kNoToken) waiting.push(merged << 32 | i);
    };
    for (uint32_t i = 0; i < n; ++i)
        token[i] = kBytes.id_of_byte[uint8_t(piece[i])], previous[i] = i - 1, next[i] = i + 1;
    for (uint32_t i = 0; i < n; ++i) offer(i);
    while (!waiting.empty()) {
        const uint32_t merged = uint32_t(waiting.top() >> 32), i = uint32_t(waiting.top());
        waiting.pop();
        if (merged_at(i) != merged) continue;  // one of the two has merged with another neighbour
        const uint32_t right = next[i];
        token[i] = merged, token[right] = kNoToken;
        next[i] = next[right];
        if (next[i] < n) previous[next[i]] = i;
        if (i > 0) offer(previous[i]);
        offer(i);
    }
    for (uint32_t i = 0; i < n; i = next[i]) out.push_back(uint16_t(token[i]));
}

inline std::vector<uint16_t> Tokenizer::encode(std::string_view text) const {
    auto merge = [&](uint32_t left, uint32_t right) {
        const auto found = merged_.find(left << 16 | right);
        return found == merged_.end() ? kNoToken : found->second;
    };
    std::vector<uint16_t> tokens;
    for (size_t at = 0; at < text.size();) {
        const std::string_view piece = next_piece(text, at);
        merge_piece(merge, piece, tokens);
        at += piece.size();
    }
    return tokens;
}

// --- Vocabulary files
// Two files in OpenAI's format, under Hugging Face's names (OpenAI's are vocab.bpe, encoder.json):
//
//     merges.txt    #version: 0.2            vocab.json    {"!": 0, "\"": 1, "#": 2, ...
//                   Ġ t                                    "\u0120t": 256, "\u0120a": 257, ...
//                   Ġ a                                    "<|endoftext|>": 50256}
//
// and one that has both, and says how text is cut, in the format of Hugging Face's tokenizers:
//
//     tokenizer.json    {..., "model": {"type": "BPE", "vocab": {...}, "merges": ["Ġ t", ...]}}
//
// The vocabulary follows from the merges; one that says otherwise is refused.

// As Python's json writes it: GPT-2's is, byte for byte, what OpenAI published.
inline std::string Tokenizer::vocab_json() const {
    std::string json = "{";
    for (int id = 0; id < vocab_size(); ++id) {
        json += id == 0 ? "\"" : ", \"";
        for (char c : bytes_of(id)) {
            const unsigned code = kBytes.character_of_byte[uint8_t(c)];
            if (code == '"' || code == '\\') json += '\\';
            json += code < 128 ? std::string(1, c) : format("\\u%04x", code);
        }
        if (id == end_of_text()) json += kEndOfText;
        json += to_text("\": ", id);
    }
    return json + "}";
}

// As tokenizers writes it. ByteLevel is the alphabet and the pattern above.
inline std::string Tokenizer::tokenizer_json() const {
    const std::string byte_level = R"({"type": "ByteLevel", "add_prefix_space": false, )"
                                   R"("trim_offsets": true, "use_regex": true})";
    return to_text(
        R"({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": )",
        end_of_text(), R"(, "content": ")", kEndOfText,
        R"(", "single_word": false, "lstrip": false, )",
        R"("rstrip": false, "normalized": false, "special": true}], "normalizer": null, )",
        R"("pre_tokenizer": )", byte_level, R"(, "post_processor": null, "decoder": )", byte_level,
        R"(, "model": {"type": "BPE", "dropout": null, "unk_token": null, )",
        R"("continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false, )",
        R"("byte_fallback": false, "ignore_merges": false, "vocab": )", vocab_json(),
        R"(, "merges": )", Json::array(merge_names()).write(), "}}\n");
}

inline void Tokenizer::save(const std::string& folder) const {
    make_folders(folder);
    write_file(folder + "/vocab.json", vocab_json());
    write_file(folder + "/merges.txt", merges_text());
    write_file(folder + "/tokenizer.json", tokenizer_json());
}

constexpr size_t kMaxVocabBytes = 16'000'000;  // of a vocabulary file: GPT-2's have a million

// The tokenizer of some merges ("Ġ t"); an error in one begins with `where` and its number.
// `vocab`, from the file `path`, must give every token the id that its merge has.
inline Tokenizer make_tokenizer(const std::vector<std::string>& merges, const std::string& where,
                                const Json& vocab, const std::string& path) {
    std::unordered_map<std::string, int> ids;
    std::vector<Tokenizer::Merge> pairs;
    const Tokenizer bytes = Tokenizer::bytes();
    for (int id = 0; id < 256; ++id) ids[bytes.name_of(id)] = id;
    for (size_t i = 0; i < merges.size(); ++i) {
        const std::string& merge = merges[i];
        if (i == 0 && merge.starts_with("#version")) continue;
        const std::vector<std::string> names = split_at(merge, ' ');
        if (names.size() != 2 || !ids.contains(names[0]) || !ids.contains(names[1]))
            fail(where, i + 1, ": expected two tokens with a blank between them, bytes or made by ",
                 "earlier lines, found ", shown(merge));
        pairs.emplace_back(ids[names[0]], ids[names[1]]);
        if (!ids.emplace(names[0] + names[1], 255 + pairs.size()).second)
            fail(where, i + 1, ": ", shown(merge), " makes a token that there is already");
    }
    ids.emplace(kEndOfText, 256 + pairs.size());
    if (vocab.members.size() != ids.size())
        fail(path, ": expected an object of ", ids.size(), " tokens (256 bytes, ", pairs.size(),
             " merges, ", kEndOfText, "), found ", vocab.members.size());
    for (auto& [name, id] : vocab.members) {
        const auto entry = ids.find(name);
        if (entry == ids.end()) fail(path, ": no merge makes the token ", shown(name));
        if (id.as<int>() != entry->second)
            fail(path, ": the token ", shown(name), " must have the id ", entry->second,
                 ", as its merge has, found ", shown(id.write()));
    }
    return Tokenizer(std::move(pairs));
}

// A merges file's lines; their ends may be those of Windows.
inline std::vector<std::string> read_merge_lines(const std::string& path) {
    std::vector<std::string> lines = split_at(read_text(path, kMaxVocabBytes), '\n');
    if (lines.back().empty()) lines.pop_back();
    for (std::string& line : lines)
        if (line.ends_with('\r')) line.pop_back();
    return lines;
}

// Refuses, by name, what this tokenizer does not do; what changes no token is not looked at.
inline Tokenizer read_tokenizer_json(const std::string& path) {
    const Json json = Json::parse(read_text(path, kMaxVocabBytes), path);
    const auto object = Json::Kind::object, array = Json::Kind::array;
    const Json& cut = json.get("pre_tokenizer", object, path);
    const Json& model = json.get("model", object, path);
    const char* gpt2 = "only GPT-2's byte-level BPE is supported";
    json.only(path, "normalizer", {nullptr}, gpt2);
    cut.only(path, "type", {"ByteLevel"}, gpt2);
    cut.only(path, "add_prefix_space", {false}, gpt2);
    cut.only(path, "use_regex", {true}, gpt2);
    model.only(path, "type", {"BPE"}, gpt2);
    model.only(path, "dropout", {nullptr, 0}, gpt2);
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
        model.only(path, key, {nullptr, ""}, gpt2);
    for (const char* key : {"byte_fallback", "ignore_merges"}) model.only(path, key, {false}, gpt2);
    Json vocab = model.get("vocab", object, path);
    for (const auto& [none, token] : json.get("added_tokens", array, path).members) {
        token.only(path, "content", {std::string(kEndOfText)},
                   "no other added token is supported: remove it if your texts do without it");
        vocab.set(kEndOfText, token.get("id", Json::Kind::number, path));
    }
    std::vector<std::string> lines;  // "Ġ t", or of two names, ["Ġ", "t"]
    for (const auto& [none, merge] : model.get("merges", array, path).members) {
        const auto& names = merge.members;
        const bool pair = names.size() == 2;
        lines.push_back(pair ? names[0].second.text + ' ' + names[1].second.text : merge.text);
    }
    return make_tokenizer(lines, path + ", merge ", vocab, path);
}

inline Tokenizer Tokenizer::load(const std::string& folder) {
    using Names = std::pair<const char*, const char*>;  // nvcc 12.4 does not deduce it below
    for (auto [vocab, merges] :
         {Names{"/vocab.json", "/merges.txt"}, Names{"/encoder.json", "/vocab.bpe"}}) {
        const std::string path = folder + vocab;
        if (!file_exists(path) || !file_exists(folder + merges)) continue;
        const std::vector<std::string> lines = read_merge_lines(folder + merges);
        const Json ids = Json::parse(read_text(path, kMaxVocabBytes), path);
        return make_tokenizer(lines, folder + merges + ", line ", ids, path);
    }
    if (file_exists(folder + "/tokenizer.json"))
        return read_tokenizer_json(folder + "/tokenizer.json");
    fail("there is no tokenizer in ", folder, ": expected vocab.json and merges.txt, encoder.json ",
         "and vocab.bpe (make gpt2-vocab fetches GPT-2's into data/gpt2), or tokenizer.json");
}

// The tokenizer of a folder, where it has one. A damaged one is an error.
inline std::optional<Tokenizer> tokenizer_of(const std::string& folder) {
    for (const char* name : {"/vocab.json", "/encoder.json", "/tokenizer.json"})
        if (file_exists(folder + name)) return Tokenizer::load(folder);
    return std::nullopt;
}

// --- What Unicode says of a character

// \p{L}, \p{N} and \s of Unicode 17.0, written by checks/unicode_classes.py: runs of code points of
// one class. Each run is the number (length - 1) * 4 + class in base 32, lowest digit first. Digits
// are the 64 characters from '0' to 'p' without the backslash; the upper 32 say that another digit
// follows. So "P1", 0 + 32 * 1, is 9 code points of kOther.
constexpr std::string_view kClassRuns =
    "P1CT23i1V1HU3DU3T13T33P11H6018210:0j20j30Uj1<^1e1AH101P@A054=01D109010^20Y:0YALfD0f441DQ5i8Y"
    "3<=a5Y5a2V1<50Y<01i15H5V1941m110f3a3Q;X11e1V1Q4P15<1@f2<1P1181i2Q3HY1@n20Im1U5T7f681T21HU1<V"
    "10n1<M454f20I018=81m11a1509<V154F41LE<54f20I050505i3=01HV149m1Q1090f20I050A81T21i15<V1P11X1M"
    "454f20I050A81e3509<V101FX110E890=85010585898^1e21a2c1T2M090j20n181T390545<V1LJ01<M090j20U10A"
    "81e3905<V105P2Q1090Q541m11@90J9<Z20E@U28n20Q1014Ii3V1P2n505]1IP1V1i45010A0n2010U105P114A01P1"
    "V14=m31i3_2]1M0^4X3AX>Y5]21V1DE<=8185H9<b1]110V1Df401@14Y50bY10=4I010=4Q50=4Q40=4I010=4j10Q7"
    "0=4Y8e1_28n1m1f:4E8^^24Q23U3@Y98:MHU2a1Y2e1U2e1b109i1^6X41<18V1DV1e2V1DQ;HA4U401@f8T1j3i4V1f"
    "34AX1^5<U3DZ1a4j2P1b6X5V1DV1a11a;j5P2M8V1P5f3a15V1^5T3^4]3V189V1^44Y1@Y549P5=0E0581@nGm7fR14"
    "E4f44E4M0101010j34b60I01890I8=4E<b1@90I8[1a37@3i53m1214F@1V1Db1a<1<14U1018AD101010=0Y14=@A<1"
    "0Z65Bek2_7e9g2e_2g3]^4bLD=85P124f401@14n6H1m1j2P1I0I0I0I0I0I0I0Im91mj13<52P3R1HA4:5<f:D90U;0"
    "=@Y50f;8>T1n3m5n1m3V1e3N0k1m3V1i4k1mW1nhIm7bbg2X8f54bQ18n1V15]2j5m1j34f8V1i4Q14j<4U:]2Q2090="
    "0j2a1FT1^6e1U6]3V1m2E81050V1^3T1j2P3b3Hj5]31V1DA0U1V1A0Q5i290M<V1Dj2818U601854A4101m294Y1H9]"
    "1E4E4EP1I0I0Y50f1DY>a1V1D^e[1]1j2<Q6]PQ1f^14U=e4I]1A@10U10b10A0105050^=P4Y^1T2n74f6m4^1]>A0j"
    "@X2V1HU3DU3X1Q;8E4E4E49X4^10U30Y2050j14f1T4Y?]1c5]1R7P26]Nb38Q6m1Z3<n3>P1^22M2@f4T1f34^4<M0B"
    "T5fC4V1D^4<^4<n4L^6]1Y10j10I050Y10j10I058^6]1jV1P1f2T1Mm2E0U50Q1a8E410^505814j24Nj24Jj3LR1m5"
    "Y205@Bf2F<U3DU3e4n6<65o14g51i1=090b3T1R1i2b360b3:m3M0^3DBm1f6T1f24NY2@NU2i2Jm9Q9i6Y6a1Y6HF^4"
    "]1V1DV1^3P1j2TKk30U5D5m1Em6b3V11Lf2X1>X3U2e5b2J]2j2]1b6T3g30541a1b5m3Q3HV1P1^4i1V1<141LY481]"
    "1n5e1=X1V1101<_2X1U20Q3X25i7I010=0j10U1Hj5P2V1X1M454f20I050A81T21]1Ae3U101410f401P3101]5b6T2"
    "=@V1@9e3n5]2501LV1eDj5P5=]4n5]21X1V1e4Y5a11HV1D_2]3Y3a2_1<IPG^5]>n7Z2]1M414M050n2i1101e1V1e8"
    "M4j4m1101]31T1n4H1a21X1f5X21T2Q9iHQ4i1V1DQ10b4P21i1c3@f3m=I050f4a21P1V1DE050n3e11HV1D^5<V1eN"
    "Y2i110b10U4]3V1e:1i1c2X5Ud3e<k=P2^H]Y:Q<i1nU4P2EP3Yd?@jX2PhJf3T2V1ei6QW2Hj30V1Dj90V1Df3T2n5m"
    "1=]1V10J0b2@Y2mf1b58V1eHn7k2P1Q34Q3]5Y9@1T8b1m7501e15:P1fkLP5n3P<Y>apQ1=0I050YT1i11a3941e1=L"
    "^b1]P9Y=@b18Q1HU1eZ@V1ei5_2]1_2]=R3i@b:0j80541454=0^1010I0Q80=4M0I0^30=0A018I0^Z14Q30Q30j30Q"
    "30j30Q30j30Q30j30Q30M4V6mp6j3DEaP1f7TBb5T1I4V1<1PX1f3T2^5<V1ek1^3<V1eJf341V1aHj309050I4AP15m"
    "KI0=050j10bH4R1m5^8H1<V1iR3Z70:0>]9c50k1TH=0Y30501410U10=0101D1<10101090501410101010105014=0"
    "I0=0=010U10Q2@90A0Q2]X2c1Xm:V1eP4nlV5m3fSA4fbF4QVMi1f^2Te9fS2Tm5YYC@UUQ1";

// The class of each code point. Careful: as a lambda, g++ would run it while compiling, which takes
// 260 MB.
inline std::vector<CharClass> expand_class_runs() {
    std::vector<CharClass> classes;
    size_t value = 0, shift = 0;
    for (char c : kClassRuns) {
        const size_t digit = size_t(c - '0' - (c > '\\'));
        value |= (digit & 31) << shift, shift += 5;
        if (digit >= 32) continue;
        classes.insert(classes.end(), value / 4 + 1, CharClass(value % 4));
        value = shift = 0;
    }
    return classes;
}
inline const std::vector<CharClass> kClasses = expand_class_runs();
inline CharClass class_of(uint32_t code) {
    return code < kClasses.size() ? kClasses[code] : kOther;
}

// =================================================================================================
// §14 Hugging Face in, Hugging Face out: safetensors files and config.json
// =================================================================================================
// What you have now: a model that reads and writes text. On disk it is a folder as transformers
// writes it.
//
// A safetensors file (github.com/huggingface/safetensors, README and tensor.rs):
//
//     8 bytes        N, the length of the header, little-endian
//     N bytes        JSON, {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...},
//                    with or without an object "__metadata__"; spaces at the end
//     the rest       the tensors' bytes, in C order: each byte belongs to one tensor
//
// For example the numbers 1 and 2 under the name "a":
//
//     byte   0  58 00 00 00 00 00 00 00   N = 88
//            8  {"__metadata__":{"format":"pt"},
//               "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   (in one line)
//           93  20 20 20                  three spaces: the data begins at a multiple of 8
//           96  00 00 80 3f               1, at offset 0 of the data
//          100  00 00 00 40               2; the file ends at byte 104
//
static_assert(std::endian::native == std::endian::little, "files hold numbers as memory does");

// --- Types of elements

// Bytes of an element of that type; 0: there is no such type. Four of them can be weights.
inline size_t dtype_bytes(std::string_view dtype) {
    static constexpr std::pair<std::string_view, size_t> sizes[] =
        {{"F64", 8}, {"F32", 4},  {"F16", 2},     {"BF16", 2},    {"I64", 8},    {"U64", 8},
         {"C64", 8}, {"I32", 4},  {"U32", 4},     {"I16", 2},     {"U16", 2},    {"I8", 1},
         {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}};
    for (auto& [name, bytes] : sizes)
        if (name == dtype) return bytes;
    return 0;
}

// IEEE half precision: one bit of sign, five of exponent, ten of significand.
struct f16 {
    uint16_t bits;
    // Exponents are biased by 15, in a float by 127. The largest is infinity and NaN in both; with
    // exponent 0 the value is significand * 2^-24.
    explicit operator float() const {
        const uint32_t exponent = bits >> 10 & 31, significand = bits & 0x3ff;
        const uint32_t moved = (exponent == 31 ? 255 : exponent + 112) << 23 | significand << 13;
        const float value =
            exponent == 0 ? float(significand) * 0x1p-24f : std::bit_cast<float>(moved);
        return bits & 0x8000 ? -value : value;
    }
};

// The first of n numbers that is not finite, or n.
template <class real>
size_t first_not_finite(const real* x, size_t n) {
    real zero = 0;  // 0 times NaN or infinity is NaN
#pragma omp simd reduction(+ : zero)
    for (size_t i = 0; i < n; ++i) zero += 0 * x[i];
    if (zero == 0) return n;
    return size_t(std::find_if(x, x + n, [](real value) { return !std::isfinite(value); }) - x);
}

// --- Reading

// Calls use(i) for each i below n, on all threads. Careful: no exception may leave a parallel loop;
// the first is thrown behind it.
void for_each_index(size_t n, auto&& use) {
    std::vector<std::exception_ptr> errors(n);
#pragma omp parallel for schedule(dynamic) if (n > 4)
    for (size_t i = 0; i < n; ++i) {
        try {
            use(i);
        } catch (...) {
            errors[i] = std::current_exception();
        }
    }
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}
// Calls use(first, n) for chunks of [0, count), which stay in L2, on all threads.
constexpr size_t kChunk = size_t(1) << 16;
void for_each_chunk(size_t count, auto&& use) {
    for_each_index(ceil_div(count, kChunk),
                   [&](size_t i) { use(i * kChunk, std::min(kChunk, count - i * kChunk)); });
}

// A tensor of a file. One that was found has the bytes [begin, end) of `file`; one to be written,
// fill(out, first, n), which sets out[n] to the elements from `first` on.
struct StoredTensor {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::function<void(float* out, size_t first, size_t n)> fill = nullptr;
    const class SafetensorsFile* file = nullptr;
    size_t begin = 0, end = 0;
    size_t count() const {
        return std::accumulate(shape.begin(), shape.end(), size_t(1), std::multiplies<size_t>());
    }
};

inline std::string shape_text(const std::vector<int64_t>& shape) {
    return shown(Json::array(shape).write());
}

// A safetensors file. The constructor reads and checks the header.
class SafetensorsFile : public InputFile {
public:
    std::vector<StoredTensor> tensors;  // in the order of their bytes

    explicit SafetensorsFile(const std::string& path) : InputFile(path) { read_header(); }
    SafetensorsFile(const SafetensorsFile&) = delete;  // its tensors point to it

    // Sets out[tensor.count()]. Refuses NaN, infinities, and what is too large for `real`.
    template <class real>
    void read(const StoredTensor& tensor, real* out) const {
        if (tensor.dtype == "F64") return read_as<double>(tensor, out);
        if (tensor.dtype == "F32") return read_as<float>(tensor, out);
        if (tensor.dtype == "F16") return read_as<f16>(tensor, out);
        if (tensor.dtype == "BF16") return read_as<bf16>(tensor, out);
        fail(about(tensor), "expected type F32, BF16, F16 or F64, found ", tensor.dtype);
    }
    // How a message about a tensor begins.
    std::string about(const StoredTensor& tensor) const {
        return path + ": tensor " + shown(tensor.name) + ": ";
    }

private:
    template <class Stored, class real>
    void read_as(const StoredTensor& tensor, real* out) const {
        for_each_chunk(tensor.count(), [&](size_t first, size_t n) {
            const size_t offset = tensor.begin + first * sizeof(Stored);
            if constexpr (std::is_same_v<Stored, real>) {
                read_bytes(out + first, n * sizeof(Stored), offset);
            } else {
                Stored chunk[kChunk];
                read_bytes(chunk, n * sizeof(Stored), offset);
                for (size_t i = 0; i < n; ++i) out[first + i] = real(float(chunk[i]));
            }
            const size_t bad = first + first_not_finite(out + first, n);
            if (bad < first + n)
                fail(about(tensor), std::isnan(out[bad]) ? "NaN" : "infinity", " in element ", bad,
                     ": these weights are broken");
        });
    }

    void read_header() {
        size_t N = 0;
        if (bytes < 8) fail(path, ": a safetensors file has at least 10 bytes, found ", bytes);
        std::string begin(std::min<size_t>(bytes, 64), ' ');
        read_bytes(begin.data(), begin.size(), 0);
        std::memcpy(&N, begin.data(), 8);
        if (N > bytes - 8)
            fail(path, ": header of ", N, " bytes in a file of ", bytes, ": ",
                 *other_form(begin) ? to_text("no safetensors file, but ", other_form(begin))
                                    : "cut short, or no safetensors file; fetch or copy it again");
        // Why: a header of GPT-2 has about 110 bytes a tensor; parsing 100 MB would take seconds.
        if (N > 4'000'000) fail(path, ": header of ", N, " bytes: a GPT-2 needs less than 4000000");
        std::string header(N, '\0');
        read_bytes(header.data(), N, 8);
        if (!header.starts_with('{')) fail(path, ": the header must begin with '{'");
        const Json json = Json::parse(header, path + ": header");
        for (auto& [name, value] : json.members)
            if (name != "__metadata__") tensors.push_back(parse_tensor(name, value, 8 + N));

        // Each tensor begins where the one before it ends. Why so strict: a million tensors could
        // share the same bytes and ask for a million times the file's size in memory.
        std::stable_sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) {
            return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
        });
        size_t at = 8 + N;
        for (const StoredTensor& tensor : tensors) {
            if (tensor.begin != at)
                fail(about(tensor), "its bytes begin at byte ", tensor.begin,
                     " of the file, those before it end at ", at);
            at = tensor.end;
        }
        if (at != bytes)
            fail(path, ": the header describes ", at, " bytes, the file has ", bytes,
                 ": it is cut short or too long; fetch it again");
    }
    // One member of the header; offsets count from byte `data` of the file:
    //     "h.0.ln_1.bias": {"dtype": "F32", "shape": [768], "data_offsets": [0, 3072]}
    StoredTensor parse_tensor(const std::string& name, const Json& value, size_t data) const {
        StoredTensor tensor{name, "", {}, nullptr, this};
        const std::string where = path + ": tensor " + shown(name);
        tensor.dtype = value.get_string("dtype", where);
        tensor.shape = parse_sizes(value, "shape", where);
        const std::vector<int64_t> offsets = parse_sizes(value, "data_offsets", where);
        if (value.members.size() != 3)
            fail(where, ": unknown key beside dtype, shape and data_offsets");
        if (offsets.size() != 2) fail(where, ": data_offsets must be two integers");
        // Why double: in 64 bits 2^32 * 2^32 is 0, so a huge tensor would pass.
        double size = double(dtype_bytes(tensor.dtype));
        if (size == 0) fail(where, ": unknown dtype ", shown(tensor.dtype));
        for (int64_t n : tensor.shape) size *= double(n);
        if (size != double(offsets[1] - offsets[0]))
            fail(where, ": shape ", shape_text(tensor.shape), " of ", tensor.dtype, " takes ",
                 format("%.0f", size), " bytes, data_offsets are ", shape_text(offsets));
        tensor.begin = data + size_t(offsets[0]), tensor.end = data + size_t(offsets[1]);
        return tensor;
    }
    // A member that is an array of sizes. Why 2^53: some readers use doubles.
    static std::vector<int64_t> parse_sizes(const Json& tensor, const char* key,
                                            const std::string& where) {
        std::vector<int64_t> sizes;
        for (auto& [name, item] : tensor.get(key, Json::Kind::array, where).members) {
            sizes.push_back(item.as<int64_t>().value_or(-1));
            if (sizes.back() < 0 || sizes.back() > int64_t(1) << 53)
                fail(where, ": ", key, " must be integers from 0 to 2^53");
        }
        return sizes;
    }
};

// --- Writing

// The first 8 + N bytes of a file of these tensors, in F32, in this order.
inline std::string safetensors_header(const std::vector<StoredTensor>& tensors) {
    Json header = Json::object();
    header.set("__metadata__", Json::object().set("format", "pt"));
    size_t at = 0;
    for (const StoredTensor& tensor : tensors) {
        const size_t end = at + 4 * tensor.count();
        Json entry = Json::object();
        entry.set("dtype", "F32").set("shape", Json::array(tensor.shape));
        entry.set("data_offsets", Json::array(std::vector{at, end}));
        header.members.emplace_back(tensor.name, std::move(entry));
        at = end;
    }
    std::string json = header.write(), length(8, '\0');
    json.append((8 - json.size() % 8) % 8, ' ');  // the data begins at a multiple of 8
    const size_t N = json.size();
    std::memcpy(length.data(), &N, 8);
    return length + json;
}

// Writes the file, whole or not at all, sorted by name: the same weights make the same file.
// Refuses NaN and infinities.
inline void write_safetensors(const std::string& path, std::vector<StoredTensor> tensors) {
    std::sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) { return a.name < b.name; });
    FileWriter file(path);
    const std::string header = safetensors_header(tensors);
    file.write(header.data(), header.size());
    std::vector<float> buffer(size_t(1) << 18);
    for (const StoredTensor& tensor : tensors)
        for (size_t first = 0, n, count = tensor.count(); first < count; first += n) {
            n = std::min(count - first, buffer.size());
            tensor.fill(buffer.data(), first, n);
            if (first_not_finite(buffer.data(), n) < n)
                fail(path, ": not written: NaN or infinity in tensor ", shown(tensor.name));
            file.write(buffer.data(), 4 * n);
        }
    file.commit();
}

// --- GPT-2's names
// The list of tensors (§3) has Hugging Face's names. Files name them in several ways:
//
//     transformer.h.0.ln_1.weight           as transformers saves a language model, and as we do
//     h.0.ln_1.weight                       as OpenAI's own checkpoint has it
//     module.transformer.h.0.ln_1.weight    of a model that was wrapped when it was saved
//     h.0.attn.bias                         the causal mask, in older files: a constant, ignored
//     lm_head.weight                        the head; a tied one is wte once more
//     score.weight                          the head of another task, passed over

inline std::string name_in_checkpoint(const std::string& name) {
    return name == "lm_head.weight" ? name : "transformer." + name;
}
inline std::string_view bare_name(std::string_view name) {
    for (const std::string_view part : {"module.", "_orig_mod.", "model.", "transformer."})
        if (name.starts_with(part)) return bare_name(name.substr(part.size()));
    return name;
}
inline bool is_other_head(const StoredTensor& tensor) {
    const std::string_view name = bare_name(tensor.name);
    for (const char* head :
         {"score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head."})
        if (name.starts_with(head)) return true;
    return false;
}

// Finds every tensor of the list in the files; result[i] belongs to expected[i]. Refuses missing,
// extra and misshapen ones. The lm_head.weight of a tied model is put at the end.
inline std::vector<const StoredTensor*> match_tensors(const std::deque<SafetensorsFile>& files,
                                                      const std::vector<TensorInfo>& expected) {
    std::map<std::string_view, size_t> index;
    for (size_t i = 0; i < expected.size(); ++i) index[bare_name(expected[i].name)] = i;
    std::vector<const StoredTensor*> found(expected.size(), nullptr);
    auto match = [&](const StoredTensor& tensor) {
        const std::string about = tensor.file->about(tensor);
        const std::string_view name = bare_name(tensor.name);
        const bool spare_head = name == "lm_head.weight" && !index.count(name);
        const bool mask = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
        if (mask || is_other_head(tensor)) return;
        const auto entry = index.find(spare_head ? "wte.weight" : name);
        if (entry == index.end())
            fail(about, "unexpected: the model of config.json has no such tensor");
        const TensorInfo& wanted = expected[entry->second];
        if (tensor.shape != wanted.shape)
            fail(about, "expected shape ", shape_text(wanted.shape), ", found ",
                 shape_text(tensor.shape));
        if (spare_head)
            found.push_back(&tensor);
        else if (std::exchange(found[entry->second], &tensor))
            fail(about, "there twice");
    };
    for (const SafetensorsFile& file : files)
        for (const StoredTensor& tensor : file.tensors) match(tensor);
    for (size_t i = 0; i < expected.size(); ++i)
        if (!found[i])
            fail(files.front().path, ": tensor ", shown(bare_name(expected[i].name)),
                 " is missing: expected shape ", shape_text(expected[i].shape));
    return found;
}

// The files of a folder's weights: model.safetensors, or several (shards) and which has what:
//     model.safetensors.index.json    {"metadata": {...}, "weight_map":
//                                         {"wte.weight": "model-00001-of-00002.safetensors", ...}}
inline std::deque<SafetensorsFile> open_weights(const std::string& folder) {
    const std::string path = folder + "/model.safetensors", index = path + ".index.json";
    std::set<std::string> names;
    if (file_exists(path)) {
        names.insert("model.safetensors");
    } else if (file_exists(index)) {
        const Json json = Json::parse(read_text(index, 4'000'000), index);
        for (auto& [tensor, shard] : json.get("weight_map", Json::Kind::object, index).members)
            names.insert(shard.text);
    }
    std::deque<SafetensorsFile> files;
    for (const std::string& name : names) {
        if (!file_exists(folder + "/" + name))
            fail(index, " names the file ", shown(name), ", which is missing: fetch it too");
        files.emplace_back(folder + "/" + name);
    }
    if (files.empty())
        fail(folder, ": expected model.safetensors, found no such file. Save a model of another ",
             "form with transformers: save_pretrained(folder)");
    return files;
}

// --- config.json
//     {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024,
//      "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, ...}
// "gelu" is the exact GELU; the tanh form (§4.6), which has five names, differs by up to 0.0005.

// Reads GPT-2's config.json. Refuses, by name, what this model does not do. What does not change
// the numbers is ignored, and so is dropout, the run's choice.
inline Config read_hf_config(const std::string& path) {
    const Json json = Json::parse(read_text(path, 1'000'000), path);
    json.only(path, "model_type", {"gpt2"}, "only \"gpt2\" is supported");
    Config model;
    for (const SizeLimit& limit : kSizes) {
        const char* key = json.find(limit.name) || !json.find(limit.also) ? limit.name : limit.also;
        model.*limit.size = int(json.get_int(key, path, 1, limit.most));
    }
    if (model.n_embd % model.n_head != 0)
        fail(path, ": \"n_head\" ", model.n_head, " does not divide \"n_embd\" ", model.n_embd);
    json.only(path, "n_inner", {nullptr, 4 * model.n_embd}, "only null or 4 n_embd is supported");
    json.only(path, "n_ctx", {model.n_positions}, "it must equal n_positions");
    json.only(path, "activation_function",
              {"gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"},
              "only the tanh GELU (\"gelu_new\") is supported");
    const Json epsilon = json.find("layer_norm_epsilon") ? *json.find("layer_norm_epsilon") : 1e-5;
    model.layer_norm_epsilon = epsilon.as<double>().value_or(0);
    if (!(model.layer_norm_epsilon >= 1e-30 && model.layer_norm_epsilon <= 1))
        fail(path, ": \"layer_norm_epsilon\" must be from 1e-30 to 1, found ", epsilon.write());
    json.only(path, "scale_attn_weights", {true}, "only true is supported");
    for (const char* key : {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
                            "add_cross_attention", "is_encoder_decoder"})
        json.only(path, key, {false}, "only false is supported");
    json.only(path, "quantization_config", {nullptr}, "quantised weights are not supported");
    json.only(path, "pruned_heads", {nullptr, Json::object()}, "pruned heads are not supported");
    json.only(path, "tie_word_embeddings", {true, false}, "must be true or false");
    const Json* tied = json.find("tie_word_embeddings");
    model.untied_head = tied && tied->text == "false";
    return model;
}

// The same file, written. end_of_text: -1 where there is none.
inline Json hf_config(const Config& model, int64_t end_of_text) {
    Json json = Json::object(), end = end_of_text < 0 ? Json() : Json(end_of_text);
    json.set("model_type", "gpt2");
    json.set("architectures", Json::array(std::vector{"GPT2LMHeadModel"}));
    for (const SizeLimit& limit : kSizes) json.set(limit.name, model.*limit.size);
    json.set("n_ctx", model.n_positions).set("n_inner", nullptr);
    json.set("activation_function", "gelu_new").set("scale_attn_weights", true);
    json.set("layer_norm_epsilon", model.layer_norm_epsilon).set("initializer_range", 0.02);
    for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"})
        json.set(key,
                 *number_of<double>(format("%.6g", double(model.dropout))));  // as it was typed
    json.set("tie_word_embeddings", !model.untied_head);
    json.set("bos_token_id", end).set("eos_token_id", end).set("torch_dtype", "float32");
    return json;
}

// All that a folder has beside the weights. tokenizer: null where there is none.
//     config.json              the model's sizes        GPT2LMHeadModel.from_pretrained(folder)
//     generation_config.json   where a text ends        model.generate(...)
//     vocab.json merges.txt    the vocabulary (§13)     GPT2Tokenizer.from_pretrained(folder)
//     tokenizer.json           the same, once more      Tokenizer.from_file(file), of tokenizers
//     tokenizer_config.json    its kind and its limit   AutoTokenizer.from_pretrained(folder)
inline void write_model_description(const std::string& folder, const Config& config,
                                    const Tokenizer* tokenizer) {
    auto put = [&](const char* name, const Json& json) {
        write_file(folder + "/" + name, json.write(2) + "\n");
    };
    const int64_t end = tokenizer ? tokenizer->end_of_text() : -1;
    Json generation = Json::object(), about = Json::object();
    generation.set("_from_model_config", true);
    if (end >= 0) generation.set("bos_token_id", end).set("eos_token_id", end);
    put("config.json", hf_config(config, end)), put("generation_config.json", generation);
    if (!tokenizer) return;
    tokenizer->save(folder);
    about.set("model_max_length", config.n_positions).set("tokenizer_class", "GPT2Tokenizer");
    for (const char* role : {"bos_token", "eos_token", "unk_token"})
        about.set(role, std::string(kEndOfText));
    put("tokenizer_config.json", about);
}

// =================================================================================================
// §15 Checkpoints: a run that is interrupted goes on as if it had not been
// =================================================================================================
// What you have now: a model on disk that any tool can open. A checkpoint also has what resuming
// needs:
//
//   checkpoint-<step>/  model.safetensors  config.json  generation_config.json
//                       vocab.json  merges.txt  tokenizer.json  tokenizer_config.json  (if there
//                       is a tokenizer)
//                       optimizer.safetensors    AdamW's moments, "m." and "v." + the tensor's name
//                       trainer_state.json       everything else, the checksum of every other file,
//                                                and in its last line its own
//
// It is there whole or not at all. A run is a function of its weights, its moments, the step and
// the position in the data: random numbers (§1) and the order of the data (§2) have no state. So a
// resumed run makes the same numbers, to the bit.

// --- The state of a run
// trainer_state.json:
//     {"planned_steps": 1500, "step": 1500, "samples": 12000, ..., "val_loss": 0.471601092630086,
//      "options": {"seed": "1337", "batch-size": "8", ...},        what --resume compares
//      "data": ["train_000001.bin: 1293045 tokens, 313425166c112c9d", ...],
//      "checksums": {"config.json": "6dd9eb60222ef55e", ...},
//      "own_checksum": "96d1f042752586eb"}

// What a run is, apart from weights and moments.
struct TrainerState {
    int64_t planned_steps = 0;  // N; 0: not known yet
    int64_t step = 0;           // updates tried: the next step is this one, counted from 0
    int64_t samples = 0;        // rows of text read: the data's position, and so its order
    double seconds = 0;         // of training so far, evaluation and saving not counted
    double best_loss = std::numeric_limits<double>::infinity();
    int64_t best_step = -1, stale_evals = 0;  // evaluations since the best one
    double epoch_loss = 0;                    // sum over the steps of this epoch so far
    int64_t epoch_steps = 0;
    double val_loss = NAN, train_loss = NAN;  // the last measured
    bool finished = false;
    StepState guards;                  // counts and windows of §7
    std::string program;               // train_gpt or train_gpt_cu
    Json options{Json::Kind::object};  // those that change the numbers: names and values
    Json data{Json::Kind::array};      // what the shards are recognised by, a text each
};

// The one list of trainer_state.json: calls visit(name, field), with the least value of a whole
// number where that is not 0.
template <class Visit>
void for_each_field(TrainerState& s, Visit& visit) {
    visit("planned_steps", s.planned_steps), visit("step", s.step), visit("samples", s.samples);
    visit("best_step", s.best_step, -1), visit("stale_evals", s.stale_evals);
    visit("epoch_steps", s.epoch_steps), visit("updates", s.guards.updates);
    visit("skipped", s.guards.skipped), visit("outliers", s.guards.outliers);
    visit("seen", s.guards.seen), visit("seconds", s.seconds), visit("best_loss", s.best_loss);
    visit("epoch_loss", s.epoch_loss), visit("val_loss", s.val_loss);
    visit("train_loss", s.train_loss), visit("finished", s.finished), visit("program", s.program);
    visit("losses", s.guards.losses), visit("norms", s.guards.norms);
    visit("options", s.options), visit("data", s.data);
}

inline Json state_to_json(TrainerState state) {
    Json json = Json::object();
    auto put = [&](const char* name, const auto& field, int64_t = 0) { json.set(name, field); };
    for_each_field(state, put);
    return json;
}
// A missing member is an error, but a double may be missing or null (NaN or infinity): then it
// stays as in a fresh state.
inline TrainerState state_from_json(const Json& json, const std::string& where) {
    TrainerState state;
    auto take = [&]<class Field>(const char* name, Field& field, int64_t lowest = 0) {
        if constexpr (std::is_same_v<Field, int64_t>) {
            field = json.get_int(name, where, lowest);
        } else if constexpr (std::is_same_v<Field, double>) {
            if (const Json* value = json.find(name)) field = value->as<double>().value_or(field);
        } else if constexpr (std::is_same_v<Field, bool>) {
            field = json.get(name, Json::Kind::boolean, where).text == "true";
        } else if constexpr (std::is_same_v<Field, std::string>) {
            field = json.get_string(name, where);
        } else if constexpr (std::is_same_v<Field, Json>) {
            field = json.get(name, field.kind, where);
        } else {
            const auto& list = json.get(name, Json::Kind::array, where).members;
            if (list.size() != std::size(field))
                fail(where, ": \"", name, "\" must have ", std::size(field), " numbers");
            for (size_t i = 0; i < list.size(); ++i)
                field[i] = list[i].second.as<double>().value_or(0);
        }
    };
    for_each_field(state, take);
    return state;
}

// --- Checksums: nothing that changed on the disk is used unnoticed
//     trainer_state.json
//       "checksums"      every other file of the folder, each as a whole
//       "own_checksum"   every byte of this file up to the line's own comma
//     checked by         --resume: all of it; --init-from, eval and sample: all but the moments

// 16 hexadecimal digits, at the speed of memory; against accidents, not attackers. Four lanes take
// every fourth 8-byte word, mixed:
//     word = word * K;  word ^= word >> 32;  lane = rotate((lane ^ word) * K'),  K and K' odd
//     bytes   0-7  8-15  16-23  24-31  32-39 ...   the last 32 filled up with zeros
//     lane     0     1     2      3      0   ...   then length and lanes become one number
// Each step can be undone, so a change within one word always changes the checksum; other texts
// agree with a chance of about 2^-64. K and K' are those of mix_bits.
inline std::string checksum(std::string_view bytes) {
    uint64_t lanes[4] = {1, 2, 3, 4}, sum = bytes.size();
    auto step = [](uint64_t lane, uint64_t word) {
        word *= 0xbf58476d1ce4e5b9ull;
        return std::rotl((lane ^ word ^ (word >> 32)) * 0x94d049bb133111ebull, 29);
    };
    auto add = [&](size_t at, size_t count) {
        uint64_t words[4] = {};
        std::memcpy(words, bytes.data() + at, count);
        for (int i = 0; i < 4; i++) lanes[i] = step(lanes[i], words[i]);
    };
    const size_t rest = bytes.size() % 32, whole = bytes.size() - rest;
    for (size_t at = 0; at < whole; at += 32) add(at, 32);
    if (rest > 0) add(whole, rest);
    for (uint64_t lane : lanes) sum = step(sum, lane);
    return format("%016llx", (unsigned long long)mix_bits(sum));
}

// A file's: that of the checksums of its chunks, so that all threads can work on it.
inline std::string file_checksum(const std::string& path) {
    const InputFile file(path);
    std::string sums(16 * ceil_div(file.bytes, kChunk), '0');
    for_each_chunk(file.bytes, [&](size_t first, size_t n) {
        char chunk[kChunk];
        file.read_bytes(chunk, n, first);
        checksum({chunk, n}).copy(&sums[16 * (first / kChunk)], 16);
    });
    return checksum(sums);
}

inline std::string state_seal(std::string_view body) {
    return ",\n  \"own_checksum\": \"" + checksum(body) + "\"\n}\n";
}
inline void write_sealed(const std::string& path, const Json& json) {
    std::string body = json.write(2);
    body.resize(body.size() - 2);  // the closing "\n}" is part of the seal
    write_file(path, body + state_seal(body));
}
inline Json read_sealed(const std::string& path) {
    const std::string text = read_file(path, 16'000'000);
    const size_t end = text.size() - std::min(text.size(), state_seal("").size());
    const std::string_view body = std::string_view(text).substr(0, end);
    if (text.substr(end) != state_seal(body))
        fail(path, " is damaged: its checksum does not match");
    return Json::parse(text, path);
}

// Whether a folder has a state of ours: the trainer_state.json of Hugging Face's trainer has a
// "log_history".
inline bool has_checksums(const std::string& folder) {
    const std::string path = folder + "/trainer_state.json";
    return file_exists(path) && read_file(path).find("\"log_history\":") == std::string::npos;
}

// What a checkpoint is for. Only resuming needs its moments.
enum class Purpose { use, resume };

// Verifies every file that a folder's state names (the moments only to resume); returns the state.
inline Json verify_files(const std::string& folder, Purpose purpose) {
    const bool resume = purpose == Purpose::resume;
    const std::string path = folder + "/trainer_state.json";
    const std::string advice =
        resume ? "" : "; if it was changed on purpose, remove trainer_state.json beside it";
    Json state = read_sealed(path);
    for (auto& [name, sum] : state.get("checksums", Json::Kind::object, path).members) {
        const std::string file = folder + "/" + name;
        if (!resume && name == "optimizer.safetensors") continue;
        if (!file_exists(file)) fail(file, " is missing", advice);
        if (file_checksum(file) != sum.text)
            fail(file, " is damaged, or was changed: its checksum does not match", advice);
    }
    return state;
}

// --- Saving

// The tensors of one file of a checkpoint, under their names there, and each one's array: the
// weights, or a moment.
enum class Contents { weights, moments };
template <class Device>
auto arrays_of(Gpt2<Device>& model, Contents contents) {
    std::pair<std::vector<TensorInfo>, std::vector<typename Device::Real*>> list;
    const bool weights = contents == Contents::weights;
    for (size_t i = 0; i < (weights ? 1 : model.moments.size()); ++i)
        for (TensorInfo info : model.layout.tensors) {
            list.second.push_back(weights ? model.masters : model.moments[i]);
            info.name = (weights ? "" : AdamW::kMoments[i]) + name_in_checkpoint(info.name);
            list.first.push_back(std::move(info));
        }
    return list;
}

// Makes the arrays of a checkpoint whole, in their order, where ranks share them out. All ranks
// take part to the end, even where writing fails: hence the destructor.
template <class Device>
struct WholeArrays {
    using Real = typename Device::Real;
    Gpt2<Device>& model;
    std::vector<Real*> arrays;
    size_t made = 0;
    const Real* now = nullptr;
    ~WholeArrays() {
        if (made < arrays.size()) get(arrays.back());
    }
    const Real* get(Real* array) {
        while (made == 0 || arrays[made - 1] != array) now = model.whole(arrays[made++]);
        return now;
    }
};

template <class Device>
void write_arrays(const std::string& path, Gpt2<Device>& model, Contents contents,
                  WholeArrays<Device>& whole) {
    const auto [infos, arrays] = arrays_of(model, contents);
    std::vector<StoredTensor> tensors;
    for (size_t i = 0; i < infos.size(); ++i) {
        auto fill = [&, array = arrays[i], offset = infos[i].offset](float* out, size_t first,
                                                                     size_t n) {
            std::vector<typename Device::Real> host(n);
            model.device.download(host.data(), whole.get(array) + offset + first, n);
            std::copy(host.begin(), host.end(), out);
        };
        tensors.push_back({infos[i].name, "F32", infos[i].shape, fill});
    }
    write_safetensors(path, std::move(tensors));
}

// Renames a folder; removes one that has the new name already.
inline void move_folder(const std::string& from, const std::string& to) {
    if (folder_exists(to)) remove_folder(to);
    rename_path(from, to);
}

// Gives a finished folder its name. An old one is NAME.old meanwhile, and after a kill gets its
// name back. Why: rename replaces a file, but no folder with something in it.
inline void replace_folder(const std::string& temporary, const std::string& folder) {
    const bool replaces = folder_exists(folder);
    if (replaces) move_folder(folder, folder + ".old");
    rename_path(temporary, folder);
    if (replaces) remove_folder(folder + ".old");
}

// Writes the checkpoint `folder`, whole or not at all. Careful: the order. Each step is on the disk
// before the next begins:
//   1  mkdir checkpoint-500.tmp
//   2  each file in it: write, fsync, rename, fsync of the folder (FileWriter)
//   3  read them all again, for their checksums; write the state in the same way
//   4  rename to checkpoint-500, fsync of the folder above
// A kill before 4 leaves checkpoint-500.tmp, which the next run removes.
template <class Device>
void save_checkpoint(Gpt2<Device>& model, const std::string& folder, const Tokenizer* tokenizer,
                     const TrainerState& state, Purpose purpose) {
    WholeArrays<Device> whole{model, {model.masters}};
    if (purpose == Purpose::resume)
        whole.arrays.insert(whole.arrays.end(), model.moments.begin(), model.moments.end());
    if (model.device.ranks->rank != 0) return;
    const std::string temporary = folder + ".tmp";
    if (folder_exists(temporary)) remove_folder(temporary);
    if (::mkdir(temporary.c_str(), 0777) != 0) fail_errno("cannot create folder ", temporary);
    try {
        write_arrays(temporary + "/model.safetensors", model, Contents::weights, whole);
        if (purpose == Purpose::resume)
            write_arrays(temporary + "/optimizer.safetensors", model, Contents::moments, whole);
        write_model_description(temporary, model.config, tokenizer);
        Json sums = Json::object();
        for (const std::string& name : list_folder(temporary))
            sums.set(name, file_checksum(temporary + "/" + name));
        write_sealed(temporary + "/trainer_state.json",
                     state_to_json(state).set("checksums", sums));
    } catch (...) {
        // If that fails too, the first error matters.
        try {
            remove_folder(temporary);
        } catch (const Error&) {}
        throw;
    }
    replace_folder(temporary, folder);
}

// --- Opening

// The model that a Hugging Face folder describes. What is wrong with the folder, but for NaN and
// infinity, is found here, before memory is taken.
inline Config config_of_folder(const std::string& folder) {
    if (!folder_exists(folder)) fail(folder, ": there is no such folder");
    if (has_checksums(folder)) verify_files(folder, Purpose::use);
    const Config config = read_hf_config(folder + "/config.json");
    const std::deque<SafetensorsFile> files = open_weights(folder);
    const std::vector<TensorInfo> expected = layout_of(config).tensors;
    const std::vector<const StoredTensor*> stored = match_tensors(files, expected);
    // wte is the first of the list; behind it stands the head of a tied model.
    for (size_t i = expected.size(); i < stored.size(); ++i) {
        std::vector<float> wte(expected[0].count), head(wte.size());
        stored[0]->file->read(*stored[0], wte.data());
        stored[i]->file->read(*stored[i], head.data());
        if (wte != head)
            fail(stored[i]->file->about(*stored[i]), "differs from wte.weight, but ", folder,
                 "/config.json says that the head is tied: set \"tie_word_embeddings\" to false "
                 "there to use this head, or remove it from the file");
    }
    return config;
}

// Sets the arrays from files, a tensor at a time; rank 0 reads.
template <class Device>
void read_arrays(const std::deque<SafetensorsFile>& files, Gpt2<Device>& model, Contents contents) {
    const bool reads = model.device.ranks->rank == 0;
    const bool in_place = Device::kHostMemory && model.device.ranks->count == 1;
    std::vector<typename Device::Real> copy;  // of a tensor
    const auto [infos, arrays] = arrays_of(model, contents);
    std::vector<const StoredTensor*> stored;
    if (reads) stored = match_tensors(files, infos);
    for (size_t i = 0; i < infos.size(); ++i) {
        const size_t count = infos[i].count, room = infos[i].room, offset = infos[i].offset;
        if (!in_place) copy.resize(room);
        auto* host = in_place ? arrays[i] + offset : copy.data();
        if (reads) stored[i]->file->read(*stored[i], host);
        std::fill(host + count, host + room, 0);  // padding
        model.device.ranks->broadcast(host, room * sizeof *host);
        if (!in_place) model.set(arrays[i], offset, host, room);
    }
}
template <class Device>
void load_weights(Gpt2<Device>& model, const std::string& folder) {
    std::deque<SafetensorsFile> files;
    if (model.device.ranks->rank == 0) files = open_weights(folder);
    read_arrays(files, model, Contents::weights);
    model.round_weights();
}

// --- The checkpoints of a run
//     out/stories/   checkpoint-2000/  checkpoint-2500/   to resume from; --keep says how many
//                    best/                                lowest validation loss so far, no moments
//                    log.csv  samples.txt                 what a run leaves for people
//                    lock                                 held while a run writes here

// The checkpoint after so many steps, "checkpoint-500"; and its step, -1 for any other name.
inline std::string checkpoint_name(int64_t step) { return "checkpoint-" + std::to_string(step); }
inline int64_t step_of_name(const std::string& name) {
    const bool named = name.starts_with("checkpoint-");
    const int64_t step = named ? std::strtoll(name.c_str() + 11, nullptr, 10) : -1;
    return step >= 0 && name == checkpoint_name(step) ? step : -1;
}
inline std::string checkpoint_folder(const std::string& output, int64_t step) {
    return output + "/" + checkpoint_name(step);
}

inline std::vector<int64_t> checkpoint_steps(const std::string& output) {
    std::vector<int64_t> steps;
    if (!folder_exists(output)) return steps;
    for (const std::string& name : list_folder(output))
        if (step_of_name(name) >= 0 && folder_exists(output + "/" + name))
            steps.push_back(step_of_name(name));
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

// Removes all but the newest `keep` checkpoints. Why renamed first: a half-removed one must not be
// taken for a damaged one.
inline void remove_old_checkpoints(const std::string& output, int keep) {
    for (int64_t step : checkpoint_steps(output)) {
        if (keep-- > 0) continue;
        const std::string folder = checkpoint_folder(output, step), gone = folder + ".tmp";
        move_folder(folder, gone);
        remove_folder(gone);
    }
}

// The checkpoints later than `step`: a run that goes on from there makes those steps again, and
// must not take old ones for its newest. Where a run starts (step -1): all, and best/.
inline std::vector<std::string> later_checkpoints(const std::string& output, int64_t step) {
    std::vector<std::string> paths;
    for (int64_t later : checkpoint_steps(output))
        if (later > step) paths.push_back(checkpoint_folder(output, later));
    if (step < 0 && folder_exists(output + "/best")) paths.push_back(output + "/best");
    return paths;
}

// Renames "out/a" to "out/a.set-aside", or "out/a.set-aside-2". Returns both names, for people.
inline std::string set_aside(const std::string& path) {
    std::string name = path + ".set-aside";
    for (int i = 2; mode_of(name) != 0; ++i) name = to_text(path, ".set-aside-", i);
    rename_path(path, name);
    return path + ", as " + name;
}

// =================================================================================================
// §16 Log and terminal: what a run writes and shows
// =================================================================================================
// What you have now: all that trains, and files. This is how a run reports.

// "a", "b" -> "a, b", one item at a time.
inline void join(std::string& list, const char* separator, const std::string& item) {
    list += (list.empty() ? "" : separator) + item;
}

// The text as one word for a shell: in single quotes, where only a single quote is special.
inline std::string shell_word(const std::string& text) {
    auto plain = [](char c) { return std::isalnum(uint8_t(c)) || std::strchr("_-+=:,./@%", c); };
    if (!text.empty() && std::all_of(text.begin(), text.end(), plain)) return text;
    std::string word = "'";
    for (char c : text) word += c == '\'' ? "'\\''" : std::string(1, c);
    return word + "'";
}

// --- The terminal

// The columns of the terminal that fd leads to; in_a_file if it leads to none.
inline size_t columns_of(int fd, size_t in_a_file = SIZE_MAX) {
    winsize window{};
    if (!::isatty(fd)) return in_a_file;
    return ::ioctl(fd, TIOCGWINSZ, &window) == 0 && window.ws_col > 0 ? window.ws_col : 80;
}

// A text in lines of at most `width` columns, broken at blanks. Lines begin at column `indent`, the
// first at `column`. The text may come in parts.
struct WordWrap {
    size_t width, indent = 0, column = 0;
    size_t blanks = 0;  // before the word
    std::string word = "";

    std::string add(std::string_view text) {
        std::string out;
        for (char c : text) {
            if (c != ' ' && c != '\n') {
                word += c;
                continue;
            }
            out += end();
            if (c == '\n') out += '\n', column = blanks = 0;
            if (c == ' ') ++blanks;
        }
        return out;
    }
    std::string end() {
        if (word.empty()) return "";
        const size_t length = characters(word);
        std::string out;
        if (column > indent && length + blanks + column > width) out = "\n", column = blanks = 0;
        blanks += column < indent ? indent - column : 0;
        out += std::string(blanks, ' ') + std::exchange(word, "");
        column += std::exchange(blanks, 0) + length;
        return out;
    }

    // Bytes that do not continue a UTF-8 character.
    static size_t characters(std::string_view text) {
        return size_t(
            std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
    }
};

inline std::string wrapped(const std::string& text, int fd = STDOUT_FILENO, size_t indent = 0,
                           size_t column = 0) {
    WordWrap wrap{columns_of(fd), indent, column};
    std::string lines = wrap.add(text);
    return lines += wrap.end();
}

// The text in a colour (31 red, 33 yellow, 36 cyan), where the terminal has colours and NO_COLOR
// (no-color.org) is not set.
inline std::string coloured(int colour, const std::string& text, int fd = STDOUT_FILENO) {
    const char *no = std::getenv("NO_COLOR"), *kind = std::getenv("TERM");
    const bool plain = !::isatty(fd) || (no && *no) || !kind || std::string_view(kind) == "dumb";
    return plain ? text : format("\033[%dm%s\033[0m", colour, text.c_str());
}

// "warning: " and a text, on standard error.
inline void complain(int colour, const char* label, const std::string& text) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s %s\n", coloured(colour, label, STDERR_FILENO).c_str(),
                 wrapped(text, STDERR_FILENO, 0, std::strlen(label) + 1).c_str());
}
inline void warn(const std::string& message) {
    if (world->rank != 0) return;                    // rank 0 says it
    if (::isatty(STDOUT_FILENO)) std::printf("\n");  // the live line may not have ended
    complain(33, "warning:", message);
}

// A label and a text; its further lines are aligned with the first.
inline void say(const std::string& label, const std::string& text) {
    std::printf("%s %s\n", coloured(36, format("%-10s", label.c_str())).c_str(),
                wrapped(text, STDOUT_FILENO, 11, 11).c_str());
    std::fflush(stdout);
}

inline double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// 1234567 -> "1,234,567"
inline std::string with_commas(int64_t n) {
    std::string digits = std::to_string(n);
    for (size_t at = digits.size(); at > 3;) digits.insert(at -= 3, 1, ',');
    return digits;
}

// "1 file", "2,000 files"
inline std::string counted(int64_t n, const std::string& what) {
    return with_commas(n) + " " + what + (n == 1 ? "" : "s");
}

// --- Files that grow

// Whether the path still leads to the open file or folder.
inline bool leads_to(const std::string& path, const FileHandle& file) {
    struct stat a = {}, b = {};
    return ::fstat(file.fd, &a) == 0 && ::stat(path.c_str(), &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

// A file that grows during a run. On a full disk, its text waits in memory, with one warning.
class GrowingFile {
public:
    explicit GrowingFile(const std::string& path)
        : path_(path), file_(path, O_WRONLY | O_CREAT | O_APPEND) {}
    void append(const std::string& text) {
        waiting_ += text;
        if (!flush() && !std::exchange(warned_, true))
            warn(to_text("cannot write ", path_, ": ", std::strerror(errno),
                         "; what is missing waits in memory"));
    }
    // Fails unless all text is on the disk.
    void sync() {
        if (!flush() || sync_file(file_.fd) != 0) fail_errno("cannot write ", path_);
    }

private:
    bool flush() {
        waiting_.erase(0, write_all(file_.fd, waiting_.data(), waiting_.size()));
        return waiting_.empty();
    }
    std::string path_, waiting_;
    FileHandle file_;
    bool warned_ = false;
};

// --- log.csv: one row a step

// Row 0 is the evaluation before training. Row s has the loss, rate and norm of update s, from
// before it, and the evaluation after it. An empty field was not measured.
struct LogRow {
    std::optional<double> step, epoch, tokens, train_loss, eval_train_loss, val_loss, perplexity;
    std::optional<double> floor, lr, grad_norm, tokens_per_s, mfu, seconds;
    double ranks = 0;  // share of the step that went into other ranks; not in the file
};

// All columns: name, printf pattern, member. Nine digits restore a float exactly.
struct LogColumn {
    const char *name, *pattern;
    std::optional<double> LogRow::*value;
};
constexpr LogColumn kLogColumns[] = {
    {"step", "%.0f", &LogRow::step},
    {"epoch", "%.6g", &LogRow::epoch},  // passes over the training text
    {"tokens", "%.0f", &LogRow::tokens},
    {"train_loss", "%.9g", &LogRow::train_loss},
    {"eval_train_loss", "%.9g", &LogRow::eval_train_loss},  // of --eval-batches
    {"val_loss", "%.9g", &LogRow::val_loss},
    {"perplexity", "%.9g", &LogRow::perplexity},
    {"floor", "%.9g", &LogRow::floor},  // the lowest possible loss, where it is known
    {"lr", "%.9g", &LogRow::lr},        // 0: the update was skipped
    {"grad_norm", "%.9g", &LogRow::grad_norm},
    {"tokens_per_s", "%.1f", &LogRow::tokens_per_s},
    {"mfu", "%.4f", &LogRow::mfu},  // share of the machine's peak
    {"seconds", "%.3f", &LogRow::seconds},
};

// Why "nan": printf writes some as "-nan".
inline std::string log_line(const LogRow& row) {
    std::string line;
    for (const LogColumn& column : kLogColumns) {
        const std::optional<double>& value = row.*column.value;
        if (value) line += std::isnan(*value) ? "nan" : format(column.pattern, *value);
        line += ",";
    }
    line.back() = '\n';
    return line;
}
// The same as JSON, for --log-json: {"step": 3, "train_loss": 4.1}. JSON has no NaN or infinity.
inline std::string json_line(const LogRow& row) {
    std::string line;
    for (const LogColumn& column : kLogColumns)
        if (const auto& value = row.*column.value)
            join(line, ", ",
                 to_text("\"", column.name,
                         "\": ", std::isfinite(*value) ? format(column.pattern, *value) : "null"));
    return "{" + line + "}\n";
}
inline std::string log_text(const std::vector<LogRow>& rows) {
    std::string text;
    for (const LogColumn& column : kLogColumns) join(text, ",", column.name);
    text += "\n";
    for (const LogRow& row : rows) text += log_line(row);
    return text;
}
// The rows up to step `last`, without damaged lines and half a line that a crash left at the end.
inline std::vector<LogRow> read_log(const std::string& path, int64_t last) {
    const DotForDecimals dot;
    std::vector<LogRow> rows;
    const std::string text = text_if_any(path);
    double before = -1;
    for (const std::string& line : split_at(text.substr(0, text.rfind('\n') + 1), '\n')) {
        const std::vector<std::string> fields = split_at(line, ',');
        if (fields.size() != std::size(kLogColumns)) continue;
        LogRow row;
        for (size_t i = 0; i < fields.size(); ++i) {
            if (fields[i].empty()) continue;
            char* end = nullptr;
            row.*kLogColumns[i].value = std::strtod(fields[i].c_str(), &end);
            if (*end) row.step.reset();
        }
        if (!(row.step > before && row.step <= double(last))) continue;
        before = *row.step;
        rows.push_back(row);
    }
    return rows;
}

// Steps of a run that has no such limit: more than any run makes.
constexpr int64_t kNoLimit = 1'000'000'000'000;

// --- Ctrl-C

// When the run was asked to stop, in nanoseconds of the steady clock; 0: not.
inline std::atomic<int64_t> stop_asked{0};
static_assert(std::atomic<int64_t>::is_always_lock_free, "a signal handler must not wait");

// =================================================================================================
// §17 The training loop
// =================================================================================================
// What you have now: a step (§8), an evaluation (§9), checkpoints (§15) and a log (§16).
// Trainer::run is the loop. What it calls stands below it, in the order of the calls.
//
// What to watch of the live line, and at evaluations:
//   loss         in nats a token; e^loss is the perplexity: among so many tokens it hesitates
//   norm         of the gradient; a jump: a batch, or the learning rate, throws the weights off
//   MFU          the share of the machine's peak that went into the model; half is good
//   val          the loss of text that training never reads
//   eval train   of the same few training batches; what val is above it, the model knows by heart
//
// A run ends at max_steps, epochs or max_minutes, whichever comes first; 0: no such limit.
// Intervals are in steps; 0: never.
struct RunOptions {
    std::string output;  // the run's folder
    int64_t seed = 1337;

    int batch_size = 8, grad_accum_steps = 1;
    bool shuffle = true, overfit_batch = false;

    int64_t max_steps = 2500;
    double epochs = 0, max_minutes = 0;

    LearningRate rate = {.peak = 2e-3, .warmup = 100};  // the run sets its steps
    std::string schedule = "cosine";                    // a word of schedule_named (§7)
    AdamW adamw;
    Guards guards;

    int64_t eval_interval = 250, eval_batches = 10, sample_interval = 1000;
    int64_t eval_tokens = 1 << 20;  // of the validation text, in an evaluation; 0: all
    int64_t tensor_stats_interval = 0, patience = 0, save_interval = 500;
    int keep = 2;          // newest checkpoints
    std::string prompt;    // of samples
    std::string log_json;  // the log's second file; empty: none

    std::string on_nan = "stop";  // or "skip"
};

// --- What a run learns from

// A data folder, or shards that were named.
struct Corpus {
    std::string folder;                  // empty where shards were named
    Shards train, val;                   // either may have no files
    std::optional<Tokenizer> tokenizer;  // none: tokens are shown as numbers
    double floor = NAN;                  // the lowest possible loss; NaN: not known

    explicit Corpus(const std::string& train_glob = "", const std::string& val_glob = "")
        : train(train_glob), val(val_glob) {}

    int end_of_text() const { return tokenizer ? tokenizer->end_of_text() : -1; }
    // For evaluation_windows (§9). Why: the floor is that of documents read from their start.
    int document_start() const { return std::isfinite(floor) ? end_of_text() : -1; }
};

// Without a tokenizer, the token's number; <number> for a token that only the model has.
inline std::string text_of_token(const std::optional<Tokenizer>& tokenizer, int token) {
    if (!tokenizer) return std::to_string(token) + " ";
    if (token >= tokenizer->vocab_size()) return "<" + std::to_string(token) + ">";
    return std::string(tokenizer->bytes_of(token));
}

// Without a tokenizer, the text must be numbers below vocab_size.
inline std::vector<int32_t> prompt_tokens(const std::string& text,
                                          const std::optional<Tokenizer>& tokenizer,
                                          int vocab_size) {
    std::vector<int32_t> tokens;
    if (tokenizer) {
        for (uint16_t token : tokenizer->encode(text)) tokens.push_back(token);
        return tokens;
    }
    for (const std::string& word : split_at(text, ' ')) {
        if (word.empty()) continue;
        const std::optional<int32_t> id = number_of<int32_t>(word);
        if (!id || *id < 0 || *id >= vocab_size)
            fail_usage("there is no tokenizer: give the prompt as token numbers below ", vocab_size,
                       ", not ", shown(word));
        tokens.push_back(*id);
    }
    return tokens;
}

// The training text that evaluations score: at most so many batches, the same for every seed.
inline std::vector<Window> fixed_windows(const DataOrder& order, int64_t batches) {
    const DataOrder fixed{order.shards, order.B, order.T, 0, true, order.overfit_batch};
    std::vector<Window> windows;
    batches = std::min(batches, ceil_div(fixed.blocks_per_epoch(), fixed.B));
    for (int64_t i = 0; i < batches * fixed.B; ++i) windows.push_back(fixed.window(i));
    return windows;
}

// Operations of a training step per token: 2 for every weight in forward, 4 in backward; for
// attention's scores and sums 2 C each, at (T+1)/2 positions on average, and twice as much in
// backward.
inline double flops_per_token(const Config& config, int T) {
    const double C = config.n_embd, L = config.n_layer, V = config.vocab_size;
    return 6 * (12 * C * C * L + V * C) + 6 * C * (T + 1.0) * L;
}

// --- The run

// With --on-nan skip, this many broken steps in a row end a run.
constexpr int64_t kMostBroken = 100;

// Why a run ended; none: it goes on.
enum class End { none, finished, out_of_time, plateau, interrupted };

// Where a run begins.
struct Start {
    std::string folder;  // the checkpoint's; empty: from scratch
    TrainerState state;
};

// What a run tells while it goes on.
template <class Device>
struct Observer {
    virtual ~Observer() = default;
    // The row of a step; keep: it matters (it has an evaluation, say).
    virtual void step(const LogRow&, int64_t /*steps*/, double /*seconds_left*/, bool /*keep*/) {}
    // Tokens scored of all in an evaluation, from 0 to all.
    virtual void evaluating(int64_t /*done*/, int64_t /*all*/) {}
    virtual void sample(const std::string& /*title*/, const std::string& /*text*/) {}
    // With --tensor-stats-interval, the weights before the step, and the model after it.
    virtual void tensors(Gpt2<Device>&, const std::vector<typename Device::Real>& /*before*/,
                         int64_t /*step*/) {}
};

// One run. It writes into options.output, which no other run may use. Divergence, or a disk that
// fails, ends it with an Error; a full disk only at its end.
template <class Device>
class Trainer {
public:
    // The model must be reserved for batch_size x T, with the weights and moments to begin with.
    // peak_flops: what products could reach on a rank; 0: no MFU. All ranks run the same loop; rank
    // 0 writes.
    Trainer(const RunOptions& options, const Corpus& corpus, Gpt2<Device>& model, double peak_flops,
            Observer<Device>& observer)
        : o_(options), corpus_(corpus), model_(model), observer_(observer),
          order_(DataOrder{corpus.train, o_.batch_size, model.T, uint64_t(o_.seed), o_.shuffle,
                           o_.overfit_batch}),
          val_windows_(
              evaluation_windows(corpus.val, model.T, corpus.document_start(), o_.eval_tokens)),
          train_windows_(fixed_windows(order_, o_.eval_batches)),
          peak_flops_(peak_flops * ranks_.count) {}

    // Trains to the end, and evaluates there unless Ctrl-C ends it.
    End run(const Start& start) {
        std::optional<LogRow> row = begin(start);
        End end = state_.step < state_.planned_steps ? End::none : End::finished;
        if (row) end = finish(*row);
        while (end == End::none) {
            row = one_step();
            check_broken(*row);
            end = finish(*row);
        }
        return end;
    }
    const TrainerState& state() const { return state_; }
    // What this rank spent on the others in its steps, and sent after the first one, which had no
    // weights to gather.
    double ranks_seconds = 0, ranks_bytes = 0, ranks_steps = 0;

    // Some text of the model's own, also appended to samples.txt. It begins with the prompt, or
    // where a document does. Why the run's seed: samples differ by what was learned.
    std::string write_sample(const std::string& title, int count) {
        std::string text;
        try {
            auto tokens = prompt_tokens(o_.prompt, corpus_.tokenizer, model_.config.vocab_size);
            const int end_of_text = corpus_.end_of_text();
            std::string bytes;
            auto add = [&](int token) {
                return bytes += text_of_token(corpus_.tokenizer, token), true;
            };
            for (int token : tokens) add(token);
            if (end_of_text >= 0) tokens.insert(tokens.begin(), end_of_text);
            if (tokens.empty()) tokens.push_back(0);
            SampleOptions s;
            s.max_new_tokens = count, s.seed = o_.seed;
            s.end_of_text = end_of_text, s.vocab_size = end_of_text + 1;
            generate(model_, tokens, s, add);
            text = take_characters(bytes, true);
            if (!samples_) samples_.emplace(o_.output + "/samples.txt");
            samples_->append("=== " + title + "\n" + text + "\n\n");
        } catch (const Error& error) {  // do not end the run for a sample
            warn(to_text("the sample at step ", state_.step, " failed: ", error.what()));
        }
        return text;
    }

private:
    // Plans the run. Returns the row to finish first, if any: row 0 of a new run, or the one whose
    // evaluation was interrupted. Why a row 0: a new model's loss is log V; another one shows a
    // mistake early.
    std::optional<LogRow> begin(const Start& start) {
        const bool resumed = !start.folder.empty(), first = ranks_.rank == 0;
        state_ = start.state;
        if (state_.planned_steps == 0) state_.planned_steps = planned_steps();
        plan_by_clock();
        model_.device.upload(model_.state, &state_.guards, 1);
        if (first) {  // it alone writes
            folder_.emplace(::open(o_.output.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
            for (const auto& path : later_checkpoints(o_.output, resumed ? state_.step : -1))
                say("set aside", set_aside(path));
        }
        const std::string tokens = with_commas(rows_per_step() * model_.T) + " tokens";
        const double passes = epochs(state_.planned_steps * rows_per_step());
        say("run", (by_clock() ? to_text(o_.max_minutes, " min, in steps of ", tokens)
                               : with_commas(state_.planned_steps) + " steps of " + tokens +
                                     format(" (%.2f epochs)", passes)) +
                       " into " + o_.output + "\n");
        return resumed ? reopen_log(start) : row_now();
    }

    // Reads the log up to the checkpoint. Returns its last row where that is not finished.
    std::optional<LogRow> reopen_log(const Start& start) {
        LogRow last;
        bool unfinished = false;
        if (ranks_.rank == 0) {
            const std::string path = parent_folder(start.folder) + "/log.csv";
            rows_ = read_log(path, state_.step);
            if (int64_t(rows_.size()) != state_.step + 1)
                warn(to_text(path, " has ", rows_.size(), " of the ", state_.step + 1,
                             " rows up to step ", state_.step));
            for (size_t i = rows_.size(); i-- > 0 && is_broken(rows_[i]);) ++broken_in_a_row_;
            if (!rows_.empty()) last = rows_.back();
            unfinished = last.step == state_.step && wants_evaluation() && !last.val_loss &&
                         !last.eval_train_loss;
            unfinished ? rows_.pop_back() : open_log();
        }
        ranks_.broadcast(&broken_in_a_row_, sizeof broken_in_a_row_);
        ranks_.broadcast(&unfinished, sizeof unfinished);
        return unfinished ? std::optional(last) : std::nullopt;
    }

    // The rows so far replace the files of the log: never append to half a row.
    void open_log() {
        const std::string csv = o_.output + "/log.csv", &json = o_.log_json;
        std::string lines;
        for (const LogRow& row : rows_) lines += json_line(row);
        if (!json.empty()) write_file(json, lines), log_json_.emplace(json);
        write_file(csv, log_text(rows_)), log_.emplace(csv);
    }
    void add_to_log(const LogRow& row) {
        if (log_) log_->append(log_line(row));
        if (log_json_) log_json_->append(json_line(row));
    }

    // The fewer of max_steps and epochs.
    int64_t planned_steps() const {
        const int64_t steps = o_.max_steps > 0 ? o_.max_steps : kNoLimit;
        if (o_.epochs <= 0) return steps;
        const double rows = o_.epochs * double(order_.blocks_per_epoch());
        const double wanted = std::ceil(rows / double(rows_per_step()) - 1e-9);
        return std::min(steps, int64_t(std::clamp(wanted, 1.0, double(kNoLimit))));
    }
    bool by_clock() const { return o_.max_steps == 0 && o_.epochs <= 0 && o_.max_minutes > 0; }

    // Where only max_minutes is set, plans what fits into it at the speed so far, so the learning
    // rate has fallen when the time is up. Why not for every small difference: every plan makes a
    // GPU record its graph again.
    void plan_by_clock() {
        if (!by_clock() || state_.seconds <= 0) return;
        const double left = std::max(0.0, o_.max_minutes * 60 - state_.seconds);
        const double fit = std::min(left * double(state_.step) / state_.seconds, double(kNoLimit));
        if (std::abs(double(state_.planned_steps - state_.step) - fit) > 0.5 + fit / 32)
            state_.planned_steps =
                state_.step + std::max(int64_t(ahead_), int64_t(std::lround(fit)));
    }

    // --- The step

    double epochs(int64_t rows) const { return double(rows) / double(order_.blocks_per_epoch()); }
    // Rows of text of an update; and micro-batches of this rank.
    int64_t rows_per_step() const { return int64_t(o_.batch_size) * o_.grad_accum_steps; }
    int64_t micro_batches() const { return o_.grad_accum_steps / ranks_.count; }
    // Whether something of that interval is due after step `step`.
    static bool due(int64_t interval, int64_t step) {
        return interval > 0 && step > 0 && step % interval == 0;
    }
    // Why not the clock: the minutes before a resume count too.
    bool time_is_up() const { return o_.max_minutes > 0 && state_.seconds > o_.max_minutes * 60; }
    bool wants_evaluation() const {
        const bool last = state_.step == state_.planned_steps || (time_is_up() && !ahead_);
        return o_.eval_interval > 0 && !(val_windows_.empty() && train_windows_.empty()) &&
               (state_.step == 0 || last || due(o_.eval_interval, state_.step));
    }

    LogRow row_now() const {
        LogRow row;
        row.step = state_.step, row.epoch = epochs(state_.samples);
        row.tokens = state_.samples * model_.T, row.seconds = state_.seconds;
        return row;
    }

    // Whether the model is needed as the next step leaves it, or the run may end there. If so, the
    // device must not get the step after it yet.
    bool next_is_waited_for() const {
        const int64_t step = state_.step + 1, samples = state_.samples + rows_per_step();
        for (int64_t interval :
             {o_.eval_interval, o_.save_interval, o_.sample_interval, o_.tensor_stats_interval})
            if (due(interval, step)) return true;
        return due(o_.tensor_stats_interval, step + 1) || step >= state_.planned_steps ||
               order_.epoch(samples) > order_.epoch(state_.samples) || stops_ || time_is_up();
    }

    // Reads this rank's micro-batches of the step that begins at that sample, on another thread (as
    // Python's executor.submit); get() waits for them.
    void read_ahead(int64_t first) {
        batches_ = std::async(std::launch::async, [this, first] {
            std::vector<Batch> batches;
            for (int64_t i = 0, n = micro_batches(); i < n; ++i)
                batches.push_back(order_.batch(first + (ranks_.rank * n + i) * order_.B,
                                               model_.config.vocab_size));
            return batches;
        });
    }

    // Starts step s on the device, with text that was read during the step before.
    void queue_step(int64_t s) {
        const int64_t rows = rows_per_step(), first = state_.samples + (s - state_.step) * rows;
        if (!batches_.valid()) read_ahead(first);
        const std::vector<Batch> batches = batches_.get();
        read_ahead(first + rows);
        StepShare share{size_t(ranks_.rank * micro_batches()), size_t(o_.grad_accum_steps)};
        for (int64_t i = 0; i < rows; ++i) share.scored += order_.window(first + i).count;
        StepOptions options{uint64_t(o_.seed), o_.rate, o_.adamw, o_.guards};
        options.rate.schedule = schedule_named(o_.schedule);
        options.rate.steps = state_.planned_steps;
        if (!ahead_) began_ = now_seconds();
        train_step(model_, batches, options, s, share);
        model_.device.post(model_.state);
    }

    // Makes one update; returns its row. A GPU gets the step after it before the host waits for
    // this one's numbers. MFU: model FLOPs utilisation (Chowdhery et al. 2022).
    LogRow one_step() {
        const bool wants_stats = due(o_.tensor_stats_interval, state_.step + 1);
        std::vector<typename Device::Real> before;
        if (wants_stats) before = model_.get_weights();
        const double seconds_before = ranks_.seconds, bytes_before = ranks_.bytes;
        if (!ahead_) queue_step(state_.step);
        ahead_ = Device::kStepsBehind > 0 && !next_is_waited_for();
        if (ahead_) queue_step(state_.step + 1);
        state_.guards = model_.device.fetch(model_.state);
        const double waited = ranks_.seconds - seconds_before;
        ranks_seconds += waited;
        if (++ranks_steps > 1) ranks_bytes += ranks_.bytes - bytes_before;
        const double now = now_seconds();
        double seconds = now - std::exchange(began_, now);
        ranks_.broadcast(&seconds, sizeof seconds);  // one clock for all
        const StepState& done = state_.guards;
        ++state_.step, state_.samples += rows_per_step(), state_.seconds += seconds;
        state_.train_loss = done.loss;
        if (!done.broken) state_.epoch_loss += done.loss, ++state_.epoch_steps;
        plan_by_clock();

        LogRow row = row_now();
        row.train_loss = done.loss, row.grad_norm = done.grad_norm;
        row.lr = done.skip ? 0 : done.lr;
        row.ranks = seconds > 0 ? waited / seconds : 0;
        if (seconds > 0) row.tokens_per_s = double(rows_per_step() * model_.T) / seconds;
        if (seconds > 0 && peak_flops_ > 0)
            row.mfu = *row.tokens_per_s * flops_per_token(model_.config, model_.T) / peak_flops_;
        if (wants_stats) observer_.tensors(model_, before, state_.step);
        return row;
    }

    // Whether any rank was asked to stop. Decisions must be the same on all.
    bool any_stops() {
        std::vector<int64_t> asked(size_t(ranks_.count));
        asked[size_t(ranks_.rank)] = stop_asked;
        ranks_.gather(asked.data(), sizeof asked[0], 1);
        return std::ranges::any_of(asked, [](int64_t when) { return when != 0; });
    }

    static bool is_broken(const LogRow& row) {
        return row.grad_norm && !(std::isfinite(*row.grad_norm) && std::isfinite(*row.train_loss));
    }

    // Reports a skipped update (§7). With --on-nan stop, a NaN or infinity ends the run: only its
    // row is kept. kMostBroken in a row always end it.
    void check_broken(const LogRow& row) {
        const StepState& g = state_.guards;
        broken_in_a_row_ = g.broken ? broken_in_a_row_ + 1 : 0;
        if (!g.skip) return;
        const bool skips = o_.on_nan == "skip";
        if (g.broken && (!skips || broken_in_a_row_ >= kMostBroken)) {
            add_to_log(row);
            fail("step ", state_.step, ": the loss is ", g.loss, " and the gradient's norm ",
                 g.grad_norm, skips ? to_text(", like ", kMostBroken - 1, " steps before it") : "",
                 ": training has diverged. Nothing of this step was saved. Go on from the last ",
                 "checkpoint with a lower --learning-rate, --resume auto and --override",
                 skips ? "" : ", or pass over such steps with --on-nan skip");
        }
        if (g.skipped <= 4 || std::has_single_bit(uint64_t(g.skipped)))
            warn(to_text("step ", state_.step, " was skipped: loss ", g.loss, ", norm ",
                         g.grad_norm, g.broken ? " (not a number; " : " (an outlier; ", g.skipped,
                         " so far)"));
    }

    // A step that the device already has is completed first. Why Ctrl-C comes last: a run that is
    // finished anyway is finished.
    End end_reached() {
        stops_ = any_stops();
        if (ahead_) return End::none;
        if (state_.step >= state_.planned_steps) return End::finished;
        if (o_.patience > 0 && state_.stale_evals >= o_.patience) return End::plateau;
        if (time_is_up()) return End::out_of_time;
        return stops_ ? End::interrupted : End::none;
    }

    // What follows a step; returns whether the run ends. Why this order: the row is logged before
    // anything may fail; the checkpoint, after best/, remembers which model was the best.
    End finish(LogRow& row) {
        const bool wanted = wants_evaluation(), evaluated = wanted && evaluate_into(row);
        const bool cut_short = wanted && !evaluated;  // by Ctrl-C: made again when resumed
        if (cut_short && state_.step == 0) return End::interrupted;
        if (evaluated) note_best(row);
        // Why only now: where the first evaluation fails, no run is left behind.
        if (log_)
            add_to_log(row);
        else if (ranks_.rank == 0)
            rows_.push_back(row), open_log();
        const End end = cut_short ? End::interrupted : end_reached();
        observer_.step(row, state_.planned_steps, seconds_left(),
                       evaluated || state_.step == 0 || end != End::none);
        const std::string title = cut_short ? "" : sample_title();
        if (evaluated && state_.best_step == state_.step) try_save("best", Purpose::use);
        if (end != End::none || due(o_.save_interval, state_.step)) save(end);
        // Why last: Ctrl-C waits only for the checkpoint.
        if (!title.empty() && end != End::interrupted && ranks_.rank == 0)
            observer_.sample(title, write_sample(title, 50));
        return end;
    }

    // --- Watching it

    // Stops for Ctrl-C.
    Evaluation score(const std::vector<Window>& windows) {
        int64_t tokens = 0;
        for (const Window& window : windows) tokens += window.count - window.skip;
        const Evaluation result = evaluate(model_, windows, {}, [&](int64_t done) {
            observer_.evaluating(done, tokens);
            return !any_stops();
        });
        observer_.evaluating(tokens, tokens);
        return result;
    }

    // False if Ctrl-C came in between; the row is as it was then.
    bool evaluate_into(LogRow& row) {
        const Evaluation val = score(val_windows_);
        const Evaluation train = val.stopped ? val : score(train_windows_);
        if (train.stopped) return false;
        if (val.tokens > 0) {
            row.val_loss = state_.val_loss = val.loss(), row.perplexity = val.perplexity();
            if (std::isfinite(corpus_.floor)) row.floor = corpus_.floor;
        }
        if (train.tokens > 0) row.eval_train_loss = train.loss();
        return true;
    }

    // Without validation text, the fixed training batches decide.
    void note_best(const LogRow& row) {
        const std::optional<double> loss = row.val_loss ? row.val_loss : row.eval_train_loss;
        if (!loss) return;
        const bool better = *loss < state_.best_loss;
        if (better) state_.best_loss = *loss, state_.best_step = state_.step;
        state_.stale_evals = better ? 0 : state_.stale_evals + 1;
    }

    // That of the steps, or of --max-minutes where that is less.
    double seconds_left() const {
        const double a_step = state_.seconds / double(std::max<int64_t>(1, state_.step));
        const double left = double(state_.planned_steps - state_.step) * a_step;
        if (o_.max_minutes <= 0) return left;
        return std::clamp(o_.max_minutes * 60 - state_.seconds, 0.0, left);
    }

    // The title of a sample that is due; empty: none is. At the end of an epoch of many steps it
    // says the mean loss.
    std::string sample_title() {
        std::string title;
        const int64_t epoch = order_.epoch(std::max<int64_t>(0, state_.samples - rows_per_step()));
        if (due(o_.sample_interval, state_.step)) title = to_text("sample at step ", state_.step);
        if (order_.epoch(state_.samples) == epoch) return title;
        const double mean = state_.epoch_loss / double(std::max<int64_t>(1, state_.epoch_steps));
        if (order_.blocks_per_epoch() >= 10 * rows_per_step())
            title = format("epoch %ld ends at step %ld: mean train loss %.4f", long(epoch + 1),
                           long(state_.step), mean);
        state_.epoch_loss = 0, state_.epoch_steps = 0;
        return title;
    }

    // --- Saving it

    // Whether it saved. A full disk is a warning: somebody may make space. Any other error stops
    // the run.
    bool try_save(const std::string& name, Purpose purpose) {
        if (folder_ && !leads_to(o_.output, *folder_))
            fail(o_.output, " was removed or replaced while this run was writing into it, so step ",
                 state_.step, " cannot be saved there. Give every run an --output of its own");
        try {
            if (log_) log_->sync();  // first: no checkpoint may be ahead of its log
            const Tokenizer* tokenizer = corpus_.tokenizer ? &*corpus_.tokenizer : nullptr;
            save_checkpoint(model_, o_.output + "/" + name, tokenizer, state_, purpose);
            return true;
        } catch (const FileError& e) {
            const std::string what =
                to_text(e.what(), "; ", name, " was not saved at step ", state_.step, ", ");
            if (e.code != ENOSPC && e.code != EDQUOT && e.code != EFBIG)
                fail(what, "and training stops, because the next save would fail too. ",
                     "Checkpoints that are in ", o_.output, " are whole: --resume auto");
            warn(what + "training goes on");
            return false;
        }
    }

    // A checkpoint. The one that ends the run must succeed.
    void save(End end) {
        state_.finished = end != End::none && end != End::interrupted;
        const bool saved = try_save(checkpoint_name(state_.step), Purpose::resume);
        if (!saved && end != End::none)
            fail("the run has ended at step ", state_.step, ", but it could not be saved there: ",
                 "make room and type --resume auto to make the last steps again");
        try {
            if (ranks_.rank == 0) remove_old_checkpoints(o_.output, o_.keep);
        } catch (const FileError& e) {
            warn(to_text(e.what(), "; an old checkpoint stays"));
        }
    }

    const RunOptions& o_;
    const Corpus& corpus_;
    Gpt2<Device>& model_;
    Observer<Device>& observer_;
    Ranks& ranks_ = *model_.device.ranks;
    const DataOrder order_;
    const std::vector<Window> val_windows_, train_windows_;  // what is scored
    const double peak_flops_;
    std::optional<FileHandle> folder_;  // of the run
    std::vector<LogRow> rows_;          // with which the log begins
    std::optional<GrowingFile> log_, log_json_, samples_;
    TrainerState state_;           // what a checkpoint keeps
    bool ahead_ = false;           // the device has the next step already
    double began_ = 0;             // when the current step began
    bool stops_ = false;           // a rank was asked to stop
    int64_t broken_in_a_row_ = 0;  // latest steps whose loss or norm was NaN or infinite
    // Of the next step. Careful: the last member, and so destroyed first: it waits for its thread,
    // which uses the others.
    std::future<std::vector<Batch>> batches_;
};

// =================================================================================================
// §18 Options: one table of them, and all that is made from it
// =================================================================================================
// What you have now: all that trains. A program around it needs a command line. An option is a row
// of a table: its name, the variable it sets, the values it takes, its help. Whatever is wrong is
// bad usage (exit status 2).

// --- A row of the table

// The values an option takes, as help shows them: "(0, 1]" is a number between two bounds, a round
// bracket leaving its bound out; "stop|skip" is one of these words; "0|1" is a switch; capitals
// ("DIR") stand for any text.
struct Range {
    std::string text;
    double low = 0, high = 0;  // of a number

    Range(const char* text) : text(text) {
        const DotForDecimals dot;
        std::sscanf(text, "%*c%lf, %lf", &low, &high);
    }
    bool is_number() const { return text[0] == '[' || text[0] == '('; }
    bool is_text() const { return std::isupper(text[0]); }
    std::vector<std::string> words() const { return split_at(text, '|'); }
    bool contains(double x) const {
        return (text[0] == '(' ? x > low : x >= low) && (text.back() == ')' ? x < high : x <= high);
    }
};

// A variant holds one of the types listed; std::visit calls a function with what it holds.
struct Option {
    std::string name;  // without --
    std::variant<bool*, int*, int64_t*, double*, std::string*, std::vector<std::string>*> value;
    std::string group;  // its heading in help
    unsigned commands;  // those that take it, one bit each
    Range range;
    std::string help;

    // For messages: "a whole number in [1, 1000]", "one of stop|skip", "DIR".
    std::string wanted() const {
        if (!range.is_number()) return (range.is_text() ? "" : "one of ") + range.text;
        const bool real = std::holds_alternative<double*>(value);
        return (real ? "a number in " : "a whole number in ") + range.text;
    }
    bool is_switch() const { return std::holds_alternative<bool*>(value); }
    bool is_list() const { return std::holds_alternative<std::vector<std::string>*>(value); }
};

struct CommandName {
    unsigned bit;
    const char *name, *help;
};
// "train, eval": the names of the commands in a set.
inline std::string command_names(const std::vector<CommandName>& commands, unsigned set) {
    std::string names;
    for (const CommandName& command : commands)
        if (set & command.bit) join(names, ", ", command.name);
    return names;
}

// --- One value, to text and from text

// The value as the user would type it.
inline std::string value_text(const Option& option) {
    const auto text_of = [](auto* value) -> std::string {
        using T = std::decay_t<decltype(*value)>;
        std::string list;
        if constexpr (std::is_same_v<T, std::string>)
            return *value;
        else if constexpr (std::is_same_v<T, bool>)
            return *value ? "1" : "0";
        else if constexpr (std::is_arithmetic_v<T>)
            return Json(*value).text;
        else
            for (const std::string& item : *value) join(list, " ", item);
        return list;
    };
    return std::visit(text_of, option.value);
}

// "--top-p must be a number in (0, 1], got 1.5"; "--data needs a value: DIR".
[[noreturn]] inline void fail_value(const Option& option, const std::string& text) {
    const std::string name = "--" + option.name;
    if (text.empty()) fail_usage(name, " needs a value: ", option.wanted());
    fail_usage(name, " must be ", option.wanted(), ", got ", shown(text));
}

// Sets an option to what the text says, which it must take. Only a TEXT may be empty.
inline void set_option(const Option& option, const std::string& text) {
    const Range& range = option.range;
    const std::vector<std::string> words = range.words();
    const bool is_word = std::find(words.begin(), words.end(), text) != words.end();
    if (range.is_text() ? text.empty() && range.text != "TEXT" : !range.is_number() && !is_word)
        fail_value(option, text);
    const auto set = [&](auto* value) {
        using T = std::decay_t<decltype(*value)>;
        if constexpr (std::is_same_v<T, std::vector<std::string>>) {
            value->push_back(text);
        } else if constexpr (std::is_same_v<T, std::string>) {
            *value = text;
        } else if constexpr (std::is_same_v<T, bool>) {
            *value = text == "1";
        } else {
            const std::optional<T> number = number_of<T>(text);
            if (!number || !range.contains(double(*number))) fail_value(option, text);
            *value = *number;
        }
    };
    std::visit(set, option.value);
}

// --- Names that were mistyped

// How many letters must be added, dropped or changed to make b of a (Levenshtein 1966). row[j]: the
// same for the letters of a so far and the first j of b.
inline size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), size_t(0));
    for (size_t i = 0; i < a.size(); ++i) {
        size_t diagonal = std::exchange(row[0], i + 1);
        for (size_t j = 0; j < b.size(); ++j) {
            const size_t changed = diagonal + (a[i] != b[j]);
            diagonal = std::exchange(row[j + 1], std::min({changed, row[j] + 1, row[j + 1] + 1}));
        }
    }
    return row.back();
}

// How far `typed` is from `name`. Initials ("lr") and parts ("steps") are near; of the names with
// that part, the shortest is nearest. Careful: what was typed may be very long.
inline double name_distance(const std::string& typed, const std::string& name) {
    std::string initials;
    for (const std::string& word : split_at(name, '-')) initials += word.substr(0, 1);
    if (typed == initials) return 0;
    if (typed.size() > 2 && name.find(typed) != name.npos)
        return 1 + 0.01 * double(name.size() - typed.size());
    return double(edit_distance(typed.substr(0, 64), name));
}

// The entry of a table (of options, of commands) whose name is nearest to `typed`.
const auto& nearest(const auto& table, const std::string& typed) {
    return *std::min_element(table.begin(), table.end(), [&](auto& a, auto& b) {
        return name_distance(typed, a.name) < name_distance(typed, b.name);
    });
}

// --- Reading the command line

// What other programs call an option that is not here, and what to type instead.
struct OtherNames {
    const char *names, *answer;  // "eval-iters m"
};

struct Assignment {
    const Option* option;
    std::string text;
};

struct CommandLine {
    const std::vector<Option>& table;
    const std::vector<CommandName>& commands;
    unsigned command;
    std::string_view same = "";  // "max-iters=max-steps ...": accepted, as they mean the same
    std::span<const OtherNames> others = {};

    // Reads and sets the options in the arguments; returns the names of those that were given.
    // Given twice, the last counts; the command line counts before files.
    std::set<std::string> read(const std::vector<std::string>& arguments) const {
        std::set<std::string> given;
        const std::vector<Assignment> typed = read_arguments(arguments);
        for (const Assignment& a : typed)
            if (a.option->name == "config") set(a, given), read_config(a.text, given);
        for (const Assignment& a : typed) set(a, given);
        return given;
    }
    static void set(const Assignment& a, std::set<std::string>& given) {
        set_option(*a.option, a.text), given.insert(a.option->name);
    }

    // The option of that name, which the command must take. '-' and '_' are the same.
    const Option& find(std::string name) const {
        std::replace(name.begin(), name.end(), '_', '-');
        for (const Option& option : table) {
            if (option.name != name) continue;
            if (option.commands & command) return option;
            fail_usage(command_names(commands, command), " takes no option --", name,
                       "; it is for ", command_names(commands, option.commands));
        }
        if (const std::string ours = same_name(name); !ours.empty()) return find(ours);
        if (const char* answer = answer_to(name)) fail_usage("there is no --", name, ": ", answer);
        fail_usage("unknown option ", shown("--" + name), "; did you mean --",
                   nearest(table, name).name, "? (--help lists all options)");
    }

    // The option that means the same; "" for none.
    std::string same_name(const std::string& name) const {
        for (const std::string& pair : split_at(same, ' '))
            if (pair.starts_with(name + "=")) return pair.substr(name.size() + 1);
        return "";
    }
    // What to type instead; null: no known program has this name.
    const char* answer_to(const std::string& name) const {
        for (const OtherNames& row : others)
            for (const std::string& one : split_at(row.names, ' '))
                if (one == name) return row.answer;
        return nullptr;
    }

    // An argument as the option that it stands for: -h is --help, run.conf is --config=run.conf,
    // and -b is --b where other programs have it.
    std::string long_form(const std::string& argument) const {
        if (argument == "-h") return "--help";
        const std::string name = argument.substr(argument.starts_with('-'));
        if (name != argument)
            return answer_to(name) || !same_name(name).empty() ? "-" + argument : argument;
        return argument.ends_with(".conf") ? "--config=" + argument : argument;
    }

    // What follows an option is its value, unless it begins with "--". A switch alone means 1; a
    // list takes all values up to the next option.
    std::vector<Assignment> read_arguments(const std::vector<std::string>& arguments) const {
        std::vector<Assignment> all;
        for (size_t i = 0; i < arguments.size();) {
            const std::string argument = long_form(arguments[i++]);
            if (!argument.starts_with("--") || argument.size() < 3)
                fail_usage("expected an option such as --", table[0].name, ", found ",
                           shown(argument), " (--help lists all options; a pattern such as ",
                           "'data/train_*.bin' must be quoted)");
            const size_t equals = argument.find('=');
            const Option& option = find(argument.substr(2, equals - 2));
            const auto is_value = [&](const std::string& next) {
                return !next.starts_with("--") && !(option.is_switch() && next == "-h");
            };
            std::vector<std::string> values;
            if (equals != argument.npos)
                values.push_back(argument.substr(equals + 1));
            else
                while (i < arguments.size() && is_value(arguments[i]) &&
                       (values.empty() || option.is_list()))
                    values.push_back(arguments[i++]);
            if (values.empty() && !option.is_switch()) fail_value(option, "");
            if (values.empty()) values.push_back("1");
            for (const std::string& value : values) all.push_back({&option, value});
        }
        return all;
    }

    // Reads and sets lines of `name = value`. A '#' at the start of a line or after a blank begins
    // a comment. Errors begin with file and line: "run.conf:3: --top-p must be ...".
    //   # a small GPT-2 on a book
    //   data = data/book
    //   n-layer = 4     # the other sizes are the preset's
    void read_config(const std::string& path, std::set<std::string>& given) const {
        int number = 0;
        try {
            for (const std::string& line : split_at(read_text(path, 1 << 16), '\n'))
                ++number, read_config_line(line, given);
        } catch (const Error& error) {
            fail_usage(number ? to_text(path, ":", number) : "--config", ": ", error.what());
        }
    }

    void read_config_line(std::string line, std::set<std::string>& given) const {
        const auto trim = [blanks = " \t\r"](std::string s) {
            s.erase(0, s.find_first_not_of(blanks));
            return s.erase(s.find_last_not_of(blanks) + 1);
        };
        for (size_t at = 0; (at = line.find('#', at)) != line.npos; ++at)
            if (at == 0 || line[at - 1] == ' ' || line[at - 1] == '\t') line.resize(at);
        line = trim(line);
        if (line.empty()) return;
        const size_t equals = line.find('=');
        if (equals == line.npos) fail("expected `name = value`, found ", shown(line));
        std::string name = trim(line.substr(0, equals));
        if (name.starts_with("--")) name.erase(0, 2);
        if (name == "config" || name == "help") fail("a config file cannot hold --", name);
        set({&find(name), trim(line.substr(equals + 1))}, given);
    }
};

// --- Help

// Help for the options that these commands take. `defaults`: the table of a fresh object, in which
// an empty text or a number out of range means "not set". A bound of a million or more only guards
// against overflow, and is not shown.
//   --top-p X                   ...; in (0, 1] (default 1)
inline std::string options_help(const std::vector<Option>& defaults, unsigned commands) {
    const size_t indent = 30, width = std::min<size_t>(100, columns_of(STDOUT_FILENO, 100));
    std::string text, group;
    for (const Option& option : defaults) {
        if (!(option.commands & commands)) continue;
        if (group != option.group) text += "\n" + (group = option.group) + "\n";
        const Range& range = option.range;
        const char* number = std::holds_alternative<double*>(option.value) ? " X" : " N";
        std::string line = "  --" + option.name, help = option.help;
        if (!option.is_switch()) line += range.is_number() ? number : " " + range.text;
        if (range.is_number() && range.high < 1e6) help += "; in " + range.text;
        const std::string value = value_text(option);
        const bool unset = range.is_number()
                               ? !range.contains(number_of<double>(value).value_or(NAN))
                               : value.empty() || (option.is_switch() && value == "0");
        if (!unset) help += " (default " + value + ")";
        if (line.size() >= indent) text += std::exchange(line, "") + "\n";
        WordWrap wrap{width, indent, line.size()};
        text += line + wrap.add(help + "\n");
    }
    return text;
}

}  // namespace tinygpt

#endif  // TINYGPT_HPP_INCLUDED
