#!/usr/bin/env python3
"""Holds tinygpt against Hugging Face's transformers, in both directions, and against llama.cpp.

    make test_hf                      needs Python with torch, transformers and llama-cpp-python
                                      (PYTHON=... names it)
    checks/test_hf.py TRAIN_GPT PREPARE_DATA

1. Folders that transformers wrote: several shapes, the head tied or not, names with and without the
   prefix, one file or several, float32, bfloat16 and float16. Loss and 50 greedy tokens must be the
   same here. (Logits: `make test`, with such folders in data/reference.)
2. Folders that tinygpt wrote: transformers must open model and tokenizer as they are, with the same
   loss, the same tokens of a text and the same 50 greedy tokens; and what transformers then saves
   again (of the tokenizer only tokenizer.json) must come back here bit for bit.
3. GGUF files that tinygpt exported: llama.cpp must have the same tokens of every golden text, and
   the same 50 greedy tokens, for the type of the weights in each.
"""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # transformers looks for a module `kernels`; checks/kernels.py is not that
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
try:
    import torch
    import tokenizers
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
except ImportError as error:
    sys.exit(f"test_hf: {error}. It needs torch and transformers: pip install torch transformers, "
             "and PYTHON=... if that is not python3")
try:
    from llama_cpp import Llama
except ImportError:
    Llama = None

TRAIN_GPT, PREPARE_DATA = sys.argv[1:3]
LOSS_LIMIT, NEW_TOKENS = 1e-5, 50
TEXT = ("Once upon a time, Mia's dog couldn't find 3 red apples.\n\n  \"Where are they?\" she "
        "asked. It's naïve — 東京 🙂 \t!!  The end. \n")

# name: layers, heads, channels, positions, vocabulary, tied, form of the names, type
#   prefix   as save_pretrained of the language model writes them
#   bare     as save_pretrained of the model without its head writes them
#   openai   as the published GPT-2: no prefix, and the causal masks are in the file
#   spare    the tied head is in the file a second time
#   module   as DistributedDataParallel and torch.compile name them
#   shards   in several files
#   score    with the head of another task, a layernorm epsilon and an activation of its own
#   small    with weights that float16 can only hold as subnormals
CASES = {
    "tied": (2, 2, 16, 64, 300, True, "prefix", "float32"),
    "openai": (2, 4, 16, 60, 257, True, "openai", "float32"),
    "untied-bf16": (1, 5, 20, 70, 333, False, "bare", "bfloat16"),
    "untied": (3, 3, 48, 96, 515, False, "prefix", "float32"),
    "bare": (4, 8, 64, 61, 301, True, "bare", "float32"),
    "spare": (1, 1, 24, 75, 1000, True, "spare", "float32"),
    "bf16": (2, 2, 128, 128, 2048, True, "prefix", "bfloat16"),
    "f16": (2, 12, 96, 64, 400, True, "prefix", "float16"),
    "f16 small": (2, 2, 32, 64, 300, True, "small", "float16"),
    "wrapped": (2, 2, 16, 64, 300, False, "module", "float32"),
    "shards": (3, 2, 32, 64, 300, True, "shards", "float32"),
    "score": (2, 2, 16, 64, 300, True, "score", "float32"),
}


def run(*command):
    """The standard output of a program; an error is the test's error."""
    done = subprocess.run([str(part) for part in command], capture_output=True)
    if done.returncode:
        sys.exit(f"test_hf: {' '.join(map(str, command))}\n{done.stderr.decode()}")
    return done.stdout


def random_tokens(seed, count, vocab):
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_shard(path):
    with open(path, "rb") as file:
        data = file.read()
    return list(struct.unpack(f"<{len(data) // 2 - 512}H", data[1024:]))


def tokens_of(text, folder, output):
    """The tokens of a file, with the vocabulary of a folder."""
    shutil.rmtree(output, ignore_errors=True)
    run(PREPARE_DATA, "--input", text, "--tokenizer", "gpt2", "--vocab", folder, "--val-fraction", 0,
        "--output", output)
    return read_shard(f"{output}/train_000001.bin")


def make_folder(folder, seed, layers, heads, channels, positions, vocab, tied, form, dtype):
    """A model of random weights, saved by transformers in one file."""
    torch.manual_seed(seed)
    # Without a name for the end of text it is GPT-2's, 50256, whatever the vocabulary.
    ends = {} if dtype == "float16" else {"bos_token_id": vocab - 1, "eos_token_id": vocab - 1}
    if form == "small":
        ends |= {"layer_norm_epsilon": 1e-12}
    if form == "score":
        ends |= {"layer_norm_epsilon": 1e-2, "activation_function": "gelu_fast"}
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=layers, n_head=heads, n_embd=channels, n_positions=positions, vocab_size=vocab,
        tie_word_embeddings=tied, initializer_range=0.2, **ends))
    with torch.no_grad():  # biases and norms that are not 0 and 1, so that none can be forgotten
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        if form == "small":  # most are below 6.1e-5; the layernorms make them large again
            for name, parameter in model.named_parameters():
                if "wte" in name or "wpe" in name:
                    parameter *= 1e-4
    model = model.to(getattr(torch, dtype))
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="20KB")
        assert not os.path.exists(f"{folder}/model.safetensors")
        return
    (model.transformer if form == "bare" and tied else model).save_pretrained(folder)
    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    if form in ("bare", "openai"):
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    if form == "openai":
        mask = torch.tril(torch.ones(1, 1, positions, positions))
        weights |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(layers)}
    if form == "spare":
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    if form == "module":
        weights = {"module._orig_mod." + name: w for name, w in weights.items()}
    if form == "score":
        weights["score.weight"] = torch.ones(2, channels)
    if form not in ("prefix", "small"):
        save_file(weights, path, metadata={"format": "pt"})


def open_folder(folder, form=""):
    """The model as transformers opens it, computing in float32."""
    if form == "module":  # transformers has no names for wrapped models
        config = GPT2Config.from_pretrained(folder)
        model = GPT2LMHeadModel(config)
        model.load_state_dict({name.removeprefix("module._orig_mod."): w for name, w in
                               load_file(f"{folder}/model.safetensors").items()})
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_loss(model, tokens, T):
    """Every prediction of the shard once, in windows of T that lie end to end."""
    total = 0.0
    for begin in range(0, len(tokens) - 1, T):
        window = tokens[begin:begin + T + 1]
        total += torch.nn.functional.cross_entropy(
            model(torch.tensor([window[:-1]])).logits[0].double(), torch.tensor(window[1:]), reduction="sum").item()
    return total / (len(tokens) - 1)


def their_greedy(model, tokens, end):
    return model.generate(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)),
                          max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end,
                          pad_token_id=0)[0].tolist()[len(tokens):]


def our_greedy(folder, prompt):
    """What sample writes behind the prompt, as bytes."""
    out = run(TRAIN_GPT, "sample", "--init-from", folder, "--prompt", prompt,
              "--max-new-tokens", NEW_TOKENS, "--temperature", 0)
    assert out.startswith(prompt.encode()), out
    return out[len(prompt.encode()):-1]


class Table:
    """Prints a row of figures for every folder, and remembers whether one was out of bounds."""
    good = True
    FORMAT = "{:24} {:>11} {:>11} {:>8} {:>8}  {}"

    def __init__(self, title):
        print("\n" + title)
        print(self.FORMAT.format("folder", "loss", "difference", "greedy", "text", "result"))

    def row(self, name, folder, model, shard, T, greedy, text="-", same=True):
        """The loss on the shard is compared here; the rest is told."""
        loss = their_loss(model, read_shard(shard), T)
        out = run(TRAIN_GPT, "eval", "--init-from", folder, "--val-shards", shard,
                  "--batch-size", 2, "--seq-len", T).decode()
        difference = abs(float(re.search(r"val loss\s+(\S+)", out)[1]) - loss)
        good = difference <= LOSS_LIMIT and same
        Table.good &= good
        print(self.FORMAT.format(name, f"{loss:.7f}", f"{difference:.1e}", greedy, text,
                                 "ok" if good else "WRONG"), flush=True)


def opened_here(temporary):
    """Part 1: folders of transformers."""
    table = Table("written by transformers, opened here")
    for seed, (name, shape) in enumerate(CASES.items()):
        folder, shard = f"{temporary}/{name}", f"{temporary}/{name}.bin"
        make_folder(folder, seed, *shape)
        T, model = min(48, shape[3]), open_folder(folder, shape[6])
        tokens = random_tokens(seed, 5 * T + 12, shape[4])
        with open(shard, "wb") as file:
            file.write(struct.pack(f"<256i{len(tokens)}H", 20240520, 1, len(tokens), *[0] * 253, *tokens))
        # Without a tokenizer, sample takes and writes token numbers.
        prompt = tokens[:shape[3] - NEW_TOKENS]
        theirs = their_greedy(model, prompt, None)
        ours = our_greedy(folder, " ".join(map(str, prompt)) + " ")
        ours = [int(token) for token in ours.split()]
        same = sum(a == b for a, b in zip(ours, theirs))
        table.row(f"{name} {shape[7]}", folder, model, shard, T, f"{same}/{len(theirs)}",
                  same=ours == theirs)


def make_our_folders(temporary):
    """Trains three tiny models for a few steps; yields name, data folder and model folder."""
    with open(f"{temporary}/text.txt", "w", encoding="utf-8") as file:
        file.write("".join(f"{n}. {TEXT}" for n in range(400)))
    for tokenizer, more in (("bpe", ["--vocab-size", 400]), ("byte", [])):
        run(PREPARE_DATA, "--input", f"{temporary}/text.txt", "--tokenizer", tokenizer,
            *more, "--output", f"{temporary}/data-{tokenizer}")
    for name, tokenizer, more in (("bpe", "bpe", []), ("byte", "byte", ["--n-layer", 3]),
                                  ("bpe untied", "bpe", ["--untied-head"])):
        data, out = f"{temporary}/data-{tokenizer}", f"{temporary}/run {name}"
        run(TRAIN_GPT, "--data", data, "--output", out, "--n-layer", 2, "--n-head", 2,
            "--n-embd", 32, "--n-positions", 128, "--seq-len", 64, "--batch-size", 4, "--max-steps",
            60, "--learning-rate", 1e-2, *more)
        yield name, data, out + "/best"


def opened_there(temporary):
    """Part 2: folders of tinygpt."""
    table = Table("written here, opened by transformers")
    for name, data, folder in make_our_folders(temporary):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.dtype == torch.float32, model.dtype
        tokenizer = AutoTokenizer.from_pretrained(folder)
        end = tokenizer.eos_token_id
        assert end == model.config.vocab_size - 1 == model.generation_config.eos_token_id, end
        # The tokens of a text, with the model's own folder as the vocabulary.
        with open(f"{temporary}/text.txt", encoding="utf-8") as file:
            text = file.read()
        ids = tokens_of(f"{temporary}/text.txt", folder, f"{temporary}/tokens")
        same_text = ids == [end] + tokenizer(text).input_ids and tokenizer.decode(ids[1:]) == text
        # Greedy: the same text, up to its end.
        prompt = "12. Once upon"
        theirs = their_greedy(model, tokenizer(prompt).input_ids, end)
        same = our_greedy(folder, prompt).decode(errors="replace") == tokenizer.decode(
            theirs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # And back: saved again by transformers, not a bit differs. Of the tokenizer it writes
        # tokenizer.json alone; from that, and from ours alone, the same tokens come.
        model.save_pretrained(f"{temporary}/again")
        tokenizer.save_pretrained(f"{temporary}/tokenizer {name}")
        assert not os.path.exists(f"{temporary}/tokenizer {name}/vocab.json")
        same_text &= ids == tokens_of(f"{temporary}/text.txt", f"{temporary}/tokenizer {name}",
                                      f"{temporary}/tokens")
        alone = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        same_text &= alone.encode(text).ids == ids[1:] and alone.decode(ids[1:]) == text
        before, after = (load_file(f"{where}/model.safetensors") for where in (folder, f"{temporary}/again"))
        back = before.keys() == after.keys() and all(
            before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)
        table.row(name, folder, model, f"{data}/val_000000.bin", 64, len(theirs) if same else "differs",
                  "same" if same_text else "differs", same and same_text and back)


def golden_texts():
    """Texts that have gone wrong somewhere, with GPT-2's tokens of them where those are known."""
    shared = os.environ.get("TINYGPT_SHARED", "../shared") + "/data"
    texts = [(text, None) for text in (TEXT, "a", " ", "a   b", "\n\nA", "DON'T don't ''s x'sy", "½ Ⅷ ² 3.14",
             "e\u0301 naïve\u00a0\u3000x", "<|endoftext|>", "😀" * 3, "=" * 100, "\t\tif (x) {\r\n")]
    if os.path.exists(f"{shared}/gpt2_golden.jsonl"):
        with open(f"{shared}/gpt2_golden.jsonl", encoding="utf-8") as file:
            texts += [(line["text"], line["ids"]) for line in map(json.loads, file) if line["text"]]
    return texts, shared


def our_tokens(temporary, folder, texts):
    """The tokens of each text, with the vocabulary of a folder."""
    with open(f"{temporary}/texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    end, *tokens = tokens_of(f"{temporary}/texts.jsonl", folder, f"{temporary}/tokens")
    lists = [[]]
    for token in tokens:
        lists.append([]) if token == end else lists[-1].append(token)
    return lists


def folders_to_export(temporary):
    """Name, folder and a prompt: those that tinygpt trained, and one of GPT-2's own vocabulary."""
    for name in ("bpe", "byte", "bpe untied"):
        yield name, f"{temporary}/run {name}/best", "12. Once upon"
    shared = golden_texts()[1]
    if not os.path.exists(f"{shared}/vocab.bpe"):
        print(f"skipped: GPT-2's vocabulary is not in {shared}")
        return
    folder = f"{temporary}/gpt2-vocabulary"
    make_folder(folder, 7, 2, 2, 32, 128, 50257, True, "prefix", "float32")
    shutil.copy(f"{shared}/encoder.json", f"{folder}/vocab.json")
    shutil.copy(f"{shared}/vocab.bpe", f"{folder}/merges.txt")
    yield "gpt2's vocabulary", folder, "Every effort moves you"


def exported(temporary):
    """Part 3: GGUF files of tinygpt, in llama.cpp."""
    title = "exported here, opened by llama.cpp"
    if Llama is None:
        print(f"\n{title}: skipped: pip install llama-cpp-python")
        return
    print(f"\n{title}\n{'folder':24} {'type':5} {'texts':>9} {'greedy':>8}  result")
    for name, folder, prompt in folders_to_export(temporary):
        texts = [text for text, _ in golden_texts()[0]]
        ours = our_tokens(temporary, folder, texts)
        if name.startswith("gpt2"):
            assert all(known in (None, ids) for (_, known), ids in zip(golden_texts()[0], ours))
        # Without a tokenizer, sample takes and writes token numbers.
        bare = f"{temporary}/numbers {name}"
        os.makedirs(bare)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(f"{folder}/{file}", bare)
        start = our_tokens(temporary, folder, [prompt])[0]
        greedy = [int(token) for token in our_greedy(
            bare, " ".join(map(str, start)) + " ").split()]
        for kind in ("f32", "f16", "bf16"):
            path = f"{temporary}/model.gguf"
            run(TRAIN_GPT, "export", "--init-from", folder, "--output", path, "--type", kind)
            # f32 keys and values, as here
            llama = Llama(path, n_ctx=0, n_threads=1, verbose=False, type_k=0, type_v=0)
            theirs = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
            same_texts = sum(a == b for a, b in zip(ours, theirs))
            tokens = []
            for token in llama.generate(start, temp=0.0, top_k=1, repeat_penalty=1.0):
                tokens.append(token)
                if len(tokens) == NEW_TOKENS:
                    break
            same = sum(a == b for a, b in zip(greedy, tokens))
            good = same_texts == len(texts) and same == NEW_TOKENS
            Table.good &= good
            print(f"{name:24} {kind:5} {same_texts:>5}/{len(texts)} {same:>5}/{NEW_TOKENS}  "
                  f"{'ok' if good else 'WRONG'}", flush=True)
            for a, b, text in zip(ours, theirs, texts):
                if a != b:
                    print(f"    {text!r}: {a}, llama.cpp {b}")


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; limits: loss "
          f"{LOSS_LIMIT:g}, {NEW_TOKENS} greedy tokens the same")
    with tempfile.TemporaryDirectory(prefix="tinygpt-hf-") as temporary:
        opened_here(temporary)
        opened_there(temporary)
        exported(temporary)
    print("\ntest_hf: " + ("all agree" if Table.good else "NOT the same"))
    return 0 if Table.good else 1


if __name__ == "__main__":
    sys.exit(main())
