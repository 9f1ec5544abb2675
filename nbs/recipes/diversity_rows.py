"""The bundled teacher's diversity per prompt, drawn once: 16 captions, 24 pictures of each, three guidance scales.

    python nbs/recipes/diversity_rows.py
"""
import json
from datetime import date
from pathlib import Path
import torch, tyro
from embedded_run import machine
from sid_lsg_nb.core import EMBEDDED, atomic_write
from sid_lsg_nb.metrics.diversity import PICTURES, PROMPTS, draw_diversity
from sid_lsg_nb.metrics.stored_rows import by_teacher, row_hashes
from sid_lsg_nb.metrics.tiny import TinyClip
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.training.drawing import many_step_draw


def main(
    out: Path = EMBEDDED,  # the bundled folder
    threads: int = 1,      # of the processor
):
    "Draw, and write diversity.json"
    torch.set_num_threads(threads)
    teacher, scorer, rows = load_sd(), TinyClip(), []
    for kappa in (1.0, 1.5, 3.0):
        values = draw_diversity(many_step_draw(teacher, kappa, 25), scorer)
        print(f'CFG {kappa:g}: {values.mean():.4f}', flush=True)
        rows.append(dict(how=by_teacher(25, kappa), values=[round(v, 7) for v in values.tolist()]))
    about = dict(machine=machine(), date=date.today().isoformat(), prompts=PROMPTS, pictures=PICTURES)
    atomic_write(out / 'diversity.json', json.dumps(about | dict(sha256=row_hashes(out), rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
