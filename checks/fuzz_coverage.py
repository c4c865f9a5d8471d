"""How many lines of each parser the fuzz corpora reach: make fuzz_coverage, after make fuzz.

    fuzz_coverage.py PROGRAM PROFILE     fuzz.cpp built for coverage; merged by llvm-profdata
"""
import json
import re
import subprocess
import sys

PARSERS = {  # by the names of their functions and classes; a class stands for all its functions
    "json": "JsonParser Json json_string shown append_utf8 utf8_character",
    "safetensors": "SafetensorsFile InputFile f16 dtype_bytes shape_text match_tensors bare_name",
    "checkpoint: config.json": "read_hf_config hf_config",
    "checkpoint: trainer_state.json": "state_from_json state_to_json read_sealed state_seal",
    "checkpoint: HellaSwag": "read_hellaswag",
    "checkpoint: log.csv": "read_log log_line",
    "options": "parse_options find_command check_together CommandLine set_option shown "
               "edit_distance name_distance nearest command_names",
    "tokenizer": "make_tokenizer read_merge_lines Tokenizer merge_piece class_of class_at next_piece",
    "shard": "Shard Shards DataOrder shuffled read_batch evaluation_windows",
}


def export(form):
    command = ["llvm-cov", "export", "-format=" + form, sys.argv[1], "-instr-profile=" + sys.argv[2]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Of every line that is code, by file and number, whether it was run.
run, path = {}, ""
for line in export("lcov").splitlines():
    if line.startswith("SF:"):
        path = line[3:]
    elif line.startswith("DA:"):
        number, count = map(int, line[3:].split(",")[:2])
        run[path, number] = run.get((path, number), False) or count > 0
functions = json.loads(export("text"))["data"][0]["functions"]
worst = 1
for parser, names in PARSERS.items():
    lines = set()
    for name in names.split():
        # tinygpt::name, as the linker knows it; Z+ for what is inside, such as a lambda.
        mangled = re.compile("_Z+NK?7tinygpt%d%s" % (len(name), name))
        found = [f for f in functions if mangled.match(f["name"].split(":")[-1])]
        if not found:
            sys.exit("fuzz_coverage: there is no %s any more" % name)
        for f in found:
            first, _, last = f["regions"][0][:3]
            lines |= {(f["filenames"][0], n) for n in range(first, last + 1)} & run.keys()
    missed = sorted(line for line in lines if not run[line])
    worst = min(worst, 1 - len(missed) / len(lines))
    print("%-31s %4d of %4d lines (%5.1f %%)  missed: %s" % (
        parser, len(lines) - len(missed), len(lines), 100 - 100 * len(missed) / len(lines),
        " ".join(str(n) for _, n in missed) or "none"))
sys.exit(worst < 0.9)
