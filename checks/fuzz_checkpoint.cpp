// What else a checkpoint holds, and a HellaSwag file; the first byte chooses which.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const MemoryFile file(data + 1, size - 1);
    const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
    accepts([&] {
        switch (data[0] % 5) {
            case 0: {
                const Config config = read_hf_config(file.path());
                check(config.n_embd % config.n_head == 0, "heads divide channels");
                hf_config_text(config, -1);
                break;
            }
            case 1: {  // the state without its seal, which nothing but luck would get right
                const TrainerState state = state_from_json(Json::parse(text, "state"), "state");
                const std::string written = state_to_json(state).write();
                const TrainerState again = state_from_json(Json::parse(written, "again"), "again");
                check(state_to_json(again).write() == written, "reads what it writes");
                break;
            }
            case 2: read_sealed(file.path()); break;
            case 3: read_hellaswag(file.path(), 300); break;
            default:
                for (const LogRow& row : read_log(file.path(), 1000)) log_line(row);
        }
    });
    return 0;
}
