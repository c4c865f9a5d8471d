// Shards: whatever passes the header's checks can be read to the end, in any order. An input is the
// header's three numbers and the tokens; the zeros between them are put in here, so that no input
// is spent on changing bytes that nobody reads. An input too short for three numbers is the file.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t input_size) {
    std::string bytes(reinterpret_cast<const char*>(input), input_size);
    if (input_size >= 12) bytes.insert(12, kShardHeaderBytes - 12, '\0');
    const uint8_t* data = reinterpret_cast<const uint8_t*>(bytes.data());
    const size_t size = bytes.size();
    const MemoryFile memory(data, size), second(data, size / 2);
    accepts([&] { Shard shard(second.path()); });
    accepts([&] {
        const Shards shards(memory.path());
        check(shards.tokens() * 2 + 1024 == int64_t(size), "the count is that of the file");
        const int vocab_size = size > 1030 ? 1 + data[1029] * 257 : 300;
        accepts([&] { shards.check_tokens(vocab_size); });
        for (int document_start : {-1, 0}) {
            int64_t scored = 0;
            for (const Window& window : evaluation_windows(shards, 4, document_start))
                scored += read_batch(std::span(&window, 1), 2, 4, 65536).scored;
            check(scored == std::max<int64_t>(0, shards.tokens() - 1), "every token once");
        }
        if (shards.tokens() < 2) return;
        for (bool shuffle : {false, true}) {
            const DataOrder order{shards, 2, 4, 1, shuffle};
            for (int64_t i = 0; i < order.blocks_per_epoch(); i += 2) order.batch(i, vocab_size);
        }
    });
    // The same file cut short while it is open.
    accepts([&] {
        const Shards shards(memory.path());
        check(::truncate(memory.path().c_str(), off_t(size / 2)) == 0, "cut");
        shards.check_tokens(65536);
        check(shards.tokens() == 0, "a shard that shrank is noticed");
    });
    return 0;
}
