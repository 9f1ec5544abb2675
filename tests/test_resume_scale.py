"The loss scale that a run under fp16 has settled at is kept on resume."

from sid_lsg_nb.training.checkpoint import load_checkpoint, save_checkpoint
from sid_lsg_nb.testing import tiny_pipeline
from sid_lsg_nb.training.distributed import SCALE
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import setup
from sid_lsg_nb.training.resume import restore, state_of

def test_the_settled_scale_is_kept(tmp_path):
    """Saved to disk and loaded into a job that has just begun: the scale and the count of good steps since it last
    changed, of each network its own"""
    tiny_pipeline(tmp_path / 'teacher')
    (tmp_path / 'p.txt').write_text('a red cat\na blue dog\n')
    config = Config(
        teacher=str(tmp_path / 'teacher'),
        prompts=str(tmp_path / 'p.txt'),
        mixed_precision='fp16',
        device='cpu',
        total_batch_size=2,
    )
    old, new = setup(config), setup(config)
    settled = dict(fake=(32.0, 7), generator=(1024.0, 1999))
    for k, (scale, good) in settled.items():
        old.nets.learners[k].scaler.load_state_dict(
            old.nets.learners[k].scaler.state_dict() | dict(scale=scale, _growth_tracker=good)
        )
    assert [l.scaler.get_scale() for l in new.nets.learners.values()] == [SCALE] * 2
    restore(new, load_checkpoint(save_checkpoint(tmp_path, 8, state_of(old))))
    found = {k: l.scaler.state_dict() for k, l in new.nets.learners.items()}
    assert {k: (s['scale'], s['_growth_tracker']) for k, s in found.items()} == settled
