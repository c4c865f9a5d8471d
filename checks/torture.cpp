// torture: kills, interrupts and starves small runs, and compares what comes out of them with a run
// that nobody disturbed. `make torture` builds and runs it: about five minutes, a table at the end,
// exit status 0 if nothing was lost. Options: --seed N, --part NAME, --scale F (0.1: a tenth),
// --cuda PROGRAM (train_gpt_cu_on_cpu, or on a GPU train_gpt_cu).
//
// The trainer runs in a child process of this program (fork, without exec), so that file_fault() can
// slow its file operations down, fail them, and say where the child is. Only what is resumed on the
// CUDA device is a program of its own.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"
#include "runs.hpp"

using namespace tinygpt;
namespace fs = std::filesystem;

static uint64_t seed = 1, drawn = 0;
static double scale = 1;
static std::string cuda;
static const SmallRuns* runs;

// Whole numbers below n, from the seed.
static int random(int n) { return int(random_bits(seed, drawn++) % uint64_t(std::max(1, n))); }
static int times(int n) { return std::max(1, int(n * scale + 0.5)); }

// --- A run, in a child process

// What the child tells while it runs; in memory that both see.
struct Progress {
    std::atomic<int> in_save, calls, failed;
    std::atomic<int> save_began;  // at which call the last save did
};
static Progress* progress;

struct Child {
    Arguments arguments;
    int slow_us = 0;               // every write, fsync, rename and mkdir waits so long first
    int fail_at = -1;              // this call of the run fails ...
    int code = 0;                  // ... with this errno, or comes up short (-1)
    rlim_t limit = RLIM_INFINITY;  // of every file's size
    std::string program = "";      // to be run instead of this one's trainer
};

static Arguments run_in(const std::string& output, const Arguments& more = {}) {
    return runs->arguments(output, joined({"--resume", "auto", "--save-interval", "3"}, more));
}

// Follows the child's calls, slows them down and fails one of them, as it was told.
static int follow(const Child& child, const std::string& call, const std::string& path) {
    // A save of a checkpoint: from making its folder to the sync of the folder above it.
    if (call == "mkdir" && path.ends_with(".tmp"))
        progress->in_save = 1, progress->save_began = progress->calls.load();
    if (progress->in_save == 2 && call == "fsync") progress->in_save = 3;
    const bool named =
        call == "rename" && path.find(".tmp") == path.npos && !path.ends_with(".old");
    if (named && progress->in_save == 1) progress->in_save = 2;
    if (child.slow_us > 0 && progress->in_save > 0) ::usleep(unsigned(child.slow_us));
    if (progress->in_save == 3) progress->in_save = 0;
    if (progress->calls++ != child.fail_at) return 0;
    progress->failed = 1;
    return child.code;
}

[[noreturn]] static void be_child(const Child& child) {
    const std::string err = runs->out("stderr");
    ::dup2(::open("/dev/null", O_WRONLY), 1);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666), 2);
    const rlimit limit = {child.limit, RLIM_INFINITY};
    ::signal(SIGXFSZ, SIG_IGN);
    if (child.limit != RLIM_INFINITY) ::setrlimit(RLIMIT_FSIZE, &limit);
    file_fault() = [child](const char* call, const std::string& path) {
        return follow(child, call, path);
    };
    Arguments all = joined({child.program.empty() ? "train_gpt" : child.program}, child.arguments);
    std::vector<char*> argv;
    for (std::string& word : all) argv.push_back(word.data());
    argv.push_back(nullptr);
    if (!child.program.empty()) ::execv(argv[0], argv.data()), ::_exit(127);
    const int status = program(int(all.size()), argv.data(), "train_gpt", run_on_cpu);
    std::fflush(nullptr);
    ::_exit(status);
}
static pid_t start(const Child& child) {
    progress->in_save = 0, progress->calls = 0, progress->failed = 0;
    std::fflush(stdout);
    const pid_t pid = ::fork();
    if (pid < 0) fail_errno("cannot fork");
    if (pid == 0) be_child(child);
    return pid;
}

// The exit status; minus the signal where one ended it.
static int finish(pid_t pid) {
    int status = 0;
    while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
static int finish(const Child& child) { return finish(start(child)); }
static std::string said() { return read_file(runs->out("stderr")); }

// Waits until the child is saving, or has ended.
static void wait_for_save(pid_t pid) {
    for (int i = 0; i < 20'000 && !progress->in_save; i++, ::usleep(100)) {
        siginfo_t info{};
        ::waitid(P_PID, id_t(pid), &info, WEXITED | WNOHANG | WNOWAIT);
        if (info.si_pid == pid) return;
    }
}

// --- What is done to them

// The row of the table: how often it was done, what is worth saying, and how often it went wrong.
struct Row {
    int times = 0, wrong = 0;
    std::string note;
    // The run has ended as the other did; it is removed.
    void compare(const std::string& output, const std::string& straight = "straight") {
        wrong += !difference(runs->out(straight), runs->out(output)).empty();
        fs::remove_all(runs->out(output));
    }
    // Whatever checkpoint is there is whole.
    void verify(const std::string& output) {
        for (int64_t step : checkpoint_steps(runs->out(output)))
            wrong += verify_checkpoint(checkpoint_folder(runs->out(output), step)).step != step;
    }
};

// SIGKILL at random moments; every second one inside a save, which is slowed down for it. The run
// is started again and again until it ends, and then another one begins.
static Row kills() {
    Row row;
    int inside = 0, number = 0;
    for (const int wanted = times(200); row.times < wanted;) {
        const std::string output = format("kill%d", number++);
        for (int attempt = 0, status = -1; status < 0; attempt++) {
            // The last attempts are left alone, so that every run ends.
            const bool alone = row.times >= wanted || attempt >= 40;
            const pid_t pid = start({run_in(output), alone ? 0 : 100});
            if (!alone) {
                const bool in_a_save = random(2);
                if (in_a_save) wait_for_save(pid);
                ::usleep(unsigned(random(in_a_save ? 12'000 : 250'000)));
                ::kill(pid, SIGKILL);
            }
            const bool in_save = progress->in_save;
            status = finish(pid);
            if (status == -SIGKILL) ++row.times, inside += in_save;
            // A kill never damages a checkpoint, so none may be passed over, or be missed.
            row.wrong += (status != 0 && status != -SIGKILL) || contains(said(), "passing over");
        }
        row.compare(output);
    }
    row.note = format("%d inside a save, %d runs", inside, number);
    return row;
}

// One request to stop: the step is finished, the run is saved, the status is 130.
static Row interrupts(int signal) {
    Row row;
    int stopped = 0, number = 0;
    for (const int wanted = times(50); row.times < wanted;) {
        const std::string output = format("stop%d", number++);
        for (int status = 130; status == 130;) {
            const pid_t pid = start({run_in(output), row.times < wanted ? 300 : 0});
            ::usleep(unsigned(random(120'000)));
            // Before it has begun to train, a signal ends it as it would end any program.
            const bool begun = progress->calls > 3;
            if (row.times < wanted && begun) ::kill(pid, signal), ++row.times;
            status = finish(pid);
            stopped += status == 130;
            row.wrong += status != 0 && status != 130;
        }
        row.compare(output);
    }
    row.note = format("%d stopped with 130, %d runs", stopped, number);
    return row;
}

// No file may grow beyond some size: the checkpoint, the log, or both do not fit any more. Then
// there is room again, and the run goes on.
static Row full_disk() {
    Row row;
    int warned = 0;
    for (row.times = 0; row.times < times(50); row.times++) {
        // Most sizes are small: from 0 to 30,000 bytes, evenly on a scale of logarithms.
        const rlim_t limit = rlim_t(std::exp(std::log(30'001.0) * random(10'000) / 10'000)) - 1;
        const int status = finish({run_in("full"), 0, -1, 0, limit});
        warned += contains(said(), std::strerror(EFBIG));
        row.wrong += status != 0 && status != 1;
        row.verify("full");
        row.wrong += finish({run_in("full")}) != 0;
        row.compare("full");
    }
    row.note = format("%d said so", warned);
    return row;
}

// One bit of one file of a checkpoint: it must be noticed, wherever it is.
static Row flipped_bits() {
    Row row;
    const std::string output = runs->out("straight"),
                      checkpoint = checkpoint_folder(output, last_step(output));
    const std::vector<std::string> names = list_folder(checkpoint);
    std::vector<std::pair<std::string, size_t>> bytes;  // every byte: its file, and where in that
    for (const std::string& name : names)
        for (size_t i = 0; i < read_file(checkpoint + "/" + name).size(); i++)
            bytes.emplace_back(checkpoint + "/" + name, i);
    for (row.times = 0; row.times < times(500); row.times++) {
        // Every other one in any byte of the folder, the rest evenly over its files.
        const std::string name = checkpoint + "/" + names[size_t(random(int(names.size())))];
        auto [path, at] = bytes[size_t(random(int(bytes.size())))];
        if (row.times % 2) path = name, at = size_t(random(int(read_file(name).size())));
        const std::string good = read_file(path);
        std::string bad = good;
        bad[at] = char(bad[at] ^ (1 << random(8)));
        write_file(path, bad);
        try {
            verify_checkpoint(checkpoint);
            ++row.wrong;
        } catch (const Error&) {}
        write_file(path, good);
    }
    verify_checkpoint(checkpoint);
    row.note = format("%zu files, %zu bytes", names.size(), bytes.size());
    return row;
}

// Every write, fsync, rename, mkdir, ... of a run's second save fails in turn, in three ways.
static Row failing_calls() {
    Row row;
    int stopped = 0;
    auto six = [](const std::string& output) {
        return run_in(output, words("--max-steps 6 --patience 0 --eval-interval 0"));
    };
    finish({six("six")});
    const int first = progress->save_began, last = progress->calls;
    const std::string weights = "/checkpoint-6/model.safetensors", good = runs->out("six"),
                      fails = runs->out("fails");
    for (int code : {EIO, ENOSPC, -1})
        for (int call = first; call < last; call += scale < 1 ? 3 : 1, row.times++) {
            const int status = finish({six("fails"), 0, call, code});
            stopped += status == 1;
            row.wrong += (status != 0 && status != 1) || !progress->failed || last_step(fails) < 0;
            row.verify("fails");
            row.wrong += finish({six("fails")}) != 0 || rows_of(fails) != rows_of(good) ||
                         read_file(fails + weights) != read_file(good + weights);
            fs::remove_all(fails);
        }
    row.note = format("%d calls x 3 ways, %d stopped", last - first, stopped);
    return row;
}

// A run of which every step is a checkpoint, resumed at each of them, on 1, 2, ... threads.
static Row every_step(const std::string& program, int max_threads) {
    Row row;
    auto run = [&](const std::string& output, const std::string& line) {
        return finish({run_in(output, words(line)), 0, -1, 0, RLIM_INFINITY, program});
    };
    const std::string steps = runs->out("steps"), again = runs->out("again");
    if (run("steps", "--save-interval 1 --keep 100") != 0 || !folder_exists(steps + "/best"))
        fail("the run of every step fails: ", said());
    const int64_t end = last_step(steps);
    for (int threads = 1; threads <= max_threads; threads++)
        for (int64_t step = 1; step < end; step += scale < 1 ? 5 : 1, row.times++) {
            make_folders(again);
            fs::copy(checkpoint_folder(steps, step), checkpoint_folder(again, step),
                     fs::copy_options::recursive);
            fs::copy(steps + "/log.csv", again + "/log.csv");
            fs::copy(steps + "/best", again + "/best");
            row.wrong += run("again", "--threads " + std::to_string(threads)) != 0;
            row.compare("again", "steps");
        }
    // How often a run saves does not matter either.
    row.wrong += run("again", "--save-interval 3") != 0;
    row.compare("again", "steps");
    fs::remove_all(steps);
    row.note = format("ends at %ld (patience), %d threads at most", long(end), max_threads);
    return row;
}

// --- The table

struct Part {
    const char *name, *title;
    std::function<Row()> run;
};
const Part kParts[] = {
    {"steps", "resumed at every step", [] { return every_step("", 3); }},
    {"cuda", "the same, on the CUDA device", [] { return every_step(cuda, 1); }},
    {"kill", "SIGKILL", kills},
    {"int", "SIGINT", [] { return interrupts(SIGINT); }},
    {"term", "SIGTERM", [] { return interrupts(SIGTERM); }},
    {"disk", "full disk (file size limit)", full_disk},
    {"calls", "a call of a save fails", failing_calls},
    {"bits", "flipped bits in a checkpoint", flipped_bits},
};

static int torture(const std::string& only) {
    const SmallRuns folder;
    runs = &folder;
    progress = static_cast<Progress*>(::mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE,
                                             MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (finish({run_in("straight")}) != 0) fail("the undisturbed run fails: ", said());
    std::printf("seed %lu, in %s\n\n%-34s %6s  %-34s %5s  %8s\n", seed, folder.path.c_str(),
                "what was done", "times", "", "lost", "time");
    int wrong = 0;
    for (const Part& part : kParts) {
        const std::string name = part.name;
        if ((!only.empty() && only != name) || (name == "cuda" && cuda.empty())) continue;
        const double began = now_seconds();
        const Row row = part.run();
        std::printf("%-34s %6d  %-34s %5d  %6.1f s\n", part.title, row.times, row.note.c_str(),
                    row.wrong, now_seconds() - began);
        std::fflush(stdout);
        wrong += row.wrong;
    }
    std::printf("\n%s\n", wrong ? "LOST OR WRONG: see above" : "nothing was lost");
    return wrong != 0;
}

int main(int argc, char** argv) {
    wait_politely(argv);
    omp_set_num_threads(1);  // a child of fork() must not inherit threads that it does not have
    std::map<std::string, std::string> options;
    for (int i = 1; i + 1 < argc; i += 2) options[argv[i]] = argv[i + 1];
    if (options.contains("--seed")) seed = std::stoull(options["--seed"]);
    if (options.contains("--scale")) scale = std::stod(options["--scale"]);
    cuda = options["--cuda"];
    try {
        return torture(options["--part"]);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
