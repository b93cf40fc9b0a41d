"""Command-line flags from a dataclass: one a field, the field's comment is its help. And what --device=auto means."""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys

import torch


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line: sixty flags of usage would bury it."""

    def error(self, message):
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def boolean(text):
    """true or false, as a flag's value."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def read_flags(kind, argv, prog):
    """Flags of a dataclass: --name=value for each field, with the field's comment as its help. Returns those given."""
    notes = {}
    for base in reversed(kind.__mro__[:-1]):
        notes.update(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(base), re.MULTILINE))
    parser = Parser(prog=prog, description=sys.modules[kind.__module__].__doc__, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(kind):
        optional = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type,
                            metavar=field.type.__name__, **optional,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), vars(given) | notes, 1, 0)
        parser.error(f"unknown flag {unknown[0]}; did you mean --{near[0]}?")
    return vars(given)


def pick_device(cfg):
    """(device, autocast dtype or None), and a line that says why."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if cfg.device != "auto" and not has[cfg.device]:
        raise ValueError(f"--device={cfg.device}: this machine has none that torch can use; take --device=auto or cpu")
    device = next(name for name in has if has[name]) if cfg.device == "auto" else cfg.device
    fast = dict(cuda=lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                cpu=torch.cpu._is_amx_tile_supported, mps=lambda: False)[device]()
    bf16 = fast if cfg.dtype == "auto" else cfg.dtype == "bf16"
    why = dict(cuda="a GPU is there", mps="an Apple GPU is there", cpu="no GPU is there")[device]
    gain = "as asked" if cfg.dtype != "auto" else "faster on this hardware" if fast else "bf16 gains nothing here"
    why = why if cfg.device == "auto" else "as asked"
    print(f"device {device} ({why}), {'bf16 autocast' if bf16 else 'fp32'} ({gain})")
    return device, torch.bfloat16 if bf16 else None
