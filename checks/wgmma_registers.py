#!/usr/bin/env python3
# checks/wgmma_registers.py: does the compiler keep its hands off the registers of wgmma? Reads what
# `cuobjdump -sass FILE` prints, from standard input. In every kernel with an HGMMA:
#   - between its start and the wait that covers it, nobody writes to a register of its A or D;
#   - a left operand that is loaded (LDSM) for the first tile only is not overwritten later in the loop.
#     nvcc 13.0 does that to operands which are undefined before the loop.
import re
import sys

kernels, name = {}, None
for line in sys.stdin:
    if found := re.search(r"Function : (\S+)", line):
        name = found.group(1)
        kernels[name] = []
    elif found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?);", line):
        kernels[name].append((int(found.group(1), 16), found.group(2)))


def written(text):
    """The registers that an instruction writes."""
    found = re.match(r"(?:@!?U?P\w+ )?(\S+)\s+(?:(?:!?U?P\w+),\s*)*R(\d+)\b", text)
    if not found or re.match(r"ST|LDGSTS|BAR|RED|HGMMA", found.group(1)):
        return set()
    code, first = found.group(1), int(found.group(2))
    count = 4 if code.endswith((".4", ".128")) else 2 if ".64" in code or ".WIDE" in code or code.endswith(".2") else 1
    return set(range(first, first + count))


def check(code):
    mistakes, under_way, batch = [], [], set()
    for place, text in code:
        if product := re.search(r"HGMMA\S*\s+R(\d+), R(\d+)", text):
            d, a = int(product.group(1)), int(product.group(2))
            batch |= set(range(d, d + 32)) | set(range(a, a + 4))
            if "gsb0" in text:
                under_way, batch = under_way + [batch], set()
        elif wait := re.search(r"WARPGROUP.DEPBAR.LE gsb0, (0x\d+)", text):
            left = int(wait.group(1), 16)
            under_way = under_way[-left:] if left else []
        elif any(written(text) & busy for busy in under_way + [batch]):
            mistakes.append("%04x: %s: of a product that is under way" % (place, text))
    jumps = [(place, int(found.group(1), 16)) for place, text in code
             if (found := re.search(r"BRA\S*\s+(?:!?U?P\w+, )*`?\(?(0x[0-9a-f]+)", text))]
    for at, text in code:
        loops = [(to, end) for end, to in jumps if to <= at <= end]
        if "LDSM" not in text or not loops:
            continue
        begin, end = max(loops)  # the innermost
        if not any(begin <= place < at < to for place, to in jumps):
            continue  # nothing jumps over it: it is loaded each time
        loop = [one for one in code if begin <= one[0] <= end]
        operands = set()
        for _, t in loop:
            if product := re.search(r"HGMMA\S*\s+R\d+, R(\d+)", t):
                operands |= set(range(int(product.group(1)), int(product.group(1)) + 4))
        for place, t in loop:
            if "LDSM" not in t and written(t) & written(text) & operands:
                mistakes.append("%04x: %s: of an operand that was loaded before" % (place, t))
    return mistakes


groups = {kernel: check(code) for kernel, code in kernels.items() if any("HGMMA" in text for _, text in code)}
for kernel, mistakes in groups.items():
    for mistake in mistakes:
        print(kernel, mistake)
print("%d kernels with wgmma, %d mistakes" % (len(groups), sum(map(len, groups.values()))))
sys.exit(not groups or any(groups.values()))
