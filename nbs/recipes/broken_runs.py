"""Runs of the bundled teacher that were broken on purpose, beside good ones, with what `doctor` measures on them.

    python nbs/recipes/broken_runs.py nbs/images/doctor.json

Each run is short, since what is broken here shows at once. Finished runs in the
working folder are taken as they are.
"""
import json
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
import torch, tyro
from embedded_run import machine
from sid_lsg_nb.commands.doctor import check_up, restored_job
from sid_lsg_nb.core import atomic_write
from sid_lsg_nb.training.presets import PRESETS
from sid_lsg_nb.training.run_folder import log_rows
from sid_lsg_nb.training.trainer import train

BASE = dict(
    device='cpu', total_batch_size=8, log_every=16, checkpoint_every=0, sample_every=0, n_eval=0, lr_scheduler='constant')
RUNS = {  # settings of each kind, on top of the preset `embedded`
    'good': {}, 'frozen': dict(lr_fake=1e-12), 'lr10': dict(lr=2e-3, lr_fake=2e-3),
    'alpha': dict(alpha=1.2, lr_fake=1e-5), 'kappa2': dict(kappa1=1., kappa2=3.)}
RUNS_AND_SEEDS = [(name, seed) for seed in (1, 2) for name in RUNS] + [('good', 3)]
LOGGED = 'nimg', 'norm', 'norm_fake', 'fisher', 'skipped', 'iterations'  # of each line


def measured(name: str, seed: int, images: int, work: Path) -> dict:
    "Train one run, and look at its last checkpoint"
    out = work / f'{name}-{seed}-{images}'
    if not (out / 'done.json').exists():
        folder = train(replace(PRESETS['embedded'], **BASE | RUNS[name], seed=seed, max_train_images=images, out=str(out)))
        checkup = check_up(restored_job(folder, 'cpu'))
        (out / 'done.json').write_text(json.dumps(dict(checkup=asdict(checkup), log=log_rows(folder / 'log.jsonl')[0])))
    kept = json.loads((out / 'done.json').read_text())
    short = lambda row: {k: float(f'{v:.6g}') for k, v in row.items() if k in LOGGED or k in kept['checkup']}
    return dict(name=name, seed=seed, checkup=short(kept['checkup']), log=[short(row) for row in kept['log']])


def main(
    out: tyro.conf.Positional[Path],  # the JSON file
    images: int = 160,  # of each run
    work: Path = Path('broken-runs'),  # where the runs are
    threads: int = 1,  # of the processor
):
    "Train, measure, write"
    torch.set_num_threads(threads)
    rows, about = [], dict(machine=machine(), date=date.today().isoformat(), images=images, base=BASE, settings=RUNS)
    for name, seed in RUNS_AND_SEEDS:
        rows.append(measured(name, seed, images, work))
        atomic_write(out, json.dumps(about | dict(runs=rows)) + '\n')


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
