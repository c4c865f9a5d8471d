// A config file's text; its first byte chooses the command.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const unsigned command = kCommands[data[0] % kCommands.size()].bit;
    const MemoryFile file(data + 1, size - 1);
    accepts([&] {
        Options options;
        const std::vector<Option> table = option_table(options);
        for (const Assignment& a : CommandLine{table, kCommands, command}.read_config(file.path())) {
            a.set();
            check(is_set(*a.option) || a.text.empty(), "what was assigned is set");
        }
    });
    return 0;
}
