// Stands between a test program and the system: it defines the system calls by which a program
// changes files, so that a test can make any of them fail, or read off their order. The linker
// prefers a program's own functions to the C library's, so nothing in the program knows of it.
#ifndef TINYGPT_FAULTS_HPP_INCLUDED
#define TINYGPT_FAULTS_HPP_INCLUDED

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <ctime>
#include <functional>
#include <string>

// Asked before each call: 0 lets it be made, a positive number makes it fail with that errno, -1
// makes a write come up short. Calls that the function itself makes are not asked about. Set it
// before any thread starts.
using FileFault = std::function<int(const char* call, const std::string& path)>;
inline FileFault& file_fault() {
    static FileFault* const fault = new FileFault;  // never destroyed: there are writes at exit
    return *fault;
}
// What the steady clock shows, in nanoseconds; 0: the time.
inline std::atomic<int64_t> steady_clock_shows{0};

inline int ask_fault(const char* call, const std::string& path) {
    static thread_local bool asking = false;
    if (asking || !file_fault()) return 0;
    asking = true;
    const int fault = file_fault()(call, path);
    asking = false;
    return fault;
}
// Makes the call of that number, unless it is to fail.
inline long faulty_call(const char* name, const std::string& path, long number, auto... arguments) {
    const int fault = ask_fault(name, path);
    if (fault <= 0) return ::syscall(number, arguments...);
    errno = fault;
    return -1;
}
// The path of an open file; "" for a pipe and the like.
inline std::string path_of(int fd) {
    char path[4096];
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    const ssize_t length = ::readlink(link.c_str(), path, sizeof path);
    return length > 0 && path[0] == '/' ? std::string(path, size_t(length)) : "";
}

// The tests are two programs in one; one of them defines the calls.
#if !defined(TINYGPT_TEST_CUDA) || defined(__CUDACC__)
// The name in quotes is the symbol's. Why not these names themselves: the headers have declared
// them, some with attributes, and some as inline functions.
extern "C" {
int faulty_open(const char* path, int flags, ...) __asm__("open");
int faulty_fsync(int fd) __asm__("fsync");
int faulty_mkdir(const char* path, mode_t mode) __asm__("mkdir");
int faulty_rename(const char* from, const char* to) __asm__("rename");
int faulty_unlink(const char* path) __asm__("unlink");
int faulty_rmdir(const char* path) __asm__("rmdir");
ssize_t faulty_write(int fd, const void* data, size_t bytes) __asm__("write");
int faulty_clock_gettime(clockid_t clock, timespec* now) __asm__("clock_gettime");

// Only opens that may make a file are asked about.
int faulty_open(const char* path, int flags, ...) {
    if (!(flags & O_CREAT)) return int(::syscall(SYS_openat, AT_FDCWD, path, flags, 0));
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return int(faulty_call("open", path, SYS_openat, AT_FDCWD, path, flags, mode));
}
int faulty_fsync(int fd) { return int(faulty_call("fsync", path_of(fd), SYS_fsync, fd)); }
int faulty_mkdir(const char* path, mode_t mode) {
    return int(faulty_call("mkdir", path, SYS_mkdirat, AT_FDCWD, path, mode));
}
int faulty_rename(const char* from, const char* to) {
    return int(faulty_call("rename", to, SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int faulty_unlink(const char* path) {
    return int(faulty_call("unlink", path, SYS_unlinkat, AT_FDCWD, path, 0));
}
int faulty_rmdir(const char* path) {
    return int(faulty_call("rmdir", path, SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}
// Only of files: pipes and terminals are let alone.
ssize_t faulty_write(int fd, const void* data, size_t bytes) {
    struct stat info;
    const bool is_file = file_fault() && ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    const int fault = is_file ? ask_fault("write", path_of(fd)) : 0;
    if (fault > 0) return errno = fault, -1;
    return ::syscall(SYS_write, fd, data, fault < 0 ? (bytes + 1) / 2 : bytes);
}
int faulty_clock_gettime(clockid_t clock, timespec* now) {
    const int64_t shown = clock == CLOCK_MONOTONIC ? steady_clock_shows.load() : 0;
    if (shown == 0) return int(::syscall(SYS_clock_gettime, clock, now));
    *now = {time_t(shown / 1'000'000'000), long(shown % 1'000'000'000)};
    return 0;
}
}
#endif

#endif
