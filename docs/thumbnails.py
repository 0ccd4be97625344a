"""Make the small pictures of the README from the committed figures: `make thumbnails`."""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SIZE = (320, 200)  # pixels
# Of each notebook the figure that tells most, and the part that is shown: left, top, right and
# bottom edge as shares of the whole.
FIGURES = {
    "00_tour": ("tour_order_of_reveal", (0.0, 0.0, 1.0, 1.0)),
    "01_masked_diffusion": ("diffusion_paths", (0.5, 0.0, 1.0, 1.0)),
    "02_rewards": ("rewards_gamed", (0.0, 0.0, 1.0, 1.0)),
    "03_reward_curves": ("fig_4_1_reward_curves", (0.5, 0.07, 1.0, 0.485)),
    "04_kl_instability": ("kl_cured", (0.0, 0.075, 0.5, 0.49)),
    "05_estimator_lab": ("estimator_error", (0.0, 0.48, 0.5, 0.86)),
    "06_benchmark_tables": ("table_4_1", (0.0, 0.03, 0.5, 0.37)),
    "07_speed_vs_steps": ("fig_4_4_speed_vs_steps", (0.0, 0.07, 0.5, 1.0)),
    "08_block_rl": ("block_rl", (0.5, 0.06, 1.0, 0.385)),
    "09_value_guided": ("value_guided", (0.5, 0.08, 1.0, 1.0)),
    "10_hierarchy": ("hierarchy", (0.0, 0.06, 0.6, 0.53)),
    "11_reward_ablation": ("reward_ablation", (0.0, 0.09, 0.52, 0.9)),
    "12_code_completion": ("code_completion", (0.5, 0.065, 1.0, 0.5)),
    "13_dafny": ("dafny_rl", (0.5, 0.065, 1.0, 1.0)),
    "14_pass_at_k": ("fig_5_2_pass_at_k", (0.5, 0.045, 1.0, 0.5)),
    "15_unified_objective": ("unified_objective", (0.0, 0.04, 0.5, 0.47)),
    "16_starting_point": ("cold_start", (0.0, 0.05, 0.68, 0.5)),
    "17_few_steps": ("few_steps", (0.0, 0.13, 0.66, 1.0)),
}

if __name__ == "__main__":
    for notebook, (figure, part) in FIGURES.items():
        if not (path := ROOT / "figures" / f"{figure}.png").exists():
            print(f"{notebook}: no figures/{figure}.png yet, its picture stays as it is")
            continue
        whole = Image.open(path).convert("RGB")
        shown = whole.crop([round(s * e) for s, e in zip(part, 2 * whole.size, strict=True)])
        shown.thumbnail(SIZE, Image.Resampling.LANCZOS)
        picture = Image.new("RGB", SIZE, "white")
        picture.paste(shown, [(s - e) // 2 for s, e in zip(SIZE, shown.size, strict=True)])
        target = ROOT / "docs" / "thumbnails" / f"{notebook}.png"
        picture.quantize(128).save(target, optimize=True)
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} KB")
