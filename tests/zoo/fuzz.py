"""Throws bytes at a model's folder, for as long as one likes: an optional target for atheris.

    pip install atheris
    python tests/zoo/fuzz.py -max_total_time=600

The suite does the same with hypothesis for a few seconds, in ``test_fuzz.py``.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import tempfile
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models import files, load, strict
from phenoseq.models.load import load_folder

SEED = Path(__file__).with_name("frozen") / "v1-published"


def attempt(folder: Path, name: str, data: bytes) -> bool:
    """Load a model with one of its files replaced; anything but success or our error is a bug."""
    (folder / name).write_bytes(data)
    try:
        load_folder(folder)
    except ModelError as error:
        check_told(str(error))
        return False
    finally:
        shutil.copy(SEED / name, folder / name)
    return True


def check_told(message: str) -> None:
    """Check that an error can be shown."""
    assert message.isprintable(), repr(message)
    assert len(message) < 2000


def main() -> None:
    """Run atheris."""
    import atheris

    folder = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(SEED, folder)
    whole = {name: (SEED / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def one(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        name = given.PickValueInList(list(whole))
        seed = bytearray(whole[name])
        at = given.ConsumeIntInRange(0, len(seed))
        end = given.ConsumeIntInRange(at, min(len(seed), at + 64))
        seed[at:end] = given.ConsumeBytes(given.remaining_bytes())
        attempt(folder, name, bytes(seed))

    for module in (strict, files, load):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
