"""Run notebooks as `nbdev_test` would (honouring `tst_flags` and `eval: false`) and save their fresh outputs, cleaned.

From the repository root:  python tests/run_nbs.py [--flags "slow cuda"] nbs/00_core.ipynb ..."""
import argparse, os, sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor

def skipper(fn, flags):
    "A function saying which cells of notebook `fn` do not run"
    skip = set(get_config().tst_flags.split()) - set(flags)
    directives = {c.id: c.directives_ for c in NBProcessor(fn, rm_directives=False).nb.cells if c.cell_type == 'code'}
    def skips(cell):
        d = directives.get(cell.get('id'), {})
        never = d.get('eval:', [''])[0].lower() == 'false' or 'nbdev_export' + '(' in cell.source
        return cell.cell_type != 'code' or never or bool(skip & d.keys())
    return skips

def drop_stderr(nb):
    "Progress bars and warnings are noise in a saved notebook, and warnings name paths of the machine"
    for c in nb.cells:
        if c.cell_type == 'code': c['outputs'] = [o for o in c.get('outputs', []) if o.get('name') != 'stderr']

def run(fn, flags=()):
    "Execute `fn` in its own folder, save it with its outputs, clean it"
    nb, shell, skips = read_nb(fn), CaptureShell(fn), skipper(fn, flags)
    try:
        with working_directory(fn.parent): shell.run_all(nb, exc_stop=True, preproc=skips)
    except Exception: sys.exit(shell.prettytb(fname=fn))
    drop_stderr(nb)
    write_nb(nb, fn)
    nbdev_clean.__wrapped__(str(fn))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('notebooks', nargs='+', type=Path)
    ap.add_argument('--flags', default='', help='test flags whose cells run too, space separated')
    a = ap.parse_args()
    os.environ['IN_TEST'] = '1'
    sys.path.insert(0, str(get_config().config_path))
    for f in a.notebooks: run(f.absolute(), a.flags.split())

if __name__ == '__main__': main()
