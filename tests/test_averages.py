"""A run with several averages, to its end: what is exported is the one with the best score, and its card says so."""

import json, shutil
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from sid_lsg_nb.cli import main
from sid_lsg_nb.core import to_uint8
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint

LINE = (
    'distill --out run --device cpu --max-train-images 24 --total-batch-size 8 --lr 1e-3 --lr-fake 1e-3 --n-eval 0 '
    '--sample-every 0 --checkpoint-every 24 --log-every 24 --ema-halflife 1e6 --ema-rampup 1e6 '
    '--more-ema-halflives 1e-3 --eval-reference real --eval-images 12 --inception bundled'
).split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a few pictures to be scored against"
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path('real').mkdir()
    for i, pixels in enumerate(to_uint8(torch.rand(14, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2 - 1)):
        Image.fromarray(pixels).save(f'real/{i}.png')
    return tmp_path


def exported(run):
    return load_file(run / 'generator/unet/diffusion_pytorch_model.safetensors')


def equal(a, b):
    return all(torch.equal(v, b[k.removeprefix('net.')]) for k, v in a.items() if k.removeprefix('net.') in b)


def test_the_best_average_is_exported(place, capsys):
    assert main(LINE) in (0, None)
    run = place / 'run'
    kept = json.loads((run / 'averages.json').read_text())
    state = load_checkpoint(checkpoints(run / 'checkpoints')[0])
    averages = {'1e+06': state['ema'], '0.001': state['ema_0.001']}
    assert kept['nimg'] == 24 and {*kept['halflives']} == {*averages} and kept['score'] == 'fd'
    best = min(kept['halflives'], key=kept['halflives'].get)
    assert kept['best'] == best
    assert len({*kept['halflives'].values()}) == 2  # the averages do differ
    other = next(h for h in averages if h != best)
    assert equal(averages[best], exported(run)) and not equal(averages[other], exported(run))
    said = 'Of averages with several half-lives'
    assert said in capsys.readouterr().out and said in (run / 'generator/README.md').read_text()
    # what was chosen once is taken again, here the other one, when the last steps are repeated
    (run / 'averages.json').write_text(json.dumps(kept | dict(best=other)))
    (run / 'closing.json').unlink()
    shutil.rmtree(run / 'generator')
    assert main(['distill', '--resume', 'run']) in (0, None)
    assert equal(averages[other], exported(run))
