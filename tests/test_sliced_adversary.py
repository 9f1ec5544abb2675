"Real pictures with networks in slices: two processes with slices learn what two with copies learn"

import json
import numpy as np
from forks import finish, start_ranks
from PIL import Image
from sid_lsg_nb.testing import tiny_pipeline, tiny_sd3

BOTH = """
import json
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed, gather_full
from sid_lsg_nb.training.job import iterate, setup
processes = Distributed('cpu')

def play(fsdp, more):
    job = setup(Config(
        prompts='p.txt', device='cpu', total_batch_size=4, micro_batch=1, max_train_images=8, real_images='real',
        freeze_generator_until=0, gan_start=0, gan_weight_generator=1.0, fsdp=fsdp, **more), processes)
    for s in iterate(job):
        if s.nimg >= 8: break
    states = {{role: gather_full(l.optimizer.state_dict())['state'] for role, l in job.nets.learners.items()}}
    return {{role: [v['exp_avg_sq'].sqrt() for v in state.values()] for role, state in states.items()}}

def apart(a, b):  # of the gradients' sizes: the largest difference, and the largest
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)), max(float(y.max()) for y in b)

for name, more in json.loads({cases!r}).items():
    sliced, copied = play(True, more), play(False, more)
    if processes.is_main: print('told', json.dumps([name, {{k: apart(v, copied[k]) for k, v in sliced.items()}}]))
processes.close()
"""
CASES = {
    'transformer': (dict(teacher='flow'), {'fake', 'generator'}),
    "a head's own weights": (
        dict(teacher='unet', method='dmd2'), {'fake', 'generator', 'discriminator'})}

def test_slices_learn_from_real_pictures_what_copies_learn(tmp_path):
    tiny_pipeline(tmp_path / 'unet')
    tiny_sd3(tmp_path / 'flow')
    (tmp_path / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    (tmp_path / 'real').mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f'real/{k}.png')
    cases = json.dumps({name: more for name, (more, _) in CASES.items()})
    (status, out, err), (status2, _, err2) = finish(start_ranks(['-c', BOTH.format(cases=cases)], [tmp_path]*2), 400)
    assert (status, status2) == (0, 0), err[-3000:] + err2[-3000:]
    told = dict(json.loads(line[5:]) for line in out.splitlines() if line.startswith('told '))
    assert {name: {*found} for name, found in told.items()} == {name: roles for name, (_, roles) in CASES.items()}
    for found in told.values():
        for error, size in found.values(): assert error < 1e-3*size, told
