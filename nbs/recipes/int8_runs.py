"""Runs of the bundled teacher with and without `--int8-teacher`: the same settings, seeds and prompts.

    python nbs/recipes/int8_runs.py nbs/images/int8_runs.json

Each is scored as the table at the end of a run does it, with the networks of the run. The students that are saved have
the weights of the files, not the rounded ones; with a LoRA they are scored once more, out of their folders. Finished
runs in the working folder are taken as they are.
"""
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
import torch, tyro
from embedded_run import machine
from sid_lsg_nb.commands.evaluate import evaluate
from sid_lsg_nb.commands.options import Evaluate
from sid_lsg_nb.core import atomic_write
from sid_lsg_nb.training.presets import PRESETS
from sid_lsg_nb.training.trainer import train

BASE = dict(device='cpu', sample_every=0, checkpoint_every=0)
RUNS = {  # settings of each kind, on top of the preset `embedded`
    'plain': {}, 'int8': dict(int8_teacher=True),
    'lora': dict(lora='both'), 'lora-int8': dict(lora='both', int8_teacher=True)}
KEPT = 'tiny_fd', 'tiny_fd_se', 'fd_difference', 'fd_difference_se', 'concept', 'n'


def measured(name: str, seed: int, images: int, work: Path) -> dict:
    "Train one run if that was not done, and read its scores"
    out = work / f'{name}-{seed}'
    if not (out / 'closing.json').exists():
        train(replace(PRESETS['embedded'], **BASE | RUNS[name], seed=seed, max_train_images=images, out=str(out)))
    rows = {row['name']: row for row in json.loads((out / 'scores.json').read_text())}
    found = dict(name=name, seed=seed) | {k: rows['student, one step'][k] for k in KEPT}
    if 'lora' not in name: return found
    saved = out / 'saved.json'
    if not saved.exists(): evaluate(Evaluate(str(out / 'generator'), protocol='tiny', out=str(saved), device='cpu'))
    return found | dict(saved=json.loads(saved.read_text())['values']['fd'])


def main(
    out: tyro.conf.Positional[Path],  # the JSON file
    images: int = 4_800,  # of each run
    seeds: int = 3,  # from 0 on
    lora_seeds: int = 2,
    work: Path = Path('int8-runs'),  # where the runs are
    threads: int = 1,  # of the processor
):
    "Train, score, write"
    torch.set_num_threads(threads)
    rows, about = [], dict(machine=machine(), date=date.today().isoformat(), images=images, base=BASE, settings=RUNS)
    for name in RUNS:
        for seed in range(lora_seeds if 'lora' in name else seeds):
            rows.append(measured(name, seed, images, work))
            atomic_write(out, json.dumps(about | dict(runs=rows)) + '\n')


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
