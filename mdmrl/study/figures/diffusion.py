"""The tour, masked diffusion on a toy, and what the rewards pay: notebooks 00, 01 and 02."""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mdmrl.diffusion import posterior, transition_matrix
from mdmrl.study import plots
from mdmrl.study.colours import BLACK, GREY, MDM, PARTS, colour
from mdmrl.study.figures.registry import figure

MASK_SHOWN = "░"


@figure(
    "00_tour",
    "tour_order_of_reveal",
    says="The text appears roughly from left to right, though nothing tells the model to: the "
    "correlation of a position's place with the step of its reveal is {correlation}.",
    known=lambda reveals: {
        "correlation": f"{reveals[['position', 'step']].corr('spearman').iloc[0, 1]:.2f}"
    },
)
def tour_order_of_reveal(facts, reveals) -> Figure:
    drawn, (axes,) = plots.panels(1, height=2.6, columns=1)
    shade = {"c": reveals.p, "cmap": "viridis", "vmin": 0, "vmax": 1}
    points = axes.scatter(reveals.position, reveals.step, s=9, **shade)
    axes.axvline(reveals.counts.sum() - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="position in the completion (dotted: its end)", ylabel="step of reveal")
    drawn.colorbar(points, label="probability when revealed")
    said = "Order of reveal: {policy}, {steps} steps, temperature {temperature:g}"
    drawn.suptitle(said.format(**facts))
    return drawn


@figure(
    "01_masked_diffusion",
    "diffusion_schedules",
    says="Half of a text is hidden at t = {linear} (linear), {quadratic} (quadratic), {cosine} "
    "(cosine) and {geometric} (geometric); the loss of the limit depends on none of it.",
    known=lambda table: {
        name: f"{part.t[part.alpha < 0.5].iloc[0]:.2f}" for name, part in table.groupby("schedule")
    },
)
def diffusion_schedules(facts, table) -> Figure:
    said = {"alpha": (r"$\alpha_t$", "share still readable")}
    said["weight"] = (r"$-\alpha'_t\,/\,(1-\alpha_t)$", "weight in the loss")
    said["log-SNR"] = (r"log-SNR $\lambda_t$", "nats")
    names = table.schedule.unique()
    drawn, axes = plots.panels(3, height=2.2, columns=3)
    for axis, (column, (title, words)) in zip(axes, said.items(), strict=True):
        for name, shade in zip(names, plots.ramp(len(names)), strict=True):
            own = table[table.schedule == name]
            axis.plot(own.t, own[column], color=shade, label=name)
        axis.set(title=title, ylabel=words, xlabel="time t")
    axes[1].set(yscale="log", ylim=(0.05, 500))
    axes[2].set_ylim(-12, 12)
    plots.shared_legend(drawn, axes[0], columns=4)
    return drawn


@figure(
    "01_masked_diffusion",
    says="A masked token is revealed with probability (α_s - α_t) / (1 - α_t) and then drawn from "
    "μ, a categorical: the sums of its rows differ from 1 by {erratum_mu_categorical} at most.",
)
def diffusion_matrices(facts) -> Figure:
    alpha = [1.0, 0.75, 0.5, 0.25]
    mu = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    one, two, three = (transition_matrix(*pair, 3) for pair in pairwise(alpha))
    matrices = {"$Q_1$": one, "$Q_2$": two, "$Q_3$": three}
    matrices[r"$\bar{Q}_2 = Q_1 Q_2$"] = transition_matrix(1.0, alpha[2], 3)
    matrices[r"$\bar{Q}_3 = Q_1 Q_2 Q_3$"] = transition_matrix(1.0, alpha[3], 3)
    revealed = posterior(torch.arange(4), mu.expand(4, 4), alpha[2], alpha[3], 3)
    matrices[r"$p_\theta(x_s \mid x_t)$ from $t = 3/4$"] = revealed
    drawn, axes = plots.panels(6, height=1.9, columns=3)
    names = ["A", "B", "C", MASK_SHOWN]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        table = pd.DataFrame(matrix.numpy(), names, names)
        plots.cells(axis, table, table.map("{:.2g}".format), (0, 1), "Greys")
        axis.set(title=title, xlabel="to", ylabel="from", aspect="equal")
    return drawn


@figure(
    "01_masked_diffusion",
    "diffusion_paths",
    says="When a position is hidden follows the same law forwards and backwards, and at t = 1 all "
    "are: the share of [MASK] there is {erratum_prior}.",
)
def diffusion_paths(facts, paths) -> Figure:
    drawn, axes = plots.panels(2, height=2.3)
    said = {"forward": "forward: masked where u < t", "reverse": f"reverse: {facts['policy']}"}
    for axis, (column, title) in zip(axes, said.items(), strict=True):
        edges = [*paths.position, len(paths)], [*paths[column], paths[column].iloc[-1]]
        axis.fill_between(*edges, 1, step="post", color=MDM, linewidth=0)
        axis.set(title=title, xlabel="position (coloured: masked)", ylabel="time t", ylim=(0, 1))
        axis.margins(x=0)
        axis.spines[:].set_visible(True)
    return drawn


@figure(
    "01_masked_diffusion",
    "diffusion_elbo",
    says="Without its reconstruction term the bound is none: at 32 steps it still lies above log p "
    "by {erratum_reconstruction_term} nats a text.",
)
def diffusion_elbo(facts, elbo) -> Figure:
    drawn, axes = plots.panels(2, height=2.5)
    lines = {"log p": (BLACK, "-", "log p"), "ELBO": (colour("elbo"), "-", "ELBO")}
    lines["-L_T alone"] = (colour("elbo"), "--", "$-L_T$ alone")
    for axis, (title, part) in zip(axes, elbo.groupby("model", sort=False), strict=True):
        for column, (shade, style, name) in lines.items():
            axis.plot(part["T"], part[column], style, color=shade, marker=".", label=name)
        axis.axhline(part.limit.iloc[0], color=GREY, linestyle=":", label="limit $-L_\\infty$")
        low = part.ELBO.min()
        axis.set(title=title, ylabel="nats a text", ylim=(1.05 * low, -0.05 * low))
        plots.doubling(axis, part["T"], "steps T of the reverse process")
    plots.shared_legend(drawn, axes[0], columns=4)
    return drawn


@figure(
    "01_masked_diffusion",
    "diffusion_blocks",
    says="More blocks, a smaller gap; counting the divergence of the first step twice, as the "
    "thesis's sum does, loosens the bound by {erratum_double_count} nats a text.",
)
def diffusion_blocks(facts, blocks) -> Figure:
    drawn, axes = plots.panels(2, height=2.5)
    for axis, (name, part) in zip(axes, blocks.groupby("model", sort=False), strict=True):
        columns = part.columns[2:]
        for column, shade in zip(columns, plots.ramp(len(columns)), strict=True):
            axis.plot(part.blocks, part[column], marker=".", color=shade, label=column)
        # One letter a block: the autoregressive cross-entropy, at every T.
        level = part.limit[part.blocks.idxmax()]
        axis.axhline(level, color=colour("AR"), linestyle=":", label="autoregressive")
        axis.set(title=name, xlabel="number of blocks", ylabel="$L_{BD}$, nats a text")
        axis.set_xticks(part.blocks)
    plots.shared_legend(drawn, axes[0], columns=6)
    return drawn


@figure(
    "01_masked_diffusion",
    "diffusion_training",
    "diffusion_bounds",
    says="Trained, the exact loss comes within {left} nats a text of the entropy of the data, "
    "which is known before the first step.",
    known=lambda training, bounds: {
        "left": f"{training.exact.dropna().iloc[-1] - bounds.entropy.iloc[0]:.3f}"
    },
)
def diffusion_training(facts, training, bounds) -> Figure:
    drawn, (left, right) = plots.panels(2, height=2.5)
    left.plot(training.step, training.loss, color="0.75", linewidth=0.5, label="loss of a batch")
    points = training.dropna()
    left.plot(points.step, points.exact, color=MDM, marker=".", label="exact $L_\\infty$")
    left.set(xscale="log", xlabel="step", ylabel="nats a text", title="training")
    left.set_ylim(0, 1.2 * training.loss.iloc[0])
    for name, shade in {"log p": BLACK, "ELBO": colour("elbo")}.items():
        right.plot(bounds["T"], bounds[f"minus {name}"], marker=".", color=shade, label=f"-{name}")
    right.set(title="the trained model", ylabel="nats a text")
    plots.doubling(right, bounds["T"], "steps T of the reverse process")
    for axis in (left, right):
        axis.axhline(bounds.entropy[0], color=GREY, linestyle=":", label="entropy of the data")
        axis.legend()
    return drawn


@figure(
    "02_rewards",
    "rewards_examples",
    says="Fifty paragraph breaks earn {newlines} and an honest answer {honest}, of which "
    "similarity to the reference sets it {reward_accuracy_separates} above a wrong one.",
    known=lambda examples: {
        name: f"{examples.set_index('attack').reward[name]:.2f}" for name in ("newlines", "honest")
    },
)
def rewards_gamed(facts, examples) -> Figure:
    drawn, (axes,) = plots.panels(1, height=2.8, columns=1)
    left = np.zeros(len(examples))
    for part, shade in PARTS.items():
        axes.barh(examples.attack, examples[part], left=left, color=shade, label=part)
        left = left + examples[part]
    for y, exact in enumerate(examples.exact):
        axes.text(left[y] + 0.05, y, f"exact {exact:.0%}", va="center", fontsize=7)
    plots.rows(axes, examples.attack)
    axes.set_xlim(0, left.max() + 0.7)
    axes.set_xlabel(f"mean reward over {facts['prompts']} held-out questions")
    plots.shared_legend(drawn, axes)
    return drawn
