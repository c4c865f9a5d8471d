// Every parser under libFuzzer, in one program: `fuzz TARGET FLAGS... CORPUS`, and `fuzz seeds FOLDER`
// writes the first inputs of each target. `make fuzz` does both.
// A target reads bytes that mean no good. Beside reading them, the only thing it may do is to throw an
// Error: a line or two, not long.
#include <filesystem>

#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"

using namespace tinygpt;
using Strings = std::vector<std::string>;
using Target = void (*)(const std::string&);

Target target;  // the one that is being fuzzed
void options(const std::string& input);

void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

template <class Read>
void may_refuse(Read&& read) {
    try {
        read();
    } catch (const Error& error) {
        const std::string message = error.what();
        check(!message.empty() && message.size() < 1500, "a message of a sensible length");
        check(std::count(message.begin(), message.end(), '\n') < 3, "a message of a line or two");
        check(error.status == 2 || (error.status == 1 && target != options), "a status");
    }
}

// A folder of this process, in memory.
const std::string folder = format("/dev/shm/tinygpt-fuzz-%d", ::getpid());

// Writes a file; returns its path.
std::string put(const std::string& path, const std::string& bytes) {
    std::FILE* file = std::fopen(path.c_str(), "wb");
    check(file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size(), "written");
    std::fclose(file);
    return path;
}
template <class T>
std::string raw(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}
std::string joined_by_zeros(const Strings& parts) {
    std::string bytes = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) bytes += '\0' + parts[i];
    return bytes;
}

// --- JSON: what is read, written and read again is the same

void json(const std::string& input) {
    const Json value = Json::parse(input, "fuzz.json");
    for (int indent : {0, 2}) {
        const std::string written = value.write(indent);
        check(Json::parse(written, "again").write(indent) == written, "reads what it writes");
    }
    if (value.kind != Json::Kind::object) return;
    for (const char* key : {"a", "step", "shape"}) {
        may_refuse([&] { value.get_int(key, "fuzz", -5, 5); });
        may_refuse([&] { value.get(key, Json::Kind::number, "fuzz"); });
        may_refuse([&] { value.get_string(key, "fuzz"); });
    }
}

// --- safetensors: no header reads outside the file or allocates more than the file holds

void safetensors(const std::string& input) {
    static const Layout layout = layout_of({1, 1, 2, 2, 3});
    std::deque<SafetensorsFile> files;
    const SafetensorsFile& file = files.emplace_back(put(folder + "/input", input));
    may_refuse([&] { match_tensors(files, layout.tensors); });
    for (const StoredTensor& tensor : file.tensors) {
        check(tensor.end <= input.size(), "a tensor is inside its file");
        may_refuse([&] {
            std::vector<float> out(tensor.count());
            file.read(tensor, out.data());
            for (float x : out) check(std::isfinite(x), "a number");
        });
    }
}

// --- Shards: what passes the header's checks can be read to the end, in any order

// An input is the header's three numbers and the tokens; the zeros between them are put in here, so
// that no input is spent on changing bytes that nobody reads. A shorter one is the file.
void shard(const std::string& input) {
    std::string bytes = input;
    if (bytes.size() >= 12) bytes.insert(12, kShardHeaderBytes - 12, '\0');
    const size_t size = bytes.size();
    may_refuse([&] { Shard shard(put(folder + "/half", bytes.substr(0, size / 2))); });
    const Shards shards(put(folder + "/input", bytes));
    check(shards.tokens() * 2 + 1024 == int64_t(size), "the count is that of the file");
    const int vocab_size = size > 1030 ? 1 + uint8_t(bytes[1029]) * 257 : 300;
    may_refuse([&] { shards.check_tokens(vocab_size); });
    for (int document_start : {-1, 0}) {
        int64_t scored = 0;
        for (const Window& window : evaluation_windows(shards, 4, document_start))
            scored += read_batch(std::span(&window, 1), 2, 4, 65536).scored;
        check(scored == std::max<int64_t>(0, shards.tokens() - 1), "every token once");
    }
    for (bool shuffle : {false, true}) {
        const DataOrder order{shards, 2, 4, 1, shuffle};
        for (int64_t i = 0; shards.tokens() >= 2 && i < order.blocks_per_epoch(); i += 2)
            may_refuse([&] { order.batch(i, vocab_size); });
    }
    // Cut short while it is open.
    std::filesystem::resize_file(folder + "/input", size / 2);
    shards.check_tokens(65536);
    check(shards.tokens() == 0, "a shard that shrank is noticed");
}

// --- What else a checkpoint holds, and HellaSwag; the first byte chooses which

void checkpoint(const std::string& input) {
    if (input.empty()) return;
    const std::string text = input.substr(1), path = put(folder + "/input", text);
    // The state without its seal, which nothing but luck would get right.
    auto state = [](const std::string& json) {
        return state_to_json(state_from_json(Json::parse(json, "state"), "state")).write();
    };
    switch (uint8_t(input[0]) % 5) {
        case 0: hf_config(read_hf_config(path), -1); break;
        case 1: check(state(state(text)) == state(text), "reads what it writes"); break;
        case 2: read_sealed(path); break;
        case 3: read_hellaswag(path, 300); break;
        default:
            for (const LogRow& row : read_log(path, 1000)) log_line(row);
    }
}

// --- The command line, and the text of a config file, whose first byte chooses the command

void options(const std::string& input) {
    Strings arguments = split_at(input, '\0');
    while (!arguments.empty() && arguments.back().empty()) arguments.pop_back();
    Options options = parse_options(arguments);
    help_text(options, "fuzz"), retyped(options, options.command);
    // Every value as it would be typed makes the same options again.
    Strings again;
    for (const CommandName& c : kCommands)
        if (c.bit == options.command) again.push_back(c.name);
    for (const Option& option : option_table(options))
        if (options.given.contains(option.name) && option.name != "config")
            again.push_back("--" + option.name + "=" + value_text(option));
    check(options_that_change_numbers(parse_options(again)).write() ==
              options_that_change_numbers(options).write(),
          "the same options again");
}
void config(const std::string& input) {
    if (input.empty()) return;
    const unsigned command = kCommands[uint8_t(input[0]) % kCommands.size()].bit;
    Options options;
    const std::vector<Option> table = option_table(options);
    const std::string path = put(folder + "/input", input.substr(1));
    std::set<std::string> given;
    CommandLine{table, kCommands, command}.read_config(path, given);
    for (const Option& option : table)
        if (given.contains(option.name))
            check(!value_text(option).empty() || option.range.text == "TEXT", "it is set");
}

// --- A tokenizer's two files and a text

// The vocab.json that goes with these merges.
std::string vocab_of(const Strings& lines) {
    Json vocab = Json::object();
    auto add = [&](const std::string& name) {
        vocab.members.emplace_back(name, vocab.members.size());
    };
    for (int id = 0; id < 256; ++id) add(Tokenizer::bytes().name_of(id));
    for (std::string line : lines) {
        if (line.starts_with("#version")) continue;
        if (line.find(' ') != line.npos) line.erase(line.find(' '), 1);
        add(line);
    }
    add(std::string(kEndOfText));
    return vocab.write();
}

// An empty vocab.json stands for the right one, so that the way behind it is open.
void tokenizer(const std::string& input) {
    Strings parts = split_at(input, '\0');
    parts.resize(3);
    const std::string text = parts[2], merges = put(folder + "/merges.txt", parts[0]);
    std::string held = text.substr(0, text.size() / 2), shown = take_characters(held, false);
    held += text.substr(text.size() / 2);
    shown += take_characters(held, true);
    for (size_t at = 0, n; at < shown.size(); at += n)
        check((n = utf8_character(std::string_view(shown).substr(at, 4)).bytes) > 0, "UTF-8 only");
    put(folder + "/vocab.json", parts[1].empty() ? vocab_of(read_merge_lines(merges)) : parts[1]);
    if (parts[0].starts_with('{')) {  // the whole of tokenizer.json
        for (const char* name : {"/vocab.json", "/merges.txt"}) remove_file(folder + name);
        put(folder + "/tokenizer.json", parts[0]);
    }
    const Tokenizer tokenizer = Tokenizer::load(folder);
    check(tokenizer.decode(tokenizer.encode(text)) == text, "decodes what it encodes");
    check(tokenizer.encode(text).size() <= text.size(), "no more tokens than bytes");
    tokenizer.save(folder);
    check(Tokenizer::load(folder) == tokenizer, "reads what it writes");
}

// --- The first inputs: small good files, made by the code that makes them, and a few nearly good

void seed(const std::string& target, const std::string& bytes) {
    static int number = 0;
    put(target + format("/seed%03d", number++), bytes);
}

void seed_files() {
    for (const char* text :
         {R"({"a": 1, "step": -2.5e-3, "shape": [1, 2, {}]})", "[null, true, false, -0.0, 1e400]",
          R"( {"shape":"\"\\\/\b\f\r\t\u00e9\ud83d\ude00\n"} )",
          "[9223372036854775807, 12345678901234567890",
          R"({"a": {"b": [[], {}]}, "step": true, "a": 2})"})
        seed("json", text);

    auto zeros = [](float* out, size_t, size_t n) { std::fill_n(out, n, 0.0f); };
    std::vector<StoredTensor> tensors;
    for (const TensorInfo& info : layout_of({1, 1, 2, 2, 3}).tensors)
        tensors.push_back({name_in_checkpoint(info.name), "F32", info.shape, zeros});
    write_safetensors(folder + "/file", tensors);
    seed("safetensors", read_file(folder + "/file"));
    for (const char* type : {"F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F32"})
        for (const char* shape : {"[]", "[2]", "[2, 2]", "[0]"}) {
            const std::string header = format(R"({"__metadata__":{"k":"v"},"h.0.attn.bias":)"
                                              R"({"dtype":"%s","shape":%s,"data_offsets":[0,8]}})",
                                              type, shape);
            seed("safetensors", raw(std::vector<uint64_t>{header.size()}) + header +
                                    std::string("\0\x80\1\0\0\x7b\1\x7e", 8));
        }

    const std::vector<uint16_t> text = {0, 5, 6, 7, 0, 8, 65535, 10, 300, 2, 2, 0, 1};
    for (int count : {0, 1, 8, 13})
        seed("shard", raw(std::vector<int32_t>{kShardMagic, 1, count}) +
                          raw(std::vector<uint16_t>(text.begin(), text.begin() + count)));
    seed("shard", "x");

    TrainerState state;
    state.options.set("seed", "1"), state.data = Json::array(std::vector{"train: 5 tokens"});
    write_sealed(folder + "/file", state_to_json(state));
    const std::string sealed = read_file(folder + "/file");
    std::vector<int32_t> header = {20240522, 1, 1, 40};
    header.resize(256);
    std::vector<uint16_t> words = {65535, 40, 0, 1, 4, 2, 5, 6};
    for (uint16_t ending = 8; ending < 12; ++ending) words.insert(words.end(), {2, 7, ending});
    seed("checkpoint", '\0' + hf_config({1, 1, 2, 2, 3, true, 0.1f}, 2).write());
    seed("checkpoint", '\1' + state_to_json(state).write());
    seed("checkpoint", '\2' + sealed);
    seed("checkpoint", '\3' + raw(header) + raw(words));
    seed("checkpoint", '\4' + log_text({LogRow()}) + "1,0.1,32,5.5,,nan,,,1e-3,-inf,,,0.5\n2,0.2");
}

void seed_texts() {
    Options defaults;
    for (const Option& option : option_table(defaults)) {  // with the first command that takes it
        size_t which = 0;
        while (!(option.commands & kCommands[which].bit)) ++which;
        const std::string value = value_text(option), command = kCommands[which].name;
        seed("options", joined_by_zeros({command, "--" + option.name + "=" + value}));
        seed("options", joined_by_zeros({command, "--" + option.name, value + "1", "--seed", "3"}));
        seed("config", char(which) + option.name + " = " + value + " # text\n\n--seed=3\n");
    }
    for (const std::string& line :
         split_at("--help;-h;--batch_size 0x10;--lr 1;--max-minutes=1e-3 --epochs 2.5;x;--override;"
                  "--patience=2 --eval-interval=0;--data=a --train-shards=b;--val-shards=b;"
                  "--config /proc/self/cmdline;--batch-size=1000000 --seq-len=1000000",
                  ';'))
        seed("options", joined_by_zeros(split_at(line, ' ')));
    for (const char* text :
         {"\xef\xbb\xbf# comment\r\nbatch_size = 3\n", "batch-size 3\n", "a\1b = 3\n", "x = 1\n",
          "config = a\n", "schedule = wsd\nshuffle = 2\n"})
        seed("config", '\0' + std::string(text));

    const Tokenizer few({{'a', 'b'}, {256, 'c'}, {220, 't'}});
    const std::vector<Strings> inputs =
        {{few.merges_text(), "", "abc the cat's 12 abcabc, \xc3\xa9\xe4\xb8\xad\xff  x"},
         {few.merges_text(), few.vocab_json(), "abc"},
         {few.tokenizer_json(), "", "abc"},
         {"#version: 0.2\n\xc4\xa0 t\nh e\n\xc4\xa0t he\n", "", "the then\n\n  the"},
         {"a b\na b\n", "", ""},
         {"a b\nab c\n", "{\"a\": 0}", "x"},
         {"a a\naa aa\naaaa aaaa\n", "", "I'll we've don't\r\n\t 1234 !?" + std::string(79, 'a')},
         {"", "", "\xf0\x9f\x98\x80\xe2\x80\x83 \xd9\xa3"}};
    for (const Strings& parts : inputs) seed("tokenizer", joined_by_zeros(parts));
}

// --- The targets

const std::map<std::string, Target> kTargets = {{"json", json},
                                                {"safetensors", safetensors},
                                                {"shard", shard},
                                                {"options", options},
                                                {"config", config},
                                                {"checkpoint", checkpoint},
                                                {"tokenizer", tokenizer}};

// Takes the first argument; the others are libFuzzer's.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::string first = *argc > 1 ? (*argv)[1] : "";
    make_folders(folder);
    std::atexit([] { remove_folder(folder); });
    if (first == "seeds") {
        for (const auto& [name, read] : kTargets)
            make_folders(std::string((*argv)[2]) + "/" + name);
        check(::chdir((*argv)[2]) == 0, "a folder for the seeds");
        seed_files(), seed_texts();
        std::exit(0);
    }
    check(kTargets.contains(first), "expected a target's name, or `seeds FOLDER`");
    target = kTargets.at(first);
    std::copy(*argv + 2, *argv + *argc + 1, *argv + 1);
    --*argc;
    return 0;
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    may_refuse([&] { target(std::string(reinterpret_cast<const char*>(data), size)); });
    return 0;
}
