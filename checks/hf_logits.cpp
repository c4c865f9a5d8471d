// hf_logits FOLDER: reads token numbers from standard input and prints the logits after each of
// them, a line a token, with all the digits of a float. For checks/test_hf.py.
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cpp"

#include <iostream>

int main(int argc, char** argv) {
    using namespace tinygpt;
    flush_tiny_numbers();  // as the program does
    try {
        if (argc != 2) fail_usage("hf_logits takes a folder, and token numbers on standard input");
        const Config config = config_of_folder(argv[1]);
        Batch batch(1, config.n_positions);
        int T = 0;
        for (int token; T < config.n_positions && std::cin >> token; ++T)
            batch.inputs[size_t(T)] = token;
        Gpt2<Cpu> model(config);
        model.reserve(1, config.n_positions, Use::evaluation);
        load_weights(model, argv[1]);
        set_batch(model, batch);
        forward(model, {1, config.n_positions});
        const int V = config.vocab_size;
        std::vector<float> logits(size_t(T) * size_t(V));
        model.device.head_logits(logits.data(), model.a.ln_f, model.w.lm_head, T, config.n_embd, V);
        for (size_t i = 0; i < logits.size(); ++i)
            std::printf("%.9g%c", double(logits[i]), (i + 1) % size_t(V) ? ' ' : '\n');
        return 0;
    } catch (const Error& error) {
        std::fprintf(stderr, "hf_logits: %s\n", error.what());
        return error.status;
    }
}
