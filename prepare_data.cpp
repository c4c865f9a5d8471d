// prepare_data - turns text into what train_gpt reads: a tokenizer and shards of tokens
//
//   ./prepare_data                                           the default corpus: data/stories
//   ./prepare_data --input book.txt --vocab-size 4096 --output data/book
//   ./prepare_data --input a.txt b.jsonl folder --tokenizer gpt2 --output data/mine
//
// It reads documents, cuts off the last part for validation, makes or loads a tokenizer, turns the
// documents into tokens on all cores, and writes a folder with
//   train_000001.bin ...  val_000000.bin   the tokens (the format is in §2 of tinygpt.hpp)
//   vocab.json  merges.txt                 the tokenizer (§12)
//   dataset.json                           source, counts, and the floor where it is known
// The order is: options, documents, learning a vocabulary, tokens, the folder, the default corpus.

#include "tinygpt.hpp"

#include <filesystem>
#include <queue>

namespace tinygpt {

// =================================================================================================
// Options
// =================================================================================================

struct PrepareOptions {
    std::vector<std::string> input;
    std::string tokenizer = "bpe", vocab = "data/gpt2", output, from_llmc;
    int64_t vocab_size = 4096, shard_tokens = 100'000'000, seed = 1;
    double val_fraction = 0.1;
    bool help = false;
    std::set<std::string> given;  // the options that were on the command line
    bool has(const char* name) const { return given.count(name) > 0; }
};

// One option: its name, its argument as help shows it ("" for none), what it does, what sets it.
struct PrepareOption {
    std::string name, argument, help;
    std::function<void(const std::string& value)> set;
};

// The value as a number from low to high; anything else is bad usage.
template <class Number>
inline Number parse_option(const std::string& name, const std::string& value, Number low,
                           Number high) {
    Number number{};
    auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error == std::errc() && end == value.data() + value.size() && number >= low &&
        number <= high)
        return number;
    const char* kind = std::is_integral_v<Number> ? "a whole number" : "a number";
    fail_usage(format("--%s takes %s from %.15g to %.15g, found %s", name.c_str(), kind,
                      double(low), double(high), shown(value).c_str()));
}

// All options, in the order of the help text.
inline std::vector<PrepareOption> prepare_option_table(PrepareOptions& o) {
    auto text = [](std::string& to) { return [&to](const std::string& value) { to = value; }; };
    auto integer = [](const char* name, int64_t& to, int64_t low, int64_t high) {
        return [=, &to](const std::string& value) { to = parse_option(name, value, low, high); };
    };
    return {
        {"input", "FILE...", "text, .jsonl files (field \"text\") and folders; may be repeated",
         [&o](const std::string& value) { o.input.push_back(value); }},
        {"output", "DIR", "the folder to write (default corpus: data/stories)", text(o.output)},
        {"tokenizer", "KIND",
         "bpe (learn a vocabulary), byte, or gpt2 (as in --vocab; default: bpe)",
         text(o.tokenizer)},
        {"vocab", "DIR", "the folder of a vocabulary, for --tokenizer gpt2 (default: data/gpt2)",
         text(o.vocab)},
        {"vocab-size", "N", "tokens in a bpe vocabulary, 257 to 65536 (default: 4096)",
         integer("vocab-size", o.vocab_size, 257, 65536)},
        {"val-fraction", "F", "the part at the end that is for validation (default: 0.1; 0: none)",
         [&o](const std::string& v) {
             o.val_fraction = parse_option("val-fraction", v, 0.0, 0.999);
         }},
        {"shard-tokens", "N", "tokens in a shard (default: 100000000)",
         integer("shard-tokens", o.shard_tokens, 1, INT32_MAX)},
        {"seed", "N", "which stories the default corpus has (default: 1)",
         integer("seed", o.seed, 0, INT64_MAX)},
        {"from-llmc", "FILE", "convert a model of llm.c to a Hugging Face folder",
         text(o.from_llmc)},
        {"help", "", "show this", [&o](const std::string&) { o.help = true; }},
    };
}

// The option of this name ('_' and '-' are the same); otherwise bad usage, naming the nearest.
inline const PrepareOption& find_option(const std::vector<PrepareOption>& table, std::string name) {
    std::replace(name.begin(), name.end(), '_', '-');
    for (const PrepareOption& option : table)
        if (option.name == name) return option;
    fail_usage(format("there is no option --%s; did you mean --%s? (--help lists all)",
                      shown(name).c_str(), nearest(table, name).name.c_str()));
}

// The options of a command line, checked together. Reads nothing but the arguments.
inline PrepareOptions parse_prepare_options(const std::vector<std::string>& arguments) {
    PrepareOptions o;
    const std::vector<PrepareOption> table = prepare_option_table(o);
    for (size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        if (!argument.starts_with("--"))
            fail_usage(
                format("expected an option such as --input, found %s", shown(argument).c_str()));
        size_t equals = argument.find('=');
        const PrepareOption& option =
            find_option(table, argument.substr(2, equals - 2 * (equals != argument.npos)));
        o.given.insert(option.name);
        // The value is after '=' or follows; for --input, all up to the next option follow.
        std::vector<std::string> values;
        if (equals != argument.npos)
            values.push_back(argument.substr(equals + 1));
        else if (option.argument.empty())
            values.push_back("");
        else
            while (i + 1 < arguments.size() && !arguments[i + 1].starts_with("--") &&
                   (values.empty() || option.name == "input"))
                values.push_back(arguments[++i]);
        if (values.empty() || (values[0].empty() && !option.argument.empty()))
            fail_usage(format("--%s needs a value: --%s %s", option.name.c_str(),
                              option.name.c_str(), option.argument.c_str()));
        for (const std::string& value : values) option.set(value);
    }
    return o;
}

inline std::string prepare_help() {
    PrepareOptions defaults;
    std::string text =
        "prepare_data: text -> a tokenizer and shards of tokens, for train_gpt\n\n"
        "  ./prepare_data                                          the default corpus\n"
        "  ./prepare_data --input book.txt --output data/book      your own text\n\n";
    for (const PrepareOption& option : prepare_option_table(defaults))
        text += format("  %-24s %s\n", ("--" + option.name + " " + option.argument).c_str(),
                       option.help.c_str());
    return text;
}

// Refuses options that do not go together. Adds the default folder.
inline void check_prepare_options(PrepareOptions& o) {
    if (o.tokenizer != "bpe" && o.tokenizer != "byte" && o.tokenizer != "gpt2")
        fail_usage(
            format("--tokenizer is bpe, byte or gpt2, found %s", shown(o.tokenizer).c_str()));
    if (o.tokenizer != "bpe" && o.has("vocab-size"))
        fail_usage(
            format("--vocab-size is for --tokenizer bpe; the size of a %s vocabulary is given",
                   o.tokenizer.c_str()));
    if (o.tokenizer != "gpt2" && o.has("vocab") && o.from_llmc.empty())
        fail_usage(
            format("--vocab is for --tokenizer gpt2, found --tokenizer %s", o.tokenizer.c_str()));
    if (!o.from_llmc.empty() && (!o.input.empty() || o.output.empty()))
        fail_usage(
            "--from-llmc needs --output DIR, and takes no --input: it converts a model, not text");
    if (!o.input.empty() && o.has("seed"))
        fail_usage("--seed is for the default corpus: with --input nothing is drawn at random");
    if (!o.input.empty() && o.output.empty())
        fail_usage(
            "--input needs --output DIR too: the folder to write, for example --output data/mine");
    if (o.output.empty()) o.output = "data/stories";
    while (o.output.size() > 1 && o.output.back() == '/') o.output.pop_back();
}

// =================================================================================================
// Documents
// =================================================================================================

// The texts that were read, and how they are divided. The views look into `texts`.
struct Documents {
    std::vector<std::string> texts;
    std::vector<std::string_view> train, val;
    int64_t empty = 0;  // documents without a byte, left out
};

inline void add_document(Documents& documents, std::string text) {
    if (text.empty())
        ++documents.empty;
    else
        documents.texts.push_back(std::move(text));
}

// Every line of a .jsonl file is a document: an object with a string "text". Blank lines are none.
inline void add_jsonl(Documents& documents, const std::string& path) {
    std::string file = read_file(path);
    if (file.starts_with("\xef\xbb\xbf")) file.erase(0, 3);  // a mark that Windows likes to set
    int64_t line_number = 0;
    for (size_t at = 0; at < file.size();) {
        size_t end = std::min(file.find('\n', at), file.size());
        std::string_view line = std::string_view(file).substr(at, end - at);
        at = end + 1;
        std::string where = format("%s, line %lld", path.c_str(), (long long)++line_number);
        if (line.find_first_not_of(" \t\r") == line.npos) continue;
        Json object = Json::parse(line, where);
        TINYGPT_CHECK(object.is_object(), "%s: expected an object with a \"text\", found %s",
                      where.c_str(), Json::name_of(object.kind));
        add_document(documents, object.get_string("text", where));
    }
}

// The files of an input, in the order of their paths. Hidden ones in a folder are passed over.
inline std::vector<std::string> files_of_input(const std::string& input) {
    namespace fs = std::filesystem;
    if (!folder_exists(input)) return {input};
    std::vector<std::string> files;
    std::error_code error;
    std::string last = input;  // what an error is about
    for (fs::recursive_directory_iterator at(input, error), end; !error && at != end;
         at.increment(error)) {
        last = at->path().string();
        if (at->path().filename().string().starts_with(".")) {
            if (at->is_directory(error)) at.disable_recursion_pending();
        } else if (at->is_regular_file(error)) {
            files.push_back(at->path().string());
        }
        if (error) break;
    }
    TINYGPT_CHECK(!error, "cannot read %s: %s", last.c_str(), error.message().c_str());
    std::sort(files.begin(), files.end());
    return files;
}

// Reads all inputs: a file is one document, a line of a .jsonl file is one. Fails if there is no
// text.
inline Documents read_documents(const std::vector<std::string>& inputs) {
    Documents documents;
    for (const std::string& input : inputs)
        for (const std::string& path : files_of_input(input)) {
            if (path.ends_with(".jsonl"))
                add_jsonl(documents, path);
            else
                add_document(documents, read_file(path));
        }
    if (documents.texts.empty()) {
        std::string names;
        for (const std::string& input : inputs) join(names, ", ", input);
        fail(format("there is no text in the input (%.200s): nothing to prepare", names.c_str()));
    }
    return documents;
}

// Where the character after the one at text[at] begins; a byte that belongs to none counts as one.
inline size_t next_character(std::string_view text, size_t at) {
    return at + (text[at] & 0x80 ? character_at(text, at).bytes : 1);
}
inline int64_t count_characters(std::string_view text) {
    int64_t count = 0;
    for (size_t at = 0; at < text.size(); at = next_character(text, at)) ++count;
    return count;
}

// Divides the documents: the last `val_fraction` is for validation, rounded up. One text is cut by
// characters, several by documents. (nanoGPT cuts Shakespeare at the same character.)
inline void split_documents(Documents& documents, double val_fraction) {
    const auto& texts = documents.texts;
    documents.train.clear(), documents.val.clear();
    bool single = texts.size() == 1;
    int64_t count = single ? count_characters(texts[0]) : int64_t(texts.size());
    // Careful: 1 - 0.1 and the like are not exact; without the last term 10 could become 9.
    int64_t kept = int64_t(std::floor(double(count) * (1 - val_fraction) + 1e-9));
    TINYGPT_CHECK(kept > 0,
                  "--val-fraction %g leaves nothing to train on: the input has only %lld %s",
                  val_fraction, (long long)count, single ? "characters" : "documents");
    if (single) {
        std::string_view text = texts[0];
        size_t cut = 0;
        for (int64_t i = 0; i < kept; ++i) cut = next_character(text, cut);
        documents.train = {text.substr(0, cut)};
        if (cut < text.size()) documents.val = {text.substr(cut)};
    } else {
        documents.train.assign(texts.begin(), texts.begin() + kept);
        documents.val.assign(texts.begin() + kept, texts.end());
    }
}

// =================================================================================================
// Work for all cores
// =================================================================================================

// A part of a document that can be tokenized by itself.
struct Part {
    std::string_view text;
    bool begins_document;
};
using Job = std::vector<Part>;

// The first place at or after text[at] where the text may be cut, so that its two parts have the
// same pieces as the whole (§12): between a character that is no space and a space, both ASCII.
inline size_t safe_cut(std::string_view text, size_t at) {
    for (at = std::max<size_t>(at, 1); at < text.size(); ++at) {
        const uint8_t before = uint8_t(text[at - 1]), after = uint8_t(text[at]);
        const bool ascii = before < 128 && after < 128;
        if (ascii && kAsciiClass[before] != kSpace && kAsciiClass[after] == kSpace) return at;
    }
    return text.size();
}

// Cuts the documents into jobs of about 256 KB each, at places that do not change the pieces.
inline std::vector<Job> make_jobs(const std::vector<std::string_view>& documents,
                                  size_t job_bytes = 1 << 18) {
    std::vector<Job> jobs;
    size_t filled = job_bytes;
    for (std::string_view text : documents)
        for (size_t at = 0; at < text.size();) {
            if (filled >= job_bytes) jobs.emplace_back(), filled = 0;
            size_t end = safe_cut(text, at + (job_bytes - filled));
            jobs.back().push_back({text.substr(at, end - at), at == 0});
            filled += end - at, at = end;
        }
    return jobs;
}

inline size_t thread_count() { return size_t(omp_get_max_threads()); }

// Calls work(job number, thread number) for every job, on all cores. An error in one is thrown
// here.
template <class Work>
inline void for_all_jobs(size_t jobs, const Work& work) {
    std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < jobs; ++i) {
        try {
            work(i, size_t(omp_get_thread_num()));
        } catch (...) {
#pragma omp critical
            error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

// =================================================================================================
// Learning a vocabulary: byte-pair encoding
// =================================================================================================
// Start with bytes. Find the pair of neighbouring tokens that occurs most often, make it a new
// token, replace it everywhere, and repeat. Pairs within a piece only (§12), so no token spans two
// words. For "aaabdaaabac": aa is the most frequent pair (4), XabdXabac; then ab (2; Xa is as
// frequent, but its tokens are later ones), XYdXYac; then XY (2), ZdZac.

// Every distinct piece of the documents and how often it occurs, in byte order.
inline std::vector<std::pair<std::string_view, int64_t>> count_pieces(
    const std::vector<std::string_view>& documents) {
    std::vector<Job> jobs = make_jobs(documents);
    std::vector<std::unordered_map<std::string_view, int64_t>> counts(thread_count());
    for_all_jobs(jobs.size(), [&](size_t job, size_t thread) {
        for (const Part& part : jobs[job])
            for (size_t at = 0; at < part.text.size();) {
                std::string_view piece = next_piece(part.text, at);
                ++counts[thread][piece];
                at += piece.size();
            }
    });
    for (size_t thread = 1; thread < counts.size(); ++thread)
        for (auto [piece, count] : counts[thread]) counts[0][piece] += count;
    std::vector<std::pair<std::string_view, int64_t>> sorted(counts[0].begin(), counts[0].end());
    std::sort(sorted.begin(), sorted.end());
    return sorted;
}

// Learns merges, one at a time. The distinct pieces lie one after the other in one long row of
// places, each a link in a list; every pair knows its count and the places where it occurs. A merge
// touches those places and their neighbours only: it costs what it changes, not a pass over the
// text.
class BpeTrainer {
public:
    explicit BpeTrainer(const std::vector<std::pair<std::string_view, int64_t>>& pieces) {
        for (auto [piece, count] : pieces) {
            TINYGPT_CHECK(places_.size() + piece.size() < kNone,
                          "the text has more than %u bytes of distinct "
                          "pieces: learn the vocabulary from a part of it",
                          kNone);
            for (size_t i = 0; i < piece.size(); ++i) {
                uint32_t at = uint32_t(places_.size());
                uint32_t previous = i == 0 ? kNone : at - 1,
                         next = i + 1 == piece.size() ? kNone : at + 1;
                places_.push_back({kBytes.id_of_byte[uint8_t(piece[i])], previous, next, count});
                if (i > 0) add(at - 1, +1);
            }
        }
        for (const auto& [key, pair] : pairs_) heap_.push({pair.count, key});
        fresh_.clear();
    }

    // Learns `wanted` merges, or fewer when no pair is left that occurs twice.
    std::vector<Tokenizer::Merge> train(size_t wanted) {
        std::vector<Tokenizer::Merge> merges;
        while (merges.size() < wanted && !heap_.empty()) {
            auto [count, key] = heap_.top();
            heap_.pop();
            // The heap may be out of date: counts fall while other pairs are merged.
            int64_t now = pairs_.find(key) == pairs_.end() ? 0 : pairs_[key].count;
            if (now < 2) continue;
            if (now < count) {
                heap_.push({now, key});
                continue;
            }
            merges.emplace_back(uint16_t(key >> 16), uint16_t(key & 0xffff));
            merge_everywhere(key, uint32_t(256 + merges.size() - 1));
        }
        return merges;
    }

private:
    static constexpr uint32_t kNone = UINT32_MAX;
    struct Place {
        uint32_t token, previous, next;
        int64_t weight;  // how often the piece occurs
    };
    struct Pair {
        int64_t count = 0;
        std::vector<uint32_t> places;  // of the left token; some may be out of date
    };
    // The most frequent first; among equals the smaller left token, then the smaller right one.
    struct Candidate {
        int64_t count;
        uint32_t key;
        bool operator<(const Candidate& other) const {
            return count != other.count ? count < other.count : key > other.key;
        }
    };

    // Counts the pair that begins at this place: sign +1 when it appears, -1 when it goes.
    void add(uint32_t at, int sign) {
        const Place& left = places_[at];
        uint32_t key = left.token << 16 | places_[left.next].token;
        Pair& pair = pairs_[key];
        pair.count += sign * left.weight;
        if (sign < 0) return;
        pair.places.push_back(at);
        fresh_.push_back(key);
    }

    // Replaces the pair by `token` wherever it occurs. The places of a pair of two equal tokens are
    // in order from left to right (they came in one walk), so aaa becomes (aa)a, as in encoding.
    void merge_everywhere(uint32_t key, uint32_t token) {
        std::vector<uint32_t> places = std::move(pairs_[key].places);
        for (uint32_t at : places) {
            Place& left = places_[at];
            if (left.token != key >> 16 || left.next == kNone ||
                places_[left.next].token != (key & 0xffff))
                continue;
            Place& right = places_[left.next];
            // Three pairs go: before, this one, after.
            if (left.previous != kNone) add(left.previous, -1);
            add(at, -1);
            if (right.next != kNone) add(left.next, -1);
            // The left place becomes the new token; the right one leaves the list.
            left.token = token, left.next = right.next, right.token = kNone;
            if (left.next != kNone) places_[left.next].previous = at;
            // Two pairs come.
            if (left.previous != kNone) add(left.previous, +1);
            if (left.next != kNone) add(at, +1);
        }
        pairs_.erase(key);
        std::sort(fresh_.begin(), fresh_.end());
        fresh_.erase(std::unique(fresh_.begin(), fresh_.end()), fresh_.end());
        for (uint32_t pair : fresh_) heap_.push({pairs_[pair].count, pair});
        fresh_.clear();
    }

    std::vector<Place> places_;
    std::unordered_map<uint32_t, Pair> pairs_;  // key: left token << 16 | right token
    std::priority_queue<Candidate> heap_;
    std::vector<uint32_t> fresh_;  // pairs that appeared during this merge
};

// A vocabulary of `size` tokens, or as many as the documents support.
inline Tokenizer train_bpe(const std::vector<std::string_view>& documents, int64_t size) {
    if (size < 257 || size > 65536)
        fail_usage(
            format("a vocabulary has 257 (256 bytes and end of text) to 65536 tokens, found %lld",
                   (long long)size));
    return Tokenizer(BpeTrainer(count_pieces(documents)).train(size_t(size - 257)));
}

// =================================================================================================
// Tokens and shards
// =================================================================================================

// The tokens of all documents, each after an end of text. The same for any number of threads.
inline std::vector<uint16_t> encode_documents(const Tokenizer& tokenizer,
                                              const std::vector<std::string_view>& documents) {
    std::vector<Job> jobs = make_jobs(documents);
    std::vector<std::vector<uint16_t>> done(jobs.size());
    std::vector<std::unique_ptr<Encoder>> encoders(thread_count());
    for_all_jobs(jobs.size(), [&](size_t job, size_t thread) {
        if (!encoders[thread]) encoders[thread] = std::make_unique<Encoder>(tokenizer);
        for (const Part& part : jobs[job]) {
            if (part.begins_document) done[job].push_back(uint16_t(tokenizer.end_of_text()));
            encoders[thread]->encode(part.text, done[job]);
        }
    });
    std::vector<uint16_t> tokens;
    size_t total = 0;
    for (const auto& part : done) total += part.size();
    tokens.reserve(total);
    for (auto& part : done) {
        tokens.insert(tokens.end(), part.begin(), part.end());
        std::vector<uint16_t>().swap(part);
    }
    return tokens;
}

// Writes count tokens as one shard (§2).
inline void write_shard(const std::string& path, const uint16_t* tokens, size_t count) {
    TINYGPT_CHECK(count <= INT32_MAX,
                  "%s: a shard holds at most %d tokens, not %zu; use a smaller --val-fraction",
                  path.c_str(), INT32_MAX, count);
    int32_t header[kShardHeaderBytes / 4] = {kShardMagic, 1, int32_t(count)};
    FileWriter file(path);
    file.write(header, sizeof header);
    file.write(tokens, count * sizeof *tokens);
    file.commit();
}

// =================================================================================================
// The data folder
// =================================================================================================

// Everything that goes into the folder.
struct Dataset {
    Tokenizer tokenizer;
    std::vector<uint16_t> train, val;
    Json description;
};

// A shard's file name as this program writes it?
inline bool is_shard_name(const std::string& name) {
    size_t begin = name.starts_with("train_") ? 6 : name.starts_with("val_") ? 4 : name.npos;
    return begin != name.npos && name.size() == begin + 10 && name.ends_with(".bin") &&
           std::all_of(name.begin() + ptrdiff_t(begin), name.end() - 4,
                       [](char c) { return c >= '0' && c <= '9'; });
}

constexpr const char* kIncoming = ".incoming";  // the new files wait here until all are written

// Refuses a folder that cannot be written, or that has shards which this program did not write.
// Called before the work begins: an hour of tokenizing should not end with a message about a
// folder.
inline void check_output_folder(const std::string& folder) {
    TINYGPT_CHECK(!file_exists(folder), "cannot write to %s: it is a file; --output names a folder",
                  folder.c_str());
    std::string parent = folder;
    while (!folder_exists(parent) && !file_exists(parent) && parent_folder(parent) != parent)
        parent = parent_folder(parent);
    TINYGPT_CHECK(folder_exists(parent) && ::access(parent.c_str(), W_OK | X_OK) == 0,
                  "cannot write to %s: %s is no folder that may be written; choose another "
                  "--output",
                  folder.c_str(), parent.c_str());
    if (!folder_exists(folder) || file_exists(folder + "/dataset.json") ||
        folder_exists(folder + "/" + kIncoming))
        return;
    for (const std::string& name : list_folder(folder))
        TINYGPT_CHECK(!is_shard_name(name),
                      "%s has shards (%s) but no dataset.json, so they are not prepare_data's "
                      "to replace; choose another --output",
                      folder.c_str(), name.c_str());
}

// Writes the dataset, whole or not at all: all files are first written in full to a folder beside
// their place; then shards of an earlier run are removed and the new files take their names, with
// dataset.json last. Whatever fails in the first half leaves the old data as it was.
inline void write_dataset(const std::string& folder, const Dataset& data, int64_t shard_tokens) {
    const std::string incoming = folder + "/" + kIncoming;
    const FolderToFill to_fill(folder);
    struct Cleaner {
        std::string incoming;
        ~Cleaner() {
            std::error_code ignored;
            std::filesystem::remove_all(incoming, ignored);
        }
    } cleaner{incoming};
    if (folder_exists(incoming)) remove_folder(incoming);
    make_folders(incoming);
    for (size_t at = 0, shard = 1; at < data.train.size(); at += size_t(shard_tokens), ++shard)
        write_shard(incoming + format("/train_%06zu.bin", shard), data.train.data() + at,
                    std::min(size_t(shard_tokens), data.train.size() - at));
    if (!data.val.empty())
        write_shard(incoming + "/val_000000.bin", data.val.data(), data.val.size());
    data.tokenizer.save(incoming);
    write_file(incoming + "/dataset.json", data.description.write(2) + "\n");
    // All is on the disk: change over.
    for (const std::string& name : list_folder(folder))
        if (is_shard_name(name) && !file_exists(incoming + "/" + name))
            remove_file(folder + "/" + name);
    for (const std::string& name : list_folder(incoming))
        if (name != "dataset.json") rename_path(incoming + "/" + name, folder + "/" + name);
    rename_path(incoming + "/dataset.json", folder + "/dataset.json");
}

// Adds to the description how large one split is.
inline void describe_split(Json& json, const std::string& split,
                           const std::vector<std::string_view>& documents, size_t tokens) {
    int64_t characters = 0, bytes = 0;
    for (std::string_view text : documents)
        characters += count_characters(text), bytes += int64_t(text.size());
    json.set(split + "_documents", int64_t(documents.size()));
    json.set(split + "_characters", characters);
    json.set(split + "_bytes", bytes);
    json.set(split + "_tokens", int64_t(tokens));
    std::printf("  %-5s %9lld document%s %12lld characters %12lld bytes %12lld tokens\n",
                split.c_str(), (long long)documents.size(), documents.size() == 1 ? " " : "s",
                (long long)characters, (long long)bytes, (long long)tokens);
}

// The tokenizer that was asked for; a learnt one learns from the training part only.
inline Tokenizer make_tokenizer(const PrepareOptions& o,
                                const std::vector<std::string_view>& train) {
    if (o.tokenizer == "byte") return Tokenizer::bytes();
    if (o.tokenizer == "gpt2") return Tokenizer::load(o.vocab);
    return train_bpe(train, o.vocab_size);
}

// Documents to a data folder. `source` says where they came from; a finished description may be
// added to by `add` before it is written.
inline void prepare(const PrepareOptions& o, const Documents& documents, const std::string& source,
                    const std::function<void(Json&)>& add = nullptr) {
    const double start = now_seconds();
    Dataset data{make_tokenizer(o, documents.train), {}, {}, Json::object()};
    const double learnt = now_seconds();
    data.train = encode_documents(data.tokenizer, documents.train);
    data.val = encode_documents(data.tokenizer, documents.val);
    const double encoded = now_seconds();
    std::printf("%s -> %s\n", source.c_str(), o.output.c_str());
    data.description.set("source", source)
        .set("tokenizer", o.tokenizer)
        .set("vocab_size", data.tokenizer.vocab_size());
    describe_split(data.description, "train", documents.train, data.train.size());
    describe_split(data.description, "val", documents.val, data.val.size());
    if (add) add(data.description);
    write_dataset(o.output, data, o.shard_tokens);
    double bytes = 0;
    for (const std::string& text : documents.texts) bytes += double(text.size());
    if (o.tokenizer == "bpe" && !o.input.empty() && data.tokenizer.vocab_size() < o.vocab_size)
        std::printf("  no pair is left that occurs twice: the vocabulary has %d tokens, not %lld\n",
                    data.tokenizer.vocab_size(), (long long)o.vocab_size);
    if (documents.empty)
        std::printf("  %lld empty documents were left out\n", (long long)documents.empty);
    std::printf("  %d tokens in the vocabulary (%s, %.1f s), %.2f bytes a token",
                data.tokenizer.vocab_size(), o.tokenizer.c_str(), learnt - start,
                bytes / double(data.train.size() + data.val.size()));
    if (bytes >= 1e6)  // less says nothing about speed
        std::printf(", tokenized at %.0f MB/s", bytes / 1e6 / (encoded - learnt));
    std::printf("\n");
}
// =================================================================================================
// The default corpus: short stories drawn from a grammar whose probabilities are known exactly
// =================================================================================================
//
// Every choice a story makes is a roll of dice written down here, and every choice can be read off
// the finished text. So the probability of a story is known: the product of that of its choices,
//
//     -log p(story) = sum over its choices of -log p(choice)            (in nats)
//
// and no model can do better, on average, than the sum of these over the stories it is scored on.
// Divided by their tokens, that is the floor under the loss curve. Two things make it exact: the
// grammar is unambiguous (one text, one list of choices), and every story closes with the same two
// words, found nowhere else, so the end-of-text token after them costs the true model nothing.
//
// How to read the grammar. A rule is a name and its alternatives, with `|` between them; all are
// equally likely. In an alternative, braces are replaced:
//     {Plot}              one of the alternatives of the rule Plot
//     {any colour}        a word drawn from the list `colour`
//     {new number}        a word drawn from the list `number`, and remembered as `number`
//     {hero=name}         a word drawn from the list `name`, and remembered as `hero`
//     {there=spot!spot}   the same, but any word except the one remembered as `spot`
//     {hero}              the word remembered as `hero`: no dice, so it costs nothing
//     {hero.his}          another form of it: the columns of a list have names, as in [he him his]
//     {hero.His}          the same with a capital letter
//     {any colour.a}      the word with its article: "a red", "an orange"
// Rules with a capital letter are made of whole sentences; the others are parts of a sentence.
//
// Remembered words are what makes the stories worth learning. They decide names, pronouns and verbs
// many words later, when a model that looks at the last four words has long forgotten them. What
// has to agree (he or she, it or they, was or were) has few values and is soon learned; it teaches
// where to look, and so makes the names, which have many, easier.

namespace stories {

inline constexpr const char* grammar_text = R"(
story: {Opening} {Plot} {Closing} The end.

Opening:
    Once there was {any trait.a} child called {hero=name}. {hero.He} lived {any place}. |
    Once upon a time, a child called {hero=name} lived {any place}.
        {hero.He} was very {any trait}. |
    Long ago, {any trait.a} child lived {any place}. The child was called {hero=name}. |
    There was once a child called {hero=name}, who was {any trait} and lived {any place}.

when: One {any weather} {any daytime}

Plot:
    {Lost} | {Gift} | {Sharing} | {Supper} | {Rescue} | {Hiding} | {Finding} | {Race} |
    {Picture} | {Song}

Lost:
    {when}, {hero.he} lost {hero.his} {any colour} {any toy}. {Helper}
        {hero} looked {new spot}, but {friend.it} found it {there=spot!spot}.
Helper:
    Soon {friend=animal} came to help {hero.him}. |
    "Do not cry," said {friend=animal}. |
    {hero.He} asked {friend=animal} to help.

Gift:
    {when}, {hero.he} went to see {friend=animal}.
        {hero} gave {friend.them} {any colour.a} {any toy}. {Thanks}
Thanks:
    "Thank you, {hero}," said the {friend.kind}. |
    The {friend.kind} {friend.was} so {any feeling} that {friend.it} danced {any way}. |
    {friend.It} thanked {hero.him} {any way}.

Sharing:
    {when}, {hero.he} had {new number} {any fruit}s.
        Then {hero.he} met {friend=animal}, and {friend.it} {friend.was} {any look}.
        {Kindness} Now {hero} had only {number.less} left.
Kindness:
    {hero} gave {friend.them} one to eat. |
    "Please take one," said {hero}. |
    The {friend.kind} asked {hero.him} for one.

Supper:
    {when}, {hero.he} made some {any food}. Soon {friend=animal} came to the door.
        {Asking} Then {friend.it} ate it all {any way}.
Asking:
    "Come in and sit down," said {hero}. |
    "That smells good," said the {friend.kind}. |
    {friend.It} {friend.was} very {any look}.

Rescue:
    {when}, {hero.he} heard {any tune.a} cry. It was {friend=animal}, stuck {any spot}!
        {hero} pulled {friend.them} out with {any tool.a}. {Praise}
Praise:
    "You are very {any trait}," said the {friend.kind}. |
    {friend.It} thanked {hero.him} {any way}. |
    "Thank you, {hero}," said the {friend.kind}.

Hiding:
    {when}, {hero.he} played hide and seek with {friend=animal}.
        {hero} counted to {any number}. {Seek}
Seek:
    The {friend.kind} hid {any spot} and {friend.was} very quiet. |
    Then {hero.he} found {friend.them} {any spot}. |
    {friend.It} hid {any spot}, but {hero.he} found {friend.them} {any way}.

Finding:
    {when}, {hero.he} found {any colour.a} {any toy} {any spot}.
        {hero} showed it to {friend=animal}. {Return}
Return:
    {friend.It} {friend.was} {any feeling} to play with it. |
    The {friend.kind} played with it {any way}. |
    "You may keep it," {hero} told {friend.them}.

Race:
    {when}, {hero.he} ran a race with {friend=animal}.
        {friend.It} {friend.was} fast and ran {any way}. {Win}
Win:
    But {hero} was first, so {friend.it} gave {hero.him} some {any food}. |
    The {friend.kind} {friend.was} first, so {hero} gave {friend.them} some {any food}. |
    In the end, it was a tie, so they shared some {any food}.

Picture:
    {when}, {hero.he} painted {any colour.a} {any toy}.
        Soon {friend=animal} came to look. {Paint}
Paint:
    "That is very good," said the {friend.kind}. |
    The {friend.kind} asked {hero} to paint {friend.them} too. |
    Then {friend.it} fell into the paint and {friend.was} {any colour} all over!

Song:
    {when}, {hero.he} sang {any tune.a} song {any spot}.
        Soon {friend=animal} came to listen. {Music}
Music:
    The {friend.kind} danced to it {any way}. |
    "Please sing it again," said the {friend.kind}. |
    {friend.It} {friend.was} so {any feeling} that {hero} sang it again.

Closing:
    {hero} and the {friend.kind} felt {any feeling} and danced {any way}. |
    {hero} told {hero.his} {any family} about the {friend.kind} and went to bed. |
    After that, {hero.he} met the {friend.kind} {any place} every {any daytime}. |
    The {friend.kind} went home, and {hero} had {any food} with {hero.his} {any family}. |
    That night, {hero.he} dreamed of {any colour.a} {any toy} and {any tune.a} song.

name [he him his]:
    Mia/she/her/her | Anna/she/her/her | Lily/she/her/her | Nora/she/her/her |
    Tom/he/him/his | Ben/he/him/his | Max/he/him/his | Leo/he/him/his
animal [kind it them was]:
    a fox/fox/it/it/was | a bear/bear/it/it/was | a duck/duck/it/it/was | an owl/owl/it/it/was |
    some mice/mice/they/them/were | two rabbits/rabbits/they/them/were |
    three kittens/kittens/they/them/were | four frogs/frogs/they/them/were
trait: brave | kind | clever | shy | happy | sleepy | curious | gentle | funny | eager | wise |
    elegant
look: small | big | young | old | fat | thin | grey | fluffy | muddy | hungry | tired | wet
feeling: glad | proud | merry | pleased | excited | cheerful | lucky | jolly
place:
    in the park | in the forest | in the garden | on the farm | at the beach | by the river |
    on the hill | by the lake | at the market | in the meadow | in the village | in the castle
spot:
    under the bridge | behind the tree | inside the log | beside the gate |
    near the well | behind the wall | under the bench | between the rocks |
    inside the barn | behind the bush | beside the tent | near the fence
way: all day long | again and again | with a smile | until supper | right away | like the wind |
    three times | at once | in the sunshine | through the puddles
tune: loud | soft | sad | silly | strange | quiet | old | odd
weather: sunny | rainy | windy | snowy | foggy | cloudy | warm | cold
daytime: morning | afternoon | evening | day
colour: red | blue | green | yellow | orange | white | black | pink | purple | brown
toy: ball | kite | drum | boat | book | bell | hat | bike | wagon | lantern | umbrella | whistle |
    flag | accordion | map | puzzle
tool: rope | ladder | stick | net | umbrella | oar | hook | scarf
number [less]: three/two | four/three | five/four | six/five
fruit: apple | pear | plum | nut | carrot | egg | bun | biscuit
food: honey | bread | soup | cheese | porridge | jam | cake | rice | pie | toast
family: mother | father | sister | brother | grandma | grandpa | aunt | uncle
)";

// -------------------------------------------------------------------------------------------------
// The grammar as data
// -------------------------------------------------------------------------------------------------

// A piece of an alternative: letters to be written, a rule to be expanded, a word to be drawn and
// remembered, or a remembered word.
struct Item {
    enum Kind { letters, rule, draw, recall } kind;
    std::string text;      // letters
    int index = 0;         // rule: which rule; draw, recall: which slot
    int form = 0;          // draw, recall: which form of the word
    bool capital = false;  // draw, recall: with a capital letter
};
using Items = std::vector<Item>;

// A rule is a list of words, each in several forms, or has alternatives made of items.
struct Rule {
    std::string name;
    std::vector<std::string> form_names;          // "", "a", then the columns named in brackets
    std::vector<std::vector<std::string>> words;  // of a list: [word][form]
    std::vector<Items> alternatives;              // of any other rule
};

// A place in memory: a word of one list, never the word in the slot `unlike` (-1: any word).
struct Slot {
    std::string name;
    int rule, unlike;
};

struct Grammar {
    std::vector<Rule> rules;  // rules[0] is the story
    std::vector<Slot> slots;
    std::vector<Items> sentences;  // every sentence of every rule, for the recogniser
};

// For every slot the number of the word it holds, or -1.
using Memory = std::array<int8_t, 32>;

// The pieces of `text` between separators, runs of blanks made one, no blanks around a piece.
inline std::vector<std::string> split(std::string_view text, char separator) {
    std::vector<std::string> pieces(1);
    for (char c : text) {
        bool blank = c == ' ' || c == '\n';
        if (c == separator)
            pieces.emplace_back();
        else if (!blank)
            pieces.back() += c;
        else if (!pieces.back().empty() && pieces.back().back() != ' ')
            pieces.back() += ' ';
    }
    for (std::string& piece : pieces) {
        if (!piece.empty() && piece.back() == ' ') piece.pop_back();
    }
    return pieces;
}

// The index of the thing called `name`, or -1.
template <class Named>
int find(const std::vector<Named>& things, const std::string& name) {
    for (size_t i = 0; i < things.size(); i++) {
        if (things[i].name == name) return int(i);
    }
    return -1;
}

inline std::string with_article(const std::string& word) {
    bool vowel = std::string_view("aeiou").find(word[0]) != std::string_view::npos;
    return (vowel ? "an " : "a ") + word;
}

// Cuts `text` off before `mark`; returns what came after it, or nothing if there is none.
inline std::string cut(std::string& text, char mark) {
    size_t at = std::min(text.find(mark), text.size());
    std::string after = text.substr(std::min(at + 1, text.size()));
    text.resize(at);
    return after;
}

// What stands between braces: a rule, or a slot and the form of its word. Adds new slots.
inline Item parse_braces(Grammar& grammar, std::string tag) {
    Item item{Item::rule, "", find(grammar.rules, tag)};
    if (item.index >= 0 && grammar.rules[item.index].words.empty()) return item;

    // The parts are slot = list . form ! unlike. Nobody recalls the slot "any colour".
    std::string unlike = cut(tag, '!'), form = cut(tag, '.'), list = cut(tag, '=');
    if (tag.starts_with("new ")) list = tag = tag.substr(4);
    if (tag.starts_with("any ")) list = tag.substr(4);
    item.kind = list.empty() ? Item::recall : Item::draw;
    if (item.kind == Item::draw && find(grammar.slots, tag) < 0) {
        grammar.slots.push_back({tag, find(grammar.rules, list), find(grammar.slots, unlike)});
    }
    item.index = find(grammar.slots, tag);
    TINYGPT_CHECK(item.index >= 0 && grammar.slots[item.index].rule >= 0,
                  "story grammar: '%s' is no rule, no list and never drawn", tag.c_str());

    item.capital = std::isupper(uint8_t(form[0]));
    if (item.capital) form[0] = char(std::tolower(form[0]));
    const auto& forms = grammar.rules[grammar.slots[item.index].rule].form_names;
    item.form = int(std::find(forms.begin(), forms.end(), form) - forms.begin());
    TINYGPT_CHECK(item.form < int(forms.size()), "story grammar: '%s' has no form '%s'",
                  tag.c_str(), form.c_str());
    return item;
}

// Letters and braces in turn.
inline Items parse_items(Grammar& grammar, std::string_view text) {
    Items items;
    while (!text.empty()) {
        size_t open = std::min(text.find('{'), text.size());
        if (open > 0) items.push_back({Item::letters, std::string(text.substr(0, open))});
        text.remove_prefix(open);
        if (text.empty()) break;
        size_t close = text.find('}');
        items.push_back(parse_braces(grammar, std::string(text.substr(1, close - 1))));
        text.remove_prefix(close + 1);
    }
    return items;
}

// Adds the sentences that are written out in an alternative: what ends in . ! or ?, less the rules
// before it ({Opening} and so on) that are sentences of their own.
inline void add_sentences(Grammar& grammar, std::string_view text) {
    while (!text.empty()) {
        if (text[0] == '{' && std::isupper(uint8_t(text[1]))) {
            text.remove_prefix(std::min(text.find('}') + 2, text.size()));
            continue;
        }
        size_t end = 0;
        while (end < text.size() && !(std::string_view(".!?").find(text[end]) < 3 &&
                                      (end + 1 == text.size() || text[end + 1] == ' ')))
            end++;
        grammar.sentences.push_back(parse_items(grammar, text.substr(0, end + 1)));
        text.remove_prefix(std::min(end + 2, text.size()));
    }
}

// Adds a slot for every word that is drawn somewhere in the text.
inline void declare_slots(Grammar& grammar, std::string_view text) {
    while (text.find('{') != std::string_view::npos) {
        text.remove_prefix(text.find('{') + 1);
        std::string tag(text.substr(0, text.find('}')));
        bool draws = tag.find('=') < tag.size() || tag.find(' ') < tag.size();
        if (draws) parse_braces(grammar, tag);
    }
}

// A list: every word with its forms.
inline void parse_words(Rule& rule, const std::string& body) {
    for (const std::string& word : split(body, '|')) {
        std::vector<std::string> forms = split(word, '/');
        forms.insert(forms.begin() + 1, with_article(forms[0]));
        rule.words.push_back(forms);
        TINYGPT_CHECK(forms.size() == rule.form_names.size(),
                      "story grammar: '%s' has %zu forms, list '%s' has %zu", word.c_str(),
                      forms.size(), rule.name.c_str(), rule.form_names.size());
    }
}

// Adds each rule's name and columns to the grammar; returns the texts of their alternatives.
inline std::vector<std::string> parse_headers(Grammar& grammar, std::string_view text) {
    std::vector<std::string> bodies;
    while (!text.empty()) {
        std::string line(text.substr(0, text.find('\n')));
        text.remove_prefix(std::min(line.size() + 1, text.size()));
        if (!line.empty() && line[0] != ' ') {
            std::string body = cut(line, ':'), columns = cut(line, '[');
            cut(columns, ']');
            grammar.rules.push_back({split(line, ' ')[0], {"", "a"}, {}, {}});
            bodies.emplace_back();
            for (const std::string& column : split(columns, ' ')) {
                grammar.rules.back().form_names.push_back(column);
            }
            if (columns.empty()) grammar.rules.back().form_names.pop_back();
            line = body;
        }
        if (!bodies.empty()) bodies.back() += line + "\n";
    }
    return bodies;
}

// Reads the text above: names first, then the lists of words, then the rules that refer to them.
inline Grammar parse_grammar(std::string_view text) {
    Grammar grammar;
    std::vector<std::string> bodies = parse_headers(grammar, text);
    for (size_t i = 0; i < bodies.size(); i++) {
        bool is_list = bodies[i].find('{') == std::string::npos;
        if (is_list) parse_words(grammar.rules[i], bodies[i]);
    }
    for (const std::string& body : bodies) declare_slots(grammar, body);
    for (size_t i = 0; i < bodies.size(); i++) {
        Rule& rule = grammar.rules[i];
        if (!rule.words.empty()) continue;
        for (const std::string& alternative : split(bodies[i], '|')) {
            rule.alternatives.push_back(parse_items(grammar, alternative));
            bool whole_sentences = std::isupper(uint8_t(rule.name[0]));
            if (whole_sentences) add_sentences(grammar, alternative);
        }
    }
    grammar.sentences.push_back(parse_items(grammar, "The end."));
    TINYGPT_CHECK(grammar.slots.size() <= Memory().size(), "story grammar: %zu slots, at most %zu",
                  grammar.slots.size(), Memory().size());
    return grammar;
}

inline const Grammar& the_grammar() {
    static const Grammar grammar = parse_grammar(grammar_text);
    return grammar;
}

inline Memory empty_memory() {
    Memory memory;
    memory.fill(-1);
    return memory;
}

// The letters of a remembered word.
inline std::string spell(const Grammar& grammar, const Item& item, int word) {
    std::string text = grammar.rules[grammar.slots[item.index].rule].words[word][item.form];
    if (item.capital) text[0] = char(std::toupper(text[0]));
    return text;
}

// -------------------------------------------------------------------------------------------------
// Telling a story, and adding up what its choices cost
// -------------------------------------------------------------------------------------------------

struct Teller {
    const Grammar& grammar;
    uint64_t key;  // the story's own random stream
    uint64_t rolls = 0;
    Memory memory = empty_memory();
    std::string text = {};
    double neg_log_prob = 0;

    // One of n, each with probability 1/n.
    int roll(int n) {
        neg_log_prob += std::log(double(n));
        return int(random_uniform(key, rolls++) * n);
    }

    // A word for the slot, any but the one in the slot it must differ from.
    int draw(const Slot& slot) {
        int n = int(grammar.rules[slot.rule].words.size());
        if (slot.unlike < 0) return roll(n);
        int word = roll(n - 1);
        return word + (word >= memory[slot.unlike]);
    }

    void tell(const Items& items) {
        for (const Item& item : items) {
            if (item.kind == Item::letters) {
                text += item.text;
            } else if (item.kind == Item::rule) {
                const Rule& rule = grammar.rules[item.index];
                tell(rule.alternatives[roll(int(rule.alternatives.size()))]);
            } else {
                int8_t& word = memory[item.index];
                if (item.kind == Item::draw) word = int8_t(draw(grammar.slots[item.index]));
                text += spell(grammar, item, word);
            }
        }
    }
};

// The entropy of what a rule writes, in nats: the mean of -log p, by the chain rule.
//
//     H(rule) = log n + 1/n sum over its n alternatives of [ sum of H(rule inside)
//               + sum of log(words to draw from) ]
//
// Why this is exact although words are remembered: memory decides which letters are written, never
// how many words there are to choose from. A barred word takes one of n away whichever it is, and a
// recall costs nothing.
inline double entropy(const Grammar& grammar, const Rule& rule) {
    double n = double(rule.alternatives.size()), sum = 0;
    for (const Items& items : rule.alternatives) {
        for (const Item& item : items) {
            if (item.kind == Item::rule) sum += entropy(grammar, grammar.rules[item.index]);
            if (item.kind != Item::draw) continue;
            const Slot& slot = grammar.slots[item.index];
            sum += std::log(double(grammar.rules[slot.rule].words.size()) - (slot.unlike >= 0));
        }
    }
    return std::log(n) + sum / n;
}

// -------------------------------------------------------------------------------------------------
// Reading a story back
// -------------------------------------------------------------------------------------------------

// What is still to be read: the rest of some items, and then the rest of those around them.
struct Todo {
    const Items& items;
    size_t next;
    const Todo* around;
};

// Finds every way in which the grammar can write a text, by trying each alternative in turn and
// giving it up at the first letter that differs.
struct Reader {
    const Grammar& grammar;
    std::vector<double> neg_log_probs = {};  // of every way found

    // May the slot hold this word? A slot that is still empty may: a sentence read alone recalls
    // words that were drawn before it.
    bool may_hold(const Memory& memory, int slot, int word) const {
        if (memory[slot] >= 0) return memory[slot] == word;
        for (size_t other = 0; other < grammar.slots.size(); other++) {
            bool differ =
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
        Todo after{todo.items, todo.next + 1, todo.around};
        if (item.kind == Item::letters) {
            if (!text.starts_with(item.text)) return;
            read(after, text.substr(item.text.size()), memory, cost);
        } else if (item.kind == Item::rule) {
            const Rule& rule = grammar.rules[item.index];
            for (const Items& items : rule.alternatives) {
                read({items, 0, &after}, text, memory, cost + std::log(rule.alternatives.size()));
            }
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
            std::string spelt = spell(grammar, item, word);
            if (!text.starts_with(spelt) || !may_hold(before, item.index, word)) continue;
            memory[item.index] = int8_t(word);
            read(after, text.substr(spelt.size()), memory, cost);
        }
    }
};

// What each way of deriving the story costs, in nats: one number, as the grammar is unambiguous.
inline std::vector<double> derivations(std::string_view story) {
    Reader reader{the_grammar()};
    for (const Items& items : the_grammar().rules[0].alternatives) {
        reader.read({items, 0, nullptr}, story, empty_memory(), 0.0);
    }
    return reader.neg_log_probs;
}

}  // namespace stories

// -log p(story) in nats, exactly: the loss of the true model, summed over the story's tokens and
// its end-of-text token, whatever the tokenizer. Infinity if the grammar cannot tell this story.
inline double story_neg_log_prob(std::string_view story) {
    std::vector<double> found = stories::derivations(story);
    return found.empty() ? std::numeric_limits<double>::infinity() : found[0];
}

// Does this sentence occur in some story of the grammar? What is recalled in it must agree within
// it: pronouns with names, a number with the number less one.
inline bool is_story_sentence(std::string_view sentence) {
    const stories::Grammar& grammar = stories::the_grammar();
    stories::Reader reader{grammar};
    for (const stories::Items& items : grammar.sentences) {
        reader.read({items, 0, nullptr}, sentence, stories::empty_memory(), 0.0);
        if (!reader.neg_log_probs.empty()) return true;
    }
    return false;
}

// The sentences of a text, blanks around them dropped. A sentence ends in . ! or ? and, in these
// stories, such a mark ends nothing else.
inline std::vector<std::string> story_sentences(std::string_view text) {
    std::vector<std::string> sentences(1);
    for (char c : text) {
        bool blank = std::isspace(uint8_t(c)) != 0;
        if (!blank || !sentences.back().empty()) sentences.back() += blank ? ' ' : c;
        if (c == '.' || c == '!' || c == '?') sentences.emplace_back();
    }
    if (sentences.back().empty()) sentences.pop_back();
    return sentences;
}

struct StoryCorpus {
    std::vector<std::string> train, val;
    double val_neg_log_prob = 0;   // nats, all validation stories together
    double entropy_per_story = 0;  // nats: what -log p(story) is on average, in closed form
};

// Training and validation stories, each from a random stream of its own: story i stays the same
// when more are asked for, and no number is used twice.
inline StoryCorpus make_stories(uint64_t seed, int train_stories, int val_stories) {
    const stories::Grammar& grammar = stories::the_grammar();
    StoryCorpus corpus;
    auto tell = [&](uint64_t part, int number) {
        stories::Teller teller{grammar, random_key(seed, part, uint64_t(number))};
        teller.tell(grammar.rules[0].alternatives[0]);
        return teller;
    };
    for (int i = 0; i < train_stories; i++) corpus.train.push_back(tell(0, i).text);
    for (int i = 0; i < val_stories; i++) {
        stories::Teller teller = tell(1, i);
        corpus.val.push_back(teller.text);
        corpus.val_neg_log_prob += teller.neg_log_prob;
    }
    corpus.entropy_per_story = stories::entropy(grammar, grammar.rules[0]);
    return corpus;
}

constexpr int kStories = 22'000;  // of which a tenth is for validation

// Draws the stories and writes them as a dataset whose floor is known.
inline void prepare_stories(const PrepareOptions& o) {
    int val = int(std::ceil(kStories * o.val_fraction - 1e-9));
    TINYGPT_CHECK(val < kStories, "--val-fraction %g leaves no story to train on", o.val_fraction);
    StoryCorpus stories = make_stories(uint64_t(o.seed), kStories - val, val);
    Documents documents;
    documents.texts = std::move(stories.train);
    documents.texts.insert(documents.texts.end(), stories.val.begin(), stories.val.end());
    documents.train.assign(documents.texts.begin(), documents.texts.end() - val);
    documents.val.assign(documents.texts.end() - val, documents.texts.end());
    // The floor is the loss of the true model: what the validation stories cost it, divided by the
    // tokens that are predicted (all but the first). The entropy is what a story costs on average.
    prepare(o, documents, format("stories, seed %lld", (long long)o.seed), [&](Json& json) {
        if (val == 0) return;
        double tokens = double(json.find("val_tokens")->integer);
        json.set("floor", stories.val_neg_log_prob / (tokens - 1));
        json.set("entropy", stories.entropy_per_story / (tokens / val));
        std::printf(
            "  the floor: no model can score below %.4f nats a token on the validation stories\n",
            json.find("floor")->number);
    });
}

// =================================================================================================
// Models of llm.c
// =================================================================================================
// A .bin file of llm.c has 256 x int32: 20240326, version (3: float, 5: bf16), positions,
// vocabulary, layers, heads, channels, vocabulary with padding, zeros. Then every tensor for all
// layers together, in the order below; linear weights are [out, in], so they are transposed on the
// way.

struct LlmcModel {
    Config config;
    std::string bytes, dtype;  // the whole file; "F32" or "BF16"
    int64_t padded_vocab = 0;
};

// Reads the file and checks its header and its length.
inline LlmcModel read_llmc(const std::string& path) {
    LlmcModel model;
    model.bytes = read_file(path);
    int32_t header[256] = {};
    std::memcpy(header, model.bytes.data(), std::min(model.bytes.size(), sizeof header));
    TINYGPT_CHECK(header[0] == 20240326 && (header[1] == 3 || header[1] == 5),
                  "%s is no model of llm.c: expected it to begin with 20240326 and version 3 or 5, "
                  "found %d and %d",
                  path.c_str(), header[0], header[1]);
    auto [P, V, L, NH, C, padded] =
        std::array{header[2], header[3], header[4], header[5], header[6], header[7]};
    bool sane = P > 0 && P <= 1 << 20 && V > 0 && V <= padded && padded <= 1 << 20 && L > 0 &&
                L <= 1000 && NH > 0 && C > 0 && C <= 65536 && C % NH == 0;
    TINYGPT_CHECK(sane,
                  "%s: impossible sizes: positions %d, vocabulary %d (padded to %d), layers %d, "
                  "heads %d, "
                  "channels %d",
                  path.c_str(), P, V, padded, L, NH, C);
    model.config = {L, NH, C, P, V};
    model.dtype = header[1] == 3 ? "F32" : "BF16";
    model.padded_vocab = padded;
    size_t count = layout_of(model.config).count + size_t(padded - V) * size_t(C);
    size_t expected = sizeof header + count * dtype_bytes(model.dtype);
    TINYGPT_CHECK(model.bytes.size() == expected,
                  "%s is damaged: its header promises %zu bytes, it has %zu", path.c_str(),
                  expected, model.bytes.size());
    return model;
}

// One tensor of the file, which begins at `from`; as [in, out] if it is stored as [out, in].
inline StoredTensor llmc_tensor(const TensorInfo& info, const char* from, const std::string& dtype,
                                bool transposed) {
    size_t rows = size_t(info.shape[0]), columns = info.count / rows;
    auto element = [=](auto value, size_t i) {
        std::memcpy(&value, from + i * sizeof value, sizeof value);
        return float(value);
    };
    auto fill = [=](float* out, size_t first, size_t n) {
        for (size_t i = first; i < first + n; ++i) {
            size_t at = transposed ? (i % columns) * rows + i / columns : i;
            *out++ = dtype == "F32" ? element(float(), at) : element(bf16(), at);
        }
    };
    return {name_in_checkpoint(info.name), dtype, info.shape, fill};
}

// Every tensor of the file, under Hugging Face's names.
inline std::vector<StoredTensor> llmc_tensors(const LlmcModel& model) {
    std::map<std::string, TensorInfo> named;
    for (const TensorInfo& info : layout_of(model.config).tensors) named[info.name] = info;
    std::vector<StoredTensor> tensors;
    const char* at = model.bytes.data() + 1024;
    auto take = [&](const std::string& name, bool transposed = false) {
        tensors.push_back(llmc_tensor(named.at(name), at, model.dtype, transposed));
        at += named.at(name).count * dtype_bytes(model.dtype);
    };
    take("wte.weight");
    at += size_t(model.padded_vocab - model.config.vocab_size) * size_t(model.config.n_embd) *
          dtype_bytes(model.dtype);
    take("wpe.weight");
    for (const char* name :
         {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
          "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight",
          "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"})
        for (int l = 0; l < model.config.n_layer; ++l) {
            std::string full = format("h.%d.%s", l, name);
            take(full, named.at(full).shape.size() == 2);
        }
    take("ln_f.weight");
    take("ln_f.bias");
    return tensors;
}

// Converts a model of llm.c to a Hugging Face folder, with GPT-2's tokenizer if it is at hand and
// fits.
inline void convert_llmc(const PrepareOptions& o) {
    LlmcModel model = read_llmc(o.from_llmc);
    std::optional<Tokenizer> tokenizer =
        o.has("vocab") ? Tokenizer::load(o.vocab) : tokenizer_of(o.vocab);
    if (tokenizer && tokenizer->vocab_size() != model.config.vocab_size) {
        TINYGPT_CHECK(!o.has("vocab"), "%s has %d tokens, but the model %d", o.vocab.c_str(),
                      tokenizer->vocab_size(), model.config.vocab_size);
        tokenizer.reset();
    }
    const FolderToFill to_fill(o.output);
    write_safetensors(o.output + "/model.safetensors", llmc_tensors(model));
    write_model_description(o.output, model.config, tokenizer ? &*tokenizer : nullptr,
                            model.dtype == "F32" ? "float32" : "bfloat16");
    std::printf("%s -> %s: %zu parameters, %s, %s\n", o.from_llmc.c_str(), o.output.c_str(),
                layout_of(model.config).count, model.dtype.c_str(),
                tokenizer ? "with its tokenizer" : "without a tokenizer (--vocab DIR adds one)");
    std::printf("next: ./train_gpt sample --init-from %s\n", shell_word(o.output).c_str());
}

// =================================================================================================
// The program
// =================================================================================================

inline void run_prepare_data(const std::vector<std::string>& arguments) {
    PrepareOptions o = parse_prepare_options(arguments);
    if (o.help) {
        std::fputs(prepare_help().c_str(), stdout);
        return;
    }
    check_prepare_options(o);
    check_output_folder(o.output);
    if (!o.from_llmc.empty()) return convert_llmc(o);
    if (o.input.empty()) {
        prepare_stories(o);
    } else {
        std::string source;
        for (const std::string& input : o.input) join(source, ", ", input);
        Documents documents = read_documents(o.input);
        split_documents(documents, o.val_fraction);
        prepare(o, documents, source);
    }
    std::printf("next: ./train_gpt%s\n",
                o.output == "data/stories" ? "" : (" --data " + shell_word(o.output)).c_str());
}

}  // namespace tinygpt

// test_gpt.cpp includes this file for its functions and has a main of its own.
#ifndef PREPARE_DATA_NO_MAIN
int main(int argc, char** argv) {
    ::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is then an error message
    try {
        tinygpt::run_prepare_data({argv + 1, argv + argc});
        return 0;
    } catch (const tinygpt::Error& error) {
        std::fprintf(stderr, "prepare_data: %s\n", error.what());
        return error.status;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "prepare_data: out of memory; give it less text at a time\n");
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "prepare_data: %s\n", error.what());
        return 1;
    }
}
#endif
