// translate.cpp: turns CUDA C++ into plain C++ for the headers of this folder.
//
//     g++ -std=c++20 -O2 cuda_on_cpu/translate.cpp -o build/translate
//     build/translate train_gpt.cu build/train_gpt_cu_on_cpu.cpp
//
// It is no compiler. It knows exactly what is listed here, rewrites it in place so that every line
// keeps its number, and stops with file:line at anything else that only nvcc understands.
//
//   k<<<grid, block, shared, stream>>>(...)         a call of cuda_on_cpu::launch
//   kernel<<<...>>>(...)                            the same; `kernel` is a pointer to one, and the
//                                                   const char* `name` beside it says to which
//   extern __shared__ T name[];                     a pointer to the block's dynamic shared memory
//   __shared__ T name[N];                           a reference to shared memory of the block
//   __global__ void __launch_bounds__(N) name(...)  a check of N where the body starts
//   // PTX wrappers begin ... // PTX wrappers end   replaced by #include "ptx_on_cpu.hpp"
//   // GPU only begin ... // GPU only end           left out
//   #include "other.cu"                             translated in its place
//   #pragma unroll                                  left out
//
// The output ends with the list of all __global__ functions, for cuda_on_cpu::kernels().
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

struct Kernel {
    std::string name, file;
    int line;
};

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

long count_lines(const std::string& s) { return std::count(s.begin(), s.end(), '\n'); }

// The end of the raw string literal whose R stands at `at`.
size_t end_of_raw_string(const std::string& s, size_t at) {
    size_t open = s.find('(', at);
    if (open == std::string::npos) return s.size();
    std::string closing = ")" + s.substr(at + 2, open - at - 2) + "\"";
    size_t close = s.find(closing, open);
    return close == std::string::npos ? s.size() : close + closing.size();
}

// The end of the comment or literal that starts at `at`; `at` itself if none does.
size_t end_of_quiet_part(const std::string& s, size_t at) {
    auto after = [&](const char* what, size_t from) {
        size_t found = s.find(what, from);
        return found == std::string::npos ? s.size() : found + std::string(what).size();
    };
    if (s.compare(at, 2, "//") == 0) return std::min(s.find('\n', at), s.size());
    if (s.compare(at, 2, "/*") == 0) return after("*/", at + 2);
    bool in_word = at > 0 && is_word(s[at - 1]);
    if (s.compare(at, 2, "R\"") == 0 && !in_word) return end_of_raw_string(s, at);
    if (s[at] == '"' || (s[at] == '\'' && !in_word)) {  // after a word: a digit separator
        size_t end = at + 1;
        while (end < s.size() && s[end] != s[at] && s[end] != '\n') end += s[end] == '\\' ? 2 : 1;
        return std::min(end + 1, s.size());
    }
    return at;
}

// The text with comments and literals blanked out, of the same length and with the same lines.
std::string blank_quiet_parts(std::string s) {
    for (size_t i = 0; i < s.size();) {
        size_t end = end_of_quiet_part(s, i);
        for (size_t j = i; j < end; j++) s[j] = s[j] == '\n' ? '\n' : ' ';
        i = std::max(end, i + 1);
    }
    return s;
}

struct Source {
    std::string file;  // as the compiler is to name it
    std::string text;  // what is rewritten
    std::string code;  // the same, with comments and literals blank: what is searched
    int shared_arrays = 0;

    [[noreturn]] void stop(size_t at, const std::string& message) const {
        std::cerr << file << ":" << line_of(at) << ": translate: " << message << "\n";
        std::exit(1);
    }
    long line_of(size_t at) const { return 1 + count_lines(text.substr(0, at)); }

    // Replaces [from, to). Line breaks that would be lost are kept behind the replacement.
    // Returns the position after it.
    size_t replace(size_t from, size_t to, std::string with) {
        long lost = count_lines(text.substr(from, to - from)) - count_lines(with);
        if (lost > 0) with.append(size_t(lost), '\n');
        text.replace(from, to - from, with);
        code.replace(from, to - from, blank_quiet_parts(with));
        return from + with.size();
    }
    // The next place of `word` as a whole word.
    size_t find_word(const std::string& word, size_t from) const {
        for (size_t at = code.find(word, from); at != std::string::npos;
             at = code.find(word, at + 1))
            if ((at == 0 || !is_word(code[at - 1])) && !is_word(code[at + word.size()])) return at;
        return std::string::npos;
    }
    size_t skip_space(size_t at) const {
        while (at < code.size() && std::isspace(static_cast<unsigned char>(code[at]))) at++;
        return at;
    }
    // The position after the bracket that closes the one at `at`.
    size_t after_bracket(size_t at) const {
        const char open = code[at], close = open == '('   ? ')'
                                            : open == '[' ? ']'
                                            : open == '{' ? '}'
                                                          : '>';
        int depth = 0;
        for (size_t i = at; i < code.size(); i++) {
            depth += (code[i] == open) - (code[i] == close);
            if (depth == 0) return i + 1;
        }
        stop(at, std::string("this '") + open + "' is never closed");
    }
};

// Cuts the lines between two marker comments out of the source and puts `with` there.
void replace_sections(Source& s, const std::string& name, const std::string& with) {
    const std::string begin_mark = "// " + name + " begin", end_mark = "// " + name + " end";
    for (size_t at = s.text.find(begin_mark); at != std::string::npos;
         at = s.text.find(begin_mark, at)) {
        size_t end = s.text.find(end_mark, at);
        if (end == std::string::npos) s.stop(at, "no line \"" + end_mark + "\" follows");
        end = std::min(s.text.find('\n', end), s.text.size());
        at = s.replace(at, end, with);
    }
}

// Hints on unrolling mean nothing here, and one compiler warns of them.
void drop_unroll_hints(Source& s) {
    for (size_t at = s.code.find("#pragma unroll"); at != std::string::npos;
         at = s.code.find("#pragma unroll", at))
        at = s.replace(at, std::min(s.text.find('\n', at), s.text.size()), "");
}

// What the translator and the headers beside it give no meaning to.
void refuse_the_unknown(const Source& s) {
    const char* words[][2] = {
        {"asm", "inline assembly belongs between // PTX wrappers begin and // PTX wrappers end"},
        {"__asm__",
         "inline assembly belongs between // PTX wrappers begin and // PTX wrappers end"},
        {"__managed__", "managed memory is not known here; use cudaMalloc and cudaMemcpy"},
        {"__cluster_dims__",
         "clusters are not known here; put them between // GPU only begin and end"},
        {"__grid_constant__", "not known here; put it between // GPU only begin and end"},
        {"cudaLaunchKernel", "launch with kernel<<<grid, block, shared, stream>>>(...)"},
        {"cudaLaunchKernelEx", "launch with kernel<<<grid, block, shared, stream>>>(...)"},
        {"cooperative_groups", "use __syncthreads, __syncwarp and the shuffles with a mask"},
    };
    for (auto& [word, advice] : words)
        if (size_t at = s.find_word(word, 0); at != std::string::npos)
            s.stop(at, std::string("'") + word + "': " + advice);
}

// Where the kernel's name starts that ends before `end`: name, space::name or name<arguments>.
size_t start_of_kernel_name(const Source& s, size_t end) {
    auto back_over_space = [&](size_t at) {
        while (at > 0 && std::isspace(static_cast<unsigned char>(s.code[at - 1]))) at--;
        return at;
    };
    size_t at = back_over_space(end);
    if (at > 0 && s.code[at - 1] == '>') {
        int depth = 0;
        do {
            at--;
            depth += (s.code[at] == '>') - (s.code[at] == '<');
        } while (at > 0 && depth > 0);
        at = back_over_space(at);
    }
    size_t name_end = at;
    while (at > 0 && (is_word(s.code[at - 1]) || s.code[at - 1] == ':')) at--;
    if (at == name_end)
        s.stop(end, "no kernel name before <<<; write name<<<...>>> or name<arguments><<<...>>>");
    return at;
}

// Splits the code in [from, to) at commas outside of brackets.
std::vector<std::string> split_at_commas(const Source& s, size_t from, size_t to) {
    std::vector<std::string> parts{""};
    int depth = 0;
    for (size_t i = from; i < to; i++) {
        char c = s.code[i];
        depth += (c == '(' || c == '[' || c == '{') - (c == ')' || c == ']' || c == '}');
        if (c == ',' && depth == 0)
            parts.push_back("");
        else
            parts.back() += s.text[i];
    }
    return parts;
}

// name<A><<<grid, block, ...>>>  becomes  a Launcher made with the name, where it stands, two small
// functions (one calls the kernel, one tells its address) and the numbers; its call operator takes
// the kernel's arguments, which already stand behind. Where the kernel is a pointer, `kernel`, its
// name is what the variable `name` says.
void translate_launches(Source& s) {
    for (size_t open = s.code.find("<<<"); open != std::string::npos;
         open = s.code.find("<<<", open)) {
        size_t close = s.code.find(">>>", open), stop_at = s.code.find(';', open);
        if (close == std::string::npos || close > stop_at) s.stop(open, "<<< without >>>");
        auto parts = split_at_commas(s, open + 3, close);
        if (parts.size() < 2 || parts.size() > 4)
            s.stop(open,
                   "cannot read the launch: expected <<<grid, block>>>, <<<grid, block, shared>>> "
                   "or "
                   "<<<grid, block, shared, stream>>>");
        if (s.code[s.skip_space(close + 3)] != '(')
            s.stop(close, "the kernel's arguments must follow >>>");
        size_t start = start_of_kernel_name(s, open);
        std::string kernel = s.text.substr(start, open - start);
        std::string quoted = blank_quiet_parts(kernel), numbers;
        std::replace(quoted.begin(), quoted.end(), '\n', ' ');
        while (!quoted.empty() && quoted.back() == ' ') quoted.pop_back();
        for (auto& part : parts) numbers += ", " + part;
        const std::string name = quoted == "kernel" ? "name" : "\"" + quoted + "\"";
        open = s.replace(start, close + 3,
                         "::cuda_on_cpu::launch(" + name +
                             ", __FILE__, __LINE__, "
                             "[=](auto... arguments) { " +
                             quoted +
                             "(arguments...); }, "
                             "[=]([[maybe_unused]] auto address) -> const void* { "
                             "if constexpr (requires { address(" +
                             quoted + "); }) return address(" + quoted +
                             "); "
                             "else return nullptr; }" +
                             numbers + ")");
    }
}

// The declared names of `T a[4], b, c[]`: the last word before each [ , = or the end.
std::vector<std::string> declared_names(const Source& s, size_t from, size_t to) {
    std::vector<std::string> names;
    std::string word;
    int depth = 0;
    bool named = false;
    for (size_t i = from; i <= to; i++) {
        char c = i == to ? ',' : s.code[i];
        if (depth == 0 && c == '=') s.stop(i, "shared memory cannot have an initial value");
        if (depth == 0 && (c == ',' || c == '[') && !named) {
            names.push_back(word);
            named = true;
        }
        if (depth == 0 && c == ',') named = false;
        depth += (c == '(' || c == '[' || c == '<' || c == '{') -
                 (c == ')' || c == ']' || c == '>' || c == '}');
        if (is_word(c) && depth == 0) {
            if (i == from || !is_word(s.code[i - 1])) word.clear();
            word += c;
        }
    }
    return names;
}

// A shared declaration becomes a local struct that holds the same declaration, so that its type
// need not be understood here, and a reference (or, for extern, a pointer) into the block's shared
// memory.
void translate_shared(Source& s) {
    for (size_t at = s.find_word("__shared__", 0); at != std::string::npos;
         at = s.find_word("__shared__", at)) {
        size_t start = at, end = s.code.find(';', at);
        size_t line_start = s.code.find_last_of(";{}", at);
        std::string before = s.code.substr(line_start + 1, at - line_start - 1);
        bool is_extern = before.find("extern") != std::string::npos;
        start = s.skip_space(line_start + 1);
        if (s.code[start] == '#')
            s.stop(at, "a shared declaration must stand in a function's body");
        for (const char* word : {"extern", "__shared__", "static"})
            if (size_t w = s.find_word(word, start); w < end)
                for (size_t i = 0; i < std::string(word).size(); i++)
                    s.text[w + i] = s.code[w + i] = ' ';
        auto names = declared_names(s, start, end);
        std::string tag = "Shared_" + std::to_string(++s.shared_arrays),
                    body = s.text.substr(start, end - start);
        size_t empty_bounds = body.rfind('[');
        if (is_extern && (names.size() != 1 || empty_bounds == std::string::npos))
            s.stop(at, "write one array of unknown size: extern __shared__ T name[];");
        if (is_extern) body.replace(empty_bounds, std::string::npos, "[1]");
        std::string out = "struct " + tag + " { " + body + "; };";
        for (auto& name : names)
            out += is_extern ? " auto* " + name + " = ::cuda_on_cpu::dynamic_shared<" + tag +
                                   ">()." + name + ";"
                             : " auto& " + name + " = ::cuda_on_cpu::static_shared<" + tag +
                                   ">(\"" + name + "\")." + name + ";";
        at = s.replace(start, end + 1, out);
    }
}

// Collects the kernels' names and turns __launch_bounds__(N) into a check that runs.
void collect_kernels(Source& s, std::vector<Kernel>& kernels) {
    for (size_t at = s.find_word("__global__", 0); at != std::string::npos;
         at = s.find_word("__global__", at + 1)) {
        std::string word, bounds;
        size_t i = at + std::string("__global__").size();
        for (;; i++) {
            if (i >= s.code.size() || s.code[i] == ';' || s.code[i] == '{')
                s.stop(at, "no function follows __global__");
            if (is_word(s.code[i])) {
                if (!is_word(s.code[i - 1])) word.clear();
                word += s.code[i];
            } else if (s.code[i] == '<') {
                i = s.after_bracket(i) - 1;
            } else if (s.code[i] == '(') {
                bool attribute =
                    word == "alignas" || word == "__attribute__" || word == "__launch_bounds__";
                if (!attribute) break;
                size_t end = s.after_bracket(i);
                if (word == "__launch_bounds__") bounds = split_at_commas(s, i + 1, end - 1)[0];
                i = end - 1;
            }
        }
        bool known = std::any_of(kernels.begin(), kernels.end(),
                                 [&](const Kernel& k) { return k.name == word; });
        if (!known) kernels.push_back({word, s.file, int(s.line_of(at))});
        size_t body = s.skip_space(s.after_bracket(i));
        if (s.code[body] == '{' && !bounds.empty())
            s.replace(body, body + 1, "{ ::cuda_on_cpu::check_launch_bounds(" + bounds + ");");
    }
}

std::string read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
        std::cerr << "translate: cannot read " << path << "\n";
        std::exit(1);
    }
    std::stringstream content;
    content << in.rdbuf();
    return content.str();
}

// The whole of one file, with the .cu files it includes.
std::string translate(const std::string& path, std::vector<Kernel>& kernels) {
    Source s{path, read_file(path), ""};
    s.code = blank_quiet_parts(s.text);
    replace_sections(s, "PTX wrappers", "#include \"ptx_on_cpu.hpp\"");
    replace_sections(s, "GPU only", "");
    refuse_the_unknown(s);
    drop_unroll_hints(s);
    translate_launches(s);
    translate_shared(s);
    collect_kernels(s, kernels);

    std::string out = "#line 1 \"" + path + "\"\n", line;
    std::istringstream lines(s.text);
    for (int number = 1; std::getline(lines, line); number++) {
        size_t quote = line.find('"'), end = line.rfind(".cu\"");
        bool include = line.rfind("#include", 0) == 0 && quote != std::string::npos &&
                       end != std::string::npos;
        if (include) {
            std::string folder =
                path.find('/') == std::string::npos ? "" : path.substr(0, path.rfind('/') + 1);
            out += translate(folder + line.substr(quote + 1, end + 2 - quote), kernels);
            out += "#line " + std::to_string(number + 1) + " \"" + path + "\"\n";
        } else {
            out += line + "\n";
        }
    }
    return out;
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: translate input.cu output.cpp\n";
        return 2;
    }
    std::vector<Kernel> kernels;
    std::string body = translate(argv[1], kernels);
    std::ofstream out(argv[2], std::ios::binary);
    out << "// Made by cuda_on_cpu/translate from " << argv[1] << ". Change that, not this.\n"
        << "#undef _FORTIFY_SOURCE  // its longjmp takes a switch between fibres for an error\n"
        << "#include \"cuda_runtime.h\"\n"
        << body;
    out << "#line 1 \"the list of kernels\"\n"
        << "[[maybe_unused]] static const bool cuda_on_cpu_kernels_listed = "
           "::cuda_on_cpu::list_kernels({";
    for (auto& k : kernels)
        out << "\n    {\"" << k.name << "\", \"" << k.file << "\", " << k.line << "},";
    out << "\n});\n";
    out.flush();
    if (!out) {
        std::cerr << "translate: cannot write " << argv[2] << "\n";
        return 1;
    }
    return 0;
}
