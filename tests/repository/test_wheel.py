"""The wheel and the sdist, built from a copy of the tree: links become folders, data files travel, tests stay."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hf_fastattn

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "patches", "eval")
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "examples")
SOURCES = ("pyproject.toml", "MANIFEST.in", "constraints.txt", "LICENSE", *DOCUMENTS, "hf_fastattn", *FOLDERS)
# Below eval/: training data and records of past runs.
LEFT_OUT = {"work", "mixture", "results"}

GENERATE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_fastattn, hf_fastattn.cli
from hf_fastattn.eval.choices import SHIPPED

print(hf_fastattn.__file__)
print(SHIPPED)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 97, (1, 20))
stock = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
with hf_fastattn.patched(model):
    ours = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    call = hf_fastattn.report(model).last_call
    assert call.forwards > 0 and not call.fallbacks, call
assert torch.equal(stock, ours), (stock, ours)
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--no-index"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy: setuptools leaves a build folder behind, whose stale files would be in the next wheel.
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "work", ".*")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    # One file that must travel and three that must not, whatever these folders hold at the moment.
    for name in ("checkpoint/weights", "checkpoint/work", "checkpoint/mixture", "results"):
        (tree / "eval" / name).mkdir(parents=True, exist_ok=True)
        (tree / "eval" / name / "planted.json").write_text("{}")
    (tree / "tests").mkdir()
    (tree / "tests" / "test_planted.py").write_text("")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--wheel-dir", tree.parent, tree)
    (built,) = tree.parent.glob("hf_fastattn-*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tree.parent / "dist")]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    (built,) = (tree.parent / "dist").glob("hf_fastattn-*.tar.gz")
    return built


def test_wheel_has_every_source_and_data_file(tree: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    suffixes = {".py", ".md", ".txt", ".json", ".jsonl", ".jinja", ".model", ".safetensors"}
    expected = {"hf_fastattn/py.typed", "hf_fastattn/eval/checkpoint/weights/planted.json"}
    expected |= {path.relative_to(tree).as_posix() for path in (tree / "hf_fastattn").rglob("*.py")}
    for folder in FOLDERS:
        files = (path.relative_to(tree) for path in (tree / folder).rglob("*") if path.suffix in suffixes)
        expected |= {f"hf_fastattn/{path.as_posix()}" for path in files if not LEFT_OUT & set(path.parts)}
    assert not expected - names


def test_wheel_has_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert "hf_fastattn" in tops
    assert all(top == "hf_fastattn" or top.endswith(".dist-info") for top in tops)
    assert not [name for name in names if {*LEFT_OUT, "__pycache__"} & set(name.split("/"))]


def test_wheel_has_no_links(wheel: Path) -> None:
    modes = [info.external_attr >> 16 for info in zipfile.ZipFile(wheel).infolist()]
    assert all(stat.S_ISREG(mode) for mode in modes)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == hf_fastattn.__version__ and metadata["Requires-Python"] == ">=3.11"
    # Transformers changes what it calls between minor versions, so the next one must be tried first.
    assert "transformers<5.25,>=5.17" in metadata.get_all("Requires-Dist", [])


def test_sdist_has_no_tests_and_no_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert not [name for name in names if {"tests", *LEFT_OUT} & set(name.split("/"))]
    assert {
        "constraints.txt",
        "hf_fastattn/kernels/attention/paged.py",
        "hf_fastattn/eval/checkpoint/weights/planted.json",
    } <= names


def test_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    pip("wheel", "--no-build-isolation", "--wheel-dir", tmp_path, sdist)
    (built,) = tmp_path.glob("hf_fastattn-*.whl")
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_installed_wheel_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--target", target, wheel)
    assert not (target / "kernels").exists()
    environment = {**os.environ, "PYTHONPATH": str(target)}
    process = subprocess.run(
        [sys.executable, "-c", GENERATE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    answer = subprocess.run(
        [sys.executable, "-m", "hf_fastattn", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.stdout == f"hf-fastattn {hf_fastattn.__version__}\n"
    module, checkpoint = process.stdout.split()[-2:]
    assert Path(module).is_relative_to(target) and Path(checkpoint).is_relative_to(target)
    if (ROOT / "eval" / "checkpoint" / "weights" / "config.json").is_file():
        assert (Path(checkpoint) / "config.json").is_file()
