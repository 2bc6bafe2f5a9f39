"""Trains a tiny model in this process's world and writes what a test compares; started by accelerate or alone."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from head_cases import StandIn
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import FAMILIES
from torch.distributed.tensor import DTensor
from training import DATA, SAMPLES, history, make
from transformers import TrainerCallback

from hf_dualspeed import DualSpeedTrainer
from hf_dualspeed.trainer import fused_loss as head
from hf_dualspeed.trainer import speedup
from hf_dualspeed.utils.devices import gathered


class ShardedOnCpu(DualSpeedTrainer):
    """Accelerate turns FSDP on for accelerators only; what it then runs works over gloo as well."""

    def create_accelerator_and_postprocess(self):
        assert self.args.device.type == "cpu"  # sets the process group up
        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class PushFirst(TrainerCallback):
    """Waits for the push of a save before the next step, whose save would change the files that are being read."""

    def __init__(self, trainer: DualSpeedTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        pushing = getattr(self.trainer, "push_in_progress", None)
        if pushing is not None:
            pushing.wait_until_done()


class FastView(TrainerCallback):
    """Notes whether each optimizer step moves isolator or pruner."""

    def __init__(self, dual_forward):
        self.dual_forward, self.moved, self._before = dual_forward, [], []

    def values(self):
        with gathered(self.dual_forward.parameters()):
            own = [p.to_local() if isinstance(p, DTensor) else p for p in self.dual_forward.parameters()]
            return [p.detach().clone() for p in own]

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self.values()

    def on_step_end(self, args, state, control, **kwargs):
        self.moved.append(not all(map(torch.equal, self.values(), self._before)))


# What the training arguments say. DeepSpeed's own optimizer for CPUs needs a compiler.
KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
AUTOMATIC = {**dict.fromkeys(KEYS, "auto"), "zero_force_ds_cpu_optimizer": False}
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--family", default="llava")
    parser.add_argument("--images", action="store_true", help="leave samples without images out")
    parser.add_argument("--texts", action="store_true", help="leave samples with images out")
    parser.add_argument("--tower", action="store_true", help="train the vision tower")
    parser.add_argument("--shards", action="store_true", help="FSDP saves its checkpoints in shards")
    parser.add_argument("--all-used", action="store_true", help="tell DDP that every pass uses all parameters")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--by-length", action="store_true", help="group samples by lengths that the data set has")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-steps", type=int, default=6)
    parser.add_argument("--slow-warmup", type=int, default=0, help="the first steps, which are slow")
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--speedup-rounds", type=int, default=0)
    parser.add_argument("--pruner", default="divprune")
    parser.add_argument("--slow-mode-splits", default="1")
    parser.add_argument("--padding-free", action="store_true", help="fast steps in one row")
    parser.add_argument("--adaptive", action="store_true", help="slow steps that follow the losses")
    parser.add_argument("--evaluate", action="store_true", help="on the training samples, after training")
    parser.add_argument("--fused", action="store_true", help="the loss of fast steps by a stand-in for Liger's")
    parser.add_argument("--rooms", type=int, nargs="*", help="choose the batch by each rank's bytes of memory")
    parser.add_argument("--cache", help="the folder of vision features")
    parser.add_argument("--push", help="the Hub repo to push to at each save")
    parser.add_argument("--zero", type=json.loads, help="DeepSpeed's settings of ZeRO")
    parser.add_argument("--isolator-length", type=int, default=4)
    parser.add_argument("--adapters", action="store_true", help="train two of PEFT, one of them in fast steps alone")
    parser.add_argument("--fast-only", nargs="*", default=[])
    parser.add_argument("--slow-only", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.zero is not None:
        os.environ.update({key: value for key, value in ONE_PROCESS.items() if key not in os.environ})
    if options.shards:
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    speedup.STEPS_PER_ROUND = 10
    if options.fused:
        head.DEVICES, head.find_spec, head.fused_loss = ("cpu",), str, StandIn.apply
    model, _ = FAMILIES[options.family].build()
    # Frozen, as in fine-tuning: torch can't resume the optimizer of a sharded model whose parameters it has not
    # all stepped, and LLaVA never uses its tower's last layer.
    model.get_encoder(modality="image").requires_grad_(options.tower)
    if options.adapters:
        config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(model, config, adapter_name="shared")
        model.add_adapter("fast", config)
        model.base_model.set_adapter(["shared", "fast"])
        options.fast_only.append("*.fast.*")
    # Sharded layers are gathered by all ranks at once, so each rank's batch must reach the vision tower.
    data = [DATA[0], *(e for e in DATA[1:] if SAMPLES[e["index"]][1]), DATA[0]] if options.images else DATA
    data = [e for e in DATA if not SAMPLES[e["index"]][1]] * len(DATA) if options.texts else data
    if options.by_length:
        pictures = [[16] * len(SAMPLES[example["index"]][1]) for example in data]
        texts = [len(SAMPLES[example["index"]][0]) for example in data]
        lengths = zip(data, texts, pictures, strict=True)
        data = [{**e, "length": text + sum(visual), "visual_length": visual} for e, text, visual in lengths]
    trainer = make(
        options.out,
        options.family,
        ShardedOnCpu if os.environ.get("ACCELERATE_USE_FSDP") == "true" else DualSpeedTrainer,
        data=data,
        train_sampling_strategy="group_by_length" if options.by_length else "random",
        per_device_train_batch_size="auto" if options.rooms else options.batch,
        memory_gib=options.rooms[int(os.environ["RANK"])] / 2**30 if options.rooms else None,
        per_device_eval_batch_size=1,
        fused_head_loss="on" if options.fused else "auto",
        gradient_accumulation_steps=2,
        activation_checkpointing=options.checkpointing,
        ddp_find_unused_parameters=False if options.all_used else None,
        max_steps=options.max_steps,
        speedup_rounds=options.speedup_rounds,
        slow_mode_ratio=0.5,
        slow_warmup_steps=options.slow_warmup,
        mode_schedule="adaptive" if options.adaptive else "random",
        max_slow_mode_ratio=0.9,
        pruner=options.pruner,
        pruning_ratio=0.5,
        slow_mode_splits=options.slow_mode_splits,
        padding_free=options.padding_free,
        vision_feature_cache=options.cache,
        seed=1,
        deepspeed=None if options.zero is None else {**AUTOMATIC, "zero_optimization": options.zero},
        isolator_length=options.isolator_length,
        fast_only_parameters=options.fast_only,
        slow_only_parameters=options.slow_only,
        model=model,
        # With an epsilon this large Adam has a state to save, yet does not blow rounding noise up to full steps.
        adam_epsilon=1.0,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=options.save_steps,
        push_to_hub=options.push is not None,
        hub_model_id=options.push,
        hub_always_push=True,
    )
    trainer.add_callback(PushFirst(trainer))
    fast_view = FastView(trainer.dual_forward)
    trainer.add_callback(fast_view)
    trainer.processing_class = None  # Qwen's tiny processor lacks a video part, which saving asks for
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    if options.push:
        trainer.push_to_hub()
    trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    sharded = any(isinstance(p, DTensor) or not p.numel() for p in trained.values())
    with gathered(trained.values()):
        weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in trained.items()}
    # A mean over batches, here of one sample each.
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"] if options.evaluate else 0.0
    rank = trainer.args.process_index
    save_file(weights, options.out / f"rank{rank}.safetensors")
    report = {
        "world": trainer.args.world_size,
        "sharded": sharded,
        "moved": fast_view.moved,
        "ratios": trainer.adaptive_schedule.ratios if options.adaptive else [],
        "modes": [trainer.mode_at(step) for step in range(options.max_steps)],
        "steps": trainer.summary()["steps"],
        "record": trainer.record(),
        "size": trainer.size,
        "eval_loss": evaluated,
        "hit_rates": [rate for (rate,) in history(trainer, "vision_cache_hit_rate")],
        "history": history(trainer, "loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss"),
    }
    (options.out / f"rank{rank}.json").write_text(json.dumps(report))
    PartialState().destroy_process_group()  # whose threads may abort a process that ends with them


if __name__ == "__main__":
    main()
