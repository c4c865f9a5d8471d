// All fuzz targets in one program without a fuzzer: feeds them the corpora below argv[1], a folder
// for each target. Built with -fprofile-instr-generate -fcoverage-mapping, it tells llvm-cov which
// lines the corpora reach.
#define LLVMFuzzerTestOneInput fuzz_checkpoint
#include "fuzz_checkpoint.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_config
#include "fuzz_config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_json
#include "fuzz_json.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_options
#include "fuzz_options.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "fuzz_safetensors.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_shard
#include "fuzz_shard.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer
#include "fuzz_tokenizer.cpp"
#undef LLVMFuzzerTestOneInput

int main(int, char** argv) {
    using Target = int (*)(const uint8_t*, size_t);
    const std::pair<const char*, Target> targets[] = {{"checkpoint", fuzz_checkpoint},
                                                      {"config", fuzz_config},
                                                      {"json", fuzz_json},
                                                      {"options", fuzz_options},
                                                      {"safetensors", fuzz_safetensors},
                                                      {"shard", fuzz_shard},
                                                      {"tokenizer", fuzz_tokenizer}};
    for (auto& [name, target] : targets) {
        const std::string folder = std::string(argv[1]) + "/" + name;
        const std::vector<std::string> files = list_folder(folder);
        for (const std::string& file : files) {
            const std::string bytes = read_file(folder + "/" + file);
            target(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
        }
        std::printf("%-12s %zu inputs\n", name, files.size());
    }
}
