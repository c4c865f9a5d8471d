// torture: kills, interrupts and starves small runs, and compares what comes out of them with a run
// that nobody disturbed. `make torture` builds and runs it: about five minutes, a table at the end,
// exit status 0 if nothing was lost. Options: --seed N, --part NAME, --scale F (0.1: a tenth),
// --cuda PROGRAM (train_gpt_cu_on_cpu, or on a GPU train_gpt_cu).
//
// The trainer runs in a child process of this program (fork, without exec), so that
// file_fault() can slow its file operations down, fail them, and say where the child is.
// Only what is resumed on the CUDA device is a program of its own.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <filesystem>

#include "faults.hpp"
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"

using namespace tinygpt;
namespace fs = std::filesystem;
using Arguments = std::vector<std::string>;

// ---- a run, in a child process -----------------------------------------------------------------

// What the child tells while it runs; in memory that both see.
struct Progress {
    std::atomic<int> in_save, calls, failed;
    std::atomic<int> save_began;  // at which call the last save did
};

struct Child {
    Arguments arguments;
    int slow_us = 0;               // every write, fsync, rename and mkdir waits so long first
    int fail_at = -1;              // this call of the run fails ...
    int code = 0;                  // ... with this errno, or comes up short (-1)
    rlim_t limit = RLIM_INFINITY;  // of every file's size
    std::string program = "";      // to be run instead of this one's trainer
};

class Torture {
public:
    Torture(uint64_t seed, double scale, const std::string& cuda)
        : seed_(seed), scale_(scale), cuda_(cuda) {
        // In memory where that is possible: thousands of saves wait for every fsync.
        const char* base = std::getenv("TMPDIR");
        folder_ = base && *base ? base : ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
        folder_ += "/tinygpt-torture-XXXXXX";
        if (!::mkdtemp(folder_.data())) fail_errno("cannot make the folder ", folder_);
        progress_ = static_cast<Progress*>(::mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE,
                                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0));
        make_data();
        if (finish(start({arguments("straight")})) != 0)
            fail("the undisturbed run fails: ", said());
    }
    ~Torture() { fs::remove_all(folder_); }

    bool all(const std::string& only);

private:
    std::string path(const std::string& name) const { return folder_ + "/" + name; }
    // Whole numbers below n, from the seed.
    int random(int n) { return int(random_bits(seed_, drawn_++) % uint64_t(std::max(1, n))); }
    int times(int n) const { return std::max(1, int(n * scale_ + 0.5)); }

    void make_data();
    Arguments arguments(const std::string& output, const Arguments& more = {}) const;
    pid_t start(const Child& child);
    [[noreturn]] void be_child(const Child& child);
    int finish(pid_t pid);
    std::string said() const { return read_file(path("stderr")); }
    bool same(const std::string& output, const std::string& straight = "straight") const;
    void end_row(const std::string& what, int tries, const std::string& note, int wrong);
    // Waits until the child is saving (or has ended).
    bool wait_for_save(pid_t pid);

    void kills();
    void interrupts(int signal, const char* name);
    void full_disk();
    void flipped_bits();
    void failing_calls();
    void every_step(const std::string& program, int max_threads);

    uint64_t seed_, drawn_ = 0;
    double scale_, began_ = now_seconds();
    int wrong_ = 0;
    std::string folder_, cuda_;
    Progress* progress_;
};

// Shards of unequal lengths: words that repeat, with noise.
void Torture::make_data() {
    make_folders(path("data"));
    int number = 0;
    for (size_t length : {700u, 131u, 1u, 2u, 333u, 150u}) {
        std::vector<uint16_t> shard(512 + length);  // the header is 256 int32
        const int32_t header[3] = {kShardMagic, 1, int32_t(length)};
        std::memcpy(shard.data(), header, sizeof header);
        for (size_t i = 0; i < length; i++) {
            const uint64_t noise = random_bits(uint64_t(number), i);
            shard[512 + i] = uint16_t(noise % 5 ? "the cat sat "[i % 12] : 'a' + noise / 5 % 26);
        }
        const char* split = length == 150 ? "val" : "train";
        write_file(path("data") + format("/%s_%06d.bin", split, number++),
                   {reinterpret_cast<const char*>(shard.data()), 2 * shard.size()});
    }
    Tokenizer::bytes().save(path("data"));
}

Arguments Torture::arguments(const std::string& output, const Arguments& more) const {
    Arguments all = {"--data",
                     path("data"),
                     "--output",
                     path(output),
                     "--resume",
                     "auto",
                     "--n-layer",
                     "1",
                     "--n-embd",
                     "8",
                     "--n-head",
                     "2",
                     "--n-positions",
                     "8",
                     "--seq-len",
                     "8",
                     "--batch-size",
                     "3",
                     "--grad-accum-steps",
                     "2",
                     "--dropout",
                     "0.1",
                     "--max-steps",
                     "30",
                     "--learning-rate",
                     "0.1",
                     "--min-lr-fraction",
                     "0.5",
                     "--warmup-steps",
                     "16",
                     "--eval-interval",
                     "2",
                     "--eval-batches",
                     "1",
                     "--patience",
                     "5",
                     "--sample-interval",
                     "0",
                     "--save-interval",
                     "3",
                     "--threads",
                     "1"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
}

pid_t Torture::start(const Child& child) {
    progress_->in_save = 0, progress_->calls = 0, progress_->failed = 0;
    std::fflush(stdout);
    const pid_t pid = ::fork();
    if (pid < 0) fail_errno("cannot fork");
    if (pid == 0) be_child(child);
    return pid;
}

void Torture::be_child(const Child& child) {
    const int null = ::open("/dev/null", O_WRONLY);
    const int err = ::open(path("stderr").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666);
    ::dup2(null, 1), ::dup2(err, 2);
    const rlimit limit = {child.limit, RLIM_INFINITY};
    ::signal(SIGXFSZ, SIG_IGN);
    if (child.limit != RLIM_INFINITY) ::setrlimit(RLIMIT_FSIZE, &limit);
    file_fault() = [this, child](const char* call, const std::string& where) {
        const std::string what = call;
        // A save of a checkpoint: from making its folder to the sync of the folder above it.
        if (what == "mkdir" && where.ends_with(".tmp"))
            progress_->in_save = 1, progress_->save_began = progress_->calls.load();
        if (progress_->in_save == 2 && what == "fsync") progress_->in_save = 3;
        const bool named = what == "rename" || what == "exchange";
        if (named && where.find(".tmp") == where.npos && progress_->in_save == 1)
            progress_->in_save = 2;
        if (child.slow_us > 0 && progress_->in_save > 0) ::usleep(unsigned(child.slow_us));
        if (progress_->in_save == 3) progress_->in_save = 0;
        if (progress_->calls++ != child.fail_at) return 0;
        progress_->failed = 1;
        return child.code;
    };
    std::vector<std::string> words = child.arguments;
    words.insert(words.begin(), child.program.empty() ? "train_gpt" : child.program);
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    if (!child.program.empty()) {
        argv.push_back(nullptr);
        ::execv(argv[0], argv.data());
        ::_exit(127);
    }
    const int status = program(int(argv.size()), argv.data(), "train_gpt",
                               [](const Options& o) { return run_command(make_cpu(o), o); });
    std::fflush(nullptr);
    ::_exit(status);
}

// The exit status; minus the signal where one ended it.
int Torture::finish(pid_t pid) {
    int status = 0;
    while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

bool Torture::wait_for_save(pid_t pid) {
    for (int i = 0; i < 20'000; i++) {
        siginfo_t info{};
        ::waitid(P_PID, id_t(pid), &info, WEXITED | WNOHANG | WNOWAIT);
        if (info.si_pid == pid) return false;
        if (progress_->in_save) return true;
        ::usleep(100);
    }
    return false;
}

// ---- comparing ---------------------------------------------------------------------------------

// log.csv without its three timing columns.
static std::string rows_of(const std::string& output) {
    std::string rows;
    for (const std::string& line : split_at(read_file(output + "/log.csv"), '\n')) {
        size_t end = line.size();
        for (int i = 0; i < 3 && end != line.npos && end > 0; i++) end = line.rfind(',', end - 1);
        rows += line.substr(0, end) + "\n";
    }
    return rows;
}

// The finished run has the undisturbed run's log, weights, moments and best model.
bool Torture::same(const std::string& output, const std::string& straight) const {
    const std::string a = path(straight), b = path(output);
    const auto steps = checkpoint_steps(a), found = checkpoint_steps(b);
    if (found.empty() || steps[0] != found[0] || rows_of(a) != rows_of(b)) return false;
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
        if (read_file(checkpoint_folder(a, steps[0]) + "/" + name) !=
            read_file(checkpoint_folder(b, steps[0]) + "/" + name))
            return false;
    return read_file(a + "/best/model.safetensors") == read_file(b + "/best/model.safetensors");
}

void Torture::end_row(const std::string& what, int tries, const std::string& note, int wrong) {
    std::printf("%-34s %6d  %-34s %5d  %6.1f s\n", what.c_str(), tries, note.c_str(), wrong,
                now_seconds() - std::exchange(began_, now_seconds()));
    std::fflush(stdout);
    wrong_ += wrong;
}

// ---- what is done to them ----------------------------------------------------------------------

// SIGKILL at random moments; every second one inside a save, which is slowed down for it. The run
// is started again and again until it ends, and then another one begins.
void Torture::kills() {
    int killed = 0, inside = 0, wrong = 0, runs = 0;
    const int wanted = times(200);
    while (killed < wanted) {
        const std::string output = format("kill%d", runs++);
        for (int attempt = 0;; attempt++) {
            // The last attempts are left alone, so that every run ends.
            const bool alone = killed >= wanted || attempt >= 40;
            const pid_t pid = start({arguments(output), alone ? 0 : 100});
            if (!alone) {
                if (random(2))
                    wait_for_save(pid), ::usleep(unsigned(random(12'000)));
                else
                    ::usleep(unsigned(random(250'000)));
                ::kill(pid, SIGKILL);
            }
            const bool in_save = progress_->in_save;
            const int status = finish(pid);
            if (status == -SIGKILL)
                ++killed, inside += in_save;
            else if (status != 0)
                ++wrong;
            // A kill never damages a checkpoint, so none may be passed over, or be missed.
            if (said().find("passing over") != std::string::npos || status > 0) ++wrong;
            if (status >= 0) break;
        }
        if (!same(output)) ++wrong;
        fs::remove_all(path(output));
    }
    end_row("SIGKILL", killed, format("%d inside a save, %d runs", inside, runs), wrong);
}

// One request to stop: the step is finished, the run is saved, the status is 130.
void Torture::interrupts(int signal, const char* name) {
    int sent = 0, stopped = 0, wrong = 0, runs = 0;
    const int wanted = times(50);
    while (sent < wanted) {
        const std::string output = format("stop%d", runs++);
        for (int status = 130; status == 130;) {
            const pid_t pid = start({arguments(output), sent < wanted ? 300 : 0});
            ::usleep(unsigned(random(120'000)));
            // Before it has begun to train, a signal ends it as it would end any program.
            const bool begun = progress_->calls > 3;
            if (sent < wanted && begun) ::kill(pid, signal), ++sent;
            status = finish(pid);
            stopped += status == 130;
            if (status != 0 && status != 130) ++wrong;
        }
        if (!same(output)) ++wrong;
        fs::remove_all(path(output));
    }
    end_row(name, sent, format("%d stopped with 130, %d runs", stopped, runs), wrong);
}

// No file may grow beyond some size: the checkpoint, the log, or both do not fit any more. Then
// there is room again, and the run goes on.
void Torture::full_disk() {
    int wrong = 0, warned = 0;
    const int wanted = times(50);
    for (int i = 0; i < wanted; i++) {
        const std::string output = format("full%d", i);
        // Most sizes are small: from 0 to 30,000 bytes, evenly on a scale of logarithms.
        const rlim_t limit = rlim_t(std::exp(std::log(30'001.0) * random(10'000) / 10'000)) - 1;
        const int status = finish(start({arguments(output), 0, -1, 0, limit}));
        warned += said().find(std::strerror(EFBIG)) != std::string::npos;
        for (int64_t step : checkpoint_steps(path(output)))  // whatever is there is whole
            wrong += verify_checkpoint(checkpoint_folder(path(output), step)).step != step;
        if (status != 0 && status != 1) ++wrong;
        if (finish(start({arguments(output)})) != 0 || !same(output)) ++wrong;
        fs::remove_all(path(output));
    }
    end_row("full disk (file size limit)", wanted, format("%d said so", warned), wrong);
}

// One bit of one file of a checkpoint: it must be noticed, wherever it is.
void Torture::flipped_bits() {
    const std::string output = path("straight"),
                      checkpoint = checkpoint_folder(output, checkpoint_steps(output)[0]);
    std::vector<std::pair<std::string, size_t>> files;
    size_t total = 0;
    for (const std::string& name : list_folder(checkpoint)) {
        files.emplace_back(checkpoint + "/" + name, read_file(checkpoint + "/" + name).size());
        total += files.back().second;
    }
    int silent = 0;
    const int wanted = times(500);
    for (int i = 0; i < wanted; i++) {
        // Every other one in any byte of the folder, the rest evenly over its files.
        size_t at = size_t(random(int(total))), file = 0;
        while (at >= files[file].second) at -= files[file++].second;
        if (i % 2)
            file = size_t(random(int(files.size()))), at = size_t(random(int(files[file].second)));
        const std::string good = read_file(files[file].first);
        std::string bad = good;
        bad[at] = char(bad[at] ^ (1 << random(8)));
        write_file(files[file].first, bad);
        try {
            verify_checkpoint(checkpoint);
            ++silent;
        } catch (const Error&) {}
        write_file(files[file].first, good);
    }
    verify_checkpoint(checkpoint);
    end_row("flipped bits in a checkpoint", wanted,
            format("%zu files, %zu bytes", files.size(), total), silent);
}

// Every write, fsync, rename, mkdir, ... of a run's second save fails in turn, in three ways.
void Torture::failing_calls() {
    int tries = 0, wrong = 0, stopped = 0;
    // Where that save begins and ends is counted in a run of six steps.
    auto six = [&](const std::string& output) {
        return arguments(output, {"--max-steps", "6", "--patience", "0", "--eval-interval", "0"});
    };
    finish(start({six("calls")}));
    const int first = progress_->save_began, last = progress_->calls;
    fs::remove_all(path("calls"));
    auto weights = [&](const std::string& output) {
        return read_file(path(output) + "/checkpoint-6/model.safetensors");
    };
    finish(start({six("six")}));
    for (int code : {EIO, ENOSPC, -1})
        for (int call = first; call < last; call += scale_ < 1 ? 3 : 1, tries++) {
            const int status = finish(start({six("fails"), 0, call, code}));
            stopped += status == 1;
            if ((status != 0 && status != 1) || !progress_->failed) ++wrong;
            const auto steps = checkpoint_steps(path("fails"));
            if (steps.empty()) ++wrong;
            for (int64_t step : steps)
                wrong += verify_checkpoint(checkpoint_folder(path("fails"), step)).step != step;
            if (finish(start({six("fails")})) != 0 || weights("fails") != weights("six") ||
                rows_of(path("fails")) != rows_of(path("six")))
                ++wrong;
            fs::remove_all(path("fails"));
        }
    end_row("a call of a save fails", tries,
            format("%d calls x 3 ways, %d stopped", last - first, stopped), wrong);
}

// A run of which every step is a checkpoint, resumed at each of them, on 1, 2, ... threads.
void Torture::every_step(const std::string& program, int max_threads) {
    int tries = 0, wrong = 0;
    auto child = [&](const std::string& output, const Arguments& more) {
        return Child{arguments(output, more), 0, -1, 0, RLIM_INFINITY, program};
    };
    finish(start(child("steps", {"--save-interval", "1", "--keep", "100"})));
    if (!folder_exists(path("steps") + "/best")) fail("the run of every step fails: ", said());
    const int64_t end = checkpoint_steps(path("steps"))[0];
    for (int threads = 1; threads <= max_threads; threads++)
        for (int64_t step = 1; step < end; step += scale_ < 1 ? 5 : 1, tries++) {
            make_folders(path("again"));
            fs::copy(checkpoint_folder(path("steps"), step), checkpoint_folder(path("again"), step),
                     fs::copy_options::recursive);
            fs::copy(path("steps") + "/log.csv", path("again") + "/log.csv");
            fs::copy(path("steps") + "/best", path("again") + "/best");
            const int status = finish(start(child("again", {"--threads", format("%d", threads)})));
            if (status != 0 || !same("again", "steps")) ++wrong;
            fs::remove_all(path("again"));
        }
    // How often a run saves does not matter either.
    if (finish(start(child("seldom", {}))) != 0 || !same("seldom", "steps")) ++wrong;
    fs::remove_all(path("steps")), fs::remove_all(path("seldom"));
    end_row(program.empty() ? "resumed at every step" : "the same, on the CUDA device", tries,
            format("ends at %lld (patience), %s", (long long)end,
                   program.empty() ? format("1-%d threads", max_threads).c_str() : "bf16"),
            wrong);
}

bool Torture::all(const std::string& only) {
    std::printf("seed %llu, in %s\n\n%-34s %6s  %-34s %5s  %8s\n", (unsigned long long)seed_,
                folder_.c_str(), "what was done", "times", "", "lost", "time");
    const std::vector<std::pair<std::string, std::function<void()>>> parts = {
        {"steps", [&] { every_step("", 3); }},
        {"cuda",
         [&] {
             if (!cuda_.empty()) every_step(cuda_, 1);
         }},
        {"kill", [&] { kills(); }},
        {"int", [&] { interrupts(SIGINT, "SIGINT"); }},
        {"term", [&] { interrupts(SIGTERM, "SIGTERM"); }},
        {"disk", [&] { full_disk(); }},
        {"calls", [&] { failing_calls(); }},
        {"bits", [&] { flipped_bits(); }},
    };
    for (auto& [name, part] : parts)
        if (only.empty() || only == name) part();
    std::printf("\n%s\n", wrong_ ? "LOST OR WRONG: see above" : "nothing was lost");
    return wrong_ == 0;
}

int main(int argc, char** argv) {
    wait_politely(argv);
    omp_set_num_threads(1);  // a child of fork() must not inherit threads that it does not have
    uint64_t seed = 1;
    double scale = 1;
    std::string part, cuda;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i];
        if (name == "--seed")
            seed = std::strtoull(argv[i + 1], nullptr, 10);
        else if (name == "--scale")
            scale = std::strtod(argv[i + 1], nullptr);
        else if (name == "--part")
            part = argv[i + 1];
        else if (name == "--cuda")
            cuda = argv[i + 1];
    }
    try {
        return Torture(seed, scale, cuda).all(part) ? 0 : 1;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
