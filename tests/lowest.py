"""Every requirement of settings.ini at its lower bound, one line each.

    python tests/lowest.py > lowest.txt
    pip install -c lowest.txt .
"""

import re
from configparser import ConfigParser
from pathlib import Path

def lowest(requirements: str) -> list[str]:  # "a>=1 b>=2,<3" -> a==1, b==2
    "The lower bounds as constraints; raises `ValueError` for a requirement without one"
    found = {r: re.fullmatch(r'([\w.-]+)>=([\w.]+)(,<[\w.]+)?', r) for r in requirements.split()}
    if odd := [r for r, m in found.items() if m is None]:
        raise ValueError(f'no lower bound in {" ".join(odd)}; write name>=version')
    return [f'{m[1]}=={m[2]}' for m in found.values()]


if __name__ == '__main__':
    settings = ConfigParser()
    settings.read(Path(__file__).parent.parent / 'settings.ini')
    print(*lowest(settings['DEFAULT']['requirements']), sep='\n')
