// torture: kills and interrupts small runs, and compares what comes out of them with a run that
// nobody disturbed. `make torture` builds and runs it: about three minutes, a table at the end, exit
// status 0 if nothing was lost. Options: --seed N, --part NAME, --scale F (0.1: a tenth).
//
// The trainer runs in a child process of this program (fork, without exec), so that file_fault() can
// slow its file operations down, and say where the child is.
#include <sys/mman.h>
#include <sys/wait.h>

#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"
#include "runs.hpp"

using namespace tinygpt;

static uint64_t seed = 1, drawn = 0;
static double scale = 1;
static const SmallRuns* runs;

// Whole numbers below n, from the seed.
static int random(int n) { return int(random_bits(seed, drawn++) % uint64_t(std::max(1, n))); }
static int times(int n) { return std::max(1, int(n * scale + 0.5)); }

// --- A run, in a child process

// What the child tells while it runs; in memory that both see.
struct Progress {
    std::atomic<int> in_save, calls;
};
static Progress* progress;

// Follows the child's calls and makes each wait so long first.
static int follow(int slow_us, const std::string& call, const std::string& path) {
    // A save of a checkpoint: from making its folder to the sync of the folder above it.
    if (call == "mkdir" && path.ends_with(".tmp")) progress->in_save = 1;
    if (progress->in_save == 2 && call == "fsync") progress->in_save = 3;
    const bool named =
        call == "rename" && path.find(".tmp") == path.npos && !path.ends_with(".old");
    if (named && progress->in_save == 1) progress->in_save = 2;
    if (slow_us > 0 && progress->in_save > 0) ::usleep(unsigned(slow_us));
    if (progress->in_save == 3) progress->in_save = 0;
    return ++progress->calls, 0;
}

// Starts, or resumes, a run in the folder of that name; its saves are slow.
static pid_t start(const std::string& output, int slow_us = 0) {
    progress->in_save = 0, progress->calls = 0;
    std::fflush(stdout);
    const pid_t pid = ::fork();
    if (pid < 0) fail_errno("cannot fork");
    if (pid > 0) return pid;
    const std::string err = runs->out("stderr");
    ::dup2(::open("/dev/null", O_WRONLY), 1);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666), 2);
    file_fault() = [=](const char* call, const std::string& path) {
        return follow(slow_us, call, path);
    };
    Arguments all = "train_gpt --resume auto" + runs->arguments(output, "--save-interval 3");
    std::vector<char*> argv;
    for (std::string& word : all) argv.push_back(word.data());
    const int status = program(int(all.size()), argv.data(), "train_gpt", run_on_cpu);
    std::fflush(nullptr);
    ::_exit(status);
}

// The exit status; minus the signal where one ended it.
static int finish(pid_t pid) {
    int status = 0;
    while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
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
    // The run has ended as the undisturbed one did; it is removed.
    void compare(const std::string& output) {
        wrong += !difference(runs->out("straight"), runs->out(output)).empty();
        remove_folder(runs->out(output));
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
            const pid_t pid = start(output, alone ? 0 : 100);
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
            const pid_t pid = start(output, row.times < wanted ? 300 : 0);
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

// --- The table

struct Part {
    const char *name, *title;
    std::function<Row()> run;
};
const Part kParts[] = {
    {"kill", "SIGKILL", kills},
    {"int", "SIGINT", [] { return interrupts(SIGINT); }},
    {"term", "SIGTERM", [] { return interrupts(SIGTERM); }},
};

static int torture(const std::string& only) {
    const SmallRuns folder;
    runs = &folder;
    progress = static_cast<Progress*>(::mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE,
                                             MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (finish(start("straight")) != 0) fail("the undisturbed run fails: ", said());
    std::printf("seed %lu, in %s\n\n%-34s %6s  %-34s %5s  %8s\n", seed, folder.path.c_str(),
                "what was done", "times", "", "lost", "time");
    int wrong = 0;
    for (const Part& part : kParts) {
        const std::string name = part.name;
        if (!only.empty() && only != name) continue;
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
    try {
        return torture(options["--part"]);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
