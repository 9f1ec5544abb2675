"""Speed and memory of one iteration, beside its floor: `sid-lsg bench`, over a list of settings.

    python benchmarks/run.py cpu         # measure the rows for a CPU (about 10 minutes on 2 cores), then write README.md,
                                         # and the sentence on speed in the repository's README.md and nbs/index.ipynb
    python benchmarks/run.py gpu         # the rows for a GPU with 24 GB or more: Stable Diffusion 1.5 at 512², random weights
    python benchmarks/run.py gpu-fp16-4  # single rows by name
    python benchmarks/run.py day         # take in what gpu_day.py left in the folder `day`, then write README.md
    python benchmarks/run.py             # only write README.md from what was measured

Each row leaves NAME.json with the machine in words and the date. A row without a file says "not run" in the table.
"""

import json, re, subprocess, sys
from pathlib import Path

HERE = Path(__file__).parent
SD = '--teacher random-sd15 --device cuda'
ROWS = {  # name: options of `sid-lsg bench`
    'cpu-4': '--micro-batch 4',
    'cpu-16': '--micro-batch 16',
    'cpu-16-kappa1': '--micro-batch 16 --kappa 1',
    'cpu-16-sequential': '--micro-batch 16 --sequential-gradient',
    'cpu-16-checkpointing': '--micro-batch 16 --gradient-checkpointing',
    'cpu-16-both': '--micro-batch 16 --sequential-gradient --gradient-checkpointing',
    'cpu-16-lora': '--micro-batch 16 --lora both --lora-rank 16',
    'cpu-16-bf16': '--micro-batch 16 --mixed-precision bf16',
    'gpu-fp32-4': f'{SD} --micro-batch 4',
    'gpu-tf32-4': f'{SD} --micro-batch 4 --tf32',
    'gpu-bf16-4': f'{SD} --micro-batch 4 --mixed-precision bf16',
    'gpu-bf16-1': f'{SD} --micro-batch 1 --mixed-precision bf16',
    'gpu-bf16-8': f'{SD} --micro-batch 8 --mixed-precision bf16',
    'gpu-bf16-16': f'{SD} --micro-batch 16 --mixed-precision bf16',
    'gpu-fp32-1': f'{SD} --micro-batch 1',
    'gpu-fp32-8': f'{SD} --micro-batch 8',
    'gpu-fp16-16': f'{SD} --micro-batch 16 --mixed-precision fp16',
    'gpu-fp16-4': f'{SD} --micro-batch 4 --mixed-precision fp16',
    'gpu-fp16-8': f'{SD} --micro-batch 8 --mixed-precision fp16',
    'gpu-bf16-4-channels-last': f'{SD} --micro-batch 4 --mixed-precision bf16 --channels-last',
    'gpu-bf16-4-compile': f'{SD} --micro-batch 4 --mixed-precision bf16 --compile',
    'gpu-bf16-4-sequential': f'{SD} --micro-batch 4 --mixed-precision bf16 --sequential-gradient',
    'gpu-bf16-4-checkpointing': f'{SD} --micro-batch 4 --mixed-precision bf16 --gradient-checkpointing',
    'gpu-fp16-1-24gb': f'{SD} --micro-batch 1 --mixed-precision fp16 --sequential-gradient --gradient-checkpointing',
    'gpu-fp16-1-lora': f'{SD} --micro-batch 1 --mixed-precision fp16 --gradient-checkpointing --lora both',
    'gpu-pure-fp16-4': f'{SD} --micro-batch 4 --weight-dtype fp16',
}

RECIPE = '''### The recipe

On a machine with PyTorch and one NVIDIA GPU, with or without a network; a checkout of this repository is all it needs.

```sh
python benchmarks/gpu_day.py --out /tmp/rehearsal --device cpu --tiny     # before: two minutes, every line of the script, no GPU
python benchmarks/gpu_day.py wheels .whl --python 3.12                                  # before, where a network is: what an image with PyTorch, transformers,
                                                                          # accelerate and peft lacks (diffusers among it); a dozen MB
python -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site    # there; if where.json still says "missing", fetch those too
python benchmarks/gpu_day.py --out day                                    # there: nine minutes; day/PART.json is whole after every finding
python benchmarks/run.py day && python benchmarks/cifar10.py table        # home again: the tables above and below
```

With real data: `python benchmarks/cifar10.py data` where a network is leaves `runs/cifar10/cifar10.safetensors` (184 MB) and `inception.pt` (87 MB).
If only so much can be carried at once, cut them with `split -b 45m FILE FILE.`, append piece by piece there (`cat FILE.?? >> FILE`), and give the folder with `--folder`.
A day leaves `day/state-*.bin` (at most 15 MiB each, `--pieces 1` of them, so that seven JSON files and one piece come back); a second day goes on with

```sh
python benchmarks/gpu_day.py --out day2 --only real --state day --pieces 6
```
'''.splitlines()

def command(name: str) -> list[str]:
    return ['bench', *ROWS[name].split(), *(['--device', 'cpu'] if name.startswith('cpu') else [])]

def settings(name: str) -> dict:
    "The same as fields of `Bench`"
    words, out = command(name)[1:], {}
    for i, w in enumerate(words):
        if not w.startswith('--'):
            continue
        value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith('--') else True
        out[w[2:].replace('-', '_')] = int(value) if str(value).isdigit() else value
    return out

def measure(name: str):
    "One row, in a process of its own"
    subprocess.run(
        [
            sys.executable,
            '-m',
            'sid_lsg_nb.cli',
            *command(name),
            '--repeat',
            '9',
            '--out',
            str(HERE / f'{name}.json'),
        ],
        check=True,
    )

def line(name: str) -> str:
    "One line of the table"
    file, words = HERE / f'{name}.json', f'`sid-lsg {" ".join(command(name))}`'
    if not file.exists():
        return f'| {words} | not run | | | | |'
    r = json.loads(file.read_text())
    m = r['machine']
    peak = f'{r["peak_gib"]:.2f}' if r['peak_gib'] else '–'
    return (
        f'| {words} | **{r["ratio"]:.3f}** | {r["seconds"]:.4g} | {r["img_per_s"]:.4g} | {peak} / '
        f'{r.get("counted_gib", float("nan")):.2f} | {m["cpu"] if m["device"] == "cpu" else m["device"]}, '
        f'{m["threads"]} thread(s), torch {m["torch"].split("+")[0]}, {m["date"]} |'
    )

def take(day: Path, to: Path = HERE):
    """The findings of gpu_day.py: a file per row of the table, the rows of CIFAR-10, and the rest in day.json; a
    rehearsal is refused"""
    found = {f.stem: json.loads(f.read_text()) for f in sorted(day.glob('*.json'))}
    if found.get('where', {}).get('rehearsal', True):
        sys.exit(
            f'{day}/where.json is missing or of a rehearsal: only a GPU that was measured goes into the tables'
        )
    for name, row in found.get('fast', {}).get('rows', {}).items():
        if 'ratio' in row:
            (to / f'{name}.json').write_text(json.dumps(row, indent=1) + '\n')
    if fresh := found.get('real', {}).get('rows'):
        key = lambda r: tuple(
            r.get(k) for k in ('who', 'size', 'classes', 'device', 'images', 'n', 'reference_n')
        )
        old = json.loads((to / 'cifar10.json').read_text())
        new = {key(r) for r in fresh}
        (to / 'cifar10.json').write_text(
            '[\n' + ',\n'.join(json.dumps(r) for r in [r for r in old if key(r) not in new] + fresh) + '\n]\n'
        )
    (to / 'day.json').write_text(json.dumps(found, indent=1) + '\n')

def speeds(here: Path = HERE) -> list[dict]:
    "What `--dry-run` reads: speeds on GPUs, the card named"
    rows = [json.loads(f.read_text()) for f in sorted(here.glob('gpu-*.json'))]
    return [
        dict(
            card=r['machine']['device'],
            date=r['machine']['date'],
            img_per_s=r['img_per_s'],
            settings=r['settings'],
        )
        for r in rows
    ]

def numbers(settings: dict) -> str:
    "The number format of weights and arithmetic, in a word or two"
    if settings['weight_dtype'] != 'fp32':
        return f'all in {settings["weight_dtype"]}'
    return 'fp32' if settings['mixed_precision'] == 'no' else settings['mixed_precision']

def speed_words(rows: list[dict]) -> str:
    "README's sentence on speed, from `speeds`"
    if not rows:
        return '**No GPU has run it yet**, so the speeds and peaks of `benchmarks/` on GPUs say "not run".'
    best = {}
    for r in rows:
        best[r['card']] = max(best.get(r['card'], r), r, key=lambda r: r['img_per_s'])
    told = [
        f'{card}: {r["img_per_s"]:.3g} images/s at best ({r["settings"]["teacher"]}, {numbers(r["settings"])}, '
        f'{r["settings"]["micro_batch"]} at once; {r["date"]})'
        for card, r in best.items()
    ]
    return f'GPUs that ran it: {"; ".join(told)}. The other rows are in `benchmarks/`.'

def write_words(rows: list[dict], root: Path = HERE.parent):
    """Put that sentence between the marks of the index notebook and of README; raises `ValueError` where the marks
    are gone"""
    index, readme = root / 'nbs/index.ipynb', root / 'README.md'
    book = json.loads(index.read_text(encoding='utf-8'))

    def between(old):
        return re.subn(
            r'(<!-- speeds -->\s*).*?(\s*<!-- /speeds -->)',
            lambda m: m[1] + speed_words(rows) + m[2],
            old,
            flags=re.S,
        )

    cells = [(c, *between(''.join(c['source']))) for c in book['cells'] if c['cell_type'] == 'markdown']
    new, n = between(readme.read_text(encoding='utf-8'))
    if n != 1 or sum(k for *_, k in cells) != 1:
        raise ValueError('README.md and nbs/index.ipynb must each have one place between the marks of speeds')
    for cell, source, _ in cells:
        cell['source'] = source.splitlines(True)
    index.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    readme.write_text(new, encoding='utf-8')

def day_section(file: Path = HERE / 'day.json') -> list[str]:
    "What a day with one GPU found, or that there was none"
    head = [
        '',
        '## A day with one GPU',
        '',
        'Made by `python benchmarks/gpu_day.py`, whose first lines say what each part proves; goals are written '
        'beside what was found.',
        '',
    ]
    if not file.exists():
        return [
            *head,
            '| part | found |',
            '|---|---|',
            *(f'| {k} | not run |' for k in ('where', 'right', 'fast', 'small', 'many', 'whole', 'real')),
        ]
    found, rows = json.loads(file.read_text()), []
    for part, d in found.items():
        own = {
            k: v
            for k, v in d.items()
            if k not in ('part', 'rows', 'table', 'versions', 'trace', 'cure') and not k.endswith('_failed')
        }
        failed = ''.join(f'; **{k.removesuffix("_failed")} failed**' for k in d if k.endswith('_failed'))
        rows.append(f'| {part} | {json.dumps(own).replace("|", "/")}{failed} |')
    w = found['where']
    return [
        *head,
        f'{w.get("card")}, driver {w.get("driver")}, torch {w["versions"]["torch"]}, {w["date"]}.',
        '',
        '| part | found |',
        '|---|---|',
        *rows,
    ]

def main(wanted: list[str]):
    if len(wanted) == 1 and Path(wanted[0]).is_dir():
        take(Path(wanted[0]))
        wanted = []
    names = [n for n in ROWS if any(n == w or n.startswith(w + '-') for w in wanted)]
    if wanted and not names:
        sys.exit(f'no row is called {wanted}; there are {", ".join(ROWS)}')
    for n in names:
        measure(n)
    (HERE.parent / 'sid_lsg_nb/embedded/speeds.json').write_text(json.dumps(speeds(), indent=1) + '\n')
    write_words(speeds())
    head = [
        '# Benchmarks',
        '',
        'One iteration (a fake and a generator step, guided unless `--kappa 1`) beside its floor, the same network '
        'calls alone, in the same run (nbs/7_commands/03_bench). Made by `python benchmarks/run.py cpu` and `gpu`; not tests.',
        'Peak memory is measured on GPUs only; the second number is the count from shapes (nbs/6_training/03_memory). Rows say '
        'where and when; "not run" means just that.',
        'The turns of iteration and floor alternate, so ratios hold on a machine shared with other work, as the '
        'one of the CPU rows was; seconds of different rows do not compare there.',
        '',
        '| command | iteration / floor | s per iteration | images/s | peak / counted GiB | machine |',
        '|---|---|---|---|---|---|',
    ]
    kept = (
        (HERE / 'README.md').read_text(encoding='utf-8').partition('\n<!-- cifar10 -->')[1:]
    )  # cifar10.py's part stays
    (HERE / 'README.md').write_text(
        '\n'.join([*head, *map(line, ROWS), *day_section(), '', *RECIPE]) + '\n' + ''.join(kept),
        encoding='utf-8',
    )


if __name__ == '__main__':
    main(sys.argv[1:])
