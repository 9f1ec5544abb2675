__version__ = "0.1.0"

PLACES = {
    'Config': 'training.config',
    'train': 'training.trainer',
    'distill': 'method.steps',
    'open_teacher': 'teachers.registry',
    'open_student': 'teachers.registry',
}


def __getattr__(name):
    "The few names that a user of the library wants; each is imported when it is first asked for"
    from importlib import import_module
    if name not in PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{PLACES[name]}'), name)


def __dir__(): return sorted([*globals(), *PLACES])
