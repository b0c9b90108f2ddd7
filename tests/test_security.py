"""No file of others runs code here, files are as open as the umask says, and secrets stay in the environment."""

import ast
import builtins
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils

import flows.run
from benchmarks.s3 import bucket_address, s3_client, s3_server
from covercal.decoder import load_decoder
from covercal.errors import InputError
from covercal.model_files import locate_model
from covercal.pool import read_documents
from covercal.quantization_settings import Quantization
from covercal.recipe import Model, TextSource, load_recipe
from flows import cli
from flows.chain import run_chain
from flows.execution import Direct
from flows.inputs import check_inputs, identify
from flows.record import Running
from storage.arrays import read_array
from storage.artifacts import ArtifactStore
from storage.durable import flush_and_hash
from storage.keys import content_digest
from storage.manifest import MANIFEST, Ref
from storage.remote import open_remote
from storage.runs import read_runs
from storage.transfer import pull_run, push_run
from tasks.cached import open_store
from tasks.identities import ModelIdentity, identify_model
from tasks.model import import_model, load_tokenizer, original_decoder, trusts_copy
from tests import tiny
from tests.covercal.walks import write_checkpoint
from tests.flows.test_cache_cli import run_without_prefect
from tests.storage.s3 import closed_port
from tests.storage.test_transfer import RUN, make_real_run

ROOT = Path(__file__).parent.parent
PACKAGES = ("covercal", "storage", "tasks", "flows")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# --- what our own source may do ------------------------------------------------------------------------------------

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    *("torch.load", "numpy.load", "numpy.fromfile", "pandas.read_pickle", "zarr.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader", "yaml.Loader"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("numcodecs.pickles.Pickle", "numcodecs.Pickle"),
}
FORBIDDEN_KEYWORDS = {"allow_pickle=True", "shell=True", "weights_only=False", "trust_remote_code=True"}


def names_by_import(tree: ast.AST) -> dict[str, str]:
    """Return what the names that a file imports stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.split(".")[0]
                names[each.asname or first] = each.name if each.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """Return the dotted name of an expression, such as `numpy.load`; empty for another expression."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def dangers(source: str) -> list[str]:
    """Return everything in a source that could run what it reads, line by line."""
    tree = ast.parse(source)
    names = names_by_import(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {m}" for m in modules if m.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Name | ast.Attribute) and full_name(node, names) in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {full_name(node, names)}")
        elif isinstance(node, ast.keyword) and ast.unparse(node) in FORBIDDEN_KEYWORDS:
            found.append(f"{node.value.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import os, dill",
            "import joblib.memory",
            "import marshal as m",
        ),
        *("import torch\ntorch.load(f)", "from torch import load as read\nread(f)", "import torch as t\nx = t.load"),
        *("import numpy as np\nnp.load(f)", "import numpy\nnumpy.load(f)", "f(x, allow_pickle=True)"),
        *("import pandas as pd\npd.read_pickle(f)", "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)"),
        *("eval(x)", "exec(x)", "run(x, shell=True)", "import os\nos.system(x)", "read(f, weights_only=False)"),
        *("from yaml import unsafe_load\nunsafe_load(t)", "AutoModel.from_pretrained(x, trust_remote_code=True)"),
    ],
)
def test_the_reader_of_sources_finds_every_danger(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        *("import json\njson.load(f)", "import yaml\nyaml.safe_load(t)", "run(x, shell=False)", "model.eval()"),
        *(
            "import re\nre.compile(x)",
            "f(trust_remote_code=trusted)",
            "load(f)",
            "from safetensors.torch import load_file",
        ),
    ],
)
def test_the_reader_of_sources_lets_what_is_harmless_pass(source: str) -> None:
    assert dangers(source) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_of_ours_runs_what_it_reads(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


def loads_of_models(path: Path) -> Iterator[tuple[int, set[str | None]]]:
    """Yield line and keywords of every call that loads a model."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.search(
            r"(?<!Config)(?<!Tokenizer)\.from_pretrained$", ast.unparse(node.func)
        ):
            yield node.lineno, {each.arg for each in node.keywords}


def test_our_sources_load_models_somewhere() -> None:
    assert sum(1 for path in SOURCES for _ in loads_of_models(path)) >= 2


@pytest.mark.parametrize("path", [p for p in SOURCES if list(loads_of_models(p))], ids=lambda p: p.name)
def test_a_model_is_only_loaded_from_safetensors_or_gguf(path: Path) -> None:
    assert [line for line, keywords in loads_of_models(path) if not keywords & {"use_safetensors", "gguf_file"}] == []


# --- weights that are pickles --------------------------------------------------------------------------------------


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that there is once somebody's code has run."""
    return tmp_path / "ran"


def write_index(folder: Path, name: str) -> None:
    weights = dict.fromkeys(tiny.tiny_model().state_dict(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def pickled_model(folder: Path, ran: Path, kind: str) -> Path:
    """Write a model folder whose weights are a pickle, harmless or not."""
    tiny.save_model(folder)
    (folder / "model.safetensors").unlink()
    name = "weights.bin" if kind.startswith("index") else "pytorch_model.bin"
    if kind.startswith("index"):
        write_index(folder, name)
    if kind == "plain pickle":
        (folder / name).write_bytes(pickle.dumps(Touch(ran)))
        return folder
    weights: dict[str, Any] = tiny.tiny_model().state_dict()
    if "evil" in kind:
        weights["more"] = Touch(ran)
    torch.save(weights, folder / name, _use_new_zipfile_serialization="legacy" not in kind)
    return folder


def test_the_pickle_would_create_the_file(tmp_path: Path, ran: Path) -> None:
    folder = pickled_model(tmp_path / "model", ran, "evil")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("kind", ["evil", "evil legacy", "plain pickle", "index evil"])
def test_no_pickle_in_a_model_folder_is_run(tmp_path: Path, ran: Path, kind: str) -> None:
    folder = pickled_model(tmp_path / "model", ran, kind)
    with pytest.raises(Exception):  # noqa: B017 -- whatever it is called
        load_decoder(folder, "float32", torch.device("cpu"))
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["harmless", "harmless legacy", "index harmless"])
def test_weights_that_are_a_pickle_are_not_even_read(tmp_path: Path, ran: Path, kind: str) -> None:
    folder = pickled_model(tmp_path / "model", ran, kind)
    with pytest.raises((InputError, OSError)):
        load_decoder(folder, "float32", torch.device("cpu"))


def test_a_model_folder_with_a_pickle_alone_is_refused_by_name(tmp_path: Path, ran: Path) -> None:
    folder = pickled_model(tmp_path / "model", ran, "evil")
    with pytest.raises(InputError, match=r"holds its weights as pickle \(pytorch_model.bin\), which can run code"):
        locate_model(Model(source=str(folder)))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["weights.bin", "../outside.safetensors", "/etc/passwd"])
def test_an_index_that_names_anything_but_safetensors_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tiny.save_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shutil.copy(folder / "other.safetensors", tmp_path / "outside.safetensors")
    torch.save(tiny.tiny_model().state_dict(), folder / "weights.bin")
    write_index(folder, name)
    with pytest.raises(InputError, match="index"):
        locate_model(Model(source=str(folder)))


def test_an_array_in_a_format_that_can_hold_pickles_is_not_read(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True)  # as it was before numcodecs 0.16
    array = tmp_path / "peak.zarr"
    (array / "c" / "0").mkdir(parents=True)
    (array / "c" / "0" / "0").write_bytes(b"as if")
    (array / "0.0").write_bytes(pickle.dumps(Touch(ran)))
    value = {"zarr_format": 2, "shape": [1, 1], "chunks": [1, 1], "dtype": "|O", "order": "C", "fill_value": ""}
    value |= {"compressor": {"id": "pickle"}, "filters": [{"id": "vlen-utf8"}]}
    (array / ".zarray").write_text(json.dumps(value))
    with pytest.raises(Exception):  # noqa: B017 -- whatever it is called
        read_array(array)
    assert not ran.exists()


def test_a_recipe_runs_nothing(tmp_path: Path, ran: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: !!python/object/apply:builtins.open ['{ran}', 'w']\n")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_recipe(recipe)
    recipe.write_text("model: {source: x}\n")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_recipe(recipe, [f"model.source=!!python/object/apply:builtins.open ['{ran}', 'w']"])
    assert not ran.exists()


@pytest.mark.parametrize("name", ["data.py", "train.pkl", "train.tar"])
def test_a_folder_of_a_data_set_runs_nothing(tmp_path: Path, ran: Path, name: str) -> None:
    import io
    import tarfile

    folder = tmp_path / "data"
    folder.mkdir()
    evil = pickle.dumps(Touch(ran))
    if name.endswith(".tar"):
        with tarfile.open(folder / name, "w") as archive:
            for ending, data in (("pth", evil), ("txt", b"text")):
                member = tarfile.TarInfo(f"0.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        (folder / name).write_bytes(f"open({str(ran)!r}, 'w')".encode() if name.endswith(".py") else evil)
    with pytest.raises(Exception):  # noqa: B017 -- whatever it is called
        list(read_documents(TextSource(hub=str(folder))))
    assert not ran.exists()


def test_a_folder_of_a_data_set_with_a_script_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text("")
    with pytest.raises(InputError, match="cannot be loaded"):
        list(read_documents(TextSource(hub=str(folder))))


# --- code that comes with a model ----------------------------------------------------------------------------------

CODE = """
open({ran!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def add_code(folder: Path, ran: Path) -> None:
    """Let a model folder bring code along that creates a file when it is imported."""
    module = f"code_{uuid.uuid4().hex}"  # transformers imports a module of one name once
    (folder / f"{module}.py").write_text(CODE.format(ran=str(ran)))
    model = {"AutoConfig": f"{module}.OwnConfig", "AutoModelForCausalLM": f"{module}.OwnModel"}
    for name, code in (
        ("config.json", model),
        ("tokenizer_config.json", {"AutoTokenizer": [None, f"{module}.OwnTokenizer"]}),
    ):
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {"model_type": "llama"}
        path.write_text(json.dumps({**value, "auto_map": code}))


@dataclass(frozen=True)
class Imported:
    """A GGUF model whose recipe trusts its code, and the artifact it was unpacked to, which brings code along."""

    store: ArtifactStore
    model: ModelIdentity
    ref: Ref
    recipe: Path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Ref]:
    """A folder with a GGUF file and a recipe, a store with what the file was unpacked to, and its name."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny.save_gguf(folder / "tiny.gguf")
    value = tiny.recipe_value(folder, model={"source": str(folder / "tiny.gguf"), "trust_remote_code": True})
    (folder / "recipe.yaml").write_text(json.dumps(value))
    store = ArtifactStore(folder / "cache").prepare()
    model = identify_model(load_recipe(folder / "recipe.yaml").model, store)
    return folder, store.root, import_model.run(store, "model", {"model": model}).ref


@pytest.fixture
def imported(unpacked: tuple[Path, Path, Ref], tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Imported:
    """What somebody could have put into a remote cache under the name of an unpacked GGUF file, here already."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, root, ref = unpacked
    store = ArtifactStore(tmp_path / "cache").prepare()
    staged = store.root / "staging" / "hostile"
    shutil.copytree(root / "objects" / "model" / ref.key[:2] / ref.key, staged)
    (staged / MANIFEST).unlink()
    add_code(staged, ran)
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in flush_and_hash(staged).items()}
    manifest = ArtifactStore(root).look_up("model", ref.key).manifest
    digest = content_digest({name: each["sha256"] for name, each in files.items()})
    store.local.commit(dataclasses.replace(manifest, files=files, digest=digest), staged)
    assert store.verify("model", ref.key) == []
    recipe = load_recipe(folder / "recipe.yaml")
    return Imported(store, identify_model(recipe.model, store), Ref("model", ref.key, digest), folder / "recipe.yaml")


def test_code_of_a_folder_that_the_recipe_trusts_is_run(tmp_path: Path, ran: Path, imported: Imported) -> None:
    folder = tiny.save_model(tmp_path / "model")
    add_code(folder, ran)
    model = dataclasses.replace(imported.model, folder=str(folder), gguf="", weights="of its own")
    assert type(original_decoder(imported.store, model, None, "float32", "cpu").model).__name__ == "OwnModel"
    assert ran.exists()


def test_code_of_a_folder_that_the_recipe_does_not_trust_is_not_run(
    tmp_path: Path, ran: Path, imported: Imported
) -> None:
    folder = tiny.save_model(tmp_path / "model")
    add_code(folder, ran)
    model = dataclasses.replace(
        imported.model, folder=str(folder), gguf="", weights="of its own, not trusted", trust_remote_code=False
    )
    original_decoder(imported.store, model, None, "float32", "cpu")
    load_tokenizer(imported.store, model, None)
    assert not ran.exists()


def test_what_was_read_while_a_models_files_were_others_is_not_taken_for_it(tmp_path: Path, imported: Imported) -> None:
    folder = tiny.save_model(tmp_path / "model")
    model = dataclasses.replace(imported.model, folder=str(folder), gguf="", weights="own", trust_remote_code=False)

    def head() -> torch.Tensor:
        return original_decoder(imported.store, model, None, "float32", "cpu").model.lm_head.weight.clone()

    whole, weights = head(), (folder / "model.safetensors").read_bytes()
    tiny.tiny_model(seed=1).save_pretrained(folder)
    assert not torch.equal(head(), whole)
    (folder / "model.safetensors").write_bytes(weights)
    assert torch.equal(head(), whole)


def test_the_model_of_an_imported_artifact_runs_no_code(ran: Path, imported: Imported) -> None:
    model = dataclasses.replace(imported.model, weights="imported")
    decoder = original_decoder(imported.store, model, imported.ref, "float32", "cpu")
    assert type(decoder.model).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_the_tokenizer_of_an_imported_artifact_runs_no_code(ran: Path, imported: Imported) -> None:
    load_tokenizer(imported.store, imported.model, imported.ref)
    assert not ran.exists()


def test_the_check_of_an_imported_artifact_runs_no_code(ran: Path, imported: Imported) -> None:
    recipe = load_recipe(imported.recipe)
    check_inputs(recipe, identify(recipe, imported.store), imported.store.path(imported.ref))
    assert not ran.exists()


def test_a_checkpoint_runs_no_code(tmp_path: Path, ran: Path, imported: Imported) -> None:
    folder = tiny.save_model(tmp_path / "checkpoint")
    add_code(folder, ran)
    load_decoder(folder, "float32", torch.device("cpu"))
    assert not ran.exists()


@pytest.mark.parametrize("change", ["nothing", "another line", "another file", "no trust", "elsewhere"])
def test_a_checkpoint_runs_code_of_the_trusted_model_alone(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny.save_model(tmp_path / "model")
    add_code(folder, ran)
    model = identify_model(Model(source=str(folder), trust_remote_code=True), ArtifactStore(tmp_path / "c").prepare())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "org/base--modeling.Body"  # which nothing loads
    (folder / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(folder, "float32", torch.device("cpu"), trust_remote_code=True)
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, decoder, [], Quantization(method="rtn", bits=4, group_size=16, symmetric=True))
    (code,) = checkpoint.glob("*.py")
    if change == "another line":
        code.write_text(code.read_text() + "\n")
    elif change == "another file":
        (checkpoint / "more.py").write_text("")
    elif change == "elsewhere":
        config = json.loads((checkpoint / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = f"{tmp_path}--evil.OwnModel"
        (checkpoint / "config.json").write_text(json.dumps(config))
    elif change == "no trust":
        model = dataclasses.replace(model, trust_remote_code=False)
    assert trusts_copy(model, checkpoint) == (change == "nothing")
    if change == "nothing":
        loaded = load_decoder(checkpoint, "float32", torch.device("cpu"), trust_remote_code=True)
        assert type(loaded.model).__name__ == "OwnModel"


def test_nobody_is_asked_whether_code_beside_a_gguf_file_may_run(
    tmp_path: Path, ran: Path, imported: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "n")
    tiny.save_gguf(tmp_path / "tiny.gguf")
    add_code(tmp_path, ran)
    model = identify_model(Model(source=str(tmp_path / "tiny.gguf")), imported.store)
    with contextlib.suppress(InputError):  # to refuse such a folder is right as well
        import_model.run(ArtifactStore(tmp_path / "new").prepare(), "model", {"model": model})
    assert asked == []
    assert not ran.exists()


# --- permissions ---------------------------------------------------------------------------------------------------

UMASKS = {"0027": (0o640, 0o750), "0002": (0o664, 0o775)}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Give new files other permissions in this process."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module", params=UMASKS)
def ran_under(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A real run, pushed to a shared folder and pulled from it, under each umask."""
    folder = tmp_path_factory.mktemp("umask")
    with umask(int(request.param, 8)):
        (folder / "team").mkdir()
        ran = make_real_run(folder)
        remote = open_remote(str(folder / "team"), writable=True)
        remote.create()
        push_run(ArtifactStore(ran.root, remote), RUN)
        pull_run(ArtifactStore(folder / "another", remote).prepare(), RUN)
    return request.param, folder


@pytest.mark.parametrize(
    "place", ["cache/objects", "cache/runs", "cache/work", "team", "another/objects", "another/runs"]
)
def test_everything_is_as_open_as_the_umask_says(ran_under: tuple[str, Path], place: str) -> None:
    mask, folder = ran_under
    file_mode, folder_mode = UMASKS[mask]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder / place, *(folder / place).rglob("*"))}
    wrong = {path: mode for path, mode in modes.items() if mode != (folder_mode if path.is_dir() else file_mode)}
    assert {str(path.relative_to(folder)): oct(mode) for path, mode in wrong.items()} == {}
    assert any(path.is_file() for path in modes) or place == "cache/work"


# --- secrets -------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "unmistakable+aws/secret",
    "HF_TOKEN": "hf_UnmistakableHuggingFaceToken",
    "AZURE_STORAGE_SAS_KEY": "sv=2026&sig=Unmistakable%2Bazure%2Fsecret%3D",
}
TOLD = [b"unmistakable", b"Unmistakable"]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 endpoint in a process of its own."""
    with s3_server() as endpoint:
        yield endpoint


@dataclass(frozen=True)
class Shell:
    """Command lines in an environment with secrets, and all that they wrote."""

    cache: Path
    recipe: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[bytes]

    def run(self, *arguments: object) -> tuple[int, bytes]:
        """Run a command line; return its exit code and everything it printed, by whatever means."""
        self.monkeypatch.setattr(sys, "argv", ["covercal", *map(str, arguments)])
        self.capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capture.readouterr()
        return int(ended.value.code or 0), out + err

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.cache.rglob("*") if path.is_file()}


def tells(text: bytes) -> bool:
    return any(secret in text for secret in TOLD)


@pytest.fixture
def shell(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Shell:
    """A shell whose remote is a new bucket."""
    address = bucket_address(s3)
    for name, value in {**SECRETS, "COVERCAL_REMOTE": address, "COVERCAL_REMOTE_WRITE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COVERCAL_OFFLINE", raising=False)
    monkeypatch.setattr(flows.run, "_run_flow", run_without_prefect)
    monkeypatch.setattr(flows.run, "configured_server", lambda: "")
    open_remote(address, writable=True).create()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.recipe_value(tmp_path)))
    return Shell(tmp_path / "cache", recipe, monkeypatch, capfdbinary)


def objects_of(endpoint: str) -> list[bytes]:
    """Return the bytes of everything in the bucket that is the remote."""
    bucket = os.environ["COVERCAL_REMOTE"].removeprefix("s3://").partition("/")[0]
    client = s3_client(endpoint)
    listed = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return [client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read() for each in listed]


def delete_bucket(endpoint: str) -> None:
    bucket = os.environ["COVERCAL_REMOTE"].removeprefix("s3://").partition("/")[0]
    client = s3_client(endpoint)
    for each in client.list_objects_v2(Bucket=bucket).get("Contents", []):
        client.delete_object(Bucket=bucket, Key=each["Key"])
    client.delete_bucket(Bucket=bucket)


def test_a_run_that_shares_tells_no_secret(shell: Shell, s3: str) -> None:
    for arguments in (["run", shell.recipe], ["plan", shell.recipe], ["cache", "push"], ["cache", "remote"]):
        code, output = shell.run(*arguments)
        assert (code, tells(output)) == (0, False)
    there = objects_of(s3)
    assert len(there) > 20
    assert not any(map(tells, there))
    files = shell.files()
    assert any(path.endswith(".json") and "/runs/" in path for path in files)
    assert [path for path, data in files.items() if tells(data)] == []


def test_a_run_whose_remote_breaks_off_tells_no_secret(shell: Shell, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(running: Running, *_: Any, **__: Any) -> None:
        store = open_store()
        store.remote.check()
        inputs = identify(running.recipe, store)
        delete_bucket(s3)
        run_chain(running.recipe, inputs, Direct(store, running.recorder))

    monkeypatch.setattr(flows.run, "_run_flow", broken)
    code, output = shell.run("run", shell.recipe)
    (record,) = read_runs(shell.cache)
    assert (code in (1, 2), record.state) == (True, "failed")
    assert "Remote s3://" in record.error
    assert not tells(output)
    assert [path for path, data in shell.files().items() if tells(data)] == []


@pytest.mark.parametrize("fault", ["nothing listens", "no such bucket", "no such account"])
def test_a_remote_that_cannot_be_read_tells_no_secret(
    shell: Shell, s3: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("storage.remote.RETRIES", 0)
    if fault == "nothing listens":
        monkeypatch.setenv("AWS_ENDPOINT_URL", closed_port())
    elif fault == "no such bucket":
        monkeypatch.setenv("COVERCAL_REMOTE", "s3://no-such-bucket/cache")
    else:
        monkeypatch.setenv("COVERCAL_REMOTE", "az://container/cache")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", closed_port().replace("http:", "https:"))
    code, output = shell.run("run", shell.recipe)
    assert code in (1, 2)
    assert b"error" in output
    assert not tells(output)
    assert [path for path, data in shell.files().items() if tells(data)] == []
