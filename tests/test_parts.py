"""Schedule, isolator, distillation, parameter views and the layering."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_dualspeed
from hf_dualspeed import ModeIsolator, ModeSchedule, self_distillation_loss
from hf_dualspeed.distillation import supervised_cross_entropy
from hf_dualspeed.isolator import saved_length
from hf_dualspeed.parameter_views import ParameterViews

PACKAGE = Path(hf_dualspeed.__file__).parent


# --- schedule -----------------------------------------------------------------------------------------------------


def test_random_schedule_depends_on_seed_and_step_alone():
    modes = [ModeSchedule(0.1, seed=5).mode_at(s) for s in range(5000)]
    backwards = ModeSchedule(0.1, seed=5)
    assert [backwards.mode_at(s) for s in reversed(range(5000))] == modes[::-1]
    share = modes.count("slow") / 5000
    assert abs(share - 0.1) < 3 * math.sqrt(0.09 / 5000)
    assert modes != [ModeSchedule(0.1, seed=6).mode_at(s) for s in range(5000)]
    # Pinned: a changed generator would change what a resumed run does.
    assert [s for s in range(60) if ModeSchedule(0.1, seed=0).mode_at(s) == "slow"] == [
        14,
        15,
        21,
        28,
        33,
        35,
        51,
        57,
    ]


def test_periodic_warmup_and_tail():
    slow = lambda schedule, n: [s for s in range(n) if schedule.mode_at(s) == "slow"]  # noqa: E731
    assert slow(ModeSchedule(0.1, "periodic"), 40) == [9, 19, 29, 39]
    assert slow(ModeSchedule(0.34, "periodic"), 9) == [2, 5, 8]
    assert slow(ModeSchedule(0.0, "periodic"), 100) == slow(ModeSchedule(0.0), 100) == []
    assert slow(ModeSchedule(1.0, "periodic"), 5) == slow(ModeSchedule(1.0), 5) == [0, 1, 2, 3, 4]
    assert slow(ModeSchedule(0.0, warmup_steps=2, tail_ratio=0.3, total_steps=10), 10) == [0, 1, 7, 8, 9]
    assert slow(ModeSchedule(0.25, "periodic", tail_ratio=0.2, total_steps=10), 10) == [3, 7, 8, 9]


def test_periodic_ratio_that_is_no_fraction_of_one_warns(caplog):
    ModeSchedule(0.1, "periodic")
    assert not caplog.text
    ModeSchedule(0.7, "periodic")
    assert "slow every 1 step(s), a ratio of 1.00" in caplog.text


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match=r"`ratio` must be in \[0, 1\], got 1.5"):
        ModeSchedule(1.5)
    with pytest.raises(ValueError, match="`kind` must be one of 'random', 'periodic', 'growing', .*, got 'often'"):
        ModeSchedule(kind="often")
    with pytest.raises(ValueError, match="`tail_ratio` needs `total_steps`"):
        ModeSchedule(tail_ratio=0.1)


# --- distillation -------------------------------------------------------------------------------------------------


def test_distillation_by_hand():
    # Teacher (0.8, 0.2), student (0.5, 0.5): 0.8 ln 1.6 + 0.2 ln 0.4 = 0.19274...
    teacher, student = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert self_distillation_loss(student, teacher).item() == pytest.approx(by_hand)
    assert self_distillation_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)
    # Not symmetric: the teacher comes first in the divergence.
    assert self_distillation_loss(teacher, student).item() != pytest.approx(by_hand, rel=1e-2)
    twice = self_distillation_loss(student.repeat(2, 1), teacher.repeat(2, 1), num_items_in_batch=8)
    assert twice.item() == pytest.approx(by_hand * 2 / 8)
    # At temperature 2 the teacher is (2/3, 1/3) and the sum is multiplied by 4.
    warm = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert self_distillation_loss(student, teacher, temperature=2.0).item() == pytest.approx(warm)


def test_distillation_teaches_the_student_alone():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    self_distillation_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"`student_logits` \(3, 5\) and `teacher_logits` \(2, 5\) must agree"):
        self_distillation_loss(student, teacher[:2])
    low = self_distillation_loss(student.bfloat16(), teacher.bfloat16())
    assert low.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 16, 50])
def test_distillation_in_slices_is_that_of_the_whole(monkeypatch, temperature, dtype, vocabulary):
    monkeypatch.setattr("hf_dualspeed.distillation.VOCABULARY_SLICE", 16)
    torch.manual_seed(0)
    student = (3 * torch.randn(9, vocabulary)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(9, vocabulary)).to(dtype)
    self_distillation_loss(student, teacher, temperature, num_items_in_batch=4).mul(3).backward()
    again = student.detach().clone().requires_grad_()
    logs = [F.log_softmax(logits.double() / temperature, -1) for logits in (again, teacher)]
    expected = F.kl_div(*logs, log_target=True, reduction="sum") * temperature**2 / 4
    expected.mul(3).backward()
    sliced = self_distillation_loss(student, teacher, temperature, num_items_in_batch=4)
    torch.testing.assert_close(sliced.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, again.grad)


class Float32Sizes(TorchDispatchMode):
    """Notes the elements of each float32 tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out._base is None:
            self.made.append(out.numel())
        return out


def test_distillation_keeps_no_further_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr("hf_dualspeed.distillation.VOCABULARY_SLICE", 8)
    student, teacher = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Float32Sizes() as sizes:
        self_distillation_loss(student, teacher.bfloat16()).backward()
    assert max(sizes.made) < student.numel()
    assert sum(t.numel() for t in kept) == 2 * student.numel() + 2 * len(student)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 50])
def test_cross_entropy_in_slices_is_that_of_the_whole(smoothing, dtype, rows):
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, 37)).to(dtype).requires_grad_()
    targets = torch.randint(37, (rows,))
    sliced = supervised_cross_entropy(logits, targets, 4, smoothing)
    sliced.mul(3).backward()
    again = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(again.double(), targets, reduction="sum", label_smoothing=smoothing) / 4
    expected.mul(3).backward()
    torch.testing.assert_close(sliced.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, again.grad)
    assert logits.grad.dtype == dtype


def test_cross_entropy_keeps_no_further_copy_of_the_logits():
    logits, targets = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True), torch.randint(32, (64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Float32Sizes() as sizes:
        supervised_cross_entropy(logits, targets, label_smoothing=0.1).backward()
    assert max(sizes.made) < logits.numel() / 8
    assert sum(t.numel() for t in kept) == logits.numel() + len(targets)


def test_losses_of_nothing_are_zero_and_reach_the_graph():
    logits = torch.zeros(0, 7, requires_grad=True)
    for items in (None, 0, torch.tensor(0)):
        loss = supervised_cross_entropy(logits, torch.zeros(0, dtype=torch.long), items)
        loss = loss + self_distillation_loss(logits, logits, num_items_in_batch=items)
        assert loss.item() == 0.0
        loss.backward()


# --- isolator -----------------------------------------------------------------------------------------------------


def test_isolator_has_the_models_width_and_scale_and_round_trips(tmp_path):
    model, _ = FAMILIES["llava"].build()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    isolator = ModeIsolator.for_model(model, 64)
    assert isolator().shape == (64, 32)
    scale = model.get_input_embeddings().weight.std().item()
    assert isolator.prompt.std().item() == pytest.approx(scale, rel=0.1)
    isolator.save_pretrained(tmp_path)
    assert saved_length(tmp_path) == 64
    other = ModeIsolator(64, 32)
    other.load_pretrained(tmp_path)
    assert torch.equal(other.prompt, isolator.prompt)
    with pytest.raises(ValueError, match=r"`isolator_length` is 3 .* length 64 .* Set isolator_length=64"):
        ModeIsolator(3, 32).load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No mode_isolator\.safetensors"):
        other.load_pretrained(tmp_path / "elsewhere")
    assert saved_length(tmp_path / "elsewhere") is None


# --- parameter views ----------------------------------------------------------------------------------------------


def test_views_drop_the_gradients_of_the_other_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    views = ParameterViews(model, ["0.*"], ["1.weight"])
    assert views.names == {"fast": {"0.weight", "0.bias"}, "slow": {"1.weight"}}
    for mode, expected in (("fast", {"1.weight"}), ("slow", {"0.weight", "0.bias"})):
        model(torch.ones(1, 2)).sum().backward()
        views.drop_gradients(mode)
        assert {n for n, p in model.named_parameters() if p.grad is None} == expected
        model.zero_grad()


# --- layers -------------------------------------------------------------------------------------------------------

# Lowest first; a module may import from its own layer and from those below.
LAYERS = [
    {"arguments", "attention_capture", "shortening", "containers", "cards", "host_waits", "hub_io"},
    {
        "pruners",
        "isolator",
        "schedule",
        "distillation",
        "parameter_views",
        "adapters",
        "easy_vqa",
        "fashion_grid",
        "examples",
        "data",
        "label_spans",
        "tiny_llava",
        "dinov2_onnx",
        "wheels",
        "evaluation",
        "metrics",
        "predictions",
        "model_card",
        "model_roles",
        "plots",
        "callbacks",
        "recomputation",
        "recipe_arguments",
        "results",
        "sample_lengths",
        "feature_store",
        "tower_call",
        "tower_outputs",
    },
    {
        "families",
        "protocol",
        "layout",
        "instructions",
        "encoding",
        "feature_cache",
        "packing",
        "proportional_attention",
        "layer_arguments",
        "layer_pass",
        "fast_pass",
        "batch_parts",
        "head",
        "mode_pass",
    },
    {
        "trainer",
        "adaptive_schedule",
        "checkpoints",
        "plain_evaluation",
        "publishing",
        "speedup",
        "sft",
        "length_batches",
        "conformance",
    },
    {
        "recipe",
        "publish",
        "published_files",
        "compare",
        "compare_report",
        "ablation",
        "ablation_plan",
        "ablation_pretraining",
        "ablation_report",
        "ablation_task",
        "ablation_text",
        "push_pruner",
        "push_metric",
        "evaluate_command",
        "evaluation_data",
        "evaluation_model",
        "pruned_prompts",
        "kept_tokens",
        "bench",
        "bench_arguments",
        "bench_cached",
        "bench_flops",
        "bench_growth",
        "bench_lengths",
        "bench_memory",
        "bench_plots",
        "bench_profile",
        "bench_report",
        "bench_shapes",
        "assemble",
        "check",
        "space",
        "cli",
        "__init__",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.parent.relative_to(PACKAGE).parts
                base = ".".join(["hf_dualspeed", *package[: len(package) - node.level + 1], *base.split(".")])
            names = [base] if base.strip(".") != "hf_dualspeed" else [f"hf_dualspeed.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts = [n.strip(".").split(".") for n in names]
        found |= {p[1] for p in parts if p[0] == "hf_dualspeed" and len(p) > 1}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"put {own} in a layer, here and in CONTRIBUTING.md"
    for name in imported(path):
        if name in LEVEL:
            assert LEVEL[name] <= LEVEL[own], f"{own} imports {name}, which lies above it"


def test_pruners_know_nothing_of_the_rest():
    allowed = {"arguments", "shortening", "hub_io", "cards", "pruners"}
    for path in (PACKAGE / "pruners").glob("*.py"):
        assert imported(path) <= allowed, path.name
