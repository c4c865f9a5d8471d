#!/usr/bin/env python3
"""Write the table of §13 of tinygpt.hpp: Unicode's letters, numbers and white space, as text.

    pip install regex==2026.5.9      # Unicode 17.0
    python3 checks/unicode_classes.py

The code points 0, 1, 2, ... fall into runs of one class (0 other, 1 letter, 2 number, 3 space).
A run is the number (length - 1) * 4 + class, in base 32, lowest digit first; the digits are the 64
characters from '0' to 'p' without the backslash, the upper 32 of them when more digits follow.
"""
import regex

LETTER, NUMBER, SPACE = (regex.compile(p) for p in (r"\p{L}", r"\p{N}", r"\s"))


def class_of(code):
    c = chr(code)
    return 1 if LETTER.match(c) else 2 if NUMBER.match(c) else 3 if SPACE.match(c) else 0


def digit(value):
    code = ord("0") + value
    return chr(code + (code >= ord("\\")))


def main():
    classes = [class_of(code) for code in range(0x110000)]
    out, start = "", 0
    for code in range(1, 0x110000):
        if classes[code] == classes[start]:
            continue
        value = (code - start - 1) * 4 + classes[start]
        while value >= 32:
            out += digit(32 + value % 32)
            value //= 32
        out += digit(value)
        start = code
    for i in range(0, len(out), 92):
        print('    "' + out[i:i + 92] + '"')


if __name__ == "__main__":
    main()
