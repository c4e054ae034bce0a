"""The layout that lets root folders and one installable package be the same files."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from hf_fastattn.patches.registry import FAMILIES
from tests.tools.fresh import ROOT, fresh

FOLDERS = ("kernels", "patches", "eval")
# Run as a script, a file's folder comes first on the path: these names would hide what the file itself imports.
USED_ELSEWHERE = {"kernels", "patches", "eval", "evaluate", "triton", "datasets", "lm_eval", "flashinfer", "vllm"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "hf_fastattn" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert (ROOT / folder).is_dir() and not (ROOT / folder).is_symlink()


def test_git_stores_links_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    links = [f"hf_fastattn/{folder}" for folder in FOLDERS]
    listing = subprocess.run(["git", "ls-files", "--stage", *links], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode or not listing.stdout:
        pytest.skip("git does not track these files here")
    assert [line.split()[0] for line in listing.stdout.splitlines()] == ["120000"] * len(links)


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folders_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_named_like_a_package_in_use(folder: str) -> None:
    taken = USED_ELSEWHERE | set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    taken.discard("hf_fastattn")
    entries = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / folder).iterdir()}
    assert not entries & taken


def test_every_kernel_file_is_in_the_table() -> None:
    table = (ROOT / "kernels" / "README.md").read_text()
    named = re.findall(r"^\| `([\w/]+\.py)` \|", table, re.MULTILINE)
    kernels = ROOT / "kernels"
    assert sorted(named) == sorted(path.relative_to(kernels).as_posix() for path in kernels.rglob("*.py"))


def test_the_readme_names_every_family() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in FAMILIES if f"`{name.removesuffix('_text')}`" not in readme]


def test_transformers_imports_from_the_root() -> None:
    assert fresh("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)") == "LlamaForCausalLM"


def test_import_has_no_side_effects() -> None:
    # Classes and module globals that a patch could have replaced are compared before and after the import.
    code = """
import sys, torch
from transformers import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

watched = [GenerationMixin, llama, qwen2, llama.LlamaAttention, qwen2.Qwen2Attention, llama.LlamaForCausalLM]
before = [dict(vars(owner)) for owner in watched]
names = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
triton_modules = {name for name in sys.modules if name.split(".")[0] == "triton"}

import hf_fastattn

assert callable(hf_fastattn.patch)

assert [dict(vars(owner)) for owner in watched] == before
assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
assert {name for name in sys.modules if name.split(".")[0] == "triton"} == triton_modules
assert not torch.cuda.is_initialized()
print("clean")
"""
    assert fresh(code) == "clean"


def test_import_does_not_need_triton() -> None:
    # Transformers itself loads Triton through torch._dynamo, so what is tested is that we do not: an import fails here.
    code = "import sys; sys.modules['triton'] = None; import hf_fastattn; print(callable(hf_fastattn.patch))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "True", shown.stderr
