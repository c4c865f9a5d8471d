// test_nccl.cpp: does nccl.h move what NCCL would move, and refuse what NCCL refuses or hangs on?
// Each rank is a process of its own.
#include <nccl.h>
#include <sys/wait.h>

#include <cstdio>
#include <functional>
#include <string>

constexpr int kRanks = 3;
constexpr size_t kCount = 50000;  // more than a mailbox holds

// What a rank works with.
struct Rank {
    int rank;
    ncclComm_t comm;
    cudaStream_t stream;
    float *from, *to;  // [kRanks, kCount] each; from[i] = 1000000 rank + i
    float at(size_t i) const {
        float value;
        cudaMemcpy(&value, to + i, sizeof value, cudaMemcpyDeviceToHost);
        return value;
    }
};
using Work = std::function<ncclResult_t(Rank&)>;

// The code and the message of rank 1, when all ranks do this work.
std::pair<int, std::string> outcome_of(const Work& work) {
    ncclUniqueId id;
    ncclGetUniqueId(&id);
    int fds[2];
    if (::pipe(fds) != 0) return {-1, "no pipe"};
    for (int rank = 0; rank < kRanks; ++rank) {
        if (::fork() != 0) continue;
        Rank r{rank, nullptr, nullptr, nullptr, nullptr};
        int code = ncclCommInitRank(&r.comm, kRanks, id, rank);
        cudaStreamCreate(&r.stream);
        cudaMalloc(&r.from, kRanks * kCount * sizeof(float));
        cudaMalloc(&r.to, kRanks * kCount * sizeof(float));
        std::vector<float> host(kRanks * kCount);
        for (size_t i = 0; i < host.size(); ++i) host[i] = 1e6f * float(rank) + float(i);
        cudaMemcpy(r.from, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice);
        std::string message;
        try {
            if (code == 0) code = work(r);
            message = ncclGetLastError(r.comm);
        } catch (const cuda_on_cpu::Error& e) {
            code = 99, message = e.what();
        }
        message = std::to_string(code) + " " + message;
        if (rank == 1 && ::write(fds[1], message.data(), message.size()) < 0) ::_exit(1);
        ::_exit(0);
    }
    ::close(fds[1]);
    std::string text(4096, 0);
    text.resize(size_t(std::max<ssize_t>(0, ::read(fds[0], text.data(), text.size()))));
    ::close(fds[0]);
    while (::wait(nullptr) > 0) {}
    return {std::atoi(text.c_str()), text};
}

ncclResult_t all_to_all(Rank& r, size_t count) {
    ncclGroupStart();
    for (int other = 0; other < kRanks; ++other) {
        ncclSend(r.from + size_t(other) * kCount, count, ncclFloat, other, r.comm, r.stream);
        ncclRecv(r.to + size_t(other) * kCount, count, ncclFloat, other, r.comm, r.stream);
    }
    return ncclGroupEnd();
}
ncclResult_t gather(Rank& r, size_t count, ncclDataType_t type = ncclFloat) {
    return ncclAllGather(r.from, r.to, count, type, r.comm, r.stream);
}
ncclResult_t captured(Rank& r, const Work& work) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal);
    const ncclResult_t code = work(r);
    cudaStreamEndCapture(r.stream, &graph);
    if (code != ncclSuccess) return code;
    cudaGraphInstantiate(&exec, graph, 0);
    for (int i = 0; i < 2; ++i) cudaGraphLaunch(exec, r.stream);
    return code;
}
// Whether rank s's numbers from `first` on have arrived at `to`.
ncclResult_t arrived(Rank& r, size_t to, int s, size_t first) {
    const float want = 1e6f * float(s) + float(first);
    cudaStreamSynchronize(r.stream);
    return r.at(to) == want && r.at(to + kCount - 1) == want + float(kCount - 1)
               ? ncclSuccess
               : ncclInternalError;
}
ncclResult_t all_arrived(Rank& r, bool exchanged) {
    for (int s = 0; s < kRanks; ++s) {
        const size_t first = exchanged ? size_t(r.rank) * kCount : 0;
        if (arrived(r, size_t(s) * kCount, s, first) != ncclSuccess) return ncclInternalError;
    }
    return ncclSuccess;
}

int main() {
    ::setenv("CUDA_ON_CPU_NCCL_TIMEOUT", "2", 1);
    struct Case {
        const char* what;
        int code;
        const char* says;
        Work work;
    };
    const Case cases[] = {
        {"an exchange of all with all", 0, "",
         [](Rank& r) { return all_to_all(r, kCount), all_arrived(r, true); }},
        {"a gather", 0, "", [](Rank& r) { return gather(r, kCount), all_arrived(r, false); }},
        {"both, recorded, and launched twice", 0, "",
         [](Rank& r) {
             captured(r, [](Rank& r) { return gather(r, kCount), all_to_all(r, kCount); });
             return all_arrived(r, true);
         }},
        {"another count", ncclInvalidUsage, "differ in call 1: ncclAllGather of 9 elements",
         [](Rank& r) { return gather(r, r.rank == 1 ? 9 : 8); }},
        {"another type", ncclInvalidUsage, "of 4 bytes against ncclAllGather of 8 elements of 1",
         [](Rank& r) { return gather(r, 8, r.rank == 1 ? ncclFloat : ncclChar); }},
        {"another operation", ncclInvalidUsage, "differ in call 1",
         [](Rank& r) { return r.rank == 1 ? gather(r, 8) : all_to_all(r, 8); }},
        {"a send that nobody receives", ncclInvalidUsage, "against nothing",
         [](Rank& r) {
             if (r.rank != 1) return gather(r, 0);
             ncclGroupStart();
             ncclSend(r.from, 8, ncclFloat, 0, r.comm, r.stream);
             gather(r, 0);
             return ncclGroupEnd();
         }},
        {"one records, the others do not", ncclInvalidUsage, "being captured",
         [](Rank& r) {
             auto work = [](Rank& r) { return gather(r, 8); };
             return r.rank == 1 ? captured(r, work) : work(r);
         }},
        {"a rank that never comes", ncclSystemError, "rank 2 never comes to call 1",
         [](Rank& r) { return r.rank == 2 ? ncclSuccess : gather(r, 8); }},
        {"memory of the host", ncclInvalidArgument, "on the host",
         [](Rank& r) {
             static float host[8];
             return ncclAllGather(host, r.to, 8, ncclFloat, r.comm, r.stream);
         }},
        {"past the end of a buffer", ncclInvalidArgument, "",
         [](Rank& r) { return gather(r, kRanks * kCount + 1); }},
        {"no such rank", ncclInvalidArgument, "there is no rank 3",
         [](Rank& r) { return ncclSend(r.from, 8, ncclFloat, 3, r.comm, r.stream); }},
        {"the end of no group", ncclInvalidUsage, "without ncclGroupStart",
         [](Rank&) { return ncclGroupEnd(); }},
    };
    int failed = 0;
    for (const Case& c : cases) {
        const auto [code, text] = outcome_of(c.work);
        if (code == c.code && text.find(c.says) != text.npos) continue;
        std::printf("FAILED: %s: expected %d '%s', found %s\n", c.what, c.code, c.says,
                    text.c_str());
        ++failed;
    }
    std::printf("nccl.h: %zu cases, %d failed\n", std::size(cases), failed);
    return failed != 0;
}
