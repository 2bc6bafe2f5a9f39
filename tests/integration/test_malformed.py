"""One table of malformed inputs: each is refused with a clear error that names what is wrong, and none is accepted.

A row is a kind, an input and the expected text of the error, a pattern that names argument, key or file. `REFUSE` has,
for each kind, what is done with the input.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import tiny_llava_processor
from torch import nn

from hf_dualspeed import (
    AutoPruner,
    DualSpeedTrainer,
    DualSpeedTrainingArguments,
    ModeIsolator,
    ModeSchedule,
    PrunerConfig,
    VisualTokens,
    cli,
    freeze_roles,
    prune_inputs,
    prune_visual_tokens,
    register_pruner,
    self_distillation_loss,
)
from hf_dualspeed.commands import bench as bench_command
from hf_dualspeed.data.checking import check_samples
from hf_dualspeed.data.collators import MaskVisualLabels, VisionLanguageCollator
from hf_dualspeed.data.easy_vqa import load_easy_vqa
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.evaluation.checkpoint import find_checkpoint
from hf_dualspeed.evaluation.generation import answer_accuracy
from hf_dualspeed.evaluation.pruned_prompts import PrunedPrompts
from hf_dualspeed.evaluation.questions import load_questions
from hf_dualspeed.pruning.inputs import check_inputs
from hf_dualspeed.pruning.isolator import saved_length
from hf_dualspeed.publishing.model_card import model_card, write_model_card
from hf_dualspeed.publishing.plots import plot_learning_curve
from hf_dualspeed.publishing.results import read_results, write_results
from hf_dualspeed.recipes.arguments import RecipeArguments, parse_recipe
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava
from hf_dualspeed.trainer.checkpoints import fault_of
from hf_dualspeed.trainer.training_args import DICTS

NAN, INF = float("nan"), float("inf")
BASE = "model_name_or_path: org/model\ndataset: easy-vqa\noutput_dir: run\nuse_cpu: true\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


def wrong(kind: str, name: str, *values: object, said: str = "{name}") -> list[tuple]:
    """A row for each value of the argument `name`; the error names both."""
    return [(kind, {name: value}, said.format(name=f"`{name}` ")) for value in values]


def recipe_files() -> list[tuple]:
    """Whole files."""
    rows = [
        ("", "must hold `key: value` lines, but holds None"),
        ("# a comment\n", "must hold `key: value` lines, but holds None"),
        ("null\n", "must hold `key: value` lines"),
        ("- a\n- b\n", "must hold `key: value` lines, but holds a list"),
        ("text\n", "must hold `key: value` lines, but holds a text"),
        ("3\n", "must hold `key: value` lines"),
        ("!!omap\n- seed: 3\n", "line 1 has the tag .*omap"),
        ("!!set {seed}\n", "line 1 has the tag .*set"),
        ("!!python/object:os.system {}\n", "line 1 has the tag .*python"),
        ("!!python/object/apply:os.system ['true']\n", "line 1 has the tag .*python"),
        ("a: [", "not valid YAML"),
        ("a: {", "not valid YAML"),
        ("a: 'b", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("\tseed: 3\n", "not valid YAML"),
        ("seed:\n\t- 3\n", "not valid YAML"),
        ("seed: 3\n lr: 4\n", "not valid YAML"),
        ("seed: @3\n", "not valid YAML"),
        ("%YAML 3.0\n---\nseed: 1\n", "not valid YAML"),
        ("seed: 3\n---\nseed: 4\n", "not valid YAML"),
        ("seed: 3\nseed: 4\n", "`seed` stands in lines 1 and 2"),
        ("lora:\n  r: 4\n  r: 8\n", "`r` stands in lines 2 and 3"),
        ("lora: {r: 4, 'r': 8}\n", "`r` stands in lines 1 and 1"),
        ("? [a, b]\n: 3\n", "line 1 has a key that is no text"),
        ("? {a: b}\n: 3\n", "line 1 has a key that is no text"),
        ("<<: {seed: 3}\n", "unknown key `<<`"),
        ("a: &x 3\nb: *x\n", "line 2 refers to an anchor"),
        ("a: &x [*x]\n", "line 1 refers to an anchor"),
        (BOMB, "line 2 refers to an anchor"),
        ("lora: " + "[" * 5000, "nested too deeply|not valid YAML"),
        ("lora: " + "{a: " * 5000, "nested too deeply|not valid YAML"),
        ("lora: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("lora: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("- " * 3000 + "a", "nested too deeply|not valid YAML|holds a list"),
        (b"\x00\x01\x02\xff", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not valid YAML"),
        (b"seed: \xff\xfe\n", "not valid YAML"),
        (b"\xff\xfes\x00", "not valid YAML|unknown key|holds"),
        ("seed: \x07\n", "not valid YAML"),
    ]
    return [("recipe file", text, rf"recipe\.yaml: .*({said})") for text, said in rows]


def recipe_values() -> list[tuple]:
    """Lines of a recipe that is right but for them."""
    of_type = [
        ("seed: x", "`seed` is 'x'"),
        ("seed: 3.5", "`seed` is '3.5'"),
        ("seed: true", "`seed` is 'true'"),
        ("seed: [1, 2]", "`seed` is"),
        ("seed: {a: 1}", "`seed` is"),
        ("seed: -1", "`seed` must be in"),
        ("seed: 99999999999", "`seed` must be"),
        ("max_steps: many", "`max_steps` is 'many'"),
        ("max_steps: 1e3", "`max_steps` is '1e3'"),
        ("max_steps: -7", "`max_steps` must be in .* got -7"),
        ("max_steps: 0", "`max_steps` must be in .* got 0"),
        ("learning_rate: fast", "`learning_rate` is 'fast'"),
        ("learning_rate: true", "`learning_rate` is 'true'"),
        ("learning_rate: -1e-4", "`learning_rate` must be in .* got -0.0001"),
        ("learning_rate: .nan", "`learning_rate` is '.nan'"),
        ("learning_rate: nan", "`learning_rate` must be a finite number, got nan"),
        ("learning_rate: inf", "`learning_rate` must be a finite number, got inf"),
        ("max_grad_norm: nan", "`max_grad_norm` must be a finite number, got nan"),
        ("max_grad_norm: -1", "`max_grad_norm` must be in"),
        ("weight_decay: -0.1", "`weight_decay` must be in"),
        ("weight_decay: nan", "`weight_decay` must be a finite number"),
        ("warmup_steps: -1", "`warmup_steps` must be in"),
        ("num_train_epochs: -1", "`num_train_epochs` must be in .* got -1"),
        ("num_train_epochs: 0", "`num_train_epochs` must be in"),
        ("num_train_epochs: nan", "`num_train_epochs` must be a finite number"),
        ("save_steps: 0", "`save_steps` must be in .* got 0"),
        ("save_steps: -5", "`save_steps` must be in"),
        ("save_steps: inf", "`save_steps` must be a finite number"),
        ("logging_steps: 0", "`logging_steps` must be in"),
        ("logging_steps: -1", "`logging_steps` must be in"),
        ("eval_steps: -1", "`eval_steps` must be in"),
        ("eval_steps: 0", "`eval_steps` must be in"),
        ("save_total_limit: -1", "`save_total_limit` must be in"),
        ("save_total_limit: 0", "`save_total_limit` must be in"),
        ("per_device_train_batch_size: 0", "`per_device_train_batch_size` must be in"),
        ("per_device_train_batch_size: -2", "`per_device_train_batch_size` must be in"),
        ("per_device_train_batch_size: 2.5", "`per_device_train_batch_size` is '2.5'"),
        ("per_device_eval_batch_size: 0", "`per_device_eval_batch_size` must be in"),
        ("gradient_accumulation_steps: 0", "`gradient_accumulation_steps` must be in"),
        ("adam_beta1: 1", "`adam_beta1` must be in"),
        ("adam_beta2: -0.1", "`adam_beta2` must be in"),
        ("adam_epsilon: -1", "`adam_epsilon` must be in"),
        ("label_smoothing_factor: 2", "`label_smoothing_factor` must be in"),
        ("dataloader_num_workers: -1", "`dataloader_num_workers` must be in"),
        ("neftune_noise_alpha: -5", "`neftune_noise_alpha` must be in"),
        ("lr_scheduler_type: fast", "`lr_scheduler_type`"),
        ("optim: best", "`optim`"),
        ("eval_strategy: often", "`eval_strategy`"),
        ("save_strategy: never", "`save_strategy`"),
        ("hub_strategy: all", "`hub_strategy`"),
        ("bf16: maybe", "`bf16` is 'maybe'"),
        ("plain_path: perhaps", "`plain_path` is 'perhaps'"),
        ("train_vision_tower: 3", "`train_vision_tower` is '3'"),
        ("run_name: {a: b}", "`run_name` must be a text"),
        ("run_name: [a]", "`run_name` must be a text"),
        ("dataset: [a]", "`dataset` .*"),
        ("dataset_split: [a]", "`dataset_split` must be a text"),
        ("mode_schedule: {a: b}", "`mode_schedule` must be a text"),
        ("image_column: [[a]]", "`image_column` must be a list of texts, got something else in line 5"),
        ("image_column: [null]", "`image_column` must be a list of texts"),
        ("image_column: [{a: b}]", "`image_column` must be a list of texts"),
        ("image_column: {a: b}", "`image_column` must be a list"),
        ("fast_only_parameters: [~]", "`fast_only_parameters` must be a list of texts"),
        ("fast_only_parameters: {a: b}", "`fast_only_parameters` must be a list"),
        ("eval_dataset: ''", "`eval_dataset` is an empty text"),
        ("image_folder: ''", "`image_folder` is an empty text"),
        ("lora: [1]", "`lora`"),
        ("lora: text", "`lora` must be a JSON mapping"),
        ("lora: '[1]'", "`lora` must be a mapping"),
        ("lora: {rank: 4}", "`lora` has an unknown key 'rank'"),
        ("lora: {r: four}", "`lora.r` must be a whole number"),
        ("lora: {r: 0}", "`lora.r` must be in"),
        ("lora: {lora_dropout: 2}", "`lora.lora_dropout` must be in"),
        ("pruner_kwargs: 3", "`pruner_kwargs` must be a mapping"),
        ("lr_scheduler_kwargs: 3", "`lr_scheduler_kwargs` must be a mapping"),
        ("pruner_kwargs: x", "`pruner_kwargs` must be a JSON mapping"),
        ("tiny_llava: {layers: 1}", "exactly one of `model_name_or_path`"),
        ("load_in_4bit: true", "`load_in_4bit` is True"),
        ("dtype: float64", "`dtype` must be one of"),
        ("long_samples: drop", "`long_samples` must be one of"),
        ("unreadable_images: ignore", "`unreadable_images` must be one of"),
        ("max_length: 0", "`max_length` must be in"),
        ("max_length: -4", "`max_length` must be in"),
        ("eval_batch_size: 0", "`eval_batch_size` must be in"),
        ("max_new_tokens: -1", "`max_new_tokens` must be in"),
        ("eval_limit: 0", "`eval_limit` must be in"),
        ("card_images: -1", "`card_images` must be in"),
        ("pruning_ratio: 1", r"`pruning_ratio` must be in \[0, 1\), got 1"),
        ("pruning_ratio: nan", "`pruning_ratio` must be a finite number"),
        ("pruning_ratio: half", "`pruning_ratio` is 'half'"),
        ("slow_mode_ratio: 1.5", "`slow_mode_ratio` must be in"),
        ("min_slow_mode_ratio: 0.5", "`min_slow_mode_ratio` is 0.5, more than `max_slow_mode_ratio`"),
        ("min_pruning_ratio: 0.95", "`min_pruning_ratio` is 0.95, more than `pruning_ratio`"),
        ("mode_schedule: often", "`mode_schedule` must be one of"),
        ("isolator_length: -1", "`isolator_length` must be in"),
        ("isolator_length: 2.5", "`isolator_length` is '2.5'"),
        ("slow_mode_splits: 0", "`slow_mode_splits` must be a whole number"),
        ("slow_mode_splits: few", "`slow_mode_splits` must be a whole number"),
        ("fused_head_loss: maybe", "`fused_head_loss` must be one of"),
        ("vision_feature_cache_gib: 0", "`vision_feature_cache_gib` must be in"),
        ("learning_rat: 1", "unknown key `learning_rat`.* Did you mean 'learning_rate'"),
        ("5: 1", "unknown key `5`"),
        ("LEARNING_RATE: 1", "unknown key `LEARNING_RATE`"),
        ("dataset: other", "`dataset` stands in lines 2 and 5"),
        ("lora: !!python/name:os.system", "line 5 has the tag"),
        ("seed: !!int 3", "line 5 has the tag"),
        ("lora: !!omap [r: 4]", "line 5 has the tag"),
    ]
    return [("recipe value", line, said) for line, said in of_type]


def commands() -> list[tuple]:
    """Words of a command line."""
    names = ("train", "evaluate", "push", "push-pruner", "push-metric", "card", "check", "assemble", "merge", "convert")
    rows = [(name, "required|exactly one of") for name in (*names, "space")]
    rows += [
        (f"{name} a b --nonsense", "unrecognized arguments|required|Unknown argument|invalid choice") for name in names
    ]
    rows += [
        ("pruners now", "unrecognized arguments: now"),
        ("train --config none.yaml", "`config` is 'none.yaml', but there is no such file"),
        ("train --config .", "`config` is '.', but there is no such file"),
        ("train --config", "expected one argument"),
        ("train --learning_rat 1", "Unknown argument `--learning_rat`"),
        ("train --seed x", "--seed: invalid int value: 'x'"),
        ("train --model_name_or_path m", "`dataset` is not set"),
        ("train --dataset easy-vqa --tiny_llava 3", "`tiny_llava` must be a mapping, got 3"),
        ("train --dataset easy-vqa --tiny_llava {", "`tiny_llava` must be a JSON mapping"),
        ("train --dataset easy-vqa --model_name_or_path m --max_grad_norm nan --use_cpu", "`max_grad_norm` must be"),
        ("demo --port 99999", r"`port` must be in \[1, 65535\], got 99999"),
        ("demo --port 0", "`port` must be in"),
        ("demo --port -1", "`port` must be in"),
        ("demo --port web", "--port: invalid int value: 'web'"),
        ("check /nope", "`model` is '/nope', which is neither a folder nor a Hub repo"),
        ("check a/b/c", "`model` is 'a/b/c'"),
        ("check m --position_ids up", "--position_ids: invalid choice: 'up'"),
        ("evaluate /nope --dataset easy-vqa", "`checkpoint` is '/nope', which is neither"),
        ("evaluate . --dataset easy-vqa", "holds no checkpoint"),
        ("evaluate m", "required: --dataset"),
        ("evaluate m --dataset d --metric bleu", "invalid choice: 'bleu'"),
        ("evaluate m --dataset d --batch_size 0", "`batch_size` must be in"),
        ("evaluate m --dataset d --batch_size x", "invalid int value: 'x'"),
        ("evaluate m --dataset d --max_new_tokens -1", "`max_new_tokens` must be in"),
        ("evaluate m --dataset d --pruning_ratio 1", "`pruning_ratio` must be in"),
        ("evaluate m --dataset d --pruning_ratio nan", "`pruning_ratio` must be in"),
        ("evaluate m --dataset d --seed -1", "`seed` must be in"),
        ("evaluate m --dataset d --dtype int8", "invalid choice: 'int8'"),
        ("bench --pruner none", "`pruner` must be one of"),
        ("bench --batch 0", "`batch` must be in"),
        ("bench --rounds 1", "`rounds` must be in"),
        ("bench --pruning-ratio 1", "`pruning_ratio` must be in"),
        ("bench --pruning-ratio nan", "`pruning_ratio` must be a finite number, got nan"),
        ("bench --shape cube", "`shape` must be one of"),
        ("bench --output bench.txt", "`output` must end in .json"),
        ("bench --slow-splits 0", "`slow_splits` must be a whole number"),
        ("bench --growth --profile", "one at a time"),
        ("bench --render-only --output none.json", "there is no such file to render"),
        ("card /nope", "/nope|results.json"),
        ("push-pruner divprune repo --set ratio", "`--set` takes KEY=VALUE, got 'ratio'"),
        ("push-pruner divprune a/b --set ratio=1", "`--set` has an unknown key 'ratio'"),
        ("push-pruner divprune a/b --set ratio=[", r"`--set` takes KEY=VALUE with a value in YAML, got 'ratio=\['"),
        ("push-pruner divprune a/b --set ratio=!!python/name:os.system", "`--set` takes KEY=VALUE with a value in"),
        ("merge [/x] out", r"`checkpoint` is '\[/x\]'"),
        ("merge /nope out --dtype int8", "invalid choice: 'int8'"),
        ("merge a out\0", "`output` is .* no name of a folder"),
        ("merge a /dev/null", "`output` is '/dev/null', which is not empty"),
        ("merge a /dev/null/b", "`output` is '/dev/null/b', but nothing can be written into '/dev/null'"),
        ("assemble /dev/null", "`output_dir` is '/dev/null', which is not empty"),
        ("assemble out\0", "`output_dir` is .* no name of a folder"),
        ("convert table none.csv out.jsonl", "no file or folder 'none.csv'"),
        ("convert table /dev/null out.jsonl", "'/dev/null' is no regular file"),
        ("convert coco /dev/null out.jsonl", "'/dev/null' is no regular file"),
        ("push-pruner divprune a/b --pruning_ratio 2", "`pruning_ratio` must be in"),
        ("push-pruner divprun a/b", "`pruner` must be one of"),
        ("push-metric bleu a/b", "invalid choice: 'bleu'"),
        ("push-metric anls b", "`repo` must be a Space 'user/name'"),
        ("space --push x", "must be a"),
        ("trian", "There is no command 'trian'. Did you mean 'train'"),
    ]
    return [("command", words.split(), said) for words, said in rows]


def compared() -> list[tuple]:
    """Files that `python -m benchmarks.compare`, `benchmarks.ablation` and `dualspeed bench` are asked to render."""
    texts = ("", "{", "[]", "{}", '{"summary": []}', '{"summary": {"x": 3}}', "NaN", "[" * 5000)
    rows = [("rendered file", ("compare", text), "`results`") for text in texts]
    rows += [("rendered file", ("ablation", text), "`output`") for text in texts]
    return rows + [("rendered file", ("bench", text), "`output`") for text in texts]


def training_arguments() -> list[tuple]:
    kind, rows = "training arguments", []
    flags = ("plain_path", "proportional_attention", "fast_mode_checkpointing", "supervised_logits_only")
    for name in (*flags, "remove_unused_columns", "bf16", "push_to_hub", "load_best_model_at_end"):
        rows += wrong(kind, name, "false", 1, None, said="{name}must be True or False")
    for name in ("isolator_length", "slow_warmup_steps", "speedup_rounds", "seed", "per_device_train_batch_size"):
        rows += wrong(kind, name, 2.5, "4", True, None, [4], NAN, np.float32(2.5), said="{name}must be a whole number")
        rows += wrong(kind, name, -2, said="{name}must be in .* got -2")
    for name in ("pruning_ratio", "slow_mode_ratio", "distillation_weight", "learning_rate", "max_grad_norm"):
        rows += wrong(
            kind, name, "0.5", True, None, NAN, INF, [0.5], np.float64(NAN), said="{name}must be a finite number"
        )
        rows += wrong(kind, name, -0.5, said="{name}must be in .* got -0.5")
    for name in ("fast_only_parameters", "slow_only_parameters"):
        rows += wrong(kind, name, None, "*lora*", [3], [None], {"a": 1}, said="{name}must be a list, each item a text")
    for name in ("pruner", "mode_schedule", "position_ids", "video_budget"):
        rows += wrong(kind, name, None, 3, ["a"], said="{name}must be a text")
    rows += wrong(kind, "pruner_kwargs", 3, ["a"], "[1]", "x", said="{name}must be a")
    rows += wrong(kind, "vision_feature_cache", 3, True, [1], said="{name}must be a text or None")
    rows += wrong(kind, "slow_mode_splits", 0, 2.5, None, "few", True)
    rows += wrong(kind, "fused_head_loss", None, 3, "maybe")
    rows += wrong(kind, "max_steps", 0, -7, 2.5, "3")
    rows += wrong(kind, "save_steps", 0, -1, "3", NAN)
    for name in DICTS:
        rows += wrong(kind, name, 3, "3", "x", "[1]", said="{name}must be a")
    rows += wrong(kind, "hub_token", 3, said="{name}must be a text or None, got a int")
    rows += wrong(kind, "lr_scheduler_type", "fast", 3, None, said="{name}must be one of 'linear'")
    rows += wrong(kind, "report_to", 3, [3])
    rows += wrong(kind, "output_dir", 3, True, ["a"])
    rows += [("SFT arguments", given, said) for _, given, said in rows[::7]]
    rows += wrong("SFT arguments", "max_length", 0, -1, 2.5, "32")
    rows += wrong("SFT arguments", "packing", "false", None, said="{name}must be True or False")
    rows += wrong("SFT arguments", "dataset_kwargs", 3, ["a"])
    return [*rows, (kind, {"min_slow_mode_ratio": 0.3, "max_slow_mode_ratio": 0.2}, "more than `max_slow_mode_ratio`")]


def recipe_arguments() -> list[tuple]:
    kind = "recipe arguments"
    rows = wrong(kind, "train_projector", "false", 0, None, said="{name}must be True or False")
    rows += wrong(kind, "check_data", "no", 1, said="{name}must be True or False or None")
    rows += wrong(kind, "max_length", "32", 2.5, True, 0, -1)
    rows += wrong(kind, "eval_batch_size", None, "4", 0, NAN)
    rows += wrong(kind, "image_column", "image", [3], {"a": 1}, said="{name}must be a list, each item a text or None")
    rows += wrong(kind, "dataset", None, 3, ["a"], "")
    rows += wrong(kind, "lora", 3, ["a"], {"rank": 3}, {"r": "4"}, {"r": 0}, said="`lora")
    return rows


def pruner_configs() -> list[tuple]:
    kind = "pruner config"
    rows = wrong(kind, "pruning_ratio", "0.5", None, True, NAN, INF, 1, -0.1, 2, [0.5])
    rows += wrong(kind, "pruning_schedule", None, 3, "step")
    rows += wrong(kind, "initial_pruning_ratio", "0.5", 0.5, NAN)
    rows += wrong(kind, "dropped_tokens", None, 3, "keep")
    texts = [
        ("", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ("3", "is not a JSON object"),
        ('{"pruner_type": NaN}', "is not a JSON object"),
        ("[" * 5000, "is not a JSON object"),
        ('{"pruner_type": "divprune", "x": ' + "[" * 300 + "]" * 300 + "}", "nested more than"),
        ("{}", "`pruner` must be one of"),
        ('{"pruner_type": 3}', "`pruner` must be one of"),
        ('{"pruner_type": "divprun"}', "Did you mean 'divprune'"),
        ('{"pruner_type": "divprune", "pruning_ratio": "x"}', "`pruning_ratio` in .*json"),
        ('{"pruner_type": "divprune", "pruning_ratio": 1e999}', "`pruning_ratio` in .*json"),
        ('{"pruner_type": "divprune", "pruning_ratio": true}', "`pruning_ratio` in .*json"),
        ('{"pruner_type": "fastv", "layer": 1.5}', "`layer` in .*json"),
        ('{"pruner_type": "pyramiddrop", "stages": "abc"}', "`stages` in .*json"),
        ('{"pruner_type": "token_learner", "hidden_size": 99999999999}', "`hidden_size` in .*json"),
    ]
    return rows + [("pruner file", text, said) for text, said in texts]


def isolators() -> list[tuple]:
    good = save({"prompt": torch.zeros(4, 8)})
    files = [
        (b"", "no whole safetensors file"),
        (b"x", "no whole safetensors file"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "holds no isolator"),
        (b"\xff" * 64, "no whole safetensors file"),
        (good[:-4], "no whole safetensors file"),
        (good[:20], "no whole safetensors file"),
        (save({"other": torch.zeros(4, 8)}), "holds no isolator"),
        (save({"prompt": torch.zeros(32)}), "holds no isolator"),
        (save({"prompt": torch.zeros(4, 8, 1)}), "holds no isolator"),
        (save({"prompt": torch.zeros(4, 8, dtype=torch.int64)}), "holds no isolator"),
        (save({"prompt": torch.zeros(4, 8, dtype=torch.bool)}), "holds no isolator"),
        (save({"prompt": torch.zeros(0, 8)}), "`isolator_length` is 4"),
        (save({"prompt": torch.zeros(3, 8)}), "`isolator_length` is 4"),
        (save({"prompt": torch.zeros(4, 9)}), "`isolator_length` is 4"),
        (save({"prompt": torch.full((4, 8), NAN)}), "NaN or infinity"),
        (save({"prompt": torch.full((4, 8), INF)}), "NaN or infinity"),
    ]
    return [("isolator file", data, rf"mode_isolator\.safetensors.*{said}|{said}") for data, said in files]


def results() -> list[tuple]:
    entry = {"dataset": "d", "metric": "m", "view": "full", "value": 0.5, "n": 3}
    values = [
        ("accuracy", "high", "`accuracy` must be a number"),
        ("accuracy", True, "`accuracy` must be a number"),
        ("accuracy", 10**400, "`accuracy` must be a number"),
        ("n", [3], "`n` must be a number"),
        ("name", 3, "`name` must be a word"),
        ("datasets", "d", "`datasets` must be a list"),
        ("tags", [3], "`tags` must be a list"),
        ("settings", [], "`settings` must be a mapping"),
        ("settings", {"pruner": 3}, "`settings.pruner` must be a mapping"),
        ("settings", {"pruner": {"pruner_type": 3}}, "`settings.pruner.pruner_type` must be a word"),
        ("settings", {"pruner": {"pruner_type": "a"}}, "`settings.pruner.pruning_ratio` is missing"),
        ("steps", [3], "`steps` must be a mapping"),
        ("steps", {"fast": "3"}, "`steps.fast` must be a number"),
        ("seconds", 3, "`seconds` must be a mapping"),
        ("evaluations", {}, "`evaluations` must be a list"),
        ("evaluations", [3], r"`evaluations\[0\]` must be a mapping"),
        ("evaluations", [{}], r"`evaluations\[0\].dataset` is missing"),
        ("evaluations", [{**entry, "value": "x"}], r"`evaluations\[0\].value` must be a number"),
        ("evaluations", [{**entry, "metric": ["m"]}], r"`evaluations\[0\].metric` must be a word"),
        ("evaluations", [entry] * 20_000, "`evaluations` has 20,000 entries, more than 1,000"),
        ("progress", {"step": 1}, "`progress.of` is missing"),
        ("speedup", {"speedup": 2}, "`speedup.slow_share` is missing"),
        ("hub", "user/name", "`hub` must be a mapping"),
    ]
    texts = [(json.dumps({key: value}), said) for key, value, said in values]
    texts += [(json.dumps({"accuracy": 0.5}), "`n` is missing")]
    texts += [
        (f'{{"accuracy": {word}, "n": 3}}', f"{word} is no JSON number") for word in ("NaN", "Infinity", "-Infinity")
    ]
    texts += [('{"accuracy": 1e999, "n": 3}', "`accuracy` must be a number"), ('{"x": {"y": [NaN]}}', "no JSON number")]
    texts += [("", "not valid JSON"), ("{", "not valid JSON"), ("[]", "JSON mapping"), ("3", "JSON mapping")]
    texts += [("[" * 100_000, "nested too deeply"), ('{"x": ' + "[" * 400 + "]" * 400 + "}", "nested more than")]
    texts += [('{"n": ' + "9" * 5000 + "}", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON")]
    return [("results file", text, rf"results\.json'.*{said}") for text, said in texts]


def data() -> list[tuple]:
    """Files of samples."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        ("", "has no rows"),
        ("{", "rows.jsonl"),
        ("[]", "rows.jsonl"),
        ("3", "rows.jsonl"),
        ("null", "rows.jsonl"),
        ("[" * 5000, "rows.jsonl"),
        ('{"id": "a"}', "row 0 of 'rows.jsonl'.*'?a"),
        ('{"messages": 3}', "row 0 of 'rows.jsonl'"),
        ('{"messages": []}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [3]}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [{"role": "user"}]}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [{"content": "x"}]}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [{"role": 3, "content": "x"}]}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "row 0 of 'rows.jsonl'"),
        ('{"messages": [{"role": "user", "content": [{"type": "smell"}]}]}', "row 0 of 'rows.jsonl'"),
        ('{"conversations": [{"from": "human"}]}', "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": talk, "images": [3]}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": talk, "images": [{"bytes": "x"}]}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": talk, "images": [None, None]}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": talk, "videos": ["a.mp4"]}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": "[" * 5000}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"conversations": "[" * 5000}), "row 0 of 'rows.jsonl'"),
        (json.dumps({"messages": talk, "tools": "[" * 5000}), "row 0 of 'rows.jsonl'"),
        ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "rows.jsonl"),
        (b"\xff\xfe\xfd", "rows.jsonl"),
    ]
    return [("data file", text, said) for text, said in rows]


def checkpoints() -> list[tuple]:
    """Contents of a checkpoint's trainer_state.json."""
    texts = ("", "{", "[]", "3", "{}", '{"global_step": null}', '{"global_step": "3"}', '{"global_step": -5}')
    texts += ('{"global_step": 2.5}', '{"global_step": true}', '{"global_step": [3]}', "[" * 5000)
    rows = [("checkpoint", text, r"trainer_state\.json") for text in texts]
    llava = '{"model_type": "llava"'
    files = [
        *({"config.json": text} for text in ("", "{", "[]", "3", "{}", "[" * 5000, "NaN", b"\xff\xfe")),
        *({"config.json": f'{{"model_type": {kind}}}'} for kind in ('"llavva"', '"llama"', "3", "null", "[3]")),
        *({"config.json": f'{{"model_type": "llava", "text_config": {part}}}'} for part in ("3", '"x"', "[]")),
        *({"adapter_config.json": text} for text in ("", "{", "[]", "{}", "[" * 5000)),
        {"adapter_config.json": '{"base_model_name_or_path": 3}'},
        {"adapter_config.json": '{"base_model_name_or_path": "/nope"}'},
        {"config.json": llava + "}", "tokenizer.json": "{"},
        {"config.json": llava + "}", "tokenizer.json": "[]", "tokenizer_config.json": "3"},
        {"config.json": llava + "}", "processor_config.json": "["},
        {"config.json": llava + "}", "preprocessor_config.json": "[]"},
        {},
    ]
    return rows + [("checkpoint folder", contents, r"'run'|\brun\b") for contents in files]


class Bare(nn.Module):
    """A model of no family."""


def calls() -> list[tuple]:
    """Python's functions and constructors."""
    model, pruner = Bare(), AutoPruner.from_name("divprune")
    logits, counts, ids = (
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.int64),
        {"input_ids": torch.ones(1, 2).long()},
    )
    rows = [
        (ModeIsolator, {"length": 2.5, "hidden_size": 8}, "`length` must be a whole number, got 2.5"),
        (ModeIsolator, {"length": "4", "hidden_size": 8}, "`length` must be a whole number, got '4'"),
        (ModeIsolator, {"length": True, "hidden_size": 8}, "`length` must be a whole number, got True"),
        (ModeIsolator, {"length": -1, "hidden_size": 8}, "`length` must be in"),
        (ModeIsolator, {"length": 4, "hidden_size": 0}, "`hidden_size` must be in"),
        (ModeIsolator, {"length": 4, "hidden_size": None}, "`hidden_size` must be a whole number"),
        (ModeIsolator, {"length": 4, "hidden_size": 8, "std": NAN}, "`std` must be a finite number"),
        (ModeIsolator(4, 8).load_pretrained, {"folder": None}, "`folder` must be a text or of type Path"),
        (ModeIsolator(4, 8).save_pretrained, {"folder": 3}, "`folder` must be"),
        (ModeSchedule, {"ratio": "0.5"}, "`ratio` must be a finite number"),
        (ModeSchedule, {"ratio": NAN}, "`ratio` must be a finite number"),
        (ModeSchedule, {"kind": None}, "`kind` must be a text"),
        (ModeSchedule, {"seed": 1.5}, "`seed` must be a whole number"),
        (ModeSchedule, {"warmup_steps": -1}, "`warmup_steps` must be in"),
        (ModeSchedule, {"warmup_steps": "3"}, "`warmup_steps` must be a whole number"),
        (ModeSchedule, {"total_steps": 2.5}, "`total_steps` must be a whole number or None"),
        (AutoPruner.from_name, {"name": None}, "`name` must be a text, got None"),
        (AutoPruner.from_name, {"name": 3}, "`name` must be a text, got 3"),
        (AutoPruner.from_name, {"name": "divprun"}, "Did you mean 'divprune'"),
        (AutoPruner.from_pretrained, {"name": None}, "`name` must be a text"),
        (AutoPruner.from_pretrained, {"name": "x", "trust_remote_code": "yes"}, "`trust_remote_code` must be True"),
        (register_pruner, {"name": 3}, "`name` must be a text"),
        (type(pruner), {"config": None}, "`config` must be of type PrunerConfig"),
        (type(pruner), {"config": {"pruning_ratio": 0.5}}, "`config` must be of type PrunerConfig"),
        (prune_inputs, {"model": None, "inputs": {}, "pruner": pruner}, "`model` must be of type Module"),
        (prune_inputs, {"model": "m", "inputs": {}, "pruner": pruner}, "`model` must be of type Module"),
        (prune_inputs, {"model": model, "inputs": None, "pruner": pruner}, "`inputs` must be of type Mapping"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": "divprune"}, "`pruner` must be of type Pruner"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": pruner, "isolator": 4}, "`isolator` must be"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": pruner, "position_ids": None}, "`position_ids` must"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": pruner, "position_ids": "up"}, "`position_ids` must"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": pruner, "video_budget": "x"}, "`video_budget` must"),
        (prune_inputs, {"model": model, "inputs": {}, "pruner": pruner, "generator": 3}, "`generator` must be"),
        (prune_visual_tokens, {"model": model, "pruner": None}, "`pruner` must be of type Pruner"),
        (prune_visual_tokens, {"model": 3, "pruner": pruner}, "`model` must be of type Module"),
        (VisualTokens, {"features": [[[0.0]]]}, "`features` must be of type Tensor"),
        (VisualTokens, {"features": np.zeros((1, 2, 3))}, "`features` must be of type Tensor"),
        (VisualTokens, {"features": torch.zeros(2, 3)}, "`features` must be of shape"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "lengths": 2}, "`lengths` must be a list"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "valid": [[True]]}, "`valid` must be of type Tensor"),
        (PrunedPrompts, {"model": None, "pruner": pruner}, "`model` must be of type Module"),
        (MaskVisualLabels, {"collator": None, "visual_token_ids": [3]}, "`collator` must be of type Callable"),
        (MaskVisualLabels, {"collator": list, "visual_token_ids": 3}, "`visual_token_ids` must be a list"),
        (self_distillation_loss, {"student_logits": [[0.0]], "teacher_logits": logits}, "`student_logits` must be"),
        (self_distillation_loss, {"student_logits": logits, "teacher_logits": None}, "`teacher_logits` must be"),
        (
            self_distillation_loss,
            {"student_logits": logits, "teacher_logits": logits, "temperature": 0},
            "`temperature`",
        ),
        (self_distillation_loss, {"student_logits": logits, "teacher_logits": logits[:1]}, "must agree in shape"),
        (VisionLanguageCollator, {"processor": None}, "`processor` must be of type ProcessorMixin, got None"),
        (VisionLanguageCollator, {"processor": "m"}, "`processor` must be of type ProcessorMixin, got 'm'"),
        (collator, {"max_length": "32"}, "`max_length` must be a whole number or None, got '32'"),
        (collator, {"max_length": 2.5}, "`max_length` must be a whole number or None, got 2.5"),
        (collator, {"max_length": True}, "`max_length` must be a whole number or None, got True"),
        (collator, {"max_length": 0}, "`max_length` must be in"),
        (collator, {"long_samples": None}, "`long_samples` must be a text"),
        (collator, {"long_samples": "skip"}, "without a `max_length`"),
        (collator, {"unreadable_images": 3}, "`unreadable_images` must be a text"),
        (collator, {"image_folder": 3}, "`image_folder` must be a text or None"),
        (load_examples, {"path_or_name": None}, "`path_or_name` must be a text, got None"),
        (load_examples, {"path_or_name": 3}, "`path_or_name` must be a text"),
        (load_examples, {"path_or_name": "easy-vqa", "split": 3}, "`split` must be a text"),
        (load_examples, {"path_or_name": "easy-vqa", "split": None}, "`split` must be a text"),
        (load_examples, {"path_or_name": "easy-vqa", "split": "tset"}, "split"),
        (load_examples, {"path_or_name": "easy-vqa", "image_column": 3}, "`image_column` must be"),
        (load_examples, {"path_or_name": "easy-vqa", "image_column": [3]}, "`image_column` must be"),
        (load_examples, {"path_or_name": "none.json"}, "`path_or_name` names a file that does not exist"),
        (load_easy_vqa, {"split": None}, "`split` must be a text"),
        (load_questions, {"name": 3, "split": "test"}, "`name` must be a text"),
        (load_questions, {"name": "easy-vqa", "split": "test", "limit": 2.5}, "`limit` must be a whole number"),
        (load_questions, {"name": "easy-vqa", "split": "test", "limit": 0}, "`limit` must be in"),
        (check_samples, {"dataset": [], "collator": None}, "`collator` must be of type VisionLanguageCollator"),
        (find_checkpoint, {"name": None}, "`name` must be a text"),
        (find_checkpoint, {"name": "/nope"}, "`checkpoint` is '/nope'"),
        (answer_accuracy, {"model": None, "processor": None, "dataset": None}, "`model` must be of type"),
        (parse_recipe, {"argv": None}, "`argv` must be a list"),
        (parse_recipe, {"argv": "--seed 3"}, "`argv` must be a list"),
        (parse_recipe, {"argv": [3]}, "`argv` must be a list, each item a text"),
        (build_tiny_llava, {"texts": "words"}, "`texts` must be a list, each item a text, got 'words'"),
        (build_tiny_llava, {"texts": [3]}, r"`texts` must be a list, each item a text, got \[3\]"),
        (build_tiny_llava, {"texts": ["a"], "layers": 1.5}, "`layers` must be a whole number"),
        (build_tiny_llava, {"texts": ["a"], "seed": "0"}, "`seed` must be a whole number"),
        (read_results, {"folder": None}, "`folder` must be"),
        (write_results, {"output_dir": None, "results": {}}, "`output_dir` must be"),
        (write_results, {"output_dir": "x", "results": [3]}, "`results` must be a mapping"),
        (model_card, {"results": None}, "`results` must be a mapping, got None"),
        (model_card, {"results": "x"}, "`results` must be a mapping, got 'x'"),
        (write_model_card, {"folder": 3, "results": {}}, "`folder` must be"),
        (plot_learning_curve, {"log_history": None, "path": "x", "title": "t"}, "`log_history` must be a list"),
        (freeze_roles, {"model": None}, "`model` must be of type Module, got None"),
        (freeze_roles, {"model": "m"}, "`model` must be of type Module, got 'm'"),
        (freeze_roles, {"model": Bare}, "`model` must be of type Module"),
        (freeze_roles, {"model": model}, "`model` must be a vision-language model of transformers, got a Bare"),
        (freeze_roles, {"model": model, "train_projector": "yes"}, "`train_projector` must be True or False"),
        (check_inputs, {"inputs": {"input_ids": [[1]]}}, "`input_ids` must be of type Tensor or None"),
        (check_inputs, {"inputs": {"input_ids": torch.zeros(1, 2)}}, "`input_ids` of shape .* whole numbers"),
        (check_inputs, {"inputs": {**ids, "attention_mask": 3}}, "`attention_mask` must be of type Tensor or None"),
        (pruner, {"tokens": torch.zeros(1, 2, 3)}, "`tokens` must be VisualTokens, got a Tensor"),
        (pruner, {"tokens": None}, "`tokens` must be VisualTokens, got a NoneType"),
        (pruner.save_pretrained, {"folder": 3}, "`folder` must be"),
        (pruner.save_pretrained, {"folder": None}, "`folder` must be"),
        (register_pruner, {"name": ""}, "`name` must be a word of letters"),
        (register_pruner, {"name": "a/../b"}, "`name` must be a word of letters"),
        (register_pruner("own"), {"cls": 3}, "'own' must be a subclass of Pruner, got 3"),
        (register_pruner("own"), {"cls": object}, "'own' must be a subclass of Pruner"),
        (AutoPruner.from_pretrained, {"name": "a/b", "revision": 3}, "`revision` must be a text or None"),
        (AutoPruner.from_pretrained, {"name": "a/b", "token": 3}, "`token` must be .*, got a int"),
        (AutoPruner.from_pretrained, {"name": "a/b", "cache_dir": 3}, "`cache_dir` must be a text"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3, dtype=torch.int64)}, "`features` must hold floating-point"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "lengths": [3]}, "`lengths` must be 1 numbers from 0 to 2"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "lengths": [2, 2]}, "`lengths` must be 1 numbers from 0"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "lengths": [-1]}, "`lengths` must be 1 numbers from 0"),
        (VisualTokens, {"features": torch.zeros(1, 2, 3), "valid": torch.ones(1, 2)}, "`valid` must hold True and"),
        (self_distillation_loss, {"student_logits": counts, "teacher_logits": counts}, "`student_logits` must hold"),
        (load_examples, {"path_or_name": ""}, "`path_or_name` is '', which names no data set"),
        (load_examples, {"path_or_name": "/"}, "`path_or_name` is '/', which names no data set"),
        *(
            (DualSpeedTrainer, {"model": model, name: value}, f"`{name}` must be a")
            for name, values in {
                "processing_class": ["x", 3],
                "train_dataset": ["x", 3],
                "eval_dataset": ["x", 3, True],
                "data_collator": ["x"],
                "compute_metrics": [3],
                "callbacks": ["x", 3, [3], [object]],
                "optimizers": [3, (3,)],
            }.items()
            for value in values
        ),
        (DualSpeedTrainer, {"model": "m"}, "`model` must be"),
        (DualSpeedTrainer, {"model": 3}, "`model` must be"),
        (DualSpeedTrainer, {"model": model, "args": {}}, "`args` must be"),
        (DualSpeedTrainer, {"model": model, "args": "x"}, "`args` must be"),
        (DualSpeedTrainer, {"model": model, "pruner": "divprune"}, "`pruner` must be of type Pruner or None"),
    ]
    return [("call", (function, arguments), said) for function, arguments, said in rows]


# --- what is done with an input of each kind --------------------------------------------------------------------------


@cache
def processor():
    return tiny_llava_processor()


def collator(**options):
    return VisionLanguageCollator(processor(), **options)


def written(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def command(words: list[str], capsys) -> str:
    """The one line that a command ends with."""
    try:
        code = cli.main(words)
    except SystemExit as stop:  # the first word is no command
        return capsys.readouterr().err if stop.code == 2 else ""
    line = capsys.readouterr().err
    assert code != 0
    assert line.count("\n") == 1
    assert line.startswith("Error: ")
    return line


def rendered_file(given: tuple[str, str], capsys) -> None:
    kind, text = given
    path = written("found.json", text)
    if kind == "bench":
        bench_command.main(["--render-only", "--output", path])
    elif kind == "compare":
        compare = pytest.importorskip("benchmarks.compare.compare")
        compare.main(["--render-only", "--results", path])
    else:
        ablation = pytest.importorskip("benchmarks.ablation.ablation")
        ablation.main(["--render-only", "--output", path])


def sft_arguments(given: dict, capsys) -> object:
    pytest.importorskip("trl")
    from hf_dualspeed import DualSpeedSFTConfig

    return DualSpeedSFTConfig(**{"output_dir": "run", **given})


def isolator_file(contents: bytes, capsys) -> None:
    written("mode_isolator.safetensors", contents)
    saved_length(".")
    ModeIsolator(4, 8).load_pretrained(".")


def data_file(text: str | bytes, capsys) -> None:
    collator()(list(load_examples(written("rows.jsonl", text))))


def checkpoint(text: str, capsys) -> str | None:
    written("trainer_state.json", text)
    return fault_of(Path())


def checkpoint_folder(contents: dict, capsys) -> object:
    Path("run").mkdir()
    for name, text in contents.items():
        written(f"run/{name}", text)
    return find_checkpoint("run").processor()


REFUSE = {
    "recipe file": lambda text, capsys: parse_recipe(["--config", written("recipe.yaml", text)]),
    "recipe value": lambda line, capsys: parse_recipe(["--config", written("recipe.yaml", f"{BASE}{line}\n")]),
    "command": command,
    "rendered file": rendered_file,
    "training arguments": lambda given, capsys: DualSpeedTrainingArguments(**{"output_dir": "run", **given}),
    "SFT arguments": sft_arguments,
    "recipe arguments": lambda given, capsys: RecipeArguments(
        **{"model_name_or_path": "org/model", "dataset": "easy-vqa", **given}
    ),
    "pruner config": lambda given, capsys: PrunerConfig(**given),
    "pruner file": lambda text, capsys: AutoPruner.from_pretrained(
        str(Path(written("pruner_config.json", text)).parent)
    ),
    "isolator file": isolator_file,
    "results file": lambda text, capsys: read_results(Path(written("results.json", text)).parent),
    "data file": data_file,
    "checkpoint": checkpoint,
    "checkpoint folder": checkpoint_folder,
    "call": lambda given, capsys: given[0](**given[1]),
}
TABLE = [
    *recipe_files(),
    *recipe_values(),
    *commands(),
    *compared(),
    *training_arguments(),
    *recipe_arguments(),
    *pruner_configs(),
    *isolators(),
    *results(),
    *data(),
    *checkpoints(),
    *calls(),
]
refused: Counter = Counter()


def name_of(row: int) -> str:
    return f"{row}-{TABLE[row][0]}".replace(" ", "_")


@pytest.mark.parametrize("row", range(len(TABLE)), ids=name_of)
def test_malformed_input_is_refused_by_name(row, tmp_path, monkeypatch, capsys):
    kind, given, said = TABLE[row]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)
    try:
        error = REFUSE[kind](given, capsys)
        assert isinstance(error, str), f"accepted: {str(given)[:200]}"
    except (ValueError, OSError) as found:
        error = str(found)
    assert re.search(said, error, re.DOTALL), error
    assert "Traceback" not in error
    refused[kind] += 1


def test_the_table_is_long_and_none_of_it_was_accepted(request):
    """At least 300 inputs, no two alike, of every kind."""
    assert len(TABLE) >= 300
    assert len({repr(row) for row in TABLE}) == len(TABLE)
    total = Counter(kind for kind, _, _ in TABLE)
    assert total.keys() == REFUSE.keys()
    print(*(f"{kind}: {refused[kind]} of {count} refused" for kind, count in total.items()), sep="\n")
    ran = sum(
        f"{__name__.rpartition('.')[2]}.py::test_malformed_input" in item.nodeid for item in request.session.items
    )
    if ran == len(TABLE):  # not a choice of them
        assert {**refused} == {kind: count for kind, count in total.items() if kind in refused}
        assert total.keys() - refused.keys() <= {"SFT arguments"}  # skipped without TRL
