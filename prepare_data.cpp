// prepare_data - turns text into what train_gpt reads: a tokenizer and shards of tokens
//
//   ./prepare_data                                           the default corpus: data/stories
//   ./prepare_data --input book.txt --vocab-size 4096 --output data/book
//   ./prepare_data --input a.txt b.jsonl folder --tokenizer gpt2 --output data/mine
//
// It reads documents, cuts off the last part for validation, learns or loads a tokenizer, turns the
// documents into tokens on all cores, and writes a folder with
//   train_000001.bin ...  val_000000.bin   the tokens (the format is in §2 of tinygpt.hpp)
//   vocab.json  merges.txt  tokenizer.json the tokenizer (§12)
//   dataset.json                           source, counts, and the floor where it is known
// The order is: options, documents, learning a vocabulary, tokens, the folder, the default corpus,
// models of llm.c.

#include "tinygpt.hpp"

#include <filesystem>

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

// All options, in the order of --help. There is one command only: bit 1.
inline std::vector<Option> option_table(PrepareOptions& o) {
    const char* group = "options";
    return {
        {"input", &o.input, group, 1, "FILE...",
         "texts, .jsonl files (field \"text\") and folders to read; may be repeated"},
        {"output", &o.output, group, 1, "DIR",
         "the folder to write; for the default corpus data/stories"},
        {"tokenizer", &o.tokenizer, group, 1, "bpe|byte|gpt2",
         "bpe learns a vocabulary from the text, byte makes every byte a token, gpt2 takes the "
         "vocabulary in --vocab"},
        {"vocab", &o.vocab, group, 1, "DIR", "folder of a vocabulary, for --tokenizer gpt2"},
        {"vocab-size", &o.vocab_size, group, 1, "[257, 65536]",
         "number of tokens in the vocabulary that --tokenizer bpe learns"},
        {"val-fraction", &o.val_fraction, group, 1, "[0, 0.999]",
         "share of the text, at its end, that is kept for validation; 0: none"},
        {"shard-tokens", &o.shard_tokens, group, 1, "[1, 2147483647]",
         "number of tokens in a shard; the last may have fewer"},
        {"seed", &o.seed, group, 1, "[0, 9223372036854775807]",
         "random seed that chooses the stories of the default corpus"},
        {"from-llmc", &o.from_llmc, group, 1, "FILE",
         "convert this model of llm.c to a Hugging Face folder, instead of preparing text"},
        {"help", &o.help, group, 1, "0|1", "print this text"},
    };
}

inline std::string prepare_help() {
    PrepareOptions defaults;
    return "prepare_data: text -> a tokenizer and shards of tokens, for train_gpt\n\n"
           "  ./prepare_data                                          the default corpus\n"
           "  ./prepare_data --input book.txt --output data/book      your own text\n" +
           options_help(option_table(defaults), 1);
}

// Reads nothing but the arguments. Fails where options do not go together; sets the default folder.
inline PrepareOptions parse_prepare_options(const std::vector<std::string>& arguments) {
    PrepareOptions o;
    o.given = CommandLine{option_table(o), {{1, "prepare_data", ""}}, 1}.read(arguments);
    if (o.help) return o;
    if (o.tokenizer != "bpe" && o.has("vocab-size"))
        fail_usage("--vocab-size is for --tokenizer bpe; the size of a ", o.tokenizer,
                   " vocabulary is given");
    if (o.tokenizer != "gpt2" && o.has("vocab") && o.from_llmc.empty())
        fail_usage("--vocab is for --tokenizer gpt2, found --tokenizer ", o.tokenizer);
    if (!o.from_llmc.empty() && (!o.input.empty() || o.output.empty()))
        fail_usage(
            "--from-llmc needs --output DIR, and takes no --input: it converts a model, not ",
            "text");
    if (!o.input.empty() && o.has("seed"))
        fail_usage("--seed is for the default corpus: with --input nothing is drawn at random");
    if (!o.input.empty() && o.output.empty())
        fail_usage("--input needs --output DIR too: the folder to write, for example ",
                   "--output data/mine");
    if (o.output.empty()) o.output = "data/stories";
    while (o.output.size() > 1 && o.output.back() == '/') o.output.pop_back();
    return o;
}

// =================================================================================================
// Documents
// =================================================================================================

// The texts that were read, and how they are divided. The views look into `texts`.
struct Documents {
    std::vector<std::string> texts;
    std::vector<std::string_view> train, val;
    int64_t empty = 0;  // documents without a byte, left out

    void add(std::string text) {
        if (text.empty())
            ++empty;
        else
            texts.push_back(std::move(text));
    }
};

// Every line of a .jsonl file is a document: an object with a string "text". Blank lines are none.
inline void add_jsonl(Documents& documents, const std::string& path) {
    std::string file = read_file(path);
    if (file.starts_with("\xef\xbb\xbf")) file.erase(0, 3);  // the byte order mark of Windows
    int64_t line_number = 0;
    for (size_t at = 0, end; at < file.size(); at = end + 1) {
        end = std::min(file.find('\n', at), file.size());
        const std::string_view line = std::string_view(file).substr(at, end - at);
        const std::string where = to_text(path, ", line ", ++line_number);
        if (line.find_first_not_of(" \t\r") == line.npos) continue;
        const Json object = Json::parse(line, where);
        if (object.kind != Json::Kind::object)
            fail(where, ": expected an object with a \"text\", found ", shown(line));
        documents.add(object.get_string("text", where));
    }
}

// The files of an input, sorted by path. In a folder, hidden files and folders are left out.
inline std::vector<std::string> files_of_input(const std::string& input) {
    namespace fs = std::filesystem;
    if (!folder_exists(input)) return {input};
    std::vector<std::string> files;
    std::error_code error;
    std::string last = input;  // what an error is about
    for (fs::recursive_directory_iterator at(input, error), end; !error && at != end;) {
        last = at->path().string();
        const bool hidden = at->path().filename().string().starts_with(".");
        if (hidden && at->is_directory(error)) at.disable_recursion_pending();
        if (!hidden && at->is_regular_file(error)) files.push_back(last);
        if (!error) at.increment(error);
    }
    if (error) fail("cannot read ", last, ": ", error.message());
    std::sort(files.begin(), files.end());
    return files;
}

// A file is one document, and a line of a .jsonl file is one. Fails if there is no text.
inline Documents read_documents(const std::vector<std::string>& inputs) {
    Documents documents;
    for (const std::string& input : inputs)
        for (const std::string& path : files_of_input(input)) {
            if (path.ends_with(".jsonl"))
                add_jsonl(documents, path);
            else
                documents.add(read_file(path));
        }
    if (documents.texts.empty()) {
        std::string names;
        for (const std::string& input : inputs) join(names, ", ", input);
        fail("there is no text in the input (", names.substr(0, 200), "): nothing to prepare");
    }
    return documents;
}

// Where the character after the one at text[at] begins. A byte that belongs to none counts as one.
inline size_t next_character(std::string_view text, size_t at) {
    return at + std::max<size_t>(utf8_character(text.substr(at)).bytes, 1);
}
inline int64_t count_characters(std::string_view text) {
    int64_t count = 0;
    for (size_t at = 0; at < text.size(); at = next_character(text, at)) ++count;
    return count;
}

// The last `val_fraction` is for validation, rounded up. One text is cut by characters, several by
// documents. (nanoGPT cuts Shakespeare at the same character.)
inline void split_documents(Documents& documents, double val_fraction) {
    const auto& texts = documents.texts;
    const bool single = texts.size() == 1;
    const int64_t count = single ? count_characters(texts[0]) : int64_t(texts.size());
    // Careful: 1 - 0.1 and the like are not exact; without the last term 10 could become 9.
    const int64_t kept = int64_t(std::floor(double(count) * (1 - val_fraction) + 1e-9));
    if (kept <= 0)
        fail("--val-fraction ", val_fraction, " leaves nothing to train on: the input has only ",
             count, single ? " characters" : " documents");
    documents.train.assign(texts.begin(), texts.begin() + (single ? 1 : kept));
    documents.val.assign(texts.begin() + (single ? 1 : kept), texts.end());
    if (!single) return;
    size_t cut = 0;
    for (int64_t i = 0; i < kept; ++i) cut = next_character(texts[0], cut);
    documents.train[0] = documents.train[0].substr(0, cut);
    if (cut < texts[0].size()) documents.val = {std::string_view(texts[0]).substr(cut)};
}

// =================================================================================================
// Work for all cores
// =================================================================================================

// A part of a document that can be tokenized by itself. A job is some of them.
struct Part {
    std::string_view text;
    bool begins_document;
};
using Job = std::vector<Part>;

// The first index from `at` on where the text may be cut, so that its two parts have the same
// pieces as the whole (§12): between a character that is no space and a space, both ASCII.
inline size_t safe_cut(std::string_view text, size_t at) {
    for (at = std::max<size_t>(at, 1); at < text.size(); ++at) {
        const uint8_t before = uint8_t(text[at - 1]), after = uint8_t(text[at]);
        const bool ascii = before < 128 && after < 128;
        if (ascii && class_of(before) != kSpace && class_of(after) == kSpace) return at;
    }
    return text.size();
}

// Cuts the documents into jobs of about job_bytes each.
inline std::vector<Job> make_jobs(const std::vector<std::string_view>& documents,
                                  size_t job_bytes = 1 << 18) {
    std::vector<Job> jobs;
    size_t filled = job_bytes;
    for (std::string_view text : documents)
        for (size_t at = 0; at < text.size();) {
            if (filled >= job_bytes) jobs.emplace_back(), filled = 0;
            const size_t end = safe_cut(text, at + (job_bytes - filled));
            jobs.back().push_back({text.substr(at, end - at), at == 0});
            filled += end - at, at = end;
        }
    return jobs;
}

inline size_t thread_count() { return size_t(omp_get_max_threads()); }

// Calls work(job number, thread number) for every job, on all cores. Throws what one of them threw.
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
// Pieces, fast
// =================================================================================================

// How many of the eight bytes at `text`, from the first on, are ASCII letters. It compares all
// eight in one register: adding 128 - c to a byte below 128 sets its top bit just where it is c or
// more. ("a" is 0x61, and 0x61 + 0x1f = 0x80; "`" is 0x60, and makes 0x7f.) The bit 0x20 makes
// capitals small; a byte of 128 or more is ruled out by its own top bit.
inline size_t leading_letters(const char* text) {
    constexpr uint64_t kEach = 0x0101010101010101, kTop = 0x80 * kEach;
    uint64_t bytes;
    std::memcpy(&bytes, text, sizeof bytes);
    const uint64_t lower = (bytes | 0x20 * kEach) & ~kTop;
    const uint64_t from_a = lower + (128 - 'a') * kEach, beyond_z = lower + (127 - 'z') * kEach;
    const uint64_t others = ~(from_a & ~beyond_z & ~bytes) & kTop;
    return size_t(std::countr_zero(others)) / 8;
}

// next_piece (§12), faster: eight letters at a time where the piece is a word of up to 15 letters of
// ASCII, perhaps with a blank before it.
inline std::string_view fast_piece(std::string_view text, size_t at) {
    if (at + 17 > text.size()) return next_piece(text, at);
    const size_t begin = at + (text[at] == ' ');
    size_t letters = leading_letters(&text[begin]);
    if (letters == 8) letters += leading_letters(&text[begin + 8]);
    const bool more = letters == 16 || (text[begin + letters] & 0x80);  // perhaps
    return letters == 0 || more ? next_piece(text, at) : text.substr(at, begin - at + letters);
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
    const std::vector<Job> jobs = make_jobs(documents);
    std::vector<std::unordered_map<std::string_view, int64_t>> counts(thread_count());
    for_all_jobs(jobs.size(), [&](size_t job, size_t thread) {
        for (const Part& part : jobs[job])
            for (size_t at = 0; at < part.text.size();) {
                const std::string_view piece = fast_piece(part.text, at);
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

// Learns merges, one at a time. The distinct pieces lie one after the other in one array of
// symbols, each a link in a list; every pair knows its count and where it occurs. So a merge costs
// what it changes, not a pass over the text.
class BpeTrainer {
public:
    explicit BpeTrainer(const std::vector<std::pair<std::string_view, int64_t>>& pieces) {
        for (auto [piece, count] : pieces) {
            if (symbols_.size() + piece.size() >= kNone)
                fail("the text has more than ", kNone,
                     " bytes of distinct pieces: learn the vocabulary from a part of it");
            for (size_t i = 0; i < piece.size(); ++i) {
                const uint32_t at = uint32_t(symbols_.size());
                const uint32_t previous = i == 0 ? kNone : at - 1;
                const uint32_t next = i + 1 == piece.size() ? kNone : at + 1;
                symbols_.push_back({kBytes.id_of_byte[uint8_t(piece[i])], previous, next, count});
                if (i > 0) count_pair(at - 1, +1);
            }
        }
        queue_fresh();
    }

    // Learns `wanted` merges, or fewer when no pair is left that occurs twice.
    std::vector<Tokenizer::Merge> train(size_t wanted) {
        std::vector<Tokenizer::Merge> merges;
        while (merges.size() < wanted && !queue_.empty()) {
            const auto [count, inverted_key] = queue_.top();
            const uint32_t key = ~inverted_key;
            queue_.pop();
            // Counts fall while other pairs are merged, and the queue does not hear of it.
            const int64_t now = pairs_[key].count;
            if (now < 2) continue;
            if (now < count) {
                queue_.push({now, inverted_key});
                continue;
            }
            merge_everywhere(key, uint32_t(256 + merges.size()));
            merges.emplace_back(uint16_t(key >> 16), uint16_t(key & 0xffff));
        }
        return merges;
    }

private:
    static constexpr uint32_t kNone = UINT32_MAX;
    struct Symbol {
        uint32_t token, previous, next;  // previous, next: indices, kNone at a piece's ends
        int64_t weight;                  // how often the piece occurs
    };
    struct Pair {
        int64_t count = 0;
        std::vector<uint32_t> where;  // of the left token; some may be out of date
    };

    // Counts the pair that begins at this symbol: +1 when it appears, -1 when it goes.
    void count_pair(uint32_t at, int sign) {
        const Symbol& left = symbols_[at];
        const uint32_t key = left.token << 16 | symbols_[left.next].token;
        Pair& pair = pairs_[key];
        pair.count += sign * left.weight;
        if (sign < 0) return;
        if (pair.where.empty()) fresh_.push_back(key);
        pair.where.push_back(at);
    }

    // Replaces the pair by `token` wherever it occurs. Pairs of two equal tokens come from left to
    // right, as one walk found them, so aaa becomes (aa)a, as in encoding.
    void merge_everywhere(uint32_t key, uint32_t token) {
        const std::vector<uint32_t> where = std::move(pairs_[key].where);
        for (uint32_t at : where) {
            Symbol& left = symbols_[at];
            if (left.token != key >> 16 || left.next == kNone) continue;
            Symbol& right = symbols_[left.next];
            if (right.token != (key & 0xffff)) continue;
            // Three pairs go: before, this one, after.
            if (left.previous != kNone) count_pair(left.previous, -1);
            count_pair(at, -1);
            if (right.next != kNone) count_pair(left.next, -1);
            // The left symbol becomes the new token; the right one leaves the list.
            left.token = token, left.next = right.next, right.token = kNone;
            if (left.next != kNone) symbols_[left.next].previous = at;
            // Two pairs come.
            if (left.previous != kNone) count_pair(left.previous, +1);
            if (left.next != kNone) count_pair(at, +1);
        }
        pairs_.erase(key);
        queue_fresh();
    }

    // A new pair enters the queue once all of it is counted. Why inverted: of pairs that are as
    // frequent, the one with the smaller left token comes first, then the smaller right one.
    void queue_fresh() {
        for (uint32_t key : fresh_) queue_.push({pairs_[key].count, ~key});
        fresh_.clear();
    }

    std::vector<Symbol> symbols_;
    std::unordered_map<uint32_t, Pair> pairs_;  // key: left token << 16 | right token
    std::priority_queue<std::pair<int64_t, uint32_t>> queue_;  // count, inverted key
    std::vector<uint32_t> fresh_;                              // keys of pairs not yet queued
};

// A vocabulary of `size` tokens, or as many as the documents support.
inline Tokenizer train_bpe(const std::vector<std::string_view>& documents, int64_t size) {
    return Tokenizer(BpeTrainer(count_pieces(documents)).train(size_t(size - 257)));
}

// =================================================================================================
// Encoding, fast
// =================================================================================================
// The tokens are those of Tokenizer::encode (§12); a test compares them. This is faster because it
// caches the tokens of short pieces, where it finds 96 of 100 pieces of English, and because it
// merges the others without a heap.

// Which token two neighbours merge into: a hash table with linear probing, at most half full.
// Why not std::unordered_map: a look-up here touches one cache line, there three or more.
class MergeTable {
    struct Entry {
        uint32_t pair = 0, token = kNoToken;
    };
    std::vector<Entry> entries_;

public:
    explicit MergeTable(size_t merges) : entries_(std::bit_ceil(2 * merges + 2)) {}
    // The token that left and right become, or kNoToken. The smaller it is, the earlier the merge
    // was learnt, so nothing else has to be stored. Both ids must be below 65,536.
    uint32_t find(uint32_t left, uint32_t right) const {
        return entries_[index_of(left << 16 | right)].token;
    }
    void add(uint32_t left, uint32_t right, uint32_t token) {
        entries_[index_of(left << 16 | right)] = {left << 16 | right, token};
    }

private:
    // Where the pair is, or the empty entry where it belongs. The search begins where Fibonacci
    // hashing says (Knuth, The Art of Computer Programming, 6.4).
    size_t index_of(uint32_t pair) const {
        const size_t mask = entries_.size() - 1;
        size_t at = size_t((pair * 0x9e3779b97f4a7c15ull) >> 32) & mask;
        while (entries_[at].token != kNoToken && entries_[at].pair != pair) at = (at + 1) & mask;
        return at;
    }
};

// Careful: one for each thread, because of the cache.
class Encoder {
    static constexpr size_t kMaxBytes = 15, kMaxTokens = 7;  // of a cached piece
    static constexpr size_t kShort = 32;                     // up to here, merge_short is faster

    // A piece and its tokens. low and high are the piece's bytes, zeros, and in the last byte its
    // length:
    //     " lower"     20 6c 6f 77 65 72 00 00 | 00 00 00 00 00 00 00 06
    // Why so small: two fill a cache line, and two comparisons find a piece.
    struct Cached {
        uint64_t low = 0, high = 0;  // zero: nothing here, as no piece is empty
        uint16_t count = 0, tokens[kMaxTokens] = {};
    };
    MergeTable table_;
    std::vector<Cached> cache_ = std::vector<Cached>(1 << 16);  // 2 MB: it stays in L2

public:
    explicit Encoder(const Tokenizer& tokenizer) : table_(tokenizer.merges().size()) {
        uint32_t token = 256;
        for (auto [left, right] : tokenizer.merges()) table_.add(left, right, token++);
    }

    // Appends the tokens of the text to out.
    void encode(std::string_view text, std::vector<uint16_t>& out) {
        uint16_t buffer[4096], *to = buffer;
        const auto flush = [&] { out.insert(out.end(), buffer, to), to = buffer; };
        for (size_t at = 0; at < text.size();) {
            const std::string_view piece = fast_piece(text, at);
            const bool inside = at + 16 <= text.size();  // what `cached` reads
            at += piece.size();
            if (piece.size() > kShort || to + kShort > std::end(buffer)) flush();
            if (piece.size() > kShort)
                merge_piece([&](uint32_t a, uint32_t b) { return table_.find(a, b); }, piece, out);
            else
                to += inside && piece.size() <= kMaxBytes ? cached(piece, to)
                                                          : merge_short(piece, to);
        }
        flush();
    }

private:
    // Both write the tokens of a short piece to `to`, which has kShort elements, and return how
    // many they are.

    // From the cache. A piece that is not there replaces the one in its entry. Careful: reads 16
    // bytes, though the piece has at most 15.
    size_t cached(std::string_view piece, uint16_t* to) {
        // Why: reading 16 bytes and clearing those after the piece takes a few instructions;
        // copying just its own is a call.
        uint64_t low, high;
        std::memcpy(&low, piece.data(), 8);
        std::memcpy(&high, piece.data() + 8, 8);
        const size_t in_low = std::min<size_t>(piece.size(), 8), in_high = piece.size() - in_low;
        low &= ~uint64_t(0) >> (64 - 8 * in_low);
        high &= (uint64_t(1) << (8 * in_high)) - 1;
        high |= uint64_t(piece.size()) << 56;
        const uint64_t mixed = (low ^ (high * 0xbf58476d1ce4e5b9ull)) * 0x9e3779b97f4a7c15ull;
        Cached& entry = cache_[mixed >> 48];
        if (entry.low != low || entry.high != high) {
            const size_t count = merge_short(piece, to);
            if (count > kMaxTokens) return count;
            entry.low = low, entry.high = high, entry.count = uint16_t(count);
            std::copy(to, to + count, entry.tokens);
        }
        // Why all seven, whatever the count: a copy of fixed size is one instruction.
        std::memcpy(to, entry.tokens, sizeof entry.tokens);
        return entry.count;
    }

    // Merging as it is defined: make the earliest merge, and look again; n * n steps.
    size_t merge_short(std::string_view piece, uint16_t* to) const {
        size_t n = piece.size();
        uint32_t merged[kShort];  // what token i and the one after it make
        for (size_t i = 0; i < n; ++i) to[i] = kBytes.id_of_byte[uint8_t(piece[i])];
        for (size_t i = 0; i + 1 < n; ++i) merged[i] = table_.find(to[i], to[i + 1]);
        while (n > 1) {
            const size_t best = size_t(std::min_element(merged, merged + n - 1) - merged);
            if (merged[best] == kNoToken) break;
            // Token `best` becomes the merged one, and the token after it goes.
            to[best] = uint16_t(merged[best]);
            --n;
            std::copy(to + best + 2, to + n + 1, to + best + 1);
            if (best + 1 < n) std::copy(merged + best + 2, merged + n, merged + best + 1);
            // It has new neighbours.
            if (best > 0) merged[best - 1] = table_.find(to[best - 1], to[best]);
            if (best + 1 < n) merged[best] = table_.find(to[best], to[best + 1]);
        }
        return n;
    }
};

// The tokens of all documents, each after an end of text. The same for any number of threads.
inline std::vector<uint16_t> encode_documents(const Tokenizer& tokenizer,
                                              const std::vector<std::string_view>& documents) {
    const std::vector<Job> jobs = make_jobs(documents);
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
    for (const auto& of_job : done) total += of_job.size();
    tokens.reserve(total);
    for (auto& of_job : done) {
        tokens.insert(tokens.end(), of_job.begin(), of_job.end());
        std::vector<uint16_t>().swap(of_job);  // frees it
    }
    return tokens;
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

// Writes count tokens as one shard (§2).
inline void write_shard(const std::string& path, const uint16_t* tokens, size_t count) {
    if (count > INT32_MAX)
        fail(path, ": a shard holds at most ", INT32_MAX, " tokens, not ", count,
             "; use a smaller --val-fraction");
    const int32_t header[kShardHeaderBytes / 4] = {kShardMagic, 1, int32_t(count)};
    FileWriter file(path);
    file.write(header, sizeof header);
    file.write(tokens, count * sizeof *tokens);
    file.commit();
}

// Is it a shard's name as this program writes it?
inline bool is_shard_name(const std::string& name) {
    const size_t begin = name.starts_with("train_") ? 6 : name.starts_with("val_") ? 4 : name.npos;
    return begin != name.npos && name.size() == begin + 10 && name.ends_with(".bin") &&
           std::all_of(name.begin() + ptrdiff_t(begin), name.end() - 4,
                       [](char c) { return c >= '0' && c <= '9'; });
}

constexpr const char* kIncoming = ".incoming";  // the new files wait here until all are written

// Refuses a folder that cannot be written, or that has shards which this program did not write.
// Called before the work begins: an hour of tokenizing should not end in this message.
inline void check_output_folder(const std::string& folder) {
    if (file_exists(folder))
        fail("cannot write to ", folder, ": it is a file; --output names a folder");
    std::string parent = folder;
    while (!folder_exists(parent) && !file_exists(parent) && parent_folder(parent) != parent)
        parent = parent_folder(parent);
    if (!folder_exists(parent) || ::access(parent.c_str(), W_OK | X_OK) != 0)
        fail("cannot write to ", folder, ": ", parent,
             " is no folder that may be written; choose another --output");
    if (!folder_exists(folder) || file_exists(folder + "/dataset.json") ||
        folder_exists(folder + "/" + kIncoming))
        return;
    for (const std::string& name : list_folder(folder))
        if (is_shard_name(name))
            fail(folder, " has shards (", name, ") but no dataset.json, so they are not ",
                 "prepare_data's to replace; choose another --output");
}

inline void write_dataset_files(const std::string& folder, const Dataset& data,
                                size_t shard_tokens) {
    for (size_t at = 0, shard = 1; at < data.train.size(); at += shard_tokens, ++shard)
        write_shard(folder + format("/train_%06zu.bin", shard), data.train.data() + at,
                    std::min(shard_tokens, data.train.size() - at));
    if (!data.val.empty())
        write_shard(folder + "/val_000000.bin", data.val.data(), data.val.size());
    data.tokenizer.save(folder);
    write_file(folder + "/dataset.json", data.description.write(2) + "\n");
}

// Whole or not at all: all files are first written to a folder within the folder. Then shards of an
// earlier run are removed and the new files take their names, dataset.json last. Whatever fails in
// the first half leaves the old data as it was.
inline void write_dataset(const std::string& folder, const Dataset& data, int64_t shard_tokens) {
    const std::string incoming = folder + "/" + kIncoming;
    if (folder_exists(incoming)) remove_folder(incoming);
    const FolderToFill to_fill(incoming);
    try {
        write_dataset_files(incoming, data, size_t(shard_tokens));
        for (const std::string& name : list_folder(folder))
            if (is_shard_name(name) && !file_exists(incoming + "/" + name))
                remove_file(folder + "/" + name);
        for (const std::string& name : list_folder(incoming))
            if (name != "dataset.json") rename_path(incoming + "/" + name, folder + "/" + name);
        rename_path(incoming + "/dataset.json", folder + "/dataset.json");
    } catch (...) {
        std::error_code ignored;
        std::filesystem::remove_all(incoming, ignored);
        throw;
    }
}

// Adds to the description how large one split is, and prints it.
inline void describe_split(Json& json, const std::string& split,
                           const std::vector<std::string_view>& documents, size_t tokens) {
    int64_t characters = 0, bytes = 0;
    for (std::string_view text : documents)
        characters += count_characters(text), bytes += int64_t(text.size());
    json.set(split + "_documents", documents.size())
        .set(split + "_characters", characters)
        .set(split + "_bytes", bytes)
        .set(split + "_tokens", tokens);
    std::printf("  %-5s %9zu document%s %12s characters %12s bytes %12zu tokens\n", split.c_str(),
                documents.size(), documents.size() == 1 ? " " : "s",
                std::to_string(characters).c_str(), std::to_string(bytes).c_str(), tokens);
}

// The tokenizer of the options. One that is learnt learns from the training part only.
inline Tokenizer make_tokenizer(const PrepareOptions& o,
                                const std::vector<std::string_view>& train) {
    if (o.tokenizer == "byte") return Tokenizer::bytes();
    if (o.tokenizer == "gpt2") return Tokenizer::load(o.vocab);
    return train_bpe(train, o.vocab_size);
}

// Documents to a data folder. `source` says where they came from; `add` may add to the description.
inline void prepare(const PrepareOptions& o, const Documents& documents, const std::string& source,
                    const std::function<void(Json&)>& add = nullptr) {
    const double start = now_seconds();
    Dataset data{make_tokenizer(o, documents.train), {}, {}, Json::object()};
    const double learnt = now_seconds();
    data.train = encode_documents(data.tokenizer, documents.train);
    data.val = encode_documents(data.tokenizer, documents.val);
    const double encoded = now_seconds();
    std::printf("%s -> %s\n", source.c_str(), o.output.c_str());
    const int vocab_size = data.tokenizer.vocab_size();
    data.description.set("source", source)
        .set("tokenizer", o.tokenizer)
        .set("vocab_size", vocab_size);
    describe_split(data.description, "train", documents.train, data.train.size());
    describe_split(data.description, "val", documents.val, data.val.size());
    if (add) add(data.description);
    write_dataset(o.output, data, o.shard_tokens);
    double bytes = 0;
    for (const std::string& text : documents.texts) bytes += double(text.size());
    std::string notes;
    if (o.tokenizer == "bpe" && !o.input.empty() && vocab_size < o.vocab_size)
        notes += to_text("  no pair is left that occurs twice: the vocabulary has ", vocab_size,
                         " tokens, not ", o.vocab_size, "\n");
    if (documents.empty)
        notes += to_text("  ", documents.empty, " empty documents were left out\n");
    notes += to_text("  ", vocab_size, " tokens in the vocabulary (", o.tokenizer, ", ",
                     format("%.1f s), %.2f bytes a token", learnt - start,
                            bytes / double(data.train.size() + data.val.size())));
    if (bytes >= 1e6)  // less says nothing about speed
        notes += format(", tokenized at %.0f MB/s", bytes / 1e6 / (encoded - learnt));
    std::puts(notes.c_str());
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

// --- The grammar as data

// A part of an alternative: letters to be written, a rule to be expanded, a word to be drawn and
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

// Remembers a word of one list, never the word in the slot `unlike` (-1: any word).
struct Slot {
    std::string name;
    int rule, unlike;
};

struct Grammar {
    std::vector<Rule> rules;  // rules[0] is the story
    std::vector<Slot> slots;
    std::vector<Items> sentences;  // every sentence of every rule, for is_story_sentence
};

// For every slot the number of the word it holds, or -1.
struct Memory : std::array<int8_t, 32> {
    Memory() { fill(-1); }
};

// The parts of `text` between separators. Runs of blanks become one blank; none is left around a
// part.
inline std::vector<std::string> split(std::string_view text, char separator) {
    std::vector<std::string> parts;
    for (const std::string& raw : split_at(text, separator)) {
        std::string& part = parts.emplace_back();
        for (char c : raw) {
            const bool blank = c == ' ' || c == '\n';
            if (!blank)
                part += c;
            else if (!part.empty() && part.back() != ' ')
                part += ' ';
        }
        if (part.ends_with(' ')) part.pop_back();
    }
    return parts;
}

// The index of the thing with this name, or -1.
template <class Named>
int find(const std::vector<Named>& things, const std::string& name) {
    for (size_t i = 0; i < things.size(); i++)
        if (things[i].name == name) return int(i);
    return -1;
}

inline bool is_capital(char c) { return std::isupper(uint8_t(c)) != 0; }

inline std::string with_article(const std::string& word) {
    return (std::strchr("aeiou", word[0]) ? "an " : "a ") + word;
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
    if (item.kind == Item::draw && find(grammar.slots, tag) < 0)
        grammar.slots.push_back({tag, find(grammar.rules, list), find(grammar.slots, unlike)});
    item.index = find(grammar.slots, tag);
    if (item.index < 0 || grammar.slots[item.index].rule < 0)
        fail("story grammar: '", tag, "' is no rule, no list and never drawn");

    item.capital = is_capital(form[0]);
    if (item.capital) form[0] = char(std::tolower(form[0]));
    const auto& forms = grammar.rules[grammar.slots[item.index].rule].form_names;
    item.form = int(std::find(forms.begin(), forms.end(), form) - forms.begin());
    if (item.form == int(forms.size())) fail("story grammar: '", tag, "' has no form '", form, "'");
    return item;
}

// Letters and braces in turn.
inline Items parse_items(Grammar& grammar, std::string text) {
    Items items;
    while (!text.empty()) {
        std::string rest = cut(text, '{');
        if (!text.empty()) items.push_back({Item::letters, text});
        text = cut(rest, '}');
        if (!rest.empty()) items.push_back(parse_braces(grammar, rest));
    }
    return items;
}

// Adds the sentences that are written out in an alternative: what ends in . ! or ?, less the rules
// before it ({Opening} and so on) that are sentences of their own.
inline void add_sentences(Grammar& grammar, std::string_view text) {
    while (!text.empty()) {
        const bool rule = text[0] == '{' && is_capital(text[1]);
        size_t end = rule ? text.find('}') + 1 : 1;
        while (!rule && end < text.size() &&
               !(std::strchr(".!?", text[end - 1]) && text[end] == ' '))
            end++;
        if (!rule)
            grammar.sentences.push_back(parse_items(grammar, std::string(text.substr(0, end))));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
}

// Adds a slot for every word that is drawn somewhere in the text.
inline void declare_slots(Grammar& grammar, std::string text) {
    while (!text.empty()) {
        std::string tag = cut(text, '{');
        text = cut(tag, '}');
        const bool draws = tag.find_first_of("= ") != tag.npos;
        if (draws) parse_braces(grammar, tag);
    }
}

// A list: every word with its forms.
inline void parse_words(Rule& rule, const std::string& body) {
    for (const std::string& word : split(body, '|')) {
        std::vector<std::string> forms = split(word, '/');
        forms.insert(forms.begin() + 1, with_article(forms[0]));
        if (forms.size() != rule.form_names.size())
            fail("story grammar: '", word, "' has ", forms.size(), " forms, list '", rule.name,
                 "' has ", rule.form_names.size());
        rule.words.push_back(forms);
    }
}

// Adds each rule's name and columns to the grammar; returns the texts of their alternatives.
inline std::vector<std::string> parse_headers(Grammar& grammar, std::string_view text) {
    std::vector<std::string> bodies;
    for (std::string line : split_at(text, '\n')) {
        const bool starts_rule = !line.empty() && line[0] != ' ';
        if (starts_rule) {
            const std::string body = cut(line, ':');
            std::string columns = cut(line, '[');
            cut(columns, ']');
            Rule rule{split(line, ' ')[0], {"", "a"}, {}, {}};
            for (const std::string& column : split(columns, ' '))
                if (!column.empty()) rule.form_names.push_back(column);
            grammar.rules.push_back(rule);
            bodies.emplace_back();
            line = body;
        }
        if (!bodies.empty()) bodies.back() += line + "\n";
    }
    return bodies;
}

// Reads the text above: names first, then the lists of words, then the rules that refer to them.
inline Grammar parse_grammar(std::string_view text) {
    Grammar grammar;
    const std::vector<std::string> bodies = parse_headers(grammar, text);
    for (size_t i = 0; i < bodies.size(); i++) {
        const bool is_list = bodies[i].find('{') == std::string::npos;
        if (is_list) parse_words(grammar.rules[i], bodies[i]);
    }
    for (const std::string& body : bodies) declare_slots(grammar, body);
    for (size_t i = 0; i < bodies.size(); i++) {
        Rule& rule = grammar.rules[i];
        if (!rule.words.empty()) continue;
        for (const std::string& alternative : split(bodies[i], '|')) {
            rule.alternatives.push_back(parse_items(grammar, alternative));
            const bool whole_sentences = is_capital(rule.name[0]);
            if (whole_sentences) add_sentences(grammar, alternative);
        }
    }
    grammar.sentences.push_back(parse_items(grammar, "The end."));
    if (grammar.slots.size() > Memory().size())
        fail("story grammar: ", grammar.slots.size(), " slots, at most ", Memory().size());
    return grammar;
}

inline const Grammar& the_grammar() {
    static const Grammar grammar = parse_grammar(grammar_text);
    return grammar;
}

// The letters of a remembered word.
inline std::string spell(const Grammar& grammar, const Item& item, int word) {
    std::string text = grammar.rules[grammar.slots[item.index].rule].words[word][item.form];
    if (item.capital) text[0] = char(std::toupper(text[0]));
    return text;
}

// --- Telling a story, and adding up what its choices cost

struct Teller {
    const Grammar& grammar;
    uint64_t key;  // the story's own random stream
    uint64_t rolls = 0;
    Memory memory = {};
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
    for (const Items& items : rule.alternatives)
        for (const Item& item : items) {
            if (item.kind == Item::rule) sum += entropy(grammar, grammar.rules[item.index]);
            if (item.kind != Item::draw) continue;
            const Slot& slot = grammar.slots[item.index];
            sum += std::log(double(grammar.rules[slot.rule].words.size()) - (slot.unlike >= 0));
        }
    return std::log(n) + sum / n;
}

// --- Reading a story back

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
    return !stories::derivations(sentence, stories::the_grammar().sentences).empty();
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

struct StoryCorpus {
    std::vector<std::string> train, val;
    double val_neg_log_prob = 0;   // nats, all validation stories together
    double entropy_per_story = 0;  // nats: what -log p(story) is on average, in closed form
};

// Training and validation stories, each from a random stream of its own: story i stays the same
// when there are more of them, and no number is used twice.
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
        const stories::Teller teller = tell(1, i);
        corpus.val.push_back(teller.text);
        corpus.val_neg_log_prob += teller.neg_log_prob;
    }
    corpus.entropy_per_story = stories::entropy(grammar, grammar.rules[0]);
    return corpus;
}

constexpr int kStories = 22'000;  // of which a tenth is for validation

// Draws the stories and writes them as a dataset whose floor is known.
inline void prepare_stories(const PrepareOptions& o) {
    const int val = int(std::ceil(kStories * o.val_fraction - 1e-9));
    if (val >= kStories) fail("--val-fraction ", o.val_fraction, " leaves no story to train on");
    const StoryCorpus stories = make_stories(uint64_t(o.seed), kStories - val, val);
    Documents documents;
    documents.texts = stories.train;
    documents.texts.insert(documents.texts.end(), stories.val.begin(), stories.val.end());
    documents.train.assign(documents.texts.begin(), documents.texts.end() - val);
    documents.val.assign(documents.texts.end() - val, documents.texts.end());
    // The floor is the loss of the true model: what the validation stories cost it, divided by the
    // tokens that are predicted (all but the first). The entropy is what a story costs on average.
    prepare(o, documents, to_text("stories, seed ", o.seed), [&](Json& json) {
        if (val == 0) return;
        const double tokens = json.find("val_tokens")->as<double>().value();
        const double floor = stories.val_neg_log_prob / (tokens - 1);
        json.set("floor", floor).set("entropy", stories.entropy_per_story / (tokens / val));
        std::printf(
            "  the floor: no model can score below %.4f nats a token on the validation stories\n",
            floor);
    });
}

// =================================================================================================
// Models of llm.c
// =================================================================================================
// A .bin file of llm.c has 256 x int32: 20240326, version 3 (fp32), positions, vocabulary, layers,
// heads, channels, padded vocabulary, zeros. Then every tensor, for all layers together, in the
// order below. Linear weights are [out, in], so they are transposed.

struct LlmcModel {
    std::string bytes;  // of the whole file
    Config config;
    int64_t padded_vocab = 0;
};
constexpr size_t kLlmcHeaderBytes = 256 * sizeof(int32_t);

// Reads the file and checks its header and its length.
inline LlmcModel read_llmc(const std::string& path) {
    LlmcModel model{read_file(path), {}, 0};
    int32_t header[kLlmcHeaderBytes / sizeof(int32_t)] = {};
    std::memcpy(header, model.bytes.data(), std::min(model.bytes.size(), sizeof header));
    if (header[0] == 20240326 && header[1] == 5)
        fail(path, " is a model of llm.c in bf16 (version 5); only fp32 (version 3) can be ",
             "converted: give the file without _bf16 in its name, or build llm.c with ",
             "PRECISION=FP32");
    if (header[0] != 20240326 || header[1] != 3)
        fail(path, " is no model of llm.c: expected it to begin with 20240326 and version 3, ",
             "found ", header[0], " and ", header[1]);
    const auto [P, V, L, NH, C, padded] =
        std::array{header[2], header[3], header[4], header[5], header[6], header[7]};
    const bool sane = P > 0 && P <= 1 << 20 && V > 0 && V <= padded && padded <= 1 << 20 && L > 0 &&
                      L <= 1000 && NH > 0 && C > 0 && C <= 65536 && C % NH == 0;
    if (!sane)
        fail(path, ": impossible sizes: positions ", P, ", vocabulary ", V, " (padded to ", padded,
             "), layers ", L, ", heads ", NH, ", channels ", C);
    model.config = {L, NH, C, P, V};
    model.padded_vocab = padded;
    const size_t count = layout_of(model.config).count + size_t(padded - V) * size_t(C);
    const size_t expected = kLlmcHeaderBytes + count * sizeof(float);
    if (model.bytes.size() != expected)
        fail(path, " is damaged: its header promises ", expected, " bytes, it has ",
             model.bytes.size());
    return model;
}

// Every tensor of the file, under Hugging Face's names. They read from `model` when they are saved.
inline std::vector<StoredTensor> llmc_tensors(const LlmcModel& model) {
    std::map<std::string, TensorInfo> named;
    for (const TensorInfo& info : layout_of(model.config).tensors) named[info.name] = info;
    std::vector<StoredTensor> tensors;
    const char* at = model.bytes.data() + kLlmcHeaderBytes;
    auto take = [&](const std::string& name, bool transposed = false) {
        const TensorInfo& info = named.at(name);
        const size_t rows = size_t(info.shape[0]), columns = info.count / rows;
        auto fill = [=, from = at](float* out, size_t first, size_t n) {
            for (size_t i = first; i < first + n; ++i) {
                const size_t stored = transposed ? (i % columns) * rows + i / columns : i;
                std::memcpy(out++, from + stored * sizeof *out, sizeof *out);
            }
        };
        tensors.push_back({name_in_checkpoint(name), "F32", info.shape, fill});
        at += info.count * sizeof(float);
    };
    take("wte.weight");
    at += size_t(model.padded_vocab - model.config.vocab_size) * size_t(model.config.n_embd) *
          sizeof(float);
    take("wpe.weight");
    for (const char* name :
         {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
          "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight",
          "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"})
        for (int l = 0; l < model.config.n_layer; ++l) {
            const std::string full = to_text("h.", l, ".", name);
            take(full, named.at(full).shape.size() == 2);
        }
    take("ln_f.weight");
    take("ln_f.bias");
    return tensors;
}

// Writes a Hugging Face folder, with GPT-2's tokenizer if it is there and fits.
inline void convert_llmc(const PrepareOptions& o) {
    const LlmcModel model = read_llmc(o.from_llmc);
    std::optional<Tokenizer> tokenizer =
        o.has("vocab") ? Tokenizer::load(o.vocab) : tokenizer_of(o.vocab);
    if (tokenizer && tokenizer->vocab_size() != model.config.vocab_size) {
        if (o.has("vocab"))
            fail(o.vocab, " has ", tokenizer->vocab_size(), " tokens, but the model ",
                 model.config.vocab_size);
        tokenizer.reset();
    }
    const FolderToFill to_fill(o.output);
    write_safetensors(o.output + "/model.safetensors", llmc_tensors(model));
    write_model_description(o.output, model.config, tokenizer ? &*tokenizer : nullptr);
    std::printf("%s -> %s: %zu parameters, %s\n", o.from_llmc.c_str(), o.output.c_str(),
                layout_of(model.config).count,
                tokenizer ? "with its tokenizer" : "without a tokenizer (--vocab DIR adds one)");
    std::printf("next: ./train_gpt sample --init-from %s\n", shell_word(o.output).c_str());
}

// =================================================================================================
// The program
// =================================================================================================

inline void run_prepare_data(const std::vector<std::string>& arguments) {
    const PrepareOptions o = parse_prepare_options(arguments);
    if (o.help) {
        std::fputs(prepare_help().c_str(), stdout);
        return;
    }
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
    tinygpt::use_all_cores();
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
