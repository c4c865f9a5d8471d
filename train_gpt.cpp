// train_gpt: trains a GPT-2. The program of both drivers: options, commands, report, bench, walk,
// show, export, and the ranks of MPI. What trains is tinygpt.hpp. train_gpt.cu includes this file
// and brings another device.
#include "tinygpt.hpp"

#include <random>  // random_device

#ifdef TINYGPT_MPI
#include <mpi.h>
#include <sched.h>

#include <deque>
#include <thread>
#endif

namespace tinygpt {

// =================================================================================================
// 1 Options: what the user can ask for, each said once
// =================================================================================================
// What you have now: all that trains, and an engine for options (§18).
//
// A new option is a member of Options (type and default) and a row of the table. What happens to
// --batch-size 4:
//
//   parse_options      sees no command before it, so this is train
//   CommandLine::read  finds the row "batch-size", which train takes; 4 is in [1, 1000000], so it
//                      sets options.batch_size
//   check_together     looks at it beside the others: batch and length must fit into an int

// One bit each, so that a set of commands is a sum of them.
enum Command : unsigned {
    kTrain = 1,
    kEval = 2,
    kSample = 4,
    kInfo = 8,
    kBench = 16,
    kWalk = 32,
    kShow = 64,
    kExport = 128
};

inline const std::vector<CommandName> kCommands = {
    {kTrain, "train", "train a model (what happens without a command)"},
    {kEval, "eval", "the loss of a checkpoint"},
    {kSample, "sample", "text from a checkpoint"},
    {kInfo, "info", "every tensor, and what memory and time the model takes"},
    {kBench, "bench", "how fast each layer is, against what this machine can do"},
    {kWalk, "walk", "one tiny batch through one training step, with all its numbers"},
    {kShow, "show", "a page: what a model sees in a text, or the curves of runs"},
    {kExport, "export", "a checkpoint as a GGUF file, which llama.cpp reads"},
};

// A default outside the option's own range (0 where the least is 1) or an empty text means "not
// set": the help says what happens then.
struct Options : RunOptions {
    Command command = kTrain;
    bool command_given = false;   // the command was written out
    std::set<std::string> given;  // names of the options that were: "batch-size"

    std::string data = "data/stories", train_shards, val_shards;
    int64_t log_interval = -1;  // -1: at evaluations, and once a minute

    std::string model = "tiny", init_from;
    Config sizes;  // 0: the preset's
    double dropout = 0;
    bool recompute_gelu = false;

    std::string config, resume, precision;
    bool override_changes = false, overwrite = false, tune_matmul = false, quiet = false;
    bool help = false, version = false;
    int threads = 0, seq_len = 0;

    std::string prompt_file;
    bool interactive = false;
    SampleOptions sampling;
    int num_samples = 1, show_top = 0;

    std::string hellaswag, type = "f32";
    std::vector<std::string> runs;

    Options() { rate.peak = -1; }  // not set: it follows the model
};

// kNumbers marks an option that changes the numbers which a training run computes. A resumed run
// must have the same value, so checkpoints remember it. kRun: those of a training run; kBuild: of
// commands that make a model of the sizes given; kBatch: of commands that run batches.
constexpr unsigned kAll = 255, kNumbers = 256, kRun = kTrain | kNumbers;
constexpr unsigned kBuild = kRun | kInfo | kBench, kBatch = kBuild | kEval;

// "tiny|gpt2|...": what --model may be.
inline std::string preset_names() {
    std::string names;
    for (const Preset& preset : kPresets) join(names, "|", preset.name);
    return names;
}

// The values that --n-layer and the other sizes may have.
inline Range size_range(int Config::*size) {
    int most = 0;
    for (const SizeLimit& limit : kSizes)
        if (limit.size == size) most = limit.most;
    return to_text("[1, ", most, "]").c_str();
}

// The table, in three parts. A row: name, variable, group, commands, range, help.
// Careful: an upper bound keeps a product of sizes inside 64 bits; those of eps and dropout keep
// them inside what a float can tell from 0 and 1.
inline std::vector<Option> model_options(Options& o) {
    return {
        {"data", &o.data, "data", kRun | kEval | kInfo, "DIR",
         "folder of token shards and their tokenizer, as ./prepare_data writes it"},
        {"train-shards", &o.train_shards, "data", kRun | kEval, "GLOB",
         "training shards, instead of --data; without a tokenizer: text is shown as token numbers"},
        {"val-shards", &o.val_shards, "data", kRun | kEval, "GLOB",
         "validation shards, instead of those of --data"},

        {"model", &o.model, "model", kBuild, preset_names().c_str(), "preset of model sizes"},
        {"n-layer", &o.sizes.n_layer, "model", kBuild, size_range(&Config::n_layer),
         "layers, instead of the preset's"},
        {"n-head", &o.sizes.n_head, "model", kBuild, size_range(&Config::n_head),
         "attention heads in each layer, instead of the preset's"},
        {"n-embd", &o.sizes.n_embd, "model", kBuild, size_range(&Config::n_embd),
         "channels (width of the embedding), instead of the preset's"},
        {"n-positions", &o.sizes.n_positions, "model", kBuild, size_range(&Config::n_positions),
         "longest context in tokens, instead of the preset's"},
        {"vocab-size", &o.sizes.vocab_size, "model", kBuild, size_range(&Config::vocab_size),
         "tokens in the vocabulary; not set: the tokenizer's, or else the preset's"},
        {"dropout", &o.dropout, "model", kRun | kBench, "[0, 0.999]",
         "dropout probability during training"},
        {"untied-head", &o.sizes.untied_head, "model", kBuild, "0|1",
         "give the output head weights of its own, instead of the token embedding's"},
        {"recompute-gelu", &o.recompute_gelu, "model", kRun | kInfo, "0|1",
         "recompute GELU in backward instead of keeping it: less memory, a little slower"},
        {"init-from", &o.init_from, "model", kRun | kEval | kSample | kInfo | kShow | kExport,
         "DIR", "load the model from this Hugging Face folder or checkpoint"},

        {"config", &o.config, "run", kAll, "FILE",
         "read options from this file, lines of `name = value`; the command line takes precedence"},
        {"resume", &o.resume, "run", kTrain, "DIR|auto",
         "continue from this checkpoint; auto: from the newest intact one in --output, if any"},
        {"override", &o.override_changes, "run", kTrain, "0|1",
         "resume although options that change the numbers differ from the checkpoint's"},
        {"overwrite", &o.overwrite, "run", kTrain, "0|1",
         "where --output holds a run already, rename its folder to NAME.set-aside and start"},
        {"output", &o.output, "run", kTrain | kShow | kExport, "DIR",
         "folder of the run (not set: out/ and the name of --data); of show and export: the file"},
        {"seed", &o.seed, "run", kRun | kSample, "[0, 1e+18]",
         "random seed of initial weights, data order, dropout and sampling"},
        {"threads", &o.threads, "run", kAll, "[0, 1024]", "CPU threads; 0: all cores"},
        {"precision", &o.precision, "run", kBatch | kSample | kShow, "fp32|bf16|tf32",
         "precision of the computation; not set: bf16 on a GPU that has it, otherwise fp32. "
         "bf16 on a CPU: half the memory, and faster where it has AVX512-BF16 or AMX"},
        {"tune-matmul", &o.tune_matmul, "run", kRun | kBench, "0|1",
         "on a GPU: time matmul kernels once, keep the fastest in data/matmul-plans.txt (several "
         "ranks only use what is there)"},
        {"quiet", &o.quiet, "run", kTrain, "0|1",
         "print only warnings and errors; the run's folder has the log and the samples"},
        {"help", &o.help, "run", kAll, "0|1",
         "print this page; after a command, what that command takes"},
        {"version", &o.version, "run", kAll, "0|1", "print the version, and how this was built"},

        {"batch-size", &o.batch_size, "batch", kBatch, "[1, 1000000]",
         "sequences in a micro-batch"},
        {"seq-len", &o.seq_len, "batch", kBatch, "[1, 1048576]",
         "tokens in a sequence; not set: as many as the model has positions (bench: 128 at most)"},
        {"grad-accum-steps", &o.grad_accum_steps, "batch", kRun, "[1, 1000000]",
         "micro-batches accumulated into one update"},
        {"shuffle", &o.shuffle, "batch", kRun, "0|1",
         "read the training data in a new random order every epoch"},
        {"overfit-batch", &o.overfit_batch, "batch", kRun, "0|1",
         "train on the first batch only, to see that the model can learn"},
    };
}

// How long a run is, how it learns, and what is shown and saved on the way.
inline std::vector<Option> training_options(Options& o) {
    return {
        {"max-steps", &o.max_steps, "length", kRun, "[1, 1e+12]",
         "number of updates; the default counts only without --epochs and --max-minutes"},
        {"epochs", &o.epochs, "length", kRun, "(0, 1000000000]",
         "passes over the training data; the first limit reached ends the run"},
        {"max-minutes", &o.max_minutes, "length", kRun, "(0, 1000000000]",
         "training time in minutes; the first limit reached ends the run"},

        {"learning-rate", &o.rate.peak, "optimizer", kRun, "[0, 100]",
         "peak learning rate; not set: 0.002 for the tiny model, 0.0006 for gpt2, less for larger "
         "ones, and a tenth of that where training starts from --init-from"},
        {"min-lr-fraction", &o.rate.min_fraction, "optimizer", kRun, "[0, 1]",
         "learning rate at the end, as a fraction of the peak"},
        {"schedule", &o.schedule, "optimizer", kRun, "cosine|linear|constant|wsd",
         "how the learning rate falls after warm-up"},
        {"warmup-steps", &o.rate.warmup, "optimizer", kRun, "[0, 1e+12]",
         "updates until the learning rate reaches its peak"},
        {"weight-decay", &o.adamw.weight_decay, "optimizer", kRun, "[0, 100]",
         "weight decay, on matrices and embeddings only"},
        {"beta1", &o.adamw.beta1, "optimizer", kRun, "[0, 1)",
         "AdamW's decay rate of the mean gradient"},
        {"beta2", &o.adamw.beta2, "optimizer", kRun, "[0, 1)",
         "AdamW's decay rate of the mean squared gradient"},
        {"eps", &o.adamw.eps, "optimizer", kRun, "[1e-30, 1]",
         "AdamW epsilon, added outside the square root"},
        {"grad-clip", &o.guards.grad_clip, "optimizer", kRun, "[0, 1e+30]",
         "clip the gradient to this global norm; 0: do not clip"},

        {"log-interval", &o.log_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between lines on the terminal; 0: only evaluations; not set: also once a minute"},
        {"eval-interval", &o.eval_interval, "watching", kRun, "[0, 1e+12]",
         "steps between evaluations; 0: never"},
        {"eval-batches", &o.eval_batches, "watching", kRun | kEval, "[0, 1e+12]",
         "training batches scored in each evaluation, always the same (eval train); 0: none"},
        {"eval-tokens", &o.eval_tokens, "watching", kRun, "[0, 1e+18]",
         "tokens of the validation data scored in each evaluation, the first ones; 0: all"},
        {"sample-interval", &o.sample_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between samples; 0: never"},
        {"prompt", &o.prompt, "watching", kTrain | kSample | kShow, "TEXT",
         "text that samples begin with; of show: the text that the model reads"},
        {"tensor-stats-interval", &o.tensor_stats_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between tables of each tensor's weight, gradient and update; 0: never"},
        {"patience", &o.patience, "watching", kRun, "[0, 1e+12]",
         "stop after this many evaluations without a new best loss; 0: do not"},
        {"save-interval", &o.save_interval, "watching", kTrain, "[0, 1e+12]",
         "steps between checkpoints; 0: only at the end"},
        {"log-json", &o.log_json, "watching", kTrain, "FILE",
         "also write every row of log.csv into this file, as a line of JSON"},
        {"keep", &o.keep, "watching", kTrain, "[1, 1000000]",
         "number of checkpoints to keep, the newest"},

        {"on-nan", &o.on_nan, "guards", kRun, "stop|skip",
         "where loss or gradient is NaN or infinite: stop, or skip the update (100 in a row stop)"},
        {"skip-outliers", &o.guards.skip_outliers, "guards", kRun, "[0, 1000000]",
         "skip updates whose loss or norm is so many standard deviations above the mean; 0: none"},
    };
}

inline std::vector<Option> option_table(Options& o) {
    std::vector<Option> table = model_options(o), training = training_options(o);
    table.insert(table.end(), training.begin(), training.end());
    table.insert(
        table.end(),
        {
            {"prompt-file", &o.prompt_file, "sample", kSample, "FILE",
             "read the prompt from this file; - is standard input"},
            {"interactive", &o.interactive, "sample", kSample, "0|1",
             "read prompts from standard input, one a line, and continue each"},
            {"max-new-tokens", &o.sampling.max_new_tokens, "sample", kSample, "[1, 1000000000]",
             "number of tokens to generate at most"},
            {"num-samples", &o.num_samples, "sample", kSample, "[1, 1000000]",
             "number of texts to generate"},
            {"temperature", &o.sampling.temperature, "sample", kSample, "[0, 100]",
             "sampling temperature; 0: always the likeliest token"},
            {"top-k", &o.sampling.top_k, "sample", kSample, "[0, 65536]",
             "sample from the k likeliest tokens only; 0: from all"},
            {"top-p", &o.sampling.top_p, "sample", kSample, "(0, 1]",
             "sample from the likeliest tokens only, as many as have this probability together"},
            {"show-top", &o.show_top, "sample", kSample, "[0, 65536]",
             "print that many of the likeliest next tokens, with probabilities, instead of text; "
             "--temperature is then 1 unless it is given"},

            {"runs", &o.runs, "show", kShow, "DIR",
             "show the curves and samples of these runs, instead of a model"},

            {"type", &o.type, "export", kExport, "f32|f16|bf16",
             "type of the weights; norms, biases and positions are always f32"},

            {"hellaswag", &o.hellaswag, "eval", kEval, "FILE",
             "score this HellaSwag file (in llm.c's format) instead of the validation data"},
        });
    return table;
}

// Names of nanoGPT, llm.c and transformers that mean the same as an option here, and are accepted.
constexpr const char* kSameNames =
    "a=overfit-batch adam-beta1=beta1 adam-beta2=beta2 adam-epsilon=eps b=batch-size "
    "block-size=n-positions c=weight-decay early-stopping-patience=patience "
    "eval-every=eval-interval eval-steps=eval-interval "
    "gradient-accumulation-steps=grad-accum-steps i=train-shards j=val-shards k=schedule "
    "l=learning-rate log-every=log-interval logging-steps=log-interval lr-scheduler-type=schedule "
    "max-grad-norm=grad-clip max-iters=max-steps max-position-embeddings=n-positions "
    "max-seq-length=seq-len model-name-or-path=init-from n=save-interval n-ctx=n-positions "
    "nk=keep num-train-epochs=epochs o=output out-dir=output output-dir=output "
    "overwrite-output-dir=overwrite per-device-train-batch-size=batch-size q=min-lr-fraction "
    "r=recompute-gelu resume-from-checkpoint=resume s=sample-interval "
    "sample-every=sample-interval save-every=save-interval save-steps=save-interval "
    "save-total-limit=keep t=seq-len u=warmup-steps v=eval-interval warmup-iters=warmup-steps "
    "x=max-steps";

// The others, and what to type instead.
constexpr OtherNames kOtherNames[] = {
    {"dataset dataset-name train-file validation-file", "--data DIR, made by ./prepare_data"},
    {"tokenizer-name", "the tokenizer is part of the --data folder (./prepare_data --tokenizer)"},
    {"e config-name", "--init-from takes a Hugging Face folder; --n-layer is for a new model"},
    {"d", "a step has --batch-size times --seq-len times --grad-accum-steps tokens"},
    {"per-device-eval-batch-size", "--batch-size is that of training and of evaluation"},
    {"min-lr", "--min-lr-fraction is a fraction of --learning-rate"},
    {"decay-lr", "--schedule constant is without decay"},
    {"warmup-ratio", "--warmup-steps is a number of steps"},
    {"eval-iters m", "--eval-tokens is a number of validation tokens, not of batches; 0: all"},
    {"eval-strategy evaluation-strategy", "--eval-interval is a number of steps; 0: never"},
    {"save-strategy always-save-checkpoint", "--save-interval is in steps; best/ is extra"},
    {"logging-strategy logging-first-step", "--log-interval is for the terminal; log.csv has all"},
    {"log-level", "--quiet prints only warnings and errors"},
    {"y", "--resume auto goes on from the newest checkpoint in --output"},
    {"dtype torch-dtype bf16 fp16 tf32 f", "--precision fp32, bf16 or, on a GPU, tf32; no fp16"},
    {"gradient-checkpointing", "--recompute-gelu computes GELUs again, and nothing else"},
    {"sl sg", "--skip-outliers is one limit, for loss and gradient norm"},
    {"data-seed", "--seed is that of weights, data, dropout and samples"},
    {"start", "--prompt TEXT, or --prompt-file FILE"},
    {"max-length max-tokens", "--max-new-tokens does not count the prompt"},
    {"eval-only do-eval", "type ./train_gpt eval --init-from DIR"},
    {"do-train", "./train_gpt trains unless it is given another command"},
    {"profile", "type ./train_gpt bench"},
    {"g", "samples of a run have 50 tokens; ./train_gpt sample has --max-new-tokens"},
    {"wandb-log wandb-project wandb-run-name report-to logging-dir run-name",
     "--output DIR has log.csv, which ./train_gpt show --runs DIR draws; --log-json FILE has JSON"},
    {"push-to-hub hub-model-id", "every checkpoint is a Hugging Face folder, ready to upload"},
    {"device use-cpu no-cuda", "./train_gpt runs on the CPU, ./train_gpt_cu on the GPU"},
    {"backend ddp-backend local-rank deepspeed fsdp z pn pr pg pm ps pp",
     "mpirun -np 4 ./train_gpt_mpi trains with four processes"},
    {"compile torch-compile", "this program is compiled already"},
    {"bias", "all layers of GPT-2 have biases"},
    {"lr-decay-iters", "the learning rate falls until the last step, that of --max-steps"},
    {"optim", "AdamW is the only optimizer"},
    {"w", "the optimizer always has fp32 weights"},
    {"ge", "GELU is always part of its matrix product"},
    {"nm", "--keep N keeps the newest; copy a checkpoint that is to stay"},
    {"load-best-model-at-end metric-for-best-model", "best/ has the lowest validation loss"},
    {"dataloader-num-workers", "the next batches are always read ahead"},
    {"auto-find-batch-size", "sizes that do not fit are refused, naming some that do"},
    {"label-smoothing-factor", "the loss is plain cross-entropy"},
    {"repetition-penalty num-beams", "--temperature, --top-k and --top-p choose the tokens"},
};

inline Command find_command(const std::string& typed) {
    for (const CommandName& c : kCommands)
        if (typed == c.name) return Command(c.bit);
    fail_usage("unknown command ", shown(typed), "; did you mean ", nearest(kCommands, typed).name,
               "? The commands are ", command_names(kCommands, kAll));
}

// nanoGPT's --init-from has words for where to begin. Reads nothing.
inline void check_init_from(const std::string& word) {
    if (word == "scratch") fail_usage("without --init-from a model begins from scratch");
    if (word == "resume") fail_usage("--init-from resume is --resume auto here");
    if (word.starts_with("gpt2") && word.find('/') == word.npos)
        fail_usage("there is no folder ", word,
                   ": `make gpt2` fetches the published GPT-2 small; "
                   "then say --init-from data/gpt2");
}

inline void check_batch(const Options& o, int T) {
    if (int64_t(o.batch_size) * T > INT32_MAX)
        fail_usage("--batch-size ", o.batch_size, " times --seq-len ", T,
                   " must be below 2147483648 tokens");
}

// Refuses options that contradict each other: nothing the user types may be silently ignored.
inline void check_together(const Options& o) {
    const std::vector<std::pair<const char*, std::vector<const char*>>> alone =
        {{"data", {"train-shards", "val-shards"}},
         {"prompt", {"prompt-file"}},
         {"overwrite", {"resume"}},
         {"runs", {"init-from", "prompt", "precision"}},
         {"show-top", {"num-samples", "max-new-tokens", "seed"}},
         {"interactive", {"prompt", "prompt-file", "num-samples", "show-top"}},
         {"hellaswag", {"data", "train-shards", "val-shards", "eval-batches", "batch-size"}}};
    for (const auto& [a, others] : alone)
        for (const char* b : others)
            if (o.given.contains(a) && o.given.contains(b))
                fail_usage("--", a, " and --", b, " exclude each other");
    if (o.command == kEval && o.given.contains("train-shards") && !o.given.contains("eval-batches"))
        fail_usage("eval reads --train-shards only for --eval-batches N: give both or neither");
    if (o.command == kTrain && o.given.contains("val-shards") && !o.given.contains("train-shards"))
        fail_usage("--val-shards needs --train-shards too: --train-shards GLOB --val-shards GLOB");
    if (o.override_changes && o.resume.empty())
        fail_usage("--override needs --resume DIR or --resume auto");
    if (o.given.contains("init-from") && !folder_exists(o.init_from)) check_init_from(o.init_from);
    if (o.patience > 0 && o.eval_interval == 0)
        fail_usage("--patience counts evaluations: it needs an --eval-interval above 0");
    check_batch(o, std::max(o.seq_len, 1));
}

// The options in the arguments (without the program's name), all checked. Bad usage throws Error
// with status 2. Reads no file but that of --config.
inline Options parse_options(std::vector<std::string> arguments) {
    Options o;
    const auto is_help = [](const std::string& word) {
        return word == "help" || word == "--help" || word == "-h";
    };
    if (!arguments.empty() && is_help(arguments[0])) {  // `help eval` is `eval --help`
        arguments[0] = "--help";
        if (arguments.size() > 1 && !arguments[1].starts_with('-'))
            std::swap(arguments[0], arguments[1]);
    }
    o.command_given =
        !arguments.empty() && !arguments[0].starts_with('-') && !arguments[0].ends_with(".conf");
    if (o.command_given) {
        o.command = find_command(arguments[0]);
        arguments.erase(arguments.begin());
    }
    const std::vector<Option> table = option_table(o);
    o.given = CommandLine{table, kCommands, o.command, kSameNames, kOtherNames}.read(arguments);
    if (!o.help && !o.version) check_together(o);  // --help works whatever else is on the line
    if (!o.given.contains("max-steps") &&
        (o.given.contains("epochs") || o.given.contains("max-minutes")))
        o.max_steps = 0;
    return o;
}

// What --help prints: all options, or only those of the command that was written out.
inline std::string help_text(const Options& options, const std::string& program) {
    const unsigned commands = options.command_given ? unsigned(options.command) : kAll;
    std::string text =
        to_text("usage: ", program, " [command] [--name value | --name=value | --switch] ...\n\n");
    for (const CommandName& c : kCommands)
        if (commands & c.bit) text += format("  %-8s %s\n", c.name, c.help);
    Options defaults;
    return text + options_help(option_table(defaults), commands) +
           "\nA switch is --name or --name 0|1. In names - and _ are the same. Given twice,\n"
           "the last counts. A file of options is --config FILE, or FILE.conf alone.\n";
}

inline std::string version_text() {
    return format("tinygpt %d.%d.%d, built by %s %s, vectors of %d bits\n", TINYGPT_VERSION / 10000,
                  TINYGPT_VERSION / 100 % 100, TINYGPT_VERSION % 100,
#ifdef __clang__
                  "clang", __clang_version__,
#else
                  "g++", __VERSION__,
#endif
                  kVectorBytes * 8);
}

// Name and value of every option that must be the same for a resumed run to be the same run: a
// checkpoint holds them, and resuming compares.
inline Json options_that_change_numbers(Options options) {
    Json all = Json::object();
    for (const Option& option : option_table(options))
        if (option.commands & kNumbers) all.set(option.name, value_text(option));
    return all;
}

// The options given that `command` takes too, without the model, as they would be typed:
//   retyped(o, kEval)     " --data data/book --seed 5"
inline std::string retyped(Options o, Command command) {
    const std::set<std::string> left_out = {"config", "help", "init-from"};
    std::string line;
    for (const Option& option : option_table(o)) {
        if (!(option.commands & command) || !o.given.contains(option.name)) continue;
        if (left_out.contains(option.name)) continue;
        const std::string value = value_text(option);
        line += to_text(" --", option.name, value.starts_with("--") ? "=" : " ", shell_word(value));
    }
    return line;
}

// =================================================================================================
// 2 Report: what a run's own numbers say, and what to type next
// =================================================================================================
// --- While it trains

// The two largest units: "2d 3h", "3h 07m", "7m 05s", "5s".
inline std::string duration_text(double seconds) {
    const long s = std::lround(seconds);
    if (s >= 86400) return format("%ldd %ldh", s / 86400, s % 86400 / 3600);
    if (s >= 3600) return format("%ldh %02ldm", s / 3600, s % 3600 / 60);
    return s >= 60 ? format("%ldm %02lds", s / 60, s % 60) : format("%lds", s);
}

// "step 50/2500", "loss 4.3021", ...: what matters most comes first.
inline std::vector<std::string> live_line(const LogRow& row, int64_t steps, double seconds_left) {
    std::vector<std::string> parts = {format("step %.0f", *row.step)};
    if (steps < kNoLimit) parts[0] += format("/%ld", long(steps));
    if (row.train_loss) parts.push_back(format("loss %.4f", *row.train_loss));
    if (row.val_loss) parts.push_back(format("val %.4f", *row.val_loss));
    if (row.train_loss) parts.push_back(duration_text(seconds_left) + " left");
    if (row.tokens_per_s) parts.push_back(with_commas(int64_t(*row.tokens_per_s)) + " tok/s");
    if (row.mfu) parts.push_back(format("MFU %.0f%%", 100 * *row.mfu));
    if (row.ranks > 0) parts.push_back(format("ranks %.0f%%", 100 * row.ranks));
    if (row.lr) parts.push_back(format("lr %.2e", *row.lr));
    if (row.grad_norm) parts.push_back(format("norm %.3f", *row.grad_norm));
    if (row.eval_train_loss) parts.push_back(format("eval train %.4f", *row.eval_train_loss));
    if (row.perplexity) parts.push_back(format("perplexity %.2f", *row.perplexity));
    return parts;
}
// Overwrites the live line with as many parts as fit; with `keep`, the next does not overwrite it.
// In a file or a pipe only those are printed. Why: of a line that wrapped, only the last part would
// be overwritten.
inline void show_line(const std::vector<std::string>& parts, bool keep) {
    const bool live = ::isatty(STDOUT_FILENO);
    if (!live && !keep) return;
    const size_t width = columns_of(STDOUT_FILENO) - 1;
    std::string line = parts[0].substr(0, width);
    for (size_t i = 1; i < parts.size(); ++i) {
        if (line.size() + 3 + parts[i].size() > width) break;
        line += " | " + parts[i];
    }
    std::printf("%s%s%s", live ? "\r\033[K" : "", line.c_str(), keep ? "\n" : "");
    std::fflush(stdout);
}

// Shows, in place of the live line, how far work has come that takes more than a second.
struct ProgressLine {
    const char* what;
    int64_t total;
    double begin = now_seconds(), shown = begin;

    ProgressLine(const char* what, int64_t total) : what(what), total(total) {}
    ~ProgressLine() {
        if (shown > begin) show_line({""}, false);
    }
    void show(int64_t done) {
        const double now = now_seconds(), left = (now - begin) * (double(total) / double(done) - 1);
        if (now - shown < 1 || done <= 0) return;
        shown = now;
        show_line({to_text(what, " ", 100 * done / total, " %"), duration_text(left) + " left"},
                  false);
    }
};

// The norms of every tensor's weight, gradient and update. Watch update/weight: about 0.001 is
// healthy; far less learns slowly, far more is about to break.
template <class Device>
void print_tensor_stats(Gpt2<Device>& model, const std::vector<typename Device::Real>& before,
                        int64_t step) {
    model.device.gather(model.grads, model.shares.part, model.shares.rounds);
    std::vector<typename Device::Gradient> grads(model.layout.size);
    model.device.download(grads.data(), model.grads, grads.size());
    const auto after = model.get_weights();
    std::printf("\n%-28s %12s %12s %12s %12s\n", to_text("step ", step).c_str(), "|weight|",
                "|gradient|", "|update|", "update/weight");
    for (const TensorInfo& t : model.layout.tensors) {
        double weight = 0, gradient = 0, update = 0;  // sums of squares
        for (size_t i = t.offset; i < t.offset + t.count; ++i) {
            const double w = double(after[i]), g = double(grads[i]), u = w - double(before[i]);
            weight += w * w, gradient += g * g, update += u * u;
        }
        std::printf("%-28s %12.5g %12.5g %12.5g %12.3g\n", t.name.c_str(), std::sqrt(weight),
                    std::sqrt(gradient), std::sqrt(update),
                    std::sqrt(update / std::max(weight, 1e-300)));
    }
}

// A run on the terminal: a live line, which is kept at evaluations and every log_interval steps
// (negative: once a minute), and samples.
template <class Device>
class Screen : public Observer<Device> {
public:
    explicit Screen(int64_t log_interval) : log_interval_(log_interval) {}

    void step(const LogRow& row, int64_t steps, double seconds_left, bool keep) override {
        const double now = now_seconds();
        const bool due = log_interval_ > 0 && int64_t(*row.step) % log_interval_ == 0;
        keep |= log_interval_ < 0 ? now - kept_ > 60 : due;
        if (keep) kept_ = now;
        show_line(live_line(row, steps, seconds_left), keep);
        began_ = true;
    }
    void evaluating(int64_t done, int64_t all) override {
        if (!began_) show_line({"evaluating the model as it is"}, !::isatty(STDOUT_FILENO));
        began_ = true;
        if (done == 0) progress_.emplace("evaluating", all);
        if (done == all)
            progress_.reset();
        else
            progress_->show(done);
    }
    // A terminal has one line for a sample, and all of it is in samples.txt.
    void sample(const std::string& title, const std::string& text) override {
        if (!::isatty(STDOUT_FILENO))
            return void(std::printf("\n%s\n%s\n\n", title.c_str(), text.c_str()));
        std::string line = text;
        std::replace(line.begin(), line.end(), '\n', ' ');
        WordWrap wrap{columns_of(STDOUT_FILENO) - 4};
        const auto lines = split_at(wrap.add(title + ": " + line) + wrap.end(), '\n');
        std::printf("\r\033[K%s%s\n", lines[0].c_str(), lines.size() > 1 ? " ..." : "");
    }
    void tensors(Gpt2<Device>& model, const std::vector<typename Device::Real>& before,
                 int64_t step) override {
        print_tensor_stats(model, before, step);
    }

private:
    const int64_t log_interval_;
    bool began_ = false;           // a line was shown
    double kept_ = now_seconds();  // when the last line was kept
    std::optional<ProgressLine> progress_;
};

// --- When it has ended
//
// How to read a curve. While both losses fall, the model learns what all such texts have in
// common. When only training loss falls, it learns the training text by heart: overfitting; best/
// is the model to keep. When neither falls, nothing is left to learn (compare the floor), or the
// model is too small to learn it.

struct CurvePoint {
    int64_t step;
    double loss;
};
using Curve = std::vector<CurvePoint>;

// A column of the log, where it was measured and is a number.
inline Curve curve_of(const std::vector<LogRow>& rows, std::optional<double> LogRow::*loss) {
    Curve curve;
    for (const LogRow& row : rows)
        if (std::isfinite((row.*loss).value_or(NAN)))
            curve.push_back({int64_t(*row.step), *(row.*loss)});
    return curve;
}

// Draws train (.), validation (o) and floor (-) into a box of text, or nothing where no loss is
// finite. Why a log scale: the long tail of a run is still seen to fall.
inline std::string draw_curve(const Curve& train, const Curve& val, double floor) {
    const int width = int(std::clamp<size_t>(columns_of(STDOUT_FILENO, 100), 40, 100)) - 10;
    constexpr int height = 10;
    double low = std::isfinite(floor) ? floor : INFINITY, high = 0;
    int64_t last = 1;
    for (const Curve* curve : {&train, &val})
        for (const CurvePoint& p : *curve) {
            low = std::min(low, p.loss), high = std::max(high, p.loss);
            last = std::max(last, p.step);
        }
    if (low <= 0 || high <= 0) return "";
    // Some space below, and never a box so flat that noise fills it.
    const double bottom = std::log(low * 0.98), top = std::log(std::max(high, low * 1.1));

    // x runs from 0 to 1 over the steps, y from 0 at the top to 1. Later marks cover earlier ones.
    std::vector<std::string> rows(height, std::string(width, ' '));
    auto put = [&](double x, double loss, char mark) {
        if (!std::isfinite(loss)) return;
        const double y = std::clamp((top - std::log(loss)) / (top - bottom), 0.0, 1.0);
        rows[size_t(std::lround(y * (height - 1)))][size_t(std::lround(x * (width - 1)))] = mark;
    };
    for (int c = 0; c < width; ++c) put(c / (width - 1.0), floor, '-');
    for (const CurvePoint& p : train) put(double(p.step) / double(last), p.loss, '.');
    for (const CurvePoint& p : val) put(double(p.step) / double(last), p.loss, 'o');

    std::string out;
    for (int r = 0; r < height; ++r) {
        const double loss = std::exp(top - (top - bottom) * r / (height - 1));
        out += r % 3 == 0 ? format("%8.3f |", loss) : "         |";
        out += rows[size_t(r)].substr(0, rows[size_t(r)].find_last_not_of(' ') + 1) + "\n";
    }
    out += "         +" + std::string(width, '-') + "\n";
    out +=
        format("          0%*ld\n", width - 1, long(last)) + "          loss over steps: . train";
    out += val.empty() ? "" : "   o validation";
    return out + (std::isfinite(floor) ? format("   --- floor %.4f\n", floor) : "\n");
}

// A curve at a step: the mean of its points in the `window` steps that end there, or else the last
// point before. Why a window: every batch is another text, so one training loss says little.
inline CurvePoint curve_at(const Curve& curve, double step, double window) {
    double sum = 0, count = 0;
    CurvePoint last{0, NAN};
    for (const CurvePoint& p : curve) {
        if (double(p.step) > step) continue;
        last = p;
        if (double(p.step) > step - window) sum += p.loss, ++count;
    }
    if (count > 0) last.loss = sum / count;
    return last;
}

// What a run came to, with the numbers that say so. Validation losses judge wherever there are two
// (that before training is one): they are of the same tokens, so a thousandth is no noise.
// Otherwise training losses judge; less than 1 % counts as nothing.
inline std::string verdict(int64_t steps, const Curve& train, const Curve& val) {
    const bool by_val = val.size() > 1;
    const double end = double(steps), window = end / 8, learned = curve_at(train, end, window).loss;
    auto percent = [](double loss, double before) { return 100 * (loss / before - 1); };
    auto change = [&](const char* name, double loss, const CurvePoint& before) {
        const double by = percent(loss, before.loss);
        return format("%s loss %s %.1f %% since step %ld", name, by < 0 ? "fell" : "rose",
                      std::abs(by), long(before.step));
    };
    if (by_val) {
        const double first = val.front().loss, last = val.back().loss;
        if (percent(last, first) > 0.1)
            return format("worse: validation loss is %.1f %% above that before training, %.4f",
                          percent(last, first), first);
        const CurvePoint best = *std::ranges::min_element(val, {}, &CurvePoint::loss);
        const CurvePoint then = curve_at(train, std::max(window, double(best.step)), window);
        if (percent(last, best.loss) > 1)
            return format("%s: validation loss is %.1f %% above its best, of step %ld;\n",
                          learned < then.loss ? "overfitting" : "worse", percent(last, best.loss),
                          long(best.step)) +
                   change("training", learned, then);
    } else if (steps < 20) {
        return "too short a run to judge by";
    }
    const CurvePoint before = curve_at(by_val ? val : train, 0.75 * end, by_val ? 0 : window);
    const double loss = by_val ? val.back().loss : learned, by = percent(loss, before.loss);
    return (by < -1  ? "improving: "
            : by > 1 ? "worse: "
                     : "flat: ") +
           change(by_val ? "validation" : "training", loss, before);
}

// A label and a command to paste, which is in one line, however wide the terminal is.
inline void say_command(const std::string& label, const std::string& command) {
    std::printf("%s %s\n", coloured(36, format("%-10s", label.c_str())).c_str(), command.c_str());
}

// The end of a run: the curve, the verdict, a sample, and lines to paste.
template <class Device>
void report(const Options& o, const Corpus& corpus, Trainer<Device>& trainer, End end) {
    const TrainerState& state = trainer.state();
    const std::vector<LogRow> rows = read_log(o.output + "/log.csv", state.step);
    const Curve train = curve_of(rows, &LogRow::train_loss),
                val = curve_of(rows, &LogRow::val_loss);
    const char* why = end == End::plateau       ? "stopped early: no progress (--patience)"
                      : end == End::out_of_time ? "time is up (--max-minutes)"
                                                : "done";
    std::printf("\n%s: %ld steps in %s\n\n%s\n", why, long(state.step),
                duration_text(state.seconds).c_str(), draw_curve(train, val, corpus.floor).c_str());

    std::string losses = format("%.4f, best %.4f at step %ld", state.val_loss, state.best_loss,
                                long(state.best_step));
    if (std::isfinite(corpus.floor))
        losses += format("; %.1f %% above the floor, %.4f",
                         100 * (state.val_loss / corpus.floor - 1), corpus.floor);
    if (std::isfinite(state.val_loss))
        say("val loss", losses);
    else
        say("train loss",
            format("%.4f", curve_at(train, double(state.step), double(state.step) / 8).loss));
    say("verdict", verdict(state.step, train, val));
    if (state.guards.skipped)
        say("guards", to_text(state.guards.skipped, " updates were skipped, ",
                              state.guards.outliers, " of them as outliers"));
    const std::string title = "the model writes:", text = trainer.write_sample(title, 100);
    const bool terminal = ::isatty(STDOUT_FILENO);  // would break lines within a word
    std::printf("\n%s\n%s\n\n", title.c_str(), (terminal ? wrapped(text) : text).c_str());

    // The user's own options are repeated, or the line would be of another run.
    // Careful: where a new model became no better, best/ is the one before training.
    const bool trained = state.best_step > 0 || !o.init_from.empty();
    const bool better = trained && folder_exists(o.output + "/best");
    const std::string folder =
        better ? o.output + "/best" : checkpoint_folder(o.output, state.step);
    const std::string model = " --init-from " + shell_word(folder);
    const std::string program = to_text("./", Device::kProgram);
    const char* prompt = corpus.tokenizer && o.prompt.empty() ? " --prompt \"Once\"" : "";
    say_command("next", program + " sample" + retyped(o, kSample) + model + prompt);
    Options eval = o;
    if (!o.given.contains("eval-batches")) eval.given.erase("train-shards");
    if (!corpus.val.empty()) say_command("", program + " eval" + retyped(eval, kEval) + model);
}

// =================================================================================================
// 3 The commands: train, eval, sample, info
// =================================================================================================
// What you have now: the loop and its options. A command finds what it works on (the data, the
// model's sizes, where to begin), and refuses what cannot work before it prints or writes anything.
// It is a function of a device and the options, and returns the exit status:
//
//   train    open_corpus, find_start, config_for, the checks, open_model, Trainer::run
//   eval     the same data and model, without a run: evaluate (§9) once
//   sample   no data: the tokenizer is in the model's folder; generate (§9)
//   info     no model either: only its sizes

// --- The data

// The data of a folder: opens every shard and reads the tokenizer and dataset.json, but no token.
inline Corpus open_corpus(const std::string& folder) {
    if (file_exists(folder))
        fail(folder, " is a file, and --data takes a folder: of text, ./prepare_data --input ",
             shell_word(folder), " --output data/mine makes one; shards are for --train-shards");
    if (!folder_exists(folder))
        fail("there is no data folder ", folder, ": ./prepare_data makes the default one, ",
             "./prepare_data --input book.txt --output ", folder, " one of your own");
    std::string pattern;  // in which every character of the name means itself
    for (char c : folder) {
        if (std::strchr("*?[\\", c)) pattern += '\\';
        pattern += c;
    }
    Corpus corpus(pattern + "/train_*.bin", pattern + "/val_*.bin");
    corpus.folder = folder;
    corpus.tokenizer = tokenizer_of(folder);
    const std::string about = folder + "/dataset.json";
    if (!file_exists(about)) return corpus;
    const Json json = Json::parse(read_file(about, 10'000'000), about);
    if (const Json* floor = json.find("floor")) corpus.floor = floor->as<double>().value_or(NAN);
    return corpus;
}

// The data that the options name. Shards that are named one by one have no tokenizer and no floor.
inline Corpus open_corpus(const Options& o) {
    const bool named = !o.train_shards.empty() || !o.val_shards.empty();
    Corpus corpus = named ? Corpus(o.train_shards, o.val_shards) : open_corpus(o.data);
    for (const Shards* split : {&corpus.train, &corpus.val})
        if (named && split->empty() && !split->pattern.empty())
            fail("no file matches ", split->pattern,
                 " (give a pattern in quotes, such as 'data/train_*.bin', or one file)");
    if (o.command != kTrain || !corpus.train.empty()) return corpus;
    for (const std::string& name :
         folder_exists(o.data) ? list_folder(o.data) : std::vector<std::string>())
        if (name.ends_with(".bin"))
            fail(o.data, " holds no train_*.bin, but ", name, ": say which files to read, such as ",
                 "--train-shards '", o.data, "/*train*.bin' --val-shards '", o.data, "/*val*.bin'");
    fail(o.data, " holds no train_*.bin: make shards with ./prepare_data --input FILE --output ",
         o.data);
}

// With another tokenizer's tokens the model would read nonsense, and only a high loss would tell.
inline void check_same_tokenizer(const Corpus& corpus, const std::string& model_folder) {
    const std::optional<Tokenizer> theirs = tokenizer_of(model_folder);
    if (corpus.tokenizer && theirs && !(*theirs == *corpus.tokenizer))
        fail(corpus.folder, " has another tokenizer than the model in ", model_folder,
             ": tokenize the text again with ./prepare_data --tokenizer gpt2 --vocab ",
             model_folder);
}

// Refuses training data that is too short for a batch of --batch-size x T, tokens that the model
// does not have, and options that this data cannot serve.
inline void check_data(const Options& o, const Corpus& corpus, const Config& config, int T) {
    const int64_t batch = int64_t(o.batch_size) * T, text = corpus.train.predictions();
    if (text < batch) {
        std::string advice = "take more text";
        if (text >= T) advice += to_text(", or --batch-size ", text / T);
        if (text >= o.batch_size)
            advice += to_text(", or --seq-len ", text / o.batch_size);
        else if (0 < text && text < T)
            advice += to_text(", or --batch-size 1 --seq-len ", text);
        fail_usage("the training data has ", counted(corpus.train.tokens(), "token"),
                   ", but one batch of ", o.batch_size, " x ", T, " needs ", with_commas(batch + 1),
                   " (one more than its size): ", advice);
    }
    if (o.overfit_batch && corpus.train.files[0].predictions() < batch)
        fail_usage("--overfit-batch takes its batch from the first shard: it is too short for it");
    if (o.patience > 0 && corpus.val.empty() && o.eval_batches == 0)
        fail_usage("--patience needs something to evaluate: validation data, or --eval-batches");
    prompt_tokens(o.prompt, corpus.tokenizer, config.vocab_size);  // fails where it has no tokens
    const int64_t quick = 200'000'000;  // tokens; longer data is checked as it is read
    for (const Shards* split : {&corpus.train, &corpus.val})
        if (split->tokens() <= quick) split->check_tokens(config.vocab_size);
}

// --- The model

// Fails where --init-from names no folder with a model as this program reads it, with what it is
// and what to type.
inline void check_model_folder(const std::string& path) {
    auto has = [&](const std::string& name) { return file_exists(path + "/" + name); };
    if (file_exists(path)) {
        std::string begin(64, ' ');
        const InputFile file(path);
        file.read_bytes(begin.data(), std::min(begin.size(), file.bytes), 0);
        const std::string folder = parent_folder(path), form = other_form(begin);
        fail(path, " is ", form.empty() ? "a file" : form,
             file_exists(folder + "/config.json")
                 ? ": give its folder, --init-from " + shell_word(folder)
                 : "; expected a folder with config.json and model.safetensors");
    }
    // A name with at most one slash may be one of the hub.
    const bool is_path = path.starts_with('.') || std::ranges::count(path, '/') > 1;
    if (!folder_exists(path))
        fail(path, ": there is no such folder",
             is_path ? ""
                     : "; for a model of Hugging Face's hub: hf download " + path +
                           " --local-dir data/model, then --init-from data/model");
    const bool weights = has("model.safetensors") || has("model.safetensors.index.json");
    if (weights && has("config.json")) return;
    const std::vector<std::string> names = list_folder(path);
    std::string inner = "best";
    for (const std::string& name : names)
        if (!has(inner + "/config.json")) inner = name;
    if (has(inner + "/config.json"))
        fail(path, " is the folder of a run: its model is ", path, "/", inner);
    if (has("adapter_config.json"))
        fail(path, " holds a LoRA adapter, not a whole model: merge the two with peft, ",
             "AutoPeftModelForCausalLM.from_pretrained('", path, "').merge_and_unload()",
             ".save_pretrained('", path, "-merged')");
    const std::pair<const char*, std::string> forms[] =
        {{".safetensors",
          "weights under another name: model.safetensors or, for shards, "
          "model.safetensors.index.json must be there"},
         {".bin",
          "PyTorch's own form: python3 -c \"from transformers import GPT2LMHeadModel as M; "
          "M.from_pretrained('" +
              path + "').save_pretrained('" + path + "')\""},
         {".gguf", "a GGUF file, for llama.cpp: take the folder that it was made from"},
         {".h5 .msgpack .pt .pth .ckpt",
          "another program's form: save the model again with transformers, for PyTorch"}};
    for (auto& [ends, what] : forms)
        for (const std::string& end : split_at(ends, ' '))
            for (const std::string& name : names)
                if (!weights && name.ends_with(end) && !name.starts_with("optimizer"))
                    fail(path, ": expected model.safetensors, found ", shown(name), ", ", what);
}

// The model of --init-from. Warns of what it passes over in the files.
inline Config config_of_model(const std::string& folder) {
    check_model_folder(folder);
    const Config config = config_of_folder(folder);
    const std::deque<SafetensorsFile> files = open_weights(folder);
    for (const SafetensorsFile& file : files)
        for (const StoredTensor& tensor : file.tensors) {
            if (is_other_head(tensor))
                warn(file.about(tensor) + "passed over: it is a head for another task");
            const std::string prefix = tensor.name.substr(0, tensor.name.rfind("wte.weight"));
            if (bare_name(tensor.name) == "wte.weight" && prefix != "" && prefix != "transformer.")
                warn(to_text(folder, ": the names of its tensors begin with ", shown(prefix),
                             ", which is passed over"));
        }
    for (const std::string& name : list_folder(folder)) {
        auto has_name = [&](auto& file) { return file.path == folder + "/" + name; };
        if (name.ends_with(".safetensors") && name != "optimizer.safetensors" &&
            std::none_of(files.begin(), files.end(), has_name))
            warn(to_text(folder, ": ", shown(name), " passed over: no part of the model"));
    }
    return config;
}

// The sizes of the model. With --init-from: those of its folder, or of the checkpoint `weights`
// where a run is resumed, and options that differ are refused. Else a preset's, with the
// tokenizer's vocabulary and the sizes given. A vocabulary may be larger than the tokenizer's: some
// round it up for speed.
inline Config config_for(const Options& o, const Corpus& corpus, const std::string& weights = "") {
    const bool given_weights = !o.init_from.empty();
    const std::string folder = weights.empty() ? o.init_from : weights;
    const int tokens = corpus.tokenizer ? corpus.tokenizer->vocab_size() : 0;
    Config config;
    if (given_weights) {
        config = config_of_model(folder);
    } else {
        for (const Preset& preset : kPresets)
            if (o.model == preset.name) config = preset.config;
        if (tokens) config.vocab_size = tokens;
    }
    if (given_weights && o.given.contains("model"))
        fail_usage("--model and --init-from exclude each other: ", folder, " has its own sizes");
    auto take = [&](std::string name, auto wanted, auto& size) {
        std::replace(name.begin(), name.end(), '_', '-');
        if (!o.given.contains(name)) return;
        if (given_weights && wanted != size)
            fail_usage("--", name, " ", wanted, " does not fit --init-from: the model in ", folder,
                       " has ", size);
        size = wanted;
    };
    for (const SizeLimit& limit : kSizes) take(limit.name, o.sizes.*limit.size, config.*limit.size);
    take("untied-head", o.sizes.untied_head, config.untied_head);
    config.dropout = float(o.dropout), config.recompute_gelu = o.recompute_gelu;
    if (config.n_head < 1 || config.n_embd % config.n_head != 0)
        fail_usage("--n-head ", config.n_head, " does not divide --n-embd ", config.n_embd,
                   ": each head takes an equal share of the channels");
    if (config.vocab_size < tokens)
        fail_usage("the vocabulary of ", config.vocab_size, " is smaller than the tokenizer's ",
                   tokens, " in ", corpus.folder);
    return config;
}

// How many tokens the model reads at once: --seq-len; not set: all its positions, at most `most`.
// Why all: a position that training never reads keeps its random weights.
inline int sequence_length(const Options& o, const Config& config, int most = INT_MAX) {
    const int T = o.seq_len > 0 ? o.seq_len : std::min(most, config.n_positions);
    if (T > config.n_positions)
        fail_usage("--seq-len ", T, " is longer than the model's ", config.n_positions,
                   " positions: shorten it, or raise --n-positions");
    check_batch(o, T);
    return T;
}

// Decimal units, as on disks and data sheets.
inline std::string bytes_text(double bytes) {
    if (bytes >= 1e9) return format("%.2f GB", bytes / 1e9);
    return bytes >= 1e6 ? format("%.1f MB", bytes / 1e6) : format("%.1f KB", bytes / 1e3);
}
// The peak learning rate for new weights of a model with so many parameters: GPT-3's (Brown et al.
// 2020, table 2.1) from 125 million on; 1e-3 is nanoGPT's for 10 million; 2e-3 was measured here.
inline double usual_rate(size_t parameters) {
    constexpr std::pair<double, double> kRates[] = {{6e6, 2e-3},   {60e6, 1e-3},  {200e6, 6e-4},
                                                    {500e6, 3e-4}, {1e9, 2.5e-4}, {2e9, 2e-4}};
    for (const auto& [most, rate] : kRates)
        if (double(parameters) <= most) return rate;
    return 1.6e-4;
}

// Chooses --seq-len and --learning-rate where they were not given; returns what to say about them.
// Trained weights get a tenth of the usual rate, with which a run's schedule ends: they are past
// the large steps.
inline std::string choose_defaults(Options& o, const Config& config) {
    std::string notes;
    auto note = [&](const auto&... parts) { join(notes, "\n", to_text(parts...)); };
    const bool chosen = o.seq_len == 0, trained = !o.init_from.empty();
    const int T = o.seq_len = sequence_length(o, config), P = config.n_positions;
    if (chosen) note("--seq-len ", T, ": the model's positions");
    if (T < P && !trained)
        note("--seq-len ", T, ": positions ", T, " to ", P - 1, " stay untrained");
    if (o.rate.peak >= 0) return notes;
    const size_t parameters = layout_of(config).count;
    o.rate.peak = usual_rate(parameters) / (trained ? 10 : 1);
    note("--learning-rate ", o.rate.peak, ": ",
         trained ? "its weights are trained, so a tenth of that " : "",
         format("for a new model of %.3g million parameters", double(parameters) / 1e6));
    return notes;
}

// Refuses sizes that the device cannot hold, and says which batch would fit. Why before allocating:
// Linux grants memory that it does not have, and kills the process that uses it.
template <class Device>
void check_memory(const Device& device, const Config& config, int B, int T, Use use, int spares) {
    device.check_sizes(config, B);
    const Ranks& ranks = *device.ranks;
    const size_t free = device.free_memory() / size_t(Device::kHostMemory ? ranks.here : 1);
    auto need = [&](int rows) {
        return memory_need<Device>(config, rows, T, use, ranks, spares).total();
    };
    if (need(B) <= free) return;
    // Would half as many sequences fit, or a quarter?
    int fits = B / 2;
    while (fits > 0 && need(fits) > free) fits /= 2;
    std::string advice = "choose a smaller --model";
    if (fits > 0)
        advice = to_text("--batch-size ", fits, " would fit (with --grad-accum-steps ",
                         ceil_div(B, fits), " for the same step)");
    fail("these sizes need ", bytes_text(double(need(B))), " of memory, and ",
         bytes_text(double(free)), " are free: ", advice);
}

// What a device's matrix products could reach at most, in operations a second.
double product_peak_flops(auto& device) {
    return device.bf16_products() ? device.bf16_peak_flops() : device.peak_flops();
}

// A model with buffers for batches of B x T. weights: the folder to load them from; empty: they are
// not set. spares: as in memory_need.
template <class Device>
std::unique_ptr<Gpt2<Device>> open_model(Device device, const Config& config, int B, int T, Use use,
                                         const std::string& weights = "", int spares = 0) {
    check_memory(device, config, B, T, use, spares);
    auto model = std::make_unique<Gpt2<Device>>(config, device);
    model->reserve(B, T, use);
    if (!weights.empty()) load_weights(*model, weights);
    return model;
}

// What the model is made of, and what it takes to train it. Returns the memory, by its uses.
template <class Device>
MemoryNeed print_model(const Config& config, int B, int T, const Ranks& ranks = alone,
                       int spares = 0) {
    say("model", to_text(config.n_layer, " layers, ", config.n_head, " heads, ", config.n_embd,
                         " channels, ", config.n_positions, " positions, vocabulary ",
                         config.vocab_size, config.untied_head ? ", untied head" : ""));
    const MemoryNeed need = memory_need<Device>(config, B, T, Use::training, ranks, spares);
    say("", to_text(with_commas(int64_t(layout_of(config).count)), " parameters, ",
                    format("%.1f MFLOP a token, ", flops_per_token(config, T) / 1e6),
                    bytes_text(need.total()), " to train", ranks.count > 1 ? " on each rank" : ""));
    return need;
}

// --- Ctrl-C

// A second signal exits at once, which harms no file. Careful: this may interrupt anything, so it
// must not lock or allocate.
inline void on_stop_signal(int) {
    const int64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
    int64_t first = 0;
    if (stop_asked.compare_exchange_strong(first, now)) return;
    // Why 50 ms: `timeout` and a closing terminal send two signals at once and mean one.
    if (now - first > 50'000'000) ::_exit(130);
}
// Ctrl-C, `kill`, SIGUSR1 (as batch systems send it) and a closed terminal ask the run to stop.
// SIGPIPE and SIGXFSZ are ignored: the failed write reports the error.
inline void catch_signals() {
    stop_asked = 0;
    for (int number : {SIGINT, SIGTERM, SIGUSR1}) ::signal(number, on_stop_signal);
    if (::signal(SIGHUP, on_stop_signal) == SIG_IGN) ::signal(SIGHUP, SIG_IGN);  // under nohup
    for (int number : {SIGPIPE, SIGXFSZ}) ::signal(number, SIG_IGN);
}

// --- Ranks: what they must agree about

// What f returns at rank 0, which alone calls it; a number, or a struct of numbers.
auto from_first(Ranks& ranks, auto&& f) {
    decltype(f()) value{};
    if (ranks.rank == 0) value = f();
    ranks.broadcast(&value, sizeof value);
    return value;
}
inline std::string text_from_first(Ranks& ranks, std::string text) {
    text.resize(from_first(ranks, [&] { return text.size(); }));
    ranks.broadcast(text.data(), text.size());
    return text;
}
// The names of all ranks' machines.
inline std::vector<std::string> gather_hosts(Ranks& ranks) {
    std::vector<std::array<char, 256>> names(static_cast<size_t>(ranks.count));
    ::gethostname(names[size_t(ranks.rank)].data(), sizeof names[0] - 1);
    ranks.gather(names.data(), sizeof names[0], 1);
    std::vector<std::string> hosts;
    for (const auto& name : names) hosts.push_back(name.data());
    return hosts;
}

// Refuses a number of ranks among which the step cannot be shared out.
inline void check_share(const Options& o, const Ranks& ranks) {
    const int all = o.grad_accum_steps, count = ranks.count;
    if (all % count == 0) return;
    const int next = round_up(all, count);
    std::string advice = to_text("--grad-accum-steps ", next, " would do");
    if (o.batch_size % next == 0 && all == 1)
        advice += to_text(" (and --batch-size ", o.batch_size / next, " for as much text a step)");
    fail_usage("--grad-accum-steps ", all, " are the micro-batches of a step, which ", count,
               " ranks share out: it must be a multiple of ", count, "; ", advice);
}

inline std::string describe_ranks(Ranks& ranks, int micro_batches, const MemoryNeed& need) {
    std::map<std::string, int> hosts;
    for (const std::string& host : gather_hosts(ranks)) ++hosts[host];
    std::string text = to_text(ranks.count, ", of which each has ", bytes_text(need.moments),
                               " of AdamW's moments");
    for (auto& [host, count] : hosts) text += to_text("\n", count, " on ", host);
    if (std::gcd(micro_batches, 8) % ranks.count != 0)
        text +=
            "\ntheir sums have an order of their own: only 1, 2, 4 or 8 ranks, whichever divide "
            "--grad-accum-steps, make the same bits";
    return text;
}

// --- train: where a run begins, and whether it may

// The run's folder: --output, or that of the checkpoint to resume, or out/ and the data's name.
inline std::string output_folder(const Options& o) {
    if (o.output.empty() && !o.resume.empty() && o.resume != "auto") return parent_folder(o.resume);
    std::string name = !o.output.empty() ? o.output : o.train_shards.empty() ? o.data : "run";
    while (name.size() > 1 && name.back() == '/') name.pop_back();
    if (!o.output.empty()) return name;
    name = name.substr(name.rfind('/') + 1);  // the last part of the path
    return "out/" + (name.empty() || name == "." || name == ".." ? "run" : name);
}

// Fails where another run holds the folder's lock. The lock lives as long as the handle returned,
// and no longer than the process.
inline FileHandle lock_folder(const std::string& folder) {
    const std::string path = folder + "/lock";
    FileHandle file(path, O_RDWR | O_CREAT);
    // A run that was refused may have removed the file just now: then the lock locks nothing.
    if (::flock(file.fd, LOCK_EX | LOCK_NB) == 0)
        return leads_to(path, file) ? std::move(file) : lock_folder(folder);
    if (errno == EWOULDBLOCK)
        fail("another run is writing into ", folder, ": wait for it, or give another --output");
    // Some file systems have no locks.
    warn(to_text("cannot lock ", path, " (", std::strerror(errno),
                 "): take care that no other run uses it"));
    return file;
}

// Refuses to write over a run: only the run that resumes it goes on in its folder.
inline bool holds_run(const std::string& folder) {
    return !checkpoint_steps(folder).empty() || file_exists(folder + "/log.csv") ||
           folder_exists(folder + "/best");
}
inline void check_output(const Options& o) {
    const std::string advice =
        "go on with --resume auto, give another name, or keep the old one "
        "as NAME.set-aside with --overwrite";
    if (!o.log_json.empty() && !folder_exists(parent_folder(o.log_json)))
        fail("--log-json ", o.log_json, ": there is no folder ", parent_folder(o.log_json));
    if (o.resume == "auto" || o.overwrite) return;
    std::error_code missing;
    const bool goes_on = !o.resume.empty() &&
                         std::filesystem::equivalent(o.output, parent_folder(o.resume), missing);
    if (holds_run(o.output) && !goes_on) fail(o.output, " already holds a run: ", advice);
    if (file_exists(o.log_json) && o.resume.empty())
        fail("--log-json ", o.log_json, " exists already: ", advice);
}

inline void set_aside_old_run(const Options& o) {
    if (!o.overwrite) return;
    if (holds_run(o.output)) {
        const FileHandle lock = lock_folder(o.output);  // nobody may be writing there
        say("set aside", set_aside(o.output));
    }
    if (file_exists(o.log_json)) say("set aside", set_aside(o.log_json));
}

// Verifies every byte of a checkpoint that is to be resumed, and reads its state.
inline TrainerState verify_checkpoint(const std::string& folder) {
    const std::string path = folder + "/trainer_state.json";
    if (!file_exists(path))
        fail(folder, " is no checkpoint to resume: it has no trainer_state.json (--init-from ",
             "starts a new run from any Hugging Face folder)");
    const Json state = verify_files(folder, Purpose::resume);
    if (!state.find("checksums")->find("optimizer.safetensors"))
        fail(folder, " has no moments of AdamW: it can be used with --init-from, but not resumed");
    return state_from_json(state, path);
}
// Sets AdamW's moments from a checkpoint. Needs reserve(..., Use::training) before.
template <class Device>
void load_moments(Gpt2<Device>& model, const std::string& folder) {
    std::deque<SafetensorsFile> files;
    if (model.device.ranks->rank == 0) files.emplace_back(folder + "/optimizer.safetensors");
    read_arrays(files, model, Contents::moments);
}

// Tidies a run's folder after a kill: what a save left half done is removed, and a checkpoint that
// was about to be replaced gets its name back. Careful: only with the folder's lock held.
inline void recover_folders(const std::string& output) {
    for (const std::string& name : list_folder(output)) {
        const std::string path = output + "/" + name;
        if (name.starts_with("log.csv.tmp-") && file_exists(path)) remove_file(path);
        if (name.size() < 5 || !folder_exists(path)) continue;
        const std::string stem = name.substr(0, name.size() - 4);
        if (stem != "best" && step_of_name(stem) < 0) continue;
        if (name.ends_with(".old") && !folder_exists(output + "/" + stem))
            rename_path(path, output + "/" + stem);
        else if (name.ends_with(".old") || name.ends_with(".tmp"))
            remove_folder(path);
    }
}

// --resume DIR: that checkpoint, which must verify. --resume auto: the newest that does; damaged
// ones are passed over, with a line on standard error. Sets the lock of a folder that is resumed.
inline Start find_start(const Options& o, std::optional<FileHandle>& lock) {
    check_output(o);
    if (o.resume.empty()) return {};
    const bool resumes_here = o.resume == "auto" || file_exists(o.output + "/log.csv");
    if (resumes_here && folder_exists(o.output)) {
        lock.emplace(lock_folder(o.output));
        recover_folders(o.output);
    }
    if (o.resume != "auto") return {o.resume, verify_checkpoint(o.resume)};
    const std::vector<int64_t> steps = checkpoint_steps(o.output);
    for (int64_t step : steps) {
        const std::string folder = checkpoint_folder(o.output, step);
        try {
            return {folder, verify_checkpoint(folder)};
        } catch (const Error& e) {
            std::fprintf(stderr, "passing over %s: %s\n", folder.c_str(), e.what());
        }
    }
    if (!steps.empty())
        fail("no checkpoint in ", o.output,
             " is whole: nothing to resume. Remove the folder to start again");
    return {};
}

// The checksum of a shard's tokens. Of more than 64 million only the ends are read: a run must not
// begin with minutes of reading.
inline std::string checksum_of(const Shard& shard) {
    const int64_t all = shard.tokens, end = all <= 64'000'000 ? all : 1 << 16;
    std::vector<uint16_t> tokens(size_t(end == all ? all : 2 * end));
    shard.read(tokens.data(), 0, end);
    if (end < all) shard.read(tokens.data() + end, all - end, end);
    return checksum({reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size()});
}

// What a checkpoint recognises the data by: no path, so data that was moved is the same data.
inline std::vector<std::string> fingerprint(const Corpus& corpus) {
    std::vector<std::string> list;
    if (corpus.tokenizer)
        list.push_back(to_text("tokenizer: ", corpus.tokenizer->vocab_size(), " tokens, ",
                               checksum(corpus.tokenizer->merges_text())));
    for (auto* split : {&corpus.train, &corpus.val})
        for (const Shard& shard : split->files)
            list.push_back(to_text(split == &corpus.train ? "train: " : "val: ", shard.tokens,
                                   " tokens, ", checksum_of(shard)));
    return list;
}

// Warns where validation shards have the tokens of training shards, under whatever name. `data` is
// the fingerprint.
inline void warn_if_trained_on(const Corpus& corpus, const std::vector<std::string>& data) {
    const std::set<std::string> all(data.begin(), data.end());
    const std::vector<Shard>& val = corpus.val.files;
    std::string same;
    for (size_t i = 0; i < val.size(); ++i) {
        const std::string of_val = data[data.size() - val.size() + i].substr(std::strlen("val"));
        if (same.size() < 200 && all.contains("train" + of_val)) join(same, ", ", val[i].path);
    }
    if (!same.empty())
        warn("the training data has the tokens of " + same +
             " too: the validation loss will say nothing about new text");
}

// Options that may differ although they change the numbers: checksums tell whether the data does.
inline const std::set<std::string> kPaths = {"data", "train-shards", "val-shards", "init-from"};

// Fails where a resumed run would not be the run that was interrupted. Why the program matters: a
// GPU adds up in another order. `data` is the fingerprint.
inline void check_same_run(const Options& o, const Start& start,
                           const std::vector<std::string>& data, const std::string& program) {
    auto check = [&](const std::string& what, const std::string& saved, const std::string& now) {
        auto value = [](const std::string& text) { return text.empty() ? "(not set)" : text; };
        if (saved != now)
            fail_usage(start.folder, " was made with ", what, " ", value(saved), ", now it is ",
                       value(now), ": resume with the same options, data and program, ",
                       "or say --override to go on all the same");
    };
    const Json options = options_that_change_numbers(o);
    for (auto& [name, now] : options.members) {
        const Json* saved = start.state.options.find(name);
        if (saved && !kPaths.contains(name)) check("--" + name, saved->text, now.text);
    }
    check("the program", start.state.program, program);
    const auto& saved = start.state.data.members;
    for (size_t i = 0; i < std::max(data.size(), saved.size()); ++i)
        check("the data", i < saved.size() ? saved[i].second.text : "none",
              i < data.size() ? data[i] : "none");
}

// Gives all ranks the start that rank 0 found.
inline void share_start(Ranks& ranks, Start& start) {
    if (ranks.count == 1) return;
    start.folder = text_from_first(ranks, start.folder);
    const std::string state = text_from_first(ranks, state_to_json(start.state).write(0));
    start.state = state_from_json(Json::parse(state, "rank 0"), "rank 0");
}

// Refuses a rank that would not make the same run as rank 0: with another program, other options
// or other data. `mine`: this rank's fingerprint.
inline void check_same_ranks(Ranks& ranks, const Options& o, std::vector<std::string> mine) {
    mine.push_back(to_text("version ", TINYGPT_VERSION, ", ", file_checksum("/proc/self/exe")));
    for (auto& [name, value] : options_that_change_numbers(o).members)
        if (!kPaths.contains(name)) mine.push_back(to_text("--", name, " ", value.text));
    for (size_t i = 0, n = from_first(ranks, [&] { return mine.size(); }); i < n; ++i) {
        const std::string here = i < mine.size() ? mine[i] : "nothing";
        const std::string first = text_from_first(ranks, here);
        if (here != first)
            fail("this rank has ", here, "; rank 0 has ", first,
                 ": all ranks need the same program, options and data");
    }
    // Waits for all: nothing is written before they agree.
    std::vector<char> met(static_cast<size_t>(ranks.count));
    ranks.gather(met.data(), 1, 1);
}

// What the program chose for a run that is resumed, and what is not given again, stays as it was.
inline void take_choices(Options& o, const TrainerState& state) {
    for (const Option& option : option_table(o)) {
        const Json* saved = state.options.find(option.name);
        const bool chosen = option.name == "seq-len" || option.name == "learning-rate";
        if (chosen && saved && !o.given.contains(option.name)) set_option(option, saved->text);
    }
}

// Sets the weights with which the run begins: those of the checkpoint (with its moments), of
// --init-from (fine-tuning), or new random ones.
void load_start(auto& model, const Options& o, const Start& start) {
    if (!start.folder.empty())
        load_weights(model, start.folder), load_moments(model, start.folder);
    else if (!o.init_from.empty())
        load_weights(model, o.init_from);
    else
        model.initialise(o.seed);
}

// The folder of a run, locked: `held` is the lock, or it is taken. A run that ends before it has a
// log was refused after all: its lock is removed, and so is the folder if it was made for it.
struct RunFolder : FolderToFill {
    const FileHandle lock;
    RunFolder(const std::string& path, std::optional<FileHandle>& held)
        : FolderToFill(path), lock(held ? std::move(*held) : lock_folder(path)) {}
    ~RunFolder() {
        if (made.empty() || file_exists(made.back() + "/log.csv")) return;
        const std::string path = made.back() + "/lock";
        if (leads_to(path, lock)) ::unlink(path.c_str());
    }
};

// "31 % of the steps' time went into other ranks; each rank sent 12.3 MB a step"
std::string spent_on_ranks(const auto& trainer, double seconds) {
    const double percent = 100 * trainer.ranks_seconds / std::max(seconds, 1e-9);
    return format("%.0f %% of the steps' time went into other ranks; each sent %s a step%s",
                  percent,
                  bytes_text(trainer.ranks_bytes / std::max(1.0, trainer.ranks_steps - 1)).c_str(),
                  percent < 20 ? "" : ": a larger --grad-accum-steps lowers the share");
}

// Checks the data, the output folder, the checkpoint, the sizes, the options against the
// checkpoint's, and memory, in this order; then trains.
// Careful: a folder that is resumed is locked before it is read, a new one is made after all
// checks.
template <class Device>
int train_command(Device device, const Options& given) {
    Options o = given;
    Ranks& ranks = *device.ranks;
    const bool leads = ranks.rank == 0;
    check_share(o, ranks);
    o.output = output_folder(o);
    // What is there: the data, the folder, the checkpoint.
    Corpus corpus = open_corpus(o);
    std::optional<FileHandle> lock;
    Start start;
    if (leads) start = find_start(o, lock);
    share_start(ranks, start);
    const bool resumed = !start.folder.empty();
    // Does it fit together?
    const Config config = from_first(ranks, [&] { return config_for(o, corpus, start.folder); });
    // Known of the whole validation text only.
    const bool limited = o.eval_tokens > 0 && o.eval_tokens < corpus.val.predictions();
    if (limited) corpus.floor = NAN;
    // What was left to the program becomes an option that the checkpoint remembers: another
    // version's defaults must not change a run that is half done.
    o.sizes = config;
    if (resumed) take_choices(o, start.state);
    std::string notes = choose_defaults(o, config);
    if (limited)
        join(notes, "\n",
             to_text("--eval-tokens ", o.eval_tokens, ": the first of ",
                     with_commas(corpus.val.tokens()), " for validation"));
    const int B = o.batch_size, T = o.seq_len;
    if (o.precision.empty() && Device::kHostMemory) o.precision = "fp32";
    if (!o.init_from.empty() && !resumed && leads) check_same_tokenizer(corpus, o.init_from);
    check_data(o, corpus, config, T);
    const bool same_run = resumed && !o.override_changes;
    const std::vector<std::string> data = fingerprint(corpus);
    if (same_run && leads) check_same_run(o, start, data, Device::kProgram);
    if (ranks.count > 1) check_same_ranks(ranks, o, data);
    if (same_run && start.state.finished) {
        std::printf("%s is finished: %ld steps. Nothing to do\n", o.output.c_str(),
                    long(start.state.step));
        return 0;
    }
    // Does it fit into memory, and can all be read that it begins with?
    const int spares = spares_needed(size_t(o.grad_accum_steps), size_t(ranks.count));
    const auto model = open_model(device, config, B, T, Use::training, "", spares);
    load_start(*model, o, start);
    if (o.override_changes) start.state.planned_steps = 0;  // the plan may have changed
    start.state.options = options_that_change_numbers(o);
    warn_if_trained_on(corpus, data);
    start.state.data = Json::array(data), start.state.program = Device::kProgram;
    Screen<Device> screen(o.log_interval);
    Trainer<Device> trainer(o, corpus, *model, product_peak_flops(device), screen);
    // From here on things are written.
    if (leads) set_aside_old_run(o);
    std::optional<RunFolder> folder;
    if (leads) folder.emplace(o.output, lock);
    if (leads) check_output(o);  // again: another run may have ended there meanwhile

    // Say what will be trained on what, and go.
    say("tinygpt", device.describe());
    const std::string options = retyped(given, kTrain);
    say("options",
        options.empty() ? "none given (--help lists all, with defaults)" : options.substr(1));
    say("data", to_text(corpus.folder.empty() ? "shards" : corpus.folder, ": ",
                        with_commas(corpus.train.tokens()), " training tokens, ",
                        with_commas(corpus.val.tokens()), " for validation"));
    const MemoryNeed need = print_model<Device>(config, B, T, ranks, spares);
    if (ranks.count > 1) say("ranks", describe_ranks(ranks, o.grad_accum_steps, need));
    if (resumed) say("resumed", start.folder);
    if (!resumed && !o.init_from.empty()) say("weights", "from " + o.init_from);
    if (!resumed && !notes.empty()) say("chosen", notes);
    catch_signals();
    const End end = trainer.run(start);
    if (ranks.count > 1 && trainer.ranks_steps > 0)
        say("ranks", spent_on_ranks(trainer, trainer.state().seconds - start.state.seconds));
    if (end != End::interrupted) {
        if (leads) report(o, corpus, trainer, end);
        return 0;
    }
    if (checkpoint_steps(o.output).empty())
        std::printf("\ninterrupted before the first step: there was nothing to save\n");
    else
        std::printf("\ninterrupted: saved at step %ld; go on with --resume auto\n",
                    long(trainer.state().step));
    return 130;
}

// --- eval

// The folder of the model that a command is about; it must be given.
inline const std::string& need_init_from(const Options& o) {
    if (o.init_from.empty())
        fail_usage("--init-from is missing: give the folder of a model, such as out/stories/best");
    return o.init_from;
}

// Where no data is named, takes that of the run which made the model.
inline void use_training_data(Options& o) {
    const std::string path = o.init_from + "/trainer_state.json";
    for (const char* name : {"data", "train-shards", "val-shards"})
        if (o.given.contains(name)) return;
    if (!has_checksums(o.init_from)) return;
    const Json options = read_sealed(path).get("options", Json::Kind::object, path);
    auto take = [&](const char* name, std::string& value) {
        if (const Json* saved = options.find(name)) value = saved->text;
    };
    take("data", o.data), take("train-shards", o.train_shards), take("val-shards", o.val_shards);
    const bool named = !o.train_shards.empty() || !o.val_shards.empty();
    if (!named && !folder_exists(o.data))
        fail(o.init_from, " was trained on ", o.data, ", which is not here: name a folder with ",
             "--data");
    say("data", (named ? o.val_shards : o.data) + ", as in its training");
}

// HellaSwag (Zellers et al. 2019): which of four endings fits? The model's answer is the ending of
// the lowest mean loss; a sum would prefer short endings. A quarter is right by luck; GPT-2 small
// gets about 3 of 10. The file is llm.c's (dev/data/hellaswag.py): a header of 256 int32 (20240522,
// 1, number of examples, bytes of the longest), then each example as uint16:
//   65535, its bytes, its index, the label, 4, then for the context and each of the four endings
//   its length and its tokens
struct HellaswagExample {
    int label = 0;  // which ending is right
    std::vector<uint16_t> context, endings[4];
};

// All examples of a file; fails where it is damaged, or of another vocabulary.
inline std::vector<HellaswagExample> read_hellaswag(const std::string& path, int vocab_size) {
    const std::string bytes = read_file(path, size_t(1) << 30);
    int32_t header[256] = {};
    std::memcpy(header, bytes.data(), std::min(bytes.size(), sizeof header));
    if (bytes.size() < sizeof header || header[0] != 20240522 || header[1] != 1)
        fail(path, " is no HellaSwag file: expected a header of 1024 bytes with 20240522 and ",
             "version 1, found ", header[0], " and ", header[1], " (", bytes.size(), " bytes)");
    size_t at = sizeof header;
    auto next = [&] {
        uint16_t word = 0;
        if (at + sizeof word > bytes.size()) fail(path, " ends in the middle of an example");
        std::memcpy(&word, &bytes[at], sizeof word), at += sizeof word;
        return word;
    };
    auto tokens = [&] {
        std::vector<uint16_t> list(next());
        if (list.empty()) fail(path, " has a text without tokens");
        for (uint16_t& token : list)
            if ((token = next()) >= vocab_size)
                fail(path, ": token ", token, " is outside the vocabulary of ", vocab_size);
        return list;
    };
    // Every number whose value is known is checked: a wrong length shows at the next example.
    std::vector<HellaswagExample> examples;
    for (int32_t i = 0; i < header[2]; ++i) {
        HellaswagExample& e = examples.emplace_back();
        const int start = next();
        next(), next();
        e.label = next();
        if (start != 65535 || e.label >= 4 || next() != 4)
            fail(path, ": example ", i, " is damaged");
        e.context = tokens();
        for (auto& ending : e.endings) ending = tokens();
    }
    if (at != bytes.size())
        fail(path, " goes on after its ", header[2], " examples: it is damaged");
    return examples;
}

// The mean loss of each ending after its context; a text too long for T loses its beginning. The
// four texts are the rows of one batch; only targets within the endings are scored.
std::array<double, 4> score_endings(auto& model, const HellaswagExample& e) {
    size_t longest = 0;
    for (const auto& ending : e.endings)
        longest = std::max(longest, e.context.size() + ending.size() - 1);
    const size_t T = std::min(size_t(model.T), longest);
    Batch batch(4, int(T));
    for (size_t i = 0; i < 4; ++i) {
        std::vector<uint16_t> text = e.context;
        text.insert(text.end(), e.endings[i].begin(), e.endings[i].end());
        const size_t cut = text.size() > T + 1 ? text.size() - (T + 1) : 0;
        for (size_t t = cut; t + 1 < text.size(); ++t) {
            batch.inputs[i * T + t - cut] = text[t];
            if (t + 1 >= e.context.size()) batch.targets[i * T + t - cut] = text[t + 1];
        }
    }
    // One pass for all four; then the mean over each ending's targets.
    const auto losses = batch_losses(model, batch);
    std::array<double, 4> mean{};
    for (size_t i = 0; i < 4; ++i) {
        int count = 0;
        for (size_t at = i * T; at < (i + 1) * T; ++at)
            if (batch.targets[at] >= 0) mean[i] += double(losses[at]), ++count;
        mean[i] /= std::max(1, count);
    }
    return mean;
}

int hellaswag_command(auto device, const Options& o, const Config& config) {
    const auto examples = read_hellaswag(o.hellaswag, config.vocab_size);
    const int T = sequence_length(o, config);
    const auto model = open_model(device, config, 4, T, Use::evaluation, o.init_from);
    Ranks& ranks = *device.ranks;
    const size_t rank = size_t(ranks.rank), count = size_t(ranks.count);
    std::vector<int64_t> right(count);  // of each rank
    ProgressLine progress{"scoring", int64_t(examples.size())};
    for (size_t i = rank; i < examples.size(); i += count) {
        progress.show(int64_t(i));
        const std::array<double, 4> loss = score_endings(*model, examples[i]);
        right[rank] += std::ranges::min_element(loss) - loss.begin() == examples[i].label;
    }
    ranks.gather(right.data(), sizeof right[0], 1);
    const int64_t all = std::accumulate(right.begin(), right.end(), int64_t(0));
    say("hellaswag", format("%ld of %zu right: accuracy %.4f", long(all), examples.size(),
                            all / double(std::max<size_t>(1, examples.size()))));
    return 0;
}

// How many bytes each token stands for; empty without a tokenizer.
inline std::vector<int> token_bytes(const std::optional<Tokenizer>& tokenizer) {
    std::vector<int> bytes;
    for (int id = 0; tokenizer && id < tokenizer->vocab_size(); ++id)
        bytes.push_back(int(tokenizer->bytes_of(id).size()));
    return bytes;
}

// The loss of a model on the validation text, every token of it once, in three units.
//   val loss    nats a token: the mean of -log p of the token that came
//   perplexity  e^loss: the model is as unsure as among that many equally likely tokens
//   bits/byte   what the text would take, compressed by this model. Careful: the other two depend
//               on the tokenizer; only this one compares models with different ones
int eval_command(auto device, const Options& given) {
    Options o = given;
    const Config config =
        from_first(*device.ranks, [&] { return config_of_model(need_init_from(o)); });
    if (!o.hellaswag.empty()) return hellaswag_command(device, o, config);
    use_training_data(o);
    const Corpus corpus = open_corpus(o);
    if (device.ranks->rank == 0) check_same_tokenizer(corpus, o.init_from);
    if (corpus.val.empty())
        fail("there is no validation data: ./prepare_data --val-fraction makes some, or name ",
             "shards with --val-shards");
    const int T = sequence_length(o, config);
    const auto model = open_model(device, config, o.batch_size, T, Use::evaluation, o.init_from);
    const auto windows = evaluation_windows(corpus.val, T, corpus.document_start());
    if (windows.empty()) fail("the validation data is too short: at least two tokens are needed");
    const double begin = now_seconds();
    const Evaluation e = [&] {
        ProgressLine progress{"evaluating", corpus.val.predictions()};  // gone at the end
        return evaluate(*model, windows, token_bytes(corpus.tokenizer),
                        [&](int64_t done) { return progress.show(done), true; });
    }();
    const double speed = double(e.tokens) / (now_seconds() - begin);
    say("val loss",
        format("%.9g nats a token over ", e.loss()) + with_commas(e.tokens) + " tokens");
    say("perplexity", format("%.4f", e.perplexity()));
    if (e.bytes > 0) say("bits/byte", format("%.4f", e.bits_per_byte()));
    if (std::isfinite(corpus.floor))
        say("floor", format("%.6f: the loss is %.2f %% above it", corpus.floor,
                            100 * (e.loss() / corpus.floor - 1)));
    say("speed", with_commas(int64_t(speed)) + " tokens a second");
    if (o.given.contains("eval-batches") && o.eval_batches > 0 && !corpus.train.empty()) {
        const auto fixed = fixed_windows({corpus.train, o.batch_size, T}, o.eval_batches);
        say("train loss",
            format("%.9g nats a token over fixed batches", evaluate(*model, fixed, {}).loss()));
    }
    return 0;
}

// --- sample

// The tokenizer beside the model of --init-from, where there is one.
inline std::optional<Tokenizer> tokenizer_of_model(const Options& o, const Config& config) {
    std::optional<Tokenizer> tokenizer = tokenizer_of(o.init_from);
    if (tokenizer && tokenizer->vocab_size() > config.vocab_size)
        fail(o.init_from, ": its tokenizer has more tokens than its model");
    return tokenizer;
}

// The likeliest next tokens, with the probabilities that they are drawn with.
void show_top(auto& model, const std::vector<int32_t>& tokens,
              const std::optional<Tokenizer>& tokenizer, const SampleOptions& sampling, int count) {
    // Of a prompt that is too long, the end counts.
    const size_t context = size_t(std::min(model.config.n_positions, model.T));
    const std::vector<int32_t> tail(tokens.end() - ptrdiff_t(std::min(tokens.size(), context)),
                                    tokens.end());
    for (const Candidate& c : likeliest(choices(next_logits(model, tail, 0), sampling), 0, 1)) {
        if (count-- <= 0) break;
        const bool end = tokenizer && c.token == tokenizer->end_of_text();
        const std::string text = end ? std::string(kEndOfText) : text_of_token(tokenizer, c.token);
        std::printf("%8.4f %%  %6d  %s\n", 100 * c.probability, c.token,
                    tokenizer ? shown(text).c_str() : "");
    }
}

// The prompt's tokens; without a prompt, what a document begins with.
inline std::vector<int32_t> sample_tokens(const std::string& prompt,
                                          const std::optional<Tokenizer>& tokenizer, int V) {
    std::vector<int32_t> tokens = prompt_tokens(prompt, tokenizer, V);
    if (tokens.empty()) tokens.push_back(tokenizer ? tokenizer->end_of_text() : 0);
    return tokens;
}

// The prompt and one text after it, shown while it is made. Notes go to standard error, so that a
// file of samples holds nothing else. It stops when nobody reads any more (head closes the pipe).
void write_text(auto& model, const std::string& prompt, const std::optional<Tokenizer>& tokenizer,
                const SampleOptions& options) {
    const bool terminal = ::isatty(STDOUT_FILENO);
    WordWrap wrap{columns_of(STDOUT_FILENO)};
    auto show = [&](const std::string& text) {
        const std::string out = terminal ? wrap.add(text) : text;
        std::fwrite(out.data(), 1, out.size(), stdout);
        std::fflush(stdout);
    };
    const auto tokens = sample_tokens(prompt, tokenizer, model.config.vocab_size);
    show(!tokenizer && !prompt.empty() ? prompt + " " : prompt);  // a blank between two numbers
    std::string bytes;                                            // sampled, and not shown yet
    int64_t count = 0;
    const double begin = now_seconds();
    double first = begin;  // when the prompt had been read, and the first token was there
    const int slides = generate(model, tokens, options, [&](int token) {
        if (count == 0) first = now_seconds();
        bytes += text_of_token(tokenizer, token);
        show(take_characters(bytes, false));
        return ++count, !std::ferror(stdout);
    });
    show(take_characters(bytes, true) + "\n");
    std::string note = format("[%zu tokens read in %.2f s, %ld written", tokens.size(),
                              first - begin, long(count));
    if (count > 1) note += format(", %.1f a second", double(count - 1) / (now_seconds() - first));
    note += "]\n";
    if (slides)
        note += format(
            "[the text outgrew the model's %d positions: %d times its older half was "
            "forgotten]\n",
            model.config.n_positions, slides);
    std::fputs(wrapped(note, STDERR_FILENO).c_str(), stderr);
}

// Reads prompts, one a line, and continues each, until the input ends. A prompt that cannot be read
// does not end it.
void converse(auto& model, const std::optional<Tokenizer>& tokenizer, SampleOptions options) {
    const bool typed = ::isatty(STDIN_FILENO);
    std::fprintf(stderr, "[seed %llu; type a prompt; Ctrl-D ends]\n",
                 static_cast<unsigned long long>(options.seed));
    for (std::string prompt;; ++options.seed, prompt.clear()) {
        if (typed) std::fputs("> ", stderr);
        int c;
        while ((c = std::getchar()) != EOF && c != '\n') prompt += char(c);
        if (c == EOF && prompt.empty()) return void(typed && std::fputs("\n", stderr));
        try {
            write_text(model, prompt, tokenizer, options);
        } catch (const Error& error) {
            complain(31, "error:", error.what());
        }
    }
}

// --num-samples texts, each after the prompt and with a seed of its own; or, with --show-top, the
// likeliest next tokens. Without a prompt a text begins where a document does.
int sample_command(auto device, const Options& o) {
    const Config config = config_of_model(need_init_from(o));
    const std::optional<Tokenizer> tokenizer = tokenizer_of_model(o, config);
    const std::string file = o.prompt_file == "-" ? "/dev/stdin" : o.prompt_file;
    const std::string prompt = file.empty() ? o.prompt : read_file(file, size_t(1) << 26);
    const auto tokens = sample_tokens(prompt, tokenizer, config.vocab_size);
    const auto model =
        open_model(device, config, 1, config.n_positions, Use::generation, o.init_from);
    SampleOptions options = o.sampling;
    options.seed = uint64_t(o.seed);
    if (o.interactive && !o.given.contains("seed")) options.seed = std::random_device()();
    options.end_of_text = tokenizer ? tokenizer->end_of_text() : -1;
    options.vocab_size = options.end_of_text + 1;
    if (o.show_top > 0) {
        if (!o.given.contains("temperature")) options.temperature = 1;  // what the softmax says
        return show_top(*model, tokens, tokenizer, options, o.show_top), 0;
    }
    if (o.interactive) return converse(*model, tokenizer, options), 0;
    for (int i = 0; i < o.num_samples; ++i, ++options.seed) {
        if (i > 0) std::printf("\n---\n");
        write_text(*model, prompt, tokenizer, options);
    }
    return 0;
}

// --- info

// Every tensor, and what memory and time the model takes. share: of all parameters; decays: whether
// AdamW pulls it towards 0. Allocates nothing: works for models too large for this machine.
template <class Device>
int info_command(Device device, const Options& o) {
    const Corpus corpus = o.given.contains("data") ? open_corpus(o) : Corpus();
    const Config config = config_for(o, corpus);
    const int T = sequence_length(o, config);
    const Layout layout = layout_of(config);
    std::printf("%-28s %-16s %14s %8s  %s\n", "tensor", "shape", "parameters", "share", "decays");
    auto row = [&](const std::string& name, const std::string& shape, size_t count) {
        std::printf("%-28s %-16s %14s %7.3f%%", name.c_str(), shape.c_str(),
                    with_commas(int64_t(count)).c_str(),
                    100 * double(count) / double(layout.count));
    };
    for (const TensorInfo& t : layout.tensors) {
        row(t.name, shape_text(t.shape), t.count);
        std::printf("  %s\n", t.decays() ? "yes" : "");
    }
    row("total", "", layout.count);
    std::printf("\n\n");
    const MemoryNeed need = print_model<Device>(config, o.batch_size, T);
    say("memory", to_text("weights ", bytes_text(need.weights), ", gradients ",
                          bytes_text(need.gradients), ", moments ", bytes_text(need.moments),
                          ", activations ", bytes_text(need.activations), " with --batch-size ",
                          o.batch_size, " --seq-len ", T));
    // What a long training would take. No program reaches the peak; half of it is good.
    const double peak = product_peak_flops(device);
    const double seconds = 1e10 * flops_per_token(config, T) / peak;
    say("time", "10 billion tokens take " + duration_text(seconds) +
                    format(" at this machine's measured %.0f GFLOP/s, ", peak / 1e9) +
                    duration_text(2 * seconds) + " at half of it");
    return 0;
}

// =================================================================================================
// 4 bench and walk: how fast it is, and what it does
// =================================================================================================
// What you have now: a program that trains. Two commands watch the calls of a real training step:
// bench times each of them, walk prints the numbers of a step small enough to follow by hand.

// --- Watched: a device that shows its calls

// A call of one of the device's functions. sizes: its integers and flags in their order, such as
// rows, C, OC.
struct Call {
    std::string_view function;
    std::vector<double> sizes;
    std::function<void()> make;
};

// While there is a watcher, every call goes to it. The watcher must make it, and may do anything
// before and after; what it calls itself is not watched.
template <class Device>
struct Watched : Device {
    std::function<void(const Call&)> watcher = nullptr;

    // Why eager: when a CUDA graph is replayed, no calls are made.
    void replay(const Pass& pass, const StepOptions& o, auto&& work) {
        watcher ? work() : Device::replay(pass, o, work);
    }
    void watch(auto&& make, const char* function, auto... arguments) {
        if (!watcher) return make();
        Call call{function, {}, make};
        auto keep = [&]<class A>(A argument) {
            if constexpr (std::is_integral_v<A>) call.sizes.push_back(double(argument));
        };
        (keep(arguments), ...);
        const auto kept = std::exchange(watcher, nullptr);
        kept(call);
        watcher = kept;
    }
#define WATCH(f)                                   \
    void f(auto... a) {                            \
        watch([&] { Device::f(a...); }, #f, a...); \
    }
    WATCH(embed_forward)
    WATCH(embed_backward)
    WATCH(layernorm_forward)
    WATCH(layernorm_backward)
    WATCH(linear_forward)
    WATCH(linear_backward)
    WATCH(linear_gelu_forward)
    WATCH(gelu_forward)
    WATCH(linear_gelu_backward)
    WATCH(linear_residual_forward)
    WATCH(attention_forward)
    WATCH(attention_backward)
    WATCH(attention_cached)
    WATCH(head_forward)
    WATCH(head_forward_backward)
    WATCH(head_logits)
    WATCH(begin_step)
    WATCH(add_loss)
    WATCH(square_sums)
    WATCH(norm_of_sums)
    WATCH(judge_step)
    WATCH(adamw)
#undef WATCH
};

// A batch of B rows of one text, whose token i is token(i).
Batch batch_of(int B, int T, auto&& token) {
    Batch batch(B, T);
    for (int i = 0; i < B * T; ++i)
        batch.inputs[size_t(i)] = token(i), batch.targets[size_t(i)] = token(i + 1);
    batch.scored = B * T;
    return batch;
}

// --- bench
// How to read a row: a function does so many operations and moves at least so many bytes. Each
// takes a least time at the machine's peak. The longer one binds; the last column is the share of
// that peak that was reached (the roofline model; Williams et al. 2009).
//   linear c_attn  12 calls  3.990 ms a call  227.0 GFLOP/s  0.9 GB/s   61.4 % of FLOP/s
// Large products should come near their peak, and take most of a step. Embedding, layernorm, the
// norm and AdamW are bound by memory (more than 100 %: the operands were in a cache). A row far
// below both peaks has too little work for all cores (try more rows), or could be better.
//
// The first table is of training steps at --batch-size. If a whole step, unwatched, takes much
// longer than the sum of its calls, time is lost between them. Then evaluations of 256, 1024 and
// 4096 rows: with --model gpt2 these are the products that the literature reports.

// On a GPU a function is one or more kernels. Below a row of several stands a row for each:
//   d linear c_fc                  12 calls  1.512 ms a call ...
//       product nt 65536x768, k 3072   12 calls  0.741 ms a call  417000.0 GFLOP/s  ...
// t marks a transposed operand: nn is x w of forward, nt is dout w^T (dx), tn is x^T dout (dw). The
// head's table lies the other way: its logits are nt, its dx is nn. Below the whole step stand all
// its kernels, the costliest first: copy brings the batch from the host, zero clears memory.

// What a GPU's kernel took, in one call or several. flops: of matrix products, else 0. row: what
// kernels_are_for said, else -1.
struct KernelTime {
    std::string name;
    double flops = 0, seconds = 0;
    int calls = 0, row = -1;
};

inline void add_call(std::vector<KernelTime>& sums, const KernelTime& call) {
    const auto same = [&](const KernelTime& sum) { return sum.name == call.name; };
    auto sum = std::find_if(sums.begin(), sums.end(), same);
    if (sum == sums.end()) sum = sums.insert(sums.end(), {call.name});
    sum->flops += call.flops, sum->seconds += call.seconds, sum->calls += call.calls;
}

template <class Device>
class Bench {
public:
    // Random weights and tokens will do.
    Bench(const Device& device, const Options& o)
        : config_(config_for(o, Corpus())), C(config_.n_embd), T_(sequence_length(o, config_, 128)),
          model_(open_model(Watched<Device>{device}, config_, o.batch_size, T_, Use::training)),
          device_(model_->device) {
        model_->initialise(1);
        set_batch_size(o.batch_size, Use::training);
    }

    // Measures and prints all tables; about so many seconds for each.
    void run(double seconds = 3) {
        show_machine();
        StepOptions options;
        options.rate.peak = 1e-5;
        const double step =
            table("function", "step", seconds, [&] { train_step(*model_, batches_, options, 0); });
        const double flops = flops_per_token(config_, T_) * rows_ / step;
        std::printf("whole step        %s tokens a second, %.1f GFLOP/s, %.1f %% of the peak\n",
                    with_commas(int64_t(rows_ / step)).c_str(), flops / 1e9,
                    100 * flops / product_peak_);
        if (kKernels) show_kernels();
        for (int rows : {256, 1024, 4096}) {
            if (rows < T_) continue;
            set_batch_size(rows / T_, Use::evaluation);
            table(format("%d rows", rows).c_str(), "evaluation", seconds,
                  [&] { batch_losses(*model_, batches_[0]); });
        }
    }

private:
    static constexpr double kA = sizeof(typename Device::Activation),
                            kR = sizeof(typename Device::Real),
                            kW = sizeof(typename Device::Weight),
                            kG = sizeof(typename Device::Gradient);
    static constexpr bool kKernels = !Device::kHostMemory;  // a GPU tells what each takes
    static constexpr int kName = kKernels ? 34 : 22;        // the width of the first column

    // Calls of one kind, and what each must at least do: operations (a multiply-add is two), and
    // bytes, if every input is read once and every output written once. product: a matrix product,
    // which has a peak of its own.
    struct Row {
        std::string label;
        double flops = 0, bytes = 0;
        bool product = false;
        std::string way = "";                  // how it was done, where the device has several ways
        int calls = 0;                         // in all passes
        std::vector<double> seconds = {};      // of all its calls, for each pass
        std::vector<KernelTime> kernels = {};  // the sums of all passes
    };

    // From now on B texts at a time, of random tokens.
    void set_batch_size(int B, Use use) {
        model_->reserve(B, T_, use);
        rows_ = B * T_;
        const uint64_t V = uint64_t(config_.vocab_size);
        batches_ = {batch_of(B, T_, [&](int i) { return int32_t(random_bits(7, i) % V); })};
    }

    void show_machine() {
        std::printf("machine           %s\n", device_.describe().c_str());
        tinygpt::show_line({"measuring its peaks"}, false);
        peak_bytes_ = device_.peak_bandwidth();
        std::string peaks = format("%.1f GFLOP/s, ", device_.peak_flops() / 1e9);
        if constexpr (requires { device_.tile_peak_flops(); })
            peaks += format("%.1f from L1, ", device_.tile_peak_flops() / 1e9);
        if (const double bf16_peak = device_.bf16_peak_flops(); bf16_peak > 0)
            peaks += format("%.1f in bf16, ", bf16_peak / 1e9);
        tinygpt::show_line({""}, false);
        std::printf("measured peaks    %s%.1f GB/s\n", peaks.c_str(), peak_bytes_ / 1e9);
        std::printf("model             %d layers, %d heads, %d channels, ", config_.n_layer,
                    config_.n_head, C);
        std::printf("vocabulary %d; B=%d T=%d\n", config_.vocab_size, rows_ / T_, T_);
    }

    // The row of a call. No label: it does too little to be shown. The little arithmetic of rows
    // that memory binds is not counted.
    Row row_of(const Call& call) const {
        const std::vector<double>& s = call.sizes;
        const double n = rows_, x = kA * n * C;  // bytes of a [rows, C]
        // A product of attention: 2 C operations over (T+1)/2 positions for each row.
        const double attention = C * (T_ + 1) * n;
        // Reads gradients, masters, both moments; writes the last three, and separate weights.
        const double adamw = kG + 6 * kR + (Device::kSeparateMasters ? kW : 0);
        auto products = [&](int times, const std::string& label) {
            return Row{label, times * 2 * n * s[1] * s[2],
                       times * (kA * n * (s[1] + s[2]) + kW * s[1] * s[2]), true};
        };
        auto is = [&](const char* function) { return call.function == function; };
        if (is("embed_forward")) return {"embed", 0, 3 * x};
        if (is("embed_backward")) return {"d embed", 0, 3 * x};
        if (is("layernorm_forward")) return {"layernorm", 0, 2 * x};
        if (is("layernorm_backward")) return {"d layernorm", 0, 4 * x};
        if (is("gelu_forward")) return {"gelu again", 0, 8 * x};
        // Products: the scores and the sums; the scores again, dv, dp, dq, dk.
        if (is("attention_forward")) return {"attention", 2 * attention, 4 * x};
        if (is("attention_backward")) return {"d attention", 5 * attention, 8 * x};
        if (is("head_forward")) return products(1, "head");
        if (is("head_forward_backward")) return products(3, "head, both ways");
        if (is("square_sums")) return {"gradient norm", 0, kG * s[0]};
        if (is("adamw")) return {"adamw", 0, adamw * s[0]};
        if (!call.function.starts_with("linear_")) return {};
        const std::string layer = s[1] > s[2]        ? "linear mlp.c_proj"
                                  : s[1] == s[2]     ? "linear attn.c_proj"
                                  : s[2] == 3 * s[1] ? "linear c_attn"
                                                     : "linear c_fc";
        const bool backward = call.function.ends_with("_backward");  // makes dx and dw
        return backward ? products(2, "d " + layer) : products(1, layer);
    }

    // Makes a call and adds its time to its row; on a GPU the kernels' times come after the pass.
    void time_call(const Call& call) {
        const Row kind = row_of(call);
        if (kind.label.empty()) return call.make();
        size_t i = 0;
        while (i < table_.size() && table_[i].label != kind.label) ++i;
        if (i == table_.size()) table_.push_back(kind);
        Row& row = table_[i];
        row.seconds.resize(size_t(passes_)), ++row.calls;
        if constexpr (kKernels) device_.kernels_are_for(int(i));
        const double begin = now_seconds();
        call.make();
        if constexpr (kKernels)
            row.way = device_.way(), device_.kernels_are_for(-1);
        else
            row.seconds.back() += now_seconds() - begin;
    }
    // Makes a pass, a step or an evaluation, with every call timed.
    void watch(auto&& pass) {
        ++passes_;
        device_.watcher = [this](const Call& call) { time_call(call); };
        std::vector<KernelTime> kernels;
        if constexpr (kKernels)
            kernels = device_.kernel_times(pass);
        else
            pass();
        device_.watcher = nullptr;
        for (const KernelTime& kernel : kernels) {
            add_call(kernels_, kernel);
            if (kernel.row < 0) continue;
            Row& row = table_[size_t(kernel.row)];
            row.seconds.back() += kernel.seconds, add_call(row.kernels, kernel);
        }
    }
    // Why not the least, as for the peaks: a step is made of usual calls, not of lucky ones.
    static double median(std::vector<double> values) {
        std::sort(values.begin(), values.end());
        return values[values.size() / 2];
    }

    // Times the calls of a pass, and whole passes in turn with them, at least three of each, and
    // prints the table. Returns the seconds of a whole pass.
    double table(const char* title, const char* what, double seconds, auto&& pass) {
        table_.clear(), kernels_.clear(), passes_ = 0;
        std::vector<double> whole;
        tinygpt::show_line({"measuring: " + std::string(title)}, false);
        pass(), device_.synchronize();
        const double end = now_seconds() + seconds;
        while (whole.size() < 3 || (now_seconds() < end && whole.size() < 50)) {
            watch(pass);
            const double begin = now_seconds();
            pass(), device_.synchronize();
            whole.push_back(now_seconds() - begin);
        }
        // A processor slows down when it gets hot: the peaks are those of this moment.
        peak_ = device_.peak_flops(), product_peak_ = product_peak_flops(device_);
        tinygpt::show_line({""}, false);
        std::printf("\n%-*s %5s %9s %8s %8s %7s\n", kName, title, "calls", "ms a call", "GFLOP/s",
                    "GB/s", "of peak");
        double sum = 0;
        for (const Row& row : table_) sum += show(row);
        std::printf("\nsum of the above  %.2f ms; a whole %s takes %.2f ms\n", sum * 1e3, what,
                    median(whole) * 1e3);
        return median(whole);
    }
    // Prints a row and its kernels, where these are several; returns the seconds of its calls.
    double show(const Row& row) const {
        const double seconds = median(row.seconds);
        show_line(row.label + row.way, row.calls / passes_, seconds * passes_ / row.calls, row);
        for (const KernelTime& k : row.kernels)
            if (row.kernels.size() > 1)
                show_line("    " + k.name, k.calls / passes_, k.seconds / k.calls,
                          {"", k.flops / k.calls, 0, true});
        return seconds;
    }
    // seconds: of each call. What binds it is the resource that it would need longer for.
    void show_line(const std::string& name, int calls, double seconds, const Row& work) const {
        const double least_flops = work.flops / (work.product ? product_peak_ : peak_);
        const double least_bytes = work.bytes / peak_bytes_;
        std::printf("%-*s %5d %9.3f", kName, name.c_str(), calls, seconds * 1e3);
        if (work.flops + work.bytes > 0)
            std::printf(" %8.1f %8.1f %6.1f %% of %s", work.flops / seconds / 1e9,
                        work.bytes / seconds / 1e9,
                        100 * std::max(least_flops, least_bytes) / seconds,
                        least_flops > least_bytes ? "FLOP/s" : "GB/s");
        std::printf("\n");
    }
    void show_kernels() {
        KernelTime all{"all"};
        for (const KernelTime& k : kernels_) all.seconds += k.seconds, all.calls += k.calls;
        kernels_.push_back(all);
        std::stable_sort(kernels_.begin(), kernels_.end(),
                         [](auto& a, auto& b) { return a.seconds > b.seconds; });
        std::printf("\n%-*s %6s %10s %9s\n", kName, "kernels of a step", "calls", "ms", "share");
        for (const KernelTime& k : kernels_)
            std::printf("    %-*s %6d %10.3f %7.1f %%\n", kName - 4, k.name.c_str(),
                        k.calls / passes_, k.seconds / passes_ * 1e3,
                        100 * k.seconds / all.seconds);
    }

    const Config config_;
    const int C, T_;
    int rows_ = 0;  // B T
    std::unique_ptr<Gpt2<Watched<Device>>> model_;
    Watched<Device>& device_;
    std::vector<Batch> batches_;                           // of a step: one
    double peak_ = 1, product_peak_ = 1, peak_bytes_ = 1;  // a second
    // The latest table: its rows, all kernels of all watched passes, and how many passes.
    std::vector<Row> table_;
    std::vector<KernelTime> kernels_;
    int passes_ = 0;
};

// --- walk
// B = 2 rows of T = 4 tokens, C = 8 channels, 2 heads, 2 layers, a vocabulary of 11 words, in
// double: a training step (§8) small enough to follow with a pocket calculator. The watcher stops
// before some calls, prints what there is by then, and how to get it by hand. The header quotes
// lines of it ("walk>"), and a test compares them. The numbers are the same on every machine.

class Walk {
public:
    Walk() : model_({2, 2, kC, kT, kV}) {
        model_.initialise(1);
        // Ten times the usual weights: so small a model would show nothing but zeros.
        for (const TensorInfo& t : model_.layout.tensors)
            for (size_t i = t.offset; t.decays() && i < t.offset + t.count; ++i)
                model_.weights[i] *= 10;
        model_.reserve(2, kT, Use::training);
    }

    void run() {
        show_batch();
        StepOptions options;
        options.rate = {.schedule = Schedule::constant, .peak = 0.1};
        options.guards.grad_clip = 0.5;
        model_.device.watcher = [this](const Call& call) { watch(call); };
        train_step(model_, {batch_}, options, 0);
        model_.device.watcher = nullptr;
        show_dropout(), show_effect();
        std::printf(
            "\nThe same of a model of yours, as a page to point at:\n"
            "./train_gpt show --init-from out/stories/best --prompt \"Once upon a time, a\"\n");
    }

private:
    static constexpr int kT = 4, kC = 8, kV = 11, kRows = 2 * kT;
    static constexpr const char* kWords[kV] = {"the", "cat", "sat", "on", "mat", "and",
                                               "dog", "ran", "to",  "a",  "."};
    static constexpr int kText[kRows + 1] = {0, 1, 2, 3, 0, 4, 5, 0, 6};

    void watch(const Call& call) {
        if (call.function == "head_forward_backward") show_forward(), show_loss();
        if (call.function == "square_sums") show_backward();
        if (call.function == "adamw") show_update();
        call.make();
        if (call.function == "adamw") std::printf("and the program has %.6f\n", model_.weights[0]);
    }

    void title(const std::string& text) {
        std::printf("\n%s\n%s\n", text.c_str(), std::string(text.size(), '-').c_str());
    }
    // A buffer [rows, columns]: its shape and the beginning of row 0.
    void show(const char* name, const double* x, int columns, int rows = kRows) {
        std::printf("%-12s [%d, %2d] ", name, rows, columns);
        for (int i = 0; i < std::min(columns, 6); ++i) std::printf(" %8.4f", x[i]);
        std::printf("%s\n", columns > 6 ? " ..." : "");
    }
    // The mean loss of the batch, in nats a token. Runs forward, so it sets all activations.
    double loss() {
        const std::vector<double> losses = batch_losses(model_, batch_);
        return std::accumulate(losses.begin(), losses.end(), 0.0) / kRows;
    }

    // Row 1 continues row 0, so the last target of row 0 is the first input of row 1.
    void show_batch() {
        title("The batch: two rows of four tokens; the targets are the same text, one later");
        for (int i = 0; i < kRows; ++i)
            std::printf("row %d, t=%d   input %2d %-4s  target %2d %s\n", i / kT, i % kT, kText[i],
                        kWords[kText[i]], kText[i + 1], kWords[kText[i + 1]]);
    }

    // Every buffer is [8, ...]: one row for each of the 8 tokens. x_mid and x_out are the residual
    // stream: compare them with embedded, to which each layer has only added.
    void show_forward() {
        title("Forward: shapes, and the first numbers of the first row");
        const auto& a = model_.a;
        show("embedded", a.embedded, kC);
        for (int i = 0; i < 2; ++i) {
            const auto& l = a.layers[size_t(i)];
            std::printf("layer %d\n", i);
            show("  ln_1", l.ln_1, kC), show("  qkv", l.qkv, 3 * kC), show("  att", l.att, kC);
            show("  x_mid", l.x_mid, kC), show("  ln_2", l.ln_2, kC), show("  fc", l.fc, 4 * kC);
            show("  gelu", l.gelu, 4 * kC), show("  x_out", l.x_out, kC);
        }
        show("ln_f", a.ln_f, kC);
        std::printf("att of t=0 is its own value, qkv[16..23], since it sees nobody else:\n");
        show("  v of t=0", a.layers[0].qkv + 2 * kC, kC, 1);
    }

    // Nothing is learned yet, so the mean loss is near log 11, that of a guess among 11 words.
    void show_loss() {
        title("The loss of the first row, by hand");
        // Logits, their softmax, and minus the logarithm of the target's share.
        double logits[kV], total = 0;
        model_.device.head_logits(logits, model_.a.ln_f, model_.w.lm_head, 1, kC, kV);
        for (double logit : logits) total += std::exp(logit);
        const int target = kText[1];
        std::printf("word      logit   exp(logit)   probability\n");
        for (int v = 0; v < kV; ++v)
            std::printf("%-5s  %8.4f   %10.4f   %11.4f%s\n", kWords[v], logits[v],
                        std::exp(logits[v]), std::exp(logits[v]) / total,
                        v == target ? "   <- the target" : "");
        std::printf("sum of exp %.4f; loss = log(sum) - logit = %.4f - %.4f = %.4f\n", total,
                    std::log(total), logits[target], std::log(total) - logits[target]);
        std::printf("loss of the batch: mean of 8 such = %.6f; ", loss());
        std::printf("knowing nothing is log 11 = %.4f\n", std::log(11.0));
    }

    // The slope of the loss from backward, and from moving one weight: the tests check every
    // formula of §4 like this. Why 1e-5: the difference errs by about h^2, and rounding by 1e-16 /
    // h.
    void show_backward() {
        title("Backward: gradients, beside (loss(w + h) - loss(w - h)) / 2h with h = 1e-5");
        std::printf("dlogits of row 0, (p - [target]) / 8:");
        for (int v = 0; v < 4; ++v) std::printf(" %7.4f", model_.a.logits[v]);
        std::printf(" ...\n%-26s %12s %12s\n", "tensor, element 0", "backward", "difference");
        for (const TensorInfo& t : model_.layout.tensors) {
            if (t.name.starts_with("h.1.")) continue;  // the second layer is like the first
            double& weight = model_.weights[t.offset];
            const double kept = weight, h = 1e-5;
            auto loss_with = [&](double w) { return weight = w, loss(); };
            const double above = loss_with(kept + h), below = loss_with(kept - h);
            weight = kept;
            std::printf("%-26s %12.8f %12.8f\n", t.name.c_str(), model_.grads[t.offset],
                        (above - below) / (2 * h));
        }
    }

    // Why m and v are divided: they start at 0, so after one step they are a tenth of g and a
    // twentieth of g^2. Corrected, m / sqrt(v) is g / |g|: the first step moves every weight by the
    // rate, however small its gradient (and decay by a little more).
    void show_update() {
        title("The update: clip, then AdamW, of the first weight of wte");
        before_ = next_words();
        // AdamW's first step by hand: m and v were 0.
        const StepState& state = *model_.state;
        const double clip = state.clip_scale, w = model_.weights[0], g = model_.grads[0] * clip;
        const double m = 0.1 * g, v = 0.05 * g * g, m_hat = m / 0.1, v_hat = v / 0.05;
        std::printf("norm of all gradients %.6f; the limit is 0.5: each is multiplied by %.6f\n",
                    state.grad_norm, clip);
        std::printf("g  = %.6f * %.6f = %.6f\n", model_.grads[0], clip, g);
        std::printf("m  = 0.9 * 0 + 0.1 g = %.8f;     m / (1 - 0.9^1)  = %.6f\n", m, m_hat);
        std::printf("v  = 0.95 * 0 + 0.05 g^2 = %.8f; v / (1 - 0.95^1) = %.6f\n", v, v_hat);
        std::printf("w  = %.6f - 0.1 (%.6f / (sqrt(%.6f) + 1e-8) + 0.1 * %.6f)\n   = %.6f\n", w,
                    m_hat, v_hat, w, w - 0.1 * (m_hat / (std::sqrt(v_hat) + 1e-8) + 0.1 * w));
    }

    // Why doubled: the mean of what the next layer reads stays what it is without dropout.
    void show_dropout() {
        title("Dropout 0.5 of the embedding, after the update: half is zeroed, half doubled");
        double x[kRows * kC];
        for (bool training : {true, false}) {
            const Dropout drop{random_key(1, 2, 3), training ? 0.5f : 0.0f};
            model_.device.embed_forward(x, model_.a.inputs, model_.w.wte, model_.w.wpe, 2, kT, kC,
                                        0, drop);
            show(training ? "training" : "evaluation", x, kC);
        }
    }

    // Words after "the cat sat on", the likeliest first.
    std::vector<Candidate> next_words() {
        return tinygpt::likeliest(candidates(next_logits(model_, {0, 1, 2, 3}, 0), 1), 0, 1);
    }
    // One step on eight tokens is enough to see the right word gain.
    void show_effect() {
        title("What the step changed: words after \"the cat sat on\" (the text has: the)");
        const std::vector<Candidate> after = next_words();
        std::printf("before            after one step\n");
        for (size_t i = 0; i < 5; ++i)
            std::printf("%-5s %.4f      %-5s %.4f\n", kWords[before_[i].token],
                        before_[i].probability, kWords[after[i].token], after[i].probability);
        std::printf("loss of the batch before %.6f, after %.6f\n", model_.state->loss, loss());
    }

    Gpt2<Watched<Reference<double>>> model_;
    const Batch batch_ = batch_of(2, kT, [](int i) { return kText[i]; });
    std::vector<Candidate> before_;  // of the update
};

// =================================================================================================
// 5 show: a page of what a model sees, or of how runs went
// =================================================================================================
// data/show.html is the page; here its numbers are computed and put in. The model reads the text
// once, watched: after each layer's attention the weights are made from qkv and lse (§4.5), after
// each layer ln_f and the head turn the residual stream into scores (the logit lens).

// A page: the template with these numbers in it. Why no '<': nothing in a text can end the script
// that holds them.
inline void write_page(const std::string& path, const Json& numbers) {
    const std::string page = "data/show.html", mark = ">DATA<";
    if (!file_exists(page))
        fail("expected the page ", page, ", found none: run show in the folder of tinygpt");
    std::string html = read_file(page, 10'000'000);
    const size_t at = html.find(mark);
    if (at == html.npos) fail(page, ": expected ", mark, " where the numbers go, found none");
    std::string json;
    for (char c : numbers.write()) json += c == '<' ? "\\u003c" : std::string(1, c);
    write_file(path, html.replace(at + 1, mark.size() - 2, json));
    say("page", path + ": open it in a browser");
}

constexpr char kBase64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// Seven digits: what a page needs of a double.
inline Json rounded(double x) {
    return std::isfinite(x) ? Json(*number_of<double>(format("%.7g", x))) : Json();
}

// The bits of some bytes, six at a time, as text (RFC 4648, without the padding at the end).
inline std::string base64(const std::string& bytes) {
    std::string text;
    uint32_t bits = 0;
    int held = 0;
    for (unsigned char byte : bytes)
        for (bits = bits << 8 | byte, held += 8; held >= 6; held -= 6)
            text += kBase64[bits >> (held - 6) & 63];
    if (held > 0) text += kBase64[bits << (6 - held) & 63];
    return text;
}

// A token's bytes as text; those that are no whole character as \xff.
inline std::string readable(const std::string& bytes) {
    std::string text;
    for (size_t i = 0, size; i < bytes.size(); i += std::max<size_t>(size, 1)) {
        size = utf8_character(std::string_view(bytes).substr(i)).bytes;
        text += size ? bytes.substr(i, size) : format("\\x%02x", uint8_t(bytes[i]));
    }
    return text;
}

// What the page shows of one text that a model reads.
template <class Device>
class Show {
public:
    Show(const Device& device, const Options& o, const Config& config, std::vector<int32_t> tokens,
         const std::optional<Tokenizer>& tokenizer)
        : tokenizer_(tokenizer), tokens_(std::move(tokens)), T_(int(tokens_.size())),
          first_(std::max(0, T_ - kAttentionTokens)),
          model_(open_model(Watched<Device>{device}, config, 1, T_, Use::evaluation, o.init_from)) {
        Batch batch(1, T_);
        batch.inputs = tokens_;
        Watched<Device>& d = model_->device;
        logits_ = d.template allocate<Real>(size_t(T_) * size_t(config.vocab_size));
        d.watcher = [this](const Call& call) { watch(call); };
        batch_losses(*model_, batch);
        d.watcher = nullptr;
    }
    ~Show() { model_->device.release(logits_); }

    Json numbers(const std::string& title) {
        const Config& c = model_->config;
        Json page = Json::object(), model = Json::object();
        model.set("n_layer", c.n_layer).set("n_head", c.n_head).set("n_embd", c.n_embd);
        model.set("vocab_size", c.vocab_size).set("parameters", model_->layout.count);
        page.set("title", title).set("model", model).set("prompt", Json::array(tokens_));
        add_predictions(page);
        page.set("attention_first", first_)
            .set("attention", attention_)
            .set("lens", Json::array(lens_));
        for (int32_t token : tokens_) name(token);
        page.set("texts", texts_);
        return page;
    }

private:
    using Real = typename Device::Real;
    using Activation = typename Device::Activation;
    static constexpr int kAttentionTokens = 128;  // of longer texts the last: a page has limits
    static constexpr int kExpected = 10, kNamed = 300;  // likeliest tokens; after the last one

    // After the embedding and each layer: the lens. After each layer's attention: its weights.
    void watch(const Call& call) {
        call.make();
        const auto& l = model_->a.layers[0];  // all layers share one set of buffers
        const int C = model_->config.n_embd;
        if (call.function == "embed_forward") add_lens(model_->a.embedded);
        if (call.function == "attention_forward") add_attention(l.qkv, l.lse);
        const bool ends_layer =
            call.function == "linear_residual_forward" && call.sizes[1] == 4 * C;
        if (ends_layer) add_lens(l.x_out);
    }

    template <class T>
    std::vector<double> host(const T* from, size_t count) {
        std::vector<T> values(count);
        model_->device.download(values.data(), from, count);
        std::vector<double> out(count);
        for (size_t i = 0; i < count; ++i) out[i] = double(float(values[i]));
        return out;
    }

    // p = e^(q.k / sqrt(HS) - lse), from position first_ on; 12 bits each, as two letters. Why sums
    // are rounded, and the steps from one to the next kept: so a row adds up to 1, as its p do.
    void add_attention(const Activation* qkv_on_device, const Real* lse_on_device) {
        const int C = model_->config.n_embd, NH = model_->config.n_head, HS = C / NH;
        const std::vector<double> qkv = host(qkv_on_device, size_t(T_) * 3 * C),
                                  lse = host(lse_on_device, size_t(NH) * T_);
        for (int h = 0; h < NH; ++h)
            for (int t = first_; t < T_; ++t) {
                double sum = 0;
                for (int t2 = first_, kept = 0; t2 <= t; ++t2) {
                    const double* q = &qkv[size_t(t) * 3 * C + h * HS];
                    const double* k = &qkv[size_t(t2) * 3 * C + C + h * HS];
                    const double score = std::inner_product(q, q + HS, k, 0.0) / std::sqrt(HS);
                    sum += std::exp(score - lse[size_t(h) * T_ + t]);
                    const int rounded_sum = int(std::lround(4095 * std::min(sum, 1.0)));
                    const int code = rounded_sum - std::exchange(kept, rounded_sum);
                    attention_ += kBase64[code >> 6], attention_ += kBase64[code & 63];
                }
            }
    }

    // The scores of what comes after each position, if x [T, C] were the last layer's stream.
    std::vector<float> scores(const Activation* x) {
        auto& m = *model_;
        const int C = m.config.n_embd, V = m.config.vocab_size;
        m.device.layernorm_forward(m.a.ln_f, m.a.ln_f_mean, m.a.ln_f_rstd, x, m.w.ln_f_weight,
                                   m.w.ln_f_bias, T_, C, m.config.layer_norm_epsilon);
        m.device.head_logits(logits_, m.a.ln_f, m.w.lm_head, T_, C, V);
        std::vector<Real> all(size_t(T_) * size_t(V));
        m.device.download(all.data(), logits_, all.size());
        return {all.begin(), all.end()};
    }
    std::vector<Candidate> distribution(int t) const {
        const size_t V = size_t(model_->config.vocab_size);
        return candidates({scores_.begin() + ptrdiff_t(t * V),
                           scores_.begin() + ptrdiff_t((t + 1) * V)},
                          1);
    }

    // The likeliest token at every position, its probability, and the length of the stream.
    void add_lens(const Activation* x) {
        const int C = model_->config.n_embd;
        scores_ = scores(x);
        const std::vector<double> stream = host(x, size_t(T_) * C);
        std::vector<Json> token, p, norm;
        for (int t = 0; t < T_; ++t) {
            const std::vector<Candidate> all = distribution(t);
            const Candidate top = likeliest(all, 1, 1)[0];
            const double* row = &stream[size_t(t) * C];
            token.push_back(name(top.token));
            p.push_back(rounded(all[size_t(top.token)].probability));
            norm.push_back(rounded(std::sqrt(std::inner_product(row, row + C, row, 0.0))));
        }
        lens_.push_back(Json::object()
                            .set("token", Json::array(token))
                            .set("p", Json::array(p))
                            .set("norm", Json::array(norm)));
    }

    // Surprise and expectations, from the scores of the last layer; and those of the last position.
    void add_predictions(Json& page) {
        std::vector<Json> surprise = {nullptr}, expected;  // the first token is not predicted
        for (int t = 0; t < T_; ++t) {
            const std::vector<Candidate> all = distribution(t);
            if (t + 1 < T_)
                surprise.push_back(
                    rounded(-std::log2(all[size_t(tokens_[size_t(t) + 1])].probability)));
            std::vector<Json> list;
            for (const Candidate& c : likeliest(all, t + 1 < T_ ? kExpected : kNamed, 1))
                list.push_back(Json::array(
                    std::vector<Json>{name(c.token), rounded(all[size_t(c.token)].probability)}));
            expected.push_back(Json::array(list));
        }
        page.set("surprise", Json::array(surprise)).set("expected", Json::array(expected));
        // As in sample: ids that have no token are never drawn.
        const int V = model_->config.vocab_size, drawn = tokenizer_ ? tokenizer_->vocab_size() : V;
        const float* last = scores_.data() + scores_.size() - size_t(V);
        page.set("logits", base64(std::string(reinterpret_cast<const char*>(last),
                                              size_t(drawn) * sizeof(float))));
    }

    // A token, whose text the page will need. Without a tokenizer it has none.
    Json name(int token) {
        const std::string id = std::to_string(token);
        if (!tokenizer_ || texts_.find(id)) return token;
        const bool end = token == tokenizer_->end_of_text();
        texts_.set(id, end ? std::string(kEndOfText) : readable(text_of_token(tokenizer_, token)));
        return token;
    }

    const std::optional<Tokenizer>& tokenizer_;
    const std::vector<int32_t> tokens_;
    const int T_, first_;
    std::unique_ptr<Gpt2<Watched<Device>>> model_;
    Real* logits_ = nullptr;     // [T, V], on the device
    std::vector<float> scores_;  // of the latest lens
    std::string attention_;
    std::vector<Json> lens_;
    Json texts_ = Json::object();
};

// The logs and samples of runs. Of long runs some rows are left out, but none with an evaluation.
inline Json numbers_of_runs(const std::vector<std::string>& folders) {
    std::vector<Json> runs;
    for (const std::string& folder : folders) {
        const std::vector<LogRow> rows = read_log(folder + "/log.csv", INT64_MAX);
        if (rows.empty()) fail(folder, " holds no run: expected rows in ", folder, "/log.csv");
        const size_t stride = ceil_div(rows.size(), size_t(4000));
        Json columns = Json::object();
        for (const LogColumn& column : kLogColumns) {
            std::vector<Json> values;
            for (size_t i = 0; i < rows.size(); ++i)
                if (i % stride == 0 || rows[i].val_loss || i + 1 == rows.size())
                    values.push_back(rounded((rows[i].*column.value).value_or(NAN)));
            columns.set(column.name, Json::array(values));
        }
        std::vector<Json> samples;
        const std::string path = folder + "/samples.txt";
        const std::string text = file_exists(path) ? "\n" + read_file(path) : "";
        for (size_t at = text.find("\n=== "), next; at != text.npos; at = next) {
            next = text.find("\n=== ", at + 1);
            const std::string entry = text.substr(at + 5, next - at - 5);
            const size_t end = std::min(entry.find('\n'), entry.size());
            samples.push_back(
                Json::object().set("title", entry.substr(0, end)).set("text", entry.substr(end)));
        }
        runs.push_back(Json::object()
                           .set("name", folder)
                           .set("columns", columns)
                           .set("samples", Json::array(samples)));
    }
    return Json::object()
        .set("title", runs.size() == 1 ? "a run" : "runs")
        .set("runs", Json::array(runs));
}

int show_command(auto device, const Options& o) {
    const std::string output = o.output.empty() ? "out/show.html" : o.output;
    if (o.output.empty()) make_folders("out");
    if (!o.runs.empty()) return write_page(output, numbers_of_runs(o.runs)), 0;
    const Config config = config_of_model(need_init_from(o));
    const std::optional<Tokenizer> tokenizer = tokenizer_of_model(o, config);
    std::vector<int32_t> tokens = prompt_tokens(o.prompt, tokenizer, config.vocab_size);
    // As a document begins, where there is a token that says so.
    if (tokenizer) tokens.insert(tokens.begin(), tokenizer->end_of_text());
    if (tokens.empty()) tokens.push_back(0);
    if (int(tokens.size()) > config.n_positions)
        fail_usage("--prompt has ", tokens.size(), " tokens, but the model has only ",
                   config.n_positions, " positions: give a shorter one");
    write_page(output, Show(device, o, config, tokens, tokenizer).numbers(o.init_from));
    return 0;
}

// =================================================================================================
// 6 export: the model as a GGUF file
// =================================================================================================
// What you have now: a folder that transformers opens. llama.cpp reads one file instead, GGUF
// (ggml's docs/gguf.md), version 3, little-endian; a text is its length in 64 bits, then its bytes:
//
//     "GGUF", 3 (32 bits)       number of tensors, number of members (64 bits each)
//     each member               name, type (32 bits), value; an array: type, length, values
//     each tensor               name, number of sizes (32 bits), sizes (64 bits), type (32 bits),
//                               where its bytes begin (64 bits), counted from the first tensor's
//     zeros to a multiple of 32, then the tensors' bytes, each filled up in the same way
//
// The sizes of a tensor stand in the other order there, fastest first. llama.cpp multiplies by
// matrices [out, in], so those of linear layers are turned round; ids without a token are left out.

// The header's members and tensors, as bytes.
struct GgufBytes {
    std::string bytes;
    size_t count = 0;  // of members

    // The numbers of the types are the format's.
    template <class Value>
    static constexpr uint32_t kType = std::is_same_v<Value, uint32_t>      ? 4
                                      : std::is_same_v<Value, int32_t>     ? 5
                                      : std::is_same_v<Value, float>       ? 6
                                      : std::is_same_v<Value, bool>        ? 7
                                      : std::is_same_v<Value, std::string> ? 8
                                                                           : 9;
    template <class Value>
    void put(const Value& value) {
        if constexpr (std::is_arithmetic_v<Value>) {
            bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
        } else if constexpr (std::is_same_v<Value, std::string>) {
            put(uint64_t(value.size())), bytes += value;
        } else {
            put(kType<typename Value::value_type>), put(uint64_t(value.size()));
            for (const auto& one : value) put(one);
        }
    }
    template <class Value>
    void member(const char* name, const Value& value) {
        put(std::string(name)), put(kType<Value>), put(value), ++count;
    }
};

// The name that llama.cpp has for a tensor of the list: h.3.ln_1.bias is blk.3.attn_norm.bias.
inline std::string gguf_name(std::string name) {
    static const std::pair<const char*, const char*> parts[] =
        {{"wte.", "token_embd."},          {"wpe.", "position_embd."},
         {"ln_f.", "output_norm."},        {"lm_head.", "output."},
         {"ln_1.", "attn_norm."},          {"attn.c_attn.", "attn_qkv."},
         {"attn.c_proj.", "attn_output."}, {"ln_2.", "ffn_norm."},
         {"mlp.c_fc.", "ffn_up."},         {"mlp.c_proj.", "ffn_down."}};
    if (name.starts_with("h.")) name = "blk." + name.substr(2);
    for (auto& [ours, theirs] : parts)
        if (const size_t at = name.find(ours); at != name.npos)
            return name.replace(at, std::strlen(ours), theirs);
    return name;
}

// IEEE half precision, rounded to nearest, ties to even; infinite where it is too large.
inline uint16_t f16_bits(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    // Exponents are biased by 127 there, by 15 here. Below 2^-14 the step is 2^-24, whatever the
    // exponent: so more bits are dropped.
    uint32_t from = a - (112u << 23), drop = 13;
    if (a < 113u << 23) from = (a & 0x7fffff) | 0x800000, drop = std::min(126 - (a >> 23), 31u);
    if (a >= 143u << 23) return uint16_t(sign | 0x7c00);
    const uint32_t half = (1u << (drop - 1)) - 1 + (from >> drop & 1);
    return uint16_t(sign | (from + half) >> drop);
}

// A type of weights: its number among the types of elements and among those of files.
struct GgufType {
    const char* name;
    uint32_t element, file;
    size_t bytes;
};
inline constexpr GgufType kGgufTypes[] = {{"f32", 0, 0, 4}, {"f16", 1, 1, 2}, {"bf16", 30, 32, 2}};

// A tensor as it is stored there. Positions and what has one dimension are small, and kept exact.
struct GgufTensor {
    std::vector<uint64_t> sizes;  // fastest first
    GgufType type;
    bool turned;  // [in, out] becomes [out, in]

    GgufTensor(const TensorInfo& info, const GgufType& wanted, int tokens)
        : sizes(info.shape.rbegin(), info.shape.rend()), type(wanted), turned(false) {
        const bool table = info.name == "wte.weight" || info.name == "lm_head.weight";
        if (table)
            sizes[1] = uint64_t(tokens);
        else if (sizes.size() < 2 || info.name == "wpe.weight")
            type = kGgufTypes[0];
        else
            turned = true, std::swap(sizes[0], sizes[1]);
    }
    size_t count() const { return sizes[0] * (sizes.size() > 1 ? sizes[1] : 1); }
    // Its bytes, of the values of the model's tensor.
    std::string bytes_of(const std::vector<float>& values, const std::string& name) const {
        const auto is_large = [](float value) { return std::abs(value) >= 65520; };
        if (type.element == 1 && std::ranges::any_of(values, is_large))
            fail(name, "a weight is beyond 65504, the largest of --type f16: use --type bf16");
        std::string out(count() * type.bytes, '\0');
#pragma omp parallel for
        for (size_t i = 0; i < count(); ++i) {
            const size_t in = i % sizes[0], row = i / sizes[0];
            const float value = values[turned ? in * sizes[1] + row : i];
            const uint16_t half = type.element == 1 ? f16_bits(value) : bf16(value).bits;
            const void* bytes = type.bytes == 4 ? static_cast<const void*>(&value) : &half;
            std::memcpy(&out[type.bytes * i], bytes, type.bytes);
        }
        return out;
    }
};

// What llama.cpp must know of the model. "gpt-2" names the pattern by which text is cut. Kinds of
// tokens: 1 text, 3 control.
inline GgufBytes gguf_members(const std::string& name, const Config& config,
                              const Tokenizer& tokenizer, const GgufType& type) {
    std::vector<std::string> names;
    for (int id = 0; id < tokenizer.vocab_size(); ++id) names.push_back(tokenizer.name_of(id));
    std::vector<int32_t> kinds(names.size(), 1);
    kinds.back() = 3;
    GgufBytes m;
    m.member("general.architecture", std::string("gpt2"));
    m.member("general.name", name);
    m.member("general.file_type", type.file);
    m.member("gpt2.block_count", uint32_t(config.n_layer));
    m.member("gpt2.context_length", uint32_t(config.n_positions));
    m.member("gpt2.embedding_length", uint32_t(config.n_embd));
    m.member("gpt2.feed_forward_length", uint32_t(4 * config.n_embd));
    m.member("gpt2.attention.head_count", uint32_t(config.n_head));
    m.member("gpt2.attention.layer_norm_epsilon", float(config.layer_norm_epsilon));
    m.member("tokenizer.ggml.model", std::string("gpt2"));
    m.member("tokenizer.ggml.pre", std::string("gpt-2"));
    m.member("tokenizer.ggml.tokens", names);
    m.member("tokenizer.ggml.token_type", kinds);
    m.member("tokenizer.ggml.merges", tokenizer.merge_names());
    m.member("tokenizer.ggml.bos_token_id", uint32_t(tokenizer.end_of_text()));
    m.member("tokenizer.ggml.eos_token_id", uint32_t(tokenizer.end_of_text()));
    m.member("tokenizer.ggml.add_bos_token", false);
    return m;
}

inline void write_gguf(const std::string& path, const std::string& folder, const Config& config,
                       const Tokenizer& tokenizer, const GgufType& type) {
    const std::vector<TensorInfo> infos = layout_of(config).tensors;
    const std::deque<SafetensorsFile> files = open_weights(folder);
    const std::vector<const StoredTensor*> stored = match_tensors(files, infos);
    const GgufBytes members = gguf_members(folder, config, tokenizer, type);
    GgufBytes all{"GGUF"};
    all.put(uint32_t(3)), all.put(uint64_t(infos.size())), all.put(uint64_t(members.count));
    all.bytes += members.bytes;
    size_t at = 0;
    for (const TensorInfo& info : infos) {
        const GgufTensor tensor(info, type, tokenizer.vocab_size());
        all.put(gguf_name(info.name)), all.put(uint32_t(tensor.sizes.size()));
        for (uint64_t n : tensor.sizes) all.put(n);
        all.put(tensor.type.element), all.put(uint64_t(at));
        at += round_up(tensor.count() * tensor.type.bytes, size_t(32));
    }
    FileWriter file(path);
    auto write_padded = [&](std::string bytes) {
        bytes.resize(round_up(bytes.size(), size_t(32)));
        file.write(bytes.data(), bytes.size());
    };
    write_padded(all.bytes);
    for (size_t i = 0; i < infos.size(); ++i) {
        std::vector<float> values(infos[i].count);
        stored[i]->file->read(*stored[i], values.data());
        write_padded(GgufTensor(infos[i], type, tokenizer.vocab_size())
                         .bytes_of(values, stored[i]->file->about(*stored[i])));
    }
    file.commit();
}

inline int export_command(const Options& o) {
    const Config config = config_of_model(need_init_from(o));
    if (o.output.empty())
        fail_usage("--output is missing: give the file to write, such as model.gguf");
    const std::optional<Tokenizer> tokenizer = tokenizer_of_model(o, config);
    if (!tokenizer)
        fail(o.init_from, " has no tokenizer, and a GGUF file needs one: expected vocab.json and ",
             "merges.txt, or tokenizer.json, beside the model");
    for (const GgufType& type : kGgufTypes)
        if (o.type == type.name) write_gguf(o.output, o.init_from, config, *tokenizer, type);
    say("written",
        to_text(o.output, ", ", bytes_text(double(InputFile(o.output).bytes)), " in ", o.type,
                "; with llama.cpp: llama-cli -m ", shell_word(o.output), " -p \"Once\""));
    return 0;
}

// =================================================================================================
// 7 main
// =================================================================================================
// What you have now: every command. A driver adds the device: its main gives `program` a function
// that makes one and calls run_command with it.

int run_command(auto device, const Options& o) {
    const bool shared = o.command == kTrain || o.command == kEval;
    if (device.ranks->rank != 0 && !shared) return 0;
    switch (o.command) {
        case kTrain: return train_command(device, o);
        case kEval: return eval_command(device, o);
        case kSample: return sample_command(device, o);
        case kInfo: return info_command(device, o);
        case kBench: return Bench(device, o).run(), 0;
        case kShow: return show_command(device, o);
        case kExport: return export_command(o);
        case kWalk: return Walk().run(), 0;
    }
    return 2;
}

// From here on numbers below 1.2e-38 (subnormals) count as zero, in this thread and in those it
// starts. Why: they mean nothing, a softmax that is sure of itself makes thousands of them, and
// arithmetic with each takes the CPU about a hundred cycles. (prepare_data copies weights, bit by
// bit, and computes with none: it needs no such thing.)
inline void flush_tiny_numbers() {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);  // FTZ and DAZ: results, operands
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" ::"r"(control | 1 << 24));  // FZ
#endif
}

// Lets waiting threads sleep soon: on a busy machine, spinning makes a step ten times slower.
// OpenMP reads these variables before main, so the program sets them and starts itself again.
inline void wait_politely(char** argv) {
    if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT") ||
        std::getenv("KMP_BLOCKTIME"))
        return;
    ::setenv("GOMP_SPINCOUNT", "10000", 0);  // libgomp: about 30 microseconds
    ::setenv("KMP_BLOCKTIME", "0", 0);       // libomp: milliseconds
    ::execvp(argv[0], argv);                 // if that fails, it runs as it is
}

// --- Ranks of MPI: mpirun starts them
#ifdef TINYGPT_MPI
class MpiRanks : public Ranks {
public:
    MpiRanks() {
        int threads = 0;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &threads);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &count);
        MPI_Comm machine;
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
        MPI_Comm_rank(machine, &rank_here), MPI_Comm_size(machine, &here);
        MPI_Comm_free(&machine);
        MPI_Comm_dup(MPI_COMM_WORLD, &watched_);
        share_cores();
        hosts_ = gather_hosts(*this);
        // Only rank 0 prints; an error still goes to standard error.
        if (rank != 0 && !std::freopen("/dev/null", "w", stdout)) std::fclose(stdout);
        if (const char* limit = std::getenv("TINYGPT_RANK_TIMEOUT")) limit_ = std::atof(limit);
        if (count > 1 && threads == MPI_THREAD_MULTIPLE)
            watcher_ = std::thread([this] { watch(); });
    }
    // Why the barrier: until all have come here, each is watched.
    ~MpiRanks() override {
        std::vector<MPI_Request> requests(1);
        MPI_Ibarrier(MPI_COMM_WORLD, requests.data());
        wait(requests);
        done_ = true;
        if (watcher_.joinable()) watcher_.join();
        MPI_Finalize();
    }

    void exchange(void* to, const void* from, size_t part) override {
        auto& requests = background_.emplace_back();
        for (int r = 0; r < count; ++r)
            swap(r, part_of(to, part, size_t(r)), part_of(from, part, size_t(r)), part, 1,
                 requests);
        on_their_way_ = true;
    }
    void begin_gather(void* array, size_t part) override {
        gather_round(array, part, 2, background_.emplace_back());
        on_their_way_ = true;
    }
    bool arrived(bool wait) override {
        int done = wait;
        auto& requests = background_.front();
        wait ? this->wait(requests)
             : void(MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE));
        if (done) background_.pop_front(), on_their_way_ = !background_.empty();
        return done;
    }
    void gather(void* array, size_t part, size_t rounds) override {
        for (size_t t = 0; t < rounds; ++t) {
            std::vector<MPI_Request> requests;
            gather_round(part_of(array, part * size_t(count), t), part, 3, requests);
            wait(requests);
        }
    }
    void broadcast(void* data, size_t size) override {
        for (size_t at = 0, n; at < size; at += n) {
            n = std::min(size - at, size_t(1) << 28);
            std::vector<MPI_Request> requests(1);
            MPI_Ibcast(static_cast<char*>(data) + at, int(n), MPI_BYTE, 0, MPI_COMM_WORLD,
                       requests.data());
            wait(requests);
        }
    }
    std::string name() const override { return rank == 0 ? "" : name_of(rank) + ": "; }
    // Why the alarm: with a machine that cannot be reached, MPI_Abort may never return.
    void end_all(int status) override {
        if (count == 1) return;
        ::signal(SIGALRM, SIG_DFL), ::alarm(5);
        MPI_Abort(MPI_COMM_WORLD, status);
        ::_exit(status);
    }

private:
    // Part r of an array of parts.
    static char* part_of(const void* array, size_t part, size_t r) {
        return static_cast<char*>(const_cast<void*>(array)) + r * part;
    }
    // Begins to send `from` [size] to a rank, and to receive as much from it. Why in pieces: larger
    // messages Open MPI 4 sends over TCP in one direction at a time, at half the speed of the line.
    // Tags: 1 exchange, 2 begin_gather, 3 gather. MPI matches each kind by itself, since two ranks
    // may not begin all rounds at the same place among other calls.
    void swap(int other, char* to, const char* from, size_t size, int tag,
              std::vector<MPI_Request>& requests) {
        for (size_t at = 0, n; at < size; at += n) {
            n = std::min(size - at, size_t(1) << 18);
            MPI_Irecv(to + at, int(n), MPI_BYTE, other, tag, MPI_COMM_WORLD,
                      &requests.emplace_back());
            MPI_Isend(from + at, int(n), MPI_BYTE, other, tag, MPI_COMM_WORLD,
                      &requests.emplace_back());
        }
        if (other != rank) bytes += double(size);
    }
    // Begins to send this rank's part of round [count, part] to all others, and to receive theirs.
    void gather_round(void* round, size_t part, int tag, std::vector<MPI_Request>& requests) {
        for (int r = 0; r < count; ++r)
            if (r != rank)
                swap(r, part_of(round, part, size_t(r)), part_of(round, part, size_t(rank)), part,
                     tag, requests);
    }
    // Waits for all; a rank that shares its core gives it up meanwhile.
    void wait(std::vector<MPI_Request>& requests) {
        const double begin = now_seconds();
        for (int done = 0, turns = 0;; ++turns) {
            MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
            if (done) break;
            turns < 1000 ? ::sched_yield() : ::usleep(20);
        }
        seconds += now_seconds() - begin;
    }
    std::string name_of(int rank) const {
        return to_text("rank ", rank, " on ", hosts_[size_t(rank)]);
    }

    // Why a child: mpirun would wait for a machine that it cannot reach, after it has killed this
    // rank.
    void end_mpirun() {
        const pid_t parent = ::getppid();
        auto name = [&] { return text_if_any(to_text("/proc/", parent, "/comm")); };
        if (rank != 0 || (name() != "mpirun\n" && name() != "mpiexec\n") || ::fork() != 0) return;
        for (int fd : {0, 1, 2}) ::close(fd);
        ::setsid(), ::sleep(5);
        if (name() != "") ::kill(parent, SIGKILL);
        ::_exit(0);
    }

    // Divides the cores of this machine among its ranks, whatever mpirun bound them to: Open MPI
    // gives each of two ranks one core, on which all threads would crowd.
    void share_cores() {
        cpu_set_t set;
        std::memset(&set, 0xff, sizeof set);
        if (::sched_setaffinity(0, sizeof set, &set) != 0) return;
        ::sched_getaffinity(0, sizeof set, &set);
        std::vector<std::array<int, 3>> cores;  // package, core, number
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &set)) continue;
            const std::string topology = to_text("/sys/devices/system/cpu/cpu", cpu, "/topology/");
            auto number = [&](const char* name) {
                return int(numbers_behind(text_if_any(topology + name))[0]);
            };
            cores.push_back({number("physical_package_id"), number("core_id"), cpu});
        }
        std::sort(cores.begin(), cores.end());
        const size_t n = cores.size(), begin = n * size_t(rank_here) / size_t(here),
                     end = std::max(begin + 1, n * size_t(rank_here + 1) / size_t(here));
        CPU_ZERO(&set);
        for (size_t i = begin; i < end; ++i) CPU_SET(cores[i][2], &set);
        ::sched_setaffinity(0, sizeof set, &set);
        omp_set_num_threads(int(end - begin));
    }

    // Rank 0 and every other send each other a sign of life each second. One that stays silent has
    // stopped, or was cut off. A rank that is only slow, or writes a checkpoint, is not silent: the
    // signs come from this thread.
    void watch() {
        std::vector<double> heard(size_t(count), now_seconds());
        std::vector<MPI_Request> sent(size_t(count), MPI_REQUEST_NULL);
        double last = now_seconds(), next = last;
        // MPI moves data only while it is called: so this thread calls it, while the other
        // computes.
        for (; !done_; ::usleep(on_their_way_ ? 200 : 50000)) {
            const double now = now_seconds();
            if (now - last > limit_ / 2)
                heard.assign(heard.size(), now);  // it was this one that stood still
            last = now;
            int there = 1;
            for (MPI_Status from; there;) {
                MPI_Iprobe(MPI_ANY_SOURCE, 0, watched_, &there, &from);
                if (!there) break;
                MPI_Recv(nullptr, 0, MPI_BYTE, from.MPI_SOURCE, 0, watched_, MPI_STATUS_IGNORE);
                heard[size_t(from.MPI_SOURCE)] = now;
            }
            if (now < next) continue;
            next = now + 1;
            for (int other = rank == 0 ? 1 : 0; other < (rank == 0 ? count : 1); ++other) {
                int free = 1;
                MPI_Test(&sent[size_t(other)], &free, MPI_STATUS_IGNORE);
                if (free) MPI_Isend(nullptr, 0, MPI_BYTE, other, 0, watched_, &sent[size_t(other)]);
                if (now - heard[size_t(other)] < limit_ + 0.1 * rank) continue;
                complain(31, "error:",
                         to_text(name_of(other), " has not answered for ", limit_,
                                 " seconds: all ranks end. Go on with --resume auto"));
                end_mpirun();
                end_all(1);
            }
        }
        for (MPI_Request& request : sent)
            if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
    }

    MPI_Comm watched_;
    std::deque<std::vector<MPI_Request>> background_;  // what was begun, in its order
    std::atomic<bool> on_their_way_{false};
    std::vector<std::string> hosts_;
    double limit_ = 30;  // seconds of silence
    std::atomic<bool> done_{false};
    std::thread watcher_;
};
inline std::unique_ptr<Ranks> start_ranks() {
    auto ranks = std::make_unique<MpiRanks>();
    world = ranks.get();
    return ranks;
}
#else
inline std::unique_ptr<Ranks> start_ranks() { return nullptr; }
#endif

// Reads the command line, hands the options to `run`, and turns errors into a line on standard
// error and an exit status. All errors end here; destructors tidy up on the way.
int program(int argc, char** argv, const char* name, auto&& run) {
    auto failed = [](int status, const std::string& message) {
        // Why sleep: what is wrong on all ranks, rank 0 says, and then ends all.
        if (world->rank != 0) ::sleep(2);
        complain(31, "error:", world->name() + message);
        world->end_all(status);
        return status;
    };
    try {
        const Options options = parse_options(std::vector<std::string>(argv + 1, argv + argc));
        if (options.help) return std::printf("%s", help_text(options, name).c_str()), 0;
        if (options.version) return std::printf("%s", version_text().c_str()), 0;
        if (options.quiet && !std::freopen("/dev/null", "w", stdout)) fail_errno("/dev/null");
        if (options.threads > 0) omp_set_num_threads(options.threads);
        const int threads = omp_get_max_threads(), cores = usable_cores();
        if (threads > cores)
            warn(to_text(threads, " threads share ", counted(cores, "core"),
                         ", which is slow: use --threads ", cores));
        const int status = run(options);
        // What a run makes is in its folder; what other commands make must have been printed.
        const bool printed = std::fflush(stdout) == 0 && !std::ferror(stdout);
        if (options.command == kTrain || printed || errno == EPIPE) return status;
        fail_errno("cannot write what is printed");
    } catch (const Error& e) {
        return failed(e.status, e.what());
    } catch (const std::bad_alloc&) {
        return failed(1, "out of memory: choose a smaller --batch-size or --model");
    } catch (const std::exception& e) {  // such as a thread that could not be started
        return failed(1, std::string(e.what()) + " (memory or threads are short)");
    }
}

// --- The machine: what it is, how much memory is free, and what it can do at best

// The least seconds that f takes, of so many runs: disturbances only ever make a run longer.
double least_seconds(int runs, auto&& f) {
    double least = INFINITY;
    for (int run = 0; run < runs; ++run) {
        const double begin = now_seconds();
        f();
        least = std::min(least, now_seconds() - begin);
    }
    return least;
}

// Multiplies and adds in registers, nothing else. Returns the operations a second of one thread.
// Why 12 sums: a core starts one or two of these operations a cycle and finishes each about four
// cycles later; sums that do not wait for each other keep it busy.
inline double registers_only_flops() {
    constexpr int kSums = 12, kRounds = 20000;
    float growth = 1.0000001f, step = 1e-7f;  // not const: nvcc 13 crashes on a constant vector
    const Vec<float> factor = Vec<float>{} + growth, addend = Vec<float>{} + step;
    Vec<float> sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = Vec<float>{} + float(i);
    const double seconds = least_seconds(8, [&] {
        for (int round = 0; round < kRounds; ++round)
#pragma GCC unroll 12
            for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + addend;
    });
    volatile float sink = 0;  // so that the sums are needed
    for (int i = 0; i < kSums; ++i) sink = sink + sums[i][0];
    return 2.0 * kSums * kLanes * kRounds / seconds;
}

// Operations a second of one thread in the product's tiles, with operands that lie in L1. What
// whole products lose against this they lose on packing, on the caches and on ragged edges. In fp32
// it is below what registers alone reach, because every step has to load as well.
template <class Tiles, class Number>
double tile_flops() {
    constexpr int R = Tiles::kRows, N = Tiles::kCols, kDeep = 256, kCalls = 500;
    [[maybe_unused]] Tiles setup{};
    alignas(64) float c[R * N] = {};
    const std::vector<Number> numbers(size_t(std::max(R, N)) * kDeep, Number(0.75f));
    const auto left = pack_left<Tiles>(0, View(numbers.data(), R, kDeep));
    const auto right = pack_right<Tiles>(1, View(numbers.data(), N, kDeep).transposed());
    const double seconds = least_seconds(8, [&] {
        for (int call = 0; call < kCalls; ++call) {
            Tiles::tile(c, N, left, right, R, Tiles::steps(kDeep), true);
            // Careful: without this the compiler may make one call and add it 500 times.
            asm volatile("" ::"r"(left.data), "r"(right.data), "r"(c) : "memory");
        }
    });
    return 2.0 * R * N * kDeep * kCalls / seconds;
}

// The sum of f() over all threads at once: cores that share a power budget, or an arithmetic unit,
// are slower together. Why f is a function: GCC 12 optimises work away that stands in the region.
inline double on_all_threads(double (*f)()) {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    total += f();
    return total;
}

// Bytes that this process could use without swapping: what the system calls available (or all,
// where it does not say), within the limits of its control groups. Copies of files (inactive_file)
// make room when it is needed. The root is another one in tests.
inline size_t usable_memory(const std::string& root = "") {
    double bytes = 1024 * numbers_behind(text_if_any(root + "/proc/meminfo"), "MemAvailable:")[0];
    if (bytes == 0) bytes = double(::sysconf(_SC_PHYS_PAGES)) * double(::sysconf(_SC_PAGESIZE));
    const auto limits = of_groups(root, "memory.max", "memory.limit_in_bytes");
    const auto used = of_groups(root, "memory.current", "memory.usage_in_bytes");
    const auto details = of_groups(root, "memory.stat");
    for (size_t i = 0; i < limits.size(); ++i) {
        const double limit = numbers_behind(limits[i])[0];
        const double files = numbers_behind(details[i], "inactive_file")[0];
        if (limit > 0)
            bytes = std::min(bytes, std::max(limit - numbers_behind(used[i])[0] + files, 0.0));
    }
    return size_t(bytes);
}

// The CPU as the program's device: what a program asks of the machine. Peaks are measured: a data
// sheet's number is rarely what is left of it in a container, or on a warm laptop.
template <class A>
struct Machine : CpuOf<A> {
    static constexpr const char* kProgram = "train_gpt";
    bool bf16_products() const { return this->kSeparateMasters && kHasPairs; }
    void check_sizes(const Config&, int /*B*/) const {}  // any will do

    // "CPU, 2 threads, vectors of 512 bits, fp32"
    std::string describe() const {
        const bool matrix_unit = with_tiles<bf16>([](auto tiles) { return tiles.kIsMatrix; });
        const char* precision = !this->kSeparateMasters ? "fp32"
                                : matrix_unit           ? "bf16, products on the matrix unit (AMX)"
                                : kHasPairs
                                    ? "bf16, products by vdpbf16ps"
                                    : "bf16 in memory, fp32 arithmetic: half the memory, "
                                      "not faster (no AVX512-BF16 here, or not built for it)";
        return to_text("CPU, ", counted(omp_get_max_threads(), "thread"), ", vectors of ",
                       kVectorBytes * 8, " bits, ", precision);
    }
    size_t free_memory() const { return usable_memory(); }
    // Operations a second: in registers alone; of the fp32 product's tiles with operands in L1; of
    // products in bf16, 0 where the CPU has none.
    double peak_flops() const { return on_all_threads(registers_only_flops); }
    double tile_peak_flops() const { return on_all_threads(tile_flops<PlainTiles, float>); }
    double bf16_peak_flops() const {
        if (!kHasPairs) return 0;
        return with_tiles<bf16>(
            [](auto tiles) { return on_all_threads(tile_flops<decltype(tiles), bf16>); });
    }
    // Bytes a second: all threads read 256 MB, far more than any cache holds. Why integers: the
    // compiler may add those in any order, and so a register full at a time.
    double peak_bandwidth() const {
        const size_t count = size_t(1) << 26;
        uint32_t* data = tinygpt::allocate<uint32_t>(count);
        // Why in parallel: memory lies near the thread that first writes it.
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < count; ++i) data[i] = 1;
        [[maybe_unused]] volatile uint32_t sink = 0;  // so that the sum is needed
        const double seconds = least_seconds(5, [&] {
            uint32_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
            for (size_t i = 0; i < count; ++i) total += data[i];
            sink = total;
        });
        std::free(data);
        return double(count * sizeof(uint32_t)) / seconds;
    }
};

inline int run_on_cpu(const Options& o) {
    if (o.precision == "tf32")
        fail_usage("--precision tf32 is for GPUs (./train_gpt_cu); a CPU has fp32 and bf16");
    if (o.tune_matmul)
        fail_usage("--tune-matmul is for GPUs (./train_gpt_cu): a CPU has one matmul kernel");
    return o.precision == "bf16" ? run_command(Machine<bf16>(), o)
                                 : run_command(Machine<float>(), o);
}

}  // namespace tinygpt

// train_gpt.cu and the tests include this file and have a main of their own.
#ifndef TRAIN_GPT_NO_MAIN
int main(int argc, char** argv) {
    using namespace tinygpt;
    wait_politely(argv);
    use_all_cores();
    flush_tiny_numbers();
    const auto ranks = start_ranks();
    return program(argc, argv, "train_gpt", run_on_cpu);
}
#endif
