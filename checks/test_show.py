#!/usr/bin/env python3
# checks/test_show.py: pages of `train_gpt show` in a real browser (headless Chromium). Pages of a trained
# model, of bytes with emoji and broken UTF-8, of hostile text, of one token, of a context that is full, of GPT-2's
# sizes with random weights, and of two runs. Each is opened, wide and narrow, and driven: what is pointed at,
# slid and typed must show what the numbers say. A message on the console is a failure. The attention of the
# reference folders is held to PyTorch's, where transformers is installed.
#
#     checks/test_show.py build/g++-native/train_gpt                     the test
#     checks/test_show.py build/g++-native/train_gpt docs out/stories    a picture of each panel, of that run
import base64, json, math, os, re, struct, subprocess, sys, tempfile

PROGRAM = os.path.abspath(sys.argv[1])
CHROMIUM = os.environ.get("CHROMIUM", "chromium")
CHROMIUM = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

# Runs inside the page, after its own script: acts as a user would and notes what is seen then.
DRIVE = """
const seen = {}, text = e => e ? e.textContent : null;
const input = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input")); };
const rows = () => [...document.querySelectorAll("#what-comes-next td[data-p]")].map(e => +e.dataset.p);
seen.panels = [...document.querySelectorAll("section")].map(e => e.id);
seen.heights = [...document.querySelectorAll("section")].map(e => e.offsetHeight);
seen.scripts = document.scripts.length;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
if (!D.runs) {
  const tokens = [...document.querySelectorAll("#tokens .token")], last = tokens.length - 1;
  seen.tokens = tokens.map(e => e.firstChild.textContent);
  tokens[last].dispatchEvent(new MouseEvent("mouseenter"));
  seen.hover = text(document.querySelector("#tokens [aria-live]"));
  tokens[last].focus();
  tokens[last].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
  seen.key = document.activeElement.dataset.t;
  seen.next = rows();
  input("temperature", 0.5); seen.cold = rows();
  input("temperature", 1); input("top-k", 3); seen.top_k = rows();
  input("top-k", 0); input("top-p", 0.5); seen.top_p = rows();
  input("temperature", 0); seen.zero = rows();
  document.getElementById("draw").click();
  seen.drawn = text(document.querySelector("#what-comes-next [aria-live] code"));
  const maps = document.querySelectorAll(".maps button");
  seen.maps = maps.length;
  maps[maps.length - 1].click();
  seen.attention = text(document.querySelector("#attention [aria-live]"));
  seen.habit = text(document.getElementById("habit"));
  const cell = [...document.querySelectorAll("#layer-by-layer tr")].at(-1).querySelectorAll("button");
  cell[cell.length - 1].focus();
  seen.lens = text(document.querySelector("#layer-by-layer [aria-live]"));
} else {
  for (const y of ["losses", "lr", "tokens_per_s"]) { document.getElementById("y").value = y; document.getElementById("y").dispatchEvent(new Event("change")); }
  document.getElementById("y").value = "losses"; document.getElementById("y").dispatchEvent(new Event("change"));
  input("from", 20); input("to", 60);
  seen.paths = document.querySelectorAll("#curves svg[role] path").length;
  const box = document.querySelector("#curves svg[role]").getBoundingClientRect();
  document.querySelector("#curves svg[role]").dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
  seen.values = text(document.querySelector("#curves [aria-live]"));
  const slider = document.querySelector("#samples input");
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  seen.sample = text(document.querySelector("#samples strong"));
}
const out = document.createElement("pre"); out.id = "seen"; out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
document.body.append(out);
"""


def run(*arguments, **more):
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, **more)
    if done.returncode:
        sys.exit("FAILED: %s\n%s" % (arguments, done.stderr.decode()))


def browse(page, width):
    """What the script saw in the page, opened in a window of that width."""
    with open(page) as file:
        html = file.read()
    driven = page + ".driven.html"
    with open(driven, "w") as file:
        file.write(html.replace("</body>", "<script>" + DRIVE + "</script></body>"))
    done = subprocess.run([*CHROMIUM, "--window-size=%d,3000" % width, "--dump-dom", "file://" + driven], capture_output=True, text=True, timeout=300)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen">([^<]*)</pre>', done.stdout)
    check(not console and found, "%s at %d: console %s" % (page, width, console or "has nothing, the script did not end"))
    return json.loads(base64.b64decode(found[1]))


def check(good, message):
    if not good:
        sys.exit("FAILED: " + message)


def sampled(logits, temperature, top_k, top_p):
    """§9 of tinygpt.hpp once more: the probabilities of the twelve likeliest tokens."""
    highest = max(logits)
    p = sorted((math.exp((l - highest) / (temperature or 1)) for l in logits), reverse=True)
    total = sum(p)
    p = [x / total for x in p][: top_k or None]
    count, reached, total = 0, 0.0, sum(p)
    while count < len(p) and (count == 0 or top_p >= 1 or reached < top_p * total):
        reached, count = reached + p[count], count + 1
    return [x / reached for x in p[:count]][:12]


def close(a, b):
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b))


def numbers(page):
    with open(page) as file:
        html = file.read()
    check(len(html) < 3_000_000, "%s has %d bytes, at most 3 MB are wanted" % (page, len(html)))
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def check_model(page):
    D, T = numbers(page), None
    logits = struct.unpack("<%df" % D["model"]["vocab_size"], base64.b64decode(D["logits"] + "=="))
    for width in (1100, 390):
        seen = browse(page, width)
        T = len(D["prompt"])
        check(seen["panels"] == ["tokens", "what-comes-next", "attention", "layer-by-layer", "one-block"], str(seen["panels"]))
        check(seen["scripts"] == 3, "%s: text became a script" % page)
        check(seen["wide"] <= 0, "%s is wider than a window of %d" % (page, width))
        check(len(seen["tokens"]) == T and seen["key"] == str(max(0, T - 2)), "%s: tokens, arrow keys" % page)
        if T > 1:
            check("%.2f bits" % D["surprise"][T - 1] in seen["hover"], seen["hover"])
        for name, wanted in (("next", (1, 0, 1)), ("cold", (0.5, 0, 1)), ("top_k", (1, 3, 1)), ("top_p", (1, 0, 0.5)), ("zero", (0, 1, 1))):
            check(close(seen[name], sampled(logits, *wanted)), "%s: %s shows %s, wanted %s" % (page, name, seen[name], sampled(logits, *wanted)))
        check(seen["drawn"], "%s: nothing was drawn" % page)
        check(seen["maps"] == D["model"]["n_layer"] * D["model"]["n_head"], "%s: %d maps" % (page, seen["maps"]))
        check(D["attention_first"] > 0 or "together 100.0 %" in seen["attention"], seen["attention"])
        last = attention(D)[-1][2:]
        before = 100 * sum(row[-2] for row in last) / max(1, len(last))
        check(not last or "%.*f %% from the token before" % (2 if before < 9.95 else 1, before) in seen["habit"], seen["habit"])
        check("length %.2f" % D["lens"][-1]["norm"][-1] in seen["lens"], seen["lens"])
        check(close([max(sampled(logits, 1, 0, 1))], [D["lens"][-1]["p"][-1]]), "%s: the last lens is not the logits" % page)
    print("%-28s %4d tokens, %7d bytes" % (os.path.basename(page), T, os.path.getsize(page)))


def attention(D):
    """The page's attention: for each head the rows, of 1, 2, ... weights."""
    code = iter(LETTERS.index(a) * 64 + LETTERS.index(b) for a, b in zip(D["attention"][::2], D["attention"][1::2]))
    T, heads = len(D["prompt"]) - D["attention_first"], D["model"]["n_layer"] * D["model"]["n_head"]
    return [[[next(code) / 4095 for _ in range(t + 1)] for t in range(T)] for _ in range(heads)]


def check_attention():
    """The rows of the page sum to 1, and are PyTorch's output_attentions to the page's 12 bits."""
    try:
        import torch, transformers
    except ImportError:
        return print("[skipped] attention beside PyTorch's: transformers is not installed (PYTHON=... names another Python)")
    for name in sorted(os.listdir("data/reference")):
        folder = "data/reference/" + name
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
        ids = [7 * t * t % model.config.vocab_size for t in range(min(40, model.config.n_positions) - 1)]
        with tempfile.TemporaryDirectory() as work:
            # Without the tokenizer's files a prompt is a list of ids.
            for file in ("config.json", "model.safetensors"):
                os.symlink(os.path.abspath(folder + "/" + file), work + "/" + file)
            run("show", "--init-from", work, "--prompt", " ".join(map(str, ids)), "--output", work + "/page.html")
            D = numbers(work + "/page.html")
        check(D["prompt"] == ids, "%s: the page's tokens are %s" % (name, D["prompt"]))
        with torch.no_grad():
            layers = model(torch.tensor([ids]), output_attentions=True).attentions
        worst = worst_sum = 0.0
        wanted = [head for layer in layers for head in layer[0].tolist()]
        for shown_head, head in zip(attention(D), wanted, strict=True):
            for shown, row in zip(shown_head, head, strict=True):
                worst = max(worst, max(abs(a - b) for a, b in zip(shown, row)))
                worst_sum = max(worst_sum, abs(sum(shown) - 1) / len(shown))
        check(worst < 0.6 / 4095 and worst_sum < 0.6 / 4095, "%s: attention differs by %g, its sums from 1 by %g an entry" % (name, worst, worst_sum))
        print("%-28s attention is PyTorch's, at most %.1e apart (a step of 12 bits is 2.4e-4)" % (name, worst))


def pictures(output, folder):
    """A picture of each panel, of a run's best model and of its curves."""
    with tempfile.TemporaryDirectory() as work:
        run("show", "--init-from", folder + "/best", "--prompt", "Once upon a time, a child called Leo lived at the beach. He was very gentle. One cold evening, he", "--output", work + "/model.html")
        run("show", "--runs", folder, "--output", work + "/runs.html")
        for page in (work + "/model.html", work + "/runs.html"):
            seen = browse(page, 1000)
            with open(page) as file:
                html = file.read()
            for panel, height in zip(seen["panels"], seen["heights"]):
                with open(work + "/panel.html", "w") as file:
                    file.write(html.replace("</style>", "h1, section:not(#%s) { display: none } section { margin: 0 } </style>" % panel))
                picture = "%s/show-%s.png" % (os.path.abspath(output), panel)
                subprocess.run([*CHROMIUM, "--hide-scrollbars", "--window-size=1000,%d" % (height + 32), "--screenshot=" + picture,
                                "file://" + work + "/panel.html"], check=True, capture_output=True, timeout=300)
                print(picture)


def main():
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if len(sys.argv) > 2:
        return pictures(*sys.argv[2:])
    check_attention()
    work = tempfile.mkdtemp()
    with open(work + "/text.txt", "wb") as file:
        file.write(bytes(range(256)) * 4 + "The cat sat on the mat. Grüße, 🐈!\n".encode() * 200)
    subprocess.run([os.path.dirname(PROGRAM) + "/prepare_data", "--input", work + "/text.txt", "--tokenizer", "byte", "--output", work + "/bytes"],
                   check=True, capture_output=True)
    small = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--batch-size", "4", "--max-steps", "60", "--eval-interval", "20"]
    run(*small, "--data", work + "/bytes", "--n-positions", "1024", "--seq-len", "32", "--sample-interval", "20", "--output", work + "/a")
    run(*small, "--data", work + "/bytes", "--seq-len", "32", "--seed", "2", "--sample-interval", "20", "--output", work + "/b")
    run("--model", "gpt2", "--vocab-size", "50257", "--train-shards", "data/reference/gpt2-tied/batch.bin", "--n-positions", "1024", "--seq-len", "8",
        "--batch-size", "1", "--max-steps", "1", "--eval-interval", "0", "--eval-batches", "0", "--sample-interval", "0", "--output", work + "/gpt2")
    texts = {"model": b"The cat sat on", "one": b"", "emoji": "🐈 mat \x01\x02".encode() + b"\xff\xc3(", "long": b"The cat sat on the mat. " * 42,
             "hostile": b'</script><script>document.title="x"</script><img src=x onerror=alert(1)> "\'`&lt; \\u003c\n'}
    for name, prompt in texts.items():
        page = "%s/%s.html" % (work, name)
        run("show", "--init-from", work + "/a/best", "--prompt", prompt, "--output", page)
        check_model(page)
    run("show", "--init-from", work + "/gpt2/checkpoint-1", "--prompt", " ".join(str(i * 37 % 50257) for i in range(127)), "--output", work + "/gpt2.html")
    check_model(work + "/gpt2.html")
    run("show", "--runs", work + "/a", work + "/b", "--output", work + "/runs.html")
    for width in (1100, 390):
        seen = browse(work + "/runs.html", width)
        check(seen["panels"] == ["curves", "samples"] and seen["paths"] == 4 and "val_loss" in seen["values"] and "20" in seen["sample"], str(seen))
        check(seen["wide"] <= 0, "runs.html is wider than a window of %d" % width)
    print("every page shows what the program computed")


if __name__ == "__main__":
    main()
