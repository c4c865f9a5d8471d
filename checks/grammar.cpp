// Reads text and says how many of its sentences the grammar of the default corpus can make:
//   ./train_gpt sample --init-from out/stories/best --num-samples 20 | build/.../grammar
#define PREPARE_DATA_NO_MAIN
#include "../prepare_data.cpp"
#include "stories.hpp"

#include <iostream>
#include <iterator>

int main() {
    const std::string text{std::istreambuf_iterator<char>(std::cin), {}};
    std::vector<std::string> sentences;
    for (const std::string& line : tinygpt::split_at(text, '\n'))
        for (const std::string& sentence : tinygpt::story_sentences(line))
            if (sentence.ends_with('.') && sentences.size() < 100) sentences.push_back(sentence);
    int accepted = 0;
    for (const std::string& sentence : sentences) {
        const bool good = tinygpt::is_story_sentence(sentence);
        accepted += good;
        if (!good) std::printf("not in the grammar: %s\n", sentence.c_str());
    }
    std::printf("%d of %zu sentences accepted\n", accepted, sentences.size());
    return sentences.size() == 100 && accepted >= 90 ? 0 : 1;
}
