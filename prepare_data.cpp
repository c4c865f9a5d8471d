// prepare_data - turns text into what train_gpt reads: a tokenizer and shards of tokens
//
//   ./prepare_data                                           the default corpus: data/stories
//   ./prepare_data --input book.txt --vocab-size 4096 --output data/book
//   ./prepare_data --input a.txt b.jsonl folder --tokenizer gpt2 --output data/mine
//
// It finds the documents, cuts off the last part for validation, learns or loads a tokenizer, turns
// the documents into tokens on all cores, and writes a folder with
//   train_000001.bin ...  val_000000.bin   the tokens (the format is in §2 of tinygpt.hpp)
//   vocab.json  merges.txt  tokenizer.json the tokenizer (§13)
//   dataset.json                           source, counts, and the floor where it is known
// The order is: options, what is text, passes over it, the input, learning a vocabulary, tokens,
// the folder, the default corpus, models of llm.c.

#include "tinygpt.hpp"

#include <fnmatch.h>

#include <filesystem>
#include <sstream>

namespace tinygpt {

// =================================================================================================
// Options
// =================================================================================================

struct PrepareOptions {
    std::vector<std::string> input;
    std::string field = "text", tokenizer = "bpe", vocab = "data/gpt2", output, from_llmc;
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
         "texts, files with a JSON object in every line, and folders; - is standard input; may be "
         "repeated"},
        {"field", &o.field, group, 1, "NAME", "the field that holds the text in lines of JSON"},
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
    const bool text = !o.input.empty(), model = !o.from_llmc.empty();
    const std::pair<bool, const char*> wrong[] =
        {{o.has("vocab-size") && o.tokenizer != "bpe", "--vocab-size is for --tokenizer bpe"},
         {o.has("vocab") && o.tokenizer != "gpt2" && !model, "--vocab is for --tokenizer gpt2"},
         {model && (text || o.output.empty()),
          "--from-llmc needs --output DIR, and takes no --input: it converts a model, not text"},
         {o.has("field") && !text, "--field is for --input FILE with lines of JSON"},
         {o.has("seed") && text,
          "--seed is for the default corpus: with --input nothing is drawn at random"},
         {text && o.output.empty(),
          "--input needs --output DIR too: the folder to write, for example --output data/mine"}};
    for (const auto& [is_wrong, message] : wrong)
        if (is_wrong) fail_usage(message);
    if (o.output.empty()) o.output = "data/stories";
    while (o.output.size() > 1 && o.output.back() == '/') o.output.pop_back();
    return o;
}

// =================================================================================================
// What is text
// =================================================================================================

// A kind of file that is no text: what it begins with and what else is near its beginning, its
// name, and the command that makes text of it. FILE stands for its path.
struct FileKind {
    std::string_view begin, within;
    const char *name, *remedy;
};
constexpr const char* kPandoc = "pandoc -t plain FILE -o FILE.txt";
constexpr FileKind kFileKinds[] = {
    {"\x1f\x8b", "", "gzip", "zcat FILE | ./prepare_data --input - ..."},
    {"BZh", "", "bzip2", "bzcat FILE | ./prepare_data --input - ..."},
    {"\xfd\x37zXZ", "", "xz", "xzcat FILE | ./prepare_data --input - ..."},
    {"\x28\xb5\x2f\xfd", "", "zstd", "zstdcat FILE | ./prepare_data --input - ..."},
    {"PK\x03\x04", "[Content_Types].xml", "an Office document (docx, xlsx, pptx)", kPandoc},
    {"PK\x03\x04", "application/epub+zip", "an EPUB book", kPandoc},
    {"PK\x03\x04", "opendocument", "an OpenDocument file", kPandoc},
    {"PK\x03\x04", "", "a zip archive", "unzip FILE -d FILE.files, and --input FILE.files"},
    {"\xd0\xcf\x11\xe0", "", "an old Office document (doc, xls)", "soffice --convert-to txt FILE"},
    {"{\\rtf", "", "an RTF document", kPandoc},
    {"%PDF-", "", "PDF", "pdftotext FILE FILE.txt"},
    {"PAR1", "", "parquet",
     "python3 -c \"import pandas; pandas.read_parquet('FILE').to_json('FILE.jsonl', "
     "orient='records', lines=True)\""},
    {{"\xff\xfe\0\0", 4}, "", "UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > FILE.txt"},
    {"\xff\xfe", "", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"},
    {"\xfe\xff", "", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"},
    {"version https://git-lfs", "", "a pointer to a file of Git LFS", "git lfs pull"},
};
constexpr FileKind kBinary =
    {"", "", "binary data", "make text of it first (of UTF-16: iconv -f UTF-16LE FILE > FILE.txt)"};
constexpr FileKind kJsonArray = {"", "", "a JSON array", "jq -c '.[]' FILE > FILE.jsonl"};

// The kind of the file that begins so; null: it is text.
inline const FileKind* no_text(std::string_view begin, const std::string& field) {
    for (const FileKind& kind : kFileKinds)
        if (begin.starts_with(kind.begin) && begin.find(kind.within) != begin.npos) return &kind;
    auto is_control = [](char c) {
        return uint8_t(c) < 32 && class_of(uint8_t(c)) != kSpace && c != '\x1b';  // colours text
    };
    const auto controls = size_t(std::count_if(begin.begin(), begin.end(), is_control));
    if (begin.find('\0') != begin.npos || controls > begin.size() / 20) return &kBinary;
    const size_t first = begin.find_first_not_of(" \t\r\n");
    const size_t second = begin.find_first_not_of(" \t\r\n", first + 1);
    const bool array = second != begin.npos && begin[first] == '[' && begin[second] == '{';
    return array && begin.find("\"" + field + "\"") != begin.npos ? &kJsonArray : nullptr;
}

// =================================================================================================
// Passes over the text
// =================================================================================================
// The text may be larger than the memory. So it is never held: it stays in its files, and a pass
// reads it chunk by chunk, a group of chunks on all cores at a time. There are three passes: one
// counts what there is, so that it can be divided; one learns a vocabulary; one makes tokens.

// A file, or a part of one. It is one document, or holds one in every line.
struct Source {
    std::string path;
    std::string field;  // of the JSON object in a line, that holds the text; empty: plain text
    size_t begin, end;  // bytes
    bool plain_lines = false;  // the lines are text, not JSON
};

// Some bytes of a source, from begin to end, cut where its text may be cut.
struct Chunk {
    const Source* source;
    size_t begin, end;
    std::string bytes;

    void read() {
        bytes.resize(end - begin);
        InputFile(source->path).read_bytes(bytes.data(), bytes.size(), begin);
    }
};

// The last index at which a text may be cut, so that its two parts have the same pieces as the
// whole (§13): between a character that is no space and a space, both ASCII. 0: there is none.
inline size_t last_cut(std::string_view text) {
    for (size_t at = text.size(); at-- > 1;) {
        const uint8_t before = uint8_t(text[at - 1]), after = uint8_t(text[at]);
        const bool ascii = before < 128 && after < 128;
        if (ascii && class_of(before) != kSpace && class_of(after) == kSpace) return at;
    }
    return 0;
}

// Reads sources from front to end.
struct ChunkReader {
    const std::vector<Source>& sources;
    size_t bytes = 1 << 18;     // of a chunk; more where the text cannot be cut
    size_t source = 0, at = 0;  // where the next chunk begins, or before the source

    std::optional<Chunk> next() {
        while (source < sources.size() &&
               std::max(at, sources[source].begin) >= sources[source].end)
            ++source, at = 0;
        if (source == sources.size()) return {};
        const Source& from = sources[source];
        Chunk chunk{&from, std::max(at, from.begin), 0, ""};
        for (size_t size = bytes, cut = 0; cut == 0; size *= 2) {
            chunk.end = std::min(chunk.begin + size, from.end);
            chunk.read();
            cut = chunk.end == from.end ? chunk.bytes.size()
                  : from.field.empty()  ? last_cut(chunk.bytes)
                                        : chunk.bytes.rfind('\n') + 1;
            chunk.bytes.resize(cut), at = chunk.end = chunk.begin + cut;
        }
        return chunk;
    }
};

// Some text of a document, or all of it.
struct Text {
    std::string_view text;
    bool begins;  // is it the beginning of the document?
    size_t end;   // where it ends in the file
};

// The text in a line of JSON. Errors do not say which line it is.
inline std::string text_of_line(std::string_view line, const std::string& field) {
    const Json object = Json::parse(line, "");
    if (object.kind != Json::Kind::object)
        fail(": expected an object with a \"", field, "\", found ", shown(line));
    std::string others;
    for (const auto& [name, value] : object.members)
        if (value.kind == Json::Kind::string && others.size() < 200) join(others, ", ", name);
    if (!object.find(field) && !others.empty())
        fail(": \"", field, "\" is missing; say with --field which to read: ", others);
    return object.get_string(field, "");
}

// How many lines of a source end before `at`.
inline int64_t lines_before(const Source& source, size_t at) {
    const std::vector<Source> before = {{source.path, source.field, 0, at}};
    int64_t lines = 0;
    for (ChunkReader reader{before}; const auto chunk = reader.next();)
        lines += std::count(chunk->bytes.begin(), chunk->bytes.end(), '\n');
    return lines;
}

// Calls visit(Text) for all text in a chunk, in order. Blank lines are no documents.
void for_each_text(const Chunk& chunk, auto&& visit) {
    const Source& source = *chunk.source;
    const std::string_view bytes = chunk.bytes;
    if (source.field.empty()) return visit(Text{bytes, chunk.begin == source.begin, chunk.end});
    for (size_t at = 0, end; at < bytes.size(); at = end) {
        end = std::min(bytes.find('\n', at), bytes.size() - 1) + 1;
        std::string_view line = bytes.substr(at, end - at);
        line = line.substr(0, line.find_last_not_of(" \t\r\n") + 1);
        if (line.empty()) continue;
        std::string text;
        try {
            if (!source.plain_lines) line = text = text_of_line(line, source.field);
        } catch (const Error& error) {
            fail(source.path, ", line ", 1 + lines_before(source, chunk.begin + at), error.what());
        }
        visit(Text{line, true, chunk.begin + end});
    }
}

inline size_t thread_count() { return size_t(omp_get_max_threads()); }

constexpr const char* kInterrupted = "interrupted; nothing was changed";

// How far a pass is: on a terminal a line that changes, elsewhere one every half minute.
struct PassProgress {
    const char* doing;
    double total = 0, done = 0, start = now_seconds(), shown = start;  // bytes, seconds
    const bool live = ::isatty(STDOUT_FILENO);

    ~PassProgress() {
        if (live) std::fputs("\r\033[K", stdout);
    }
    void advance(size_t bytes) {
        if (stop_asked) throw Error(130, kInterrupted);
        done += double(bytes);
        const double now = now_seconds(), speed = done / (now - start);
        if (now - shown < (live ? 0.5 : 30)) return;
        shown = now;
        std::printf("%s  %s: %.0f of %.0f MB, %.0f MB/s, %.1f minutes left%s",
                    live ? "\r\033[K" : "", doing, done / 1e6, total / 1e6, speed / 1e6,
                    (total - done) / speed / 60, live ? "" : "\n");
        std::fflush(stdout);
    }
};

// One pass. Calls visit(result, text, thread) for all text, on all cores, with a Result for each
// chunk, and then(result, chunk) in the order of the chunks, once all of a group have been visited.
template <class Result>
void pass_over(const char* doing, const std::vector<Source>& sources, auto&& visit, auto&& then,
               size_t chunk_bytes = 1 << 18) {
    constexpr size_t kGroup = 128;  // 32 MB
    PassProgress progress{doing};
    for (const Source& source : sources) progress.total += double(source.end - source.begin);
    ChunkReader reader{sources, chunk_bytes};
    for (std::optional<Chunk> next = reader.next(); next;) {
        std::vector<Chunk> chunks;
        for (; next && chunks.size() < kGroup; next = reader.next())
            chunks.push_back(std::move(*next));
        std::vector<Result> results(chunks.size());
        for_each_index(chunks.size(), [&](size_t i) {
            const size_t thread = size_t(omp_get_thread_num());
            for_each_text(chunks[i], [&](const Text& text) { visit(results[i], text, thread); });
        });
        for (size_t i = 0; i < chunks.size(); ++i) {
            then(results[i], chunks[i]);
            progress.advance(chunks[i].bytes.size());
        }
    }
}

// =================================================================================================
// The input
// =================================================================================================

// The files of the input, and what there is to say of some: "passed over (gzip)" -> their paths.
struct Input {
    std::vector<Source> sources;
    int64_t empty = 0;  // files without a byte of text
    std::map<std::string, std::vector<std::string>> notes;
};

// Does it hold a JSON object in every line? Yes, if the first one has the field, or the first two
// lines are objects.
inline bool holds_json_lines(Source source, const std::string& field) {
    source.field = field;  // so that chunks are lines
    const std::vector<Source> sources = {source};
    int objects = 0;
    try {
        ChunkReader reader{sources, 1 << 12};
        while (const auto chunk = reader.next())
            for (const std::string& line : split_at(chunk->bytes, '\n')) {
                if (line.find_first_not_of(" \t\r") == line.npos) continue;
                if (line[0] != '{') return false;
                const Json object = Json::parse(line, ""), *value = object.find(field);
                if ((value && value->kind == Json::Kind::string) || ++objects == 2) return true;
            }
    } catch (const Error&) {}
    return false;
}

// Adds a file where it is text. What is none is an error where the file was named, and passed over
// where it was found in a folder.
inline void add_file(Input& input, const std::string& path, const std::string& field, bool named) {
    const InputFile file(path);
    std::string begin(std::min<size_t>(file.bytes, 1 << 16), '\0');
    file.read_bytes(begin.data(), begin.size(), 0);
    if (const FileKind* kind = no_text(begin, field)) {
        if (!named) return input.notes[to_text("passed over (", kind->name, ")")].push_back(path);
        std::string remedy = kind->remedy;
        for (size_t at = 0; (at = remedy.find("FILE", at)) != remedy.npos; at += path.size())
            remedy.replace(at, 4, path);
        fail(path, " is no text but ", kind->name, ": ", remedy);
    }
    const bool mark = begin.starts_with("\xef\xbb\xbf");
    if (mark) input.notes["left out the byte-order mark of"].push_back(path);
    Source source{path, "", mark ? 3u : 0u, file.bytes};
    if (source.begin == source.end) return void(++input.empty);
    if (path.ends_with(".jsonl") || holds_json_lines(source, field)) source.field = field;
    input.sources.push_back(source);
}

// Appends the files of a folder, and of those in it. Hidden ones are left out, links to folders and
// links to nothing too.
inline void list_files(const std::filesystem::path& folder, std::vector<std::string>& files,
                       Input& input) {
    for (const std::string& name : list_folder(folder.string())) {
        const std::string path = (folder / name).string();
        if (name.starts_with(".")) continue;
        if (std::filesystem::is_symlink(path) && !file_exists(path))
            input
                .notes[to_text("passed over (a link to ",
                               folder_exists(path) ? "a folder)" : "nothing)")]
                .push_back(path);
        else if (folder_exists(path))
            list_files(path, files, input);
        else if (S_ISREG(mode_of(path)))
            files.push_back(path);
    }
}

// Copies standard input ("-") or a pipe to a file, as it is read more than once.
inline void copy_stream(const std::string& name, const std::string& path) {
    const FileHandle from(name == "-" ? ::dup(STDIN_FILENO) : ::open(name.c_str(), O_RDONLY));
    if (from.fd < 0) fail_errno("cannot read ", name);
    FileWriter to(path);
    std::vector<char> buffer(1 << 20);
    for (ssize_t got = 1; got != 0;) {
        got = ::read(from.fd, buffer.data(), buffer.size());
        if (stop_asked) throw Error(130, kInterrupted);
        if (got < 0 && errno != EINTR) fail_errno("cannot read ", name);
        to.write(buffer.data(), size_t(std::max<ssize_t>(got, 0)));
    }
    to.commit();
}

inline bool is_shard_name(const std::string& name) {
    const std::string number = "[0-9][0-9][0-9][0-9][0-9][0-9].bin";
    return ::fnmatch(("train_" + number).c_str(), name.c_str(), 0) == 0 ||
           ::fnmatch(("val_" + number).c_str(), name.c_str(), 0) == 0;
}

// Fails where this run would read what it, or one before it, writes.
inline void check_apart(const std::string& input, const std::string& output) {
    const auto in = std::filesystem::weakly_canonical(input);
    const auto out = std::filesystem::weakly_canonical(output);
    const bool inside = !out.lexically_relative(in).string().starts_with("..");
    if (folder_exists(input) && inside)
        fail_usage("--output ", output, " lies in the input folder ", input,
                   ": the next run would read it as text; choose an --output elsewhere");
    const std::string name = in.filename();
    const bool written = is_shard_name(name) || name == "dataset.json" || name == "vocab.json" ||
                         name == "merges.txt" || name == "tokenizer.json";
    if (in.parent_path() == out && written)
        fail_usage("--input ", input,
                   " is a file that this would replace; choose another --output");
}

// All files of the input. What cannot be read twice is copied into the folder `copies`.
inline Input find_input(const PrepareOptions& o, const std::string& copies) {
    Input input;
    for (const std::string& name : o.input) {
        const mode_t mode = mode_of(name);
        const bool stream = name == "-" || (mode && !S_ISREG(mode) && !S_ISDIR(mode));
        const std::string copy = to_text(copies, "/.input-", input.sources.size());
        if (stream)
            copy_stream(name, copy);
        else
            check_apart(name, o.output);
        std::vector<std::string> files;
        const bool folder = !stream && folder_exists(name);
        if (folder) list_files(name, files, input);
        if (!folder) add_file(input, stream ? copy : name, o.field, true);
        std::sort(files.begin(), files.end());
        for (const std::string& path : files) add_file(input, path, o.field, false);
    }
    const bool lines = std::any_of(input.sources.begin(), input.sources.end(),
                                   [](const Source& source) { return !source.field.empty(); });
    if (o.has("field") && !lines)
        fail_usage("--field ", o.field, " is for lines of JSON, and the input has none");
    return input;
}

// --- How much there is, and how it is divided

// Where the character after the one at text[at] begins: behind the bytes that continue it.
inline size_t next_character(std::string_view text, size_t at) {
    do ++at;
    while (at < text.size() && (text[at] & 0xc0) == 0x80);
    return at;
}
struct Tally {
    int64_t documents = 0, empty = 0, characters = 0, bytes = 0, tokens = 0;

    void add(const Text& text) {
        if (text.begins) ++(text.text.empty() ? empty : documents);
        characters += int64_t(WordWrap::characters(text.text)), bytes += int64_t(text.text.size());
    }
    void add(const Tally& b) {
        documents += b.documents, empty += b.empty, characters += b.characters;
        bytes += b.bytes, tokens += b.tokens;
    }
};

struct Split {
    std::vector<Source> train, val;
    Tally all = {};
};

// The last `val_fraction` is for validation, rounded up. One text is cut by characters, several by
// documents. (nanoGPT cuts Shakespeare at the same character.) `copies`: a folder for a copy.
inline Split divide(const std::vector<Source>& sources, double val_fraction,
                    const std::string& copies) {
    Split split{sources, {}};
    std::vector<std::pair<Chunk, Tally>> chunks;  // without their bytes
    const auto count_text = [](Tally& tally, const Text& text, size_t) { tally.add(text); };
    pass_over<Tally>("counting", sources, count_text, [&](const Tally& tally, const Chunk& chunk) {
        chunks.push_back({{chunk.source, chunk.begin, chunk.end, ""}, tally});
        split.all.add(tally);
    });
    const bool single = split.all.documents == 1;
    const auto counted = [&](const Tally& t) { return single ? t.characters : t.documents; };
    // Careful: 1 - 0.1 and the like are not exact; without the last term 10 could become 9.
    const int64_t count = counted(split.all);
    int64_t kept = int64_t(std::floor(double(count) * (1 - val_fraction) + 1e-9));
    if (kept <= 0 && count > 0)
        fail("--val-fraction ", val_fraction, " leaves nothing to train on: the input has only ",
             count, single ? " characters" : " documents");
    if (kept == count) return split;
    // The chunk in which the last part begins.
    size_t c = 0;
    for (; counted(chunks[c].second) < kept; ++c) kept -= counted(chunks[c].second);
    Chunk& chunk = chunks[c].first;
    chunk.read();
    const Source& source = *chunk.source;
    size_t cut = source.end;                // where it begins
    if (single && !source.field.empty()) {  // text can be cut, a line of JSON cannot
        const std::string copy = copies + "/.document";
        for_each_text(chunk, [&](const Text& text) {
            if (!text.text.empty()) write_file(copy, text.text);
        });
        const Tally all = split.all;
        split = divide({{copy, "", 0, size_t(all.bytes)}}, val_fraction, copies);
        split.all = all;
        return split;
    }
    if (single)
        for (cut = chunk.begin; kept > 0; --kept)
            cut = chunk.begin + next_character(chunk.bytes, cut - chunk.begin);
    else if (!source.field.empty())
        for_each_text(chunk, [&](const Text& text) {
            if (!text.text.empty() && kept-- > 0) cut = text.end;
        });
    const size_t s = size_t(&source - sources.data());
    split.train.resize(s + 1), split.train[s].end = cut;
    split.val.assign(sources.begin() + ptrdiff_t(s), sources.end());
    split.val[0].begin = cut;
    return split;
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

// next_piece (§13), faster: eight letters at a time where the piece is a word of up to 15 letters
// of ASCII, perhaps with a blank before it.
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
// token, replace it everywhere, and repeat. Pairs within a piece only (§13), so no token spans two
// words. For "aaabdaaabac": aa is the most frequent pair (4), XabdXabac; then ab (2; Xa is as
// frequent, but its tokens are later ones), XYdXYac; then XY (2), ZdZac.

class PieceCounts {
    struct Hash {  // with is_transparent, a piece is found without making a std::string of it
        using is_transparent = void;
        size_t operator()(std::string_view piece) const {
            return std::hash<std::string_view>()(piece);
        }
    };
    std::unordered_map<std::string, int64_t, Hash, std::equal_to<>> counts_;

public:
    size_t bytes = 0;  // of the pieces, each counted once

    void add_piece(std::string_view piece, int64_t count) {
        const auto found = counts_.find(piece);
        if (found != counts_.end()) return void(found->second += count);
        counts_.emplace(piece, count);
        bytes += piece.size();
    }
    void add(std::string_view text) {
        for (size_t at = 0; at < text.size();) {
            const std::string_view piece = fast_piece(text, at);
            add_piece(piece, 1);
            at += piece.size();
        }
    }
    // Takes the counts of `other`, which has none then.
    void take(PieceCounts& other) {
        for (const auto& [piece, count] : other.counts_) add_piece(piece, count);
        other = {};
    }
    // In byte order. The pieces are those of this object.
    std::vector<std::pair<std::string_view, int64_t>> sorted() const {
        std::vector<std::pair<std::string_view, int64_t>> all(counts_.begin(), counts_.end());
        std::sort(all.begin(), all.end());
        return all;
    }
    // Keeps the most frequent pieces, at most `most` bytes of them. Of those that are as frequent
    // a hash chooses, so that they are a fair sample.
    void forget_rare(size_t most) {
        std::vector<std::tuple<int64_t, uint64_t, std::string_view>> order;
        for (const auto& [piece, count] : counts_) {
            uint64_t hash = 0;
            for (char c : piece) hash = mix_bits(hash + uint8_t(c) + 1);
            order.emplace_back(-count, hash, piece);
        }
        std::sort(order.begin(), order.end());
        size_t kept = 0;
        for (const auto& [count, hash, piece] : order) {
            kept += piece.size();
            if (kept <= most) continue;
            bytes -= piece.size();
            counts_.erase(counts_.find(piece));
        }
    }
};

// The pieces from which a vocabulary is learnt. Learning takes some thirty times their bytes of
// memory: where there are more than `most`, only the frequent ones are kept. Careful: whether there
// are must not depend on the threads, so it is decided only between groups of chunks.
inline PieceCounts count_pieces(const std::vector<Source>& sources, size_t most = 32'000'000) {
    std::vector<PieceCounts> counts(thread_count());
    const auto gather = [&] {
        for (size_t t = 1; t < counts.size(); ++t) counts[0].take(counts[t]);
        if (counts[0].bytes > most) counts[0].forget_rare(most / 2);
    };
    const auto count = [&](int&, const Text& text, size_t thread) {
        counts[thread].add(text.text);
    };
    pass_over<int>("learning a vocabulary", sources, count, [&](int, const Chunk&) {
        size_t bytes = 0;
        for (const PieceCounts& of_thread : counts) bytes += of_thread.bytes;
        if (bytes > most) gather();
    });
    gather();
    return std::move(counts[0]);
}

// Learns merges, one at a time. The distinct pieces lie one after the other in one array of
// symbols, each a link in a list; every pair knows its count and where it occurs. So a merge costs
// what it changes, not a pass over the text.
class BpeTrainer {
public:
    explicit BpeTrainer(const std::vector<std::pair<std::string_view, int64_t>>& pieces) {
        for (auto [piece, count] : pieces) {
            counts_.push_back(count);
            for (size_t i = 0; i < piece.size(); ++i) {
                const uint32_t at = uint32_t(symbols_.size());
                const uint32_t previous = i == 0 ? kNone : at - 1;
                const uint32_t next = i + 1 == piece.size() ? kNone : at + 1;
                symbols_.push_back({kBytes.id_of_byte[uint8_t(piece[i])], previous, next,
                                    uint32_t(counts_.size() - 1)});
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
        uint32_t piece;                  // it occurs counts_[piece] times
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
        pair.count += sign * counts_[left.piece];
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
    std::vector<int64_t> counts_;               // of every piece
    std::unordered_map<uint32_t, Pair> pairs_;  // key: left token << 16 | right token
    std::priority_queue<std::pair<int64_t, uint32_t>> queue_;  // count, inverted key
    std::vector<uint32_t> fresh_;                              // keys of pairs not yet queued
};

// A vocabulary of `size` tokens, or as many as the pieces support.
inline Tokenizer train_bpe(const PieceCounts& pieces, int64_t size) {
    return Tokenizer(BpeTrainer(pieces.sorted()).train(size_t(size - 257)));
}

// =================================================================================================
// Encoding, fast
// =================================================================================================
// The tokens are those of Tokenizer::encode (§13); a test compares them. This is faster because it
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

// Calls then(tokens) with the tokens of all text, in its order, an end of text before each
// document. The same for any number of threads. Returns what there was.
template <class Then>
Tally encode_sources(const Tokenizer& tokenizer, const std::vector<Source>& sources,
                     const Then& then) {
    struct Encoded {
        std::vector<uint16_t> tokens = {};
        Tally tally = {};
    };
    std::vector<std::unique_ptr<Encoder>> encoders(thread_count());
    const auto encode = [&](Encoded& out, const Text& text, size_t thread) {
        if (!encoders[thread]) encoders[thread] = std::make_unique<Encoder>(tokenizer);
        out.tally.add(text);
        if (text.begins && !text.text.empty())
            out.tokens.push_back(uint16_t(tokenizer.end_of_text()));
        encoders[thread]->encode(text.text, out.tokens);
    };
    Tally all;
    pass_over<Encoded>("making tokens", sources, encode, [&](Encoded& encoded, const Chunk&) {
        then(encoded.tokens);
        all.add(encoded.tally), all.tokens += int64_t(encoded.tokens.size());
    });
    return all;
}

// =================================================================================================
// The data folder
// =================================================================================================

// Writes tokens to shards (§2) of at most `most` tokens: train_000001.bin and so on.
class ShardWriter {
    std::string prefix_;
    size_t number_, most_, tokens_ = 0;  // in the shard that is open
    std::optional<FileWriter> file_;

public:
    // `prefix`: the path up to the number. `number`: the first.
    ShardWriter(const std::string& prefix, size_t number, int64_t most)
        : prefix_(prefix), number_(number), most_(size_t(most)) {}

    void add(std::span<const uint16_t> tokens) {
        while (!tokens.empty()) {
            if (!file_) {
                file_.emplace(prefix_ + format("%06zu.bin", number_++));
                write_header(0);
            }
            const size_t count = std::min(tokens.size(), most_ - tokens_);
            file_->write(tokens.data(), 2 * count);
            tokens_ += count, tokens = tokens.subspan(count);
            if (tokens_ == most_) finish();
        }
    }
    // Writes the header again, now that the number of tokens is known.
    void finish() {
        if (!file_) return;
        file_->rewind();
        write_header(int32_t(tokens_));
        file_->commit();
        file_.reset(), tokens_ = 0;
    }

private:
    void write_header(int32_t count) {
        const int32_t header[kShardHeaderBytes / 4] = {kShardMagic, 1, count};
        file_->write(header, sizeof header);
    }
};

constexpr const char* kIncoming = ".incoming";  // the new files wait here until all are written

// Refuses a folder with shards which this program did not write.
inline void check_output_folder(const std::string& folder) {
    if (!folder_exists(folder) || file_exists(folder + "/dataset.json") ||
        folder_exists(folder + "/" + kIncoming))
        return;
    for (const std::string& name : list_folder(folder))
        if (is_shard_name(name))
            fail(folder, " has shards (", name, ") but no dataset.json, so they are not ",
                 "prepare_data's to replace; choose another --output");
}

// The folder within the output folder where the new files wait until all are written. What is left
// in it at the end of the scope is removed: whatever fails leaves the old data as it was.
struct Incoming {
    std::string folder, path;
    FolderToFill made;
    FileHandle lock;

    explicit Incoming(const std::string& output)
        : folder(output), path(output + "/" + kIncoming), made(path),
          lock(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
        if (::flock(lock.fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            fail("another prepare_data is writing to ", output, ": wait for it to end");
        clear();  // what a killed run has left
    }
    ~Incoming() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    void clear() const {
        for (const std::string& name : list_folder(path)) remove_file(path + "/" + name);
    }
    // Shards of an earlier run are removed and the new files take their names, dataset.json last.
    // Names with a dot in front are not the dataset's.
    void publish() const {
        for (const std::string& name : list_folder(folder))
            if (is_shard_name(name) && !file_exists(path + "/" + name))
                remove_file(folder + "/" + name);
        for (const std::string& name : list_folder(path))
            if (name != "dataset.json" && !name.starts_with("."))
                rename_path(path + "/" + name, folder + "/" + name);
        rename_path(path + "/dataset.json", folder + "/dataset.json");
    }
};

// Adds to the description how large one split is, and prints it.
inline void describe_split(Json& json, const std::string& split, const Tally& tally) {
    json.set(split + "_documents", tally.documents)
        .set(split + "_characters", tally.characters)
        .set(split + "_bytes", tally.bytes)
        .set(split + "_tokens", tally.tokens);
    say("  " + split,
        to_text(counted(tally.documents, "document"), ", ", counted(tally.characters, "character"),
                ", ", counted(tally.bytes, "byte"), ", ", counted(tally.tokens, "token")));
}

// The tokenizer of the options. One that is learnt learns from the training part only.
inline Tokenizer make_tokenizer(const PrepareOptions& o, const std::vector<Source>& train) {
    if (o.tokenizer == "byte") return Tokenizer::bytes();
    if (o.tokenizer == "gpt2") return Tokenizer::load(o.vocab);
    return train_bpe(count_pieces(train), o.vocab_size);
}

// Text to a data folder. `source` says where it came from; `add` may add to the description.
// Returns the number of tokens to train on.
inline int64_t prepare(const PrepareOptions& o, const Incoming& incoming, const Split& split,
                       const std::string& source, const std::function<void(Json&)>& add = nullptr) {
    const double start = now_seconds();
    const Tokenizer tokenizer = make_tokenizer(o, split.train);
    const double learnt = now_seconds();
    const auto encode = [&](const std::vector<Source>& sources, ShardWriter shards) {
        auto write = [&](const std::vector<uint16_t>& tokens) { shards.add(tokens); };
        const Tally tally = encode_sources(tokenizer, sources, write);
        shards.finish();
        return tally;
    };
    const Tally train = encode(split.train, {incoming.path + "/train_", 1, o.shard_tokens});
    const Tally val = encode(split.val, {incoming.path + "/val_", 0, INT32_MAX});
    const double encoded = now_seconds();
    const int vocab_size = tokenizer.vocab_size();
    Json description = Json::object();
    description.set("source", source).set("tokenizer", o.tokenizer).set("vocab_size", vocab_size);
    describe_split(description, "train", train);
    describe_split(description, "val", val);
    if (add) add(description);
    tokenizer.save(incoming.path);
    write_file(incoming.path + "/dataset.json", description.write(2) + "\n");
    incoming.publish();
    const double bytes = double(train.bytes + val.bytes);
    std::string notes;
    if (o.tokenizer == "bpe" && !o.input.empty() && vocab_size < o.vocab_size)
        notes += to_text("  no pair is left that occurs twice: the vocabulary has ", vocab_size,
                         " tokens, not ", o.vocab_size, "\n");
    if (split.all.empty)
        notes += to_text("  left out: ", counted(split.all.empty, "empty document"), "\n");
    notes += to_text("  ", vocab_size, " tokens in the vocabulary (", o.tokenizer, ", ",
                     format("%.1f s), %.2f bytes a token", learnt - start,
                            bytes / double(train.tokens + val.tokens)));
    if (bytes >= 1e6)  // less says nothing about speed
        notes += format(", tokenized at %.0f MB/s", bytes / 1e6 / (encoded - learnt));
    std::puts(wrapped(notes).c_str());
    return train.tokens;
}

inline int64_t prepare_text(const PrepareOptions& o) {
    const Incoming incoming(o.output);
    std::string names;
    for (const std::string& input : o.input)
        join(names, ", ", input == "-" ? "standard input" : input);
    const Input input = find_input(o, incoming.path);
    std::printf("%s -> %s\n", names.c_str(), o.output.c_str());
    for (const auto& [note, paths] : input.notes) {
        std::string some;
        for (size_t i = 0; i < paths.size() && some.size() < 200; ++i) join(some, ", ", paths[i]);
        std::printf("  %s %s, such as %s\n", note.c_str(),
                    counted(int64_t(paths.size()), "file").c_str(), some.c_str());
    }
    Split split = divide(input.sources, o.val_fraction, incoming.path);
    if (split.all.documents == 0)
        fail("there is no text in the input (", names.substr(0, 200), "): nothing to prepare");
    split.all.empty += input.empty;
    return prepare(o, incoming, split, names);
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

// A part of an alternative: letters, and then what stood between braces: {slot=list.form!unlike},
// or {rule}.
struct Item {
    std::string letters;
    std::string name;  // of a rule, or of the slot that remembers a word; empty: only letters
    std::string list, form, unlike;  // list: drawn from; empty: the slot's word is recalled
};
using Items = std::vector<Item>;

// A list of words, each in several forms, or a rule of alternatives.
struct Rule {
    std::vector<std::string> form_names;          // "", "a", then the columns named in brackets
    std::vector<std::vector<std::string>> words;  // of a list: [word][form]
    std::vector<Items> alternatives;              // of a rule
};
using Grammar = std::unordered_map<std::string, Rule>;

// The alternatives of the rule of that name; null where it is that of a list or a slot.
inline const std::vector<Items>* alternatives_of(const Grammar& grammar, const std::string& name) {
    const auto found = grammar.find(name);
    const bool is_rule = found != grammar.end() && !found->second.alternatives.empty();
    return is_rule ? &found->second.alternatives : nullptr;
}

// For every slot the word it holds: its list, and its number there.
struct Word {
    const Rule* list;
    int number;
};
using Memory = std::unordered_map<std::string, Word>;

// The parts of `text` between separators. Runs of blanks become one blank; none is left around a
// part.
inline std::vector<std::string> split(std::string_view text, char separator) {
    std::vector<std::string> parts = split_at(text, separator);
    for (std::string& part : parts) {
        std::istringstream words(std::exchange(part, ""));
        for (std::string word; words >> word;) join(part, " ", word);
    }
    return parts;
}

// Cuts `text` off before `mark`; returns what came after it, or nothing if there is none.
inline std::string cut(std::string& text, char mark) {
    size_t at = std::min(text.find(mark), text.size());
    std::string after = text.substr(std::min(at + 1, text.size()));
    text.resize(at);
    return after;
}

inline Items parse_items(std::string text) {
    Items items;
    while (!text.empty()) {
        std::string tag = cut(text, '{'), rest = cut(tag, '}');
        Item item{text, "", "", "", ""};
        item.unlike = cut(tag, '!'), item.form = cut(tag, '.'), item.list = cut(tag, '=');
        if (tag.starts_with("new ")) item.list = tag = tag.substr(4);
        if (tag.starts_with("any ")) item.list = tag.substr(4);  // nobody recalls "any colour"
        item.name = tag;
        items.push_back(item), text = rest;
    }
    return items;
}

// The forms of a word, which are separated by '/'; the second, with its article, is made.
inline std::vector<std::string> parse_word(const std::string& text) {
    std::vector<std::string> forms = split(text, '/');
    forms.insert(forms.begin() + 1, (std::strchr("aeiou", text[0]) ? "an " : "a ") + forms[0]);
    return forms;
}

// The heads and the bodies of the text's rules, "name [he him his]" and what follows the colon.
inline std::vector<std::pair<std::string, std::string>> rule_texts(std::string_view text) {
    std::vector<std::pair<std::string, std::string>> rules;
    for (std::string line : split_at(text, '\n')) {
        const bool starts_rule = !line.empty() && line[0] != ' ';
        if (starts_rule) {
            const std::string body = cut(line, ':');
            rules.emplace_back(line, body + "\n");
        } else if (!rules.empty()) {
            rules.back().second += line + "\n";
        }
    }
    return rules;
}

inline Grammar parse_grammar(std::string_view text) {
    Grammar grammar;
    for (auto [head, body] : rule_texts(text)) {
        std::string columns = cut(head, '[');
        cut(columns, ']');
        Rule& rule = grammar[split(head, ' ')[0]] = {{"", "a"}, {}, {}};
        for (const std::string& column : split(columns, ' '))
            if (!column.empty()) rule.form_names.push_back(column);
        const bool is_list = body.find('{') == std::string::npos;
        for (const std::string& part : split(body, '|')) {
            if (!is_list) {
                rule.alternatives.push_back(parse_items(part));
                continue;
            }
            rule.words.push_back(parse_word(part));
            if (rule.words.back().size() != rule.form_names.size())
                fail("story grammar: '", part, "' has ", rule.words.back().size(),
                     " forms, its list has ", rule.form_names.size());
        }
    }
    return grammar;
}

inline const Grammar& the_grammar() {
    static const Grammar grammar = parse_grammar(grammar_text);
    return grammar;
}

// The word in that form; "Him" is "him" with a capital letter.
inline std::string spell(const Word& word, std::string form) {
    const bool capital = std::isupper(uint8_t(form[0])) != 0;
    if (capital) form[0] = char(std::tolower(form[0]));
    const std::vector<std::string>& names = word.list->form_names;
    const size_t which = size_t(std::find(names.begin(), names.end(), form) - names.begin());
    if (which == names.size()) fail("story grammar: a list has no form '", form, "'");
    std::string text = word.list->words[size_t(word.number)][which];
    if (capital) text[0] = char(std::toupper(text[0]));
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
    int roll(size_t n) {
        neg_log_prob += std::log(double(n));
        return int(random_uniform(key, rolls++) * double(n));
    }

    // A word of the list, any but the one in the slot it must differ from.
    Word draw(const Item& item) {
        const Rule& list = grammar.at(item.list);
        if (item.unlike.empty()) return {&list, roll(list.words.size())};
        const int number = roll(list.words.size() - 1);
        return {&list, number + (number >= memory.at(item.unlike).number)};
    }

    void tell(const Items& items) {
        for (const Item& item : items) {
            text += item.letters;
            if (const auto* alternatives = alternatives_of(grammar, item.name))
                tell((*alternatives)[size_t(roll(alternatives->size()))]);
            else if (!item.name.empty()) {
                if (!item.list.empty()) memory[item.name] = draw(item);
                text += spell(memory.at(item.name), item.form);
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
inline double entropy(const Grammar& grammar, const std::vector<Items>& alternatives) {
    double n = double(alternatives.size()), sum = 0;
    for (const Items& items : alternatives)
        for (const Item& item : items) {
            if (const auto* inner = alternatives_of(grammar, item.name))
                sum += entropy(grammar, *inner);
            else if (!item.list.empty())
                sum += std::log(double(grammar.at(item.list).words.size() - !item.unlike.empty()));
        }
    return std::log(n) + sum / n;
}

}  // namespace stories

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
        teller.tell(grammar.at("story").alternatives[0]);
        return teller;
    };
    for (int i = 0; i < train_stories; i++) corpus.train.push_back(tell(0, i).text);
    for (int i = 0; i < val_stories; i++) {
        const stories::Teller teller = tell(1, i);
        corpus.val.push_back(teller.text);
        corpus.val_neg_log_prob += teller.neg_log_prob;
    }
    corpus.entropy_per_story = stories::entropy(grammar, grammar.at("story").alternatives);
    return corpus;
}

constexpr int kStories = 22'000;  // of which a tenth is for validation

// Draws the stories and writes them as a dataset whose floor is known.
inline int64_t prepare_stories(const PrepareOptions& o) {
    const int val = int(std::ceil(kStories * o.val_fraction - 1e-9));
    if (val >= kStories) fail("--val-fraction ", o.val_fraction, " leaves no story to train on");
    const StoryCorpus stories = make_stories(uint64_t(o.seed), kStories - val, val);
    const Incoming incoming(o.output);
    const auto source = [&](const char* name, const std::vector<std::string>& texts) {
        std::string lines;
        for (const std::string& text : texts) lines += text + "\n";
        const std::string path = incoming.path + "/." + name;
        write_file(path, lines);
        return std::vector<Source>{{path, "text", 0, lines.size(), true}};
    };
    const Split split{source("train", stories.train), source("val", stories.val)};
    const std::string name = to_text("stories, seed ", o.seed);
    std::printf("%s -> %s\n", name.c_str(), o.output.c_str());
    // The floor is the loss of the true model: what the validation stories cost it, divided by the
    // tokens that are predicted (all but the first). The entropy is what a story costs on average.
    return prepare(o, incoming, split, name, [&](Json& json) {
        if (val == 0) return;
        const double tokens = json.find("val_tokens")->as<double>().value();
        const double floor = stories.val_neg_log_prob / (tokens - 1);
        json.set("floor", floor).set("entropy", stories.entropy_per_story / (tokens / val));
        say("  floor",
            format("no model can score below %.4f nats a token on the val stories", floor));
    });
}

// =================================================================================================
// Models of llm.c
// =================================================================================================
// A .bin file of llm.c has 256 x int32: 20240326, version 3 (fp32), positions, vocabulary, layers,
// heads, channels, padded vocabulary, zeros. Then every tensor, one kind for all layers together.
// Linear weights are [out, in], so they are transposed.

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
    if (header[0] != 20240326 || header[1] != 3)
        fail(path, " is no model of llm.c in fp32: expected it to begin with 20240326 and version ",
             "3, found ", header[0], " and ", header[1], " (5 is bf16: build with PRECISION=FP32)");
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
    // In the order of the file: sorted by kind, the name without its layer.
    std::vector<TensorInfo> infos = layout_of(model.config).tensors;
    const auto kind = [](const std::string& name) {
        return name.starts_with("h.") ? name.substr(name.find('.', 2)) : name;
    };
    std::map<std::string, size_t> order;
    for (const TensorInfo& info : infos) order.emplace(kind(info.name), order.size());
    std::ranges::stable_sort(infos, {}, [&](auto& info) { return order[kind(info.name)]; });
    std::vector<StoredTensor> tensors;
    const char* at = model.bytes.data() + kLlmcHeaderBytes;
    for (const TensorInfo& info : infos) {
        const bool transposed = info.name.starts_with("h.") && info.shape.size() == 2;
        const size_t rows = size_t(info.shape[0]), columns = info.count / rows;
        auto fill = [=, from = at](float* out, size_t first, size_t n) {
            for (size_t i = first; i < first + n; ++i) {
                const size_t stored = transposed ? (i % columns) * rows + i / columns : i;
                std::memcpy(out++, from + stored * sizeof *out, sizeof *out);
            }
        };
        tensors.push_back({name_in_checkpoint(info.name), "F32", info.shape, fill});
        // The rows that fill up the vocabulary are passed over.
        const size_t padded = size_t(model.padded_vocab) * size_t(model.config.n_embd);
        at += (info.name == "wte.weight" ? padded : info.count) * sizeof(float);
    }
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
    if (o.tokenizer == "gpt2") Tokenizer::load(o.vocab);  // where it fails: now, not hours later
    const int64_t tokens = o.input.empty() ? prepare_stories(o) : prepare_text(o);
    std::string next = "next: ./train_gpt";
    if (o.output != "data/stories") next += " --data " + shell_word(o.output);
    // A batch of eight rows of 128 tokens, which is the default, needs one token more.
    if (tokens <= 8 * 128)
        next +=
            to_text(" --seq-len ", std::bit_floor(uint64_t(std::max<int64_t>(8, tokens - 1)) / 8));
    std::puts(next.c_str());
}

}  // namespace tinygpt

// test_gpt.cpp includes this file for its functions and has a main of its own.
#ifndef PREPARE_DATA_NO_MAIN
int main(int argc, char** argv) {
    // Ctrl-C stops at the next chunk, a second one at once.
    for (int number : {SIGINT, SIGTERM})
        ::signal(number, [](int) {
            if (tinygpt::stop_asked.exchange(1) != 0) ::_exit(130);
        });
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
