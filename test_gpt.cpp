// The checks of tinygpt: `make test`. First what many cases use (fixtures); then the cases, in the
// order of what they check: tinygpt.hpp §1 to §18, train_gpt.cpp, prepare_data.cpp, and the CUDA
// kernels. A case's name begins with its area.
// One file, compiled twice: as it is for the CPU, and with TINYGPT_TEST_CUDA for the CUDA device,
// by nvcc for a GPU (then a program of its own) or by the host compiler for cuda_on_cpu.
#if !defined(TINYGPT_TEST_CUDA) || defined(__CUDACC__)
#define DOCTEST_CONFIG_IMPLEMENT
#endif
#include <doctest/doctest.h>

#include <pty.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <barrier>
#include <fstream>
#include <thread>

#ifndef TINYGPT_TEST_CUDA
#define TRAIN_GPT_NO_MAIN
#include "train_gpt.cpp"
#define PREPARE_DATA_NO_MAIN
#include "prepare_data.cpp"
#define main embedding_main
#include "docs/embedding.cpp"
#undef main
#else
#define TRAIN_GPT_CU_NO_MAIN
#ifdef __CUDACC__
#include "train_gpt.cu"
#else
#include "train_gpt_cu.cpp"  // translated by cuda_on_cpu/translate.cpp
#endif
#endif

#ifndef TINYGPT_TEST_CUDA
#include "checks/stories.hpp"
#endif
#include "checks/runs.hpp"

// Numbers below 1.2e-38 count as zero in all tests, as they do in the program. More threads than
// cores, as in some containers, would be warned of by every command.
#if !defined(TINYGPT_TEST_CUDA) || defined(__CUDACC__)
int main(int argc, char** argv) {
    tinygpt::flush_tiny_numbers();
    omp_set_num_threads(std::min(omp_get_max_threads(), tinygpt::usable_cores()));
    doctest::Context context(argc, argv);
#ifdef __CUDACC__
    cudaDeviceProp gpu{};
    if (cudaGetDeviceProperties(&gpu, 0) == cudaSuccess && gpu.major < 8)  // no bf16, no tf32
        context.addFilter("test-case-exclude", "*bf16*,*Tf32*,cuda: every kernel*");
#endif
    return context.run();
}
#endif

// What this was built with.
#if defined(__has_feature)
[[maybe_unused]] constexpr bool thread_sanitizer = __has_feature(thread_sanitizer);
[[maybe_unused]] constexpr bool sanitized = thread_sanitizer || __has_feature(address_sanitizer);
#elif defined(__SANITIZE_ADDRESS__)
[[maybe_unused]] constexpr bool thread_sanitizer = false, sanitized = true;
#else
[[maybe_unused]] constexpr bool thread_sanitizer = false, sanitized = false;
#endif

// =================================================================================================
// Fixtures: what the cases of all areas, CPU and CUDA, share
// =================================================================================================

// What the tests say of themselves: a line for each area when it is done, on a terminal also which
// case is running. What was skipped or failed, and why, is repeated at the very end, where nobody
// can overlook it; a test says so with MESSAGE("skipped: what: why").
namespace test_report {
struct Report : doctest::IReporter {
    const bool terminal = ::isatty(STDOUT_FILENO);
    std::vector<std::string> skipped, failed;
    std::string running, area;
    int cases = 0;
    double began = 0;
    explicit Report(const doctest::ContextOptions&) {}
    void test_case_start(const doctest::TestCaseData& test) override {
        running = test.m_name;
        const std::string its_area = running.substr(0, running.find(':'));
        if (its_area != area) end_area(), area = its_area, began = tinygpt::now_seconds();
        ++cases;
        if (terminal) tinygpt::show_line({running}, false);
    }
    void clear_line() {
        if (terminal) std::fputs("\r\033[K", stdout), std::fflush(stdout);
    }
    void end_area() {
        clear_line();
        if (cases > 0)
            std::printf("%-14s %3d cases %7.1f s\n", area.c_str(), cases,
                        tinygpt::now_seconds() - began);
        std::fflush(stdout);
        cases = 0;
    }
    void log_message(const doctest::MessageData& message) override {
        clear_line();
        const std::string text = message.m_string.c_str();
        if (text.starts_with("skipped")) skipped.push_back(running + ": " + text);
    }
    void log_assert(const doctest::AssertData& check) override {
        if (check.m_failed) clear_line();
        if (check.m_failed && failed.size() < 20)
            failed.push_back(tinygpt::format("%s, line %d: %s: %s", running.c_str(), check.m_line,
                                             check.m_expr, check.m_decomp.c_str()));
    }
    void test_case_exception(const doctest::TestCaseException& thrown) override {
        failed.push_back(running + ": " + thrown.error_string.c_str());
    }
    void test_run_end(const doctest::TestRunStats& stats) override {
        end_area();
        if (stats.numTestCasesPassingFilters == 0) {
            std::puts(
                "error: no test has a name like this; FILTER=\"matmul*\" runs those of one area");
            std::fflush(stdout);
            std::_Exit(1);
        }
        std::printf("[skipped] %zu checks were skipped%s\n", skipped.size(),
                    skipped.empty() ? "" : ":");
        for (const std::string& line : skipped) std::printf("[skipped]   %s\n", line.c_str());
        for (const std::string& line : failed) std::printf("[failed]   %s\n", line.c_str());
    }
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};
#if !defined(TINYGPT_TEST_CUDA) || defined(__CUDACC__)
REGISTER_LISTENER("report", 1, Report);
#endif
}  // namespace test_report

// The CPU and the CUDA object are linked into one program: everything here is inline.
namespace fixtures {

using namespace tinygpt;

// The CPU in float and bf16, and in double the plain layers that it is compared with.
template <class real>
using DeviceOf = std::conditional_t<sizeof(real) < 8, CpuOf<real>, Reference<real>>;

// A stand-in for the matrix unit (AMX), so that the code for its tiles runs, and is checked, on any
// CPU: eight registers of 16 rows of 64 bytes for each thread, and what the Intel 64 manual says
// that its instructions do with them, lane by lane. (TDPBF16PS: c[m][n] += a[m][2k] b[k][2n], then
// += a[m][2k+1] b[k][2n+1].) Registers hold NaN until they are loaded, and nothing works before the
// set-up or after the release.
struct StandInUnit {
    struct Registers {
        uint32_t rows[8][16][16];
        int set_up = 0;
    };
    static Registers& access() {
        static thread_local Registers all;
        return all;
    }
    static auto& rows(int t) {
        if (access().set_up == 0) std::abort();  // an exception cannot leave an OpenMP region
        return access().rows[t];
    }
    template <int t>
    static void zero() {
        std::memset(rows(t), 0, 1024);
    }
    template <int t>
    static void load(const void* from, ptrdiff_t row) {
        for (int i = 0; i < 16; ++i)
            std::memcpy(rows(t)[i], static_cast<const char*>(from) + i * row, 64);
    }
    template <int t>
    static void load_once(const void* from, ptrdiff_t row) {
        load<t>(from, row);
    }
    template <int t>
    static void store(void* to, ptrdiff_t row) {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * row, rows(t)[i], 64);
    }
    template <int c, int a, int b>
    static void multiply() {
        auto number = [](uint32_t bits) { return std::bit_cast<float>(bits); };
        auto &sums = rows(c), &left = rows(a), &right = rows(b);
        for (int m = 0; m < 16; ++m) {
            float low[16] = {}, high[16] = {};  // added apart, as the manual has it
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 16; ++n) {
                    const uint32_t x = left[m][k], y = right[k][n];
                    low[n] += number(x << 16) * number(y << 16);
                    high[n] += number(x & 0xffff0000u) * number(y & 0xffff0000u);
                }
            for (int n = 0; n < 16; ++n)
                sums[m][n] = std::bit_cast<uint32_t>(number(sums[m][n]) + (low[n] + high[n]));
        }
    }
    StandInUnit() {
        Registers& all = access();
        if (all.set_up++ == 0) std::memset(all.rows, 0xff, sizeof all.rows);
    }
    ~StandInUnit() { --access().set_up; }
};
using UnitTiles = MatrixTiles<StandInUnit>;

// The fast operations in a way that this CPU need not have: bf16 without pairs, or on the matrix
// unit.
template <class Tiles>
struct OpsBy : FastOps {
    static void matmul(auto* c, auto a, auto b, bool accumulate = false,
                       const Finish<float>& finish = {}) {
        multiply<Tiles>(c, a, b, accumulate, finish);
    }
    static void attend(auto... a) { tinygpt::attend<Tiles>(a...); }
    static void attend_backward(auto... a) { tinygpt::attend_backward<Tiles>(a...); }
};
using CpuBf16 = CpuOf<bf16>;
using PlainBf16 = Layers<bf16, OpsBy<PlainTiles>>;
using UnitBf16 = Layers<bf16, OpsBy<UnitTiles>>;

// Sets the number of OpenMP threads until the end of the block.
struct Threads {
    int before = omp_get_max_threads();
    explicit Threads(int n) { omp_set_num_threads(n); }
    ~Threads() { omp_set_num_threads(before); }
};

// A limit of this process until the end of the block.
struct Limit {
    __rlimit_resource of;
    rlimit before;
    Limit(__rlimit_resource of, rlim_t most) : of(of) {
        ::getrlimit(of, &before);
        const rlimit now{most, before.rlim_max};
        REQUIRE(::setrlimit(of, &now) == 0);
    }
    ~Limit() { ::setrlimit(of, &before); }
    // What leaves so many files to be opened, however many are open already.
    static rlim_t open_files(int more) {
        int fd = 0;
        for (; more > 0; ++fd) more -= ::fcntl(fd, F_GETFD) < 0;
        return rlim_t(fd);
    }
};

// A steady clock that only the test moves, until the end of the block.
struct StoppedClock {
    StoppedClock() { steady_clock_shows = 1'000'000'000; }
    ~StoppedClock() { steady_clock_shows = 0; }
    static void move(int64_t nanoseconds) { steady_clock_shows += nanoseconds; }
};

// The message of the Error that `action` throws, which must have this exit status; "" if it throws
// none. Any other exception fails the test.
template <class Action>
std::string error_of(Action&& action, int status = 1) {
    try {
        action();
    } catch (const Error& error) {
        CHECK(error.status == status);
        return error.what();
    }
    return "";
}

// --- Running a command in this process

// What a command did: its exit status, and what it printed.
struct Outcome {
    int status = 0;
    std::string out, err;
    bool says(const std::string& part) const { return contains(err, part); }
    int lines() const { return int(std::count(err.begin(), err.end(), '\n')); }
    // It ended in one line of error, or as many, that has all of these parts; and, where it was
    // refused, printed nothing else.
    void check_fails(int with, const std::vector<std::string>& parts, int most_lines = 1) const {
        CAPTURE(err);
        CHECK(status == with);
        CHECK((lines() >= 1 && lines() <= most_lines));
        CHECK(err.size() < size_t(400 * most_lines));
        for (const std::string& part : parts) CHECK_MESSAGE(says(part), part);
    }
    void check_refused(int with, const std::vector<std::string>& parts, int most_lines = 1) const {
        check_fails(with, parts, most_lines);
        CHECK(out == "");
    }
    // The message that it failed with; "" where it did not.
    std::string error() const {
        const size_t at = err.find("error: ");
        return status == 0 || at == err.npos ? "" : err.substr(at + 7, err.size() - at - 8);
    }
};

// What did not fail.
inline Outcome good(Outcome outcome) {
    REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
    return outcome;
}

// Sends a file descriptor elsewhere until the end of the block.
struct Redirect {
    int fd, kept;
    Redirect(int fd, int to) : fd(fd), kept(::fcntl(fd, F_DUPFD_CLOEXEC, 3)) {
        std::fflush(nullptr);
        REQUIRE(::dup2(to, fd) >= 0);
    }
    ~Redirect() {
        std::fflush(nullptr);
        ::dup2(kept, fd), ::close(kept);
    }
};

// Reads a pipe or a terminal to its end.
inline void read_all(int fd, std::string& text) {
    char part[4096];
    for (ssize_t got; (got = ::read(fd, part, sizeof part)) > 0;) text.append(part, size_t(got));
    ::close(fd);
}

// Keeps in `text` what is written to `fd` in the block: by a pipe, because limits on file sizes do
// not concern it, and a thread, because nobody knows how much a pipe holds.
struct Captured {
    std::array<int, 2> ends = pipe_ends();
    std::jthread reader;
    Redirect redirect;
    Captured(int fd, std::string& text)
        : reader(read_all, ends[0], std::ref(text)), redirect(fd, ends[1]) {
        ::close(ends[1]);
    }
    static std::array<int, 2> pipe_ends() {
        std::array<int, 2> ends;
        REQUIRE(::pipe2(ends.data(), O_CLOEXEC) == 0);
        return ends;
    }
};

// Runs `command`, which returns an exit status, and puts back what a command may change in this
// process. Standard output goes to `terminal`, which is closed, where one is given.
template <class Command>
Outcome outcome_of(Command&& command, int terminal = -1) {
    struct PutBack {
        Threads threads{omp_get_max_threads()};
        ~PutBack() {
            file_fault() = nullptr;
            std::clearerr(stdout);
            for (int number : {SIGINT, SIGTERM, SIGHUP}) ::signal(number, SIG_DFL);
        }
    } put_back;
    Outcome outcome;
    {
        const Captured out(STDOUT_FILENO, outcome.out), err(STDERR_FILENO, outcome.err);
        if (terminal >= 0) ::dup2(terminal, STDOUT_FILENO), ::close(terminal);
        outcome.status = command();
    }
    return outcome;
}
// The same on a terminal of so many columns; none where this machine gives no terminal.
template <class Command>
std::optional<Outcome> outcome_on_terminal(unsigned short columns, Command&& command) {
    int screen = -1, terminal = -1;
    winsize size{};
    size.ws_col = columns;
    if (::openpty(&screen, &terminal, nullptr, nullptr, &size) != 0) {
        MESSAGE("skipped: what is shown on a terminal: this machine gives none");
        return {};
    }
    std::string shown;
    std::jthread reader(read_all, screen, std::ref(shown));
    Outcome outcome = outcome_of(command, terminal);
    reader.join();
    outcome.out = shown;
    return outcome;
}

// A main function with these arguments.
inline int run_main(Arguments words, auto&& main) {
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return main(int(argv.size()), argv.data());
}
// ./train_gpt with these arguments, or as much of it as `run` is.
inline int train_gpt_status(const Arguments& arguments, auto&& run) {
    return run_main("train_gpt" + arguments,
                    [&](int argc, char** argv) { return program(argc, argv, "train_gpt", run); });
}
inline Outcome train_gpt(const Arguments& arguments, int terminal = -1) {
    return outcome_of([&] { return train_gpt_status(arguments, run_on_cpu); }, terminal);
}

#ifndef TINYGPT_TEST_CUDA
// ./prepare_data with these arguments; where it fails, `err` is "status: message".
inline Outcome prepare(const Arguments& arguments) {
    return outcome_of([&] {
        try {
            run_prepare_data(arguments);
            return 0;
        } catch (const Error& error) {
            std::fprintf(stderr, "%d: %s", error.status, error.what());
            return error.status;
        }
    });
}
inline std::string prepare_data(const Arguments& arguments) { return prepare(arguments).err; }
#endif

// The text with every `from` as `to`.
inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
    for (size_t at = 0; (at = text.find(from, at)) != text.npos; at += to.size())
        text.replace(at, from.size(), to);
    return text;
}

inline std::string repeated(const std::string& part, size_t times) {
    std::string text;
    for (size_t i = 0; i < times; ++i) text += part;
    return text;
}

// --- Random contents

inline std::vector<int32_t> random_tokens(size_t count, int V, uint64_t seed) {
    std::vector<int32_t> tokens(count);
    for (size_t i = 0; i < count; ++i) tokens[i] = int32_t(random_bits(seed, i) % uint64_t(V));
    return tokens;
}

// A batch of random tokens; every `ignored`-th target is not scored (0: all are).
inline Batch random_batch(uint64_t seed, int B, int T, int V, int ignored = 0) {
    Batch batch(B, T);
    for (size_t i = 0; i < batch.inputs.size(); ++i) {
        batch.inputs[i] = int32_t(random_bits(seed, 2 * i) % uint64_t(V));
        if (ignored > 0 && int(i) % ignored == ignored - 1) continue;
        batch.targets[i] = int32_t(random_bits(seed, 2 * i + 1) % uint64_t(V));
        ++batch.scored;
    }
    return batch;
}

// Sets the state's norm to that of grads [count], as an update does.
void set_norm(auto device, StepState* state, auto* grads, size_t count) {
    const size_t chunks = ceil_div(count, tinygpt::kNormChunk);
    double* sums = device.template allocate<double>(chunks);
    device.square_sums(sums, grads, count);
    device.norm_of_sums(state, sums, chunks);
    device.release(sums);
}

template <class real = double>
std::vector<real> random_vector(size_t count, uint64_t seed, double scale = 1, double mean = 0) {
    std::vector<real> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = real(mean + scale * random_normal(seed, i));
    return values;
}

// --- Runs, and what they left

struct TestRuns : SmallRuns {
    using SmallRuns::SmallRuns;
    Outcome train(const std::string& name, const Arguments& more = {}) const {
        return train_gpt(arguments(name, more));
    }
    // A line, with this data and that run's folder.
    Arguments line(const std::string& name, const std::string& more) const {
        return more + " --data " + data() + " --output " + out(name);
    }
    std::vector<LogRow> log(const std::string& name = "out") const {
        return read_log(out(name) + "/log.csv", INT64_MAX);
    }
    // What its newest checkpoint says.
    TrainerState state(const std::string& name = "out") const {
        return verify_checkpoint(checkpoint_folder(out(name), last_step(out(name))));
    }
};

// Another shard in a file's place, at once and with another time. Why: a loader may be reading it.
inline void replace_shard(const std::string& path, const std::vector<uint16_t>& tokens) {
    const auto when = std::filesystem::last_write_time(path);
    put_shard(path + ".new", tokens);
    std::filesystem::last_write_time(path + ".new", when + std::chrono::seconds(2));
    std::filesystem::rename(path + ".new", path);
}

inline void check_same_end(const std::string& a, const std::string& b) {
    CHECK(difference(a, b) == "");
}

// Calls `action` when row `step` is written to log.csv. (Row 0 comes with the file, under another
// name.)
inline void at_step(int step, std::function<void()> action) {
    auto rows = std::make_shared<int>(0);
    file_fault() = [=](const char* call, const std::string& path) {
        if (std::string(call) == "write" && path.ends_with("/log.csv") && ++*rows == step) action();
        return 0;
    };
}

// Makes an action fail at one system call after another: in every try at the next one.
struct EachCall {
    int code;               // what the call answers; -1: a write comes up short
    std::string only = "";  // calls of that name
    int nth = 0;
    std::string failed = "";  // the call that failed in the last try; "": it made no more
    bool renamed = false;     // it came after a rename
    // The message of the action's error.
    std::string run(auto&& action) {
        int calls = 0;
        failed = "", renamed = false;
        file_fault() = [&](const std::string& call, const std::string&) {
            if (!only.empty() && only != call) return 0;
            if (calls++ != nth) return renamed |= call == "rename", 0;
            failed = call;
            return code;
        };
        const std::string message = error_of(action);
        file_fault() = nullptr, ++nth;
        return message;
    }
};

// --- PyTorch's numbers, in double

// A folder of reference values: of $TINYGPT_REFERENCE, data/reference or ../shared/reference.
// Empty, with a message, where there is none.
inline std::string reference_folder(const std::string& name) {
    const char* named = std::getenv("TINYGPT_REFERENCE");
    for (const std::string base :
         {named ? named : "data/reference", "data/reference", "../shared/reference"})
        if (file_exists(base + "/" + name + "/expected.safetensors")) return base + "/" + name;
    MESSAGE("skipped: comparison with PyTorch's "
            << name << ": neither $TINYGPT_REFERENCE nor data/reference has it");
    return "";
}

// The tensor of that name in a file, or null.
inline const StoredTensor* tensor_of(const SafetensorsFile& file, std::string_view name) {
    for (const StoredTensor& tensor : file.tensors)
        if (tensor.name == name) return &tensor;
    return nullptr;
}

struct PyTorchNumbers {
    std::deque<SafetensorsFile> weights;
    SafetensorsFile expected;
    Config config;
    Batch batch;
    StepOptions options;
    bool compact;  // stored in float32, without the final weights

    explicit PyTorchNumbers(const std::string& folder)
        : weights(open_weights(folder)), expected(folder + "/expected.safetensors"),
          config(read_hf_config(folder + "/config.json")) {
        const std::string path = folder + "/expected.json";
        const Json run = Json::parse(read_file(path), path).get("run", Json::Kind::object, path);
        auto number = [&](const char* key) {
            return run.get(key, Json::Kind::number, path).as<double>().value();
        };
        compact = run.get("compact", Json::Kind::boolean, path).text == "true";
        options.rate = {Schedule::cosine, number("lr"), number("min_lr_fraction"),
                        int64_t(number("warmup")), int64_t(number("steps"))};
        options.adamw = {number("beta1"), number("beta2"), number("eps"), number("decay")};
        options.guards = {number("clip"), 0};
        const int B = int(number("batch")), T = int(number("seq"));
        const Shards shards(folder + "/batch.bin");
        batch = DataOrder{shards, B, T, 0, true, true}.batch(0, config.vocab_size);
    }
    std::vector<double> read(const std::string& name) const {
        const StoredTensor* tensor = tensor_of(expected, name);
        REQUIRE_MESSAGE(tensor, name << " is missing from " << expected.path);
        std::vector<double> values(tensor->count());
        expected.read(*tensor, values.data());
        return values;
    }
};

// The initial weights of the reference.
template <class Device>
void read_weights(Gpt2<Device>& model, const PyTorchNumbers& reference) {
    std::vector<typename Device::Real> w(model.layout.size);
    const auto stored = match_tensors(reference.weights, model.layout.tensors);
    for (size_t i = 0; i < stored.size(); ++i)
        stored[i]->file->read(*stored[i], w.data() + model.layout.tensors[i].offset);
    model.set_weights(w.data());
}

}  // namespace fixtures

using namespace fixtures;

#ifndef TINYGPT_TEST_CUDA

namespace cpu_tests {

// Weights for checks: larger than at the start of training, so that every nonlinearity is felt and
// no gradient is small.
template <class Device>
void set_lively_weights(Gpt2<Device>& model, uint64_t seed) {
    std::vector<typename Device::Real> w(model.layout.size);
    for (size_t t = 0; t < model.layout.tensors.size(); ++t) {
        const TensorInfo& info = model.layout.tensors[t];
        const double mean = info.init == Init::ones ? 1 : 0, deviation = info.decays() ? 0.3 : 0.2;
        for (size_t i = 0; i < info.count; ++i)
            w[info.offset + i] = typename Device::Real(
                float(mean + deviation * random_normal(random_key(seed, t, 0), i)));
    }
    model.set_weights(w.data());
}

// The larger of two errors; a NaN is the worst of all.
inline double worse(double a, double b) {
    return std::isnan(a) || std::isnan(b) ? double(INFINITY) : std::max(a, b);
}

// max|a-b| / max|b|, with b the truth.
template <class A, class B>
double relative_error(const A* a, const B* b, size_t count) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < count; ++i) {
        worst = worse(worst, std::abs(double(a[i]) - double(b[i])));
        largest = std::max(largest, std::abs(double(b[i])));
    }
    return largest > 0 ? worst / largest : worst;
}

inline StepOptions plain_steps(double lr, int64_t steps) {
    return {.seed = 3, .rate = {Schedule::constant, lr, 0.1, 0, steps}, .adamw = {}, .guards = {}};
}
// A model of config on the CPU, with room for B x T, and lively weights.
template <class real>
struct Lively : Gpt2<DeviceOf<real>> {
    Lively(const Config& config, int B, int T, Use use = Use::training)
        : Gpt2<DeviceOf<real>>(config) {
        this->reserve(B, T, use);
        set_lively_weights(*this, 4);
    }
    std::vector<RealOf<real>> gradients() const {
        return {this->grads, this->grads + this->layout.size};
    }
};

template <class A, class B>
double largest_difference(const std::vector<A>& a, const std::vector<B>& b) {
    REQUIRE(a.size() == b.size());
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        const double d = std::abs(double(a[i]) - double(b[i]));
        if (!(d <= worst)) worst = d;  // a NaN stays
    }
    return worst;
}

// --- Files and folders, written by hand

std::string little_endian(uint64_t n) { return raw(std::vector{n}); }
std::string safetensors_bytes(const std::string& header, const std::string& data) {
    return little_endian(header.size()) + header + data;
}
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
           ",\"data_offsets\":" + offsets + "}";
}

// The folder with GPT-2's vocabulary and its golden tokens; empty where it is not there.
inline std::string gpt2_data() {
    const char* named = std::getenv("TINYGPT_SHARED");
    std::string folder = std::string(named ? named : "../shared") + "/data";
    if (file_exists(folder + "/vocab.bpe") && file_exists(folder + "/gpt2_golden.jsonl"))
        return folder;
    MESSAGE("skipped: GPT-2's vocabulary and its golden tokens are not in "
            << folder << " (set TINYGPT_SHARED to the folder that has data/)");
    return "";
}

// An error is one line that has this reason in it; none where there is no reason.
void check_error(const std::string& error, const std::string& reason) {
    CAPTURE(reason);
    CHECK_MESSAGE(contains(error, reason), error);
    CHECK_MESSAGE(error.empty() == reason.empty(), error);
    CHECK_FALSE(contains(error, "\n"));
}
// The action fails with one line that begins with the file's name and has the reason in it.
void check_refused(const std::string& path, const std::string& reason, auto&& action) {
    const std::string message = error_of(action);
    check_error(message, path + ": ");
    CHECK_MESSAGE(message.starts_with(path + ": "), message);
    CHECK_MESSAGE(contains(message, reason), message);
    CHECK(message.size() < 400);
}
void check_unreadable(const std::string& path, const std::string& reason) {
    check_refused(path, reason, [&] { SafetensorsFile file(path); });
}

// An array as a tensor to be written.
StoredTensor tensor_to_write(const std::string& name, std::vector<int64_t> shape, const float* data,
                             const std::string& dtype = "F32") {
    auto fill = [data](float* out, size_t first, size_t n) { std::copy_n(data + first, n, out); };
    return {name, dtype, std::move(shape), fill};
}

const Config tiny_config{2, 2, 8, 4, 11}, untied_config{2, 2, 8, 4, 11, true};

// Random weights under the names of a checkpoint, changed at will before they are written.
struct Weights {
    Layout layout;
    std::vector<float> values;
    std::vector<StoredTensor> tensors;
    explicit Weights(const Config& config, bool prefix = true)
        : layout(layout_of(config)), values(layout.size) {
        for (const TensorInfo& info : layout.tensors) {
            for (size_t i = info.offset; i < info.offset + info.count; i++)
                values[i] = float(random_normal(7, i));
            tensors.push_back(tensor_to_write(prefix ? name_in_checkpoint(info.name) : info.name,
                                              info.shape, values.data() + info.offset));
        }
    }
    void add(const std::string& name, std::vector<int64_t> shape) {
        tensors.push_back(tensor_to_write(name, std::move(shape), values.data()));
    }
    void remove(const std::string& name) {
        std::erase_if(tensors, [&](const StoredTensor& tensor) { return tensor.name == name; });
    }
};

void copy(const std::string& from, const std::string& to) {
    std::filesystem::copy(from, to, std::filesystem::copy_options::recursive);
}

// Every file below a folder, by its name from there, with its bytes, but for the lock.
std::map<std::string, std::string> snapshot(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (auto& entry : std::filesystem::recursive_directory_iterator(folder))
        if (entry.is_regular_file() && entry.path().filename() != "lock")
            files[entry.path().string().substr(folder.size())] = read_file(entry.path().string());
    return files;
}

Json read_json(const std::string& path) { return Json::parse(read_file(path), path); }

// --- Models in folders

inline const Tokenizer& byte_tokens() {
    static const Tokenizer tokenizer = Tokenizer::bytes();
    return tokenizer;
}

// A folder with a model of random weights, as a run would save it.
void save_model(const std::string& folder, const Config& config, const Tokenizer* tokenizer,
                double scale = 1) {
    Gpt2<Cpu> model(config);
    model.initialise(11);
    for (size_t i = 0; i < model.layout.size; ++i) model.weights[i] *= float(scale);
    save_checkpoint(model, folder, tokenizer, {}, Purpose::use);
}

// Such a folder, and what the program makes of it.
struct ModelFolder : TemporaryFolder {
    const std::string model = path + "/m";
    explicit ModelFolder(const Config& config, const Tokenizer* tokenizer = &byte_tokens(),
                         double scale = 1) {
        save_model(model, config, tokenizer, scale);
    }
    Outcome operator()(const std::string& line, const Arguments& more = {}) const {
        return train_gpt(line + " --init-from " + model + more);
    }
};

// A small model with new weights, and one from a folder.
std::unique_ptr<Gpt2<Cpu>> small_model() {
    auto model = std::make_unique<Gpt2<Cpu>>(Config{1, 2, 8, 8, 257});
    model->reserve(1, 8, Use::training);
    model->initialise(1);
    return model;
}
std::unique_ptr<Gpt2<Cpu>> loaded(const std::string& folder, int B, int T) {
    auto model = std::make_unique<Gpt2<Cpu>>(config_of_folder(folder));
    model->reserve(B, T, Use::evaluation);
    load_weights(*model, folder);
    return model;
}

// --- Text and tokens

using Merge = Tokenizer::Merge;

// The SHA-256 of some bytes, by the system's own program, as in checks/fetch.sh.
inline std::string sha256_of(const std::string& bytes) {
    TemporaryFolder temporary;
    put_file(temporary / "bytes", bytes);
    std::FILE* pipe = ::popen(("sha256sum < " + temporary / "bytes").c_str(), "r");
    REQUIRE(pipe != nullptr);
    char digest[65] = "";
    CHECK(std::fread(digest, 1, 64, pipe) == 64);
    ::pclose(pipe);
    return digest;
}

// Text for small vocabularies: several scripts, contractions, digits, odd spaces.
inline std::string sample_text() {
    std::string text =
        "The cat sat on the mat. The cat didn't see the other cat, and the other cat couldn't see "
        "it.\n"
        "They're cats; they'll sleep 12 or 13 hours a day, said the caf\u00e9's owner \u2014 "
        "\u00abd\u00e9j\u00e0 vu\u00bb!\n\n"
        "\t\u0427\u0435\u0440\u043d\u044b\u0439 \u043a\u043e\u0442, \u9ed2\u732b\u3001\u3000\u732b "
        "\U0001f431\U0001f431  \u00bd \u2167 x\u00b2\n";
    return text + text + "the cat sat on the mat\n";
}

// Random text: words, spaces, apostrophes, characters beyond ASCII and broken UTF-8.
inline std::string random_text(uint64_t seed, size_t atoms) {
    using namespace std::literals;
    static const std::vector<std::string> all = split_at(
        "a|b|ab|the| |  |\n|\t|'|'s|'ll|'re|7|42|!|==|\u00e9|\u00a0|\u3000|\u732b|\u0661|\u0301|"
        "\U0001f431|\U00010400|\0|\x80|\xff|\xe9|\xc3|\xed\xa0\x80|\xf0\x9f\x90|\xc0\xaf|"
        "\xf4\x90\x80\x80"sv,
        '|');
    std::string text;
    for (size_t i = 0; i < atoms; ++i) text += all[random_bits(seed, i) % all.size()];
    return text;
}
inline std::string random_bytes(uint64_t seed, size_t count) {
    std::string text;
    for (size_t i = 0; i < count; ++i) text += char(random_bits(seed, i));
    return text;
}

inline std::vector<std::string> pieces_of(std::string_view text) {
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size(); at += pieces.back().size())
        pieces.emplace_back(next_piece(text, at));
    return pieces;
}

// The texts as files of a folder, a document each.
inline std::vector<Source> sources_of(const TemporaryFolder& folder,
                                      const std::vector<std::string>& texts) {
    std::vector<Source> sources;
    for (const std::string& text : texts) {
        sources.push_back({folder / to_text("text-", sources.size()), "", 0, text.size()});
        put_file(sources.back().path, text);
    }
    return sources;
}
// What a source holds.
inline std::string bytes_of(const Source& source) {
    return read_file(source.path).substr(source.begin, source.end - source.begin);
}
inline std::vector<std::string> texts_of(const std::vector<Source>& sources) {
    std::vector<std::string> texts;
    const auto keep = [](std::string& all, const Text& text, size_t) {
        all += (text.begins ? "|" : "") + std::string(text.text);
    };
    std::string all;
    pass_over<std::string>("reading", sources, keep,
                           [&](std::string& some, const Chunk&) { all += some; });
    if (all.empty()) return {};
    return split_at(all.substr(1), '|');
}
inline std::vector<uint16_t> encode_all(const Tokenizer& tokenizer,
                                        const std::vector<Source>& sources) {
    std::vector<uint16_t> all;
    encode_sources(tokenizer, sources, [&](const std::vector<uint16_t>& tokens) {
        all.insert(all.end(), tokens.begin(), tokens.end());
    });
    return all;
}

// All tokens of one shard.
inline std::vector<uint16_t> shard_tokens(const std::string& path) {
    Shard shard(path);
    std::vector<uint16_t> tokens(size_t(shard.tokens));
    shard.read(tokens.data(), 0, shard.tokens);
    return tokens;
}

inline Tokenizer trained_on(const std::vector<std::string>& texts, int64_t size) {
    PieceCounts pieces;
    for (const std::string& text : texts) pieces.add(text);
    return train_bpe(pieces, size);
}

// Every character is whole.
bool is_utf8(std::string_view text) {
    for (size_t at = 0, length; at < text.size(); at += length)
        if ((length = utf8_character(text.substr(at, 4)).bytes) == 0) return false;
    return true;
}

// --- Runs that are stopped, and devices that are watched

// A run that nothing disturbed, for others to be compared with.
struct Runs : TestRuns {
    explicit Runs(const Arguments& more = {}) {
        const Outcome straight = good(train("straight", more));
        CHECK(contains(straight.out, "stopped early"));
        CHECK((end() > 15 && end() < 30));
    }
    int64_t end() const { return last_step(out("straight")); }
    // Resumes the run of that name, which then ends as the undisturbed one.
    Outcome resume(const std::string& name, const Arguments& more = {}) const {
        const Outcome resumed = good(train(name, more + "--resume auto"));
        if (!folder_exists(out(name) + "/best"))
            copy(out("straight") + "/best", out(name) + "/best");
        check_same_end(out("straight"), out(name));
        return resumed;
    }
    // A run that is interrupted after that step.
    void stop(const std::string& name, int step, int signal = SIGTERM,
              const Arguments& more = {}) const {
        at_step(step, [=] { ::raise(signal); });
        CHECK(train(name, more).status == 130);
        CHECK(last_step(out(name)) == step);
    }
};

// The exit status of a child process that catches signals as a run does and then calls f.
int child_status(const std::function<void()>& f) {
    const pid_t child = ::fork();
    if (child == 0) catch_signals(), f(), ::_exit(7);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

// A CPU that does something at every batch that is evaluated, and in every update.
struct Hooked : tinygpt::Machine<float> {
    std::function<void()> on_evaluation = [] {}, on_update = [] {};
    void head_forward(auto... a) { on_evaluation(), Cpu::head_forward(a...); }
    void adamw(auto... a) { on_update(), Cpu::adamw(a...); }
};
Outcome train_on(const Hooked& device, const Arguments& arguments) {
    return outcome_of([&] {
        return train_gpt_status(arguments,
                                [&](const Options& o) { return train_command(device, o); });
    });
}

bool near(double a, double b, double relative) { return std::abs(a - b) <= relative * std::abs(b); }

// =================================================================================================
// §1 Random numbers
// =================================================================================================
// All else is random by these few functions: what a seed means may never change.

TEST_CASE("random: a seed means the same numbers in every version") {
    const uint64_t published[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u};
    for (uint64_t i = 0; i < 3; ++i) CHECK(random_bits(1234567, i + 1) == published[i]);
    CHECK(random_key(1337, 2, 3) == 14568961986398660764u);
    CHECK(random_uniform(5, 6) == 0.38060892761862153);
    CHECK(random_normal(5, 6) == doctest::Approx(0.38159067945852532).epsilon(1e-14));
    CHECK((shuffled(0, 1000, 7) == 164 && shuffled(1, 1000, 7) == 304));
    const RandomUse uses[] = {kBlockOrder,  kCutOffset,  kInitialWeights,
                              kDropoutMask, kMicroBatch, kGeneration};
    for (uint64_t i = 0; i < 6; ++i) CHECK(uses[i] == i + 1);
    CHECK(Pass{.dropout = {77, 0.5f}}.drop(3).key == random_key(77, 3, 4));
    std::vector<float> weights(layout_of({1, 1, 4, 4, 8}).size);
    initialise(weights.data(), {1, 1, 4, 4, 8}, layout_of({1, 1, 4, 4, 8}), 1337);
    CHECK(weights[0] == float(0.02 * random_normal(random_key(1337, 0, 3), 0)));
}

// =================================================================================================
// §2 Data
// =================================================================================================
// Shards and the order of their blocks: every prediction once an epoch; nothing damaged is read.

// Shards whose tokens are all different: 0, 1, 2, ... on through all of them.
inline std::unique_ptr<Shards> counting_shards(const TemporaryFolder& folder,
                                               const std::vector<size_t>& lengths) {
    uint16_t next = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
        std::vector<uint16_t> tokens(lengths[s]);
        for (uint16_t& token : tokens) token = next++;
        put_shard(folder / format("train_%06d.bin", int(s)), tokens);
    }
    return std::make_unique<Shards>(folder / "train_*.bin");
}

TEST_CASE("data: shuffled is a bijection, and another one for every key") {
    for (uint64_t n = 1; n <= 130; ++n)
        for (uint64_t key : {0ull, 1ull, 0xfeedfacedeadbeefull}) {
            std::vector<int> hits(n);
            for (uint64_t i = 0; i < n; ++i) {
                const uint64_t to = shuffled(i, n, key);
                REQUIRE(to < n);
                ++hits[to];
            }
            REQUIRE(std::count(hits.begin(), hits.end(), 1) == ptrdiff_t(n));
        }
    const uint64_t n = 70001;
    std::vector<bool> hit(n);
    uint64_t stay = 0, same = 0;
    double drift = 0;
    for (uint64_t i = 0; i < n; ++i) {
        const uint64_t a = shuffled(i, n, 5), b = shuffled(i, n, 6);
        REQUIRE((a < n && !hit[a]));
        hit[a] = true, stay += a == i, same += a == b;
        drift += (double(i) / n - 0.5) * (double(a) / n - 0.5);
    }
    CHECK(stay < 10);  // a random permutation has about one fixed point
    CHECK(same < 10);
    CHECK(std::abs(drift / n * 12) < 5 / std::sqrt(double(n)));  // i says nothing about where
}

TEST_CASE("data: one epoch makes every prediction exactly once, whatever T, shuffle and shards") {
    const std::vector<std::vector<size_t>> cases = {{40},          {2},
                                                    {1, 30},       {17, 0, 2, 64, 1},
                                                    {0, 0, 33, 7}, {101, 100, 99},
                                                    {5, 3, 1}};
    for (const auto& lengths : cases) {
        TemporaryFolder folder;
        const auto shards = counting_shards(folder, lengths);
        std::vector<char> predicted;  // token i+1 after token i
        for (size_t length : lengths)
            for (size_t i = 0; i < length; ++i) predicted.push_back(i + 1 < length);
        CHECK(shards->predictions() == std::count(predicted.begin(), predicted.end(), 1));
        for (int T : {1, 2, 3, 7, 16, 100, 128})
            for (int64_t epoch : {0, 1, 2, 10, 11, 12}) {  // shuffled from 10 on, with seeds 1, 2
                const DataOrder order{*shards, 1, T, uint64_t(epoch % 2 + 1), epoch >= 10};
                std::vector<char> seen(predicted.size());
                for (int64_t i = 0; i < order.blocks_per_epoch(); ++i) {
                    const int64_t sample = epoch * order.blocks_per_epoch() + i;
                    REQUIRE(order.epoch(sample) == epoch);
                    const Batch batch = order.batch(sample, 65536);
                    int64_t scored = 0;
                    for (size_t t = 0; t < size_t(T); ++t) {
                        if (batch.targets[t] == kIgnore) continue;
                        REQUIRE(batch.targets[t] == batch.inputs[t] + 1);  // shifted by one
                        ++seen[size_t(batch.inputs[t])], ++scored;
                    }
                    REQUIRE(batch.scored == scored);
                }
                CAPTURE(T);
                CAPTURE(epoch);
                REQUIRE(seen == predicted);
            }
    }
}

TEST_CASE("data: a shuffled epoch has its own order and its own offset; the seed decides") {
    TemporaryFolder folder;
    const auto shards = counting_shards(folder, {400, 333});
    using Blocks = std::vector<std::pair<const Shard*, int64_t>>;
    auto blocks_of = [&](uint64_t seed, int64_t epoch, bool shuffle) {
        const DataOrder order{*shards, 1, 10, seed, shuffle};
        Blocks blocks;
        for (int64_t i = 0; i < order.blocks_per_epoch(); ++i) {
            const Window window = order.window(epoch * order.blocks_per_epoch() + i);
            blocks.push_back({window.shard, window.begin});
            const uint64_t s = window.shard - &shards->files[0];
            const uint64_t ring = uint64_t(window.shard->predictions()),
                           offset = random_bits(random_key(seed, uint64_t(epoch), 2), s) % ring;
            REQUIRE((uint64_t(window.begin) + ring - (shuffle ? offset : 0)) % ring % 10 == 0);
        }
        return blocks;
    };
    const Blocks plain = blocks_of(1, 0, false), first = blocks_of(1, 0, true);
    CHECK(std::is_sorted(plain.begin(), plain.end()));
    CHECK((plain == blocks_of(2, 5, false) && first == blocks_of(1, 0, true)));
    CHECK((first != blocks_of(2, 0, true) && first != blocks_of(1, 1, true)));
    CHECK(!std::is_sorted(first.begin(), first.end()));
    std::set<Blocks> cuts;  // sorted: the offsets differ, not only the order
    for (int64_t epoch = 0; epoch < 6; ++epoch) {
        Blocks blocks = blocks_of(1, epoch, true);
        std::sort(blocks.begin(), blocks.end());
        cuts.insert(blocks);
    }
    CHECK(cuts.size() == 6);
}

TEST_CASE("data: in order, the rows follow each other; overfitting repeats the first batch") {
    TemporaryFolder folder;
    const int B = 3, T = 5;
    const auto shards = counting_shards(folder, {B * T + 1});  // just enough
    auto check_first_batch = [&](const Batch& batch) {
        for (int i = 0; i < B * T; ++i)
            REQUIRE((batch.inputs[size_t(i)] == i && batch.targets[size_t(i)] == i + 1));
        CHECK(batch.scored == B * T);
    };
    check_first_batch(DataOrder{*shards, B, T, 9}.batch(0, B * T + 1));
    for (bool shuffle : {false, true})
        for (int64_t first : {0, B, 7 * B})
            check_first_batch(DataOrder{*shards, B, T, 9, shuffle, true}.batch(first, B * T + 1));
}

TEST_CASE("data: the rows of a batch are sorted by token, equal ones in their order") {
    const Batch batch = random_batch(4, 7, 9, 10);
    std::vector<int32_t> order = rows_by_token(batch.inputs);
    for (size_t i = 1; i < order.size(); ++i) {
        const int32_t a = batch.inputs[size_t(order[i - 1])], b = batch.inputs[size_t(order[i])];
        REQUIRE((a < b || (a == b && order[i - 1] < order[i])));
    }
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size(); ++i) REQUIRE(order[i] == int32_t(i));
}

TEST_CASE("data: a damaged shard is refused, with the reason") {
    TemporaryFolder folder;
    const std::string path = folder / "a.bin";
    const std::vector<uint16_t> tokens(100, 7);
    auto refused = [&](const std::string& reason) {
        const std::string error = error_of([&] { Shard shard(path); });
        CHECK(contains(error, path));
        CHECK(contains(error, reason));
    };
    refused("cannot read");  // there is none yet
    put_shard(path, tokens, {}, 20240521), refused("20240521");
    // What it may be instead, and what to type.
    put_shard(path, tokens, {}, 20240801, 7), refused("llm.c with 32-bit tokens");
    put_file(path, raw(tokens)), refused("found 200 bytes");
    refused("python3 -c \"import struct; t = open('" + path + "', 'rb')");
    put_file(path, raw(noisy_text(1000, 1))), refused("as nanoGPT writes them");
    put_file(path, "It was the best of times.\n"),
        refused("of text with ./prepare_data --input FILE");
    put_shard(path, tokens, {}, 20240520, 2), refused("version 1");
    for (int32_t count : {0, 99, 101, 1 << 30, -2}) {
        CAPTURE(count);
        put_shard(path, tokens, count), refused("damaged");
    }
    for (size_t bytes : {0, 1, 12, 1023})
        std::filesystem::resize_file(path, bytes), refused("no token shard");
    put_shard(path, tokens);
    CHECK(Shard(path).tokens == 100);
    put_shard(path, {});
    CHECK(Shard(path).tokens == 0);
    CHECK(contains(error_of([&] { Shard shard(folder.path); }), "folder"));
    CHECK(Shards(folder / "nothing_*.bin").empty());
    CHECK(contains(error_of([&] { Shards{folder.path}; }), "is a folder: say --data"));
    CHECK(contains(error_of([&] { Shards{folder.path + "*"}; }), "is a folder: say --data"));
}

TEST_CASE("data: the name of a file that exists is no pattern") {
    TemporaryFolder folder;
    put_shard(folder / "a1.bin", {1, 2});
    for (const char* name : {"a[1].bin", "a*.bin", "a?.bin", "a\\.bin"}) {
        put_shard(folder / name, {1, 2, 3});
        const Shards shards(folder / name);
        REQUIRE(shards.files.size() == 1);
        CHECK(shards.tokens() == 3);
    }
    CHECK(Shards(folder / "a?.bi[n]").files.size() == 4);  // all but the one of two letters
}

TEST_CASE("data: more shards than a program may have open files") {
    TemporaryFolder folder;
    const auto shards = [&] { return counting_shards(folder, std::vector<size_t>(300, 5)); };
    const Limit few(RLIMIT_NOFILE, Limit::open_files(36));
    const auto all = shards();
    CHECK(all->tokens() == 1500);
    all->check_tokens(1500);
    const DataOrder order{*all, 4, 4, 1, true};
    for (int64_t i = 0; i < order.blocks_per_epoch(); i += 4)
        REQUIRE(order.batch(i, 1500).scored == 16);
}

TEST_CASE("data: a shard that shrinks while it is open is an error, not a signal") {
    TemporaryFolder folder;
    const std::string path = folder / "train_000000.bin";
    put_shard(path, std::vector<uint16_t>(5000, 7));
    const Shards shards(path);
    std::vector<uint16_t> out(10);
    auto read = [&](int64_t at) {
        return error_of([&] { shards.files[0].read(out.data(), at, 10); });
    };
    CHECK(read(4990) == "");
    CHECK(out[9] == 7);
    std::filesystem::resize_file(path, 1024 + 2 * 100);
    CHECK(contains(read(90), "was changed, replaced or cut"));
    CHECK(contains(error_of([&] { shards.check_tokens(8); }), "replaced or cut"));
    // As it was; then another of the same length in its place.
    put_shard(path, std::vector<uint16_t>(5000, 7));
    const Shards again(path);
    const DataOrder order{again, 1, 50};
    CHECK(order.batch(0, 8).scored == 50);
    replace_shard(path, std::vector<uint16_t>(5000, 6));
    CHECK(contains(error_of([&] { order.batch(1, 8); }), "was changed, replaced or cut"));
}

TEST_CASE("data: a token outside the vocabulary is an error that says where") {
    TemporaryFolder folder;
    std::vector<uint16_t> first(50, 5), second(300, 5);
    first[49] = 299, second[217] = 300;
    put_shard(folder / "train_000000.bin", first), put_shard(folder / "train_000001.bin", second);
    const Shards shards(folder / "train_*.bin");
    CHECK(shards.tokens() == 350);
    auto error = [&](int vocab) { return error_of([&] { shards.check_tokens(vocab); }); };
    CHECK(error(301) == "");
    CHECK(contains(error(300), "token 217 of " + folder.path + "/train_000001.bin is 300"));
    CHECK(contains(error(299), "token 49 of " + folder.path + "/train_000000.bin is 299"));
    // The last token is only ever a target: it is checked as well.
    const DataOrder order{shards, 1, 217};
    CHECK(error_of([&] { order.batch(0, 300); }) == "");
    CHECK(contains(error_of([&] { order.batch(1, 300); }), "token 217"));
}

// =================================================================================================
// §3 What a model is made of
// =================================================================================================
// The list of parameters: their number, their order and how they begin.

TEST_CASE("init: normal, the right width, biases 0, norms 1, and no thread matters") {
    const Config config{4, 4, 128, 128, 1024, true};
    const Layout layout = layout_of(config);
    auto weights_of = [&](uint64_t seed, int threads) {
        Threads some(threads);
        std::vector<float> w(layout.size, 7);
        initialise(w.data(), config, layout, seed);
        return w;
    };
    const std::vector<float> w = weights_of(42, 3);
    CHECK(w == weights_of(42, 1));
    CHECK(w != weights_of(43, 1));
    size_t inside = 0;
    double named = 0;
    for (const TensorInfo& t : layout.tensors) {
        CAPTURE(t.name);
        const float* x = w.data() + t.offset;
        for (size_t i = 0; i < t.count; ++i) named += std::abs(double(x[i]));
        if (!t.decays()) {
            const bool scale = contains(t.name, "ln_") && contains(t.name, ".weight");
            CHECK(std::all_of(x, x + t.count, [&](float v) { return v == (scale ? 1 : 0); }));
            continue;
        }
        const double n = double(t.count);
        const double width = contains(t.name, "c_proj.weight") ? 0.02 / std::sqrt(8.0) : 0.02;
        double sum = 0, squares = 0, beyond = 0, neighbours = 0;
        for (size_t i = 0; i < t.count; ++i) {
            const double z = double(x[i]) / width;
            sum += z, squares += z * z, beyond += std::abs(z) > 2;
            if (i > 0) neighbours += z * double(x[i - 1]) / width;
        }
        // Five standard deviations of what a sample of n would give.
        CHECK(std::abs(sum / n) < 5 / std::sqrt(n));
        CHECK(std::abs(std::sqrt(squares / n) - 1) < 5 / std::sqrt(2 * n));
        CHECK(std::abs(beyond / n - 0.0455) < 5 * std::sqrt(0.0455 / n));
        CHECK(std::abs(neighbours / n) < 5 / std::sqrt(n));
        inside += t.count;
    }
    CHECK(inside > 900000);
    // Tensors of one shape are different, and padding is 0.
    const TensorInfo &first = layout.tensors[4], &second = layout.tensors[16];
    CHECK((first.name == "h.0.attn.c_attn.weight" && second.name == "h.1.attn.c_attn.weight"));
    CHECK(!std::equal(&w[first.offset], &w[first.offset + 1000], &w[second.offset]));
    double all = 0;
    for (float x : w) all += std::abs(double(x));
    CHECK(all == doctest::Approx(named).epsilon(1e-12));
}

TEST_CASE("model: the one list has GPT-2's parameters, and only matrices decay") {
    std::map<std::string, size_t> counts;
    for (const Preset& preset : kPresets)
        for (bool untied : {false, true}) {
            Config config = preset.config;
            config.untied_head = untied;
            const Layout layout = layout_of(config);
            for (const TensorInfo& t : layout.tensors) {
                CHECK(t.offset % 64 == 0);
                CHECK((t.offset + t.count <= layout.decayed) == t.decays());
                CHECK((t.offset >= layout.decayed) == !t.decays());
                CHECK(t.offset + t.count <= layout.size);
            }
            counts[std::string(preset.name) + (untied ? " untied" : "")] = layout.count;
        }
    CHECK(counts["gpt2"] == 124439808);
    CHECK(counts["gpt2 untied"] == 163037184);
    CHECK(counts["gpt2-medium"] == 354823168);
    CHECK(counts["gpt2-large"] == 774030080);
    CHECK(counts["gpt2-xl"] == 1557611200);
}

// =================================================================================================
// §4 The layers: every gradient against finite differences
// =================================================================================================
// Each layer by itself, in double; then dropout.

// Two measurements of a gradient may differ by this much of the largest element of their tensor.
constexpr double kTolerance = 1e-7;
// What counts as "the largest" where a whole tensor's gradient is (almost) zero.
constexpr double kSmallest = 1e-3;

// df/dx by central differences of fourth order:
//   (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h, wrong by about h^4 f'''''/30
template <class Loss>
double slope(double& x, Loss&& loss) {
    const double h = 1e-4, before = x;
    auto at = [&](double offset) {
        x = before + offset;
        return loss();
    };
    const double near = at(h) - at(-h), far = at(2 * h) - at(-2 * h);
    x = before;
    return (8 * near - far) / (12 * h);
}

// An input of a layer: its values, and the gradient that the layer's backward claims.
struct Tensor {
    std::string name;
    std::vector<double> value, gradient;
    bool summed = false;  // the backward ran twice on it, the second time adding
    Tensor(std::string name, size_t count, uint64_t seed, double scale = 1, bool summed = false)
        : name(std::move(name)), value(random_vector(count, seed, scale)), gradient(count, 777.0),
          summed(summed) {}
    operator double*() { return value.data(); }
};

// How far a tensor's gradient is from its slopes: the largest difference, over the largest slope.
struct Found {
    std::string tensor;
    double worst = 0, largest = kSmallest;
    void add(double claim, double slope) {
        worst = worse(worst, std::abs(claim - slope));
        largest = std::max(largest, std::abs(slope));
    }
    double error() const { return worst / largest; }
};
inline double worst_of(const std::vector<Found>& all) {
    double worst = 0;
    for (const Found& found : all) worst = worse(worst, found.error());
    return worst;
}
inline std::string table_of(const std::vector<Found>& all) {
    std::string text;
    for (const Found& found : all)
        text += format("\n    %-28s %.2e", found.tensor.c_str(), found.error());
    return text;
}

// The elements of an array that are tried: all, or a seeded sample.
inline std::vector<size_t> tried(size_t count, size_t sample, uint64_t seed) {
    std::vector<size_t> list(std::min(count, sample));
    for (size_t n = 0; n < list.size(); ++n)
        list[n] = count <= sample ? n : random_bits(seed, n) % count;
    return list;
}
// Compares every tensor's gradient with differences of loss().
template <class Loss>
std::vector<Found> compare(std::vector<Tensor*> tensors, Loss&& loss, size_t sample = 120) {
    std::vector<Found> all;
    for (Tensor* tensor : tensors) {
        Found& found = all.emplace_back(Found{tensor->name});
        for (size_t i : tried(tensor->value.size(), sample, tensor->value.size()))
            found.add(tensor->gradient[i] / (tensor->summed ? 2 : 1),
                      slope(tensor->value[i], loss));
    }
    return all;
}
inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// Every check below makes a loss out of a layer: the dot product of its output with fixed numbers,
// `up`, which are therefore the gradient that comes from above.

template <class Device>
std::vector<Found> check_embed(Device device, int B, int T, int C, float p) {
    const int V = 5, P = T + 2;
    const size_t out_count = size_t(B) * T * C;
    const Dropout drop{11, p};
    const Batch batch = random_batch(1, B, T, V);
    Tensor wte("wte", size_t(V) * C, 2, 1, true), wpe("wpe", size_t(P) * C, 3, 1, true);
    std::vector<double> out(out_count), up = random_vector(out_count, 4);
    for (Tensor* t : {&wte, &wpe}) std::fill(t->gradient.begin(), t->gradient.end(), 0.0);
    for (int pass = 0; pass < 2; ++pass)
        device.embed_backward(wte.gradient.data(), wpe.gradient.data(), up.data(),
                              batch.inputs.data(), rows_by_token(batch.inputs).data(), B, T, C,
                              drop);
    return compare({&wte, &wpe}, [&] {
        device.embed_forward(out.data(), batch.inputs.data(), wte, wpe, B, T, C, 0, drop);
        return dot(out, up);
    });
}

// A branch joins the residual stream; a layernorm reads the stream, which also flows on past it:
//   s = residual + drop(x w + b)     loss = up . layernorm(s) + past . s
// layernorm_backward then has to join, to pass on through the mask, and to sum the bias gradient.
template <class Device>
std::vector<Found> check_layernorm(Device device, int rows, int C, float p, bool joined,
                                   bool in_place) {
    const int IN = 3;
    const size_t n = size_t(rows) * C;
    const Dropout drop{12, p};
    Tensor residual("residual", n, 1), x("x", size_t(rows) * IN, 2),
        w("w", size_t(IN) * C, 3, 1, true);
    Tensor b("b", size_t(C), 4, 1, true), weight("weight", size_t(C), 5, 1, true),
        bias("bias", size_t(C), 6, 1, true);
    std::vector<double> s(n), out(n), mean(static_cast<size_t>(rows)),
        rstd(static_cast<size_t>(rows)), dbranch(n, 777.0);
    const std::vector<double> up = random_vector(n, 7),
                              past = joined ? random_vector(n, 8) : std::vector<double>(n);
    auto loss = [&] {
        device.linear_residual_forward(s.data(), residual, x, w, b, rows, IN, C, drop);
        device.layernorm_forward(out.data(), mean.data(), rstd.data(), s.data(), weight, bias, rows,
                                 C, 1e-3);
        return dot(out, up) + dot(s, past);
    };
    loss();
    for (bool add : {false, true}) {
        double* dx = residual.gradient.data();
        if (in_place) std::copy(past.begin(), past.end(), dx);
        const double* dresidual = !joined ? nullptr : in_place ? dx : past.data();
        device.layernorm_backward(dx, weight.gradient.data(), bias.gradient.data(),
                                  drop.on() ? dbranch.data() : dx, b.gradient.data(), up.data(),
                                  dresidual, s.data(), mean.data(), rstd.data(), weight, rows, C,
                                  drop, add);
        device.linear_backward(x.gradient.data(), w.gradient.data(),
                               drop.on() ? dbranch.data() : dx, x, w, rows, IN, C, add);
    }
    return compare({&residual, &x, &w, &b, &weight, &bias}, loss);
}

template <class Device>
std::vector<Found> check_linear(Device device, int rows, int C, int OC) {
    Tensor x("x", size_t(rows) * C, 1), w("w", size_t(C) * OC, 2, 1, true);
    std::vector<double> out(size_t(rows) * OC), up = random_vector(out.size(), 4);
    const std::vector<double> b = random_vector(size_t(OC), 3);
    for (bool add : {false, true})
        device.linear_backward(x.gradient.data(), w.gradient.data(), up.data(), x, w, rows, C, OC,
                               add);
    return compare({&x, &w}, [&] {
        device.linear_forward(out.data(), x, w, b.data(), rows, C, OC);
        return dot(out, up);
    });
}

// fc = x 1 + b1 with the unit matrix, so that x's gradient is fc's; out = GELU(fc) w.
template <class Device>
std::vector<Found> check_linear_gelu(Device device, int rows, int C, int OC) {
    Tensor x("fc", size_t(rows) * C, 1, 1.5), b1("fc's bias", size_t(C), 2, 1, true);
    Tensor w("w", size_t(C) * OC, 3, 1, true);
    std::vector<double> unit(size_t(C) * C), fc(size_t(rows) * C), gelu(fc.size()),
        zero(static_cast<size_t>(OC));
    std::vector<double> out(size_t(rows) * OC), up = random_vector(out.size(), 4);
    for (int c = 0; c < C; ++c) unit[size_t(c) * C + c] = 1;
    auto loss = [&] {
        device.linear_gelu_forward(gelu.data(), fc.data(), x, unit.data(), b1, rows, C, C);
        device.linear_forward(out.data(), gelu.data(), w, zero.data(), rows, C, OC);
        return dot(out, up);
    };
    loss();
    for (bool add : {false, true})
        device.linear_gelu_backward(x.gradient.data(), w.gradient.data(), b1.gradient.data(),
                                    up.data(), gelu.data(), fc.data(), w, rows, C, OC, add);
    return compare({&x, &b1, &w}, loss);
}

template <class Device>
std::vector<Found> check_attention(Device device, int B, int T, int NH, int HS, float p) {
    const int C = NH * HS;
    const Dropout drop{13, p};
    Tensor qkv("qkv", size_t(B) * T * 3 * C, 1), bias("bias", size_t(3) * C, 3, 1, true);
    std::vector<double> out(size_t(B) * T * C), lse(size_t(B) * NH * T),
        up = random_vector(out.size(), 2), sums(qkv.value.size());
    auto loss = [&] {
        for (size_t i = 0; i < sums.size(); ++i)
            sums[i] = qkv.value[i] + bias.value[i % bias.value.size()];
        device.attention_forward(out.data(), lse.data(), sums.data(), B, T, NH, HS, drop);
        return dot(out, up);
    };
    loss();
    for (bool add : {false, true})
        device.attention_backward(qkv.gradient.data(), bias.gradient.data(), up.data(), out.data(),
                                  lse.data(), sums.data(), B, T, NH, HS, drop, add);
    // Queries, keys and values are three tensors in one: each is held against its own largest.
    std::vector<Found> all = compare({&bias}, loss);
    for (size_t third : {0, 1, 2}) {
        Found& found = all.emplace_back(Found{std::array{"queries", "keys", "values"}[third]});
        for (size_t i : tried(size_t(B) * T * C, 100, size_t(B) * T * C)) {
            const size_t at = i / C * 3 * C + third * C + i % C;
            found.add(qkv.gradient[at], slope(qkv.value[at], loss));
        }
    }
    return all;
}

template <class Device>
std::vector<Found> check_head(Device device, int rows, int C, int V) {
    const double scale = 0.7;
    Tensor x("x", size_t(rows) * C, 1), w("w", size_t(V) * C, 2, 1, true);
    const Batch batch = random_batch(3, rows, 1, V, 3);  // every third target is not scored
    std::vector<double> losses(static_cast<size_t>(rows)), logits(Device::head_workspace(rows, V));
    for (bool add : {false, true})
        device.head_forward_backward(losses.data(), x.gradient.data(), w.gradient.data(),
                                     logits.data(), x, w, batch.targets.data(), rows, C, V, scale,
                                     add);
    const std::vector<double> from_backward = losses;
    auto loss = [&] {
        device.head_forward(losses.data(), logits.data(), x, w, batch.targets.data(), rows, C, V);
        return scale * std::accumulate(losses.begin(), losses.end(), 0.0);
    };
    auto all = compare({&x, &w}, loss, rows > 200 ? 30 : 120);
    loss();
    all.push_back(
        {"losses", relative_error(from_backward.data(), losses.data(), losses.size()), 1});
    return all;
}

#define CHECK_GRADIENT(...)                            \
    do {                                               \
        const std::vector<Found> found_ = __VA_ARGS__; \
        worst = std::max(worst, worst_of(found_));     \
        INFO(#__VA_ARGS__ << table_of(found_));        \
        CHECK(worst_of(found_) < kTolerance);          \
    } while (0)

TEST_CASE("gradients: every layer's backward agrees with central differences") {
    Threads one(1);
    Reference<double> device;
    double worst = 0;
    for (float p : {0.0f, 0.3f}) {
        CAPTURE(p);
        for (const auto& s : {std::array{1, 1, 1}, {2, 3, 5}, {3, 7, 17}, {1, 13, 33}})
            CHECK_GRADIENT(check_embed(device, s[0], s[1], s[2], p));
        for (const auto& s : {std::array{1, 2}, {3, 5}, {7, 17}, {33, 8}, {65, 3}}) {
            CAPTURE(s[0]);
            CHECK_GRADIENT(check_layernorm(device, s[0], s[1], p, false, false));
            CHECK_GRADIENT(check_layernorm(device, s[0], s[1], p, true, false));
            CHECK_GRADIENT(check_layernorm(device, s[0], s[1], p, true, true));
        }
        for (const auto& s :
             {std::array{1, 1, 1, 1}, {2, 3, 2, 5}, {1, 13, 3, 4}, {2, 34, 1, 3}, {1, 67, 1, 2}}) {
            CAPTURE(s[1]);
            CHECK_GRADIENT(check_attention(device, s[0], s[1], s[2], s[3], p));
        }
    }
    for (const auto& s : {std::array{1, 1, 1}, {2, 3, 5}, {7, 5, 1}, {13, 17, 11}, {5, 33, 29}}) {
        CAPTURE(s[0]);
        CHECK_GRADIENT(check_linear(device, s[0], s[1], s[2]));
        CHECK_GRADIENT(check_linear_gelu(device, s[0], s[1], s[2]));
        CHECK_GRADIENT(check_head(device, s[0], s[1], s[2] + 1));
    }
    CHECK_GRADIENT(check_head(device, 1030, 3, 7));  // more rows than the head takes at a time
    MESSAGE("largest relative error of a layer: " << worst);
}

TEST_CASE("dropout: zero with probability p, otherwise scaled so that the mean stays") {
    const double n = 400000;
    for (float p : {0.1f, 0.5f, 0.9f}) {
        const Dropout a{random_key(1, 2, 3), p}, b{random_key(1, 2, 4), p};
        double zeros = 0, sum = 0, both = 0, pairs = 0;
        bool only_two = true;
        for (uint64_t i = 0; i < uint64_t(n); ++i) {
            const float scale = a.scale(i);
            zeros += scale == 0, sum += double(scale), both += scale == 0 && b.scale(i) == 0;
            pairs += scale == 0 && a.scale(i + 1) == 0;
            only_two = only_two && (scale == 0 || scale == 1 / (1 - p));
        }
        const double q = double(p), deviation = std::sqrt(q * (1 - q) / n);
        CAPTURE(p);
        CHECK(only_two);
        CHECK(std::abs(zeros / n - q) < 5 * deviation);
        CHECK(std::abs(sum / n - 1) < 5 * deviation / (1 - q));
        CHECK(std::abs(both / n - q * q) < 5 * q / std::sqrt(n));   // keys are independent
        CHECK(std::abs(pairs / n - q * q) < 5 * q / std::sqrt(n));  // so are neighbours
    }
    CHECK(!Dropout{5, 0.0f}.on());
}

TEST_CASE("dropout: the numbers below p 2^32 are dropped, as doubles would say") {
    for (float p : {0x1p-40f, 1e-9f, 0.1f, 0.3f, 0.5f, 0.9f, std::nextafter(1.0f, 0.0f)})
        for (uint64_t i = 0; i < 2000; ++i)
            CHECK((Dropout{7, p}.scale(i) == 0) ==
                  (double(random_bits(7, i) >> 32) < double(p) * 0x1p32));
}

TEST_CASE("dropout: on embeddings, branches and attention weights, not on the residual stream") {
    Threads one(1);
    Reference<double> device;
    const int B = 2, T = 50, C = 40, rows = B * T;
    const float p = 0.25f;
    const double kept = double(1 / (1 - p));
    const std::vector<double> ones(size_t(rows) * C * 3, 1.0), zeros(size_t(rows) * C, 0.0);
    const std::vector<double> twos(static_cast<size_t>(C), 2.0);
    const std::vector<int32_t> tokens(static_cast<size_t>(rows), 0);
    std::vector<double> out(size_t(rows) * C), lse(size_t(rows) * 4);
    auto check_quarter = [&](double dropped, double other) {
        double count = 0;
        for (double x : out) {
            count += x == dropped;
            CHECK((x == dropped || std::abs(x - other) < 1e-12));
        }
        CHECK(std::abs(count / double(out.size()) - 0.25) < 0.04);
    };
    device.embed_forward(out.data(), tokens.data(), ones.data(), zeros.data(), B, T, C, 0,
                         Dropout{1, p});
    check_quarter(0, kept);
    // Branch of 2 (a bias) onto a stream of 1: a dropped branch leaves the stream alone.
    device.linear_residual_forward(out.data(), ones.data(), ones.data(), zeros.data(), twos.data(),
                                   rows, C, C, Dropout{2, p});
    check_quarter(1, 1 + 2 * kept);
    // Values of 1 and equal scores: the output is the share of weights that stayed, times 1/(1-p).
    device.attention_forward(out.data(), lse.data(), ones.data(), B, T, 4, 10, Dropout{3, p});
    double sum = 0;
    for (size_t row = 0; row < size_t(rows); ++row)
        for (size_t h = 0; h < 4; ++h) {
            const double o = out[row * size_t(C) + h * 10], t = double(row % size_t(T)) + 1;
            CHECK(std::abs(o * t / kept - std::round(o * t / kept)) < 1e-9);
            sum += o;
        }
    CHECK(std::abs(sum / double(rows) / 4 - 1) < 0.06);
}

TEST_CASE("dropout: its own mask everywhere, in every micro-batch and step; none in evaluation") {
    Threads one(1);
    std::set<uint64_t> keys;
    for (int i = 0; i <= 9; ++i) {
        const Dropout drop = Pass{.dropout = {77, 0.5f}}.drop(i);
        CHECK(drop.p == 0.5f);
        keys.insert(drop.key);
        CHECK(!Pass{.dropout = {77, 0}}.drop(i).on());
    }
    const Config config{3, 2, 16, 8, 23, false, 0.5f};
    Lively<float> with(config, 2, 8), without({3, 2, 16, 8, 23}, 2, 8);
    const Batch batch = random_batch(1, 2, 8, 23);
    for (int64_t s = 0; s < 5; ++s)
        for (size_t i : {0, 1, 2})
            keys.insert(training_pass(config, {batch, batch, batch}, i, 9, s).dropout.key);
    CHECK(keys.size() == 10 + 15);
    const std::vector<float> losses = batch_losses(with, batch);
    CHECK(losses == batch_losses(without, batch));
    CHECK(losses == batch_losses(with, batch));
    // With a rate of 0 nothing is learned: only the masks can make a difference.
    std::set<double> seen;
    StepOptions o = plain_steps(0, 9);
    auto loss_of = [&](auto& model, const std::vector<Batch>& batches, int64_t s) {
        train_step(model, batches, o, s);
        return model.state->loss;
    };
    for (int64_t s = 0; s < 3; ++s) {
        seen.insert(loss_of(with, {batch, batch}, s));
        seen.insert(loss_of(with, {batch}, s + 100));
        seen.insert(loss_of(without, {batch}, s));
    }
    CHECK(seen.size() == 7);
    CHECK(seen.count(loss_of(with, {batch, batch}, 1)) == 1);  // the same step: the same masks
    o.seed = 4;
    CHECK(seen.count(loss_of(with, {batch, batch}, 1)) == 0);
}

// =================================================================================================
// §5, §6 The whole model
// =================================================================================================
// The gradient of every tensor, that these checks notice a fault, and PyTorch's numbers.

// The layers of §4 with one fault. The right function runs, but on inputs that make a sign or term
// wrong, or its result is spoilt.
struct Broken : Reference<double> {
    using Right = Reference<double>;
    std::string fault;  // "": nothing is wrong
    // The faults there are: those that were asked for without one.
    static inline std::set<std::string> all;
    bool is(const char* function, const char* what) const {
        const std::string name = std::string(function) + ": " + what;
        if (fault.empty()) all.insert(name);
        return fault == name;
    }
    static void negate(double* x, size_t count) {
        for (size_t i = 0; i < count; ++i) x[i] = -x[i];
    }

    template <class T>
    void zero(T* to, size_t count) {
        if (!is("model", "the embeddings' gradients are not cleared")) Right::zero(to, count);
    }

    void embed_backward(double* dwte, double* dwpe, const double* dout, const int32_t* tokens,
                        const int32_t* order, int B, int T, int C, Dropout drop) {
        auto bad = [&](const char* what) { return is("embed_backward", what); };
        std::vector<double> up(dout, dout + size_t(B) * T * C), nothing(size_t(T) * C);
        std::map<int32_t, int> last_of;
        for (int row = 0; row < B * T; ++row) last_of[tokens[row]] = row;
        for (int row = 0; row < B * T; ++row)
            if ((bad("a repeated token keeps its last row only") && row != last_of[tokens[row]]) ||
                (bad("the last row is left out") && row == B * T - 1))
                std::fill_n(&up[size_t(row) * C], C, 0.0);
        if (bad("the sign")) negate(up.data(), up.size());
        if (bad("the mask is left out")) drop = {};
        if (bad("wpe gets nothing")) dwpe = nothing.data();
        Right::embed_backward(dwte, dwpe, up.data(), tokens, order, B, T, C, drop);
    }

    void layernorm_backward(double* dx, double* dweight, double* dbias, double* dbranch,
                            double* dbranch_bias, const double* dout, const double* dresidual,
                            const double* x, const double* mean, const double* rstd,
                            const double* weight, int rows, int C, Dropout drop, bool accumulate) {
        auto bad = [&](const char* what) { return is("layernorm_backward", what); };
        if (bad("sets where it should add")) accumulate = false;
        if (bad("the residual's gradient is not joined")) dresidual = nullptr;
        Right::layernorm_backward(dx, dweight, dbias, dbranch, dbranch_bias, dout, dresidual, x,
                                  mean, rstd, weight, rows, C, drop, accumulate);
        for (int row = 0; row < rows; ++row) {
            const size_t at = size_t(row) * C;
            double mean_g = 0, mean_gn = 0;
            for (size_t i = at; i < at + C; ++i) {
                const double g = dout[i] * weight[i - at], normal = (x[i] - mean[row]) * rstd[row];
                mean_g += g / C, mean_gn += g * normal / C;
            }
            for (size_t i = at; i < at + C; ++i) {
                const size_t c = i - at;
                const double normal = (x[i] - mean[row]) * rstd[row];
                if (bad("dx without the mean's term")) dx[i] += rstd[row] * mean_g;
                if (bad("dx without the scale's term")) dx[i] += rstd[row] * normal * mean_gn;
                if (bad("the sign of the scale's term")) dx[i] += 2 * rstd[row] * normal * mean_gn;
                if (bad("dweight with x instead of the normalised x"))
                    dweight[c] += dout[i] * (x[i] - normal);
                if (bad("dbias's sign")) dbias[c] -= 2 * dout[i];
                if (bad("dbranch without the mask") && drop.on()) dbranch[i] = dx[i];
                if (bad("dbranch_bias misses the last row") && row == rows - 1 && dbranch_bias)
                    dbranch_bias[c] -= drop.on() ? dbranch[i] : dx[i];
            }
        }
    }

    void linear_backward(double* dx, double* dw, const double* dout, const double* x,
                         const double* w, int rows, int C, int OC, bool accumulate) {
        auto bad = [&](const char* what) { return is("linear_backward", what); };
        const size_t in = size_t(rows) * C;
        std::vector<double> up(dout, dout + size_t(rows) * OC), input(x, x + in);
        for (int row = 0; row < rows && bad("misses the last output"); ++row)
            up[size_t(row) * OC + OC - 1] = 0;
        if (bad("dw's sign")) negate(input.data(), in);
        Right::linear_backward(dx, dw, up.data(), input.data(), w, rows, C, OC,
                               accumulate || bad("adds where it should set"));
        if (bad("dx's sign")) negate(dx, in);
    }

    void linear_gelu_backward(double* dfc, double* dw, double* dfc_bias, const double* dout,
                              const double* gelu, const double* fc, const double* w, int rows,
                              int C, int OC, bool accumulate) {
        auto bad = [&](const char* what) { return is("linear_gelu_backward", what); };
        const size_t in = size_t(rows) * C;
        std::vector<double> dgelu(in), nothing(size_t(C) * OC);
        Right::linear_backward(dgelu.data(), nothing.data(), dout, gelu, w, rows, C, OC, false);
        Right::linear_gelu_backward(dfc, dw, dfc_bias, dout,
                                    bad("dw from fc instead of gelu") ? fc : gelu, fc, w, rows, C,
                                    OC, accumulate && !bad("sets where it should add"));
        for (size_t i = 0; i < in; ++i) {
            const double u = fc[i], k = std::sqrt(2 / M_PI), a = 0.044715;
            const double t = std::tanh(k * (u + a * u * u * u));
            const double front = dgelu[i] * 0.5 * u * (1 - t * t) * k;
            const double inner = front * (1 + 3 * a * u * u);
            if (bad("dfc_bias before the derivative")) dfc_bias[i % C] += dgelu[i] - dfc[i];
            if (bad("the derivative without its inner term")) dfc[i] -= inner;
            if (bad("the sign of the inner term")) dfc[i] -= 2 * inner;
            if (bad("the inner derivative without 3 * 0.044715 x^2")) dfc[i] -= inner - front;
        }
    }

    void attention_backward(double* dqkv, double* dqkv_bias, const double* dout, const double* out,
                            const double* lse, const double* qkv, int B, int T, int NH, int HS,
                            Dropout drop, bool accumulate) {
        auto bad = [&](const char* what) { return is("attention_backward", what); };
        const size_t C = size_t(NH) * HS, rows = size_t(B) * T, n = rows * 3 * C;
        // Of a second call, one part is taken: the queries', the keys' or the values' gradient.
        std::vector<double> nothing(rows * C), other(n), other_bias(3 * C),
            up(dout, dout + rows * C);
        auto take = [&](size_t part, Dropout its_drop) {
            Right::attention_backward(other.data(), other_bias.data(), up.data(), out, lse, qkv, B,
                                      T, NH, HS, its_drop, false);
            for (size_t i = 0; i < n; ++i)
                if (i / C % 3 == part) dqkv[i] = other[i];
        };
        Right::attention_backward(dqkv, dqkv_bias, dout,
                                  bad("without the D term") ? nothing.data() : out, lse, qkv, B, T,
                                  NH, HS, drop, accumulate || bad("adds where it should set"));
        for (size_t c = 0; c < 3 * C && bad("dqkv_bias misses the last row"); ++c)
            dqkv_bias[c] -= dqkv[(rows - 1) * 3 * C + c];
        for (size_t i = 0; i < n; ++i) {
            if (bad("dq's sign") && i / C % 3 == 0) dqkv[i] = -dqkv[i];
            if (bad("dk without 1/sqrt(HS)") && i / C % 3 == 1) dqkv[i] *= std::sqrt(HS);
        }
        if (bad("dv without the mask")) take(2, {});
        if (bad("dk misses the last query")) {
            for (int b = 1; b <= B; ++b) std::fill_n(&up[(size_t(b) * T - 1) * C], C, 0.0);
            take(1, drop);
        }
    }

    void head_forward_backward(double* losses, double* dx, double* dw, double* logits,
                               const double* x, const double* w, const int32_t* targets, int rows,
                               int C, int V, double scale, bool accumulate) {
        auto bad = [&](const char* what) { return is("head_forward_backward", what); };
        if (bad("without the scale")) scale = 1;
        if (bad("adds where it should set")) accumulate = true;
        if (bad("sets where it should add")) accumulate = false;
        Right::head_forward_backward(losses, dx, dw, logits, x, w, targets, rows, C, V, scale,
                                     accumulate);
        for (int row = 0; row < rows; ++row)
            for (int c = 0; c < C; ++c) {
                const size_t at = size_t(row) * C + c;
                const size_t pushed = size_t(std::max(targets[row], 0)) * C + c;
                if ((bad("without the minus one-hot") && targets[row] >= 0) ||
                    (bad("a target that is ignored still pushes") && targets[row] < 0))
                    dx[at] += scale * w[pushed], dw[pushed] += scale * x[at];
            }
        if (bad("dx's sign")) negate(dx, size_t(rows) * C);
    }
};

// Runs the layer check that a fault's function belongs to, on shapes where every term matters.
inline std::vector<Found> check_function(const std::string& function, Broken device) {
    if (function == "embed_backward") return check_embed(device, 3, 7, 5, 0.3f);
    if (function == "layernorm_backward") return check_layernorm(device, 13, 7, 0.3f, true, true);
    if (function == "linear_backward") return check_linear(device, 7, 5, 11);
    if (function == "linear_gelu_backward") return check_linear_gelu(device, 7, 5, 3);
    if (function == "attention_backward") return check_attention(device, 2, 7, 2, 3, 0.3f);
    if (function == "head_forward_backward") return check_head(device, 7, 5, 11);
    return {};
}

// A step of the model: its micro-batches, and how many of its weights are tried.
struct ModelCase {
    Config config;
    std::vector<Batch> batches;
    Pass pass(size_t i) const { return training_pass(config, batches, i, 99, 0); }
};
inline ModelCase small_case(bool untied, float dropout) {
    ModelCase c;
    c.config = {2, 3, 12, 8, 11, untied, dropout};
    // Three: one is set, and two are added to it, in place.
    c.batches = {random_batch(1, 2, 5, 11, 4), random_batch(2, 2, 5, 11),
                 random_batch(3, 1, 3, 11)};
    return c;
}
template <class Device>
std::unique_ptr<Gpt2<Device>> model_of(const ModelCase& c, Device device = {}) {
    auto model = std::make_unique<Gpt2<Device>>(c.config, device);
    model->reserve(c.batches[0].B, c.batches[0].T, Use::training);
    set_lively_weights(*model, 5);
    return model;
}

// The loss of the step as forward sees it.
inline double loss_of(Gpt2<Reference<double>>& model, const ModelCase& c) {
    double total = 0;
    for (size_t i = 0; i < c.batches.size(); ++i) {
        const Pass pass = c.pass(i);
        const int rows = pass.B * pass.T;
        set_batch(model, c.batches[i]);
        forward(model, pass);
        model.device.head_forward(model.a.losses, model.a.logits, model.a.ln_f, model.w.lm_head,
                                  model.a.targets, rows, c.config.n_embd, c.config.vocab_size);
        total += std::accumulate(model.a.losses, model.a.losses + rows, 0.0);
    }
    return total * c.pass(0).scale;
}

// The gradient of the step as backward makes it; it must not matter what was in memory before.
template <class Device>
std::vector<double> gradient_of(const ModelCase& c, Device device = {}) {
    auto model = model_of<Device>(c, device);
    for (const TensorInfo& t : model->layout.tensors)
        std::fill(model->grads + t.offset, model->grads + t.offset + t.count, 777);
    for (size_t i = 0; i < c.batches.size(); ++i) {
        set_batch(*model, c.batches[i]);
        forward(*model, c.pass(i));
        backward(*model, c.pass(i));
    }
    return std::vector<double>(model->grads, model->grads + model->layout.size);
}

// The slopes of a model at some of its weights: all of a small tensor, a sample of a large one.
struct Slopes {
    struct Of {
        std::string name;
        std::vector<size_t> at;  // places in the flat array
        std::vector<double> value;
    };
    std::vector<Of> tensors;
};
inline Slopes measure_slopes(const ModelCase& c, size_t sample) {
    auto model = model_of<Reference<double>>(c);
    Slopes slopes;
    for (size_t t = 0; t < model->layout.tensors.size(); ++t) {
        const TensorInfo& info = model->layout.tensors[t];
        Slopes::Of of{info.name, {}, {}};
        for (size_t i : tried(info.count, sample, t + 1000)) {
            of.at.push_back(info.offset + i);
            of.value.push_back(
                slope(model->weights[info.offset + i], [&] { return loss_of(*model, c); }));
        }
        slopes.tensors.push_back(of);
    }
    return slopes;
}
inline std::vector<Found> compare(const Slopes& slopes, const std::vector<double>& gradient) {
    std::vector<Found> all;
    for (const Slopes::Of& of : slopes.tensors) {
        Found& found = all.emplace_back(Found{of.name});
        for (size_t n = 0; n < of.at.size(); ++n) found.add(gradient[of.at[n]], of.value[n]);
    }
    return all;
}

TEST_CASE("gradients: every tensor's agrees with central differences") {
    Threads one(1);
    double worst = 0;
    size_t tried = 0;
    for (bool untied : {false, true})
        for (float dropout : {0.0f, 0.25f}) {
            CAPTURE(untied);
            CAPTURE(dropout);
            const ModelCase c = small_case(untied, dropout);
            const Slopes slopes = measure_slopes(c, 40);
            CHECK(slopes.tensors.size() == size_t(2 + 12 * c.config.n_layer + 2 + untied));
            for (const auto& of : slopes.tensors) tried += of.at.size();
            CHECK_GRADIENT(compare(slopes, gradient_of<Reference<double>>(c)));
        }
    MESSAGE("largest relative error of " << tried << " slopes: " << worst);
}

TEST_CASE("gradients: the checks notice every single broken sign and term") {
    Threads one(1);
    const ModelCase c = small_case(true, 0.25f);
    const Slopes slopes = measure_slopes(c, 12);
    CHECK(worst_of(compare(slopes, gradient_of(c, Broken()))) < kTolerance);  // no fault, no alarm
    std::map<std::string, int> faults_of;
    double quietest = INFINITY;
    const std::set<std::string> faults = Broken::all;
    for (const std::string& fault : faults) {
        const std::string function = fault.substr(0, fault.find(':'));
        ++faults_of[function];
        Broken device;
        CHECK(worst_of(check_function(function, device)) < kTolerance);
        device.fault = fault;
        const std::vector<Found> layer = check_function(function, device);
        const std::vector<Found> whole = compare(slopes, gradient_of(c, device));
        INFO(fault << "\n  the layer's check says" << table_of(layer) << "\n  the model's says"
                   << table_of(whole));
        if (function != "model") CHECK(worst_of(layer) > 100 * kTolerance);
        CHECK(worst_of(whole) > 100 * kTolerance);
        quietest =
            std::min({quietest, worst_of(whole), layer.empty() ? INFINITY : worst_of(layer)});
    }
    for (const char* function : {"embed", "layernorm", "linear", "linear_gelu", "attention"})
        CHECK_MESSAGE(faults_of[std::string(function) + "_backward"] >= 4, function);
    CHECK(faults_of["head_forward_backward"] >= 4);
    MESSAGE(faults.size() << " faults noticed; the least error is " << quietest);
}

TEST_CASE("gradients: the fast device's agree with the reference's") {
    Threads one(1);
    for (bool untied : {false, true}) {
        const ModelCase c = small_case(untied, 0.25f);
        const std::vector<double> truth = gradient_of<Reference<double>>(c),
                                  found = gradient_of<Cpu>(c);
        for (const TensorInfo& t : layout_of(c.config).tensors) {
            CAPTURE(t.name);
            CHECK(relative_error(&found[t.offset], &truth[t.offset], t.count) < 2e-5);
        }
    }
}

// Compares one tensor, by max|a-b| / max|b|. The key third of c_attn.bias has a gradient of exactly
// zero in theory (softmax ignores a constant): it is held against the whole bias.
inline double reference_error(const TensorInfo& t, const double* found,
                              const std::vector<double>& truth) {
    if (t.name.find("c_attn.bias") == std::string::npos)
        return relative_error(found, truth.data(), t.count);
    const size_t C = t.count / 3;
    double whole = 0, error = 0;
    for (size_t i = 0; i < t.count; ++i) whole = std::max(whole, std::abs(truth[i]));
    for (size_t i = C; i < 2 * C; ++i)
        error = std::max(error, std::abs(found[i] - truth[i]) / whole);
    return std::max({error, relative_error(found, truth.data(), C),
                     relative_error(found + 2 * C, truth.data() + 2 * C, C)});
}

// Logits, gradients, loss and norm of ten steps, and in double the final weights, against the
// reference; says how far each was off. Why no weights in float: AdamW divides by sqrt(v), so where
// a gradient happens to be almost 0 its rounding moves a weight as far as any other.
template <class Device>
std::string compare_with_reference(const std::string& folder) {
    using real = typename Device::Real;
    CAPTURE(folder);
    const PyTorchNumbers reference(folder);
    const bool in_double = sizeof(real) == 8;
    // float32 keeps 24 bits: 6e-8 of an element.
    const double stored = reference.compact ? 3e-7 : 1e-9, tolerance = in_double ? stored : 1e-4;
    const Config& config = reference.config;
    const Batch& batch = reference.batch;
    Gpt2<Device> model(config);
    model.reserve(batch.B, batch.T, Use::training);
    read_weights(model, reference);

    std::map<std::string, double> worst;
    auto check = [&](const std::string& what, double error, double most) {
        CHECK(error < most);
        worst[what] = std::max(worst[what], error);
    };
    auto check_tensors = [&](const std::string& what, const auto* values) {
        for (const TensorInfo& t : model.layout.tensors) {
            const std::vector<double> found(values + t.offset, values + t.offset + t.count);
            CAPTURE(t.name);
            check(what, reference_error(t, found.data(), reference.read(what + "." + t.name)),
                  tolerance);
        }
    };
    const int rows = batch.B * batch.T, C = config.n_embd, V = config.vocab_size;
    set_batch(model, batch);
    forward(model, {.B = batch.B, .T = batch.T});
    std::vector<real> logits(size_t(rows) * V);
    model.device.head_logits(logits.data(), model.a.ln_f, model.w.lm_head, rows, C, V);
    check("logits", relative_error(logits.data(), reference.read("logits").data(), logits.size()),
          tolerance);

    const StepOptions& options = reference.options;
    const auto losses = reference.read("step.loss"), norms = reference.read("step.grad_norm"),
               rates = reference.read("step.lr");
    REQUIRE(losses.size() == size_t(options.rate.steps));
    for (int64_t s = 0; s < options.rate.steps; ++s) {
        train_step(model, {batch}, options, s);
        CAPTURE(s);
        const StepState& state = *model.state;
        check("step", std::abs(state.loss / losses[size_t(s)] - 1), in_double ? 1e-9 : 1e-4);
        check("step", std::abs(state.grad_norm / norms[size_t(s)] - 1), in_double ? 1e-9 : 1e-4);
        CHECK(state.lr == doctest::Approx(rates[size_t(s)]).epsilon(1e-14));
        if (s > 0) continue;
        check("loss", std::abs(state.loss / reference.read("loss")[0] - 1),
              in_double ? stored : 1e-5);
        check_tensors("grad", model.grads);
    }
    if (in_double && !reference.compact) check_tensors("final", model.weights);
    std::string said =
        folder.substr(folder.rfind('/') + 1) + (in_double ? ", double:" : ", float:");
    for (const auto& [what, error] : worst) said += format(" %s %.0e", what.c_str(), error);
    return said;
}

TEST_CASE("reference: logits, gradients and ten AdamW steps are PyTorch's") {
    Threads one(1);
    for (const char* name : {"gpt2-tied", "gpt2-untied", "gpt2-head64"}) {
        const std::string folder = reference_folder(name);
        if (folder.empty()) continue;
        MESSAGE("\n" << compare_with_reference<Reference<double>>(folder));
        MESSAGE("\n" << compare_with_reference<Cpu>(folder));
    }
}

TEST_CASE_TEMPLATE("memory: GELUs made again in backward are the same numbers, in less memory",
                   real, float, double) {
    Config config{3, 2, 12, 9, 31};
    const Batch batch = random_batch(5, 2, 9, 31);  // 18 rows of 48: edges of every kind
    auto run = [&](bool recompute) {
        config.recompute_gelu = recompute;
        Lively<real> model(config, 2, 9);
        train_step(model, {batch, batch}, plain_steps(1e-2, 1), 0);
        return std::pair(model.gradients(), model.get_weights());
    };
    CHECK(run(true) == run(false));
    auto bytes = [&](bool recompute, Use use) {
        config.recompute_gelu = recompute;
        return memory_need<DeviceOf<real>>(config, 2, 9, use).total();
    };
    const size_t one = round_up(2 * 9 * 4 * 12 * sizeof(real), 256);  // gelu of a layer
    CHECK(bytes(false, Use::training) - bytes(true, Use::training) == 2 * one);
    CHECK(bytes(false, Use::evaluation) == bytes(true, Use::evaluation));
}

// =================================================================================================
// §7 The update
// =================================================================================================
// Learning rate, clipping, guards and AdamW, each against its formula.

TEST_CASE("schedule: warm-up, then each shape, at their corners") {
    constexpr Schedule cosine = Schedule::cosine, linear = Schedule::linear, wsd = Schedule::wsd;
    for (Schedule schedule : {cosine, linear, Schedule::constant, wsd}) {
        CAPTURE(int(schedule));
        const LearningRate rate{schedule, 0.5, 0.1, 5, 20};
        for (int s = 0; s < 5; ++s)
            CHECK(learning_rate(rate, s) == doctest::Approx(0.5 * (s + 1) / 5).epsilon(1e-15));
        for (int s = 5; s < 20; ++s) {
            const double now = learning_rate(rate, s);
            CHECK((now >= learning_rate(rate, s + 1) && now >= 0.05 && now <= 0.5));
        }
        CHECK(std::isfinite(learning_rate({schedule, 0.5, 0.1, 0, 0}, 0)));  // no step at all
        const double end = schedule == Schedule::constant ? 0.5 : 0.05;
        const std::tuple<LearningRate, int64_t, double> cases[] = {
            {rate, 5, 0.5},                            // r = 0: the peak
            {rate, 20, end},                           // one past the last step
            {{schedule, 0.5, 1.0, 0, 20}, 17, 0.5},    // lo = peak
            {{schedule, 0.5, 0.1, 40, 20}, 19, 0.25},  // warm-up beyond N
            {{schedule, 0.5, 0.1, 20, 20}, 19, 0.5},   // exactly N
            {{schedule, 0.5, 0.1, 0, 1}, 0, 0.5},      // one step
            {{schedule, 0.5, 0.1, 1, 1}, 0, 0.5},
        };
        for (const auto& [r, s, expected] : cases)
            CHECK(learning_rate(r, s) == doctest::Approx(expected).epsilon(1e-14));
    }
    const double half = 1 - std::sqrt(0.5);  // of wsd's decay
    const std::tuple<LearningRate, int64_t, double> cases[] = {
        {{cosine, 1, 0.1, 4, 20}, 12, 0.1 + 0.9 * 0.5},
        {{cosine, 1, 0.1, 0, 3}, 1, 0.1 + 0.9 * 0.75},
        {{linear, 1, 0, 4, 20}, 8, 0.75},
        {{linear, 1, 0.2, 4, 20}, 8, 0.8},
        {{wsd, 1, 0.1, 2, 10}, 7, 1},
        {{wsd, 1, 0.1, 2, 10}, 8, 1},  // r' = 0
        {{wsd, 1, 0.1, 2, 10}, 9, 0.1 + 0.9 * half},
        {{wsd, 1, 0, 0, 1000}, 900, half},
        {{wsd, 1, 0.1, 9, 10}, 8, 1},  // warm-up into the decay
        {{wsd, 1, 0.1, 9, 10}, 9, 0.1 + 0.9 * half},
    };
    for (const auto& [r, s, expected] : cases)
        CHECK(learning_rate(r, s) == doctest::Approx(expected).epsilon(1e-14));
}

TEST_CASE("guards: a norm above the limit is scaled to it exactly, any other left alone") {
    Threads one(1);
    for (auto [norm, limit, scale] : {std::array{4.0, 1.0, 0.25},
                                      {3, 2, 2.0 / 3.0},
                                      {1, 1, 1},
                                      {0.5, 1, 1},
                                      {0, 1, 1},
                                      {1e30, 0, 1}}) {  // 0: no limit
        StepState state;
        state.loss = 1, state.grad_norm = norm;
        judge_step(&state, {limit, 0});
        CHECK((state.skip == 0 && state.clip_scale == scale));
        CHECK(state.grad_norm == norm);  // the log has the norm before clipping
    }
    // The device's norm is that of all elements, and any number of them.
    for (size_t n : {size_t(1), size_t(1000), size_t(16384), size_t(16385), size_t(50001)}) {
        const std::vector<double> g = random_vector(n, n);
        StepState state;
        set_norm(Reference<double>(), &state, g.data(), n);
        CHECK(state.grad_norm == doctest::Approx(std::sqrt(dot(g, g))).epsilon(1e-13));
    }
}

TEST_CASE("guards: NaN and infinity are never let through, outliers only if asked") {
    const double nan = std::numeric_limits<double>::quiet_NaN(), inf = INFINITY;
    for (auto [loss, norm] :
         {std::pair{nan, 1.0}, {1.0, nan}, {inf, 1.0}, {-inf, 1.0}, {1.0, inf}, {nan, nan}}) {
        StepState state;
        state.loss = loss, state.grad_norm = norm;
        judge_step(&state, {1, 0});
        CHECK((state.broken == 1 && state.skip == 1 && state.updates == 0 && state.skipped == 1 &&
               state.outliers == 0 && state.seen == 0));  // and not remembered
        state.loss = 1, state.grad_norm = 1;
        judge_step(&state, {1, 0});  // the next good step is good
        CHECK((state.broken == 0 && state.skip == 0 && state.updates == 1 && state.skipped == 1 &&
               state.outliers == 0 && state.seen == 1));
    }
    for (double z : {0.0, 5.0}) {
        StepState state;
        auto step = [&](double loss, double norm) {
            state.loss = loss, state.grad_norm = norm;
            judge_step(&state, {0, z});
            return state.skip;
        };
        const int window = StepState::kWindow;
        for (int i = 0; i <= 2 * window; ++i) {
            // Before the window is full, nothing is an outlier.
            const bool jump = i == 50 || i == window;
            const double loss = jump ? 9 : 3 + 0.1 * random_normal(1, uint64_t(i));
            CHECK(step(loss, 1 + 0.1 * random_normal(2, uint64_t(i))) == (i == window && z > 0));
        }
        const int64_t before = state.updates;
        CHECK(step(3.2, 1.2) == 0);    // two deviations
        CHECK(step(2, 0.2) == 0);      // far below is no harm
        CHECK(step(3, 2) == (z > 0));  // a norm ten deviations above
        CHECK(step(5, 1) == (z > 0));  // a loss twenty above
        CHECK(state.outliers == (z > 0 ? 3 : 0));
        CHECK(state.updates == before + (z > 0 ? 2 : 4));
        CHECK(state.broken == 0);
    }
    const double equal[] = {2, 2, 2}, spread[] = {1, 3};
    CHECK(z_score(equal, 3, 7) == 0);  // no spread, no judgement
    CHECK(z_score(spread, 2, 5) == 3);
}

TEST_CASE("guards: a broken step changes neither weights nor moments") {
    Threads one(1);
    for (double poison : {std::nan(""), double(INFINITY), 1e38}) {
        CAPTURE(poison);
        Lively<float> model(Config{1, 2, 8, 8, 11}, 2, 8);
        const Batch batch = random_batch(1, 2, 8, 11);
        const StepOptions o = plain_steps(1e-2, 9);
        train_step(model, {batch}, o, 0);
        const size_t at = size_t(model.w.h[0].c_fc_weight - model.weights) + 3;
        const float good = std::exchange(model.weights[at], float(poison));
        auto all = [&] {
            std::string bytes;
            for (const float* array : {model.weights, model.moments[0], model.moments[1]})
                bytes.append(reinterpret_cast<const char*>(array),
                             model.layout.size * sizeof(float));
            return bytes;
        };
        const std::string before = all();
        train_step(model, {batch}, o, 1);
        if (poison == 1e38 && !model.state->broken) continue;  // it may survive the layernorm
        CHECK((model.state->broken == 1 && model.state->updates == 1));
        CHECK(all() == before);
        model.weights[at] = good;
        train_step(model, {batch}, o, 2);
        CHECK((model.state->broken == 0 && model.state->updates == 2));
        for (float w : model.get_weights()) REQUIRE(std::isfinite(w));
    }
}

TEST_CASE("adamw: agrees with its formula; only what comes before `decayed` decays") {
    Threads one(1);
    const size_t n = 1000, decayed = 320;
    const AdamW hyper{0.9, 0.95, 1e-8, 0.1};
    std::vector<double> w = random_vector(n, 1), m(n), v(n), g(n);
    std::vector<long double> W(w.begin(), w.end()), M(n), V(n);
    for (int t = 1; t <= 7; ++t) {
        const double lr = 0.01 * t, clip = 1.0 / t;
        StepState state;
        state.lr = lr, state.updates = t, state.clip_scale = clip, state.skip = t == 4;
        for (size_t i = 0; i < n; ++i)  // gradients down to eps and below
            g[i] = random_normal(uint64_t(t + 10), i) * std::pow(10.0, -double(i % 12));
        Reference<double>().adamw(w.data(), w.data(), m.data(), v.data(), g.data(), n, decayed,
                                  &state, hyper);
        for (size_t i = 0; i < n && !state.skip; ++i) {
            const long double d = static_cast<long double>(g[i]) * clip;
            M[i] = 0.9L * M[i] + 0.1L * d, V[i] = 0.95L * V[i] + 0.05L * d * d;
            const long double mean = M[i] / (1 - std::pow(0.9L, t));
            const long double square = V[i] / (1 - std::pow(0.95L, t));
            const long double decay = i < decayed ? 0.1L : 0.0L;
            W[i] -= lr * (mean / (std::sqrt(square) + 1e-8L) + decay * W[i]);
        }
    }
    double worst = 0;
    for (size_t i = 0; i < n; ++i) worst = std::max(worst, double(std::abs(w[i] - W[i])));
    CHECK(worst < 1e-14);
    // Without gradients only decay is left: matrices shrink by lr * decay, vectors stay.
    Gpt2<Cpu> model(Config{1, 2, 8, 8, 11, true});
    model.reserve(1, 8, Use::training);
    std::fill(model.weights, model.weights + model.layout.size, 1.0f);
    model.state->lr = 0.5, model.state->updates = 1;
    model.device.adamw(model.weights, model.masters, model.moments[0], model.moments[1],
                       model.grads, model.layout.size, model.layout.decayed, model.state, hyper);
    for (const TensorInfo& t : model.layout.tensors) {
        CAPTURE(t.name);
        const float expected = t.shape.size() == 2 ? 0.95f : 1.0f;
        for (size_t i = 0; i < t.count; ++i)
            REQUIRE(std::abs(model.weights[t.offset + i] - expected) <= 1e-6f);
    }
}

// =================================================================================================
// §8 Training
// =================================================================================================
// Steps: they learn, the same bits on any number of threads, micro-batches add up.

TEST_CASE("training: one batch is learned by heart") {
    Threads one(1);
    Gpt2<Cpu> model(Config{2, 2, 32, 16, 50});
    model.initialise(1);
    model.reserve(4, 16, Use::training);
    Batch batch = random_batch(6, 4, 16, 50);
    for (size_t i = 0; i + 1 < batch.inputs.size(); ++i) batch.targets[i] = batch.inputs[i + 1];
    const StepOptions o = plain_steps(1e-2, 200);
    train_step(model, {batch}, o, 0);
    CHECK(model.state->loss == doctest::Approx(std::log(50.0)).epsilon(0.02));  // knows nothing yet
    int64_t s = 1;
    while (s < 200 && model.state->loss >= 0.01) train_step(model, {batch}, o, s++);
    MESSAGE("loss " << model.state->loss << " after " << s << " steps");
    CHECK(model.state->loss < 0.01);
}

TEST_CASE("training: the same weights, bit for bit, for 1, 2 and 3 threads, dropout on") {
    auto run = [](auto real, int threads) {
        Threads some(threads);
        Lively<decltype(real)> model(Config{2, 3, 33, 19, 101, false, 0.1f}, 3, 19);
        std::vector<double> losses;
        for (int64_t s = 0; s < 2; ++s) {
            const Batch first = random_batch(uint64_t(2 * s), 3, 19, 101, 7);
            const Batch second = random_batch(uint64_t(2 * s + 1), 3, 19, 101);
            train_step(model, {first, second}, plain_steps(1e-2, 2), s);
            losses.push_back(model.state->loss), losses.push_back(model.state->grad_norm);
        }
        return std::pair(losses, model.get_weights());
    };
    const auto one = run(0.0f, 1);
    const auto one_bf16 = run(bf16(0.0f), 1);
    for (int threads : {1, 2, 3}) {
        CHECK(one == run(0.0f, threads));
        CHECK(one_bf16 == run(bf16(0.0f), threads));
    }
    CHECK(run(0.0, 1) == run(0.0, 3));
}

TEST_CASE("training: k accumulated micro-batches are one batch k times as large") {
    Threads one(1);
    const Batch whole = random_batch(8, 6, 8, 23, 5);  // the parts have unequal numbers of targets
    auto run = [&](int k) {
        const int B = 6 / k;
        std::vector<Batch> parts(size_t(k), Batch(B, 8));
        for (size_t i = 0; i < parts.size(); ++i) {
            const ptrdiff_t begin = ptrdiff_t(i) * B * 8;
            std::copy_n(whole.inputs.begin() + begin, B * 8, parts[i].inputs.begin());
            std::copy_n(whole.targets.begin() + begin, B * 8, parts[i].targets.begin());
            for (int32_t target : parts[i].targets) parts[i].scored += target >= 0;
        }
        Lively<double> model(Config{2, 2, 16, 8, 23}, B, 8);
        train_step(model, parts, plain_steps(1e-2, 1), 0);
        return std::tuple(model.state->loss, model.gradients(), model.get_weights());
    };
    const auto [loss, grads, weights] = run(1);
    for (int k : {2, 3, 6}) {
        const auto [part_loss, part_grads, part_weights] = run(k);
        CAPTURE(k);
        CHECK(std::abs(part_loss / loss - 1) < 1e-12);
        CHECK(relative_error(part_grads.data(), grads.data(), grads.size()) < 1e-12);
        // Careful: AdamW divides by |g|, so a gradient of nearly 0 (the keys' bias) is noise.
        CHECK(relative_error(part_weights.data(), weights.data(), weights.size()) < 1e-9);
    }
}

TEST_CASE("training: nothing but the list's tensors has a gradient or a weight") {
    Threads one(1);
    Lively<float> model(Config{2, 3, 9, 7, 13, true, 0.1f}, 2, 7);
    for (int64_t s = 0; s < 3; ++s)
        train_step(model, {random_batch(uint64_t(s), 2, 7, 13)}, plain_steps(1e-2, 3), s);
    std::vector<char> named(model.layout.size, 0);
    double squares = 0;
    for (const TensorInfo& t : model.layout.tensors)
        for (size_t i = t.offset; i < t.offset + t.count; ++i) {
            CHECK_MESSAGE(named[i] == 0, t.name << " overlaps another tensor");
            named[i] = 1, squares += double(model.grads[i]) * double(model.grads[i]);
        }
    for (size_t i = 0; i < named.size(); ++i)
        if (!named[i])
            REQUIRE((model.weights[i] == 0 && model.grads[i] == 0 && model.moments[0][i] == 0 &&
                     model.moments[1][i] == 0));
    CHECK(model.state->grad_norm == doctest::Approx(std::sqrt(squares)).epsilon(1e-9));
}

// =================================================================================================
// §9 Evaluation and generation
// =================================================================================================
// Every prediction scored once; text from the cache, and how a token is chosen.

TEST_CASE("evaluation: every prediction is scored exactly once, and the mean is the mean") {
    Threads one(1);
    TemporaryFolder folder;
    const int V = 30, eot = 29;
    for (uint64_t s = 0; s < 3; ++s) {
        std::vector<uint16_t> tokens(std::array{61, 1, 40}[s], eot);
        for (uint64_t i = 1; i < tokens.size(); ++i)
            if (random_bits(s, i) % 9 > 0) tokens[i] = uint16_t(random_bits(s + 9, i) % 29);
        put_shard(folder / format("val_%06d.bin", int(s)), tokens);
    }
    const Shards shards(folder / "val_*.bin");
    // Abcdef Ghij Klmno, as §9 has it: K is read with G before it, though eight were scored.
    put_shard(folder / "example.bin", {0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4});
    std::vector<std::array<int64_t, 3>> example;
    for (const Window& w : evaluation_windows(Shards(folder / "example.bin"), 8, 0))
        example.push_back({w.begin, w.count, w.skip});
    CHECK(example == std::vector<std::array<int64_t, 3>>{{0, 8, 0}, {6, 8, 2}});
    Lively<double> model(Config{1, 2, 8, 16, V, false, 0.5f}, 1, 1, Use::evaluation);
    for (int T : {1, 4, 16})
        for (int document_start : {-1, eot}) {
            CAPTURE(T);
            CAPTURE(document_start);
            const auto windows = evaluation_windows(shards, T, document_start);
            std::map<std::pair<const Shard*, int64_t>, int> hits;
            for (const Window& w : windows) {
                REQUIRE((w.count <= T && w.skip < w.count));
                for (int64_t t = w.skip; t < w.count; ++t) ++hits[{w.shard, w.begin + t}];
                uint16_t first = 0;
                w.shard->read(&first, w.begin, 1);
                // Whole documents, unless longer than T.
                if (document_start >= 0)
                    REQUIRE((first == eot || w.skip == 0));
                else
                    REQUIRE(w.skip == 0);
            }
            CHECK(hits.size() == 60 + 39);
            for (const auto& [prediction, times] : hits) CHECK(times == 1);
            for (int64_t limit : {1, 59, 60, 61, 98, 99, 1000}) {  // the first of them, each once
                std::set<std::pair<const Shard*, int64_t>> first;
                for (const Window& w : evaluation_windows(shards, T, document_start, limit))
                    for (int64_t t = w.skip; t < w.count; ++t) first.insert({w.shard, w.begin + t});
                auto next = hits.begin();
                CHECK(first.size() == size_t(std::min<int64_t>(limit, 99)));
                for (const auto& prediction : first) CHECK(prediction == (next++)->first);
            }
            model.reserve(1, T, Use::evaluation);
            double total = 0;
            int64_t scored = 0;
            for (const Window& w : windows) {  // one at a time
                const Batch batch = read_batch(std::span(&w, 1), 1, T, V);
                for (double loss : batch_losses(model, batch)) total += loss;
                scored += batch.scored;
            }
            CHECK(scored == 99);
            for (int B : {1, 5}) {
                model.reserve(B, T, Use::evaluation);
                const Evaluation e = evaluate(model, windows, std::vector<int>(size_t(V), 3));
                CHECK((e.tokens == 99 && e.bytes == 297));
                CHECK(e.total == doctest::Approx(total).epsilon(1e-12));
                CHECK(e.loss() == doctest::Approx(total / 99).epsilon(1e-12));
                CHECK(e.perplexity() == doctest::Approx(std::exp(total / 99)).epsilon(1e-12));
                CHECK(e.bits_per_byte() ==
                      doctest::Approx(total / std::log(2.0) / 297).epsilon(1e-12));
            }
        }
}

TEST_CASE("generation: the key/value cache gives the logits of the full forward pass") {
    Threads one(1);
    const Config config{3, 3, 24, 20, 31};
    const Batch batch = random_batch(3, 1, 20, 31);
    Lively<double> full(config, 1, 20, Use::evaluation), cached(config, 1, 20, Use::generation);
    set_batch(full, batch);
    forward(full, {.B = 1, .T = 20});
    std::vector<double> logits(20 * 31);
    full.device.head_logits(logits.data(), full.a.ln_f, full.w.lm_head, 20, 24, 31);
    double worst = 0;
    for (const std::vector<int>& parts :
         {std::vector<int>{20}, std::vector<int>(10, 1), {5, 1, 7, 2, 1, 4}, {19, 1}}) {
        int past = 0;
        for (int n : parts) {
            const auto begin = batch.inputs.begin() + past;
            const std::vector<float> next = next_logits(cached, {begin, begin + n}, past);
            past += n;
            const double* truth = logits.data() + size_t(past - 1) * 31;
            worst = std::max(worst, relative_error(cached.a.next_logits, truth, 31));
            CHECK(relative_error(next.data(), truth, 31) < 1e-6);  // handed over as float
        }
    }
    CHECK(worst < 1e-12);
}

TEST_CASE("generation: temperature, top-k and top-p choose the candidates") {
    const std::vector<float> logits = {1, 3, 2, 3, -1};
    auto cut = [&](double temperature, int top_k, double top_p) {
        return likeliest(candidates(logits, temperature), top_k, top_p);
    };
    auto tokens_of = [](const std::vector<Candidate>& list) {
        std::string tokens;
        for (const Candidate& c : list) tokens += std::to_string(c.token);
        return tokens;
    };
    auto sum_of = [](const std::vector<Candidate>& list) {
        double sum = 0;
        for (const Candidate& c : list) sum += c.probability;
        return doctest::Approx(sum).epsilon(1e-12);
    };
    CHECK(tokens_of(candidates(logits, 1)) == "01234");
    // p = e^3 : e^3 : e^2 : e : 1/e = .397, .397, .146, .054, .007, equal ones by id. One is always
    // left; of two that top_k leaves, each has a half.
    const std::tuple<double, int, double, const char*> cases[] =
        {{1, 0, 1, "13204"},   {0, 1, 1, "1"},    {1, 1, 1, "1"},     {1, 3, 1, "132"},
         {1, 99, 1, "13204"},  {1, 0, 0.39, "1"}, {1, 0, 0.40, "13"}, {1, 0, 0.80, "132"},
         {1, 0, 0.99, "1320"}, {1, 0, 0.0, "1"},  {1, 2, 0.5, "1"}};
    for (const auto& [temperature, k, p, tokens] : cases)
        CHECK(tokens_of(cut(temperature, k, p)) == tokens);
    for (double temperature : {0.0, 0.3, 1.0, 50.0})
        for (int k : {0, 1, 4})
            for (double p : {0.1, 0.7, 1.0}) CHECK(sum_of(cut(temperature, k, p)) == 1);
    CHECK(sum_of(likeliest(candidates({1000, -1000, 999}, 1e-3), 0, 1)) == 1);  // no overflow
    const auto all = cut(1, 0, 1), hot = cut(2, 0, 1);
    double total = 0;
    for (float l : logits) total += std::exp(double(l));
    for (const Candidate& c : all)
        CHECK(c.probability ==
              doctest::Approx(std::exp(double(logits[size_t(c.token)])) / total).epsilon(1e-12));
    CHECK(hot[0].probability / hot[2].probability == doctest::Approx(std::exp(0.5)).epsilon(1e-12));
    // Of a long list: the same as sorting it all.
    std::vector<float> many(30011);
    for (size_t i = 0; i < many.size(); ++i) many[i] = float(random_normal(5, i % 29000));
    const auto sorted = likeliest(candidates(many, 0.9), 0, 1);
    CHECK(std::is_sorted(sorted.begin(), sorted.end(), [](const Candidate& a, const Candidate& b) {
        return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    }));
    for (auto [k, p] : {std::pair(0, 0.5), {0, 0.01}, {0, 0.999}, {700, 1.0}, {700, 0.9}}) {
        const auto some = likeliest(candidates(many, 0.9), k, p);
        CHECK(std::equal(some.begin(), some.end(), sorted.begin(),
                         [](auto& a, auto& b) { return a.token == b.token; }));
        double whole = 0, before = 0;  // of the k likeliest; of all that are left but the last
        for (size_t i = 0; i < size_t(k > 0 ? k : 30011); ++i) whole += sorted[i].probability;
        for (size_t i = 0; i + 1 < some.size(); ++i) before += sorted[i].probability;
        CHECK(before < p * whole);
        CHECK(before + sorted[some.size() - 1].probability >= p * whole * (1 - 1e-12));
        CHECK(sum_of(some) == 1);
    }
    CHECK_THROWS_WITH(candidates({1, std::nanf(""), 0}, 1), doctest::Contains("no numbers"));
    // pick follows the probabilities.
    CHECK(pick(all, 0) == 1);
    CHECK(pick(all, 0x1.fffffffffffffp-1) == 4);
    std::vector<double> hits(5);
    const int n = 40000;
    for (int i = 0; i < n; ++i) ++hits[size_t(pick(all, random_uniform(1, uint64_t(i))))];
    for (const Candidate& c : all)
        CHECK(std::abs(hits[size_t(c.token)] / n - c.probability) <
              5 * std::sqrt(c.probability / n));
}

TEST_CASE("generation: greedy text is the argmax, the seed decides the rest, the context slides") {
    Threads one(1);
    const Config config{2, 2, 16, 12, 19};
    Lively<float> model(config, 1, 12, Use::generation), full(config, 1, 12, Use::generation);
    int slides = -1;
    auto text = [&](std::vector<int32_t> prompt, const SampleOptions& o) {
        std::vector<int> out;
        slides = generate(model, prompt, o, [&](int token) { return out.push_back(token), true; });
        return out;
    };
    SampleOptions greedy{.max_new_tokens = 9, .temperature = 0};
    const std::vector<int> out = text({3, 5, 7}, greedy);
    CHECK(out.size() == 9);
    CHECK(slides == 0);
    std::vector<int32_t> so_far = {3, 5, 7};
    for (int token : out) {
        const std::vector<float> logits = next_logits(full, so_far, 0);
        REQUIRE(token == std::max_element(logits.begin(), logits.end()) - logits.begin());
        so_far.push_back(token);
    }
    SampleOptions o{.max_new_tokens = 40, .temperature = 1, .seed = 5};
    const std::vector<int> sampled = text({1}, o);
    CHECK(sampled.size() == 40);
    CHECK(slides > 2);  // 41 tokens through a context of 12
    CHECK(sampled == text({1}, o));
    o.seed = 6;
    CHECK(sampled != text({1}, o));
    CHECK(text(std::vector<int32_t>(100, 4), o).size() == 40);  // a prompt longer than the context
    o.max_new_tokens = 0;
    CHECK(text({1}, o).empty());
    // It stops at end of text, and when it is told to.
    greedy.max_new_tokens = 50, greedy.end_of_text = out[4];
    const ptrdiff_t first = std::find(out.begin(), out.end(), out[4]) - out.begin();
    CHECK(ptrdiff_t(text({3, 5, 7}, greedy).size()) == first);
    int told = 0;
    o.max_new_tokens = 30;
    generate(model, {1}, o, [&](int) { return ++told < 3; });
    CHECK(told == 3);
}

// =================================================================================================
// §10 Many processes
// =================================================================================================
// Ranks that are threads of this process: one run, bit for bit.

// Ranks that are threads of this process.
class ThreadRanks : public Ranks {
public:
    // Calls f(ranks) on `count` of them at once.
    static void run(int count, const std::function<void(Ranks&)>& f) {
        Meeting meeting{std::barrier<>(count), std::vector<void*>(size_t(count))};
        std::vector<std::thread> threads;
        for (int rank = 0; rank < count; ++rank)
            threads.emplace_back([&, rank] {
                ThreadRanks ranks(meeting, rank, count);
                f(ranks);
            });
        for (std::thread& thread : threads) thread.join();
    }
    // What is begun is done only when somebody waits for it.
    void exchange(void* to, const void* from, size_t bytes) override {
        begun_.push_back([=, this] {
            meet(const_cast<void*>(from), [&](size_t s, const char* theirs) {
                std::memcpy(static_cast<char*>(to) + s * bytes, theirs + size_t(rank) * bytes,
                            bytes);
            });
        });
    }
    void begin_gather(void* array, size_t bytes) override {
        begun_.push_back([=, this] { gather(array, bytes, 1); });
    }
    bool arrived(bool wait) override {
        if (wait) begun_.front()(), begun_.pop_front();
        return wait;
    }
    void gather(void* array, size_t bytes, size_t rounds) override {
        meet(array, [&](size_t s, const char* theirs) {
            for (size_t t = 0; t < rounds && s != size_t(rank); ++t) {
                const size_t at = (t * size_t(count) + s) * bytes;
                std::memcpy(static_cast<char*>(array) + at, theirs + at, bytes);
            }
        });
    }
    void broadcast(void* data, size_t bytes) override {
        meet(data, [&](size_t s, const char* theirs) {
            if (s == 0 && rank != 0) std::memcpy(data, theirs, bytes);
        });
    }

private:
    struct Meeting {
        std::barrier<> barrier;
        std::vector<void*> data;
    };
    ThreadRanks(Meeting& meeting, int number, int of) : meeting_(meeting) {
        rank = number, count = of;
    }
    void meet(void* mine, auto&& visit) {
        meeting_.data[size_t(rank)] = mine;
        meeting_.barrier.arrive_and_wait();
        for (size_t s = 0; s < size_t(count); ++s)
            visit(s, static_cast<const char*>(meeting_.data[s]));
        meeting_.barrier.arrive_and_wait();
    }
    Meeting& meeting_;
    std::deque<std::function<void()>> begun_;
};

TEST_CASE("ranks: every element of an array is one rank's, and all ranks have about as many") {
    for (size_t size :
         {size_t(64), size_t(16384), size_t(16448), size_t(903488), size_t(124475904)})
        for (int count : {1, 2, 3, 4, 8}) {
            CAPTURE(size);
            CAPTURE(count);
            std::vector<std::pair<size_t, size_t>> parts;
            for (int rank = 0; rank < count; ++rank) {
                Ranks ranks;
                ranks.rank = rank, ranks.count = count;
                const Shares s(size, ranks);
                CHECK((s.room() >= size && s.own() * size_t(count) == s.room()));
                CHECK(s.own() < ceil_div(size, size_t(count)) + s.rounds * kNormChunk);
                size_t next = 0;
                s.for_each([&](size_t own, size_t at, size_t n) {
                    CHECK((own == next && at % s.part == 0 && n > 0));
                    next = own + s.part;
                    parts.emplace_back(at, n);
                });
            }
            std::sort(parts.begin(), parts.end());
            size_t end = 0;
            for (auto [at, n] : parts) CHECK(std::exchange(end, at + n) == at);
            CHECK(end == size);
        }
}

TEST_CASE("ranks: 1, 2, 4 and 8 of them are one run, bit for bit, and may change at a checkpoint") {
    TemporaryFolder folder;
    std::vector<uint16_t> text(5000);
    for (size_t i = 0; i < text.size(); ++i) text[i] = uint16_t(random_bits(7, i) % 101);
    put_shard(folder / "val.bin", text);
    const Shards shards(folder / "val.bin");
    const auto windows = evaluation_windows(shards, 5, -1);
    using Result = std::pair<std::vector<double>, std::vector<std::vector<float>>>;
    // Steps `from` to `to`, which begin and end at a checkpoint.
    auto run = [&](const Config& config, int count, size_t micro_batches, int from, int to) {
        Result result;
        ThreadRanks::run(count, [&](Ranks& ranks) {
            Threads some(count > 2 ? 1 : 2);
            Cpu device;
            device.ranks = &ranks;
            Gpt2<Cpu> model(config, device);
            model.reserve(2, 5, Use::training);
            model.initialise(1);
            auto name = [&](int s) { return folder / format("%zu-%d", micro_batches, s); };
            if (from > 0) load_weights(model, name(from)), load_moments(model, name(from));
            const size_t here = micro_batches / size_t(count);
            std::vector<double> numbers;
            for (int s = from; s < to; ++s) {
                model.state->updates = s;
                StepShare share{size_t(ranks.rank) * here, micro_batches};
                std::vector<Batch> batches;
                for (size_t i = 0; i < micro_batches; ++i) {
                    const uint64_t seed = uint64_t(s) * micro_batches + i;
                    const Batch batch = random_batch(seed, 2, 5, config.vocab_size, int(i % 3));
                    share.scored += batch.scored;
                    if (i / here == size_t(ranks.rank)) batches.push_back(batch);
                }
                train_step(model, batches, plain_steps(1e-2, 9), s, share);
                numbers.push_back(model.state->loss), numbers.push_back(model.state->grad_norm);
            }
            numbers.push_back(evaluate(model, windows, {}).total);
            save_checkpoint(model, name(to), nullptr, {}, Purpose::resume);
            std::vector<std::vector<float>> arrays = {model.get_weights()};
            for (float* moment : model.moments) {
                const float* whole = model.whole(moment);
                arrays.emplace_back(whole, whole + model.layout.size);
            }
            if (ranks.rank == count - 1) result = {numbers, arrays};
        });
        return result;
    };
    // 16 micro-batches: leaves of two, added in place.
    const Config small{2, 2, 40, 8, 101, false, 0.1f};
    for (size_t micro_batches : {size_t(8), size_t(16)}) {
        const Result one = run(small, 1, micro_batches, 0, 3);
        for (int count : {2, 4, 8}) {
            CAPTURE(count);
            CAPTURE(micro_batches);
            CHECK(run(small, count, micro_batches, 0, 3) == one);
        }
        run(small, 8, micro_batches, 0, 1), run(small, 2, micro_batches, 1, 2);
        const Result changed = run(small, 4, micro_batches, 2, 3);
        CHECK(changed.second == one.second);
        CHECK(std::equal(changed.first.rbegin(), changed.first.rend(), one.first.rbegin()));
    }
    // Arrays of several rounds, and a head of its own.
    const Config large{1, 2, 64, 8, 12000, true, 0};
    CHECK(run(large, 2, 2, 0, 3) == run(large, 1, 2, 0, 3));
}

// Rank 1 makes a NaN where the others make a gradient.
struct NanAtRankOne : Cpu {
    void add_loss(auto... a) {
        Cpu::add_loss(a...);
        if (ranks->rank == 1) grads[7] = NAN;
    }
    float* grads = nullptr;
};
TEST_CASE("ranks: a NaN at one of them is seen by all, and reaches no weight") {
    ThreadRanks::run(4, [](Ranks& ranks) {
        Threads one(1);
        NanAtRankOne device;
        device.ranks = &ranks;
        Gpt2<NanAtRankOne> model(Config{1, 2, 40, 8, 101}, device);
        model.reserve(2, 5, Use::training);
        model.initialise(1);
        model.device.grads = model.grads;
        const std::vector<float> before = model.get_weights();
        const StepShare share{size_t(ranks.rank), 4, 40};
        train_step(model, {random_batch(uint64_t(ranks.rank), 2, 5, 101)}, plain_steps(1e-2, 9), 0,
                   share);
        const bool seen = model.state->broken == 1 && model.state->skip == 1;
        const bool kept = model.get_weights() == before;
        CHECK((seen && kept));
    });
}

// =================================================================================================
// §11 The fast CPU
// =================================================================================================
// Matrix products, attention and e^x: the fast ones against the plain ones of §4.

using tinygpt::FastOps, tinygpt::PlainOps, tinygpt::kDepth;

// Sizes "m x n x k", each a matrix product's.
std::vector<std::array<int, 3>> products(const std::string& text) {
    std::vector<std::array<int, 3>> list;
    for (const std::string& word : split_at(text, ' ')) {
        auto& [m, n, k] = list.emplace_back();
        REQUIRE(std::sscanf(word.c_str(), "%dx%dx%d", &m, &n, &k) == 3);
    }
    return list;
}

// A matrix [rows, cols], stored as it is or transposed.
struct Operand {
    std::vector<float> data;
    tinygpt::View<float> view;
    Operand(int rows, int cols, bool transposed, uint64_t seed)
        : data(random_vector<float>(size_t(rows) * cols, seed, 0.5)),
          view(data.data(), rows, cols) {
        if (transposed) view = tinygpt::View<float>(data.data(), cols, rows).transposed();
    }
};

// The largest difference between the two products, over the size of its error bound.
double matmul_error(int m, int n, int k, bool a_transposed, bool b_transposed, bool accumulate) {
    const Operand a(m, k, a_transposed, 1), b(k, n, b_transposed, 2);
    std::vector<float> c = random_vector<float>(size_t(m) * n, 3, 0.5), expected = c;
    PlainOps::matmul(expected.data(), a.view, b.view, accumulate);
    FastOps::matmul(c.data(), a.view, b.view, accumulate);
    return largest_difference(c, expected) / (std::numeric_limits<float>::epsilon() * (k + 2));
}

TEST_CASE("matmul: agrees with the plain one, ragged or not, in every order") {
    // The last two: more than is packed at once.
    for (const auto& size : products(
             "1x1x1 1x17x5 1x301x257 2x3x1 7x31x2 14x32x16 15x33x17 13x127x61 6x16x8 29x65x383 "
             "28x64x384 43x97x385 29x65x511 28x64x512 43x97x513 30x33x1025 225x70x9 230x33x800 "
             "5x4200x3 60x1100x30 4300x40x20 20x40x3100"))
        for (int order = 0; order < 8; ++order) {
            INFO("m, n, k ", size[0], ", ", size[1], ", ", size[2], ", order ", order);
            CHECK(matmul_error(size[0], size[1], size[2], order & 1, order & 2, order & 4) < 1);
        }
}

TEST_CASE("matmul: finish sees every sum once, and what it leaves is stored") {
    // Sums over k that are made in one go, in two, in seven; and many rows.
    for (const auto& size : {std::array{31, 67, 400},
                             {31, 67, kDepth + 100},
                             {31, 67, 6 * kDepth + 100},
                             {1, 67, 100},
                             {4300, 33, 20}})
        for (bool plain_ops : {false, true}) {
            const int m = size[0], n = size[1], k = size[2];
            INFO("m, n, k ", m, ", ", n, ", ", k, ", plain ", plain_ops);
            const Operand a(m, k, false, 1), b(k, n, false, 2);
            std::vector<float> c(size_t(m) * n), sums(c.size()), seen(c.size());
            std::vector<int> visits(c.size());
            auto multiply = [&](std::vector<float>& to, const tinygpt::Finish<float>& finish) {
                if (plain_ops)
                    PlainOps::matmul(to.data(), a.view, b.view, false, finish);
                else
                    FastOps::matmul(to.data(), a.view, b.view, false, finish);
            };
            multiply(sums, {});
            multiply(c, [&, n = n](int row, int col, int count, float* values) {
                for (int j = 0; j < count; ++j) {
                    seen[size_t(row) * n + col + j] = values[j];
                    ++visits[size_t(row) * n + col + j];
                    values[j] = 2 * values[j] + float(row);
                }
            });
            CHECK(*std::min_element(visits.begin(), visits.end()) == 1);
            CHECK(*std::max_element(visits.begin(), visits.end()) == 1);
            CHECK(seen == sums);
            size_t wrong = 0;
            for (size_t i = 0; i < c.size(); ++i) wrong += c[i] != 2 * sums[i] + float(i / n);
            CHECK(wrong == 0);
        }
}

TEST_CASE("matmul: the same bits for any number of threads, column sums too") {
    const int m = 61, n = 203, k = 700, before = omp_get_max_threads();
    const Operand a(m, k, true, 1), b(k, n, false, 2), tall(512, k, false, 3);
    std::vector<float> first, first_tall, first_sums(n);
    for (int threads : {1, 2, 3, 5, 16}) {
        omp_set_num_threads(threads);
        std::vector<float> c(size_t(m) * n), high(size_t(512) * 128);
        FastOps::matmul(c.data(), a.view, b.view);
        FastOps::matmul(high.data(), tall.view, b.view.part(0, 0, k, 128));
        if (threads == 1) first = c, first_tall = high;
        CHECK(c == first);
        CHECK(high == first_tall);
        std::vector<float> sums(n);
        tinygpt::column_sums(sums.data(), b.data.data(), k, n, false);
        if (threads == 1) first_sums = sums;
        CHECK(sums == first_sums);
    }
    omp_set_num_threads(before);
    for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int p = 0; p < k; ++p) sum += double(b.view(p, j));
        CHECK(std::abs(first_sums[j] - sum) < 1e-4);
    }
}

// A matrix of bf16 numbers, and the same as floats.
struct Bf16Operand : Operand {
    std::vector<bf16> stored;
    tinygpt::View<bf16> as_stored;
    Bf16Operand(int rows, int cols, bool transposed, uint64_t seed)
        : Operand(rows, cols, transposed, seed),
          stored(data.begin(), data.end()), as_stored{stored.data(), view.rows, view.cols,
                                                      view.row_stride, view.col_stride} {
        std::copy(stored.begin(), stored.end(), data.begin());
    }
};

// What computes bf16 products on this CPU, what does where it has nothing for them, and what would
// on a matrix unit. (Without the instruction the first and the second are the same.)
TEST_CASE_TEMPLATE("matmul: in bf16 sums are fp32, the same bits on any number of threads", Ops,
                   FastOps, OpsBy<PlainTiles>, OpsBy<UnitTiles>) {
    for (const auto& size :
         products("1x301x257 2x3x1 15x33x17 43x97x385 30x70x801 30x70x1100 20x40x3100 "
                  "20x40x4300 130x70x4200 4300x40x40"))
        for (int order = 0; order < 4; ++order) {
            const int m = size[0], n = size[1], k = size[2];
            INFO("m, n, k ", m, ", ", n, ", ", k, ", order ", order);
            const Bf16Operand a(m, k, order & 1, 1), b(k, n, order & 2, 2);
            std::vector<float> before = random_vector<float>(size_t(m) * n, 3, 0.5);
            std::vector<bf16> half(before.begin(), before.end()), first_half;
            std::vector<float> added = before, expected = before, first;
            PlainOps::matmul(expected.data(), a.view, b.view, true);
            Ops::matmul(added.data(), a.as_stored, b.as_stored, true);
            CHECK(largest_difference(added, expected) < 1.2e-7 * (k + 2));
            PlainOps::matmul(expected.data(), a.view, b.view);
            const auto finish = [](int, int, int count, float* values) {
                for (int j = 0; j < count; ++j) values[j] += 1;
            };
            for (int threads : {1, 3}) {
                Threads some(threads);
                std::vector<float> c = before;
                Ops::matmul(c.data(), a.as_stored, b.as_stored);
                CHECK(largest_difference(c, expected) < 1.2e-7 * (k + 2));
                Ops::matmul(half.data(), a.as_stored, b.as_stored, false, finish);
                size_t wrong = 0;  // rounded once, with what finish added (sums in another order)
                for (size_t i = 0; i < c.size(); ++i) {
                    const float sum = c[i] + 1;
                    wrong += !(std::abs(half[i] - sum) <= 0x1.01p-8f * std::abs(sum) + 1e-4f);
                }
                CHECK(wrong == 0);
                if (threads == 1) first = c, first_half = half;
                CHECK(c == first);
                CHECK(std::memcmp(half.data(), first_half.data(), 2 * half.size()) == 0);
                if (m > 1) continue;  // one row, as in generation
                Ops::matmul(half.data(), a.as_stored, b.as_stored);
                for (int j = 0; j < n; ++j) CHECK(half[j].bits == bf16(c[j]).bits);
            }
        }
}

TEST_CASE_TEMPLATE("matmul: a NaN stays in its row and column, whatever k is a multiple of", Ops,
                   FastOps, OpsBy<PlainTiles>, OpsBy<UnitTiles>) {
    for (int k : {1, 2, 3, 31, 32, 33, 63, 64, 65, 1025})
        for (int order = 0; order < 4; ++order) {
            INFO("k ", k, ", order ", order);
            const int m = 40, n = 70;
            Bf16Operand a(m, k, order & 1, 1), b(k, n, order & 2, 2);
            // The last of row 7, and the first of row 8, which in memory may be its neighbour.
            const auto put = [](auto& x, ptrdiff_t i, ptrdiff_t j) {
                x.stored[size_t(i * x.view.row_stride + j * x.view.col_stride)] = bf16(NAN);
            };
            put(a, 7, k - 1), put(a, 8, 0), put(b, k - 1, 11), put(b, 0, 12);
            std::vector<float> c(size_t(m) * n);
            Ops::matmul(c.data(), a.as_stored, b.as_stored);
            size_t wrong = 0;
            for (int i = 0; i < m; ++i)
                for (int j = 0; j < n; ++j)
                    wrong += std::isnan(c[size_t(i) * n + j]) !=
                             (i == 7 || i == 8 || j == 11 || j == 12);
            CHECK(wrong == 0);
        }
}

TEST_CASE("exp: within 2 units in the last place, and right at the ends") {
    double worst = 0;
    for (float x = -87.3f; x < 88.3f; x += 1.37e-3f) {
        const double right = std::exp(double(x));
        const float near = float(right);
        const double unit = double(std::nextafter(near, INFINITY)) - double(near);
        worst = std::max(worst, std::abs(double(tinygpt::exp_of(x)) - right) / unit);
    }
    CHECK(worst < 2);
    CHECK(tinygpt::exp_of(-INFINITY) == 0);
    CHECK(tinygpt::exp_of(-1e30f) == 0);
    CHECK(tinygpt::exp_of(float(INFINITY)) == INFINITY);
    CHECK(tinygpt::exp_of(1e30f) == INFINITY);
    CHECK(std::isnan(tinygpt::exp_of(float(NAN))));
    CHECK(tinygpt::exp_of(0.0f) == 1);
}

TEST_CASE("gelu: its formula with tanh, and its derivative, everywhere") {
    using tinygpt::gelu, tinygpt::gelu_derivative;
    auto fast_gelu = [](double x) { return double(gelu(float(x))); };
    auto fast_derivative = [](double x) { return double(gelu_derivative(float(x))); };
    double worst = 0, worst_slope = 0, worst_fast = 0;
    for (double x = -12; x < 12; x += 1e-3) {
        const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), h = 1e-6;
        const double slope = (gelu(x + h) - gelu(x - h)) / (2 * h);
        worst = std::max(worst, std::abs(gelu(x) - 0.5 * x * (1 + std::tanh(u))));
        worst_slope = std::max(worst_slope, std::abs(gelu_derivative(x) - slope));
        worst_fast = std::max({worst_fast, std::abs(fast_gelu(x) - gelu(x)),
                               std::abs(fast_derivative(x) - gelu_derivative(x))});
    }
    CHECK(worst < 1e-14);
    CHECK(worst_slope < 1e-8);
    CHECK(worst_fast < 2e-6);
    for (double x : {-INFINITY, -1e30f, -100.0f}) {
        CHECK(std::abs(fast_gelu(x)) < 1e-30);
        CHECK(std::abs(fast_derivative(x)) < 1e-30);
    }
    for (double x : {100.0f, 1e30f, float(INFINITY)}) {
        CHECK(fast_gelu(x) == x);
        CHECK(fast_derivative(x) == 1);
    }
    CHECK(std::isnan(fast_gelu(NAN)));
    CHECK(std::isnan(fast_derivative(NAN)));
}

struct AttentionShape {
    int B, T, NH, HS;
    float p = 0;
};

// One layer of attention on random numbers, forward and backward, as a device makes it.
template <class A, class Ops>
struct Attention {
    using real = tinygpt::RealOf<A>;
    std::vector<A> qkv, dout, out, dqkv;
    std::vector<real> lse, bias;
    // in_bf16: the numbers are such as a bf16 holds.
    Attention(const AttentionShape& s, double scale, bool in_bf16 = false) {
        const size_t n = size_t(s.B) * s.T * s.NH * s.HS;
        // Numbers that a float holds, so that all types get the same.
        const auto number = [&](float x) { return A(in_bf16 ? float(bf16(x)) : x); };
        for (float x : random_vector<float>(3 * n, 5, 0.5 * scale)) qkv.push_back(number(x));
        for (float x : random_vector<float>(n, 6, 0.5)) dout.push_back(number(x));
        out.resize(n), lse.resize(size_t(s.B) * s.NH * s.T);
        dqkv.resize(3 * n, A(99)), bias.resize(size_t(3) * s.NH * s.HS, 99);
        const tinygpt::Dropout drop{7, s.p};
        tinygpt::Layers<A, Ops> device;
        device.attention_forward(out.data(), lse.data(), qkv.data(), s.B, s.T, s.NH, s.HS, drop);
        device.attention_backward(dqkv.data(), bias.data(), dout.data(), out.data(), lse.data(),
                                  qkv.data(), s.B, s.T, s.NH, s.HS, drop, false);
    }
};

const AttentionShape kAttentionShapes[] = {{1, 1, 1, 1},
                                           {2, 5, 3, 4},
                                           {1, 33, 2, 7},
                                           {1, 150, 1, 16},
                                           {2, 113, 2, 31},
                                           {1, 65, 1, 70},
                                           {1, 40, 2, 33, 0.3f},
                                           {2, 129, 1, 8, 0.5f},
                                           // more keys than are worked on at a time, a wider head
                                           {1, kDepth + 19, 2, 5},
                                           {1, kDepth + 75, 2, 64},
                                           {1, 2 * kDepth + 3, 1, 6, 0.2f},
                                           {1, 20, 1, kDepth + 7}};

// That the plain one is right, its gradients above say.
TEST_CASE("attention: agrees with the plain one, forward and backward") {
    const double unit = std::numeric_limits<float>::epsilon();
    for (const AttentionShape& s : kAttentionShapes)
        for (double scale : {1.0, 3.0}) {
            INFO("T ", s.T, ", HS ", s.HS, ", dropout ", s.p, ", scale ", scale);
            const Attention<float, FastOps> fast(s, scale);
            const Attention<double, PlainOps> plain(s, scale);
            const double growth = scale * scale;  // a score's error is p's relative error
            CHECK(largest_difference(fast.out, plain.out) < 20 * growth * unit);
            CHECK(largest_difference(fast.lse, plain.lse) < 20 * growth * unit);
            CHECK(largest_difference(fast.dqkv, plain.dqkv) < 40 * growth * scale * unit);
            CHECK(largest_difference(fast.bias, plain.bias) < 400 * growth * scale * unit);
        }
}

// Inputs are exact. p and ds are rounded where they are multiplied, results where they are stored,
// and D comes from an `out` that was rounded: two or three roundings of 2^-9 on a way, of the size
// of what is summed.
TEST_CASE_TEMPLATE("attention: in bf16 agrees with the plain one in double", Ops, FastOps,
                   OpsBy<PlainTiles>, OpsBy<UnitTiles>) {
    const auto apart = [](const auto& found, const auto& truth) {
        double errors = 0, squares = 1e-30;
        for (size_t i = 0; i < truth.size(); ++i)
            errors += std::pow(double(found[i]) - truth[i], 2), squares += truth[i] * truth[i];
        return std::sqrt(errors / squares) / 0x1p-9;
    };
    for (const AttentionShape& s : kAttentionShapes) {
        INFO("T ", s.T, ", HS ", s.HS, ", dropout ", s.p);
        const Attention<bf16, Ops> fast(s, 1, true);
        const Attention<double, PlainOps> plain(s, 1, true);
        CHECK(largest_difference(fast.lse, plain.lse) < 1e-5);
        CHECK(apart(fast.out, plain.out) < 2);
        CHECK(apart(fast.dqkv, plain.dqkv) < 3);
        CHECK(apart(fast.bias, plain.bias) < 6);
    }
}

TEST_CASE_TEMPLATE("attention: the same bits for any number of threads", A, float, bf16) {
    std::vector<A> first;
    for (int threads : {1, 2, 3}) {
        Threads some(threads);
        const Attention<A, FastOps> a({2, 77, 3, 20}, 1);
        if (threads == 1) first = a.dqkv;
        CHECK(std::memcmp(a.dqkv.data(), first.data(), first.size() * sizeof(A)) == 0);
    }
}

TEST_CASE("attention: with a cache, the rows of the whole") {
    const int T = kDepth + 35, NH = 3, HS = 20, C = NH * HS;
    const Attention<float, FastOps> whole({1, T, NH, HS}, 1);
    const Attention<float, PlainOps> plain({1, T, NH, HS}, 1);
    for (const auto& [first, count] :
         {std::pair{0, 1}, {1, 1}, {63, 1}, {T - 1, 1}, {0, T}, {5, 9}, {40, 100}, {T - 50, 50}}) {
        const int past = first, n = count;
        INFO("past ", past, ", n ", n);
        std::vector<float> fast(size_t(n) * C), slow(fast.size());
        tinygpt::Cpu().attention_cached(fast.data(), whole.qkv.data(), past, n, NH, HS);
        tinygpt::Reference<float>().attention_cached(slow.data(), whole.qkv.data(), past, n, NH,
                                                     HS);
        auto rows = [&, past = past](const std::vector<float>& all) {
            const auto begin = all.begin() + ptrdiff_t(past) * C;
            return std::vector<float>(begin, begin + ptrdiff_t(fast.size()));
        };
        CHECK(largest_difference(fast, rows(whole.out)) <
              20 * std::numeric_limits<float>::epsilon());
        CHECK(slow == rows(plain.out));
    }
}

// =================================================================================================
// §12 Systems, files and JSON
// =================================================================================================
// What containers allow; files whole or not at all; JSON by its standard.

TEST_CASE("machine: what containers allow counts as its cores and its memory") {
    struct Case {
        const char* what;
        int cores;
        size_t memory;
        const char* group;
        const char* files;  // below the folder of groups: name=what it says
    };
    const int all = omp_get_num_procs();
    const char* v1 = "9:cpu,cpuacct:/d/1\n4:memory:/d/1\n0::/\n";
    const Case cases[] =
        {{"no groups", all, 4'096'000, "", ""},
         {"no limits", all, 4'096'000, "0::/\n",
          "cpu.max=max 100000|memory.max=max|memory.current=5"},
         {"limits, and copies of files", 1, 700'000, "0::/\n",
          "cpu.max=50000 100000|memory.max=1000000|memory.current=400000|"
          "memory.stat=anon 7\ninactive_file 100000"},
         {"the outer group's, all used up", std::min(all, 2), 0, "0::/box/run\n",
          "box/run/cpu.max=max 100000|box/cpu.max=150000 100000|box/memory.max=1000|"
          "box/memory.current=1001"},
         {"version 1, where the path is that of outside", 1, 2000, v1,
          "cpu,cpuacct/cpu.cfs_quota_us=100000|cpu,cpuacct/cpu.cfs_period_us=100000|"
          "memory/memory.limit_in_bytes=3000|memory/memory.usage_in_bytes=1000"},
         {"version 1, no limits", all, 4'096'000, v1,
          "cpu,cpuacct/d/1/cpu.cfs_quota_us=-1|cpu,cpuacct/d/1/cpu.cfs_period_us=100000|"
          "memory/d/1/memory.limit_in_bytes=9223372036854771712|"
          "memory/d/1/memory.usage_in_bytes=1000"}};
    for (const Case& c : cases) {
        CAPTURE(c.what);
        TemporaryFolder root;
        auto put = [&](const std::string& name, const std::string& text) {
            make_folders(parent_folder(root / name));
            put_file(root / name, text + "\n");
        };
        put("proc/meminfo", "MemTotal: 8000 kB\nMemAvailable:    4000 kB");
        if (*c.group) put("proc/self/cgroup", c.group);
        for (const std::string& file : split_at(c.files, '|')) {
            const size_t at = file.find('=');
            if (at != file.npos) put("sys/fs/cgroup/" + file.substr(0, at), file.substr(at + 1));
        }
        CHECK(usable_cores(root.path) == c.cores);
        CHECK(usable_memory(root.path) == c.memory);
    }
    CHECK(usable_memory("/nowhere") > 0);
}

// A program that uses the header may have chosen a language that writes 0,5 for a half.
TEST_CASE("machine: a dot for decimals, whatever the locale") {
    TemporaryFolder scratch;
    const std::string make = "localedef -i de_DE -f UTF-8 " + scratch / "de > /dev/null 2>&1";
    ::setenv("LOCPATH", scratch.path.c_str(), 1);
    const bool made = std::system(make.c_str()) == 0 && std::setlocale(LC_ALL, "de");
    char half[8];
    std::snprintf(half, sizeof half, "%.1f", 0.5);
    if (!made || std::string(half) != "0,5") {
        MESSAGE("skipped: decimals in another locale: localedef made none with a comma");
    } else {
        LogRow row;
        row.step = 3, row.train_loss = 1.25;
        put_file(scratch / "log.csv", log_text({row}));
        const std::vector<LogRow> rows = read_log(scratch / "log.csv", 9);
        REQUIRE(rows.size() == 1);
        CHECK(rows[0].train_loss == 1.25);
        CHECK(to_text(format("%.2f", 0.5), " ", 0.25) == "0.50 0.25");
        CHECK(Json::parse("[0.5]", "").members[0].second.as<double>() == 0.5);
        CHECK(Json::array(std::vector{0.5}).write() == "[0.5]");
        CHECK(parse_options({"--dropout=0.5"}).dropout == 0.5);
        std::snprintf(half, sizeof half, "%.1f", 0.5);
        CHECK(std::string(half) == "0,5");  // the program's own choice stands
    }
    std::setlocale(LC_ALL, "C");
    ::unsetenv("LOCPATH");
}

#if defined(__SSE__) || defined(__aarch64__)
TEST_CASE(
    "machine: numbers too small to mean anything count as zero, in every thread of the tests too") {
    auto product = [] {
        volatile float small = 1e-30f;
        return small * 1e-10f;
    };
    float here = product(), later = 1, in_parallel = 0;
    std::thread([&] { later = product(); }).join();
#pragma omp parallel reduction(+ : in_parallel)
    in_parallel += product();
    CHECK(here == 0);
    CHECK(later == 0);
    CHECK(in_parallel == 0);
}
#endif

TEST_CASE("files: what is written is read back; folders are made, listed and removed") {
    TemporaryFolder scratch;
    const std::string deep = scratch / "a/b/c";
    make_folders(deep);
    make_folders(deep + "/");
    CHECK(folder_exists(deep));
    std::string bytes(300'001, 'x');
    bytes[7] = '\0';
    for (const std::string& content : {std::string(), std::string("one\n"), bytes}) {
        write_file(deep + "/f", content);
        CHECK(read_file(deep + "/f") == content);
    }
    write_file(deep + "/e", ""), write_file(deep + "/g", "");
    CHECK(list_folder(deep) == std::vector<std::string>{"e", "f", "g"});
    CHECK(read_file(deep + "/f", bytes.size()) == bytes);
    rename_path(deep + "/e", deep + "/f");
    CHECK(read_file(deep + "/f").empty());
    CHECK(file_checksum(deep + "/f") == checksum(""));
    // A link in a folder that is removed takes nothing else with it.
    write_file(scratch / "keep", "kept");
    REQUIRE(::symlink(scratch.path.c_str(), (deep + "/link").c_str()) == 0);
    remove_folder(scratch / "a");
    CHECK(!folder_exists(scratch / "a"));
    CHECK(read_file(scratch / "keep") == "kept");
}

TEST_CASE("files: errors name the path and the reason") {
    TemporaryFolder scratch;
    const std::string file = scratch / "file", missing = scratch / "none", folder = scratch.path;
    write_file(file, "12345");
    struct Case {
        std::function<void(const std::string&)> action;
        std::string path;
        const char* reason;
    };
    auto write = [](const std::string& path) { write_file(path, ""); };
    auto read = [](const std::string& path) { read_file(path, 4); };
    for (const Case& c : {Case{read, missing, "No such file"},
                          {read, folder, "Is a directory"},
                          {read, file, "at most 4 bytes"},
                          {write, missing + "/f", "No such file"},
                          {write, file + "/f", "Not a directory"},
                          {write, folder, "not a file"},
                          {write, "/dev/null", "not a file"},
                          {make_folders, file, "File exists"},
                          {make_folders, file + "/x", "File exists"},
                          {list_folder, missing, "No such file"},
                          {remove_folder, missing, "No such file"}}) {
        const std::string message = error_of([&] { c.action(c.path); });
        CAPTURE(message);
        CHECK((contains(message, c.path) || contains(message, parent_folder(c.path) + ":")));
        CHECK(contains(message, c.reason));
    }
    CHECK(list_folder(folder) == std::vector<std::string>{"file"});
    CHECK(read_file(file) == "12345");
}

TEST_CASE("files: whichever call of a save fails, the old file or the new one is there, whole") {
    TemporaryFolder scratch;
    const std::vector<float> weights(400'000, 1.5f);
    auto save_model = [&](const std::string& path) {
        write_safetensors(path, {tensor_to_write("w", {400'000}, weights.data())});
    };
    auto save_text = [](const std::string& path) { write_file(path, "the new text"); };
    const std::string path = scratch / "f";
    const std::function<void(const std::string&)> saves[] = {save_text, save_model};
    for (auto& save : saves)
        for (int code : {EIO, ENOSPC, EINTR, -1}) {
            const bool harmless = code == EINTR || code == -1;
            save(path);
            const std::string fresh = read_file(path);
            std::set<std::string> failed_calls;
            EachCall each{code, harmless ? "write" : ""};
            do {
                put_file(path, "the old bytes");
                const std::string message = each.run([&] { save(path); });
                CAPTURE(message);
                const bool must_fail = !each.failed.empty() && !harmless;
                CHECK(message.empty() == !must_fail);
                CHECK(read_file(path) == (each.renamed || !must_fail ? fresh : "the old bytes"));
                if (must_fail) {
                    CHECK(contains(message, each.renamed ? scratch.path : path));
                    CHECK(contains(message, std::strerror(code)));
                }
                CHECK(list_folder(scratch.path).size() == 1);  // no temporary
                failed_calls.insert(each.failed + (each.renamed ? " folder" : ""));
            } while (!each.failed.empty());
            failed_calls.erase(""), failed_calls.erase(" folder");
            const std::set<std::string> all = {"open", "write", "fsync", "rename", "fsync folder"};
            CHECK(failed_calls == (harmless ? std::set<std::string>{"write"} : all));
        }
    file_fault() = [](const char* call, const std::string&) {
        return std::string(call) == "mkdir" ? EACCES : std::string(call) == "write" ? ENOSPC : 0;
    };
    const std::string message = error_of([&] { make_folders(scratch / "x/y"); });
    CHECK(message == "cannot create folder " + (scratch / "x") + ": " + std::strerror(EACCES));
    try {
        write_file(path, "x");
        FAIL("a full disk went unnoticed");
    } catch (const FileError& error) {
        CHECK(error.code == ENOSPC);
    }
}

TEST_CASE("json: what RFC 8259 allows is read") {
    const std::pair<std::string, std::string> list[] = {
        {" true ", "true"},
        {"\t\r\n false", "false"},
        {R"("\"\\\/\b\f\n\r\t")", R"("\"\\/\u0008\u000c\n\u000d\u0009")"},
        {R"("\u0041\u00e9\u0120\u20ac\ud83d\ude00")",
         "\"A\xc3\xa9\xc4\xa0\xe2\x82\xac\xf0\x9f\x98\x80\""},
        {"[ ]", "[]"},
        {"[1,\n[2] , {} ]", "[1,[2],{}]"},
        {R"({"b":1,"a":{"":[]} , "A" : null})", R"({"b":1,"a":{"":[]},"A":null})"},
    };
    auto check = [](const std::string& text, const std::string& written) {
        CAPTURE(text);
        const Json json = Json::parse(text, "x.json");
        CHECK(json.write() == written);
        CHECK(Json::parse(json.write(2), "x.json").write() == written);
    };
    for (auto& [text, written] : list) check(text, written);
    for (const std::string& same : split_at(
             "null|0|-0|-0.0|-12|9223372036854775807|-9223372036854775808|9007199254740993|0.5|"
             "1e2|1E+2|-1.5e-3|1e-05|0.1|\"\"|\"a b\"|\"\xc3\xa9\xf4\x8f\xbf\xbf\"|"
             "\"\\u0000\"|\"\x7f\"|[]|{}|{\"a\":{\"a\":{\"a\":1}}}",
             '|'))
        check(same, same);
    for (const char* text : {"1.0", "1e3", "12345678901234567890", "true"})
        CHECK(!Json::parse(text, "x.json").as<int64_t>());
    CHECK(Json::parse("12345678901234567890", "x.json").as<double>() == 12345678901234567890.0);
}

TEST_CASE("json: what RFC 8259 does not allow is refused, with its place") {
    // A reason, and texts that are refused for it.
    const std::pair<const char*, std::vector<std::string>> list[] = {
        {"line 1, byte 0: expected a value, found the end", {""}},
        {"expected a value, found the end", {" ", "["}},
        {"expected a value", {"True", "NaN", "Infinity", "+1", ".5", "]", "{\"a\":}", "/* c */ 1"}},
        {"expected a value, found \"n\"", {"nul"}},
        {"expected a value, found \"'\"", {"'a'"}},
        {"expected a value, found \"]\"", {"[1,]"}},
        {"expected a value, found \"\xef\xbf\xbd\"", {"\xef\xbb\xbf{}"}},
        {"expected a digit", {"-", "1.", "1e", "1e+"}},
        {"expected a digit, found \"I\"", {"-Infinity"}},
        {"expected the end of the text", {"1 2", "01", "0x10", "{\"a\":1}}"}},
        {"expected the end of the text, found \"x\"", {"nullx"}},
        {"expected the end of the text, found \"\\u0000\"", {std::string("1\0", 2)}},
        {"number out of range", {"1e400"}},
        {"expected the rest of a string, found the end", {"\""}},
        {"expected the rest of a string, found \"\\n\"", {"\"a\nb\""}},
        {"found \"\\u0000\"", {std::string("\"a\0b\"", 5)}},
        {"expected an escape sequence, found \"x\"", {R"("\x41")"}},
        {"expected an escape sequence, found the end", {"\"\\"}},
        {"expected four hexadecimal digits, found \"g\"", {R"("\u12g4")"}},
        {"expected four hexadecimal digits", {R"("\u12)"}},
        {"half a surrogate pair", {R"("\ud800")", R"("\ud800\u0041")", R"("\udc00\ud800")"}},
        {"invalid UTF-8",
         {"\"\x80\"", "\"\xc0\x80\"", "\"\xc3\"", "\"\xe0\x9f\xbf\"", "\"\xed\xa0\x80\"",
          "\"\xf0\x8f\xbf\xbf\"", "\"\xf4\x90\x80\x80\"", "\"\xff\""}},
        {"expected ',' or ']'", {"[1 2]"}},
        {"line 2, byte 6: expected ',' or ']', found the end", {"[1,\n 2"}},
        {"expected a key in quotes, found the end", {"{"}},
        {"expected a key in quotes", {"{a:1}", "{\"a\":1,}"}},
        {"expected ':'", {"{\"a\"}"}},
        {"expected ',' or '}'", {"{\"a\":1 \"b\":2}"}},
        {"has the key a twice", {"{\"a\":1,\"b\":2,\"a\":3}", "{\"a\":1,\"\\u0061\":3}"}},
    };
    for (auto& [reason, texts] : list)
        for (const std::string& text : texts) {
            CAPTURE(text);
            check_refused("x.json", reason, [&, &text = text] { Json::parse(text, "x.json"); });
        }
}

TEST_CASE("json: numbers and strings come back as they were, members by name and type") {
    for (double x : {1.0, 0.1, -1e-300, 1.7976931348623157e308, 2.0 / 3, 123456789012345680.0}) {
        CAPTURE(x);
        CHECK(Json::parse(Json(x).write(), "x").as<double>() == x);
    }
    CHECK(Json(std::nan("")).write() == "null");
    CHECK(Json("\xff\"\\\x1b").write() == "\"\xef\xbf\xbd\\\"\\\\\\u001b\"");
    Json json = Json::object();
    json.set("n", 3).set("x", 0.5).set("s", "text").set("b", true).set("n", 4);
    CHECK(json.write() == R"({"n":4,"x":0.5,"s":"text","b":true})");
    CHECK(json.write(2) == "{\n  \"n\": 4,\n  \"x\": 0.5,\n  \"s\": \"text\",\n  \"b\": true\n}");
    CHECK(json.get_int("n", "f") == 4);
    CHECK(json.get("x", Json::Kind::number, "f").as<double>() == 0.5);
    CHECK(json.get_string("s", "f") == "text");
    CHECK(json.get("b", Json::Kind::boolean, "f").text == "true");
    CHECK(json.find("none") == nullptr);
    auto error = [&](const char* key, int64_t lowest) {
        return error_of([&] { json.get_int(key, "f", lowest, 9); });
    };
    CHECK(error("none", 0) == "f: \"none\" is missing");
    CHECK(error("s", 0) == "f: \"s\" must be a number, found a string");
    CHECK(error("x", 0) == "f: \"x\" must be an integer from 0 to 9, found 0.5");
    CHECK(error("n", 5) == "f: \"n\" must be an integer from 5 to 9, found 4");
}

// A quadratic step anywhere would take minutes.
TEST_CASE("json: large and hostile texts take linear time and bounded depth") {
    std::string vocabulary = "{", objects, zeros = "[";
    for (int i = 0; i < 50257; i++)
        vocabulary += format("%s\"word%d\": %d", i ? ", " : "", i * 7, i);
    for (int i = 0; i < 100'000; i++) objects += "{\"a\":";
    for (int i = 0; i < 300'000; i++) zeros += "0,";
    const Json json = Json::parse(vocabulary + "}", "vocab.json");
    REQUIRE(json.members.size() == 50257);
    CHECK(json.members[50256].second.as<int>() == 50256);
    const size_t many = 1'000'000;
    const std::pair<std::string, const char*> list[] =
        {{vocabulary + ", \"word0\": 1}", "word0 twice"},
         {std::string(64, '[') + std::string(64, ']'), ""},
         {std::string(65, '[') + std::string(65, ']'), "64 levels"},
         {std::string(many, '['), "64 levels"},
         {objects, "64 levels"},
         {zeros, "more than 262144 values"},
         {"\"" + std::string(many, 'x'), "the rest of a string"},
         {std::string(many, '1'), "out of range"}};
    for (auto& [text, reason] : list) {
        check_error(error_of([&, &text = text] { Json::parse(text, "x"); }), reason);
    }
}

// =================================================================================================
// §13 The tokenizer
// =================================================================================================
// By its definition and by GPT-2's golden tokens; files of a vocabulary, good and damaged.

// The bytes of every piece, as tokens.
inline std::vector<std::vector<uint16_t>> bytes_of_pieces(std::string_view text) {
    std::vector<std::vector<uint16_t>> all;
    for (const std::string& piece : pieces_of(text)) {
        all.emplace_back();
        for (char c : piece) all.back().push_back(kBytes.id_of_byte[uint8_t(c)]);
    }
    return all;
}
// Makes one merge, from left to right.
inline void merge_all(std::vector<uint16_t>& ids, Merge merge, size_t token) {
    for (size_t at = 0; at + 1 < ids.size(); ++at)
        if (Merge(ids[at], ids[at + 1]) == merge) {
            ids[at] = uint16_t(token);
            ids.erase(ids.begin() + ptrdiff_t(at) + 1);
        }
}

// Merge the earliest pair, leftmost first, until none is left.
inline std::vector<uint16_t> encode_by_definition(const Tokenizer& tokenizer,
                                                  std::string_view text) {
    std::vector<uint16_t> out;
    for (std::vector<uint16_t>& ids : bytes_of_pieces(text)) {
        for (size_t i = 0; i < tokenizer.merges().size(); ++i)
            merge_all(ids, tokenizer.merges()[i], 256 + i);
        out.insert(out.end(), ids.begin(), ids.end());
    }
    return out;
}

TEST_CASE("tokenizer: the table of characters is Unicode 17.0's") {
    int64_t count[4] = {};
    for (uint32_t code = 0; code < 0x110000; ++code) ++count[class_of(code)];
    CHECK(count[kLetter] == 145672);
    CHECK(count[kNumber] == 1924);
    CHECK(count[kSpace] == 25);
    const std::pair<CharClass, std::vector<uint32_t>> classes[] =
        {{kSpace,
          {0x9, 0xd, 0x20, 0x85, 0xa0, 0x1680, 0x2000, 0x200a, 0x2028, 0x2029, 0x202f, 0x205f,
           0x3000}},
         {kOther,
          {0x0, 0x1c, 0x1f, 0x5f, 0x180e, 0x200b, 0xfeff, 0x301, 0x1f431, 0xe0001, 0x10ffff}},
         {kLetter, {0x41, 0x7a, 0xaa, 0xe9, 0x427, 0x732b, 0xac00, 0x10400, 0x33479}},
         {kNumber, {0x30, 0xb2, 0xbd, 0x661, 0x2167, 0x1fbf9}}};
    for (const auto& [kind, codes] : classes)
        for (uint32_t code : codes) CHECK(class_of(code) == kind);
}

TEST_CASE("tokenizer: text is cut into pieces as GPT-2 cuts it") {
    const char* cases[] =
        {"Hello|,| world|'s", "a|  | b", "a|   ", "\n|\n|A", "a|\r|\n|b|\t|c",
         "DON|'|T| don|'t| ''|s| '|s| x|'s|y", "we|'ll| they|'re| I|'ve| I|'m| he|'d| '|l",
         "x|\u00b2| \u00bd| e|\u0301", "a|\u00a0|\u00a0|b|\u3000",
         // A bad byte is a character of no class: it joins neither letters nor digits.
         "caf|\xe9| \xff\x80!", "a|\xed\xa0\x80|b"};
    for (const std::string cut : cases) {
        std::string text = cut;
        std::erase(text, '|');
        CHECK(pieces_of(text) == split_at(cut, '|'));
    }
}

TEST_CASE("tokenizer: GPT-2's golden strings, pieces and tokens; its files as published") {
    std::string folder = gpt2_data();
    if (folder.empty()) return;
    Tokenizer gpt2 = Tokenizer::load(folder);
    CHECK(gpt2.vocab_size() == 50257);
    CHECK(gpt2.end_of_text() == 50256);
    int strings = 0;
    for (const std::string& line : split_at(read_file(folder + "/gpt2_golden.jsonl"), '\n')) {
        if (line.empty()) continue;
        Json golden = Json::parse(line, "gpt2_golden.jsonl");
        const std::string& text = golden.get_string("text", "golden");
        std::vector<std::string> pieces;
        std::vector<uint16_t> ids;
        for (auto& [none, piece] : golden.find("pieces")->members) pieces.push_back(piece.text);
        for (auto& [none, id] : golden.find("ids")->members)
            ids.push_back(id.as<uint16_t>().value());
        CAPTURE(text);
        CHECK(pieces_of(text) == pieces);
        CHECK(gpt2.encode(text) == ids);
        CHECK(gpt2.decode(ids) == text);
        ++strings;
    }
    CHECK(strings == 91);
    CHECK(gpt2.encode("<|endoftext|>") == std::vector<uint16_t>{27, 91, 437, 1659, 5239, 91, 29});
    TemporaryFolder temporary;
    gpt2.save(temporary.path);
    CHECK(read_file(temporary / "vocab.json") == read_file(folder + "/encoder.json"));
    CHECK(read_file(temporary / "merges.txt") == read_file(folder + "/vocab.bpe"));
    CHECK(Tokenizer::load(temporary.path) == gpt2);
    remove_file(temporary / "vocab.json"), remove_file(temporary / "merges.txt");
    CHECK(Tokenizer::load(temporary.path) == gpt2);  // from tokenizer.json
}

TEST_CASE("tokenizer: tinyshakespeare has the published tokens") {
    std::string folder = gpt2_data();
    if (folder.empty()) return;
    Tokenizer gpt2 = Tokenizer::load(folder);
    std::string text = read_file(folder + "/tinyshakespeare.txt");
    std::vector<uint16_t> tokens = gpt2.encode(text);
    CHECK(tokens.size() == 338025);
    CHECK(sha256_of(raw(tokens)) ==
          "25c01b32b32f41897a6359dd222ec114992dc30c357bcafbfe6c56672f76cd31");
    CHECK(gpt2.decode(tokens) == text);
    // nanoGPT's split: the first 90 % of the characters.
    TemporaryFolder temporary;
    const Split split = divide(sources_of(temporary, {text}), 0.1, temporary.path);
    const std::string train = bytes_of(split.train[0]), val = bytes_of(split.val[0]);
    CHECK(val.size() == 111540);
    CHECK(sha256_of(raw(gpt2.encode(train))) ==
          "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f");
    CHECK(sha256_of(raw(gpt2.encode(val))) ==
          "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b");
    // llm.c's: a document for each section, the first 32,768 tokens for validation, as whole files.
    std::string lines;
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = std::min(text.find("\n\n", at), text.size() - 2) + 2;
        lines += Json::object().set("text", text.substr(at, end - at)).write() + "\n";
    }
    CHECK(std::count(lines.begin(), lines.end(), '\n') == 7222);
    put_file(temporary / "lines", lines);
    const std::vector<uint16_t> all =
        encode_all(gpt2, {{temporary / "lines", "text", 0, lines.size()}});
    REQUIRE(all.size() == 32768 + 305260);
    ShardWriter first(temporary / "val_", 0, 32768), rest(temporary / "train_", 1, INT32_MAX);
    first.add(std::span(all).first(32768)), rest.add(std::span(all).subspan(32768));
    first.finish(), rest.finish();
    CHECK(sha256_of(read_file(temporary / "val_000000.bin")) ==
          "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62");
    CHECK(sha256_of(read_file(temporary / "train_000001.bin")) ==
          "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8");
}

TEST_CASE("tokenizer: bytes, in GPT-2's order") {
    Tokenizer bytes = Tokenizer::bytes();
    CHECK(bytes.vocab_size() == 257);
    CHECK(bytes.end_of_text() == 256);
    CHECK(bytes.encode("! ~\n\t\xff") == std::vector<uint16_t>{0, 220, 93, 198, 197, 187});
    CHECK(bytes.bytes_of(256) == "");
    CHECK(bytes.decode({39, 256, 72}, "|") == "H|i");
    CHECK(bytes.name_of(220) == "\u0120");
    CHECK(error_of([&] { bytes.decode({257}); }) ==
          "there is no token 257: the vocabulary has 257");
}

TEST_CASE("tokenizer: encoding agrees with BPE by its definition, also in prepare_data") {
    std::vector<std::string> texts;
    for (uint64_t seed = 0; seed < 100; ++seed) {
        texts.push_back(random_text(seed, 200) + sample_text().substr(seed));
        texts.push_back(random_bytes(seed, seed * 6));
    }
    for (int n : {1, 2, 3, 15, 16, 17, 31, 32, 33, 100, 1001})
        for (std::string unit : {"a", "ab", " ", "=", "\xff", "\u732b"}) {
            std::string& text = texts.emplace_back();
            for (int i = 0; i < n; ++i) text += unit;
        }
    // Words, with what decides where they end.
    const std::string word = "QuickzebrAZqfgjlmnopquvwxydhkstABCDEFGHIJ";
    for (size_t letters = 0; letters < 40; ++letters)
        for (std::string before : {"", " ", "  ", "'", "\u00e9"})
            for (std::string after : {"", " ", "'s", "7", "@", "[", "`", "{", "\u00e9", "\xff"})
                texts.push_back(before + word.substr(40 - letters) + after + sample_text());
    Tokenizer learnt = trained_on({sample_text(), std::string(40, 'a') + " aaa aaaa"}, 360);
    for (const Tokenizer& tokenizer : {learnt, Tokenizer::bytes()}) {
        Encoder encoder(tokenizer);
        for (const std::string& text : texts) {
            const std::vector<uint16_t> expected = encode_by_definition(tokenizer, text);
            CHECK(tokenizer.encode(text) == expected);
            CHECK(tokenizer.decode(expected) == text);
            std::vector<uint16_t> tokens;
            encoder.encode(text, tokens);
            CHECK(tokens == expected);
        }
    }
}

// Quadratic work would take hours.
TEST_CASE("tokenizer: a megabyte of one character takes no more than moments") {
    Tokenizer tokenizer = trained_on({sample_text(), std::string(999, 'a') + std::string(999, ' ') +
                                                         std::string(999, '=')},
                                     380);
    for (char c : {'a', ' ', '=', '\n', '\xff'}) {
        std::string text(1'000'000, c);
        CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
    }
}

TEST_CASE("tokenizer: damaged vocabulary files are refused in one clear line") {
    TemporaryFolder temporary;
    trained_on({"the cat the cat the hat"}, 262).save(temporary.path);
    const std::string vocab = read_file(temporary / "vocab.json"),
                      merges = read_file(temporary / "merges.txt"),
                      unversioned = merges.substr(merges.find('\n') + 1);
    auto changed = [&](const std::string& from, const std::string& to) {
        REQUIRE(contains(vocab, from));
        return std::string(vocab).replace(vocab.find(from), from.size(), to);
    };
    // What vocab.json and merges.txt hold, and the refusal.
    const std::array<std::string, 3> cases[] =
        {{vocab, merges, ""},
         {vocab, unversioned, ""},
         {vocab, merges + "zzz a\n", "found \"zzz a\""},
         {vocab, merges + "abc\n", "line 7: expected two tokens"},
         {vocab, merges + "\n", "line 7: expected two tokens"},
         {vocab, merges + "a b c\n", "line 7"},
         {vocab, merges + " a\n", "line 7"},
         {vocab, merges + unversioned, "makes a token that there is already"},
         {vocab, merges + "q x\n", "expected an object of 263 tokens (256 bytes, 6 merges"},
         {changed("\"!\": 0", "\"!\": 1"), merges, "! must have the id 0"},
         {changed("\"!\": 0", "\"!\": 0.0"), merges, "! must have the id 0"},
         {changed("\"!\": 0", "\"!\": 4294967296"), merges, "! must have the id 0"},
         {changed("\"!\": 0", "\"?!\": 0"), merges, "no merge makes the token ?!"},
         {changed("\"!\": 0", "\"!\": 0, \"??\": 7"), merges, "expected an object of 262 tokens"},
         {changed("<|endoftext|>", "<|end|>"), merges, "no merge makes the token <|end|>"},
         {vocab.substr(0, 99), merges, "not valid JSON"},
         {"[]", merges, "expected an object of 262 tokens"},
         // As editors and shells on Windows leave them.
         {"\xef\xbb\xbf" + vocab + "\r\n", merges, ""},
         {vocab, "\xef\xbb\xbf" + merges, ""},
         {vocab, replaced(merges, "\n", "\r\n"), ""},
         {vocab, "\xef\xbb\xbf" + replaced(unversioned, "\n", "\r\n"), ""},
         // What is no vocabulary at all.
         {"version https://git-lfs.github.com/spec/v1\n", merges,
          "vocab.json: found a pointer of Git LFS"},
         {vocab, "<!DOCTYPE html><html>", "merges.txt: found an HTML page"}};
    for (const auto& [vocab_text, merges_text, refusal] : cases) {
        put_file(temporary / "vocab.json", vocab_text);
        put_file(temporary / "merges.txt", merges_text);
        check_error(error_of([&] { Tokenizer::load(temporary.path); }), refusal);
    }
    std::filesystem::remove(temporary / "merges.txt");
    std::filesystem::remove(temporary / "tokenizer.json");
    CHECK(contains(error_of([&] { Tokenizer::load(temporary.path); }), "there is no tokenizer in"));
}

TEST_CASE(
    "tokenizer: tokenizer.json alone is a vocabulary, and what it asks for beyond is refused") {
    TemporaryFolder temporary;
    const Tokenizer learnt = trained_on({sample_text(), random_text(3, 500)}, 400);
    for (const Tokenizer& tokenizer : {learnt, Tokenizer::bytes()}) {
        put_file(temporary / "tokenizer.json", tokenizer.tokenizer_json());
        CHECK(Tokenizer::load(temporary.path) == tokenizer);
        CHECK(*tokenizer_of(temporary.path) == tokenizer);
    }
    // A change of what is written above: `from` becomes `to`. With an empty refusal it is read.
    const std::string good = learnt.tokenizer_json(), none;
    const std::string end = "\"<|endoftext|>\": " + std::to_string(learnt.end_of_text());
    const std::string merge = "[\"" + learnt.merge_names()[0];
    std::string pair = merge;
    pair.replace(pair.find(' '), 1, "\", \""), pair.insert(1, "["), pair += "\"]";
    const std::array<std::string, 3> cases[] =
        {{"{\"version\"", "\xef\xbb\xbf{\r\n\"version\"", none},
         {", " + end, none, none},  // it is among the added tokens, too
         {merge + '"', pair, none},
         {"\"post_processor\": null",
          R"("post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {}}]})",
          none},
         {"\"padding\": null", R"("padding": {"strategy": "BatchLongest"})", none},
         {"\"dropout\": null", "\"dropout\": 0", none},
         {"\"dropout\": null", "\"dropout\": 0.0", none},
         {"_prefix\": \"\"", "_prefix\": null", none},
         {"\"normalizer\": null", R"("normalizer": {"type": "NFC"})", "\"normalizer\" is {"},
         {"\"ByteLevel\"", "\"Metaspace\"", "\"type\" is \"Metaspace\": only GPT-2's byte-level"},
         {R"({"type": "ByteLevel")", R"({"type": "Sequence", "pretokenizers": [])", "Sequence"},
         {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "add_prefix_space"},
         {"\"use_regex\": true", "\"use_regex\": false", "use_regex"},
         {"\"BPE\"", "\"WordPiece\"", "WordPiece"},
         {"\"dropout\": null", "\"dropout\": 0.1", "\"dropout\" is 0.1"},
         {"_prefix\": \"\"", "_prefix\": \"##\"", "continuing_subword_prefix"},
         {"_suffix\": \"\"", "_suffix\": \"</w>\"", "end_of_word_suffix"},
         {"\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback"},
         {"\"ignore_merges\": false", "\"ignore_merges\": true", "ignore_merges"},
         {"\"added_tokens\": [", R"("added_tokens": [{"id": 400, "content": "[PAD]"}, )",
          "\"content\" is \"[PAD]\": no other added token"},
         {"\"id\": 3", "\"id\": 2", "<|endoftext|> must have the id"},
         {"\"!\": 0", "\"!\": 1", "! must have the id 0"},
         {merge + '"', "[\"zzz a\"", "merge 1: expected two tokens"},
         {merge + '"', "[7", "merge 1: expected two tokens"},
         {"\"merges\": ", "\"mergers\": ", "\"merges\" is missing"},
         {"\"vocab\": {", "\"vocab\": [{", "not valid JSON"},
         {"\"pre_tokenizer\": {", "\"pre\": {", "\"pre_tokenizer\" is missing"},
         {"\"model\": {", "\"model\": 7, \"x\": {", "\"model\" must be an object"},
         {"{\"version\"", "<html>", ": found an HTML page"}};
    for (const auto& [was, to, refusal] : cases) {
        const std::string from = was;  // clang 14 cannot capture a structured binding
        CAPTURE(from);
        REQUIRE(contains(good, from));
        std::string text = good;
        put_file(temporary / "tokenizer.json", text.replace(text.find(from), from.size(), to));
        const std::string error = error_of([&] { Tokenizer::load(temporary.path); });
        check_error(error, refusal);
        if (error.empty())
            CHECK(Tokenizer::load(temporary.path) == learnt);
        else
            CHECK(contains(error, temporary / "tokenizer.json"));
    }
}

// =================================================================================================
// §14 safetensors, weights and config.json
// =================================================================================================
// Files by their format, each rule broken once; names of tensors; what config.json may ask for.

TEST_CASE("safetensors: a file is what the format says, byte for byte") {
    TemporaryFolder scratch;
    const std::vector<float> b = {1.0f, -2.0f}, a = {0.5f, 3.0f, 1.0e-3f}, d = {0.1f};
    write_safetensors(scratch / "f",
                      {tensor_to_write("d", {}, d.data()), tensor_to_write("b", {2, 1}, b.data()),
                       tensor_to_write("a", {3}, a.data())});
    std::string header = R"({"__metadata__":{"format":"pt"},)"
                         R"("a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},)"
                         R"("b":{"dtype":"F32","shape":[2,1],"data_offsets":[12,20]},)"
                         R"("d":{"dtype":"F32","shape":[],"data_offsets":[20,24]}})";
    header.append((8 - header.size() % 8) % 8, ' ');
    CHECK(read_file(scratch / "f") == safetensors_bytes(header, raw(a) + raw(b) + raw(d)));
    CHECK(list_folder(scratch.path) == std::vector<std::string>{"f"});
}

TEST_CASE("safetensors: every type of weight is read exactly, on any number of threads") {
    TemporaryFolder scratch;
    const size_t count = 1'000'003;  // several chunks, the last one ragged
    const std::vector<double> doubles = random_vector(count, 5, 0.02);
    const std::vector<float> floats(doubles.begin(), doubles.end());
    const std::vector<bf16> halves(floats.begin(), floats.end());
    struct Case {
        const char* dtype;
        std::string data;
        std::function<double(size_t)> value;
    };
    for (const Case& c : {Case{"F64", raw(doubles), [&](size_t i) { return doubles[i]; }},
                          {"F32", raw(floats), [&](size_t i) { return floats[i]; }},
                          {"BF16", raw(halves), [&](size_t i) { return float(halves[i]); }}}) {
        CAPTURE(c.dtype);
        const std::string one =
            entry("w", c.dtype, to_text("[", count, "]"), to_text("[0,", c.data.size(), "]"));
        put_file(scratch / "f",
                 safetensors_bytes("{\"__metadata__\":{\"a\":\"b\"}," + one + "}", c.data));
        const SafetensorsFile file(scratch / "f");
        REQUIRE(file.tensors.size() == 1);
        for (int n : {1, 3}) {
            const Threads threads(n);
            std::vector<double> wide(count);
            std::vector<float> narrow(count);
            file.read(file.tensors[0], wide.data());
            file.read(file.tensors[0], narrow.data());
            bool equal = true;
            for (size_t i = 0; i < count; i++)
                equal = equal && wide[i] == c.value(i) && narrow[i] == float(c.value(i));
            CHECK(equal);
        }
    }
    // Halves: 1, -2, 65504 (largest), 2^-14 (smallest normal), 2^-24 (smallest), -0.
    const std::vector<uint16_t> bits = {0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x8000};
    put_file(scratch / "h",
             safetensors_bytes("{" + entry("w", "F16", "[2,3]", "[0,12]") + "}", raw(bits)));
    const SafetensorsFile file(scratch / "h");
    std::vector<float> w(6);
    file.read(file.tensors[0], w.data());
    CHECK(raw(w) == raw<float>({1, -2, 65504, 0x1p-14f, 0x1p-24f, -0.0f}));
    for (uint32_t half = 0; half < 0x7c00; half++) {  // in order, and the sign is a sign
        if (half > 0) REQUIRE(float(f16{uint16_t(half)}) > float(f16{uint16_t(half - 1)}));
        REQUIRE(float(f16{uint16_t(half | 0x8000)}) == -float(f16{uint16_t(half)}));
    }
    CHECK(std::isinf(float(f16{0xfc00})));
    CHECK(std::isnan(float(f16{0x7e00})));
}

TEST_CASE("safetensors: unusual files that follow the rules are read") {
    TemporaryFolder scratch;
    for (const char* header : {"{}", "{}      ", "{\"__metadata__\":{}}"}) {
        put_file(scratch / "f", safetensors_bytes(header, ""));
        CHECK(error_of([&] { SafetensorsFile file(scratch / "f"); }) == "");
    }
    for (const std::string& members :
         {std::string("\"a\" : {\"shape\":[ 2 ],\n\"data_offsets\":[0,8],\"dtype\":\"F32\"}   "),
          entry("a", "F32", "[]", "[4,8]") + "," + entry("b", "I32", "[1,1]", "[0,4]"),
          entry("z", "F32", "[0]", "[0,0]") + "," + entry("a", "F64", "[1]", "[0,8]"),
          entry("a", "F64", "[1]", "[0,8]") + "," + entry("z", "F32", "[5,0]", "[8,8]"),
          entry("a", "BOOL", "[8]", "[0,8]"), entry("a\\n\\u0120", "U16", "[2,2]", "[0,8]")}) {
        CAPTURE(members);
        put_file(scratch / "f", safetensors_bytes("{" + members + "}", std::string(8, '\0')));
        CHECK(error_of([&] { SafetensorsFile file(scratch / "f"); }) == "");
    }
}

TEST_CASE("safetensors: each rule of the format broken once is refused by name") {
    TemporaryFolder scratch;
    const std::string path = scratch / "model.safetensors", data(24, '\0');
    const std::string a = entry("a", "F32", "[2,2]", "[0,16]"),
                      b = entry("b", "F32", "[2]", "[16,24]"), good = "{" + a + "," + b + "}",
                      whole = safetensors_bytes(good, data);
    auto header = [&](const std::string& text) { return safetensors_bytes(text, data); };
    auto pair = [&](const std::string& one, const std::string& two) {
        return header("{" + one + "," + two + "}");
    };
    auto with_a = [&](const char* dtype, const char* shape, const char* offsets) {
        return pair(entry("a", dtype, shape, offsets), b);
    };
    auto shape = [&](const char* text) { return with_a("F32", text, "[0,16]"); };
    auto offsets = [&](const char* text) { return with_a("F32", "[2,2]", text); };
    auto dtype = [&](const char* text) { return with_a(text, "[2,2]", "[0,16]"); };
    auto name = [&](const char* text) { return pair(a, entry(text, "F32", "[2]", "[16,24]")); };
    auto metadata = [&](const std::string& text) {
        return header("{\"__metadata__\":" + text + "," + a + "," + b + "}");
    };
    auto length = [&](uint64_t n) { return little_endian(n) + whole.substr(8); };
    auto cut = [&](size_t bytes) { return whole.substr(0, bytes); };
    std::string many = "{";
    for (int i = 0; i < 40'000; i++)
        many += (i ? "," : "") + entry("t" + std::to_string(i), "F32", "[6]", "[0,24]");
    const std::string open = a.substr(0, a.size() - 1);

    // A reason, and files that are refused for it.
    const std::pair<const char*, std::vector<std::string>> list[] = {
        // The length of the header
        {"at least 10 bytes, found 0", {""}},
        {"at least 10 bytes, found 7", {cut(7)}},
        {"cut short", {cut(8), cut(40), cut(8 + good.size() - 1), length(whole.size() - 7)}},
        {"no safetensors file",
         {length(100'000'000), length(1ull << 31), length(1ull << 32), length(INT64_MAX),
          length(1ull << 63), length(0 - 8ull), length(UINT64_MAX),
          length(uint64_t(good.size()) << 56)}},
        {"but PyTorch's own form", {"PK\x03\x04 this is a zip archive"}},
        {"but an HTML page", {"<!DOCTYPE html><html>404</html>", "<html><head>"}},
        {"but a pointer of Git LFS", {"version https://git-lfs.github.com/spec/v1\n"}},
        {"but a GGUF file", {"GGUF\3" + std::string(50, '\0')}},
        {"a GPT-2 needs less than", {safetensors_bytes("{}" + std::string(5'000'000, ' '), "")}},
        // The JSON
        {"must begin with '{'",
         {length(0), header(" " + good), header("\xef\xbb\xbf" + good), header("[" + good + "]")}},
        {"not valid JSON",
         {length(good.size() + 8), header(good + std::string(4, '\0')), length(good.size() - 1),
          header(good + good), header("{" + a + b + "}")}},
        {"key a twice", {name("a"), name("\\u0061")}},
        {"key dtype twice", {pair(open + ",\"dtype\":\"F32\"}", b)}},
        {"__metadata__ twice", {metadata("{},\"__metadata__\":{}")}},
        // A tensor's description
        {"tensor b: \"dtype\" is missing",
         {pair(a, "\"b\":7"), pair(a, "\"b\":null"), pair(a, "\"b\":[1]"),
          pair(a, R"("b":{"shape":[2],"data_offsets":[16,24]})")}},
        {"\"shape\" is missing", {pair(a, R"("b":{"dtype":"F32","data_offsets":[16,24]})")}},
        {"\"data_offsets\" is missing", {pair(a, R"("b":{"dtype":"F32","shape":[2]})")}},
        {"unknown key beside dtype", {pair(open + ",\"strides\":[1]}", b)}},
        {"unknown dtype F128", {dtype("F128")}},
        {"unknown dtype f32", {dtype("f32")}},
        {"unknown dtype \"\"", {dtype("")}},
        {"unknown dtype U16|F16", {dtype("U16|F16")}},
        {"\"dtype\" must be a string",
         {pair(R"("a":{"dtype":4,"shape":[],"data_offsets":[0,16]})", b)}},
        {"\"shape\" must be an array", {shape("4")}},
        {"shape must be integers",
         {shape("[\"2\",2]"), shape("[-2,-2]"), shape("[-1]"), shape("[2.0,2]"), shape("[4e0]"),
          shape("[9007199254740993]"), shape("[18446744073709551616]"),
          with_a("F32", "[4611686018427387905]", "[0,4]")}},
        {"takes 73786976294838206464 bytes", {with_a("F32", "[4294967296,4294967296]", "[0,0]")}},
        {"takes 18446744073709551616 bytes", {with_a("F32", "[2147483648,2147483648]", "[0,0]")}},
        {"takes 24 bytes", {shape("[2,3]")}},
        {"takes 8 bytes", {shape("[2,1]"), dtype("BF16")}},
        {"takes 32 bytes", {dtype("F64")}},
        {"takes 0 bytes", {shape("[0]")}},
        // The offsets
        {"must be two integers", {offsets("[16]"), offsets("[0,16,16]")}},
        {"\"data_offsets\" must be an array", {offsets("{}")}},
        {"data_offsets must be integers",
         {offsets("[-16,0]"), offsets("[0.0,16]"), offsets("[0,16e0]"), offsets("[\"0\",16]"),
          offsets("[null,16]"), offsets("[9007199254740978,9007199254740994]"),
          offsets("[0,9223372036854775807]"), offsets("[18446744073709551600,0]")}},
        {"takes 16 bytes, data_offsets are [16,0]", {offsets("[16,0]")}},
        {"those before it end at",
         {offsets("[1000,1016]"), pair(entry("a", "F32", "[1,2]", "[8,16]"), b),
          pair(entry("a", "F32", "[3]", "[0,12]"), b), pair(a, entry("b", "U8", "[9]", "[15,24]")),
          pair(entry("a", "F32", "[6]", "[0,24]"), entry("b", "F32", "[6]", "[0,24]")),
          pair(a, entry("b", "F32", "[0]", "[8,8]")),
          header(many.substr(0, many.find(",\"t3000\"")) + "}")}},
        {"values", {header(many + "}")}},
        {"cut short or too long",
         {cut(whole.size() - 1), cut(8 + good.size()), whole + '\0', whole + whole, header("{}")}},
    };
    put_file(path, whole);
    REQUIRE(error_of([&] { SafetensorsFile file(path); }) == "");
    size_t count = 0;
    for (auto& [reason, files] : list)
        for (const std::string& bytes : files) {
            const std::string begins = shown(bytes.substr(0, 200));
            CAPTURE(begins);
            put_file(path, bytes);
            check_unreadable(path, reason);
            ++count;
        }
    CHECK(count >= 80);
    // Cut at any byte, it is refused; so is what is no file.
    for (size_t bytes = 0; bytes < whole.size(); bytes++) {
        put_file(path, cut(bytes));
        check_unreadable(path, "");
    }
    check_unreadable(scratch.path, "expected a file");
    REQUIRE(::mkfifo((scratch / "pipe").c_str(), 0600) == 0);  // must not wait for a writer
    check_unreadable(scratch / "pipe", "expected a file");
}

TEST_CASE("safetensors: NaN and infinity are neither read nor written") {
    TemporaryFolder scratch;
    const std::string path = scratch / "f";
    const float nan = NAN, inf = INFINITY;
    auto read_it = [&](const std::string& dtype, const std::string& bytes) {
        const size_t count = bytes.size() / dtype_bytes(dtype);
        put_file(path,
                 safetensors_bytes("{" +
                                       entry("h.0.ln_1.weight", dtype, to_text("[", count, "]"),
                                             to_text("[0,", bytes.size(), "]")) +
                                       "}",
                                   bytes));
        std::vector<float> out(count);
        const SafetensorsFile file(path);
        file.read(file.tensors[0], out.data());
    };
    std::vector<float> late(700'000, 1.0f);
    late[699'999] = nan;
    const std::tuple<const char*, std::string, const char*> list[] = {
        {"F32", raw<float>({1, nan}), "NaN in element 1"},
        {"F32", raw<float>({-inf, nan}), "infinity in element 0"},
        {"F32", raw(late), "NaN in element 699999"},
        {"F64", raw<double>({1, 2, double(nan)}), "NaN in element 2"},
        {"F64", raw<double>({1e300}), "infinity in element 0"},
        {"BF16", raw<uint16_t>({0x3f80, 0x7fc0}), "NaN in element 1"},
        {"BF16", raw<uint16_t>({0x3f80, 0xff80}), "infinity in element"},
        {"F16", raw<uint16_t>({0x7e00}), "NaN in element 0"},
        {"F16", raw<uint16_t>({0x7c00}), "infinity in element"},
        {"I64", raw<int64_t>({1}), "expected type F32, BF16, F16 or F64, found I64"},
        {"F8_E4M3", "x", "expected type F32, BF16, F16 or F64, found F8_E4M3"},
    };
    for (auto& [dtype, bytes, reason] : list)
        check_refused(path, to_text("tensor h.0.ln_1.weight: ", reason),
                      [&, &dtype = dtype, &bytes = bytes] { read_it(dtype, bytes); });
    CHECK(error_of([&] { read_it("F32", raw<float>({1, -3.4028235e38f, 1e-45f})); }) == "");
    put_file(path, "the old bytes");
    for (float bad : {nan, -inf, inf}) {
        std::vector<float> w(300'000, 1.0f);
        w[299'999] = bad;
        check_refused(path, "NaN or infinity in tensor w", [&] {
            write_safetensors(path, {tensor_to_write("w", {300'000}, w.data())});
        });
        CHECK(read_file(path) == "the old bytes");
    }
    CHECK(list_folder(scratch.path).size() == 1);
}

TEST_CASE("safetensors: a file that shrinks after it was opened is an error, not a crash") {
    TemporaryFolder scratch;
    std::vector<float> w(300'000, 1.0f);
    write_safetensors(scratch / "f", {tensor_to_write("w", {300'000}, w.data())});
    const SafetensorsFile file(scratch / "f");
    REQUIRE(::truncate((scratch / "f").c_str(), 1000) == 0);
    check_refused(scratch / "f", "became shorter", [&] { file.read(file.tensors[0], w.data()); });
}

// A file as a folder's weights.
std::deque<SafetensorsFile> one_file(const std::string& path) {
    std::deque<SafetensorsFile> files;
    files.emplace_back(path);
    return files;
}

// The values of the list's tensors, as they are in files.
std::vector<float> values_in(const std::deque<SafetensorsFile>& files, const Layout& layout) {
    const auto found = match_tensors(files, layout.tensors);
    std::vector<float> values(layout.size);
    for (size_t i = 0; i < layout.tensors.size(); i++)
        found[i]->file->read(*found[i], values.data() + layout.tensors[i].offset);
    return values;
}

TEST_CASE("checkpoints: every way of naming GPT-2's tensors is understood") {
    TemporaryFolder scratch;
    const std::string path = scratch / "model.safetensors";
    // What stands before the model's names, and before the head's.
    const std::pair<const char*, const char*> prefixes[] =
        {{"", ""},
         {"transformer.", ""},
         {"model.", ""},
         {"module.", "module."},
         {"module.transformer.", "module."},
         {"_orig_mod.transformer.", "_orig_mod."},
         {"module._orig_mod.transformer.", "module._orig_mod."},
         {"transformer.transformer.", "transformer."},
         {"model.transformer.", "model."}};
    for (const Config& config : {tiny_config, untied_config})
        for (auto [before, before_head] : prefixes)
            for (bool extras : {false, true}) {
                const char* prefix = before;  // clang 14 cannot capture a structured binding
                CAPTURE(prefix);
                Weights weights(config, false);
                for (StoredTensor& tensor : weights.tensors)
                    tensor.name =
                        (tensor.name == "lm_head.weight" ? before_head : prefix) + tensor.name;
                if (extras) {
                    weights.add(std::string(prefix) + "h.0.attn.bias", {1, 1, 4, 4});
                    weights.add(std::string(prefix) + "h.1.attn.masked_bias", {});
                    for (const char* head : {"score.weight", "classifier.bias", "qa_outputs.weight",
                                             "multiple_choice_head.summary.weight", "v_head.x"})
                        weights.add(std::string(before_head) + head, {2});
                    if (!config.untied_head)
                        weights.add(std::string(before_head) + "lm_head.weight", {11, 8});
                }
                write_safetensors(path, weights.tensors);
                const auto files = one_file(path);
                CHECK(values_in(files, weights.layout) == weights.values);
                const size_t spare = extras && !config.untied_head;
                CHECK(match_tensors(files, weights.layout.tensors).size() ==
                      weights.layout.tensors.size() + spare);
            }
}

// A folder with the model of `weights`, in as many files.
void save_shards(const std::string& folder, const Weights& weights, size_t count) {
    make_folders(folder);
    put_file(folder + "/config.json", hf_config(tiny_config, -1).write());
    Json map = Json::object();
    for (size_t shard = 0; shard < count; shard++) {
        std::vector<StoredTensor> part;
        const std::string name = format("model-%05zu-of-%05zu.safetensors", shard + 1, count);
        for (size_t i = shard; i < weights.tensors.size(); i += count) {
            part.push_back(weights.tensors[i]);
            map.set(part.back().name, name);
        }
        write_safetensors(folder + "/" + name, part);
    }
    put_file(folder + "/model.safetensors.index.json",
             Json::object().set("metadata", Json::object()).set("weight_map", map).write(2));
}

TEST_CASE(
    "checkpoints: weights in several files are read; missing, stale and stray ones are named") {
    TemporaryFolder scratch;
    const Weights weights(tiny_config), other = [] {
        Weights w(tiny_config);
        w.tensors.back().name = "transformer.of_another_save";
        return w;
    }();
    const std::string m = scratch / "m", index = m + "/model.safetensors.index.json",
                      second = m + "/model-00002-of-00003.safetensors";
    for (size_t count : {1, 2, 3}) {
        save_shards(m, weights, count);
        CHECK(values_in(open_weights(m), weights.layout) == weights.values);
        CHECK(config_of_folder(m).n_embd == 8);
        remove_folder(m);
    }
    auto edited = [&](const char* from, const char* to) {
        put_file(index, replaced(read_file(index), from, to));
    };
    // What is done to the folder, and what is named.
    const std::pair<std::function<void()>, std::string> cases[] =
        {{[&] { remove_file(second); }, "model-00002-of-00003.safetensors, which is missing"},
         {[&] { put_file(second, read_file(m + "/model-00001-of-00003.safetensors")); },
          "model-00002-of-00003.safetensors: tensor"},
         {[&] { save_shards(m, other, 3); }, "of_another_save: unexpected"},
         {[&] { edited("model-00002", "../model-00002"); }, "which is missing"},
         {[&] { put_file(second, "version https://git-lfs.github.com/spec/v1\n"); },
          second + ": header of"},
         {[&] { put_file(index, "<!DOCTYPE html>"); }, ": found an HTML page"},
         {[&] { put_file(index, "{}"); }, "\"weight_map\" is missing"},
         {[&] { put_file(index, "{\"weight_map\": {}}"); }, "found no such file"}};
    for (auto& [damage, named] : cases) {
        save_shards(m, weights, 3);
        damage();
        check_error(error_of([&] { config_of_folder(m); }), named);
        remove_folder(m);
    }
    // A whole file beside them is what counts, as in transformers.
    save_shards(m, weights, 2);
    write_safetensors(m + "/model.safetensors", weights.tensors);
    remove_file(m + "/model-00001-of-00002.safetensors");
    CHECK(values_in(open_weights(m), weights.layout) == weights.values);
}

TEST_CASE("checkpoints: a tied head that is another matrix is not dropped in silence") {
    TemporaryFolder scratch;
    for (bool differs : {false, true}) {
        Weights weights(tiny_config);
        std::vector<float> head(weights.values.begin(), weights.values.begin() + 11 * 8);
        if (differs) head.back() += 1e-6f;
        weights.tensors.push_back(tensor_to_write("lm_head.weight", {11, 8}, head.data()));
        put_file(scratch / "config.json", hf_config(tiny_config, -1).write());
        write_safetensors(scratch / "model.safetensors", weights.tensors);
        REQUIRE(weights.layout.tensors[0].offset == 0);
        const std::string error = error_of([&] { config_of_folder(scratch.path); });
        check_error(error, differs ? "lm_head.weight: differs from wte.weight" : "");
        if (differs) CHECK(contains(error, "set \"tie_word_embeddings\" to false"));
    }
    put_file(scratch / "config.json", hf_config(untied_config, -1).write());
    CHECK(config_of_folder(scratch.path).untied_head);
}

TEST_CASE("checkpoints: a missing, extra or misshapen tensor is named with what was expected") {
    TemporaryFolder scratch;
    const std::string path = scratch / "model.safetensors", p = "transformer.";
    // A tensor as it should not be, and the reason.
    struct Case {
        std::string name;
        std::optional<std::vector<int64_t>> shape;  // none: there is no such tensor
        std::string reason;
        Config config = tiny_config;
    };
    const Case cases[] =
        {{p + "wpe.weight", {}, "tensor wpe.weight is missing: expected shape [4,8]"},
         {p + "h.1.mlp.c_fc.bias", {}, "tensor h.1.mlp.c_fc.bias is missing: expected shape [32]"},
         {"lm_head.weight",
          {},
          "tensor lm_head.weight is missing: expected shape [11,8]",
          untied_config},
         {"lm_head.weight", {{8, 11}}, "lm_head.weight: expected shape [11,8], found [8,11]"},
         {"lm_head.bias", {{11}}, "tensor lm_head.bias: unexpected"},
         {p + "h.2.ln_1.weight", {{8}}, "tensor transformer.h.2.ln_1.weight: unexpected"},
         {"scores.weight", {{2, 8}}, "tensor scores.weight: unexpected"},
         {p + "h.0.attn.biases", {{1}}, "tensor transformer.h.0.attn.biases: unexpected"},
         {"model.wte.weight", {{11, 8}}, "there twice"},
         {"h.0.ln_1.bias", {{8}}, "there twice"},
         {p + "lm_head.weight", {{8, 11}}, "expected shape [11,8]"},
         {"bad\nname", {{1}}, "tensor \"bad\\nname\""},
         {"wte.weight", {{11, 8}}, "there twice"},
         {std::string(5000, 'n'), {{1}}, "nnn\"...: unexpected"},
         {p + "wte.weight",
          {{8, 11}},
          "transformer.wte.weight: expected shape [11,8], found [8,11]"},
         {p + "h.0.attn.c_attn.weight", {{24, 8}}, "expected shape [8,24], found [24,8]"},
         {p + "ln_f.weight", {{1, 8}}, "expected shape [8], found [1,8]"},
         {p + "ln_f.bias", {std::vector<int64_t>()}, "expected shape [8], found []"},
         {p + "ln_f.bias", {{0}}, "expected shape [8], found [0]"}};
    for (const Case& c : cases) {
        Weights weights(c.config);
        weights.remove(c.name);
        if (c.shape) weights.add(c.name, *c.shape);
        write_safetensors(path, weights.tensors);
        const auto files = one_file(path);
        check_refused(path, c.reason, [&] { match_tensors(files, weights.layout.tensors); });
    }
    // A folder without the file gets an answer that helps.
    check_refused(scratch / "none", "there is no such folder",
                  [&] { config_of_folder(scratch / "none"); });
    CHECK(open_weights(scratch.path).front().path == path);
    remove_file(path);
    check_refused(scratch.path, "found no such file. Save a model of another form",
                  [&] { open_weights(scratch.path); });
}

TEST_CASE("config.json: written here it is read here; Hugging Face's own is understood") {
    TemporaryFolder scratch;
    const std::string path = scratch / "config.json";
    auto check_read = [&](const Config& expected) {
        const Config config = read_hf_config(path);
        for (auto member : {&Config::n_layer, &Config::n_head, &Config::n_embd,
                            &Config::n_positions, &Config::vocab_size})
            CHECK(config.*member == expected.*member);
        CHECK(config.untied_head == expected.untied_head);
        CHECK(config.layer_norm_epsilon == expected.layer_norm_epsilon);
    };
    for (bool untied_head : {false, true})
        for (int end_of_text : {299, -1}) {
            const Config config{3, 2, 10, 7, 300, untied_head, 0.1f, false, 1.2345e-6};
            put_file(path, hf_config(config, end_of_text).write(2));
            check_read(config);
            CHECK(contains(read_file(path), "\"attn_pdrop\": 0.1,"));
            CHECK(contains(read_file(path),
                           end_of_text < 0 ? "\"eos_token_id\": null" : "\"eos_token_id\": 299"));
        }
    // The fields of the published GPT-2, in an order of their own.
    put_file(path, R"({"activation_function": "gelu_new", "attn_pdrop": 0.1,
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 0.00001, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": null, "summary_use_proj": true, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}})");
    check_read({12, 12, 768, 1024, 50257});
    // Other names of the same things, and what need not be there.
    const Config least{2, 2, 8, 6, 11};
    auto check_members = [&](const std::string& members, const Config& expected) {
        put_file(path, "{" + members + ", \"vocab_size\": 11}");
        check_read(expected);
    };
    const std::string sizes = "\"n_layer\": 2, \"n_head\": 2, \"n_embd\": 8, ";
    check_members(sizes + "\"n_positions\": 6", least);
    check_members(sizes + "\"n_ctx\": 6", least);
    put_file(path, "\xef\xbb\xbf" + replaced(hf_config(least, -1).write(2), "\n", "\r\n"));
    check_read(least);
    check_members(
        "\"num_hidden_layers\": 2, \"num_attention_heads\": 2, \"hidden_size\": 8, "
        "\"n_positions\": 6, \"n_ctx\": 6",
        least);
    for (const char* same :
         {"gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"})
        check_members(sizes + "\"n_ctx\": 6, \"activation_function\": \"" + same + '"', least);
    Config other = least;
    for (const char* epsilon : {"1e-6", "1e-12", "0.1", "1", "1e-30"}) {
        other.layer_norm_epsilon = std::stod(epsilon);
        check_members(sizes + "\"n_ctx\": 6, \"layer_norm_epsilon\": " + epsilon, other);
    }
}

TEST_CASE("config.json: the epsilon of a checkpoint is that of every layernorm, and is kept") {
    TemporaryFolder scratch;
    Config config{2, 2, 8, 6, 11};
    const Batch batch = random_batch(1, 2, 6, 11);
    std::vector<double> all;
    for (double epsilon : {1e-5, 0.1}) {
        config.layer_norm_epsilon = epsilon;
        Gpt2<Cpu> saved(config);
        saved.initialise(3);
        save_checkpoint(saved, scratch / "m", nullptr, {}, Purpose::use);
        auto loss_of = [&]<class Device>(Gpt2<Device>&& model) {
            load_weights(model, scratch / "m");
            model.reserve(2, 6, Use::evaluation);
            double loss = 0;
            for (auto one : batch_losses(model, batch)) loss += double(one);
            return loss;
        };
        const double loss = loss_of(Gpt2<Reference<double>>(config_of_folder(scratch / "m")));
        CHECK(loss_of(Gpt2<Cpu>(config_of_folder(scratch / "m"))) == doctest::Approx(loss));
        all.push_back(loss);
    }
    CHECK(std::abs(all[0] - all[1]) > 1e-6);
}

TEST_CASE("config.json: the largest model that the options allow can be saved and opened again") {
    TemporaryFolder scratch;
    const Config config{1000, 1, 1, 1, 2};
    Gpt2<Cpu> model(config);
    model.reserve(1, 1, Use::training);
    model.initialise(1);
    save_checkpoint(model, scratch / "m", nullptr, {}, Purpose::resume);
    Gpt2<Cpu> again(config_of_folder(scratch / "m"));
    again.reserve(1, 1, Use::training);
    load_weights(again, scratch / "m"), load_moments(again, scratch / "m");
    CHECK(again.get_weights() == model.get_weights());
    // One table of limits: an option and the member of config.json stop at the same size.
    Options options;
    for (const Option& option : model_options(options))
        for (const SizeLimit& limit : kSizes) {
            std::string name = limit.name;
            std::replace(name.begin(), name.end(), '_', '-');
            if (option.name == name) CHECK(option.range.high == limit.most);
        }
}

TEST_CASE("config.json: what this model does not do is refused by name") {
    TemporaryFolder scratch;
    const std::string path = scratch / "config.json";
    const Json good = hf_config(tiny_config, 10);
    auto check = [&](const std::string& text, const std::string& reason) {
        put_file(path, text);
        check_refused(path, reason, [&] { read_hf_config(path); });
    };
    // A member, the message for its value @, and values that are refused.
    const std::array<std::string, 3> members[] = {
        {"model_type", "is @: only \"gpt2\"", "\"gpt_neo\""},
        {"activation_function", "is @: only the tanh GELU", "\"gelu\" \"quick_gelu\" 7"},
        {"n_inner", "is @: only null or 4 n_embd", "31 0"},
        {"n_ctx", "is @: it must equal n_positions", "5"},
        {"scale_attn_weights", "is @: only true", "false"},
        {"scale_attn_by_inverse_layer_idx", "is @: only false", "true"},
        {"reorder_and_upcast_attn", "is @: only false", "true"},
        {"add_cross_attention", "is @: only false", "true"},
        {"is_encoder_decoder", "is @: only false", "true"},
        {"quantization_config", "is @: quantised weights", "{\"bits\":4}"},
        {"pruned_heads", "is @: pruned heads", "{\"0\":[1]}"},
        {"tie_word_embeddings", "is @: must be true or false", "0"},
        {"layer_norm_epsilon", "must be from 1e-30 to 1, found @",
         "0 -1e-5 1.5 1e-38 \"1e-5\" null"},
        {"n_layer", "must be an integer from 1 to 1000, found ", "0 -2 2.5 1001 2147483648 1e300"},
        {"n_layer", "must be a number, found a string", "\"2\""},
        {"n_layer", "must be a number, found null", "null"},
        {"n_head", "3 does not divide \"n_embd\" 8", "3"},
        {"n_head", "must be an integer from 1 to 65536", "0 65537"},
        {"n_embd", "must be an integer from 1 to 65536", "0 65537 4294967304 18446744073709551616"},
        {"n_positions", "must be an integer from 1 to 1048576", "0 1048577"},
        {"vocab_size", "must be an integer from 1 to 65536, found ", "0 65537"},
        {"vocab_size", "must be a number, found an array", "[11]"},
    };
    for (const auto& [key, said, values] : members)
        for (const std::string& value : split_at(values, ' '))
            check(Json(good).set(key, Json::parse(value, "x")).write(),
                  to_text("\"", key, "\" ", replaced(said, "@", value)));
    for (const char* key : {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}) {
        Json changed = good;
        std::erase_if(changed.members,
                      [&](auto& member) { return member.first == key || member.first == "n_ctx"; });
        check(changed.write(), to_text("\"", key, "\" is missing"));
    }
    for (const char* text : {"", "[]", "7", "{", "{\"n_layer\": 2, \"n_layer\": 2}"})
        check(text, "");
    check("<!DOCTYPE html>", "found an HTML page");
    check("version https://git-lfs.github.com/spec/v1\noid", "found a pointer of Git LFS");
    check("{\"x\":\"" + std::string(2'000'000, 'x') + "\"}", "at most 1000000 bytes");
}

// --- Hugging Face folders

std::vector<int32_t> tokens_of(const Json& expected, const char* key) {
    std::vector<int32_t> list;
    for (auto& [none, item] : expected.get(key, Json::Kind::array, "").members)
        list.push_back(item.as<int32_t>().value());
    return list;
}

// Loss, logits, and fifty tokens, each the likeliest.
template <class real>
void compare_with_golden(const std::string& folder, const Json& expected) {
    const Config config = config_of_folder(folder);
    const std::vector<int32_t> tokens = tokens_of(expected, "tokens");
    const int T = int(tokens.size()) - 1, V = config.vocab_size;
    Gpt2<DeviceOf<real>> model(config);
    model.reserve(1, config.n_positions, Use::evaluation);
    load_weights(model, folder);
    const Batch batch = batch_of(1, T, [&](int i) { return tokens[size_t(i)]; });
    double loss = 0;
    for (real row : batch_losses(model, batch)) loss += double(row) / T;
    const Json& their_loss = expected.get("loss", Json::Kind::number, "");
    CHECK(std::abs(loss - their_loss.as<double>().value()) < 1e-5);
    std::vector<real> logits(size_t(T) * size_t(V));
    model.device.head_logits(logits.data(), model.a.ln_f, model.w.lm_head, T, config.n_embd, V);
    const SafetensorsFile file(folder + "/expected.safetensors");
    std::vector<real> theirs(logits.size());
    file.read(*tensor_of(file, "logits"), theirs.data());
    CHECK(largest_difference(logits, theirs) < 1e-4);
    std::vector<int32_t> greedy;
    model.reserve(1, config.n_positions, Use::generation);
    generate(model, tokens_of(expected, "prompt"), {50, 0}, [&](int token) {
        greedy.push_back(token);
        return true;
    });
    CHECK(greedy == tokens_of(expected, "greedy"));
}

TEST_CASE("hf: a folder that transformers wrote has its loss, logits, text and tokens here") {
    Threads one(1);
    for (const char* name : {"hf-tied", "hf-openai", "hf-untied-bf16"}) {
        CAPTURE(name);
        const std::string folder = reference_folder(name);
        if (folder.empty()) continue;
        const Json expected = read_json(folder + "/expected.json");
        compare_with_golden<float>(folder, expected);
        compare_with_golden<double>(folder, expected);
        // One has a tokenizer, which Hugging Face's own trainer learnt.
        if (!expected.find("text")) continue;
        const Tokenizer tokenizer = Tokenizer::load(folder);
        const std::string text = expected.get_string("text", "");
        const std::vector<uint16_t> tokens = tokenizer.encode(text);
        CHECK(std::vector<int32_t>(tokens.begin(), tokens.end()) ==
              tokens_of(expected, "text_tokens"));
        CHECK(tokenizer.decode(tokens) == text);
        CHECK(tokenizer.end_of_text() == 299);
    }
}

TEST_CASE("hf: a saved model has all that transformers asks for, for every kind of vocabulary") {
    Threads one(1);
    const Tokenizer bytes = Tokenizer::bytes(), learnt({{0, 1}, {256, 2}, {257, 257}});
    for (const Tokenizer* tokenizer : {&bytes, &learnt}) {
        TemporaryFolder scratch;
        const int V = tokenizer->vocab_size();
        save_model(scratch / "m", {12, 2, 8, 16, V}, tokenizer);
        const SafetensorsFile file(scratch / "m/model.safetensors");
        CHECK(file.tensors.size() == 148);  // two embeddings, 12 a layer, the last norm's two
        CHECK(contains(read_file(file.path), "{\"__metadata__\":{\"format\":\"pt\"},"));
        CHECK(tensor_of(file, "transformer.h.11.mlp.c_proj.weight") != nullptr);
        for (const char* name : {"m/config.json", "m/generation_config.json"})
            for (const char* key : {"bos_token_id", "eos_token_id"})
                CHECK(read_json(scratch / name).get_int(key, "", 0) == V - 1);
        const Json about = read_json(scratch / "m/tokenizer_config.json");
        CHECK(about.get_int("model_max_length", "", 0) == 16);
        CHECK(about.get_string("eos_token", "") == "<|endoftext|>");
        CHECK(read_json(scratch / "m/vocab.json").get_int("<|endoftext|>", "", 0) == V - 1);
        CHECK(Tokenizer::load(scratch / "m") == *tokenizer);
    }
}

// =================================================================================================
// §15 Checkpoints
// =================================================================================================
// A checkpoint is there whole or not at all, and no flipped bit is loaded.

TEST_CASE("checkpoints: the checksum of a file sees every change, on any number of threads") {
    TemporaryFolder scratch;
    std::set<std::string> seen;
    size_t tried = 0;
    auto sum_of = [&](const std::string& bytes) {
        put_file(scratch / "f", bytes);
        tried++;
        return *seen.insert(file_checksum(scratch / "f")).first;
    };
    // Lengths around the chunks', zeros and not; a bit here and there; chunks that change places.
    for (size_t length = 2; length < 100; ++length) sum_of(std::string(length, '\0'));
    for (size_t length :
         {size_t(0), size_t(1), size_t(177), kChunk - 1, kChunk, kChunk + 1, 7 * kChunk + 3}) {
        std::string bytes(length, '\0');
        sum_of(bytes);
        for (size_t i = 0; i < length; i++) bytes[i] = char(random_bits(3, i));
        if (length == 0) continue;
        {
            const Threads three(3);
            const std::string sum = sum_of(bytes);
            const Threads one(1);
            CHECK(file_checksum(scratch / "f") == sum);
        }
        const size_t step =
            length == 177 ? 1 : 4 * length - 1;  // all; or the first, middle and last
        for (size_t bit = 0; bit < 8 * length; bit += step) {
            std::string changed = bytes;
            changed[bit / 8] = char(changed[bit / 8] ^ (1 << bit % 8));
            sum_of(changed);
        }
        if (length < 2 * kChunk) continue;
        std::swap_ranges(bytes.begin(), bytes.begin() + kChunk, bytes.begin() + 3 * kChunk);
        sum_of(bytes);
    }
    CHECK(seen.size() == tried);
    CHECK(error_of([&] { file_checksum(scratch / "none"); }) ==
          "cannot read " + (scratch / "none") + ": No such file or directory");
}

TEST_CASE("checkpoints: a single flipped bit anywhere in a checkpoint is never loaded silently") {
    TestRuns place;
    good(place.train("out", "--max-steps 5 --patience 0"));
    const std::string checkpoint = place.out() + "/checkpoint-5";
    const std::vector<std::string> files = list_folder(checkpoint);
    CHECK(files.size() == 9);
    CHECK(verify_checkpoint(checkpoint).step == 5);
    // Forty bits of every file, some of them the first and the last.
    for (const std::string& name : files) {
        const std::string path = checkpoint + "/" + name, good = read_file(path);
        const size_t bits = 8 * good.size();
        for (uint64_t i = 0; i < 40; i++) {
            const size_t bit = i == 0 ? 0 : i == 1 ? bits - 1 : random_bits(9, i) % bits;
            std::string bad = good;
            bad[bit / 8] = char(bad[bit / 8] ^ (1 << bit % 8));
            put_file(path, bad);
            CHECK(error_of([&] { verify_checkpoint(checkpoint); }) != "");
            const bool moments = contains(name, "optimizer");  // not read in use
            CHECK((error_of([&] { config_of_folder(checkpoint); }) == "") == moments);
        }
        put_file(path, good);
    }
    CHECK(verify_checkpoint(checkpoint).step == 5);
    place.train("out", {"--resume", place.out() + "/best"}).check_fails(1, {"has no moments"});
    // Weights that were changed on purpose, and the way to use them that the message names.
    const std::string weights = read_file(checkpoint + "/model.safetensors");
    put_file(checkpoint + "/model.safetensors",
             weights.substr(0, weights.size() - 4) + std::string(4, '\0'));
    CHECK(contains(error_of([&] { config_of_folder(checkpoint); }),
                   "if it was changed on purpose, remove trainer_state.json"));
    CHECK(!contains(error_of([&] { verify_checkpoint(checkpoint); }), "on purpose"));
    remove_file(checkpoint + "/trainer_state.json");
    CHECK(config_of_folder(checkpoint).n_embd == 8);
    // Hugging Face's trainer writes a file of that name, of any length, without checksums.
    put_file(checkpoint + "/trainer_state.json",
             "{\"epoch\": 1.0, \"log_history\": [" + std::string(20'000'000, ' ') + "]}");
    CHECK(config_of_folder(checkpoint).n_embd == 8);
}

TEST_CASE("checkpoints: whichever call of a save fails, the last good one stays, and all goes on") {
    TestRuns place;
    const auto model = small_model();
    const Tokenizer tokenizer = Tokenizer::bytes();
    TrainerState state;
    auto save = [&](const std::string& name, int64_t step) {
        model->initialise(uint64_t(step));
        state.step = step;
        save_checkpoint(*model, place.out(name), &tokenizer, state, Purpose::resume);
    };
    auto step_in = [&](const std::string& name) { return verify_checkpoint(place.out(name)).step; };
    // Errno -1: a write comes up short, which is no failure.
    struct Case {
        std::string target;
        int code;
        std::set<std::string> calls;
    };
    const std::set<std::string> of_a_file = {"mkdir", "open", "write", "fsync", "rename"};
    std::set<std::string> replaced = of_a_file;
    replaced.insert({"unlink", "rmdir"});
    const std::vector<Case> cases = {{"checkpoint-2", EIO, of_a_file},
                                     {"checkpoint-2", ENOSPC, of_a_file},
                                     {"checkpoint-2", -1, {"write"}},
                                     {"best", ENOSPC, replaced}};
    for (const Case& c : cases) {
        std::set<std::string> failed_calls;
        EachCall each{c.code, c.code < 0 ? "write" : ""};
        do {
            std::filesystem::remove_all(place.out("checkpoint-2"));
            save("checkpoint-1", 1), save("best", 1);
            const std::string message = each.run([&] { save(c.target, 2); });
            failed_calls.insert(each.failed);
            CAPTURE(message);
            CHECK((message == "") == (each.failed.empty() || c.code < 0));
            CHECK(step_in("checkpoint-1") == 1);
            recover_folders(place.path);
            if (folder_exists(place.out("checkpoint-2"))) CHECK(step_in("checkpoint-2") == 2);
            CHECK((step_in("best") == 1 || (c.target == "best" && step_in("best") == 2)));
            for (const std::string& name : list_folder(place.path))
                CHECK((name == "data" || name == "best" || step_of_name(name) > 0));
            save(c.target, 3);  // and the next save is as good as any
            CHECK(step_in(c.target) == 3);
        } while (!each.failed.empty());
        failed_calls.erase("");
        CHECK(failed_calls == c.calls);
    }
}

TEST_CASE(
    "checkpoints: a save syncs files, names, its folder, the rename, the folder above, in order") {
    TemporaryFolder place;
    const auto model = small_model();
    const Tokenizer tokenizer = Tokenizer::bytes();
    for (bool replaces : {false, true}) {
        std::vector<std::pair<std::string, std::string>> calls;
        file_fault() = [&](const char* call, const std::string& path) {
            calls.emplace_back(call, path);
            return 0;
        };
        const std::string folder = place / "checkpoint-1", temporary = folder + ".tmp";
        save_checkpoint(*model, folder, &tokenizer, {}, Purpose::resume);
        file_fault() = nullptr;
        auto last = [&](const std::string& call, const std::string& path) {
            const auto found = std::find(calls.rbegin(), calls.rend(), std::pair(call, path));
            return int(calls.rend() - found) - 1;
        };
        const int named = last("rename", folder);
        CHECK(named > 0);
        const std::vector<std::string> files = list_folder(folder);
        CHECK(files.size() == 9);
        for (const std::string& name : files) {
            const std::string path = temporary + "/" + name,
                              part = path + format(".tmp-%d", ::getpid());
            CHECK(last("write", part) >= 0);
            CHECK(last("write", part) < last("fsync", part));
            CHECK(last("fsync", part) < last("rename", path));
            CHECK(last("rename", path) < last("fsync", temporary));
        }
        CHECK(last("rename", temporary + "/trainer_state.json") < named);
        CHECK(last("fsync", temporary) < named);
        CHECK(named < last("fsync", place.path));
        if (replaces) CHECK(last("fsync", place.path) < last("rmdir", folder + ".old"));
    }
}

// =================================================================================================
// §16 Log and terminal
// =================================================================================================
// log.csv and its JSON; lines that fit.

TEST_CASE("log: log.csv is read as it was written; half a row, and one too late, is left out") {
    TemporaryFolder scratch;
    std::vector<LogRow> rows(4);
    for (size_t i = 0; i < rows.size(); ++i) {
        for (const LogColumn& column : kLogColumns)
            if (random_bits(i, size_t(&column - kLogColumns)) % 3)
                rows[i].*column.value = random_normal(7, 13 * i + size_t(&column - kLogColumns));
        rows[i].step = double(i);
    }
    rows[1] = {};
    rows[1].step = 1, rows[1].train_loss = 0.5, rows[1].lr = INFINITY, rows[1].grad_norm = -NAN;
    const std::string text = log_text(rows);
    CHECK(
        text.starts_with("step,epoch,tokens,train_loss,eval_train_loss,val_loss,perplexity,floor,"
                         "lr,grad_norm,tokens_per_s,mfu,seconds\n"));
    CHECK(log_line(rows[1]) == "1,,,0.5,,,,,inf,nan,,,\n");
    // Lines that are no row: a step again, too many fields, no number, too few, no line end.
    const std::string bad = "3,,,,,,,,,,,,\n4,,,,,,,,,,,,,\n4,,,x,,,,,,,,,\n4,,,\n4,,,,,,,,,,,,";
    put_file(scratch / "log.csv", text + bad);
    CHECK(log_text(read_log(scratch / "log.csv", 9)) == text);
    CHECK(read_log(scratch / "log.csv", 2).size() == 3);
    CHECK(read_log(scratch / "none.csv", 2).empty());
}

TEST_CASE("log: --log-json has a line for every row, also of a resumed run") {
    Runs place;
    const std::string json = place.out("run.json"), option = "--log-json " + json;
    place.stop("out", 7, SIGTERM, option);
    place.resume("out", option);
    const std::vector<LogRow> rows = place.log();
    const std::vector<std::string> lines = split_at(read_file(json), '\n');
    REQUIRE(lines.size() == rows.size() + 1);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json line = Json::parse(lines[i], json);
        for (const LogColumn& column : kLogColumns) {
            const auto& value = rows[i].*column.value;
            CHECK(bool(line.find(column.name)) == value.has_value());
            if (value) CHECK(line.find(column.name)->as<double>() == *value);
        }
    }
    LogRow row;
    row.step = 1, row.train_loss = NAN, row.lr = 0;
    CHECK(json_line(row) == "{\"step\": 1, \"train_loss\": null, \"lr\": 0}\n");
    place.train("more", option).check_fails(1, {"exists already"});
    CHECK(place.train("more", "--log-json " + place.out("none/x")).says("there is no folder"));
    good(place.train("more", option + " --overwrite"));
    CHECK(file_exists(json + ".set-aside"));
}

TEST_CASE("terminal: words are wrapped, not cut, whatever the parts they come in") {
    const std::string text =
        "one two three\n\nfour five \xc3\xa4\xc3\xb6\xc3\xbc six sevenandeight nine";
    const std::string expected =
        "one two\n  three\n\n  four\n  five \xc3\xa4\xc3\xb6\xc3\xbc\n  six\n"
        "  sevenandeight\n  nine";
    for (size_t part : {size_t(1), size_t(3), text.size()}) {
        WordWrap wrap{10, 2, 2};
        std::string out;
        for (size_t at = 0; at < text.size(); at += part) out += wrap.add(text.substr(at, part));
        CHECK(out + wrap.end() == expected);
    }
    CHECK(wrapped("as it is,  with  blanks") == "as it is,  with  blanks");
}

TEST_CASE("terminal: no line is wider than the terminal") {
    TestRuns place;
    for (unsigned short columns : {40, 80, 300, 0}) {
        // In colour, unless the user has said NO_COLOR.
        ::setenv("TERM", "xterm", 1), ::setenv("NO_COLOR", columns == 300 ? "1" : "", 1);
        const auto outcome = outcome_on_terminal(columns, [&] {
            return train_gpt_status(place.arguments(format("out%d", columns), "--max-steps 5"),
                                    run_on_cpu);
        });
        if (!outcome) return;
        CHECK_MESSAGE(outcome->status == 0, outcome->err);
        std::string shown = outcome->out;
        CHECK(contains(shown, "\033[36mdata      \033[0m ") == (columns != 300));
        for (size_t at; (at = shown.find("\033[36m")) != shown.npos;) {
            shown.erase(at, 5);
            shown.erase(shown.find("\033[0m", at), 4);
        }
        size_t live = 0, widest = 0;  // of steps 1 and 3: the others are evaluated, and stay
        for (std::string line : split_at(shown, '\n')) {
            while (line.ends_with('\r')) line.pop_back();
            for (std::string part : split_at(line, '\r')) {
                if (part.starts_with("\033[K")) part.erase(0, 3);
                const size_t width = WordWrap::characters(part);
                if (contains(part, "./train_gpt ") || contains(part, place.path)) continue;
                const bool text = std::all_of(part.begin(), part.end(),
                                              [](char c) { return c >= ' ' && c <= '~'; });
                CHECK_MESSAGE((columns != 80 || width <= 80 || !text), part);
                if (!part.starts_with("step ") || contains(part, " val ")) continue;
                ++live, widest = std::max(widest, width);
                CHECK((columns != 40 || part.size() < 40));
            }
        }
        CHECK(live == 2);
        CHECK((columns == 40 ? widest > 30 : widest > 60));
    }
}

// =================================================================================================
// §17 The training loop
// =================================================================================================
// Small runs, whole: what they write, how they end, go on, and meet what is in the way.

// --- What a run does and writes

// A run with everything on, made once for the next three cases, and what its log says of the rest.
struct WholeRun : TestRuns {
    static constexpr int64_t kBlocks = 88 + 17 + 0 + 1 + 42, kRows = 12;  // of an epoch, of a step
    Outcome outcome;
    std::vector<LogRow> rows;
    int64_t end = 0, resets = 0;       // resets: a better evaluation after one that was not
    std::vector<TrainerState> states;  // after each step
    std::vector<std::string> titles;   // of the samples

    WholeRun() {
        put_file(data() + "/dataset.json", "{\"floor\": 1.25}");
        outcome =
            train("out",
                  "--grad-accum-steps 4 --max-steps 60 --save-interval 1 --keep 100 --patience 4 "
                  "--eval-interval 3 --eval-batches 4 --sample-interval 7 --log-interval 4 "
                  "--learning-rate 0.3 --weight-decay 0.2 --beta1 0.8 --beta2 0.97 --eps 1e-6 "
                  "--grad-clip 0.7 --skip-outliers 9 --seed 5 --prompt the");
        REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
        rows = log(), end = last_step(out());
        REQUIRE(int64_t(rows.size()) == end + 1);
        TrainerState state;
        for (const LogRow& row : rows) {
            add(row, state);
            states.push_back(state);
        }
        CHECK(resets > 0);
    }
    bool evaluated(int64_t s) const { return s % 3 == 0 || s == end; }
    std::string checkpoint(int64_t s) const { return checkpoint_folder(out(), s); }

    // What follows from one more row.
    void add(const LogRow& row, TrainerState& state) {
        const auto s = int64_t(*row.step);
        state.step = s, state.samples = kRows * s, state.guards.updates = s;
        state.planned_steps = 60, state.finished = s == end;
        if (row.val_loss) {  // the loss before training counts, too
            state.val_loss = *row.val_loss;
            const bool better = *row.val_loss < state.best_loss;
            resets += better && state.stale_evals > 0;
            state.stale_evals = better ? 0 : state.stale_evals + 1;
            if (better) state.best_loss = *row.val_loss, state.best_step = s;
        }
        if (s == 0) return;
        state.train_loss = *row.train_loss;
        state.epoch_loss += *row.train_loss, ++state.epoch_steps;
        const int64_t epoch = kRows * s / kBlocks;
        if (epoch > kRows * (s - 1) / kBlocks) {
            titles.push_back(format("epoch %ld ends at step %ld: mean train loss %.4f", epoch, s,
                                    state.epoch_loss / double(state.epoch_steps)));
            state.epoch_loss = 0, state.epoch_steps = 0;
        } else if (s % 7 == 0) {
            titles.push_back(format("sample at step %ld", s));
        }
    }
};
const WholeRun& whole_run() {
    static const WholeRun run;
    return run;
}

TEST_CASE("run: a row of the log is what was measured, and when it was due") {
    const WholeRun& run = whole_run();
    const Shards train(run.data() + "/train_*.bin"), val(run.data() + "/val_*.bin");
    const std::vector<Window> val_windows = evaluation_windows(val, 8, 256);
    const DataOrder fixed{train, 3, 8, 0, true};
    for (int64_t s = 0; s <= run.end; ++s) {
        CAPTURE(s);
        const LogRow& row = run.rows[size_t(s)];
        const bool evaluated = run.evaluated(s);
        CHECK(*row.step == double(s));
        CHECK(*row.tokens == double(s * 12 * 8));
        CHECK(near(*row.epoch, double(12 * s) / run.kBlocks, 1e-5));
        CHECK(row.train_loss.has_value() == (s > 0));
        CHECK(row.grad_norm.has_value() == (s > 0));
        CHECK(row.val_loss.has_value() == evaluated);
        CHECK(row.eval_train_loss.has_value() == evaluated);
        CHECK(row.floor == (evaluated ? std::optional(1.25) : std::nullopt));
        if (evaluated) CHECK(near(*row.perplexity, std::exp(*row.val_loss), 1e-7));
        if (s == 0) continue;
        CHECK(near(*row.lr, learning_rate({Schedule::cosine, 0.3, 0.5, 16, 60}, s - 1), 1e-8));
        // Tokens a second are of this step.
        const double seconds = verify_checkpoint(run.checkpoint(s)).seconds;
        const double before = s > 1 ? verify_checkpoint(run.checkpoint(s - 1)).seconds : 0;
        CHECK(std::abs(*row.seconds - seconds) < 0.001);
        CHECK(std::abs(*row.tokens_per_s - 12 * 8 / (seconds - before)) < 0.051);  // one decimal
        // The evaluation, by the weights that were saved.
        if (s != 6 && s != run.end) continue;
        const auto model = loaded(run.checkpoint(s), 3, 8);
        CHECK(near(*row.val_loss, evaluate(*model, val_windows, {}).loss(), 1e-8));
        double total = 0, scored = 0;
        for (int64_t i = 0; i < 4; ++i) {
            const Batch batch = fixed.batch(3 * i, 257);
            for (float loss : batch_losses(*model, batch)) total += double(loss);
            scored += double(batch.scored);
        }
        CHECK(near(*row.eval_train_loss, total / scored, 1e-8));
    }
}

TEST_CASE("run: a step is train_step on the text that is next, with the options of the run") {
    const WholeRun& run = whole_run();
    const Shards train(run.data() + "/train_*.bin");
    const DataOrder order{train, 3, 8, 5, true};
    const StepOptions options = {5,
                                 {Schedule::cosine, 0.3, 0.5, 16, 60},
                                 {0.8, 0.97, 1e-6, 0.2},
                                 {0.7, 9}};
    for (int64_t s : {1, 9, 14}) {  // made again from the checkpoint before; 14: in a new epoch
        Config config = config_of_folder(run.checkpoint(s));
        config.dropout = 0.1f;
        Gpt2<Cpu> model(config);
        model.reserve(3, 8, Use::training);
        model.initialise(5);
        if (s > 1) {
            load_weights(model, run.checkpoint(s - 1)), load_moments(model, run.checkpoint(s - 1));
            *model.state = verify_checkpoint(run.checkpoint(s - 1)).guards;
        }
        std::vector<Batch> batches;
        for (int64_t i = 0; i < 4; ++i) batches.push_back(order.batch(12 * (s - 1) + 3 * i, 257));
        train_step(model, batches, options, s - 1);
        const LogRow& row = run.rows[size_t(s)];
        CHECK(near(*row.train_loss, model.state->loss, 1e-8));
        CHECK(near(*row.grad_norm, model.state->grad_norm, 1e-8));
        CHECK(near(*row.lr, model.state->lr, 1e-8));
        CHECK(model.get_weights() == loaded(run.checkpoint(s), 3, 8)->get_weights());
    }
}

TEST_CASE("run: every checkpoint knows what the log says, and best/ is the best of them") {
    const WholeRun& run = whole_run();
    for (int64_t s = 1; s <= run.end; ++s) {
        CAPTURE(s);
        const TrainerState state = verify_checkpoint(run.checkpoint(s));
        const TrainerState& expected = run.states[size_t(s)];
        for (auto count :
             {&TrainerState::planned_steps, &TrainerState::step, &TrainerState::samples,
              &TrainerState::best_step, &TrainerState::stale_evals, &TrainerState::epoch_steps})
            CHECK(state.*count == expected.*count);
        for (auto loss : {&TrainerState::epoch_loss, &TrainerState::train_loss,
                          &TrainerState::val_loss, &TrainerState::best_loss})
            CHECK(
                near(state.*loss, expected.*loss, loss == &TrainerState::epoch_loss ? 1e-7 : 1e-8));
        CHECK(state.guards.updates == expected.guards.updates);
        CHECK(state.finished == expected.finished);
        CHECK((state.stale_evals >= 4) == (s == run.end));  // --patience
    }
    CHECK(read_file(run.out() + "/best/model.safetensors") ==
          read_file(run.checkpoint(run.states.back().best_step) + "/model.safetensors"));
}

TEST_CASE("run: the terminal and samples.txt have what is due, and a sample can be made again") {
    const WholeRun& run = whole_run();
    const std::string& said = run.outcome.out;
    CHECK(contains(said, "\nrun        60 steps of 96 tokens (4.86 epochs) into "));
    CHECK(contains(said, format("stopped early: no progress (--patience): %ld steps", run.end)));
    std::vector<std::string> lines, expected, titles = run.titles, found;
    for (const std::string& line : split_at(said, '\n'))
        if (line.starts_with("step ")) lines.push_back(line.substr(0, line.find('|') + 2));
    for (int64_t s = 0; s <= run.end; ++s)
        if (run.evaluated(s) || s % 4 == 0) expected.push_back(format("step %ld/60 | ", s));
    CHECK(lines == expected);
    for (const std::string& line : split_at(read_file(run.out() + "/samples.txt"), '\n'))
        if (line.starts_with("=== ")) found.push_back(line.substr(4));
    CHECK(titles.size() > 4);
    titles.push_back("the model writes:");
    CHECK(found == titles);
    // The last sample, by the weights that were saved: from the prompt, with the run's seed.
    const auto model = loaded(run.checkpoint(run.end), 1, 8);
    std::string bytes = "the";
    generate(*model, {256, 't', 'h', 'e'}, {.max_new_tokens = 100, .seed = 5, .end_of_text = 256},
             [&](int token) { return bytes += Tokenizer::bytes().bytes_of(token), true; });
    const std::string sample = "the model writes:\n" + take_characters(bytes, true) + "\n";
    CHECK(read_file(run.out() + "/samples.txt").ends_with("=== " + sample + "\n"));
    CHECK(contains(said, "\n" + sample));
}

TEST_CASE("run: the number of steps is that of --max-steps or --epochs, whichever is fewer") {
    const TestRuns place({801});  // 100 blocks
    // 0.07 * 100 is a little more than 7, in floating point.
    const std::pair<std::string, int64_t> cases[] =
        {{"--epochs 0.07 --batch-size 7", 1},
         {"--epochs 0.08 --batch-size 7", 2},
         {"--epochs 0.0001", 1},
         {"--epochs 0.5 --batch-size 5 --grad-accum-steps 2", 5},
         {"--epochs 0.5 --max-steps 3", 3},
         {"--epochs 0.1 --max-steps 3 --batch-size 5", 2},
         {"--epochs 2 --batch-size 90", 3}};
    for (const auto& c : cases) {
        CAPTURE(c.first);
        std::filesystem::remove_all(place.out());
        good(place.train("out", "--grad-accum-steps 1 --patience 0 " + c.first));
        REQUIRE(last_step(place.out()) == c.second);
        CHECK(place.state().planned_steps == c.second);
    }
}

TEST_CASE("run: the end of an epoch is told if it has ten steps or more") {
    const TestRuns place({801});  // 100 blocks
    for (int batch : {10, 11}) {
        CAPTURE(batch);
        std::filesystem::remove_all(place.out());
        const auto outcome = good(
            place.train("out", format("--epochs 1 --grad-accum-steps 1 --batch-size %d", batch)));
        CHECK(contains(outcome.out, "epoch 1 ends at step 10: mean") == (batch == 10));
    }
}

// Keeps the reports of the time left.
struct TimeLeft : Observer<Hooked> {
    std::vector<double> said;
    void step(const LogRow&, int64_t, double seconds, bool) override { said.push_back(seconds); }
};
TEST_CASE("run: MFU is the model's operations a second over the machine's peak; the time left") {
    const TestRuns place;
    const Corpus corpus(place.data() + "/train_*.bin");
    const StoppedClock clock;
    Hooked device;
    device.on_update = [] { StoppedClock::move(10'000'000); };
    Gpt2<Hooked> model({1, 2, 8, 8, 257}, device);
    model.reserve(2, 8, Use::training);
    model.initialise(1);
    for (double limit : {0.0, 0.035}) {  // --max-minutes, in seconds
        RunOptions o;
        o.output = place.out(to_text("out", limit)), o.max_minutes = limit / 60;
        o.batch_size = 2, o.max_steps = 4, o.eval_interval = 0;
        make_folders(o.output);
        TimeLeft left;
        Trainer<Hooked> trainer(o, corpus, model, 1e7, left);
        outcome_of([&] { return int(trainer.run({})); });
        const std::vector<LogRow> rows = place.log(to_text("out", limit));
        REQUIRE(rows.size() == 5);
        REQUIRE(left.said.size() >= 4);
        for (int step = 1; step <= 4; ++step) {
            const double expected = std::max(0.0, (limit > 0 ? limit : 0.04) - 0.01 * step);
            CHECK(std::abs(left.said.end()[step - 5] - expected) < 1e-6);
        }
        CHECK(near(*rows[2].tokens_per_s, 2 * 8 / 0.01, 1e-4));
        CHECK(near(*rows[2].mfu, 1600 * flops_per_token(model.config, 8) / 1e7, 1e-3));
        CHECK(!rows[2].val_loss);
        CHECK(!rows[0].eval_train_loss);
    }
    // By counting: a product and a sum for each weight of a matrix, and twice for each pair of a
    // query and a key; the backward pass has twice as many.
    double pairs = 0;
    for (int t = 0; t < 8; ++t) pairs += t + 1;
    const double forward = 2 * (12 * 8 * 8 + 257 * 8) * 8 + 4 * 8 * pairs;
    CHECK(flops_per_token(model.config, 8) == doctest::Approx(3 * forward / 8));
}

TEST_CASE("run: the norms of every tensor are those of its weights, gradients and updates") {
    TestRuns place;
    const Outcome run = good(place.train("out",
                                         "--tensor-stats-interval 2 --save-interval 1 "
                                         "--keep 9 --max-steps 3 --warmup-steps 0"));
    CHECK(!contains(run.out, "\nstep 1   "));
    CHECK(!contains(run.out, "\nstep 3   "));
    const std::string table = run.out.substr(run.out.find("\nstep 2   "));
    // Gradients from AdamW's first moments, m2 = 0.9 m1 + 0.1 g, with g clipped to a norm of 1.
    const double norm = *place.log()[2].grad_norm;
    auto values_of = [&](int64_t step, bool moments, const TensorInfo& t) {
        const SafetensorsFile file(checkpoint_folder(place.out(), step) +
                                   (moments ? "/optimizer.safetensors" : "/model.safetensors"));
        std::vector<double> values(t.count);
        file.read(*tensor_of(file, (moments ? "m." : "") + name_in_checkpoint(t.name)),
                  values.data());
        return values;
    };
    for (const TensorInfo& t : layout_of(config_of_folder(place.out() + "/checkpoint-2")).tensors) {
        CAPTURE(t.name);
        const auto before = values_of(1, false, t), after = values_of(2, false, t);
        const auto m1 = values_of(1, true, t), m2 = values_of(2, true, t);
        double weight = 0, gradient = 0, update = 0;
        for (size_t i = 0; i < t.count; ++i) {
            weight += after[i] * after[i];
            gradient += std::pow((m2[i] - 0.9 * m1[i]) / 0.1 * std::max(1.0, norm), 2);
            update += std::pow(after[i] - before[i], 2);
        }
        double said[4] = {};
        const size_t at = table.find("\n" + t.name + " ");
        REQUIRE(at != table.npos);
        std::sscanf(table.c_str() + at + 1 + t.name.size(), "%lf %lf %lf %lf", &said[0], &said[1],
                    &said[2], &said[3]);
        CHECK(near(said[0], std::sqrt(weight), 1e-4));
        CHECK(near(said[1], std::sqrt(gradient), 1e-3));
        CHECK(near(said[2], std::sqrt(update), 1e-4));
        CHECK(near(said[3], std::sqrt(update / weight), 1e-2));
    }
}

TEST_CASE("run: the loss before training counts for best/, --patience and the verdict") {
    TestRuns place;
    good(place.train("good", "--patience 0"));
    const std::string weights = place.out("good/best"),
                      from = " --patience 3 --init-from " + weights;
    const Outcome worse = good(place.train("worse", "--warmup-steps 0 --learning-rate 2" + from));
    CHECK(last_step(place.out("worse")) == 6);
    CHECK(read_file(place.out("worse/best/model.safetensors")) ==
          read_file(weights + "/model.safetensors"));
    CHECK_MESSAGE(contains(worse.out, "% above that before training"), worse.out);
    CHECK_MESSAGE(contains(worse.out, " at step 0"), worse.out);
    // A loss that stays the same is no new best one.
    good(place.train("still", "--learning-rate 0" + from));
    CHECK(last_step(place.out("still")) == 6);
    CHECK(place.state("still").best_step == 0);
}

TEST_CASE("run: a NaN stops the run, keeping nothing of it, or is skipped and stays in the log") {
    TestRuns place;
    // Weights so large that the logits overflow.
    const auto model = small_model();
    for (size_t i = 0; i < model->layout.decayed; i++)
        model->weights[i] = model->weights[i] < 0 ? -3e38f : 3e38f;
    const std::string weights = place.out("weights");
    save_checkpoint(*model, weights, nullptr, {}, Purpose::use);
    auto with = [&](const std::string& name, const std::string& on_nan) {
        return train_gpt(place.line(
            name, "--batch-size 2 --max-steps 9 --save-interval 2 --eval-interval 0 --init-from " +
                      weights + " --on-nan " + on_nan));
    };
    const Outcome stopped = with("stop", "stop");
    CHECK(stopped.status == 1);
    CHECK(stopped.lines() == 1);
    CHECK(stopped.says("step 1: the loss is"));
    CHECK(checkpoint_steps(place.out("stop")).empty());
    CHECK(place.log("stop").size() == 2);
    const Outcome skipped = good(with("skip", "skip"));
    for (int step = 1; step <= 9; ++step)  // after four, only every power of two is told
        CHECK(skipped.says(format("step %d was skipped: ", step)) == (step <= 4 || step == 8));
    const std::vector<LogRow> rows = place.log("skip");
    REQUIRE(rows.size() == 10);
    CHECK(*rows[3].lr == 0);  // the update was not made
    CHECK(!std::isfinite(*rows[3].train_loss));
    const TrainerState state = place.state("skip");
    CHECK(state.guards.skipped == 9);
    CHECK(state.epoch_steps == 0);
    CHECK(read_file(place.out("skip") + "/checkpoint-9/model.safetensors") ==
          read_file(weights + "/model.safetensors"));
    // A hundred in a row end it, counted across a stop.
    at_step(60, [] { ::raise(SIGTERM); });
    CHECK(with("long", "skip --max-steps 200 --sample-interval 0").status == 130);
    with("long", "skip --max-steps 200 --sample-interval 0 --resume auto")
        .check_fails(1, {"step 100: the loss is", "like 99 steps before it"}, 99);
}

TEST_CASE("run: an outlier is skipped where that is asked for, and stays in the log") {
    TestRuns place;
    // Steps of 16 tokens in their order; those of step 140 are unlike all others.
    std::vector<uint16_t> tokens(16 * 150 + 1);
    for (size_t i = 0; i < tokens.size(); i++)
        tokens[i] = uint16_t(i / 16 == 139 ? random_bits(3, i) % 256 : "the cat sat "[i % 12]);
    put_shard(place.path + "/shard.bin", tokens);
    const Outcome outcome = good(train_gpt(
        "--vocab-size 257 --n-layer 1 --n-embd 8 --n-head 2 --seq-len 8 --warmup-steps 50 "
        "--batch-size 2 --shuffle 0 --max-steps 150 --eval-interval 0 --skip-outliers 6 "
        "--learning-rate 0.01 --sample-interval 0 --train-shards " +
        place.path + "/shard.bin --output " + place.out()));
    CHECK(outcome.says("step 140 was skipped"));
    CHECK(place.state().guards.outliers == 1);
    const std::vector<LogRow> rows = place.log();
    REQUIRE(rows.size() == 151);
    CHECK(*rows[140].lr == 0);
    CHECK(*rows[140].train_loss > *rows[139].train_loss);
    CHECK(*rows[141].lr > 0);
}

// --- Time

TEST_CASE("run: a run whose time is up is evaluated, and says how much time it had left") {
    TestRuns place;
    const Arguments options =
        "--patience 0 --eval-interval 1000000 --save-interval 0 --max-minutes 0.002";
    const Outcome up = good(place.train("out", options + "--max-steps 1000000000000"));
    CHECK(contains(up.out, "time is up (--max-minutes)"));
    CHECK_MESSAGE(!contains(up.out, "best inf"), up.out);
    CHECK(folder_exists(place.out() + "/best"));
    CHECK(std::isfinite(*place.log().back().val_loss));
    for (const std::string& line : split_at(up.out, '\n'))
        if (line.ends_with(" left")) CHECK_MESSAGE(line.ends_with("| 0s left"), line);
    // Without any other limit, as many steps are planned as seem to fit.
    good(train_gpt(options + place.line("fits", "--seq-len 8")));
    CHECK(place.state("fits").planned_steps >= last_step(place.out("fits")));
}

TEST_CASE("run: with --max-minutes alone, the plan follows the clock, and so does a resumed run") {
    TestRuns place;
    // Updates take 20 to 140 ms on a clock that only they move; 3 seconds are to be used.
    int made = 0;
    Hooked device;
    device.on_update = [&] { StoppedClock::move(20'123'457 * (1 + ++made / 4 % 7)); };
    auto arguments = [&](const std::string& name, const std::string& more = "--log-interval 0") {
        return place.line(
            name,
            "--n-layer 1 --n-embd 8 --n-head 2 --n-positions 8 --batch-size 2 --max-minutes 0.05 "
            "--warmup-steps 4 --min-lr-fraction 0 --learning-rate 0.1 --eval-interval 8 "
            "--threads 1 " +
                more);
    };
    const StoppedClock clock;
    const Outcome straight = good(train_on(device, arguments("straight")));
    CHECK_MESSAGE(contains(straight.out, "\nrun        0.05 min, in steps of 16 tokens into "),
                  straight.out);
    CHECK(contains(straight.out, "\nstep 0 | val "));
    const int64_t end = last_step(place.out("straight"));
    const std::vector<LogRow> rows = place.log("straight");
    CHECK(std::abs(*rows.back().seconds - 3) < 0.14);
    CHECK(*rows.back().lr < 0.01);  // the schedule has come to its end
    CHECK(*rows[size_t(end / 2)].lr > 0.02);
    for (int step : {1, 7, int(end) - 2}) {
        CAPTURE(step);
        const std::string name = to_text("out", step);
        made = 0;
        at_step(step, [] { ::raise(SIGTERM); });
        CHECK(train_on(device, arguments(name)).status == 130);
        CHECK(train_on(device, arguments(name, "--resume auto")).status == 0);
        check_same_end(place.out("straight"), place.out(name));
    }
    // A clock that stands still divides nothing by zero.
    device.on_update = [] {};
    at_step(5, [] { ::raise(SIGTERM); });
    CHECK(train_on(device, arguments("still")).status == 130);
    CHECK(!place.log("still")[3].tokens_per_s);
}

// --- Stopped and resumed

TEST_CASE("run: resumed at every step, it is the same run to the bit, on 1, 2 and 3 threads") {
    for (const auto& run : {std::pair{"fp32", 1}, {"fp32", 2}, {"fp32", 3}, {"bf16", 3}}) {
        const char* precision = run.first;  // clang 14 cannot capture a structured binding
        const int threads = run.second;
        Runs place(to_text("--save-interval 1 --keep 100 --precision ", precision));
        for (int64_t step = 1; step < place.end(); step += threads == 1 ? 1 : 4) {
            CAPTURE(precision);
            CAPTURE(threads);
            CAPTURE(step);
            const std::string output = place.out("resumed");
            make_folders(output);
            copy(checkpoint_folder(place.out("straight"), step), checkpoint_folder(output, step));
            // The log of a run that was killed later: more rows than the checkpoint, half a line.
            put_file(output + "/log.csv",
                     read_file(place.out("straight") + "/log.csv") + "31,0.2,12");
            const Outcome resumed =
                place.resume("resumed", to_text("--save-interval 0 --threads ", threads,
                                                " --precision ", precision));
            CHECK((resumed.err == "" || resumed.says(" threads share ")));  // on fewer cores
            std::filesystem::remove_all(output);
        }
    }
}

TEST_CASE("run: an interrupt finishes the step, saves and exits 130; the rest is the same run") {
    Runs place;
    for (int signal : {SIGINT, SIGTERM, SIGHUP})
        for (int step : {1, 5, 13}) {
            const std::string name = to_text("run", signal, "-", step);
            place.stop(name, step, signal);
            place.resume(name);
        }
    // The second request ends the process at once; two within 50 ms are one. On a clock that only
    // this test moves: a process may be held up for longer than that between two signals.
    auto send = [](int signal) {
        // That sanitizer never delivers one to the child of a process with threads.
        thread_sanitizer ? on_stop_signal(signal) : void(::raise(signal));
    };
    auto exit_status = [send](std::initializer_list<int64_t> pauses) {
        return child_status([=] {
            steady_clock_shows = 1;
            send(SIGINT);
            for (int64_t pause : pauses) steady_clock_shows += pause, send(SIGTERM);
        });
    };
    CHECK(exit_status({}) == 7);
    CHECK(exit_status({0}) == 7);
    CHECK(exit_status({50'000'000}) == 7);
    CHECK(exit_status({50'000'001}) == 130);
    CHECK(exit_status({20'000'000, 20'000'000}) == 7);
    CHECK(exit_status({20'000'000, 40'000'000}) == 130);
    // Under nohup a closed terminal is ignored.
    ::signal(SIGHUP, SIG_IGN);
    CHECK(child_status([] { ::raise(SIGHUP), ::_exit(stop_asked == 0 ? 7 : 8); }) == 7);
    ::signal(SIGHUP, SIG_DFL);
}

TEST_CASE("run: Ctrl-C stops an evaluation at once; resumed, it is made again, to the same run") {
    Runs place;
    int batches = 0;
    Hooked device;
    device.on_evaluation = [&] { ++batches; };
    REQUIRE(train_on(device, place.arguments("counted")).status == 0);
    const int all = batches;
    CHECK(all > 50);
    // Before row 0 nothing is there to save, and no folder stays.
    for (int stop = 1; stop < all; stop += stop < 10 ? 1 : 13) {
        CAPTURE(stop);
        const std::string name = to_text("run", stop);
        batches = 0;
        device.on_evaluation = [&] {
            if (++batches == stop) stop_asked = 1;
        };
        const Outcome stopped = train_on(device, place.arguments(name));
        CHECK_MESSAGE(stopped.status == 130, stopped.err);
        CHECK(batches == stop + 0);
        if (!folder_exists(place.out(name))) {
            CHECK(contains(stopped.out, "before the first step"));
            CHECK(stop < 10);
        } else {
            place.resume(name);
        }
    }
}

TEST_CASE("run: resuming with any option that changes the numbers is refused, naming it") {
    Runs place;
    place.stop("out", 7);
    const auto before = snapshot(place.path);
    const Arguments pairs =
        "model gpt2 n-layer 2 n-head 4 n-embd 16 n-positions 9 vocab-size 300 dropout 0.2 "
        "untied-head 1 recompute-gelu 1 seed 1 batch-size 2 seq-len 7 grad-accum-steps 1 shuffle 0 "
        "overfit-batch 1 max-steps 31 epochs 3 max-minutes 9 learning-rate 0.2 min-lr-fraction 0 "
        "schedule wsd warmup-steps 0 weight-decay 0 beta1 0.8 beta2 0.99 eps 1e-6 grad-clip 0 "
        "eval-interval 3 eval-batches 2 eval-tokens 9 patience 6 on-nan skip skip-outliers 9";
    std::set<std::string> tried = {"data",      "train-shards", "val-shards",
                                   "init-from", "precision",    "tune-matmul"};  // known otherwise
    for (size_t i = 0; i < pairs.size(); i += 2) {
        tried.insert(pairs[i]);
        const Outcome refused =
            place.train("out", "--resume auto --" + pairs[i] + " " + pairs[i + 1]);
        CAPTURE(refused.err);
        refused.check_fails(2, {"--" + pairs[i], "--override"});
    }
    const Json list = options_that_change_numbers(Options());
    std::set<std::string> listed;
    for (auto& option : list.members) listed.insert(option.first);
    CHECK(listed == tried);
    CHECK(snapshot(place.path) == before);
    // What does not change the numbers may differ, and --override lets everything pass.
    copy(place.out(), place.out("copy"));
    place.resume("out", "--keep 9 --log-interval 1");
    const Outcome forced =
        good(place.train("copy", "--resume auto --learning-rate 0.2 --max-steps 9 --override"));
    CHECK(last_step(place.out("copy")) == 9);
}

TEST_CASE("run: data that was moved is the same data, data that was changed is not") {
    Runs place;
    const std::string moved = place.path + "/moved";
    const std::vector<std::pair<std::string, std::vector<uint16_t>>> changes =
        {{"", {}},  // only moved
         {"/train_000001.bin", noisy_text(131, 99)},
         {"/val_000000.bin", noisy_text(149, 77)},
         {"/train_000005.bin", noisy_text(5, 5)}};
    for (const auto& [file, tokens] : changes) {
        std::filesystem::remove_all(place.out());
        place.stop("out", 7);
        copy(place.data(), moved);
        if (file.empty()) {
            place.resume("out", {"--data", moved});
        } else {
            put_shard(moved + file, tokens);
            const Outcome refused = place.train("out", {"--data", moved, "--resume", "auto"});
            refused.check_fails(2, {"was made with the data "});
        }
        std::filesystem::remove_all(moved);
    }
}

TEST_CASE("run: a damaged checkpoint is passed over, saying why; with none left the run refuses") {
    Runs place;
    place.stop("out", 13, SIGTERM, {"--keep", "3"});
    CHECK(checkpoint_steps(place.out()) == std::vector<int64_t>{13, 10, 5});
    std::filesystem::resize_file(place.out() + "/checkpoint-13/optimizer.safetensors", 100);
    std::filesystem::remove(place.out() + "/checkpoint-10/config.json");
    copy(place.out(), place.out("copy"));
    const Outcome resumed = place.resume("out");
    CHECK(resumed.says("passing over " + place.out() + "/checkpoint-13: "));
    CHECK(resumed.says("checkpoint-13/optimizer.safetensors is damaged"));
    CHECK(resumed.says("checkpoint-10/config.json is missing"));
    CHECK(folder_exists(place.out() + "/checkpoint-13.set-aside"));
    copy(place.out("copy"), place.out("no log"));
    std::filesystem::resize_file(place.out("copy") + "/checkpoint-5/trainer_state.json", 1000);
    const auto before = snapshot(place.out("copy"));
    const Outcome refused = place.train("copy", "--resume auto");
    refused.check_fails(1, {"no checkpoint in " + place.out("copy") + " is whole"}, 4);
    CHECK(snapshot(place.out("copy")) == before);
    // A log that lacks rows is continued, with a warning.
    const std::string log = place.out("no log") + "/log.csv";
    put_file(log, log_text({}) + "3,0,0,0.5,,,,,,,,,\n");
    const Outcome without = place.train("no log", "--resume auto");
    CHECK(without.status == 0);
    CHECK(without.says("warning: " + log + " has 1 of the 6 rows up to step 5"));
    CHECK(place.log("no log").size() == 1 + size_t(place.end()) - 5);
}

TEST_CASE("run: going back to an earlier checkpoint sets the later ones aside") {
    Runs place("--keep 99 --save-interval 1");
    const std::string earlier = place.out("straight") + "/checkpoint-5";
    copy(place.out("straight"), place.out());
    Arguments arguments = place.arguments("out", "--keep 2");
    arguments.erase(arguments.begin() + 2, arguments.begin() + 4);  // --output: the checkpoint's
    good(train_gpt(arguments + Arguments{"--resume", place.out() + "/checkpoint-5/"}));
    CHECK(folder_exists(place.out() + "/checkpoint-6.set-aside"));
    CHECK(checkpoint_steps(place.out()).size() == 2);
    check_same_end(place.out("straight"), place.out());
    // Into a folder of its own: with the log so far, and nothing else touched.
    const auto before = snapshot(place.out("straight"));
    good(place.train("fork", "--resume " + earlier));
    CHECK(rows_of(place.out("fork")) == rows_of(place.out("straight")));
    CHECK(snapshot(place.out("straight")) == before);
    place.train("out", "--resume " + earlier).check_fails(1, {"already holds a run"});
}

TEST_CASE("run: a killed save is tidied up, and only what this program made") {
    Runs place;
    place.stop("out", 7);
    const std::string out = place.out() + "/";
    std::filesystem::rename(out + "best", out + "best.old");
    for (const char* folder : {"best.tmp", "checkpoint-9.tmp", "mine.tmp", "mine.old"})
        make_folders(out + folder);
    put_file(out + "log.csv.tmp-123", "x"), put_file(out + "a.tmp-1", "x");
    place.resume("out", "--keep 2");
    std::vector<std::string> names;
    for (const std::string& name : list_folder(place.out()))
        if (step_of_name(name) < 0) names.push_back(name);
    CHECK(names == Arguments("a.tmp-1 best lock log.csv mine.old mine.tmp samples.txt"));
    CHECK(checkpoint_steps(place.out()).size() == 2);
}

// --- What is in the way

TEST_CASE("run: a finished run is left alone, no run is written over, and one writes at a time") {
    Runs place;
    const auto before = snapshot(place.path);
    const Outcome again = place.resume("straight"), over = place.train("straight");
    CHECK(contains(again.out, "is finished"));
    over.check_fails(1, {"already holds a run"});
    CHECK(snapshot(place.path) == before);
    // One run in a folder at a time; a lock file that was left behind locks nothing. With nothing
    // to resume, --resume auto starts.
    make_folders(place.out());
    {
        const FileHandle lock = lock_folder(place.out());
        place.train("out").check_fails(1, {"another run is writing into"});
        CHECK(list_folder(place.out()) == std::vector<std::string>{"lock"});
    }
    place.resume("out");
}

TEST_CASE("run: --overwrite sets the old run aside, and only once the new one can begin") {
    TestRuns place;
    const Arguments options = "--max-steps 2 --patience 0", over = options + "--overwrite";
    good(place.train("out", options));
    const auto before = snapshot(place.out());
    CHECK(place.train("out", over + "--seq-len 9").status == 2);
    {
        const FileHandle lock = lock_folder(place.out());
        CHECK(place.train("out", over).says("another run is writing into"));
    }
    CHECK(snapshot(place.out()) == before);
    const Outcome again = good(place.train("out", over + "--seed 4"));
    CHECK(contains(again.out, place.out() + ", as " + place.out() + ".set-aside"));
    good(place.train("out", over));
    CHECK(snapshot(place.out("out.set-aside")) == before);
    CHECK(snapshot(place.out("out.set-aside-2")).size() == snapshot(place.out()).size());
}

TEST_CASE(
    "run: of two that begin in one new folder one wins; a folder that was replaced is noticed") {
    TestRuns place;
    const Arguments options = "--max-steps 8 --patience 0";
    // Another run takes the lock of the folder that this one has just made.
    std::optional<FileHandle> other;
    auto at_lock = [&](std::function<void()> action) {
        file_fault() = [&, action](const char* call, const std::string& path) {
            if (std::string(call) == "open" && path.ends_with("out/lock")) action();
            return 0;
        };
    };
    at_lock([&] { other.emplace(lock_folder(place.out())); });
    place.train("out", options).check_fails(1, {"another run is writing into"});
    CHECK(leads_to(place.out("out/lock"), *other));  // what the other needs stays
    other.reset();
    // Another run has begun and ended there before this one had the lock.
    good(place.train("ended", options));
    std::filesystem::remove_all(place.out());
    at_lock([&] { copy(place.out("ended/best"), place.out("out/best")); });
    CHECK(place.train("out", options).says("already holds a run"));
    std::filesystem::remove_all(place.out());
    // Replaced under a run: nothing is written into what is now another's.
    at_step(5, [&] {
        std::filesystem::rename(place.out(), place.out("gone"));
        make_folders(place.out());
        put_file(place.out("out/lock"), "another's");
    });
    place.train("out", options)
        .check_fails(1, {"was removed or replaced while this run was writing"});
    CHECK(list_folder(place.out()) == Arguments{"lock"});
}

TEST_CASE("run: what goes wrong in the middle costs no row and no checkpoint that was there") {
    Runs place;
    const std::string shard = place.data() + "/train_000000.bin", good = read_file(shard);
    std::string out;  // the run's folder
    int row = 0;      // the last one that was to be written to the log
    auto full = [&](int from, int to) {
        return [&row, from, to](const std::string& call, const std::string&) {
            return call == "write" && row > from && row <= to ? ENOSPC : 0;
        };
    };
    auto fails = [](int code, const std::string& failing, const std::string& end) {
        return [=](const std::string& call, const std::string& path) {
            return call == failing && path.ends_with(end) ? code : 0;
        };
    };
    const std::string temporary = "/checkpoint-10.tmp", no_space = std::strerror(ENOSPC);
    const std::string tensors = temporary + format("/model.safetensors.tmp-%d", ::getpid());
    struct Case {
        const char* what;
        std::function<int(const std::string&, const std::string&)> fault;
        int status;
        std::string says;
        int64_t last;  // its newest checkpoint
    };
    const std::vector<Case> cases = {
        // A full disk pauses saving; training goes on.
        {"full for rows 5 to 11", full(4, 11), 0, no_space, place.end()},
        {"full for rows 1 to 5", full(0, 5), 0, no_space, place.end()},
        {"full from row 13 on", full(12, 99), 1, "could not be saved", 10},
        // Whatever else a disk says ends the run.
        {"the log's fsync",
         [&](const std::string& call, const std::string& path) {
             return call == "fsync" && path.ends_with("/log.csv") && last_step(out) == 5 ? EIO : 0;
         },
         1, std::strerror(EIO), 5},
        {"the weights' fsync", fails(EIO, "fsync", tensors), 1, std::strerror(EIO), 5},
        {"a read-only disk", fails(EROFS, "mkdir", temporary), 1, std::strerror(EROFS), 5},
        {"a vanished folder",  // it is not made again, without its log
         [&](const std::string&, const std::string& path) {
             if (path.ends_with(temporary)) std::filesystem::rename(out, out + "-gone");
             return 0;
         },
         1, std::strerror(ENOENT), 5},
        // Data that is not what it was ends it too.
        {"a shard cut short",
         [&](auto&, auto&) {
             if (row == 7) std::filesystem::resize_file(shard, 1024);
             return 0;
         },
         1, "was changed, replaced or cut", 5},
        {"a new shard",
         [&](auto&, auto&) {
             if (row == 7) replace_shard(shard, noisy_text(700, 99));
             return 0;
         },
         1, "was changed, replaced or cut", 5},
    };
    for (const Case& c : cases) {
        CAPTURE(c.what);
        out = place.out(c.what), row = 0;
        file_fault() = [&](const char* call, const std::string& path) {
            if (std::string(call) == "write" && path.ends_with("/log.csv")) ++row;
            return c.fault(call, path);
        };
        const Outcome outcome = place.train(c.what);
        CHECK_MESSAGE(outcome.status == c.status, outcome.err);
        CHECK_MESSAGE(outcome.says(c.says), outcome.err);
        const bool full_disk = std::string(c.what).starts_with("full");
        const std::string waiting = "log.csv: " + no_space + "; what is missing waits in memory";
        if (!full_disk) CHECK_MESSAGE(outcome.lines() == c.status, outcome.err);
        if (full_disk) CHECK(outcome.says("warning: cannot write " + out + "/" + waiting));
        CHECK(outcome.err.find(waiting) == outcome.err.rfind(waiting));  // said once
        const bool gone = folder_exists(out + "-gone");
        CHECK(folder_exists(out) == !gone);
        if (gone) std::filesystem::rename(out + "-gone", out);
        CHECK(last_step(out) == c.last);
        ::unlink(shard.c_str());
        put_file(shard, good);
        c.status ? void(place.resume(c.what)) : check_same_end(place.out("straight"), out);
    }
}

TEST_CASE("run: a limit on file sizes at any byte is a full disk, not a signal") {
    Runs place;
    for (rlim_t limit : {0u, 1u, 100u, 700u, 1500u, 3000u, 15'000u, 20'000u, 1'000'000u}) {
        CAPTURE(limit);
        const std::string name = to_text("run", limit);
        ::signal(SIGXFSZ, SIG_IGN);  // as the program does before it writes
        const Outcome outcome = [&] {
            const Limit small_files(RLIMIT_FSIZE, limit);
            return place.train(name);
        }();
        CHECK(outcome.status == (limit == 1'000'000 ? 0 : 1));
        if (outcome.status == 1) CHECK(outcome.says(std::strerror(EFBIG)));
        place.resume(name);
    }
}

TEST_CASE("run: near the limit of open files a run trains and saves") {
    Runs place;
    for (int i = 10; i < 60; ++i) put_shard(place.data() + format("/train_%06d.bin", i), {1, 2, 3});
    const Limit few(RLIMIT_NOFILE, Limit::open_files(26));
    good(place.train("out"));
}

// =================================================================================================
// §18 Options: the engine, and the table of train_gpt.cpp
// =================================================================================================
// What is typed is taken as it is meant, or refused with what to type.

Options parsed(const Arguments& arguments) { return parse_options(arguments); }
// The message of a refusal; "" where the arguments are accepted.
std::string refusal(const Arguments& arguments) {
    return error_of([&] { parse_options(arguments); }, 2);
}

// Each command line is refused with a message that has this part.
void check_refused(const std::vector<std::pair<Arguments, std::string>>& cases) {
    for (const auto& refused : cases) {
        CAPTURE(refused.first);
        CHECK_MESSAGE(contains(refusal(refused.first), refused.second), refusal(refused.first));
    }
}

// Options with their table, of which a test may look at every row.
struct Rows {
    Options options;
    std::vector<Option> all = option_table(options);
    const Option& operator[](const std::string& name) const {
        for (const Option& row : all)
            if (row.name == name) return row;
        FAIL("no option " << name);
        return all[0];
    }
    // A value that an option takes and does not have.
    std::string another_value(const Option& row) const {
        if (!row.range.is_number())
            return row.range.words().back() == value_text(row) ? "0" : row.range.words().back();
        for (const char* value : {"1", "2", "0.5"})
            if (value_text(row) != value && row.range.contains(std::stod(value))) return value;
        return "0";
    }
    // Sets an option; the message of the refusal where it is refused.
    std::string set(const Option& row, const std::string& value) const {
        return error_of([&] { set_option(row, value); }, 2);
    }
};

const std::vector<std::string> kDocumented = split_at(
    "data train-shards val-shards model n-layer n-head n-embd n-positions vocab-size dropout "
    "untied-head recompute-gelu init-from config resume override overwrite output seed threads "
    "precision tune-matmul quiet help version batch-size seq-len grad-accum-steps shuffle "
    "overfit-batch max-steps epochs max-minutes learning-rate min-lr-fraction "
    "schedule warmup-steps weight-decay beta1 beta2 eps "
    "grad-clip log-interval eval-interval eval-batches eval-tokens sample-interval prompt "
    "tensor-stats-interval patience save-interval log-json keep on-nan skip-outliers prompt-file "
    "interactive max-new-tokens num-samples temperature top-k top-p show-top runs type hellaswag",
    ' ');

TEST_CASE("options: every documented option is in the table, once, in this order") {
    std::vector<std::string> names;
    for (const Option& row : Rows().all) {
        names.push_back(row.name);
        CHECK(row.commands != 0);
        CHECK(row.help.size() > 0);
    }
    CHECK(names == kDocumented);
}

TEST_CASE("options: no two options share a variable") {
    // Setting one option changes the text of that one only.
    const Rows defaults;
    for (size_t i = 0; i < defaults.all.size(); ++i) {
        const Rows rows;
        const Option& row = rows.all[i];
        CHECK(rows.set(row, rows.another_value(row)) == "");
        for (size_t k = 0; k < rows.all.size(); ++k)
            CHECK_MESSAGE((value_text(rows.all[k]) != value_text(defaults.all[k])) == (k == i),
                          row.name << " and " << rows.all[k].name);
    }
}

TEST_CASE("options: nothing given means train with the defaults") {
    const Options o = parsed({});
    CHECK((o.command == kTrain && !o.command_given && o.given.empty()));
    CHECK((o.data == "data/stories" && o.model == "tiny" && o.schedule == "cosine"));
    CHECK((o.max_steps > 0 && o.shuffle));
}

TEST_CASE("options: the two forms, switches, lists, - for _, and values given twice") {
    const std::string big = "1000000000000000000";
    struct Case {
        Arguments arguments;
        std::string name, value;
    };
    for (const Case& c : std::vector<Case>{
             {"--batch-size 7", "batch-size", "7"},
             {"--batch-size=7", "batch-size", "7"},
             {"--batch_size=7", "batch-size", "7"},
             {"train --grad_accum-steps 3", "grad-accum-steps", "3"},
             {"--batch-size 7 --batch_size=8", "batch-size", "8"},
             {"--overfit-batch", "overfit-batch", "1"},
             {"--overfit-batch --seed 2", "overfit-batch", "1"},
             {"--overfit-batch -h", "overfit-batch", "1"},
             {"--overfit-batch 1", "overfit-batch", "1"},
             {"--shuffle 0", "shuffle", "0"},
             {"--shuffle=0", "shuffle", "0"},
             {"--shuffle=1", "shuffle", "1"},
             {"--schedule wsd", "schedule", "wsd"},
             {"sample --prompt=", "prompt", ""},
             {{"sample", "--prompt", ""}, "prompt", ""},
             {{"sample", "--prompt", "a = b # c"}, "prompt", "a = b # c"},
             {"sample --prompt=--x", "prompt", "--x"},
             {"--data=a=b", "data", "a=b"},
             {{"--seed", big}, "seed", big},
         }) {
        CAPTURE(c.arguments);
        Rows rows;
        rows.options = parsed(c.arguments);
        CHECK(value_text(rows[c.name]) == c.value);
        CHECK(rows.options.given.contains(c.name));
    }
    std::vector<std::string> list;
    const std::vector<Option> table = {{"input", &list, "", 1, "FILE...", "files"}};
    CommandLine{table, {}, 1}.read({"--input", "a", "b", "--input=c"});
    CHECK(list == std::vector<std::string>{"a", "b", "c"});
    CHECK(value_text(table[0]) == "a b c");
}

TEST_CASE("options: commands, and options of other commands") {
    for (const CommandName& c : kCommands) {
        const Options o = parsed({c.name});
        CHECK(o.command == c.bit);
        CHECK(o.command_given);
        for (const Option& row : Rows().all)
            CHECK(contains(refusal({c.name, "--" + row.name + "=\n"}), "takes no option") ==
                  !(row.commands & c.bit));
    }
    check_refused({
        {"smaple", "did you mean sample?"},
        {"evl", "did you mean eval?"},
        {{""}, "unknown command \"\""},
        {{"sample", "--batch-size", "4"},
         "sample takes no option --batch-size; it is for train, eval, info, bench"},
        {"--top-k 4", "train takes no option --top-k; it is for sample"},
    });
}

TEST_CASE("options: an unknown name is answered with the nearest") {
    for (const std::string& pair : split_at(
             "learningrate:learning-rate lr:learning-rate batchsize:batch-size bs:batch-size "
             "steps:max-steps epoch:epochs drop-out:dropout seqlen:seq-len layers:n-layer "
             "wieght-decay:weight-decay outptu:output beta3:beta1 thread:threads n-heads:n-head "
             "vocab:vocab-size -data:data",
             ' ')) {
        const std::string typed = "--" + split_at(pair, ':')[0], meant = split_at(pair, ':')[1];
        CHECK(refusal({typed, "1"}) == "unknown option " + typed + "; did you mean --" + meant +
                                           "? (--help lists all options)");
    }
    CHECK(contains(refusal("--batchsize=4"), "did you mean --batch-size?"));
    CHECK(edit_distance("kitten", "sitting") == 3);
    CHECK(edit_distance("", "abc") == 3);
    CHECK(edit_distance("abc", "abc") == 0);
}

TEST_CASE("options: what is no option, a missing or a wrong value, a contradiction") {
    for (const char* stray : {"-Z", "-", "--", "-batch-size", "4", "train"})
        CHECK(contains(refusal({"train", stray}),
                       "expected an option such as --data, found " + std::string(stray)));
    for (const char* bad : {"true", "false", "yes", "2", "01", "on", "-1"})
        CHECK(refusal({"--shuffle", bad}) ==
              "--shuffle must be one of 0|1, got " + std::string(bad));
    check_refused({
        {"--seed 1 2", "found 2"},
        {"--=3", "unknown option"},
        {"--batch-size", "--batch-size needs a value: a whole number in [1, 1000000]"},
        {"--batch-size --seed 1", "--batch-size needs a value"},
        {"--batch-size=", "--batch-size needs a value"},
        {{"--batch-size", ""}, "--batch-size needs a value"},
        {"--data --model tiny", "--data needs a value: DIR"},
        {"--data=", "--data needs a value: DIR"},
        {"sample --prompt", "--prompt needs a value: TEXT"},
        {"--shuffle=", "--shuffle needs a value: one of 0|1"},
        // A negative number is a value. Given twice, all values are checked.
        {"--skip-outliers -1", "--skip-outliers must be a number in [0, 1000000], got -1"},
        {"--seed -4", "--seed must be a whole number in [0, 1e+18], got -4"},
        {"--learning-rate -1e-3", "must be a number in [0, 100], got -1e-3"},
        {"--batch-size x --batch-size 8", "must be a whole number"},
        {"--batch-size 8 --batch-size 0", "[1, 1000000], got 0"},
        {"--max-steps 0", "[1, 1e+12], got 0"},
        {"sample --top-p 1.5", "--top-p must be a number in (0, 1], got 1.5"},
        {"--schedule cos", "--schedule must be one of cosine|linear|constant|wsd, got cos"},
        {"--model gpt3", "one of tiny|gpt2|gpt2-medium|gpt2-large|gpt2-xl, got gpt3"},
        {"--on-nan Stop", "one of stop|skip"},
        // Contradictions.
        {"--data a --train-shards b", "--data and --train-shards exclude each other"},
        {"sample --prompt a --prompt-file b", "exclude each other"},
        {"--val-shards b", "--val-shards needs --train-shards"},
        {"--override", "--override needs --resume"},
        {"--patience 3 --eval-interval 0", "--patience"},
        {"--overwrite --resume auto", "--overwrite and --resume exclude each other"},
        // What a command could not use.
        {"eval --seed 1", "eval takes no option --seed; it is for train, sample"},
        {"bench --seed 1", "bench takes no option --seed"},
        {"info --dropout 0.1", "info takes no option --dropout"},
        {"eval --eval-tokens 9", "eval takes no option --eval-tokens"},
        {"eval --hellaswag a --data b", "--hellaswag and --data exclude each other"},
        {"eval --hellaswag a --batch-size 2", "--batch-size exclude each other"},
        {"eval --hellaswag a --eval-batches 2", "--eval-batches exclude each other"},
        {"eval --train-shards a --val-shards b", "only for --eval-batches"},
        {"sample --show-top 5 --seed 1", "--show-top and --seed exclude"},
        {"sample --show-top 5 --num-samples 2", "--num-samples exclude each other"},
        {"sample --show-top 5 --max-new-tokens 2", "--max-new-tokens exclude"},
        {"show --runs a --prompt b", "--runs and --prompt exclude each other"},
        {"show --runs a --precision fp32", "--runs and --precision exclude"},
        {"show --runs a --init-from b", "--runs and --init-from exclude"},
        {"--batch-size 1000000 --seq-len 4096", "must be below 2147483648 tokens"},
    });
    CHECK(refusal("eval --val-shards b").empty());
    CHECK(refusal("eval --train-shards a --val-shards b --eval-batches 3").empty());
    CHECK(refusal("--train-shards a --val-shards b").empty());
    CHECK(refusal("--override --resume auto").empty());
}

TEST_CASE("options: numbers are read strictly") {
    for (const char* bad :
         {"abc", "1x", "1.5", "1e3", "0x10", " 1", "1 ", "+1", "-", "--1", "1,000", "\xc2\xb2",
          "99999999999", "99999999999999999999999", "-99999999999999999999999"})
        CHECK(contains(refusal({"--batch-size=" + std::string(bad)}),
                       "--batch-size must be a whole number in [1, 1000000], got"));
    for (const char* bad : {"abc", "1x", "inf", "nan", "-inf", "0x1p3", " 1", "1 ", "+1", "1e",
                            "e5", ".", "1.2.3", "1e999", "1e-999", "101"})
        CHECK(contains(refusal({"--learning-rate=" + std::string(bad)}),
                       "--learning-rate must be a number in [0, 100], got"));
    for (auto [text, value] : {std::pair<const char*, double>{"1e-3", 1e-3},
                               {"0.5", 0.5},
                               {".5", 0.5},
                               {"5", 5},
                               {"5.", 5},
                               {"1E+1", 10},
                               {"0.30000000000000004", 0.30000000000000004},
                               {"0", 0}}) {
        Rows rows;
        rows.options = parsed({"--learning-rate", text});
        CHECK(rows.options.rate.peak == value);
        CHECK(rows.set(rows["learning-rate"], value_text(rows["learning-rate"])) == "");
        CHECK(rows.options.rate.peak == value);  // what is written out is read back
    }
}

TEST_CASE("options: ranges hold at both ends, for every number") {
    const Rows rows;
    int numbers = 0;
    for (const Option& row : rows.all) {
        const Range& range = row.range;
        if (!range.is_number()) continue;
        ++numbers;
        const bool whole = !std::holds_alternative<double*>(row.value);
        auto beyond = [&](double x, double way) {
            if (x == 0 && !whole) return way * std::numeric_limits<double>::min();
            return whole && x < 1e15 ? x + way : std::nextafter(x, way * INFINITY);
        };
        auto accepted = [&](double x) {
            return rows.set(row, format(whole ? "%.0f" : "%.17g", x)) == "";
        };
        CHECK(range.low < range.high);
        CHECK_MESSAGE(accepted(range.low) == (range.text.front() == '['), row.name);
        CHECK_MESSAGE(accepted(range.high) == (range.text.back() == ']'), row.name);
        CHECK_MESSAGE(!accepted(beyond(range.low, -1)), row.name);
        CHECK_MESSAGE(!accepted(beyond(range.high, 1)), row.name);
    }
    CHECK(numbers > 30);
}

TEST_CASE("options: length: what is set counts, the default only alone") {
    CHECK(parsed("--max-steps 9").max_steps == 9);
    CHECK(parsed("--epochs 2").max_steps == 0);
    CHECK(parsed("--max-minutes 0.5").max_steps == 0);
    const Options both = parsed("--epochs 2 --max-steps 9");
    CHECK(both.max_steps == 9);
    CHECK(both.epochs == 2);
}

TEST_CASE("options: config files") {
    TemporaryFolder scratch;
    const std::string path = scratch / "a", bad = scratch / "bad", good = scratch / "good";
    put_file(path,
             "\xef\xbb\xbf# a comment\n\n  batch-size = 3\t# three\r\n"
             "--learning_rate=0.5\nshuffle = 0\nprompt = C# is = fine\ndata = x#y\n"
             "batch_size = 4\n\t#\nprecision=fp32");
    put_file(bad, "seed = 3\nbatch-size = 0");
    put_file(good, "batch-size = 8");
    const Options o = parsed("--config " + path);
    CHECK(o.batch_size == 4);
    CHECK(o.rate.peak == 0.5);
    CHECK_FALSE(o.shuffle);
    CHECK(o.prompt == "C# is = fine");
    CHECK(o.data == "x#y");
    CHECK(o.precision == "fp32");
    CHECK(o.given == std::set<std::string>{"batch-size", "config", "data", "learning-rate",
                                           "precision", "prompt", "shuffle"});
    // The command line comes first, on either side.
    CHECK(parsed("--config " + path + " --batch-size 9").batch_size == 9);
    CHECK(parsed("--batch-size 9 --config " + path).batch_size == 9);
    CHECK(parsed("--batch-size 9 --config=" + path).rate.peak == 0.5);
    // Of two files both count; where both have an option, the last.
    check_refused({{"--config /no/such/file --config " + path, "cannot read /no/such/file"},
                   {"--config " + bad + " --config " + good, "bad:2: --batch-size must be"}});
    const Options last = parsed("--config " + path + " --config " + good);
    CHECK(last.batch_size == 8);
    CHECK(last.precision == "fp32");
}

TEST_CASE("options: a bad config file is refused, naming file and line") {
    TemporaryFolder scratch;
    const std::string path = scratch / "bad";
    auto message = [&](const std::string& text, const std::string& command = "train") {
        put_file(path, text);
        return refusal({command, "--config", path});
    };
    CHECK(message("# empty").empty());
    CHECK(message("").empty());
    for (auto [text, part] :
         {std::pair<std::string, std::string>{"seed = 1\nbatch-size = x\n",
                                              ":2: --batch-size must be a whole number"},
          {"batch-size = 0\nbatch-size = 1\n", ":1: --batch-size must be"},
          {"\n\nlearningrate = 1",
           ":3: unknown option --learningrate; did you mean --learning-rate?"},
          {"batch-size 4", ":1: expected `name = value`"},
          {"overfit-batch", ":1: expected `name = value`"},
          {"batch-size =", ":1: --batch-size needs a value"},
          {"= 4", ":1: unknown option"},
          {"config = other", ":1: a config file cannot hold --config"},
          {"--help = 1", ":1: a config file cannot hold --help"},
          {"top-k = 4", ":1: train takes no option --top-k"},
          {std::string("seed = 1\n\0x", 11), ":2: expected `name = value`, found \"\\u0000x\""},
          {"\177ELF", ":1: expected `name = value`"},
          {"GGUF = 1", ": found a GGUF file"}})
        CHECK(contains(message(text), path + part));
    CHECK(contains(message("seed = 1", "walk"), ":1: walk takes no option --seed"));
    CHECK(contains(message(std::string(1 << 17, '\n')), "expected at most 65536 bytes"));
    CHECK(message(std::string(60000, 'x')).size() < 300);
    check_refused({{"--config /dev/zero", "expected at most 65536 bytes"},
                   {"--config /", "--config: cannot read /"},
                   {{"--config", ""}, "--config needs a value"}});
}

TEST_CASE("options: help has every option once, in its group, in 100 columns") {
    const std::string all = help_text(parsed("--help"), "train_gpt");
    for (const std::string& name : kDocumented) {
        const std::string start = "\n  --" + name;
        size_t count = 0;
        for (size_t at = all.find(start); at != all.npos; at = all.find(start, at + 1))
            count += all[at + start.size()] == ' ';
        CHECK_MESSAGE(count == 1, name);
    }
    for (const char* group : {"data", "model", "run", "batch", "length", "optimizer", "watching",
                              "guards", "sample", "show", "export", "eval"})
        CHECK_MESSAGE(contains(all, "\n\n" + std::string(group) + "\n"), group);
    for (const CommandName& c : kCommands) {
        const Options o = parsed({c.name, "-h"});
        CHECK(o.help);
        CHECK(o.command == c.bit);
        const std::string page = help_text(o, "train_gpt");
        for (const Option& row : Rows().all)
            CHECK(contains(page, "\n  --" + row.name + " ") == bool(row.commands & c.bit));
    }
    for (const std::string& line : split_at(all, '\n')) {
        CHECK_MESSAGE(line.size() <= 100, line);
        CHECK_MESSAGE((line.empty() || line.back() != ' '), line);
    }
    std::istringstream text(all);  // a narrow terminal breaks other lines
    std::string words;
    for (std::string word; text >> word;) words += word + ' ';
    CHECK(contains(words, "in [0, 1) (default 0.9)"));
    CHECK(contains(words, "(default data/stories)"));
    CHECK_FALSE(contains(all, "e+"));
    CHECK(parsed("--help --override").help);  // what goes together does not matter then
    CHECK(contains(refusal("--help --nonsense"), "unknown option"));
}

TEST_CASE("options: what was given is printed so that it can be typed again") {
    const Arguments given =
        Arguments{"--prompt", "two words", "--data", "a\nb"} +
        "--batch-size 4 --seed 1337 --tensor-stats-interval=2 --shuffle 0 --output=--x";
    CHECK(retyped(parsed(given), kTrain) ==
          " --data 'a\nb' --output=--x --seed 1337 --batch-size 4 --shuffle 0 --prompt 'two words' "
          "--tensor-stats-interval 2");
    CHECK(retyped(parsed({}), kTrain) == "");
    CHECK(retyped(parsed("--batch-size 4 --seed=5"), kSample) == " --seed 5");
}

TEST_CASE("options: help and version, however they are asked for; a config file given bare") {
    for (const char* typed : {"eval --help", "help eval", "--help eval", "-h eval", "eval -h"}) {
        CAPTURE(typed);
        const Options o = parsed(typed);
        CHECK(o.help);
        CHECK(o.command_given);
        CHECK(o.command == kEval);
    }
    CHECK_FALSE(parsed("help").command_given);
    CHECK(contains(refusal("help evl"), "did you mean eval?"));
    CHECK(contains(train_gpt("help").out, "--learning-rate"));
    CHECK(train_gpt("--version").out.starts_with("tinygpt 0."));
    TemporaryFolder scratch;
    const std::string path = scratch / "a.conf";
    put_file(path, "batch-size = 3\nn_ctx = 7");
    const Options o = parsed({path, "--seed", "4"});
    CHECK(o.command == kTrain);
    CHECK(o.batch_size == 3);
    CHECK(o.sizes.n_positions == 7);
    CHECK(o.given.contains("seed"));
    CHECK(parsed({"bench", path, "--batch-size", "9"}).batch_size == 9);
    CHECK(contains(refusal("none.conf"), "cannot read none.conf"));
}

TEST_CASE("options: the names of nanoGPT, llm.c and transformers are taken, or answered rightly") {
    // Their name, and ours.
    const Arguments accepted =
        "--out_dir output --block_size n-positions --overwrite_output_dir overwrite "
        "--gradient_accumulation_steps grad-accum-steps --batch_size batch-size "
        "--max_iters max-steps --warmup_iters warmup-steps "
        "--eval_interval eval-interval --log_interval log-interval "
        "--n_layer n-layer --n_head n-head --n_embd n-embd --dropout dropout "
        "--learning_rate learning-rate --weight_decay weight-decay --beta1 beta1 --beta2 beta2 "
        "--grad_clip grad-clip -i train-shards -o output -n save-interval -nk keep -b batch-size "
        "-t seq-len -x max-steps -k schedule -l learning-rate -u warmup-steps -q min-lr-fraction "
        "-c weight-decay -v eval-interval -s sample-interval -a overfit-batch -r recompute-gelu "
        "--output_dir output --per_device_train_batch_size batch-size --num_train_epochs epochs "
        "--adam_beta1 beta1 --adam_beta2 beta2 --adam_epsilon eps --max_grad_norm grad-clip "
        "--lr_scheduler_type schedule --warmup_steps warmup-steps --logging_steps log-interval "
        "--eval_steps eval-interval --save_steps save-interval --save_total_limit keep --seed seed "
        "--max_steps max-steps --resume_from_checkpoint resume";
    for (size_t i = 0; i < accepted.size(); i += 2) {
        CAPTURE(accepted[i]);
        Rows rows;
        const std::string value = rows.another_value(rows[accepted[i + 1]]);
        rows.options = parsed({accepted[i], value});
        CHECK(value_text(rows[accepted[i + 1]]) == value);
        CHECK(rows.options.given.contains(accepted[i + 1]));
    }
    // What is typed, and a part of the answer.
    const std::pair<const char*, const char*> answered[] = {
        {"--dtype=bfloat16", "there is no --dtype: --precision fp32, bf16"},
        {"--bf16", "--precision fp32"},
        {"--fp16", "no fp16"},
        {"--tf32 1", "--precision fp32"},
        {"-f 1", "--precision fp32"},
        {"--device=cuda", "./train_gpt_cu on the GPU"},
        {"--compile=False", "there is no --compile: "},
        {"--torch_compile", "there is no --torch-compile: "},
        {"--wandb_log=True", "log.csv"},
        {"--report_to wandb", "log.csv"},
        {"--eval_iters=200", "there is no --eval-iters: --eval-tokens "},
        {"--start=x", "--prompt TEXT"},
        {"--bias=False", "all layers of GPT-2 have biases"},
        {"--decay_lr=False", "--schedule constant"},
        {"--lr_decay_iters=600", "--max-steps"},
        {"--min_lr=6e-5", "--min-lr-fraction"},
        {"--eval_only=True", "./train_gpt eval"},
        {"--always_save_checkpoint=True", "--save-interval"},
        {"--dataset=shakespeare", "--data"},
        {"--init_from=gpt2", "`make gpt2`"},
        {"--init_from=gpt2-xl", "--init-from data/gpt2"},
        {"--init_from=scratch", "without --init-from"},
        {"--init_from=resume", "--resume auto"},
        {"--backend=nccl", "there is no --backend: "},
        {"-d 524288", "--grad-accum-steps"},
        {"-e d12", "--n-layer"},
        {"-y 1", "--resume auto"},
        {"-z 1", "there is no --z: "},
        {"-sl 5.0", "--skip-outliers"},
        {"-m 20", "--eval-tokens"},
        {"--gradient_checkpointing", "--recompute-gelu"},
        {"--warmup_ratio 0.1", "--warmup-steps"},
        {"--do_train", "trains unless"},
        {"--optim adamw_torch", "AdamW is the only optimizer"},
        {"--load_best_model_at_end", "best/"},
        {"--push_to_hub", "Hugging Face folder"},
    };
    for (const auto& [name, answer] : answered) {
        const std::string typed = name;  // clang 14 cannot capture a structured binding
        const std::string found = refusal(typed);
        CHECK_MESSAGE(contains(found, answer), typed << ": " << found);
        CHECK_MESSAGE(found.size() < 200, found);
    }
    // No name twice, none of our own, and each leads to an option that there is, or to another
    // program's.
    std::set<std::string> seen;
    const Rows rows;
    for (const Option& row : rows.all) seen.insert(row.name);
    for (const std::string& pair : split_at(kSameNames, ' ')) {
        CHECK_MESSAGE(seen.insert(split_at(pair, '=')[0]).second, pair);
        rows[split_at(pair, '=')[1]];
    }
    for (const OtherNames& other : kOtherNames) {
        for (const std::string& name : split_at(other.names, ' '))
            CHECK_MESSAGE(seen.insert(name).second, name);
        for (std::string word : split_at(other.answer, ' ')) {
            while (std::strchr(",;:)", word.back())) word.pop_back();
            const bool ours = word.starts_with("--") && word != "--input" && word != "--tokenizer";
            if (ours) rows[word.substr(2)];
        }
    }
}

// In small what `make fuzz` does at large.
TEST_CASE("parsers: no change to a good text makes one do anything but read it or refuse it") {
    TemporaryFolder scratch;
    const std::string path = scratch / "f";
    const std::vector<float> w = {1, 2, 3, 4, 5, 6};
    write_safetensors(path, {tensor_to_write("a", {2, 2}, w.data()),
                             tensor_to_write("b", {2}, w.data())});
    struct Parser {
        std::string good;
        int status;
        std::string refusal;  // how it begins
        std::function<void(const std::string&)> read;
    };
    const Parser parsers[] = {
        {R"({"a":[1,-2.5e3,true,false,null],"b\u0041\ud83d\ude00":{"c":"\n\t\"","d":{}},"e":""})",
         1, "x: not valid JSON: line ",
         [](const std::string& text) {
             const std::string written = Json::parse(text, "x").write();
             CHECK(Json::parse(written, "x").write() == written);
         }},
        {read_file(path), 1, path + ": ",
         [&](const std::string&) {
             const SafetensorsFile file(path);
             uint64_t covered = 0;
             for (const StoredTensor& tensor : file.tensors) covered += tensor.end - tensor.begin;
             CHECK(file.tensors.back().end == std::filesystem::file_size(path));
             CHECK(covered == 24);
         }},
        {hf_config(tiny_config, 10).write(), 1, path + ": ",
         [&](const std::string&) { read_hf_config(path); }},
        {"train --batch-size 4 --schedule=wsd --data x --shuffle 0 -t 8 --config /dev/null -h", 2,
         "", [](const std::string& text) { parsed(text); }},
    };
    for (const Parser& parser : parsers) {
        int accepted = 0;
        for (uint64_t i = 0; i < 5000; i++) {
            std::string text = parser.good;
            auto draw = [&, n = uint64_t(0)](size_t below) mutable {
                return size_t(random_bits(i, n++) % below);
            };
            for (size_t changes = draw(3) + 1; changes > 0 && !text.empty(); --changes) {
                const size_t at = draw(text.size());
                const char c = draw(2) ? parser.good[draw(parser.good.size())] : char(draw(256));
                switch (draw(3)) {
                    case 0: text[at] = c; break;
                    case 1: text.insert(at, 1, c); break;
                    default: text.erase(at, 1 + draw(5));
                }
            }
            put_file(path, text);
            const std::string message = error_of([&] { parser.read(text); }, parser.status);
            accepted += message.empty();
            CAPTURE(text);
            CHECK((message.empty() || message.starts_with(parser.refusal)));
            CHECK(message.size() < 400);
        }
        CHECK((accepted > 50 && accepted < 4000));
    }
}

// =================================================================================================
// train_gpt.cpp: what a run shows and says
// =================================================================================================

TEST_CASE("terminal: progress is shown on a terminal, once a second, and cleared") {
    const auto outcome = outcome_on_terminal(80, [] {
        const StoppedClock clock;
        ProgressLine progress{"evaluating", 200};
        for (int64_t done : {0, 20, 50, 60, 100})
            progress.show(done), StoppedClock::move(700'000'000);
        return 0;
    });
    if (outcome)
        CHECK(outcome->out ==
              "\r\033[Kevaluating 25 % | 4s left\r\033[Kevaluating 50 % | 3s left\r\033[K");
}

TEST_CASE("run: the report says what the run was, and what it says to type next can be typed") {
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"overfitting: validation loss is ", "--max-steps 300 --learning-rate 0.01"},
        {"improving: validation loss fell ", "--max-steps 40 --learning-rate 0.001"},
        {"flat: validation loss rose 0.0 % since step 20\n", "--max-steps 40 --learning-rate 0"},
        {"improving: training loss fell ",
         "--max-steps 100 --eval-interval 0 --learning-rate 0.01"},
        {"improving: validation loss fell ", "--max-steps 4 --epochs 9"},
        {"too short a run", "--max-steps 4 --eval-interval 0"},
        {"worse: validation loss is ", "--max-steps 40 --learning-rate 20"},
    };
    for (const auto& [start, more] : cases) {
        const std::string verdict = start;
        CAPTURE(verdict);
        TestRuns place;
        const Outcome outcome = good(train_gpt(place.line(
            "out/",
            "--n-layer 1 --n-embd 32 --n-head 2 --n-positions 32 --seq-len 16 --threads 1 "
            "--batch-size 8 --eval-interval 20 --warmup-steps 0 " +
                more)));
        CHECK_MESSAGE(contains(outcome.out, "\nverdict    " + verdict), outcome.out);
        // A slash at the end of --output is none in the folder's name.
        // Nor is best/ worth a sample where it is the model before training.
        const bool best =
            verdict.starts_with("overfitting") || verdict.starts_with("improving: val");
        const std::string out = place.out("out"), last = checkpoint_folder(out, last_step(out));
        CHECK(contains(outcome.out, " --init-from " + (best ? out + "/best" : last)));
        int typed = 0;
        for (const std::string& line : split_at(outcome.out, '\n')) {
            const size_t at = line.find("./train_gpt ");
            if (at == line.npos) continue;
            std::string next = line.substr(at + 12);
            std::erase(next, '"');
            CHECK_MESSAGE(train_gpt(next).status == 0, line);
            ++typed;
        }
        CHECK(typed == 2);
    }
}

// =================================================================================================
// train_gpt.cpp: the commands
// =================================================================================================
// Each run in this process, as it would be typed.

// --- What they refuse

TEST_CASE("run: bad input ends with a clear line or two, and nothing is written") {
    TestRuns place;
    const std::string path = place.path + "/", new_data = "--data " + place.data() + " ";
    make_folders(path + "empty"), make_folders(path + "ones");
    put_shard(path + "short.bin", noisy_text(20, 1));
    put_shard(path + "large.bin", std::vector<uint16_t>(3000, 60'000));
    for (int i = 0; i < 20; i++) put_shard(path + format("ones/train_%06d.bin", i), {5});
    std::string shard = read_file(place.data() + "/train_000000.bin");
    put_file(path + "cut.bin", shard.substr(0, shard.size() - 1));
    shard[0] ^= 1;
    put_file(path + "bad.bin", shard);
    put_file(path + "file", "x");
    make_folders(path + "others"), put_file(path + "others/fineweb_train_000001.bin", shard);
    good(place.train("good", "--max-steps 2 --patience 0"));
    const std::string shards = "--vocab-size 257 --batch-size 4 --train-shards " + path;
    struct Case {
        std::string arguments;
        int status;
        std::string says;
    };
    const std::vector<Case> cases = {
        {"--bach-size 3", 2, "did you mean --batch-size"},
        {new_data + "--n-embd 10 --n-head 3", 2, "does not divide"},
        {new_data + "--seq-len 129", 2, "longer than the model's 128 positions"},
        {new_data + "--vocab-size 256", 2, "smaller than the tokenizer's 257"},
        {new_data + "--prompt x --seq-len 16 --batch-size 1000", 2, "needs 16,001"},
        {"--data " + path + "none", 1, "there is no data folder"},
        {"--data " + path + "file", 1,
         "is a file, and --data takes a folder: of text, ./prepare_data"},
        {"--data " + path + "empty", 1, "holds no train_*.bin"},
        // Enough tokens, and nothing to predict.
        {"--seq-len 4 --batch-size 1 --data " + path + "ones", 2, "one batch of 1 x 4 needs 5"},
        {shards + "none*.bin", 1, "no file matches"},
        {shards + "bad.bin " + path + "cut.bin", 2,
         "a pattern such as 'data/train_*.bin' must be quoted"},
        {"--train-shards " + place.data(), 1, "is a folder: say --data"},
        {"--data " + path + "others", 1, "--train-shards '" + path + "others/*train*.bin'"},
        {shards + "bad.bin", 1, "is no token shard"},
        {shards + "cut.bin", 1, "is damaged"},
        {shards + "large.bin", 1, "but the vocabulary has only 257"},
        {shards + "short.bin", 2,
         "20 tokens, but one batch of 4 x 128 needs 513 (one more than its size): take more text, "
         "or --seq-len 4\n"},
        {shards + "short.bin --seq-len 16", 2, "text, or --batch-size 1, or --seq-len 4\n"},
        {shards + "short.bin --batch-size 20", 2, "text, or --batch-size 1 --seq-len 19\n"},
        {new_data + "--batch-size 8 --seq-len 128 --overfit-batch", 2, "too short"},
        {new_data + "--batch-size 1000000 --seq-len 2", 2, "needs 2,000,001"},
        {new_data + "--init-from " + path + "none", 1, "no such folder"},
        {new_data + "--resume " + path + "none", 1, "no checkpoint to resume"},
        {new_data + "--precision tf32", 2, "is for GPUs"},
        {new_data + "--tune-matmul", 2, "is for GPUs"},
        {"eval", 2, "--init-from is missing"},
        {"sample --init-from " + path + "empty", 1, "config.json"},
        {"sample --init-from " + path + "good", 1, "its model is " + path + "good/best"},
        // A checkpoint's sizes cannot be overridden, and are not silently taken instead.
        {new_data + "--n-layer 2 --init-from " + path + "good/best", 2,
         "--n-layer 2 does not fit --init-from"},
        // An output folder that cannot be made, and sizes that no memory holds.
        {new_data + "--seq-len 8 --output " + path + "file/x", 1, "cannot create folder"},
        {new_data + "--seq-len 8 --output " + path + "new/deep/" + std::string(300, 'x'), 1,
         "cannot create folder"},
        {new_data + "--n-layer 1000 --n-embd 65536 --n-head 512 --n-positions 1048576 --vocab-size "
                    "65536 --seq-len 8",
         1, "of memory, and"},
    };
    const auto before = snapshot(place.path);
    for (const Case& c : cases) {
        Arguments arguments = c.arguments;
        if (arguments[0].starts_with("--") && !contains(c.arguments, "--output"))
            arguments = arguments + "--output " + place.out("bad");
        const Outcome outcome = train_gpt(arguments);
        CAPTURE(c.arguments);
        outcome.check_refused(c.status, {"error: ", c.says}, 2);
        CHECK(!folder_exists(place.out("bad")));
    }
    CHECK(snapshot(place.path) == before);
    CHECK(!folder_exists(place.out("new")));
    // Of a checkpoint that is not there, no folder is made.
    CHECK(train_gpt({"--data", place.data(), "--resume", path + "nothere"}).status == 1);
    CHECK(!file_exists(path + "lock"));
}

TEST_CASE("run: refused however late, a run leaves no folder behind") {
    TestRuns place;
    good(place.train("good", "--max-steps 4 --patience 0"));
    const std::string checkpoint = place.out("good") + "/checkpoint-4";
    auto names = [&] {
        std::set<std::string> found;
        for (auto& entry : std::filesystem::recursive_directory_iterator(place.path))
            if (entry.path().filename() != "lock") found.insert(entry.path().string());
        return found;
    };
    // Weights that load but for what is in them: NaN, a byte too few, another name, nothing.
    const std::string weights = read_file(checkpoint + "/model.safetensors");
    std::string nan = weights, renamed = weights;
    nan.replace(nan.size() - 4, 4, "\xff\xff\xff\x7f");
    renamed.replace(renamed.find("ln_f"), 4, "ln_g");
    const std::map<std::string, std::string> broken = {{"nan", nan},
                                                       {"cut",
                                                        weights.substr(0, weights.size() - 1)},
                                                       {"ln_g", renamed},
                                                       {"none", ""}};
    for (const auto& [key, bytes] : broken) {
        const std::string name = key;
        CAPTURE(name);
        make_folders(place.out(name));
        for (const char* file : {"config.json", "vocab.json", "merges.txt"})
            copy(checkpoint + "/" + file, place.out(name) + "/" + file);
        put_file(place.out(name) + "/model.safetensors", bytes);
        const auto before = names();
        train_gpt(
            place.line("new/run", "--batch-size 2 --seq-len 8 --init-from " + place.out(name)))
            .check_refused(1, {name});
        CHECK(names() == before);
    }
    // Each operation on files that comes before the log's own name fails, in a new folder and in
    // one that is there already.
    int failed = 0;
    make_folders(place.out("there"));
    for (const std::string name : {"new/run", "there"})
        for (int call = 0, done = 0; !done; call++) {
            CAPTURE(call);
            const auto before = names();
            int count = 0;
            file_fault() = [&](const char* what, const std::string& path) {
                if (count++ == call) return EIO;
                done |= std::string(what) == "rename" && path.ends_with("/log.csv");
                return 0;
            };
            const Outcome outcome = place.train(name, "--resume auto --max-steps 1 --patience 0");
            if (done) break;
            CHECK_MESSAGE(outcome.status == 1, outcome.err);
            CHECK(outcome.lines() == 1);
            CHECK(names() == before);
            ++failed;
        }
    CHECK(failed >= 8);
}

// --- Data and model

TEST_CASE("run: validation data that is trained on is warned of, under whatever name") {
    Runs place;
    const std::string data = place.data(), train = data + "/train_000001.bin";
    auto warned = [&](const std::string& name, const std::string& shards) {
        Arguments all = place.arguments(name, "--max-steps 2 --patience 0");
        if (!shards.empty()) all.erase(all.begin(), all.begin() + 2);  // --data
        const Outcome ran = good(train_gpt(shards + all));
        return ran.says("the validation loss will say nothing about new text");
    };
    CHECK_FALSE(warned("apart", ""));
    CHECK(warned("globs", "--vocab-size 257 --train-shards " + data + "/*.bin --val-shards " +
                              data + "/val_*.bin"));
    std::filesystem::copy_file(train, data + "/val_000001.bin");
    CHECK(warned("copied", ""));
}

TEST_CASE("hf: data of another tokenizer is refused, saying which is which") {
    const ModelFolder folder({1, 1, 8, 16, 258});
    const std::string model = folder.model, data = folder / "data";
    Tokenizer({{0, 1}}).save(data);
    for (const char* name : {"/train_000001.bin", "/val_000000.bin"})
        put_shard(data + name, noisy_text(200, 1, 258));
    auto check_refused = [&](const std::string& command) {
        const Outcome outcome = folder(command + " --seq-len 8 --data " + data);
        CHECK(outcome.says(data));
        CHECK(outcome.says("another tokenizer than the model in " + model));
        CHECK_FALSE(folder_exists(folder / "out"));
    };
    check_refused("eval");
    // The same from tokenizer.json alone, which is all that transformers 5 writes.
    for (const char* file : {"/vocab.json", "/merges.txt", "/trainer_state.json"})
        remove_file(model + file);
    check_refused("train --output " + folder / "out");
    byte_tokens().save(model);
    rename_path(model + "/vocab.json", model + "/encoder.json");
    rename_path(model + "/merges.txt", model + "/vocab.bpe");
    check_refused("eval");
}

// The files of a folder, in memory.
using Files = std::map<std::string, std::string>;

// What only a whole folder can have wrong, or what would take memory; the file at fault and the
// reason must be in the message. What else makes each file bad, its own section has.
struct Damage {
    std::function<void(Files&)> make;
    std::string file, reason;
};
std::vector<Damage> damages() {
    const std::string c = "config.json", w = "model.safetensors", v = "vocab.json",
                      m = "merges.txt", t = "tokenizer.json", s = "trainer_state.json";
    auto holds = [](const std::string& name, const std::string& bytes) {
        return [=](Files& f) { f[name] = bytes; };
    };
    // A state of ours beside the model, sealed: only what it says is wrong.
    auto sealed = [=](const std::string& body) { return holds(s, body + state_seal(body)); };
    const std::string deep = "{\"a\":" + repeated("[", 900'000);
    // Each line doubles the token before it.
    std::string growing = "#version: 0.2\n", part = "a";
    for (int i = 0; i < 24; ++i, part += part) growing += part + " " + part + "\n";
    return {
        {holds(c, deep), c, "more than 64 levels"},
        {[=](Files& f) { f[c] = replaced(f[c], "\"n_embd\": 8", "\"n_embd\": 65536"); }, w,
         "expected shape"},
        {[=](Files& f) { f[w].replace(0, 8, little_endian(100'000'000)); }, w, "cut short"},
        {holds(w, safetensors_bytes(deep + "}", "")), w, "more than 64 levels"},
        {[=](Files& f) { f[w].replace(f[w].size() - 4, 4, raw<uint32_t>({0xff800001})); }, w,
         "NaN"},
        {[=](Files& f) { f.erase(m), f.erase(t); }, "", "expected vocab.json and merges.txt"},
        {holds(m, growing), m, "at most 16000000 bytes"},
        {holds(v, deep), v, "more than 64 levels"},
        {holds(v, std::string(17'000'000, ' ')), v, "at most 16000000 bytes"},
        {[=](Files& f) { f.erase(v), f.erase(m), f[t].assign(17'000'000, ' '); }, t,
         "at most 16000000 bytes"},
        {[=](Files& f) {
             TemporaryFolder scratch;
             Tokenizer({{0, 1}}).save(scratch.path);
             f[v] = read_file(scratch / v), f[m] = read_file(scratch / m);
         },
         "", "tokenizer has more tokens than its model"},
        {holds(s, ""), s, "is damaged"},
        {holds(s, std::string(15'000'000, ' ')), s, "is damaged"},
        {holds(s, std::string(17'000'000, ' ')), s, "at most 16000000 bytes"},
        {sealed(deep), s, "more than 64 levels"},
        {sealed("{\"a\":[" + repeated("0,", 900'000) + "0]"), s, "more than 262144"},
        {sealed("{\"step\":1"), s, "\"checksums\" is missing"},
        {sealed("{\"checksums\":{\"../x\":\"0\"}"), "", "is missing"},
        {sealed("{\"checksums\":{\"x\":\"0\"}"), "/x", "is missing; if it was changed"},
        {sealed("{\"checksums\":{\"config.json\":7}"), c, "is damaged"},
    };
}

TEST_CASE("hf: a damaged folder is refused in 64 MB and one line that names file and reason") {
    Threads one(1);
    const ModelFolder folder({2, 2, 8, 16, 257});
    Files good;
    for (const std::string& name : list_folder(folder.model))
        if (name != "trainer_state.json") good[name] = read_file(folder.model + "/" + name);
    auto open = [&](const Files& files) {
        std::filesystem::remove_all(folder.model), make_folders(folder.model);
        for (auto& [name, bytes] : files) put_file(folder.model + "/" + name, bytes);
        // In 64 MB. (A sanitizer has more of its own; some systems do not say what is held.)
        const std::string pages = split_at(read_file("/proc/self/statm"), ' ')[5];
        const rlim_t held = rlim_t(::sysconf(_SC_PAGESIZE)) * std::stoul(pages);
        const bool known = held > 0 && !sanitized;
        const Limit little(RLIMIT_DATA, known ? held + 64'000'000 : RLIM_INFINITY);
        return folder("sample --max-new-tokens 1");
    };
    REQUIRE(open(good).error() == "");
    for (const Damage& damage : damages()) {
        Files files = good;
        damage.make(files);
        const Outcome outcome = open(files);
        CAPTURE(damage.file);
        CAPTURE(damage.reason);
        outcome.check_refused(1, {folder.model, damage.file, damage.reason});
    }
}

TEST_CASE("hf: what --init-from names is named for what it is, with what to type") {
    TemporaryFolder scratch;
    const std::string good = scratch / "good", run = scratch / "run", m = scratch / "m";
    const Tokenizer tokenizer = Tokenizer::bytes();
    save_model(good, {1, 1, 8, 16, 257}, &tokenizer);
    make_folders(run);
    std::filesystem::copy(good, run + "/best");
    std::filesystem::copy(good, run + "/checkpoint-30");
    // What is named; the files of the folder "m", where it is that; and the message.
    const std::string lfs =
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n";
    const std::array<std::string, 3> cases[] = {
        {m, "config.json pytorch_model.bin", "pytorch_model.bin, PyTorch's own form: python3 -c"},
        {m, "config.json pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json",
         "save_pretrained('" + m + "')"},
        {m, "model-q4.gguf", "found model-q4.gguf, a GGUF file, for llama.cpp: take the folder"},
        {m, "adapter_config.json adapter_model.safetensors", "holds a LoRA adapter"},
        {m, "adapter_config.json adapter_model.bin", "merge_and_unload().save_pretrained('"},
        {m, "config.json model-00001-of-00002.safetensors", "model.safetensors.index.json must be"},
        {m, "config.json gpt2.safetensors", "weights under another name"},
        {m, "config.json tf_model.h5", "another program's form"},
        {m, "config.json flax_model.msgpack", "another program's form"},
        {m, "ckpt.pt", "another program's form"},
        {m, "config.json", "expected model.safetensors, found no such file"},
        {m, "model.safetensors", "config.json"},
        {good + "/model.safetensors", "", "is a file: give its folder, --init-from " + good},
        {good + "/config.json", "", "give its folder, --init-from " + good},
        {run, "", "is the folder of a run: its model is " + run + "/best"},
        {"me/a-gpt2", "", "hf download me/a-gpt2 --local-dir data/model"},
        {"distilgpt2", "", "hf download distilgpt2 --local-dir data/model"},
        {"./gone", "", "./gone: there is no such folder"},
        {scratch / "none", "", "there is no such folder"},
    };
    for (const auto& [named, files, says] : cases) {
        std::filesystem::remove_all(m), make_folders(m);
        for (const std::string& name : Arguments(files))
            put_file(m + "/" + name,
                     file_exists(good + "/" + name) ? read_file(good + "/" + name) : "x");
        for (const char* command : {"sample", "eval", "info", "show", "export"})
            train_gpt({command, "--init-from", named}).check_refused(1, {says});
    }
    std::filesystem::remove_all(run + "/best");
    CHECK(train_gpt({"sample", "--init-from", run}).says("its model is " + run + "/checkpoint-30"));
    // Files that are named by themselves.
    for (auto& [bytes, says] : {std::pair{std::string("GGUF\3"), "is a GGUF file, for llama.cpp"},
                                {"PK\3\4", "is PyTorch's own form or another zip file"},
                                {lfs, "is a pointer of Git LFS: fetch the file itself"},
                                {"<!doctype html>", "is an HTML page"},
                                {"text", "is a file; expected a folder with config.json"}}) {
        put_file(scratch / "file", bytes);
        CHECK(train_gpt({"sample", "--init-from", scratch / "file"}).says(says));
    }
}

TEST_CASE("hf: what is passed over in a folder is said, once for each") {
    TemporaryFolder scratch;
    Weights weights(tiny_config);
    for (StoredTensor& tensor : weights.tensors) tensor.name = "module." + tensor.name;
    weights.add("module.score.weight", {2, 8});
    put_file(scratch / "config.json", hf_config(tiny_config, -1).write());
    write_safetensors(scratch / "model.safetensors", weights.tensors);
    put_file(scratch / "model-00001-of-00002.safetensors", "of an earlier save");
    const Outcome outcome =
        good(train_gpt("sample --max-new-tokens 2 --init-from " + scratch.path));
    for (const char* said :
         {"begin with module.transformer., which is passed over",
          "tensor module.score.weight: passed over: it is a head for another task",
          "model-00001-of-00002.safetensors passed over: no part of the model"}) {
        CHECK_MESSAGE(outcome.says(said), outcome.err);
        CHECK_MESSAGE(outcome.err.find(said) == outcome.err.rfind(said), outcome.err);
    }
}

TEST_CASE("run: --seq-len and --learning-rate follow the model and the start, and are said") {
    const std::map<std::string, double> rates = {{"tiny", 2e-3},
                                                 {"gpt2", 6e-4},
                                                 {"gpt2-medium", 3e-4},
                                                 {"gpt2-large", 2.5e-4},
                                                 {"gpt2-xl", 2e-4}};
    for (const Preset& preset : kPresets)
        CHECK(usual_rate(layout_of(preset.config).count) == rates.at(preset.name));
    TestRuns place;
    const std::string small = "--n-layer 1 --n-embd 8 --n-head 2 --n-positions 24 ";
    const std::string steps = "--warmup-steps 1 --batch-size 2 --max-steps 2 ";
    auto run = [&](const std::string& name, const std::string& more) {
        return good(train_gpt(place.line(name, steps + more))).out;
    };
    auto saved = [&](const std::string& name, const char* option) {
        return place.state(name).options.find(option)->text;
    };
    const std::string fresh = run("fresh", small + "--max-steps 2");
    CHECK_MESSAGE(contains(fresh, "--seq-len 24: the model's positions"), fresh);
    CHECK_MESSAGE(contains(fresh, "--learning-rate 0.002: for a new model of "), fresh);
    CHECK(saved("fresh", "seq-len") == "24");
    CHECK(*place.log("fresh")[1].lr == 0.002);
    const std::string part = run("part", small + "--seq-len 8 --learning-rate 0.5");
    CHECK_MESSAGE(contains(part, "positions 8 to 23 stay untrained"), part);
    CHECK(!contains(part, "--learning-rate 0.5:"));
    // From trained weights, a tenth; resumed without --init-from, it stays what it was.
    const std::string tuned = "--init-from " + place.out("fresh/best");
    at_step(1, [] { ::raise(SIGTERM); });
    CHECK(train_gpt(place.line("tuned", steps + tuned)).status == 130);
    file_fault() = nullptr;
    run("tuned", small + "--resume auto");
    CHECK(*place.log("tuned")[1].lr == 0.0002);
    CHECK(std::stod(saved("tuned", "learning-rate")) == 0.0002);
    // eval reads as many, too.
    const Outcome eval =
        good(train_gpt("eval --data " + place.data() + " --batch-size 1 " + tuned));
    const auto model = loaded(place.out("fresh/best"), 1, 24);
    const Shards val(place.data() + "/val_*.bin");
    const std::string loss =
        format("%.9g nats", evaluate(*model, evaluation_windows(val, 24, -1), {}).loss());
    CHECK_MESSAGE(contains(eval.out, loss), eval.out);
}

// --- eval

TEST_CASE("run: --eval-tokens limits the evaluations of a run; eval scores all, on the same data") {
    TestRuns place;
    put_file(place.data() + "/dataset.json", "{\"floor\": 1.25}");
    const Outcome run = good(place.train("out", "--max-steps 2 --patience 0 --eval-tokens 20"));
    CHECK(contains(run.out, "--eval-tokens 20: the first of 150 for validation"));
    CHECK(!place.log()[2].floor);  // known of the whole text only
    const auto model = loaded(place.out("out/checkpoint-2"), 1, 8);
    const Shards val(place.data() + "/val_*.bin");
    const Evaluation first = evaluate(*model, evaluation_windows(val, 8, -1, 20), {});
    CHECK(first.tokens == 20);
    CHECK(near(*place.log()[2].val_loss, first.loss(), 1e-8));
    const std::string eval = "eval --threads 1 --init-from " + place.out("out/best");
    const Outcome same = good(train_gpt(eval));
    CHECK(contains(same.out, place.data() + ", as in its training"));
    CHECK(contains(same.out, "over 149 tokens"));
    // The same of shards; data that was moved; other data, where it is named.
    const std::string shards = place.data() + "/val_*.bin";
    good(train_gpt("--vocab-size 257 --n-embd 8 --n-positions 8 --max-steps 1 --train-shards " +
                   place.data() + "/train_*.bin --val-shards " + shards + " --output " +
                   place.out("shards")));
    CHECK(contains(train_gpt("eval --init-from " + place.out("shards/best")).out, shards));
    std::filesystem::rename(place.data(), place.out("moved"));
    train_gpt(eval).check_fails(1, {"was trained on " + place.data() + ", which is not here"});
    good(train_gpt(eval + " --data " + place.out("moved")));
}

TEST_CASE("eval: fine-tuning goes on from the very loss that was saved, to its last digit") {
    for (const char* head : {"", " --untied-head"}) {
        const TestRuns place;
        const std::string val = place.path + "/val.bin", best = place.out("first/best"),
                          shards =
                              " --train-shards " + place.path + "/train.bin --val-shards " + val;
        put_shard(place.path + "/train.bin", noisy_text(2000, 1, 40));
        put_shard(val, noisy_text(333, 2, 40));
        // The validation losses, by step.
        auto run = [&](const std::string& name, const std::string& line) {
            good(train_gpt(line + shards + " --output " + place.out(name) +
                           " --seq-len 16 --batch-size 4 --eval-batches 0 --warmup-steps 50"));
            std::map<double, double> losses;
            for (const LogRow& row : place.log(name))
                if (row.val_loss) losses[*row.step] = *row.val_loss;
            return losses;
        };
        auto first = run("first", std::string("--n-layer 2 --n-head 2 --n-embd 16 --n-positions 32 "
                                              "--vocab-size 40 --max-steps 30 --eval-interval 10 "
                                              "--learning-rate 3e-3") +
                                      head);
        const double saved =
            first.at(double(read_json(best + "/trainer_state.json").get_int("best_step", "", 1)));
        CHECK(saved < 0.97 * first.at(0));
        auto second = run("second", "--max-steps 3 --learning-rate 1e-4 --init-from " + best);
        CHECK(second.at(0) == saved);
        CHECK(second.at(3) != saved);  // and it did train
        // eval says the same. A longer text than the model has positions for is refused.
        const std::string eval =
            "eval --init-from " + best + " --val-shards " + val + " --seq-len ";
        const std::string out = good(train_gpt(eval + "16")).out;
        CHECK(std::stod(out.substr(out.find("val loss   ") + 8)) ==
              doctest::Approx(saved).epsilon(1e-6));
        CHECK(train_gpt(eval + "33").says("--seq-len 33 is longer than the model's 32 positions"));
    }
}

using Tokens = std::vector<uint16_t>;

// A file in llm.c's format (dev/data/hellaswag.py).
std::string hellaswag_bytes(const std::vector<HellaswagExample>& examples) {
    std::vector<int32_t> header = {20240522, 1, int32_t(examples.size()), 0};
    std::string body;
    for (size_t i = 0; i < examples.size(); ++i) {
        const HellaswagExample& e = examples[i];
        Tokens words = {65535, 0, uint16_t(i), uint16_t(e.label), 4};
        auto append = [&](const Tokens& tokens) {
            words.push_back(uint16_t(tokens.size()));
            words.insert(words.end(), tokens.begin(), tokens.end());
        };
        append(e.context);
        for (const Tokens& ending : e.endings) append(ending);
        words[1] = uint16_t(2 * words.size());
        header[3] = std::max<int32_t>(header[3], words[1]);
        body += raw(words);
    }
    header.resize(256);
    return raw(header) + body;
}

// Examples of contexts and endings of many lengths.
std::vector<HellaswagExample> some_examples(int count, int vocab) {
    std::vector<HellaswagExample> examples(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        auto text = [&](int which, uint64_t longest) {
            const size_t length = 1 + random_bits(uint64_t(i), uint64_t(which)) % longest;
            const std::vector<int32_t> tokens =
                random_tokens(length, vocab, uint64_t(5 * i + which));
            return Tokens(tokens.begin(), tokens.end());
        };
        HellaswagExample& e = examples[size_t(i)];
        e.label = i % 4, e.context = text(4, 9);
        for (int k = 0; k < 4; ++k) e.endings[k] = text(k, 7);
    }
    return examples;
}

// By definition: the mean over the ending of -log softmax, a full forward pass for every token.
double ending_loss(Gpt2<Reference<double>>& model, const Tokens& context, const Tokens& ending) {
    std::vector<int32_t> text(context.begin(), context.end());
    double total = 0;
    for (uint16_t token : ending) {
        const std::vector<float> logits = next_logits(model, text, 0);
        double sum = 0;
        for (float logit : logits) sum += std::exp(double(logit));
        total += std::log(sum) - double(logits[token]);
        text.push_back(token);
    }
    return total / double(ending.size());
}

TEST_CASE("eval: HellaSwag is scored by the mean loss of each ending") {
    Threads one(1);
    const Config config{2, 2, 16, 24, 50};
    const ModelFolder folder(config, nullptr, 8);  // sharp logits: no two endings are alike
    std::vector<HellaswagExample> examples = some_examples(12, 50);
    Gpt2<Reference<double>> exact(config);
    exact.reserve(1, 24, Use::generation);
    load_weights(exact, folder.model);
    Gpt2<Cpu> model(config);
    model.reserve(4, 24, Use::evaluation);
    load_weights(model, folder.model);
    // The model's own answers are the labels of two examples in three.
    int right = 0;
    for (size_t i = 0; i < examples.size(); ++i) {
        HellaswagExample& e = examples[i];
        const std::array<double, 4> found = score_endings(model, e);
        std::array<double, 4> expected;
        for (size_t k = 0; k < 4; ++k) {
            expected[k] = ending_loss(exact, e.context, e.endings[k]);
            CHECK(found[k] == doctest::Approx(expected[k]).epsilon(1e-4));
        }
        const auto best = std::min_element(expected.begin(), expected.end()) - expected.begin();
        e.label = int(i % 3 ? best : (best + 1) % 4);
        right += i % 3 != 0;
    }
    put_file(folder / "h.bin", hellaswag_bytes(examples));
    const Outcome ran = good(folder("eval --hellaswag " + folder / "h.bin"));
    CHECK(contains(ran.out, format("%d of 12 right: accuracy %.4f", right, right / 12.0)));

    // A text that is longer than the model's positions loses its beginning, nothing else.
    HellaswagExample e = examples[0];
    e.context = noisy_text(40, 3, 50);
    const std::array<double, 4> found = score_endings(model, e);
    for (size_t k = 0; k < 4; ++k) {
        const size_t kept = 25 - e.endings[k].size();
        const Tokens tail(e.context.end() - ptrdiff_t(kept), e.context.end());
        CHECK(found[k] == doctest::Approx(ending_loss(exact, tail, e.endings[k])).epsilon(1e-4));
    }
}

TEST_CASE("eval: a damaged HellaSwag file is refused, wherever it is cut") {
    TemporaryFolder scratch;
    const std::string path = scratch / "h.bin", good = hellaswag_bytes(some_examples(3, 50));
    auto error = [&](const std::string& bytes) {
        put_file(path, bytes);
        return error_of([&] { read_hellaswag(path, 50); });
    };
    CHECK(error(good) == "");
    for (size_t bytes = 0; bytes < good.size(); ++bytes) {
        if (bytes > 8 && bytes < 1020) continue;
        CAPTURE(bytes);
        const std::string message = error(good.substr(0, bytes));
        CHECK(contains(message, path));
    }
    struct Change {
        size_t at, size;
        int32_t value;
        std::string reason;
    };
    for (const Change& change : std::vector<Change>{
             {0, 4, 20240520, "is no HellaSwag file"},
             {4, 4, 2, "version 1"},
             {8, 4, 4, "ends in the middle"},
             {8, 4, 2, "goes on after its 2 examples"},
             {8, 4, INT32_MAX, "ends in the middle"},
             {1024, 2, 65534, "example 0 is damaged"},
             {1024 + 6, 2, 4, "example 0 is damaged"},  // the label
             {1024 + 8, 2, 3, "example 0 is damaged"},  // how many endings
             {1024 + 10, 2, 0, path},
             {1024 + 12, 2, 50, "token 50 is outside the vocabulary of 50"},
         }) {
        std::string bytes = good;
        std::memcpy(&bytes[change.at], &change.value, change.size);
        CHECK(contains(error(bytes), change.reason));
    }
}

// --- sample

TEST_CASE("sample: it takes its prompt from the command line, a file, a pipe") {
    const ModelFolder folder({1, 2, 16, 32, 257}, &byte_tokens(), 4);
    auto sample = [&](const Arguments& more) {
        return good(folder("sample --max-new-tokens 9 --temperature 0", more)).out;
    };
    const std::string prompt = "naïve 東京\n", text = sample({"--prompt", prompt});
    CHECK(text.starts_with(prompt));
    CHECK(text.size() > prompt.size() + 1);
    put_file(folder / "prompt", prompt);
    CHECK(sample("--prompt-file " + folder / "prompt") == text);
    // Runs it with this standard input.
    auto piped = [&](const std::string& in, const Arguments& more) {
        put_file(folder / "input", in);
        const FileHandle file(::open((folder / "input").c_str(), O_RDONLY));
        const Redirect input(STDIN_FILENO, file.fd);
        std::clearerr(stdin);
        return sample(more);
    };
    CHECK(piped(prompt, "--prompt-file -") == text);
    CHECK(folder("sample --prompt-file " + folder / "none").says(folder / "none"));
    // Several samples: the same greedy one each time, another one from each seed otherwise.
    const std::string two = sample({"--prompt", prompt, "--num-samples", "2"});
    CHECK(two == text + "\n---\n" + text);
    const std::string hot = "--prompt a --temperature 1 --seed 7", a = sample(hot),
                      both = sample(hot + " --num-samples 2");
    CHECK(sample(hot) == a);
    CHECK(both.starts_with(a + "\n---\n"));
    CHECK(both != a + "\n---\n" + a);
    // A conversation: each line is a prompt, and gets the next seed. Without --seed it has its own.
    const std::string second = sample("--prompt b --temperature 1 --seed 8");
    CHECK(piped("a\nb", "--interactive --temperature 1 --seed 7") == a + second);
    CHECK(piped("a\n", "--interactive --temperature 1") !=
          piped("a\n", "--interactive --temperature 1"));
}

TEST_CASE("sample: it stops at the end of text, says when the context slides, shows only UTF-8") {
    Threads one(1);
    TemporaryFolder scratch;
    Gpt2<Cpu> model({1, 1, 8, 12, 257});
    model.initialise(1);
    // The last norm gives the same vector always, so the head's largest row is the likeliest token.
    auto always = [&](int token) {
        std::fill(model.w.wte, model.w.wte + 257 * 8, 0.0f);
        std::fill(model.w.ln_f_weight, model.w.ln_f_weight + 8, 0.0f);
        std::fill(model.w.ln_f_bias, model.w.ln_f_bias + 8, 1.0f);
        std::fill(model.w.wte + token * 8, model.w.wte + token * 8 + 8, 1.0f);
        std::filesystem::remove_all(scratch / "m");
        save_checkpoint(model, scratch / "m", &byte_tokens(), {}, Purpose::use);
        return train_gpt("sample --prompt a --temperature 0 --max-new-tokens 30 --init-from " +
                         scratch / "m");
    };
    const Outcome stops = always(byte_tokens().end_of_text());
    CHECK(stops.out == "a\n");
    CHECK_FALSE(stops.says("forgotten"));
    // 12 positions: full after 11 new tokens, then after every 6 more: at 12, 19 and 26.
    const Outcome goes_on = always(byte_tokens().encode("x")[0]);
    CHECK(goes_on.out == "a" + repeated("x", 30) + "\n");
    CHECK(goes_on.says("outgrew the model's 12 positions: 3 times"));
    // Bytes that are no character never reach the terminal, and no more do tokens without a text.
    CHECK(always(byte_tokens().encode("\xe6")[0]).out == "a" + repeated("\xef\xbf\xbd", 30) + "\n");
    const ModelFolder large({1, 1, 8, 12, 512});
    const Outcome ran = good(large("sample --prompt a --temperature 5 --max-new-tokens 200"));
    CHECK(contains(ran.out, "\xef\xbf\xbd"));
    CHECK(is_utf8(ran.out));
}

TEST_CASE("sample: what is streamed is whole characters, and all of them, however they are cut") {
    const std::string text = "naïve 東京 🙂 é\n";
    for (size_t step = 1; step < 6; ++step) {
        std::string shown, held;
        for (size_t at = 0; at < text.size(); at += step) {
            held += text.substr(at, step);
            const std::string part = take_characters(held, false);
            CHECK(is_utf8(part));
            shown += part;
        }
        CHECK(shown + take_characters(held, true) == text);
    }
}

TEST_CASE("sample: ids that have no token in a padded vocabulary are never drawn") {
    const TestRuns place;
    Gpt2<Cpu> model({1, 1, 8, 16, 320});
    model.initialise(1);
    // Every stream ends as (1, 0, 0, ...), and the ids from 257 on answer to it.
    const auto& w = model.w;
    std::fill(w.ln_f_weight, w.ln_f_weight + 8, 0.0f), w.ln_f_bias[0] = 1;
    for (int id = 257; id < 320; ++id) w.wte[8 * id] = 9;
    save_checkpoint(model, place.out("m"), &byte_tokens(), {}, Purpose::use);
    const std::string from = " --init-from " + place.out("m");
    for (const char* more :
         {"--temperature 0", "--temperature 1", "--top-k 5", "--top-p 0.9", "--show-top 320"})
        CHECK(!contains(good(train_gpt("sample " + (more + from))).out, "<2"));
    // A run's samples, too.
    good(train_gpt(
        place.line("out", "--max-steps 1 --learning-rate 0 --batch-size 2 --seq-len 8" + from)));
    CHECK(!contains(read_file(place.out() + "/samples.txt"), "<2"));
}

// =================================================================================================
// train_gpt.cpp: bench and walk
// =================================================================================================

TEST_CASE("bench: watching a step changes no number of it, and shows every call") {
    const Config config = {2, 1, 8, 4, 11};
    Gpt2<Cpu> plain(config);
    Gpt2<Watched<Cpu>> watched(config);
    const Batch batch = batch_of(2, 4, [](int i) { return i % 11; });
    std::map<std::string, int> calls;
    std::map<std::string, std::vector<double>> sizes;
    watched.device.watcher = [&](const Call& call) {
        ++calls[std::string(call.function)], sizes[std::string(call.function)] = call.sizes;
        watched.device.gelu_forward(watched.a.dx, watched.a.dx, 0);  // no call of the step
        call.make();
    };
    plain.initialise(1), watched.initialise(1);
    plain.reserve(2, 4, Use::training), watched.reserve(2, 4, Use::training);
    for (int s = 0; s < 2; ++s) {
        train_step(plain, {batch, batch}, {}, s);
        train_step(watched, {batch, batch}, {}, s);
    }
    CHECK(plain.get_weights() == watched.get_weights());
    CHECK(plain.state->grad_norm == watched.state->grad_norm);
    // Two steps of two micro-batches of two layers.
    std::string counts;
    for (const auto& [function, count] : calls) counts += to_text(function, " ", count, " ");
    CHECK(counts ==
          "adamw 2 add_loss 4 attention_backward 8 attention_forward 8 begin_step 2 "
          "embed_backward 4 embed_forward 4 head_forward_backward 4 judge_step 2 "
          "layernorm_backward 20 layernorm_forward 20 linear_backward 24 "
          "linear_forward 8 linear_gelu_backward 8 "
          "linear_gelu_forward 8 linear_residual_forward 16 norm_of_sums 2 square_sums 2 ");
    CHECK(sizes["linear_forward"] == std::vector<double>{8, 8, 24});
    CHECK(sizes["adamw"][0] == double(plain.layout.size));
}

TEST_CASE("bench: a row for every function and linear layer") {
    const Options options = parse_options(Arguments("bench --n-embd 8 --n-head 1"));
    const Outcome ran = outcome_of([&] { return Bench(Machine<float>(), options).run(0), 0; });
    auto calls = [&](const std::string& row) {
        CAPTURE(row);
        const size_t at = ran.out.find("\n" + row + "  ");
        REQUIRE(at != std::string::npos);
        return std::stoi(ran.out.substr(at + 1 + row.size()));
    };
    CHECK(calls("layernorm") == 5);
    CHECK(calls("d layernorm") == 5);
    for (const char* layer : {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"})
        for (const char* way : {"linear ", "d linear "})
            CHECK(calls(way + std::string(layer)) == 2);
    CHECK(calls("attention") == 2);
    CHECK(calls("d attention") == 2);
    for (const char* row : {"embed", "d embed", "head, both ways", "gradient norm", "adamw"})
        CHECK(calls(row) == 1);
    for (const char* rows : {"256 rows", "1024 rows", "4096 rows"})
        CHECK(ran.out.find(rows) != std::string::npos);
}

TEST_CASE("walk: every line that the header quotes is printed") {
    const std::string walk = train_gpt("walk").out;
    const std::string header = tinygpt::read_file("tinygpt.hpp");
    int quoted = 0;
    for (size_t at = 0; (at = header.find("//   walk> ", at)) != std::string::npos;) {
        at += 11;
        const std::string line = header.substr(at, header.find('\n', at) - at);
        CHECK_MESSAGE(walk.find(line) != std::string::npos, "the walk does not print: ", line);
        ++quoted;
    }
    CHECK(quoted >= 8);
    // The two columns of the gradient table agree, and so do the update by hand and the program's.
    const size_t by_hand = walk.find(" = 0.240565\n"),
                 program = walk.find("and the program has 0.240565\n");
    CHECK(by_hand != std::string::npos);
    CHECK(program != std::string::npos);
}

// =================================================================================================
// train_gpt.cpp: show
// =================================================================================================

TEST_CASE("show: the page's numbers are the model's, and text stays text") {
    const TemporaryFolder folder;
    const Config config = {2, 2, 16, 32, 257};
    const Tokenizer tokenizer = Tokenizer::bytes();
    {
        Gpt2<Cpu> model(config);
        model.initialise(11);
        for (size_t i = 0; i < model.layout.size; ++i) model.weights[i] *= 12;
        save_checkpoint(model, folder / "model", &tokenizer, {}, Purpose::use);
    }
    const std::string text = "</script><b>\"'&\\ \xff";
    const Outcome ran = train_gpt({"show", "--init-from", folder / "model", "--prompt", text,
                                   "--output", folder / "page.html"});
    REQUIRE(ran.status == 0);
    const std::string html = read_file(folder / "page.html");
    const std::string mark = "id=\"data\">";
    const size_t begin = html.find(mark) + mark.size(), end = html.find("</script>", begin);
    const std::string json = html.substr(begin, end - begin);
    CHECK(json.find('<') == json.npos);
    const Json page = Json::parse(json, "page");
    // The same text through the reference device, in double.
    std::vector<int32_t> tokens = prompt_tokens(text, tokenizer, 257);
    tokens.insert(tokens.begin(), 256);
    CHECK(page.find("texts")->find(std::to_string(tokens.back()))->text == "\\xff");
    const int T = int(tokens.size()), C = config.n_embd, V = config.vocab_size;
    Gpt2<Reference<double>> model(config);
    load_weights(model, folder / "model");
    model.reserve(1, T, Use::training);
    Batch batch = batch_of(1, T, [&](int i) { return i < T ? tokens[size_t(i)] : kIgnore; });
    const std::vector<double> losses = batch_losses(model, batch);
    auto items = [](const Json& list) {
        std::vector<double> values;
        for (auto& [name, value] : list.members) values.push_back(value.as<double>().value_or(NAN));
        return values;
    };
    const std::vector<double> surprise = items(*page.find("surprise"));
    REQUIRE(int(surprise.size()) == T);
    for (int t = 1; t < T; ++t)
        CHECK(surprise[size_t(t)] ==
              doctest::Approx(losses[size_t(t - 1)] / std::log(2)).epsilon(1e-4));
    // Attention of both layers: each row adds up to 1, and is e^(q.k / sqrt(8) - lse).
    const std::string letters = kBase64, code = page.find("attention")->text;
    REQUIRE(code.size() == size_t(2 * 2 * 2 * (T * (T + 1) / 2)));
    size_t at = 0;
    for (int layer = 0; layer < 2; ++layer)
        for (int h = 0; h < 2; ++h)
            for (int t = 0; t < T; ++t) {
                const auto& l = model.a.layers[size_t(layer)];
                double sum = 0;
                for (int t2 = 0; t2 <= t; ++t2, at += 2) {
                    const double p =
                        double(letters.find(code[at]) * 64 + letters.find(code[at + 1])) / 4095;
                    const double *q = l.qkv + t * 3 * C + 8 * h,
                                 *k = l.qkv + t2 * 3 * C + C + 8 * h;
                    const double wanted = std::exp(
                        std::inner_product(q, q + 8, k, 0.0) / std::sqrt(8.0) - l.lse[h * T + t]);
                    CHECK(std::abs(p - wanted) < 1.01 / 4095);
                    sum += p;
                }
                CHECK(std::abs(sum - 1) < 1e-9);
            }
    // The last lens is the model's own answer; the first, the embedding's.
    std::vector<double> logits(static_cast<size_t>(V));
    model.device.head_logits(logits.data(), model.a.ln_f + (T - 1) * C, model.w.lm_head, 1, C, V);
    const auto best = candidates({logits.begin(), logits.end()}, 1);
    const Json& lens = page.find("lens")->members[2].second;
    CHECK(int(page.find("lens")->members.size()) == 3);
    const int token = int(items(*lens.find("token")).back());
    CHECK(items(*lens.find("p")).back() ==
          doctest::Approx(best[size_t(token)].probability).epsilon(1e-4));
    double norm = 0;
    for (int c = 0; c < C; ++c) norm += std::pow(model.a.embedded[c], 2);
    CHECK(items(*page.find("lens")->members[0].second.find("norm"))[0] ==
          doctest::Approx(std::sqrt(norm)).epsilon(1e-5));
    CHECK(train_gpt({"show", "--init-from", folder / "model", "--runs", "out/a"}).status == 2);
    CHECK(train_gpt({"show", "--runs", folder / "none"}).status == 1);
}

// =================================================================================================
// train_gpt.cpp: export
// =================================================================================================

// A reader of its own for what export writes: llama.cpp itself reads it in `make test_hf`.
struct Gguf {
    std::string bytes;
    size_t at = 0;
    std::map<std::string, std::string> members;  // texts as they are, lists joined by '|'
    struct Tensor {
        std::vector<uint64_t> sizes;
        uint32_t type;
        uint64_t begin;
    };
    std::map<std::string, Tensor> tensors;

    template <class Number>
    Number take() {
        Number value;
        REQUIRE(at + sizeof value <= bytes.size());
        std::memcpy(&value, &bytes[at], sizeof value);
        at += sizeof value;
        return value;
    }
    std::string take_text() {
        const size_t length = take<uint64_t>();
        at += length;
        return bytes.substr(at - length, length);
    }
    std::string take_value(uint32_t type) {
        if (type == 4) return to_text(take<uint32_t>());
        if (type == 5) return to_text(take<int32_t>());
        if (type == 6) return to_text(double(take<float>()));
        if (type == 7) return take<bool>() ? "true" : "false";
        if (type == 8) return take_text();
        REQUIRE(type == 9);
        const uint32_t inner = take<uint32_t>();
        const uint64_t count = take<uint64_t>();
        std::string list;
        for (uint64_t i = 0; i < count; ++i) list += (i ? "|" : "") + take_value(inner);
        return list;
    }
    explicit Gguf(const std::string& path) : bytes(read_file(path)) {
        REQUIRE(bytes.starts_with("GGUF"));
        at = 4;
        CHECK(take<uint32_t>() == 3);
        const uint64_t tensor_count = take<uint64_t>(), member_count = take<uint64_t>();
        for (uint64_t i = 0; i < member_count; ++i) {
            const std::string name = take_text();
            members[name] = take_value(take<uint32_t>());
        }
        for (uint64_t i = 0; i < tensor_count; ++i) {
            Tensor& tensor = tensors[take_text()];
            tensor.sizes.resize(take<uint32_t>());
            for (uint64_t& size : tensor.sizes) size = take<uint64_t>();
            tensor.type = take<uint32_t>(), tensor.begin = take<uint64_t>();
            CHECK(tensor.begin % 32 == 0);
        }
        for (auto& [name, tensor] : tensors) tensor.begin += round_up(at, size_t(32));
    }
    // The next number of a tensor.
    double take_element(uint32_t type) {
        if (type == 0) return double(take<float>());
        const uint16_t half = take<uint16_t>();
        return type == 1 ? double(float(f16{half})) : double(std::bit_cast<float>(half << 16));
    }
};

TEST_CASE("export: a GGUF file has every weight where llama.cpp looks for it, in three types") {
    TemporaryFolder scratch;
    const std::string path = scratch / "m.gguf";
    const Tokenizer tokenizer({{0, 1}, {256, 2}, {220, 83}});
    const std::pair<const char*, const char*> names[] = {{"wte", "token_embd"},
                                                         {"wpe", "position_embd"},
                                                         {"lm_head", "output"},
                                                         {"ln_f", "output_norm"},
                                                         {"h.", "blk."},
                                                         {"ln_1", "attn_norm"},
                                                         {"attn.c_attn", "attn_qkv"},
                                                         {"ln_2", "ffn_norm"},
                                                         {"mlp.c_fc", "ffn_up"},
                                                         {"attn.c_proj", "attn_output"},
                                                         {"mlp.c_proj", "ffn_down"}};
    for (bool untied : {false, true}) {
        Config config{2, 3, 12, 7, 300, untied};
        config.layer_norm_epsilon = 1e-6;
        Gpt2<Cpu> model(config);
        model.initialise(5);
        for (size_t i = 0; i < model.layout.size; ++i) model.weights[i] += 0.01f * float(i % 7);
        save_checkpoint(model, scratch / "m", &tokenizer, {}, Purpose::use);
        for (auto [type, number, file_type, unit, least] : {std::tuple{"f32", 0, "0", 0.0, 0.0},
                                                            {"f16", 1, "1", 0x1p-11, 0x1p-25},
                                                            {"bf16", 30, "32", 0x1p-8, 0.0}}) {
            good(train_gpt(to_text("export --init-from ", scratch / "m", " --output ", path,
                                   " --type ", type)));
            Gguf gguf(path);
            const Arguments members =
                "general.architecture gpt2 gpt2.block_count 2 gpt2.context_length 7 "
                "gpt2.embedding_length 12 gpt2.feed_forward_length 48 gpt2.attention.head_count 3 "
                "gpt2.attention.layer_norm_epsilon 1e-06 tokenizer.ggml.model gpt2 "
                "tokenizer.ggml.pre gpt-2 tokenizer.ggml.bos_token_id 259 "
                "tokenizer.ggml.eos_token_id 259 tokenizer.ggml.add_bos_token false";
            for (size_t i = 0; i < members.size(); i += 2)
                CHECK_MESSAGE(gguf.members.at(members[i]) == members[i + 1], members[i]);
            CHECK(gguf.members.at("general.file_type") == file_type);
            CHECK(gguf.members.at("tokenizer.ggml.merges") == "! \"|!\" #|\u0120 t");
            const auto tokens = split_at(gguf.members.at("tokenizer.ggml.tokens"), '|'),
                       kinds = split_at(gguf.members.at("tokenizer.ggml.token_type"), '|');
            CHECK(tokens.size() == 260 + 1 + 2);  // '|' itself, and the two of <|endoftext|>
            CHECK(kinds.size() == 260);
            CHECK(kinds[0] + kinds[259] == "13");
            CHECK(gguf.tensors.size() == model.layout.tensors.size());
            for (const TensorInfo& t : model.layout.tensors) {
                std::string name = t.name;
                for (auto [ours, theirs] : names) name = replaced(name, ours, theirs);
                CAPTURE(name);
                // A linear layer's [in, out] is turned; of the embeddings only tokens are there.
                const bool matrix = t.shape.size() == 2, turned = matrix && name.starts_with("blk");
                const bool small = !matrix || name.starts_with("position");
                std::vector<uint64_t> sizes(t.shape.begin(), t.shape.end());
                if (!turned) std::reverse(sizes.begin(), sizes.end());
                if (matrix && sizes[1] == 300) sizes[1] = 260;
                const Gguf::Tensor& tensor = gguf.tensors.at(name);
                REQUIRE(tensor.sizes == sizes);
                CHECK(int(tensor.type) == (small ? 0 : number));
                gguf.at = tensor.begin;
                for (size_t j = 0; j < (matrix ? sizes[1] : 1); ++j)
                    for (size_t i = 0; i < sizes[0]; ++i) {
                        const size_t at = turned ? i * sizes[1] + j : j * sizes[0] + i;
                        const double value = double(model.weights[t.offset + at]);
                        REQUIRE(std::abs(gguf.take_element(tensor.type) - value) <=
                                (small ? 0 : unit * std::abs(value) + least));
                    }
            }
        }
        remove_folder(scratch / "m");
    }
}

TEST_CASE("export: halves are rounded to the nearest, ties to even") {
    for (uint32_t half = 0; half < 0x7c00; ++half)
        for (uint32_t sign : {0u, 0x8000u}) {
            const uint16_t bits = uint16_t(half | sign), next = uint16_t(bits + 1);
            const double x = double(float(f16{bits}));
            const double y = half == 0x7bff ? x * (65536 / 65504.0) : double(float(f16{next}));
            REQUIRE(f16_bits(float(x)) == bits);
            const float middle = float((x + y) / 2);
            REQUIRE(f16_bits(middle) == (bits & 1 ? next : bits));
            REQUIRE(f16_bits(std::nextafterf(middle, float(x))) == bits);
            REQUIRE(f16_bits(std::nextafterf(middle, float(y))) == next);
        }
    for (float large : {65536.0f, 1e10f, 3.4e38f, INFINITY}) {
        CHECK(f16_bits(large) == 0x7c00);
        CHECK(f16_bits(-large) == 0xfc00);
    }
}

TEST_CASE("export: what cannot be exported is refused, and no file is left") {
    TemporaryFolder scratch;
    const Tokenizer tokenizer = Tokenizer::bytes();
    Gpt2<Cpu> model({1, 1, 8, 16, 257});
    model.initialise(1);
    model.w.h[0].c_fc_weight[7] = 65520;
    save_checkpoint(model, scratch / "m", &tokenizer, {}, Purpose::use);
    save_checkpoint(model, scratch / "ids", nullptr, {}, Purpose::use);
    const std::string file = scratch / "m.gguf", m = " --init-from " + scratch / "m",
                      to = " --output " + file;
    for (const auto& [more, status, says] : std::vector<std::tuple<std::string, int, std::string>>{
             {to, 2, "--init-from is missing"},
             {m, 2, "--output is missing"},
             {m + to + " --type q4", 2, "one of f32|f16|bf16"},
             {" --init-from " + scratch / "ids" + to, 1, "has no tokenizer"},
             {m + " --output " + scratch / "none/m.gguf", 1, "cannot write"},
             {m + to + " --type f16", 1,
              "tensor transformer.h.0.mlp.c_fc.weight: a weight is beyond 65504"}}) {
        train_gpt("export" + more).check_refused(status, {says});
        CHECK(!file_exists(file));
    }
    good(train_gpt("export --type bf16" + m + to));
}

// =================================================================================================
// train_gpt.cpp: main, and what uses the header
// =================================================================================================

TEST_CASE("run: what users once stumbled over") {
    Runs place;
    const std::string odd = place.path + "/a [b]*?\\ \"c\" \xff", name = "o[u]t \xff";
    copy(place.data(), odd);
    good(place.train(name, {"--data", odd}));
    check_same_end(place.out("straight"), place.out(name));
    place.resume(name, {"--data", odd});
    // What prepare_data says to type next, where a path has a blank.
    put_file(place.path + "/text", "some text");
    const Outcome prepared =
        prepare({"--input", place.path + "/text", "--output", place.out("a b")});
    CHECK_MESSAGE(contains(prepared.out, "./train_gpt --data '" + place.out("a b") + "' "),
                  prepared.out);
    // Numbers instead of text: the prompt's last and the model's first are two.
    const Outcome numbers =
        good(train_gpt("--n-embd 8 --max-steps 1 --seq-len 8 --batch-size 2 --train-shards " +
                       place.data() + "/train_*.bin --output " + place.out("none")));
    const Outcome sample = train_gpt({"sample", "--init-from", place.out("none/best"), "--prompt",
                                      "1 2", "--max-new-tokens", "3", "--threads", "1"});
    CHECK_MESSAGE(sample.out.starts_with("1 2 "), sample.out);
    CHECK_MESSAGE(std::count(sample.out.begin(), sample.out.end(), ' ') == 5, sample.out);
    // Quiet: all is in the folder, and nothing on the screen.
    const Outcome quiet = good(place.train("quiet", "--quiet"));
    CHECK(quiet.out + quiet.err == "");
    check_same_end(place.out("straight"), place.out("quiet"));
    // A thread that cannot be started is a message, not an abort.
    const Outcome no_thread = outcome_of([&] {
        return train_gpt_status({}, [](const Options&) -> int {
            throw std::system_error(EAGAIN, std::generic_category());
        });
    });
    no_thread.check_refused(1, {"error: "});
    // What a command printed must have arrived. A run is in its folder all the same.
    auto full = [] { return ::open("/dev/full", O_WRONLY); };
    train_gpt("info", full())
        .check_fails(1, {"cannot write what is printed: No space left on device"});
    CHECK(train_gpt(place.arguments("out", "--max-steps 2"), full()).status == 0);
}

TEST_CASE("run: the program of docs/embedding.cpp trains, saves, loads and samples") {
    TestRuns place;
    auto embedding = [](const Arguments& arguments) {
        return outcome_of([&] { return run_main(arguments, embedding_main); });
    };
    const Outcome run = good(embedding({"embedding", place.data(), place.out(), "61"}));
    double first = 0, last = 0;
    std::sscanf(run.out.c_str(), "step 0: loss %lf", &first);
    std::sscanf(run.out.c_str() + run.out.find("step 60: "), "step 60: loss %lf", &last);
    CHECK(std::abs(first - std::log(257)) < 0.1);
    CHECK(last < 0.6 * first);
    const Outcome sample =
        good(train_gpt({"sample", "--init-from", place.out("out/model"), "--threads", "1"}));
    CHECK(embedding({"embedding", place.data()}).status == 2);
    CHECK(embedding({"embedding", place.out(), place.out(), "1"}).status == 1);
}

TEST_CASE("readme: the training step it shows is the header's") {
    const std::string readme = tinygpt::read_file("README.md");
    const size_t begin = readme.find("```cpp\n"), end = readme.find("```", begin + 7);
    REQUIRE(end != std::string::npos);
    const std::string shown = readme.substr(begin + 7, end - begin - 7);
    CHECK(shown.find("train_step") != std::string::npos);
    CHECK(tinygpt::read_file("tinygpt.hpp").find(shown) != std::string::npos);
}

// =================================================================================================
// prepare_data.cpp
// =================================================================================================
// Text into shards: what is text, passes over it, vocabularies, the stories, models of llm.c.

// --- Options, input, and what is text

TEST_CASE("prepare_data: options") {
    PrepareOptions o = parse_prepare_options(
        split_at("--input a b --vocab_size=300 --tokenizer byte --tokenizer=bpe --output x "
                 "--val-fraction 0",
                 ' '));
    CHECK(o.input == std::vector<std::string>{"a", "b"});
    CHECK(o.vocab_size == 300);
    CHECK(o.tokenizer == "bpe");
    CHECK(o.val_fraction == 0);
    for (const char* bad :
         {"12x", "256", "65537", "-1", "0", "1e3", "99999999999999999999", " 300", "nan"})
        CHECK(prepare_data({"--vocab-size", bad}) ==
              "2: --vocab-size must be a whole number in [257, 65536], got " + shown(bad));
    for (const char* bad : {"1", "-0.1", "nan", "inf", "half", "0.1x"})
        CHECK(contains(prepare_data({"--val-fraction", bad}), "2: --val-fraction must be"));
    const std::pair<const char*, const char*> cases[] =
        {{"--field body", "2: --field is for --input FILE"},
         {"--vocabsize 300",
          "2: unknown option --vocabsize; did you mean --vocab-size? (--help lists all options)"},
         {"--shard-tokens=0", "2: --shard-tokens must be"},
         {"--output", "2: --output needs a value"},
         {"--input x", "2: --input needs --output"},
         {"--from-llmc x", "2: --from-llmc needs --output"},
         {"--tokenizer word", "2: --tokenizer must be one of bpe|byte|gpt2, got word"},
         {"--tokenizer byte --vocab-size 300", "2: --vocab-size is for --tokenizer bpe"},
         {"--tokenizer bpe --vocab x", "2: --vocab is for --tokenizer gpt2"},
         {"--input x --output y --seed 2", "2: --seed is for the default corpus"}};
    for (const auto& [arguments, error] : cases)
        CHECK(contains(prepare_data(split_at(arguments, ' ')), error));
}

// Prepares the inputs, with a token for each byte; returns what was printed, and behind it the text
// of the shards, training and validation, where there are any.
inline std::string prepared_text(const TemporaryFolder& temporary, const Arguments& inputs,
                                 const Arguments& more = {}) {
    const std::string out = temporary / "out";
    std::filesystem::remove_all(out);
    const Outcome ran =
        prepare("--input" + inputs + "--output " + out + " --tokenizer byte" + more);
    std::string text = ran.out + ran.err;
    for (const char* shard : {"/train_000001.bin", "/val_000000.bin"})
        if (file_exists(out + shard))
            text += "\n" + Tokenizer::bytes().decode(shard_tokens(out + shard), "|");
    return text;
}

TEST_CASE("prepare_data: what is no text is named, with what makes text of it") {
    const std::string prose = "It was the best of times, it was the worst of times.\n";
    std::string wide, swapped, noise;
    for (char c : prose) wide += c, wide += '\0', swapped += '\0', swapped += c;
    for (int i = 0; i < 100; ++i) noise += char(1 + i * 37 % 255);
    const std::string zip("PK\x03\x04\x14\0\x06\0", 8), zeros(20, '\0');
    struct Case {
        std::string bytes;
        const char *kind, *remedy;
    };
    const Case cases[] = {{"\x1f\x8b\x08" + noise, "gzip", "zcat ~ | ./prepare_data --input -"},
                          {"BZh91AY&SY" + noise, "bzip2", "bzcat ~ |"},
                          {"\xfd\x37zXZ" + zeros, "xz", "xzcat ~ |"},
                          {"\x28\xb5\x2f\xfd" + noise, "zstd", "zstdcat ~ |"},
                          {zip + "[Content_Types].xml", "an Office document", "pandoc -t plain ~"},
                          {zip + "mimetypeapplication/epub+zip", "an EPUB book", "pandoc"},
                          {zip + "mimetypeapplication/vnd.oasis.opendocument.text",
                           "an OpenDocument file", "pandoc"},
                          {zip + "book.txt", "a zip archive", "unzip ~"},
                          {"\xd0\xcf\x11\xe0\xa1\xb1" + zeros, "an old Office document", "txt ~"},
                          {"{\\rtf1\\ansi " + prose, "an RTF document", "pandoc"},
                          {"%PDF-1.7\n" + noise, "PDF", "pdftotext ~"},
                          {"PAR1" + noise, "parquet", "pandas.read_parquet('~')"},
                          {"\xff\xfe" + wide, "UTF-16", "iconv -f UTF-16 -t UTF-8 ~ > ~.txt"},
                          {"\xfe\xff" + swapped, "UTF-16", "iconv -f UTF-16 -t"},
                          {wide, "binary data", "iconv -f UTF-16LE ~"},
                          {"\xff\xfe" + zeros, "UTF-32", "iconv -f UTF-32"},
                          {"\x89PNG\r\n\x1a\n" + zeros + noise, "binary data", "text"},
                          {"\177ELF" + zeros, "binary data", "text"},
                          {prose + '\0' + prose, "binary data", "text"},
                          {std::string(30, '\x02') + prose, "binary data", "text"},
                          {"version https://git-lfs.github.com/spec/v1\noid x", "a pointer to a",
                           "git lfs pull"},
                          {"[\n  {\"id\": 1, \"text\": \"x\"},\n", "a JSON array",
                           "jq -c '.[]' ~"}};
    for (const Case& c : cases) {
        TemporaryFolder temporary;
        make_folders(temporary / "in");
        const std::string file = temporary / "in/FILE", text = temporary / "in/text";
        put_file(file, c.bytes), put_file(text, prose);
        CAPTURE(c.kind);
        const std::string remedy = replaced(c.remedy, "~", file);
        const std::string named = prepared_text(temporary, file);
        CHECK_MESSAGE(contains(named, "1: " + file + " is no text but " + c.kind), named);
        CHECK_MESSAGE(contains(named, remedy), named);
        CHECK_FALSE(folder_exists(temporary / "out"));
        const std::string in_folder = prepared_text(temporary, {temporary / "in"});
        CHECK_MESSAGE(contains(in_folder, to_text("passed over (", c.kind)), in_folder);
        CHECK(contains(in_folder, "1 file"));
        CHECK(contains(in_folder, "\n|It was the best of times, it"));
    }
    // What is text, though it may not look so.
    TemporaryFolder temporary;
    for (const std::string text :
         {"caf\xe9\n", "\x1b[31mred\x1b[0m", "{\"a\": 1}", "[x]\n{y}", "PK",
          "\xef\xbb\xbf\xd0\xb4\xd0\xb0", "a\fb\x01 and so on, and on"}) {
        put_file(temporary / "text", text);
        const std::string out =
            prepared_text(temporary, {temporary / "text"}, {"--val-fraction=0"});
        CHECK_MESSAGE(out.ends_with("\n|" + text.substr(text[0] == '\xef' ? 3 : 0)), out);
    }
}

TEST_CASE("prepare_data: lines of JSON are told by what is in them; --field says which text") {
    TemporaryFolder temporary;
    const std::string path = temporary / "file.json";
    struct Case {
        std::string bytes, more, found;
    };
    const std::string two =
        "{\"title\": \"A\", \"text\": \"x y\"}\n{\"text\": \"z\", \"title\": \"B\"}\n";
    const std::string bodies = "{\"body\": \"one\"}\n\n{\"body\": \"two\"}";
    const Case cases[] =
        {{two, "", "\n|x y|z"},
         {"\xef\xbb\xbf" + two, "", "left out the byte-order mark of 1 file"},
         {"\xef\xbb\xbf" + two, "", "\n|x y|z"},
         {two, "--field title", "\n|A|B"},
         {two, "--field none",
          "line 1: \"none\" is missing; say with --field which to read: title, text"},
         {bodies, "--field body", "\n|one|two"},
         {bodies, "", "line 1: \"text\" is missing; say with --field which to read: body"},
         {"{\"text\": \"alone\"}", "", "\n|alone"},
         {"{\"name\": \"package\"}", "", "\n|{\"name\": \"package\"}"},
         {"{\n  \"text\": \"pretty\"\n}\n", "", "\n|{\n  \"text\""},
         {"{x}\n{\"text\": \"y\"}\n", "", "\n|{x}\n{"},
         {two + "{\"text\": 3}\n", "", "line 3: \"text\" must be a string, found a number"},
         {two + "{\"text\": \"a\xff\"}\n", "", "line 3: not valid JSON"},
         {"plain\n", "--field body", "2: --field body is for lines of JSON"}};
    for (const Case& c : cases) {
        put_file(path, c.bytes);
        const std::string out = prepared_text(temporary, path, "--val-fraction 0 " + c.more);
        CHECK_MESSAGE(contains(out, c.found), out);
    }
    // The first error in the file's order is the one that is told, on any number of threads.
    std::string many;
    for (int i = 0; i < 60'000; ++i)
        many += i % 20'000 == 19'999 ? "{}\n" : "{\"text\": \"abc\"}\n";
    put_file(path, many);
    CHECK(contains(prepared_text(temporary, {path}), "line 20000: \"text\" is missing"));
}

TEST_CASE("prepare_data: standard input and pipes; links to nothing; input and output apart") {
    TemporaryFolder temporary;
    const std::string text = temporary / "text", in = temporary / "in";
    put_file(text, "abc def");
    {
        const FileHandle file(::open(text.c_str(), O_RDONLY));
        const Redirect input(STDIN_FILENO, file.fd);
        const std::string out = prepared_text(temporary, "- " + text, "--val-fraction 0");
        CHECK(contains(out, "standard input, " + text));
        CHECK(contains(out, "\n|abc def|abc def"));
        CHECK(contains(out, "out --seq-len 1\n"));          // so that the next command can work
        CHECK(list_folder(temporary / "out").size() == 5);  // and nothing of the copy
    }
    REQUIRE(::mkfifo((temporary / "pipe").c_str(), 0600) == 0);
    std::thread writer([&] { std::ofstream(temporary / "pipe") << "{\"text\": \"piped\"}\n"; });
    CHECK(contains(prepared_text(temporary, temporary / "pipe", "--val-fraction=0"), "\n|piped"));
    writer.join();
    // In a folder.
    make_folders(in + "/deep");
    std::filesystem::create_symlink("nowhere", in + "/gone");
    std::filesystem::create_directory_symlink(in, in + "/deep/round");
    std::filesystem::create_symlink(text, in + "/deep/good");
    const std::string out = prepared_text(temporary, {in});
    CHECK(contains(out, "passed over (a link to nothing) 1 file, such as " + in + "/gone"));
    CHECK(contains(out, "passed over (a link to a folder) 1 file, such as " + in + "/deep/round"));
    CHECK(contains(out, "\n|abc de\n|f"));
    // Where a second run would read what the first has written, the first is refused.
    std::filesystem::create_directory_symlink(temporary.path, temporary / "link");
    const std::array<std::string, 3> cases[] = {{"", "/out", "2: --output"},
                                                {"", "", "2: --output"},
                                                {"/link", "/in/out", "2: --output"},
                                                {"/in", "/link/in/x/y", "2: --output"},
                                                {"/in/vocab.json", "/in", "would replace"},
                                                {"/in/deep", "/in", ""},
                                                {"/in/deep/good", "/in/deep", ""},
                                                {"/in", "/in2", ""}};
    put_file(in + "/vocab.json", "{}");
    for (const auto& [input, output, error] : cases) {
        check_error(prepare_data("--tokenizer byte --input " + temporary.path + input +
                                 " --output " + temporary.path + output),
                    error);
    }
}

TEST_CASE("prepare_data: documents keep their order and their bytes") {
    TemporaryFolder temporary;
    make_folders(temporary / "in/b");
    put_file(temporary / "in/b/1.md", "one\r\n");
    put_file(temporary / "in/a.jsonl",
             "\xef\xbb\xbf{\"text\": \" x\\n\", \"id\": 1}\n\n{\"id\": 2, \"text\": "
             "\"\\u732b\\ud83d\\udc31\"}\r\n{\"text\": \"\"}\n");
    put_file(temporary / "in/c", "\xff\xfd");
    put_file(temporary / "in/.hidden", "no");
    put_file(temporary / "in/empty", "");
    PrepareOptions o;
    o.output = temporary / "out";
    o.input = {temporary / "in/c", temporary / "in"};
    const Input input = find_input(o, temporary.path);
    using Texts = std::vector<std::string>;
    CHECK(texts_of(input.sources) ==
          Texts{"\xff\xfd", " x\n", "\u732b\U0001f431", "", "one\r\n", "\xff\xfd"});
    CHECK(input.empty == 1);
    // Several documents are divided by documents, the validation part rounded up.
    const Split split = divide(input.sources, 0.3, temporary.path);
    CHECK(split.all.documents == 5);
    CHECK(split.all.empty == 1);
    CHECK(texts_of(split.train) == Texts{"\xff\xfd", " x\n", "\u732b\U0001f431"});
    CHECK(texts_of(split.val) == Texts{"", "one\r\n", "\xff\xfd"});
    // One is divided by characters, whole ones, in lines of JSON too.
    const std::string cats = "\u732b\u732b\u732b\u732b", single = cats + "\377a" + cats;
    const auto divided = [&](const std::string& text, double fraction) {
        put_file(temporary / "single", text);
        const std::string field = text[0] == '{' ? "t" : "";
        return divide({{temporary / "single", field, 0, text.size()}}, fraction, temporary.path);
    };
    CHECK(texts_of(divided(single, 0.5).train) == Texts{cats + "\xff"});
    CHECK(texts_of(divided(single, 0.5).val) == Texts{"a" + cats});
    CHECK(texts_of(divided("{\"t\": \"\"}\n{\"t\": \"" + cats + "\"}", 0.25).val) ==
          Texts{"\u732b"});
    CHECK(divided(single, 0).val.empty());
    CHECK(contains(error_of([&] { divided("a", 0.1); }), "only 1 characters"));
}

TEST_CASE("prepare_data: bad input ends in one line, and nothing is written") {
    TemporaryFolder temporary;
    put_file(temporary / "text", "some text");
    put_file(temporary / "empty", "");
    put_file(temporary / "bad.jsonl", "{\"text\": \"x\"}\n{\"text\": \"y\"\n");
    put_file(temporary / "other.jsonl", "{\"text\": \"x\"}\n{\"body\": \"y\"}\n");
    put_file(temporary / "list.jsonl", "[1]\n");
    for (const char* folder : {"nothing", "links", "foreign"}) make_folders(temporary / folder);
    std::filesystem::create_symlink("nowhere", temporary / "links/gone");
    put_file(temporary / "foreign/train_000001.bin", "x");  // somebody else's
    // --input and --output, where ~ is the folder, and the error.
    const std::array<std::string, 3> cases[] =
        {{"~missing", "~out", "1: cannot read"},
         {"~links", "~out", "1: there is no text in the input"},
         {"~empty", "~out", "1: there is no text in the input"},
         {"~nothing", "~out", "1: there is no text in the input"},
         {"~bad.jsonl", "~out", "bad.jsonl, line 2: not valid JSON"},
         {"~other.jsonl", "~out", "other.jsonl, line 2: \"text\" is missing"},
         {"~list.jsonl", "~out", "list.jsonl, line 1: expected an object"},
         {"~text", "~out --tokenizer gpt2 --vocab ~nothing", "there is no tokenizer in"},
         {"~text", "~text", "cannot create folder"},
         {"~text", "~text/deeper", "cannot create folder"},
         {"~text", "~foreign", "no dataset.json"}};
    for (const auto& [input, output, error] : cases) {
        check_error(prepare_data(
                        replaced("--input " + input + " --output " + output, "~", temporary / "")),
                    error);
        CHECK_FALSE(folder_exists(temporary / "out"));
    }
    CHECK(read_file(temporary / "foreign/train_000001.bin") == "x");
}

// --- Passes over the text

TEST_CASE("prepare_data: the text may be cut where last_cut says") {
    for (uint64_t seed = 0; seed < 300; ++seed) {
        std::string text = random_text(seed, 100);
        std::vector<std::string> whole = pieces_of(text);
        for (size_t at = text.size(); at > 0; at = last_cut(text.substr(0, at))) {
            std::vector<std::string> parts = pieces_of(text.substr(0, at));
            for (const std::string& piece : pieces_of(text.substr(at))) parts.push_back(piece);
            CHECK(parts == whole);
        }
    }
}

TEST_CASE("prepare_data: chunks of any size are the text, whatever is in it") {
    TemporaryFolder folder;
    std::vector<std::string> texts = {std::string(10'000, 'a'), std::string(3, ' '), "x", " y z "};
    for (uint64_t seed = 0; seed < 6; ++seed) texts.push_back(random_text(seed, 700));
    texts.push_back(std::string(9'000, 'b') + " c " + std::string(9'000, 'd'));
    std::string lines = "\n";
    for (const std::string& text : texts)
        lines += Json::object().set("t", text).write() + (text.size() % 2 ? "\n" : "\r\n \n");
    std::vector<Source> sources = sources_of(folder, texts);
    put_file(folder / "lines", lines);
    sources.push_back({folder / "lines", "t", 0, lines.size()});
    sources.push_back({folder / "lines", "", 5, lines.size() - 3});
    using Found = std::pair<std::string, size_t>;  // the text, and in how many pieces it falls
    const auto keep = [](Found& found, const Text& text, size_t) {
        found.first += (text.begins ? "|" : "") + std::string(text.text);
        found.second += pieces_of(text.text).size();
    };
    std::optional<Found> whole;
    for (size_t bytes : {1 << 30, 1, 7, 100, 5'000}) {
        Found all;
        size_t chunks = 0;
        const auto add = [&](const Found& some, const Chunk&) {
            all.first += some.first, all.second += some.second, ++chunks;
        };
        pass_over<Found>("", sources, keep, add, bytes);
        CHECK((chunks == sources.size()) == (bytes == 1 << 30));
        if (!whole) whole = all;
        CHECK(all == *whole);
    }
    CHECK(whole->first.starts_with("|" + texts[0] + "|   |x| y z |"));
}

// --- Learning a vocabulary, and encoding

// Counts all pairs again for every merge.
inline std::vector<Merge> train_by_definition(std::string_view text, size_t wanted) {
    std::vector<std::vector<uint16_t>> pieces = bytes_of_pieces(text);
    std::vector<Merge> merges;
    while (merges.size() < wanted) {
        std::map<Merge, int> counts;
        for (auto& ids : pieces)
            for (size_t at = 0; at + 1 < ids.size(); ++at) ++counts[{ids[at], ids[at + 1]}];
        auto best = std::max_element(counts.begin(), counts.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
        if (best == counts.end() || best->second < 2) break;
        for (auto& ids : pieces) merge_all(ids, best->first, 256 + merges.size());
        merges.push_back(best->first);
    }
    return merges;
}

TEST_CASE("prepare_data: where there are too many pieces, the most frequent ones are kept") {
    PieceCounts pieces;
    for (int i = 0; i < 1000; ++i) pieces.add(format(" word%d", i) + (i % 10 ? "" : " often"));
    const size_t before = pieces.bytes;
    pieces.forget_rare(500);
    CHECK((pieces.bytes <= 500 && pieces.bytes > 400 && before > 2000));
    size_t bytes = 0, often = 0, last = 0;
    for (auto [piece, count] : pieces.sorted()) {
        bytes += piece.size(), often += piece == " often" && count == 100;
        last += piece.find("9") != piece.npos;
    }
    CHECK(bytes == pieces.bytes);
    CHECK(often == 1);
    CHECK((last > 2 && last < 60));  // of the rest any, not the first or the last ones
}

TEST_CASE("prepare_data: learning, on the worked example aaabdaaabac") {
    auto id = [](char c) { return kBytes.id_of_byte[uint8_t(c)]; };
    std::vector<Merge> merges = BpeTrainer({{"aaabdaaabac", 1}}).train(3);
    // aa, four times; then ab, twice, as is (aa)a, but with the smaller left token; then (aa)(ab).
    CHECK(merges == std::vector<Merge>{{id('a'), id('a')}, {id('a'), id('b')}, {256, 257}});
    CHECK(Tokenizer(merges).encode("aaabdaaabac") ==
          std::vector<uint16_t>{258, id('d'), 258, id('a'), id('c')});
    CHECK(BpeTrainer({{"aaabdaaabac", 1}}).train(99) == merges);  // nothing else occurs twice
    CHECK(Tokenizer(std::vector<Merge>(65279)).vocab_size() == 65536);
    CHECK(contains(error_of([] { Tokenizer(std::vector<Merge>(65280)); }), "at most 65279 merges"));
    CHECK(BpeTrainer({{"ab", 2}, {"cd", 3}}).train(9) ==
          std::vector<Merge>{{id('c'), id('d')}, {id('a'), id('b')}});
}

TEST_CASE("prepare_data: learning agrees with counting all pairs anew for each merge") {
    CHECK(trained_on({sample_text()}, 500).merges() == train_by_definition(sample_text(), 243));
    for (uint64_t seed = 0; seed < 60; ++seed) {
        std::string letters;
        for (size_t i = 0; i < 400; ++i)
            letters += "ab c"[random_bits(seed + 1000, i) % 4 * (i % 7 != 0)];
        for (const std::string& text : {random_text(seed, 300), letters})
            CHECK(trained_on({text}, 330).merges() == train_by_definition(text, 73));
    }
}

TEST_CASE("prepare_data: the same tokens on any number of threads, and from the serial encoder") {
    Tokenizer tokenizer = trained_on({sample_text()}, 320);
    std::vector<std::string> texts;
    for (uint64_t seed = 0; seed < 40; ++seed)
        texts.push_back(random_text(seed, 10 + seed * seed * 30));
    texts.push_back(random_text(40, 200'000));
    TemporaryFolder temporary;
    const std::vector<Source> sources = sources_of(temporary, texts);
    std::vector<uint16_t> serial;
    for (const std::string& text : texts) {
        std::vector<uint16_t> tokens = tokenizer.encode(text);
        serial.push_back(uint16_t(tokenizer.end_of_text()));
        serial.insert(serial.end(), tokens.begin(), tokens.end());
    }
    const std::vector<Merge> learnt = trained_on(texts, 400).merges();
    const auto frequent = [&](size_t most) {
        const PieceCounts pieces = count_pieces(sources, most);
        const auto sorted = pieces.sorted();
        return std::map<std::string, int64_t>(sorted.begin(), sorted.end());
    };
    const auto few = frequent(10'000);
    CHECK((few.size() > 100 && few.size() < frequent(1 << 30).size()));
    for (int n : {1, 2, 3}) {
        Threads threads(n);
        CHECK(encode_all(tokenizer, sources) == serial);
        CHECK(train_bpe(count_pieces(sources), 400).merges() == learnt);
        CHECK(frequent(10'000) == few);
    }
}

// --- The data folder

TEST_CASE("prepare_data: a text becomes shards, a tokenizer and dataset.json") {
    TemporaryFolder temporary;
    const std::string text = "The cat sat on the mat", out = temporary / "new/data";
    put_file(temporary / "cat.txt", text);
    auto prepared = [&](const std::string& more) {
        CHECK(prepare_data("--input " + temporary / "cat.txt" + " --output " + out + more) == "");
    };
    prepared(" --tokenizer byte --shard-tokens 20");
    Tokenizer bytes = Tokenizer::load(out);
    CHECK(bytes == byte_tokens());
    const std::vector<uint16_t> train = shard_tokens(out + "/train_000001.bin");
    CHECK(bytes.decode(train, "|") == "|The cat sat on the ");
    CHECK(bytes.decode(shard_tokens(out + "/val_000000.bin"), "|") == "|mat");
    Json json = read_json(out + "/dataset.json");
    CHECK(json.get_string("tokenizer", "") == "byte");
    for (auto [key, number] : {std::pair{"vocab_size", 257},
                               {"train_characters", 19},
                               {"train_tokens", 20},
                               {"val_bytes", 3},
                               {"val_tokens", 4}})
        CHECK(json.get_int(key, "") == number);
    CHECK(json.find("floor") == nullptr);
    // Shards of six tokens; then again without validation: the old files go.
    prepared(" --tokenizer byte --shard-tokens 6");
    CHECK(list_folder(out).size() == 4 + 4 + 1);
    std::vector<uint16_t> joined;
    for (int shard = 1; shard <= 4; ++shard) {
        std::vector<uint16_t> part = shard_tokens(out + format("/train_%06d.bin", shard));
        joined.insert(joined.end(), part.begin(), part.end());
    }
    CHECK(joined == train);
    prepared(" --val-fraction=0");
    CHECK(list_folder(out) ==
          Arguments("dataset.json merges.txt tokenizer.json train_000001.bin vocab.json"));
    CHECK(Tokenizer::load(out).decode(shard_tokens(out + "/train_000001.bin")) == text);
}

TEST_CASE("prepare_data: interrupted, or beside another, it changes nothing") {
    TemporaryFolder temporary;
    const std::string out = temporary / "out";
    put_file(temporary / "text", "some text, some more text");
    const Arguments arguments = "--input " + temporary / "text" + " --output " + out;
    stop_asked = 1;
    CHECK(prepare_data(arguments) == "130: interrupted; nothing was changed");
    stop_asked = 0;
    CHECK_FALSE(folder_exists(out));
    {
        const Incoming other(out);
        CHECK(contains(prepare_data(arguments), "another prepare_data is writing to " + out));
    }
    make_folders(out + "/.incoming");
    put_file(out + "/.incoming/train_000007.bin", "of a run that was killed");
    CHECK(prepare_data(arguments) == "");
    CHECK(list_folder(out).size() == 6);
}

TEST_CASE("prepare_data: when writing fails, the old dataset stays whole") {
    TemporaryFolder temporary;
    const std::string out = temporary / "out";
    write_file(temporary / "text", "some text, some more text");
    const std::string line = "--input " + temporary / "text" + " --output " + out;
    REQUIRE(prepare_data(line) == "");
    const auto before = snapshot(out);
    EachCall each{ENOSPC, "write"};
    std::string error;
    for (;;) {
        each.run([&] { error = prepare_data(line + " --tokenizer byte"); });
        if (each.failed.empty()) break;
        CHECK(contains(error, "No space left"));
        CHECK(snapshot(out) == before);
    }
    CHECK(error == "");
    CHECK(each.nth > 5);  // two shards with header and tokens, two tokenizer files, dataset.json
    CHECK(snapshot(out) != before);
}

// --- The stories

TEST_CASE("prepare_data: the stories have a floor, and it agrees with the grammar's entropy") {
    TemporaryFolder temporary;
    CHECK(prepare_data("--output " + temporary / "stories") == "");
    Json json = read_json(temporary / "stories/dataset.json");
    double floor = json.get("floor", Json::Kind::number, "").as<double>().value(),
           entropy = json.get("entropy", Json::Kind::number, "").as<double>().value();
    CHECK(floor == doctest::Approx(entropy).epsilon(0.02));
    CHECK(json.get_int("val_tokens", "") == Shard(temporary / "stories/val_000000.bin").tokens);
}

// Story number i of a seed.
inline stories::Teller told(uint64_t seed, int i) {
    stories::Teller teller{stories::the_grammar(), random_key(seed, 0, uint64_t(i))};
    teller.tell(teller.grammar.at("story").alternatives[0]);
    return teller;
}

TEST_CASE("stories: the parser finds one derivation, and it costs what the teller paid") {
    for (int i = 0; i < 20000; i++) {
        const stories::Teller teller = told(99, i);
        auto found = stories::derivations(teller.text);
        CAPTURE(teller.text);
        REQUIRE(found.size() == 1);
        REQUIRE(std::abs(found[0] - teller.neg_log_prob) < 1e-9);
        REQUIRE(teller.text.ends_with(" The end."));
        REQUIRE(teller.text.find(" The end.") == teller.text.size() - 9);
    }
}

TEST_CASE("stories: the closed-form entropy is the mean of many stories") {
    double n = 100000, sum = 0, squares = 0;
    for (int i = 0; i < int(n); i++) {
        const double neg_log_prob = told(7, i).neg_log_prob;
        sum += neg_log_prob;
        squares += neg_log_prob * neg_log_prob;
    }
    double mean = sum / n, standard_error = std::sqrt((squares / n - mean * mean) / n);
    const stories::Grammar& grammar = stories::the_grammar();
    double entropy = stories::entropy(grammar, grammar.at("story").alternatives);
    CHECK(entropy > 25);
    CHECK(standard_error < 0.02);
    CHECK(std::abs(mean - entropy) < 4 * standard_error);
}

TEST_CASE("stories: the validation floor is the sum over its stories, none of them trained on") {
    auto corpus = make_stories(1337, 20000, 600);
    std::set<std::string> seen(corpus.train.begin(), corpus.train.end());
    CHECK(seen.size() == corpus.train.size());
    double sum = 0;
    size_t shared = 0;
    for (const std::string& story : corpus.val) {
        sum += story_neg_log_prob(story);
        shared += seen.count(story);
    }
    CHECK(shared == 0);
    CHECK(std::abs(sum - corpus.val_neg_log_prob) < 1e-6);
    CHECK(make_stories(1337, 3, 2).train[2] == corpus.train[2]);
    CHECK(make_stories(1337, 3, 2).val[1] == corpus.val[1]);
    CHECK(make_stories(1338, 3, 2).train[2] != corpus.train[2]);
}

TEST_CASE("stories: the recogniser takes every sentence and no shuffled one") {
    int shuffled = 0, accepted = 0;
    for (const std::string& story : make_stories(5, 0, 300).val) {
        for (const std::string& sentence : story_sentences(story)) {
            CAPTURE(sentence);
            REQUIRE(is_story_sentence(sentence));

            // Exchange two neighbouring words that differ.
            size_t first = sentence.find(' '), second = sentence.find(' ', first + 1);
            if (second == std::string::npos) continue;
            std::string a = sentence.substr(0, first);
            std::string b = sentence.substr(first + 1, second - first - 1);
            shuffled++;
            accepted += is_story_sentence(b + " " + a + sentence.substr(second));
        }
    }
    CHECK(shuffled > 1000);
    CHECK(accepted == 0);
}

TEST_CASE("stories: a sentence must agree with itself, a story with all of itself") {
    const std::string story =
        "Once there was a brave child called Mia. She lived on the farm. One rainy day, she had "
        "three apples. Then she met two rabbits, and they were muddy. Mia gave them one to eat. "
        "Now Mia had only two left. After that, she met the rabbits by the lake every evening. "
        "The end.";
    // Each change breaks one agreement. The last three together break none.
    const std::vector<std::string> changes = split_at(
        "She lived>He lived|they were>they was|gave them>gave it|a brave>an brave|"
        "the rabbits by>the kittens by|only two>only three| The end.>|The end.>The end. The end.|"
        "called Mia>called Anna|Mia gave>Anna gave|Mia had>Anna had",
        '|');
    auto change = [](std::string text, const std::string& change) {
        const std::vector<std::string> parts = split_at(change, '>');
        REQUIRE(contains(text, parts[0]));
        return text.replace(text.find(parts[0]), parts[0].size(), parts[1]);
    };
    CHECK(std::isfinite(story_neg_log_prob(story)));
    for (const std::string& one : changes) {
        CAPTURE(one);
        CHECK_FALSE(std::isfinite(story_neg_log_prob(change(story, one))));
    }
    std::string anna = story;
    for (size_t i = changes.size() - 3; i < changes.size(); ++i) anna = change(anna, changes[i]);
    CHECK(std::isfinite(story_neg_log_prob(anna)));
}

// An n-gram model with absolute discounting: what an order takes off its counts goes to the next
// shorter one. As in Kneser and Ney (1995), the shorter orders count contexts, not occurrences.
struct Ngram {
    static constexpr int order = 5;
    struct Context {
        double total = 0, kinds = 0;
    };
    double discount, vocabulary;
    std::unordered_map<uint64_t, double> counts;
    std::unordered_map<uint64_t, Context> contexts;

    // The n words before and at `at`; 12 bits a word hold any of these vocabularies.
    static uint64_t key(const std::vector<int>& story, size_t at, int n) {
        uint64_t key = 1;
        for (int i = n - 1; i >= 0; i--) key = key << 12 | uint64_t(story[at - size_t(i)]);
        return key;
    }

    void add(const std::vector<int>& story, size_t at) {
        for (int n = order - 1; n >= 0; n--) {
            double& count = counts[key(story, at, n + 1)];
            Context& context = contexts[key(story, at - 1, n)];
            context.total++;
            context.kinds += count == 0;
            if (count++ > 0) return;  // the shorter orders have seen this continuation
        }
    }

    double prob(const std::vector<int>& story, size_t at) const {
        double p = 1 / vocabulary;
        for (int n = 0; n < order; n++) {
            auto context = contexts.find(key(story, at - 1, n));
            if (context == contexts.end()) break;
            auto found = counts.find(key(story, at, n + 1));
            double count = found == counts.end() ? 0 : found->second;
            p = (std::max(count - discount, 0.0) + discount * context->second.kinds * p) /
                context->second.total;
        }
        return p;
    }
};

// A story's words and punctuation marks, each a token: a fair stand-in for a trained vocabulary.
// Token 0, the end of text, stands after it, and before it often enough for a whole context.
inline std::vector<int> padded_tokens(const std::string& story, std::map<std::string, int>& ids) {
    std::vector<int> tokens(Ngram::order, 0);
    for (size_t at = 0, end; at < story.size(); at = end) {
        end = at + 1;
        while (std::isalpha(story[at]) && std::isalpha(story[end])) ++end;
        if (story[at] == ' ') continue;
        const auto id = ids.emplace(story.substr(at, end - at), int(ids.size())).first;
        tokens.push_back(id->second);
    }
    tokens.push_back(0);
    return tokens;
}

TEST_CASE("stories: a 5-gram with the best discount stays 20 % above the floor") {
    auto corpus = make_stories(1337, 20000, 600);
    std::map<std::string, int> ids{{"end of text", 0}};
    std::vector<std::vector<int>> train, val;
    for (const std::string& story : corpus.train) train.push_back(padded_tokens(story, ids));
    for (const std::string& story : corpus.val) val.push_back(padded_tokens(story, ids));
    REQUIRE(ids.size() < 4096);

    Ngram model{0, double(ids.size()), {}, {}};
    for (const auto& story : train)
        for (size_t at = Ngram::order; at < story.size(); at++) model.add(story, at);
    double best = 1e300;
    for (double discount : {0.3, 0.5, 0.7, 0.9}) {
        model.discount = discount;
        double loss = 0;
        for (const auto& story : val)
            for (size_t at = Ngram::order; at < story.size(); at++)
                loss -= std::log(model.prob(story, at));
        best = std::min(best, loss);
    }
    MESSAGE("5-gram / floor: " << best / corpus.val_neg_log_prob);
    CHECK(best > 1.2 * corpus.val_neg_log_prob);
}

// --- Models of llm.c

TEST_CASE("prepare_data: a model of llm.c becomes a Hugging Face folder, to the bit") {
    TemporaryFolder temporary;
    const Config config{2, 2, 4, 5, 257};
    Gpt2<Cpu> model(config), back(config);
    model.initialise(3);
    // What llm.c's write_model does: each kind of tensor for all layers, weights as [out, in].
    std::string file = raw(std::vector<int32_t>{20240326, 3, 5, 257, 2, 2, 4, 320});
    file.resize(1024);
    auto append = [&](const std::string& name, bool turn) {
        const auto is_it = [&](const TensorInfo& t) { return t.name == name; };
        const auto& all = model.layout.tensors;
        const TensorInfo& t = *std::find_if(all.begin(), all.end(), is_it);
        const size_t rows = size_t(t.shape[0]), columns = t.count / rows;
        std::vector<float> values(model.weights + t.offset, model.weights + t.offset + t.count);
        for (size_t i = 0; i < t.count && turn; ++i)
            values[i] = model.weights[t.offset + i % rows * columns + i / rows];
        file += raw(values);
    };
    append("wte.weight", false);
    file += std::string(4 * 4 * (320 - 257), '\0');  // the padding
    append("wpe.weight", false);
    for (const char* part :
         {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"})
        for (const char* kind : {"weight", "bias"})
            for (int l = 0; l < 2; ++l)
                append(format("h.%d.%s.%s", l, part, kind), *part != 'l' && *kind == 'w');
    append("ln_f.weight", false), append("ln_f.bias", false);
    put_file(temporary / "model.bin", file);
    Tokenizer::bytes().save(temporary / "bytes");
    CHECK(prepare_data({"--from-llmc", temporary / "model.bin", "--output", temporary / "out",
                        "--vocab", temporary / "bytes"}) == "");
    CHECK(SafetensorsFile(temporary / "out/model.safetensors").tensors.size() == 4 + 12 * 2);
    load_weights(back, temporary / "out");
    CHECK(raw(model.get_weights()) == raw(back.get_weights()));
    CHECK(Tokenizer::load(temporary / "out") == Tokenizer::bytes());
    CHECK(config_of_folder(temporary / "out").n_head == 2);
    CHECK(contains(read_file(temporary / "out/config.json"), "\"torch_dtype\": \"float32\""));
    // A file cut short, or of another kind, is refused.
    auto with = [&](size_t at, const std::string& bytes) {
        return std::string(file).replace(at, bytes.size(), bytes);
    };
    const std::pair<std::string, const char*> bad[] =
        {{file.substr(0, file.size() - 1), "is damaged"},
         {file.substr(0, 10), "impossible sizes"},
         {with(20, "\x03"), "impossible sizes"},  // heads
         {"", "no model of llm.c"},
         {"x" + file, "no model of llm.c"},
         {with(4, "\x05"), "version 3, found 20240326 and 5 (5 is bf16"},
         {with(file.size() - 2, "\xff\x7f"), "ln_f.bias"}};  // NaN, in the last element
    for (const auto& [bytes, error] : bad) {
        put_file(temporary / "bad.bin", bytes);
        CHECK(contains(prepare_data(
                           {"--from-llmc", temporary / "bad.bin", "--output", temporary / "none"}),
                       error));
        CHECK_FALSE(folder_exists(temporary / "none"));
    }
}

}  // namespace cpu_tests

#else  // TINYGPT_TEST_CUDA

// =================================================================================================
// CUDA: every kernel against Reference<double>, on a GPU or on the CPU in its place
// =================================================================================================
// Both devices get the same inputs: random numbers, rounded to the activation type. What comes back
// is held against double arithmetic. The tolerance is counted, not tuned: u is the rounding unit of
// the activation type (2^-9 for bf16, 2^-24 for fp32; 2^-11 where a matmul rounds to tf32, 2^-10 on
// a GPU, whose tensor cores cut a float off), n the length of the longest sum behind an element,
// and `stages` how many times a value is rounded on its way. Random roundings of a sum of n terms
// in fp32 add up to sqrt(n) 2^-24 of the result's size, so with
//   unit = stages (u + sqrt(n) 2^-24)
// the relative error of the whole array, as a vector, must stay below unit, and the error of every
// element below 4 unit times the largest element. A term left out, or a sign turned, errs by about
// 1.

namespace cuda_tests {

using namespace fixtures;
using Values = std::vector<double>;

#ifdef CUDA_ON_CPU
// What ptxas makes of the kernels, so that the emulator counts their registers and shared memory.
const bool sizes_known = cuda_on_cpu::load_kernel_sizes("checks/kernels.txt");
#endif

// The device with matmuls in tf32: numbers of 11 bits go into a product, all else is fp32.
struct CudaTf32 : Cuda<float> {
    CudaTf32() : Cuda<float>(true) {}
};
// u, of an activation type or of a device.
template <class A>
constexpr double kUnit = 0x1p-24;
template <>
constexpr double kUnit<bf16> = 0x1p-9;
template <>
constexpr double kUnit<Cuda<bf16>> = 0x1p-9;
// The CPU in bf16 has the same bounds: as this one does it, without pairs, and as a matrix
// unit would.
template <class Ops>
constexpr double kUnit<Layers<bf16, Ops>> = 0x1p-9;
#ifdef CUDA_ON_CPU
constexpr double kTf32Unit = 0x1p-11;
#else
constexpr double kTf32Unit = 0x1p-10;
#endif
template <>
constexpr double kUnit<CudaTf32> = kTf32Unit;
// u of a product whose result is fp32: bf16 inputs are exact, and only tf32 rounds them once more.
template <class Device>
constexpr double kProductUnit = std::is_same_v<Device, CudaTf32> ? kTf32Unit : 0x1p-24;

template <class A>
double rounded(double x) {
    return double(float(A(float(x))));
}
template <class A>
Values random_values(size_t count, uint64_t seed, double scale = 1, double mean = 0) {
    Values values = random_vector(count, seed, scale, mean);
    for (double& x : values) x = rounded<A>(x);
    return values;
}

// An array on the device. Fresh ones hold NaN, so that what a kernel leaves out is seen. Careful:
// the default stream, in which they are filled, and the device's own stream do not wait for each
// other, and a copy may still be on its way when its call returns.
template <class T>
struct Array {
    T* data = nullptr;
    size_t count = 0;
    explicit Array(size_t count) : count(count) {
        CUDA_CHECK(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)));
        CUDA_CHECK(cudaMemset(data, 0xff, count * sizeof(T)));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    explicit Array(const Values& values) : Array(values.size()) { set(values); }
    explicit Array(const std::vector<int32_t>& values) : Array(values.size()) {
        CUDA_CHECK(cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(data); }
    void set(const Values& values) {
        std::vector<T> host(count);
        for (size_t i = 0; i < count; ++i) host[i] = T(float(values[i]));
        CUDA_CHECK(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    std::vector<T> bits() const {
        std::vector<T> host(count);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }
    Values values() const {
        Values out;
        for (T x : bits()) out.push_back(double(float(x)));
        return out;
    }
};

// Holds `got` against `want` as said above. gain: how much larger than the result its terms are.
inline void compare(const char* what, const Values& got, const Values& want, double u,
                    double stages, double n, double gain = 1) {
    REQUIRE(got.size() == want.size());
    const double unit = gain * stages * (u + std::sqrt(n) * 0x1p-24);
    double errors = 0, squares = 0, largest = 0, worst = 0;
    size_t where = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::abs(got[i] - want[i]);
        errors += error * error, squares += want[i] * want[i],
            largest = std::max(largest, std::abs(want[i]));
        if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error, where = i;
    }
    INFO(what << ": element " << where << " of " << got.size() << " is "
              << (got.empty() ? 0 : got[where]) << ", not " << (got.empty() ? 0 : want[where])
              << "; the largest is " << largest << "; unit " << unit << "; error of the whole "
              << std::sqrt(errors / std::max(squares, 1e-300)));
    CHECK(worst <= 4 * unit * largest);
    CHECK(std::sqrt(errors) <= unit * std::sqrt(squares));
}

// What a failing check prints of where it stands.
inline std::string place_of(std::initializer_list<std::pair<const char*, double>> values) {
    std::string text;
    for (auto& [name, value] : values) text += format("%s %g  ", name, value);
    return text;
}

// Whether the GPU is refused these sizes; a card with little shared memory is some.
template <class Device>
bool too_large(const Device& cuda, int C, int NH) {
    const std::string error = error_of([&] { cuda.check_sizes({1, NH, C, 8, 8}, 1); });
    return contains(error, "n_embd is at most") || contains(error, "a head has at most");
}
// Compute capability 8.0 and later have bf16 and tf32.
inline bool has_bf16() { return Cuda<float>().context->gpu.major >= 8; }

template <size_t N>
using Sizes = std::vector<std::array<int, N>>;

struct Shape {
    int B, T, NH, HS, V;
    int rows() const { return B * T; }
    int C() const { return NH * HS; }
};

inline std::vector<int32_t> sorted_order(const std::vector<int32_t>& tokens) {
    std::vector<int32_t> order(tokens.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return tokens[size_t(a)] < tokens[size_t(b)]; });
    return order;
}
const Dropout kDrop{77, 0.3f};

// Does `work` twice more: on a CPU with the threads of every block in other orders, where a missing
// barrier would show; on a GPU as it comes. What it compares must not change by a bit.
template <class Work>
void again_in_other_orders(Work&& work) {
#ifdef CUDA_ON_CPU
    for (auto order :
         {cuda_on_cpu::Order::descending, cuda_on_cpu::Order::random, cuda_on_cpu::Order::warps}) {
        cuda_on_cpu::set_order(order, 5);
        work();
    }
    cuda_on_cpu::set_order(cuda_on_cpu::Order::ascending);
#else
    work(), work();
#endif
}

TEST_CASE_TEMPLATE("cuda: embedding", A, float, bf16) {
    Cuda<A> cuda;
    Reference<double> cpu;
    for (Dropout drop : {Dropout{}, kDrop})
        for (auto [B, T, C, V, past] : Sizes<5>{{1, 1, 8, 3, 0},
                                                {3, 7, 24, 5, 2},
                                                {2, 5, 264, 2, 0},
                                                {40, 1, 8, 1, 1},
                                                {256, 1, 8, 1, 0},
                                                {2, 300, 16, 2, 0}}) {
            const std::string at = place_of(
                {{"B", double(B)}, {"T", double(T)}, {"C", double(C)}, {"drop.p", double(drop.p)}});
            CAPTURE(at);
            const int rows = B * T, P = past + T;
            const auto wte = random_values<A>(size_t(V) * C, 1),
                       wpe = random_values<A>(size_t(P) * C, 2);
            const auto tokens = random_tokens(size_t(rows), V, 3), order = sorted_order(tokens);
            Array<A> d_wte(wte), d_wpe(wpe), out(size_t(rows) * C);
            Array<int32_t> d_tokens(tokens), d_order(order);
            cuda.embed_forward(out.data, d_tokens.data, d_wte.data, d_wpe.data, B, T, C, past,
                               drop);
            Values want(size_t(rows) * C);
            cpu.embed_forward(want.data(), tokens.data(), wte.data(), wpe.data(), B, T, C, past,
                              drop);
            compare("out", out.values(), want, kUnit<A>, 2, 2);

            const auto dout = random_values<A>(size_t(rows) * C, 4);
            Values dwte = random_values<float>(size_t(V) * C, 5),
                   dwpe = random_values<float>(size_t(T) * C, 6);
            Array<A> d_dout(dout);
            Array<float> d_dwte(dwte), d_dwpe(dwpe);
            cuda.embed_backward(d_dwte.data, d_dwpe.data, d_dout.data, d_tokens.data, d_order.data,
                                B, T, C, drop);
            cpu.embed_backward(dwte.data(), dwpe.data(), dout.data(), tokens.data(), order.data(),
                               B, T, C, drop);
            compare("dwte", d_dwte.values(), dwte, 0x1p-24, 2, rows);
            compare("dwpe", d_dwpe.values(), dwpe, 0x1p-24, 2, B);
        }
}

TEST_CASE_TEMPLATE("cuda: layernorm", A, float, bf16) {
    Cuda<A> cuda;
    Reference<double> cpu;
    // The first: more partial sums than a block has rows of threads. 520 and 2056: more columns
    // than a warp asks for at once. The last: a variance of the size of the epsilon added to it.
    for (auto [rows, C, mean, thousandths] : Sizes<4>{{300, 8, 0, 2000},
                                                      {1, 8, 0, 2000},
                                                      {3, 24, 0, 2000},
                                                      {37, 64, 0, 2000},
                                                      {5, 264, 30, 2000},
                                                      {9, 520, 0, 500},
                                                      {3, 2056, 0, 2000},
                                                      {4, 40, 0, 3}})
        for (Dropout drop : {Dropout{}, kDrop})
            for (bool accumulate : {false, true})
                for (bool residual : {false, true}) {
                    if (too_large(cuda, C, C / 8)) continue;
                    const std::string at = place_of({{"rows", double(rows)},
                                                     {"C", double(C)},
                                                     {"drop.p", double(drop.p)},
                                                     {"accumulate", double(accumulate)},
                                                     {"residual", double(residual)}});
                    CAPTURE(at);
                    const size_t n = size_t(rows) * C, c = size_t(C), r = size_t(rows);
                    const auto x = random_values<A>(n, 1, thousandths / 1000.0, mean),
                               w = random_values<A>(c, 2), b = random_values<A>(c, 3);
                    const double gain = 1 + mean / 2.0;  // x - m is small against x
                    const double eps = residual ? 1e-5 : 1e-3;
                    Array<A> d_x(x), d_w(w), d_b(b), out(n);
                    Array<float> d_mean(r), d_rstd(r);
                    cuda.layernorm_forward(out.data, d_mean.data, d_rstd.data, d_x.data, d_w.data,
                                           d_b.data, rows, C, eps);
                    Values want(n), m(r), rstd(r);
                    cpu.layernorm_forward(want.data(), m.data(), rstd.data(), x.data(), w.data(),
                                          b.data(), rows, C, eps);
                    compare("out", out.values(), want, kUnit<A>, 2, C, gain);
                    compare("mean", d_mean.values(), m, 0x1p-24, 4, C, mean ? 1 : 8);
                    compare("rstd", d_rstd.values(), rstd, 0x1p-24, 4, C, gain);

                    const auto dout = random_values<A>(n, 4), dres = random_values<A>(n, 5);
                    Values dw = random_values<float>(c, 6), db = random_values<float>(c, 7),
                           dbias = random_values<float>(c, 8);
                    Array<A> d_dout(dout), d_dres(dres), dx(n), dbranch(n);
                    Array<float> d_dw(dw), d_db(db), d_dbias(dbias);
                    // dx may be dresidual itself
                    A* d_dx = residual && accumulate ? d_dres.data : dx.data;
                    cuda.layernorm_backward(d_dx, d_dw.data, d_db.data,
                                            drop.on() ? dbranch.data : d_dx,
                                            rows == 9 ? nullptr : d_dbias.data, d_dout.data,
                                            residual ? d_dres.data : nullptr, d_x.data, d_mean.data,
                                            d_rstd.data, d_w.data, rows, C, drop, accumulate);
                    Values want_dx(n), want_branch(n);
                    cpu.layernorm_backward(want_dx.data(), dw.data(), db.data(), want_branch.data(),
                                           rows == 9 ? nullptr : dbias.data(), dout.data(),
                                           residual ? dres.data() : nullptr, x.data(), m.data(),
                                           rstd.data(), w.data(), rows, C, drop, accumulate);
                    compare("dx", d_dx == dx.data ? dx.values() : d_dres.values(), want_dx,
                            kUnit<A>, 2, C, gain);
                    compare("dweight", d_dw.values(), dw, 0x1p-24, 8, rows + C, gain);
                    compare("dbias", d_db.values(), db, 0x1p-24, 4, rows);
                    compare("dbranch_bias", d_dbias.values(), dbias, 0x1p-24, 8, rows + C, gain);
                    if (drop.on())
                        compare("dbranch", dbranch.values(), want_branch, kUnit<A>, 2, C, gain);
                }
}

TEST_CASE_TEMPLATE("cuda: linear layers", Device, Cuda<float>, CudaTf32, Cuda<bf16>) {
    using A = typename Device::Activation;
    const double product = kProductUnit<Device>;
    Reference<double> cpu;
    for (bool fuse : {true, false})
        for (auto [rows, C, OC] :
             Sizes<3>{{1, 8, 8}, {5, 24, 40}, {33, 16, 72}, {70, 264, 24}, {300, 16, 8}})
            for (bool accumulate : {false, true}) {
                const std::string at = place_of({{"fuse", double(fuse)},
                                                 {"rows", double(rows)},
                                                 {"C", double(C)},
                                                 {"OC", double(OC)},
                                                 {"accumulate", double(accumulate)}});
                CAPTURE(at);
                Device cuda;
                cuda.fuse = fuse;
                const size_t in = size_t(rows) * C, wide = size_t(rows) * OC, ws = size_t(C) * OC;
                const auto x = random_values<A>(in, 1), w = random_values<A>(ws, 2),
                           b = random_values<A>(size_t(OC), 3);
                const auto dout = random_values<A>(wide, 4), residual = random_values<A>(wide, 5),
                           fc = random_values<A>(in, 6, 2);
                Array<A> d_x(x), d_w(w), d_b(b), d_dout(dout), d_residual(residual), d_fc(fc);
                Array<A> out(wide), gelu(wide), kept(wide), sum(wide), dx(in);
                Values want(wide), want_gelu(wide), want_kept(wide), want_sum(wide), want_dx(in);
                cuda.linear_forward(out.data, d_x.data, d_w.data, d_b.data, rows, C, OC);
                cpu.linear_forward(want.data(), x.data(), w.data(), b.data(), rows, C, OC);
                compare("out", out.values(), want, kUnit<Device>, 2, C);
                cuda.linear_gelu_forward(gelu.data, kept.data, d_x.data, d_w.data, d_b.data, rows,
                                         C, OC);
                cpu.linear_gelu_forward(want_gelu.data(), want_kept.data(), x.data(), w.data(),
                                        b.data(), rows, C, OC);
                compare("fc", kept.values(), want_kept, kUnit<Device>, 2, C);
                compare("gelu", gelu.values(), want_gelu, kUnit<Device>, 3, C);
                for (Dropout drop : {Dropout{}, kDrop}) {
                    cuda.linear_residual_forward(sum.data, d_residual.data, d_x.data, d_w.data,
                                                 d_b.data, rows, C, OC, drop);
                    cpu.linear_residual_forward(want_sum.data(), residual.data(), x.data(),
                                                w.data(), b.data(), rows, C, OC, drop);
                    compare("residual", sum.values(), want_sum, kUnit<Device>, 3, C);
                }
                Values dw = random_values<float>(ws, 7),
                       dfc_bias = random_values<float>(size_t(C), 9);
                Values dw2 = dw;
                Array<float> d_dw(dw), d_dw2(dw), d_dpre_bias(dfc_bias);
                cuda.linear_backward(dx.data, d_dw.data, d_dout.data, d_x.data, d_w.data, rows, C,
                                     OC, accumulate);
                cpu.linear_backward(want_dx.data(), dw.data(), dout.data(), x.data(), w.data(),
                                    rows, C, OC, accumulate);
                compare("dx", dx.values(), want_dx, kUnit<Device>, 2, OC);
                compare("dw", d_dw.values(), dw, product, 2, rows);
                cuda.linear_gelu_backward(dx.data, d_dw2.data, d_dpre_bias.data, d_dout.data,
                                          d_x.data, d_fc.data, d_w.data, rows, C, OC, accumulate);
                cpu.linear_gelu_backward(want_dx.data(), dw2.data(), dfc_bias.data(), dout.data(),
                                         x.data(), fc.data(), w.data(), rows, C, OC, accumulate);
                compare("dfc", dx.values(), want_dx, kUnit<Device>, 4, OC);
                compare("dw of gelu", d_dw2.values(), dw2, product, 2, rows);
                // Where GELU is fused, the layer that made fc also makes its bias gradient.
                const Values dfc = dx.values();
                Values dw3 = random_values<float>(ws, 10), ignored(wide);
                Array<float> d_dw3(dw3);
                cuda.linear_backward(out.data, d_dw3.data, dx.data, d_dout.data, d_w.data, rows, OC,
                                     C, accumulate);
                cpu.linear_backward(ignored.data(), dw3.data(), dfc.data(), dout.data(), w.data(),
                                    rows, OC, C, accumulate);
                compare("dw of fc", d_dw3.values(), dw3, product, 2, rows);
                compare("dfc_bias", d_dpre_bias.values(), dfc_bias, kUnit<Device>, 4, rows);
            }
}

// One layer of attention, forward, backward, and the last rows from a cache.
template <class Device>
void check_attention(Shape s, Dropout drop, double scale, bool groups = true) {
    using A = typename Device::Activation;
    const std::string at = place_of({{"s.B", double(s.B)},
                                     {"s.T", double(s.T)},
                                     {"s.NH", double(s.NH)},
                                     {"s.HS", double(s.HS)},
                                     {"drop.p", double(drop.p)},
                                     {"scale", double(scale)}});
    CAPTURE(at);
    Device cuda;
    if (too_large(cuda, s.C(), s.NH) && s.HS > 64) return;
    cuda.use_groups = groups;
    groups = groups && std::is_same_v<Device, Cuda<bf16>> && s.HS == 64 && !drop.on() &&
             cuda.context->gpu.major == 9;
    if (groups) check_attention<Device>(s, drop, scale, false);
    Reference<double> cpu;
    const size_t n = size_t(s.rows()) * s.C(), stats = size_t(s.rows()) * s.NH;
    // Numbers that tf32 has exactly, too.
    using Input = std::conditional_t<std::is_same_v<Device, CudaTf32>, bf16, A>;
    const auto qkv = random_values<Input>(3 * n, 1, scale), dout = random_values<Input>(n, 2);
    Array<A> d_qkv(qkv), d_dout(dout), out(n), dqkv(3 * n);
    Array<float> lse(stats);
    Values want(n), want_lse(stats), want_dqkv(3 * n);
    cuda.attention_forward(out.data, lse.data, d_qkv.data, s.B, s.T, s.NH, s.HS, drop);
    cpu.attention_forward(want.data(), want_lse.data(), qkv.data(), s.B, s.T, s.NH, s.HS, drop);
    const bool tensor_cores =
        std::is_same_v<Device, Cuda<bf16>> || (std::is_same_v<Device, CudaTf32> && s.HS <= 64);
    CHECK(std::string(cuda.way()) == (groups ? " (wgmma)" : tensor_cores ? " (mma.sync)" : ""));
    // A score is a sum of HS terms of size scale^2, in fp32; an error of it is a relative error of
    // p.
    const double u = kUnit<Device> + 0x1p-22 * scale * scale * std::sqrt(double(s.HS));
    compare("out", out.values(), want, u, 3, s.T);
    compare("lse", lse.values(), want_lse, 0x1p-24, 8, s.HS + s.T, 1 + scale * scale);
    Values want_bias = random_values<float>(size_t(3) * s.C(), 5);
    Array<float> bias(want_bias);
    const bool accumulate = s.T % 2 == 0;
    cuda.attention_backward(dqkv.data, bias.data, d_dout.data, out.data, lse.data, d_qkv.data, s.B,
                            s.T, s.NH, s.HS, drop, accumulate);
    cpu.attention_backward(want_dqkv.data(), want_bias.data(), dout.data(), want.data(),
                           want_lse.data(), qkv.data(), s.B, s.T, s.NH, s.HS, drop, accumulate);
    const Values got = dqkv.values();
    for (int part = 0; part < 3; ++part) {
        Values a, b;
        for (size_t i = 0; i < got.size(); ++i)
            if (int(i % size_t(3 * s.C())) / s.C() == part)
                a.push_back(got[i]), b.push_back(want_dqkv[i]);
        // one key: the softmax is constant, the gradient is 0 up to rounding
        if (s.T == 1 && part < 2) {
            for (double x : a)
                CHECK(std::abs(x) <= 4 * kUnit<Device> * scale * std::sqrt(s.HS) * 4);
            continue;
        }
        // ds = p (dp - delta): both are sums of HS products, and may nearly cancel where p is near
        // 1.
        compare(part == 0   ? "dq"
                : part == 1 ? "dk"
                            : "dv",
                a, b, u, part < 2 ? 5 : 3, s.T + s.HS, part < 2 ? 1 + scale : 1);
        // The bias gradient is the sum of this part's columns: as wrong as they, together.
        const auto third = [&](const Values& all) {
            return Values(all.begin() + part * s.C(), all.begin() + (part + 1) * s.C());
        };
        const double size = std::sqrt(std::inner_product(b.begin(), b.end(), b.begin(), 0.0)),
                     sum = std::sqrt([&] {
                         double squares = 0;
                         for (double x : third(want_bias)) squares += x * x;
                         return squares;
                     }());
        compare("bias", third(bias.values()), third(want_bias), u, part < 2 ? 5 : 3, s.T + s.HS,
                (part < 2 ? 1 + scale : 1) * (1 + size / sum));
    }
    if (drop.on() || s.B > 1) return;
    for (int cut : {0, s.T / 2, s.T - 1}) {
        Array<A> rows(size_t(s.T - cut) * s.C());
        cuda.attention_cached(rows.data, d_qkv.data, cut, s.T - cut, s.NH, s.HS);
        compare("cached", rows.values(), Values(want.begin() + ptrdiff_t(cut) * s.C(), want.end()),
                u, 3, s.T);
    }
}

TEST_CASE_TEMPLATE("cuda: attention", Device, Cuda<float>, CudaTf32, Cuda<bf16>) {
    for (int HS : {64, 32, 128}) {
        check_attention<Device>({1, 1, 1, HS, 0}, {}, 1);
        check_attention<Device>({1, 65, 1, HS, 0}, {}, 1);
        check_attention<Device>({2, 33, 2, HS, 0}, kDrop, 1);
        // scores of about 36 sqrt(HS): p is near 0 or 1
        check_attention<Device>({1, 130, 1, HS, 0}, {}, 6);
    }
    check_attention<Device>({1, 200, 3, 64, 0}, {}, 1);
    check_attention<Device>({3, 16, 2, 8, 0}, {}, 1);
    check_attention<Device>({1, 70, 2, 12, 0}, kDrop, 1);
    check_attention<Device>({1, 45, 1, 40, 0}, {}, 1);
    check_attention<Device>({1, 37, 8, 5, 0}, {}, 1);  // heads that start and end anywhere
    check_attention<Device>({1, 40, 2, 100, 0}, {}, 1);
    // Blocks of 128 rows, which a GPU takes where it has enough of them.
#ifdef CUDA_ON_CPU
    const int before = std::exchange(cuda_on_cpu::settings().multiprocessors, 1);
    check_attention<Device>({2, 1, 1, 64, 0}, {}, 1);
    check_attention<Device>({1, 200, 2, 64, 0}, {}, 1);
    check_attention<Device>({1, 130, 1, 64, 0}, {}, 6);
    cuda_on_cpu::settings().multiprocessors = before;
#else
    check_attention<Device>({16, 130, 20, 64, 0}, {}, 1);
#endif
}

#ifdef CUDA_ON_CPU
TEST_CASE("cuda: attention has the same bits in blocks of 64 and of 128 rows") {
    if (!has_bf16()) return;
    const int B = 1, T = 150, NH = 2, HS = 64, C = NH * HS;
    const Array<bf16> qkv(random_values<bf16>(size_t(B) * T * 3 * C, 1)),
        dout(random_values<bf16>(size_t(B) * T * C, 2));
    const auto before = cuda_on_cpu::settings();
    std::set<Values> results;
    for (int processors : {1, 1000}) {
        cuda_on_cpu::settings().multiprocessors = processors;
        Cuda<bf16> cuda;
        cuda.use_groups = false;
        Array<bf16> out(dout.count), dqkv(qkv.count);
        Array<float> lse(size_t(B) * NH * T), bias(size_t(3) * C);
        Values all;
        again_in_other_orders([&] {
            cuda.attention_forward(out.data, lse.data, qkv.data, B, T, NH, HS, {});
            cuda.attention_backward(dqkv.data, bias.data, dout.data, out.data, lse.data, qkv.data,
                                    B, T, NH, HS, {}, false);
            all = out.values();
            for (double x : lse.values()) all.push_back(x);
            for (double x : dqkv.values()) all.push_back(x);
            results.insert(all);
        });
    }
    cuda_on_cpu::settings().multiprocessors = before.multiprocessors;
    CHECK(results.size() == 1);
}
#endif

TEST_CASE_TEMPLATE("cuda: head", Device, Cuda<float>, CudaTf32, Cuda<bf16>) {
    using A = typename Device::Activation;
    const double product = kProductUnit<Device>;
    Reference<double> cpu;
    for (size_t bytes : {size_t(1) << 30, size_t(1500)})
        for (auto [rows, C, V, scale] : Sizes<4>{{1, 8, 1, 1},
                                                 {5, 16, 61, 1},
                                                 {9, 24, 1003, 6},
                                                 {4, 8, 700, 0},
                                                 {3, 8, 8200, 1},
                                                 {1, 8, 58201, 1}})  // in fp32 too long to be kept
            for (bool accumulate : {false, true}) {
                const std::string at = place_of({{"rows", double(rows)},
                                                 {"C", double(C)},
                                                 {"V", double(V)},
                                                 {"bytes", double(bytes)},
                                                 {"accumulate", double(accumulate)}});
                CAPTURE(at);
                Device cuda;
                cuda.head_bytes = bytes;
                // The rows behind V are 0, as in a Layout, and so are their gradients.
                const size_t n = size_t(rows) * C, ws = size_t(V) * C,
                             all = table_rows(V) * size_t(C);
                const auto x = random_values<A>(n, 1, scale);
                Values w = random_values<A>(ws, 2, scale);
                w.resize(all);
                auto targets = random_tokens(size_t(rows), V, 3);
                if (rows > 4) targets[4] = kIgnore;
                Array<A> d_x(x), d_w(w), dx(n), logits(Device::head_workspace(rows, V));
                Array<int32_t> d_targets(targets);
                Array<float> losses(targets.size()), scores(targets.size() * size_t(V));
                Values want(rows), want_scores(size_t(rows) * V),
                    space(Reference<double>::head_workspace(rows, V)), want_dx(n);
                Values dw = random_values<float>(ws, 4);
                dw.resize(all);
                Array<float> d_dw(dw);
                // Logits are sums of C terms, rounded to A: of size s, they err by u s, and so do
                // the losses.
                const double size = scale * scale * std::sqrt(double(C)), gain = 1 + size;
                cuda.head_logits(scores.data, d_x.data, d_w.data, rows, C, V);
                cpu.head_logits(want_scores.data(), x.data(), w.data(), rows, C, V);
                compare("logits", scores.values(), want_scores, product, 2, C);
                cuda.head_forward(losses.data, logits.data, d_x.data, d_w.data, d_targets.data,
                                  rows, C, V);
                cpu.head_forward(want.data(), space.data(), x.data(), w.data(), targets.data(),
                                 rows, C, V);
                compare("losses", losses.values(), want, kUnit<Device>, 2, C, V == 1 ? 1 : gain);
                losses.set(Values(size_t(rows), NAN));
                cuda.head_forward_backward(losses.data, dx.data, d_dw.data, logits.data, d_x.data,
                                           d_w.data, d_targets.data, rows, C, V, 0.25f, accumulate);
                cpu.head_forward_backward(want.data(), want_dx.data(), dw.data(), space.data(),
                                          x.data(), w.data(), targets.data(), rows, C, V, 0.25,
                                          accumulate);
                compare("losses", losses.values(), want, kUnit<Device>, 2, C, V == 1 ? 1 : gain);
                compare("dx", dx.values(), want_dx, kUnit<Device>, 3, V, gain);
                compare("dw", d_dw.values(), dw, kUnit<Device>, 3, rows, gain);
            }
}

TEST_CASE_TEMPLATE("cuda: update", A, float, bf16) {
    Cuda<A> cuda;
    Reference<double> cpu;
    for (size_t count : {size_t(64), size_t(4 * 1024 + 64), size_t(1 << 16)}) {
        const size_t decayed = count / 128 * 64;
        CAPTURE(count);
        Values masters = random_values<float>(count, 1), m = random_values<float>(count, 2, 0.1),
               v = random_values<float>(count, 3, 0.1);
        for (double& x : v) x *= x, x = rounded<float>(x);
        const auto grads = random_values<float>(count, 4), losses = random_values<float>(999, 5);
        Array<float> d_masters(masters), d_m(m), d_v(v), d_grads(grads), d_losses(losses);
        Array<A> d_weights(Values(count, 0.0));
        Array<StepState> d_state(1);
        StepState state, got;
        CUDA_CHECK(cudaMemcpy(d_state.data, &state, sizeof state, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
        A* weights =
            Cuda<A>::kSeparateMasters ? d_weights.data : reinterpret_cast<A*>(d_masters.data);
        const AdamW hyper{0.9, 0.95, 1e-8, 0.1};
        for (int step = 0; step < 3; ++step) {
            const Guards guards{step == 0 ? 1.0 : 0.0, 0};
            cuda.begin_step(d_state.data, 0.01 * (step + 1)),
                cpu.begin_step(&state, 0.01 * (step + 1));
            for (int part = 0; part < 2; ++part) {
                cuda.add_loss(d_state.data, d_losses.data, step == 2 ? 1 : 999, 0.5);
                cpu.add_loss(&state, losses.data(), step == 2 ? 1 : 999, 0.5);
            }
            set_norm(cuda, d_state.data, d_grads.data, count);
            set_norm(cpu, &state, grads.data(), count);
            cuda.judge_step(d_state.data, guards), cpu.judge_step(&state, guards);
            cuda.adamw(weights, d_masters.data, d_m.data, d_v.data, d_grads.data, count, decayed,
                       d_state.data, hyper);
            cpu.adamw(nullptr, masters.data(), m.data(), v.data(), grads.data(), count, decayed,
                      &state, hyper);
        }
        got = d_state.bits()[0];
        CHECK(got.lr == state.lr);
        CHECK(got.updates == 3);
        CHECK(got.skip == 0);
        CHECK(got.seen == state.seen);
        CHECK(got.loss == doctest::Approx(state.loss).epsilon(1e-12));
        CHECK(got.grad_norm == doctest::Approx(state.grad_norm).epsilon(1e-12));
        CHECK(got.clip_scale == doctest::Approx(state.clip_scale).epsilon(1e-12));
        compare("masters", d_masters.values(), masters, 0x1p-24, 8, 1);
        compare("m", d_m.values(), m, 0x1p-24, 8, 1);
        compare("v", d_v.values(), v, 0x1p-24, 8, 1);
        if (Cuda<A>::kSeparateMasters) {
            compare("weights", d_weights.values(), masters, kUnit<A>, 1, 1);
            Array<A> again(count);
            cuda.weights_from_masters(again.data, d_masters.data, count);
            CHECK(again.values() == d_weights.values());
        }
        // A NaN in the gradient stops the update, and only that.
        Values broken = grads;
        broken[count - 1] = NAN;
        d_grads.set(broken);
        const Values before = d_masters.values();
        set_norm(cuda, d_state.data, d_grads.data, count);
        cuda.judge_step(d_state.data, {});
        cuda.adamw(weights, d_masters.data, d_m.data, d_v.data, d_grads.data, count, decayed,
                   d_state.data, hyper);
        CHECK(d_masters.values() == before);
        CHECK(d_state.bits()[0].skip == 1);
    }
}

// --- The whole model

// Weights that a bf16 holds exactly, biases and layernorms away from 0 and 1, so that all have a
// say.
template <class A>
Values random_weights(const Config& config) {
    const Layout layout = layout_of(config);
    Values weights(layout.size);
    initialise(weights.data(), config, layout, 1);
    for (const TensorInfo& info : layout.tensors)
        for (size_t i = 0; i < info.count; ++i) {
            double& w = weights[info.offset + i];
            w = rounded<A>(5 * (w - (info.init == Init::ones)) + (info.init == Init::ones) +
                           (info.decays() ? 0 : 0.1 * random_normal(9, info.offset + i)));
        }
    return weights;
}

template <class Device>
void set_weights(Gpt2<Device>& model, const Values& weights) {
    const std::vector<typename Device::Real> host(weights.begin(), weights.end());
    model.set_weights(host.data());
}
template <class Device>
Values gradients_of(Gpt2<Device>& model) {
    std::vector<typename Device::Gradient> host(model.layout.size);
    model.device.download(host.data(), model.grads, host.size());
    return Values(host.begin(), host.end());
}
template <class Device>
StepState state_of(Gpt2<Device>& model) {
    StepState state;
    model.device.download(&state, model.state, 1);
    return state;
}

TEST_CASE_TEMPLATE("cuda: loss and every gradient of a whole model, again bit for bit", Device,
                   Cuda<float>, CudaTf32, Cuda<bf16>, CpuBf16, PlainBf16, UnitBf16) {
    using A = typename Device::Activation;
    for (auto [NH, HS, untied, dropout] : Sizes<4>{{2, 64, 0, 0}, {3, 8, 1, 0}, {1, 32, 0, 1}}) {
        Config config{2, NH, NH * HS, 20, 61, untied == 1, dropout ? 0.2f : 0.0f};
        const std::string at =
            place_of({{"NH", NH}, {"HS", HS}, {"untied", untied}, {"dropout", dropout}});
        CAPTURE(at);
        Gpt2<Device> cuda(config);
        Gpt2<Reference<double>> cpu(config);
        const Values weights = random_weights<A>(config);
        cuda.reserve(2, 19, Use::training), cpu.reserve(2, 19, Use::training);
        set_weights(cuda, weights), set_weights(cpu, weights);
        // two micro-batches; the second is smaller, and is added
        auto both_passes = [&](auto& model) {
            model.device.begin_step(model.state, 0);
            for (int micro = 0; micro < 2; ++micro) {
                const Batch batch =
                    random_batch(uint64_t(micro), 2, micro ? 5 : 19, config.vocab_size, 5);
                const Pass pass{.B = batch.B,
                                .T = batch.T,
                                .scale = 1.0 / 46,
                                .first = micro == 0,
                                .dropout = {random_key(3, uint64_t(micro), 0), config.dropout}};
                set_batch(model, batch);
                forward(model, pass);
                backward(model, pass);
                model.device.add_loss(model.state, model.a.losses, batch.B * batch.T, 1.0 / 46);
            }
        };
        both_passes(cuda), both_passes(cpu);
        // A value is rounded about 10 times in each of the 2 layers, there and back.
        const double loss = state_of(cuda).loss;
        compare("loss", {loss}, {state_of(cpu).loss}, kUnit<Device>, 4, 64);
        const Values got = gradients_of(cuda), want = gradients_of(cpu);
        for (const TensorInfo& info : cuda.layout.tensors) {
            auto piece = [&](const Values& all) {
                return Values(all.begin() + ptrdiff_t(info.offset),
                              all.begin() + ptrdiff_t(info.offset + info.count));
            };
            compare(info.name.c_str(), piece(got), piece(want), kUnit<Device>, 20, 64);
        }
        again_in_other_orders([&] {
            both_passes(cuda);
            CHECK(state_of(cuda).loss == loss);
            CHECK(gradients_of(cuda) == got);
        });
    }
}

TEST_CASE_TEMPLATE("cuda: GELUs made again in backward are the same numbers", Device, Cuda<float>,
                   Cuda<bf16>) {
    Config config{3, 2, 32, 16, 29};
    const Values weights = random_weights<typename Device::Activation>(config);
    auto run = [&](bool recompute) {
        config.recompute_gelu = recompute;
        Device device;
        device.fuse = false;  // cuBLASLt's own GELU may differ from ours in the last bit
        Gpt2<Device> model(config, device);
        model.reserve(2, 9, Use::training);
        set_weights(model, weights);
        for (int step = 0; step < 2; ++step)
            train_step(model, {random_batch(uint64_t(step), 2, 9, 29, 5)}, {}, step);
        return gradients_of(model);
    };
    CHECK(run(true) == run(false));
}

TEST_CASE_TEMPLATE(
    "cuda: ten training steps follow Reference<double>, and two runs are equal bit for bit", Device,
    Cuda<float>, CudaTf32, Cuda<bf16>, CpuBf16) {
    using A = typename Device::Activation;
    const Config config{2, 1, 64, 16, 29};
    const Values weights = random_weights<A>(config);
    StepOptions options;
    options.rate = {Schedule::cosine, 1e-3, 0.1, 2, 10};
    auto run = [&](auto& model) {
        model.reserve(2, 9, Use::training);
        set_weights(model, weights);
        Values losses;
        for (int step = 0; step < 10; ++step) {
            const std::vector<Batch> batches = {random_batch(uint64_t(step % 2), 2, 9, 29, 5),
                                                random_batch(7, 1, 9, 29, 5)};
            train_step(model, batches, options, step);
            losses.push_back(state_of(model).loss);
        }
        return losses;
    };
    Gpt2<Device> cuda(config), again(config);
    Gpt2<Reference<double>> cpu(config);
    const Values got = run(cuda), want = run(cpu);
    compare("losses", got, want, kUnit<Device>, 8, 64);
    CHECK(want[8] < want[0]);
    CHECK(run(again) == got);
    CHECK(again.get_weights() == cuda.get_weights());
    // A bf16 weight is rounded from its master; the masters themselves went the way of double
    // arithmetic. AdamW's first steps are lr in each element whatever the gradient's size: where a
    // gradient is near 0 its rounding may turn a whole step around, so the distance is held against
    // the way.
    const auto masters = cuda.get_weights();
    const auto exact = cpu.get_weights();
    double way = 0, apart = 0;
    // A key's bias adds the same to all scores of a query, so its gradient is rounding alone.
    std::vector<bool> key_bias(masters.size());
    for (const TensorInfo& tensor : cpu.layout.tensors)
        if (tensor.name.ends_with("attn.c_attn.bias"))
            std::fill_n(key_bias.begin() + ptrdiff_t(tensor.offset) + 64, 64, true);
    for (size_t i = 0; i < masters.size(); ++i) {
        if (key_bias[i]) continue;
        way += std::pow(exact[i] - weights[i], 2);
        apart += std::pow(double(masters[i]) - exact[i], 2);
    }
    CHECK(std::sqrt(apart) <= std::max(1e-3, 100 * kUnit<Device>) * std::sqrt(way));
}

// Both round activations, weights and their gradients to bf16 at the same places, and add in other
// orders. So a value rounds the other way now and then: an error of 2^-9 in what comes after, as in
// the comparisons with double above, from which each of the two may be one bound away.
TEST_CASE("cuda: bf16 on the CPU is bf16 on the GPU: the same 50 steps but for rounding") {
    const Config config{2, 2, 32, 16, 61};
    const Values weights = random_weights<bf16>(config);
    StepOptions options;
    options.rate = {Schedule::cosine, 2e-3, 0.1, 5, 50};
    auto run = [&](auto& model) {
        model.reserve(3, 16, Use::training);
        set_weights(model, weights);
        Values losses;
        for (int step = 0; step < 50; ++step) {
            train_step(model, {random_batch(uint64_t(step % 3), 3, 16, 61, 5)}, options, step);
            losses.push_back(state_of(model).loss);
        }
        return losses;
    };
    Gpt2<Cuda<bf16>> gpu(config);
    Gpt2<CpuBf16> cpu(config);
    const Values on_gpu = run(gpu), on_cpu = run(cpu);
    compare("losses", on_cpu, on_gpu, 0x1p-9, 2, 64);
    CHECK(on_cpu[48] < 0.9 * on_cpu[0]);
}

TEST_CASE_TEMPLATE("cuda: generation from the cache gives the logits of the whole sequence", Device,
                   Cuda<float>, CudaTf32, Cuda<bf16>, CpuBf16) {
    using A = typename Device::Activation;
    const Config config{2, 2, 64, 24, 61};
    const Values weights = random_weights<A>(config);
    Gpt2<Device> cuda(config);
    Gpt2<Reference<double>> cpu(config);
    cuda.reserve(1, 24, Use::generation), cpu.reserve(1, 24, Use::generation);
    set_weights(cuda, weights), set_weights(cpu, weights);
    const auto tokens = random_tokens(24, 61, 5);
    for (auto [past, n] : Sizes<2>{{0, 5}, {5, 1}, {6, 18}, {0, 24}}) {
        const std::vector<int32_t> fresh(tokens.begin() + past, tokens.begin() + past + n);
        const auto got = next_logits(cuda, fresh, past), want = next_logits(cpu, fresh, past);
        compare("logits", Values(got.begin(), got.end()), Values(want.begin(), want.end()),
                kUnit<Device>, 20, 64);
    }
}

TEST_CASE_TEMPLATE("cuda: PyTorch's losses, norms and gradients", Device, Cuda<float>, CudaTf32,
                   Cuda<bf16>, CpuBf16) {
    for (const char* name : {"gpt2-tied", "gpt2-untied", "gpt2-head64"}) {
        const std::string folder = reference_folder(name);
        if (folder.empty()) continue;
        const PyTorchNumbers reference(folder);
        CAPTURE(name);
        Gpt2<Device> model(reference.config);
        model.reserve(reference.batch.B, reference.batch.T, Use::training);
        read_weights(model, reference);
        const Values losses = reference.read("step.loss"), norms = reference.read("step.grad_norm");
        // A step of the largest model takes seconds on a CPU in a GPU's place.
        const size_t steps = reference.config.n_embd > 100 ? 2 : losses.size();
        for (size_t s = 0; s < steps; ++s) {
            CAPTURE(s);
            train_step(model, {reference.batch}, reference.options, int64_t(s));
            const StepState state = state_of(model);
            const double unit = 20 * (kUnit<Device> + 8 * 0x1p-24);
            CHECK(std::abs(state.loss / losses[s] - 1) < unit);
            // AdamW's first steps are lr in each element, whatever the gradient's size: rounding
            // turns some around, and from then on the norm, which jumps by half from step to step
            // here, is that of another place.
            CHECK(std::abs(state.grad_norm / norms[s] - 1) < (s == 0 ? 2 : 4) * unit);
            if (s > 0) continue;
            const Values found = gradients_of(model);
            for (const TensorInfo& t : model.layout.tensors) {
                const auto begin = found.begin() + ptrdiff_t(t.offset);
                compare(t.name.c_str(), Values(begin, begin + ptrdiff_t(t.count)),
                        reference.read("grad." + t.name), kUnit<Device>, 20, 64);
            }
        }
    }
}

// --- CUDA graphs, and a host that runs ahead

TEST_CASE_TEMPLATE("cuda: a step as a graph is the step, bit for bit, whatever changes in between",
                   Device, Cuda<float>, Cuda<bf16>) {
    using A = typename Device::Activation;
    const Config config{1, 1, 32, 16, 29}, other_config{2, 2, 16, 16, 61};
    const Values weights = random_weights<A>(config), other = random_weights<A>(other_config);
    // Steps of two models that share a device; batches, options, room and scratch memory change.
    auto run = [&](bool use_graphs) {
        Device device;
        device.use_graphs = use_graphs;
        Gpt2<Device> model(config, device), second(other_config, device);
        model.reserve(2, 9, Use::training), second.reserve(1, 16, Use::training);
        set_weights(model, weights), set_weights(second, other);
        Values seen;
        StepOptions options;
        options.rate = {Schedule::cosine, 1e-3, 0.1, 2, 20};
        for (int step = 0; step < 20; ++step) {
            if (step == 5) options.guards.grad_clip = 0.01;
            if (step == 8) options.adamw.weight_decay = 0;
            if (step == 11) model.reserve(2, 12, Use::training);
            if (step == 14) device.context->template scratch<char>(1 << 20);
            std::vector<Batch> batches = {random_batch(uint64_t(step), 2, 9, 29, 5)};
            if (step % 3 == 2) batches.push_back(random_batch(77, 2, 9, 29, 5));
            if (step % 4 == 3) batches.push_back(random_batch(78, 1, 5, 29, 5));
            train_step(model, batches, options, step);
            train_step(second, {random_batch(uint64_t(step), 1, 16, 61, 5)}, options, step);
            seen.push_back(state_of(model).loss), seen.push_back(state_of(model).grad_norm);
            seen.push_back(state_of(second).loss);
        }
        for (float w : model.get_weights()) seen.push_back(w);
        for (float w : second.get_weights()) seen.push_back(w);
        CHECK((device.context->replays > 20) == use_graphs);
        return seen;
    };
    CHECK(run(true) == run(false));
}

TEST_CASE("cuda: dropout's masks are new in every step, graphs or not") {
    Config config{1, 1, 32, 8, 29, false, 0.5f};
    Gpt2<Cuda<float>> model(config);
    model.reserve(1, 8, Use::training);
    set_weights(model, random_weights<float>(config));
    StepOptions options;
    options.rate = {Schedule::constant, 0, 1, 0, 1};  // a rate of 0: only the masks change
    std::set<double> losses;
    for (int step = 0; step < 6; ++step) {
        train_step(model, {random_batch(1, 1, 8, 29, 5)}, options, step);
        losses.insert(state_of(model).loss);
    }
    CHECK(losses.size() == 6);
}

// A folder with data, and runs of a small model on it.
struct CudaRuns : TestRuns {
    using TestRuns::TestRuns;
    // What a line of options means here.
    Options options(const std::string& line) const {
        return parse_options(
            split_at("--data " + data() +
                         " --n-layer 1 --n-embd 8 --n-head 2 --n-positions 8 --seq-len 8 "
                         "--batch-size 3 --max-steps 24 --warmup-steps 2 --sample-interval 0 "
                         "--log-interval 0 --eval-batches 0 " +
                         line,
                     ' '));
    }
    // Trains into out(name), printing nothing; returns the exit status.
    template <class Device>
    int train(Device device, const std::string& name, const std::string& more) const {
        const Options o = options("--output " + out(name) + " " + more);
        return outcome_of([&] { return run_command(device, o); }).status;
    }
};

// The same device, but the host waits for every step, and starts every kernel itself.
struct CudaStepByStep : Cuda<float> {
    static constexpr int kStepsBehind = 0;
    CudaStepByStep() { use_graphs = false; }
};

// Within its scope the device is as late as it may be: nothing is done before it is waited for.
struct LateStreams {
#ifdef CUDA_ON_CPU
    LateStreams() { cuda_on_cpu::settings().late_streams = true; }
    ~LateStreams() { cuda_on_cpu::settings().late_streams = false; }
#endif
};

TEST_CASE("cuda: a run whose numbers come a step late is the same run") {
    const CudaRuns text({700});
    auto train = [&](auto device, const std::string& name, const std::string& more) {
        return text.train(device, name, more);
    };
    auto check_same = [&](const std::string& a, const std::string& b) {
        check_same_end(text.out(a), text.out(b));
    };
    const std::string often = "--eval-interval 5 --save-interval 7 --grad-accum-steps 2";
    CHECK(train(CudaStepByStep(), "straight", often) == 0);
    CHECK(checkpoint_steps(text.out("straight"))[0] == 24);
    [[maybe_unused]] const LateStreams late;
    CHECK(train(Cuda<float>(), "late", often) == 0);
    check_same("straight", "late");
    // Interrupted in the middle: the step that is under way is finished and kept, too.
    for (int step : {3, 5, 12}) {
        const std::string name = "stopped-" + std::to_string(step);
        at_step(step, [] { ::raise(SIGINT); });
        CHECK(train(Cuda<float>(), name, often) == 130);
        CHECK(train(Cuda<float>(), name, often + " --resume auto") == 0);
        check_same("straight", name);
    }
    // A step that breaks is known a step late, and stops the run all the same.
    CHECK_THROWS_WITH(train(Cuda<float>(), "broken",
                            "--learning-rate 100 --grad-clip 0 "
                            "--warmup-steps 0 --max-steps 500"),
                      doctest::Contains("training has diverged"));
}

// Shards of unequal lengths, shuffling, accumulation, dropout and early stopping; in bf16, so that
// the masters have to come back, too. Dropout's steps are no graphs, so some are resumed without
// it: such a run begins with no graph, where the straight run was in the middle of using its.
TEST_CASE("cuda: resumed at every step, it is the same run to the bit") {
    if (!has_bf16()) return;
    namespace fs = std::filesystem;
    const CudaRuns text({700, 131, 1, 2, 333}, 40);
    const std::string resumed = text.out("resumed");
    [[maybe_unused]] const LateStreams late;
    for (bool dropout : {true, false}) {
        const std::string all = format(
            "--grad-accum-steps 2 --dropout %g --max-steps 30 --learning-rate 0.1 "
            "--min-lr-fraction 0.5 --warmup-steps %d --eval-interval %d --patience %d "
            "--keep 100 --save-interval ",
            dropout ? 0.1 : 0.0, dropout ? 16 : 8, dropout ? 2 : 3, dropout ? 3 : 1);
        const std::string name = dropout ? "dropout" : "none", straight = text.out(name);
        REQUIRE(text.train(Cuda<bf16>(), name, all + "1") == 0);
        const int64_t end = checkpoint_steps(straight)[0];
        CHECK_MESSAGE((end > 10 && end < 30), "patience ended the run at step ", end);
        for (int64_t step = 0; step < end; step += dropout || step == 0 ? 1 : 6) {
            CAPTURE(dropout);
            CAPTURE(step);
            // Step 0: from the start. Saving waits for the device; a run that does not is the same.
            make_folders(resumed);
            if (step > 0) {
                fs::copy(checkpoint_folder(straight, step), checkpoint_folder(resumed, step));
                fs::copy(straight + "/log.csv", resumed + "/log.csv");
            }
            const Cuda<bf16> device;
            REQUIRE(text.train(device, "resumed", all + "0 --resume auto") == 0);
            if (step == 0) CHECK((device.context->replays > 0) == !dropout);
            if (!folder_exists(resumed + "/best")) fs::copy(straight + "/best", resumed + "/best");
            check_same_end(straight, resumed);
            fs::remove_all(resumed);
        }
    }
}

// --- Tuned matmuls

// What a device makes of a forward product, an accumulated weight gradient with a long sum, and the
// head: all products' results, in double.
template <class Device>
Values some_products(Device& cuda) {
    using A = typename Device::Activation;
    const int rows = 300, C = 24, OC = 16;
    const Array<A> x(random_values<A>(size_t(rows) * C, 1)), w(random_values<A>(size_t(C) * OC, 2)),
        b(random_values<A>(size_t(OC), 3)), dout(random_values<A>(size_t(rows) * OC, 4));
    Array<A> out(size_t(rows) * OC), dx(size_t(rows) * C);
    Array<float> dw(random_values<float>(size_t(C) * OC, 5)), logits(size_t(rows) * OC);
    cuda.linear_forward(out.data, x.data, w.data, b.data, rows, C, OC);
    for (bool accumulate : {false, true})
        cuda.linear_backward(dx.data, dw.data, dout.data, x.data, w.data, rows, C, OC, accumulate);
    cuda.head_logits(logits.data, dx.data, w.data, 1, C, OC);
    logits.count = size_t(OC);
    Values all;
    for (const Values& part : {out.values(), dx.values(), dw.values(), logits.values()})
        all.insert(all.end(), part.begin(), part.end());
    return all;
}

#ifdef CUDA_ON_CPU
TEST_CASE("cuda: tuning tries sums in 5 and 7 parts, and keeps the choice where it adds to them") {
    if (!has_bf16() || cuda_on_cpu::settings().refusals) return;
    const TemporaryFolder place;
    const std::string path = place.path + "/plans.txt";
    Cuda<bf16> cuda;
    cuda.context->matmuls->tune_from = 0;
    cuda.context->matmuls->tune_into(path, cuda.context->gpu.name);
    const int rows = 900, C = 64, OC = 128;
    const Array<bf16> x(random_values<bf16>(size_t(rows) * C, 1)),
        w(random_values<bf16>(size_t(C) * OC, 2)), dout(random_values<bf16>(size_t(rows) * OC, 3));
    Array<bf16> dx(size_t(rows) * C);
    Array<float> dw(random_values<float>(size_t(C) * OC, 4));
    cuda.linear_backward(dx.data, dw.data, dout.data, x.data, w.data, rows, C, OC, false);
    for (uint32_t parts : {5, 7}) CHECK(cuda_on_cpu::splits_wanted().count(parts) == 1);
    Values want = dw.values();
    for (double& value : want) value *= 2;
    const std::string text = read_file(path);
    cuda.linear_backward(dx.data, dw.data, dout.data, x.data, w.data, rows, C, OC, true);
    CHECK(dw.values() == want);
    CHECK(read_file(path) == text);
}

// Where the library lacks what it may lack, and where its fused GELU is slow, kernels do it.
TEST_CASE("cuda: every product has another way, for a library or a GPU that lacks the first") {
    const auto card = std::exchange(cuda_on_cpu::settings(), {}), before = cuda_on_cpu::settings();
    const int rows = 33, C = 16, OC = 72;
    auto launches = [](const std::string& name) {
        for (const auto& kernel : cuda_on_cpu::kernels())
            if (kernel.name == name) return kernel.launches;
        return 0L;
    };
    const Array<bf16> x(random_values<bf16>(size_t(rows) * C, 1)),
        w(random_values<bf16>(size_t(C) * OC, 2)), b(random_values<bf16>(size_t(OC), 3)),
        residual(random_values<bf16>(size_t(rows) * OC, 4));
    // The bias gradient of the layer that made fc, set and then added to: by a kernel of ours?
    const Array<bf16> fc(random_values<bf16>(size_t(rows) * OC, 5));
    auto own_bias = [&](Cuda<bf16>& cuda) {
        Array<bf16> dfc(fc.count), dx(x.count);
        Array<float> dw(size_t(OC) * C), dw_fc(size_t(C) * OC), bias(static_cast<size_t>(OC));
        const long before = launches("column_sums_kernel");
        for (bool accumulate : {false, true}) {
            cuda.linear_gelu_backward(dfc.data, dw.data, bias.data, x.data, fc.data, fc.data,
                                      w.data, rows, OC, C, accumulate);
            cuda.linear_backward(dx.data, dw_fc.data, dfc.data, x.data, w.data, rows, C, OC,
                                 accumulate);
        }
        Values want(static_cast<size_t>(OC)), d = dfc.values(), x_want(x.count),
                                              dw_want(dw_fc.count);
        for (size_t i = 0; i < d.size(); ++i) want[i % size_t(OC)] += 2 * d[i];
        compare("bias", bias.values(), want, 0x1p-9, 4, rows);
        for (bool accumulate : {false, true})
            Reference<double>().linear_backward(x_want.data(), dw_want.data(), d.data(),
                                                x.values().data(), w.values().data(), rows, C, OC,
                                                accumulate);
        compare("dw", dw_fc.values(), dw_want, 0x1p-24, 4, rows);
        return launches("column_sums_kernel") > before;
    };
    struct Case {
        const char* card;
        uint64_t refusals;
        bool own_gelu, own_sum, own_bias;
    };
    for (const Case& c :
         {Case{"h100", 0, false, false, false}, Case{"b200", 0, false, false, false},
          Case{"a100", 0, true, false, true}, Case{"rtx4090", 0, true, false, true},
          Case{"rtx5090", 0, true, false, true}, Case{"h100", 1, true, true, true}}) {
        CAPTURE(c.card);
        cuda_on_cpu::play_card(cuda_on_cpu::settings(), c.card);
        cuda_on_cpu::settings().refusals = c.refusals;
        Cuda<bf16> cuda;
        Array<bf16> gelu(size_t(rows) * OC), fc(size_t(rows) * OC), sum(size_t(rows) * OC);
        const long gelus = launches("gelu_kernel"), sums = launches("residual_kernel");
        cuda.linear_gelu_forward(gelu.data, fc.data, x.data, w.data, b.data, rows, C, OC);
        cuda.linear_residual_forward(sum.data, residual.data, x.data, w.data, b.data, rows, C, OC,
                                     {});
        CHECK((launches("gelu_kernel") > gelus) == c.own_gelu);
        CHECK((launches("residual_kernel") > sums) == c.own_sum);
        const Values left = residual.values();
        Values want = fc.values();
        for (size_t i = 0; i < want.size(); ++i) want[i] += left[i];
        compare("sum", sum.values(), want, 0x1p-9, 3, C);
        CHECK(own_bias(cuda) == c.own_bias);
    }
    // What is refused at random: all of these have another way, too.
    std::set<bool> ways;
    for (uint64_t seed = 2; seed < 10; ++seed) {
        cuda_on_cpu::play_card(cuda_on_cpu::settings(), "h100");
        cuda_on_cpu::settings().refusals = seed;
        Cuda<bf16> cuda;
        ways.insert(own_bias(cuda));
    }
    CHECK(ways.size() == 2);
    // A product that the library must have and has not is named.
    cuda_on_cpu::settings() = before;
    Cuda<bf16> cuda;
    cuda_on_cpu::settings().major = 7;
    CHECK(
        error_of([&] {
            Array<bf16> out(size_t(rows) * OC);
            cuda.linear_forward(out.data, x.data, w.data, b.data, rows, C, OC);
        }) ==
        "cuBLASLt has no kernel for product nn 33x72, k 16, epilogue 4, beta 0, types 14 to 14 on "
        "CUDA on CPU: CUBLASLT_LOG_LEVEL=5 makes it say why; a newer CUDA Toolkit may have one");
    cuda_on_cpu::settings() = card;
}
#endif

TEST_CASE_TEMPLATE("cuda: a tuned matmul is chosen once, written down, and the same ever after",
                   Device, Cuda<float>, CudaTf32, Cuda<bf16>) {
    const TemporaryFolder place;
    const std::string path = place.path + "/deeper/plans.txt";
    auto tuned = [&](double from = 0) {
        Device cuda;
        cuda.context->matmuls->tune_from = from;
        cuda.context->matmuls->tune_into(path, cuda.context->gpu.name);
        return some_products(cuda);
    };
    Device plain;
    const Values want = some_products(plain), got = tuned();
    compare("products", got, want, kUnit<Device>, 4, 300);
    const std::string text = read_file(path);
    CHECK(std::count(text.begin(), text.end(), '\n') == 4);
    for (int time = 0; time < 3; ++time) CHECK(tuned() == got);
    CHECK(read_file(path) == text);
    CHECK(tuned(1e9) == want);  // too small to be worth it
    // Several ranks do as the first one's file says, and time nothing.
    Ranks two;
    two.count = 2;
    Ranks* const before = std::exchange(world, &two);
    CHECK(tuned() == got);
    write_file(path, "");
    CHECK(tuned() == want);
    CHECK(read_file(path) == "");
    world = before;
    write_file(path, text);

    // Plans of another GPU or library are not ours, and stay.
    for (std::string word : {std::string(plain.context->gpu.name), std::string("cuBLASLt")}) {
        std::string others = text;
        for (size_t at = 0; (at = others.find(word, at)) != others.npos; at += word.size())
            others.replace(at, word.size(), std::string(word.size(), '?'));
        write_file(path, others);
        compare("products", tuned(), want, kUnit<Device>, 4, 300);
        CHECK(read_file(path).substr(0, others.size()) == others);
        CHECK(read_file(path).size() > others.size());
    }

    // A damaged line is refused by name.
    std::string broken = text;
    broken[broken.find('|', broken.find('|') + 1) + 2] = 'z';
    write_file(path, broken);
    CHECK_THROWS_WITH(tuned(), doctest::Contains("plans.txt:1 is damaged, or no plan that cuBLASLt "
                                                 "knows: remove the line"));
#ifdef CUDA_ON_CPU
    // The file decides: every algorithm of the stand-in adds in an order of its own, 64, 32 or 16
    // terms at a time. Why without splits: which one was fastest is a matter of the clock.
    std::set<Values> results;
    for (const char* number : {"0", "1", "2"}) {
        std::string changed = text;
        for (size_t at = changed.find("| 0000"); at != changed.npos;
             at = changed.find("| 0000", at + 2)) {
            changed.replace(at + 17, 1, number);
            changed.replace(at + 36, 16, "0000000000000001");  // not split: parts may be too short
        }
        write_file(path, changed);
        results.insert(tuned());
        CHECK(read_file(path) == changed);
    }
    CHECK(results.size() == 3);
    std::string unknown = text;
    unknown.replace(unknown.find("| 0000") + 17, 1, "7");
    write_file(path, unknown);
    CHECK_THROWS_WITH(tuned(), doctest::Contains("plans.txt:1 is damaged, or no plan"));
#endif
}

// Where our own GELU behind a plain product is faster than the library's epilogue, the file says so
// with a plan of zeros; that, too, is what every later run does.
TEST_CASE_TEMPLATE("cuda: tuning takes an epilogue or our kernel, and keeps to it", Device,
                   CudaTf32, Cuda<bf16>) {
    using A = typename Device::Activation;
    const TemporaryFolder place;
    const std::string path = place.path + "/plans.txt";
    const int rows = 40, C = 16, OC = 24;
    const Array<A> x(random_values<A>(size_t(rows) * C, 1)), w(random_values<A>(size_t(C) * OC, 2)),
        b(random_values<A>(size_t(OC), 3)), w2(random_values<A>(size_t(OC) * C, 4)),
        dout(random_values<A>(size_t(rows) * C, 5));
    auto results = [&](bool tune, bool accumulate) {
        Device cuda;
        cuda.context->matmuls->tune_from = 0;
        if (tune) cuda.context->matmuls->tune_into(path, cuda.context->gpu.name);
        Array<A> gelu(size_t(rows) * OC), fc(gelu.count), dfc(gelu.count);
        Array<float> bias(random_values<float>(size_t(OC), 6)),
            dw(random_values<float>(size_t(OC) * C, 7));
        cuda.linear_gelu_forward(gelu.data, fc.data, x.data, w.data, b.data, rows, C, OC);
        cuda.linear_gelu_backward(dfc.data, dw.data, bias.data, dout.data, gelu.data, fc.data,
                                  w2.data, rows, OC, C, accumulate);
        Array<A> dx(x.count);
        Array<float> dw_fc(random_values<float>(size_t(C) * OC, 8));
        cuda.linear_backward(dx.data, dw_fc.data, dfc.data, x.data, w.data, rows, C, OC,
                             accumulate);
        Values all;
        for (const Values& part :
             {gelu.values(), fc.values(), dfc.values(), bias.values(), dw.values(), dw_fc.values()})
            all.insert(all.end(), part.begin(), part.end());
        return all;
    };
    for (bool accumulate : {false, true}) {
        const Values want = results(false, accumulate), got = results(true, accumulate);
        compare("products", got, want, kUnit<Device>, 4, rows);
        CHECK(results(true, accumulate) == got);
        // The other of the two, by the file: first no epilogue at all.
        const std::string text = read_file(path);
        std::string changed;
        for (const std::string& line : split_at(text, '\n')) {
            if (line.empty()) continue;
            const size_t words = line.find(" | ", line.find(" | ") + 3) + 3;
            const bool epilogue =
                line.find(format(" %d ", CUBLASLT_EPILOGUE_GELU_AUX_BIAS)) < words ||
                line.find(format(" %d ", CUBLASLT_EPILOGUE_DGELU)) < words ||
                line.find(format(" %d ", CUBLASLT_EPILOGUE_BGRADA)) < words;
            changed += line.substr(0, words);
            for (size_t i = words; i < line.size(); ++i)
                changed += epilogue && i < words + 8 * 17 - 1 && line[i] != '-' ? '0' : line[i];
            changed += '\n';
        }
        CHECK(std::count(changed.begin(), changed.end(), '\n') >= 2);
        write_file(path, changed);
        const Values by_hand = results(true, accumulate);
        compare("products", by_hand, want, kUnit<Device>, 4, rows);
        CHECK(results(true, accumulate) == by_hand);
        std::remove(path.c_str());
    }
}

// What one layer of attention gives, forward and backward, by groups of warps or by single ones.
Values attention_by(bool groups, Shape s, double scale = 1) {
    Cuda<bf16> cuda;
    cuda.use_groups = groups;
    const size_t n = size_t(s.rows()) * s.C();
    const Array<bf16> qkv(random_values<bf16>(3 * n, 1, scale)), dout(random_values<bf16>(n, 2));
    Array<bf16> out(n), dqkv(3 * n);
    Array<float> lse(size_t(s.rows()) * s.NH), bias(size_t(3) * s.C());
    cuda.attention_forward(out.data, lse.data, qkv.data, s.B, s.T, s.NH, s.HS, {});
    const std::string way = groups ? " (wgmma)" : " (mma.sync)";
    CHECK(cuda.way() == way);
    cuda.attention_backward(dqkv.data, bias.data, dout.data, out.data, lse.data, qkv.data, s.B, s.T,
                            s.NH, s.HS, {}, false);
    CHECK(cuda.way() == way);
    Values all = out.values();
    for (const Values& more : {lse.values(), dqkv.values(), bias.values()})
        all.insert(all.end(), more.begin(), more.end());
    return all;
}

// On a GPU of compute capability 9.0.
TEST_CASE("cuda: attention by groups of warps gives what single warps give") {
    if (Cuda<float>().context->gpu.major != 9) return;
    for (Shape s : {Shape{1, 1, 1, 64, 0}, Shape{2, 33, 2, 64, 0}, Shape{1, 64, 1, 64, 0},
                    Shape{1, 65, 3, 64, 0}, Shape{1, 130, 1, 64, 0}, Shape{1, 200, 2, 64, 0},
#ifndef CUDA_ON_CPU
                    Shape{16, 130, 20, 64, 0},  // blocks of 128 rows on a whole GPU
#endif
                    Shape{1, 257, 1, 64, 0}})
        for (int processors : {1, 1000})
            for (double scale : {1.0, 6.0}) {
                const std::string at = place_of({{"s.T", double(s.T)}, {"scale", scale}});
                CAPTURE(at);
#ifdef CUDA_ON_CPU
                const int before =
                    std::exchange(cuda_on_cpu::settings().multiprocessors, processors);
#else
                if (processors == 1000) continue;
#endif
                const Values want = attention_by(false, s, scale);
                compare("attention", attention_by(true, s, scale), want, 0x1p-9, 5, s.T, 1 + scale);
#ifdef CUDA_ON_CPU
                std::set<Values> results;
                if (scale == 1)
                    again_in_other_orders([&] { results.insert(attention_by(true, s, scale)); });
                CHECK(results.size() == (scale == 1));
                cuda_on_cpu::settings().multiprocessors = before;
#endif
            }
}

// Where the two differ, or the GPU has only one, it is mma.sync; dropout has only one, too.
TEST_CASE("cuda: attention by groups of warps is taken where it is right") {
    if (Cuda<float>().context->gpu.major != 9) return;
    const Shape s{1, 70, 2, 64, 0};
    const size_t n = size_t(s.rows()) * s.C();
    const Array<bf16> qkv(random_values<bf16>(3 * n, 1)), dout(random_values<bf16>(n, 2));
    auto ways = [&](double agreement, Dropout drop = {}) {
        Cuda<bf16> cuda;
        cuda.context->agreement = agreement;
        Array<bf16> out(n), dqkv(3 * n);
        Array<float> lse(size_t(s.rows()) * s.NH), bias(random_values<float>(size_t(3) * s.C(), 5));
        const Values before = bias.values();
        std::string all;
        for (int time = 0; time < 2; ++time) {
            cuda.attention_forward(out.data, lse.data, qkv.data, s.B, s.T, s.NH, s.HS, drop);
            all += cuda.way();
            cuda.attention_backward(dqkv.data, bias.data, dout.data, out.data, lse.data, qkv.data,
                                    s.B, s.T, s.NH, s.HS, drop, true);
            all += cuda.way();
        }
        // The bias gradient was added to once for each call, whatever way was tried first.
        Values sums = before, got = dqkv.values();
        for (size_t i = 0; i < got.size(); ++i) sums[i % sums.size()] += 2 * got[i];
        compare("bias", bias.values(), sums, 0x1p-8, 4, s.T, 4);
        return all;
    };
    const std::string never = " (mma.sync) (mma.sync) (mma.sync) (mma.sync)";
    CHECK(ways(0x1p-8) == " (wgmma) (wgmma) (wgmma) (wgmma)");
    CHECK(ways(0x1p-8, kDrop) == never);
    std::string said;
    {
        const Captured err(STDERR_FILENO, said);
        CHECK(ways(NAN) == never);  // nothing agrees with anything
    }
    const std::string rest = ": results by wgmma differ, so mma.sync is used\n";
    CHECK(said == "warning: attention forward" + rest + "warning: attention backward" + rest);
#ifdef CUDA_ON_CPU
    const int before = std::exchange(cuda_on_cpu::settings().major, 8);
    CHECK(ways(0x1p-8) == never);
    cuda_on_cpu::settings().major = before;
#endif
}

// --- What a GPU cannot do is refused before anything is done

#ifdef CUDA_ON_CPU
TEST_CASE("cuda: no GPU, an old one, a small one, sizes it has no kernels for: a line says so") {
    const CudaRuns text({400'000});
    const auto card = std::exchange(cuda_on_cpu::settings(), {}), before = cuda_on_cpu::settings();
    auto refusal = [&](const std::string& line) {
        cudaGetLastError();  // of the refusal before
        const Options o = text.options("--output " + text.out() + " " + line);
        const std::string message = error_of([&] { outcome_of([&] { return run_on_gpu(o); }); });
        std::filesystem::remove_all(text.out());
        return message;
    };
    CHECK(refusal("--max-steps 1") == "");

    cuda_on_cpu::settings().device_count = 0;
    CHECK(refusal("--max-steps 1") ==
          "there is no GPU here to train on (no CUDA-capable device is detected): "
          "type make train_gpt && ./train_gpt to train on the CPU");
    cuda_on_cpu::settings() = before;
    cuda_on_cpu::settings().old_driver = true;
    CHECK(
        refusal("--max-steps 1") ==
        "this program was built with CUDA Toolkit 12.0, and the GPU's driver is for 11.8 at most: "
        "install a newer driver, or build with an older Toolkit (make train_gpt_cu NVCC=...)");
    cuda_on_cpu::settings() = before;
    cuda_on_cpu::settings().has_code = false;
    CHECK(refusal("--max-steps 1") ==
          "this program holds no code for CUDA on CPU, of compute capability 9.0: type make "
          "train_gpt_cu CUDA_ARCHS=90a");
    cuda_on_cpu::settings().major = 7;
    CHECK(refusal("--max-steps 1") ==
          "this program holds no code for CUDA on CPU, of compute capability 7.0: type make "
          "train_gpt_cu CUDA_ARCHS=70 with CUDA Toolkit 12, as later ones begin at 7.5");
    cuda_on_cpu::settings() = before;

    cuda_on_cpu::settings().major = 7, cuda_on_cpu::settings().minor = 5;
    CHECK(refusal("--max-steps 1") == "");  // in fp32
    for (const char* precision : {"bf16", "tf32"})
        CHECK(refusal(std::string("--precision ") + precision) ==
              std::string("--precision ") + precision +
                  " needs a GPU of compute capability 8.0 or later, and CUDA on CPU has 7.5: use "
                  "--precision fp32");
    // Its blocks have 64 KB of shared memory: heads are narrower, and so is layernorm's backward.
    CHECK(refusal("--n-embd 128 --n-head 1") ==
          "on a GPU a head has at most 64 channels, and n_embd / n_head is 128: use --n-head 2");
    CHECK(refusal("--n-embd 2048") == "on this GPU n_embd is at most 1280; it is 2048");
    cuda_on_cpu::settings() = before;

    // 300 MB, of which 256 are left for cuBLASLt, code and graphs.
    cuda_on_cpu::settings().memory_bytes = cuda_on_cpu::buffers().bytes_in_use + (300u << 20);
    const long buffers = cuda_on_cpu::buffers().count;
    CHECK(refusal("--batch-size 4096 --n-embd 64") ==
          "these sizes need 124.5 MB of memory, and 46.1 MB are free: --batch-size 1024 would "
          "fit (with --grad-accum-steps 4 for the same step)");
    CHECK(refusal("--n-embd 4096 --n-head 32") ==
          "these sizes need 3.65 GB of memory, and 46.1 MB are free: choose a smaller --model");
    CHECK(refusal("--n-embd 12") ==
          "on a GPU n_embd must be a multiple of 8; it is 12: use --n-embd 16");
    CHECK(refusal("--n-embd 1040 --n-head 4") ==
          "on a GPU a head has at most 128 channels, and n_embd / n_head is 260: use --n-head 10");
    CHECK(refusal("--batch-size 40000") ==
          "on a GPU a batch has at most 65535 heads, and this one has 40000 times 2: use "
          "--batch-size 32767 or less");
    CHECK(cuda_on_cpu::buffers().count == buffers);  // nothing was allocated
    CHECK_FALSE(folder_exists(text.out()));
    cuda_on_cpu::settings() = card;
}
#endif

TEST_CASE_TEMPLATE("cuda: the peaks are measured, and leave the memory as it was", Device,
                   Cuda<float>, CudaTf32, Cuda<bf16>) {
    Device device;
    // The first time kernels are loaded. Later only another program on the GPU may change it.
    size_t before = 0, after = 1;
    for (int time = 0; time < 2 || (time < 20 && after != before); ++time) {
        before = device.free_memory();
        CHECK(device.peak_flops() > 1e6);
        CHECK(device.peak_bandwidth() > 1e6);
        after = device.free_memory();
    }
    CHECK(after == before);
}

// What bench shows of a step is all that the step starts.
TEST_CASE_TEMPLATE("cuda: the kernels of a step are all timed", Device, Cuda<float>, Cuda<bf16>) {
    const int B = 2, T = 9, C = 32, L = 2, V = 29;
    Gpt2<Watched<Device>> model({L, 1, C, 16, V});
    model.reserve(B, T, Use::training);
    set_weights(model, random_weights<typename Device::Activation>(model.config));
    const std::vector<Batch> batches = {random_batch(1, B, T, V, 5)};
    StepOptions options;
    auto launches = [] {
        std::map<std::string, long> all;
#ifdef CUDA_ON_CPU
        for (const auto& kernel : cuda_on_cpu::kernels()) all[kernel.name] = kernel.launches;
#endif
        return all;
    };
    for (int s = 0; s < 3; ++s) train_step(model, batches, options, s);  // as a graph, too
    std::map<std::string, int> calls;
    double flops = 0;
    auto before = launches();
    const int64_t replays = model.device.context->replays;
    model.device.watcher = [&](const Call& call) {
        model.device.kernels_are_for(call.function == "layernorm_forward" ? 7 : -1);
        call.make();
    };
    const auto timed = model.device.kernel_times([&] { train_step(model, batches, options, 3); });
    model.device.watcher = nullptr;
    for (const KernelTime& kernel : timed)
        CHECK((kernel.row == 7) == (kernel.name == "layernorm_forward"));
    std::vector<KernelTime> sums;
    for (const KernelTime& kernel : timed) add_call(sums, kernel);
    for (const KernelTime& kernel : sums) {
        CAPTURE(kernel.name);
        CHECK(kernel.seconds >= 0);
        CHECK((kernel.flops > 0) == kernel.name.starts_with("product "));
        CHECK(calls.count(kernel.name) == 0);
        calls[kernel.flops > 0 ? "product" : kernel.name] += kernel.calls;
        flops += kernel.flops;
    }
    CHECK(model.device.context->replays == replays);
    CHECK(calls["adamw"] == 1);
    CHECK(calls["layernorm_forward"] == 2 * L + 1);
    CHECK(calls["layernorm_backward"] == 2 * L + 1);
    CHECK(calls["softmax_cross_entropy"] == 1);
    CHECK(calls["product"] == 12 * L + 3);
    CHECK(calls["copy"] == 3);
    CHECK(calls["zero"] == 1);
    CHECK(flops == 6.0 * B * T * C * (12 * C * L + double(table_rows(V))));
#ifdef CUDA_ON_CPU
    for (const auto& [kernel, after] : launches()) {
        const std::string name = kernel;
        CAPTURE(name);
        CHECK(calls[name.substr(0, name.find("_kernel"))] == after - before[name]);
    }
#endif
    // Nothing is timed any more: the step is a graph again.
    train_step(model, batches, options, 4);
    CHECK(model.device.context->replays == replays + 1);
}

#ifdef CUDA_ON_CPU
// One step of one layer, in each precision that the card has.
TEST_CASE("cuda: GPT-2's vocabulary, on every card") {
    const auto before = cuda_on_cpu::settings();
    auto loss = [](auto device) {
        Gpt2<decltype(device)> model({1, 1, 64, 8, 50257}, device);
        model.initialise(1);
        model.reserve(1, 4, Use::training);
        train_step(model, {random_batch(1, 1, 4, 50257, 0)}, {}, 0);
        return state_of(model).loss;
    };
    for (const cuda_on_cpu::Card& card : cuda_on_cpu::cards) {
        CAPTURE(card.name);
        cuda_on_cpu::play_card(cuda_on_cpu::settings(), card.name);
        CHECK(loss(Cuda<float>()) == doctest::Approx(std::log(50257)).epsilon(0.02));
        if (card.major < 8) continue;
        CHECK(loss(CudaTf32()) == doctest::Approx(std::log(50257)).epsilon(0.02));
        CHECK(loss(Cuda<bf16>()) == doctest::Approx(std::log(50257)).epsilon(0.02));
    }
    cuda_on_cpu::settings() = before;
}

TEST_CASE("cuda: every kernel was launched") {
    long launches = 0;
    for (const auto& kernel : cuda_on_cpu::kernels()) launches += kernel.launches;
    if (launches == 0) return;  // none of the tests above was asked for
    for (const auto& kernel : cuda_on_cpu::kernels()) {
        CAPTURE(kernel.name);
        CHECK(kernel.launches > 0);
    }
}
#endif

}  // namespace cuda_tests

#endif  // TINYGPT_TEST_CUDA
