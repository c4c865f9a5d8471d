// JSON: what is read, written and read again is the same; nothing else gets through.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string text(reinterpret_cast<const char*>(data), size);
    accepts([&] {
        const Json json = Json::parse(text, "fuzz.json");
        for (int indent : {0, 2}) {
            const std::string written = json.write(indent);
            check(Json::parse(written, "again").write(indent) == written, "reads what it writes");
        }
        if (json.kind != Json::Kind::object) return;
        for (const char* key : {"a", "step", "shape"}) {
            accepts([&] { json.get_int(key, "fuzz", -5, 5); });
            accepts([&] { json.get(key, Json::Kind::number, "fuzz"); });
            accepts([&] { json.get_string(key, "fuzz"); });
        }
    });
    return 0;
}
