// tinygpt.hpp - v0.1.0 - train a GPT-2, on a CPU or a GPU, in one header
//
// The whole model, an explicit forward and an explicit backward for every layer, and the training
// loop. Two drivers choose the device: train_gpt.cpp (CPU, OpenMP) and train_gpt.cu (CUDA). Both
// run the code of this file, so what you read here is what trains. It is GPT-2 exactly, in fp32 or
// bf16, from scratch or from a Hugging Face checkpoint. It is not a framework: no autograd, no
// graph, no other model, one machine, one GPU.
//
//   make train_gpt && ./train_gpt         learns the default corpus in about a minute
//   ./train_gpt walk                      one tiny batch through one step, with every number
//   make test                             every gradient against finite differences, and much more
//
// Read it from the top: it follows one batch through one training step.
//
//   §1  ground rules      errors with a message; random numbers that can be asked for in any order
//   §2  one batch         shards, and the same text shifted by one
//   §3  the model         sizes, and the one list of parameters
//   §4  the layers        embed, layernorm, matmul, attention, linear and GELU, dropout, head and
//   loss §5  forward           GPT-2 on one screen
//   §6  backward          the same lines upside down
//   §7  the update        schedule, clip, guards, AdamW
//   §8  one step          all of it, on one screen
//   §9  evaluate, generate
//   ----  plumbing from here on: the model is done
//   §10 files, JSON, and the tokenizer     §11 safetensors, checkpoints     §12 options, log
//   §13 the loop and the commands
//
// Notation. x is what a layer reads, out what it makes, w and b weight and bias; dx is the gradient
// of the loss with respect to x. (B, T, C): B rows of T tokens of C channels, the last index
// running fastest. A function's comment says what it sets and what it adds to; outputs come first.
// "Why:" gives a reason, "Careful:" marks a trap, "walk>" quotes a line that ./train_gpt walk
// prints.
//
// To use it in a program of your own: C++20, -fopenmp, one #include. Everything is in namespace
// tinygpt and may be included from several files. Licence: MIT, see LICENSE.
//
#ifndef TINYGPT_HPP_INCLUDED
#define TINYGPT_HPP_INCLUDED

#define TINYGPT_VERSION 100  // major * 10000 + minor * 100 + patch

#include <dirent.h>    // opendir: the files of a folder
#include <fcntl.h>     // open
#include <glob.h>      // glob: shard patterns
#include <omp.h>       // threads
#include <signal.h>    // sigaction: Ctrl-C saves before it stops
#include <sys/file.h>  // flock: one run per folder
#include <sys/mman.h>  // madvise: large pages
#include <sys/stat.h>
#include <sys/syscall.h>  // arch_prctl: asking for the matrix unit
#include <unistd.h>       // pread, fsync

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <compare>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
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
// §1 Ground rules: errors with a message, and random numbers that can be asked for in any order
// =================================================================================================
// We hold nothing yet but three promises that the rest is built on.
//   Nothing fails in silence: every check stays on, and says what was expected and what to do.
//   A run can be repeated, bit for bit: random numbers are a function of where they are used
//   (below), every sum has one order that does not depend on the number of threads, and the order
//   of the data is a function of the seed. So 1 thread and 16, or a run that was interrupted and
//   one that was not, end in the same weights.
//   Nothing is hidden: what a step computes is in this file, and `walk` prints it.

// Whatever goes wrong is thrown as an Error; main prints its message and exits with its status.
struct Error : std::runtime_error {
    int status;  // 1: failed at run time, 2: bad usage
    Error(int status, const std::string& message) : std::runtime_error(message), status(status) {}
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    std::string out(size_t(std::vsnprintf(nullptr, 0, pattern, args)), '\0');
    std::vsnprintf(out.data(), out.size() + 1, pattern, again);
    va_end(args);
    va_end(again);
    return out;
}

[[noreturn]] inline void fail(const std::string& message) { throw Error(1, message); }
[[noreturn]] inline void fail_usage(const std::string& message) { throw Error(2, message); }

// A check that stays on in every build. The message (printf style) says what was expected, what was
// found, where, and what to do. It is evaluated only when the check fails.
#define TINYGPT_CHECK(condition, ...)                                      \
    do {                                                                   \
        if (!(condition)) ::tinygpt::fail(::tinygpt::format(__VA_ARGS__)); \
    } while (0)

// bf16: the upper half of a float. Eight bits of exponent, so float's range; eight of significand.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    // Round to nearest, ties to even; a NaN stays a NaN.
    TINYGPT_HD explicit bf16(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = uint16_t(nan ? (u >> 16) | 0x40 : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
    TINYGPT_HD explicit operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

// Random numbers are a pure function of where they are used: random_bits(key, i) is the i-th number
// of the stream `key`. Nothing is drawn "next", so threads, restarts and GPUs all see the same
// ones. The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
TINYGPT_HD inline uint64_t mix_bits(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
TINYGPT_HD inline uint64_t random_key(uint64_t seed, uint64_t step, uint64_t place) {
    return mix_bits(mix_bits(mix_bits(seed + 0x9e3779b97f4a7c15ull) + step) + place);
}
TINYGPT_HD inline uint64_t random_bits(uint64_t key, uint64_t i) {
    return mix_bits(key + i * 0x9e3779b97f4a7c15ull);
}
// In [0, 1): the upper 53 bits.
TINYGPT_HD inline double random_uniform(uint64_t key, uint64_t i) {
    return double(random_bits(key, i) >> 11) * 0x1.0p-53;
}
// Standard normal, by Box and Muller: two uniforms make one.
inline double random_normal(uint64_t key, uint64_t i) {
    double u = 1.0 - random_uniform(key, 2 * i), v = random_uniform(key, 2 * i + 1);
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * M_PI * v);
}

// =================================================================================================
// §2 One batch: B rows of T tokens, and the same text shifted by one
// =================================================================================================
// A model reads numbers. A token is a number below 65,536 that stands for a piece of text (§12):
//
//   text      the   cat   sat   on   the   mat   and
//   inputs    the   cat   sat   on                       T = 4 of them make one row of the batch
//   targets         cat   sat   on   the                 the same text, one token later
//
// So every row holds T questions, not one: after "the" comes?, after "the cat" comes?, and so on.
// Text comes as shards:
//   256 x int32 header: 20240520, version 1, number of tokens, zeros; then the tokens as uint16.
// The same layout is used by the public FineWeb shards for GPT-2, so those work as they are.

constexpr int kShardHeaderBytes = 1024;
constexpr int32_t kShardMagic = 20240520;
constexpr int32_t kIgnore = -1;  // a target that is not scored

// What one training step reads. Row b predicts targets[b][t] from inputs[b][0..t], where
// targets[b][t] is the token that follows inputs[b][t] in the text: the shift by one.
//   walk> row 0, t=0   input  0 the   target  1 cat
//   walk> row 0, t=1   input  1 cat   target  2 sat
struct Batch {
    int B = 0, T = 0;
    std::vector<int32_t> inputs, targets;  // [B, T] each
    std::vector<int32_t> order;            // the rows 0 .. B*T-1 sorted by input token (for §4.1)
    int64_t scored = 0;                    // targets that are not kIgnore
    void resize(int rows, int columns) {
        B = rows, T = columns, scored = 0;
        inputs.assign(size_t(B) * T, 0);
        targets.assign(size_t(B) * T, kIgnore);
    }
    void sort_rows() {
        order.resize(inputs.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [this](int32_t i, int32_t j) {
            return inputs[size_t(i)] < inputs[size_t(j)];
        });
    }
};

// One open shard. Reads with pread, so that a file that shrinks is an error and not a signal.
class Shard {
public:
    // Opens and validates `path`: magic, version, and a length that agrees with the count.
    explicit Shard(std::string file)
        : path(std::move(file)), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        TINYGPT_CHECK(fd_ >= 0, "cannot open the shard %s: %s", path.c_str(), std::strerror(errno));
        int32_t header[256] = {};
        struct stat info {};
        ssize_t got = ::pread(fd_, header, sizeof header, 0);
        if (::fstat(fd_, &info) != 0 || got != kShardHeaderBytes || header[0] != kShardMagic ||
            header[1] != 1) {
            ::close(fd_);
            fail(
                format("%s is no token shard: expected a 1024-byte header with %d and version 1, "
                       "found "
                       "%d and %d (%zd bytes read). Make shards with ./prepare_data",
                       path.c_str(), kShardMagic, header[0], header[1], got));
        }
        tokens = header[2];
        if (tokens < 0 || info.st_size != kShardHeaderBytes + 2 * tokens) {
            ::close(fd_);
            fail(
                format("%s is damaged: its header promises %lld tokens, so %lld bytes, but it has "
                       "%lld",
                       path.c_str(), (long long)tokens, (long long)(kShardHeaderBytes + 2 * tokens),
                       (long long)info.st_size));
        }
    }
    Shard(Shard&& other) noexcept
        : path(std::move(other.path)), tokens(other.tokens), fd_(std::exchange(other.fd_, -1)) {}
    ~Shard() {
        if (fd_ >= 0) ::close(fd_);
    }

    // Reads tokens [begin, begin + count) into out. Fails if the file has been cut short since.
    void read(uint16_t* out, int64_t begin, int64_t count) const {
        char* to = reinterpret_cast<char*>(out);
        int64_t left = 2 * count, at = kShardHeaderBytes + 2 * begin;
        while (left > 0) {
            ssize_t got = ::pread(fd_, to, size_t(left), at);
            if (got < 0 && errno == EINTR) continue;
            TINYGPT_CHECK(got > 0, "cannot read token %lld of %s: %s", (long long)(at / 2 - 512),
                          path.c_str(),
                          got < 0 ? std::strerror(errno) : "the file has become shorter");
            to += got, at += got, left -= got;
        }
    }

    std::string path;
    int64_t tokens = 0;

private:
    int fd_;
};

// All shards of one split, and a check that every token is below the vocabulary's size.
class Shards {
public:
    // Opens every file that matches the pattern, in name order.
    explicit Shards(const std::string& pattern) : pattern_(pattern) {
        glob_t found{};
        int status = ::glob(pattern.c_str(), 0, nullptr, &found);
        std::vector<std::string> paths(found.gl_pathv,
                                       found.gl_pathv + (status == 0 ? found.gl_pathc : 0));
        ::globfree(&found);
        for (const std::string& path : paths) shards_.emplace_back(path);
        for (const Shard& shard : shards_) tokens_ += shard.tokens;
    }
    bool empty() const { return shards_.empty(); }
    int64_t tokens() const { return tokens_; }
    const std::string& pattern() const { return pattern_; }
    const std::vector<Shard>& files() const { return shards_; }

    // Reads every token once; fails at the first that the vocabulary does not have.
    void check_tokens(int vocab_size) const {
        std::vector<uint16_t> buffer(1 << 14);
        for (const Shard& shard : shards_)
            for (int64_t at = 0; at < shard.tokens; at += int64_t(buffer.size())) {
                int64_t count = std::min(int64_t(buffer.size()), shard.tokens - at);
                shard.read(buffer.data(), at, count);
                check_range(shard, buffer.data(), at, count, vocab_size);
            }
    }
    static void check_range(const Shard& shard, const uint16_t* tokens, int64_t at, int64_t count,
                            int vocab_size) {
        for (int64_t i = 0; i < count; ++i)
            TINYGPT_CHECK(tokens[i] < vocab_size,
                          "token %lld of %s is %d, but the vocabulary has only %d entries: this "
                          "data "
                          "was made with another tokenizer; give its folder, or --vocab-size",
                          (long long)(at + i), shard.path.c_str(), tokens[i], vocab_size);
    }

private:
    std::string pattern_;
    std::vector<Shard> shards_;
    int64_t tokens_ = 0;
};

// A permutation of 0..n-1 that needs no memory: four Feistel rounds on the next even number of
// bits, walking on while the result is not below n. Bijective because every round can be undone.
inline uint64_t shuffled(uint64_t i, uint64_t n, uint64_t key) {
    int half = 1;
    while (half < 32 && (uint64_t(1) << (2 * half)) < n) ++half;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (int round = 0; round < 4; ++round) {
            uint64_t mixed =
                left ^ (mix_bits(key + uint64_t(round) * 0x9e3779b97f4a7c15ull + right) & mask);
            left = right, right = mixed;
        }
        i = (left << half) | right;
    } while (i >= n);
    return i;
}

// Which block of text is the i-th sample of training. A shard of N tokens has N-1 predictions; they
// are cut into blocks of T, so that one epoch makes every prediction exactly once. The last block
// may be short: its missing targets are kIgnore. With shuffle, every epoch has a fresh order of the
// blocks and a fresh offset at which the cutting begins (the shard is taken as a ring), so blocks
// do not always begin at the same words. Everything is a function of (seed, i): nothing to save.
class DataOrder {
public:
    DataOrder() = default;
    DataOrder(const Shards& shards, int B, int T, uint64_t seed, bool shuffle, bool overfit_batch)
        : B_(B), T_(T), seed_(seed), shuffle_(shuffle), overfit_(overfit_batch) {
        for (const Shard& shard : shards.files()) {
            lengths_.push_back(std::max<int64_t>(0, shard.tokens - 1));
            first_block_.push_back(blocks_);
            blocks_ += (lengths_.back() + T - 1) / T;
        }
        if (overfit_) blocks_ = B;
    }
    struct Place {
        int shard = 0;
        // first prediction of the block, on the ring of the shard's predictions
        int64_t begin = 0;
        int64_t length = 0;  // how many of its T predictions exist
    };
    int64_t blocks_per_epoch() const { return blocks_; }
    int64_t epoch(int64_t sample) const { return sample / blocks_; }
    int64_t ring(int shard) const { return lengths_[size_t(shard)]; }

    // The place of sample number i, counted from the start of training.
    Place place(int64_t i) const {
        if (overfit_) return {0, (i % B_) * T_, T_};
        int64_t epoch = i / blocks_, block = i % blocks_;
        if (shuffle_)
            block = int64_t(shuffled(uint64_t(block), uint64_t(blocks_),
                                     random_key(seed_, uint64_t(epoch), 1)));
        size_t shard = size_t(std::upper_bound(first_block_.begin(), first_block_.end(), block) -
                              first_block_.begin() - 1);
        // an empty shard shares its first block with the next
        while (lengths_[shard] == 0) --shard;
        int64_t inside = (block - first_block_[shard]) * T_, length = lengths_[shard];
        int64_t offset = 0;
        if (shuffle_)
            offset = int64_t(random_bits(random_key(seed_, uint64_t(epoch), 2), shard) %
                             uint64_t(length));
        return {int(shard), (inside + offset) % length, std::min<int64_t>(T_, length - inside)};
    }

private:
    int B_ = 1, T_ = 1;
    uint64_t seed_ = 0;
    bool shuffle_ = false, overfit_ = false;
    int64_t blocks_ = 0;
    std::vector<int64_t> lengths_, first_block_;
};

// Fills one batch with samples first .. first + B - 1. Fails on a token outside the vocabulary.
inline void fill_batch(Batch& batch, const Shards& shards, const DataOrder& order, int64_t first,
                       int vocab_size) {
    std::vector<uint16_t> text(size_t(batch.T) + 1);
    for (int b = 0; b < batch.B; ++b) {
        const DataOrder::Place place = order.place(first + b);
        const Shard& shard = shards.files()[size_t(place.shard)];
        int32_t* inputs = batch.inputs.data() + size_t(b) * batch.T;
        int32_t* targets = batch.targets.data() + size_t(b) * batch.T;
        // `count` predictions from `begin` on; each needs its own token and the one after it.
        auto copy = [&](int64_t begin, int64_t count) {
            if (count == 0) return;
            shard.read(text.data(), begin, count + 1);
            Shards::check_range(shard, text.data(), begin, count + 1, vocab_size);
            inputs = std::copy_n(text.begin(), count, inputs);
            targets = std::copy_n(text.begin() + 1, count, targets);  // shifted by one
        };
        // The block, in two pieces where it runs over the end of the ring.
        const int64_t head = std::min(place.length, order.ring(place.shard) - place.begin);
        copy(place.begin, head), copy(0, place.length - head);
        batch.scored += place.length;
    }
    batch.sort_rows();
}

// Reads the batches of a run in order, one ahead of the step: while the model computes, a thread
// reads what comes next, so reading never shows in the time of a step.
class BatchLoader {
public:
    BatchLoader(const Shards& shards, DataOrder order, int B, int T, int vocab_size,
                int64_t first_sample)
        : shards_(shards), order_(std::move(order)), B_(B), T_(T), vocab_size_(vocab_size),
          sample_(first_sample) {
        read_ahead();
    }
    BatchLoader(const BatchLoader&) = delete;

    // The next B samples. A reading error met by the thread is thrown here.
    Batch next() {
        Batch batch = ahead_.get();
        sample_ += B_;
        read_ahead();
        return batch;
    }

private:
    void read_ahead() {
        ahead_ = std::async(std::launch::async, [this] {
            Batch batch;
            batch.resize(B_, T_);
            fill_batch(batch, shards_, order_, sample_, vocab_size_);
            return batch;
        });
    }

    const Shards& shards_;
    DataOrder order_;
    int B_, T_, vocab_size_;
    int64_t sample_;
    // Why shared: an error stays. Careful: last, so that it is waited for before the rest goes.
    std::shared_future<Batch> ahead_;
};

// =================================================================================================
// §3 What a model is made of: its sizes, and the one list of its parameters
// =================================================================================================
// We hold B rows of T tokens. The model turns each token into a vector of C numbers, x, lets L
// layers add to it what they find, and at the end compares it with the vectors of all V tokens:
//
//   tokens --> wte[token] + wpe[place] --> x              the residual stream, C numbers a position
//                                          |
//                +-- x += attention(ln_1(x))              positions look at each other
//      L times   |
//                +-- x += mlp(ln_2(x))                    each position thinks for itself
//                                          |
//                                     ln_f(x) wte^T --> a score for every token of the vocabulary
//
// The last line uses the embedding's own table again (the "tied head"): the vector by which a token
// is read is the vector by which it is predicted. Nearly all parameters are in the layers' four
// matrices, 12 C^2 a layer, and in wte, V C: 124,439,808 in all for GPT-2 small. Dimensions:
//   B batch   T sequence   C channels (n_embd)   NH heads   HS = C / NH head size
//   L layers  V vocabulary  P positions

struct Config {
    int n_layer = 0, n_head = 0, n_embd = 0, n_positions = 0, vocab_size = 0;
    bool untied_head = false;  // true: lm_head.weight is a tensor of its own, not wte.weight
    float dropout = 0;         // training only
    int head_size() const { return n_embd / n_head; }
};

struct Preset {
    const char* name;
    Config config;
};
// `tiny` learns the default corpus in about a minute on two cores. The others are GPT-2's (Radford
// et al. 2019; sizes as in the published configurations).
inline const std::vector<Preset>& presets() {
    static const std::vector<Preset> list = {
        {"tiny", {2, 4, 128, 128, 1024}},
        {"gpt2", {12, 12, 768, 1024, 50257}},
        {"gpt2-medium", {24, 16, 1024, 1024, 50257}},
        {"gpt2-large", {36, 20, 1280, 1024, 50257}},
        {"gpt2-xl", {48, 25, 1600, 1024, 50257}},
    };
    return list;
}

// Every tensor of the model by name. T is what an element is: a weight, a gradient, a moment.
template <class T>
struct Parameters {
    struct Block {
        T *ln_1_weight, *ln_1_bias, *c_attn_weight, *c_attn_bias, *attn_proj_weight,
            *attn_proj_bias;
        T *ln_2_weight, *ln_2_bias, *c_fc_weight, *c_fc_bias, *mlp_proj_weight, *mlp_proj_bias;
    };
    T *wte, *wpe;          // token and position embeddings
    std::vector<Block> h;  // the layers
    T *ln_f_weight, *ln_f_bias;
    T* lm_head;  // the tied head is wte itself
};

enum class Init { zeros, ones, normal, residual };  // residual: normal, scaled by 1/sqrt(2L)

// The one list. Calls visit(name, pointer, shape, init) once for every tensor, in the order of the
// text's way through the model. Allocation, initialisation, weight decay, checkpoints, the
// parameter table and the gradient test all come from here, so none of them can forget a tensor.
// Names and shapes are Hugging Face's for GPT-2: linear weights are [in, out], y = x W + b.
template <class T, class Visit>
void for_each_tensor(const Config& config, Parameters<T>& p, Visit&& visit) {
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

// Where a tensor lies in the one flat array that holds all of them.
struct TensorInfo {
    std::string name;
    std::vector<int64_t> shape;
    Init init;
    size_t offset, count;
    bool decays() const { return shape.size() >= 2; }  // weight decay is for matrices only
};

// All parameters lie in one flat array, and so do their gradients and moments: the update is one
// loop, and so is saving. First all tensors that decay (the matrices and the two embeddings), then
// all that do not (biases, layernorms): "does element i decay" is one comparison, i < decayed.
// Why not all: decay pulls weights towards 0; a bias or a scale has no reason to be small.
// Each tensor starts at a multiple of 64 elements.
struct Layout {
    std::vector<TensorInfo> tensors;  // in the order of the list
    size_t size = 0, decayed = 0;     // elements with padding; how many of them decay
    size_t count = 0;                 // parameters, without padding
};

inline Layout layout_of(const Config& config) {
    Layout layout;
    Parameters<char> none;
    none.h.resize(size_t(config.n_layer));
    for_each_tensor(
        config, none, [&](std::string name, char*, std::vector<int64_t> shape, Init init) {
            size_t count = 1;
            for (int64_t n : shape) count *= size_t(n);
            layout.tensors.push_back({std::move(name), std::move(shape), init, 0, count});
            layout.count += count;
        });
    for (bool decays : {true, false}) {
        for (TensorInfo& t : layout.tensors)
            if (t.decays() == decays)
                t.offset = layout.size, layout.size += (t.count + 63) / 64 * 64;
        if (decays) layout.decayed = layout.size;
    }
    return layout;
}

// Points every tensor of p into the flat array at base.
template <class T>
void point_into(Parameters<T>& p, T* base, const Config& config, const Layout& layout) {
    p.h.resize(size_t(config.n_layer));
    size_t i = 0;
    for_each_tensor(config, p,
                    [&](const std::string&, T*& pointer, const std::vector<int64_t>&, Init) {
                        pointer = base + layout.tensors[i++].offset;
                    });
    if (!config.untied_head) p.lm_head = p.wte;
}

// Fresh weights: N(0, 0.02), the two projections that write into the residual stream scaled down by
// 1/sqrt(2L) so that 2L additions keep its variance (Radford et al. 2019, §2.3), biases 0, norms
// 1.
// sets weights[layout.size]; padding is 0. Element i of a tensor depends on (seed, tensor, i)
// alone.
template <class real>
void initialise(real* weights, const Config& config, const Layout& layout, uint64_t seed) {
    std::fill(weights, weights + layout.size, real(0));
    for (size_t tensor = 0; tensor < layout.tensors.size(); ++tensor) {
        const TensorInfo& info = layout.tensors[tensor];
        const uint64_t key = random_key(seed, tensor, 3);
        real* w = weights + info.offset;
        if (info.init == Init::zeros) continue;
        if (info.init == Init::ones) {
            std::fill(w, w + info.count, real(1));
            continue;
        }
        const double scale =
            info.init == Init::residual ? 0.02 / std::sqrt(2.0 * config.n_layer) : 0.02;
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < int64_t(info.count); ++i)
            w[i] = real(float(scale * random_normal(key, uint64_t(i))));
    }
}

// =================================================================================================
// §4 The layers, in the order the batch meets them
// =================================================================================================
// We hold one batch of tokens [B, T] and the parameters. From here on a row is one position of one
// sequence; rows = B*T of them lie below each other, and x is [rows, C]: the residual stream.
//
// Backward is the chain rule, and nothing else. If the loss depends on out, and out on x, then
//   dx_i = sum over j of dout_j (d out_j / d x_i)
// Each backward function is that sum written out for one layer, with dout given. What a layer gets
// from two places, its gradient gets from two: gradients of a value that was used twice are added.
//
// A device is a struct with the functions below. Cpu<real> has them as loops, Cuda as kernels;
// model, training and generation (§5-9) are written once, over any device, and never ask which one
// it is. For the reader: in every function outputs come first, d means "the gradient of the loss
// with respect to", and a backward function stands directly below its forward.

// Dropout multiplies every element by 0 with probability p, otherwise by 1/(1-p), so that the mean
// stays (Srivastava et al. 2014). Which is decided by the element's index alone: the backward pass
// makes the mask again instead of storing it, and the GPU makes the same one.
struct Dropout {
    uint64_t key = 0;
    float p = 0;  // 0: off
    TINYGPT_HD bool on() const { return p > 0; }
    TINYGPT_HD float scale(uint64_t i) const {
        return double(random_bits(key, i) >> 32) < double(p) * 4294967296.0 ? 0.0f
                                                                            : 1.0f / (1.0f - p);
    }
};

// The few numbers of a step that live beside the weights, on the device, so that no step has to
// wait for the host: what the host set (lr), what the device found, and the guards' memory (§7).
struct StepState {
    static constexpr int kWindow = 128;  // how many past steps an outlier is judged by
    double lr = 0, loss = 0, grad_norm = 0;
    double clip_scale = 1;              // gradients are multiplied by this in the update
    int32_t skip = 0;                   // 1: this update is not made
    int32_t broken = 0;                 // 1: loss or norm was NaN or infinite
    int64_t updates = 0;                // updates made so far: AdamW's t
    int64_t skipped = 0, outliers = 0;  // totals of the run
    int64_t seen = 0;                   // steps in the window so far
    double losses[kWindow] = {}, norms[kWindow] = {};
};

// The rules of the update (§7).
struct Guards {
    double grad_clip = 1;      // limit of the global norm; 0: none
    double skip_outliers = 0;  // z-score above which an update is skipped; 0: never
    auto operator<=>(const Guards&) const = default;
};
struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    auto operator<=>(const AdamW&) const = default;
};

// How the CPU computes matrix products. bf16: operands are rounded to bf16, sums stay fp32.
struct MatmulOptions {
    bool bf16 = false;
};

// The CPU. `real` is float for training and double for checking gradients.
template <class real>
struct Cpu {
    using Real = real;        // masters, moments, statistics, losses
    using Weight = real;      // what the layers read (on a GPU in bf16: bf16 copies of the masters)
    using Gradient = real;    // of parameters
    using Activation = real;  // and their gradients
    static constexpr bool kSeparateMasters = false;  // masters and weights are one array
    static constexpr bool kHostMemory = true;        // the host may read and write its arrays
    MatmulOptions matmul_options;                    // bf16 operands or not

    // --- the machine
    static constexpr const char* kProgram = "train_gpt";
    std::string describe() const;   // one line
    size_t free_memory() const;     // bytes
    double peak_flops() const;      // operations a second, measured
    double peak_bandwidth() const;  // bytes a second, measured
    void synchronize() {}           // wait until everything asked for is done: here it always is
    void check_sizes(const Config&, int /*B*/) const {}  // fails for sizes it has no functions for

    // --- a step as one piece of work, and its numbers. A device that works behind the host's back
    // may do a step while the host prepares the next: it may be kStepsBehind steps late.
    static constexpr int kStepsBehind = 0;
    // Does the work. A device may record it, and repeat the recording for an equal key.
    template <class Key, class Work>
    void replay(const Key&, Work&& work) {
        work();
    }
    void post(const StepState*) {}  // asks for a copy of the state as it is after all work so far
    StepState fetch(const StepState* state) { return *state; }  // waits for the oldest such copy

    // --- memory
    template <class T>
    T* allocate(size_t count);
    template <class T>
    void release(T* pointer);
    template <class T>
    void zero(T* to, size_t count);
    template <class T>
    void upload(T* to, const T* from_host, size_t count);
    template <class T>
    void download(T* to_host, const T* from, size_t count);
    void weights_from_masters(Weight*, const Real*, size_t) {}  // nothing to do: one array

    // --- token and position embeddings
    void embed_forward(Activation* out, const int32_t* tokens, const Weight* wte, const Weight* wpe,
                       int B, int T, int C, int past, Dropout drop);
    void embed_backward(Gradient* dwte, Gradient* dwpe, const Activation* dout,
                        const int32_t* tokens, const int32_t* order, int B, int T, int C,
                        Dropout drop);

    // --- layernorm
    void layernorm_forward(Activation* out, Real* mean, Real* rstd, const Activation* x,
                           const Weight* weight, const Weight* bias, int rows, int C);
    void layernorm_backward(Activation* dx, Gradient* dweight, Gradient* dbias, Activation* dbranch,
                            Gradient* dbranch_bias, const Activation* dout,
                            const Activation* dresidual, const Activation* x, const Real* mean,
                            const Real* rstd, const Weight* weight, int rows, int C, Dropout drop,
                            bool accumulate);

    // --- linear layers: plain; followed by GELU; added to the residual stream
    void linear_forward(Activation* out, const Activation* x, const Weight* w, const Weight* b,
                        int rows, int C, int OC);
    void linear_backward(Activation* dx, Gradient* dw, Gradient* db, const Activation* dout,
                         const Activation* x, const Weight* w, int rows, int C, int OC,
                         bool accumulate);
    void linear_gelu_forward(Activation* gelu, Activation* pre, const Activation* x,
                             const Weight* w, const Weight* b, int rows, int C, int OC);
    void linear_gelu_backward(Activation* dpre, Gradient* dw, Gradient* dpre_bias,
                              const Activation* dout, const Activation* gelu, const Activation* pre,
                              const Weight* w, int rows, int C, int OC, bool accumulate);
    void linear_residual_forward(Activation* out, const Activation* residual, const Activation* x,
                                 const Weight* w, const Weight* b, int rows, int C, int OC,
                                 Dropout drop);

    // --- causal attention over packed queries, keys and values
    void attention_forward(Activation* out, Real* lse, const Activation* qkv, int B, int T, int NH,
                           int HS, Dropout drop);
    void attention_backward(Activation* dqkv, const Activation* dout, const Activation* out,
                            const Real* lse, const Activation* qkv, int B, int T, int NH, int HS,
                            Dropout drop);
    void attention_cached(Activation* out, const Activation* qkv, int past, int n, int NH, int HS);

    // --- head, softmax and cross-entropy in one
    static size_t head_workspace(int rows, int V);  // elements of `logits` below
    void head_forward(Real* losses, Activation* logits, const Activation* x, const Weight* w,
                      const int32_t* targets, int rows, int C, int V);
    void head_forward_backward(Real* losses, Activation* dx, Gradient* dw, Activation* logits,
                               const Activation* x, const Weight* w, const int32_t* targets,
                               int rows, int C, int V, Real scale, bool accumulate);
    void head_logits(Real* logits, const Activation* x, const Weight* w, int rows, int C, int V);

    // --- the update
    void begin_step(StepState* state, double lr);
    void add_loss(StepState* state, const Real* losses, int rows, double scale);
    void gradient_norm(StepState* state, const Gradient* grads, size_t count);
    void judge_step(StepState* state, Guards guards);
    void adamw(Weight* weights, Real* masters, Real* m, Real* v, const Gradient* grads,
               size_t count, size_t decayed, const StepState* state, AdamW hyper);
};

// --- memory: one aligned block; the host is the device

// Uninitialised memory for count elements, at a multiple of 64 bytes. Fails when there is none.
// Large blocks ask for large pages: fewer of them to look up when the packing below jumps from row
// to row.
template <class real>
template <class T>
T* Cpu<real>::allocate(size_t count) {
    const size_t large_page = size_t(1) << 21;
    size_t bytes = std::max<size_t>(count, 1) * sizeof(T);
    const size_t unit = bytes >= large_page ? large_page : 64;
    bytes = (bytes + unit - 1) / unit * unit;
    void* pointer = std::aligned_alloc(unit, bytes);
    TINYGPT_CHECK(pointer, "out of memory: %.2f GB more were needed", double(bytes) / 1e9);
#ifdef MADV_HUGEPAGE
    if (unit == large_page) ::madvise(pointer, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(pointer);
}
template <class real>
template <class T>
void Cpu<real>::release(T* pointer) {
    std::free(pointer);
}
template <class real>
template <class T>
void Cpu<real>::zero(T* to, size_t count) {
    std::memset(static_cast<void*>(to), 0, count * sizeof(T));
}
template <class real>
template <class T>
void Cpu<real>::upload(T* to, const T* from_host, size_t count) {
    std::memcpy(static_cast<void*>(to), from_host, count * sizeof(T));
}
template <class real>
template <class T>
void Cpu<real>::download(T* to_host, const T* from, size_t count) {
    std::memcpy(static_cast<void*>(to_host), from, count * sizeof(T));
}

// A sum over rows must not depend on the number of threads. So the rows are cut into a fixed number
// of stripes, each stripe is summed by one thread, and the stripes are added in order.
constexpr int kStripes = 32;
inline int stripe_begin(int rows, int stripe) { return int(int64_t(rows) * stripe / kStripes); }

// --- §4.1 Embedding: every position gets the vector of its token plus the vector of its place
//   out[b,t] = drop(wte[tokens[b,t]] + wpe[past + t])
//   walk> embedded     [8,  8]   -0.0054  -0.0335   0.1426   0.0302  -0.0398  -0.0485 ...

// out [B*T, C], tokens [B*T], wte [V, C], wpe [P, C]. past: position of the first column.
template <class real>
void Cpu<real>::embed_forward(real* out, const int32_t* tokens, const real* wte, const real* wpe,
                              int B, int T, int C, int past, Dropout drop) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < B * T; ++row) {
        const real* token = wte + size_t(tokens[row]) * C;
        const real* place = wpe + size_t(past + row % T) * C;
        real* o = out + size_t(row) * C;
        for (int c = 0; c < C; ++c) o[c] = token[c] + place[c];
        if (drop.on())
            for (int c = 0; c < C; ++c) o[c] *= drop.scale(size_t(row) * C + c);
    }
}

// The output is a plain sum, so its gradient goes to both addends as it is: each row of dout is
// added to its token's row of dwte and to its place's row of dwpe. Adds to both.
// Threads share the channels, not the rows: two rows may hold the same token. `order` (the rows
// sorted by token) is for devices that share out tokens instead.
template <class real>
void Cpu<real>::embed_backward(real* dwte, real* dwpe, const real* dout, const int32_t* tokens,
                               const int32_t* /*order*/, int B, int T, int C, Dropout drop) {
    const int slice = 16;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += slice)
        for (int row = 0; row < B * T; ++row) {
            const real* d = dout + size_t(row) * C;
            real* token = dwte + size_t(tokens[row]) * C;
            real* place = dwpe + size_t(row % T) * C;
            for (int c = first; c < std::min(C, first + slice); ++c) {
                real value = drop.on() ? d[c] * drop.scale(size_t(row) * C + c) : d[c];
                token[c] += value, place[c] += value;
            }
        }
}

// --- §4.2 Layernorm (Ba et al. 2016): each row is shifted to mean 0 and scaled to variance 1
//   m = mean(x)   r = 1/sqrt(mean((x - m)^2) + 1e-5)   n = (x - m) r   out = n weight + bias
//   walk>   ln_1       [8,  8]   -0.4404  -0.7322   1.0990  -0.0701  -0.7977  -0.8881 ...
constexpr double kLayernormEps = 1e-5;

// out, x [rows, C]; mean, rstd [rows]: kept for backward.
template <class real>
void Cpu<real>::layernorm_forward(real* out, real* mean, real* rstd, const real* x,
                                  const real* weight, const real* bias, int rows, int C) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const real* in = x + size_t(row) * C;
        real* o = out + size_t(row) * C;
        real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; ++c) sum += in[c];
        const real m = sum / C;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; ++c) squares += (in[c] - m) * (in[c] - m);
        const real r = 1 / std::sqrt(squares / C + real(kLayernormEps));
        for (int c = 0; c < C; ++c) o[c] = (in[c] - m) * r * weight[c] + bias[c];
        mean[row] = m, rstd[row] = r;
    }
}

// With g = dout * weight, the gradient of the normalised n:
//   dx_j = sum_i g_i dn_i/dx_j,   n_i = (x_i - m) r
//   dm/dx_j = 1/C,  dr/dx_j = -r^2 n_j / C  (the variance's derivative is 2 (x_j - m) / C)
//   dn_i/dx_j = r [i=j] - r/C - n_i n_j r / C
// so  dx = r (g - mean(g) - n mean(g n)): three terms, for x itself, for the mean, for the scale.
// Why the last two: adding a constant to the row, or stretching it, does not change n. So moving x
// that way cannot change the loss, and the gradient must have no part in these two directions.
// Layernorm reads the residual stream, which also flows on past it; dx joins both gradients:
//   dx = dresidual + the above        (dresidual may be null: nothing else read x; may be dx
//   itself)
// What was added to the stream just below came from a branch, x = residual + drop(branch), with a
// bias. Its gradients ride along, since dx is at hand:
//   dbranch = drop(dx) (written only when drop is on)   dbranch_bias = column sums of dbranch
// dweight = column sums of dout n, dbias = column sums of dout. dbranch_bias may be null.
// sets dx and dbranch; sets dweight, dbias, dbranch_bias [C], or adds to them if accumulate.
template <class real>
void Cpu<real>::layernorm_backward(real* dx, real* dweight, real* dbias, real* dbranch,
                                   real* dbranch_bias, const real* dout, const real* dresidual,
                                   const real* x, const real* mean, const real* rstd,
                                   const real* weight, int rows, int C, Dropout drop,
                                   bool accumulate) {
    std::vector<real> sums(size_t(kStripes) * 3 * C);  // of dweight, dbias, dbranch_bias
#pragma omp parallel for schedule(static)
    for (int stripe = 0; stripe < kStripes; ++stripe) {
        real* sum_w = sums.data() + size_t(stripe) * 3 * C;
        real *sum_b = sum_w + C, *sum_branch = sum_b + C;
        for (int row = stripe_begin(rows, stripe); row < stripe_begin(rows, stripe + 1); ++row) {
            const size_t at = size_t(row) * C;
            const real *in = x + at, *d = dout + at, m = mean[row], r = rstd[row];
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
                dx[at + c] = joined + r * (g - mean_g - n * mean_gn);
            }
            if (drop.on())
                for (int c = 0; c < C; ++c) dbranch[at + c] = dx[at + c] * drop.scale(at + c);
            const real* branch = drop.on() ? dbranch : dx;
            for (int c = 0; c < C; ++c) sum_branch[c] += branch[at + c];
        }
    }
    auto add_up = [&](real* to, int which) {
        for (int c = 0; to && c < C; ++c) {
            real total = accumulate ? to[c] : real(0);
            for (int stripe = 0; stripe < kStripes; ++stripe)
                total += sums[(size_t(stripe) * 3 + which) * C + c];
            to[c] = total;
        }
    };
    add_up(dweight, 0), add_up(dbias, 1), add_up(dbranch_bias, 2);
}

// --- §4.3 Products of matrices: where nearly all the arithmetic is

// A matrix in memory: element (i, j) is data[i * row + j * col]. One of the two steps is 1. So a
// transpose costs nothing: it is the same numbers, walked the other way.
template <class real>
struct View {
    const real* data;
    ptrdiff_t row, col;
    real operator()(ptrdiff_t i, ptrdiff_t j) const { return data[i * row + j * col]; }
    View from(ptrdiff_t i, ptrdiff_t j) const { return {data + i * row + j * col, row, col}; }
    View transposed() const { return {data, col, row}; }
};
// Row-major data, its rows `stride` elements apart; and the transpose of such a matrix.
template <class real>
View<real> rows_of(const real* data, ptrdiff_t stride) {
    return {data, stride, 1};
}
template <class real>
View<real> transpose_of(const real* data, ptrdiff_t stride) {
    return {data, 1, stride};
}

// The definition: c[m, n] = a[m, k] b[k, n]. That is all a product is: m n dot products of length
// k, so 2 m n k operations. c is row-major, its rows ldc apart.
template <class real>
void matmul_definition(real* c, ptrdiff_t ldc, View<real> a, View<real> b, int m, int n, int k) {
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
            double sum = 0;
            for (int p = 0; p < k; ++p) sum += double(a(i, p)) * double(b(p, j));
            c[i * ldc + j] = real(sum);
        }
}

// What to do with finished sums: nothing.
struct KeepSums {
    template <class real>
    void operator()(int, int, int, real*) const {}
};

// The one that is used makes the same sums some fifty times faster. It is §10, it is held to the
// definition by a test, and nothing before §10 needs to know how it works:
//   c = finish(a b)      or, if accumulate,      c = finish(c + a b)
// finish(row, col, count, values) may change `count` finished sums of a row, from column col, where
// they lie in c, while they are still in the cache: that is where bias, GELU and residual go.
template <class real, class Finish = KeepSums>
void matmul(real* c, ptrdiff_t ldc, View<real> a, View<real> b, int m, int n, int k,
            MatmulOptions options = {}, bool accumulate = false, Finish finish = {});

// --- §4.4 The linear layer: every output is a weighted sum of all inputs, plus a bias
//   out = x w + bias        x [rows, C], bias [OC]
// w is [C, OC], that is [in, out], as Hugging Face stores GPT-2.

template <class real>
struct AddBias {
    const real* bias;
    void operator()(int, int col, int count, real* values) const {
        for (int j = 0; j < count; ++j) values[j] += bias[col + j];
    }
};

// out [rows, OC] = x w + b.
template <class real>
void Cpu<real>::linear_forward(real* out, const real* x, const real* w, const real* b, int rows,
                               int C, int OC) {
    matmul(out, OC, rows_of(x, C), rows_of(w, OC), rows, OC, C, matmul_options, false,
           AddBias<real>{b});
}

// out[n] = column sums of x [rows, n], or adds them. The rows are added in order, whoever does it.
template <class real>
void column_sums(real* out, const real* x, int rows, int n, bool accumulate) {
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

// out_ro = sum over c of x_rc w_co + b_o is linear in each of its three parts, so each gradient is
// dout times what stood beside that part, summed over all the places where it was used:
//   dx_rc = sum_o dout_ro w_co      dx = dout w^T      every output the input fed
//   dw_co = sum_r x_rc dout_ro      dw = x^T dout      every row the weight served
//   db_o  = sum_r dout_ro           column sums        every row the bias was added to
// This is why x must be kept from forward to backward, and why backward takes twice as long.
// sets dx [rows, C]; sets dw [C, OC] and db [OC], or adds to them if accumulate. db may be null.
template <class real>
void Cpu<real>::linear_backward(real* dx, real* dw, real* db, const real* dout, const real* x,
                                const real* w, int rows, int C, int OC, bool accumulate) {
    matmul(dx, C, rows_of(dout, OC), transpose_of(w, OC), rows, C, OC, matmul_options);
    matmul(dw, OC, transpose_of(x, C), rows_of(dout, OC), C, OC, rows, matmul_options, accumulate);
    if (db) column_sums(db, dout, rows, OC, accumulate);
}

// --- §4.5 Causal self-attention (Vaswani et al. 2017): every position looks back at all before it
// qkv [B*T, 3C]: a row holds the queries of all NH heads, then the keys, then the values; a head is
// HS neighbouring channels, C = NH*HS. For each head, for query t and keys t2 <= t:
//   s[t,t2] = q[t].k[t2] / sqrt(HS)    p[t,t2] = e^s[t,t2] / sum of e^s[t,.]
//   out[t] = sum over t2 of p[t,t2] v[t2]
// 1/sqrt(HS) keeps the variance of s near 1 at any head size: q.k is a sum of HS products.
// The mask (t2 <= t) makes it causal: no position sees what it is to predict. It costs nothing: the
// scores behind it are not made at all, which halves the work, but for tiles on the diagonal.
// lse[t] = log of that sum of e^s: all that the backward pass needs to make p again, so that no
// T x T matrix is ever kept. Dropout, where it is on, multiplies p by a mask, of index
// ((b NH + h) T + t) T + t2, after the sum.
//   walk> att of t=0 is its own value, qkv[16..23], since it sees nobody else:

// The definition, of one head: q, k, v with rows `stride` apart, out [T, HS] with rows out_stride
// apart. place: b NH + h.
template <class real>
void attention_definition(real* out, ptrdiff_t out_stride, const real* q, const real* k,
                          const real* v, ptrdiff_t stride, int T, int HS, Dropout drop,
                          uint64_t place) {
    for (int t = 0; t < T; ++t) {
        std::vector<double> p(t + 1), sum(HS);
        double total = 0;
        for (int t2 = 0; t2 <= t; ++t2) {
            for (int i = 0; i < HS; ++i)
                p[t2] += double(q[t * stride + i]) * double(k[t2 * stride + i]);
            total += p[t2] = std::exp(p[t2] / std::sqrt(double(HS)));
        }
        for (int t2 = 0; t2 <= t; ++t2) {
            if (drop.on()) p[t2] *= double(drop.scale((place * T + t) * T + t2));
            for (int i = 0; i < HS; ++i) sum[i] += p[t2] / total * double(v[t2 * stride + i]);
        }
        for (int i = 0; i < HS; ++i) out[t * out_stride + i] = real(sum[i]);
    }
}

// The fast ones, in §10, tested against it. Forward sets out [B*T, C] and lse [B, NH, T].
template <class real>
void attention_forward(real* out, real* lse, const real* qkv, int B, int T, int NH, int HS,
                       Dropout drop);

// Backward goes the three lines of forward upside down. dout is the gradient of out.
//   out[t] = sum p[t,t2] v[t2]:  dv[t2] = sum over t of p[t,t2] dout[t],   dp[t,t2] = dout[t].v[t2]
//   p = softmax(s), of one row:  dp_j/ds_i = p_j ([i=j] - p_i),  so
//                                ds_i = sum_j dp_j p_j ([i=j] - p_i) = p_i (dp_i - D)
//                                D = sum_j p_j dp_j = dout . sum_j p_j v_j = dout . out
//   s = q k^T / sqrt(HS):        dq[t] = sum over t2 of ds[t,t2] k[t2] / sqrt(HS)
//                                dk[t2] = sum over t of ds[t,t2] q[t] / sqrt(HS)
// D is one number a row, from dout and out alone; p is made again from q, k and lse. Dropout's mask
// multiplies p in the first line and dp in the second.
// Sets dqkv [B*T, 3C] from dout, out [B*T, C], lse [B, NH, T] and qkv [B*T, 3C].
template <class real>
void attention_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                        const real* qkv, int B, int T, int NH, int HS, Dropout drop);

// Generation: out [n, C] for positions past..past+n-1 of one sequence, whose qkv rows 0..past+n-1
// are the cache of keys and values.
template <class real>
void attention_cached(real* out, const real* qkv, int past, int n, int NH, int HS);

template <class real>
void Cpu<real>::attention_forward(real* out, real* lse, const real* qkv, int B, int T, int NH,
                                  int HS, Dropout drop) {
    tinygpt::attention_forward(out, lse, qkv, B, T, NH, HS, drop);
}
template <class real>
void Cpu<real>::attention_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                                   const real* qkv, int B, int T, int NH, int HS, Dropout drop) {
    tinygpt::attention_backward(dqkv, dout, out, lse, qkv, B, T, NH, HS, drop);
}
template <class real>
void Cpu<real>::attention_cached(real* out, const real* qkv, int past, int n, int NH, int HS) {
    tinygpt::attention_cached(out, qkv, past, n, NH, HS);
}

// --- §4.6 The MLP's first layer: linear, then GELU with tanh (Hendrycks and Gimpel 2016)
//   gelu(x) = x/2 (1 + tanh u),   u = sqrt(2/pi) (x + 0.044715 x^3)
// and (1 + tanh u)/2 = 1/(1 + e^(-2u)) = s, the logistic function: gelu(x) = x s, one exponential.
// Its derivative: ds/du = 2 s (1 - s), so gelu'(x) = s + x 2 s (1 - s) du/dx.

// e^x of one number, in §10: float's within 2 units in the last place, double's the library's.
inline float exp_fast(float x);
inline double exp_fast(double x);

// Careful: at -10 the true value is -1e-37; stopping there keeps -infinity * 0 away.
template <class real>
real gelu(real x) {
    x = x < -10 ? real(-10) : x;
    const real inner = real(-1.5957691216057308) * x * (1 + real(0.044715) * x * x);
    return x / (1 + exp_fast(inner));
}
template <class real>
real gelu_derivative(real x) {
    x = x < -10 ? real(-10) : x;
    x = x > 10 ? real(10) : x;
    const real slope = real(1.5957691216057308) * (1 + 3 * real(0.044715) * x * x);
    const real inner = real(-1.5957691216057308) * x * (1 + real(0.044715) * x * x);
    const real s = 1 / (1 + exp_fast(inner));
    return s + x * s * (1 - s) * slope;
}

// Also keeps the sum before the GELU in pre [rows, OC]: the GELU's backward needs it.
template <class real>
struct AddBiasGelu {
    const real* bias;
    real* pre;
    int OC;
    void operator()(int row, int col, int count, real* values) const {
        real* kept = pre + size_t(row) * OC + col;
        for (int j = 0; j < count; ++j) kept[j] = values[j] + bias[col + j];
        for (int j = 0; j < count; ++j) values[j] = gelu(kept[j]);
    }
};

// gelu [rows, OC] = GELU(pre), pre = x w + b. Both are kept.
template <class real>
void Cpu<real>::linear_gelu_forward(real* gelu, real* pre, const real* x, const real* w,
                                    const real* b, int rows, int C, int OC) {
    matmul(gelu, OC, rows_of(x, C), rows_of(w, OC), rows, OC, C, matmul_options, false,
           AddBiasGelu<real>{b, pre, OC});
}

// Multiplies a finished gradient of gelu(pre) by gelu'(pre): the chain rule, in place.
template <class real>
struct TimesGeluDerivative {
    const real* pre;
    int C;
    void operator()(int row, int col, int count, real* values) const {
        const real* x = pre + size_t(row) * C + col;
        for (int j = 0; j < count; ++j) values[j] *= gelu_derivative(x[j]);
    }
};

// Backward of a linear layer whose input was gelu = GELU(pre), and of that GELU:
//   dpre = (dout w^T) gelu'(pre)     dw = gelu^T dout     dpre_bias = column sums of dpre
// dpre_bias is the bias gradient of the layer that made pre. Shapes: dpre, gelu, pre [rows, C],
// dout [rows, OC], w [C, OC]. sets dpre; sets dw, dpre_bias [C], or adds to them if accumulate.
template <class real>
void Cpu<real>::linear_gelu_backward(real* dpre, real* dw, real* dpre_bias, const real* dout,
                                     const real* gelu, const real* pre, const real* w, int rows,
                                     int C, int OC, bool accumulate) {
    matmul(dpre, C, rows_of(dout, OC), transpose_of(w, OC), rows, C, OC, matmul_options, false,
           TimesGeluDerivative<real>{pre, C});
    matmul(dw, OC, transpose_of(gelu, C), rows_of(dout, OC), C, OC, rows, matmul_options,
           accumulate);
    column_sums(dpre_bias, dpre, rows, C, accumulate);
}

// --- §4.7 The residual stream: a branch ends in a linear layer whose output is added to x
//   out = x + drop(branch w + bias)
// The sum passes its gradient on unchanged to both sides. That is what lets a deep model learn: the
// gradient of the loss reaches every layer by a path without a single multiplication.

template <class real>
struct AddBiasResidual {
    const real *bias, *residual;
    int OC;
    Dropout drop;
    void operator()(int row, int col, int count, real* values) const {
        const size_t at = size_t(row) * OC + col;
        for (int j = 0; j < count; ++j) values[j] += bias[col + j];
        if (drop.on())
            for (int j = 0; j < count; ++j) values[j] *= drop.scale(at + j);
        for (int j = 0; j < count; ++j) values[j] += residual[at + j];
    }
};

// out [rows, OC] = residual + drop(x w + b). Its backward is linear_backward of drop(dout); the
// residual's gradient is dout itself (see layernorm_backward, which makes both).
template <class real>
void Cpu<real>::linear_residual_forward(real* out, const real* residual, const real* x,
                                        const real* w, const real* b, int rows, int C, int OC,
                                        Dropout drop) {
    matmul(out, OC, rows_of(x, C), rows_of(w, OC), rows, OC, C, matmul_options, false,
           AddBiasResidual<real>{b, residual, OC, drop});
}

// --- §4.8 The head: logits, softmax and cross-entropy in one
//   logits = x w^T,  w [V, C]      p = softmax(logits)      loss = -log p[target]
// Every token gets a score, and the loss is how surprised the softmax is by the one that came: 0 if
// it was certain of it, log V if it knows nothing. e^loss, the perplexity, is the number of tokens
// among which it seems to be guessing.
//   walk> loss of the batch: the mean of 8 such = 2.433049; knowing nothing is log 11 = 2.3979
//   walk> cat     -0.8429       0.4305        0.0351   <- the target
//   walk> sum of exp 12.2585; loss = log(sum) - logit of the target = 2.5062 - -0.8429 = 3.3491
// logits [rows, V] is by far the largest thing in the model (0.8 GB for 4 x 1024 rows of GPT-2), so
// it is made a block of rows at a time, and used for everything it is needed for while it is there.

constexpr int kHeadRows = 1024;  // of one block
template <class real>
size_t Cpu<real>::head_workspace(int rows, int V) {
    return size_t(std::min(rows, kHeadRows)) * size_t(V);
}

// The largest of n >= 1 numbers, as the largest of sixteen lanes: so the loop vectorises.
template <class real>
real maximum(const real* x, int n) {
    constexpr int L = 16;
    real lanes[L];
    for (int j = 0; j < L; ++j) lanes[j] = x[std::min(j, n - 1)];
    for (int i = 0; i + L <= n; i += L)
        for (int j = 0; j < L; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (int i = n / L * L; i < n; ++i) lanes[0] = std::max(lanes[0], x[i]);
    return *std::max_element(lanes, lanes + L);
}

// x [count] becomes e^(x - shift); returns the sum. Fast, in §10.
template <class real>
real exp_and_sum(real* x, real shift, int count);

// Loss of each row: log(sum exp(logits)) - logits[target], with the maximum taken out so that exp
// cannot overflow. With scale > 0 the row of logits becomes its own gradient:
//   dloss/dlogits_v = d/dlogits_v (log sum_u exp(logits_u) - logits_target) = p_v - [v = target]
// softmax minus one-hot, times scale (1/8 in the walk, and -0.1206 = (0.0351 - 1) / 8):
//   walk> dlogits of the first row, (p - [target]) / 8:  0.0094 -0.1206  0.0051  0.0179  0.0290
// A row whose target is kIgnore has loss 0 and gradient 0.
// sets losses [rows]; logits [rows, V] in place.
template <class real>
void softmax_cross_entropy(real* losses, real* logits, const int32_t* targets, int rows, int V,
                           real scale) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; ++row) {
        real* l = logits + size_t(row) * V;
        const int target = targets[row];
        if (target < 0) {
            losses[row] = 0;
            if (scale > 0) std::fill(l, l + V, real(0));
            continue;
        }
        const real highest = maximum(l, V);
        const real at_target = l[target];
        const real sum = exp_and_sum(l, highest, V);  // l[v] = exp(l[v] - highest)
        losses[row] = std::log(sum) + highest - at_target;
        if (scale <= 0) continue;
        const real factor = scale / sum;
        for (int v = 0; v < V; ++v) l[v] *= factor;
        l[target] -= scale;
    }
}

// sets losses [rows]. x [rows, C], w [V, C]; logits is workspace.
template <class real>
void Cpu<real>::head_forward(real* losses, real* logits, const real* x, const real* w,
                             const int32_t* targets, int rows, int C, int V) {
    for (int first = 0; first < rows; first += kHeadRows) {
        const int n = std::min(kHeadRows, rows - first);
        head_logits(logits, x + size_t(first) * C, w, n, C, V);
        softmax_cross_entropy(losses + first, logits, targets + first, n, V, real(0));
    }
}

// As head_forward, and the gradients of scale * (sum of losses):
//   dx = dlogits w      dw = dlogits^T x
// sets losses [rows], dx [rows, C]; sets dw [V, C], or adds to it if accumulate.
template <class real>
void Cpu<real>::head_forward_backward(real* losses, real* dx, real* dw, real* logits, const real* x,
                                      const real* w, const int32_t* targets, int rows, int C, int V,
                                      real scale, bool accumulate) {
    for (int first = 0; first < rows; first += kHeadRows) {
        const int n = std::min(kHeadRows, rows - first);
        const real* x_block = x + size_t(first) * C;
        head_logits(logits, x_block, w, n, C, V);
        softmax_cross_entropy(losses + first, logits, targets + first, n, V, scale);
        matmul(dx + size_t(first) * C, C, rows_of(logits, V), rows_of(w, C), n, C, V,
               matmul_options);
        matmul(dw, C, transpose_of(logits, V), rows_of(x_block, C), V, C, n, matmul_options,
               accumulate || first > 0);
    }
}

// logits [rows, V] = x w^T: for generation, which wants the scores themselves.
template <class real>
void Cpu<real>::head_logits(real* logits, const real* x, const real* w, int rows, int C, int V) {
    matmul(logits, V, rows_of(x, C), transpose_of(w, C), rows, V, C, matmul_options);
}

// =================================================================================================
// §5 Forward: GPT-2 on one screen
// =================================================================================================
// We hold every layer; now they are put together. Memory is what limits training, so only what
// backward cannot do without is kept, for each layer:
//   ln_1, att, ln_2, gelu     the input of each matmul: its weight gradient is input^T dout
//   x (twice), mean, rstd     the input of each layernorm, and what it was normalised by
//   qkv, att, lse             attention makes its probabilities again from these
//   fc                        the GELU's derivative is taken at its input
// That is 16 C numbers a position and layer. Attention's T x T probabilities and the logits of more
// than 1024 rows are never kept, and one set of gradients of activations serves all layers.

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
    Activation* logits;           // workspace of the head: never all rows at once on a CPU
    Real* losses;                 // [rows]
    Real* next_logits;            // [V], of one row, for generation
    // Gradients of activations. One set serves all layers: each is used up before the next needs
    // it.
    Activation *dx, *dbranch, *dwide, *dnarrow;  // [rows, C], [rows, C], [rows, 4C], [rows, C]
};

// What the memory is for. generation: one sequence, one set of buffers for all layers, except qkv,
// whose rows are the key/value cache.
enum class Use { training, evaluation, generation };

// Hands out aligned pieces of one block; with no block it only counts, which is how the memory a
// run will need is known before any is taken.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * sizeof(T) + 255) / 256 * 256;
        return piece;
    }
};

// Places every buffer of `a` into the arena.
template <class Device>
void place(Activations<Device>& a, Arena& arena, const Config& config, int B, int T, Use use) {
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
            l.fc = wide(4 * C), l.gelu = wide(4 * C), l.x_out = wide(C);
            l.qkv = wide(3 * C);
            l.ln_1_mean = per_row(), l.ln_1_rstd = per_row();
            l.ln_2_mean = per_row(), l.ln_2_rstd = per_row();
            l.lse = arena.take<Real>(rows * size_t(config.n_head));
        } else {
            // nothing is kept: all layers share one set; x_out is read before it is set
            l = a.layers[0];
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

// A model on a device: the parameters, what training adds to them, and the activations of one
// batch.
template <class Device>
struct Gpt2 {
    using Real = typename Device::Real;
    using Weight = typename Device::Weight;
    using Gradient = typename Device::Gradient;
    Config config;
    Layout layout;
    Device device;
    Weight* weights = nullptr;        // flat, layout.size
    Real* masters = nullptr;          // flat; the same array where Device has no separate masters
    Gradient* grads = nullptr;        // flat
    Real *m = nullptr, *v = nullptr;  // AdamW's moments, flat
    StepState* state = nullptr;
    Parameters<Weight> w;    // the flat weights by name
    Parameters<Gradient> g;  // the flat gradients by name
    Activations<Device> a;
    int B = 0, T = 0;  // what the activations have room for
    char* block = nullptr;

    explicit Gpt2(const Config& config, Device device = {})
        : config(config), layout(layout_of(config)), device(device) {
        weights = this->device.template allocate<Weight>(layout.size);
        masters = Device::kSeparateMasters ? this->device.template allocate<Real>(layout.size)
                                           : reinterpret_cast<Real*>(weights);
        point_into(w, weights, config, layout);
        state = this->device.template allocate<StepState>(1);
        StepState fresh;
        this->device.upload(state, &fresh, 1);
    }
    Gpt2(const Gpt2&) = delete;
    ~Gpt2() {
        for (Real* array : {m, v, Device::kSeparateMasters ? masters : nullptr})
            device.release(array);
        device.release(weights), device.release(grads), device.release(block),
            device.release(state);
    }

    // Makes room for batches of up to B x T. For training also for gradients and moments, set to 0.
    void reserve(int rows, int columns, Use use) {
        device.release(std::exchange(block, nullptr));
        Arena arena;
        place(a, arena, config, rows, columns, use);
        arena = {device.template allocate<char>(arena.used), 0};
        block = arena.base, B = rows, T = columns;
        place(a, arena, config, rows, columns, use);
        if (use != Use::training || grads) return;
        grads = device.template allocate<Gradient>(layout.size);
        m = device.template allocate<Real>(layout.size);
        v = device.template allocate<Real>(layout.size);
        device.zero(grads, layout.size), device.zero(m, layout.size), device.zero(v, layout.size);
        point_into(g, grads, config, layout);
    }

    // Takes masters [layout.size] from the host.
    void set_weights(const Real* host) {
        device.upload(masters, host, layout.size);
        device.weights_from_masters(weights, masters, layout.size);
    }
    std::vector<Real> get_weights() {
        std::vector<Real> host(layout.size);
        device.download(host.data(), masters, layout.size);
        return host;
    }
    void initialise(uint64_t seed) {
        std::vector<Real> host(layout.size);
        tinygpt::initialise(host.data(), config, layout, seed);
        set_weights(host.data());
    }
};

// Bytes that a model will take on its device, by what they are for.
struct MemoryNeed {
    size_t weights = 0, gradients = 0, moments = 0, activations = 0;
    size_t total() const { return weights + gradients + moments + activations; }
};
template <class Device>
MemoryNeed memory_need(const Config& config, int B, int T, Use use) {
    const size_t n = layout_of(config).size;
    MemoryNeed need;
    need.weights = n * sizeof(typename Device::Weight);
    if (Device::kSeparateMasters) need.weights += n * sizeof(typename Device::Real);
    Activations<Device> a;
    Arena arena;
    place(a, arena, config, B, T, use);
    need.activations = arena.used;
    if (use != Use::training) return need;
    need.gradients = n * sizeof(typename Device::Gradient);
    need.moments = 2 * n * sizeof(typename Device::Real);
    return need;
}

// How one pass is made. Dropout acts when pass.dropout is set: in training, never in evaluation.
struct Pass {
    int B = 0, T = 0;
    bool dropout = false;
    uint64_t dropout_key = 0;  // differs in every micro-batch of every step
    int past = 0;              // generation: positions already in the key/value cache; then B = 1
    bool cached = false;
};

// The mask at one place of the model: place 0 follows the embedding, then three in every layer.
inline Dropout dropout_at(const Config& config, const Pass& pass, int place) {
    if (!pass.dropout) return {};
    return {random_key(pass.dropout_key, uint64_t(place), 4), config.dropout};
}

// tokens a.inputs [B, T] -> a.ln_f [B*T, C], from which the head makes logits. The whole of GPT-2.
template <class Device>
void forward(Gpt2<Device>& model, const Pass& pass) {
    const Config& config = model.config;
    Device& device = model.device;
    auto& a = model.a;
    auto& w = model.w;
    const int B = pass.B, T = pass.T, rows = B * T, C = config.n_embd;
    const int NH = config.n_head, HS = config.head_size();
    auto drop = [&](int place) { return dropout_at(config, pass, place); };

    device.embed_forward(a.embedded, a.inputs, w.wte, w.wpe, B, T, C, pass.past, drop(0));
    auto* x = a.embedded;  // the residual stream: every layer reads it and adds to it
    for (int i = 0; i < config.n_layer; ++i) {
        auto& l = a.layers[size_t(i)];
        const auto& p = w.h[size_t(i)];
        auto* qkv = l.qkv + size_t(pass.past) * 3 * C;  // new rows go behind the cached ones
        device.layernorm_forward(l.ln_1, l.ln_1_mean, l.ln_1_rstd, x, p.ln_1_weight, p.ln_1_bias,
                                 rows, C);
        device.linear_forward(qkv, l.ln_1, p.c_attn_weight, p.c_attn_bias, rows, C, 3 * C);
        if (pass.cached)
            device.attention_cached(l.att, l.qkv, pass.past, T, NH, HS);
        else
            device.attention_forward(l.att, l.lse, qkv, B, T, NH, HS, drop(3 * i + 1));
        device.linear_residual_forward(l.x_mid, x, l.att, p.attn_proj_weight, p.attn_proj_bias,
                                       rows, C, C, drop(3 * i + 2));
        device.layernorm_forward(l.ln_2, l.ln_2_mean, l.ln_2_rstd, l.x_mid, p.ln_2_weight,
                                 p.ln_2_bias, rows, C);
        device.linear_gelu_forward(l.gelu, l.fc, l.ln_2, p.c_fc_weight, p.c_fc_bias, rows, C,
                                   4 * C);
        device.linear_residual_forward(l.x_out, l.x_mid, l.gelu, p.mlp_proj_weight, p.mlp_proj_bias,
                                       rows, 4 * C, C, drop(3 * i + 3));
        x = l.x_out;
    }
    device.layernorm_forward(a.ln_f, a.ln_f_mean, a.ln_f_rstd, x, w.ln_f_weight, w.ln_f_bias, rows,
                             C);
}

// =================================================================================================
// §6 Backward: the same lines upside down
// =================================================================================================
// We hold a.ln_f [rows, C], the targets, and all that forward kept. The head turns them into the
// loss and, while a block of logits is at hand, into its own two gradients. From there every line
// of forward has its mirror image, last first. dx is the gradient of the residual stream; since
// x_out = x_mid + branch, it goes to the branch as it is and past it as it is, and layernorm's
// backward joins the two again. Read it beside forward, from the bottom: each call has its partner
// there, with d's added.
//   walk> wte.weight                  -0.50763749  -0.50763749
//   walk> h.0.attn.c_attn.weight       0.00059701   0.00059701
// (Backward's gradient of one weight, and the slope found by moving that weight a little.)

// sets (first micro-batch) or adds to every parameter gradient; sets a.losses. `scale` is 1 /
// (number of scored targets of the whole step): the loss of a step is the mean over all its
// micro-batches.
template <class Device>
void backward(Gpt2<Device>& model, const Pass& pass, double scale, bool first_micro_batch) {
    const Config& config = model.config;
    Device& device = model.device;
    auto& a = model.a;
    auto& w = model.w;
    auto& g = model.g;
    const bool add = !first_micro_batch;
    const int B = pass.B, T = pass.T, rows = B * T, C = config.n_embd, V = config.vocab_size;
    const int NH = config.n_head, HS = config.head_size(), L = config.n_layer;
    auto drop = [&](int place) { return dropout_at(config, pass, place); };
    // The input of layer i is the output of the layer below.
    auto input_of = [&](int i) { return i > 0 ? a.layers[size_t(i - 1)].x_out : a.embedded; };
    auto* dbranch = pass.dropout ? a.dbranch : a.dx;

    device.head_forward_backward(a.losses, a.dnarrow, g.lm_head, a.logits, a.ln_f, w.lm_head,
                                 a.targets, rows, C, V, typename Device::Real(scale), add);
    // The projection's bias gradient of the layer below rides on each layernorm's backward.
    auto bias_below = [&](int i) { return i > 0 ? g.h[size_t(i - 1)].mlp_proj_bias : nullptr; };
    device.layernorm_backward(a.dx, g.ln_f_weight, g.ln_f_bias, dbranch, bias_below(L), a.dnarrow,
                              nullptr, input_of(L), a.ln_f_mean, a.ln_f_rstd, w.ln_f_weight, rows,
                              C, drop(3 * L), add);
    for (int i = L - 1; i >= 0; --i) {
        auto& l = a.layers[size_t(i)];
        const auto& p = w.h[size_t(i)];
        const auto& d = g.h[size_t(i)];
        // MLP: projection and GELU, then c_fc, then ln_2, which joins dx.
        device.linear_gelu_backward(a.dwide, d.mlp_proj_weight, d.c_fc_bias, dbranch, l.gelu, l.fc,
                                    p.mlp_proj_weight, rows, 4 * C, C, add);
        device.linear_backward(a.dnarrow, d.c_fc_weight, nullptr, a.dwide, l.ln_2, p.c_fc_weight,
                               rows, C, 4 * C, add);
        device.layernorm_backward(a.dx, d.ln_2_weight, d.ln_2_bias, dbranch, d.attn_proj_bias,
                                  a.dnarrow, a.dx, l.x_mid, l.ln_2_mean, l.ln_2_rstd, p.ln_2_weight,
                                  rows, C, drop(3 * i + 2), add);
        // Attention: projection, attention itself (dwide serves as dqkv), c_attn, then ln_1.
        device.linear_backward(a.dnarrow, d.attn_proj_weight, nullptr, dbranch, l.att,
                               p.attn_proj_weight, rows, C, C, add);
        device.attention_backward(a.dwide, a.dnarrow, l.att, l.lse, l.qkv, B, T, NH, HS,
                                  drop(3 * i + 1));
        device.linear_backward(a.dnarrow, d.c_attn_weight, d.c_attn_bias, a.dwide, l.ln_1,
                               p.c_attn_weight, rows, C, 3 * C, add);
        device.layernorm_backward(a.dx, d.ln_1_weight, d.ln_1_bias, dbranch, bias_below(i),
                                  a.dnarrow, a.dx, input_of(i), l.ln_1_mean, l.ln_1_rstd,
                                  p.ln_1_weight, rows, C, i > 0 ? drop(3 * i) : Dropout{}, add);
    }
    // The embeddings are only ever added to: wpe, and wte where the head has not set it already.
    if (first_micro_batch) device.zero(g.wpe, size_t(config.n_positions) * C);
    if (first_micro_batch && config.untied_head) device.zero(g.wte, size_t(V) * C);
    device.embed_backward(g.wte, g.wpe, a.dx, a.inputs, a.order, B, T, C, drop(0));
}

// =================================================================================================
// §7 The update: how far, how much, and whether at all
// =================================================================================================
// We hold a gradient for every parameter, flat. It says which way is uphill from here, for this
// batch; it does not say how far to trust it. Three questions: which learning rate (schedule), is
// the gradient too long (clip) or not to be trusted (guards), and which way to go (AdamW).

// Schedules. Warm-up: at the start the moments of AdamW are estimates from a few batches, and the
// model changes fast; small steps do no harm. Decay: near the end, the noise of single batches is
// what keeps the loss up, and smaller steps average it away.

enum class Schedule { cosine, linear, constant, wsd };
struct LearningRate {
    Schedule schedule = Schedule::cosine;
    double peak = 1e-3, min_fraction = 0.1;
    int64_t warmup = 0, steps = 1;  // warm-up steps; N, all steps
};

// The rate of step s = 0 .. N-1. Warm-up: peak (s+1)/warmup. Then, with r from 0 towards 1 and
// lo = peak min_fraction: cosine lo + (peak - lo)(1 + cos(pi r))/2 (Loshchilov, Hutter 2017);
// linear; constant; wsd (warm-up, stable, decay; Hu et al. 2024): constant for 80 % of all steps,
// then lo + (peak - lo)(1 - sqrt(r')), r' over what is left.
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

// How many standard deviations `value` lies above the mean of the last `count` values.
TINYGPT_HD inline double z_score(const double* window, int64_t count, double value) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i) mean += window[i];
    mean /= double(count);
    for (int64_t i = 0; i < count; ++i) squares += (window[i] - mean) * (window[i] - mean);
    const double deviation = sqrt(squares / double(count));
    return deviation > 0 ? (value - mean) / deviation : 0;
}

// Decides about the step in `state` from its loss and norm: sets broken, skip and clip_scale,
// counts, and remembers good values. A NaN or an infinity always skips: it must never reach the
// weights. Clipping: a norm above the limit scales the gradient by limit / norm (Pascanu et al.
// 2013).
TINYGPT_HD inline void judge(StepState& state, const Guards& guards) {
    const int64_t window = StepState::kWindow;
    const double limit = 1.7976931348623157e308;  // comparisons with a NaN are false
    state.broken = !(state.loss <= limit && state.loss >= -limit && state.grad_norm <= limit);
    bool outlier = false;
    if (!state.broken && guards.skip_outliers > 0 && state.seen >= window)
        outlier = z_score(state.losses, window, state.loss) > guards.skip_outliers ||
                  z_score(state.norms, window, state.grad_norm) > guards.skip_outliers;
    state.skip = state.broken || outlier;
    state.outliers += outlier, state.skipped += state.skip, state.updates += !state.skip;
    state.clip_scale = guards.grad_clip > 0 && state.grad_norm > guards.grad_clip
                           ? guards.grad_clip / state.grad_norm
                           : 1.0;
    if (state.broken) return;
    state.losses[state.seen % window] = state.loss;
    state.norms[state.seen % window] = state.grad_norm;
    ++state.seen;
}

// AdamW (Loshchilov, Hutter 2019). m remembers which way the gradient went lately, v how large it
// was (its square). The step m / sqrt(v) has no unit: about 1 for a weight whose gradient always
// points the same way, about 0 for one whose gradient only jitters, however large either is. So
// every weight moves by about lr at most. m and v start at 0, so early on they are too small by
// 1 - beta^t, and are divided by that. The decay is not part of the gradient: it shrinks the weight
// itself, and only that of matrices (§3).
// One element, t = number of this update, from 1:
//   m <- beta1 m + (1-beta1) g        v <- beta2 v + (1-beta2) g^2
//   w <- w - lr (m/(1-beta1^t) / (sqrt(v/(1-beta2^t)) + eps) + weight_decay w)
// m_scale = 1/(1-beta1^t), v_scale = 1/(1-beta2^t). decay is 0 for vectors.
//   walk> g  = -0.507637 * 0.196058 = -0.099526
//   walk> w  = 0.141984 - 0.1 (-0.099526 / (sqrt(0.009905) + 1e-8) + 0.1 * 0.141984) = 0.240565
template <class real>
TINYGPT_HD inline void adamw_element(real& w, real& m, real& v, real g, real lr, real m_scale,
                                     real v_scale, real beta1, real beta2, real eps, real decay) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    w -= lr * (m * m_scale / (std::sqrt(v * v_scale) + eps) + decay * w);
}

template <class real>
void Cpu<real>::begin_step(StepState* state, double lr) {
    state->lr = lr, state->loss = 0;
}

// state.loss += scale * sum of losses [rows].
template <class real>
void Cpu<real>::add_loss(StepState* state, const real* losses, int rows, double scale) {
    double sum = 0;
    for (int row = 0; row < rows; ++row) sum += double(losses[row]);
    state->loss += scale * sum;
}

// state.grad_norm = the length of the whole gradient as one vector. Fixed pieces, added in order.
template <class real>
void Cpu<real>::gradient_norm(StepState* state, const real* grads, size_t count) {
    const size_t piece = 1 << 14, pieces = (count + piece - 1) / piece;
    std::vector<double> sums(pieces);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < pieces; ++i) {
        const real* g = grads + i * piece;
        const size_t n = std::min(piece, count - i * piece);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t j = 0; j < n; ++j) sum += double(g[j]) * double(g[j]);
        sums[i] = sum;
    }
    state->grad_norm = std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

template <class real>
void Cpu<real>::judge_step(StepState* state, Guards guards) {
    judge(*state, guards);
}

// Updates masters, m and v [count] from grads, unless state.skip. Elements below `decayed` decay.
template <class real>
void Cpu<real>::adamw(real*, real* masters, real* m, real* v, const real* grads, size_t count,
                      size_t decayed, const StepState* state, AdamW hyper) {
    if (state->skip) return;
    const double t = double(state->updates);
    const real m_scale = real(1 / (1 - std::pow(hyper.beta1, t)));
    const real v_scale = real(1 / (1 - std::pow(hyper.beta2, t)));
    const real lr = real(state->lr), clip = real(state->clip_scale);
    const real beta1 = real(hyper.beta1), beta2 = real(hyper.beta2), eps = real(hyper.eps);
    auto update = [&](size_t begin, size_t end, real decay) {
#pragma omp parallel for simd schedule(static)
        for (size_t i = begin; i < end; ++i)
            adamw_element(masters[i], m[i], v[i], grads[i] * clip, lr, m_scale, v_scale, beta1,
                          beta2, eps, decay);
    };
    update(0, decayed, real(hyper.weight_decay)), update(decayed, count, real(0));
}

// =================================================================================================
// §8 One training step
// =================================================================================================
// We hold everything. A step is: for each micro-batch forward, backward, then one update.
// Gradients of the micro-batches add up, and each is scaled by 1 / (targets of the whole step): k
// micro-batches of B rows make the same update as one of k B rows, in a k-th of the memory.

struct StepOptions {
    int grad_accum_steps = 1;
    uint64_t seed = 0;
    LearningRate rate;
    AdamW adamw;
    Guards guards;
};

// Puts a batch where the model reads it.
template <class Device>
void set_batch(Gpt2<Device>& model, const Batch& batch) {
    const size_t rows = batch.inputs.size();
    model.device.upload(model.a.inputs, batch.inputs.data(), rows);
    model.device.upload(model.a.targets, batch.targets.data(), rows);
    model.device.upload(model.a.order, batch.order.data(), rows);
}

// One update with the gradients that model.grads holds.
template <class Device>
void update(Gpt2<Device>& model, const StepOptions& o) {
    model.device.gradient_norm(model.state, model.grads, model.layout.size);
    model.device.judge_step(model.state, o.guards);
    model.device.adamw(model.weights, model.masters, model.m, model.v, model.grads,
                       model.layout.size, model.layout.decayed, model.state, o.adamw);
}

// All that decides which functions a micro-batch calls with which arguments, but for dropout's
// masks. What changes from step to step (tokens, learning rate, loss) lies in the device's memory.
struct WorkKey {
    const void* memory;  // the model's, which no other model has
    int B, T;
    double scale;
    bool first, last;  // of the step's micro-batches
    AdamW adamw;
    Guards guards;
    auto operator<=>(const WorkKey&) const = default;
};

// Step s (from 0): gradients of all micro-batches, then one update. Afterwards model.state holds
// the loss and the norm of the batch, both from before the update. micro_batches: the step's
// batches.
template <class Device>
void train_step(Gpt2<Device>& model, const std::vector<Batch>& micro_batches, const StepOptions& o,
                int64_t s) {
    Device& device = model.device;
    int64_t scored = 0;
    for (const Batch& batch : micro_batches) scored += batch.scored;
    const double scale = 1.0 / double(std::max<int64_t>(1, scored));

    device.begin_step(model.state, learning_rate(o.rate, s));
    for (size_t i = 0; i < micro_batches.size(); ++i) {
        const Batch& batch = micro_batches[i];
        const uint64_t key = random_key(o.seed, uint64_t(s) * micro_batches.size() + i, 5);
        const Pass pass{batch.B, batch.T, model.config.dropout > 0, key};
        const bool first = i == 0, last = i + 1 == micro_batches.size();
        auto work = [&] {
            forward(model, pass);
            backward(model, pass, scale, first);
            device.add_loss(model.state, model.a.losses, batch.B * batch.T, scale);
            if (last) update(model, o);
        };
        set_batch(model, batch);
        if (pass.dropout)
            work();  // the masks are new in every step: there is nothing to repeat
        else
            device.replay(WorkKey{model.block, batch.B, batch.T, scale, first, last, o.adamw,
                                  o.guards},
                          work);
    }
}

// =================================================================================================
// §9 Evaluate and generate
// =================================================================================================
// We hold a model that trains. How good is it on text it has not seen, and what does it write?

// A window of T predictions, the first `skip` of which are context only and not scored.
struct Window {
    int shard = 0;
    int64_t begin = 0;
    int64_t skip = 0;
};

// Windows that score every prediction of the shards exactly once. Plainly, they lie end to end.
// With document_start >= 0 (the end-of-text token), each window starts at the start of a document
// instead, and tokens that were scored already are skipped: then every token is predicted from the
// whole of its document so far, which is what the floor of the default corpus assumes.
inline std::vector<Window> evaluation_windows(const Shards& shards, int T, int document_start) {
    std::vector<Window> windows;
    for (int s = 0; s < int(shards.files().size()); ++s) {
        const Shard& shard = shards.files()[size_t(s)];
        std::vector<uint16_t> tokens(document_start < 0 ? 0 : size_t(shard.tokens));
        if (document_start >= 0) shard.read(tokens.data(), 0, shard.tokens);
        for (int64_t scored = 0; scored < shard.tokens - 1;) {
            int64_t begin = scored;
            if (document_start >= 0) {
                while (begin > 0 && tokens[size_t(begin)] != document_start) --begin;
                if (scored - begin >= T) begin = scored;  // a document longer than the window
            }
            windows.push_back({s, begin, scored - begin});
            scored = std::min(begin + T, shard.tokens - 1);
        }
    }
    return windows;
}

// Fills a batch with windows [first, first + B). Rows past the last window are not scored.
inline void fill_windows(Batch& batch, const Shards& shards, const std::vector<Window>& windows,
                         size_t first, int vocab_size) {
    std::vector<uint16_t> text(size_t(batch.T) + 1);
    for (size_t b = 0; b < size_t(batch.B) && first + b < windows.size(); ++b) {
        const Window& window = windows[first + b];
        const Shard& shard = shards.files()[size_t(window.shard)];
        const int64_t count = std::min<int64_t>(batch.T, shard.tokens - 1 - window.begin);
        shard.read(text.data(), window.begin, count + 1);
        Shards::check_range(shard, text.data(), window.begin, count + 1, vocab_size);
        for (int64_t t = 0; t < count; ++t) {
            const size_t at = b * size_t(batch.T) + size_t(t);
            batch.inputs[at] = text[size_t(t)];
            if (t < window.skip) continue;
            batch.targets[at] = text[size_t(t) + 1];
            ++batch.scored;
        }
    }
    batch.sort_rows();
}

struct Evaluation {
    double total = 0;               // sum of -log p, in nats
    int64_t tokens = 0, bytes = 0;  // scored; what they decode to
    double loss() const { return total / double(std::max<int64_t>(1, tokens)); }
    double perplexity() const { return std::exp(loss()); }
    double bits_per_byte() const {
        return total / std::log(2.0) / double(std::max<int64_t>(1, bytes));
    }
};

// The losses of one batch, row by row [B*T], without dropout. Needs model.reserve(>= B, >= T).
template <class Device>
std::vector<typename Device::Real> batch_losses(Gpt2<Device>& model, const Batch& batch) {
    const int rows = batch.B * batch.T;
    Pass pass;
    pass.B = batch.B, pass.T = batch.T;
    set_batch(model, batch);
    forward(model, pass);
    model.device.head_forward(model.a.losses, model.a.logits, model.a.ln_f, model.w.lm_head,
                              model.a.targets, rows, model.config.n_embd, model.config.vocab_size);
    std::vector<typename Device::Real> losses(static_cast<size_t>(rows));
    model.device.download(losses.data(), model.a.losses, losses.size());
    return losses;
}

// Scores every window. token_bytes[id]: how many bytes a token stands for; may be empty.
template <class Device>
Evaluation evaluate(Gpt2<Device>& model, const Shards& shards, const std::vector<Window>& windows,
                    const std::vector<int>& token_bytes) {
    Evaluation result;
    Batch batch;
    for (size_t first = 0; first < windows.size(); first += size_t(model.B)) {
        batch.resize(model.B, model.T);
        fill_windows(batch, shards, windows, first, model.config.vocab_size);
        const auto losses = batch_losses(model, batch);
        for (size_t i = 0; i < losses.size(); ++i) {
            if (batch.targets[i] < 0) continue;
            result.total += double(losses[i]), ++result.tokens;
            if (!token_bytes.empty()) result.bytes += token_bytes[size_t(batch.targets[i])];
        }
    }
    return result;
}

// --- Generation: predict one token, append it, predict the next
// The key/value cache: a new token changes nothing about the ones before it, because none of them
// can look ahead. So their keys and values are kept, and only the new row is computed: one pass
// over the weights for one token, which is why memory, not arithmetic, sets the speed.

struct SampleOptions {
    int max_new_tokens = 50;
    double temperature = 0.8;  // 0: always the likeliest token
    int top_k = 0;             // 0: all tokens
    double top_p = 1;          // 1: all tokens
    uint64_t seed = 0;
    int end_of_text = -1;  // stops there; -1: never
};

struct Candidate {
    int token;
    double probability;
};

// The softmax of logits / temperature, likeliest first (equal ones by id), cut to the top_k
// likeliest and then to the fewest whose probabilities reach top_p (nucleus sampling, Holtzman et
// al. 2020); what is left is scaled to sum 1.
inline std::vector<Candidate> candidates(const std::vector<float>& logits, double temperature,
                                         int top_k, double top_p) {
    const double highest = double(*std::max_element(logits.begin(), logits.end()));
    const double scale = temperature > 0 ? 1 / temperature : 1;
    std::vector<Candidate> list(logits.size());
    for (size_t i = 0; i < logits.size(); ++i)
        list[i] = {int(i), std::exp((double(logits[i]) - highest) * scale)};
    auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    };
    if (temperature <= 0) top_k = 1;
    const size_t keep = top_k > 0 ? std::min(list.size(), size_t(top_k)) : list.size();
    std::partial_sort(list.begin(), list.begin() + ptrdiff_t(keep), list.end(), likelier);
    list.resize(keep);
    double total = 0, reached = 0;
    for (const Candidate& c : list) total += c.probability;
    size_t count = 0;
    while (count < list.size() && (count == 0 || reached < top_p * total))
        reached += list[count++].probability;
    list.resize(count);
    for (Candidate& c : list) c.probability /= reached;
    return list;
}

// Picks by a uniform number u in [0, 1).
inline int pick(const std::vector<Candidate>& list, double u) {
    for (const Candidate& c : list)
        if ((u -= c.probability) < 0) return c.token;
    return list.back().token;
}

// Reads tokens into the key/value cache behind `past` earlier ones; returns the logits of what
// comes after the last [V]. The cache is nothing but the rows of qkv that forward keeps anyway.
// Needs past + tokens.size() <= the rows that are reserved, and <= n_positions.
template <class Device>
std::vector<float> next_logits(Gpt2<Device>& model, const std::vector<int32_t>& tokens, int past) {
    using Real = typename Device::Real;
    const int n = int(tokens.size()), C = model.config.n_embd, V = model.config.vocab_size;
    Pass pass;
    pass.B = 1, pass.T = n, pass.past = past, pass.cached = true;
    model.device.upload(model.a.inputs, tokens.data(), tokens.size());
    forward(model, pass);
    model.device.head_logits(model.a.next_logits, model.a.ln_f + size_t(n - 1) * C, model.w.lm_head,
                             1, C, V);
    std::vector<Real> real_logits(static_cast<size_t>(V));
    model.device.download(real_logits.data(), model.a.next_logits, real_logits.size());
    return std::vector<float>(real_logits.begin(), real_logits.end());
}

// Continues `tokens` (at least one) and calls on_token(token) for each new one; stops when that
// returns false, at end of text, or after max_new_tokens. When the context is full it slides: the
// later half of it is read again as a new beginning. Returns how often that happened.
template <class Device, class OnToken>
int generate(Gpt2<Device>& model, std::vector<int32_t> tokens, const SampleOptions& o,
             OnToken&& on_token) {
    const int context = std::min(model.config.n_positions, model.T);
    const uint64_t key = random_key(o.seed, 0, 6);
    int cached = 0, slides = 0;
    for (int i = 0; i < o.max_new_tokens; ++i) {
        if (int(tokens.size()) > context) {
            tokens.erase(tokens.begin(), tokens.end() - std::max(1, context / 2));
            cached = 0, ++slides;
        }
        const std::vector<int32_t> fresh(tokens.begin() + cached, tokens.end());
        const std::vector<float> logits = next_logits(model, fresh, cached);
        cached = int(tokens.size());
        const int token = pick(candidates(logits, o.temperature, o.top_k, o.top_p),
                               random_uniform(key, uint64_t(i)));
        if (token == o.end_of_text || !on_token(token)) break;
        tokens.push_back(token);
    }
    return slides;
}

// =================================================================================================
// What follows is plumbing. The model is done: §10 makes its products fast on a CPU, the rest reads
// and writes files, and talks to the user.
// =================================================================================================

// =================================================================================================
// §10 The CPU at full speed: products of matrices, attention and e^x
// =================================================================================================
// Why products can be fast: n^3 operations on n^2 numbers, so each number can be used many times
// once it is near. A core does 32 multiply-adds a cycle here, and loads far fewer numbers from its
// caches, hardly any from memory. So: keep sums in registers, and operands in the caches, in the
// order in which they will be read.

// --- The compiler's vectors: arithmetic on a whole register at a time, on any CPU
#ifdef __CUDACC__
#pragma nv_diag_suppress 1675  // it need not know "GCC unroll"
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

// Vec<real>: kLanes<real> numbers in one register. + - * / < work lane by lane, and a number beside
// a vector stands for a vector full of it.
template <class real>
struct VectorOf {
    typedef real type __attribute__((vector_size(kVectorBytes)));
};
template <class real>
using Vec = typename VectorOf<real>::type;
template <class real>
constexpr int kLanes = kVectorBytes / int(sizeof(real));

// From and to memory, one instruction each; the address need not be aligned.
template <class real>
Vec<real> load(const real* from) {
    Vec<real> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class real>
void store(real* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// --- e^x without a library call: the same lines for one float and for a vector of them
//   x = n ln2 + r,  |r| <= ln2/2,  n whole:   e^x = 2^n e^r,  and e^r = 1 + r + r^2 q(r)
// The coefficients of q are a minimax fit (relative error of e^r: 3.2e-9, far below float's 6e-8).
// ln2 is subtracted in two parts so that n * 0.693359375 is exact (Cody and Waite 1980). Adding and
// subtracting 1.5 * 2^23 rounds to whole numbers and leaves n in the low bits of the sum.

// Within 2 units in the last place for -87.3 < x < 88.3; 0 below, infinity above; NaN stays NaN.
template <class V>
V exp_float(V x) {
    using Bits = std::conditional_t<std::is_same_v<V, float>, int32_t, decltype(x < x)>;
    x = x < -88.0f ? -88.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const V shifted = x * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const V q =
        (((1.38138782e-3f * r + 8.36906396e-3f) * r + 4.16684225e-2f) * r + 1.66665182e-1f) * r +
        0.49999994f;
    const Bits power = (std::bit_cast<Bits>(shifted) << 23) + (127 << 23);
    return ((r * r) * q + r + 1.0f) * std::bit_cast<V>(power);
}
inline float exp_fast(float x) { return exp_float(x); }
inline Vec<float> exp_fast(Vec<float> x) { return exp_float(x); }
// In double, for checking gradients: the library's, to the last bit.
inline double exp_fast(double x) { return std::exp(x); }
inline Vec<double> exp_fast(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// Whole vectors first, then what is left over: the order of additions is fixed.
template <class real>
real exp_and_sum(real* x, real shift, int count) {
    constexpr int L = kLanes<real>;
    Vec<real> sums = {};
    int j = 0;
    for (; j + L <= count; j += L) {
        const Vec<real> e = exp_fast(load(x + j) - shift);
        store(x + j, e);
        sums += e;
    }
    real sum = 0;
    for (int i = 0; i < L; ++i) sum += sums[i];
    for (; j < count; ++j) sum += x[j] = exp_fast(x[j] - shift);
    return sum;
}

// --- The fast product
//
//             n                    b, kDepth rows at a time, is cut into panels of kTileCols
//        +---------+               columns, each copied so that it is read from start to end.
//      k | b  |p|  |
//        +---------+               a, the same: panels of kTileRows rows.
//   k
// +-----+ +---------+              A tile of c is one panel of a times one panel of b. Its sums
// |     | |    | |  |              stay in registers for kDepth steps; every step reads one
// |  a  | |    | |  |              column of a's panel and one row of b's panel, and does
// |=====| |----[]---| <- tile      kTileRows * kTileCols multiply-adds with them.
// |     | |         |
// +-----+ +---------+
//
// One panel of a, in the first cache, meets the panels of b in turn, which come from the second: c
// is walked along its rows, which is how memory likes it. That is the blocking of Goto and van de
// Geijn (2008) and of BLIS, with the parts of the two operands exchanged. Ragged edges: panels are
// filled up with zeros, and there is a micro-kernel for each number of rows.
constexpr int kTileRows = kVectorRegisters == 32 ? 14 : 6;  // sums and operands fill the registers
template <class real>
constexpr int kTileCols = 2 * kLanes<real>;
constexpr int kDepth = 384;      // steps of k packed at a time: a's panel stays in the first cache
constexpr int kBlockCols = 512;  // columns of b packed at a time: they stay in the second

// One step of the product: sum += a b, a number a beside a vector b.
template <class real>
void multiply_add(Vec<real>& sum, real a, Vec<real> b) {
    sum += a * b;
}
// In bf16 a packed element is a pair, two neighbouring steps of k, and one instruction does both:
// sum += a.low b.low + a.high b.high, in fp32.
#ifdef __AVX512BF16__
inline bool cpu_has_bf16_dot() { return true; }
inline void multiply_add(Vec<float>& sum, uint32_t a, Vec<uint32_t> b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(Vec<uint32_t>{} + a));
}
#else
inline bool cpu_has_bf16_dot() { return false; }
inline void multiply_add(Vec<float>&, uint32_t, Vec<uint32_t>) {}  // refused before it gets here
#endif

// Tile [rows, kTileCols] (+)= panel of a [k, kTileRows] * panel of b [k, kTileCols].
template <int rows, class real, class Packed>
void micro_kernel(real* tile, ptrdiff_t stride, const Packed* a, const Packed* b, int k, bool add) {
    constexpr int L = kLanes<real>;
    Vec<real> left[rows], right[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) left[i] = right[i] = Vec<real>{};
    for (int p = 0; p < k; ++p, a += kTileRows, b += 2 * L) {
        const Vec<Packed> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i)
            multiply_add(left[i], a[i], b0), multiply_add(right[i], a[i], b1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
        real* out = tile + i * stride;
        store(out, add ? load(out) + left[i] : left[i]);
        store(out + L, add ? load(out + L) + right[i] : right[i]);
    }
}

// Runs the micro-kernel for tiles of `rows` rows, 1 to kTileRows.
template <class real, class Packed, int... i>
void run_kernel(int rows, real* tile, ptrdiff_t stride, const Packed* a, const Packed* b, int k,
                bool add, std::integer_sequence<int, i...>) {
    using Kernel = void (*)(real*, ptrdiff_t, const Packed*, const Packed*, int, bool);
    static constexpr Kernel kernels[] = {micro_kernel<i + 1, real, Packed>...};
    kernels[rows - 1](tile, stride, a, b, k, add);
}
template <class real, class Packed>
void multiply_tile(real* tile, ptrdiff_t stride, const Packed* a, const Packed* b, int rows, int k,
                   bool add) {
    run_kernel(rows, tile, stride, a, b, k, add, std::make_integer_sequence<int, kTileRows>());
}

// Memory that its owner keeps and that grows on demand; large pages where it is large.
class Scratch {
    std::unique_ptr<void, decltype(&std::free)> block{nullptr, &std::free};
    size_t size = 0;

public:
    template <class T>
    T* get(size_t count) {
        const size_t page = count * sizeof(T) < (1 << 20) ? 64 : 1 << 21;
        const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
        if (bytes > size) {
            block.reset(std::aligned_alloc(page, bytes));
            TINYGPT_CHECK(block, "out of memory: %.2f GB more were needed", double(bytes) / 1e9);
            if (page > 64) madvise(block.get(), bytes, MADV_HUGEPAGE);
            size = bytes;
        }
        return static_cast<T*>(block.get());
    }
};

// One step of a transpose: exchanges the lanes of a that have bit `step` set with those of b that
// do not.
template <int step, class V, int... lane>
[[gnu::always_inline]] inline void exchange_lanes(V& a, V& b, std::integer_sequence<int, lane...>) {
    constexpr int L = sizeof...(lane);
#ifdef __CUDACC__  // nvcc's front end loses the list of lanes below
    const V x = a, y = b;
    for (int i = 0; i < L; ++i)
        a[i] = i & step ? y[i - step] : x[i], b[i] = i & step ? y[i] : x[i + step];
#else
    const V low = __builtin_shufflevector(a, b, (lane & step ? L + lane - step : lane)...);
    b = __builtin_shufflevector(a, b, (lane & step ? L + lane : lane + step)...);
    a = low;
#endif
}

// v[i][j] = v[j][i], in registers, for kLanes vectors of kLanes numbers.
template <class real, int step = 1>
[[gnu::always_inline]] inline void transpose_square(Vec<real>* v) {
    constexpr int L = kLanes<real>;
    if constexpr (step < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if (!(i & step))
                exchange_lanes<step>(v[i], v[i + step], std::make_integer_sequence<int, L>());
        transpose_square<real, 2 * step>(v);
    }
}

// Packs one panel of a matrix whose rows are whole in memory: out[p][i] = from(i, p) for p < k, and
// 0 for i >= rows. A panel that is not a whole number of squares wide is written from its end, so
// that what one store puts too far the next puts right; but for the very last.
template <int width, class real>
void pack_transposed(real* out, View<real> from, int rows, int k) {
    constexpr int L = kLanes<real>;
    const int whole = from.col == 1 ? k / L * L : 0;
    for (int p = 0; p < whole; p += L)
        for (int i = (width - 1) / L * L; i >= 0; i -= L) {
            Vec<real> square[L];
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j)
                square[j] = i + j < rows ? load(&from.data[(i + j) * from.row + p]) : Vec<real>{};
            transpose_square<real>(square);
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j)
                if (i + L <= width || p + j + 1 < k)
                    store(out + size_t(p + j) * width + i, square[j]);
                else
                    std::memcpy(out + size_t(p + j) * width + i, &square[j],
                                width % L * sizeof(real));
        }
    for (size_t p = whole; p < size_t(k); ++p)
        for (int i = 0; i < width; ++i) out[p * width + i] = i < rows ? from(i, p) : real(0);
}

// Packs panels: with w = i / width, out[w][p][i % width] = from(i, p) for p < k and i < count, and
// 0 up to a whole panel. One of from's steps is 1.
template <int width, class real>
void pack_panels(real* out, View<real> from, int count, int k) {
    const size_t panel = size_t(width) * k;
    if (from.row != 1) {
        for (int i = 0; i < count; i += width, out += panel)
            pack_transposed<width>(out, from.from(i, 0), std::min(width, count - i), k);
        return;
    }
    for (int p = 0; p < k; ++p)  // whole rows are copied, to all panels side by side
        for (int i = 0; i < count; i += width) {
            real* to = out + i / width * panel + size_t(p) * width;
            const real* row = &from.data[i + p * from.col];
            if (i + width <= count)
                std::memcpy(to, row, width * sizeof(real));
            else
                for (int j = 0; j < width; ++j) to[j] = i + j < count ? row[j] : real(0);
        }
}

// --- Three ways to compute a tile. Each says what its panels hold, how many rows and columns a
// tile has, how many packed steps `depth` steps of k become, how panels are packed, and computes a
// tile.

// Numbers as they are.
template <class real>
struct PlainTiles {
    using Packed = real;
    static constexpr int kRows = kTileRows, kCols = kTileCols<real>, kMost = kDepth;
    static constexpr bool kAnyRows = true;  // tile() writes `rows` rows, else all kRows
    static int steps(int depth) { return depth; }
    static void pack_a(Packed* out, View<real> a, int m, int k) {
        pack_panels<kRows>(out, a, m, k);
    }
    static void pack_b(Packed* out, View<real> b, int n, int k) {
        pack_panels<kCols>(out, b.transposed(), n, k);
    }
    static void tile(real* c, ptrdiff_t ldc, const Packed* a, const Packed* b, int rows, int k,
                     bool add) {
        multiply_tile(c, ldc, a, b, rows, k, add);
    }
};

// bf16 in pairs, with the vector unit's dot product. k is filled up with zeros to a multiple of 32.
struct PairTiles {
    using Packed = uint32_t;
    static constexpr int kRows = kTileRows, kCols = kTileCols<float>, kMost = 2 * kDepth;
    static constexpr bool kAnyRows = true;
    static int steps(int depth) { return (depth + 31) / 32 * 16; }
    template <int width>
    static void pack(Packed* out, View<float> from, int count, int k) {
        static thread_local Scratch scratch;
        const int pairs = steps(k);
        float* panel = scratch.get<float>(size_t(width) * 2 * pairs);
        for (int i = 0; i < count; i += width) {
            pack_panels<width>(panel, from.from(i, 0), std::min(width, count - i), k);
            std::fill(panel + size_t(width) * k, panel + size_t(width) * 2 * pairs, 0.0f);
            for (int p = 0; p < pairs; ++p, out += width)
                for (int j = 0; j < width; ++j)
                    out[j] = bf16(panel[2 * p * width + j]).bits |
                             uint32_t(bf16(panel[(2 * p + 1) * width + j]).bits) << 16;
        }
    }
    static void pack_a(Packed* out, View<float> a, int m, int k) { pack<kRows>(out, a, m, k); }
    static void pack_b(Packed* out, View<float> b, int n, int k) {
        pack<kCols>(out, b.transposed(), n, k);
    }
    static void tile(float* c, ptrdiff_t ldc, const Packed* a, const Packed* b, int rows, int k,
                     bool add) {
        multiply_tile(c, ldc, a, b, rows, k, add);
    }
};

// bf16 in the matrix unit, where the CPU has one (AMX; Intel 64 manual, volume 1, chapter 18): a
// tile register holds 16 rows of 64 bytes, and one instruction multiplies 16 x 32 by 32 x 16
// numbers.
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
struct MatrixTiles : PairTiles {
    static constexpr int kRows = 32, kCols = 32, kMost = 512;
    static constexpr bool kAnyRows = false;
    // Linux lends the unit to a process that asks: ARCH_REQ_XCOMP_PERM, for tile data.
    static bool usable() {
        static const bool lent = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return lent;
    }
    // A panel is [k / 32][kRows][32]: pack_panels makes that, with rows and steps exchanged.
    static void pack_a(Packed* out, View<float> a, int m, int k) {
        static thread_local Scratch scratch;
        float* panel = scratch.get<float>(size_t(kRows) * 2 * steps(k));
        for (int i = 0; i < m; i += kRows) {
            const int rows = std::min(kRows, m - i);
            pack_panels<32>(panel, a.from(i, 0).transposed(), k, rows);
            for (int chunk = 0; chunk < steps(k) / 16; ++chunk, out += kRows * 16) {
                bf16* to = reinterpret_cast<bf16*>(out);
                for (int j = 0; j < rows * 32; ++j) to[j] = bf16(panel[chunk * rows * 32 + j]);
                for (int j = rows * 32; j < kRows * 32; ++j) to[j].bits = 0;
            }
        }
    }
    static void pack_b(Packed* out, View<float> b, int n, int k) {
        pack<kCols>(out, b.transposed(), n, k);
    }
    // Registers 0 to 3 are the four quarters of c; 4, 5 two of a, below each other; 6, 7 two of b.
    static void tile(float* c, ptrdiff_t ldc, const Packed* a, const Packed* b, int, int k,
                     bool add) {
        float* low = c + 16 * ldc;
        const ptrdiff_t c_row = 4 * ldc, a_row = 64, b_row = 128;  // bytes
        asm volatile(
            "tileloadd (%0,%2), %%tmm0; tileloadd 64(%0,%2), %%tmm1;"
            "tileloadd (%1,%2), %%tmm2; tileloadd 64(%1,%2), %%tmm3" ::"r"(c),
            "r"(low), "r"(c_row)
            : "memory");
        if (!add) asm volatile("tilezero %tmm0; tilezero %tmm1; tilezero %tmm2; tilezero %tmm3");
        for (int p = 0; p < k; p += 16, a += 16 * 32, b += 16 * 32)
            asm volatile(
                "tileloadd (%0,%2), %%tmm4; tileloadd 1024(%0,%2), %%tmm5;"
                "tileloadd (%1,%3), %%tmm6; tileloadd 64(%1,%3), %%tmm7;"
                "tdpbf16ps %%tmm6, %%tmm4, %%tmm0; tdpbf16ps %%tmm7, %%tmm4, %%tmm1;"
                "tdpbf16ps %%tmm6, %%tmm5, %%tmm2; tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(a),
                "r"(b), "r"(a_row), "r"(b_row)
                : "memory");
        asm volatile(
            "tilestored %%tmm0, (%0,%2); tilestored %%tmm1, 64(%0,%2);"
            "tilestored %%tmm2, (%1,%2); tilestored %%tmm3, 64(%1,%2)" ::"r"(c),
            "r"(low), "r"(c_row)
            : "memory");
    }
    // While one of these lives, its thread's registers are set up: 8 of 16 rows of 64 bytes.
    MatrixTiles() {
        alignas(64) uint8_t setup[64] = {1};
        for (int i = 0; i < 8; ++i) setup[16 + 2 * i] = 64, setup[48 + i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(setup));
    }
    ~MatrixTiles() { asm volatile("tilerelease"); }
};
#else
struct MatrixTiles : PairTiles {
    static bool usable() { return false; }
};
#endif

// c[rows, cols] = finish of one tile, at row i0 and column j0 of the whole, from its two panels.
template <class Tiles, class real, class Packed, class Finish>
void finish_tile(real* c, ptrdiff_t ldc, const Packed* a, const Packed* b, int i0, int j0, int rows,
                 int cols, int steps, bool add, bool last, Finish finish) {
    constexpr int R = Tiles::kRows, N = Tiles::kCols;
    if (cols == N && (rows == R || Tiles::kAnyRows)) {
        for (int i = 0; i < rows; ++i)
            __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + N / 2, 1);
        Tiles::tile(c, ldc, a, b, rows, steps, add);
        for (int i = 0; last && i < rows; ++i) finish(i0 + i, j0, N, c + i * ldc);
        return;
    }
    alignas(64) real edge[R * N] = {};
    Tiles::tile(edge, N, a, b, rows, steps, false);
    for (int i = 0; i < rows; ++i) {
        real *out = c + i * ldc, *sum = edge + i * N;
        for (int j = 0; j < cols; ++j) out[j] = add ? out[j] + sum[j] : sum[j];
        if (last) finish(i0 + i, j0, cols, out);
    }
}

// c[m, n] = finish(a b), or finish(c + a b) if accumulate. All of a is packed first, by all threads
// together; then c is cut into units, blocks of columns by stretches of rows, and a thread packs
// the columns of b that its unit needs for itself, where they stay in its second cache. So threads
// wait for each other once. The sum over k of one element is made by one thread, in order: no
// result depends on the number of threads.
template <class Tiles, class real, class Finish>
void multiply_blocks(real* c, ptrdiff_t ldc, View<real> a, View<real> b, int m, int n, int k,
                     bool accumulate, Finish finish) {
    using Packed = typename Tiles::Packed;
    constexpr int R = Tiles::kRows, N = Tiles::kCols, kMost = Tiles::kMost;
    static thread_local Scratch scratch_a;
    const int rows = (m + R - 1) / R * R, threads = omp_get_max_threads();
    const int wanted = ((n + kBlockCols - 1) / kBlockCols + threads - 1) / threads * threads;
    const int width = std::max(4, ((n + wanted - 1) / wanted + N - 1) / N) * N;  // equal blocks
    const int blocks = (n + width - 1) / width;
    const int stretches = blocks < threads ? std::min(2 * threads / blocks, rows / R) : 1;
    const int stretch = (rows / R + stretches - 1) / stretches * R;
    Packed* packed_a = scratch_a.get<Packed>(size_t(rows) * Tiles::steps(k + kMost));
#pragma omp parallel
    {
        [[maybe_unused]] Tiles setup{};
        static thread_local Scratch scratch_b;  // Careful: here, so that every thread makes its own
        Packed* packed_b = scratch_b.get<Packed>(size_t(width) * Tiles::steps(std::min(k, kMost)));
        for (int k0 = 0; k0 < k; k0 += kMost) {
            const int depth = std::min(kMost, k - k0);
            Packed* to = packed_a + size_t(rows) * Tiles::steps(k0);
#pragma omp for schedule(static) nowait
            for (int i = 0; i < m; i += 4 * R)
                Tiles::pack_a(to + size_t(i) * Tiles::steps(depth), a.from(i, k0),
                              std::min(4 * R, m - i), depth);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int unit = 0; unit < blocks * stretches; ++unit) {
            const int j0 = unit / stretches * width, cols = std::min(width, n - j0);
            const int i0 = unit % stretches * stretch, end = std::min(m, i0 + stretch);
            for (int k0 = 0; k0 < k; k0 += kMost) {
                const int depth = std::min(kMost, k - k0), steps = Tiles::steps(depth);
                const Packed* left = packed_a + size_t(rows) * Tiles::steps(k0);
                Tiles::pack_b(packed_b, b.from(k0, j0), cols, depth);
                for (int i = i0; i < end; i += R)
                    for (int j = 0; j < cols; j += N)
                        finish_tile<Tiles>(c + i * ldc + j0 + j, ldc, left + size_t(i) * steps,
                                           packed_b + size_t(j) * steps, i, j0 + j,
                                           std::min(R, m - i), std::min(N, cols - j), steps,
                                           k0 > 0 || accumulate, k0 + depth == k, finish);
            }
        }
    }
}

// a.b of k numbers: four vectors of partial sums, then their lanes, then what is left over.
template <class real>
real dot(const real* a, const real* b, int k) {
    constexpr int L = kLanes<real>;
    Vec<real> sums[4] = {};
    int p = 0;
    for (; p + 4 * L <= k; p += 4 * L)
        for (int i = 0; i < 4; ++i) sums[i] += load(a + p + i * L) * load(b + p + i * L);
    const Vec<real> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    real sum = 0;
    for (int i = 0; i < L; ++i) sum += lanes[i];
    for (; p < k; ++p) sum += a[p] * b[p];
    return sum;
}

// c[1, n] of one row a, as in generation. Every number of b is used once, so nothing is packed, and
// memory sets the speed. Where b is row-major a thread goes down its own columns.
template <class real, class Finish>
void multiply_row(real* c, View<real> a, View<real> b, int n, int k, bool accumulate,
                  Finish finish) {
    constexpr int kMost = 1024;
    static thread_local Scratch scratch;
    real* x = scratch.get<real>(k);
    for (int p = 0; p < k; ++p) x[p] = a(0, p);
    const int threads = omp_get_max_threads();
    const int pieces = (n + kMost * threads - 1) / (kMost * threads) * threads;
    const int width = std::min(kMost, ((n + pieces - 1) / pieces + 15) / 16 * 16);
#pragma omp parallel for schedule(static)
    for (int j0 = 0; j0 < n; j0 += width) {
        const int count = std::min(width, n - j0);
        real sums[kMost] = {};
        for (int p = 0; b.col == 1 && p < k; p += 4) {
            const real* rows[4];
            real scale[4];
            for (int i = 0; i < 4; ++i) {
                rows[i] = &b.data[std::min(p + i, k - 1) * b.row + j0];
                scale[i] = p + i < k ? x[p + i] : real(0);
            }
            for (int j = 0; j < count; ++j)
                sums[j] += (scale[0] * rows[0][j] + scale[1] * rows[1][j]) +
                           (scale[2] * rows[2][j] + scale[3] * rows[3][j]);
        }
        for (int j = 0; b.col != 1 && j < count; ++j)
            sums[j] = dot(x, &b.data[(j0 + j) * b.col], k);
        for (int j = 0; j < count; ++j) c[j0 + j] = accumulate ? c[j0 + j] + sums[j] : sums[j];
        finish(0, j0, count, c + j0);
    }
}

// The product, the way the shape and the options ask for.
template <class real, class Finish>
void matmul(real* c, ptrdiff_t ldc, View<real> a, View<real> b, int m, int n, int k,
            MatmulOptions options, bool accumulate, Finish finish) {
    if (m == 1) return multiply_row(c, a, b, n, k, accumulate, finish);
    if constexpr (std::is_same_v<real, float>)
        if (options.bf16) {
            TINYGPT_CHECK(cpu_has_bf16_dot(),
                          "bf16 products need a CPU with avx512_bf16 and a build for it "
                          "(-march=native), "
                          "which this is not: use --precision fp32");
            if (MatrixTiles::usable())
                return multiply_blocks<MatrixTiles>(c, ldc, a, b, m, n, k, accumulate, finish);
            return multiply_blocks<PairTiles>(c, ldc, a, b, m, n, k, accumulate, finish);
        }
    multiply_blocks<PlainTiles<real>>(c, ldc, a, b, m, n, k, accumulate, finish);
}

// --- Attention, forward
// The scores are made transposed, keys down and queries across: then a running softmax is a vector
// of maxima and one of sums, a lane for each query, and p^T [keys, queries] is already the packed
// right operand of out^T = v^T p^T. For each block of keys (Milakov and Gimelshein 2018):
//   new max = max(old max, s)    p = e^(s - new max)    old sums shrink by e^(old max - new max)
// Keys behind the last query of a tile are never touched: that is the causal half.

// out [m, kTileCols] (+)= left [m, k] * right [k, kTileCols], packed; left's panels are `panel`
// apart.
template <class real>
void multiply_packed(real* out, const real* left, size_t panel, const real* right, int m, int k,
                     bool add) {
    constexpr int R = kTileRows, N = kTileCols<real>;
    for (int i = 0; i < m; i += R)
        multiply_tile(out + i * N, N, left + i / R * panel, right, std::min(R, m - i), k, add);
}

// out[j][i] = tile[i][j]: a transposed tile of kTileCols columns back into rows.
template <class real>
void unpack_tile(real* out, ptrdiff_t stride, const real* tile, int count, int HS) {
    for (int j = 0; j < count; ++j)
        for (int i = 0; i < HS; ++i) out[j * stride + i] = tile[i * kTileCols<real> + j];
}

// One step of the running softmax, for a block of scores s [keys, kTileCols], which become p.
// Updates each query's maximum and sum of p, and shrinks sums [HS, kTileCols].
template <class real>
void softmax_block(real* s, real* max, real* total, real* sums, int keys, int HS) {
    constexpr int N = kTileCols<real>, L = kLanes<real>;
    for (int lane = 0; lane < N; lane += L) {
        const Vec<real> old_max = load(max + lane);
        Vec<real> top = old_max;
        for (int i = 0; i < keys; ++i) {
            const Vec<real> x = load(s + i * N + lane);
            top = x > top ? x : top;
        }
        const Vec<real> shrink = exp_fast(old_max - top);
        Vec<real> sum = load(total + lane) * shrink;
        for (int i = 0; i < keys; ++i) {
            const Vec<real> p = exp_fast(load(s + i * N + lane) - top);
            store(s + i * N + lane, p);
            sum += p;
        }
        store(max + lane, top), store(total + lane, sum);
        for (int i = 0; i < HS; ++i) store(sums + i * N + lane, load(sums + i * N + lane) * shrink);
    }
}

// One head: queries first..last-1 over keys 0..last-1. qkv: the head's query of row 0, rows 3C
// apart. Sets out [last - first, HS], rows C apart, and lse [last - first] unless it is null.
template <class real>
void attend(real* out, real* lse, const real* qkv, int first, int last, int C, int HS, Dropout drop,
            uint64_t place, int T) {
    constexpr int R = kTileRows, N = kTileCols<real>, kKeys = 8 * R;
    constexpr real kNever = -std::numeric_limits<real>::infinity();
    static thread_local Scratch room[5];
    const View<real> q = rows_of(qkv, 3 * ptrdiff_t(C)), k = q.from(0, C), v = q.from(0, 2 * C);
    real* keys = room[0].get<real>(size_t(last + R) * HS);    // panels of keys, [HS][R] each
    real* values = room[1].get<real>(size_t(HS + R) * last);  // panels of channels, [last][R] each
    real* queries = room[2].get<real>(size_t(HS) * N);        // [HS][N]
    real* sums = room[3].get<real>(size_t(HS) * N);           // [HS][N]: out^T
    real* p = room[4].get<real>(size_t(kKeys) * N);           // [keys][N]: scores, then p
    pack_panels<R>(keys, k, last, HS);
    pack_panels<R>(values, v.transposed(), HS, last);
    for (int t = first; t < last; t += N) {
        const int count = std::min(N, last - t), end = t + count;
        alignas(64) real max[N], total[N] = {};
        std::fill(max, max + N, kNever);
        std::fill(sums, sums + HS * N, real(0));
        pack_panels<N>(queries, q.from(t, 0), count, HS);
        for (int i = 0; i < HS * N; ++i) queries[i] *= 1 / std::sqrt(real(HS));
        for (int k0 = 0; k0 < end; k0 += kKeys) {
            const int n = std::min(kKeys, end - k0);
            multiply_packed(p, keys + size_t(k0) * HS, size_t(R) * HS, queries, n, HS, false);
            for (int i = std::max(0, t - k0); i < n; ++i)  // a key behind the query is not seen
                std::fill(p + i * N, p + i * N + std::min(N, k0 + i - t), kNever);
            softmax_block(p, max, total, sums, n, HS);
            for (int i = 0; drop.on() && i < n; ++i)
                for (int j = 0; j < count; ++j)
                    p[i * N + j] *= drop.scale((place * T + t + j) * T + k0 + i);
            multiply_packed(sums, values + size_t(k0) * R, size_t(R) * last, p, HS, n, true);
        }
        for (int i = 0; i < HS * N; ++i) sums[i] /= total[i % N];
        unpack_tile(out + (t - first) * ptrdiff_t(C), C, sums, count, HS);
        for (int j = 0; lse && j < count; ++j) lse[t - first + j] = max[j] + std::log(total[j]);
    }
}

template <class real>
void attention_forward(real* out, real* lse, const real* qkv, int B, int T, int NH, int HS,
                       Dropout drop) {
    const int C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; ++head) {
        const size_t row = size_t(head / NH) * T, at = row * C + head % NH * HS;
        attend(out + at, lse + size_t(head) * T, qkv + at + 2 * row * C, 0, T, C, HS, drop,
               uint64_t(head), T);
    }
}

// One query, the last of n rows, in one head. Nothing is used twice, so nothing is packed.
template <class real>
void attend_one(real* out, const real* qkv, int n, int C, int HS) {
    static thread_local Scratch scratch;
    real* p = scratch.get<real>(n);
    const ptrdiff_t stride = 3 * ptrdiff_t(C);
    const real *q = qkv + (n - 1) * stride, *k = qkv + C, *v = qkv + 2 * C;
    real top = -std::numeric_limits<real>::infinity();
    for (int t = 0; t < n; ++t, k += stride) {
        p[t] = dot(q, k, HS) / std::sqrt(real(HS));
        top = std::max(top, p[t]);
    }
    const real total = exp_and_sum(p, top, n);
    std::fill(out, out + HS, real(0));
    for (int t = 0; t < n; ++t, v += stride)
        for (int i = 0; i < HS; ++i) out[i] += p[t] / total * v[i];
}

template <class real>
void attention_cached(real* out, const real* qkv, int past, int n, int NH, int HS) {
    const int C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int at = 0; at < C; at += HS)
        if (n == 1)
            attend_one(out + at, qkv + at, past + 1, C, HS);
        else
            attend(out + at, static_cast<real*>(nullptr), qkv + at, past, past + n, C, HS,
                   Dropout{}, 0, past + n);
}

// --- Attention, backward
// For each block of keys the scores of all later queries are made again, p = e^(s - lse), this time
// queries down and keys across: p and ds are then the right operands of dv^T and dk^T as they are.

// Scores p and products ds = dout v^T, [queries, kTileCols], of queries t.. and keys k0.. become p
// (times the mask) and ds / sqrt(HS). lse, D: of query t.
template <class real>
void softmax_block_backward(real* p, real* ds, const real* lse, const real* D, int t, int k0,
                            int queries, int T, int HS, Dropout drop, uint64_t place) {
    constexpr int N = kTileCols<real>;
    const real scale = 1 / std::sqrt(real(HS));
    for (int i = 0; i < queries; ++i, ++t, p += N, ds += N) {
        for (int j = 0; j < N; ++j) p[j] = exp_fast(p[j] * scale - lse[i]);
        for (int j = std::max(0, t + 1 - k0); j < N; ++j) p[j] = 0;  // keys behind the query
        if (!drop.on()) {
            for (int j = 0; j < N; ++j) ds[j] = p[j] * (ds[j] - D[i]) * scale;
            continue;
        }
        for (int j = 0; j < N; ++j) {
            const real mask = drop.scale((place * T + t) * T + k0 + j);
            ds[j] = p[j] * (ds[j] * mask - D[i]) * scale;
            p[j] *= mask;
        }
    }
}

// One head; rows of dqkv and qkv are 3C apart, those of dout and out C. Sets dqkv.
template <class real>
void attend_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                     const real* qkv, int T, int C, int HS, Dropout drop, uint64_t place) {
    constexpr int R = kTileRows, N = kTileCols<real>, kQueries = 8 * R;
    static thread_local Scratch room[13];
    const ptrdiff_t stride = 3 * ptrdiff_t(C);
    const View<real> q = rows_of(qkv, stride), k = q.from(0, C), v = q.from(0, 2 * C),
                     d = rows_of(dout, C);
    const size_t by_rows = size_t(T + R) * HS, by_cols = size_t(HS + R) * T,
                 tile = size_t(HS + N) * N;
    real *q_rows = room[0].get<real>(by_rows), *dout_rows = room[1].get<real>(by_rows);
    real *q_cols = room[2].get<real>(by_cols), *dout_cols = room[3].get<real>(by_cols);
    real *k_right = room[4].get<real>(tile), *v_right = room[5].get<real>(tile);  // [HS][N]
    real *dk = room[6].get<real>(tile), *dv = room[7].get<real>(tile);            // [HS][N]
    real* k_wide = room[8].get<real>(tile);  // [HS / N][keys][N]
    real *p = room[9].get<real>(kQueries * N),
         *ds = room[10].get<real>(kQueries * N);               // [queries][N]
    real* ds_left = room[11].get<real>(size_t(kQueries) * N);  // panels of queries, [keys][R] each
    const int wide = (HS + N - 1) / N;
    real *dq = room[12].get<real>((size_t(wide) * N + 1) * T), *D = dq + size_t(wide) * T * N;
    std::fill(dq, D, real(0));  // [HS / N][T][N]
    for (int t = 0; t < T; ++t) D[t] = dot(dout + ptrdiff_t(t) * C, out + ptrdiff_t(t) * C, HS);
    pack_panels<R>(q_rows, q, T, HS), pack_panels<R>(dout_rows, d, T, HS);
    pack_panels<R>(q_cols, q.transposed(), HS, T), pack_panels<R>(dout_cols, d.transposed(), HS, T);
    for (int k0 = 0; k0 < T; k0 += N) {
        const int keys = std::min(N, T - k0);
        pack_panels<N>(k_right, k.from(k0, 0), keys, HS),
            pack_panels<N>(v_right, v.from(k0, 0), keys, HS);
        pack_panels<N>(k_wide, k.from(k0, 0).transposed(), HS, keys);
        std::fill(dk, dk + tile, real(0)), std::fill(dv, dv + tile, real(0));
        for (int t = k0 / R * R; t < T; t += kQueries) {
            const int n = std::min(kQueries, T - t);
            multiply_packed(p, q_rows + size_t(t) * HS, size_t(R) * HS, k_right, n, HS, false);
            multiply_packed(ds, dout_rows + size_t(t) * HS, size_t(R) * HS, v_right, n, HS, false);
            softmax_block_backward(p, ds, lse + t, D + t, t, k0, n, T, HS, drop, place);
            multiply_packed(dv, dout_cols + size_t(t) * R, size_t(R) * T, p, HS, n, true);
            multiply_packed(dk, q_cols + size_t(t) * R, size_t(R) * T, ds, HS, n, true);
            pack_panels<R>(ds_left, rows_of(ds, N), n, keys);
            for (int w = 0; w < wide; ++w)
                multiply_packed(dq + (size_t(w) * T + t) * N, ds_left, size_t(R) * keys,
                                k_wide + size_t(w) * keys * N, n, keys, true);
        }
        unpack_tile(dqkv + k0 * stride + C, stride, dk, keys, HS);
        unpack_tile(dqkv + k0 * stride + 2 * C, stride, dv, keys, HS);
    }
    for (int i = 0; i < HS; i += N)
        for (int t = 0; t < T; ++t)
            std::copy_n(dq + size_t(i) * T + size_t(t) * N, std::min(N, HS - i),
                        dqkv + t * stride + i);
}

template <class real>
void attention_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                        const real* qkv, int B, int T, int NH, int HS, Dropout drop) {
    const int C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; ++head) {
        const size_t row = size_t(head / NH) * T, at = row * C + head % NH * HS,
                     at3 = at + 2 * row * C;
        attend_backward(dqkv + at3, dout + at, out + at, lse + size_t(head) * T, qkv + at3, T, C,
                        HS, drop, uint64_t(head));
    }
}

// =================================================================================================
// §10 Files: read and written whole, checked, and JSON
// =================================================================================================

// A file operation that failed, with the system's error number: a full disk (ENOSPC, EDQUOT) can be
// told from a folder that is not there.
struct FileError : Error {
    int code;
    FileError(int code, const std::string& message) : Error(1, message), code(code) {}
};
[[noreturn]] inline void fail_file(const std::string& what, const std::string& path, int code) {
    throw FileError(code, "cannot " + what + " " + path + ": " + std::strerror(code));
}

// Every change this program makes on disk goes through the calls below, and each of them first asks
// this hook: 0 goes ahead, a positive number makes the call fail with that errno, -1 makes a write
// come up short. It is empty but in tests, which make each call of a save fail in turn and read off
// the order of the calls.
// Why a static: a test must reach calls made deep inside a save. Set before any thread starts.
using FileFault = std::function<int(const char* call, const std::string& path)>;
inline FileFault& file_fault() {
    static FileFault fault;
    return fault;
}
// True where the hook lets `call` happen; otherwise errno says why not. short_write may be null.
inline bool file_call(const char* call, const std::string& path, bool* short_write = nullptr) {
    int verdict = file_fault() ? file_fault()(call, path) : 0;
    if (short_write) *short_write = verdict < 0;
    if (verdict > 0) errno = verdict;
    return verdict <= 0;
}
inline int sys_create(const std::string& path) {
    if (!file_call("open", path)) return -1;
    return ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
}
inline ssize_t sys_write(int fd, const std::string& path, const void* data, size_t bytes) {
    bool half = false;
    if (!file_call("write", path, &half)) return -1;
    return ::write(fd, data, half && bytes > 1 ? bytes / 2 : bytes);
}
inline int sys_fsync(int fd, const std::string& path) {
    return file_call("fsync", path) ? ::fsync(fd) : -1;
}
inline int sys_rename(const std::string& from, const std::string& to) {
    return file_call("rename", to) ? ::rename(from.c_str(), to.c_str()) : -1;
}
inline int sys_mkdir(const std::string& path) {
    return file_call("mkdir", path) ? ::mkdir(path.c_str(), 0777) : -1;
}
inline int sys_unlink(const std::string& path) {
    return file_call("unlink", path) ? ::unlink(path.c_str()) : -1;
}
inline int sys_rmdir(const std::string& path) {
    return file_call("rmdir", path) ? ::rmdir(path.c_str()) : -1;
}

// An open file descriptor, closed at the end of its scope.
struct FileHandle {
    int fd = -1;
    explicit FileHandle(int fd) : fd(fd) {}
    FileHandle(FileHandle&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    FileHandle& operator=(FileHandle&& other) noexcept {
        std::swap(fd, other.fd);
        return *this;
    }
    ~FileHandle() {
        if (fd >= 0) ::close(fd);
    }
};

// Something of that name is there that is not a folder; a folder is there.
inline bool file_exists(const std::string& path) {
    struct stat info;
    return ::stat(path.c_str(), &info) == 0 && !S_ISDIR(info.st_mode);
}
inline bool folder_exists(const std::string& path) {
    struct stat info;
    return ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}
// "a/b/c" -> "a/b", "c" -> ".", "/c" -> "/".
inline std::string parent_folder(std::string path) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

// The names in a folder, sorted, without "." and "..".
inline std::vector<std::string> list_folder(const std::string& path) {
    std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(path.c_str()), ::closedir);
    if (!folder) fail_file("list folder", path, errno);
    std::vector<std::string> names;
    errno = 0;
    while (dirent* entry = ::readdir(folder.get())) {
        std::string name = entry->d_name;
        if (name != "." && name != "..") names.push_back(name);
    }
    if (errno != 0) fail_file("list folder", path, errno);
    std::sort(names.begin(), names.end());
    return names;
}

// The whole file. Pipes are fine too; more than max_bytes is an error before it is read.
inline std::string read_file(const std::string& path, size_t max_bytes = SIZE_MAX) {
    FileHandle file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat info;
    if (file.fd < 0 || ::fstat(file.fd, &info) != 0) fail_file("read", path, errno);
    if (S_ISDIR(info.st_mode)) fail_file("read", path, EISDIR);
    size_t expected = S_ISREG(info.st_mode) ? size_t(info.st_size) : 0, used = 0;
    std::string bytes;
    try {
        for (;;) {
            TINYGPT_CHECK(std::max(used, expected) <= max_bytes,
                          "%s: expected at most %zu bytes, found more", path.c_str(), max_bytes);
            // One byte more than expected: the read that finds the end finds it at once.
            if (used == bytes.size()) bytes.resize(std::max(expected + 1, 2 * used + 4096));
            ssize_t got = ::read(file.fd, bytes.data() + used, bytes.size() - used);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail_file("read", path, errno);
            if (got == 0) break;
            used += size_t(got);
        }
    } catch (const std::bad_alloc&) {
        fail(format("%s: %zu bytes do not fit in memory", path.c_str(), std::max(used, expected)));
    } catch (const std::length_error&) {
        fail(format("%s: %zu bytes do not fit in memory", path.c_str(), std::max(used, expected)));
    }
    bytes.resize(used);
    return bytes;
}

// Makes the names in a folder survive a power cut. Careful: some network file systems cannot
// (EINVAL, ENOTSUP); there is nothing to be done about those, so they count as done.
inline void sync_folder(const std::string& path) {
    FileHandle folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.fd < 0) fail_file("open folder", path, errno);
    if (sys_fsync(folder.fd, path) != 0 && errno != EINVAL && errno != ENOTSUP)
        fail_file("sync folder", path, errno);
}

// Creates a folder and those above it; those that exist are left alone.
inline void make_folders(const std::string& path) {
    if (path.empty() || folder_exists(path)) return;
    std::string parent = parent_folder(path);
    make_folders(parent);
    if (sys_mkdir(path) != 0) {
        int code = errno;  // somebody else may have made it meanwhile: that is as good
        if (code != EEXIST || !folder_exists(path)) fail_file("create folder", path, code);
    }
    sync_folder(parent);
}

// Gives a file or folder another name, and makes the new name last. Replaces a file of that name.
inline void rename_path(const std::string& from, const std::string& to) {
    if (sys_rename(from, to) != 0) fail_file("rename " + from + " to", to, errno);
    sync_folder(parent_folder(to));
}

inline void remove_file(const std::string& path) {
    if (sys_unlink(path) != 0 && errno != ENOENT) fail_file("remove", path, errno);
}
// Removes a folder and all in it, following no link. For our own temporary and old checkpoints.
inline void remove_folder(const std::string& path) {
    for (const std::string& name : list_folder(path)) {
        std::string inner = path + "/" + name;
        struct stat info;
        bool folder = ::lstat(inner.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
        folder ? remove_folder(inner) : remove_file(inner);
    }
    if (sys_rmdir(path) != 0) fail_file("remove folder", path, errno);
}

// A file that appears whole or not at all: bytes go to a temporary name beside it, commit() syncs
// them and gives them their name. Without commit() the temporary is removed and the old file, if
// there was one, stays as it was. After a commit() that failed at its very last step (the folder's
// sync) the new file is there, whole, but may not survive a power cut.
class FileWriter {
public:
    explicit FileWriter(const std::string& path)
        : path(path), temporary(path + format(".tmp-%d", int(::getpid()))), file(-1) {
        struct stat info;  // a rename over /dev/null would be a surprise
        bool other = ::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode);
        TINYGPT_CHECK(!other, "cannot write %s: it exists and is not a file", path.c_str());
        ::unlink(temporary.c_str());  // left by a killed process that had our number
        file.fd = sys_create(temporary);
        if (file.fd < 0) fail_file("write", path, errno);
    }
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;
    ~FileWriter() {
        if (file.fd >= 0) ::unlink(temporary.c_str());
    }
    // Appends. Not buffered: give it large pieces. A write may come up short or be interrupted.
    void write(const void* data, size_t bytes) {
        const char* from = static_cast<const char*>(data);
        while (bytes > 0) {
            ssize_t done = sys_write(file.fd, temporary, from, bytes);
            if (done < 0 && errno == EINTR) continue;
            if (done <= 0) fail_file("write", path, done < 0 ? errno : ENOSPC);
            from += done;
            bytes -= size_t(done);
        }
    }
    // Careful: the order is the promise. Were the name synced before the data, a power cut could
    // leave the name with an empty file.
    void commit() {
        if (sys_fsync(file.fd, temporary) != 0) fail_file("write (fsync)", path, errno);
        if (sys_rename(temporary, path) != 0) fail_file("write (rename to)", path, errno);
        ::close(std::exchange(file.fd, -1));
        sync_folder(parent_folder(path));
    }

private:
    std::string path, temporary;
    FileHandle file;
};

// Removes what a killed process left in a folder under FileWriter's temporary names. Careful: only
// for a folder that no other process writes to now.
inline void remove_temporary_files(const std::string& folder) {
    for (const std::string& name : list_folder(folder)) {
        std::string path = folder + "/" + name;
        if (name.find(".tmp-") != std::string::npos && file_exists(path)) remove_file(path);
    }
}

// The file has these bytes, all of them, or is as it was.
inline void write_file(const std::string& path, std::string_view bytes) {
    FileWriter writer(path);
    writer.write(bytes.data(), bytes.size());
    writer.commit();
}

// ---- Has this file changed? -----------------------------------------------------------------

// A 64-bit checksum at the speed of memory, against accidents (a flipped bit, a lost page), not
// against somebody who wants to deceive. Four lanes take every fourth 8-byte word, mixed:
//     word = word * K;  word ^= word >> 32;  lane = rotate((lane ^ word) * K'),  K and K' odd.
// Each of these can be undone, for a fixed word as for a fixed lane: so two files of one length
// that differ only within one word, by a single bit, say, always have different checksums. Others
// escape with a chance of about 2^-64. K and K' are the multipliers of mix_bits.
class Checksum {
public:
    // In any portions: the sum is that of all the bytes in a row.
    void add(const void* data, size_t bytes) {
        const char* from = static_cast<const char*>(data);
        length += bytes;
        while (bytes > 0) {
            if (filled == 0 && bytes >= sizeof buffer) {
                size_t blocks = bytes / sizeof buffer;
                add_blocks(from, blocks);
                from += blocks * sizeof buffer;
                bytes -= blocks * sizeof buffer;
                continue;
            }
            size_t part = std::min(bytes, sizeof buffer - filled);
            std::memcpy(buffer + filled, from, part);
            filled += part;
            from += part;
            bytes -= part;
            if (filled == sizeof buffer) add_blocks(buffer, 1), filled = 0;
        }
    }
    // 16 hexadecimal digits. The last block is filled up with zeros; the length tells them apart.
    std::string hex() const {
        Checksum last = *this;
        std::memset(last.buffer + filled, 0, sizeof buffer - filled);
        if (filled > 0) last.add_blocks(last.buffer, 1);
        uint64_t sum = length;
        for (uint64_t lane : last.lanes) sum = step(sum, lane);
        return format("%016llx", static_cast<unsigned long long>(mix_bits(sum)));
    }

private:
    uint64_t lanes[4] = {1, 2, 3, 4}, length = 0;
    char buffer[32];
    size_t filled = 0;

    static uint64_t step(uint64_t lane, uint64_t word) {
        word *= 0xbf58476d1ce4e5b9ull;
        word ^= word >> 32;
        lane = (lane ^ word) * 0x94d049bb133111ebull;
        return (lane << 29) | (lane >> 35);
    }
    void add_blocks(const char* from, size_t blocks) {
        uint64_t a = lanes[0], b = lanes[1], c = lanes[2], d = lanes[3], words[4];
        for (size_t i = 0; i < blocks; i++, from += sizeof words) {
            std::memcpy(words, from, sizeof words);
            a = step(a, words[0]), b = step(b, words[1]);
            c = step(c, words[2]), d = step(d, words[3]);
        }
        lanes[0] = a, lanes[1] = b, lanes[2] = c, lanes[3] = d;
    }
};

// SHA-256 (FIPS 180-4), for files whose digest is published. Bytes are added in any portions.
class Sha256 {
public:
    void add(const void* data, size_t bytes) {
        const uint8_t* from = static_cast<const uint8_t*>(data);
        for (length += bytes; bytes > 0;) {
            size_t part = std::min(bytes, 64 - filled);
            std::memcpy(block + filled, from, part);
            filled += part;
            from += part;
            bytes -= part;
            if (filled == 64) add_block(), filled = 0;
        }
    }
    // 64 hexadecimal digits. §5.1.1: a one bit, zeros, and the length in bits end the last block.
    std::string hex() const {
        Sha256 last = *this;
        uint64_t bits = length * 8;
        uint8_t padding[72] = {0x80};
        size_t zeros = (filled < 56 ? 56 : 120) - filled;
        for (int i = 0; i < 8; i++) padding[zeros + size_t(i)] = uint8_t(bits >> (56 - 8 * i));
        last.add(padding, zeros + 8);
        std::string text;
        for (uint32_t word : last.state) text += format("%08x", word);
        return text;
    }

private:
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};  // §5.3.3
    uint8_t block[64];
    uint64_t length = 0;
    size_t filled = 0;

    // §4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    static const std::array<uint32_t, 64>& constants() {
        static const std::array<uint32_t, 64> table = [] {
            std::array<uint32_t, 64> k;
            size_t found = 0;
            for (int n = 2; found < k.size(); n++) {
                bool prime = true;
                for (int d = 2; d * d <= n; d++) prime = prime && n % d != 0;
                double root = std::cbrt(double(n));
                if (prime) k[found++] = uint32_t((root - std::floor(root)) * 0x1p32);
            }
            return k;
        }();
        return table;
    }
    static uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }
    // §6.2.2, with its names.
    void add_block() {
        uint32_t w[64], s[8];
        for (int t = 0; t < 16; t++)
            w[t] = uint32_t(block[4 * t]) << 24 | uint32_t(block[4 * t + 1]) << 16 |
                   uint32_t(block[4 * t + 2]) << 8 | block[4 * t + 3];
        for (int t = 16; t < 64; t++) {
            uint32_t x = w[t - 15], y = w[t - 2];
            uint32_t sigma0 = rotate(x, 7) ^ rotate(x, 18) ^ (x >> 3);
            uint32_t sigma1 = rotate(y, 17) ^ rotate(y, 19) ^ (y >> 10);
            w[t] = sigma1 + w[t - 7] + sigma0 + w[t - 16];
        }
        std::copy(state, state + 8, s);
        const std::array<uint32_t, 64>& k = constants();
        for (size_t t = 0; t < 64; t++) {
            auto [a, b, c, d, e, f, g, h] = s;
            uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +
                          ((e & f) ^ (~e & g)) + k[t] + w[t];
            uint32_t t2 =
                (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            uint32_t next[8] = {t1 + t2, a, b, c, d + t1, e, f, g};
            std::copy(next, next + 8, s);
        }
        for (int i = 0; i < 8; i++) state[i] += s[i];
    }
};
inline std::string sha256_hex(std::string_view bytes) {
    Sha256 sha;
    sha.add(bytes.data(), bytes.size());
    return sha.hex();
}

// The digest of a file (Checksum or Sha256), read a piece at a time.
template <class Digest>
inline std::string file_digest(const std::string& path) {
    FileHandle file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.fd < 0) fail_file("read", path, errno);
    std::vector<char> piece(size_t(1) << 18);
    Digest digest;
    for (;;) {
        ssize_t got = ::read(file.fd, piece.data(), piece.size());
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail_file("read", path, errno);
        if (got == 0) return digest.hex();
        digest.add(piece.data(), size_t(got));
    }
}

// ---- JSON (RFC 8259) ------------------------------------------------------------------------

// The number of bytes of the character text begins with; 0 where that is not valid UTF-8 (too long
// a form, half a surrogate pair, above U+10FFFF, cut short).
inline size_t utf8_character(std::string_view text) {
    auto byte = [&](size_t i) { return i < text.size() ? unsigned(uint8_t(text[i])) : 0u; };
    auto tail = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
    unsigned a = byte(0), b = byte(1);
    if (text.empty()) return 0;
    if (a < 0x80) return 1;
    if (a >= 0xc2 && a <= 0xdf) return tail(1) ? 2 : 0;
    if (a >= 0xe0 && a <= 0xef) {
        bool range = !(a == 0xe0 && b < 0xa0) && !(a == 0xed && b > 0x9f);
        return range && tail(1) && tail(2) ? 3 : 0;
    }
    bool range = a >= 0xf0 && a <= 0xf4 && !(a == 0xf0 && b < 0x90) && !(a == 0xf4 && b > 0x8f);
    return range && tail(1) && tail(2) && tail(3) ? 4 : 0;
}
// Appends a code point (below 0x110000, no surrogate) in one to four bytes.
inline void append_utf8(std::string& out, uint32_t code) {
    auto put = [&](uint32_t byte) { out.push_back(char(uint8_t(byte))); };
    if (code < 0x80) return put(code);
    if (code < 0x800) return put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
    if (code < 0x10000)
        put(0xe0 | code >> 12);
    else
        put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
}

// A JSON string, quotes included. A byte that is not UTF-8 becomes U+FFFD: the text stays JSON.
inline void append_json_string(std::string& out, std::string_view text) {
    out.push_back('"');
    for (size_t i = 0; i < text.size();) {
        unsigned char c = uint8_t(text[i]);
        size_t bytes = utf8_character(text.substr(i, 4));
        if (c == '"' || c == '\\')
            out.append({'\\', char(c)});
        else if (c == '\n')
            out.append("\\n");
        else if (c < 0x20)
            out.append(format("\\u%04x", c));
        else if (bytes == 0)
            out.append("\xef\xbf\xbd");
        else
            out.append(text.substr(i, bytes));
        i += std::max<size_t>(bytes, 1);
    }
    out.push_back('"');
}
// Names for messages: one line, not long, whatever a file holds.
inline std::string in_quotes(std::string_view text) {
    std::string out;
    append_json_string(out, text.substr(0, 60));
    return text.size() > 60 ? out + "..." : out;
}

// What a text may ask of the parser.
struct JsonLimits {
    int depth = 64;              // arrays and objects inside one another
    size_t values = 10'000'000;  // of any kind, keys not counted
};

// One JSON value; an object keeps its members in the order of the file.
struct Json {
    enum class Kind { null, boolean, number, string, array, object };
    Kind kind = Kind::null;
    bool boolean = false;
    bool integral = false;  // a number written without fraction or exponent that fits `integer`
    int64_t integer = 0;
    double number = 0;  // of every number, the integral ones too
    std::string text;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> members;

    Json() = default;
    Json(std::nullptr_t) {}
    Json(bool value) : kind(Kind::boolean), boolean(value) {}
    Json(double value) : kind(Kind::number), number(value) {}
    template <class T, class = std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>>>
    Json(T value)
        : kind(Kind::number), integral(true), integer(int64_t(value)), number(double(value)) {
        TINYGPT_CHECK(std::is_signed_v<T> || integer >= 0, "JSON: integer above 2^63 - 1");
    }
    Json(std::string value) : kind(Kind::string), text(std::move(value)) {}
    Json(std::string_view value) : Json(std::string(value)) {}
    Json(const char* value) : Json(std::string(value)) {}
    static Json array() { return of(Kind::array); }
    static Json object() { return of(Kind::object); }

    // `where` (a file's name) begins every error's message.
    static Json parse(std::string_view text, const std::string& where, JsonLimits limits = {});
    // One line with indent 0; otherwise a line for each member, and for each item of an array.
    std::string write(int indent = 0) const;

    bool is_null() const { return kind == Kind::null; }
    bool is_object() const { return kind == Kind::object; }
    bool is_array() const { return kind == Kind::array; }
    bool is_string() const { return kind == Kind::string; }
    // The member's value, or null where there is none.
    const Json* find(std::string_view key) const {
        for (auto& [name, value] : members)
            if (name == key) return &value;
        return nullptr;
    }
    // Sets a member, at its old place or the end. Linear: fill large objects through `members`.
    Json& set(std::string_view key, Json value) {
        for (auto& [name, old] : members)
            if (name == key) return old = std::move(value), *this;
        members.emplace_back(std::string(key), std::move(value));
        return *this;
    }
    // A member that must be there and of that kind; otherwise an error naming `where` and the key.
    const Json& get(std::string_view key, Kind kind, const std::string& where) const;
    int64_t get_int(std::string_view key, const std::string& where, int64_t lowest = INT64_MIN,
                    int64_t highest = INT64_MAX) const;
    double get_number(std::string_view key, const std::string& where) const {
        return get(key, Kind::number, where).number;
    }
    bool get_bool(std::string_view key, const std::string& where) const {
        return get(key, Kind::boolean, where).boolean;
    }
    const std::string& get_string(std::string_view key, const std::string& where) const {
        return get(key, Kind::string, where).text;
    }

private:
    static Json of(Kind kind) {
        Json value;
        value.kind = kind;
        return value;
    }
    void write_to(std::string& out, int indent, int depth) const;
};

inline const char* json_kind_name(Json::Kind kind) {
    constexpr const char* names[] = {"null",     "true or false", "a number",
                                     "a string", "an array",      "an object"};
    return names[size_t(kind)];
}
inline const Json& Json::get(std::string_view key, Kind wanted, const std::string& where) const {
    std::string name(key);
    const Json* value = find(key);
    TINYGPT_CHECK(value, "%s: \"%s\" is missing", where.c_str(), name.c_str());
    TINYGPT_CHECK(value->kind == wanted, "%s: \"%s\" must be %s, found %s", where.c_str(),
                  name.c_str(), json_kind_name(wanted), json_kind_name(value->kind));
    return *value;
}
inline int64_t Json::get_int(std::string_view key, const std::string& where, int64_t lowest,
                             int64_t highest) const {
    const Json& value = get(key, Kind::number, where);
    bool good = value.integral && value.integer >= lowest && value.integer <= highest;
    TINYGPT_CHECK(good, "%s: \"%s\" must be an integer from %lld to %lld, found %s", where.c_str(),
                  std::string(key).c_str(), static_cast<long long>(lowest),
                  static_cast<long long>(highest), value.write().c_str());
    return value.integer;
}

// The grammar, a function for each kind of value. Time and memory are linear in the text, but for
// the sort that finds duplicate keys.
class JsonParser {
public:
    JsonParser(std::string_view text, const std::string& where, JsonLimits limits)
        : text(text), where(where), limits(limits) {}
    Json document() {
        Json out;
        value(out, 0);
        if (at < text.size()) wrong("the end of the text");
        return out;
    }

private:
    std::string_view text;
    const std::string& where;
    JsonLimits limits;
    size_t at = 0, values = 0;

    // Why lines are counted only here: a good text pays nothing for them.
    [[noreturn]] void error(size_t place, const std::string& message) const {
        place = std::min(place, text.size());
        std::string_view before = text.substr(0, place);
        size_t line = 1 + size_t(std::count(before.begin(), before.end(), '\n'));
        fail(format("%s: not valid JSON: line %zu, byte %zu: %s", where.c_str(), line, place,
                    message.c_str()));
    }
    [[noreturn]] void wrong(const char* expected) const {
        std::string found = "the end";
        if (at < text.size()) {
            uint8_t c = uint8_t(text[at]);
            found = c > ' ' && c < 127 ? format("'%c'", c) : format("byte 0x%02x", c);
        }
        error(at, format("expected %s, found %s", expected, found.c_str()));
    }
    char peek() const { return at < text.size() ? text[at] : '\0'; }
    void space() {
        while (at < text.size() && std::strchr(" \t\n\r", text[at]) && text[at]) at++;
    }
    bool accept(char c) {
        if (at >= text.size() || text[at] != c) return false;
        at++;
        return true;
    }

    // Each of these reads one thing of the grammar at text[at], and moves `at` behind it.
    // A value, and the space around it; `out` is empty.
    void value(Json& out, int depth) {
        space();
        if (++values > limits.values) error(at, format("more than %zu values", limits.values));
        char c = peek();
        if (c == '{' || c == '[') {
            if (depth >= limits.depth) error(at, format("more than %d levels", limits.depth));
            at++;
            c == '{' ? object(out, depth + 1) : array(out, depth + 1);
        } else if (c == '"') {
            out.kind = Json::Kind::string;
            string(out.text);
        } else if (c == '-' || (c >= '0' && c <= '9')) {
            number(out);
        } else if (!word("null", out, nullptr) && !word("true", out, true) &&
                   !word("false", out, false)) {
            wrong("a value");
        }
        space();
    }
    bool word(std::string_view word, Json& out, Json meaning) {
        if (text.substr(at, word.size()) != word) return false;
        at += word.size();
        out = std::move(meaning);
        return true;
    }
    void array(Json& out, int depth) {
        out.kind = Json::Kind::array;
        space();
        if (accept(']')) return;
        do value(out.items.emplace_back(), depth);
        while (accept(','));
        if (!accept(']')) wrong("',' or ']'");
    }
    void object(Json& out, int depth) {
        size_t start = at;
        out.kind = Json::Kind::object;
        space();
        if (accept('}')) return;
        do {
            auto& [key, member] = out.members.emplace_back();
            space();
            if (peek() != '"') wrong("a key in quotes");
            string(key);
            space();
            if (!accept(':')) wrong("':'");
            value(member, depth);
        } while (accept(','));
        if (!accept('}')) wrong("',' or '}'");
        refuse_duplicates(out, start);
    }
    // Why sorting: comparing every pair takes minutes on a vocabulary of 50,000 keys, and the keys
    // of a hostile file could be chosen to fall into one slot of a hash table.
    void refuse_duplicates(const Json& object, size_t start) const {
        std::vector<std::string_view> keys;
        for (auto& member : object.members) keys.push_back(member.first);
        std::sort(keys.begin(), keys.end());
        auto twice = std::adjacent_find(keys.begin(), keys.end());
        if (twice != keys.end())
            error(start, "the object that starts here has the key " + in_quotes(*twice) + " twice");
    }
    void digits() {
        if (!std::isdigit(uint8_t(peek()))) wrong("a digit");
        while (std::isdigit(uint8_t(peek()))) at++;
    }
    // from_chars alone would take "01", "1." and "inf": the grammar comes first.
    void number(Json& out) {
        size_t start = at;
        accept('-');
        if (!accept('0')) digits();
        size_t whole = at;
        if (accept('.')) digits();
        if (accept('e') || accept('E')) {
            accept('+') || accept('-');
            digits();
        }
        const char *begin = text.data() + start, *end = text.data() + at;
        out.kind = Json::Kind::number;
        if (std::from_chars(begin, end, out.number).ec != std::errc())
            error(start, "number out of range");
        out.integral = whole == at && std::from_chars(begin, end, out.integer).ec == std::errc();
    }
    // A quoted string, valid UTF-8, without control characters.
    void string(std::string& out) {
        for (at++; !accept('"');) {
            uint8_t c = uint8_t(peek());
            if (at >= text.size() || c < 0x20) wrong("the rest of a string");
            if (c == '\\') {
                escape(out);
                continue;
            }
            size_t bytes = c < 0x80 ? 1 : utf8_character(text.substr(at, 4));
            if (bytes == 0) error(at, "invalid UTF-8");
            out.append(text, at, bytes);
            at += bytes;
        }
    }
    // \n and the like, or \u with the four digits of a UTF-16 unit.
    void escape(std::string& out) {
        static constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        size_t start = at++;
        size_t which = at < text.size() ? names.find(text[at]) : std::string_view::npos;
        if (which != std::string_view::npos) {
            at++;
            out.push_back(meanings[which]);
        } else if (accept('u')) {
            uint32_t code = hex4();
            // Above U+FFFF: a high and a low surrogate, ten bits each.
            if (code >= 0xd800 && code <= 0xdbff && text.substr(at, 2) == "\\u") {
                at += 2;
                uint32_t low = hex4();
                if (low < 0xdc00 || low > 0xdfff) error(start, "half a surrogate pair");
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            }
            if (code >= 0xd800 && code <= 0xdfff) error(start, "half a surrogate pair");
            append_utf8(out, code);
        } else {
            wrong("an escape sequence");
        }
    }
    uint32_t hex4() {
        uint32_t code = 0;
        for (int i = 0; i < 4; i++) {
            if (!std::isxdigit(uint8_t(peek()))) wrong("four hexadecimal digits");
            char c = text[at++];
            code = code * 16 + uint32_t(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
        }
        return code;
    }
};
inline Json Json::parse(std::string_view text, const std::string& where, JsonLimits limits) {
    return JsonParser(text, where, limits).document();
}

inline std::string Json::write(int indent) const {
    std::string out;
    write_to(out, indent, 0);
    return out;
}
// Numbers are written so that reading them gives the same bits back.
inline void Json::write_to(std::string& out, int indent, int depth) const {
    auto line = [&](int level) {
        if (indent > 0) out.append("\n").append(size_t(indent * level), ' ');
    };
    char digits[32];
    if (kind == Kind::null) out.append("null");
    if (kind == Kind::boolean) out.append(boolean ? "true" : "false");
    if (kind == Kind::string) append_json_string(out, text);
    if (kind == Kind::number) {
        TINYGPT_CHECK(std::isfinite(number), "JSON has no NaN and no infinity: cannot write one");
        // "-0" keeps its sign
        const bool whole = integral && !(integer == 0 && std::signbit(number));
        auto end = whole ? std::to_chars(digits, digits + sizeof digits, integer).ptr
                         : std::to_chars(digits, digits + sizeof digits, number).ptr;
        out.append(digits, end);
    }
    if (kind == Kind::array) {
        out.push_back('[');
        for (size_t i = 0; i < items.size(); i++) {
            if (i > 0) out.push_back(',');
            line(depth + 1);
            items[i].write_to(out, indent, depth + 1);
        }
        if (!items.empty()) line(depth);
        out.push_back(']');
    }
    if (kind == Kind::object) {
        out.push_back('{');
        for (size_t i = 0; i < members.size(); i++) {
            if (i > 0) out.push_back(',');
            line(depth + 1);
            append_json_string(out, members[i].first);
            out.append(indent > 0 ? ": " : ":");
            members[i].second.write_to(out, indent, depth + 1);
        }
        if (!members.empty()) line(depth);
        out.push_back('}');
    }
}

// =================================================================================================
// §10 The tokenizer: text to tokens and back
// =================================================================================================
// GPT-2's tokenizer is a byte-level BPE (byte pair encoding). Text is cut into pieces, which are
// roughly words with the space before them; each piece starts as its bytes, one token a byte; and
// then the neighbours whose merge was learnt first become one token, again and again, until no two
// neighbours have a merge. So any bytes at all can be encoded, and decoding gives them back.
//
//   text    "Hello, world's"
//   pieces  "Hello" | "," | " world" | "'s"
//   tokens   15496     11     995       338        (with GPT-2's own vocabulary)

// ---- Letters, numbers, spaces: what Unicode says of a character --------------------------------

// The classes of characters that decide where a piece ends. kBeyondAscii marks the first byte of a
// longer character, in the table of bytes only.
enum CharClass : uint8_t { kOther, kLetter, kNumber, kSpace, kBeyondAscii };

// \p{L}, \p{N} and \s of Unicode 17.0. The code points 0, 1, 2, ... fall into runs of one class;
// each run is the number (length - 1) * 4 + class in base 32, lowest digit first. A digit is one of
// the 64 characters from '0' to 'p' without the backslash, one of the upper 32 where more digits
// follow. (Written by checks/unicode_classes.py.) GPT-2 itself was trained with the Unicode of
// 2017: only characters that were added later are classed differently.
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

// The class of every code point. Expanded at its first use, then only read.
class CharTable {
public:
    static CharClass of(uint32_t code) {
        static const CharTable table;
        return code < table.class_.size() ? table.class_[code] : kOther;
    }

private:
    CharTable() {
        size_t value = 0, shift = 0;
        for (char c : kClassRuns) {
            size_t digit = size_t(c - '0' - (c > '\\'));
            value |= (digit & 31) << shift, shift += 5;
            if (digit >= 32) continue;
            class_.insert(class_.end(), value / 4 + 1, CharClass(value % 4));
            value = shift = 0;
        }
    }
    std::vector<CharClass> class_;  // up to the last code point that is not kOther
};

// The same for a byte that begins a character; English hardly needs more.
constexpr std::array<CharClass, 256> make_byte_classes() {
    std::array<CharClass, 256> classes{};
    for (int b = 0; b < 256; ++b) {
        int letter = b | 0x20;
        classes[size_t(b)] = b >= 128                          ? kBeyondAscii
                             : letter >= 'a' && letter <= 'z'  ? kLetter
                             : b >= '0' && b <= '9'            ? kNumber
                             : b == ' ' || (b >= 9 && b <= 13) ? kSpace
                                                               : kOther;
    }
    return classes;
}
inline constexpr std::array<CharClass, 256> kByteClass = make_byte_classes();
inline CharClass class_of_byte(char c) { return kByteClass[uint8_t(c)]; }

// One character of a text: how many bytes it takes, and its class.
struct Character {
    int bytes;
    CharClass kind;
};

// The character at text[at], for at < text.size(). A byte that begins no valid UTF-8 character is
// taken alone, as kOther: broken text loses nothing.
inline Character character_at(std::string_view text, size_t at) {
    std::string_view c = text.substr(at, 4);
    auto low_bits = [&](size_t i) { return uint32_t(uint8_t(c[i]) & 0x3f); };
    size_t bytes = utf8_character(c);
    uint32_t code = uint8_t(c[0]);
    if (bytes == 0) return {1, kOther};
    if (bytes == 2) code = (code & 31) << 6 | low_bits(1);
    if (bytes == 3) code = (code & 15) << 12 | low_bits(1) << 6 | low_bits(2);
    if (bytes == 4) code = (code & 7) << 18 | low_bits(1) << 12 | low_bits(2) << 6 | low_bits(3);
    return {int(bytes), CharTable::of(code)};
}

// How many characters the text has; a byte that belongs to none counts as one.
inline int64_t count_characters(std::string_view text) {
    int64_t count = 0;
    for (size_t at = 0; at < text.size(); ++count)
        at += text[at] & 0x80 ? size_t(character_at(text, at).bytes) : 1;
    return count;
}

// ---- Pieces: where merging stops ---------------------------------------------------------------

// How many of the eight bytes at `text`, from the first on, are ASCII letters. Eight comparisons at
// once, in one register: adding 128 - c sets the top bit of a byte below 128 that is c or more.
inline size_t leading_letters(const char* text) {
    constexpr uint64_t kEach = 0x0101010101010101, kTop = 0x80 * kEach;
    uint64_t bytes;
    std::memcpy(&bytes, text, sizeof bytes);
    uint64_t lower = (bytes | 0x20 * kEach) & ~kTop;
    uint64_t from_a = lower + (128 - 'a') * kEach, beyond_z = lower + (128 - 'z' - 1) * kEach;
    uint64_t others = ~(from_a & ~beyond_z & ~bytes) & kTop;
    return size_t(std::countr_zero(others)) / 8;
}

// Where the run of characters of class `kind` that begins at text[at] ends. If `last` is given, it
// becomes where the run's last character begins.
inline size_t run_end(std::string_view text, size_t at, CharClass kind, size_t* last = nullptr) {
    if (kind == kLetter) {
        while (at + 8 <= text.size()) {
            size_t letters = leading_letters(text.data() + at);
            at += letters;
            if (letters < 8) break;
        }
    }
    while (at < text.size()) {
        CharClass here = class_of_byte(text[at]);
        size_t bytes = 1;
        if (here == kBeyondAscii) {
            Character c = character_at(text, at);
            here = c.kind, bytes = size_t(c.bytes);
        }
        if (here != kind) break;
        if (last) *last = at;
        at += bytes;
    }
    return at;
}

// The piece that begins at text[at], for at < text.size(). This is GPT-2's pattern
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// (openai/gpt-2, src/encoder.py) as a scanner: the first alternative that fits is the piece.
inline std::string_view next_piece(std::string_view text, size_t at) {
    auto is = [&](size_t i, char c) { return at + i < text.size() && text[at + i] == c; };
    // An ending after an apostrophe, lower case only: 's 't 'm 'd, or 're 've 'll.
    if (text[at] == '\'') {
        if (is(1, 's') || is(1, 't') || is(1, 'm') || is(1, 'd')) return text.substr(at, 2);
        if ((is(1, 'r') && is(2, 'e')) || (is(1, 'v') && is(2, 'e')) || (is(1, 'l') && is(2, 'l')))
            return text.substr(at, 3);
    }
    // A run of letters, of numbers, or of anything else but space, after at most one blank.
    size_t begin = at + (text[at] == ' ' && at + 1 < text.size());
    CharClass kind = class_of_byte(text[begin]);
    if (kind == kBeyondAscii) kind = character_at(text, begin).kind;
    if (kind != kSpace) return text.substr(at, run_end(text, begin, kind) - at);
    // White space. Before a word its last character is left over: a blank joins that word.
    size_t last = at, end = run_end(text, at, kSpace, &last);
    return text.substr(at, (end == text.size() || last == at ? end : last) - at);
}

// The first place at or after text[at] where the text may be cut, so that its two parts have the
// same pieces as the whole: between a character that is no space and a space.
inline size_t safe_cut(std::string_view text, size_t at) {
    for (at = std::max<size_t>(at, 1); at < text.size(); ++at) {
        CharClass before = class_of_byte(text[at - 1]), after = class_of_byte(text[at]);
        if (after == kSpace && before != kSpace && before != kBeyondAscii) return at;
    }
    return text.size();
}

// ---- Tokens ------------------------------------------------------------------------------------

// GPT-2 writes bytes as characters that can be seen. The 188 bytes that are visible in Latin-1
// stand for themselves; the other 68, in order, are written as U+0100, U+0101, ... ("Ġ" is the
// blank). The token ids of the bytes follow the same order: first the 188, then the 68.
struct ByteAlphabet {
    uint8_t byte_of_id[256] = {};
    uint16_t id_of_byte[256] = {}, code_of_byte[256] = {};
    constexpr ByteAlphabet() {
        auto visible = [](int b) { return (b > 32 && b < 127) || (b > 160 && b != 173); };
        int id = 0;
        for (int hidden = 0; hidden < 2; ++hidden)
            for (int b = 0; b < 256; ++b)
                if (visible(b) != bool(hidden)) {
                    byte_of_id[id] = uint8_t(b), id_of_byte[b] = uint16_t(id);
                    code_of_byte[b] = uint16_t(hidden ? 256 + id - 188 : b);
                    ++id;
                }
    }
};
inline constexpr ByteAlphabet kBytes;

constexpr std::string_view kEndOfText = "<|endoftext|>";  // as it is written in a vocabulary file

// Which token two neighbours merge into: a hash table with linear probing.
class MergeTable {
public:
    static constexpr uint32_t kNone = UINT32_MAX;
    // The token that left and right become, or kNone. The smaller the token, the earlier its merge.
    uint32_t find(uint32_t left, uint32_t right) const {
        uint32_t key = left << 16 | right;
        for (size_t at = slot(key);; at = (at + 1) & (entries_.size() - 1)) {
            if (entries_[at].token == kNone || entries_[at].key == key) return entries_[at].token;
        }
    }
    explicit MergeTable(size_t merges = 0) : entries_(std::bit_ceil(2 * merges + 2)) {}
    void add(uint32_t left, uint32_t right, uint32_t token) {
        uint32_t key = left << 16 | right;
        size_t at = slot(key);
        while (entries_[at].token != kNone) at = (at + 1) & (entries_.size() - 1);
        entries_[at] = {key, token};
    }

private:
    struct Entry {
        uint32_t key = 0, token = kNone;
    };
    // Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4).
    size_t slot(uint32_t key) const {
        return size_t((key * 0x9e3779b97f4a7c15ull) >> 32) & (entries_.size() - 1);
    }
    std::vector<Entry> entries_;
};

// A vocabulary. Tokens 0..255 are the bytes, token 256 + i is what merge i makes of two earlier
// tokens, and the last token is the end of a text.
class Tokenizer {
public:
    using Merge = std::pair<uint16_t, uint16_t>;

    // The vocabulary of these merges. Fails if one names a token that does not exist before it.
    explicit Tokenizer(std::vector<Merge> merge_list)
        : merges_(std::move(merge_list)), table_(merges_.size()) {
        TINYGPT_CHECK(merges_.size() <= 65536 - 257,
                      "expected at most %d merges, found %zu: token ids have 16 bits", 65536 - 257,
                      merges_.size());
        for (int b : kBytes.byte_of_id) bytes_.emplace_back(1, char(b));
        for (auto [left, right] : merges_) {
            TINYGPT_CHECK(left < bytes_.size() && right < bytes_.size(),
                          "merge %zu joins tokens %d and %d, which do not exist before it",
                          bytes_.size() - 256, left, right);
            table_.add(left, right, uint32_t(bytes_.size()));
            bytes_.push_back(bytes_[left] + bytes_[right]);
        }
        bytes_.emplace_back();
    }
    // No merges: every byte is a token.
    static Tokenizer bytes() { return Tokenizer({}); }

    int vocab_size() const { return int(bytes_.size()); }
    int end_of_text() const { return vocab_size() - 1; }
    const std::vector<Merge>& merges() const { return merges_; }
    const MergeTable& merge_table() const { return table_; }
    bool operator==(const Tokenizer& other) const { return merges_ == other.merges_; }

    // The bytes that a token stands for: none for the end of a text.
    std::string_view bytes_of(int id) const {
        TINYGPT_CHECK(id >= 0 && id < vocab_size(), "there is no token %d: the vocabulary has %d",
                      id, vocab_size());
        return bytes_[size_t(id)];
    }
    // The tokens of a text. "<|endoftext|>" in it is thirteen characters like any others.
    std::vector<uint16_t> encode(std::string_view text) const;

    // The text of some tokens, with `end_of_text_mark` for every end of text.
    std::string decode(const std::vector<uint16_t>& tokens,
                       std::string_view end_of_text_mark = "") const {
        std::string text;
        for (uint16_t id : tokens) text += id == end_of_text() ? end_of_text_mark : bytes_of(id);
        return text;
    }

    // A folder with vocab.json and merges.txt (save writes those), or encoder.json and vocab.bpe.
    static Tokenizer load(const std::string& folder);
    void save(const std::string& folder) const;
    std::string name_of(int id) const;  // the token in GPT-2's visible characters
    std::string vocab_json() const;
    std::string merges_text() const;

private:
    std::vector<Merge> merges_;
    std::vector<std::string> bytes_;
    MergeTable table_;
};

// ---- Encoding ----------------------------------------------------------------------------------

// Turns text into tokens and remembers short pieces. One for each thread.
// Why: text repeats its words, so nearly every piece is found in the memory, and merging is rare.
class Encoder {
public:
    // The memory is sized for texts of about text_bytes.
    explicit Encoder(const Tokenizer& tokenizer, size_t text_bytes = SIZE_MAX)
        : table_(tokenizer.merge_table()),
          known_(std::bit_ceil(std::clamp<size_t>(text_bytes / 16, 64, kMaxKnown))) {}

    // Appends the tokens of the text to out.
    void encode(std::string_view text, std::vector<uint16_t>& out) {
        size_t used = out.size();
        for (size_t at = 0; at < text.size();) {
            std::string_view piece = next_piece(text, at);
            // Make room for a token a byte, and for all of a Known's, which are copied unseen.
            if (out.size() < used + piece.size() + kMaxTokens)
                out.resize(used + std::min(text.size() - at, used + piece.size()) + kMaxTokens);
            uint16_t* to = out.data() + used;
            bool fits = piece.size() <= kMaxBytes;
            used += fits ? recall(piece, text.size() - at, to) : merge(piece, to);
            at += piece.size();
        }
        out.resize(used);
    }

private:
    static constexpr size_t kMaxKnown = 1 << 16;
    static constexpr size_t kMaxBytes = 15, kMaxTokens = 7;
    // A piece of up to 15 bytes, with its length in the 16th, and its tokens, at most seven. Two
    // fill a line of cache. A new piece takes the place of the one that was there.
    struct Known {
        uint64_t key[2] = {0, 0};  // zero: nothing here, as no piece is empty
        uint16_t count = 0, tokens[kMaxTokens] = {};
    };

    // Writes the tokens of a short piece to `to`, which has room for 7 at least; returns how many.
    // The text goes on beyond the piece: `readable` bytes from the piece's beginning.
    size_t recall(std::string_view piece, size_t readable, uint16_t* to) {
        uint64_t key[2] = {0, 0};
        if (readable >= sizeof key) {
            // Why: copying a fixed number of bytes and clearing the surplus is far faster.
            std::memcpy(key, piece.data(), sizeof key);
            size_t low = std::min<size_t>(piece.size(), 8), high = piece.size() - low;
            key[0] &= ~uint64_t(0) >> (64 - 8 * low);
            key[1] &= (uint64_t(1) << (8 * high)) - 1;
        } else {
            std::memcpy(key, piece.data(), piece.size());
        }
        key[1] |= uint64_t(piece.size()) << 56;
        uint64_t mixed = (key[0] ^ (key[1] * 0xbf58476d1ce4e5b9ull)) * 0x9e3779b97f4a7c15ull;
        Known& known = known_[size_t(mixed >> 40) & (known_.size() - 1)];
        if (known.key[0] != key[0] || known.key[1] != key[1]) {
            size_t count = merge(piece, to);
            if (count > kMaxTokens) return count;
            known.key[0] = key[0], known.key[1] = key[1], known.count = uint16_t(count);
            std::copy(to, to + count, known.tokens);
        }
        std::memcpy(to, known.tokens, sizeof known.tokens);
        return known.count;
    }

    // Writes the tokens of one piece, its bytes merged, to `to`; returns how many.
    size_t merge(std::string_view piece, uint16_t* to) {
        return piece.size() <= kShort ? merge_short(piece, to) : merge_long(piece, to);
    }

    // Merging as it is defined: look for the earliest merge, make it, look again. n * n steps.
    size_t merge_short(std::string_view piece, uint16_t* to) const {
        size_t n = piece.size();
        uint32_t merged[kShort];  // what token i and the one after it make
        for (size_t i = 0; i < n; ++i) to[i] = kBytes.id_of_byte[uint8_t(piece[i])];
        for (size_t i = 0; i + 1 < n; ++i) merged[i] = table_.find(to[i], to[i + 1]);
        while (n > 1) {
            size_t best = size_t(std::min_element(merged, merged + n - 1) - merged);
            if (merged[best] == MergeTable::kNone) break;
            to[best] = uint16_t(merged[best]);
            --n;
            std::copy(to + best + 2, to + n + 1, to + best + 1);
            if (best + 1 < n) std::copy(merged + best + 2, merged + n, merged + best + 1);
            if (best > 0) merged[best - 1] = table_.find(to[best - 1], to[best]);
            if (best + 1 < n) merged[best] = table_.find(to[best], to[best + 1]);
        }
        return n;
    }

    // The same for any length. The tokens are a linked list; what can merge waits in a queue of its
    // own for every token that it would become, and the queues are served from the smallest token
    // on.
    // Why that is enough: a token takes part in later merges than its own only, so what is made
    // while a queue is served goes to queues that come after it.
    size_t merge_long(std::string_view piece, uint16_t* to) {
        TINYGPT_CHECK(piece.size() < kEnd, "a word of %zu bytes is too long to encode",
                      piece.size());
        symbols_.clear();
        for (char c : piece) {
            uint32_t i = uint32_t(symbols_.size());
            symbols_.push_back(
                {kBytes.id_of_byte[uint8_t(c)], i - 1, i + 1 < piece.size() ? i + 1 : kEnd});
        }
        for (uint32_t i = 0; i + 1 < symbols_.size(); ++i) offer(i);
        while (!queues_.empty()) {
            std::pop_heap(queues_.begin(), queues_.end(), std::greater<>());
            uint32_t token = queues_.back();
            queues_.pop_back();
            serve(token);
        }
        size_t count = 0;
        for (uint32_t i = 0; i != kEnd; i = symbols_[i].next)
            to[count++] = uint16_t(symbols_[i].token);
        return count;
    }
    // Lets symbol i wait for its merge with its right neighbour, if they have one.
    void offer(uint32_t i) {
        uint32_t token = table_.find(symbols_[i].token, symbols_[symbols_[i].next].token);
        if (token == MergeTable::kNone) return;
        if (waiting_.size() <= token) waiting_.resize(token + 1);
        if (waiting_[token].empty()) {
            queues_.push_back(token);
            std::push_heap(queues_.begin(), queues_.end(), std::greater<>());
        }
        waiting_[token].push_back(i);
    }
    // Merges all pairs that become `token`. Careful: aaa must become (aa)a, so pairs of two equal
    // tokens must wait from left to right. They do: all of them are met in one walk to the right,
    // the first over the bytes or the one that made their token. The order of others is free.
    void serve(uint32_t token) {
        std::vector<uint32_t> places = std::move(waiting_[token]);
        for (uint32_t i : places) {
            // Pass over a pair that is no more: one of its two has merged with another neighbour.
            Symbol& left = symbols_[i];
            if (left.token == kGone || left.next == kEnd) continue;
            Symbol& right = symbols_[left.next];
            if (table_.find(left.token, right.token) != token) continue;
            left.token = token, left.next = right.next, right.token = kGone;
            if (left.next != kEnd) symbols_[left.next].previous = i;
            if (left.previous != kEnd) offer(left.previous);
            if (left.next != kEnd) offer(i);
        }
        places.clear();
        waiting_[token] = std::move(places);  // empty, but its memory is used again
    }

    static constexpr size_t kShort = 32;
    static constexpr uint32_t kGone = UINT32_MAX, kEnd = UINT32_MAX;
    struct Symbol {
        uint32_t token, previous, next;
    };
    const MergeTable& table_;
    std::vector<Known> known_;
    std::vector<Symbol> symbols_;
    std::vector<std::vector<uint32_t>> waiting_;  // for every token: the left symbols of its pairs
    std::vector<uint32_t> queues_;                // a heap of the tokens whose queue is not empty
};

inline std::vector<uint16_t> Tokenizer::encode(std::string_view text) const {
    std::vector<uint16_t> tokens;
    Encoder(*this, text.size()).encode(text, tokens);
    return tokens;
}

// ---- Vocabulary files --------------------------------------------------------------------------
// merges.txt: a line "#version: 0.2", then a line "left right" for each merge. vocab.json: one
// object, "token": id. Tokens are written in GPT-2's visible characters. The vocabulary follows
// from the merges alone; a vocab.json that says otherwise is refused, for its model would see other
// tokens.

inline std::string Tokenizer::name_of(int id) const {
    if (id == end_of_text()) return std::string(kEndOfText);
    std::string name;
    for (char b : bytes_of(id)) append_utf8(name, kBytes.code_of_byte[uint8_t(b)]);
    return name;
}

inline std::string Tokenizer::merges_text() const {
    std::string text = "#version: 0.2\n";
    for (auto [left, right] : merges_) text += name_of(left) + ' ' + name_of(right) + '\n';
    return text;
}

// In plain ASCII, with the separators of Python's json: GPT-2's comes out as OpenAI wrote it.
inline std::string Tokenizer::vocab_json() const {
    std::string json = "{";
    for (int id = 0; id < vocab_size(); ++id) {
        json += id == 0 ? "\"" : ", \"";
        for (char c : bytes_of(id)) {
            unsigned code = kBytes.code_of_byte[uint8_t(c)];
            if (code == '"' || code == '\\') json += '\\';
            if (code < 128)
                json += char(code);
            else
                json += format("\\u%04x", code);
        }
        if (id == end_of_text()) json += kEndOfText;
        json += format("\": %d", id);
    }
    return json + "}";
}

inline void Tokenizer::save(const std::string& folder) const {
    make_folders(folder);
    write_file(folder + "/vocab.json", vocab_json());
    write_file(folder + "/merges.txt", merges_text());
}

// The most bytes that a vocabulary's file may have: GPT-2's have a million.
constexpr size_t kMaxVocabBytes = 16'000'000;

// The merges of a merges file. `ids` begins empty and ends with the id of every token but the last.
inline std::vector<Tokenizer::Merge> read_merges(const std::string& path,
                                                 std::unordered_map<std::string, uint16_t>& ids) {
    for (int b = 0; b < 256; ++b) {
        std::string name;
        append_utf8(name, kBytes.code_of_byte[b]);
        ids[name] = kBytes.id_of_byte[b];
    }
    std::vector<Tokenizer::Merge> merges;
    std::string text = read_file(path, kMaxVocabBytes);
    int line_number = 0;
    for (size_t at = 0; at < text.size();) {
        size_t end = std::min(text.find('\n', at), text.size()), blank = text.find(' ', at);
        std::string line = text.substr(at, end - at);
        at = end + 1;
        if (++line_number == 1 && line.starts_with("#version")) continue;
        auto where = [&] { return format("%s, line %d", path.c_str(), line_number); };
        TINYGPT_CHECK(blank < end,
                      "%s: expected two tokens with a blank between them, found \"%.40s\"",
                      where().c_str(), line.c_str());
        blank -= end - line.size();
        auto left = ids.find(line.substr(0, blank)), right = ids.find(line.substr(blank + 1));
        TINYGPT_CHECK(left != ids.end() && right != ids.end(),
                      "%s: \"%.40s\" is not two tokens that exist before it (bytes, or made by an "
                      "earlier line)",
                      where().c_str(), line.c_str());
        TINYGPT_CHECK(ids.size() < 65535, "%s: expected at most %d merges: token ids have 16 bits",
                      where().c_str(), 65535 - 256);
        merges.emplace_back(left->second, right->second);
        bool added = ids.emplace(left->first + right->first, uint16_t(ids.size())).second;
        TINYGPT_CHECK(added, "%s: \"%.40s\" makes a token that exists already", where().c_str(),
                      line.c_str());
    }
    return merges;
}

inline Tokenizer Tokenizer::load(const std::string& folder) {
    bool ours = file_exists(folder + "/vocab.json") && file_exists(folder + "/merges.txt");
    bool openai = file_exists(folder + "/encoder.json") && file_exists(folder + "/vocab.bpe");
    TINYGPT_CHECK(ours || openai,
                  "there is no tokenizer in %s: expected vocab.json and merges.txt, or "
                  "encoder.json and "
                  "vocab.bpe (make gpt2-vocab fetches GPT-2's into data/gpt2)",
                  folder.c_str());
    std::string vocab_path = folder + (ours ? "/vocab.json" : "/encoder.json");
    std::unordered_map<std::string, uint16_t> ids;
    Tokenizer tokenizer(read_merges(folder + (ours ? "/merges.txt" : "/vocab.bpe"), ids));
    ids.emplace(kEndOfText, uint16_t(tokenizer.end_of_text()));
    // The vocabulary must say what the merges say.
    const Json vocab = Json::parse(read_file(vocab_path, kMaxVocabBytes), vocab_path,
                                   {.depth = 2, .values = 70'000});
    TINYGPT_CHECK(vocab.is_object() && vocab.members.size() == ids.size(),
                  "%s: expected an object of %zu tokens (256 bytes, %zu merges, %s), found %zu",
                  vocab_path.c_str(), ids.size(), tokenizer.merges().size(), kEndOfText.data(),
                  vocab.members.size());
    for (const auto& [name, id] : vocab.members) {
        auto expected = ids.find(name);
        TINYGPT_CHECK(expected != ids.end(), "%s: no merge makes the token \"%.60s\"",
                      vocab_path.c_str(), name.c_str());
        TINYGPT_CHECK(id.integral && id.integer == expected->second,
                      "%s: the token \"%.60s\" must have the id %d, as its merge has, found %.20s",
                      vocab_path.c_str(), name.c_str(), expected->second, id.write().c_str());
    }
    return tokenizer;
}
// =================================================================================================
// §11 Hugging Face in, Hugging Face out: safetensors files and config.json
// =================================================================================================
// A safetensors file is
//
//     8 bytes        N, the length of the header, little-endian
//     N bytes        JSON, {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...},
//                    with or without a map of strings "__metadata__"; spaces at the end
//     the rest       the tensors' bytes, in C order, at those offsets: each byte belongs to one
//                    tensor, none is left over
//
// The reader checks all of that before it allocates anything of a size the file names: a damaged or
// hostile file is refused with one line.

// ---- The types of elements ------------------------------------------------------------------

// Bytes of an element; 0 for a type that is not of the format (or not of whole bytes).
inline size_t dtype_bytes(std::string_view dtype) {
    static constexpr std::string_view of_size[] = {"|BOOL|U8|I8|F8_E4M3|F8_E5M2|F8_E8M0|",
                                                   "|I16|U16|F16|BF16|", "|I32|U32|F32|",
                                                   "|I64|U64|F64|C64|"};
    const std::string wanted = format("|%.*s|", int(dtype.size()), dtype.data());
    if (dtype.find('|') != std::string_view::npos) return 0;
    for (size_t log = 0; log < 4; log++)
        if (of_size[log].find(wanted) != std::string_view::npos) return size_t(1) << log;
    return 0;
}

// IEEE half precision to float, exactly. One sign bit, five of exponent, ten of significand.
inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    if (rest < 0x400) {  // zero or subnormal: a multiple of 2^-24
        float value = float(rest) * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23);
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The first element whose exponent bits are all set (infinity, NaN), or count.
// Why two loops: the first has no exit, so it vectorises.
template <class Bits>
inline size_t first_with_exponent(const void* data, size_t count, Bits exponent) {
    const char* bytes = static_cast<const char*>(data);
    auto bad = [&](size_t i) {
        Bits bits;
        std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
        return (bits & exponent) == exponent;
    };
    Bits any = 0;
    for (size_t i = 0; i < count; i++) any |= Bits(bad(i));
    if (!any) return count;
    size_t i = 0;
    while (!bad(i)) i++;
    return i;
}
// The first element of this type that is NaN or infinite, or count.
inline size_t first_not_finite(const void* data, size_t count, std::string_view dtype) {
    if (dtype == "F64") return first_with_exponent<uint64_t>(data, count, 0x7ff0000000000000ull);
    if (dtype == "F32") return first_with_exponent<uint32_t>(data, count, 0x7f800000u);
    if (dtype == "BF16") return first_with_exponent<uint16_t>(data, count, uint16_t(0x7f80));
    if (dtype == "F16") return first_with_exponent<uint16_t>(data, count, uint16_t(0x7c00));
    return count;
}

// A shape for messages, never long.
inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size() && i < 8; i++)
        out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + (shape.size() > 8 ? ", ...]" : "]");
}

// ---- Reading --------------------------------------------------------------------------------

// A tensor as the header describes it; its bytes are [begin, end) of the file.
struct StoredTensor {
    std::string name, dtype;
    std::vector<int64_t> shape;
    uint64_t begin, end;
    size_t count() const { return size_t(end - begin) / dtype_bytes(dtype); }
};

class SafetensorsFile {
public:
    const std::string path;
    std::vector<StoredTensor> tensors;                          // in the order of their bytes
    std::vector<std::pair<std::string, std::string>> metadata;  // "__metadata__"

    // Opens the file and checks the whole header against the file's size.
    explicit SafetensorsFile(const std::string& path)
        : path(path), file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        struct stat info;
        if (file.fd < 0 || ::fstat(file.fd, &info) != 0) fail_file("read", path, errno);
        if (!S_ISREG(info.st_mode)) refuse("expected a file, found a folder, pipe or device");
        parse_header(read_header(uint64_t(info.st_size)), uint64_t(info.st_size));
    }

    // The tensor of that name, or null.
    const StoredTensor* find(std::string_view name) const {
        for (const StoredTensor& tensor : tensors)
            if (tensor.name == name) return &tensor;
        return nullptr;
    }

    // Sets out[tensor.count()] (real: float or double) from F64, F32, F16 or BF16. Straight into
    // place where the types are the same; otherwise through a buffer that stays in the cache.
    // Refuses NaN, infinities, and what is too large for `real`.
    template <class real>
    void read(const StoredTensor& tensor, real* out) const {
        const std::string& dtype = tensor.dtype;
        bool float_in = dtype == "F64" || dtype == "F32" || dtype == "F16" || dtype == "BF16";
        if (!float_in) refuse(tensor, "expected type F32, BF16, F16 or F64, found " + dtype);
        const int64_t count = int64_t(tensor.count()), step = 1 << 17;
        int error = 0;
        int64_t bad = count;
        // Why threads: half of the time goes into first touching the memory of `out`.
#pragma omp parallel for schedule(dynamic) reduction(min    \
                                                     : bad) \
    reduction(max                                           \
              : error) if (count > 4 * step)
        for (int64_t first = 0; first < count; first += step) {
            size_t some = size_t(std::min(step, count - first));
            int code = read_piece(tensor, out + first, size_t(first), some);
            error = std::max(error, code);
            size_t wrong = code ? some : first_not_finite(out + first, some, dtype_of<real>());
            if (wrong < some) bad = std::min(bad, first + int64_t(wrong));
        }
        if (error != 0) refuse_read(error);
        if (bad < count) {
            const char* what = std::isnan(out[bad]) ? "NaN" : "infinity";
            refuse(format("%s in tensor %s, element %lld: these weights are broken", what,
                          in_quotes(tensor.name).c_str(), static_cast<long long>(bad)));
        }
    }

    [[noreturn]] void refuse(const std::string& reason) const { fail(path + ": " + reason); }
    [[noreturn]] void refuse(const StoredTensor& tensor, const std::string& reason) const {
        refuse("tensor " + in_quotes(tensor.name) + ": " + reason);
    }

private:
    FileHandle file;
    static constexpr int end_of_file = 1 << 30;  // no errno is that large

    template <class real>
    static constexpr const char* dtype_of() {
        static_assert(std::is_same_v<real, float> || std::is_same_v<real, double>);
        return std::is_same_v<real, float> ? "F32" : "F64";
    }

    // Reads `bytes` at `offset`. Returns 0, an errno, or end_of_file.
    int read_at(void* out, size_t bytes, uint64_t offset) const {
        char* to = static_cast<char*>(out);
        while (bytes > 0) {
            ssize_t got = ::pread(file.fd, to, bytes, off_t(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return got < 0 ? errno : end_of_file;
            to += got, offset += uint64_t(got), bytes -= size_t(got);
        }
        return 0;
    }

    [[noreturn]] void refuse_read(int code) const {
        if (code == end_of_file) refuse("the file became shorter while it was read");
        fail_file("read", path, code);
    }

    // Elements [first, first + count) of a tensor, converted. Returns as read_at.
    template <class real>
    int read_piece(const StoredTensor& tensor, real* out, size_t first, size_t count) const {
        size_t size = dtype_bytes(tensor.dtype);
        uint64_t offset = tensor.begin + uint64_t(first) * size;
        if (tensor.dtype == dtype_of<real>()) return read_at(out, count * size, offset);
        char buffer[1 << 13];
        for (size_t done = 0; done < count;) {
            size_t some = std::min(count - done, sizeof buffer / size);
            if (int error = read_at(buffer, some * size, offset + done * size)) return error;
            convert(out + done, buffer, some, tensor.dtype);
            done += some;
        }
        return 0;
    }
    // out[i] = in[i], from the type of the file.
    template <class real>
    static void convert(real* out, const char* in, size_t count, const std::string& dtype) {
        auto each = [&](auto stored, auto meaning) {
            for (size_t i = 0; i < count; i++) {
                std::memcpy(&stored, in + i * sizeof stored, sizeof stored);
                out[i] = real(meaning(stored));
            }
        };
        if (dtype == "F64") each(double(), [](double x) { return x; });
        if (dtype == "F32") each(float(), [](float x) { return x; });
        if (dtype == "F16") each(uint16_t(), [](uint16_t x) { return half_to_float(x); });
        if (dtype == "BF16") each(bf16(), [](bf16 x) { return float(x); });
    }

    // Returns the JSON of the header, padding included. Every length is checked before it is used.
    std::string read_header(uint64_t file_bytes) const {
        uint8_t length[8];
        if (file_bytes < 8)
            refuse(format("a safetensors file has at least 10 bytes, found %d", int(file_bytes)));
        if (int code = read_at(length, 8, 0)) refuse_read(code);
        uint64_t N = 0;
        for (int i = 7; i >= 0; i--) N = N << 8 | length[i];
        auto number = [](uint64_t n) { return std::to_string(n); };
        if (N > 100'000'000)
            refuse("header of " + number(N) +
                   " bytes: the format allows 100000000; is this a "
                   "safetensors file?");
        if (N > file_bytes - 8)
            refuse("header of " + number(N) + " bytes in a file of " + number(file_bytes) +
                   ": cut short; fetch or copy it again");
        // Why: a header of GPT-2 has about 110 bytes a tensor; parsing 100 MB would take seconds.
        if (N > 4'000'000)
            refuse("header of " + number(N) + " bytes: a GPT-2 needs less than 4000000");
        std::string header(size_t(N), '\0');
        if (int code = read_at(header.data(), header.size(), 8)) refuse_read(code);
        if (header.empty() || header[0] != '{') refuse("the header must begin with '{'");
        size_t last = header.find_last_not_of(' ');
        if (header[last] != '}') refuse("the header must end with '}', then only spaces");
        return header;
    }

    // Sets tensors and metadata, with all the rules that concern the file as a whole.
    void parse_header(const std::string& header, uint64_t file_bytes) {
        const uint64_t data = 8 + header.size();
        // Why 40000 values: 300 layers need fewer, and a hostile header is refused in little time.
        Json json = Json::parse(header, path + ": header", {.depth = 8, .values = 40'000});
        for (auto& [name, value] : json.members) {
            if (name == "__metadata__")
                parse_metadata(value);
            else
                tensors.push_back(parse_tensor(name, value));
        }
        // Every byte of the data belongs to exactly one tensor.
        std::stable_sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) {
            return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
        });
        uint64_t at = 0;
        for (StoredTensor& tensor : tensors) {
            if (tensor.begin != at)
                refuse(tensor, "its bytes begin at " + std::to_string(tensor.begin) +
                                   ", the tensor before it ends at " + std::to_string(at) +
                                   (tensor.begin < at ? ": overlap" : ": hole"));
            at = tensor.end;
            tensor.begin += data, tensor.end += data;
        }
        if (data + at != file_bytes)
            refuse("the header describes " + std::to_string(data + at) + " bytes, the file has " +
                   std::to_string(file_bytes) + ": it is cut short or too long; fetch it again");
    }
    void parse_metadata(const Json& value) {
        if (!value.is_object()) refuse("__metadata__ must be an object");
        for (auto& [key, text] : value.members) {
            if (!text.is_string()) refuse("__metadata__ " + in_quotes(key) + " must be a string");
            metadata.emplace_back(key, text.text);
        }
    }
    // One member of the header; the offsets are still relative to the data.
    StoredTensor parse_tensor(const std::string& name, const Json& value) const {
        const std::string where = path + ": tensor " + in_quotes(name);
        if (!value.is_object()) fail(where + ": must be an object");
        for (auto& [key, part] : value.members)
            if (key != "dtype" && key != "shape" && key != "data_offsets")
                fail(where + ": unknown key " + in_quotes(key));
        StoredTensor tensor;
        tensor.name = name;
        tensor.dtype = value.get_string("dtype", where);
        uint64_t bytes = dtype_bytes(tensor.dtype);
        if (bytes == 0) fail(where + ": unknown dtype " + in_quotes(tensor.dtype));
        for (const Json& item : value.get("shape", Json::Kind::array, where).items)
            tensor.shape.push_back(parse_size(item, "shape", where));
        // Careful: a product that wraps around to a small number is the classic way in.
        for (int64_t n : tensor.shape)
            if (__builtin_mul_overflow(bytes, uint64_t(n), &bytes))
                fail(where + ": shape " + shape_text(tensor.shape) + " overflows 64 bits");
        auto& offsets = value.get("data_offsets", Json::Kind::array, where).items;
        if (offsets.size() != 2) fail(where + ": data_offsets must be two integers");
        tensor.begin = uint64_t(parse_size(offsets[0], "data_offsets", where));
        tensor.end = uint64_t(parse_size(offsets[1], "data_offsets", where));
        if (tensor.begin > tensor.end) fail(where + ": data_offsets end before they begin");
        if (tensor.end - tensor.begin != bytes)
            fail(where + ": shape " + shape_text(tensor.shape) + " of " + tensor.dtype + " takes " +
                 std::to_string(bytes) + " bytes, data_offsets say " +
                 std::to_string(tensor.end - tensor.begin));
        return tensor;
    }
    // Why 2^53: beyond it, readers that keep numbers as doubles would see another file.
    static int64_t parse_size(const Json& item, const char* key, const std::string& where) {
        if (!item.integral || item.integer < 0 || item.integer > (int64_t(1) << 53))
            fail(where + ": " + key + " must be integers from 0 to 2^53");
        return item.integer;
    }
};

// ---- Writing --------------------------------------------------------------------------------

// A tensor to be written. fill(out, first, count) sets out to elements [first, first + count), in
// the file's type: they may come from an array, or a piece at a time from a GPU.
struct TensorToWrite {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::function<void(char* out, size_t first, size_t count)> fill;
    size_t count() const {
        size_t product = 1;
        for (int64_t n : shape) product *= size_t(n);
        return product;
    }
};

// An array as a tensor of dtype "F32", "BF16" or "F64"; int64_t as "I64". It must stay alive.
template <class T>
TensorToWrite tensor_to_write(std::string name, std::vector<int64_t> shape, const T* data,
                              const std::string& dtype) {
    auto as = [&](auto type) {
        using Out = decltype(type);
        return [data](char* out, size_t first, size_t count) {
            for (size_t i = 0; i < count; i++) {
                Out value = Out(data[first + i]);
                std::memcpy(out + i * sizeof value, &value, sizeof value);
            }
        };
    };
    TensorToWrite tensor{std::move(name), dtype, std::move(shape), nullptr};
    if constexpr (std::is_floating_point_v<T>) {
        if (dtype == "F32") tensor.fill = as(float());
        if (dtype == "F64") tensor.fill = as(double());
        if (dtype == "BF16") tensor.fill = as(bf16());
    } else if (dtype == "I64") {
        tensor.fill = as(int64_t());
    }
    if (!tensor.fill) fail("cannot write tensor " + tensor.name + " as " + dtype);
    return tensor;
}

// The first 8 + N bytes of a file of these tensors, which lie in this order.
inline std::string safetensors_header(const std::vector<TensorToWrite>& tensors) {
    Json header = Json::object();
    header.set("__metadata__", Json::object().set("format", "pt"));
    size_t at = 0;
    for (const TensorToWrite& tensor : tensors) {
        Json shape = Json::array(), offsets = Json::array();
        for (int64_t n : tensor.shape) shape.items.push_back(n);
        offsets.items.push_back(at);
        offsets.items.push_back(at += tensor.count() * dtype_bytes(tensor.dtype));
        Json entry = Json::object();
        entry.set("dtype", tensor.dtype).set("shape", shape).set("data_offsets", offsets);
        header.members.emplace_back(tensor.name, std::move(entry));
    }
    std::string json = header.write();
    json.append((8 - json.size() % 8) % 8, ' ');  // the data begins at a multiple of 8
    std::string length(8, '\0');
    for (size_t i = 0; i < 8; i++) length[i] = char(uint8_t(uint64_t(json.size()) >> (8 * i)));
    return length + json;
}

// Writes the file, whole or not at all, and returns its Checksum. Order as the reference writer's:
// wide types first, then by name. NaN and infinities are refused: they must not reach a checkpoint.
inline std::string write_safetensors(const std::string& path, std::vector<TensorToWrite> tensors) {
    std::sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) {
        size_t wide_a = dtype_bytes(a.dtype), wide_b = dtype_bytes(b.dtype);
        return wide_a != wide_b ? wide_a > wide_b : a.name < b.name;
    });
    FileWriter file(path);
    Checksum checksum;
    auto write = [&](const char* data, size_t bytes) {
        checksum.add(data, bytes);
        file.write(data, bytes);
    };
    std::string header = safetensors_header(tensors);
    write(header.data(), header.size());
    std::vector<char> buffer(size_t(1) << 20);
    for (const TensorToWrite& tensor : tensors) {
        size_t size = dtype_bytes(tensor.dtype), count = tensor.count();
        size_t step = buffer.size() / size;
        for (size_t first = 0; first < count; first += step) {
            size_t some = std::min(step, count - first);
            tensor.fill(buffer.data(), first, some);
            bool good = first_not_finite(buffer.data(), some, tensor.dtype) == some;
            TINYGPT_CHECK(good, "%s: not written: NaN or infinity in tensor %s", path.c_str(),
                          in_quotes(tensor.name).c_str());
            write(buffer.data(), some * size);
        }
    }
    file.commit();
    return checksum.hex();
}

// ---- GPT-2's names --------------------------------------------------------------------------
// Hugging Face writes "transformer.h.0.ln_1.weight", OpenAI's own checkpoint has "h.0.ln_1.weight".
// Some files also hold the causal masks, which are constants, and the tied head once more.

// The name to write; the head stands outside of the transformer.
inline std::string name_in_checkpoint(const std::string& name) {
    return name == "lm_head.weight" ? name : "transformer." + name;
}
inline std::string_view without_prefix(std::string_view name) {
    constexpr std::string_view prefix = "transformer.";
    return name.substr(0, prefix.size()) == prefix ? name.substr(prefix.size()) : name;
}
// h.<number>.attn.bias and h.<number>.attn.masked_bias
inline bool is_mask_buffer(std::string_view name) {
    if (name.substr(0, 2) != "h.") return false;
    size_t end = std::min(name.find_first_not_of("0123456789", 2), name.size());
    std::string_view rest = name.substr(end);
    return end > 2 && (rest == ".attn.bias" || rest == ".attn.masked_bias");
}

// Finds every tensor of the list in the file; result[i] belongs to expected[i]. A missing, extra or
// misshapen tensor is an error that names it and says what was expected.
inline std::vector<const StoredTensor*> match_tensors(const SafetensorsFile& file,
                                                      const std::vector<TensorInfo>& expected) {
    // Names on both sides are compared without the prefix.
    std::map<std::string_view, size_t> index;
    for (size_t i = 0; i < expected.size(); i++) index[without_prefix(expected[i].name)] = i;
    std::vector<const StoredTensor*> found(expected.size(), nullptr);
    auto wte = index.find("wte.weight");
    for (const StoredTensor& tensor : file.tensors) {
        std::string_view name = without_prefix(tensor.name);
        auto entry = index.find(name);
        bool spare_head = name == "lm_head.weight" && entry == index.end() && wte != index.end();
        if (spare_head) entry = wte;  // tied: it is wte once more, so its shape must be the same
        if (entry == index.end()) {
            if (is_mask_buffer(name)) continue;
            file.refuse(tensor, "unexpected: the model of config.json has no such tensor");
        }
        const std::vector<int64_t>& shape = expected[entry->second].shape;
        if (tensor.shape != shape)
            file.refuse(tensor, "expected shape " + shape_text(shape) + ", found " +
                                    shape_text(tensor.shape));
        if (spare_head) continue;
        const StoredTensor*& place = found[entry->second];
        if (place) file.refuse(tensor, "there twice, with and without \"transformer.\"");
        place = &tensor;
    }
    for (size_t i = 0; i < expected.size(); i++)
        if (!found[i])
            file.refuse("tensor " + in_quotes(expected[i].name) + " is missing: expected shape " +
                        shape_text(expected[i].shape));
    return found;
}

// The weights of a Hugging Face folder. Other forms of them get an answer that helps.
inline std::string find_weights(const std::string& folder) {
    if (!folder_exists(folder)) fail(folder + ": there is no such folder");
    std::string path = folder + "/model.safetensors";
    if (file_exists(path)) return path;
    for (const char* other : {"model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5"})
        if (file_exists(folder + "/" + other))
            fail(folder + ": expected model.safetensors, found " + other +
                 "; save the model again with transformers: save_pretrained(folder, "
                 "max_shard_size=\"100GB\")");
    fail(folder + ": expected model.safetensors, found no such file");
}

// ---- config.json ----------------------------------------------------------------------------

struct HfConfig {
    Config model;
    int64_t end_of_text = -1;  // eos_token_id; -1 where there is none
};

// Reads GPT-2's config.json. What this model does not do is refused by name; what makes no
// difference to the numbers (initializer_range, summary_*, use_cache, ...) is passed over, dropout
// too: it is the run's choice. Missing switches have Hugging Face's defaults.
inline HfConfig read_hf_config(const std::string& path) {
    Json json = Json::parse(read_file(path, 1'000'000), path, {.depth = 64, .values = 100'000});
    if (!json.is_object()) fail(path + ": must be a JSON object");
    // The member is missing or has one of these values.
    auto only = [&](const char* key, const std::vector<Json>& allowed, const char* why) {
        const Json* value = json.find(key);
        if (!value) return;
        for (const Json& good : allowed)
            if (value->write() == good.write()) return;
        fail(path + ": \"" + key + "\" is " + value->write().substr(0, 60) + ": " + why);
    };
    auto size = [&](const char* key, int64_t highest) {
        return int(json.get_int(key, path, 1, highest));
    };
    only("model_type", {"gpt2"}, "only \"gpt2\" is supported");
    Config model;
    model.n_layer = size("n_layer", 300);
    model.n_head = size("n_head", 1'000'000);
    model.n_embd = size("n_embd", 1'000'000);
    model.n_positions = size("n_positions", 100'000'000);
    model.vocab_size = size("vocab_size", 65536);  // tokens have 16 bits in the shards
    if (model.n_embd % model.n_head != 0)
        fail(format("%s: \"n_head\" %d does not divide \"n_embd\" %d", path.c_str(), model.n_head,
                    model.n_embd));
    int64_t inner = 4 * int64_t(model.n_embd);
    only("n_inner", {nullptr, inner}, "only null or 4 n_embd is supported");
    only("n_ctx", {int64_t(model.n_positions)}, "it must equal n_positions");
    only("activation_function", {"gelu_new", "gelu_pytorch_tanh"},
         "only the tanh GELU (\"gelu_new\") is supported");
    only("layer_norm_epsilon", {1e-5}, "only 1e-5 is supported");
    only("scale_attn_weights", {true}, "only true is supported");
    only("scale_attn_by_inverse_layer_idx", {false}, "only false is supported");
    only("reorder_and_upcast_attn", {false}, "only false is supported");
    only("add_cross_attention", {false}, "only false is supported");
    only("is_encoder_decoder", {false}, "only false is supported");
    only("quantization_config", {nullptr}, "quantised weights are not supported");
    only("pruned_heads", {nullptr, Json::object()}, "pruned heads are not supported");
    only("tie_word_embeddings", {true, false}, "must be true or false");
    const Json *tied = json.find("tie_word_embeddings"), *end = json.find("eos_token_id");
    model.untied_head = tied && !tied->boolean;
    if (end && end->is_array() && !end->items.empty()) end = &end->items[0];
    HfConfig config{model, -1};
    if (end && !end->is_null()) {
        if (!end->integral) fail(path + ": \"eos_token_id\" must be null or an integer");
        // Small models often keep GPT-2's 50256, which they have not: then no token ends a text.
        bool exists = end->integer >= 0 && end->integer < model.vocab_size;
        config.end_of_text = exists ? end->integer : -1;
    }
    return config;
}

// The same file from this side, all of it for `transformers`: dtype is "float32" or "bfloat16",
// end_of_text is -1 where there is none.
inline std::string hf_config_text(const Config& model, int64_t end_of_text,
                                  const std::string& dtype) {
    Json json = Json::object(), end = end_of_text < 0 ? Json() : Json(end_of_text);
    Json architectures = Json::array();
    architectures.items.push_back("GPT2LMHeadModel");
    json.set("model_type", "gpt2").set("architectures", architectures);
    json.set("vocab_size", model.vocab_size).set("n_positions", model.n_positions);
    json.set("n_ctx", model.n_positions).set("n_embd", model.n_embd);
    json.set("n_layer", model.n_layer).set("n_head", model.n_head).set("n_inner", nullptr);
    json.set("activation_function", "gelu_new").set("layer_norm_epsilon", 1e-5);
    json.set("initializer_range", 0.02).set("scale_attn_weights", true);
    for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"})
        json.set(key, std::stod(format("%.6g", double(model.dropout))));
    json.set("tie_word_embeddings", !model.untied_head);
    json.set("bos_token_id", end).set("eos_token_id", end).set("torch_dtype", dtype);
    return json.write(2) + "\n";
}

// ---- Checkpoints: a Hugging Face folder, and beside it what resuming needs -------------------
//
//   checkpoint-<step>/  model.safetensors  config.json  generation_config.json
//                       vocab.json  merges.txt  tokenizer_config.json  (if there is a tokenizer)
//                       optimizer.safetensors    AdamW's moments, "m." and "v." + the tensor's name
//                       trainer_state.json       everything else, the checksum of every other file,
//                                                and in its last line its own
//
// It is written under a temporary name, synced, and renamed: it is there whole or not at all. The
// state is written last, so a folder with a state that verifies is complete.

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
    StepState guards;                                          // counts and windows of §7
    std::string program;                                       // train_gpt or train_gpt_cu
    std::vector<std::pair<std::string, std::string>> options;  // those that change the numbers
    std::vector<std::string> data;                             // the shards, to be recognised by
};

// The whole numbers of a state and their least values, once for writing and reading.
template <class State, class Visit>
void for_each_count(State& s, Visit&& visit) {
    visit("planned_steps", s.planned_steps, 0), visit("step", s.step, 0);
    visit("samples", s.samples, 0), visit("best_step", s.best_step, -1);
    visit("stale_evals", s.stale_evals, 0), visit("epoch_steps", s.epoch_steps, 0);
    visit("updates", s.guards.updates, 0), visit("skipped", s.guards.skipped, 0);
    visit("outliers", s.guards.outliers, 0), visit("seen", s.guards.seen, 0);
}
// Likewise the others. JSON has no NaN and no infinity: those are left as a fresh state has them.
template <class State, class Visit>
void for_each_real(State& s, Visit&& visit) {
    visit("seconds", s.seconds), visit("best_loss", s.best_loss);
    visit("epoch_loss", s.epoch_loss), visit("val_loss", s.val_loss);
    visit("train_loss", s.train_loss);
}
inline double number_or(const Json& json, const char* key, double otherwise) {
    const Json* value = json.find(key);
    return value && value->kind == Json::Kind::number ? value->number : otherwise;
}

inline Json state_to_json(const TrainerState& s) {
    Json json = Json::object(), options = Json::object(), data = Json::array();
    for_each_count(s, [&](const char* name, int64_t value, int64_t) { json.set(name, value); });
    for_each_real(s, [&](const char* name, double value) {
        json.set(name, std::isfinite(value) ? Json(value) : Json());
    });
    json.set("finished", s.finished).set("program", s.program);
    for (auto [name, values] : {std::pair{"losses", s.guards.losses}, {"norms", s.guards.norms}}) {
        Json list = Json::array();
        for (int i = 0; i < StepState::kWindow; ++i) list.items.push_back(values[i]);
        json.set(name, list);
    }
    for (auto& [name, value] : s.options) options.members.emplace_back(name, value);
    for (const std::string& shard : s.data) data.items.push_back(shard);
    return json.set("options", options).set("data", data);
}

// Reads the same back; `where` is the file's name, for messages.
inline TrainerState state_from_json(const Json& json, const std::string& where) {
    TrainerState s;
    for_each_count(s, [&](const char* name, int64_t& value, int64_t lowest) {
        value = json.get_int(name, where, lowest);
    });
    for_each_real(s,
                  [&](const char* name, double& value) { value = number_or(json, name, value); });
    s.finished = json.get_bool("finished", where), s.program = json.get_string("program", where);
    for (auto [name, values] : {std::pair{"losses", s.guards.losses}, {"norms", s.guards.norms}}) {
        const Json& list = json.get(name, Json::Kind::array, where);
        TINYGPT_CHECK(list.items.size() == size_t(StepState::kWindow),
                      "%s: \"%s\" must have %d numbers", where.c_str(), name, StepState::kWindow);
        for (int i = 0; i < StepState::kWindow; ++i) values[i] = list.items[size_t(i)].number;
    }
    for (auto& [name, value] : json.get("options", Json::Kind::object, where).members)
        s.options.emplace_back(name, value.text);
    for (const Json& shard : json.get("data", Json::Kind::array, where).items)
        s.data.push_back(shard.text);
    return s;
}

// The state's last line: the checksum of every byte before it.
inline std::string state_seal(std::string_view body) {
    Checksum sum;
    sum.add(body.data(), body.size());
    return ",\n  \"own_checksum\": \"" + sum.hex() + "\"\n}\n";
}
inline void write_sealed(const std::string& path, const Json& json) {
    std::string body = json.write(2);
    body.resize(body.size() - 2);  // the closing "\n}" is part of the seal
    write_file(path, body + state_seal(body));
}
inline Json read_sealed(const std::string& path) {
    const std::string text = read_file(path, size_t(1) << 28);
    const size_t end = text.size() - std::min(text.size(), state_seal("").size());
    TINYGPT_CHECK(text.substr(end) == state_seal(text.substr(0, end)),
                  "%s is damaged: its checksum does not match", path.c_str());
    return Json::parse(text, path);
}

// The flat array `from` on the device, as the tensors of the list, their names prefixed.
template <class Device, class Real>
std::vector<TensorToWrite> tensors_to_write(Gpt2<Device>& model, const Real* from,
                                            const std::string& prefix, const std::string& dtype) {
    std::vector<TensorToWrite> list;
    for (const TensorInfo& info : model.layout.tensors) {
        const Real* tensor = from + info.offset;
        auto fill = [&model, tensor, dtype](char* out, size_t first, size_t count) {
            std::vector<Real> host(count);
            model.device.download(host.data(), tensor + first, count);
            tensor_to_write("", {int64_t(count)}, host.data(), dtype).fill(out, 0, count);
        };
        list.push_back({prefix + name_in_checkpoint(info.name), dtype, info.shape, fill});
    }
    return list;
}

// config.json, generation_config.json and the tokenizer's files: what tells others how to use it.
inline void write_model_description(const std::string& folder, const Config& config,
                                    const Tokenizer* tokenizer, const std::string& dtype) {
    const int64_t end = tokenizer ? tokenizer->end_of_text() : -1;
    write_file(folder + "/config.json", hf_config_text(config, end, dtype));
    Json generation = Json::object();
    generation.set("_from_model_config", true);
    if (end >= 0) generation.set("bos_token_id", end).set("eos_token_id", end);
    write_file(folder + "/generation_config.json", generation.write(2) + "\n");
    if (!tokenizer) return;
    tokenizer->save(folder);
    Json about = Json::object();
    about.set("model_max_length", config.n_positions).set("tokenizer_class", "GPT2Tokenizer");
    for (const char* role : {"bos_token", "eos_token", "unk_token"})
        about.set(role, "<|endoftext|>");
    write_file(folder + "/tokenizer_config.json", about.write(2) + "\n");
}

// Gives a folder its name. Where one of that name is there already, the two change places in one
// step (Linux), and the old one is removed.
inline void replace_folder(const std::string& temporary, const std::string& folder) {
    if (!folder_exists(folder)) return rename_path(temporary, folder);
    const bool exchanged =
        file_call("exchange", folder) &&
        ::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0;
    if (exchanged) {
        sync_folder(parent_folder(folder));
        return remove_folder(temporary);
    }
    if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP)
        fail_file("rename " + temporary + " to", folder, errno);
    // A file system that cannot: between the two renames only the .old name exists. Should we be
    // killed there, recover_folders gives it its name back.
    const std::string old = folder + ".old";
    if (folder_exists(old)) remove_folder(old);
    rename_path(folder, old);
    try {
        rename_path(temporary, folder);
    } catch (const FileError&) {
        if (!folder_exists(folder)) sys_rename(old, folder);
        throw;
    }
    remove_folder(old);
}

// All files of a checkpoint, the state last. Their names are then on the disk, in `folder`.
template <class Device>
void write_checkpoint_files(Gpt2<Device>& model, const std::string& folder,
                            const Tokenizer* tokenizer, const TrainerState& state,
                            bool with_moments) {
    Json sums = Json::object();
    auto write = [&](const std::string& name, const std::vector<TensorToWrite>& tensors) {
        sums.set(name, write_safetensors(folder + "/" + name, tensors));
    };
    write("model.safetensors", tensors_to_write(model, model.masters, "", "F32"));
    if (with_moments) {
        auto moments = tensors_to_write(model, model.m, "m.", "F32");
        const auto second = tensors_to_write(model, model.v, "v.", "F32");
        moments.insert(moments.end(), second.begin(), second.end());
        write("optimizer.safetensors", moments);
    }
    write_model_description(folder, model.config, tokenizer, "float32");
    for (const std::string& name : list_folder(folder))
        if (!sums.find(name)) sums.set(name, file_digest<Checksum>(folder + "/" + name));
    write_sealed(folder + "/trainer_state.json", state_to_json(state).set("checksums", sums));
}

// Writes the checkpoint `folder`, whole or not at all; the folder it is in must exist. Without
// moments it can be opened and sampled but not resumed.
template <class Device>
void save_checkpoint(Gpt2<Device>& model, const std::string& folder, const Tokenizer* tokenizer,
                     const TrainerState& state, bool with_moments) {
    const std::string temporary = folder + ".tmp";
    if (folder_exists(temporary)) remove_folder(temporary);
    if (sys_mkdir(temporary) != 0) fail_file("create folder", temporary, errno);
    try {
        write_checkpoint_files(model, temporary, tokenizer, state, with_moments);
    } catch (...) {
        // Gives the room back. Best effort: the error that matters is the first one.
        try {
            remove_folder(temporary);
        } catch (const Error&) {}
        throw;
    }
    replace_folder(temporary, folder);
}

// Every file that the state names has the checksum that was written down; the moments may be
// missing where they are not needed.
inline void check_sums(const std::string& folder, const Json& state, bool need_moments) {
    for (auto& [name, sum] : state.get("checksums", Json::Kind::object, folder).members) {
        const std::string path = folder + "/" + name;
        TINYGPT_CHECK(name.find('/') == std::string::npos, "%s: its state names a file outside, %s",
                      folder.c_str(), in_quotes(name).c_str());
        if (!need_moments && name == "optimizer.safetensors") continue;
        TINYGPT_CHECK(file_exists(path), "%s is missing", path.c_str());
        TINYGPT_CHECK(file_digest<Checksum>(path) == sum.text,
                      "%s is damaged, or was changed: its checksum does not match", path.c_str());
    }
}

// Verifies a checkpoint that is to be resumed, every byte of it, and reads its state.
inline TrainerState verify_checkpoint(const std::string& folder) {
    const std::string path = folder + "/trainer_state.json";
    TINYGPT_CHECK(file_exists(path),
                  "%s is no checkpoint to resume: it has no trainer_state.json (--init-from starts "
                  "a "
                  "new run from any Hugging Face folder)",
                  folder.c_str());
    const Json json = read_sealed(path);
    check_sums(folder, json, true);
    TINYGPT_CHECK(json.get("checksums", Json::Kind::object, path).find("optimizer.safetensors"),
                  "%s has no moments of AdamW: it can be used with --init-from, but not resumed",
                  folder.c_str());
    return state_from_json(json, path);
}

// Verifies a model that is to be used. A folder that others made has no checksums to verify.
// Careful: Hugging Face's own trainer also writes a trainer_state.json, with a "log_history".
inline void verify_model(const std::string& folder) {
    const std::string path = folder + "/trainer_state.json";
    if (!file_exists(path)) return;
    if (read_file(path).find("\"log_history\"") != std::string::npos) return;
    check_sums(folder, read_sealed(path), false);
}

// The model that a Hugging Face folder describes; dropout is the run's choice.
inline Config config_of_folder(const std::string& folder) {
    if (!folder_exists(folder)) fail(folder + ": there is no such folder");
    verify_model(folder);
    const Config config = read_hf_config(folder + "/config.json").model;
    // Careful: the options' bounds. Token ids have 16 bits; products of sizes must stay below 2^63.
    TINYGPT_CHECK(
        config.vocab_size <= 65536 && config.n_embd <= 65536 && config.n_positions <= 1 << 20,
        "%s/config.json: expected vocab_size and n_embd up to 65536 and n_positions up to "
        "1048576, found %d, %d and %d",
        folder.c_str(), config.vocab_size, config.n_embd, config.n_positions);
    // Why here: before memory is taken for tensors that a damaged folder only claims to have.
    match_tensors(SafetensorsFile(find_weights(folder)), layout_of(config).tensors);
    return config;
}

// Sets a flat array on the device from a file with exactly the tensors of the list.
template <class Device, class Real>
void load_tensors(Gpt2<Device>& model, Real* to, const SafetensorsFile& file,
                  const std::vector<const StoredTensor*>& stored) {
    std::vector<Real> host;
    for (size_t i = 0; i < stored.size(); ++i) {
        const TensorInfo& info = model.layout.tensors[i];
        if constexpr (Device::kHostMemory) {
            file.read(*stored[i], to + info.offset);  // straight into place
        } else {
            host.resize(info.count);
            file.read(*stored[i], host.data());
            model.device.upload(to + info.offset, host.data(), info.count);
        }
    }
}

// Sets the weights from folder/model.safetensors.
template <class Device>
void load_weights(Gpt2<Device>& model, const std::string& folder) {
    const SafetensorsFile file(find_weights(folder));
    load_tensors(model, model.masters, file, match_tensors(file, model.layout.tensors));
    model.device.weights_from_masters(model.weights, model.masters, model.layout.size);
}

// Sets the moments from folder/optimizer.safetensors.
template <class Device>
void load_moments(Gpt2<Device>& model, const std::string& folder) {
    const SafetensorsFile file(folder + "/optimizer.safetensors");
    using Part = std::pair<const char*, typename Device::Real*>;
    const Part parts[] = {{"m.", model.m}, {"v.", model.v}};
    for (const auto& [prefix, to] : parts) {
        std::vector<const StoredTensor*> stored;
        for (const TensorInfo& info : model.layout.tensors) {
            const StoredTensor* tensor = file.find(prefix + name_in_checkpoint(info.name));
            if (!tensor || tensor->shape != info.shape)
                file.refuse("no moments of " + info.name + " in the model's shape");
            stored.push_back(tensor);
        }
        load_tensors(model, to, file, stored);
    }
}

// ---- The checkpoints of a run ----------------------------------------------------------------

inline std::string checkpoint_folder(const std::string& output, int64_t step) {
    return output + "/checkpoint-" + std::to_string(step);
}
// The step of a checkpoint's name, "checkpoint-500"; -1 for any other name.
inline int64_t step_of_name(const std::string& name) {
    const std::string prefix = "checkpoint-";
    int64_t step = -1;
    if (!name.starts_with(prefix)) return -1;
    std::from_chars(name.data() + prefix.size(), name.data() + name.size(), step);
    return step >= 0 && name == prefix + std::to_string(step) ? step : -1;
}

// The steps of the checkpoints in a run's folder, newest first. Unfinished ones do not count.
inline std::vector<int64_t> checkpoint_steps(const std::string& output) {
    std::vector<int64_t> steps;
    if (!folder_exists(output)) return steps;
    for (const std::string& name : list_folder(output))
        if (step_of_name(name) >= 0 && folder_exists(output + "/" + name))
            steps.push_back(step_of_name(name));
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

// Removes all but the newest `keep` checkpoints.
inline void remove_old_checkpoints(const std::string& output, int keep) {
    const std::vector<int64_t> steps = checkpoint_steps(output);
    for (size_t i = size_t(keep); i < steps.size(); ++i) {
        // Renamed first, so that a half-removed checkpoint is never taken for a damaged one.
        const std::string gone = checkpoint_folder(output, steps[i]) + ".tmp";
        if (folder_exists(gone)) remove_folder(gone);
        rename_path(checkpoint_folder(output, steps[i]), gone);
        remove_folder(gone);
    }
}

// Tidies a run's folder after a kill: what a save left half done goes, and a checkpoint that was
// about to be replaced gets its name back. Touches nothing but names that this program gives.
inline void recover_folders(const std::string& output) {
    for (const std::string& name : list_folder(output)) {
        const std::string path = output + "/" + name;
        if (name.starts_with("log.csv.tmp-") && file_exists(path)) remove_file(path);
        if (name.size() < 5 || !folder_exists(path)) continue;
        const std::string stem = name.substr(0, name.size() - 4);
        if (stem != "best" && step_of_name(stem) < 0) continue;
        if (name.ends_with(".old") && !folder_exists(output + "/" + stem))
            rename_path(path, output + "/" + stem);
        else if (name.ends_with(".old") || name.ends_with(".tmp"))
            remove_folder(path);
    }
}

// A run that goes on from `step` makes the later steps again. What another run left of those
// (checkpoints that are damaged, or from before the user went back) is set aside, or it would count
// as the newest. A run that starts (step -1) sets aside all, best/ too. Returns the names.
inline std::vector<std::string> set_aside_later(const std::string& output, int64_t step) {
    std::vector<std::string> names;
    for (int64_t later : checkpoint_steps(output))
        if (later > step) names.push_back("checkpoint-" + std::to_string(later));
    if (step < 0 && folder_exists(output + "/best")) names.push_back("best");
    for (const std::string& name : names) {
        const std::string aside = output + "/" + name + ".set-aside";
        if (folder_exists(aside)) remove_folder(aside);
        rename_path(output + "/" + name, aside);
    }
    return names;
}

// =================================================================================================
// §15 Options: what the user may ask for, each said once
// =================================================================================================
//
// The reader now holds all that trains, and the files it reads and writes. What is left is the
// program around it, and first what its user can say. An option is a member of struct Options,
// which gives its type and its default, and a row of one table, which gives its name, its range and
// its meaning. All else is made from that row: reading the command line and config files, --help,
// the echo at the start of a run, and what a checkpoint remembers of its run. So a new option is a
// member and a row.
//
// What happens to --batch-size 4:
//
//   split_arguments   finds the row "batch-size" and pairs it with the text "4": an Assignment
//   assign            reads 4, sees that it is in [1, 1000000], and sets options.batch_size
//   check_together    looks at it beside the others: batch and length must fit into an int
//
// Whatever is wrong ends in fail_usage, exit status 2, before anything is printed or written.

// ---- What the user asked for --------------------------------------------------------------------

// One bit each, so that a set of commands is a sum of them.
enum Command : unsigned { kTrain = 1, kEval = 2, kSample = 4, kInfo = 8, kBench = 16, kWalk = 32 };

// A member for every option, in the table's order of groups. A default outside the option's own
// range (0 where the least is 1) or an empty text means "not set": its help says what then happens.
struct Options {
    Command command = kTrain;
    bool command_given = false;       // the command was written out
    std::set<std::string> set_names;  // the options that the user set, by their names in the table

    // What it learns from.
    std::string data = "data/stories", train_shards, val_shards;

    // What learns. Sizes that are 0 are the named model's.
    std::string model = "tiny", init_from;
    int n_layer = 0, n_head = 0, n_embd = 0, n_positions = 0, vocab_size = 0;
    double dropout = 0;
    bool untied_head = false;

    // Where, and on what.
    std::string config, resume, output, precision;
    bool override_changes = false, tune_matmul = false, help = false;
    int64_t seed = 1337;
    int threads = 0;

    // What one update sees.
    int batch_size = 8, seq_len = 0, grad_accum_steps = 1;
    bool shuffle = true, overfit_batch = false;

    // What is set here ends the run, whichever comes first. The default of max_steps counts only
    // where neither of the other two is set; otherwise parse_options makes it 0, no limit.
    int64_t max_steps = 2500;
    double epochs = 0, max_minutes = 0;

    // How far it goes (§7).
    double learning_rate = 3e-3, min_lr_fraction = 0.1;
    Schedule schedule = Schedule::cosine;
    int64_t warmup_steps = 50;
    double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, grad_clip = 1;

    // What is looked at on the way, and how often: in steps, 0 is never.
    int64_t log_interval = 50, eval_interval = 250, eval_batches = 10, sample_interval = 500;
    int64_t tensor_stats_interval = 0, patience = 0, save_interval = 500;
    int keep = 2;

    // When something goes wrong.
    std::string on_nan = "stop";
    double skip_outliers = 0;

    // What is written with the model.
    std::string prompt, prompt_file;
    int max_new_tokens = 100, num_samples = 1, top_k = 0, show_top = 0;
    double temperature = 1, top_p = 1;

    std::string hellaswag;  // what it is examined on

    // Whether the user set this option. The name as in the table: "batch-size".
    bool given(const std::string& name) const { return set_names.count(name) != 0; }
};

// ---- The table ----------------------------------------------------------------------------------

// "a|b" -> "a", "b". There is always at least one part, if an empty one.
inline std::vector<std::string> split_at(std::string_view text, char separator) {
    std::vector<std::string> parts;
    for (size_t end; (end = text.find(separator)) != text.npos; text.remove_prefix(end + 1))
        parts.emplace_back(text.substr(0, end));
    parts.emplace_back(text);
    return parts;
}

// "a", "b" -> "a, b", one item at a time.
inline void join(std::string& list, const char* separator, const std::string& item) {
    list += (list.empty() ? "" : separator) + item;
}

// Which values an option takes, as help shows them. "[1, 1000]" or "(0, 1]" is a number between two
// bounds, a round bracket leaving its bound out; "0|1" is a switch; "stop|skip" is one of these
// words; capitals ("DIR") stand for any text.
struct Range {
    std::string text;
    double low = 0, high = 0;  // of a number

    Range(const char* text) : text(text) { std::sscanf(text, "%*c%lf, %lf", &low, &high); }
    bool is_number() const { return text[0] == '[' || text[0] == '('; }
    bool is_switch() const { return text == "0|1"; }
    bool is_choice() const { return std::islower(text[0]); }
    bool is_text() const { return std::isupper(text[0]); }
    std::vector<std::string> words() const { return split_at(text, '|'); }
    bool contains(double x) const {
        return (text[0] == '(' ? x > low : x >= low) && (text.back() == ')' ? x < high : x <= high);
    }
};

// One row of the table. `int Options::*` is "an int in Options, I say which": options.*member is
// that member of one Options, as getattr(options, name) in Python. A variant holds a value of one
// of the types listed; std::visit hands it, with its type, to a function.
struct Option {
    std::string name;  // as the user types it
    std::variant<bool Options::*, int Options::*, int64_t Options::*, double Options::*,
                 std::string Options::*, Schedule Options::*>
        member;
    std::string group;  // its heading in help and echo
    unsigned commands;  // those that take it, and kNumbers where it changes the numbers
    Range range;
    std::string help;  // what it means
};

inline std::string preset_names() {
    std::string names;
    for (const Preset& preset : presets()) join(names, "|", preset.name);
    return names;
}

// The table: name, member, group, commands, range, help.
// Careful: an upper bound is there to keep a product of sizes inside 64 bits, and those of eps and
// dropout keep them inside what a float can tell from 0 and 1.
struct OptionTable {
    using O = Options;
    // kNumbers stands beside the commands of an option that changes the numbers a run computes. A
    // run that is resumed must have the same value, so checkpoints remember it (kRun: a training
    // run's). kBuild: commands that make a model of the sizes asked for; kBatch: that run batches.
    static constexpr unsigned kAll = 63, kNumbers = 64, kRun = kTrain | kNumbers;
    static constexpr unsigned kBuild = kRun | kInfo | kBench, kBatch = kBuild | kEval;
    static inline const std::vector<Option> rows = {
        {"data", &O::data, "data", kRun | kEval | kInfo, "DIR",
         "shards and tokenizer, as ./prepare_data writes them"},
        {"train-shards", &O::train_shards, "data", kRun | kEval, "GLOB",
         "training shards, instead of --data; text is shown as token numbers"},
        {"val-shards", &O::val_shards, "data", kRun | kEval, "GLOB",
         "validation shards, beside --train-shards"},

        {"model", &O::model, "model", kBuild, preset_names().c_str(), "sizes of the model"},
        {"n-layer", &O::n_layer, "model", kBuild, "[1, 1000]", "layers, not the model's own"},
        {"n-head", &O::n_head, "model", kBuild, "[1, 1000]", "heads, likewise"},
        {"n-embd", &O::n_embd, "model", kBuild, "[1, 65536]", "channels, likewise"},
        {"n-positions", &O::n_positions, "model", kBuild, "[1, 1048576]",
         "the longest text it can see, in tokens, likewise"},
        {"vocab-size", &O::vocab_size, "model", kBuild, "[2, 65536]",
         "tokens in the vocabulary, where there is no tokenizer to say"},
        {"dropout", &O::dropout, "model", kBuild, "[0, 0.999]", "share dropped in training"},
        {"untied-head", &O::untied_head, "model", kBuild, "0|1",
         "the head has weights of its own, not the embedding's"},
        {"init-from", &O::init_from, "model", kRun | kEval | kSample | kInfo, "DIR",
         "start from this Hugging Face folder or checkpoint"},

        {"config", &O::config, "run", kAll, "FILE",
         "read lines `name = value` (# begins a comment); the command line comes before them"},
        {"resume", &O::resume, "run", kTrain, "DIR|auto",
         "go on from a checkpoint; auto: from the newest good one in --output, if any"},
        {"override", &O::override_changes, "run", kTrain, "0|1",
         "resume although options that change the numbers have changed"},
        {"output", &O::output, "run", kTrain, "DIR",
         "the run's folder; not set: out/ and a name made from the data folder's"},
        {"seed", &O::seed, "run", kRun | kEval | kSample | kBench, "[0, 1e+18]",
         "of all randomness"},
        {"threads", &O::threads, "run", kAll, "[0, 1024]", "0: all cores"},
        {"precision", &O::precision, "run", kBatch | kSample, "fp32|bf16|tf32",
         "not set: the best for this machine"},
        {"tune-matmul", &O::tune_matmul, "run", kRun | kBench, "0|1",
         "on a GPU: time matmul kernels once, keep the fastest in data/matmul-plans.txt"},
        {"help", &O::help, "run", kAll, "0|1",
         "this page; after a command, what that command takes"},

        {"batch-size", &O::batch_size, "batch", kBatch, "[1, 1000000]", "texts read at once"},
        {"seq-len", &O::seq_len, "batch", kBatch, "[1, 1048576]",
         "tokens in each; not set: 128, or --n-positions where that is less"},
        {"grad-accum-steps", &O::grad_accum_steps, "batch", kRun, "[1, 1000000]",
         "batches whose gradients make one update"},
        {"shuffle", &O::shuffle, "batch", kRun, "0|1", "a new order in every epoch"},
        {"overfit-batch", &O::overfit_batch, "batch", kRun, "0|1", "only ever the first batch"},

        {"max-steps", &O::max_steps, "length", kRun, "[1, 1e+12]",
         "updates; the default counts only where neither of the next two is set"},
        {"epochs", &O::epochs, "length", kRun, "(0, 1000000000]",
         "times through the training text"},
        {"max-minutes", &O::max_minutes, "length", kRun, "(0, 1000000000]",
         "of all that are set, what comes first ends the run"},

        {"learning-rate", &O::learning_rate, "optimizer", kRun, "[0, 100]", "at its highest"},
        {"min-lr-fraction", &O::min_lr_fraction, "optimizer", kRun, "[0, 1]",
         "of --learning-rate, left at the end"},
        {"schedule", &O::schedule, "optimizer", kRun, "cosine|linear|constant|wsd",
         "how the rate falls after warm-up"},
        {"warmup-steps", &O::warmup_steps, "optimizer", kRun, "[0, 1e+12]",
         "updates until the full rate"},
        {"weight-decay", &O::weight_decay, "optimizer", kRun, "[0, 100]", "of matrices"},
        {"beta1", &O::beta1, "optimizer", kRun, "[0, 1)", "memory of the mean gradient"},
        {"beta2", &O::beta2, "optimizer", kRun, "[0, 1)", "memory of its square"},
        {"eps", &O::eps, "optimizer", kRun, "[1e-30, 1]", "AdamW's, outside the root"},
        {"grad-clip", &O::grad_clip, "optimizer", kRun, "[0, 1e+30]",
         "longest gradient; 0: no limit"},

        {"log-interval", &O::log_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between lines on the terminal; 0, here and below: never"},
        {"eval-interval", &O::eval_interval, "watching", kRun, "[0, 1e+12]",
         "steps between evaluations"},
        {"eval-batches", &O::eval_batches, "watching", kRun | kEval, "[0, 1e+12]",
         "training batches scored in each, beside all of the validation text"},
        {"sample-interval", &O::sample_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between samples"},
        {"prompt", &O::prompt, "watching", kTrain | kSample, "TEXT", "how samples begin"},
        {"tensor-stats-interval", &O::tensor_stats_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between tables of each tensor's weight, gradient and update"},
        {"patience", &O::patience, "watching", kRun, "[0, 1e+12]",
         "stop after that many evaluations without a new best; 0: do not"},
        {"save-interval", &O::save_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between checkpoints"},
        {"keep", &O::keep, "watching", kTrain, "[1, 1000000]", "newest checkpoints not deleted"},

        {"on-nan", &O::on_nan, "guards", kRun, "stop|skip",
         "what to do where loss or gradient is no number"},
        {"skip-outliers", &O::skip_outliers, "guards", kRun, "[0, 1000000]",
         "skip updates whose loss or norm is this many deviations high; 0: none"},

        {"prompt-file", &O::prompt_file, "sample", kSample, "FILE",
         "how the text begins; - is standard input"},
        {"max-new-tokens", &O::max_new_tokens, "sample", kSample, "[1, 1000000000]",
         "the most to write"},
        {"num-samples", &O::num_samples, "sample", kSample, "[1, 1000000]", "texts to write"},
        {"temperature", &O::temperature, "sample", kSample, "[0, 100]",
         "0: always the likeliest token"},
        {"top-k", &O::top_k, "sample", kSample, "[0, 65536]", "only the k likeliest; 0: all"},
        {"top-p", &O::top_p, "sample", kSample, "(0, 1]", "only the likeliest, up to this sum"},
        {"show-top", &O::show_top, "sample", kSample, "[0, 65536]",
         "print the likeliest next tokens with their probabilities"},

        {"hellaswag", &O::hellaswag, "eval", kEval, "FILE", "score this file of questions too"},
    };
};
inline const std::vector<Option>& option_table() { return OptionTable::rows; }

// The commands, in the order of the help.
struct CommandName {
    Command command;
    const char *name, *help;
};
inline const std::vector<CommandName>& command_table() {
    static const std::vector<CommandName> table = {
        {kTrain, "train", "train a model (what happens without a command)"},
        {kEval, "eval", "the loss of a checkpoint"},
        {kSample, "sample", "text from a checkpoint"},
        {kInfo, "info", "every tensor, and what memory and time the model takes"},
        {kBench, "bench", "how fast each layer is, against what this machine can do"},
        {kWalk, "walk", "one tiny batch through one training step, with all its numbers"},
    };
    return table;
}

// ---- Words for messages -------------------------------------------------------------------------

// A message says what was expected, what was found, where, and what to do next; on one line, and
// not a long one, whatever was typed. "error: unknown option --lr; did you mean --learning-rate?"
// What such sentences are made of is below.

// What the user typed: as it is where it is short and plain, else quoted and cut.
inline std::string shown(const std::string& text) {
    const bool plain =
        std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 127; });
    return plain && !text.empty() && text.size() <= 60 ? text : in_quotes(text);
}

// How many letters must be added, dropped or changed to make b of a (Levenshtein 1966). row[j] is
// that number for the letters of a seen so far and the first j of b. At the next letters of both
// there are three ways: a's becomes b's (diagonal, and 1 where they differ), b's is added
// (row[j] + 1), or a's is dropped (row[j + 1] + 1).
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

// How far `typed` is from meaning `name`. Initials ("lr") and parts of it ("steps") are near; of
// names it is a part of, the shortest is nearest. Careful: what was typed may be very long.
inline double name_distance(const std::string& typed, const std::string& name) {
    std::string initials;
    for (const std::string& word : split_at(name, '-')) initials += word.substr(0, 1);
    if (typed == initials) return 0;
    if (typed.size() > 2 && name.find(typed) != name.npos)
        return 1 + 0.01 * double(name.size() - typed.size());
    return double(edit_distance(typed.substr(0, 64), name));
}

// The entry of a table (of options, of commands) whose name is nearest to `typed`.
template <class Entry>
const Entry& nearest(const std::vector<Entry>& table, const std::string& typed) {
    return *std::min_element(table.begin(), table.end(), [&](const Entry& a, const Entry& b) {
        return name_distance(typed, a.name) < name_distance(typed, b.name);
    });
}

// "train, eval": the names of these commands.
inline std::string command_name(unsigned commands) {
    std::string names;
    for (const CommandName& c : command_table())
        if (commands & c.command) join(names, ", ", c.name);
    return names;
}

// "in (0, 1]", "one of stop, skip", "0 or 1", or how the text is named.
inline std::string range_text(const Range& range) {
    if (range.is_number()) return "in " + range.text;
    if (range.is_switch()) return "0 or 1";
    if (!range.is_choice()) return range.text;
    std::string words;
    for (const std::string& word : range.words()) join(words, ", ", word);
    return "one of " + words;
}

// ---- One value, to text and from text -----------------------------------------------------------

// An option's value has a type of its own, and the two functions that meet all types are these:
// value_text, out of an Options, and assign, into one. Each undoes the other.

// Whether T is a number's type. A switch and a Schedule are places in their range's list of words:
// false, the first place, is "0", and Schedule::linear, the second, is "linear".
template <class T>
constexpr bool is_number = std::is_arithmetic_v<T> && !std::is_same_v<T, bool>;

// A value as the user would type it; reading it gives the same value again: to_chars writes as many
// digits as that takes, and no more. `if constexpr` chooses when the program is compiled, for each
// type on its own.
inline std::string value_text(const Options& options, const Option& option) {
    const auto text_of = [&](auto member) -> std::string {
        const auto& value = options.*member;
        using T = std::decay_t<decltype(value)>;
        char text[32];
        if constexpr (std::is_same_v<T, std::string>)
            return value;
        else if constexpr (is_number<T>)
            return {text, std::to_chars(text, text + sizeof text, value).ptr};
        else
            return option.range.words()[size_t(value)];
    };
    return std::visit(text_of, option.member);
}

// False for an empty text and for a number outside its option's range: both mean "not set".
inline bool is_set(const Options& options, const Option& option) {
    const std::string text = value_text(options, option);
    return option.range.is_number() ? option.range.contains(std::strtod(text.c_str(), nullptr))
                                    : !text.empty();
}

// An option and its value, as typed. where: "" or "file:line: ".
struct Assignment {
    const Option* option;
    std::string value, where;
};

// "run.conf:3: --top-p must be in (0, 1], got 1.5". kind: "a number ", where the value is none.
[[noreturn]] inline void fail_value(const Assignment& a, const std::string& kind = "") {
    fail_usage(a.where + "--" + a.option->name + " must be " + kind + range_text(a.option->range) +
               ", got " + shown(a.value));
}

// "--data needs a value: DIR; ...". The hint is for a text: "--data --x" is two options.
[[noreturn]] inline void fail_no_value(const Option& option, const std::string& where) {
    const std::string name = "--" + option.name;
    const bool text = option.range.is_text();
    fail_usage(where + name + " needs a value: " + range_text(option.range) +
               (text ? "; one that begins with -- is written " + name + "=--..." : ""));
}

// The number that the whole value is. Strict: no spaces, no "+5", no hexadecimal, no infinity, no
// NaN, nothing too large or too small for the type; a whole number has digits only. Why from_chars:
// it takes none of the former, and it says where it stopped, so "1x" is not read as 1.
template <class T>
T parse_number(const Assignment& a) {
    T value{};
    const char* end = a.value.data() + a.value.size();
    const auto [stop, error] = std::from_chars(a.value.data(), end, value);
    const bool too_far = error == std::errc::result_out_of_range;
    if (stop != end || (error != std::errc() && !too_far) || !std::isfinite(double(value)))
        fail_value(a, std::is_integral_v<T> ? "a whole number " : "a number ");
    if (too_far || !a.option->range.contains(double(value))) fail_value(a);
    return value;
}

// Sets one option, or fails. An empty value is fine for a TEXT only: an empty prompt is a prompt,
// an empty file name a mistake.
inline void assign(Options& options, const Assignment& a) {
    const Range& range = a.option->range;
    if (a.value.empty() && range.text != "TEXT") fail_no_value(*a.option, a.where);
    const std::vector<std::string> words = range.words();
    const size_t place = size_t(std::find(words.begin(), words.end(), a.value) - words.begin());
    if ((range.is_switch() || range.is_choice()) && place == words.size()) fail_value(a);
    const auto set = [&](auto member) {
        auto& value = options.*member;
        using T = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<T, std::string>)
            value = a.value;
        else if constexpr (is_number<T>)
            value = parse_number<T>(a);
        else
            value = T(place);
    };
    std::visit(set, a.option->member);
    options.set_names.insert(a.option->name);
}

// ---- Reading all of them ------------------------------------------------------------------------

// First a list of assignments, from arguments and files, with every name looked up; then they are
// carried out in order. The two steps are apart because what counts is not what is read last.

// The command of that name.
inline Command find_command(const std::string& typed) {
    for (const CommandName& c : command_table())
        if (typed == c.name) return c.command;
    fail_usage("unknown command " + shown(typed) + "; did you mean " +
               nearest(command_table(), typed).name + "? The commands are " + command_name(~0u));
}

// The option of that name, which `command` must take. '-' and '_' are the same. where: as in an
// Assignment.
inline const Option& find_option(std::string name, Command command, const std::string& where) {
    std::replace(name.begin(), name.end(), '_', '-');
    for (const Option& option : option_table()) {
        if (name != option.name) continue;
        if (option.commands & command) return option;
        fail_usage(where + command_name(command) + " takes no option --" + name + "; it is for " +
                   command_name(option.commands));
    }
    fail_usage(where + "unknown option " + shown("--" + name) + "; did you mean --" +
               nearest(option_table(), name).name + "? (--help lists all options)");
}

// The assignments in the arguments from `first` on. What follows an option is its value, unless it
// begins with "--"; a switch may stand alone and then means 1.
inline std::vector<Assignment> split_arguments(const std::vector<std::string>& args, size_t first,
                                               Command command) {
    std::vector<Assignment> all;
    for (size_t i = first; i < args.size(); ++i) {
        const std::string arg = args[i] == "-h" ? "--help" : args[i];
        if (!arg.starts_with("--") || arg.size() < 3)
            fail_usage("expected an option such as --data, found " + shown(arg) +
                       " (--help lists all options)");
        const size_t equals = arg.find('=');
        const Option& option = find_option(arg.substr(2, equals - 2), command, "");
        const bool is_switch = option.range.is_switch();
        const bool stands_alone = i + 1 == args.size() || args[i + 1].starts_with("--") ||
                                  (is_switch && args[i + 1] == "-h");
        std::string value = "1";  // a switch that stands alone
        if (equals != arg.npos)
            value = arg.substr(equals + 1);
        else if (!stands_alone)
            value = args[++i];
        else if (!is_switch)
            fail_no_value(option, "");
        all.push_back({&option, value, ""});
    }
    return all;
}

// The assignments in the text of a config file, all checked. A line is empty, `name = value`, or a
// comment; a '#' at its start or after a space begins one, so "C#" is a value. Names are those of
// the command line, with or without "--". path is for messages only.
inline std::vector<Assignment> parse_config(std::string_view text, const std::string& path,
                                            Command command) {
    const std::string spaces = " \t\r";
    const auto trim = [&](std::string s) {
        s.erase(0, s.find_first_not_of(spaces));
        return s.erase(s.find_last_not_of(spaces) + 1);
    };
    std::vector<Assignment> all;
    Options
        checked;  // takes every value, so that a bad one is refused even where a later one counts
    int number = 0;
    if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);  // a byte order mark
    for (std::string line : split_at(text, '\n')) {
        const std::string where = format("%s:%d: ", path.c_str(), ++number);  // of messages
        for (char c : line)  // a picture or a program, given by mistake
            if (std::iscntrl(uint8_t(c)) && c != '\t' && c != '\r')
                fail_usage(where + "this is not text");
        // Cut off a comment, and the space around what is left.
        for (size_t at = 0; (at = line.find('#', at)) != line.npos; ++at)
            if (at == 0 || line[at - 1] == ' ' || line[at - 1] == '\t') line.resize(at);
        line = trim(line);
        if (line.empty()) continue;

        const size_t equals = line.find('=');
        if (equals == line.npos)
            fail_usage(where + "expected `name = value`, found " + shown(line));
        std::string name = trim(line.substr(0, equals));
        if (name.starts_with("--")) name.erase(0, 2);
        if (name == "config" || name == "help")
            fail_usage(where + "a config file cannot hold --" + name);
        all.push_back({&find_option(name, command, where), trim(line.substr(equals + 1)), where});
        assign(checked, all.back());
    }
    return all;
}

// The same from a file. One that cannot be read is bad usage: its name was typed.
inline std::vector<Assignment> read_config(const std::string& path, Command command) {
    std::string text;
    try {
        text = read_file(path, 1 << 16);
    } catch (const Error& error) {
        fail_usage(std::string("--config: ") + error.what());
    }
    return parse_config(text, path, command);
}

// Refuses options that do not go together: nothing the user types may be silently ignored.
inline void check_together(const Options& o) {
    auto both = [&](const char* a, const char* b) {
        if (o.given(a) && o.given(b)) fail_usage(format("--%s and --%s exclude each other", a, b));
    };
    both("data", "train-shards"), both("data", "val-shards"), both("prompt", "prompt-file");
    if (o.command == kTrain && o.given("val-shards") && !o.given("train-shards"))
        fail_usage("--val-shards needs --train-shards too: --train-shards GLOB --val-shards GLOB");
    if (o.override_changes && o.resume.empty())
        fail_usage("--override needs --resume DIR or --resume auto");
    if (o.patience > 0 && o.eval_interval == 0)
        fail_usage("--patience counts evaluations: it needs an --eval-interval above 0");
    if (int64_t(o.batch_size) * std::max(o.seq_len, 1) > INT32_MAX)
        fail_usage(format("--batch-size %d times --seq-len %d must be below 2147483648 tokens",
                          o.batch_size, o.seq_len));
}

// The options in the arguments (without the program's name), all checked. Bad usage throws Error
// with status 2. Reads no file but that of --config. Of options given twice the last counts, of
// files too; the command line counts before a file, wherever --config stands. So the arguments are
// assigned twice: first to check them and to find the file, then over what the file says.
inline Options parse_options(const std::vector<std::string>& args) {
    // The command decides which options there are.
    Options o;
    o.command_given = !args.empty() && !args[0].starts_with('-');
    if (o.command_given) o.command = find_command(args[0]);
    const std::vector<Assignment> typed = split_arguments(args, o.command_given, o.command);

    std::vector<Assignment> from_file;
    for (const Assignment& a : typed) {
        assign(o, a);
        if (a.option->name == "config") from_file = read_config(a.value, o.command);
    }
    for (const Assignment& a : from_file) assign(o, a);
    for (const Assignment& a : typed) assign(o, a);

    // Whoever asks for help has not made up their mind: what does not go together is let pass.
    if (!o.help) check_together(o);
    if (!o.given("max-steps") && (o.given("epochs") || o.given("max-minutes"))) o.max_steps = 0;
    return o;
}

// ---- Showing them -------------------------------------------------------------------------------

// `line` and the words after it, in lines of at most 100 columns. The words begin at column
// `indent`; a word that is longer than a line has one to itself.
inline std::string wrap(std::string line, const std::vector<std::string>& words, size_t indent) {
    std::string lines;
    line.resize(std::max(line.size(), indent), ' ');
    for (const std::string& word : words) {
        if (line.size() > indent && line.size() + 1 + word.size() > 100) {
            lines += line + "\n";
            line.assign(indent, ' ');
        }
        line += (line.size() > indent ? " " : "") + word;
    }
    return lines + line + "\n";
}

// One entry of the help: name, what it means, its range, its default.
//   --top-p X                   only the likeliest, up to this sum; in (0, 1] (default 1)
inline std::string option_help(const Option& option) {
    const Options defaults;
    const Range& range = option.range;
    // What stands for the value: N a whole number, X any number, DIR and the like a text.
    const bool whole = !std::holds_alternative<double Options::*>(option.member);
    const std::string value = range.is_number()   ? whole ? " N" : " X"
                              : range.is_choice() ? " WORD"
                              : range.is_switch() ? ""
                                                  : " " + range.text;
    std::vector<std::string> words = split_at(option.help, ' ');
    if (range.is_number() || range.is_choice())
        words.back() += ";", words.push_back(range_text(range));
    if (is_set(defaults, option)) words.push_back("(default " + value_text(defaults, option) + ")");
    return wrap("  --" + option.name + value, words, 30);
}

// What --help prints: all options, or only those of the command that was written out.
inline std::string help_text(const Options& options, const std::string& program) {
    const unsigned commands = options.command_given ? unsigned(options.command) : ~0u;
    std::string group,
        text = "usage: " + program + " [command] [--name value | --name=value | --switch] ...\n\n";
    for (const CommandName& c : command_table())
        if (commands & c.command) text += format("  %-8s %s\n", c.name, c.help);
    for (const Option& option : option_table()) {
        if (!(option.commands & commands)) continue;
        if (group != option.group) text += "\n" + (group = option.group) + "\n";
        text += option_help(option);
    }
    return text +
           "\nA switch is --name or --name 0|1. In names - and _ are the same. Given twice, the "
           "last counts.\n";
}

// The echo at the start of a run: every option the command takes, in lines of at most 100 columns,
// so that a log on paper says how the run was made.
//   length    *max-steps=300 epochs=- max-minutes=-
inline std::string describe(const Options& options) {
    const Options defaults;
    std::vector<std::pair<std::string, std::vector<std::string>>> groups;
    for (const Option& option : option_table()) {
        if (!(option.commands & options.command) || option.name == "help") continue;
        const std::string value = value_text(options, option);
        std::string text = is_set(options, option) ? shown(value) : "-";
        size_t cut = 67;  // of a long text, the beginning; not cut inside a character
        while (cut < text.size() && (text[cut] & 0xc0) == 0x80) --cut;
        if (text.size() > 70) text = text.substr(0, cut) + "...";
        const char* mark = value != value_text(defaults, option) ? "*" : "";
        if (groups.empty() || groups.back().first != option.group)
            groups.push_back({option.group, {}});
        groups.back().second.push_back(mark + option.name + "=" + text);
    }
    std::string text = "options (* not the default, - not set)\n";
    for (const auto& [group, words] : groups) text += wrap("  " + group, words, 12);
    return text;
}

// Name and value of every option that must be the same for a resumed run to be the same run: a
// checkpoint holds them, and resuming compares.
inline std::vector<std::pair<std::string, std::string>> options_that_change_numbers(
    const Options& options) {
    std::vector<std::pair<std::string, std::string>> all;
    for (const Option& option : option_table())
        if (option.commands & OptionTable::kNumbers)
            all.emplace_back(option.name, value_text(options, option));
    return all;
}

// =================================================================================================
// §16 Log and terminal: what a run leaves behind, what it shows, and what it runs on
// =================================================================================================
//
// The reader now holds the options, checked. Before the loop, what it writes: log.csv, a row for
// every step, which plots and the drawn curve are made from; numbers and text as a person reads
// them on a terminal; and what the machine can do at best, to hold a run's speed against.

// ---- The log: one row for every step ------------------------------------------------------------

// Row 0 is the evaluation before training. Row s has the loss, rate and norm of update s, all from
// before it was made, and the evaluation after it. floor: the least loss any model can reach, where
// it is known; mfu: the share of the machine's peak that the step's arithmetic used. A field that
// was not measured is empty; one that is NaN was measured and is NaN.
struct LogRow {
    int64_t step = 0;
    double epoch = 0;
    int64_t tokens = 0;
    std::optional<double> train_loss, eval_train_loss, val_loss, perplexity, floor, lr, grad_norm;
    std::optional<double> tokens_per_s, mfu, seconds;
};
constexpr const char* kLogHeader =
    "step,epoch,tokens,train_loss,eval_train_loss,val_loss,perplexity,floor,lr,grad_norm,"
    "tokens_per_s,mfu,seconds\n";

// The row as a line of the file. Nine digits give a float back exactly.
inline std::string log_line(const LogRow& row) {
    std::string line =
        format("%lld,%.6g,%lld", (long long)row.step, row.epoch, (long long)row.tokens);
    auto field = [&](const std::optional<double>& value, int digits, const char* pattern) {
        // Why: printf writes some NaNs as "-nan", and two equal runs must have equal logs.
        line += !value ? "," : std::isnan(*value) ? ",nan" : format(pattern, digits, *value);
    };
    for (auto* value : {&row.train_loss, &row.eval_train_loss, &row.val_loss, &row.perplexity,
                        &row.floor, &row.lr, &row.grad_norm})
        field(*value, 9, ",%.*g");
    field(row.tokens_per_s, 1, ",%.*f"), field(row.mfu, 4, ",%.*f"), field(row.seconds, 3, ",%.*f");
    return line + "\n";
}

// The rows of a log up to that of step `last`, without their line ends. A line that a crash cut
// short is left out, and so is whatever lies behind `last`: those steps are made again.
inline std::vector<std::string> read_log_rows(const std::string& path, int64_t last) {
    std::vector<std::string> rows;
    if (!file_exists(path)) return rows;
    std::vector<std::string> lines = split_at(read_file(path), '\n');
    lines.pop_back();  // what follows the last line end: nothing, or half a row
    int64_t before = -1;
    for (const std::string& line : lines) {
        int64_t step = -1;
        std::from_chars(line.data(), line.data() + line.size(), step);
        const bool whole = std::count(line.begin(), line.end(), ',') == 12;
        if (whole && step > before && step <= last) rows.push_back(line), before = step;
    }
    return rows;
}
// A field of a row, columns counted from 0; NaN where it is empty.
inline double log_field(const std::string& row, size_t column) {
    const std::string text = split_at(row, ',').at(column);
    return text.empty() ? NAN : std::strtod(text.c_str(), nullptr);
}

// log.csv. Rows are handed to the system at once, so that a plot can follow the run, and stay in
// memory until they are known to be on the disk: one that is full, or that fails, does not lose
// them. A checkpoint syncs the log first, so the log of a resumed run has no gap.
class Log {
public:
    // Begins with these rows. The file is replaced whole before it is appended to: half a row that
    // a crash left must not be gone on with.
    Log(const std::string& path, const std::vector<std::string>& rows) : path_(path), fd_(-1) {
        std::string text = kLogHeader;
        for (const std::string& row : rows) text += row + "\n";
        write_file(path, text);
        fd_.fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
        if (fd_.fd < 0) fail_file("write", path, errno);
        synced_ = int64_t(text.size());
    }
    // Returns whether the rows so far could be handed to the system; errno says why not.
    bool add(const LogRow& row) {
        const size_t enough = 1 << 20;  // so that a run without checkpoints does not fill memory
        waiting_ += log_line(row);
        return write_out(waiting_.size() >= enough);
    }
    // Everything so far is on the disk, or an error says why not.
    void sync() {
        if (!write_out(true)) fail_file("write", path_, errno);
    }

private:
    // Hands over what waits; where `sync` is set, waits for the disk. A write may come up short, or
    // be interrupted by a signal. Careful: after an fsync that failed, the system may have dropped
    // the rows and call them written. So they are cut off, and written again the next time.
    bool write_out(bool sync) {
        while (written_ < waiting_.size()) {
            const ssize_t done =
                sys_write(fd_.fd, path_, waiting_.data() + written_, waiting_.size() - written_);
            if (done < 0 && errno == EINTR) continue;
            if (done == 0) errno = ENOSPC;
            if (done <= 0) return false;
            written_ += size_t(done);
        }
        if (!sync) return true;
        const int code = sys_fsync(fd_.fd, path_) == 0 ? 0 : errno;
        if (code == 0)
            synced_ += int64_t(waiting_.size()), waiting_.clear(), written_ = 0;
        else if (::ftruncate(fd_.fd, synced_) == 0)
            written_ = 0;
        errno = code;
        return code == 0;
    }

    std::string path_;
    FileHandle fd_;
    int64_t synced_ = 0;   // bytes of the file that are on the disk
    std::string waiting_;  // what comes behind them
    size_t written_ = 0;   // bytes of that, handed to the system
};

// ---- What the terminal shows --------------------------------------------------------------------

// A count: 1234567 -> "1,234,567"
inline std::string with_commas(int64_t n) {
    std::string digits = std::to_string(n);
    for (size_t at = digits.size(); at > 3;) digits.insert(at -= 3, 1, ',');
    return digits;
}
// Decimal units, as disks and data sheets have them.
inline std::string bytes_text(double bytes) {
    if (bytes >= 1e9) return format("%.2f GB", bytes / 1e9);
    return bytes >= 1e6 ? format("%.1f MB", bytes / 1e6) : format("%.1f KB", bytes / 1e3);
}
// The two largest units: "2d 3h", "3h 07m", "7m 05s", "5s".
inline std::string duration_text(double seconds) {
    const long long s = (long long)(seconds + 0.5);
    if (s >= 86400) return format("%lldd %lldh", s / 86400, s % 86400 / 3600);
    if (s >= 3600) return format("%lldh %02lldm", s / 3600, s % 3600 / 60);
    return s >= 60 ? format("%lldm %02llds", s / 60, s % 60) : format("%llds", s);
}

// One point of a curve.
struct CurvePoint {
    int64_t step;
    double loss;
};

// Draws train (.), validation (o) and floor (-) into a box of text. Losses are on a log scale, on
// which the long tail of a run is still seen to fall. Losses that are not finite are left out, and
// so is a floor that is; where nothing is left, the picture is empty text.
inline std::string draw_curve(const std::vector<CurvePoint>& train,
                              const std::vector<CurvePoint>& val, double floor, int width = 76,
                              int height = 16) {
    const bool has_floor = std::isfinite(floor);
    double low = has_floor ? floor : INFINITY, high = 0;
    int64_t last = 1;
    for (auto* curve : {&train, &val})
        for (const CurvePoint& p : *curve)
            if (std::isfinite(p.loss))
                low = std::min(low, p.loss), high = std::max(high, p.loss),
                last = std::max(last, p.step);
    if (low <= 0 || high <= 0) return "";
    // A little room below, and never a box so flat that noise fills it.
    const double bottom = std::log(low * 0.98), top = std::log(std::max(high, low * 1.1));

    // x runs from 0 to 1 over the steps, y from 0 at the top to 1. Later marks cover earlier ones.
    std::vector<std::string> rows(size_t(height), std::string(size_t(width), ' '));
    auto put = [&](double x, double loss, char mark) {
        if (!std::isfinite(loss)) return;
        const double y = std::clamp((top - std::log(loss)) / (top - bottom), 0.0, 1.0);
        rows[size_t(y * (height - 1) + 0.5)][size_t(x * (width - 1) + 0.5)] = mark;
    };
    for (int c = 0; c < width; ++c) put(c / (width - 1.0), floor, '-');
    for (const CurvePoint& p : train) put(double(p.step) / double(last), p.loss, '.');
    for (const CurvePoint& p : val) put(double(p.step) / double(last), p.loss, 'o');

    // Every fifth line says its loss.
    std::string out;
    for (int r = 0; r < height; ++r) {
        const double loss = std::exp(top - (top - bottom) * r / (height - 1));
        out += (r % 5 == 0 || r == height - 1 ? format("%8.3f |", loss) : "         |") +
               rows[size_t(r)] + "\n";
    }
    out += "         +" + std::string(size_t(width), '-') + "\n";
    out += format("          0%*lld\n", width - 1, (long long)last);
    out += "          loss over steps: . train" + std::string(val.empty() ? "" : "   o validation");
    return out + (has_floor ? format("   --- floor %.4f\n", floor) : "\n");
}

// Text as it is sampled, in pieces. A token may end inside a UTF-8 character, of which the terminal
// must not be shown a half: those bytes are held back until the rest has come. What never becomes a
// character is shown as U+FFFD, byte by byte.
class Utf8Stream {
public:
    std::string add(std::string_view bytes) {
        held_ += bytes;
        return take(false);
    }
    std::string finish() { return take(true); }

private:
    // All characters that are whole; at the end of the text, what is left as well.
    std::string take(bool at_end) {
        std::string out;
        size_t at = 0;
        while (at < held_.size()) {
            const std::string rest = held_.substr(at, 4);
            const size_t length = utf8_character(rest);
            if (length == 0 && !at_end && may_begin_character(rest)) break;
            out += length ? rest.substr(0, length) : "\xef\xbf\xbd";
            at += std::max<size_t>(1, length);
        }
        held_.erase(0, at);
        return out;
    }
    // Whether some bytes behind these would make a character: the least that may follow, or the
    // greatest. (After some first bytes only one half of them may.)
    static bool may_begin_character(const std::string& text) {
        return utf8_character(text + "\x80\x80\x80") || utf8_character(text + "\xbf\xbf\xbf");
    }
    std::string held_;
};

// ---- The machine --------------------------------------------------------------------------------

// The CPU's answers to what every device is asked (§4): what it is, how much memory is free, and
// what it can do at best. The peaks are measured, not looked up: what a data sheet promises is
// rarely what is left of it in a container, or on a laptop that is warm.

// "CPU, 2 threads, vectors of 512 bits, fp32"
template <class real>
std::string Cpu<real>::describe() const {
    const char* numbers = matmul_options.bf16 ? "bf16 products"
                          : sizeof(real) == 4 ? "fp32"
                                              : "fp64";
    return format("CPU, %d threads, vectors of %d bits, %s", omp_get_max_threads(),
                  kVectorBytes * 8, numbers);
}

// What the system says could be used without swapping; without /proc, all memory there is.
template <class real>
size_t Cpu<real>::free_memory() const {
    const std::string path = "/proc/meminfo", label = "MemAvailable:";  // then a number of kB
    const std::string info = file_exists(path) ? read_file(path) : "";
    const size_t at = info.find(label);
    if (at != info.npos)
        return size_t(std::strtoull(info.c_str() + at + label.size(), nullptr, 10)) * 1024;
    return size_t(::sysconf(_SC_PHYS_PAGES)) * size_t(::sysconf(_SC_PAGESIZE));
}

// Floating-point operations of a training step per token: 2 for every weight that is multiplied in
// forward and 4 in backward; attention's scores and sums over the causal half, on average (T+1)/2
// positions of 2 C each, twice, and twice as much again in backward. Divided by the time it took
// and by peak_flops, this is the MFU (model FLOPs utilisation) of the log.
inline double flops_per_token(const Config& config, int T) {
    const double C = config.n_embd, L = config.n_layer, V = config.vocab_size;
    return 6 * (12 * C * C * L + V * C) + 6 * C * (T + 1.0) * L;
}

// From a clock that is never set; only differences mean something.
inline double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Multiplies and adds in registers, nothing else. Returns the operations a second of one thread,
// the best of eight trials. Why 12 sums: a core begins one or two of these operations a cycle and
// ends each four or so later; sums that do not wait for each other keep it busy.
template <class real>
double registers_only_flops() {
    constexpr int kSums = 12, kRounds = 20000;
    Vec<real> sums[kSums], factor = Vec<real>{} + real(1.0000001),
                           addend = Vec<real>{} + real(1e-7);
    for (int i = 0; i < kSums; ++i) sums[i] = Vec<real>{} + real(i);
    double least = INFINITY;
    for (int trial = 0; trial < 8; ++trial) {
        const double begin = now_seconds();
        for (int round = 0; round < kRounds; ++round)
#pragma GCC unroll 12
            for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + addend;
        least = std::min(least, now_seconds() - begin);
    }
    volatile real sink = 0;  // so that the sums are needed
    for (int i = 0; i < kSums; ++i) sink = sink + sums[i][0];
    return 2.0 * kSums * kLanes<real> * kRounds / least;
}

// All threads at once: cores that share a power budget, or an arithmetic unit, are slower together.
// Careful: the work is a function of its own because GCC 12 leaves it out where it stands inside
// the parallel region.
template <class real>
double Cpu<real>::peak_flops() const {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    total += registers_only_flops<real>();
    return total;
}

// Memory's speed, measured: all threads read 256 MB, far more than any cache holds. Best of five.
// Why whole numbers: the compiler may add those in any order, and so a register full at a time.
template <class real>
double Cpu<real>::peak_bandwidth() const {
    const size_t count = size_t(1) << 26;
    uint32_t* data = Cpu<float>().allocate<uint32_t>(count);
    // Why in parallel: memory lies near the thread that first writes it.
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; ++i) data[i] = 1;
    double least = INFINITY;
    for (int trial = 0; trial < 5; ++trial) {
        uint32_t total = 0;
        const double begin = now_seconds();
#pragma omp parallel for schedule(static) reduction(+ : total)
        for (size_t i = 0; i < count; ++i) total += data[i];
        if (total == count) least = std::min(least, now_seconds() - begin);
    }
    std::free(data);
    return double(count * sizeof(uint32_t)) / least;
}

// =================================================================================================
// §13 The loop, and the commands
// =================================================================================================

// ---- The data of a run -----------------------------------------------------------------------

// A token's text. A model may have more tokens than its tokenizer: those are shown as numbers.
inline std::string text_of_token(const Tokenizer& tokenizer, int token) {
    if (token >= tokenizer.vocab_size()) return "<" + std::to_string(token) + ">";
    return std::string(tokenizer.bytes_of(token));
}

struct Corpus {
    std::string folder;  // empty where shards were named one by one
    std::optional<Tokenizer> tokenizer;
    std::optional<Shards> train, val;
    double floor = NAN;  // nats a token, where the corpus knows it
    std::vector<int> token_bytes() const {
        std::vector<int> bytes;
        for (int id = 0; tokenizer && id < tokenizer->vocab_size(); ++id)
            bytes.push_back(int(tokenizer->bytes_of(id).size()));
        return bytes;
    }
    bool has_val() const { return val && !val->empty(); }
    std::string text_of(int token) const {
        if (tokenizer) return text_of_token(*tokenizer, token);
        return std::to_string(token) + " ";
    }
};

// A folder's name in a glob pattern: every character means itself.
inline std::string glob_escaped(const std::string& path) {
    std::string pattern;
    for (char c : path)
        pattern += std::strchr("*?[\\", c) ? std::string("\\") + c : std::string(1, c);
    return pattern;
}

// Opens the data that the options name. Fails when there is none, saying how to make some.
inline Corpus open_corpus(const Options& o, bool needs_train) {
    Corpus corpus;
    if (!o.train_shards.empty() || !o.val_shards.empty()) {
        if (!o.train_shards.empty()) corpus.train.emplace(o.train_shards);
        if (!o.val_shards.empty()) corpus.val.emplace(o.val_shards);
        for (auto* split : {&corpus.train, &corpus.val})
            TINYGPT_CHECK(!*split || !(*split)->empty(), "no file matches %s",
                          (*split)->pattern().c_str());
        TINYGPT_CHECK(!needs_train || corpus.train,
                      "--train-shards is missing: there is nothing to train on");
        return corpus;
    }
    corpus.folder = o.data;
    TINYGPT_CHECK(folder_exists(o.data),
                  "there is no data folder %s: make the default one with ./prepare_data, or one of "
                  "your "
                  "own with ./prepare_data --input book.txt --output %s",
                  o.data.c_str(), o.data.c_str());
    corpus.train.emplace(glob_escaped(o.data) + "/train_*.bin");
    corpus.val.emplace(glob_escaped(o.data) + "/val_*.bin");
    TINYGPT_CHECK(!needs_train || !corpus.train->empty(),
                  "%s holds no train_*.bin: make shards with ./prepare_data --input FILE --output "
                  "%s",
                  o.data.c_str(), o.data.c_str());
    if (file_exists(o.data + "/vocab.json") || file_exists(o.data + "/encoder.json"))
        corpus.tokenizer = Tokenizer::load(o.data);
    const std::string about = o.data + "/dataset.json";
    if (file_exists(about)) {
        const Json json = Json::parse(read_file(about, 10'000'000), about);
        corpus.floor = number_or(json, "floor", NAN);
    }
    return corpus;
}

// ---- The model of a run ----------------------------------------------------------------------

// The sizes that the options ask for: those of a preset, some overridden; the vocabulary is the
// tokenizer's unless it was given.
inline Config config_of_options(const Options& o, const Corpus& corpus) {
    Config config;
    for (const Preset& preset : presets())
        if (o.model == preset.name) config = preset.config;
    if (o.n_layer) config.n_layer = o.n_layer;
    if (o.n_head) config.n_head = o.n_head;
    if (o.n_embd) config.n_embd = o.n_embd;
    if (o.n_positions) config.n_positions = o.n_positions;
    if (corpus.tokenizer) config.vocab_size = corpus.tokenizer->vocab_size();
    if (o.vocab_size) config.vocab_size = o.vocab_size;
    config.untied_head = o.untied_head;
    if (config.n_embd % config.n_head)
        fail_usage(
            format("--n-head %d does not divide --n-embd %d: each head takes an equal share "
                   "of the channels",
                   config.n_head, config.n_embd));
    return config;
}

// A checkpoint's sizes are what they are: options that ask for others are refused, not ignored.
inline void check_same_sizes(const Options& o, const Config& config, const std::string& folder) {
    if (o.given("model"))
        fail_usage("--model and --init-from exclude each other: " + folder + " has its own sizes");
    auto same = [&](const char* name, int asked, int found) {
        if (o.given(name) && asked != found)
            fail_usage(format("--%s %d does not fit --init-from: the model in %s has %d", name,
                              asked, folder.c_str(), found));
    };
    same("n-layer", o.n_layer, config.n_layer), same("n-head", o.n_head, config.n_head);
    same("n-embd", o.n_embd, config.n_embd), same("n-positions", o.n_positions, config.n_positions);
    same("vocab-size", o.vocab_size, config.vocab_size);
    same("untied-head", o.untied_head, config.untied_head);
}

// The model of a run: that of the folder which its weights come from, or what the options say.
inline Config config_for(const Options& o, const Corpus& corpus, const std::string& weights = "") {
    Config config;
    if (o.init_from.empty()) {
        config = config_of_options(o, corpus);
    } else {
        const std::string folder = weights.empty() ? o.init_from : weights;
        config = config_of_folder(folder);
        check_same_sizes(o, config, folder);
    }
    config.dropout = float(o.dropout);
    if (corpus.tokenizer && config.vocab_size < corpus.tokenizer->vocab_size())
        fail_usage(format("the vocabulary of %d is smaller than the tokenizer's %d in %s",
                          config.vocab_size, corpus.tokenizer->vocab_size(),
                          corpus.folder.c_str()));
    return config;
}

// A data folder of another tokenizer would train nonsense: refuse it.
inline void check_same_tokenizer(const Corpus& corpus, const std::string& model_folder) {
    const bool has_tokenizer =
        file_exists(model_folder + "/vocab.json") || file_exists(model_folder + "/encoder.json");
    if (!corpus.tokenizer || !has_tokenizer) return;
    TINYGPT_CHECK(Tokenizer::load(model_folder) == *corpus.tokenizer,
                  "%s has another tokenizer than the model in %s: tokenize the text again with "
                  "./prepare_data --tokenizer gpt2 --vocab %s",
                  corpus.folder.c_str(), model_folder.c_str(), model_folder.c_str());
}

// Refuses sizes that the device cannot hold, saying how much they need.
template <class Device>
MemoryNeed check_memory(Device& device, const Config& config, int B, int T, Use use) {
    device.check_sizes(config, B);
    const MemoryNeed need = memory_need<Device>(config, B, T, use);
    const size_t free = device.free_memory();
    if (need.total() <= free) return need;
    std::string advice = "choose a smaller --model";
    for (int smaller = B / 2; smaller > 0; smaller /= 2)
        if (memory_need<Device>(config, smaller, T, use).total() <= free) {
            advice =
                format("--batch-size %d would fit (with --grad-accum-steps %d for the same step)",
                       smaller, (B + smaller - 1) / smaller);
            break;
        }
    fail(format("these sizes need %s of memory, and %s are free: %s",
                bytes_text(double(need.total())).c_str(), bytes_text(double(free)).c_str(),
                advice.c_str()));
}

// The table at the start: what the model is made of.
inline void print_model(const Config& config, const Layout& layout, const MemoryNeed& need, int T) {
    std::printf("model      %d layers, %d heads, %d channels, %d positions, vocabulary %d%s\n",
                config.n_layer, config.n_head, config.n_embd, config.n_positions, config.vocab_size,
                config.untied_head ? ", untied head" : "");
    std::printf("           %s parameters, %.1f MFLOP a token to train\n",
                with_commas(int64_t(layout.count)).c_str(), flops_per_token(config, T) / 1e6);
    std::printf("memory     %s: weights %s, gradients %s, moments %s, activations %s\n",
                bytes_text(double(need.total())).c_str(), bytes_text(double(need.weights)).c_str(),
                bytes_text(double(need.gradients)).c_str(),
                bytes_text(double(need.moments)).c_str(),
                bytes_text(double(need.activations)).c_str());
}

// ---- The prompt -------------------------------------------------------------------------------

// Tokens of a prompt; without a tokenizer, the numbers in it. May be none.
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
        int id = -1;
        auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), id);
        const bool number = error == std::errc() && stop == word.data() + word.size();
        if (!number || id < 0 || id >= vocab_size)
            fail_usage("there is no tokenizer: give the prompt as token numbers below " +
                       std::to_string(vocab_size) + ", not " + shown(word));
        tokens.push_back(id);
    }
    return tokens;
}

// ---- Ctrl-C ----------------------------------------------------------------------------------

// When the run was asked to stop, in nanoseconds of a clock that does not jump; 0: it was not. The
// first time it finishes the step, saves and exits 130; the second time it exits at once, which
// harms nothing: files are whole or not there.
inline std::atomic<int64_t>& stop_asked() {
    static std::atomic<int64_t> when{0};
    static_assert(std::atomic<int64_t>::is_always_lock_free, "a signal handler must not wait");
    return when;
}
inline void on_stop_signal(int) {
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t nanoseconds = int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec + 1;
    int64_t first = 0;
    if (stop_asked().compare_exchange_strong(first, nanoseconds)) return;
    // Why: `timeout` and a closing terminal send two signals at once and mean one.
    if (nanoseconds - first > 50'000'000) ::_exit(130);
}
inline void catch_signals() {
    stop_asked() = 0;
    struct sigaction action = {}, before = {};
    action.sa_handler = on_stop_signal;
    for (int number : {SIGINT, SIGTERM}) ::sigaction(number, &action, nullptr);
    // Under nohup a closed terminal is to be ignored, so we do.
    ::sigaction(SIGHUP, nullptr, &before);
    if (before.sa_handler != SIG_IGN) ::sigaction(SIGHUP, &action, nullptr);
    ::signal(SIGPIPE, SIG_IGN);
    ::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is an error to report, not a death
}

// One run in a folder at a time. The lock is the kernel's: it goes when the process goes.
inline FileHandle lock_folder(const std::string& folder) {
    const std::string path = folder + "/lock";
    FileHandle file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    if (file.fd < 0) fail_file("write into", folder, errno);
    if (::flock(file.fd, LOCK_EX | LOCK_NB) == 0) return file;
    TINYGPT_CHECK(errno != EWOULDBLOCK,
                  "another run is writing into %s: wait for it, or give another --output",
                  folder.c_str());
    std::fprintf(stderr, "warning: cannot lock %s (%s): take care that no other run uses it\n",
                 path.c_str(), std::strerror(errno));
    return file;
}

// ---- One run ---------------------------------------------------------------------------------

// What tells whether a shard's file was written to: number, size, and time of the last change.
inline std::vector<std::array<int64_t, 4>> shard_stamps(const Corpus& corpus) {
    std::vector<std::array<int64_t, 4>> stamps;
    for (const auto* split : {&corpus.train, &corpus.val}) {
        if (!*split) continue;
        for (const Shard& shard : (*split)->files()) {
            struct stat info {};
            ::stat(shard.path.c_str(), &info);
            stamps.push_back({int64_t(info.st_ino), int64_t(info.st_size),
                              int64_t(info.st_mtim.tv_sec), int64_t(info.st_mtim.tv_nsec)});
        }
    }
    return stamps;
}

// What a checkpoint remembers of the data, to know it again wherever it lies: the tokenizer, and of
// each shard its length and its checksum. Of more than 64 million tokens, only the ends are read.
inline std::vector<std::string> describe_data(const Corpus& corpus) {
    std::vector<std::string> list;
    if (corpus.tokenizer) {
        Checksum sum;
        const std::string merges = corpus.tokenizer->merges_text();
        sum.add(merges.data(), merges.size());
        list.push_back(
            format("tokenizer: %d tokens, %s", corpus.tokenizer->vocab_size(), sum.hex().c_str()));
    }
    std::vector<uint16_t> buffer(1 << 16);
    for (const auto* split : {&corpus.train, &corpus.val}) {
        if (!*split) continue;
        for (const Shard& shard : (*split)->files()) {
            Checksum sum;
            const int64_t piece = int64_t(buffer.size()), all = shard.tokens;
            const int64_t stride = all <= 64'000'000 ? piece : std::max(piece, all - piece);
            for (int64_t at = 0; at < all; at += stride) {
                const int64_t count = std::min(piece, all - at);
                shard.read(buffer.data(), at, count);
                sum.add(buffer.data(), 2 * size_t(count));
            }
            list.push_back(format("%s: %lld tokens, %s", split == &corpus.train ? "train" : "val",
                                  (long long)all, sum.hex().c_str()));
        }
    }
    return list;
}

template <class Device>
class Trainer {
public:
    Trainer(const Options& options, Corpus& corpus, Gpt2<Device>& model)
        : o_(options), corpus_(corpus), model_(model), B_(o_.batch_size), T_(model.T),
          order_(*corpus.train, B_, T_, o_.seed, o_.shuffle, o_.overfit_batch),
          token_bytes_(corpus.token_bytes()) {
        if (corpus.has_val()) windows_ = evaluation_windows(*corpus.val, T_, document_start());
    }

    // Trains from state.step to the end; returns the exit status. `from`: the checkpoint that the
    // state is of, or empty.
    int run(TrainerState state, const std::string& from);

private:
    enum class End { none, finished, out_of_time, plateau, interrupted };

    // the plan
    int document_start() const {
        return std::isfinite(corpus_.floor) && corpus_.tokenizer ? corpus_.tokenizer->end_of_text()
                                                                 : -1;
    }
    int64_t rows_per_step() const { return int64_t(B_) * o_.grad_accum_steps; }
    bool due(int64_t interval) const { return interval > 0 && state_.step % interval == 0; }
    int64_t planned_steps();
    StepOptions step_options() const;
    End end_reached() const;
    // the step
    void begin(TrainerState state, const std::string& from);
    std::vector<Batch> read_step(BatchLoader& loader);
    bool waited_for(int64_t step) const;
    void queue_step(BatchLoader& loader);
    LogRow row_now() const;
    LogRow one_step(BatchLoader& loader);
    void check_broken(LogRow& row);
    // watching
    void evaluate_into(LogRow& row);
    void note_best(const LogRow& row);
    void close_epoch(std::string& title, int64_t epoch);
    void write_sample(const std::string& title, int count);
    void tensor_stats(const std::vector<typename Device::Real>& before);
    void show(const LogRow& row, bool keep);
    std::string verdict() const;
    void report(End end);
    // files
    void write_row(LogRow& row);
    void restore_log(const std::string& from);
    void check_data_unchanged();
    bool try_save(const std::string& name, bool with_moments);
    bool save(bool finished);

    const Options& o_;
    Corpus& corpus_;
    Gpt2<Device>& model_;
    int B_, T_;
    DataOrder order_;
    std::vector<int> token_bytes_;
    std::vector<Window> windows_;
    std::optional<Log> log_;
    TrainerState state_;
    std::vector<std::array<int64_t, 4>> stamps_;
    int64_t steps_ = 0;
    int64_t queued_ = 0;  // steps that the device was given; state_.step: whose numbers are known
    double peak_flops_ = 0, step_seconds_ = 0;  // the latter smoothed
    double began_ = 0;                          // when the step began that is under way
    bool warned_ = false;
    std::vector<CurvePoint> train_curve_, val_curve_;
};

template <class Device>
StepOptions Trainer<Device>::step_options() const {
    StepOptions s;
    s.grad_accum_steps = int(o_.grad_accum_steps), s.seed = o_.seed;
    s.rate = {o_.schedule, o_.learning_rate, o_.min_lr_fraction, o_.warmup_steps, steps_};
    s.adamw = {o_.beta1, o_.beta2, o_.eps, o_.weight_decay};
    s.guards = {o_.grad_clip, o_.skip_outliers};
    return s;
}

// How many steps the options ask for: steps or epochs, whichever is fewer; or what fits into
// --max-minutes, measured on three trial steps.
template <class Device>
int64_t Trainer<Device>::planned_steps() {
    int64_t steps = o_.max_steps > 0 ? o_.max_steps : std::numeric_limits<int64_t>::max();
    const double blocks = double(order_.blocks_per_epoch());
    if (o_.epochs > 0) {
        const double wanted = std::ceil(o_.epochs * blocks / double(rows_per_step()) - 1e-9);
        steps = std::min(steps, int64_t(std::clamp(wanted, 1.0, 1e15)));
    }
    if (steps < std::numeric_limits<int64_t>::max()) return steps;
    // Only --max-minutes: time three steps without an update.
    Batch batch;
    batch.resize(B_, T_);
    fill_batch(batch, *corpus_.train, order_, 0, model_.config.vocab_size);
    double begin = 0;
    for (int i = 0; i < 4; ++i) {
        if (i == 1) begin = now_seconds();
        set_batch(model_, batch);
        const Pass pass{B_, T_};
        forward(model_, pass);
        backward(model_, pass, 1.0, true);
        model_.device.gradient_norm(model_.state, model_.grads, model_.layout.size);
        model_.device.synchronize();
    }
    const double a_step = (now_seconds() - begin) / 3 * double(o_.grad_accum_steps) * 1.1;
    return std::max<int64_t>(1, int64_t(o_.max_minutes * 60 / a_step));
}

template <class Device>
std::vector<Batch> Trainer<Device>::read_step(BatchLoader& loader) {
    std::vector<Batch> batches;
    for (int i = 0; i < o_.grad_accum_steps; ++i) batches.push_back(loader.next());
    return batches;
}

// A row that knows where the run stands, and nothing measured yet.
template <class Device>
LogRow Trainer<Device>::row_now() const {
    LogRow row;
    row.step = state_.step;
    row.epoch = double(state_.samples) / double(order_.blocks_per_epoch());
    row.tokens = state_.samples * T_;
    return row;
}

// Whether anything but the next step needs the model as this step leaves it: then the device must
// not be given the next step yet.
template <class Device>
bool Trainer<Device>::waited_for(int64_t step) const {
    auto is_due = [](int64_t at, int64_t interval) { return interval > 0 && at % interval == 0; };
    const int64_t samples = state_.samples + (step - state_.step) * rows_per_step();
    return step >= steps_ || is_due(step, o_.eval_interval) || is_due(step, o_.save_interval) ||
           is_due(step, o_.sample_interval) || is_due(step, o_.tensor_stats_interval) ||
           is_due(step + 1, o_.tensor_stats_interval) ||
           order_.epoch(samples) > order_.epoch(samples - rows_per_step()) || stop_asked() != 0 ||
           (o_.max_minutes > 0 && state_.seconds > o_.max_minutes * 60);
}

// Gives the device one more step to do.
template <class Device>
void Trainer<Device>::queue_step(BatchLoader& loader) {
    const std::vector<Batch> batches = read_step(loader);
    if (queued_ == state_.step) began_ = now_seconds();
    train_step(model_, batches, step_options(), queued_++);
    model_.device.post(model_.state);
}

// Makes one update; the row has its loss and norm, both from before it. Where the device may be
// late it has the step after this one to do while the host waits for the numbers of this one.
template <class Device>
LogRow Trainer<Device>::one_step(BatchLoader& loader) {
    const bool stats =
        o_.tensor_stats_interval > 0 && (state_.step + 1) % o_.tensor_stats_interval == 0;
    std::vector<typename Device::Real> before;
    if (stats) before = model_.get_weights();
    while (queued_ == state_.step ||
           (queued_ - state_.step <= Device::kStepsBehind && !waited_for(queued_)))
        queue_step(loader);
    state_.guards = model_.device.fetch(model_.state);
    const double now = now_seconds(), seconds = now - std::exchange(began_, now);

    ++state_.step;
    state_.samples += rows_per_step();
    state_.seconds += seconds;
    step_seconds_ = step_seconds_ > 0 ? 0.9 * step_seconds_ + 0.1 * seconds : seconds;
    const double tokens_a_second = double(rows_per_step()) * T_ / seconds;
    LogRow row = row_now();
    row.train_loss = state_.guards.loss, row.grad_norm = state_.guards.grad_norm,
    row.lr = state_.guards.lr;
    row.tokens_per_s = tokens_a_second;
    if (peak_flops_ > 0)
        row.mfu = tokens_a_second * flops_per_token(model_.config, T_) / peak_flops_;
    if (state_.guards.skip) row.lr = 0.0;  // so that the log keeps what was skipped
    state_.train_loss = state_.guards.loss;
    if (!state_.guards.broken) state_.epoch_loss += state_.guards.loss, ++state_.epoch_steps;
    train_curve_.push_back({state_.step, state_.guards.loss});
    if (stats) tensor_stats(before);
    return row;
}

// Norms of weight, gradient and update of every tensor, on request.
template <class Device>
void Trainer<Device>::tensor_stats(const std::vector<typename Device::Real>& before) {
    const auto after = model_.get_weights();
    std::vector<typename Device::Gradient> grads(model_.layout.size);
    model_.device.download(grads.data(), model_.grads, grads.size());
    std::printf("\n%-28s %12s %12s %12s %12s\n",
                format("step %lld", (long long)state_.step).c_str(), "|weight|", "|gradient|",
                "|update|", "update/weight");
    for (const TensorInfo& info : model_.layout.tensors) {
        double weight = 0, gradient = 0, update = 0;
        for (size_t i = info.offset; i < info.offset + info.count; ++i) {
            weight += double(after[i]) * double(after[i]);
            gradient += double(grads[i]) * double(grads[i]);
            update +=
                (double(after[i]) - double(before[i])) * (double(after[i]) - double(before[i]));
        }
        std::printf("%-28s %12.5g %12.5g %12.5g %12.3g\n", info.name.c_str(), std::sqrt(weight),
                    std::sqrt(gradient), std::sqrt(update),
                    std::sqrt(update / std::max(weight, 1e-300)));
    }
}

// The mean loss of the same `count` batches of training text every time, or of all the text where
// that is less.
template <class Device>
double fixed_batches_loss(Gpt2<Device>& model, const Shards& shards, int64_t count,
                          bool overfit_batch) {
    const DataOrder fixed(shards, model.B, model.T, 0, !overfit_batch, overfit_batch);
    count = std::min(count, (fixed.blocks_per_epoch() + model.B - 1) / model.B);
    double total = 0;
    int64_t scored = 0;
    Batch batch;
    for (int64_t i = 0; i < count; ++i) {
        batch.resize(model.B, model.T);
        fill_batch(batch, shards, fixed, i * model.B, model.config.vocab_size);
        for (auto loss : batch_losses(model, batch)) total += double(loss);
        scored += batch.scored;
    }
    return total / double(std::max<int64_t>(1, scored));
}

// Scores the validation set, and --eval-batches fixed batches of training text.
template <class Device>
void Trainer<Device>::evaluate_into(LogRow& row) {
    if (!windows_.empty()) {
        const Evaluation e = evaluate(model_, *corpus_.val, windows_, token_bytes_);
        row.val_loss = e.loss(), row.perplexity = e.perplexity();
        if (std::isfinite(corpus_.floor)) row.floor = corpus_.floor;
        state_.val_loss = e.loss();
        val_curve_.push_back({state_.step, e.loss()});
    }
    if (o_.eval_batches > 0)
        row.eval_train_loss =
            fixed_batches_loss(model_, *corpus_.train, o_.eval_batches, o_.overfit_batch);
}

// Is this the best evaluation so far? Counts those without progress, for --patience.
template <class Device>
void Trainer<Device>::note_best(const LogRow& row) {
    const std::optional<double> loss = row.val_loss ? row.val_loss : row.eval_train_loss;
    if (!loss) return;
    const bool better = *loss < state_.best_loss;
    if (better) state_.best_loss = *loss, state_.best_step = state_.step;
    state_.stale_evals = better ? 0 : state_.stale_evals + 1;
}

// A few lines of the model's own text, from the prompt or from the start of a document: printed,
// and added to samples.txt.
template <class Device>
void Trainer<Device>::write_sample(const std::string& title, int count) {
    const int end = corpus_.tokenizer ? corpus_.tokenizer->end_of_text() : -1;
    std::vector<int32_t> tokens =
        prompt_tokens(o_.prompt, corpus_.tokenizer, model_.config.vocab_size);
    if (end >= 0) tokens.insert(tokens.begin(), end);
    if (tokens.empty()) tokens.push_back(0);
    SampleOptions s;
    s.max_new_tokens = count, s.seed = o_.seed, s.end_of_text = end;
    std::string text = o_.prompt + (o_.prompt.empty() || end >= 0 ? "" : " ");
    generate(model_, tokens, s, [&](int token) {
        text += corpus_.text_of(token);
        return true;
    });
    Utf8Stream stream;
    std::string shown = stream.add(text);
    shown += stream.finish();
    std::printf("\n%s\n%s\n\n", title.c_str(), shown.c_str());
    const std::string path = o_.output + "/samples.txt";
    const std::string entry = "=== " + title + "\n" + shown + "\n\n";
    FileHandle file(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
    if (file.fd < 0 || sys_write(file.fd, path, entry.data(), entry.size()) < 0)
        std::fprintf(stderr, "warning: cannot write %s: %s\n", path.c_str(), std::strerror(errno));
}

// An epoch has ended: counts anew, and sets what to say about it. Epochs of a few steps come too
// fast to say anything.
template <class Device>
void Trainer<Device>::close_epoch(std::string& title, int64_t epoch) {
    const double mean = state_.epoch_loss / double(std::max<int64_t>(1, state_.epoch_steps));
    if (order_.blocks_per_epoch() >= 10 * rows_per_step())
        title = format("epoch %lld ends at step %lld: mean train loss %.4f", (long long)epoch + 1,
                       (long long)state_.step, mean);
    state_.epoch_loss = 0, state_.epoch_steps = 0;
}

// A shard that was written to while we train has changed what we learn from. Nothing that came
// after the last save may be kept then.
template <class Device>
void Trainer<Device>::check_data_unchanged() {
    const auto stamps = shard_stamps(corpus_);
    if (stamps == stamps_) return;
    TINYGPT_CHECK(
        describe_data(corpus_) == state_.data,
        "the training or validation data was changed during the run: nothing was saved at "
        "step %lld. Restore the data and go on from the last checkpoint with --resume auto",
        (long long)state_.step);
    stamps_ = stamps;  // touched, or replaced by a new file: what we have open is still the same
}

// Saves under the run's folder. A full disk is a warning: the last good checkpoint is untouched,
// and training can go on. Returns whether it was saved.
template <class Device>
bool Trainer<Device>::try_save(const std::string& name, bool with_moments) {
    check_data_unchanged();
    try {
        log_->sync();  // first, so that no checkpoint is ahead of its log
        save_checkpoint(model_, o_.output + "/" + name,
                        corpus_.tokenizer ? &*corpus_.tokenizer : nullptr, state_, with_moments);
        return true;
    } catch (const FileError& e) {
        if (e.code != ENOSPC && e.code != EDQUOT && e.code != EFBIG) {
            fail(
                format("%s; %s was not saved at step %lld, and training stops, because the next "
                       "save "
                       "would fail too. Checkpoints that are in %s are whole: --resume auto",
                       e.what(), name.c_str(), (long long)state_.step, o_.output.c_str()));
        }
        std::fprintf(stderr, "\nwarning: %s; %s was not saved at step %lld, training goes on\n",
                     e.what(), name.c_str(), (long long)state_.step);
        return false;
    }
}

template <class Device>
bool Trainer<Device>::save(bool finished) {
    state_.finished = finished;
    if (!try_save("checkpoint-" + std::to_string(state_.step), true)) return false;
    try {
        remove_old_checkpoints(o_.output, o_.keep);
    } catch (const FileError& e) {
        std::fprintf(stderr, "\nwarning: %s; an old checkpoint stays\n", e.what());
    }
    return true;
}

// The live line. It stays on the terminal when `keep` is set; otherwise the next one overwrites it.
template <class Device>
void Trainer<Device>::show(const LogRow& row, bool keep) {
    const bool live = ::isatty(STDOUT_FILENO);
    if (!live && !keep) return;
    std::string line = format("step %lld/%lld", (long long)row.step, (long long)steps_);
    if (row.train_loss) line += format(" | loss %.4f", *row.train_loss);
    if (row.val_loss)
        line += format(" | val %.4f (perplexity %.2f)", *row.val_loss, *row.perplexity);
    if (row.eval_train_loss) line += format(" | fixed train %.4f", *row.eval_train_loss);
    if (row.lr) line += format(" | lr %.2e | norm %.3f", *row.lr, *row.grad_norm);
    if (row.tokens_per_s)
        line += format(" | %s tok/s", with_commas(int64_t(*row.tokens_per_s)).c_str());
    if (row.mfu) line += format(" | MFU %.0f%%", 100 * *row.mfu);
    if (row.train_loss)
        line += " | " + duration_text(double(steps_ - row.step) * step_seconds_) + " left";
    std::printf("%s%s%s", live ? "\r\033[K" : "", line.c_str(), keep ? "\n" : "");
    std::fflush(stdout);
}

// Goes on with the log of the run that the checkpoint `from` is of, and with its curves.
template <class Device>
void Trainer<Device>::restore_log(const std::string& from) {
    const int64_t step = state_.step;
    const std::vector<std::string> rows =
        from.empty() ? std::vector<std::string>{}
                     : read_log_rows(parent_folder(from) + "/log.csv", step);
    if (!from.empty() && int64_t(rows.size()) != step + 1)
        std::fprintf(stderr, "warning: %s/log.csv has %zu of the %lld rows up to step %lld\n",
                     parent_folder(from).c_str(), rows.size(), (long long)step + 1,
                     (long long)step);
    const size_t train_loss = 3, val_loss = 5;
    for (const std::string& row : rows) {
        const int64_t at = std::strtoll(row.c_str(), nullptr, 10);
        if (const double loss = log_field(row, train_loss); !std::isnan(loss))
            train_curve_.push_back({at, loss});
        if (const double loss = log_field(row, val_loss); !std::isnan(loss))
            val_curve_.push_back({at, loss});
    }
    log_.emplace(o_.output + "/log.csv", rows);
}

// Opens the log, evaluates the model as it is (row 0), and says how long the run will be.
template <class Device>
void Trainer<Device>::begin(TrainerState state, const std::string& from) {
    state_ = std::move(state);
    stamps_ = shard_stamps(corpus_);
    steps_ = state_.planned_steps > 0 ? state_.planned_steps : planned_steps();
    state_.planned_steps = steps_, queued_ = state_.step;
    peak_flops_ = model_.device.peak_flops();
    model_.device.upload(model_.state, &state_.guards, 1);
    for (const std::string& name : set_aside_later(o_.output, from.empty() ? -1 : state_.step))
        std::printf("set aside  %s, as %s.set-aside\n", name.c_str(), name.c_str());
    restore_log(from);
    std::printf("run        %s steps of %s tokens (%.2f epochs) into %s\n\n",
                with_commas(steps_).c_str(), with_commas(rows_per_step() * T_).c_str(),
                double(steps_) * double(rows_per_step()) / double(order_.blocks_per_epoch()),
                o_.output.c_str());
    if (!from.empty()) return;
    LogRow row = row_now();
    if (o_.eval_interval > 0) evaluate_into(row);
    show(row, true);
    write_row(row);
}

// A row of the step just made. A disk that is full does not stop training: rows wait in memory.
template <class Device>
void Trainer<Device>::write_row(LogRow& row) {
    row.seconds = state_.seconds;
    if (!log_->add(row) && !std::exchange(warned_, true))
        std::fprintf(stderr, "\nwarning: cannot write %s/log.csv: %s; rows wait in memory\n",
                     o_.output.c_str(), std::strerror(errno));
}

// Whether the run is over after this step, and why.
template <class Device>
typename Trainer<Device>::End Trainer<Device>::end_reached() const {
    if (queued_ > state_.step) return End::none;  // a step is under way: it is waited for first
    if (state_.step >= steps_) return End::finished;
    if (o_.patience > 0 && state_.stale_evals >= o_.patience) return End::plateau;
    if (o_.max_minutes > 0 && state_.seconds > o_.max_minutes * 60) return End::out_of_time;
    if (stop_asked() != 0) return End::interrupted;
    return End::none;
}

// A NaN or an infinity was met, or an outlier, and the update was not made. With --on-nan stop the
// former ends the run: the row is logged, nothing of the step is saved.
template <class Device>
void Trainer<Device>::check_broken(LogRow& row) {
    const StepState& g = state_.guards;
    if (!g.skip) return;
    if (g.broken && o_.on_nan == "stop") {
        write_row(row);
        fail(
            format("step %lld: the loss is %g and the gradient's norm %g: training has diverged. "
                   "Nothing of this step was saved. Go on from the last checkpoint with a lower "
                   "--learning-rate, --resume auto and --override, or pass over such steps with "
                   "--on-nan skip",
                   (long long)state_.step, g.loss, g.grad_norm));
    }
    const bool power_of_two = (g.skipped & (g.skipped - 1)) == 0;
    if (g.skipped <= 4 || power_of_two)  // the more there are, the less is said
        std::fprintf(stderr,
                     "\nwarning: step %lld was skipped: loss %g, norm %g (%s; %lld so far)\n",
                     (long long)state_.step, g.loss, g.grad_norm,
                     g.broken ? "not a number" : "an outlier", (long long)g.skipped);
}

template <class Device>
int Trainer<Device>::run(TrainerState state, const std::string& from) {
    begin(std::move(state), from);
    BatchLoader loader(*corpus_.train, order_, B_, T_, model_.config.vocab_size, state_.samples);
    End end = End::none;
    while (end == End::none && state_.step < steps_) {
        const int64_t epoch = order_.epoch(state_.samples);
        LogRow row = one_step(loader);
        check_broken(row);
        const bool last = state_.step == steps_;
        const bool evaluated = o_.eval_interval > 0 && (due(o_.eval_interval) || last);
        if (evaluated) evaluate_into(row), note_best(row);
        write_row(row);
        end = end_reached();
        show(row, evaluated || end != End::none || due(o_.log_interval));
        // Save first, then write samples: they take time, and may be waited for no longer.
        std::string title;
        if (due(o_.sample_interval)) title = format("sample at step %lld", (long long)state_.step);
        if (order_.epoch(state_.samples) > epoch) close_epoch(title, epoch);
        if (evaluated && state_.best_step == state_.step) try_save("best", false);
        if (end != End::none || due(o_.save_interval)) {
            const bool saved = save(end != End::none && end != End::interrupted);
            TINYGPT_CHECK(saved || end == End::none,
                          "the run has ended at step %lld, but it could not be saved there: make "
                          "room "
                          "and type --resume auto to make the last steps again",
                          (long long)state_.step);
        }
        if (!title.empty() && end != End::interrupted) write_sample(title, 50);
    }
    if (end != End::interrupted) return report(end), 0;
    std::printf("\ninterrupted: saved at step %lld; go on with --resume auto\n",
                (long long)state_.step);
    return 130;
}

// What the run says about itself: still improving, flat, or overfitting; from its last evaluations.
template <class Device>
std::string Trainer<Device>::verdict() const {
    const size_t evaluations = val_curve_.size();
    if (evaluations < 4)
        return "too few evaluations to judge the curve (--eval-interval sets how many)";
    const CurvePoint& last = val_curve_.back();
    const CurvePoint& before = val_curve_[evaluations - 1 - (evaluations + 3) / 4];
    const double gain = 100 * (before.loss - last.loss) / before.loss;
    const double above_best = 100 * (last.loss - state_.best_loss) / state_.best_loss;
    std::string text;
    if (above_best > 1)
        text = format(
            "overfitting: validation loss rose %.1f %% above its best (step %lld, kept in "
            "best/); more text, --dropout 0.1 or --patience 3 would help",
            above_best, (long long)state_.best_step);
    else if (gain > 1)
        text = format(
            "still improving: validation loss fell %.1f %% in the last quarter; a longer "
            "run would gain",
            gain);
    else
        text = format(
            "flat: validation loss changed by %.1f %% in the last quarter; a larger --model "
            "would gain more than a longer run",
            -gain);
    if (std::isfinite(corpus_.floor))
        text += format(
            "\n           it is %.1f %% above the floor, the loss of the process that "
            "wrote the text",
            100 * (last.loss / corpus_.floor - 1));
    return text;
}

// The end: the curve, the verdict, a sample, and what to type next.
template <class Device>
void Trainer<Device>::report(End end) {
    const char* why = end == End::plateau       ? "stopped early: no progress (--patience)"
                      : end == End::out_of_time ? "time is up (--max-minutes)"
                                                : "done";
    std::printf("\n%s: %lld steps in %s\n\n%s\n", why, (long long)state_.step,
                duration_text(state_.seconds).c_str(),
                draw_curve(train_curve_, val_curve_, corpus_.floor).c_str());
    if (std::isfinite(state_.val_loss)) {
        std::printf("val loss   %.4f, best %.4f at step %lld", state_.val_loss, state_.best_loss,
                    (long long)state_.best_step);
        if (std::isfinite(corpus_.floor))
            std::printf("; the floor is %.4f, so the ratio is %.4f", corpus_.floor,
                        state_.val_loss / corpus_.floor);
        std::printf("\nverdict    %s\n", verdict().c_str());
    }
    if (state_.guards.skipped)
        std::printf("guards     %lld updates were skipped, %lld of them as outliers\n",
                    (long long)state_.guards.skipped, (long long)state_.guards.outliers);
    write_sample("the model writes:", 100);
    const std::string best = o_.output + "/best";
    const std::string from = folder_exists(best) ? best : checkpoint_folder(o_.output, state_.step);
    std::printf("next       ./%s sample --init-from %s --prompt \"%s\"\n", Device::kProgram,
                from.c_str(), corpus_.tokenizer ? "Once" : "");
    std::printf("           ./%s eval --init-from %s%s\n", Device::kProgram, from.c_str(),
                corpus_.folder.empty() ? "" : (" --data " + corpus_.folder).c_str());
}

// ---- The commands ----------------------------------------------------------------------------

// The run's folder: --output, or that of the checkpoint to resume, or out/ and the data's name.
inline std::string output_folder(const Options& o) {
    if (!o.output.empty()) return o.output;
    if (!o.resume.empty() && o.resume != "auto") return parent_folder(o.resume);
    std::string name = o.train_shards.empty() ? o.data : "run";
    while (name.size() > 1 && name.back() == '/') name.pop_back();
    const size_t slash = name.rfind('/');
    if (slash != std::string::npos) name = name.substr(slash + 1);
    return "out/" + (name.empty() || name == "." || name == ".." ? "run" : name);
}

inline int sequence_length(const Options& o, const Config& config) {
    if (o.seq_len == 0) return std::min(128, config.n_positions);
    if (o.seq_len > config.n_positions)
        fail_usage(
            format("--seq-len %d is longer than the model's %d positions: shorten it, or raise "
                   "--n-positions",
                   int(o.seq_len), config.n_positions));
    return int(o.seq_len);
}

// Refuses data that is too short, or holds tokens that the model does not have.
inline void check_data(const Options& o, const Corpus& corpus, const Config& config, int T) {
    const int64_t batch = int64_t(o.batch_size) * T;
    int64_t predictions = 0;
    for (const Shard& shard : corpus.train->files())
        predictions += std::max<int64_t>(0, shard.tokens - 1);
    if (predictions < batch)
        fail_usage(
            format("the training data has %s tokens, but one batch of %d x %d needs %s (one "
                   "more than its size): take a smaller --batch-size or --seq-len, or more text",
                   with_commas(corpus.train->tokens()).c_str(), o.batch_size, T,
                   with_commas(batch + 1).c_str()));
    if (o.overfit_batch && corpus.train->files()[0].tokens < batch + 1)
        fail_usage(
            "--overfit-batch takes its batch from the first shard, which is too short for it");
    if (o.patience > 0 && !corpus.has_val() && o.eval_batches == 0)
        fail_usage("--patience needs something to evaluate: validation data, or --eval-batches");
    prompt_tokens(o.prompt, corpus.tokenizer, config.vocab_size);
    const int64_t quick = 200'000'000;  // tokens; more are checked as they are read
    if (corpus.train->tokens() <= quick) corpus.train->check_tokens(config.vocab_size);
    if (corpus.has_val() && corpus.val->tokens() <= quick)
        corpus.val->check_tokens(config.vocab_size);
}

// Where a run begins: afresh, or at a checkpoint that verifies.
struct Start {
    std::string folder;  // of the checkpoint; empty: afresh
    TrainerState state;
};

// A folder that holds a run already is not written over; only a run that resumes it goes on there.
inline void check_output(const Options& o) {
    const bool holds_run = !checkpoint_steps(o.output).empty() ||
                           file_exists(o.output + "/log.csv") || folder_exists(o.output + "/best");
    if (!holds_run || o.resume == "auto") return;
    struct stat output {
    }, resumed{};
    if (!o.resume.empty() && ::stat(o.output.c_str(), &output) == 0 &&
        ::stat(parent_folder(o.resume).c_str(), &resumed) == 0 && output.st_dev == resumed.st_dev &&
        output.st_ino == resumed.st_ino)
        return;
    fail(format("%s already holds a run: go on with --resume auto, or give another --output",
                o.output.c_str()));
}

// The newest checkpoint that verifies; says which were passed over, and why.
inline Start find_start(const Options& o) {
    if (o.resume.empty()) return {};
    if (o.resume != "auto") return {o.resume, verify_checkpoint(o.resume)};
    bool any = false;
    for (int64_t step : checkpoint_steps(o.output)) {
        const std::string folder = checkpoint_folder(o.output, step);
        any = true;
        try {
            return {folder, verify_checkpoint(folder)};
        } catch (const Error& e) {
            std::fprintf(stderr, "passing over %s: %s\n", folder.c_str(), e.what());
        }
    }
    TINYGPT_CHECK(!any,
                  "no checkpoint in %s is whole: nothing to resume. Remove the folder to start "
                  "again",
                  o.output.c_str());
    return {};
}

// What was left to the program to choose, as if the user had said so: a checkpoint remembers it.
template <class Device>
void settle(Options& o, const Config& config, int T) {
    o.n_layer = config.n_layer, o.n_head = config.n_head, o.n_embd = config.n_embd;
    o.n_positions = config.n_positions, o.vocab_size = config.vocab_size;
    o.untied_head = config.untied_head, o.seq_len = T;
    if (o.precision.empty() && Device::kHostMemory) o.precision = "fp32";
}

// A resumed run must be the run that was interrupted: names what has changed. Why not the paths:
// data that was moved is the same data, and is known by its checksums; weights that the run once
// began with have become the checkpoint's.
inline void check_same_run(const Options& o, const Start& start, const Corpus& corpus,
                           const std::string& program) {
    const std::set<std::string> paths = {"data", "train-shards", "val-shards", "init-from"};
    const std::string advice = "or say --override to go on all the same";
    auto value = [](const std::string& text) { return text.empty() ? "(not set)" : text; };
    for (auto& [name, now] : options_that_change_numbers(o))
        for (auto& [saved_name, saved] : start.state.options)
            if (name == saved_name && now != saved && !paths.count(name))
                fail_usage(
                    format("%s was made with --%s %s, now it is %s: resume with the same "
                           "options, %s",
                           start.folder.c_str(), name.c_str(), value(saved).c_str(),
                           value(now).c_str(), advice.c_str()));
    if (start.state.program != program)
        fail_usage(
            format("%s was made by ./%s, whose sums are rounded differently: resume with that, "
                   "%s",
                   start.folder.c_str(), start.state.program.c_str(), advice.c_str()));
    const std::vector<std::string> now = describe_data(corpus), &saved = start.state.data;
    for (size_t i = 0; i < std::max(now.size(), saved.size()); ++i) {
        const std::string a = i < saved.size() ? saved[i] : "none",
                          b = i < now.size() ? now[i] : "none";
        if (a != b)
            fail_usage(
                format("the data has changed since %s was saved (%s; now %s): resume with the "
                       "same data, %s",
                       start.folder.c_str(), a.c_str(), b.c_str(), advice.c_str()));
    }
}

// Sets the model's weights, and when it resumes its moments, to where the run begins.
template <class Device>
void load_start(Gpt2<Device>& model, const Options& o, const Start& start) {
    if (!start.folder.empty()) {
        load_weights(model, start.folder), load_moments(model, start.folder);
        std::printf("resumed    %s\n", start.folder.c_str());
    } else if (!o.init_from.empty()) {
        load_weights(model, o.init_from);
        std::printf("weights    from %s\n", o.init_from.c_str());
    } else {
        model.initialise(o.seed);
    }
}

// Trains. Everything that can be refused is refused before anything is printed or written.
template <class Device>
int train_command(Device device, const Options& given) {
    Options o = given;
    o.output = output_folder(o);
    Corpus corpus = open_corpus(o, true);
    check_output(o);
    std::optional<FileHandle> lock;
    if (!o.resume.empty() && folder_exists(o.output)) {
        lock.emplace(lock_folder(o.output));
        recover_folders(o.output);
    }
    Start start = find_start(o);
    const bool resumed = !start.folder.empty();
    const Config config = config_for(o, corpus, start.folder);
    const int T = sequence_length(o, config);
    settle<Device>(o, config, T);
    if (!o.init_from.empty() && !resumed) check_same_tokenizer(corpus, o.init_from);
    check_data(o, corpus, config, T);
    if (resumed && !o.override_changes) {
        check_same_run(o, start, corpus, Device::kProgram);
        if (start.state.finished) {
            std::printf("%s is finished: %lld steps. Nothing to do\n", o.output.c_str(),
                        (long long)start.state.step);
            return 0;
        }
    }
    const MemoryNeed need = check_memory(device, config, o.batch_size, T, Use::training);
    Gpt2<Device> model(config, device);
    model.reserve(o.batch_size, T, Use::training);
    make_folders(o.output);
    if (!lock) lock.emplace(lock_folder(o.output));

    std::printf("tinygpt    %s\n%s", device.describe().c_str(), describe(o).c_str());
    std::printf("data       %s: %s training tokens, %s for validation\n",
                corpus.folder.empty() ? "shards" : corpus.folder.c_str(),
                with_commas(corpus.train->tokens()).c_str(),
                with_commas(corpus.has_val() ? corpus.val->tokens() : 0).c_str());
    print_model(config, model.layout, need, T);
    load_start(model, o, start);
    if (o.override_changes) start.state.planned_steps = 0;  // the plan may have changed
    start.state.options = options_that_change_numbers(o);
    start.state.data = describe_data(corpus), start.state.program = Device::kProgram;
    catch_signals();
    return Trainer<Device>(o, corpus, model).run(start.state, start.folder);
}

// A model opened for use: from a folder, with its tokenizer where it has one.
inline std::optional<Tokenizer> tokenizer_of(const std::string& folder) {
    if (file_exists(folder + "/vocab.json") || file_exists(folder + "/encoder.json"))
        return Tokenizer::load(folder);
    return std::nullopt;
}
inline void need_init_from(const Options& o) {
    if (o.init_from.empty())
        fail_usage("--init-from is missing: name the folder of a model, such as out/stories/best");
}

// ---- HellaSwag: which of four endings fits? --------------------------------------------------
// The file is llm.c's (facts in its dev/data/hellaswag.py): 256 int32 header 20240522, 1, examples,
// longest; then for each example, as uint16: 65535, its bytes, index, label, 4, the context's size
// and tokens, and four times an ending's length and tokens. The ending of the lowest mean loss is
// the model's answer.

struct HellaswagExample {
    int label = 0;
    std::vector<uint16_t> context;
    std::vector<uint16_t> endings[4];
};

inline std::vector<HellaswagExample> read_hellaswag(const std::string& path, int vocab_size) {
    const std::string bytes = read_file(path, size_t(1) << 30);
    int32_t header[256] = {};
    TINYGPT_CHECK(bytes.size() >= sizeof header,
                  "%s: expected a header of 1024 bytes, found %zu bytes", path.c_str(),
                  bytes.size());
    std::memcpy(header, bytes.data(), sizeof header);
    TINYGPT_CHECK(header[0] == 20240522 && header[1] == 1,
                  "%s is no HellaSwag file: expected 20240522 and version 1, "
                  "found %d and %d",
                  path.c_str(), header[0], header[1]);
    size_t at = sizeof header;
    auto next = [&]() -> int {
        TINYGPT_CHECK(at + 2 <= bytes.size(), "%s ends in the middle of an example", path.c_str());
        uint16_t value;
        std::memcpy(&value, bytes.data() + at, 2);
        at += 2;
        return value;
    };
    auto tokens = [&] {
        std::vector<uint16_t> list(static_cast<size_t>(next()));
        for (uint16_t& token : list) {
            const int id = next();
            TINYGPT_CHECK(id < vocab_size, "%s: token %d is outside the vocabulary of %d",
                          path.c_str(), id, vocab_size);
            token = uint16_t(id);
        }
        return list;
    };
    std::vector<HellaswagExample> examples;
    for (int32_t i = 0; i < header[2]; ++i) {
        HellaswagExample e;
        const int start = next();
        next(), next();
        e.label = next();
        const int endings = next();
        TINYGPT_CHECK(start == 65535 && endings == 4 && e.label < 4, "%s: example %d is damaged",
                      path.c_str(), i);
        e.context = tokens();
        for (auto& ending : e.endings) {
            ending = tokens();
            TINYGPT_CHECK(!e.context.empty() && !ending.empty(), "%s: example %d is empty",
                          path.c_str(), i);
        }
        examples.push_back(std::move(e));
    }
    TINYGPT_CHECK(at == bytes.size(), "%s goes on after its %d examples: it is damaged",
                  path.c_str(), header[2]);
    return examples;
}

// The mean loss of each ending after its context; a text too long for T loses its beginning.
template <class Device>
std::array<double, 4> score_endings(Gpt2<Device>& model, const HellaswagExample& e) {
    size_t longest = 0;
    for (const auto& ending : e.endings)
        longest = std::max(longest, e.context.size() + ending.size() - 1);
    const size_t T =
        std::min(size_t(model.T), longest);  // no longer than the texts are: most are short
    Batch batch;
    batch.resize(4, int(T));
    for (size_t i = 0; i < 4; ++i) {
        std::vector<uint16_t> text = e.context;
        text.insert(text.end(), e.endings[i].begin(), e.endings[i].end());
        const size_t room = T + 1, cut = text.size() > room ? text.size() - room : 0;
        for (size_t t = cut; t + 1 < text.size(); ++t) {
            const size_t place = i * T + t - cut;
            batch.inputs[place] = text[t];
            if (t + 1 >= e.context.size()) batch.targets[place] = text[t + 1];
        }
    }
    batch.sort_rows();
    const auto losses = batch_losses(model, batch);
    std::array<double, 4> mean{};
    for (size_t i = 0; i < 4; ++i) {
        int count = 0;
        for (size_t t = 0; t < T; ++t)
            if (batch.targets[i * T + t] >= 0) mean[i] += double(losses[i * T + t]), ++count;
        mean[i] /= std::max(1, count);
    }
    return mean;
}

template <class Device>
int hellaswag_command(Device device, const Options& o, const Config& config) {
    const auto examples = read_hellaswag(o.hellaswag, config.vocab_size);
    const int T = o.seq_len ? sequence_length(o, config) : config.n_positions;
    check_memory(device, config, 4, T, Use::evaluation);
    Gpt2<Device> model(config, device);
    model.reserve(4, T, Use::evaluation);
    load_weights(model, o.init_from);
    int64_t right = 0;
    for (const HellaswagExample& e : examples) {
        const std::array<double, 4> loss = score_endings(model, e);
        right += std::min_element(loss.begin(), loss.end()) - loss.begin() == e.label;
    }
    std::printf("hellaswag  %lld of %zu right: accuracy %.4f\n", (long long)right, examples.size(),
                double(right) / double(std::max<size_t>(1, examples.size())));
    return 0;
}

template <class Device>
int eval_command(Device device, const Options& o) {
    need_init_from(o);
    const Config config = config_of_folder(o.init_from);
    if (!o.hellaswag.empty()) return hellaswag_command(device, o, config);
    Corpus corpus = open_corpus(o, false);
    check_same_tokenizer(corpus, o.init_from);
    TINYGPT_CHECK(corpus.has_val(),
                  "there is no validation data: make some with ./prepare_data --val-fraction, or "
                  "name shards with --val-shards");
    const int T = sequence_length(o, config);
    check_memory(device, config, int(o.batch_size), T, Use::evaluation);
    Gpt2<Device> model(config, device);
    model.reserve(int(o.batch_size), T, Use::evaluation);
    load_weights(model, o.init_from);
    const bool stories = std::isfinite(corpus.floor) && corpus.tokenizer;
    const auto windows =
        evaluation_windows(*corpus.val, T, stories ? corpus.tokenizer->end_of_text() : -1);
    TINYGPT_CHECK(!windows.empty(),
                  "the validation data is too short: at least two tokens are needed");
    const double begin = now_seconds();
    const Evaluation e = evaluate(model, *corpus.val, windows, corpus.token_bytes());
    const double seconds = now_seconds() - begin;
    std::printf("val loss   %.9g nats a token over %s tokens\nperplexity %.4f\n", e.loss(),
                with_commas(e.tokens).c_str(), e.perplexity());
    if (e.bytes > 0) std::printf("bits/byte  %.4f\n", e.bits_per_byte());
    if (std::isfinite(corpus.floor))
        std::printf("floor      %.6f: the loss is %.2f %% above it\n", corpus.floor,
                    100 * (e.loss() / corpus.floor - 1));
    std::printf("speed      %s tokens a second\n",
                with_commas(int64_t(double(e.tokens) / seconds)).c_str());
    if (o.given("eval-batches") && o.eval_batches > 0 && corpus.train && !corpus.train->empty())
        std::printf("train loss %.9g nats a token over fixed batches\n",
                    fixed_batches_loss(model, *corpus.train, o.eval_batches, false));
    return 0;
}

// ---- sample ----------------------------------------------------------------------------------

// The prompt's text: --prompt, or a file, or standard input.
inline std::string prompt_text(const Options& o) {
    if (o.prompt_file.empty()) return o.prompt;
    return read_file(o.prompt_file == "-" ? "/dev/stdin" : o.prompt_file, size_t(1) << 26);
}

// The likeliest next tokens, with their probabilities.
template <class Device>
void show_top(Gpt2<Device>& model, const std::vector<int32_t>& tokens,
              const std::optional<Tokenizer>& tokenizer, int count) {
    const size_t context = size_t(std::min(model.config.n_positions, model.T));
    const std::vector<int32_t> tail(tokens.end() - ptrdiff_t(std::min(tokens.size(), context)),
                                    tokens.end());
    for (const Candidate& c : candidates(next_logits(model, tail, 0), 1, 0, 1)) {
        if (count-- <= 0) break;
        const std::string text = !tokenizer ? ""
                                 : c.token == tokenizer->end_of_text()
                                     ? "<|endoftext|>"
                                     : text_of_token(*tokenizer, c.token);
        std::printf("%8.4f %%  %6d  %s\n", 100 * c.probability, c.token,
                    tokenizer ? in_quotes(text).c_str() : "");
    }
}

template <class Device>
int sample_command(Device device, const Options& o) {
    need_init_from(o);
    const Config config = config_of_folder(o.init_from);
    const std::optional<Tokenizer> tokenizer = tokenizer_of(o.init_from);
    if (tokenizer && tokenizer->vocab_size() > config.vocab_size)
        fail(o.init_from + ": its tokenizer has more tokens than its model");
    check_memory(device, config, 1, config.n_positions, Use::generation);
    const std::string prompt = prompt_text(o);
    std::vector<int32_t> tokens = prompt_tokens(prompt, tokenizer, config.vocab_size);
    if (tokens.empty()) tokens.push_back(tokenizer ? tokenizer->end_of_text() : 0);
    Gpt2<Device> model(config, device);
    model.reserve(1, config.n_positions, Use::generation);
    load_weights(model, o.init_from);
    if (o.show_top > 0) show_top(model, tokens, tokenizer, o.show_top);
    for (int i = 0; o.show_top == 0 && i < o.num_samples; ++i) {
        if (i > 0) std::printf("\n---\n");
        std::fwrite(prompt.data(), 1, prompt.size(), stdout);
        Utf8Stream stream;
        SampleOptions s{int(o.max_new_tokens), o.temperature,
                        int(o.top_k),          o.top_p,
                        o.seed + uint64_t(i),  tokenizer ? tokenizer->end_of_text() : -1};
        int64_t count = 0;
        const double begin = now_seconds();
        const int slides = generate(model, tokens, s, [&](int token) {
            const std::string text = tokenizer ? stream.add(text_of_token(*tokenizer, token))
                                               : std::to_string(token) + " ";
            std::fputs(text.c_str(), stdout);
            std::fflush(stdout);
            return ++count, !std::ferror(stdout);
        });
        std::printf("%s\n", stream.finish().c_str());
        std::fflush(stdout);
        const double seconds = now_seconds() - begin;
        std::fprintf(stderr, "[%lld tokens, %.1f a second]\n", (long long)count,
                     double(count) / seconds);
        if (slides)
            std::fprintf(stderr,
                         "[the text outgrew the model's %d positions: %d times its older half was "
                         "forgotten]\n",
                         config.n_positions, slides);
    }
    return 0;
}

// ---- info ------------------------------------------------------------------------------------

template <class Device>
int info_command(Device device, const Options& o) {
    Corpus corpus;
    if (o.given("data")) corpus = open_corpus(o, false);
    const Config config = config_for(o, corpus);
    const int T = o.seq_len ? sequence_length(o, config) : config.n_positions;
    const Layout layout = layout_of(config);
    std::printf("%-28s %-16s %14s %8s  %s\n", "tensor", "shape", "parameters", "share", "decays");
    for (const TensorInfo& t : layout.tensors)
        std::printf("%-28s %-16s %14s %7.3f%%  %s\n", t.name.c_str(), shape_text(t.shape).c_str(),
                    with_commas(int64_t(t.count)).c_str(),
                    100 * double(t.count) / double(layout.count), t.decays() ? "yes" : "");
    std::printf("%-28s %-16s %14s %7.3f%%\n\n", "total", "",
                with_commas(int64_t(layout.count)).c_str(), 100.0);
    print_model(config, layout, memory_need<Device>(config, int(o.batch_size), T, Use::training),
                T);
    std::printf("           for --batch-size %d --seq-len %d\n", int(o.batch_size), T);
    const double flops = flops_per_token(config, T), peak = device.peak_flops();
    std::printf(
        "time       10 billion tokens take %s at this machine's measured %.0f GFLOP/s, %s at half "
        "of it\n",
        duration_text(1e10 * flops / peak).c_str(), peak / 1e9,
        duration_text(2e10 * flops / peak).c_str());
    return 0;
}

// ---- bench: every layer's speed against what this machine can do -----------------------------
// The functions are those the model calls, on the buffers it calls them with. Going from layer to
// layer rotates the operands, so that for GPT-2's sizes nothing is found in a cache by luck.

// What a function must at least do: operations, and bytes to and from memory.
struct Work {
    double flops = 0, bytes = 0;
};

template <class Device>
class Bench {
public:
    Bench(Device device, const Config& config, int B, int T)
        : config_(config), B_(B), T_(T), model_(config, device) {
        model_.reserve(B, T, Use::training);
        model_.initialise(1);
        batch_.resize(B, T);
        for (size_t i = 0; i < batch_.inputs.size(); ++i) {
            batch_.inputs[i] = int32_t(random_bits(7, i) % uint64_t(config.vocab_size));
            batch_.targets[i] = int32_t(random_bits(8, i) % uint64_t(config.vocab_size));
        }
        batch_.scored = int64_t(batch_.inputs.size());
        batch_.sort_rows();
    }

    void run() {
        measure_peaks();
        const double step = measure_step();
        std::printf("%-22s %6s %10s %12s %12s %10s\n", "function", "calls", "ms a call", "GFLOP/s",
                    "GB/s", "of peak");
        forward_layers(), backward_layers(), update_layers();
        const double flops = flops_per_token(config_, T_) * B_ * T_;
        std::printf("\nsum of the above  %.2f ms; a whole step takes %.2f ms\n", total_ * 1e3,
                    step * 1e3);
        std::printf("whole step        %s tokens a second, %.1f GFLOP/s, %.1f %% of the peak\n",
                    with_commas(int64_t(B_ * T_ / step)).c_str(), flops / step / 1e9,
                    100 * flops / step / peak_flops_);
    }

private:
    using Act = typename Device::Activation;
    static constexpr double kA = sizeof(typename Device::Activation);
    static constexpr double kW = sizeof(typename Device::Weight);
    static constexpr double kG = sizeof(typename Device::Gradient);
    static constexpr double kR = sizeof(typename Device::Real);

    void measure_peaks() {
        peak_flops_ = model_.device.peak_flops();
        peak_bytes_ = model_.device.peak_bandwidth();
        std::printf("machine           %s\n", model_.device.describe().c_str());
        std::printf("measured peaks    %.1f GFLOP/s, %.1f GB/s\n", peak_flops_ / 1e9,
                    peak_bytes_ / 1e9);
        std::printf(
            "model             %d layers, %d heads, %d channels, vocabulary %d; B=%d T=%d\n\n",
            config_.n_layer, config_.n_head, config_.n_embd, config_.vocab_size, B_, T_);
    }

    // Median seconds of f, which makes `calls` calls; runs it for about half a second.
    template <class F>
    double median_seconds(F&& f) {
        std::vector<double> times;
        f(), model_.device.synchronize();
        const double end = now_seconds() + 0.5;
        while (times.size() < 3 || (now_seconds() < end && times.size() < 50)) {
            const double begin = now_seconds();
            f(), model_.device.synchronize();
            times.push_back(now_seconds() - begin);
        }
        std::nth_element(times.begin(), times.begin() + ptrdiff_t(times.size() / 2), times.end());
        return times[times.size() / 2];
    }

    // Times f(layer) over all layers, or f(0) alone, and prints a row.
    template <class F>
    void row(const char* name, int calls, Work work, F&& f) {
        const double seconds = median_seconds([&] {
            for (int i = 0; i < calls; ++i) f(i);
        });
        // A processor slows down when it gets hot: the peak is that of this moment.
        peak_flops_ = model_.device.peak_flops();
        total_ += seconds;
        const double each = seconds / calls;
        const double of_flops = work.flops / each / peak_flops_,
                     of_bytes = work.bytes / each / peak_bytes_;
        // What binds it is the resource that it would need longer for.
        const bool by_flops = work.flops / peak_flops_ > work.bytes / peak_bytes_;
        std::printf("%-22s %6d %10.3f %12.1f %12.1f %8.1f %% of %s\n", name, calls, each * 1e3,
                    work.flops / each / 1e9, work.bytes / each / 1e9,
                    100 * (by_flops ? of_flops : of_bytes), by_flops ? "FLOP/s" : "GB/s");
    }

    double measure_step() {
        StepOptions options;
        options.rate.peak = 1e-5;
        const std::vector<Batch> batches = {batch_};
        int64_t s = 0;
        return median_seconds([&] { train_step(model_, batches, options, s++); });
    }

    // A linear layer [rows, in] x [in, out]: the operations and bytes of one product.
    Work product(double in, double out) const {
        const double rows = double(B_) * T_;
        return {2 * rows * in * out, kA * rows * (in + out) + kW * in * out};
    }

    void forward_layers() {
        auto& a = model_.a;
        auto& w = model_.w;
        Device& d = model_.device;
        const int rows = B_ * T_, C = config_.n_embd, L = config_.n_layer, NH = config_.n_head;
        const double n = rows, c = C;
        auto layer = [&](int i) -> auto& { return a.layers[size_t(i)]; };
        auto p = [&](int i) -> auto& { return w.h[size_t(i)]; };
        row("embed", 1, {0, 3 * kA * n * c},
            [&](int) { d.embed_forward(a.embedded, a.inputs, w.wte, w.wpe, B_, T_, C, 0, {}); });
        row("layernorm", 2 * L, {0, 2 * kA * n * c}, [&](int i) {
            auto& l = layer(i / 2);
            d.layernorm_forward(l.ln_1, l.ln_1_mean, l.ln_1_rstd, l.x_mid, p(i / 2).ln_1_weight,
                                p(i / 2).ln_1_bias, rows, C);
        });
        row("linear c_attn", L, product(c, 3 * c), [&](int i) {
            d.linear_forward(layer(i).qkv, layer(i).ln_1, p(i).c_attn_weight, p(i).c_attn_bias,
                             rows, C, 3 * C);
        });
        // Scores and sums: 2 products of 2 C operations over (T+1)/2 positions for each row.
        row("attention", L, {2 * c * (T_ + 1) * n, 4 * kA * n * c}, [&](int i) {
            d.attention_forward(layer(i).att, layer(i).lse, layer(i).qkv, B_, T_, NH, C / NH, {});
        });
        row("linear attn.c_proj", L, product(c, c), [&](int i) {
            d.linear_residual_forward(layer(i).x_mid, a.embedded, layer(i).att,
                                      p(i).attn_proj_weight, p(i).attn_proj_bias, rows, C, C, {});
        });
        row("linear c_fc, gelu", L, product(c, 4 * c), [&](int i) {
            d.linear_gelu_forward(layer(i).gelu, layer(i).fc, layer(i).ln_2, p(i).c_fc_weight,
                                  p(i).c_fc_bias, rows, C, 4 * C);
        });
        row("linear mlp.c_proj", L, product(4 * c, c), [&](int i) {
            d.linear_residual_forward(layer(i).x_out, layer(i).x_mid, layer(i).gelu,
                                      p(i).mlp_proj_weight, p(i).mlp_proj_bias, rows, 4 * C, C, {});
        });
    }

    void backward_layers() {
        auto& a = model_.a;
        auto& w = model_.w;
        auto& g = model_.g;
        Device& d = model_.device;
        const int rows = B_ * T_, C = config_.n_embd, L = config_.n_layer, NH = config_.n_head;
        const int V = config_.vocab_size;
        const double n = rows, c = C;
        auto layer = [&](int i) -> auto& { return a.layers[size_t(i)]; };
        auto p = [&](int i) -> auto& { return w.h[size_t(i)]; };
        auto dp = [&](int i) -> auto& { return g.h[size_t(i)]; };
        auto twice = [](Work one) { return Work{2 * one.flops, 2 * one.bytes}; };
        row("head, both ways", 1, {3 * product(c, V).flops, 3 * product(c, V).bytes}, [&](int) {
            d.head_forward_backward(a.losses, a.dnarrow, g.lm_head, a.logits, a.ln_f, w.lm_head,
                                    a.targets, rows, C, V, typename Device::Real(1.0 / rows),
                                    false);
        });
        row("d linear mlp.c_proj", L, twice(product(4 * c, c)), [&](int i) {
            d.linear_gelu_backward(a.dwide, dp(i).mlp_proj_weight, dp(i).c_fc_bias, a.dx,
                                   layer(i).gelu, layer(i).fc, p(i).mlp_proj_weight, rows, 4 * C, C,
                                   false);
        });
        row("d linear c_fc", L, twice(product(c, 4 * c)), [&](int i) {
            d.linear_backward(a.dnarrow, dp(i).c_fc_weight,
                              static_cast<typename Device::Gradient*>(nullptr), a.dwide,
                              layer(i).ln_2, p(i).c_fc_weight, rows, C, 4 * C, false);
        });
        row("d layernorm", 2 * L, {0, 4 * kA * n * c}, [&](int i) {
            auto& l = layer(i / 2);
            d.layernorm_backward(a.dx, dp(i / 2).ln_1_weight, dp(i / 2).ln_1_bias, a.dx,
                                 dp(i / 2).mlp_proj_bias, a.dnarrow, a.dx, l.x_mid, l.ln_1_mean,
                                 l.ln_1_rstd, p(i / 2).ln_1_weight, rows, C, {}, false);
        });
        row("d linear attn.c_proj", L, twice(product(c, c)), [&](int i) {
            d.linear_backward(a.dnarrow, dp(i).attn_proj_weight,
                              static_cast<typename Device::Gradient*>(nullptr), a.dx, layer(i).att,
                              p(i).attn_proj_weight, rows, C, C, false);
        });
        // Five products are made: the scores once more, dv, dp, dq, dk.
        row("d attention", L, {5 * c * (T_ + 1) * n, 8 * kA * n * c}, [&](int i) {
            d.attention_backward(a.dwide, a.dnarrow, layer(i).att, layer(i).lse, layer(i).qkv, B_,
                                 T_, NH, C / NH, {});
        });
        row("d linear c_attn", L, twice(product(c, 3 * c)), [&](int i) {
            d.linear_backward(a.dnarrow, dp(i).c_attn_weight, dp(i).c_attn_bias, a.dwide,
                              layer(i).ln_1, p(i).c_attn_weight, rows, C, 3 * C, false);
        });
        row("d embed", 1, {0, 3 * kA * n * c},
            [&](int) { d.embed_backward(g.wte, g.wpe, a.dx, a.inputs, a.order, B_, T_, C, {}); });
    }

    void update_layers() {
        Device& d = model_.device;
        const size_t size = model_.layout.size;
        const double n = double(size);
        row("gradient norm", 1, {0, kG * n},
            [&](int) { d.gradient_norm(model_.state, model_.grads, size); });
        // Reads gradients, masters and both moments; writes masters and moments (and working
        // weights).
        const double bytes = kG + 6 * kR + (Device::kSeparateMasters ? kW : 0);
        row("adamw", 1, {0, bytes * n}, [&](int) {
            d.adamw(model_.weights, model_.masters, model_.m, model_.v, model_.grads, size,
                    model_.layout.decayed, model_.state, {});
        });
    }

    Config config_;
    int B_, T_;
    Gpt2<Device> model_;
    Batch batch_;
    double peak_flops_ = 1, peak_bytes_ = 1, total_ = 0;
};

template <class Device>
int bench_command(Device device, const Options& o) {
    const Config config = config_for(o, Corpus());
    const int T = sequence_length(o, config);
    check_memory(device, config, int(o.batch_size), T, Use::training);
    Bench<Device>(device, config, int(o.batch_size), T).run();
    return 0;
}

// ---- walk: one tiny batch through one training step, with all its numbers --------------------
// B = 2 rows of T = 4 tokens, C = 8 channels, 2 heads, 2 layers, a vocabulary of 11 words, in
// double. The comments of §2-8 quote lines of what this prints ("walk>"), and a test holds them to
// it.

class Walk {
public:
    Walk() : config_{2, 2, 8, 4, 11}, model_(config_) {
        model_.initialise(1);
        // Ten times the usual weights: so small a model would show nothing but zeros.
        for (const TensorInfo& t : model_.layout.tensors)
            for (size_t i = t.offset; t.decays() && i < t.offset + t.count; ++i)
                model_.weights[i] *= 10;
        model_.reserve(2, 4, Use::training);
        batch_.resize(2, 4);
        for (size_t i = 0; i < 8; ++i)
            batch_.inputs[i] = kText[i], batch_.targets[i] = kText[i + 1];
        batch_.scored = 8;
        batch_.sort_rows();
        set_batch(model_, batch_);
    }

    // The whole walk, as text.
    std::string text() {
        show_batch(), show_forward(), show_loss(), show_backward(), show_update(), show_dropout(),
            show_effect();
        return out_;
    }

private:
    static constexpr const char* kWords[11] = {"the", "cat", "sat", "on", "mat", "and",
                                               "dog", "ran", "to",  "a",  "."};
    static constexpr int kText[9] = {0, 1, 2, 3, 0, 4, 5, 0, 6};

    template <class... Args>
    void print(const char* pattern, Args... args) {
        if constexpr (sizeof...(args) == 0)
            out_ += pattern;
        else
            out_ += format(pattern, args...);
    }
    void title(const char* text) {
        print("\n%s\n%s\n", text, std::string(std::strlen(text), '-').c_str());
    }

    // A buffer [rows, columns]: its shape and the beginning of row 0.
    void show(const char* name, const double* x, int rows, int columns) {
        print("%-12s [%d, %2d] ", name, rows, columns);
        for (int i = 0; i < std::min(columns, 6); ++i) print(" %8.4f", x[i]);
        print(columns > 6 ? " ...\n" : "\n");
    }

    void show_batch() {
        title("The batch: two rows of four tokens; the targets are the same text, one later");
        for (size_t b = 0; b < 2; ++b)
            for (size_t t = 0; t < 4; ++t) {
                const int in = batch_.inputs[b * 4 + t], target = batch_.targets[b * 4 + t];
                print("row %d, t=%d   input %2d %-4s  target %2d %s\n", int(b), int(t), in,
                      kWords[in], target, kWords[target]);
            }
    }

    void show_forward() {
        title("Forward: shapes, and the first numbers of the first row");
        forward(model_, pass_);
        show("embedded", model_.a.embedded, 8, 8);
        for (int i = 0; i < 2; ++i) {
            const auto& l = model_.a.layers[size_t(i)];
            print("layer %d\n", i);
            show("  ln_1", l.ln_1, 8, 8), show("  qkv", l.qkv, 8, 24), show("  att", l.att, 8, 8);
            show("  x_mid", l.x_mid, 8, 8), show("  ln_2", l.ln_2, 8, 8), show("  fc", l.fc, 8, 32);
            show("  gelu", l.gelu, 8, 32), show("  x_out", l.x_out, 8, 8);
        }
        show("ln_f", model_.a.ln_f, 8, 8);
        print("att of t=0 is its own value, qkv[16..23], since it sees nobody else:\n");
        show("  v of t=0", model_.a.layers[0].qkv + 16, 1, 8);
    }

    void show_loss() {
        title("The loss of the first row, by hand");
        std::vector<double> logits(11);
        model_.device.head_logits(logits.data(), model_.a.ln_f, model_.w.lm_head, 1, 8, 11);
        double total = 0;
        for (int v = 0; v < 11; ++v) total += std::exp(logits[size_t(v)]);
        print("word      logit   exp(logit)   probability\n");
        for (size_t v = 0; v < 11; ++v)
            print("%-5s  %8.4f   %10.4f   %11.4f%s\n", kWords[v], logits[v], std::exp(logits[v]),
                  std::exp(logits[v]) / total,
                  int(v) == batch_.targets[0] ? "   <- the target" : "");
        print("sum of exp %.4f; loss = log(sum) - logit of the target = %.4f - %.4f = %.4f\n",
              total, std::log(total), logits[1], std::log(total) - logits[1]);
        const std::vector<double> losses = batch_losses(model_, batch_);
        print("loss of the batch: the mean of 8 such = %.6f; knowing nothing is log 11 = %.4f\n",
              std::accumulate(losses.begin(), losses.end(), 0.0) / 8, std::log(11.0));
    }

    double loss() {
        const std::vector<double> losses = batch_losses(model_, batch_);
        return std::accumulate(losses.begin(), losses.end(), 0.0) / 8;
    }

    void show_backward() {
        title("Backward: gradients, beside (loss(w + h) - loss(w - h)) / 2h with h = 1e-5");
        forward(model_, pass_);
        backward(model_, pass_, 1.0 / 8, true);
        print("dlogits of the first row, (p - [target]) / 8:");
        for (int v = 0; v < 6; ++v) print(" %7.4f", model_.a.logits[v]);
        print(" ...\n%-26s %12s %12s\n", "tensor, element 0", "backward", "difference");
        for (const TensorInfo& t : model_.layout.tensors) {
            if (t.name.compare(0, 4, "h.1.") == 0) continue;  // the second layer is like the first
            double& weight = model_.weights[t.offset];
            const double kept = weight, h = 1e-5, gradient = model_.grads[t.offset];
            weight = kept + h;
            const double above = loss();
            weight = kept - h;
            const double below = loss();
            weight = kept;
            print("%-26s %12.8f %12.8f\n", t.name.c_str(), gradient, (above - below) / (2 * h));
        }
    }

    void show_update() {
        title("The update: clip, then AdamW, of the first weight of wte");
        Cpu<double>& device = model_.device;
        before_ = likeliest();
        device.begin_step(model_.state, 0.1);
        model_.state->loss = loss();
        device.gradient_norm(model_.state, model_.grads, model_.layout.size);
        device.judge_step(model_.state, {0.5, 0});
        const double w = model_.weights[0], g = model_.grads[0], clip = model_.state->clip_scale,
                     lr = 0.1;
        print("norm of all gradients %.6f; the limit is 0.5, so each is multiplied by %.6f\n",
              model_.state->grad_norm, clip);
        const double m = 0.1 * g * clip, v = 0.05 * g * clip * g * clip;
        print("g  = %.6f * %.6f = %.6f\n", g, clip, g * clip);
        print("m  = 0.9 * 0 + 0.1 g = %.8f;     m / (1 - 0.9^1)  = %.6f\n", m, m / 0.1);
        print("v  = 0.95 * 0 + 0.05 g^2 = %.8f; v / (1 - 0.95^1) = %.6f\n", v, v / 0.05);
        print("w  = %.6f - 0.1 (%.6f / (sqrt(%.6f) + 1e-8) + 0.1 * %.6f) = %.6f\n", w, m / 0.1,
              v / 0.05, w, w - lr * (m / 0.1 / (std::sqrt(v / 0.05) + 1e-8) + 0.1 * w));
        device.adamw(model_.weights, model_.masters, model_.m, model_.v, model_.grads,
                     model_.layout.size, model_.layout.decayed, model_.state,
                     {0.9, 0.95, 1e-8, 0.1});
        print("and the program has %.6f\n", model_.weights[0]);
    }

    void show_dropout() {
        title(
            "Dropout 0.5 of the embedding: training zeroes half, doubles half; evaluation does "
            "not");
        std::vector<double> x(64);
        for (bool training : {true, false}) {
            const Dropout drop{random_key(1, 2, 3), training ? 0.5f : 0.0f};
            model_.device.embed_forward(x.data(), model_.a.inputs, model_.w.wte, model_.w.wpe, 2, 4,
                                        8, 0, drop);
            show(training ? "training" : "evaluation", x.data(), 8, 8);
        }
    }

    // The five likeliest words after "the cat sat on".
    std::vector<Candidate> likeliest() {
        const std::vector<float> logits = next_logits(model_, {0, 1, 2, 3}, 0);
        std::vector<Candidate> list = candidates(logits, 1, 0, 1);
        list.resize(5);
        return list;
    }
    void show_effect() {
        title(
            "What the step changed: the likeliest words after \"the cat sat on\" (the text has: "
            "the)");
        const std::vector<Candidate> after = likeliest();
        print("before            after one step\n");
        for (size_t i = 0; i < 5; ++i)
            print("%-5s %.4f      %-5s %.4f\n", kWords[before_[i].token], before_[i].probability,
                  kWords[after[i].token], after[i].probability);
        print("loss of the batch before %.6f, after %.6f\n", model_.state->loss, loss());
    }

    Config config_;
    Gpt2<Cpu<double>> model_;
    Batch batch_;
    Pass pass_{2, 4};
    std::vector<Candidate> before_;
    std::string out_;
};

inline int walk_command() {
    std::printf("%s", Walk().text().c_str());
    return 0;
}

// ---- main ------------------------------------------------------------------------------------

// Runs the command on a device.
template <class Device>
int run_command(Device device, const Options& o) {
    switch (o.command) {
        case kTrain: return train_command(device, o);
        case kEval: return eval_command(device, o);
        case kSample: return sample_command(device, o);
        case kInfo: return info_command(device, o);
        case kBench: return bench_command(device, o);
        case kWalk: return walk_command();
    }
    return 2;
}

// Threads that wait should not burn a core for long that others could use: on a busy machine that
// makes a step ten times slower. The OpenMP run-times read these once, before main, so the program
// starts itself again with them set.
inline void wait_politely(char** argv) {
    if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT") ||
        std::getenv("KMP_BLOCKTIME"))
        return;
    ::setenv("GOMP_SPINCOUNT", "10000", 0);  // libgomp: about 30 microseconds
    ::setenv("KMP_BLOCKTIME", "0", 0);       // libomp: milliseconds
    char self[4096];
    const ssize_t length = ::readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0) return;  // things go on as they are
    self[length] = 0;
    ::execv(self, argv);
}

// Reads the command line, hands the options to `run`, and turns errors into a line and a status.
template <class Run>
int program(int argc, char** argv, const char* name, Run&& run) {
    try {
        const Options options = parse_options(std::vector<std::string>(argv + 1, argv + argc));
        if (options.help) {
            std::printf("%s", help_text(options, name).c_str());
            return 0;
        }
        if (options.threads > 0) omp_set_num_threads(int(options.threads));
        return run(options);
    } catch (const Error& e) {
        std::fflush(stdout);
        std::fprintf(stderr, "error: %s\n", e.what());
        return e.status;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "error: out of memory: choose a smaller --batch-size or --model\n");
        return 1;
    } catch (const std::exception& e) {  // such as a thread that could not be started
        std::fprintf(stderr, "error: %s (memory or threads are short)\n", e.what());
        return 1;
    }
}

// The CPU device that the options ask for.
inline Cpu<float> make_cpu(const Options& o) {
    if (o.precision == "tf32")
        fail_usage(
            "--precision tf32 is for GPUs (./train_gpt_cu); a CPU has fp32 and, where it has bf16 "
            "dot "
            "products, bf16");
    if (o.tune_matmul)
        fail_usage("--tune-matmul is for GPUs (./train_gpt_cu): a CPU has one matmul kernel");
    Cpu<float> device;
    device.matmul_options.bf16 = o.precision == "bf16";
    if (device.matmul_options.bf16 && !cpu_has_bf16_dot())
        fail(
            "--precision bf16 needs a CPU with bf16 dot products (AVX-512 BF16), and a build for "
            "it "
            "(MARCH=native): use --precision fp32");
    return device;
}

}  // namespace tinygpt

#endif  // TINYGPT_HPP_INCLUDED
