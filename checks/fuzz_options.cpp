// The command line: arguments with zero bytes between them. What is accepted can be written out and
// read again; all else is bad usage, status 2.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::vector<std::string> args = parts_of(data, size, 12);
    while (!args.empty() && args.back().empty()) args.pop_back();
    try {
        Options options = parse_options(args);
        help_text(options, "fuzz"), describe(options);
        // Every value as it would be typed makes the same options again.
        std::vector<std::string> again;
        for (const CommandName& c : kCommands)
            if (c.bit == options.command) again.push_back(c.name);
        for (const Option& option : option_table(options))
            if (options.given.contains(option.name) && option.name != "config")
                again.push_back("--" + option.name + "=" + value_text(option));
        check(options_that_change_numbers(parse_options(again)) ==
                  options_that_change_numbers(options),
              "the same options again");
    } catch (const Error& error) {
        const std::string message = error.what();
        check(error.status == 2 && message.size() < 1500, "bad usage, said in a few lines");
    }
    return 0;
}
