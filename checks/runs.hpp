// Small runs, for the tests and for torture: their data, their command line, and what is left of them.
// Comes after train_gpt.cpp. Two objects of one program include it: everything here is inline.
#ifndef TINYGPT_RUNS_HPP_INCLUDED
#define TINYGPT_RUNS_HPP_INCLUDED

#include <filesystem>

#include "faults.hpp"

// What is typed behind a program's name: a line, or words, of which some may have blanks.
struct Arguments : std::vector<std::string> {
    using vector::vector;
    Arguments(vector words) : vector(std::move(words)) {}
    Arguments(const std::string& line) : vector(tinygpt::split_at(line, ' ')) {
        std::erase(*this, "");
    }
    Arguments(const char* line) : Arguments(std::string(line)) {}
    friend Arguments operator+(Arguments a, const Arguments& b) {
        a.insert(a.end(), b.begin(), b.end());
        return a;
    }
};

inline bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// A folder of its own for a test, removed at the end; in memory where possible, because some tests
// sync thousands of times.
struct TemporaryFolder {
    std::string path;
    TemporaryFolder() {
        const char* base = std::getenv("TMPDIR");
        if (!base || !*base) base = ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
        path = std::string(base) + "/tinygpt-XXXXXX";
        if (!::mkdtemp(path.data())) tinygpt::fail_errno("cannot make the folder ", path);
        path = std::filesystem::canonical(path);  // as the system names open files
    }
    ~TemporaryFolder() {
        file_fault() = nullptr;
        std::filesystem::remove_all(path);
    }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

// Writes a file plainly, for tests that write thousands: no sync, no rename.
inline void put_file(const std::string& path, const std::string& bytes) {
    ::unlink(path.c_str());  // some file systems sync a file that is cut to nothing and refilled
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size())
        tinygpt::fail_errno("cannot write ", path);
    std::fclose(file);
}

// The bytes of an array.
template <class T>
std::string raw(const std::vector<T>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Writes a shard; `told` is the count that its header promises, where it is not the right one.
inline void put_shard(const std::string& path, const std::vector<uint16_t>& tokens,
                      std::optional<int32_t> told = {}, int32_t magic = tinygpt::kShardMagic,
                      int32_t version = 1) {
    std::vector<int32_t> header = {magic, version, told.value_or(int32_t(tokens.size()))};
    header.resize(256);
    put_file(path, raw(header) + raw(tokens));
}

// Words that repeat, with some noise: there is something to learn, and not everything.
inline std::vector<uint16_t> noisy_text(size_t length, int seed, int vocab = 257) {
    std::vector<uint16_t> tokens(length, uint16_t(256 % vocab));
    for (size_t i = 1; i < length; ++i) {
        const uint64_t noise = tinygpt::random_bits(uint64_t(seed), i);
        tokens[i] = uint16_t((noise % 5 ? "the cat sat "[i % 12] : 'a' + noise / 5 % 26) % vocab);
    }
    return tokens;
}

// A folder with data, shards of unequal lengths, and space for runs.
struct SmallRuns : TemporaryFolder {
    explicit SmallRuns(const std::vector<size_t>& lengths = {700, 131, 1, 2, 333},
                       size_t val_length = 150) {
        tinygpt::make_folders(data());
        for (size_t i = 0; i < lengths.size(); ++i)
            put_shard(data() + tinygpt::format("/train_%06zu.bin", i),
                      noisy_text(lengths[i], int(i)));
        put_shard(data() + "/val_000000.bin", noisy_text(val_length, 77));
        tinygpt::Tokenizer::bytes().save(data());
    }
    std::string data() const { return path + "/data"; }
    std::string out(const std::string& name = "out") const { return path + "/" + name; }

    // A small run with everything on: shuffling, accumulation, dropout, patience.
    Arguments arguments(const std::string& name, const Arguments& more = {}) const {
        const Arguments small =
            "--n-layer 1 --n-embd 8 --n-head 2 --n-positions 8 --seq-len 8 --batch-size 3 "
            "--grad-accum-steps 2 --dropout 0.1 --max-steps 30 --learning-rate 0.1 "
            "--min-lr-fraction 0.5 --warmup-steps 16 --eval-interval 2 --eval-batches 1 "
            "--patience 5 --sample-interval 0 --save-interval 5 --threads 1";
        return Arguments{"--data", data(), "--output", out(name)} + small + more;
    }
};

// log.csv without its three timing columns.
inline std::string rows_of(const std::string& output) {
    std::string rows;
    for (const std::string& line :
         tinygpt::split_at(tinygpt::read_file(output + "/log.csv"), '\n')) {
        size_t end = line.size();
        for (int i = 0; i < 3 && end != line.npos && end > 0; ++i) end = line.rfind(',', end - 1);
        rows += line.substr(0, end) + "\n";
    }
    return rows;
}
// The step of its newest checkpoint, or -1.
inline int64_t last_step(const std::string& output) {
    const std::vector<int64_t> steps = tinygpt::checkpoint_steps(output);
    return steps.empty() ? -1 : steps[0];
}
// What differs where two runs ended: the log, the weights, the moments or the best model; "" if nothing.
inline std::string difference(const std::string& a, const std::string& b) {
    const int64_t step = last_step(a);
    if (step < 0 || step != last_step(b)) return "the last step";
    if (rows_of(a) != rows_of(b)) return "log.csv";
    const std::string last = "checkpoint-" + std::to_string(step);
    for (const std::string& name : {last + "/model.safetensors", last + "/optimizer.safetensors",
                                    std::string("best/model.safetensors")})
        if (tinygpt::read_file(a + "/" + name) != tinygpt::read_file(b + "/" + name)) return name;
    return "";
}

#endif
