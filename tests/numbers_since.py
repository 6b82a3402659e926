"""Name the numbers that an edit changed: ``python tests/numbers_since.py REVISION FILE ...``.

For each file the script lists the numbers that the revision has and the working tree lacks (-), and the reverse (+),
each with the lines that hold it. A notebook's text (with captions and alt texts), code and outputs are compared
separately. Numbers within names, addresses and LaTeX commands count too, so read the list and judge each line.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from reading import parts

NUMBER = re.compile(r"(?<![\w.])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def numbers(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


def main(revision: str, *paths: str) -> None:
    for path in paths:
        shown = subprocess.run(["git", "show", f"{revision}:{path}"], capture_output=True, text=True, check=True)
        before, now = parts(path, shown.stdout), parts(path, Path(path).read_text(encoding="utf-8"))
        for kind in now:
            gone, new = numbers(before[kind]) - numbers(now[kind]), numbers(now[kind]) - numbers(before[kind])
            for sign, changed, text in (("-", gone, before[kind]), ("+", new, now[kind])):
                for number, count in changed.items():
                    lines = [line.strip() for line in text.splitlines() if number in NUMBER.findall(line)]
                    print(f"{path} {kind} {sign} {number} ({count}): " + " | ".join(line[:120] for line in lines[:3]))


if __name__ == "__main__":
    main(*sys.argv[1:])
