// Writes the first inputs of every fuzz target into folders below argv[1]: small good files, made
// by the code that makes them, and a few that are nearly good.
#include "fuzz.hpp"

static std::string root;
static int number = 0;
static void seed(const std::string& target, const std::string& bytes) {
    make_folders(root + "/" + target);
    write_file(root + "/" + target + format("/seed%03d", number++), bytes);
}
static std::string with_zeros(const std::vector<std::string>& parts) {
    std::string bytes;
    for (size_t i = 0; i < parts.size(); i++) bytes += (i ? std::string(1, '\0') : "") + parts[i];
    return bytes;
}
// As fuzz_shard.cpp takes it: without the zeros behind the header's three numbers.
static std::string shard(const std::vector<uint16_t>& tokens) {
    int32_t header[3] = {kShardMagic, 1, int32_t(tokens.size())};
    std::string bytes(reinterpret_cast<const char*>(header), sizeof header);
    return bytes.append(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
}

static void json_seeds() {
    for (const char* text :
         {"{\"a\": 1, \"step\": -2.5e-3, \"shape\": [1, 2, {}]}", "[null, true, false]",
          "\"\\u00e9\\ud83d\\ude00\\n\"", "{\"a\": {\"b\": [[], {}]}, \"step\": true}", "-0.0",
          "1e400", "9223372036854775807", "12345678901234567890", "[1, 2", "{\"a\":1,\"a\":2}",
          " {\"shape\":\"\\\"\\\\\\/\\b\\f\\r\\t\"} "})
        seed("json", text);
}

static void safetensors_seeds() {
    const std::string path = root + "/file";
    const Layout layout = layout_of({1, 1, 2, 2, 3});
    auto zeros = [](float* out, size_t, size_t n) { std::fill_n(out, n, 0.0f); };
    std::vector<StoredTensor> tensors;
    for (const TensorInfo& info : layout.tensors)
        tensors.push_back({name_in_checkpoint(info.name), "F32", info.shape, zeros});
    write_safetensors(path, tensors);
    seed("safetensors", read_file(path));
    write_safetensors(path, {tensors[0], tensors[1]});
    seed("safetensors", read_file(path));
    auto file = [](const std::string& header, const std::string& data) {
        std::string length(8, '\0');
        length[0] = char(uint8_t(header.size())), length[1] = char(uint8_t(header.size() >> 8));
        return length + header + data;
    };
    for (const char* type : {"F64", "F16", "I64", "BOOL", "F8_E4M3", "F32"})
        for (const char* shape : {"[]", "[2]", "[2, 3]", "[0]"})
            seed("safetensors", file(format("{\"__metadata__\":{\"k\":\"v\"},\"h.0.attn.bias\":"
                                            "{\"dtype\":\"%s\",\"shape\":%s,"
                                            "\"data_offsets\":[0,8]}}",
                                            type, shape),
                                     std::string(8, 'a')));
    seed("safetensors",
         file("{\"lm_head.weight\":{\"dtype\":\"F16\",\"shape\":[3,2],\"data_offsets\":[0,12]},"
              "\"wte.weight\":{\"dtype\":\"F16\",\"shape\":[3,2],\"data_offsets\":[12,24]}}",
              std::string("\0\0\0\x3c\0\x80\1\0\0\x7c\1\x7e\0\0\0\x3c\0\x80\1\0\0\x7b\1\x70", 24)));
    ::unlink(path.c_str());
}

static void tokenizer_seeds() {
    const Tokenizer bytes = Tokenizer::bytes();
    const Tokenizer few({{'a', 'b'}, {256, 'c'}, {220, 't'}});
    for (const Tokenizer* t : {&bytes, &few}) {
        seed("tokenizer", with_zeros({t->merges_text(), "",
                                      "abc the cat's 12 abcabc, \xc3\xa9\xe4\xb8\xad\xff  x"}));
        seed("tokenizer", with_zeros({t->merges_text(), t->vocab_json(), "abc"}));
    }
    seed("tokenizer",
         with_zeros({"#version: 0.2\n\xc4\xa0 t\nh e\n\xc4\xa0t he\n", "", "the then\n\n  the"}));
    seed("tokenizer", with_zeros({"a b\na b\n", "", ""}));
    seed("tokenizer", with_zeros({"a b\nab c\n", "{\"a\": 0}", "x"}));
    for (const char* text :
         {"I'll we've don't\r\n\t 1234 !?", "\xf0\x9f\x98\x80\xe2\x80\x83 \xd9\xa3",
          "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"})
        seed("tokenizer", with_zeros({"a a\naa aa\naaaa aaaa\n", "", text}));
}

static void option_seeds() {
    Options defaults;
    for (const Option& option : option_table(defaults)) {
        const std::string name = "--" + option.name, value = value_text(option);
        for (const CommandName& c : kCommands)
            if (option.commands & c.bit) {
                seed("options", with_zeros({c.name, name + "=" + value}));
                seed("options",
                     with_zeros({c.name, name, value.empty() ? "x" : value, "--seed", "3"}));
                const char which = char(&c - kCommands.data());
                seed("config", which + (option.name + (" = " + value) + " # text\n\n--seed=3\n"));
                break;
            }
    }
    for (const char* text :
         {"\xef\xbb\xbf# comment\r\nbatch_size = 3\n", "batch-size 3\n", "a\1b = 3\n", "x = 1\n",
          "config = a\n", "schedule = wsd\nshuffle = 2\n"})
        seed("config", std::string(1, '\0') + text);
    seed("options", with_zeros({"--help"})), seed("options", with_zeros({"-h"}));
    seed("options", with_zeros({"--batch_size", "0x10"})),
        seed("options", with_zeros({"--lr", "1"}));
    seed("options", with_zeros({"--max-minutes=1e-3", "--epochs", "2.5"}));
    seed("options", with_zeros({"--patience=2", "--eval-interval=0"}));
    seed("options", with_zeros({"--data=a", "--train-shards=b"})),
        seed("options", with_zeros({"x"}));
    seed("options", with_zeros({"--override"})), seed("options", with_zeros({"--val-shards=b"}));
    seed("options", with_zeros({"--config", "/proc/self/cmdline"}));
    seed("options", with_zeros({"--batch-size=1000000", "--seq-len=1000000"}));
}

static void checkpoint_seeds() {
    auto put = [](char which, const std::string& bytes) { seed("checkpoint", which + bytes); };
    put(0, hf_config_text({1, 1, 2, 2, 3}, 2));
    put(0, hf_config_text({1, 1, 2, 2, 3, true, 0.1f}, -1));
    put(0,
        "{\"model_type\":\"gpt2\",\"n_layer\":1,\"n_head\":1,\"n_embd\":2,\"n_positions\":4,"
        "\"vocab_size\":9,"
        "\"eos_token_id\":[3],\"n_inner\":8,\"pruned_heads\":{},\"activation_function\":\"relu\"}");
    TrainerState state;
    state.options = {{"seed", "1"}}, state.data = {"train: 5 tokens"};
    put(1, state_to_json(state).write());
    const std::string path = root + "/file";
    write_sealed(path, state_to_json(state));
    put(2, read_file(path)), put(1, read_file(path));
    ::unlink(path.c_str());
    std::vector<uint16_t> words = {65535, 40, 0, 1, 4, 2, 5, 6};
    for (uint16_t ending = 0; ending < 4; ending++)
        words.insert(words.end(), {2, 7, uint16_t(8 + ending)});
    int32_t header[256] = {20240522, 1, 1, 40};
    std::string hellaswag(reinterpret_cast<const char*>(header), sizeof header);
    put(3, hellaswag.append(reinterpret_cast<const char*>(words.data()), 2 * words.size()));
    put(4, log_text({LogRow()}) + "1,0.1,32,5.5,,nan,,,1e-3,-inf,,,0.5\n2,0.2");
}

int main(int, char** argv) {
    root = argv[1];
    json_seeds(), safetensors_seeds(), tokenizer_seeds(), option_seeds(), checkpoint_seeds();
    seed("shard", shard({0, 5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 0, 1})), seed("shard", shard({}));
    seed("shard", shard({1})), seed("shard", shard({0, 65535, 300, 2, 2, 2, 0})),
        seed("shard", "x");
    seed("shard", shard({1, 2, 3}) + "x"), seed("shard", shard({1, 2, 3}).substr(0, 16));
}
