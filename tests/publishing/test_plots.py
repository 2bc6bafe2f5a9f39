import pytest
from PIL import Image

from hf_dualspeed.publishing import plots
from hf_dualspeed.publishing.plots import plot_learning_curve

BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def colours(path):
    with Image.open(path) as image:
        return image.size, {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_all_curves_are_drawn(tmp_path):
    history = [
        {
            "step": step,
            "fast_loss": 2 / step,
            "slow_loss": 1.9 / step,
            "distillation_loss": 1 / step,
        }
        for step in range(1, 50)
    ]
    path = plot_learning_curve(history, tmp_path / "curve.png", "a run")
    size, found = colours(path)
    assert {BLUE, VERMILION, GREEN} <= found
    assert size[0] > 1000
    assert size[1] > 800


def test_missing_modes_and_other_entries_are_left_out(tmp_path):
    history = [
        {"step": 1, "fast_loss": 2.0},
        {"step": 2, "fast_loss": 1.0},
        {"step": 2, "train_runtime": 3.0},
    ]
    size, found = colours(plot_learning_curve(history, tmp_path / "curve.png", "a run"))
    assert BLUE in found
    assert not {VERMILION, GREEN} & found
    assert size[1] < 800


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"`log_history` holds no losses.*logging_steps"):
        plot_learning_curve([{"step": 1, "train_runtime": 3.0}], tmp_path / "curve.png", "a run")


def test_a_picture_says_model_size_hardware_and_date(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    results = {"model": "tiny", "parameters": {"trained": 1_200_000, "frozen": 300_000}, "date": "2026-11-28 10:42"}
    machines = ({"cpu": "EPYC", "accelerator": None}, {"cpu": "EPYC", "accelerator": "H100"})
    for machine in machines:
        plot_learning_curve(
            [{"step": 1, "fast_loss": 2.0}], tmp_path / "c.png", "a run", {**results, "machine": machine}
        )
    plot_learning_curve([{"step": 1, "fast_loss": 2.0}], tmp_path / "c.png", "a run")
    facts = ("tiny, 1.5 M parameters, EPYC, 2026-11-28", "tiny, 1.5 M parameters, H100, 2026-11-28", "")
    assert titles == [f"a run\n{words}".strip() for words in facts]
