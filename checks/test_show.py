#!/usr/bin/env python3
# checks/test_show.py: pages of `train_gpt show` in a real browser (headless Chromium). Pages of a trained
# model, of bytes with emoji and broken UTF-8, of hostile text, of one token, of a context that is full, of GPT-2's
# sizes with random weights, and of two runs. Each is opened, wide and as on a phone, and used: with a mouse, with keys
# alone, with a finger; what is shown then must be what the numbers say, and the numbers what the program
# computes. A message on the console is a failure. Where transformers is installed, the reference folders'
# predictions, attention and lens are held to PyTorch's.
#
#     checks/test_show.py build/g++-native/train_gpt                     the test
#     checks/test_show.py build/g++-native/train_gpt docs out/stories    a picture of each panel, of that run
import base64, json, math, os, re, select, struct, subprocess, sys, tempfile

sys.path.pop(0)  # transformers looks for a module `kernels`; checks/kernels.py is not that
PROGRAM = os.path.abspath(sys.argv[1])
CHROMIUM = os.environ.get("CHROMIUM", "chromium") + " --headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
STORY = "Once upon a time, a child called Leo lost his orange hat. Soon a fox came to help him. Leo told his mother about the"


class Browser:
    """Chromium, told by the DevTools protocol what to do: JSON messages, each ended by a zero byte, over two pipes."""

    def __init__(self):
        theirs_in, self.to = os.pipe()
        self.come, theirs_out = os.pipe()
        self.process = subprocess.Popen(["sh", "-c", "exec %s 3<&%d 4>&%d" % (CHROMIUM, theirs_in, theirs_out)],
                                        pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.held, self.count, self.console, self.session, self.loaded = b"", 0, [], {}, False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")

    def read(self):
        while b"\0" not in self.held:
            come, _, _ = select.select([self.come], [], [], 120)
            check(come and (more := os.read(self.come, 1 << 20)), "the browser ended, or is silent")
            self.held += more
        message, self.held = self.held.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(str(message["params"])[:500])
        self.loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def call(self, method, **params):
        self.count += 1
        os.write(self.to, json.dumps({"id": self.count, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            pass
        check("error" not in answer, "%s: %s" % (method, answer.get("error")))
        return answer["result"]

    def open(self, page, width, dark=False, finger=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=finger)
        self.call("Emulation.setTouchEmulationEnabled", enabled=finger)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.loaded = False
        self.call("Page.navigate", url="file://" + page)
        while not self.loaded:
            self.read()

    def js(self, expression):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        check("exceptionDetails" not in answer, "%s: %s" % (expression, answer.get("exceptionDetails")))
        return answer["result"].get("value")

    def text(self, selector):
        return self.js("document.querySelector(%s)?.textContent" % json.dumps(selector))

    def place(self, selector, right=0.5, down=0.5):
        return self.js("(e => { e.scrollIntoView({block: 'center', inline: 'center'}); const b = e.getBoundingClientRect();"
                       "return {x: b.x + %g * b.width, y: b.y + %g * b.height} })(document.querySelector(%s))" % (right, down, json.dumps(selector)))

    def hover(self, selector, **where):
        for at in ({"x": 1, "y": 1}, self.place(selector, **where)):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)

    def click(self, selector, **where):
        at = self.place(selector, **where)
        for kind, button in (("mouseMoved", "none"), ("mousePressed", "left"), ("mouseReleased", "left")):
            self.call("Input.dispatchMouseEvent", type=kind, button=button, clickCount=1, **at)

    def tap(self, selector):
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.place(selector)])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name):
        more = {"text": "\r"} if name == "Enter" else {}
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[name]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def slide(self, name, value):
        self.js("(e => { e.value = %s; e.dispatchEvent(new Event(e.type === 'range' ? 'input' : 'change')) })(document.getElementById('%s'))"
                % (json.dumps(value), name))


def check(good, message):
    if not good:
        sys.exit("FAILED: " + message)


def run(*arguments):
    done = subprocess.run([PROGRAM, *arguments], capture_output=True)
    check(done.returncode == 0, "%s\n%s" % (arguments, done.stderr.decode()))
    return done.stdout.decode(errors="replace")


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


def close(a, b, difference=1e-6):
    return len(a) == len(b) and all(abs(x - y) < difference for x, y in zip(a, b))


def percent(p):
    return "%.*f %%" % (2 if p < 0.0995 else 1, 100 * p)


def numbers(page):
    with open(page) as file:
        html = file.read()
    check(len(html) < 3_000_000, "%s has %d bytes, at most 3 MB are wanted" % (page, len(html)))
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def logits_of(D):
    data = base64.b64decode(D["logits"] + "==")
    return struct.unpack("<%df" % (len(data) // 4), data)


def attention(D):
    """The page's attention: for each head the rows, of 1, 2, ... weights."""
    code = iter(LETTERS.index(a) * 64 + LETTERS.index(b) for a, b in zip(D["attention"][::2], D["attention"][1::2]))
    T, heads = len(D["prompt"]) - D["attention_first"], D["model"]["n_layer"] * D["model"]["n_head"]
    return [[[next(code) / 4095 for _ in range(t + 1)] for t in range(T)] for _ in range(heads)]


SAMPLERS = ((1, 0, 1), (0.5, 0, 1), (1, 3, 1), (1, 0, 0.5), (1.5, 20, 0.8), (0, 1, 1))


def check_sampler(browser, page, D, folder=None):
    """The sliders move the bars as §9 would; where a folder is named, as `sample --show-top` says."""
    for temperature, top_k, top_p in SAMPLERS:
        for name, value in (("temperature", temperature), ("top-k", top_k), ("top-p", top_p)):
            browser.slide(name, value)
        shown = browser.js("[...document.querySelectorAll('#what-comes-next td[data-p]')].map(e => +e.dataset.p)")
        wanted = sampled(logits_of(D), temperature, top_k, top_p)
        check(close(shown, wanted), "%s: temperature %g, top-k %g, top-p %g: it shows %s, wanted %s" % (page, temperature, top_k, top_p, shown, wanted))
        if folder:
            lines = run("sample", "--init-from", folder, "--prompt", " ".join(map(str, D["prompt"])), "--show-top", "12", "--temperature", str(temperature),
                        "--top-k", str(top_k), "--top-p", str(top_p)).splitlines()
            check(close(shown, [float(line.split()[0]) / 100 for line in lines], 1e-6), "%s: `sample` says %s, the page %s" % (page, lines, shown))
    browser.click("#draw")
    check(browser.text("#what-comes-next [aria-live] code"), "%s: nothing was drawn" % page)


def check_choice(browser, page, D):
    """A token that is pointed at is chosen in all panels; a click or Enter holds it; a second one or Escape lets go."""
    T = len(D["prompt"])

    def chosen():
        return browser.js("[...document.querySelectorAll('.token.chosen')].map(e => +e.dataset.t)")

    def at(t, what):
        check(chosen() == [t] * 3, "%s: %s: token %d is wanted in three panels, found %s" % (page, what, t, chosen()))

    def token(t, panel="#tokens"):
        return "%s .tokens [data-t='%d']" % (panel, t)

    a, b = T // 3, T // 2
    browser.hover(token(a)), at(a, "pointed at")
    browser.hover(token(b, "#attention")), at(b, "pointed at, in attention")
    browser.hover("#layer-by-layer [data-l='0'][data-t='%d']" % a), at(a, "pointed at, in the lens")
    browser.click(token(b)), browser.hover(token(a)), at(b, "held")
    check(T == 1 or "is held" in browser.text("#bar"), browser.text("#bar"))
    browser.click(token(a)), browser.hover(token(b)), at(a if a != b else b, "another click holds another")
    browser.js("choice.held = true")
    browser.key("Escape"), browser.hover(token(b)), at(b, "let go by Escape")
    browser.click(token(b)), browser.click(token(b)), browser.hover(token(a)), at(a, "let go by a second click")
    # Keys alone: few tab stops, arrows within a list.
    browser.click("h1")
    browser.js("choose(%d)" % b)
    stops = 0
    while stops < 40:
        browser.key("Tab")
        if browser.js("document.activeElement === document.body"):
            break
        stops += 1
        browser.js("document.activeElement.dataset.stop = %d" % stops)
    check(stops <= 20, "%s: %d tab stops" % (page, stops))
    lists = browser.js("['#tokens .tokens', '#attention .tokens', '.maps', '#layer-by-layer'].map(list => document.querySelectorAll(list + ' [role=button][data-stop]').length)")
    check(lists == [1] * 4, "%s: tab stops in each list: %s" % (page, lists))
    browser.js("document.querySelector(\"%s\").focus()" % token(b))
    browser.key("ArrowRight"), at(min(b + 1, T - 1), "arrow key")
    browser.key("Enter"), browser.hover(token(a)), at(min(b + 1, T - 1), "Enter holds")
    browser.key("Escape")
    browser.js("choose(%d, %d), document.querySelector('#layer-by-layer .chosen').focus()" % (b, D["model"]["n_layer"]))
    browser.key("ArrowUp")
    check(browser.js("document.activeElement.dataset.l") == str(D["model"]["n_layer"] - 1), "%s: the arrow key in the lens" % page)
    browser.js("document.getElementById('temperature').value = 1, document.getElementById('temperature').focus()")
    browser.key("ArrowRight")
    check(browser.js("document.getElementById('temperature').value") == "1.05", "%s: the arrow key at a slider" % page)


def check_shown(browser, page, D):
    """What the panels say of a token, of a head and of a cell is what the numbers say."""
    T, n_head, first = len(D["prompt"]), D["model"]["n_head"], D["attention_first"]
    heads, t = attention(D), len(D["prompt"]) - 1
    browser.js("choose(%d, %d)" % (t, len(D["lens"]) - 1))
    if T > 1:
        said = "The model gave it %s: %.2f bits" % (percent(2 ** -D["surprise"][t]), D["surprise"][t])
        check(said in browser.text("#tokens [aria-live]"), browser.text("#tokens [aria-live]"))
    check("length %.2f" % D["lens"][-1]["norm"][-1] in browser.text("#layer-by-layer [aria-live]"), browser.text("#layer-by-layer [aria-live]"))
    check(browser.js("document.querySelectorAll('.maps canvas').length") == len(heads), "%s: not a map for every head" % page)
    last = len(heads) - 1
    browser.click(".maps [data-l='%d'][data-h='%d']" % divmod(last, n_head))
    check(first > 0 or "whole row: 100.0 %" in browser.text(".reads"), browser.text(".reads"))
    row = heads[last][-1]
    shown = browser.js("[...document.querySelectorAll('#attention .token small')].slice(%d).map(e => +e.textContent.slice(1))" % first)
    check(close(shown, [100 * w for w in row], 0.051), "%s: the last row is %s, shown %s" % (page, row, shown))
    browser.hover(".map canvas", right=0.8 / len(row), down=1 - 0.5 / len(row))
    said = re.search(r"\(row (\d+)\) reads (\S+ %) from .*\(column (\d+)\)", browser.text("#attention .two-lines"), re.S)
    check(said and said.groups() == (str(t), percent(row[0]), str(first)), browser.text("#attention .two-lines"))
    check(browser.js("[...document.querySelectorAll('.map .here')].map(e => [...e.parentNode.children].indexOf(e))") == [len(row) - 1] * 2,
          "%s: the axes do not mark the row" % page)
    if len(row) > 2:
        means = [[sum(row[at(t)] for t, row in enumerate(head) if t > 1) / (len(head) - 2) for at in (lambda t: t - 1, lambda t: 0, lambda t: t)] for head in heads]
        for mean in means[last]:
            check(percent(mean) in browser.text("#habit"), browser.text("#habit"))
        for i, said in enumerate(browser.js("[...document.querySelectorAll('#leaders button')].map(e => e.textContent)")):
            best = max(range(len(heads)), key=lambda k: means[k][i])
            check(said == "%d.%d: %s" % (*divmod(best, n_head), percent(means[best][i])), "%s: the leading head is %d, said %s" % (page, best, said))
        small = browser.js("[...document.querySelectorAll('.maps [role=button]')].map(e => e.textContent)")
        check(all("%.0f" % (100 * max(mean)) in text or abs(100 * max(mean) % 1 - 0.5) < 1e-3 for mean, text in zip(means, small)), str(small))
    if len(row) > 3:
        k, t2 = max(((k, t2) for k in range(len(heads)) for t2 in range(1, len(row) - 2)), key=lambda at: heads[at[0]][-1][at[1]])
        check(percent(heads[k][-1][t2]) in browser.text("#far button"), browser.text("#far"))
        browser.click("#far button")
        check(percent(heads[k][-1][t2]) in browser.text(".reads p"), browser.text(".reads"))


def check_model(browser, page, folder=None):
    D = numbers(page)
    T, heads = len(D["prompt"]), D["model"]["n_layer"] * D["model"]["n_head"]
    check(not any("\ufffd" in text for text in D["texts"].values()), "%s: bytes are lost" % page)
    check(close([max(sampled(logits_of(D), 1, 0, 1))], [D["lens"][-1]["p"][-1]]), "%s: the last lens is not the logits" % page)
    for width, dark in ((1100, False), (390, True)):
        browser.open(page, width, dark, finger=width < 500)
        panels = browser.js("[...document.querySelectorAll('section')].map(e => e.id)")
        check(panels == ["tokens", "what-comes-next", "attention", "layer-by-layer", "one-block"], str(panels))
        check(browser.js("document.scripts.length + document.images.length") == 2, "%s: text became a script or a picture" % page)
        check(browser.js("document.documentElement.scrollWidth") <= width, "%s is wider than a window of %d" % (page, width))
        check(browser.js("getComputedStyle(document.body).backgroundColor") == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)"), "%s: light and dark" % page)
        if width < 500:
            token = T // 2
            browser.tap("#attention .tokens [data-t='%d']" % token)
            check(browser.js("[choice.t, choice.held].join()") == "%d,true" % token, "%s: a finger holds a token: %s" % (page, browser.text("#bar")))
            browser.tap("#attention .tokens [data-t='%d']" % token)
            check(not browser.js("choice.held"), "%s: a second tap lets go" % page)
            continue
        check_choice(browser, page, D)
        check_shown(browser, page, D)
        check_sampler(browser, page, D, folder)
        copied = browser.js("getSelection().selectAllChildren(document.querySelector('#tokens .tokens')), getSelection().toString()")
        wanted = browser.js("D.prompt.map((id, t) => token_text(id) + (t ? D.surprise[t].toFixed(1) : '')).join('')")
        check("".join(copied.split("\n")) == wanted, "%s: copied, the tokens are %r" % (page, copied))
    check(not browser.console, "%s: the console says %s" % (page, browser.console))
    print("%-28s %4d tokens, %3d heads, %7d bytes" % (os.path.basename(page), T, heads, os.path.getsize(page)))


def check_runs(browser, page):
    D = numbers(page)
    for width in (1100, 390):
        browser.open(page, width, finger=width < 500)
        check(browser.js("[...document.querySelectorAll('section')].map(e => e.id).join()") == "curves,samples", "panels")
        check(browser.js("document.documentElement.scrollWidth") <= width, "%s is wider than a window of %d" % (page, width))
        for name in browser.js("[...document.getElementById('y').options].map(e => e.value)") + ["losses"]:
            browser.slide("y", name)
            have = sum(any(v is not None for v in run["columns"][c]) for run in D["runs"] for c in (("train_loss", "val_loss", "floor") if name == "losses" else (name,)))
            check(browser.js("document.querySelectorAll('#curves svg[role] path').length") == have, "%s: %s has not %d curves" % (page, name, have))
        for over in ("tokens", "seconds", "step"):
            browser.slide("x", over)
        for box in ("#log-x", "#log-x", "#log-y", "#log-y"):
            browser.click(box) if width > 500 else browser.tap(box)
            # Ticks are round numbers.
            ticks = browser.js("[...document.querySelectorAll('#curves svg[role] text')].map(e => e.textContent)")
            check(5 <= len(ticks) <= 30 and all(float(t.replace(",", "")) == float("%.2g" % float(t.replace(",", ""))) for t in ticks), str(ticks))
        browser.slide("from", 20), browser.slide("to", 60)
        # The values under the pointer are the log's, of the nearest row.
        browser.js("document.querySelector('#curves svg[role]').focus()")
        browser.key("ArrowLeft"), browser.key("ArrowRight")
        if width > 500:
            browser.hover("#curves svg[role]")
        said = browser.text("#curves [aria-live]").splitlines()
        check(len(said) == 4, str(said))
        for _ in range(30):
            browser.key("ArrowRight")
        check(browser.text("#curves [aria-live]").splitlines() != said, "arrow keys do not move the pointer")
        for line in said:
            name, column, step, value = re.match(r"(.*)  (\w+)  step (\d+): (\S+)", line).groups()
            columns = next(run for run in D["runs"] if run["name"] == name)["columns"]
            check(columns[column][columns["step"].index(int(step))] == float(value) and abs(int(step) - 24) <= 4, line)
        if width > 500:
            # A drag across the picture zooms.
            for kind, right in (("mousePressed", 0.3), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
                browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **browser.place("#curves svg[role]", right=right))
            zoomed = browser.js("['from', 'to'].map(id => +document.getElementById(id).value)")
            check(20 < zoomed[0] < zoomed[1] < 60, "zoomed to %s" % zoomed)
        browser.js("(e => { e.value = 0; e.dispatchEvent(new Event('input')) })(document.querySelector('#samples input'))")
        check(browser.text("#samples strong") == D["runs"][0]["samples"][0]["title"] and browser.text("#samples pre") == D["runs"][0]["samples"][0]["text"], "samples")
    check(not browser.console, "%s: the console says %s" % (page, browser.console))
    print("%-28s %4d runs, %7d bytes" % (os.path.basename(page), len(D["runs"]), os.path.getsize(page)))


def check_reference(browser):
    """The reference folders: predictions, lens and attention are PyTorch's, and the sliders' list is `sample`'s."""
    try:
        import torch, transformers
    except ImportError:
        return print("[skipped] the page beside PyTorch: transformers is not installed (PYTHON=... names another Python)")
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
            check_model(browser, work + "/page.html", work)
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
            # The streams after the embedding and each layer; the last of hidden_states has ln_f behind it.
            streams = [*out.hidden_states[:-1], None]
            lens = [model.lm_head(model.transformer.ln_f(x)) if x is not None else out.logits for x in streams]
            p = [torch.softmax(scores[0], -1) for scores in lens]
        for l, shown in enumerate(D["lens"]):
            check(close(shown["p"], p[l].max(-1).values.tolist()) and close(shown["p"], [p[l][t][i].item() for t, i in enumerate(shown["token"])]), "%s: lens %d" % (name, l))
            if streams[l] is not None:
                check(close(shown["norm"], streams[l][0].norm(dim=-1).tolist(), 1e-4), "%s: norms of lens %d" % (name, l))
        check(close([2**-s for s in D["surprise"][1:]], [p[-1][t][i].item() for t, i in enumerate(ids[1:])]), "%s: surprise" % name)
        for t, expected in enumerate(D["expected"]):
            check(close([x for _, x in expected], p[-1][t].topk(len(expected)).values.tolist()), "%s: what is expected after token %d" % (name, t))
        worst = 0.0
        wanted = [head for layer in out.attentions for head in layer[0].tolist()]
        for shown_head, head in zip(attention(D), wanted, strict=True):
            for shown, row in zip(shown_head, head, strict=True):
                worst = max(worst, max(abs(a - b) for a, b in zip(shown, row)))
                check(abs(sum(shown) - 1) < 1e-9, "%s: a row of attention adds up to %.17g" % (name, sum(shown)))
        check(worst < 1.01 / 4095, "%s: attention differs by %g" % (name, worst))
        print("%-28s predictions and lens are PyTorch's to 1e-6, attention to %.1e (a step of 12 bits is 2.4e-4)" % (name, worst))


def pictures(output, folder):
    """A picture of each panel, of a run's best model and of its curves."""
    browser = Browser()
    with tempfile.TemporaryDirectory() as work:
        run("show", "--init-from", folder + "/best", "--prompt", STORY, "--output", work + "/model.html")
        run("show", "--runs", folder, "--output", work + "/runs.html")
        for page in ("model", "runs"):
            browser.open("%s/%s.html" % (work, page), 1000)
            browser.js("document.head.append(el('style', {}, '#bar { display: none }'))")
            for panel in browser.js("[...document.querySelectorAll('section')].map(e => e.id)"):
                # Of the tokens the one that surprised most; elsewhere the last one.
                browser.js("D.runs || choose(%s)" % ("D.surprise.indexOf(Math.max(...D.surprise))" if panel == "tokens" else "D.prompt.length - 1"))
                box = browser.js("(b => ({x: b.x - 8, y: b.y + scrollY - 8, width: b.width + 16, height: b.height + 16, scale: 1}))"
                                 "(document.getElementById('%s').getBoundingClientRect())" % panel)
                picture = "%s/show-%s.png" % (output, panel)
                with open(picture, "wb") as file:
                    file.write(base64.b64decode(browser.call("Page.captureScreenshot", clip=box, captureBeyondViewport=True)["data"]))
                print(picture)


def main():
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if len(sys.argv) > 2:
        return pictures(*sys.argv[2:])
    with tempfile.TemporaryDirectory() as work:
        browser = Browser()
        check_reference(browser)
        check_pages(browser, work)
    print("every page shows what the program computed")


def check_pages(browser, work):
    """Pages of small models that are trained here, of GPT-2's sizes, and of two runs."""
    with open(work + "/text.txt", "w") as file:
        file.write("The cat sat on the mat. Grüße, 🐈!\n" * 200)
    subprocess.run([os.path.dirname(PROGRAM) + "/prepare_data", "--input", work + "/text.txt", "--tokenizer", "byte", "--output", work + "/bytes"],
                   check=True, capture_output=True)
    small = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--batch-size", "4", "--max-steps", "60", "--eval-interval", "20"]
    run(*small, "--data", work + "/bytes", "--n-positions", "1024", "--seq-len", "32", "--sample-interval", "20", "--output", work + "/a")
    run(*small, "--data", work + "/bytes", "--seq-len", "32", "--seed", "2", "--sample-interval", "20", "--output", work + "/b")
    run("--model", "gpt2", "--vocab-size", "50257", "--train-shards", "data/reference/gpt2-tied/batch.bin", "--n-positions", "1024", "--seq-len", "8",
        "--batch-size", "1", "--max-steps", "1", "--eval-interval", "0", "--eval-batches", "0", "--sample-interval", "0", "--output", work + "/gpt2")
    texts = {"model": b"The cat sat on", "one": b"", "emoji": "🐈 mat \x01\x02".encode() + b"\xff\xc3(", "long": b"The cat sat on the mat. " * 42 + b"The cat sat on ",
             "hostile": b'</script><script>document.title="x"</script><img src=x onerror=alert(1)> "\'`&lt; \\u003c\n<!--'}
    for name, prompt in texts.items():
        page = "%s/%s.html" % (work, name)
        run("show", "--init-from", work + "/a/best", "--prompt", prompt, "--output", page)
        check_model(browser, page)
    run("show", "--init-from", work + "/gpt2/checkpoint-1", "--prompt", " ".join(str(i * 37 % 50257) for i in range(128)), "--output", work + "/gpt2.html")
    check_model(browser, work + "/gpt2.html")
    run("show", "--runs", work + "/a", work + "/b", "--output", work + "/runs.html")
    check_runs(browser, work + "/runs.html")


if __name__ == "__main__":
    main()
