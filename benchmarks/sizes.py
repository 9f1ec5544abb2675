"""Which of the published sizes fit one card of 24 GB with LoRA, with and without the text encoder beside it and with
the teacher in 8 bits, and eight of 80 GB with all weights.

    python benchmarks/sizes.py [NAME ...]

Nothing is measured: each row is what `sid-lsg distill --dry-run` says, counted from shapes on this machine, and no
GPU is asked. One picture at a time in bf16 with gradient checkpointing and sequential gradients, at the size of the
family's preset, the VAE on the CPU; the rest as the preset has it. Rows go to nbs/images/sizes.json, in the place of
older ones; the chapter on the dry run shows them."""

import argparse, contextlib, io, json, re
from dataclasses import replace
from datetime import date
from pathlib import Path
import diffusers
import torch
from sid_lsg_nb.teachers.registry import model_shapes, published_models
from sid_lsg_nb.testing import quiet_libraries
from sid_lsg_nb.training.dry_run import dry_run
from sid_lsg_nb.training.presets import PRESETS

FILE = Path(__file__).resolve().parent.parent/'nbs/images/sizes.json'
LEAN = dict(
    mixed_precision='bf16', gradient_checkpointing=True, micro_batch=1, sequential_gradient=True, offload=('vae',))
PLANS = {  # column: GiB of a card as PyTorch sees it, how many cards, settings
    '1 x 24 GB, LoRA': (23.6, 1, LEAN | dict(lora='both')),
    '1 x 24 GB, LoRA, prompts encoded before': (23.6, 1, LEAN | dict(lora='both', cache_text=True)),
    '1 x 24 GB, LoRA, prompts encoded before, teacher in 8 bits': (
        23.6, 1, LEAN | dict(lora='both', cache_text=True, int8_teacher=True)),
    '8 x 80 GB, all weights': (79.1, 8, LEAN | dict(fsdp=True))}


def parts_of(said: str) -> dict[str, float]:  # GiB by component, of one process
    "The components that a dry run lists"
    lines = said[said.index('memory per process'):].splitlines()
    found = dict(m.groups() for line in lines if (m := re.fullmatch(r'  (\S.*?) +([\d.]+) GiB', line)))
    return {k: float(v) for k, v in found.items() if k != 'sum'}


def before_of(said: str) -> float:  # GiB
    "The most that a dry run counts before the first step"
    line, = re.findall('before the first step: .*', said)
    return max(map(float, re.findall(r'([\d.e+]+) GiB', line)))


def plan(name: str, column: str) -> dict:
    "What one process holds while it runs and before, and what is left of its card"
    card, cards, settings = PLANS[column]
    preset = PRESETS[published_models()[name].default_preset]
    config = replace(preset, teacher=model_shapes(name).hub_id, device='cpu', **settings)
    with contextlib.redirect_stdout(io.StringIO()) as out: dry_run(config, cards)
    parts = {k: round(v, 2) for k, v in parts_of(out.getvalue()).items() if v}
    total, before = round(sum(parts.values()), 1), round(before_of(out.getvalue()), 1)
    return dict(sum=total, before=before, left=round(card - max(total, before), 1), parts=parts)


def row_of(name: str) -> dict:
    shapes, preset = model_shapes(name), PRESETS[published_models()[name].default_preset]
    with torch.device('meta'): weights = sum(p.numel() for p in shapes.build().parameters())
    pixels = preset.height or shapes.latent[1]*shapes.shrink
    own = dict(hub_id=shapes.hub_id, millions=round(weights/1e6, 1), text=shapes.text, pixels=pixels)
    return own | {column: plan(name, column) for column in PLANS} | dict(date=f'{date.today()}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='*')
    names = parser.parse_args().name or list(published_models())
    quiet_libraries()
    for name in names:
        known = json.loads(FILE.read_text())['rows'] if FILE.is_file() else {}
        rows = known | {name: row_of(name)}
        rows = {k: rows[k] for k in published_models() if k in rows}
        versions = dict(torch=torch.__version__, diffusers=diffusers.__version__)
        cards = {column: how[0] for column, how in PLANS.items()}
        FILE.write_text(json.dumps(dict(**versions, cards=cards, rows=rows), indent=1) + '\n')
        print(name, *(f'{column}: {rows[name][column]["sum"]} GiB' for column in PLANS), flush=True)


if __name__ == '__main__': main()
