"""Opens mutations of a GGUF file until one of them breaks the reader.

    python tests/convert/fuzz_gguf.py FILE FOLDER COUNT SEED

Prints how many were opened and refused. Anything but a clear refusal ends it with a traceback.
"""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

from ohmygpu.convert.source import open_source
from ohmygpu.convert.tokenizer import prepare_tokenizer
from ohmygpu.core.errors import OhMyGPUError

EXTREMES = (0, 1, 5, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """A copy with one to four kinds of damage, most of it in the header."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(header_bytes)
        kind = rng.randrange(5)
        if kind == 0:
            damaged[position] = rng.randrange(256)
        elif kind == 1:
            width = rng.choice((4, 8))
            value = rng.choice(EXTREMES) % 256**width
            damaged[position : position + width] = value.to_bytes(width, "little")
        elif kind == 2:
            length = rng.randrange(1, 64)
            source = rng.randrange(header_bytes)
            damaged[position : position + length] = damaged[source : source + length]
        elif kind == 3:
            del damaged[position : position + rng.randrange(1, 16)]
        elif rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        if not damaged:
            break
    return bytes(damaged)


def use(path: Path, folder: Path) -> None:
    """Open a model and read all of it."""
    source = open_source({path.name: path})
    try:
        for name in source.tensors:
            source.read(name)
            source.blocks(name)
        prepare_tokenizer(source, folder)
    finally:
        source.close()


def main() -> None:
    """Run the mutations the command line asks for."""
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    count, rng = int(sys.argv[3]), random.Random(int(sys.argv[4]))
    data = file.read_bytes()
    header_bytes = min(len(data), int(sys.argv[5]))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    use(file, folder)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = refused = 0
    path = folder / "mutated.gguf"
    for number in range(count):
        path.write_bytes(mutate(data, header_bytes, rng))
        try:
            use(path, folder)
            opened += 1
        except OhMyGPUError as error:
            refused += 1
            if not error.message.isprintable() or len(error.message) > 1000:
                raise AssertionError(f"mutation {number}: {error.message!r}") from error
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) // 1024
    print(f"opened {opened}, refused {refused}, grown {grown_mib} MiB")


if __name__ == "__main__":
    main()
