"""Speed and memory of one iteration, beside its floor: `sid-lsg bench`, over a list of settings.

    python benchmarks/run.py cpu         # measure the rows for a CPU (about 10 minutes on 2 cores), then write README.md
    python benchmarks/run.py gpu         # the rows for a GPU with 24 GB or more: Stable Diffusion 1.5 at 512², random weights
    python benchmarks/run.py gpu-fp16-4  # single rows by name
    python benchmarks/run.py             # only write README.md from what was measured

Each row leaves NAME.json with the machine in words and the date. A row without a file says "not run" in the table.
"""
import json, subprocess, sys
from pathlib import Path

HERE = Path(__file__).parent
SD = '--teacher random-sd15 --device cuda'
ROWS = {  # name: options of `sid-lsg bench`
    'cpu-4': '--micro 4', 'cpu-16': '--micro 16', 'cpu-16-kappa1': '--micro 16 --kappa 1', 'cpu-16-sequential': '--micro 16 --sequential', 'cpu-16-checkpointing': '--micro 16 --checkpointing',
    'cpu-16-both': '--micro 16 --sequential --checkpointing', 'cpu-16-lora': '--micro 16 --lora both --rank 16', 'cpu-16-bf16': '--micro 16 --precision bf16',
    'gpu-fp32-4': f'{SD} --micro 4', 'gpu-tf32-4': f'{SD} --micro 4 --tf32', 'gpu-bf16-4': f'{SD} --micro 4 --precision bf16', 'gpu-bf16-1': f'{SD} --micro 1 --precision bf16', 'gpu-bf16-8': f'{SD} --micro 8 --precision bf16',
    'gpu-bf16-16': f'{SD} --micro 16 --precision bf16', 'gpu-fp32-1': f'{SD} --micro 1', 'gpu-fp32-8': f'{SD} --micro 8', 'gpu-fp16-16': f'{SD} --micro 16 --precision fp16', 'gpu-fp16-4': f'{SD} --micro 4 --precision fp16', 'gpu-fp16-8': f'{SD} --micro 8 --precision fp16',
    'gpu-bf16-4-channels-last': f'{SD} --micro 4 --precision bf16 --channels-last', 'gpu-bf16-4-compile': f'{SD} --micro 4 --precision bf16 --compile', 'gpu-bf16-4-sequential': f'{SD} --micro 4 --precision bf16 --sequential',
    'gpu-bf16-4-checkpointing': f'{SD} --micro 4 --precision bf16 --checkpointing', 'gpu-fp16-1-24gb': f'{SD} --micro 1 --precision fp16 --sequential --checkpointing', 'gpu-fp16-1-lora': f'{SD} --micro 1 --precision fp16 --checkpointing --lora both',
    'gpu-pure-fp16-4': f'{SD} --micro 4 --precision pure-fp16',
}

def command(name:str)->list[str]: return ['bench', *ROWS[name].split(), *(['--device', 'cpu'] if name.startswith('cpu') else [])]

def settings(name:str)->dict:
    "The same as fields of `Bench`"
    words, out = command(name)[1:], {}
    for i, w in enumerate(words):
        if not w.startswith('--'): continue
        value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith('--') else True
        out[w[2:].replace('-', '_')] = int(value) if str(value).isdigit() else value
    return out

def measure(name:str):
    "One row, in a process of its own"
    subprocess.run([sys.executable, '-m', 'sid_lsg_nb.cli', *command(name), '--repeat', '9', '--out', str(HERE/f'{name}.json')], check=True)

def line(name:str)->str:
    "One line of the table"
    file, words = HERE/f'{name}.json', f'`sid-lsg {" ".join(command(name))}`'
    if not file.exists(): return f'| {words} | not run | | | | |'
    r = json.loads(file.read_text()); m = r['machine']
    peak = f'{r["peak_gib"]:.2f}' if r['peak_gib'] else '–'
    return f'| {words} | **{r["ratio"]:.3f}** | {r["seconds"]:.4g} | {r["img_per_s"]:.4g} | {peak} / {r.get("counted_gib", float("nan")):.2f} | {m["cpu"] if m["device"] == "cpu" else m["device"]}, {m["threads"]} thread(s), torch {m["torch"].split("+")[0]}, {m["date"]} |'

def main(wanted:list[str]):
    names = [n for n in ROWS if any(n == w or n.startswith(w + '-') for w in wanted)]
    if wanted and not names: sys.exit(f'no row is called {wanted}; there are {", ".join(ROWS)}')
    for n in names: measure(n)
    head = ['# Benchmarks', '', 'One iteration (a fake and a generator step, guided unless `--kappa 1`) beside its floor, the same network calls alone, in the same run: chapter 25. Made by `python benchmarks/run.py cpu` and `gpu`; not tests.',
            'Peak memory is measured on GPUs only; the second number is the count from shapes (chapter 21). Rows say where and when; "not run" means just that.',
            'The turns of iteration and floor alternate, so ratios hold on a machine shared with other work, as the one of the CPU rows was; seconds of different rows do not compare there.', '',
            '| command | iteration / floor | s per iteration | images/s | peak / counted GiB | machine |', '|---|---|---|---|---|---|']
    kept = (HERE/'README.md').read_text(encoding='utf-8').partition('\n<!-- cifar10 -->')[1:]   # cifar10.py's part stays
    (HERE/'README.md').write_text('\n'.join([*head, *map(line, ROWS)]) + '\n' + ''.join(kept), encoding='utf-8')

if __name__ == '__main__': main(sys.argv[1:])
