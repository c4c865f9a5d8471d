// nccl.h: the calls of NCCL that a program translated by translate.cpp may use, between processes of
// one machine, on a CPU. Names, values and meanings follow NVIDIA's NCCL documentation; what is
// missing here fails to compile.
//
// NCCL trusts its callers: ranks whose calls differ hang, or read past a buffer. Here every call,
// or group of calls, is announced and compared before anything is moved. Refused are ranks that
// differ in operation, count or type, a send that nobody receives, a rank that is being captured
// while another is not, and, after CUDA_ON_CPU_NCCL_TIMEOUT seconds (20), one that never comes.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <deque>

#include "cuda_runtime.h"

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6
} ncclResult_t;
typedef enum {
    ncclInt8 = 0,
    ncclChar = 0,
    ncclFloat32 = 7,
    ncclFloat = 7,
    ncclFloat64 = 8,
    ncclDouble = 8
} ncclDataType_t;
#define NCCL_UNIQUE_ID_BYTES 128
typedef struct {
    char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;

namespace cuda_on_cpu::nccl {

constexpr int kMostRanks = 16, kMostCalls = 4096;
enum Operation : int { kSend, kReceive, kAllGather };

// A call as the other ranks see it.
struct Announced {
    int operation, peer, type;
    uint64_t count;
};
// What a rank is about to do: one call, or a group.
struct Announcement {
    std::atomic<uint64_t> made{0}, seen{0};  // its number; the last one of others it has compared
    int captured = 0, calls = 0;
    Announced call[kMostCalls];
};
// From one rank to another: full, until it was read.
struct Mailbox {
    std::atomic<uint64_t> bytes{0};  // 0: empty
    char data[1 << 16];
};
// Memory that all ranks share.
struct Meeting {
    std::atomic<int> joined{0};
    int ranks = 0;
    Announcement rank[kMostRanks];
    Mailbox box[kMostRanks][kMostRanks];  // [from][to]
};

inline std::string& last_error() {
    static std::string message;
    return message;
}
inline ncclResult_t fail(ncclResult_t code, const std::string& message) {
    last_error() = message;
    return code;
}
inline double timeout() {
    const char* seconds = std::getenv("CUDA_ON_CPU_NCCL_TIMEOUT");
    return seconds ? std::atof(seconds) : 20;
}
// Waits until ready() is true; false if it takes too long.
inline bool wait_until(auto&& ready) {
    const auto begin = std::chrono::steady_clock::now();
    for (int turn = 0; !ready(); ++turn) {
        ::usleep(turn < 100 ? 0 : 50);
        const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
        if (waited.count() > timeout()) return false;
    }
    return true;
}

inline size_t size_of(int type) { return type == ncclFloat64 ? 8 : type == ncclFloat32 ? 4 : 1; }
inline std::string name_of(const Announced& call) {
    const char* names[] = {"ncclSend", "ncclRecv", "ncclAllGather"};
    return text("%s of %llu elements of %zu bytes", names[call.operation],
                (unsigned long long)call.count, size_of(call.type));
}

}  // namespace cuda_on_cpu::nccl

struct cuda_on_cpu_nccl_comm {
    cuda_on_cpu::nccl::Meeting* meeting;
    int rank, ranks;
    uint64_t calls = 0;
};
typedef cuda_on_cpu_nccl_comm* ncclComm_t;

namespace cuda_on_cpu::nccl {

// A call with its buffers.
struct Call {
    Announced what;
    const char* from;
    char* to;
    ncclComm_t comm;
    cudaStream_t stream;
};
// A part on its way between two ranks.
struct Move {
    int peer;
    char* data;
    size_t bytes;
};
struct Group {
    int depth = 0;
    std::vector<Call> calls;
};
inline Group& group() {
    static Group open;
    return open;
}

// Compares what this rank is about to do with what the others are.
inline ncclResult_t agree(ncclComm_t comm, const std::vector<Call>& calls, bool captured) {
    Meeting& meeting = *comm->meeting;
    Announcement& mine = meeting.rank[comm->rank];
    const uint64_t number = ++comm->calls;
    auto missing = [&](auto&& there) {
        int absent = -1;
        const bool all = wait_until([&] {
            absent = -1;
            for (int r = 0; r < comm->ranks; ++r)
                if (!there(meeting.rank[r])) absent = r;
            return absent < 0;
        });
        return all ? -1 : absent;
    };
    // Only when all have seen the last one may it be replaced.
    int absent = missing([&](const Announcement& other) { return other.seen >= number - 1; });
    if (absent < 0) {
        mine.captured = captured, mine.calls = int(calls.size());
        for (size_t i = 0; i < calls.size(); ++i) mine.call[i] = calls[i].what;
        mine.made = number;
        absent = missing([&](const Announcement& other) { return other.made >= number; });
    }
    if (absent >= 0)
        return fail(ncclSystemError,
                    text("rank %d never comes to call %llu, %s of rank %d", absent,
                         (unsigned long long)number, name_of(calls[0].what).c_str(), comm->rank));
    ncclResult_t result = ncclSuccess;
    auto differs = [&](int other, const std::string& what) {
        result = fail(ncclInvalidUsage, text("ranks %d and %d differ in call %llu: %s", comm->rank,
                                             other, (unsigned long long)number, what.c_str()));
    };
    for (int r = 0; r < comm->ranks && result == ncclSuccess; ++r) {
        const Announcement& other = meeting.rank[r];
        if (other.captured != mine.captured) differs(r, "one is being captured, the other is not");
        // What this rank sends, and gathers, the other must receive, and gather, in the same order.
        auto list = [&](const Announcement& of, int peer, int operation) {
            std::vector<Announced> out;
            for (int i = 0; i < of.calls; ++i)
                if (of.call[i].operation == operation &&
                    (operation == kAllGather || of.call[i].peer == peer))
                    out.push_back(of.call[i]);
            return out;
        };
        for (auto [here, there] :
             {std::pair{kSend, kReceive}, {kReceive, kSend}, {kAllGather, kAllGather}}) {
            const auto a = list(mine, r, here), b = list(other, comm->rank, there);
            for (size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
                const std::string left = i < a.size() ? name_of(a[i]) : "nothing";
                const std::string right = i < b.size() ? name_of(b[i]) : "nothing";
                if (i >= a.size() || i >= b.size() || a[i].count != b[i].count ||
                    a[i].type != b[i].type)
                    differs(r, left + " against " + right);
            }
        }
    }
    mine.seen = number;
    return result;
}

// Moves the parts through the mailboxes.
inline void move(ncclComm_t comm, std::vector<Move> sends, std::vector<Move> receives) {
    Meeting& meeting = *comm->meeting;
    std::vector<std::deque<Move>> out(size_t(comm->ranks)), in(size_t(comm->ranks));
    for (const Move& m : sends) out[size_t(m.peer)].push_back(m);
    for (const Move& m : receives) in[size_t(m.peer)].push_back(m);
    size_t left = sends.size() + receives.size();
    auto advance = [&](std::deque<Move>& queue, Mailbox& box, bool sending) {
        while (!queue.empty() && queue.front().bytes == 0) queue.pop_front(), --left;
        if (queue.empty() || (box.bytes == 0) != sending) return false;
        Move& m = queue.front();
        const size_t n = sending ? std::min(m.bytes, sizeof box.data) : size_t(box.bytes);
        std::memcpy(sending ? box.data : m.data, sending ? m.data : box.data, n);
        if (!sending) watch_host_write(m.data, n);
        m.data += n, m.bytes -= n;
        box.bytes = sending ? n : 0;
        return true;
    };
    while (left > 0) {
        const bool moved = wait_until([&] {
            bool any = left == 0;
            for (int r = 0; r < comm->ranks; ++r) {
                any |= advance(out[size_t(r)], meeting.box[comm->rank][r], true);
                any |= advance(in[size_t(r)], meeting.box[r][comm->rank], false);
            }
            return any || left == 0;
        });
        if (!moved)
            report(Mistake::other, text("nccl: rank %d waits for data that never comes: another "
                                        "rank has not launched the same work",
                                        comm->rank));
    }
}

inline ncclResult_t start(const std::vector<Call>& calls) {
    if (calls.empty()) return ncclSuccess;
    const ncclComm_t comm = calls[0].comm;
    const cudaStream_t stream = calls[0].stream;
    if (calls.size() > kMostCalls) return fail(ncclInvalidUsage, "too many calls in a group");
    std::vector<Move> sends, receives;
    std::vector<std::pair<char*, const char*>> copies;  // within this rank
    std::vector<size_t> sizes;
    for (const Call& call : calls) {
        if (call.comm != comm || call.stream != stream)
            return fail(ncclInvalidUsage, "a group on several communicators or streams");
        const size_t bytes = call.what.count * size_of(call.what.type);
        const size_t all = call.what.operation == kAllGather ? bytes * size_t(comm->ranks) : bytes;
        for (auto [pointer, size] : {std::pair{(const void*)call.from, bytes}, {call.to, all}}) {
            bool on_device = false;
            std::string message;
            if (!pointer) continue;
            if (!check_range(uintptr_t(pointer), size, "nccl", on_device, message))
                return fail(ncclInvalidArgument, message);
            if (!on_device) return fail(ncclInvalidArgument, "nccl: a buffer is on the host");
        }
        for (int r = 0; r < comm->ranks; ++r) {
            const bool gathers = call.what.operation == kAllGather;
            if (!gathers && r != call.what.peer) continue;
            if (gathers && r == comm->rank) {
                copies.emplace_back(call.to + size_t(r) * bytes, call.from), sizes.push_back(bytes);
                continue;
            }
            if (call.from) sends.push_back({r, const_cast<char*>(call.from), bytes});
            if (call.to)
                receives.push_back({r, call.to + (gathers ? size_t(r) * bytes : 0), bytes});
        }
    }
    if (ncclResult_t code = agree(comm, calls, captures(stream)); code != ncclSuccess) return code;
    submit(stream, [=] {
        for (size_t i = 0; i < copies.size(); ++i)
            copy_bytes(copies[i].first, copies[i].second, sizes[i]);
        move(comm, sends, receives);
    });
    return ncclSuccess;
}
inline ncclResult_t call(Operation operation, const void* from, void* to, size_t count, int peer,
                         ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    if (!comm || peer < 0 || peer >= comm->ranks)
        return fail(ncclInvalidArgument, text("there is no rank %d", peer));
    group().calls.push_back({{operation, peer, type, count},
                             static_cast<const char*>(from),
                             static_cast<char*>(to),
                             comm,
                             stream});
    if (group().depth > 0) return ncclSuccess;
    return start(std::exchange(group().calls, {}));
}

}  // namespace cuda_on_cpu::nccl

inline const char* ncclGetErrorString(ncclResult_t code) {
    const char* names[] = {"no error",
                           "unhandled cuda error",
                           "unhandled system error",
                           "internal error",
                           "invalid argument",
                           "invalid usage",
                           "remote process exited or there was a network error"};
    return names[code];
}
inline const char* ncclGetLastError(ncclComm_t) { return cuda_on_cpu::nccl::last_error().c_str(); }

inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::snprintf(id->internal, sizeof id->internal, "/nccl-on-cpu-%d-%lld", int(::getpid()),
                  (long long)std::chrono::steady_clock::now().time_since_epoch().count());
    return ncclSuccess;
}
// Returns when all ranks have joined; the name is removed then.
inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    using namespace cuda_on_cpu::nccl;
    if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks)
        return fail(ncclInvalidArgument, "ncclCommInitRank: rank " + std::to_string(rank) + " of " +
                                             std::to_string(ranks));
    const int fd = ::shm_open(id.internal, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ::ftruncate(fd, sizeof(Meeting)) != 0)
        return fail(ncclSystemError, "ncclCommInitRank: no shared memory");
    void* memory = ::mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ::close(fd);
    if (memory == MAP_FAILED) return fail(ncclSystemError, "ncclCommInitRank: no shared memory");
    Meeting* meeting = static_cast<Meeting*>(memory);  // zeros, as an empty one is
    ++meeting->joined;
    const bool all = wait_until([&] { return meeting->joined >= ranks; });
    ::shm_unlink(id.internal);
    if (!all) return fail(ncclSystemError, "ncclCommInitRank: not all ranks have come");
    *comm = new cuda_on_cpu_nccl_comm{meeting, rank, ranks};
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    ::munmap(comm->meeting, sizeof *comm->meeting);
    delete comm;
    return ncclSuccess;
}

inline ncclResult_t ncclGroupStart() { return ++cuda_on_cpu::nccl::group().depth, ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    using namespace cuda_on_cpu::nccl;
    if (group().depth == 0) return fail(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group().depth > 0) return ncclSuccess;
    return start(std::exchange(group().calls, {}));
}
inline ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu::nccl;
    return call(kSend, from, nullptr, count, peer, type, comm, stream);
}
inline ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    using namespace cuda_on_cpu::nccl;
    return call(kReceive, nullptr, to, count, peer, type, comm, stream);
}
inline ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu::nccl;
    return call(kAllGather, from, to, count, comm ? comm->rank : 0, type, comm, stream);
}
