"""Throw damaged headers at the readers of models, for as long as one likes.

    nice python scripts/fuzz_headers.py --minutes 10 [MODEL.gguf …]

A child process reads files that a few bytes, lengths or pieces of were changed in, and files
made to be large. It may not crash, take a second of CPU for one, or 50 MB: what breaks this is
kept in the folder that is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MAX_BYTES = 50 << 20
MAX_CPU_S = 1.0
BATCH = 400  # files that one child reads
EDGES = (0, 1, 2, 7, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 64) - 1)

Make = Callable[[random.Random, Path], None]


def main() -> int:
    """Run the children for so many minutes, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("models", type=Path, nargs="*", help="real files to begin with")
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.seed, options.models)
    return parent(options.minutes, options.seed, options.models)


def parent(minutes: float, seed: int, models: list[Path]) -> int:
    """Run one child after the other, each with a seed of its own, until one finds something."""
    began, files, worst_s, worst_bytes = time.monotonic(), 0, 0.0, 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-headers-"))
    while time.monotonic() < began + 60 * minutes:
        argv = [sys.executable, __file__, "--child", str(folder), "--seed", str(seed)]
        done = subprocess.run(
            [*argv, *map(str, models)], capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode != 0:
            print(f"seed {seed}: status {done.returncode}\n{done.stdout}{done.stderr}")
            print(f"the file is in {folder}")
            return 1
        figures = json.loads(done.stdout)
        files += figures["files"]
        worst_s = max(worst_s, figures["worst_s"])
        worst_bytes = max(worst_bytes, figures["worst_bytes"])
        seed += 1
    shutil.rmtree(folder)
    spent_s = time.monotonic() - began
    print(
        f"{files} files in {spent_s:.0f} s: no crash; the worst took {worst_s:.3f} s of CPU, "
        f"and the memory grew by {worst_bytes / 2**20:.1f} MB at most"
    )
    return 0


# The child.


def child(folder: Path, seed: int, models: list[Path]) -> int:
    """Read so many damaged files; the one that breaks the rules is left in `folder`."""
    from xandrouting.inventory.headers import HeaderCache
    from xandrouting.inventory.scan import scan

    chance = random.Random(seed)
    root = folder / "models"
    makers: list[Make] = [damaged_gguf(models), damaged_folder, huge_gguf, huge_folder]
    weights = (60, 40, 3, 4)
    shutil.rmtree(root, ignore_errors=True)
    scan(root, HeaderCache())  # what is imported at first is not the file's
    _small_folder(root)
    scan(root, HeaderCache())
    at_rest = _peak_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + 2 * MAX_BYTES,) * 2)
    worst_s = 0.0
    for number in range(BATCH):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        [make] = chance.choices(makers, weights)
        make(chance, root)
        began = time.process_time()
        found = scan(root, HeaderCache())
        cpu_s = time.process_time() - began
        worst_s = max(worst_s, cpu_s)
        grown = _peak_bytes() - at_rest
        if cpu_s > MAX_CPU_S or grown > MAX_BYTES:
            print(f"file {number} by {make}: {cpu_s:.3f} s, {grown} bytes")
            return 1
        for model in found.models:
            assert model.traits is not None
            assert str(root) not in (model.problem or "")
    figures = {"files": BATCH, "worst_s": worst_s, "worst_bytes": _peak_bytes() - at_rest}
    print(json.dumps(figures))
    return 0


def _peak_bytes() -> int:
    # The writers stay far below the readers' limit: what they make large is sparse or in pieces.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Change some places of the first part, where the lengths and the types are."""
    text = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(min(len(text), chance.choice((64, 1024, 1 << 20)))) if text else 0
        match chance.randrange(6):
            case 0:
                text[at : at + 1] = chance.randbytes(1)
            case 1:
                text[at : at + 8] = struct.pack("<Q", chance.choice(EDGES))
            case 2:
                text[at : at + 4] = struct.pack("<I", chance.choice(EDGES) & 0xFFFFFFFF)
            case 3:
                del text[at : at + chance.randrange(64)]
            case 4:
                text[at:at] = text[at : at + chance.randrange(256)] * chance.choice((1, 2, 50))
            case _:
                del text[at : at + 1 if chance.random() < 0.7 else len(text)]
    return bytes(text)


def damaged_gguf(models: list[Path]) -> Make:
    """Return what writes one or some GGUF files that are not as they were."""
    heads = [_head_of(path) for path in models] or [_tiny_gguf()]

    def make(chance: random.Random, root: Path) -> None:
        for number in range(chance.choice((1, 1, 3))):
            stem = f"m-0000{number + 1}-of-00003" if chance.random() < 0.3 else f"m{number}"
            (root / f"{stem}.gguf").write_bytes(
                mutated(chance, chance.choice([*heads, _tiny_gguf()]))
            )

    return make


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4 << 20)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _tiny_gguf() -> bytes:
    keys = [
        _text("general.architecture") + struct.pack("<I", 8) + _text("llama"),
        _text("tokenizer.chat_template") + struct.pack("<I", 8) + _text("{% if tools %}x"),
        _text("llama.block_count") + struct.pack("<II", 4, 2),
        _text("llama.attention.head_count_kv") + struct.pack("<IIQ2i", 9, 5, 2, 1, 2),
        _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b"),
        _text("split.count") + struct.pack("<IH", 2, 3),
        _text("split.no") + struct.pack("<IH", 2, 0),
    ]
    tensor = _text("blk.0.x") + struct.pack("<IQQIQ", 2, 32, 2, 2, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(keys)) + b"".join(keys) + tensor
    return head + bytes(-len(head) % 32 + 36)


def _small_folder(root: Path) -> None:
    folder = root / "f"
    folder.mkdir(parents=True)
    for name, data in _folder_files().items():
        (folder / name).write_bytes(data)


def _folder_files() -> dict[str, bytes]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "text_config": {"num_attention_heads": 4, "layer_types": ["full_attention"] * 2},
        "quantization_config": {"quant_method": "awq"},
    }
    tensors = {
        "__metadata__": {"format": "pt", "x": '{"y": "}"}'},
        "a": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
    }
    header = json.dumps(tensors).encode()
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    template = [{"name": "default", "template": "{{ tools }}"}]
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": struct.pack("<Q", len(header)) + header + bytes(24),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": template}).encode(),
        "tokenizer.json": b"{}",
        "sentence_bert_config.json": b'{"max_seq_length": 128}',
        "modules.json": b"[]",
    }


def damaged_folder(chance: random.Random, root: Path) -> None:
    """Write a model as safetensors of which some files are not as they were."""
    _small_folder(root)
    for name, data in _folder_files().items():
        if chance.random() < 0.4:
            (root / "f" / name).write_bytes(mutated(chance, data))


def huge_gguf(chance: random.Random, root: Path) -> None:
    """As large as the reader believes, and then some."""
    count = chance.choice((1_400_000, 1_499_999, 1_500_001))
    array = _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count)
    with (root / "huge.gguf").open("wb") as file:
        if chance.random() < 0.5:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array)
            file.truncate(chance.choice((64 << 20, 1 << 34)))
            return
        tensors = chance.choice((49_999, 50_000))
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, tensors, 0))
        for number in range(tensors):
            name = _text(f"blk.{number % 4096}.{chance.randbytes(8).hex()}")
            file.write(name + struct.pack("<IQQIQ", 2, 32, 1, 2, 32 * number))


def huge_folder(chance: random.Random, root: Path) -> None:
    """One of its files is as large as the reader believes, of what takes most when decoded."""
    _small_folder(root)
    name = chance.choice([*_folder_files()])
    with (root / "f" / name).open("wb") as file:
        if name == "model.safetensors":
            count = chance.choice((199_999, 200_001, 300_000))
            entry = '"%07d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
            length = sum(len(entry % (n, n, n + 1)) + 1 for n in range(count)) + 1
            file.write(struct.pack("<Q", length))
            for n in range(count):
                file.write((("{" if n == 0 else ",") + entry % (n, n, n + 1)).encode())
            file.write(b"}")
            file.truncate(8 + length + count)
            return
        some = chance.choice((b'"%07d":"x",', b'"%07d": 1 ,', b'"%07d":{},', b'"%07d":[1,2],'))
        first = {
            "model.safetensors.index.json": b'{"weight_map":{',
            "tokenizer_config.json": b'{"chat_template":[{"template":"',
        }.get(name, b"{")
        file.write(first)
        if first.endswith(b'"'):
            some = chance.choice(("\U0001f600".encode() * 4, b"x" * 16, b"\\n" * 8))
        size = chance.choice((3, 12, 15, 38, 41)) << 20
        for n in range(size // len(some)):
            file.write(some % n if b"%" in some else some)


if __name__ == "__main__":
    sys.exit(main())
