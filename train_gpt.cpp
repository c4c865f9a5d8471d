// train_gpt: trains a GPT-2 on the CPU. Everything it does is in tinygpt.hpp; this chooses the
// device.
#include "tinygpt.hpp"

int main(int argc, char** argv) {
    using namespace tinygpt;
    wait_politely(argv);
    flush_tiny_numbers();
    return program(argc, argv, "train_gpt",
                   [](const Options& options) { return run_command(make_cpu(options), options); });
}
