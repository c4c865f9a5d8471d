// A tokenizer's two files and a text, with zero bytes between them. An empty vocab.json stands for
// the right one, so that the way behind it is open.
#include "fuzz.hpp"

static const std::string& folder() {
    static const std::string* path = [] {  // never deleted: it is needed at the very end
        auto* name = new std::string("/dev/shm/tinygpt-fuzz-XXXXXX");
        check(::mkdtemp(name->data()) != nullptr, "a folder");
        std::atexit([] { remove_folder(folder()); });
        return name;
    }();
    return *path;
}
static void put(const std::string& name, const std::string& bytes) {
    std::FILE* file = std::fopen((folder() + "/" + name).c_str(), "wb");
    check(file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size(), "written");
    std::fclose(file);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::vector<std::string> parts = parts_of(data, size, 3);
    put("merges.txt", parts[0]), put("vocab.json", parts[1]);
    accepts([&] {
        if (parts[1].empty()) {
            std::unordered_map<std::string, uint16_t> ids;
            put("vocab.json", Tokenizer(read_merges(folder() + "/merges.txt", ids)).vocab_json());
        }
        const Tokenizer tokenizer = Tokenizer::load(folder());
        check(tokenizer.decode(tokenizer.encode(parts[2])) == parts[2], "decodes what it encodes");
        check(tokenizer.encode(parts[2]).size() <= parts[2].size(), "no more tokens than bytes");
        put("merges.txt", tokenizer.merges_text());
        check(Tokenizer::load(folder()) == tokenizer, "reads what it writes");
    });
    std::string held = parts[2].substr(0, parts[2].size() / 2), shown = take_characters(held, false);
    held += parts[2].substr(parts[2].size() / 2);
    shown += take_characters(held, true);
    for (size_t at = 0, n; at < shown.size(); at += n)
        check((n = utf8_character(std::string_view(shown).substr(at, 4)).bytes) > 0,
              "shows only UTF-8");
    return 0;
}
