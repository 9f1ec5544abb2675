"""The run that README and the story of the bundled teacher show.

    python nbs/recipes/embedded_run.py [any option of `sid-lsg distill`]

Runs `sid-lsg distill` as a user would, and copies what it wrote into nbs/images/: the last sample sheet
(embedded_run.png) and config, log, scores, machine, date and minutes (embedded_run.json). Then does it again with two
other seeds, of which the scores are kept, and scores the teacher at several guidance scales, so that the table's teacher
row can be seen to be its best. Nothing is typed in by hand.
"""

import json, os, platform, shutil, subprocess, sys, tempfile, time
from dataclasses import asdict
from datetime import date
from pathlib import Path
import torch
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.metrics.stored_rows import by_teacher, row_hashes, row_or_draw
from sid_lsg_nb.metrics.tiny import TinyClip, load_captions
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.drawing import many_step_draw

IMAGES = Path(__file__).parent.parent / 'images'
MORE_SEEDS = 1, 2

def machine() -> str:
    "Cores, processor and torch version, in words"
    model = (
        [
            l.split(':', 1)[1].strip()
            for l in Path('/proc/cpuinfo').read_text().splitlines()
            if l.startswith('model name')
        ]
        if Path('/proc/cpuinfo').exists()
        else [platform.processor()]
    )
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f'{os.cpu_count()} CPU cores ({model[0]})'
    )
    return f'{where}, torch {torch.__version__.split("+")[0]}'

def teacher_scores(before: dict, scales=(1.0, 1.25, 1.5, 2.0, 3.0)) -> list[dict]:
    "The teacher's row at several guidance scales, one pass over the captions each; those of before, if nothing changed"
    if before.get('teacher_sha256') == row_hashes(): return before['teacher']
    teacher, scorer, captions, steps = load_sd(), TinyClip(), load_captions(), Config().teacher_steps
    row = lambda k: row_or_draw(
        f'teacher, {steps} steps, CFG {k:g}', by_teacher(steps, k), many_step_draw(teacher, k, steps), scorer,
        captions, passes=1)
    return [asdict(row(k).score) for k in scales]

def distill(out: Path, options: list[str]) -> float:  # minutes
    "One run of the command"
    tick = time.time()
    subprocess.run([sys.executable, '-m', 'sid_lsg_nb.cli', 'distill', '--out', str(out), *options], check=True)
    return round((time.time() - tick) / 60, 2)


def main(options: list[str]):
    "Run, then copy"
    read = lambda file: json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / 'embedded'
        minutes = distill(out, options)
        IMAGES.mkdir(exist_ok=True)
        shutil.copy(sorted((out / 'samples').glob('*.png'))[-1], IMAGES / 'embedded_run.png')
        run = dict(
            machine=machine(),
            date=date.today().isoformat(),
            minutes=minutes,
            threads=torch.get_num_threads(),
            config={k: v for k, v in read(out / 'config.json').items() if k != 'out'},
            scores=read(out / 'scores.json'),
            log=[json.loads(l) for l in (out / 'log.jsonl').read_text().splitlines()],
            more=[],
        )
        for seed in MORE_SEEDS:
            again = Path(tmp) / str(seed)
            minutes = distill(again, [*options, '--seed', str(seed), '--sample-every', '0'])
            run['more'].append(dict(seed=seed, minutes=minutes, scores=read(again / 'scores.json')))
    file = IMAGES / 'embedded_run.json'
    run |= dict(teacher_sha256=row_hashes(), teacher=teacher_scores(read(file)))
    file.write_text(json.dumps(run) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:])
