"""Kernels compiled ahead: by workers, from a configuration, for the sizes that were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn import warming
from hf_fastattn.warming import Size, buildable, shallow, warm_up_config
from tests.tools.composites import composite
from tests.tools.models import tiny


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(ValueError, match=r"not patched; call hf_fastattn.patch"):
        hf_fastattn.warm_up(tiny("llama"))


def test_on_a_cpu_nothing_is_compiled() -> None:
    assert hf_fastattn.warm_up(hf_fastattn.patch(tiny("llama"))) == 0.0


def test_sizes() -> None:
    assert warming._sizes((1, 8), (512,), (False, True)) == [
        Size(1, 512, False), Size(1, 512, True), Size(8, 512, False), Size(8, 512, True),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"rows=\(0,\) must be positive"):
        warming._sizes((0,), (512,), (False,))


def test_as_few_layers_as_show_every_type() -> None:
    assert shallow(tiny("llama").config).num_hidden_layers == 1
    mixed = tiny("ministral").config
    found = shallow(mixed)
    assert set(found.layer_types) == set(mixed.layer_types) and len(found.layer_types) == found.num_hidden_layers
    assert found.num_hidden_layers <= mixed.num_hidden_layers


def test_workers_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they compile nothing, but run the same calls."""
    model = hf_fastattn.patch(tiny("qwen3"))
    sizes = [Size(2, 9, False), Size(1, 5, True)]
    options = asdict(model._fastattn.runtime.config)
    assert warm_up_config(model.config, torch.float32, torch.device("cpu"), options, sizes, 1) > 0


COMPOSITES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "qwen3_omni_moe")


@pytest.mark.parametrize("name", [*COMPOSITES, "llava", "qwen3_5"])
def test_models_with_a_tower(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker builds the text model alone where it can, else the whole with a short tower, and runs it on pages."""
    model = composite(name) if name == "llava" else tiny(name)
    small, architecture = buildable(model.config, type(hf_fastattn.patch(model)).__name__)
    assert (architecture is not None) == (name in COMPOSITES)
    assert small.get_text_config(decoder=True).num_hidden_layers < model.config.get_text_config().num_hidden_layers
    made: list[Any] = []
    monkeypatch.setattr(warming, "patch", lambda model, **options: made.append(hf_fastattn.patch(model, **options)))
    small.save_pretrained(tmp_path)
    task = {"folder": str(tmp_path), "architecture": architecture, "dtype": "float32", "device": "cpu", "options": {}}
    warming.worker({**task, "sizes": [(2, 9, False)]})
    call = hf_fastattn.report(made[0]).last_call
    assert call is not None and call.forwards == warming.NEW_TOKENS and not call.fallbacks
    towers = [part for part in ("vision_config", "audio_config") if architecture and hasattr(small, part)]
    for tower in (getattr(small, part) for part in towers):
        assert {getattr(tower, depth, 1) for depth in warming.DEPTHS} == {1}


def test_a_model_whose_class_is_not_known() -> None:
    with pytest.raises(ValueError, match="cannot be built alone, and architecture='NoSuch' is no class"):
        buildable(tiny("qwen2_vl").config, "NoSuch")


def test_a_worker_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"worker that compiles kernels failed: .*no_such_option"):
        warm_up_config(tiny("llama").config, torch.float32, torch.device("cpu"), {"no_such_option": 1}, [Size(1, 4, False)])


@pytest.mark.gpu
def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    """What a call needs is in Triton's cache before the model is there."""
    config = tiny("qwen3", hidden_size=256, head_dim=64).config
    made = tmp_path / "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(made))
        warm_up_config(config, torch.bfloat16, torch.device("cuda"), {}, [Size(2, 40, False), Size(2, 40, True)], 2)
    before = {(path.stem, path.parent.name) for path in made.rglob("*.cubin")}
    config.save_pretrained(tmp_path)
    code = f"""
import torch, hf_fastattn
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(tmp_path)!r}), dtype=torch.bfloat16).eval()
hf_fastattn.patch(model)
ids = torch.randint(1, 99, (2, 40), device="cuda")
for sampled in (False, True):
    model.generate(ids, do_sample=sampled, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
assert hf_fastattn.report(model).last_call.fast_loops == 1
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(made)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
    after = {(path.stem, path.parent.name) for path in made.rglob("*.cubin")}
    assert before and after - before == set()
