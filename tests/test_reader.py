"The reader of pickles has nothing to call: its own source, its two tables, and what random damage does to it."

import ast, io, pickle, random, re, sys
from pathlib import Path
import pytest, torch
from sid_lsg_nb import checkpoint_reader as reader
from sid_lsg_nb.core import InputError

TREE = ast.parse(Path(reader.__file__).read_text(encoding='utf-8'))
NEVER = re.compile(
    r'(eval|exec|compile|__import__|getattr|setattr|delattr|globals|vars|open_code)'
    r'|(.*\.)?(import_module|loads?|Unpickler|find_class|system|Popen|run_path|__setstate__)'
)
ALLOWED_CALLS = {
    '_codecs.encode',
    'builtins.frozenset',
    'builtins.set',
    'numpy._core.multiarray.scalar',
    'numpy.core.multiarray.scalar',
    'numpy.dtype',
    'torch.Size',
    'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_parameter_with_state',
    'torch._utils._rebuild_tensor_v2',
    'torch.device',
    'torch.storage._load_from_bytes',
    'torch_utils.persistence._reconstruct_persistent_obj',
}
OPCODES = set(
    '''
    ADDITEMS APPEND APPENDS BINBYTES BINBYTES8 BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT
    BINUNICODE BINUNICODE8 BUILD EMPTY_DICT EMPTY_LIST EMPTY_SET EMPTY_TUPLE FRAME FROZENSET GLOBAL LONG1 LONG4
    LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS
    SHORT_BINBYTES SHORT_BINUNICODE STACK_GLOBAL TUPLE TUPLE1 TUPLE2 TUPLE3
    '''.split()
)

def called(tree):
    "Names of everything that a module calls or takes from another"
    for n in ast.walk(tree):
        if isinstance(n, ast.Call):
            yield ast.unparse(n.func)
        elif isinstance(n, ast.ImportFrom):
            yield from (a.name for a in n.names)

def dangerous(tree):
    return {c for c in called(tree) if NEVER.fullmatch(c)}

def test_the_source_calls_nothing_that_runs_code():
    assert dangerous(TREE) == set()

def test_such_a_call_would_be_seen():
    assert dangerous(
        ast.parse('from pickle import loads; importlib.import_module(x); eval(y); net.eval(); re.compile(z)')
    ) == {'loads', 'importlib.import_module', 'eval'}

def test_the_tables_grow_by_decision_only():
    assert set(reader.ALLOWED_CALLS) == ALLOWED_CALLS and set(reader.OPCODES) == OPCODES
    assert reader.DICT_CLASSES == {
        'collections.OrderedDict',
        'diffusers.configuration_utils.FrozenDict',
        'dnnlib.util.EasyDict',
    }
    assert not any(
        reader.MODULE_CLASSES.fullmatch(n)
        for n in (
            'os.system',
            'torch.nn.modules',
            'torch.nn.functional.silu',
            'diffusers.utils.x',
            'xtorch.nn.modules.a',
            'torch.nn.modules.a\n',
        )
    )

def files():
    "A small module in every container"
    net = torch.nn.Linear(2, 2)
    yield 'pkl', pickle.dumps(dict(ema=net))
    for zipped in (True, False):
        torch.save(dict(ema=net), f := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        yield f'zip{zipped}', f.getvalue()

@pytest.mark.parametrize('name, data', list(files()), ids=lambda v: v if isinstance(v, str) else '')
def test_damage_is_an_input_error_and_imports_nothing(name, data, tmp_path):
    file, rng, ends, before = tmp_path / 'net.pt', random.Random(1), [], set(sys.modules)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        file.write_bytes(bad[: rng.choice((len(bad), len(bad), rng.randrange(1, len(bad))))])
        try:
            reader.read_checkpoint(file)
            ends.append(0)
        except InputError as e:
            ends.append(1)
            assert '\n' not in str(e) and len(str(e)) < 400
    assert 50 < sum(ends) and not {
        m for m in set(sys.modules) - before if not m.startswith('encodings.')
    }  # Python's own codecs come on first use
