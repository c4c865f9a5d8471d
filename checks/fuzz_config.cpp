// A config file's text; its first byte chooses the command.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const Command command = command_table()[data[0] % command_table().size()].command;
    const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
    accepts([&] {
        Options options;
        for (const Assignment& a : parse_config(text, "fuzz.conf", command)) {
            assign(options, a);
            check(is_set(options, *a.option) || a.value.empty(), "what was assigned is set");
        }
    });
    const MemoryFile file(text.data(), text.size());
    accepts([&] { read_config(file.path(), command); });
    return 0;
}
