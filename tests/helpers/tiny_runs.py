"""Three checkpoints as the Space compares them, trained for two steps each."""

from __future__ import annotations

import pytest
from datasets import Dataset
from overlay import COLOURS, drawn_shape
from slots import Slot, load_slots
from transformers import set_seed

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

QUESTION = "what color is the shape?"
TOKENS = 64
SIZES = {"image_size": 32, "vision_hidden_size": 16, "vision_layers": 1, "hidden_size": 32, "layers": 2, "heads": 2}
WAYS = {
    "baseline": {"slow_mode_ratio": 1.0, "isolator_length": 0, "distillation_weight": 0.0},
    "dualspeed": {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "isolator_length": 4},
    "pruned": {"slow_mode_ratio": 0.0, "isolator_length": 0, "distillation_weight": 0.0},
}


def samples() -> Dataset:
    """A picture of each colour, and a question about it."""

    def row(colour: str) -> dict:
        content = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
        answer = [{"type": "text", "text": colour}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [drawn_shape("circle", COLOURS[colour])]}

    return Dataset.from_list([row(colour) for colour in COLOURS])


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory) -> dict[str, str]:
    """The folder of each role's run."""
    folders = {}
    for key, settings in WAYS.items():
        folders[key] = str(tmp_path_factory.mktemp("runs") / key)
        options = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1}
        options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "speedup_rounds": 0}
        args = DualSpeedTrainingArguments(folders[key], pruner="divprune", learning_rate=1e-2, **options, **settings)
        set_seed(0)
        model, processor = build_tiny_llava([QUESTION, *COLOURS], **SIZES)
        trainer = DualSpeedTrainer(
            model,
            args,
            train_dataset=samples(),
            processing_class=processor,
            data_collator=VisionLanguageCollator(processor),
        )
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    return folders


@pytest.fixture(scope="session")
def slots(tiny_runs) -> list[Slot]:
    """The three runs, loaded."""
    return load_slots(tiny_runs)
