// A program of your own around tinygpt.hpp: it trains a small GPT-2, saves it, loads it and samples
// from it. `make test` compiles and runs it. By hand, on the default corpus:
//
//   g++ -std=c++20 -O3 -fno-math-errno -march=native -fopenmp docs/embedding.cpp -o embedding
//   ./embedding data/stories out/embedding 200
//
// What it saves is a Hugging Face folder: ./train_gpt opens it, and so does transformers. A run with
// evaluation, a log and resuming is a Trainer (§17); ./train_gpt is made of one.
#include "../tinygpt.hpp"

using namespace tinygpt;

static void train_and_sample(const std::string& data, const std::string& output, int steps) {
    const Tokenizer tokenizer = Tokenizer::load(data);
    const Shards shards(data + "/train_*.bin");
    if (shards.empty()) fail("there are no training shards in ", data);

    // Train: every step reads B rows of T tokens.
    const int B = 8, T = 64, V = tokenizer.vocab_size();
    const Config config{.n_layer = 2, .n_head = 4, .n_embd = 64, .n_positions = T, .vocab_size = V};
    Gpt2<Cpu> model(config);
    model.reserve(B, T, Use::training);
    model.initialise(1337);
    const DataOrder order{.shards = shards, .B = B, .T = T, .seed = 1337, .shuffle = true};
    StepOptions options;
    options.rate = {Schedule::cosine, 2e-3, 0.1, steps / 10, steps};
    for (int step = 0; step < steps; ++step) {
        train_step(model, {order.batch(int64_t(step) * B, V)}, options, step);
        if (step % 10 == 0) std::printf("step %d: loss %.4f\n", step, model.state->loss);
    }

    // Save, and load.
    make_folders(output);
    save_checkpoint(model, output + "/model", &tokenizer, {}, Purpose::use);
    Gpt2<Cpu> loaded(config_of_folder(output + "/model"));
    loaded.reserve(1, T, Use::generation);
    load_weights(loaded, output + "/model");

    // Sample, from the start of a document on.
    std::string text;
    generate(loaded, {tokenizer.end_of_text()}, {.max_new_tokens = 100, .seed = 1},
             [&](int token) { return text += tokenizer.bytes_of(token), true; });
    std::printf("\n%s\n", text.c_str());
}

int main(int argc, char** argv) {
    if (argc != 4) return std::fprintf(stderr, "usage: embedding DATA OUTPUT STEPS\n"), 2;
    try {
        train_and_sample(argv[1], argv[2], std::atoi(argv[3]));
        return 0;
    } catch (const Error& error) {
        return std::fprintf(stderr, "error: %s\n", error.what()), error.status;
    }
}
