// Reads a story of the default corpus back: which choices of the grammar write it, and what they
// cost. For the tests and for checks/grammar.cpp; comes after prepare_data.cpp.
#ifndef TINYGPT_STORIES_HPP_INCLUDED
#define TINYGPT_STORIES_HPP_INCLUDED

namespace tinygpt {
namespace stories {

// Adds the sentences that are written out in an alternative: what ends in . ! or ?, less the rules
// before it ({Opening} and so on) that are sentences of their own.
inline void add_sentences(std::string_view text, std::vector<Items>& sentences) {
    while (!text.empty()) {
        const bool rule = text[0] == '{' && std::isupper(text[1]);
        size_t end = rule ? text.find('}') + 1 : 1;
        while (!rule && end < text.size() &&
               !(std::strchr(".!?", text[end - 1]) && text[end] == ' '))
            end++;
        if (!rule) sentences.push_back(parse_items(std::string(text.substr(0, end))));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
}

// Every sentence of every rule.
inline const std::vector<Items>& all_sentences() {
    static const std::vector<Items> all = [] {
        std::vector<Items> sentences;
        for (const auto& [head, body] : rule_texts(grammar_text))
            if (std::isupper(head[0]))
                for (const std::string& alternative : split(body, '|'))
                    add_sentences(alternative, sentences);
        sentences.push_back(parse_items("The end."));
        return sentences;
    }();
    return all;
}

// The list of each slot. Needed where a sentence read alone recalls words that were drawn before.
inline const std::map<std::string, const Rule*>& lists_of_slots() {
    static const std::map<std::string, const Rule*> lists = [] {
        std::map<std::string, const Rule*> of;
        for (const auto& [name, rule] : the_grammar())
            for (const Items& items : rule.alternatives)
                for (const Item& item : items)
                    if (!item.list.empty()) of[item.name] = &the_grammar().at(item.list);
        return of;
    }();
    return lists;
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
        if (!text.starts_with(item.letters)) return;
        text.remove_prefix(item.letters.size());
        if (item.name.empty()) {
            read(after, text, memory, cost);
        } else if (const auto* alternatives = alternatives_of(grammar, item.name)) {
            for (const Items& items : *alternatives)
                read({items, 0, &after}, text, memory, cost + std::log(alternatives->size()));
        } else {
            read_word(item, after, text, memory, cost);
        }
    }

    // The slot may hold a word that it holds already, or is drawn. A slot that is still empty may
    // hold any: a sentence read alone recalls words that were drawn before it.
    void read_word(const Item& item, const Todo& after, std::string_view text, Memory memory,
                   double cost) {
        const Rule& list = *lists_of_slots().at(item.name);
        const int n = int(list.words.size());
        if (!item.list.empty()) {
            memory.erase(item.name);
            cost += std::log(double(n - !item.unlike.empty()));
        }
        const auto held = memory.find(item.name), barred = memory.find(item.unlike);
        const int only = held == memory.end() ? -1 : held->second.number;
        const int never = barred == memory.end() ? -1 : barred->second.number;
        for (int word = 0; word < n; word++) {
            const std::string spelt = spell({&list, word}, item.form);
            const bool may = word != never && (only < 0 || word == only);
            if (!may || !text.starts_with(spelt)) continue;
            memory[item.name] = {&list, word};
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
    return derivations(story, the_grammar().at("story").alternatives);
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
