// Reads a story of the default corpus back: which choices of the grammar write it, and what they
// cost. For the tests and for checks/grammar.cpp; comes after prepare_data.cpp.
#ifndef TINYGPT_STORIES_HPP_INCLUDED
#define TINYGPT_STORIES_HPP_INCLUDED

namespace tinygpt {
namespace stories {

// Adds the sentences that are written out in an alternative: what ends in . ! or ?, less the rules
// before it ({Opening} and so on) that are sentences of their own.
inline void add_sentences(Grammar& grammar, std::string_view text, std::vector<Items>& sentences) {
    while (!text.empty()) {
        const bool rule = text[0] == '{' && is_capital(text[1]);
        size_t end = rule ? text.find('}') + 1 : 1;
        while (!rule && end < text.size() &&
               !(std::strchr(".!?", text[end - 1]) && text[end] == ' '))
            end++;
        if (!rule) sentences.push_back(parse_items(grammar, std::string(text.substr(0, end))));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
}

// Every sentence of every rule.
inline const std::vector<Items>& all_sentences() {
    static const std::vector<Items> all = [] {
        Grammar grammar = the_grammar(), names;
        const std::vector<std::string> bodies = parse_headers(names, grammar_text);
        std::vector<Items> sentences;
        for (size_t i = 0; i < bodies.size(); i++)
            if (is_capital(grammar.rules[i].name[0]))
                for (const std::string& alternative : split(bodies[i], '|'))
                    add_sentences(grammar, alternative, sentences);
        sentences.push_back(parse_items(grammar, "The end."));
        return sentences;
    }();
    return all;
}

// What is still to be read: the rest of some items, and then the rest of those around them.
struct Todo {
    const Items& items;
    size_t next;
    const Todo* around;
};

// Finds every way in which the grammar can write a text: tries each alternative in turn, and gives
// it up at the first letter that differs.
struct Reader {
    const Grammar& grammar;
    std::vector<double> neg_log_probs = {};  // of every way found

    // May the slot hold this word? A slot that is still empty may: a sentence read alone recalls
    // words that were drawn before it.
    bool may_hold(const Memory& memory, int slot, int word) const {
        if (memory[slot] >= 0) return memory[slot] == word;
        for (size_t other = 0; other < grammar.slots.size(); other++) {
            const bool differ =
                grammar.slots[slot].unlike == int(other) || grammar.slots[other].unlike == slot;
            if (differ && memory[other] == word) return false;
        }
        return true;
    }

    // Reads `text` as what is to do, where the choices so far cost `cost`.
    void read(const Todo& todo, std::string_view text, const Memory& memory, double cost) {
        if (todo.next == todo.items.size()) {
            if (todo.around)
                read(*todo.around, text, memory, cost);
            else if (text.empty())
                neg_log_probs.push_back(cost);
            return;
        }
        const Item& item = todo.items[todo.next];
        const Todo after{todo.items, todo.next + 1, todo.around};
        if (item.kind == Item::letters) {
            if (!text.starts_with(item.text)) return;
            read(after, text.substr(item.text.size()), memory, cost);
        } else if (item.kind == Item::rule) {
            const Rule& rule = grammar.rules[item.index];
            for (const Items& items : rule.alternatives)
                read({items, 0, &after}, text, memory, cost + std::log(rule.alternatives.size()));
        } else {
            read_word(item, after, text, memory, cost);
        }
    }

    void read_word(const Item& item, const Todo& after, std::string_view text, Memory memory,
                   double cost) {
        const Slot& slot = grammar.slots[item.index];
        int n = int(grammar.rules[slot.rule].words.size());
        if (item.kind == Item::draw) {
            memory[item.index] = -1;
            cost += std::log(double(n - (slot.unlike >= 0)));
        }
        const Memory before = memory;
        for (int word = 0; word < n; word++) {
            const std::string spelt = spell(grammar, item, word);
            if (!text.starts_with(spelt) || !may_hold(before, item.index, word)) continue;
            memory[item.index] = int8_t(word);
            read(after, text.substr(spelt.size()), memory, cost);
        }
    }
};

// What each way of reading `text` as one of the `starts` costs, in nats.
inline std::vector<double> derivations(std::string_view text, const std::vector<Items>& starts) {
    Reader reader{the_grammar()};
    for (const Items& items : starts) reader.read({items, 0, nullptr}, text, {}, 0.0);
    return reader.neg_log_probs;
}
// Of a whole story: one number, as the grammar is unambiguous; none if it cannot tell this story.
inline std::vector<double> derivations(std::string_view story) {
    return derivations(story, the_grammar().rules[0].alternatives);
}

}  // namespace stories

// -log p(story) in nats, exactly: the loss of the true model, summed over the story's tokens and
// its end-of-text token, whatever the tokenizer. Infinity if the grammar cannot tell this story.
inline double story_neg_log_prob(std::string_view story) {
    const std::vector<double> found = stories::derivations(story);
    return found.empty() ? std::numeric_limits<double>::infinity() : found[0];
}

// Does this sentence occur in some story of the grammar? What is recalled in it must agree within
// it: pronouns with names, a number with the number less one.
inline bool is_story_sentence(std::string_view sentence) {
    return !stories::derivations(sentence, stories::all_sentences()).empty();
}

// The sentences of a text, without blanks around them. A sentence ends in . ! or ? and, in these
// stories, such a mark ends nothing else.
inline std::vector<std::string> story_sentences(std::string_view text) {
    std::vector<std::string> sentences(1);
    for (char c : text) {
        const bool blank = std::isspace(uint8_t(c)) != 0;
        if (!blank || !sentences.back().empty()) sentences.back() += blank ? ' ' : c;
        if (c == '.' || c == '!' || c == '?') sentences.emplace_back();
    }
    if (sentences.back().empty()) sentences.pop_back();
    return sentences;
}

}  // namespace tinygpt

#endif
