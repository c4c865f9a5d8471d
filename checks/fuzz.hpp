// What the fuzz targets share. A target reads bytes that mean no good; the only thing it may do,
// beside reading them, is to throw an Error with a message: one line, not long.
#pragma once
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"

using namespace tinygpt;

inline void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

// Runs `read`; returns whether it accepted the input.
template <class Read>
bool accepts(Read&& read) {
    try {
        read();
        return true;
    } catch (const Error& error) {
        const std::string message = error.what();
        check(!message.empty() && message.size() < 1000, "a message of a sensible length");
        check(std::count(message.begin(), message.end(), '\n') < 2, "a message of a line or two");
        check(error.status == 1 || error.status == 2, "a status");
        return false;
    }
}

// A file in memory that holds the input, under a path that can be opened.
class MemoryFile {
public:
    MemoryFile(const void* data, size_t bytes) : fd_(::memfd_create("fuzz", 0)) {
        check(fd_ >= 0 && ::write(fd_, data, bytes) == ssize_t(bytes), "a file in memory");
    }
    ~MemoryFile() { ::close(fd_); }
    std::string path() const { return format("/proc/self/fd/%d", fd_); }

private:
    int fd_;
};

// The input cut at every occurrence of a byte that no text has.
inline std::vector<std::string> parts_of(const uint8_t* data, size_t size, size_t count) {
    std::vector<std::string> parts(1);
    for (size_t i = 0; i < size; i++)
        if (data[i] == 0 && parts.size() < count)
            parts.emplace_back();
        else
            parts.back().push_back(char(data[i]));
    parts.resize(count);
    return parts;
}
