"""The preset `embedded-long`, once for each of three seeds, as a user would run it.

    python nbs/recipes/embedded_long.py --work DIR

Runs that DIR holds already are not run again, unfinished ones go on from their newest checkpoint. Settings, scores and logs
go to nbs/images/embedded_long.json. Nothing is typed in by hand.
"""
import json, subprocess, sys
from pathlib import Path
import torch, tyro
from embedded_run import IMAGES, machine
from sid_lsg_nb.core import atomic_write
from sid_lsg_nb.training.run_folder import log_rows

SEEDS = 0, 1, 2


def finished_run(folder: Path, seed: int):
    "Begin, go on, or nothing"
    start = ['--preset', 'embedded-long', '--seed', str(seed), '--out', str(folder)]
    options = ['--resume', str(folder)] if (folder/'config.json').exists() else start
    if not (folder/'scores.json').exists():
        subprocess.run([sys.executable, '-m', 'sid_lsg_nb.cli', 'distill', *options], check=True)


def kept(folder: Path) -> dict:
    "What is shown of a run"
    read = lambda name: json.loads((folder/name).read_text())
    config = {k: v for k, v in read('config.json').items() if k not in ('out', 'resume')}
    return dict(config=config, scores=read('scores.json'), averages=read('averages.json'), log=log_rows(folder/'log.jsonl')[0])


def main(
    work: Path,                 # a folder for the runs
    seeds: tuple[int, ...] = SEEDS,
    out: Path = IMAGES/'embedded_long.json',
):
    "Run what is missing, then copy"
    for seed in seeds: finished_run(work/f'long-{seed}', seed)
    runs = [kept(work/f'long-{seed}') for seed in seeds]
    about = dict(machine=machine(), threads=torch.get_num_threads())
    atomic_write(out, json.dumps(about | dict(runs=runs)) + '\n')


if __name__ == '__main__': tyro.cli(main, description=__doc__)
